"""The Triton scan's gradients against the reference: in the interpreter, or compiled on a GPU.

Its values are in test_scan_triton.py, what the compiler made of it in test_kernels_compile.py.
"""

import pytest
import torch
from helpers import (
    C,
    Call,
    assert_close,
    assert_same,
    gradients,
    kept_and_consumed,
    randn,
    results,
    scan_call,
)
from test_scan_triton import DEVICE, LOW, STEPS, place
from test_scan_values import FLAGS, LENGTHS, PACKINGS, flags

import ttt_kernels as ttt
from ttt_kernels import testing
from ttt_kernels.ops import triton_launch
from ttt_kernels.ops.scan import heuristics, triton_bwd, triton_fwd

BOUND = 2e-5  # of float32: the state is recomputed by subtraction


def compare(call: Call, bound: float = BOUND) -> None:
    call = place(call)
    assert_close(results(call, impl="triton"), results(call, impl="reference"), bound)


def set_block_length(monkeypatch, chunks: int) -> None:
    for module in (triton_fwd, triton_bwd):
        monkeypatch.setattr(module, "fused_super_chunk", lambda chunk, *_: chunks * chunk)


@pytest.fixture(params=[1, 3], ids=lambda n: f"blocks_of_{n}")
def block_length(request, monkeypatch):
    set_block_length(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("tokens", LENGTHS)
def test_dense(tokens, block_length):
    for options in FLAGS[(tokens + block_length) % 7 :: 7]:
        compare(scan_call(2, tokens, dtype=torch.float32, **flags(*options)))


@pytest.mark.parametrize("packing", [name for name in PACKINGS if name != "no_sequences"])
def test_packed(packing, block_length):
    for options in FLAGS[block_length :: 6]:
        compare(scan_call(cu=PACKINGS[packing], dtype=torch.float32, **flags(*options)))


@pytest.mark.parametrize("batch", [0, 1, 7])
@pytest.mark.parametrize("preserve", [False, True])
def test_batch_sizes(batch, preserve):
    compare(scan_call(batch, 2 * C + 1, dtype=torch.float32, preserve_row_norm=preserve))


@pytest.mark.parametrize("chunk", [5, 16])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_steps_of_a_super_chunk(steps, chunk, monkeypatch):
    """With an earlier one before it, into which the backward has to go back."""
    set_block_length(monkeypatch, len(steps))
    call = scan_call(1, 12 * chunk + 1, chunk=chunk, steps=True, dtype=torch.float32)
    call.tensors["step_size"] = torch.tensor([[*steps, *reversed(steps), 0.1]])
    call.tensors["v"] *= 0.1
    compare(call)


@pytest.mark.parametrize("chunk", [1, 3, 16, 33, 1000])
@pytest.mark.parametrize("preserve", [False, True])
def test_chunk_sizes(chunk, preserve):
    """Chunks shorter and longer than a tile, multiples of one and not; the heuristic's own blocks."""
    call = scan_call(1, 50, chunk=chunk, steps=True, dtype=torch.float32, preserve_row_norm=preserve)
    call.tensors["v"] *= 0.1  # 50 writes must not run away
    compare(call)


@pytest.mark.parametrize("d, f, chunk", [(21, 37, 18), (37, 21, 5), (16, 64, 16), (2, 3, 3)])
@pytest.mark.parametrize("preserve", [False, True])
def test_weight_shapes(d, f, chunk, preserve, block_length):
    """Several tiles of every kind, with and without ragged ends."""
    tensors = {
        "z": randn(1, 2 * chunk + 16, f, dtype=torch.float32),
        "v": randn(1, 2 * chunk + 16, d, seed=1, dtype=torch.float32) * 0.3,
        "w0": randn(d, f, seed=2, dtype=torch.float32),
        "step_size": randn(1, -(-16 // chunk) + 2, seed=3, dtype=torch.float32) * 0.2,
    }
    options = {"chunk_size": chunk, "preserve_row_norm": preserve, "cu_seqlens": None}
    compare(Call(ttt.fast_weight_scan, tensors, {**options, "return_state": block_length == 1}))


@pytest.mark.parametrize("preserve", [False, True])
def test_each_output_alone(preserve, block_length):
    """A gradient for y only, or for the state only."""
    call = place(scan_call(2, 14, state=True, steps=True, dtype=torch.float32, preserve_row_norm=preserve))
    for output in (0, 1):
        got, want = (
            gradients([call(**leaves, impl=impl)[output]], leaves)
            for impl, leaves in (("triton", call.leaves()), ("reference", call.leaves()))
        )
        assert_close(got, want, BOUND)


@pytest.mark.parametrize("preserve", [False, True])
def test_second_backward(preserve, block_length):
    """The same bits: the carried state is not modified, and every sum has its order."""
    call = place(scan_call(2, 14, state=True, steps=True, dtype=torch.float32, preserve_row_norm=preserve))
    leaves = call.leaves()
    y, state = call(**leaves, impl="triton")
    loss = y.square().sum() + state.sin().sum()
    first, second = (torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2))
    assert_same(dict(enumerate(first)), dict(enumerate(second)))


@pytest.mark.parametrize("preserve", [False, True])
def test_in_the_saved_state(preserve, block_length):
    """The same bits as in a copy of it."""
    full, low = (block_length + 1) * C, torch.float16
    for cu, state, dtype in (
        (None, False, low), (None, True, torch.float32), ([0, full, full, full + C + 1], False, low),
    ):  # fmt: skip
        call = scan_call(1, full + C + 1, cu=cu, dtype=dtype, state=state, preserve_row_norm=preserve)
        kept, consumed, overwritten = kept_and_consumed(place(call), impl="triton")
        assert_same(consumed, kept)
        assert overwritten


@pytest.mark.parametrize("preserve", [False, True])
def test_only_what_was_written_is_read(preserve, block_length):
    """Fresh memory is filled with NaN; so are the step sizes and targets of incomplete chunks."""
    call = scan_call(2, 5 * C + 1, steps=True, dtype=torch.float32, preserve_row_norm=preserve)
    want = results(place(call), impl="reference")
    leaves = call.leaves()
    with torch.no_grad():
        leaves["step_size"][:, -1] = float("nan")
        leaves["v"][:, 5 * C :] = float("nan")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        outputs = list(call(**leaves, impl="triton"))
        got = gradients(outputs, leaves)
    finally:
        torch.use_deterministic_algorithms(before)
    assert_close(got, {name: want[name] for name in got}, BOUND)


@pytest.mark.parametrize("rows", ["zero", "tiny"])
def test_norms_below_the_floor(rows, block_length):
    call = scan_call(2, 14, preserve_row_norm=True, steps=True, dtype=torch.float32)
    call.tensors["w0"][1:3] *= 0.0 if rows == "zero" else 1e-7
    compare(call)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("preserve", [False, True])
def test_low_precision(dtype, preserve, block_length):
    """Types of every gradient, and the distance from float64 on the same operands."""
    call = scan_call(2, 18, dtype=dtype, steps=True, state=True, preserve_row_norm=preserve)
    exact = Call(call.op, {k: t.double() for k, t in call.tensors.items()}, call.options)
    want, got = results(exact, impl="reference"), results(place(call), impl="triton")
    for name, tensor in got.items():
        assert tensor.dtype == (torch.float32 if name in ("out1", "dstate", "dstep_size") else dtype), name
    assert_close({k: t.double().cpu() for k, t in got.items()}, want, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("steps", ["number", "tensor"])
def test_within_the_error_budget(dtype, preserve, steps, block_length):
    data = testing.make_inputs(1, 50, 30, 40, dtype=dtype, device=DEVICE)
    step_size = 0.3 if steps == "number" else torch.tensor([[0.3, 0.2, 0.4]], device=DEVICE)
    report = testing.check_scan(
        lambda *tensors, **options: ttt.fast_weight_scan(*tensors, impl="triton", **options),
        data,
        chunk_size=20,
        step_size=step_size,
        preserve_row_norm=preserve,
    )
    assert report.within_budget, report


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.skipif(DEVICE == "cuda", reason="the choice is the GPU's there")
def test_descriptors(preserve, block_length, monkeypatch):
    """The sm_90 way of loading, whole blocks and an incomplete one."""
    monkeypatch.setattr(triton_launch, "DESCRIPTORS_SINCE", 0)
    for tokens in (96, 101):
        call = scan_call(1, tokens, chunk=16, steps=True, dtype=torch.float32, preserve_row_norm=preserve)
        call.tensors |= {
            "z": randn(1, tokens, 40, dtype=torch.float32),
            "v": randn(1, tokens, 20, seed=1, dtype=torch.float32) * 0.1,
            "w0": randn(20, 40, seed=2, dtype=torch.float32),
        }
        compare(call)


def test_tiles_of_the_backward_fit():
    """Operand tiles of all stages in shared memory, accumulators in registers."""
    memory = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 120: 101376}
    for arch, limit in memory.items():
        for size in (2, 4):
            for d, f in ((4096, 14336), (2560, 9728), (1024, 3072), (64, 64)):
                for tokens in (64, 512, 1024):
                    token, state = heuristics.backward_tiles(arch, size, 1, tokens, d, f)
                    tiles = (token, token.t, token.d), (state, state.d, state.w_columns)
                    for tile, rows, columns in tiles:
                        assert tile.stages * tile.k * (rows + columns) * size <= limit
                        assert rows * columns <= 128 * 32 * tile.warps


def test_small_models_get_smaller_tiles():
    def shape(d, f, batch=1):
        token, state = heuristics.backward_tiles(90, 2, batch, 1024, d, f)
        return token.t * token.d, state.d * state.w_columns

    assert shape(4096, 14336) == (128 * 256, 128 * 192)
    assert shape(1024, 3072) < shape(1024, 3072, batch=8) <= shape(4096, 14336)
