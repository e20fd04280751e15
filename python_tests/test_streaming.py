"""One shot == any split into calls == token by token == training, layer by layer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import error, randn
from safetensors import safe_open
from torch import Tensor, nn

import ttt_kernels as ttt
from ttt_kernels.modules import BatchFacts, WriteRule
from ttt_kernels.modules.layer_state import LayerState

GOLDEN = Path(__file__).parent / "golden"
D, F, C = 12, 20, 8
BOUND = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}

RULES = {
    "sgd": {},
    "specnorm": {"inner_optimizer": "specnorm"},
    "clip": {"inner_optimizer": "clip", "max_norm": 0.5},
    "horizon": {"horizon": 3},
    "conv": {"target": "conv"},
    "conv without P": {"target": "conv", "use_proj": False, "lr": 0.1},
}


class Gated(nn.Module):
    """A plain gated MLP, as models have them."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False)
        self.down_proj, self.act_fn = nn.Linear(F, D, bias=bias), nn.functional.silu


def layer(dtype=torch.float64, bias=False, **options) -> ttt.FastWeightMLP:
    mlp = Gated(bias).to(dtype)
    for n, p in enumerate(mlp.parameters()):
        p.data = 0.5 * randn(*p.shape, seed=n, dtype=dtype)
    fast = ttt.FastWeightMLP(mlp, WriteRule(**{"chunk_size": C, "lr": 0.4, **options}))
    for n, part in enumerate((fast.ttt_proj, getattr(fast, "ttt_conv", None))):
        if part is not None:
            part.weight.data = 0.5 * randn(*part.weight.shape, seed=20 + n, dtype=dtype)
    return fast.requires_grad_(False)


def calls_of(tokens: int) -> dict[str, list[int]]:
    """Lengths of the calls."""
    return {
        "one call": [tokens],
        "token by token": [1] * tokens,
        "prompt and tokens": [tokens // 2] + [1] * (tokens - tokens // 2),
        "at the edges": [min(C - 1, tokens), *([1] * min(2, max(tokens - C + 1, 0)))]
        + [n for n in [tokens - C - 1] if n > 0],
        "beyond the edges": [n for n in (min(C + 3, tokens), tokens - C - 3) if n > 0],
    }


def streamed(mlp, x: Tensor, calls: list[int], state: LayerState) -> Tensor:
    parts, start = [], 0
    for n in calls:
        parts.append(mlp(x[:, start : start + n], BatchFacts(state=state)))
        start += n
    assert start == x.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("tokens", [1, 2, C - 1, C, C + 1, 2 * C - 1, 2 * C, 2 * C + 1, 5 * C + 3])
@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_any_split_equals_one_shot(rule, preserve, tokens):
    mlp = layer(preserve_row_norm=preserve, **rule)
    x = randn(2, tokens, D)
    want, finals = mlp(x), []
    for name, calls in calls_of(tokens).items():
        state = LayerState(mlp.signature())
        assert error(streamed(mlp, x, calls, state), want) <= BOUND[torch.float64], name
        assert [row.position for row in state.rows] == [tokens] * 2
        assert [row.writes for row in state.rows] == [tokens // C] * 2
        finals.append([row.weight[0] for row in state.rows if row.writes])
    for weights in finals:
        for got, expected in zip(weights, finals[0], strict=True):
            assert error(got, expected) <= BOUND[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_lower_precision(rule, preserve, dtype):
    """float32: rounding of sums in another order. bfloat16: where that moves a rounding of W or y."""
    mlp = layer(dtype, preserve_row_norm=preserve, **rule)
    x = randn(2, 5 * C + 3, D, dtype=dtype)
    want = mlp(x)
    for name, calls in calls_of(x.shape[1]).items():
        state = LayerState(mlp.signature())
        assert error(streamed(mlp, x, calls, state), want) <= BOUND[dtype], name
        assert state.rows[0].weight[0].dtype == torch.float32


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("stream_*")), ids=lambda p: p.stem)
def test_released_streams(path):
    with safe_open(path, "pt") as file:
        settings = {k: json.loads(v) for k, v in file.metadata().items()}
        stored = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    mlp = layer(inner_optimizer=settings["inner_optimizer"], lr=settings["lr"])
    assert mlp.rule.chunk_size == settings["chunk_size"]
    names = {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj, "proj": mlp.ttt_proj}
    for name, part in names.items():
        part.weight.data = stored[name].clone()
    ends = settings["calls"]
    calls = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    state = LayerState(mlp.signature())
    assert error(streamed(mlp, stored["x"], calls, state), stored["y"]) <= 1e-10
    final = torch.stack([row.weight[0] for row in state.rows])
    assert error(final, stored["final_down"]) <= 1e-10


def test_state_equals_that_of_the_scan():
    """With preservation too, where the released code has no answer to compare with."""
    mlp, x = layer(preserve_row_norm=True, inner_optimizer="specnorm"), randn(1, 5 * C + 3, D)
    z = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    v = ttt.next_token_target(x, mlp.ttt_proj.weight, chunk_size=C)
    steps = ttt.spectral_step_size(z, v, chunk_size=C, lr=mlp.rule.lr)
    y, final = ttt.fast_weight_scan(
        z, v, mlp.down_proj.weight, chunk_size=C, step_size=steps, preserve_row_norm=True,
        return_state=True,
    )  # fmt: skip
    state = LayerState(mlp.signature())
    assert error(streamed(mlp, x, [11] + [1] * 32, state), y) <= BOUND[torch.float64]
    assert error(state.rows[0].weight[0][None], final) <= BOUND[torch.float64]


@pytest.mark.parametrize("rule", ["sgd", "specnorm", "conv"])
@pytest.mark.parametrize("preserve", [False, True])
def test_rows_at_different_places(rule, preserve):
    """Padding anywhere, rows that pause: each row as it would be alone, and never counted."""
    mlp = layer(bias=True, preserve_row_norm=preserve, **RULES[rule])
    rows = [randn(1, n, D, seed=n) for n in (37, 21, 5, 30)]
    calls = [[20, 3, 0, 17], [1, 1, 1, 0], [16, 17, 4, 13]]
    state, got = LayerState(mlp.signature()), [[] for _ in rows]
    taken = [0] * len(rows)
    for n, lengths in enumerate(calls):
        width = max(lengths) + n
        x, valid = randn(len(rows), width, D, seed=90), torch.zeros(len(rows), width).bool()
        for b, length in enumerate(lengths):
            places = torch.randperm(width)[:length].sort().values
            x[b, places] = rows[b][0, taken[b] : taken[b] + length]
            valid[b, places] = True
            taken[b] += length
        y = mlp(x, BatchFacts(valid=valid, state=state))
        assert not y[~valid].any()
        for b in range(len(rows)):
            got[b].append(y[b, valid[b]])
    assert taken == [37, 21, 5, 30] == [row.position for row in state.rows]
    for b, row in enumerate(rows):
        assert error(torch.cat(got[b])[None], mlp(row)) <= BOUND[torch.float64], b


def test_short_rows_of_the_slow_weight():
    """Rows shorter than the floor of the norm are scaled also before the first write."""
    mlp = layer(preserve_row_norm=True)
    mlp.down_proj.weight.data[3] *= 1e-7
    x = randn(1, 2 * C, D)
    got = streamed(mlp, x, [1] * 2 * C, LayerState(mlp.signature()))
    assert error(got[..., 3:4], mlp(x)[..., 3:4]) <= 1e-9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("calls", calls_of(5 * C).values(), ids=calls_of(5 * C))
@pytest.mark.parametrize("preserve", [False, True])
def test_non_finite_writes_are_refused(calls, bad, preserve):
    mlp = layer(preserve_row_norm=preserve)
    x = randn(2, 5 * C, D)
    x[1, C + 2, 4] = bad
    state = LayerState(mlp.signature())
    y = streamed(mlp, x, calls, state)
    assert [row.writes for row in state.rows] == [5, 4]
    assert [row.refused for row in state.rows] == [0, 1]
    assert error(y[:1], mlp(x[:1])) <= BOUND[torch.float64]
    skipped = torch.cat([x[1:, :C], x[1:, 2 * C :]], 1)
    rest = torch.cat([y[1:, :C], y[1:, 2 * C :]], 1)
    assert error(rest, mlp(skipped)) <= BOUND[torch.float64]
    assert torch.isfinite(y[1, [n for n in range(5 * C) if n != C + 2]]).all()


def test_overflow_is_refused():
    mlp = layer(torch.float32, lr=1e38)
    state = LayerState(mlp.signature())
    streamed(mlp, 1e3 * randn(1, C, D, dtype=torch.float32), [1] * C, state)
    assert (state.rows[0].writes, state.rows[0].refused, state.rows[0].weight) == (0, 1, None)


def test_nothing_is_allocated_before_the_first_write():
    mlp, x = layer(), randn(2, C, D)
    state = LayerState(mlp.signature())
    streamed(mlp, x[:, : C - 1], [C - 1], state)
    assert all(row.weight is None for row in state.rows)
    streamed(mlp, x[:, C - 1 :], [1], state)
    assert all(row.weight is not None for row in state.rows)


def test_decoding_copies_no_weight():
    mlp, x = layer(), randn(2, 5 * C, D)
    state = LayerState(mlp.signature())
    streamed(mlp, x[:, : 2 * C], [2 * C], state)
    addresses = {row.weight[0].data_ptr() for row in state.rows}
    assert len({row.weight.tensors[0].data_ptr() for row in state.rows}) == 1, "one launch"
    streamed(mlp, x[:, 2 * C :], [1] * 3 * C, state)
    assert {row.weight[0].data_ptr() for row in state.rows} == addresses


@pytest.mark.parametrize("rule", ["sgd", "specnorm", "conv"])
@pytest.mark.parametrize("preserve", [False, True])
def test_gradients_within_a_call(rule, preserve):
    """Exact in the call, with what came before it as constants."""
    mlp = layer(preserve_row_norm=preserve, **RULES[rule])
    x = randn(2, 4 * C, D)
    want_x = x.clone().requires_grad_()
    fixed = torch.cat([x[:, : C + 3], want_x[:, C + 3 :]], 1)
    want = torch.autograd.grad(mlp(fixed)[:, C + 3 :].square().sum(), want_x)[0][:, C + 3 :]
    state = LayerState(mlp.signature())
    mlp(x[:, : C + 3], BatchFacts(state=state))
    leaf = x[:, C + 3 :].clone().requires_grad_()
    y = mlp(leaf, BatchFacts(state=state))
    assert error(y.detach(), mlp(x)[:, C + 3 :]) <= BOUND[torch.float64]
    streamed(mlp, x, [4 * C], state)  # writes in place before the backward runs
    assert error(torch.autograd.grad(y.square().sum(), leaf)[0], want) <= 1e-10
    assert not any(t.requires_grad for t in state.tensors())


def test_gradients_of_parameters_in_one_call():
    mlp, x = layer(), randn(1, 3 * C + 1, D)
    mlp.requires_grad_(True)
    want = torch.autograd.grad(mlp(x).square().sum(), list(mlp.parameters()))
    y = mlp(x, BatchFacts(state=LayerState(mlp.signature())))
    got = torch.autograd.grad(y.square().sum(), list(mlp.parameters()))
    assert all(error(a, b) <= 1e-10 for a, b in zip(got, want, strict=True))


def test_gradients_of_the_projection_alone():
    """Everything else frozen: nothing that enters the layer asks for a gradient."""
    mlp, x = layer(target="conv"), randn(1, 3 * C + 1, D)
    parts = [mlp.ttt_proj.weight.requires_grad_(), mlp.ttt_conv.weight.requires_grad_()]
    want = torch.autograd.grad(mlp(x).square().sum(), parts)
    y = mlp(x, BatchFacts(state=LayerState(mlp.signature())))
    got = torch.autograd.grad(y.square().sum(), parts)
    assert all(error(a, b) <= 1e-10 for a, b in zip(got, want, strict=True))


def test_inference_mode_and_back():
    mlp, x = layer(), randn(1, 5 * C, D)
    state = LayerState(mlp.signature())
    with torch.inference_mode():
        first = streamed(mlp, x[:, : 2 * C + 1], [2 * C + 1], state).clone()
    rest = streamed(mlp, x[:, 2 * C + 1 :], [1] * (3 * C - 1), state)
    assert error(torch.cat([first, rest], 1), mlp(x)) <= BOUND[torch.float64]


@pytest.mark.parametrize("preserve", [False, True])
def test_autocast(preserve):
    mlp, x = layer(torch.float32, preserve_row_norm=preserve), randn(2, 3 * C + 2, D).float()
    with torch.autocast("cpu", torch.bfloat16):
        want = mlp(x)
        got = streamed(mlp, x, [C + 3] + [1] * (2 * C - 1), state := LayerState(mlp.signature()))
    assert got.dtype == want.dtype and error(got, want) <= 2 * BOUND[torch.bfloat16]
    with pytest.raises(ValueError, match="holds torch.bfloat16 keys .*got torch.float32"):
        mlp(x, BatchFacts(state=state))


def test_recording_changes_no_value():
    mlp, x = layer(preserve_row_norm=True), randn(2, 4 * C + 1, D)
    state = LayerState(mlp.signature())
    state.record_writes = True
    assert error(streamed(mlp, x, [2 * C, *[1] * (2 * C + 1)], state), mlp(x)) <= 1e-12
    log = state.rows[1].log
    w0 = mlp.down_proj.weight
    assert [r.position for r in log] == [C, 2 * C, 3 * C, 4 * C]
    assert all(r.step_size == pytest.approx(0.4) and not r.refused for r in log)
    drift = (state.rows[1].weight[0] - w0).norm() / w0.norm()
    assert log[-1].drift == pytest.approx(float(drift))
    assert log[0].relative_write == pytest.approx(log[0].drift)


def test_bad_calls():
    mlp, x = layer(), randn(2, 3, D)
    state = LayerState(mlp.signature())
    mlp(x, BatchFacts(state=state))
    with pytest.raises(ValueError, match="holds 2 requests .*got a batch of 1"):
        mlp(x[:1], BatchFacts(state=state))
    with pytest.raises(ValueError, match="must not bring cu_seqlens and a state"):
        mlp(x, BatchFacts(state=state, cu_seqlens=torch.tensor([0, 6])))
    other = LayerState(replace(mlp.signature(), shape=(D, F + 1)))
    with pytest.raises(ValueError, match=r"layer \[D, F\] = \(12, 20\), got \(12, 21\)"):
        mlp(x, BatchFacts(state=other))
