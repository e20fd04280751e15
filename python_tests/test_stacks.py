"""Patched models in the training stacks people use, in one process: accumulation, autocast, adapters, Liger,
quantised layers, varlen batches, torch.compile. docs/stacks.md says what each takes."""

from __future__ import annotations

import processes
import pytest
import tiny_models as tiny
import torch
from helpers import error
from torch import Tensor, nn

import ttt_kernels as ttt

RULES = {
    "sgd": {},
    "row norms": {"preserve_row_norm": True, "inner_optimizer": "specnorm", "lr": 0.5},
}


def step(model: nn.Module, x: Tensor, **kwargs) -> dict[str, Tensor]:
    """Loss and gradients; those that are there already are added to."""
    loss = model.train()(x, labels=x, **kwargs).loss
    loss.backward()
    return {"loss": loss.detach(), **tiny.gradients(model)}


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, **kwargs) -> Tensor:
    return model.eval()(x, **kwargs).logits


def copy_added(source: nn.Module, target: nn.Module) -> None:
    """The weights that patching added."""
    for own, other in zip(tiny.fast_mlps(target), tiny.fast_mlps(source), strict=True):
        own.ttt_proj.load_state_dict(other.ttt_proj.state_dict())


# --- gradient accumulation, autocast ---------------------------------------------------------------------
def test_micro_batches_add_up():
    rows, whole, model = tiny.ids(6, 29), tiny.patched(), tiny.patched()
    want = step(whole, rows)
    for micro in rows.chunk(3):
        (model.train()(micro, labels=micro).loss / 3).backward()
    got = tiny.gradients(model)
    assert got.keys() == want.keys() - {"loss"}
    assert max(error(g, want[name]) for name, g in got.items()) < 1e-5


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_autocast_is_as_exact_as_for_the_plain_model(rule):
    """bf16 autocast of parameters that stay in float32, against float64."""
    rule = {**rule, "lr": 0.25}
    x, errors = tiny.ids(4, 45), []
    for make in (tiny.build, lambda: tiny.patched("llama", tiny.config(**rule))):
        want, model = step(make().double(), x), make()
        with torch.autocast("cpu", torch.bfloat16):
            got = step(model, x)
        assert all(g.dtype == torch.float32 for g in got.values())
        errors.append({name: error(g.double(), want[name].double()) for name, g in got.items()})
    plain, patched = errors
    assert all(patched[name] < 2 * e + 1e-3 for name, e in plain.items()), (plain, patched)
    assert all(e < 2 * max(plain.values()) for e in patched.values()), patched


# --- adapters --------------------------------------------------------------------------------------------
def lora(model: nn.Module, **changes) -> nn.Module:
    """`model` with LoRA that is not zero, the same whenever it is called."""
    peft = pytest.importorskip("peft", reason="needs peft")
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapter = peft.get_peft_model(model, peft.LoraConfig(**{**options, **changes}))
    generator = torch.Generator().manual_seed(9)
    for name, p in adapter.named_parameters():
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return adapter.eval()


def adapted(cfg: ttt.TTTConfig, adapter_first: bool, **changes) -> nn.Module:
    """Fast weights and LoRA, in either order."""
    if not adapter_first:
        return lora(tiny.patched("llama", cfg), **changes)
    model = lora(tiny.build(), **changes)
    ttt.patch_model(model, cfg)
    copy_added(tiny.patched("llama", cfg), model)
    return model


@pytest.mark.parametrize("adapter_first", [False, True], ids=["patch first", "adapter first"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_adapter_equals_merged(rule, adapter_first):
    """On down_proj too the fast weight is that of W0 + BA: read in one call, streamed, merged, and written
    into the slow weight of a model that knows no adapter."""
    cfg, x = tiny.config(**rule), tiny.ids(2, 45)
    model = adapted(cfg, adapter_first)
    want = logits(model, x)
    plain = logits(tiny.patched("llama", cfg), x)
    assert error(want, plain) > 1e-2
    cache = model(x[:, :13], use_cache=True)
    later = model(x[:, 13:], past_key_values=cache.past_key_values, use_cache=True)
    assert error(torch.cat([cache.logits, later.logits], 1).detach(), want) < 1e-5
    model.merge_adapter()
    assert error(logits(model, x), want) < 1e-5
    model.unmerge_adapter()
    with model.disable_adapter():
        assert error(logits(model, x), plain) < 1e-5
    written = tiny.patched("llama", cfg)
    merged = model.merge_and_unload()
    weights = {name.replace(".base_layer", ""): w for name, w in merged.state_dict().items()}
    written.load_state_dict(weights)
    assert error(logits(merged, x), want) < 1e-5 and error(logits(written, x), want) < 1e-5
    assert not any("lora" in name for name in weights) and len(tiny.fast_mlps(merged)) == 2


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_adapter_gradients_are_those_of_the_sum(rule):
    """dA and dB of down_proj from the gradient of a model whose slow weight is W0 + BA."""
    cfg, x = tiny.config(**rule), tiny.ids(2, 29)
    model = lora(tiny.patched("llama", cfg).double(), target_modules=["down_proj"]).double()
    step(model, x)
    down = tiny.fast_mlps(model)[0].down_proj
    merged = lora(tiny.patched("llama", cfg).double(), target_modules=["down_proj"]).double()
    merged = merged.merge_and_unload()
    weight = tiny.fast_mlps(merged)[0].slow_weight.requires_grad_()
    step(merged, x)
    a, b = down.lora_A["default"].weight, down.lora_B["default"].weight
    assert error(a.grad, 2 * b.T @ weight.grad) < 1e-8
    assert error(b.grad, 2 * weight.grad @ a.T) < 1e-8


def test_adapters_are_saved_with_the_projections(tmp_path):
    """`modules_to_save=["ttt_proj"]` trains and saves P with the adapter."""
    import peft

    cfg, x = tiny.config(), tiny.ids(2, 29)
    model = lora(tiny.patched("llama", cfg), modules_to_save=["ttt_proj"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum("ttt_proj.modules_to_save" in n for n in trained) == 2
    assert trained == set(step(model, x)) - {"loss"}
    for p in model.parameters():
        if p.requires_grad:
            p.data -= 0.1 * p.grad
    want = logits(model, x)
    model.save_pretrained(tmp_path)
    base = tiny.build()
    ttt.patch_model(base, cfg)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again, x), want)
    assert error(logits(again.merge_and_unload(), x), want) < 1e-5


def test_adapters_that_cannot_be_merged_are_refused():
    x = tiny.ids(1, 9)
    dora = lora(tiny.patched(), use_dora=True, target_modules=["down_proj"])
    with pytest.raises(NotImplementedError, match="'default' on down_proj must be a plain LoRA.*Dora"):
        dora(x)
    with dora.disable_adapter():
        assert torch.equal(logits(dora, x), logits(tiny.patched(), x))
    other = lora(tiny.patched(), use_dora=True, target_modules=["gate_proj", "q_proj"])
    assert torch.isfinite(logits(other, x)).all()
    mixed = lora(tiny.patched("llama", tiny.config(preserve_row_norm=True)))
    with pytest.raises(NotImplementedError, match="LoRA without adapter_names only"):
        mixed(x, adapter_names=["default"])
    free = lora(tiny.patched())
    assert error(logits(free, x, adapter_names=["default"]), logits(free, x)) < 1e-5


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kind", ["IA3", "OFT", "HRA"])
def test_multiplicative_adapters_are_refused_on_down_proj(kind, rule):
    """They scale what the base layer is given or returns, the fast weight included."""
    peft = pytest.importorskip("peft", reason="needs peft")
    targets = {"target_modules": ["down_proj"]} | ({"feedforward_modules": []} if kind == "IA3" else {})
    config = getattr(peft, f"{kind}Config")(**targets)
    model = peft.get_peft_model(tiny.patched("llama", tiny.config(**rule)), config).eval()
    x = tiny.ids(1, 20)
    with pytest.raises(NotImplementedError, match=f"on down_proj must be a plain LoRA.*{kind.lower()}"):
        logits(model, x)
    assert torch.isfinite(logits(model.merge_and_unload(), x)).all()


# --- quantised layers ------------------------------------------------------------------------------------
class Wrapped(Tensor):
    """As torchao does it: a parameter that claims to be float, around tensors that are not."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values: Tensor) -> None:
        self.scale = values.abs().amax() / 127
        self.codes = (values / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        plain = [a.codes * a.scale if isinstance(a, Wrapped) else a for a in args]
        return func(*plain, **(kwargs or {}))


def wrap_weights(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(Wrapped(layer.weight.detach()), requires_grad=False)
    return model


@pytest.mark.filterwarnings("ignore")  # the class is deprecated, and still what saved models hold
def dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_slow_weights_are_refused():
    x = tiny.ids(1, 20)
    with pytest.raises(TypeError, match="layer 0: down_proj must be a plain.*quantized.dynamic"):
        ttt.patch_model(dynamic(tiny.build()), tiny.config())
    wrapped = wrap_weights(tiny.build())
    before = logits(wrapped, x)
    with pytest.raises(TypeError, match=r"layer 0: down_proj.weight must be a plain tensor.*Wrapped"):
        ttt.patch_model(wrapped, tiny.config())
    assert torch.equal(logits(wrapped, x), before)
    afterwards = wrap_weights(tiny.patched())
    for use_cache in (False, True):
        with pytest.raises(TypeError, match=r"down_proj.weight must be a plain tensor.*Wrapped"):
            logits(afterwards, x, use_cache=use_cache)
    with ttt.disabled(afterwards):
        assert torch.isfinite(logits(afterwards, x)).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_other_layers_may_be_quantised():
    """torch.ao leaves the fast layers alone by itself: it goes by exact types."""
    model, x = dynamic(tiny.patched()), tiny.ids(1, 20)
    for mlp in tiny.fast_mlps(model):
        assert type(mlp.down_proj) is ttt.modules.mlp.FastWeightLinear
        assert type(mlp.gate_proj) is not nn.Linear
    got, want = logits(model, x), logits(tiny.patched(), x)
    assert 0 < error(got, want) < 0.1 < error(logits(tiny.build(), x), want)


# --- varlen batches --------------------------------------------------------------------------------------
LENGTHS = (20, 3, 8, 25, 1)
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def varlen_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """What a varlen kernel computes, [B, H, T, E]: it sees where sequences end in its kwargs alone."""
    assert attention_mask is None and set(VARLEN) <= kwargs.keys() and "ttt_info" not in kwargs
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    sizes = kwargs["cu_seq_lens_q"].diff().tolist()
    out = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        for q, k, v in zip(*(t.split(sizes, 2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def flattened(documents: list[Tensor], **options) -> dict[str, Tensor]:
    from transformers import DataCollatorWithFlattening

    features = [{"input_ids": d[0].tolist()} for d in documents]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True, **options)(features)


@pytest.mark.parametrize("positions", [True, False], ids=["position_ids", "cu_seq_lens alone"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_flattened_documents_train_as_separate_ones(rule, positions):
    """`DataCollatorWithFlattening` and a varlen kernel's kwargs; without position_ids (rotary positions only
    matter relative to one another) the fast weights too know the documents from cu_seq_lens alone."""
    import transformers

    transformers.AttentionInterface.register("varlen_test", varlen_attention)
    transformers.AttentionMaskInterface.register("varlen_test", lambda *args, **kwargs: None)
    cfg, documents = tiny.config(**rule), [tiny.ids(1, n, seed=n) for n in LENGTHS]
    separate = tiny.patched("llama", cfg).train()
    targets = sum(LENGTHS) - len(LENGTHS)
    for document in documents:
        if document.shape[1] > 1:  # a single token predicts nothing
            loss = separate(document, labels=document).loss * (document.shape[1] - 1) / targets
            loss.backward()
    batch = flattened(documents, return_position_ids=positions)
    assert set(VARLEN) <= batch.keys() and ("position_ids" in batch) == positions
    packed = tiny.patched("llama", cfg, attn_implementation="varlen_test").train()
    packed(**batch).loss.backward()
    got, want = tiny.gradients(packed), tiny.gradients(separate)
    assert got.keys() == want.keys()
    assert max(error(g, want[name]) for name, g in got.items()) < 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_flattened_documents_read_as_separate_ones(family):
    """With transformers' own attention, which separates documents by position_ids."""
    model, documents = tiny.patched(family), [tiny.ids(1, n, seed=n) for n in LENGTHS]
    batch = {k: v for k, v in flattened(documents).items() if k != "labels"}
    want = torch.cat([logits(model, d) for d in documents], 1)
    assert error(logits(model, use_cache=False, x=batch.pop("input_ids"), **batch), want) < 1e-5


# --- what patches classes or compiles: in processes of their own -------------------------------------------
def liger(rank: int, world_size: int) -> dict:
    """The real liger-kernel, its Triton kernel replaced by what it computes (it runs on GPUs only)."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama, swiglu

    class SiLUMul:
        calls = 0

        @classmethod
        def apply(cls, gate: Tensor, up: Tensor, *_: float) -> Tensor:
            cls.calls += 1
            return nn.functional.silu(gate) * up

    swiglu.LigerSiLUMulFunction = SiLUMul
    only_mlp = {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": False}
    rest = {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": True, "swiglu": False}
    x, plain, first = tiny.ids(2, 29), tiny.build(), tiny.build()
    want, last, other = tiny.patched(), tiny.patched(), tiny.patched()
    out = {"want": step(want, x)}

    def patch(model: nn.Module) -> tuple[dict[str, Tensor], int]:
        ttt.patch_model(model, tiny.config())
        copy_added(want, model)
        SiLUMul.calls = 0
        return step(model, x), SiLUMul.calls

    apply_liger_kernel_to_llama(**rest, model=other)
    out["last, all but the MLP"] = error(logits(other, x), logits(want, x))
    apply_liger_kernel_to_llama(**only_mlp, model=first)  # later models are made of its classes too
    out["first, on the model"] = patch(first)
    ttt.unpatch_model(first)
    SiLUMul.calls = 0
    out["unpatched"] = error(logits(first, x), logits(plain, x)), SiLUMul.calls
    out["first, on the class"] = patch(tiny.build())
    apply_liger_kernel_to_llama(**only_mlp, model=last)
    try:
        last(x)
    except RuntimeError as refusal:
        out["last"] = str(refusal)
    return out


def test_liger():
    """First: fast layers compute z themselves, the others with Liger's kernel. Last: an error."""
    needed = "liger_kernel.transformers.monkey_patch"  # refuses versions of transformers by itself
    pytest.importorskip(needed, reason="needs liger-kernel", exc_type=ImportError)
    (out,) = processes.run(liger, 1)
    for name in ("first, on the model", "first, on the class"):
        got, calls = out[name]
        assert calls == 2 and got.keys() == out["want"].keys()
        assert max(error(g, out["want"][n]) for n, g in got.items()) < 1e-5
    assert out["unpatched"][0] < 1e-6 and out["unpatched"][1] == 4
    assert "called without its MLP" in out["last"] and "Apply the other patch before" in out["last"]
    assert out["last, all but the MLP"] < 1e-6


def compiled(rank: int, world_size: int) -> dict:
    """By length: the largest error of inductor in one graph, and how many graphs there are by then."""
    from torch._dynamo.utils import counters

    cfg = tiny.config(layers=(0,), **RULES["row norms"])
    model = tiny.patched("llama", cfg, num_hidden_layers=1)
    fast, found = torch.compile(model, fullgraph=True, dynamic=True), {}
    for length in (45, 30, 61, tiny.CHUNK + 1):
        x = tiny.ids(2, length)
        got = step(fast, x)
        got = {name.removeprefix("_orig_mod."): g.clone() for name, g in got.items()}
        model.zero_grad()
        want = step(model, x)
        model.zero_grad()
        assert got.keys() == want.keys()
        found[length] = max(error(got[n], want[n]) for n in want), counters["stats"]["unique_graphs"]
    return found


def test_compiles_in_one_graph_for_every_length():
    (found,) = processes.run(compiled, 1, limit_s=400)
    errors, graphs = zip(*found.values(), strict=True)
    assert max(errors) < 1e-5 and len(set(graphs)) == 1
