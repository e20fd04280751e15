"""The step's Triton kernels: values, gradients, slots, layouts and bits. Interpreted without a GPU,
compiled (and in bfloat16 too) on one."""

import dataclasses
import itertools

import pytest
import torch
from helpers import Call, D, F, apply_call, assert_close, assert_same, error, randn, results

import ttt_kernels as ttt
from ttt_kernels.ops.step.heuristics import ApplyTiles, UpdateTiles

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
LAYOUTS = {  # slots, pool
    "rows": (None, None),
    "shared": (None, 1),
    "slots": ([4, 0, 2], 6),
    "repeated": ([4, 0, 4], 6),
}
RAW = torch.ops.ttt_kernels
SMALL = ApplyTiles(16, 16, 16, 1, 4, 2)  # several tiles in every direction of LARGE
LARGE = (20, 40)  # D, F


@pytest.fixture(scope="module")
def triton_apply():
    from ttt_kernels.ops.step import triton_apply

    return triton_apply


@pytest.fixture(scope="module")
def triton_update():
    from ttt_kernels.ops.step import triton_update

    return triton_update


def moved(call: Call) -> Call:
    """The call on DEVICE, by Triton."""
    tensors = {k: t.to(DEVICE) for k, t in call.tensors.items()}
    options = {k: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for k, t in call.options.items()}
    return Call(call.op, tensors, options | {"impl": "triton"})


def exact(call: Call) -> dict[str, torch.Tensor]:
    """The same by the reference in float64, in the precisions of `call`."""
    tensors = {k: t.double() for k, t in call.tensors.items()}
    return results(Call(call.op, tensors, call.options | {"impl": "reference"}))


def assert_exact(call: Call, bound: float) -> None:
    got = {k: t.double() for k, t in results(call).items()}
    assert_close(got, exact(call), bound)


def large_call(tokens: int, dtype=torch.float32, rows: int = 3, scale: bool = True, slots=(2, 0, 2)) -> Call:
    """As `apply_call`, on weights of several tiles."""
    d, f = LARGE
    tensors = {
        "z": randn(rows, tokens, f, dtype=dtype),
        "weight": randn(3, d, f, seed=2, dtype=torch.float32),
        "row_scale": randn(3, d, seed=3, dtype=torch.float32),
    }
    tensors = tensors if scale else dict(itertools.islice(tensors.items(), 2))
    return moved(Call(ttt.fast_weight_apply, tensors, {"slots": torch.tensor(slots)}))


def write(rows: int, tokens: int, d: int = D, f: int = F, dtype=torch.float32, seed: int = 10):
    """z, v of one chunk."""
    z = randn(rows, tokens, f, seed=seed, dtype=dtype)
    return z.to(DEVICE), randn(rows, tokens, d, seed=seed + 1, dtype=dtype).to(DEVICE)


def pool_of(*shape: int) -> torch.Tensor:
    return randn(*shape, seed=2, dtype=torch.float32).to(DEVICE)


def on_device(*values: int, dtype=torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


# Values


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, layout, scale, tokens):
    slots, pool = LAYOUTS[layout]
    call = moved(apply_call(3, tokens, slots=slots, pool=pool, scale=scale, dtype=dtype))
    assert_exact(call, 2e-6 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("scale", [False, True])
def test_every_tile_and_split(tokens, splits, scale, monkeypatch, triton_apply):
    """Token tiles, weight tiles and parts of F that end inside a tile, forward and transposed."""
    tiles = dataclasses.replace(SMALL, t=1 if tokens == 1 else 16, splits=splits)
    monkeypatch.setattr(triton_apply, "apply_tiles", lambda *_: tiles)
    assert_exact(large_call(tokens, scale=scale), 2e-6)


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_precision_contract(tokens, layout, dtype):
    """The applied weight is rounded to z.dtype, y once, after the row scale; nothing else is."""
    slots, pool = LAYOUTS[layout]
    call = moved(apply_call(3, tokens, slots=slots, pool=pool, dtype=dtype, scale=True))
    rounded = call.tensors["weight"].to(dtype)
    want = exact(Call(call.op, call.tensors | {"weight": rounded}, call.options))["out0"]
    y = call()
    ulp = torch.finfo(dtype).eps * want.abs()
    assert y.dtype == dtype
    assert ((y.double() - want).abs() <= 0.51 * ulp + 1e-5 * want.abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("slots", [None, [4, 0, 2]])
def test_update(slots, tokens, steps, dtype):
    z, v = write(3, tokens, dtype=dtype)
    before = pool_of(3 if slots is None else 6, D, F)
    size = pool_of(3) if steps else 0.3
    weight, where = before.clone(), None if slots is None else on_device(*slots)
    ttt.fast_weight_update_(weight, z, v, step_size=size, slots=where, impl="triton")
    want, exact_size = before.double(), size.double() if steps else size
    ttt.fast_weight_update_(
        want, z.double(), v.double(), step_size=exact_size, slots=where, impl="reference"
    )
    assert error(weight.double(), want) < 1e-6
    others = [n for n in range(len(before)) if n not in (slots or range(3))]
    assert torch.equal(weight[others], before[others])


@pytest.mark.parametrize("tiles", [UpdateTiles(16, 16, 16, 4, 2), UpdateTiles(32, 16, 32, 4, 2)])
def test_every_tile_of_an_update(tiles, monkeypatch, triton_update):
    """Also of the gradient of the pool, which sums rows that share an entry."""
    monkeypatch.setattr(triton_update, "update_tiles", lambda *_: tiles)
    z, v = write(2, 20, *LARGE)
    weight = pool_of(2, *LARGE)
    want = weight.double()
    ttt.fast_weight_update_(weight, z, v, step_size=0.3, impl="triton")
    ttt.fast_weight_update_(want, z.double(), v.double(), step_size=0.3, impl="reference")
    assert error(weight.double(), want) < 1e-6
    assert_exact(large_call(5), 2e-6)


# Layouts


@pytest.mark.parametrize("tokens", [1, 3])
def test_views_of_a_larger_pool(tokens):
    """Strided pools, scales, steps and rows, and int32 slots: the same bits, and nothing else is written."""
    layers, scales = pool_of(6, 2, D, F), pool_of(6, D, 2)
    pool, scale, other = layers[:, 1], scales[..., 1], layers[:, 0].clone()
    z, v = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in write(3, tokens))
    slots, sizes = on_device(4, 9, 0, 9, 2, 9, dtype=torch.int32)[::2], pool_of(3, 2)[:, 1]
    args = {"slots": slots, "impl": "triton"}
    want = ttt.fast_weight_apply(
        z.contiguous(), pool.contiguous(), row_scale=scale.contiguous(), slots=slots.long(), impl="triton"
    )
    assert torch.equal(ttt.fast_weight_apply(z, pool, row_scale=scale, **args), want)
    changed = pool.contiguous()
    ttt.fast_weight_update_(changed, z, v, step_size=sizes.contiguous(), **args)
    ttt.fast_weight_update_(pool, z, v, step_size=sizes, **args)
    assert torch.equal(pool, changed) and torch.equal(layers[:, 0], other)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_transposed_pool(tokens):
    """Weights that are contiguous along their rows, read and written where they lie."""
    z, v = write(2, tokens, *LARGE)
    pool = pool_of(2, *LARGE[::-1]).mT
    assert pool.stride(1) == 1
    want = ttt.fast_weight_apply(z.double(), pool.double(), impl="reference")
    assert error(ttt.fast_weight_apply(z, pool, impl="triton").double(), want) < 1e-6
    changed = pool.contiguous()
    for weight in (pool, changed):
        ttt.fast_weight_update_(weight, z, v, step_size=0.3, impl="triton")
    assert torch.equal(pool, changed)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_batches(rows):
    """One weight for all rows, one each, and slots."""
    weight = pool_of(4, D, F)
    slots = on_device(3, 1, 1, 0, 2, 3, 3)[:rows]
    z, v = write(rows, 3)
    want = ttt.fast_weight_apply(z, weight, slots=slots, impl="reference")
    assert error(ttt.fast_weight_apply(z, weight, slots=slots, impl="triton"), want) < 1e-6
    shared = ttt.fast_weight_apply(z, weight[:1], impl="reference")
    assert error(ttt.fast_weight_apply(z, weight[:1], impl="triton"), shared) < 1e-6
    own, copy = weight[:rows] if rows < 4 else pool_of(rows, D, F), weight.clone()
    want = own.clone()
    ttt.fast_weight_update_(own, z, v, step_size=0.3, impl="triton")
    ttt.fast_weight_update_(want, z, v, step_size=0.3, impl="reference")
    assert error(own, want) < 1e-6 and torch.equal(weight[rows:], copy[rows:])


# Bits


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("splits", [1, 2])
def test_a_row_does_not_depend_on_its_place(tokens, splits, monkeypatch, triton_apply):
    """Any order of rows gives the bits of each row alone, and the next run gives them again."""
    tiles = dataclasses.replace(SMALL, t=1 if tokens == 1 else 16, splits=splits)
    monkeypatch.setattr(triton_apply, "apply_tiles", lambda *_: tiles)
    weight = pool_of(6, *LARGE)
    z, v = write(4, tokens, *LARGE)
    slots, order = on_device(5, 1, 3, 0), on_device(2, 0, 3, 1)

    def read(rows):
        return ttt.fast_weight_apply(z[rows], weight, slots=slots[rows], impl="triton")

    def changed(*batches):
        pool = weight.clone()
        for rows in batches:
            step = {"step_size": 0.3, "slots": slots[rows], "impl": "triton"}
            ttt.fast_weight_update_(pool, z[rows], v[rows], **step)
        return pool

    everyone, alone = slice(None), [slice(b, b + 1) for b in range(4)]
    y = read(everyone)
    assert torch.equal(read(everyone), y) and torch.equal(read(order), y[order])
    assert all(torch.equal(read(row), y[row]) for row in alone)
    together = changed(everyone)
    assert torch.equal(changed(order), together) and torch.equal(changed(*alone), together)


def test_gradients_repeat():
    """Rows that share an entry are summed in the order of the batch."""
    call = large_call(5, rows=4, slots=(2, 0, 2, 2))
    assert_same(results(call), results(call))


# Slots, where nobody on the host has looked at them


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("splits", [1, 2])
def test_slots_outside_the_pool(tokens, splits, monkeypatch, triton_apply, triton_update):
    """Such a row gives NaN, writes nothing and has no part in a gradient; the others are as ever."""
    tiles = dataclasses.replace(SMALL, t=1 if tokens == 1 else 16, splits=splits)
    monkeypatch.setattr(triton_apply, "apply_tiles", lambda *_: tiles)
    weight, scale = pool_of(3, *LARGE), pool_of(3, LARGE[0])
    z, v = write(4, tokens, *LARGE)
    bad, good = on_device(-1, 2, 3, 0), on_device(2, 0)
    rows = on_device(1, 3)
    y = triton_apply.apply(z, weight, scale, bad)
    assert y[[0, 2]].isnan().all()
    assert torch.equal(y[rows], triton_apply.apply(z[rows], weight, scale, good))
    dz, *pool = triton_apply.apply_backward(v, z, weight, scale, bad, True)
    assert dz[[0, 2]].isnan().all()
    want = triton_apply.apply_backward(v[rows], z[rows], weight, scale, good, True)
    assert all(map(torch.equal, [dz[rows], *pool], want))
    changed, expected = weight.clone(), weight.clone()
    triton_update.update_(changed, z, v, None, 0.3, bad)
    triton_update.update_(expected, z[rows], v[rows], None, 0.3, good)
    assert torch.equal(changed, expected)
    assert triton_apply.apply(z[:1], weight[:0], scale[:0], bad[1:2]).isnan().all()


def test_an_entry_that_is_written_twice(triton_update):
    """No race that somebody wins: NaN, in that entry alone."""
    weight = pool_of(3, *LARGE)
    before, (z, v) = weight.clone(), write(3, 2, *LARGE)
    triton_update.update_(weight, z, v, None, 0.3, on_device(2, 0, 2))
    assert weight[2].isnan().all()
    triton_update.update_(before, z[1:2], v[1:2], None, 0.3, on_device(0))
    assert torch.equal(weight[:2], before[:2])


def launches(call, architecture: int = 90) -> list:
    """Recorded with tensors that hold no values: reading one on the host is an error."""
    from ttt_kernels.ops.triton_launch import record

    with record(architecture) as found:
        call()
    return found


def meta(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("d, f", [(4096, 14336), (2560, 9728), (1024, 3072)])
def test_decode_is_one_launch_and_reads_nothing_on_the_host(d, f, triton_apply, triton_update):
    pool, slots = meta(9, d, f, dtype=torch.float32), meta(8, dtype=torch.int64)
    z, v, scale = meta(8, 1, f), meta(8, 1, d), meta(9, d, dtype=torch.float32)
    (found,) = launches(lambda: triton_apply.apply(z, pool, scale, slots))
    assert found.kernel is triton_apply.step_apply_matvec_kernel
    (found,) = launches(lambda: triton_apply.apply(z, pool[:1], None, None))
    assert found.arguments["rows"] == 1 and found.arguments["tokens"] == 8  # the weight is read once
    assert len(launches(lambda: triton_update.update_(pool, z, v, None, 0.3, slots))) == 1
    assert not launches(lambda: triton_apply.apply(z[:, :0], pool, scale, slots))
    gradients = launches(lambda: triton_apply.apply_backward(v, z, pool, scale, slots, True))
    assert triton_update.step_apply_bwd_pool_kernel in {found.kernel for found in gradients}


# The op


def samples():
    for scale, layout in enumerate(("shared", "repeated")):
        slots, pool = LAYOUTS[layout]
        call = moved(apply_call(slots=slots, pool=pool, dtype=torch.float32, scale=bool(scale)))
        common = (*call.tensors.values(), *(() if scale else (None,)), call.options["slots"])
        yield "step_apply", (*common, "triton")
        yield "step_apply_bwd", (torch.ones_like(call()), *common, bool(scale), "triton")
    z, v = write(3, 4)
    yield "step_update", (pool_of(6, D, F), z, v, pool_of(3), 0.3, on_device(4, 0, 2), "triton")


def test_opcheck():
    for name, arguments in samples():
        torch.library.opcheck(getattr(RAW, name).default, arguments)


def test_update_compiles_to_one_graph():
    def step(weight, z, v, slots):
        ttt.fast_weight_update_(weight, z, v, step_size=0.3, slots=slots, impl="triton")
        return ttt.fast_weight_apply(z, weight, slots=slots, impl="triton")

    z, v = write(3, 4)
    weights = [pool_of(6, D, F) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    runs = zip((compiled, step), weights, strict=True)
    ys = [run(w, z, v, on_device(4, 0, 2)) for run, w in runs]
    assert_same({"w": weights[0], "y": ys[0]}, {"w": weights[1], "y": ys[1]})


@pytest.mark.skipif(GPU, reason="on a GPU nobody waits to look at the slots")
def test_slots_on_the_cpu_are_checked():
    z, v = write(2, 1)
    pool = pool_of(3, D, F)
    with pytest.raises(ValueError, match=r"slots must be in \[0, N\) = \[0, 3\), got slots\[1\] = 3"):
        ttt.fast_weight_apply(z, pool, slots=on_device(0, 3), impl="triton")
    with pytest.raises(ValueError, match="slots must be distinct to be written"):
        ttt.fast_weight_update_(pool, z, v, step_size=0.1, slots=on_device(1, 1), impl="triton")


def test_float64_is_refused():
    z, v = (t.double() for t in write(2, 1))
    pool = pool_of(2, D, F).double()
    with pytest.raises(NotImplementedError, match="fast_weight_apply here: its kernels take .* not float64"):
        ttt.fast_weight_apply(z, pool, impl="triton")
    with pytest.raises(NotImplementedError, match="fast_weight_update_ here: its kernels .* not float64"):
        ttt.fast_weight_update_(pool, z, v, step_size=0.1, impl="triton")
