"""`FastWeightMLP` alone: the released algorithms' values and gradients; padding and packing."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_close, randn
from safetensors import safe_open
from torch import nn
from torch.nn.functional import silu

import ttt_kernels as ttt
from ttt_kernels.modules import BatchFacts, WriteRule
from ttt_kernels.modules.mlp import FastWeightLinear

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted([*GOLDEN.glob("ntp_*.safetensors"), *GOLDEN.glob("inplace_*.safetensors")])
D, F, C = 6, 10, 8


class PlainMLP(nn.Module):
    def __init__(self, d: int = D, f: int = F, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, f, bias=bias)
        self.up_proj = nn.Linear(d, f, bias=bias)
        self.down_proj = nn.Linear(f, d, bias=bias)
        self.act_fn = silu

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def fast_mlp(bias: bool = True, **rule) -> ttt.FastWeightMLP:
    torch.manual_seed(0)
    rule = {"chunk_size": C, "lr": 0.5, **rule}
    mlp = ttt.FastWeightMLP(PlainMLP(bias=bias).double(), WriteRule(**rule))
    for name, part in mlp.named_children():
        if name.startswith("ttt_"):
            part.weight.data.copy_(randn(*part.weight.shape, seed=7) * 0.3)
    return mlp


RULES = {
    "sgd": {},
    "specnorm": {"inner_optimizer": "specnorm", "preserve_row_norm": True},
    "clip": {"inner_optimizer": "clip", "max_norm": 0.1},
    "conv": {"target": "conv", "target_source": "input_embed"},
    "horizon": {"horizon": 2, "use_proj": False},
}


def run(mlp, x, facts=None, dy=None) -> dict[str, torch.Tensor]:
    """y, and the gradient of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    mlp.zero_grad()
    y = mlp(x, facts)
    y.backward(torch.ones_like(y) if dy is None else dy)
    grads = {f"d{n}": p.grad.clone() for n, p in mlp.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads}


def golden_rule(settings: dict, stored: dict) -> WriteRule:
    in_place = settings["method"] == "in_place"
    return WriteRule(
        chunk_size=settings["chunk_size"],
        lr=settings["lr"],
        inner_optimizer=settings.get("inner_optimizer", "sgd"),
        preserve_row_norm=settings.get("norm_preserve", False),
        target="conv" if in_place else "next_token",
        target_source="input_embed" if in_place else "hidden_states",
        use_proj="proj" in stored,
    )


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_matches_the_released_algorithm(path, impl, monkeypatch):
    monkeypatch.setenv("TTT_KERNELS_IMPL", impl)
    with safe_open(path, "pt") as file:
        settings = {k: json.loads(v) for k, v in file.metadata().items()}
        stored = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    plain = PlainMLP(*reversed(stored["gate"].shape)).double()
    mlp = ttt.FastWeightMLP(plain, golden_rule(settings, stored))
    parts = {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj, "proj": mlp.ttt_proj}
    parts["conv"] = getattr(mlp, "ttt_conv", None)
    parts = {k: part for k, part in parts.items() if k in stored}
    for name, part in parts.items():
        part.weight.data.copy_(stored[name])
    inputs = {k: stored[k].clone().requires_grad_() for k in ("x", "target") if k in stored}
    y = mlp(inputs["x"], BatchFacts(embeddings=inputs.get("target")))
    y.backward(stored["dy"])
    got = {"y": y.detach()} | {f"d{k}": t.grad for k, t in inputs.items()}
    got |= {f"d{k}": part.weight.grad for k, part in parts.items()}
    want = {k: t for k, t in stored.items() if k == "y" or (k.startswith("d") and k[1:] in stored)}
    want.pop("dy", None)
    assert len(want) >= 5
    assert_close(got, want, 1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_starts_as_the_plain_mlp(bias):
    plain = PlainMLP(bias=bias).double()
    x = randn(2, 3 * C, D)
    mlp = ttt.FastWeightMLP(plain, WriteRule(chunk_size=C, lr=1.0))
    torch.testing.assert_close(mlp(x), plain(x), rtol=0, atol=1e-14)


def test_shares_parameter_objects_and_leaves_the_plain_mlp_alone():
    plain = PlainMLP(bias=True)
    linear, before = plain.down_proj, dict(plain.named_parameters())
    mlp = ttt.FastWeightMLP(plain, WriteRule(chunk_size=C, lr=1.0))
    own = dict(mlp.named_parameters())
    assert all(own[name] is p for name, p in before.items())
    assert set(own) - set(before) == {"ttt_proj.weight"}
    assert type(plain.down_proj) is nn.Linear and plain.down_proj is linear
    assert isinstance(mlp.down_proj, FastWeightLinear)


def embeddings(rule: dict, *shape: int) -> torch.Tensor | None:
    return randn(*shape, seed=11) if rule.get("target_source") == "input_embed" else None


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_packed_sequences_are_independent(rule):
    mlp, x = fast_mlp(**rule), randn(2, 30, D)
    u, dy = embeddings(rule, 2, 30, D), randn(2, 30, D, seed=5)
    bounds = [0, 19, 30, 30, 33, 60]
    packed = run(mlp, x, BatchFacts(cu_seqlens=torch.tensor(bounds), embeddings=u), dy)
    alone = None
    flat = [None if t is None else t.reshape(1, 60, D) for t in (x, u, dy)]
    for a, b in zip(bounds, bounds[1:], strict=False):
        part, source, grad = (None if t is None else t[:, a:b] for t in flat)
        one = run(mlp, part, BatchFacts(embeddings=source), grad)
        alone = one if alone is None else {
            k: torch.cat([alone[k], t], 1) if k in ("y", "dx") else alone[k] + t
            for k, t in one.items()
        }  # fmt: skip
    alone["y"], alone["dx"] = alone["y"].view_as(x), alone["dx"].view_as(x)
    assert_close(packed, alone, 1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_padding_reads_and_writes_nothing(rule):
    """Wherever it lies, whatever it holds, and whatever gradient arrives there."""
    mlp, x, dy = fast_mlp(**rule), randn(4, 30, D), randn(4, 30, D, seed=5)
    valid = torch.ones(4, 30, dtype=torch.bool)
    valid[0, :7], valid[1, 25:], valid[2, ::3], valid[3] = False, False, False, False
    x[~valid] = float("nan")
    u = embeddings(rule, 4, 30, D)
    padded = run(mlp, x, BatchFacts(valid=valid, embeddings=u), dy)
    assert (padded["y"][~valid] == 0).all() and (padded["dx"][~valid] == 0).all()
    total = {}
    for b in range(3):
        source = None if u is None else u[b : b + 1, valid[b]]
        part = x[b : b + 1, valid[b]]
        one = run(mlp, part, BatchFacts(embeddings=source), dy[b : b + 1, valid[b]])
        for name in ("y", "dx"):
            assert_close({name: padded[name][b, valid[b]]}, {name: one.pop(name)[0]}, 1e-12)
        total = {k: t + total.get(k, 0) for k, t in one.items()}
    assert_close({k: padded[k] for k in total}, total, 1e-12)


def test_errors():
    rule = WriteRule(chunk_size=C, lr=1.0)
    plain = PlainMLP()
    with pytest.raises(TypeError, match="rule must be a WriteRule, got dict"):
        ttt.FastWeightMLP(plain, {"chunk_size": 8})
    with pytest.raises(TypeError, match="mlp must have a module gate_proj, got Linear without it"):
        ttt.FastWeightMLP(nn.Linear(3, 3), rule)
    plain.down_proj = nn.Conv1d(F, D, 1)
    with pytest.raises(TypeError, match="down_proj must be a plain torch.nn.Linear.*Conv1d"):
        ttt.FastWeightMLP(plain, rule)
    plain = PlainMLP()
    plain.down_proj.forward = plain.down_proj.forward
    with pytest.raises(RuntimeError, match="down_proj.forward is already replaced"):
        ttt.FastWeightMLP(plain, rule)
    mlp = ttt.FastWeightMLP(PlainMLP(), rule)
    with pytest.raises(RuntimeError, match="called without its MLP"):
        mlp.down_proj(torch.zeros(1, 2, F))
    mlp = fast_mlp(target_source="input_embed")
    with pytest.raises(RuntimeError, match="needs the token embeddings of this call"):
        mlp(randn(1, 9, D))
