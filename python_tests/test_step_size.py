"""Step sizes in Gram form: against the released formula on G itself, and against an SVD."""

import pytest
import torch
from helpers import Call, assert_close, assert_same, randn, results

import ttt_kernels as ttt
from ttt_kernels.ops.step_size import eager, reference
from ttt_kernels.types import compute_dtype

D, F, C, BOUND = 5, 7, 4, 1e-10
LENGTHS = (0, 1, C - 1, C, C + 1, 2 * C, 19)
PACKINGS = ([0, 19], [0, 0, 1, 4, 4, 6], [0, 5, 5, 17, 20, 20], [0, 0])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(op, batch=2, tokens=13, *, cu=None, dtype=torch.float64, **options) -> Call:
    batch, tokens = (batch, tokens) if cu is None else (1, cu[-1])
    cu_seqlens = None if cu is None else torch.tensor(cu)
    tensors = {
        "z": randn(batch, tokens, F, dtype=dtype),
        "v": randn(batch, tokens, D, seed=1, dtype=dtype),
    }
    return Call(op, tensors, {"chunk_size": C, "cu_seqlens": cu_seqlens, "lr": 0.3, **options})


def spectral(*args, **options) -> Call:
    return make(ttt.spectral_step_size, *args, **options)


def clipped(*args, **options) -> Call:
    return make(ttt.clipped_step_size, *args, **{"max_norm": 10.0, **options})


MAKERS = {"spectral": (spectral, reference.spectral), "clipped": (clipped, reference.clipped)}


@pytest.fixture(params=MAKERS)
def op(request):
    return MAKERS[request.param]


@pytest.fixture(params=[None, 2 * C * C], ids=["one_group", "small_groups"])
def grouped(request, monkeypatch):
    """Chunks are handled in groups of bounded memory."""
    if request.param:
        monkeypatch.setattr(eager, "GROUP_ELEMENTS", request.param)


def compare(call: Call, formula, bound: float = BOUND) -> None:
    want = Call(formula, call.tensors, call.options)
    if call()[:, : call.tensors["z"].shape[1] // C].any():
        assert_close(results(call), results(want), bound)
    else:  # no complete chunk: the reference has no graph
        assert_close({"s": call()}, {"s": want()}, 0.0)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_dense(op, tokens, grouped):
    for batch in (0, 1, 2, 7):
        compare(op[0](batch, tokens), op[1])


@pytest.mark.parametrize("cu", PACKINGS, ids=str)
def test_packed(op, cu, grouped):
    compare(op[0](cu=cu), op[1])


@pytest.mark.parametrize("chunk", [1, 2, 13])
def test_chunk_sizes(op, chunk):
    compare(op[0](2, 13, chunk_size=chunk), op[1])


@pytest.mark.parametrize("iterations", [1, 2, 5, 9])
def test_iterations(iterations):
    compare(spectral(iterations=iterations), reference.spectral)


@pytest.mark.parametrize("max_norm", [1e-3, 5.0, 10.0, 1e6])
def test_max_norms(max_norm):
    compare(clipped(max_norm=max_norm), reference.clipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_max_norms(dtype):
    """Squares of these leave float32: "never clip", and clip to almost nothing."""
    call = clipped(dtype=dtype)
    assert torch.equal(call(max_norm=1e25)[:, :3], torch.full((2, 3), 0.3, dtype=dtype))
    tiny = call(max_norm=1e-25)[:, :3]
    assert torch.allclose(tiny * 1e25, call(max_norm=1e-3)[:, :3] * 1e3, rtol=1e-5)
    call.tensors["v"] = call.tensors["v"] * 0
    assert torch.equal(call(max_norm=1e-25)[:, :3], torch.full((2, 3), 0.3, dtype=dtype))


def test_shapes_and_empty_chunks(op):
    steps = op[0](2, 13)()
    assert steps.shape == (2, 4) and steps[:, :3].all() and not steps[:, 3].any()
    packed = op[0](cu=[0, 3, 3, 8, 13])()
    assert packed.shape == (1, 5)
    assert packed[0].ne(0).tolist() == [False, True, False, True, False]
    assert op[0](2, 0)().shape == (2, 0)
    no_sequences = op[0](1, 0)
    assert no_sequences(cu_seqlens=torch.tensor([0])).shape == (1, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision(op, dtype):
    """float32 steps from low-precision operands; gradients in the dtype of the operands."""
    make_call, formula = op
    call = make_call(2, 13, dtype=dtype)
    got = results(call)
    acc = compute_dtype(dtype)
    assert got["out0"].dtype == acc and got["dz"].dtype == got["dv"].dtype == dtype
    exact = Call(formula, {k: t.double() for k, t in call.tensors.items()}, call.options)
    want = results(exact)
    bound = 1e-5 if acc == torch.float32 else BOUND
    assert_close({"s": got["out0"].double()}, {"s": want["out0"]}, bound)
    # The direction of the output gradient is drawn in the output's own precision.
    names = ("dz", "dv")
    grads = [{k: r[k].double() for k in names} for r in (got, want)]
    assert_close(*grads, max(bound, 2 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed, grouped):
    cu = [0, 3, 3, 12] if packed else None
    for maker, formula in MAKERS.values():
        call = maker(2, 9, cu=cu)
        for op in (call.op, formula):
            assert torch.autograd.gradcheck(
                lambda z, v, op=op, call=call: op(z=z, v=v, **call.options),
                list(call.leaves().values()),
            )


def writes(call: Call) -> torch.Tensor:
    """G of every complete chunk of a dense call, [B, chunks, D, F]."""
    z, v = (t[:, : t.shape[1] // C * C].unflatten(1, (-1, C)) for t in call.tensors.values())
    return v.mT @ z


def test_enough_iterations_find_the_largest_singular_value():
    call = spectral(iterations=500)
    sigma = torch.linalg.matrix_norm(writes(call), ord=2)
    assert torch.allclose(call()[:, :3], 0.3 / sigma, rtol=1e-8)
    # Fewer iterations underestimate sigma: the step is never shorter than lr / sigma.
    assert (call(iterations=1)[:, :3] >= 0.3 / sigma * (1 - 1e-12)).all()


def test_rank_one_chunk_is_exact_after_one_iteration():
    z, v = randn(1, C, F), randn(1, 1, D, seed=1).expand(1, C, D)
    got = ttt.spectral_step_size(z, v, chunk_size=C, lr=2.0, iterations=1)
    assert torch.allclose(got, 2.0 / (v[0, 0].norm() * z[0].sum(0).norm()), rtol=1e-12)


def test_clip_keeps_the_write_within_bounds():
    norms = torch.linalg.matrix_norm(writes(clipped()))
    bound = norms.median().item()
    steps = clipped(max_norm=bound)()[:, :3]
    assert torch.allclose(steps, 0.3 * (bound / norms).clamp(max=1), rtol=1e-12)
    assert (steps == 0.3).any() and (steps < 0.3).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_chunks(dtype):
    """Nothing to write: the floor of sigma, no clipping; finite values, no gradient."""
    for call, expected in ((spectral(dtype=dtype), 0.3 / 1e-6), (clipped(dtype=dtype), 0.3)):
        for name in ("z", "v"):
            call.tensors[name][:, :C] = 0
        got = results(call)
        assert torch.allclose(got["out0"][:, 0], torch.full((2,), expected, dtype=dtype))
        assert all(t.isfinite().all() for t in got.values())
        assert not got["dz"][:, :C].any() and not got["dv"][:, :C].any()
        assert got["dz"][:, C : 3 * C].all()


def test_zero_chunks_agree_with_the_formula(op):
    call = op[0]()
    call.tensors["v"][:, :C] = 0
    compare(call, op[1])


def test_scales_as_documented():
    call = spectral()
    z, v = call.tensors.values()
    assert torch.allclose(call(z=4 * z, v=0.5 * v)[:, :3], call()[:, :3] / 2, rtol=1e-12)
    assert torch.allclose(call(lr=-0.6), -2 * call(), rtol=1e-14)


@pytest.mark.parametrize("cu", [None, [0, 5, 5, 13]], ids=str)
def test_chunks_do_not_see_one_another(op, cu):
    call = op[0](1, 13, cu=cu)
    clean = results(call)
    for name in ("z", "v"):
        dirty = call.tensors[name].clone()
        dirty[:, 6] = float("nan")
        got = call(**{name: dirty})
        hit = torch.zeros(4, dtype=torch.bool)
        hit[1 if cu is None else 2] = True
        assert torch.equal(got[0].isnan(), hit)
        assert torch.equal(got[0][~hit], clean["out0"][0][~hit])


def test_incomplete_chunk_is_not_read(op):
    call = op[0](2, 13)
    clean = results(call)
    dirty = {k: t.clone() for k, t in call.tensors.items()}
    for tensor in dirty.values():
        tensor[:, 12] = float("nan")
    got = results(Call(call.op, dirty, call.options))
    assert_same(got, clean)


def test_rows_independent_and_repeatable(op):
    call = op[0](3, 13)
    full = call()
    for b in range(3):
        rows = {k: t[b : b + 1] for k, t in call.tensors.items()}
        assert torch.equal(call(**rows)[0], full[b])
    assert_same(results(call), results(call))


def test_strided_and_expanded(op):
    call = op[0](3, 13)
    want = results(call)
    for name, tensor in call.tensors.items():
        moved = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        assert_same(results(Call(call.op, {**call.tensors, name: moved}, call.options)), want)
    leaves, dense = call.leaves(), call.leaves()
    call(**leaves).sum().backward()  # an expanded output gradient
    call(**dense).backward(torch.ones(3, 4, dtype=torch.float64))
    assert all(torch.equal(leaves[k].grad, dense[k].grad) for k in leaves)


def test_inputs_untouched_and_every_element_written(op):
    call = op[0](2, 13)
    clean, leaves = results(call), call.leaves()
    call(**leaves).sum().backward()
    assert all(t._version == 0 and torch.equal(t, call.tensors[k]) for k, t in leaves.items())
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all(), "the poison does not work"
        assert_same(results(call), clean)
    finally:
        torch.use_deterministic_algorithms(False)


def test_second_backward_and_no_double_backward(op):
    call = op[0]()
    leaves = call.leaves()
    loss = call(**leaves).square().sum()
    grads = [torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    (first, *_) = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gradient_through_step_size_and_scan(impl, op):
    """The whole inner loop: a step size computed from what it scales."""
    maker, formula = op
    call = maker(2, 13)
    w0 = randn(D, F, seed=2)

    def loop(steps):
        def run(z, v, **options):
            s = steps(z, v, **options)
            return ttt.fast_weight_scan(z, v, w0, chunk_size=C, step_size=s, impl=impl)[0]

        return results(Call(run, call.tensors, call.options))

    assert_close(loop(call.op), loop(formula), BOUND)
