"""The closed-form write: released values, both forms, streaming, safety in float32, and refusals."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import assert_close, assert_same, error, randn
from safetensors import safe_open
from torch.nn.functional import silu

import ttt_kernels as ttt
from ttt_kernels.ops.ridge import eager, reference, registration
from ttt_kernels.testing import make_inputs

GOLDEN = sorted((Path(__file__).parent / "golden").glob("ridge_*.safetensors"))
D, F = 5, 12
DOUBLE = torch.float64
SHORT, LONG = 7, 40  # tokens: dual (N < F) and primal


def prompt(tokens: int = LONG, *, batch: int = 1, dtype=DOUBLE, d: int = D, f: int = F):
    """z, x, w0, proj."""
    shapes = (batch, tokens, f), (batch, tokens, d), (d, f), (d, d)
    return tuple(randn(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))


def released(z, x, w0, proj, **options) -> dict:
    """The reference, prompt by prompt."""
    rows = [reference.ridge_write(a, b, w0, proj, **options) for a, b in zip(z, x, strict=True)]
    stacked = (torch.stack(part) for part in zip(*rows, strict=True))
    return dict(zip(("weight", "delta", "eta"), stacked, strict=True))


def written(*arguments, **options) -> dict:
    return ttt.ridge_write(*arguments, **options)._asdict()


def ridge_samples(dtype):
    """Arguments of the raw op."""
    for tokens in (1, SHORT, LONG):
        z, x, w0, proj = prompt(tokens, batch=2, dtype=dtype)
        yield "ridge_write", ([*z], [*x], w0, proj, [], 1.0, 0.1, 0.1, 20, 1, True)
    y = [z[0] @ w0.T, z[1, :9] @ w0.T]
    y = [part.to(registration.ridge_dtype(z, x, w0, None)) for part in y]
    yield "ridge_write", ([z[0], z[1, :9]], [x[0], x[1, :9]], w0, None, y, 1.0, 0.1, None, None, 2, False)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
def test_opcheck(dtype):
    for _, arguments in ridge_samples(dtype):
        torch.library.opcheck(registration.ridge_write_op, arguments)


# Values


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_matches_the_released_code(path):
    with safe_open(path, "pt") as file:
        settings = {k: json.loads(v) for k, v in file.metadata().items()}
        p = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    z = silu(p["x"] @ p["gate"].T) * (p["x"] @ p["up"].T)
    options = {k: settings[k] for k in ("lam", "eta", "cap", "last_k", "shift")}
    options["preserve_row_norm"] = settings["norm_preserve"]
    want = {
        "weight": p["new_down"][None],
        "delta": p["delta"][None],
        "eta": torch.tensor([settings["eta_used"]], dtype=DOUBLE),
    }
    for call in (written, released):
        assert_close(call(z, p["x"], p["down"], p.get("proj"), **options), want, 1e-10)


def test_every_released_case_is_stored():
    assert len(GOLDEN) == 9


@pytest.mark.parametrize("proj", [False, True])
@pytest.mark.parametrize("last_k", [None, 1, 11, 12, 13, 10**9])
@pytest.mark.parametrize("shift", [1, 2])
def test_matches_the_reference(shift, last_k, proj):
    """On both sides of N = F."""
    for tokens in (shift, shift + 1, SHORT, F, F + shift, LONG):
        z, x, w0, p = prompt(tokens, batch=2)
        arguments = (z, x, w0, p if proj else None)
        options = {"shift": shift, "last_k": last_k, "eta": 0.5}
        assert_close(written(*arguments, **options), released(*arguments, **options), 1e-11)


def test_dual_and_primal_agree(monkeypatch):
    z, x, w0, proj = prompt(F + 1, batch=2)
    sides = []
    for dual in (True, False):
        monkeypatch.setattr(eager.Pairs, "dual", dual)
        sides.append(written(z, x, w0, proj))
    assert_close(*sides, 1e-11)


def test_form_follows_the_shape():
    z, x, w0, proj = prompt(F + 1)
    for last_k, dual in ((F - 1, True), (F, False)):
        assert eager.Pairs.of(z[0], x[0], w0, proj, None, last_k, 1).dual is dual


@pytest.mark.parametrize("token, gram", [(1, 1), (3, 2), (5, 64), (64, 5)])
@pytest.mark.parametrize("tokens", [SHORT, LONG])
def test_tiles_do_not_matter(tokens, token, gram, monkeypatch):
    arguments = prompt(tokens)
    want = written(*arguments)
    monkeypatch.setattr(eager, "TOKEN_TILE", token)
    monkeypatch.setattr(eager, "GRAM_TILE", gram)
    assert_close(written(*arguments), want, 1e-12)


def test_delta_is_the_minimiser():
    """The gradient of the objective vanishes there."""
    z, x, w0, proj = prompt(LONG)
    delta = ttt.ridge_write(z, x, w0, proj, lam=0.7).delta[0]
    keys, targets = z[0, :-1], (x[0] @ proj)[1:]
    gradient = (keys @ (w0 + delta).T - targets).T @ keys + 0.7 * delta
    assert gradient.norm() < 1e-12 * (targets.T @ keys).norm()


@pytest.mark.parametrize("last_k", [None, 5, 20])
@pytest.mark.parametrize("shift", [1, 3])
def test_known_outputs_spare_their_product(shift, last_k):
    """Of whole prompts, whatever pairs are used; wrong ones show that they were."""
    z, x, w0, proj = prompt(LONG, batch=2)
    z, x = [z[0], z[1, :SHORT]], [x[0], x[1, :SHORT]]
    y, options = [part @ w0.T for part in z], {"shift": shift, "last_k": last_k}
    want = written(z, x, w0, proj, **options)
    known = ttt.ridge_write_from_outputs(z, x, y, w0, proj, **options)
    assert_close(known._asdict(), want, 1e-12)
    zero = ttt.ridge_write(z, x, torch.zeros_like(w0), proj, **options).delta
    nothing = [torch.zeros_like(part) for part in y]
    wrong = ttt.ridge_write_from_outputs(z, x, nothing, w0, proj, **options).delta
    assert error(wrong, zero) < 1e-12 and error(want["delta"], zero) > 1e-3


def test_outputs_do_not_limit_the_precision_of_a_second_try():
    data = make_inputs(1, 20, 48, 300)
    z, x = (t.repeat(1, 10, 1) for t in (data.z, data.x))
    z = z * 30
    z[:, 3] *= 50
    known = ttt.ridge_write_from_outputs(z, x, z @ data.w0.T, data.w0, data.proj)
    assert_same(known._asdict(), written(z, x, data.w0, data.proj))


@pytest.mark.parametrize("preserve", [False, True])
def test_cap_and_preservation(preserve):
    z, x, w0, proj = prompt(LONG)
    free = ttt.ridge_write(z, x, w0, proj, eta=0.5, cap=None, preserve_row_norm=preserve)
    tight = ttt.ridge_write(z, x, w0, proj, eta=0.5, cap=0.01, preserve_row_norm=preserve)
    assert free.eta.item() == 0.5 and torch.equal(free.delta, tight.delta)
    assert tight.eta.item() == pytest.approx(0.01 * (w0.norm() / free.delta.norm()).item())
    for r in (free, tight):
        raw = w0 + r.eta * r.delta[0]
        if preserve:
            assert error(r.weight[0].norm(dim=1), w0.norm(dim=1)) < 1e-15
            raw = raw * (w0.norm(dim=1) / raw.norm(dim=1))[:, None]
        assert error(r.weight[0], raw) < 1e-15


@pytest.mark.parametrize("tokens, shift", [(0, 1), (1, 1), (2, 2), (2, 5)])
def test_too_few_tokens_write_nothing(tokens, shift):
    z, x, w0, proj = prompt(tokens, batch=2, dtype=torch.bfloat16)
    r = ttt.ridge_write(z, x, w0, proj, shift=shift, eta=0.3)
    assert torch.equal(r.weight, w0.float().expand(2, D, F)) and not r.delta.any()
    assert torch.equal(r.eta, torch.full((2,), 0.3))


def test_prompts_of_different_length():
    """One tensor per prompt, views of a padded batch too: the bits of each prompt alone."""
    z, x, w0, proj = prompt(LONG, batch=3)
    cuts = [slice(0, SHORT), slice(LONG - 30, LONG), slice(4, 5)]
    parts = [[t[b, cut] for b, cut in enumerate(cuts)] for t in (z, x)]
    got = written(*parts, w0, proj)
    for b in range(3):
        alone = written(parts[0][b][None], parts[1][b][None], w0, proj)
        assert_same({k: t[b] for k, t in got.items()}, {k: t[0] for k, t in alone.items()})
    assert_same(written([*z], [*x], w0, proj), written(z, x, w0, proj))
    assert ttt.ridge_write(z[:0], x[:0], w0, proj).weight.shape == (0, D, F)


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [200, 600])
def test_low_precision_is_computed_in_float32(tokens, dtype):
    data = make_inputs(2, tokens, 48, 300, dtype=dtype)
    arguments = (data.z, data.x, data.w0, data.proj)
    got = ttt.ridge_write(*arguments)
    want = ttt.ridge_write(*(t.double() for t in arguments))
    assert {t.dtype for t in got} == {torch.float32}
    for a, b in zip(got, want, strict=True):
        assert error(a.double(), b) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(got._asdict(), written(*arguments))


@pytest.mark.parametrize("tokens", [SHORT, LONG])
def test_mixed_precisions(tokens):
    z, x, w0, proj = prompt(tokens, dtype=torch.float32)
    got = written(z.bfloat16(), x, w0.half(), proj)
    assert_close(got, written(z.bfloat16().float(), x, w0.half().float(), proj), 1e-6)
    assert ttt.ridge_write(z, x.double(), w0, proj).weight.dtype == DOUBLE


@pytest.mark.parametrize("tokens", [200, 600])
def test_an_ill_conditioned_prompt_is_solved_in_float64(tokens):
    """Few distinct tokens, one huge activation, lam = 1: float32 alone is off by far
    more."""
    data = make_inputs(1, 20, 48, 300)
    z, x = (t.repeat(1, tokens // 20, 1) for t in (data.z, data.x))
    z = z * 30
    z[:, 3] *= 50
    got = ttt.ridge_write(z, x, data.w0, data.proj)
    exact = ttt.ridge_write(*(t.double() for t in (z, x, data.w0, data.proj)))
    literal = reference.ridge_write(z[0], x[0], data.w0, data.proj)[1]
    assert error(got.delta.double(), exact.delta) < 1e-6
    assert error(literal.double(), exact.delta[0]) > 5e-5


@pytest.mark.parametrize("size", [1, 4, 5, 23])
def test_factor(size, monkeypatch):
    """Block by block, of the lower triangle alone; where it fails it says so."""
    monkeypatch.setattr(eager, "FACTOR_TILE", 4)
    a = randn(size, 30, dtype=DOUBLE)
    a = a @ a.T + torch.eye(size, dtype=DOUBLE)
    for spoilt, fine in ((None, True), (0, False), (-1, False)):
        if spoilt is not None:  # in the block where it fails
            a[spoilt, spoilt] = -1.0
        factor = eager.square(size, a, zero=False).copy_(a)
        factor += torch.full_like(a, torch.nan).triu(1)
        assert eager.factorise_(factor) is fine
        if fine:
            assert error(factor.tril(), torch.linalg.cholesky(a)) < 1e-14


def test_products_in_tf32_are_not_trusted(monkeypatch):
    data = make_inputs(1, 200, 48, 300)
    arguments = (data.z, data.x, data.w0, data.proj)
    exact = ttt.ridge_write(*(t.double() for t in arguments)).delta
    assert error(ttt.ridge_write(*arguments).delta.double(), exact) > 1e-7  # float32
    monkeypatch.setattr(eager, "rounding", lambda gram: 2**-10)
    assert error(ttt.ridge_write(*arguments).delta.double(), exact) < 1e-7  # rounded from float64


# Citizenship


def test_records_no_gradient():
    arguments = [t.requires_grad_() for t in prompt(LONG)]
    assert not any(t.requires_grad for t in ttt.ridge_write(*arguments))


def test_compiles_to_one_graph():
    arguments = prompt(LONG, batch=2)
    torch._dynamo.reset()
    compiled = torch.compile(ttt.ridge_write, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*arguments)._asdict(), written(*arguments))


def test_memory_does_not_grow_with_tokens():
    """Beyond the result: the primal form holds one Gram matrix, its right-hand side and tiles."""
    from ttt_kernels.cli.measure import extra_memory

    d, f = 32, 128
    arguments = prompt(6000, dtype=torch.float32, d=d, f=f)
    extra = extra_memory(lambda: ttt.ridge_write(*arguments), torch.device("cpu"))
    assert extra < 4 * (f * f + d * f + eager.TOKEN_TILE * d) * 1.2 < arguments[0].nbytes / 8


# Refusals

GOOD = dict(zip(("z", "x", "w0", "proj"), prompt(LONG, batch=2, dtype=torch.float32), strict=True))
BAD = [
    ({"z": 1}, TypeError,
     "z must be a tensor [B, T, F] or a sequence of tensors [T_b, F], got int"),
    ({"z": torch.zeros(3, 4)}, ValueError, "z must have shape [B, T, F], got (3, 4)"),
    ({"x": [torch.zeros(3)]}, ValueError, "x[0] must have shape [T_b, D], got (3,)"),
    ({"x": torch.zeros(1, LONG, D)}, ValueError, "x must have as many prompts as z, 2, got 1"),
    ({"x": torch.zeros(2, 3, D)}, ValueError,
     "x[0] must have shape [T_b, D] = (40, 5) to match z[0] and w0, got (3, 5)"),
    ({"w0": torch.zeros(D, F + 1)}, ValueError,
     "z[0] must have shape [T_b, F] = (40, 13) to match w0, got (40, 12)"),
    ({"z": torch.zeros(2, LONG, F).long()}, TypeError,
     "z must be one of float32, bfloat16, float16, float64, got int64"),
    ({"proj": torch.zeros(D, F)}, ValueError,
     "proj must have shape [D, D] = (5, 5) to match w0, got (5, 12)"),
    ({"w0": torch.zeros(D, F, device="meta"), "proj": None}, ValueError,
     "z[0] must be on the device of w0, meta, got cpu"),
    ({"y": torch.zeros(2, LONG, F)}, ValueError,
     "y[0] must have shape [T_b, D] = (40, 5) to match x[0], got (40, 12)"),
    ({"y": None}, TypeError, "y must be a tensor [B, T, D] or a sequence of tensors [T_b, D], got NoneType"),
    ({"y": torch.zeros(1, LONG, D)}, ValueError, "y must have as many prompts as z, 2, got 1"),
    ({"y": torch.zeros(2, LONG, D).bfloat16()}, TypeError,
     "y[0] must be float32, the compute precision, got bfloat16"),
    ({"lam": 0}, ValueError, "lam must be positive and finite, got 0"),
    ({"eta": float("inf")}, ValueError, "eta must be finite, got inf"),
    ({"cap": -1.0}, ValueError, "cap must be positive and finite, got -1.0"),
    ({"last_k": 0}, ValueError, "last_k must be >= 1, got 0"),
    ({"shift": 0}, ValueError, "shift must be >= 1, got 0"),
    ({"shift": 1.5}, TypeError, "shift must be an int >= 1, got float"),
]  # fmt: skip


@pytest.mark.parametrize("changes, kind, message", BAD, ids=[m for *_, m in BAD])
def test_refusals(changes, kind, message):
    call = ttt.ridge_write_from_outputs if "y" in changes else ttt.ridge_write
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call(**GOOD | changes)


def test_an_unknown_option_is_refused():
    message = "options must be of lam, eta, cap, last_k, shift, preserve_row_norm, got lamb"
    with pytest.raises(TypeError, match=f"^{message}$"):
        ttt.ridge_write_from_outputs(**GOOD, y=GOOD["x"], lamb=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("last_k", [SHORT, LONG])
def test_values_that_are_not_finite(value, last_k):
    spoiled = {k: t.clone() for k, t in GOOD.items()}
    spoiled["z"][1, -3, 2] = value
    with pytest.raises(ValueError, match="z must be finite, got infinite or NaN keys in prompt 1"):
        ttt.ridge_write(**spoiled, last_k=last_k)
    for name in ("x", "w0", "proj"):
        spoiled = {k: t.clone() for k, t in GOOD.items()}
        spoiled[name].view(-1)[-1] = value
        with pytest.raises(ValueError, match="x, w0 and proj must be finite, got a write of norm"):
            ttt.ridge_write(**spoiled, last_k=last_k)


@pytest.mark.parametrize("tokens, gram", [(SHORT, "Z Z^T"), (LONG, "Z^T Z")])
def test_not_positive_definite_even_in_float64(tokens, gram):
    """Equal keys, and a lam below the rounding of their Gram matrix."""
    _, x, w0, proj = prompt(tokens)
    z = torch.full((1, tokens, F), 1e3, dtype=DOUBLE)
    message = f"lam must be large enough to make {gram} + lam I positive definite to rounding"
    with pytest.raises(ValueError, match=re.escape(message)):
        ttt.ridge_write(z, x, w0, proj, lam=1e-300)
