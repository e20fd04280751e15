"""The eager scan against the reference: every option, length and way of cutting into blocks."""

import itertools

import pytest
import torch
from helpers import C, Call, D, F, assert_close, gradients, randn, results, scan_call

import ttt_kernels as ttt
from ttt_kernels.ops import _gemm
from ttt_kernels.ops.scan import eager, eager_bwd
from ttt_kernels.ops.scan import reference as scan_reference

BOUND = 1e-10
FLAGS = list(itertools.product([False, True], repeat=4))  # preserve, state, steps, return_state
LENGTHS = (0, 1, 2, C - 1, C, C + 1, 2 * C, 2 * C + 1, 6 * C, 6 * C + 3)
PACKINGS = {
    "one": [0, 18],
    "shorter_than_chunk": [0, 1, 4, 6],
    "empty_between": [0, 0, 5, 5, 17, 20, 20],
    "multiples": [0, 4, 16, 24],
    "no_tokens": [0, 0, 0],
    "no_sequences": [0],
}


@pytest.fixture(params=[None, 1, 2, 3, 8], ids=lambda n: f"blocks_of_{n or 'default'}")
def block_length(request, monkeypatch):
    """Chunks per super-chunk: those of the heuristics, or a number."""
    if request.param is not None:
        set_block_length(monkeypatch, request.param)
    return request.param


def set_block_length(monkeypatch, chunks: int) -> None:
    for module in (eager, eager_bwd):
        monkeypatch.setattr(module, "super_chunk", lambda chunk_size, *_: chunks * chunk_size)


def compare(call: Call, bound: float = BOUND) -> None:
    assert_close(results(call, impl="eager"), results(call, impl="reference"), bound)


def flags(preserve, state, steps, keep) -> dict:
    return {"preserve_row_norm": preserve, "state": state, "steps": steps, "return_state": keep}


@pytest.mark.parametrize("tokens", LENGTHS)
def test_dense(tokens, block_length):
    for options in FLAGS:
        compare(scan_call(2, tokens, **flags(*options)))


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed(packing, block_length):
    for options in FLAGS:
        call = scan_call(cu=PACKINGS[packing], **flags(*options))
        if packing != "no_sequences":
            compare(call)
            continue
        y, state = call()  # nothing to differentiate
        assert y.shape == (1, 0, D) and (state is None or state.shape == (0, D, F))


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
def test_batch_sizes(batch):
    for options in FLAGS:
        compare(scan_call(batch, 2 * C + 1, **flags(*options)))


@pytest.mark.parametrize("chunk", [1, 2, 13, 100])
def test_chunk_sizes(chunk, block_length):
    for preserve in (False, True):
        compare(scan_call(2, 13, chunk=chunk, steps=True, state=True, preserve_row_norm=preserve))


@pytest.mark.parametrize("d, f", [(1, 1), (1, 6), (6, 1), (16, 3)])
def test_weight_shapes(d, f, block_length):
    tensors = {"z": randn(2, 11, f), "v": randn(2, 11, d, seed=1), "w0": randn(d, f, seed=2)}
    options = {"chunk_size": 3, "step_size": 0.2, "return_state": True}
    for preserve in (False, True):
        options["preserve_row_norm"] = preserve
        compare(Call(ttt.fast_weight_scan, tensors, options))


@pytest.mark.parametrize("token_tile, row_tile", [(1, 1), (3, 2), (16, 3)])
def test_tiles(token_tile, row_tile, monkeypatch):
    """Long chunks are handled in tiles of tokens, weights in tiles of rows."""
    monkeypatch.setattr(eager, "TOKEN_TILE", token_tile)
    monkeypatch.setattr(_gemm, "ROW_TILE", row_tile)
    set_block_length(monkeypatch, 1)
    for options in FLAGS:
        compare(scan_call(2, 39, chunk=11, **flags(*options)))
        compare(scan_call(cu=[0, 12, 12, 15, 40], chunk=11, **flags(*options)))


def test_each_gradient_alone(block_length):
    """Only one input, or only one output, takes part: what is not asked for is not needed."""
    call = scan_call(2, 14, state=True, steps=True, preserve_row_norm=True)
    full = results(call, impl="reference")
    for name, tensor in call.tensors.items():
        leaf = {name: tensor.clone().requires_grad_()}
        for impl in ("eager", "reference"):
            grads = gradients(list(call(**leaf, impl=impl)), leaf)
            assert_close(grads, {f"d{name}": full[f"d{name}"]}, BOUND)
    for output in (0, 1):
        eager_grads, reference_grads = (
            gradients([call(**leaves, impl=impl)[output]], leaves)
            for impl, leaves in (("eager", call.leaves()), ("reference", call.leaves()))
        )
        assert_close(eager_grads, reference_grads, BOUND)


def test_int32_boundaries():
    call = scan_call(cu=[0, 5, 5, 18], state=True, steps=True)
    narrow = {"cu_seqlens": call.options["cu_seqlens"].int()}
    for impl in ("eager", "reference"):
        assert_close(results(call, impl=impl, **narrow), results(call, impl=impl), 0.0)


def test_number_equals_tensor_of_equal_steps(block_length):
    number = scan_call(2, 14, step_size=0.7)
    tensor = torch.full((2, 4), 0.7, dtype=torch.float64)
    for impl in ("eager", "reference"):
        want = results(number, impl=impl)
        assert_close(results(number, impl=impl, step_size=tensor), want, 1e-14)


def test_integer_step_size_and_default():
    call = scan_call(2, 14)
    y, _ = call(step_size=1)
    del call.options["step_size"]
    assert torch.equal(y, call()[0])


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype, steps, block_length):
    """Types of every result, and the distance from float64 on the same operands: a gross check."""
    for preserve in (False, True):
        call = scan_call(2, 18, dtype=dtype, steps=steps, state=True, preserve_row_norm=preserve)
        exact = Call(call.op, {k: t.double() for k, t in call.tensors.items()}, call.options)
        want = results(exact, impl="reference")
        for impl in ("eager", "reference"):
            got = results(call, impl=impl)
            for name, tensor in got.items():
                is_state = name in ("out1", "dstate", "dstep_size")
                assert tensor.dtype == (torch.float32 if is_state else dtype), name
            # `results` draws output gradients in the dtype of the output: rounding them counts too.
            rounded = {k: t.double() for k, t in got.items()}
            assert_close(rounded, want, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_reference_is_the_formula(preserve, packed):
    """The reference against three lines of loops, which know no chunk tensor and no cumsum."""
    cu = [0, 5, 5, 9, 18] if packed else None
    call = scan_call(1, 18, cu=cu, steps=True, state=True, preserve_row_norm=preserve)
    z, v, w0, steps, state = call.tensors.values()
    y, final = call(impl="reference")
    n = 0
    for s, (a, b) in enumerate(itertools.pairwise(cu or [0, 18])):
        weight = state[s].clone()
        for t in range(a, b, C):
            ratio = w0.norm(dim=1) / weight.norm(dim=1).clamp_min(1e-5) if preserve else 1
            stop = min(t + C, b)
            assert torch.allclose(y[0, t:stop], ratio * (z[0, t:stop] @ weight.T), atol=1e-12)
            if t + C <= b:
                weight += steps[0, n] * v[0, t:stop].T @ z[0, t:stop]
            n += 1
        assert torch.allclose(final[s], weight, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gradcheck(impl, preserve, packed, block_length):
    cu = [0, 3, 3, 8] if packed else None
    call = scan_call(2, 7, chunk=2, cu=cu, steps=True, state=True, preserve_row_norm=preserve)
    names = list(call.tensors)
    assert torch.autograd.gradcheck(
        lambda *tensors: call(**dict(zip(names, tensors, strict=True)), impl=impl),
        list(call.leaves().values()),
        fast_mode=True,
    )


def test_reference_differentiates_twice():
    call = scan_call(1, 5, chunk=2, steps=True, preserve_row_norm=True)
    names = list(call.tensors)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: call(**dict(zip(names, tensors, strict=True)), impl="reference"),
        list(call.leaves().values()),
        fast_mode=True,
    )


@pytest.mark.parametrize("rows", ["zero", "tiny"])
def test_norms_below_the_floor(rows, block_length):
    """Rows of w0 that are 0, or shorter than the floor of ||W||, before anything is written."""
    call = scan_call(2, 14, preserve_row_norm=True, steps=True)
    call.tensors["w0"][1:3] *= 0.0 if rows == "zero" else 1e-7
    compare(call)
    assert call.tensors["w0"][1].norm() < scan_reference.NORM_FLOOR
    if rows == "zero":
        assert not call()[0][..., 1:3].any()


def test_state_below_the_floor(block_length):
    call = scan_call(2, 2 * C + 1, preserve_row_norm=True, state=True)
    call.tensors["state"][:, 1] = 0.0
    call.tensors["state"][:, 2] *= 1e-7
    compare(call)
