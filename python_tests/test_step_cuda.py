"""The CUDA C++ step (decode's read and write) against the reference: emulated, or compiled on a GPU."""

import pytest
import torch
from emulated import DEVICE, DTYPES, cuda_kernels, schedule  # noqa: F401
from helpers import assert_close, assert_same, error, randn

import ttt_kernels as ttt
from ttt_kernels.ops.step import cuda as step_cuda

pytestmark = pytest.mark.usefixtures("cuda_kernels")
D, F = 40, 136
LAYOUTS = {  # slots, pool
    "rows": (None, 3),
    "shared": (None, 1),
    "slots": ([4, 0, 2], 6),
    "repeated": ([4, 0, 4], 6),
}
EPS = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def operands(tokens, *, pool=3, rows=3, dtype=torch.bfloat16, d=D, f=F) -> dict[str, torch.Tensor]:
    found = {
        "z": randn(rows, tokens, f, dtype=dtype),
        "v": randn(rows, tokens, d, seed=1, dtype=dtype),
        "weight": randn(pool, d, f, seed=2, dtype=torch.float32),
        "scale": randn(pool, d, seed=3, dtype=torch.float32),
        "step": randn(rows, seed=4, dtype=torch.float32),
    }
    return {k: t.to(DEVICE) for k, t in found.items()}


def place(slots):
    return None if slots is None else torch.tensor(slots, device=DEVICE)


def apply(x: dict, impl="cuda", slots=None, scale=True):
    row_scale = x["scale"] if scale else None
    return ttt.fast_weight_apply(x["z"], x["weight"], row_scale=row_scale, slots=slots, impl=impl)


def exact(x: dict, **options):
    """By the reference in float64, of the weight as it is applied."""
    rounded = x["weight"].to(x["z"].dtype).double()
    return apply({**{k: t.double() for k, t in x.items()}, "weight": rounded}, impl="reference", **options)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9])
def test_apply(layout, tokens):
    slots, pool = LAYOUTS[layout]
    x = operands(tokens, pool=pool)
    assert error(apply(x, slots=place(slots)).double(), exact(x, slots=place(slots))) < EPS[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 130])
def test_apply_in_parts(dtype, tokens):
    """More tokens, rows and columns than a tile; F in parts that are added."""
    x = operands(tokens, dtype=dtype, rows=1, pool=1, d=136, f=1032)
    for scale in (False, True):
        assert error(apply(x, scale=scale).double(), exact(x, scale=scale)) < EPS[dtype]


@pytest.mark.sanitize
@pytest.mark.parametrize("slots", [None, [4, 0, 2]], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update(slots, tokens, dtype):
    x = operands(tokens, pool=3 if slots is None else 6, dtype=dtype)
    got, want = x["weight"].clone(), x["weight"].double()
    options = {"step_size": x["step"], "slots": place(slots)}
    ttt.fast_weight_update_(got, x["z"], x["v"], impl="cuda", **options)
    options["step_size"] = x["step"].double()
    ttt.fast_weight_update_(want, x["z"].double(), x["v"].double(), impl="reference", **options)
    assert error(got.double(), want) < 1e-6


def test_update_leaves_the_rest_of_the_pool():
    x = operands(5, pool=6)
    got = x["weight"].clone()
    ttt.fast_weight_update_(got, x["z"], x["v"], step_size=0.3, slots=place([1, 3, 5]), impl="cuda")
    assert torch.equal(got[::2], x["weight"][::2]) and not torch.equal(got[1::2], x["weight"][1::2])


@pytest.mark.parametrize("tokens", [1, 9])
def test_bits_do_not_depend_on_the_batch(tokens):
    x = operands(tokens, pool=6)
    together = apply(x, slots=place([4, 0, 2]))
    alone = apply({**x, "z": x["z"][1:2]}, slots=place([0]))
    assert torch.equal(together[1:2], alone)


@pytest.mark.sanitize
def test_schedules_give_the_same_bits(schedule):  # noqa: F811
    for tokens in (3, 40):
        x = operands(tokens)
        y, pool = apply(x), x["weight"].clone()
        ttt.fast_weight_update_(pool, x["z"], x["v"], step_size=x["step"], impl="cuda")
        assert error(y.double(), exact(x)) < EPS[torch.bfloat16]
        want = x["weight"].clone()
        ttt.fast_weight_update_(want, x["z"], x["v"], step_size=x["step"], impl="eager")
        assert error(pool, want) < 1e-6
        assert_same({"y": apply(x)}, {"y": y})


def test_slots_that_nobody_checked():
    """As on a GPU, where asking would wait: a wrong slot gives NaN and writes nothing, and an entry that two
    rows name becomes NaN. Straight to the kernels: on a host the op checks slots."""
    for tokens in (2, 9):
        x = operands(tokens, pool=6)
        y = step_cuda.apply(x["z"], x["weight"], x["scale"], place([4, -1, 6]))
        assert y[0].isfinite().all() and y[1:].isnan().all()
        pool = x["weight"].clone()
        step_cuda.update_(pool, x["z"], x["v"], None, 0.3, place([4, -1, 6]))
        assert torch.equal(pool[:4], x["weight"][:4]) and torch.equal(pool[5], x["weight"][5])
        step_cuda.update_(pool, x["z"], x["v"], None, 0.3, place([1, 3, 1]))
        assert pool[1].isnan().all() and pool[3].isfinite().all() and torch.equal(pool[0], x["weight"][0])


def test_views():
    """Rows of a larger pool, transposed weights, weights that do not begin at 16 bytes, sliced keys."""
    x = operands(3)
    y = apply(x)
    wide = torch.zeros(3, D, 2 * F, device=DEVICE)
    wide[..., :F] = x["weight"]
    odd = torch.empty(x["weight"].numel() + 1, device=DEVICE)[1:].view_as(x["weight"]).copy_(x["weight"])
    assert odd.is_contiguous() and odd.data_ptr() % 16
    views = {
        "rows": {**x, "weight": wide[..., :F]},
        "transposed": {**x, "weight": x["weight"].mT.contiguous().mT},
        "misaligned": {**x, "weight": odd},
        "keys": {**x, "z": x["z"].mT.contiguous().mT},
    }
    for view in views.values():
        assert torch.equal(apply(view), y)
    want = x["weight"].clone()
    ttt.fast_weight_update_(want, x["z"], x["v"], step_size=0.3, impl="cuda")
    for name in ("rows", "transposed", "misaligned"):
        pool = views[name]["weight"]
        ttt.fast_weight_update_(pool, x["z"], x["v"], step_size=0.3, impl="cuda")
        assert torch.equal(pool, want)


@pytest.mark.parametrize("rows, tokens", [(0, 1), (3, 0)])
def test_empty(rows, tokens):
    x = operands(tokens, rows=rows, pool=max(rows, 1))
    assert apply(x, scale=False).shape == (rows, tokens, D)
    before = x["weight"].clone()
    slots = torch.arange(rows, device=DEVICE)
    ttt.fast_weight_update_(x["weight"], x["z"], x["v"], step_size=0.3, slots=slots, impl="cuda")
    assert torch.equal(x["weight"], before)


def test_gradients():
    """Those of the apply are library products."""
    x = operands(3)
    leaves = [x[k].clone().requires_grad_() for k in ("z", "weight", "scale")]
    y = ttt.fast_weight_apply(leaves[0], leaves[1], row_scale=leaves[2], impl="cuda")
    want = [t.detach().double().requires_grad_() for t in leaves]
    y64 = ttt.fast_weight_apply(want[0], want[1], row_scale=want[2], impl="reference")
    dy = randn(*y.shape, seed=9, dtype=y.dtype).to(DEVICE)
    got = torch.autograd.grad(y, leaves, dy)
    exact_gradients = torch.autograd.grad(y64, want, dy.double())
    pairs = enumerate(zip(got, exact_gradients, strict=True))
    for name, (a, b) in pairs:
        assert_close({name: a.double()}, {name: b}, 1e-2)


@pytest.mark.parametrize("op", ["apply", "update"])
def test_refused_widths(op):
    x = operands(2, d=12)
    with pytest.raises(NotImplementedError, match="must have D and F that are multiples of 8, got D = 12"):
        if op == "apply":
            apply(x)
        else:
            ttt.fast_weight_update_(x["weight"], x["z"], x["v"], step_size=0.3, impl="cuda")
