"""Checkpoints: what comes back is what was saved, bit for bit, and what does not fit raises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ttt_kernels as ttt

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

IDS = tiny_models.ids(2, 30)
WEIGHTS = "model.safetensors"
PROJ, CONV = "model.layers.{}.mlp.ttt_proj.weight", "model.layers.{}.mlp.ttt_conv.weight"
CONFIGS = {
    "sgd": {},
    "specnorm": {"inner_optimizer": "specnorm", "preserve_row_norm": True, "lr": 0.3},
    "clip": {"inner_optimizer": "clip", "max_norm": 0.7, "horizon": 2, "proj_init": "small"},
    "conv": {"target": "conv", "target_source": "input_embed", "proj_init": "identity"},
    "no_proj": {"use_proj": False},
    "conv_no_proj": {"target": "conv", "use_proj": False, "lr": 0.01},
}


def same(a: nn.Module, b: nn.Module) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


def fields(model: nn.Module) -> dict[str, object]:
    return {n: v for n, v in vars(model.config).items() if n.startswith("ttt_")}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = tiny_models.patched()
    ttt.save_pretrained(model, tmp_path / "checkpoint")
    return model, tmp_path / "checkpoint"


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_round_trip_of_every_family(family: str, tmp_path: Path) -> None:
    model = tiny_models.patched(family)
    model.generation_config.temperature, model.generation_config.do_sample = 0.625, True
    ttt.save_pretrained(model, tmp_path)
    again = ttt.from_pretrained(tmp_path)
    same(model, again)
    assert type(again) is type(model)
    assert fields(again) == fields(model)
    assert again.generation_config.temperature == 0.625
    assert not any(module.training for module in again.modules())
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(again.generate(IDS, **options), model.generate(IDS, **options))


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_of_every_configuration(name: str, tmp_path: Path) -> None:
    cfg = tiny_models.config(**CONFIGS[name])
    model = tiny_models.patched(cfg=cfg)
    ttt.save_pretrained(model, tmp_path)
    again = ttt.from_pretrained(tmp_path)
    same(model, again)
    assert ttt.patch_model(again).config == cfg
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_dtypes_and_tied_embeddings(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = tiny_models.patched(tie_word_embeddings=tied)
    for parameter in model.parameters():  # buffers stay float32, as in a loaded model
        parameter.data = parameter.data.to(dtype)
    ttt.save_pretrained(model, tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2 and PROJ.format(2) in index
    assert not (tmp_path / WEIGHTS).exists()
    again = ttt.from_pretrained(tmp_path)
    same(model, again)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_inner_model(tmp_path: Path) -> None:
    inner = tiny_models.patched("qwen3").model
    ttt.save_pretrained(inner, tmp_path)
    assert "layers.0.mlp.ttt_proj.weight" in load_file(tmp_path / WEIGHTS)
    again = ttt.from_pretrained(tmp_path)
    same(inner, again)
    assert type(again) is type(inner)
    assert torch.equal(again(IDS).last_hidden_state, inner(IDS).last_hidden_state)


def test_a_loaded_model_trains_unpatches_and_saves_again(saved, tmp_path: Path) -> None:
    model, path = saved
    again = ttt.from_pretrained(path)
    again.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in again.parameters())
    ttt.save_pretrained(again.eval(), path)  # over the checkpoint it came from
    same(model, ttt.from_pretrained(path))
    ttt.unpatch_model(again)
    assert torch.equal(again(IDS).logits, tiny_models.build()(IDS).logits)


def test_what_transformers_itself_saves_and_loads(tmp_path: Path) -> None:
    model = tiny_models.patched()
    model.save_pretrained(tmp_path)  # as the Trainer does
    same(model, ttt.from_pretrained(tmp_path))
    stock = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not tiny_models.fast_mlps(stock)  # no error: fast weights are left out, as documented
    assert torch.equal(stock(IDS).logits, tiny_models.build()(IDS).logits)


NTP_FIELDS = {
    "ttt_mode": True, "ttt_layers": [0, 2], "ttt_chunk": 8, "ttt_lr": 0.3, "ttt_proj": True,
    "ttt_proj_init": "diag_shared", "ttt_conv": False, "ttt_predict_mode": "next",
    "ttt_target": "hidden_states", "ttt_norm_preserve": True, "ttt_inner_opt": "specnorm",
}  # fmt: skip
IN_PLACE_FIELDS = {
    "ttt_mode": True, "ttt_layers": "[0, 2]", "ttt_chunk": 8, "ttt_lr": 2.0, "ttt_proj": True,
    "ttt_target": "hidden_states",
}  # fmt: skip
RELEASED = {
    "ntp": (NTP_FIELDS, {"inner_optimizer": "specnorm", "preserve_row_norm": True, "lr": 0.3}),
    "in_place": (IN_PLACE_FIELDS, {"target": "conv"}),
}


def write_released(folder: Path, ttt_fields: dict, tensors: dict[str, Tensor], shards: int) -> None:
    """A checkpoint as the released code leaves it, without any of ours."""
    folder.mkdir()
    config = json.loads(tiny_models.build().config.to_json_string(use_diff=False))
    config |= {"architectures": ["LlamaForCausalLM"], **ttt_fields}
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        return
    places = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(names)}
    for place in set(places.values()):
        part = {n: tensors[n] for n in names if places[n] == place}
        save_file(part, folder / place, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("release", RELEASED)
def test_the_released_layouts(release: str, shards: int, tmp_path: Path) -> None:
    ttt_fields, changes = RELEASED[release]
    tensors = state(tiny_models.build())
    parts = {PROJ: (64, 64), CONV: (64, 1, 5)} if release == "in_place" else {PROJ: (64, 64)}
    for i, (name, shape) in enumerate(parts.items()):
        for layer in (0, 2):
            tensors[name.format(layer)] = 0.05 * torch.randn(shape, generator=_seed(10 * i + layer))
    write_released(tmp_path / "released", ttt_fields, tensors, shards)
    model = ttt.from_pretrained(tmp_path / "released")
    cfg = tiny_models.config(**changes)
    assert ttt.patch_model(model).config == cfg
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    by_hand = tiny_models.build()
    ttt.patch_model(by_hand, cfg)
    by_hand.load_state_dict(tensors)
    assert torch.equal(model(IDS).logits, by_hand(IDS).logits)
    assert not torch.equal(model(IDS).logits, tiny_models.build()(IDS).logits)


def _seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_a_released_layer_that_does_not_exist_needs_cfg(tmp_path: Path) -> None:
    tensors = state(tiny_models.patched(cfg=tiny_models.config(target="conv")))
    write_released(tmp_path / "r", {**IN_PLACE_FIELDS, "ttt_layers": [0, 2, 36]}, tensors, 1)
    with pytest.raises(ValueError, match=r"within 0\.\.3.*got \[36\]"):
        ttt.from_pretrained(tmp_path / "r")
    cfg = tiny_models.config(target="conv")
    assert fields(ttt.from_pretrained(tmp_path / "r", cfg))["ttt_layers"] == [0, 2]


def _without(name: str):
    return lambda tensors: tensors.pop(name)


def _with(name: str, *shape: int):
    return lambda tensors: tensors.update({name: torch.ones(shape)})


DAMAGE = {
    "no projection": (_without(PROJ.format(2)), f"missing: {PROJ.format(2)}$"),
    "a projection too many": (_with(PROJ.format(1), 64, 64), f"unexpected: {PROJ.format(1)}$"),
    "a convolution too many": (_with(CONV.format(0), 64, 1, 5), f"unexpected: {CONV.format(0)}$"),
    "projection of another shape": (_with(PROJ.format(0), 64, 32), f"shape: {PROJ.format(0)}$"),
    "no backbone weight": (_without("model.norm.weight"), "missing: model.norm.weight$"),
    "no down_proj": (
        _without("model.layers.2.mlp.down_proj.weight"),
        "missing: model.layers.2.mlp.down_proj.weight$",
    ),
    "a weight too many": (
        _with("model.layers.0.mlp.down_proj.bias", 64),
        "unexpected: model.layers.0.mlp.down_proj.bias$",
    ),
    "backbone weight of another shape": (_with("lm_head.weight", 98, 32), "shape: lm_head.weight$"),
    "renamed": (
        lambda tensors: tensors.update(extra=tensors.pop(PROJ.format(0))),
        f"missing: {PROJ.format(0)}; unexpected: extra$",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_name_their_keys(damage: str, saved) -> None:
    _, path = saved
    edit, message = DAMAGE[damage]
    tensors = load_file(path / WEIGHTS)
    edit(tensors)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=f"exactly the model's keys, got .*{message}"):
        ttt.from_pretrained(path)


def test_a_lost_shard_raises(tmp_path: Path) -> None:
    ttt.save_pretrained(tiny_models.patched(), tmp_path, max_shard_size="50KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises((OSError, ValueError)):
        ttt.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"ttt_mode": False}, "ttt_mode must be true"),
        ({"ttt_chunk": None}, "missing: ttt_chunk"),
        ({"ttt_colour": 1}, "unknown field.*ttt_colour"),
        ({"ttt_layers": [0, 4]}, r"within 0\.\.3.*got \[4\]"),
        ({"ttt_layers": [0]}, f"unexpected: {PROJ.format(2)}"),
        ({"ttt_layers": [0, 1, 2]}, f"missing: {PROJ.format(1)}"),
        ({"ttt_conv": True, "ttt_predict_mode": None}, f"missing: {CONV.format(0)}"),
    ],
)
def test_configs_that_do_not_fit(saved, changes: dict, expected: str) -> None:
    _, path = saved
    config = json.loads((path / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=expected):
        ttt.from_pretrained(path)


def test_loading_what_is_no_checkpoint_with_fast_weights(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):  # 4.57: ValueError
        ttt.from_pretrained(tmp_path)
    tiny_models.build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have ttt_mode"):
        ttt.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"missing: {PROJ.format(0)}, {PROJ.format(2)}$"):
        ttt.from_pretrained(tmp_path, tiny_models.config())
    other = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32)
    transformers.GPT2LMHeadModel(other).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(TypeError, match="supported family"):
        ttt.from_pretrained(tmp_path / "gpt2", tiny_models.config())


def test_options_go_to_transformers(saved) -> None:
    _, path = saved
    half = ttt.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.config._attn_implementation == "eager"
    changed = ttt.from_pretrained(path, use_cache=False, ttt_lr=0.5)  # fields of the config
    assert not changed.config.use_cache and changed.model.layers[0].mlp.rule.lr == 0.5
    config = transformers.AutoConfig.from_pretrained(path)
    config.ttt_chunk = 4
    assert ttt.from_pretrained(path, config=config).model.layers[0].mlp.rule.chunk_size == 4
    for name in ("output_loading_info", "ignore_mismatched_sizes"):
        with pytest.raises(TypeError, match=f"must not hold {name}"):
            ttt.from_pretrained(path, **{name: True})


def test_a_name_on_the_hub(tmp_path: Path) -> None:
    """From its cache, in the layout of huggingface_hub: a branch and a folder of a repository."""
    commit, repository = "0" * 40, tmp_path / "models--someone--fast"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "long").write_text(commit)
    model = tiny_models.patched()
    ttt.save_pretrained(model, repository / "snapshots" / commit / "weights")
    options = {"cache_dir": tmp_path, "local_files_only": True, "revision": "long"}
    same(model, ttt.from_pretrained("someone/fast", subfolder="weights", **options))
    with pytest.raises(OSError):
        ttt.from_pretrained("someone/fast", **options)


def test_device_map_and_offloading(saved, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, path = saved
    whole = ttt.from_pretrained(path, device_map="cpu")
    same(model, whole)
    ttt.unpatch_model(whole)
    parts = ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb")
    places = dict.fromkeys((*parts, "model.layers.1", "model.layers.3"), "cpu")
    places |= {"model.layers.0": "disk", "model.layers.2": "disk"}
    away = ttt.from_pretrained(path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert away.model.layers[0].mlp.ttt_proj.weight.is_meta
    assert torch.equal(away(IDS).logits, model(IDS).logits)
    options = {"max_new_tokens": 12, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(away.generate(IDS, **options), model.generate(IDS, **options))
    ttt.save_pretrained(away, tmp_path / "again")
    same(model, ttt.from_pretrained(tmp_path / "again"))
    ttt.save_projections(model, tmp_path / "p.safetensors")
    for use in (ttt.save_projections, ttt.load_projections):
        with pytest.raises(ValueError, match="meta device or offloaded"):
            use(away, tmp_path / "p.safetensors")
    with pytest.raises(RuntimeError, match="layer 0: down_proj carries offloading hooks"):
        ttt.unpatch_model(away)


def test_adapters_in_the_folder_are_refused(saved) -> None:
    _, path = saved
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(path), "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match=r"must be without adapters, got adapter_config\.json"):
        ttt.from_pretrained(path)


def test_quantised_down_projections_are_refused(saved) -> None:
    quantizers = pytest.importorskip("transformers.quantizers")
    config_class = _toy_quantisation(quantizers)
    _, path = saved
    with pytest.raises(ValueError, match="layer 0: down_proj must stay .* got ToyLinear of Parameter"):
        ttt.from_pretrained(path, quantization_config=config_class(skip=()))
    kept = ttt.from_pretrained(path, quantization_config=config_class(skip=("down_proj",)))
    assert type(kept.model.layers[0].mlp.gate_proj).__name__ == "ToyLinear"
    assert kept(IDS).logits.isfinite().all()


def _toy_quantisation(quantizers) -> type:
    """A stand-in for any quantiser that replaces linear layers while a model is loaded."""
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class ToyConfig(QuantizationConfigMixin):
        def __init__(self, skip=(), **kwargs) -> None:
            self.quant_method, self.skip = "toy", skip

    class ToyLinear(nn.Linear):
        pass

    class ToyQuantizer(quantizers.HfQuantizer):
        requires_calibration = False
        is_trainable = is_serializable = False

        def _process_model_before_weight_loading(self, model, **kwargs) -> None:
            for module in list(model.modules()):
                for name, linear in list(module.named_children()):
                    if isinstance(linear, nn.Linear) and name not in self.quantization_config.skip:
                        toy = ToyLinear.__new__(ToyLinear)
                        toy.__dict__ = linear.__dict__
                        setattr(module, name, toy)

        def _process_model_after_weight_loading(self, model, **kwargs) -> None:
            pass

    if "toy" not in quantizers.auto.AUTO_QUANTIZER_MAPPING:
        quantizers.auto.register_quantizer("toy")(ToyQuantizer)
        quantizers.auto.register_quantization_config("toy")(ToyConfig)
    return quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING["toy"]
