"""`patch_model` and `unpatch_model`: what changes, what comes back, and what is refused first."""

import copy
import dataclasses
import pickle

import pytest
import tiny_models as tiny
import torch
from torch import nn

import ttt_kernels as ttt


def snapshot(model: nn.Module) -> dict:
    """Everything patching could touch: modules and parameters by identity, config by value."""
    modules = dict(model.named_modules())
    hooks = {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in modules.items()}
    return {
        "modules": {n: id(m) for n, m in modules.items()},
        "parameters": {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()},
        "hooks": hooks,
        "config": copy.deepcopy(vars(model.config)),
        "attributes": {n: sorted(m.__dict__) for n, m in modules.items()},
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    for key in ("modules", "hooks", "config", "attributes"):
        assert after[key] == before[key], key
    assert after["parameters"].keys() == before["parameters"].keys()
    for name, (identity, value) in before["parameters"].items():
        assert after["parameters"][name][0] == identity, name
        assert torch.equal(after["parameters"][name][1], value), name


@torch.no_grad()
def logits(model: nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(x, **kwargs).logits


@pytest.mark.parametrize(
    "family, bias", [*((f, {}) for f in tiny.FAMILIES), ("llama", {"mlp_bias": True})]
)
def test_zero_projection_changes_no_bit(family, bias):
    """Dense rows whose blocks the GEMM library treats alike: 64 tokens in chunks of 16."""
    model, x = tiny.build(family, **bias), tiny.ids(2, 64)
    before = logits(model, x)
    ttt.patch_model(model, tiny.config(chunk_size=16))
    for mlp in tiny.fast_mlps(model):
        nn.init.zeros_(mlp.ttt_proj.weight)
    assert torch.equal(logits(model, x), before)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_unpatching_restores_every_bit(family):
    model, x = tiny.build(family), tiny.ids(2, 45)
    state, before = snapshot(model), logits(model, x)
    ttt.patch_model(model, tiny.config())
    changed = logits(model, x)
    assert torch.equal(changed[:, : tiny.CHUNK], before[:, : tiny.CHUNK])
    assert not torch.equal(changed[:, tiny.CHUNK :], before[:, tiny.CHUNK :])
    ttt.unpatch_model(model)
    assert_unchanged(model, state)
    assert torch.equal(logits(model, x), before)


def test_unpatching_keeps_training_and_mode():
    model = tiny.patched()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    weight = model.model.layers[0].mlp.down_proj.weight
    model.train()
    ttt.unpatch_model(model)
    mlp = model.model.layers[0].mlp
    assert mlp.down_proj.weight is weight and type(mlp.down_proj) is nn.Linear
    assert mlp.training and all(m.training for m in model.modules())


def test_config_fields_come_and_go():
    model = tiny.build()
    model.config.ttt_mode, model.config.ttt_layers = True, "[1]"
    model.config.ttt_chunk, model.config.ttt_lr = 16, 0.1
    before = snapshot(model)
    assert ttt.patch_model(model, tiny.config()).config == tiny.config()
    assert ttt.TTTConfig.from_hf_config(model.config) == tiny.config()
    ttt.unpatch_model(model)
    assert_unchanged(model, before)
    report = ttt.patch_model(model)
    assert report.config == ttt.TTTConfig(layers=(1,), chunk_size=16, lr=0.1, target="conv")


def test_config_is_saved_with_the_model(tmp_path):
    model = tiny.patched()
    model.save_pretrained(tmp_path)
    loaded = type(model.config).from_pretrained(tmp_path)
    assert ttt.TTTConfig.from_hf_config(loaded) == tiny.config()


def test_patching_twice():
    model = tiny.build()
    report = ttt.patch_model(model, tiny.config())
    state = snapshot(model)
    assert ttt.patch_model(model, tiny.config()) is report
    assert ttt.patch_model(model.model, tiny.config(lr=2)) is report
    assert ttt.patch_model(model) is report
    with pytest.raises(ValueError, match=r"already in force .*lr=2.0.*got .*lr=1.0"):
        ttt.patch_model(model, tiny.config(lr=1.0))
    assert_unchanged(model, state)


def test_inner_model_can_be_patched():
    model, other, x = tiny.build().model, tiny.build(), tiny.ids(2, 20)
    report = ttt.patch_model(model, tiny.config())
    assert report == ttt.patch_model(other, tiny.config())
    with torch.no_grad():
        assert torch.equal(model(x)[0], other.model(x)[0])
        assert torch.equal(model(x)[0], model(input_ids=x)[0])
    ttt.unpatch_model(model)


def test_other_heads_can_be_patched():
    import transformers

    inner = tiny.build()
    model = transformers.LlamaForSequenceClassification(inner.config).eval()
    with torch.no_grad():
        before = model(tiny.ids(2, 20)).logits
        assert ttt.patch_model(model, tiny.config()).family == "llama"
        assert not torch.equal(model(tiny.ids(2, 20)).logits, before)
    ttt.unpatch_model(model)


def test_keys_and_parameters_added():
    model = tiny.build()
    before = set(model.state_dict())
    report = ttt.patch_model(model, tiny.config(target="conv"))
    added = {f"model.layers.{i}.mlp.ttt_{p}.weight" for i in tiny.LAYERS for p in ("proj", "conv")}
    assert set(model.state_dict()) - before == added and before < set(model.state_dict())
    assert report.parameters_added == 2 * (64 * 64 + 64 * 5)
    ttt.unpatch_model(model)
    ttt.patch_model(model, tiny.config(use_proj=False))
    assert set(model.state_dict()) == before


def test_report():
    report = ttt.patch_model(tiny.build().bfloat16(), tiny.config())
    assert dataclasses.replace(report) == report
    assert (report.family, report.num_layers, report.dtype) == ("llama", 4, torch.bfloat16)
    assert (report.hidden_size, report.intermediate_size) == (64, 128)
    assert report.state_bytes == 2 * 64 * 128 * 4
    text = str(report)
    for part in (
        "llama, bfloat16",
        "0, 2 of 4",
        "64 x 128",
        "every 8 tokens, sgd, lr 2",
        "8,192 add",
    ):
        assert part in text
    assert ttt.patch_model(tiny.build().double(), tiny.config()).state_bytes == 2 * 64 * 128 * 8


def test_initial_projections():
    def weights(init, dtype=torch.float32):
        model = tiny.build().to(dtype)
        ttt.patch_model(model, tiny.config(proj_init=init))
        return [m.ttt_proj.weight.detach() for m in tiny.fast_mlps(model)]

    a, b = weights("diag_shared")
    generator = torch.Generator().manual_seed(1234567)
    assert torch.equal(a, torch.diag(0.02 * torch.randn(64, generator=generator)))
    assert torch.equal(a, b)
    a, b = weights("small")
    assert not torch.equal(a, b) and (a != 0).all()
    assert abs(a.std() / (0.02 / 8) - 1) < 0.05
    a, _ = weights("identity", torch.bfloat16)
    assert torch.equal(a, torch.eye(64, dtype=torch.bfloat16))
    model = tiny.build()
    ttt.patch_model(model, tiny.config(target="conv"))
    assert not any(m.ttt_conv.weight.any() for m in tiny.fast_mlps(model))


def quantised(model):
    class Linear4bit(nn.Linear):
        pass

    model.model.layers[2].mlp.down_proj = Linear4bit(128, 64)


def wrapped(model):
    linear = model.model.layers[2].mlp.down_proj
    linear.forward = linear.forward


def hooked(model):
    model.model.layers[2].mlp.register_forward_hook(lambda *a: None)


def integer(model):
    model.model.layers[2].mlp.down_proj.weight = nn.Parameter(
        torch.zeros(64, 128).to(torch.int8), False
    )


def other_layer(model):
    model.model.layers[2].__class__ = type("OtherLayer", (nn.Module,), {})


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (quantised, TypeError, "layer 2: down_proj must be a plain torch.nn.Linear.*Linear4bit"),
        (integer, TypeError, "layer 2: down_proj.weight must be floating point, got torch.int8"),
        (wrapped, RuntimeError, "layer 2: down_proj.forward is already replaced"),
        (hooked, RuntimeError, "layer 2: the MLP carries forward hooks"),
        (other_layer, TypeError, "layer 2 must be a LlamaDecoderLayer, got OtherLayer"),
    ],
)
def test_refuses_before_anything_changes(damage, error, message):
    model = tiny.build()
    damage(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        ttt.patch_model(model, tiny.config())
    assert_unchanged(model, before)


def test_refuses_layers_that_do_not_exist():
    model = tiny.build()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"layers must be within 0\.\.3, .*4 decoder.*got \[4, 36\]"
    ):
        ttt.patch_model(model, tiny.config(layers=(0, 3, 4, 36)))
    assert_unchanged(model, before)


def test_failure_in_the_middle_is_undone(monkeypatch):
    from ttt_kernels.patch import model as patch

    model = tiny.build()
    before = snapshot(model)

    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(patch, "_install_hooks", fail)
    with pytest.raises(MemoryError, match="no room"):
        ttt.patch_model(model, tiny.config())
    assert_unchanged(model, before)


def test_refuses_other_models_and_arguments():
    with pytest.raises(
        TypeError, match=r"supported family, llama \(LlamaModel\), mistral .*got Linear"
    ):
        ttt.patch_model(nn.Linear(2, 2), tiny.config())
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        ttt.patch_model("llama", tiny.config())
    with pytest.raises(TypeError, match="cfg must be a TTTConfig or None, got dict"):
        ttt.patch_model(tiny.build(), {"layers": (0,)})
    with pytest.raises(ValueError, match="missing: ttt_mode, ttt_layers"):
        ttt.patch_model(tiny.build())
    with pytest.raises(ValueError, match="model must have been patched .*got a plain llama"):
        ttt.unpatch_model(tiny.build())
    model = tiny.patched()
    model.model.layers[2].mlp = nn.Identity()
    with pytest.raises(RuntimeError, match="layer 2 must hold its FastWeightMLP .*got Identity"):
        ttt.unpatch_model(model)


def liger_like(self, x):
    """What another patch binds to an MLP instance: a forward that knows nothing of fast weights."""
    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def test_forward_replaced_afterwards_is_refused():
    model = tiny.patched()
    mlp = model.model.layers[0].mlp
    mlp.forward = liger_like.__get__(mlp)
    with pytest.raises(RuntimeError, match="called without its MLP"):
        logits(model, tiny.ids(1, 9))


def test_forward_replaced_before_is_fine():
    model, want = tiny.build(), logits(tiny.patched(), tiny.ids(2, 30))
    for layer in model.model.layers:
        layer.mlp.forward = liger_like.__get__(layer.mlp)
        del layer.mlp.act_fn
    ttt.patch_model(model, tiny.config())
    for fast, other in zip(tiny.fast_mlps(model), tiny.fast_mlps(tiny.patched()), strict=True):
        fast.ttt_proj.load_state_dict(other.ttt_proj.state_dict())
    torch.testing.assert_close(logits(model, tiny.ids(2, 30)), want)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole(clone):
    model, x = tiny.patched(), tiny.ids(2, 30)
    want = logits(model, x)
    twin = clone(model)
    assert torch.equal(logits(twin, x), want)
    nn.init.zeros_(tiny.fast_mlps(twin)[0].ttt_proj.weight)
    assert not torch.equal(logits(twin, x), want)
    assert torch.equal(logits(model, x), want)
    ttt.unpatch_model(twin)
    assert torch.equal(logits(twin, x), logits(tiny.build(), x))
    assert len(tiny.fast_mlps(model)) == 2 and torch.equal(logits(model, x), want)
