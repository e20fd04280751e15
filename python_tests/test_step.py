"""Read and write of a pool of fast weights: values, gradients, slots, and what must not be touched."""

import itertools
import re

import pytest
import torch
from helpers import Call, D, F, apply_call, assert_close, assert_same, error, randn, results

import ttt_kernels as ttt
from ttt_kernels.ops import _gemm
from ttt_kernels.ops.step import eager
from ttt_kernels.types import compute_dtype

RAW = torch.ops.ttt_kernels
DOUBLE = torch.float64
LAYOUTS = {  # slots, pool
    "rows": (None, None),
    "shared": (None, 1),
    "slots": ([4, 0, 2], 6),
    "repeated": ([4, 0, 4], 6),
}


def write(rows: int, tokens: int, dtype=DOUBLE, seed: int = 10):
    """z, v of one chunk."""
    z = randn(rows, tokens, F, seed=seed, dtype=dtype)
    return z, randn(rows, tokens, D, seed=seed + 1, dtype=dtype)


def step_samples(dtype):
    """Arguments of the raw ops."""
    acc = compute_dtype(dtype)
    for (slots, pool), scale in itertools.product(LAYOUTS.values(), [False, True]):
        call = apply_call(slots=slots, pool=pool, dtype=dtype, scale=scale)
        common = (*call.tensors.values(), *(() if scale else (None,)), call.options["slots"])
        yield "step_apply", (*common, "eager")
        for need_pool in (False, True):
            yield "step_apply_bwd", (torch.ones_like(call()), *common, need_pool, "eager")
    z, v = write(3, 4, dtype)
    for slots in (None, torch.tensor([4, 0, 2])):
        weight = randn(3 if slots is None else 6, D, F, dtype=acc)
        for size in (None, randn(3, seed=3, dtype=acc)):
            yield "step_update", (weight, z, v, size, 0.3, slots, "eager")


@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
def test_opcheck(dtype):
    for name, arguments in step_samples(dtype):
        torch.library.opcheck(getattr(RAW, name).default, arguments)


# Values


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_apply_matches_the_reference(layout, scale, tokens):
    slots, pool = LAYOUTS[layout]
    call = apply_call(3, tokens, slots=slots, pool=pool, scale=scale)
    assert_close(results(call, impl="eager"), results(call, impl="reference"), 1e-12)


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_apply_gradcheck(layout, impl):
    slots, pool = LAYOUTS[layout]
    call = apply_call(3, 2, slots=slots, pool=pool, scale=True, impl=impl)
    names = list(call.tensors)
    assert torch.autograd.gradcheck(
        lambda *t: call(**dict(zip(names, t, strict=True))), tuple(call.leaves().values())
    )


@pytest.mark.parametrize("token_tile, row_tile", [(1, 1), (3, 2), (16, 3)])
def test_tiles(token_tile, row_tile, monkeypatch):
    monkeypatch.setattr(eager, "TOKEN_TILE", token_tile)
    monkeypatch.setattr(_gemm, "ROW_TILE", row_tile)
    for slots, pool in LAYOUTS.values():
        call = apply_call(3, 7, slots=slots, pool=pool, scale=True)
        assert_close(results(call), results(call, impl="reference"), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_precision_contract(layout, dtype, monkeypatch):
    """The applied weight is rounded to z.dtype, y once, after the row scale; nothing else is."""
    monkeypatch.setattr(_gemm, "ROW_TILE", 2)
    slots, pool = LAYOUTS[layout]
    call = apply_call(3, 5, slots=slots, pool=pool, dtype=dtype, scale=True)
    z, weight = call.tensors["z"], call.tensors["weight"]
    rounded = weight.to(dtype).double()
    exact = ttt.fast_weight_apply(
        z.double(), rounded, row_scale=call.tensors["row_scale"].double(), slots=call.options["slots"]
    )
    y = call()
    assert y.dtype == dtype
    ulp = torch.finfo(dtype).eps * exact.abs()
    assert ((y.double() - exact).abs() <= 0.51 * ulp + 1e-5 * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_low_precision(dtype):
    call = apply_call(3, 5, slots=[4, 0, 4], pool=6, dtype=dtype, scale=True)
    got = results(call)
    low = {k: t.double() for k, t in call.tensors.items()}
    exact = results(Call(call.op, low, call.options), impl="reference")
    for name, value in exact.items():
        assert error(got[name].double(), value) < 8 * torch.finfo(dtype).eps
    assert got["dz"].dtype == dtype and got["dweight"].dtype == torch.float32


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("slots", [None, [4, 0, 2]])
def test_update(slots, tokens, steps, impl):
    z, v = write(3, tokens)
    before = randn(3 if slots is None else 6, D, F)
    size = randn(3, seed=3) if steps else 0.3
    weight, where = before.clone(), None if slots is None else torch.tensor(slots)
    address = weight.data_ptr()
    assert ttt.fast_weight_update_(weight, z, v, step_size=size, slots=where, impl=impl) is None
    assert weight.data_ptr() == address
    want = before.clone()
    for b, n in enumerate(slots or range(3)):
        want[n] += (size[b] if steps else size) * v[b].T @ z[b]
    assert error(weight, want) < 1e-14
    others = [n for n in range(len(before)) if n not in (slots or range(3))]
    assert torch.equal(weight[others], before[others])


# Properties


def test_update_then_apply_is_a_scan_of_two_chunks():
    chunk, rows = 4, 3
    z, v = write(rows, 2 * chunk)
    w0 = randn(D, F, seed=5)
    want, final = ttt.fast_weight_scan(
        z, v, w0, chunk_size=chunk, step_size=0.3, preserve_row_norm=True, return_state=True
    )
    pool = w0.repeat(rows, 1, 1)
    first = ttt.fast_weight_apply(z[:, :chunk], w0[None])
    ttt.fast_weight_update_(pool, z[:, :chunk], v[:, :chunk], step_size=0.3)
    scale = w0.norm(dim=1) / pool.norm(dim=2)
    second = ttt.fast_weight_apply(z[:, chunk:], pool, row_scale=scale)
    assert error(torch.cat([first, second], 1), want) < 1e-13
    ttt.fast_weight_update_(pool, z[:, chunk:], v[:, chunk:], step_size=0.3)
    assert error(pool, final) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_place(dtype):
    """Any order of rows gives the bits of each row alone."""
    weight = randn(6, D, F, dtype=torch.float32)
    z, v = write(4, 3, dtype)
    slots = torch.tensor([5, 1, 3, 0])
    order = torch.tensor([2, 0, 3, 1])
    y = ttt.fast_weight_apply(z, weight, slots=slots)
    assert torch.equal(ttt.fast_weight_apply(z[order], weight, slots=slots[order]), y[order])
    together, permuted, alone = weight.clone(), weight.clone(), weight.clone()
    ttt.fast_weight_update_(together, z, v, step_size=0.3, slots=slots)
    ttt.fast_weight_update_(permuted, z[order], v[order], step_size=0.3, slots=slots[order])
    for b in range(4):
        row = slice(b, b + 1)
        assert torch.equal(ttt.fast_weight_apply(z[row], weight, slots=slots[row]), y[row])
        ttt.fast_weight_update_(alone, z[row], v[row], step_size=0.3, slots=slots[row])
    assert torch.equal(permuted, together) and torch.equal(alone, together)


def test_no_copy_of_a_weight():
    """In float32 nothing as large as one weight is allocated, for reads and for writes."""
    from ttt_kernels.cli.measure import extra_memory

    d, f = 256, 512
    weight, z, v = torch.randn(4, d, f), torch.randn(3, 1, f), torch.randn(3, 1, d)
    device, one = torch.device("cpu"), 4 * d * f
    for slots in (torch.tensor([3, 0, 2]), None):
        pool = weight if slots is not None else weight[:3]

        def read(pool=pool, slots=slots):
            return ttt.fast_weight_apply(z, pool, slots=slots)

        def change(pool=pool, slots=slots):
            return ttt.fast_weight_update_(pool, z, v, step_size=0.1, slots=slots)

        assert extra_memory(read, device) < one / 8
        assert extra_memory(change, device) < one / 8


def test_views_of_a_larger_pool():
    """Strided pools, rows and int32 slots: the same result, and nothing else is written."""
    layers = randn(6, 2, D, F)
    pool, other = layers[:, 1], layers[:, 0].clone()
    z, v = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in write(3, 4))
    slots = torch.tensor([4, 0, 2], dtype=torch.int32)
    want = ttt.fast_weight_apply(z.contiguous(), pool.contiguous(), slots=slots.long())
    assert error(ttt.fast_weight_apply(z, pool, slots=slots), want) < 1e-14
    changed = pool.clone()
    ttt.fast_weight_update_(changed, z, v, step_size=0.3, slots=slots)
    ttt.fast_weight_update_(pool, z, v, step_size=0.3, slots=slots)
    assert error(pool, changed) < 1e-14 and torch.equal(layers[:, 0], other)


def test_an_unneeded_pool_gradient_is_not_formed():
    call = apply_call(slots=[1, 0, 1], pool=2, scale=True)
    z = call.tensors["z"].clone().requires_grad_()
    (dz,) = torch.autograd.grad(call(z=z), z, torch.ones(3, 5, D, dtype=DOUBLE))
    assert torch.equal(dz, results_with_ones(call)["dz"])


def results_with_ones(call):
    leaves = call.leaves()
    grads = torch.autograd.grad(call(**leaves).sum(), list(leaves.values()))
    return {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_empty_batches(impl):
    weight = randn(4, D, F)
    none = torch.zeros(0, dtype=torch.int64)
    z, v = write(0, 3)
    assert ttt.fast_weight_apply(z, weight, slots=none, impl=impl).shape == (0, 3, D)
    assert ttt.fast_weight_apply(z, weight[:1], impl=impl).shape == (0, 3, D)
    before = weight.clone()
    ttt.fast_weight_update_(weight, z, v, step_size=0.3, slots=none, impl=impl)
    assert torch.equal(weight, before)


def test_update_compiles_to_one_graph():
    """The mutation reaches the caller's tensor, and the read after it."""

    def step(weight, z, v, slots):
        ttt.fast_weight_update_(weight, z, v, step_size=0.3, slots=slots)
        return ttt.fast_weight_apply(z, weight, slots=slots)

    z, v = write(3, 4)
    slots = torch.tensor([4, 0, 2])
    weights = [randn(6, D, F) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ys = [f(w, z, v, slots) for f, w in zip((compiled, step), weights, strict=True)]
    assert_same({"w": weights[0], "y": ys[0]}, {"w": weights[1], "y": ys[1]})


def test_update_under_autocast():
    z, v = write(3, 4, torch.float32)
    got, want = (randn(3, D, F, dtype=torch.float32) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        ttt.fast_weight_update_(got, z, v, step_size=0.3)
    ttt.fast_weight_update_(want, z.bfloat16(), v.bfloat16(), step_size=0.3)
    assert torch.equal(got, want)


# Refusals


def bad(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def refused(kind, message, op, **arguments):
    tensors = {k: t for k, t in arguments.items() if isinstance(t, torch.Tensor)}
    versions = {k: t._version for k, t in tensors.items()}
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        op(**arguments)
    assert versions == {k: t._version for k, t in tensors.items()}


SLOTS = [
    ({"slots": [0, 1, 2]}, TypeError, "slots must be a tensor [B], got list"),
    ({"slots": bad(0, 1)}, ValueError, "slots must have shape [B] = (3,) to match z, got (2,)"),
    ({"slots": bad(0, 1, 2, dtype=torch.int16)}, TypeError,
     "slots must be int32 or int64, got int16"),
    ({"slots": bad(0, 6, 2)}, ValueError, "slots must be in [0, N) = [0, 6), got slots[1] = 6"),
    ({"slots": bad(0, 1, -1)}, ValueError, "slots must be in [0, N) = [0, 6), got slots[2] = -1"),
    ({"impl": "cuda"}, NotImplementedError, "impl='cuda' cannot run fast_weight_"),
    ({"weight": torch.zeros(6, D, F + 1)}, ValueError,
     "weight must have shape [N, D, F] = (N, D, 7) to match z, got (6, 5, 8)"),
    ({"weight": torch.zeros(6, D, F, dtype=DOUBLE)}, TypeError,
     "weight must be float32 for z in float32, got float64"),
    ({"weight": torch.zeros(D, F)}, ValueError, "weight must have shape [N, D, F], got (5, 7)"),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("changes, kind, message", SLOTS, ids=[m for *_, m in SLOTS])
def test_refusals_of_both(changes, kind, message, impl):
    z, v = write(3, 4, torch.float32)
    arguments = {"z": z, "weight": torch.zeros(6, D, F), "slots": bad(4, 0, 2), "impl": impl}
    arguments |= changes
    refused(kind, message, ttt.fast_weight_apply, **arguments)
    refused(kind, message, ttt.fast_weight_update_, **arguments, v=v, step_size=0.1)


def test_refusals_of_apply():
    z, _ = write(3, 4, torch.float32)
    weight = torch.zeros(6, D, F)
    refused(ValueError, "weight without slots needs N = B = 3 or N = 1, got N = 6",
            ttt.fast_weight_apply, z=z, weight=weight)  # fmt: skip
    for scale, kind, message in (
        (torch.ones(3, D), ValueError, "row_scale must have shape [N, D] = (6, 5) to match weight"),
        (torch.ones(6, D).bfloat16(), TypeError, "row_scale must be float32 for z in float32"),
    ):
        refused(kind, message, ttt.fast_weight_apply, z=z, weight=weight, row_scale=scale,
                slots=bad(0, 1, 2))  # fmt: skip


def test_refusals_of_update():
    z, v = write(3, 4, torch.float32)
    good = {"weight": torch.zeros(6, D, F), "z": z, "v": v, "step_size": 0.1, "slots": bad(4, 0, 2)}
    for changes, kind, message in (
        ({"slots": bad(4, 0, 4)}, ValueError, "slots must be distinct to be written, got [4, 0, 4]"),
        ({"slots": None}, ValueError, "weight without slots needs N = B = 3, got N = 6"),
        ({"v": v[:, :3]}, ValueError,
         "v must have shape [B, C, D] = (3, 4, 5) to match z and weight, got (3, 3, 5)"),
        ({"step_size": torch.ones(2)}, ValueError,
         "step_size must have shape [B] = (3,) to match z, got (2,)"),
        ({"step_size": float("nan")}, ValueError, "step_size must be finite, got nan"),
        ({"weight": torch.zeros(1, D, F).expand(6, D, F)}, ValueError,
         "weight must have memory of its own for every entry"),
        ({"weight": torch.zeros(6, D, F, requires_grad=True)}, RuntimeError,
         "fast_weight_update_ is not differentiable, and weight requires a gradient"),
        ({"v": v.clone().requires_grad_()}, RuntimeError,
         "fast_weight_update_ is not differentiable, and v requires a gradient"),
    ):  # fmt: skip
        refused(kind, message, ttt.fast_weight_update_, **good | changes)
    with torch.no_grad():
        ttt.fast_weight_update_(**good | {"weight": torch.zeros(6, D, F, requires_grad=True)})
