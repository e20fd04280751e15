"""The Triton scan's forward against the reference: in the interpreter, or compiled on a GPU.

Its gradients are in test_scan_triton_bwd.py, what the compiler made of it in test_kernels_compile.py.
"""

import doctest
import itertools
from dataclasses import replace

import pytest
import torch
from helpers import C, D, F, assert_close, assert_same, randn, scan_call
from test_scan_values import FLAGS, LENGTHS, PACKINGS, flags

from ttt_kernels.ops import triton_launch
from ttt_kernels.ops.scan import heuristics, triton_fwd
from ttt_kernels.ops.scan.heuristics import use_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LOW = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def values(call, **changes) -> dict:
    y, state = call(**changes)
    return {"y": y} if state is None else {"y": y, "state": state}


def place(call):
    """The call with its tensors on the device under test."""
    call.tensors = {k: t.to(DEVICE) for k, t in call.tensors.items()}
    if call.options["cu_seqlens"] is not None:
        call.options["cu_seqlens"] = call.options["cu_seqlens"].to(DEVICE)
    return call


def compare(call) -> None:
    call = place(call)
    want = values(call, impl="reference")
    got = values(call, impl="triton")
    dtype = call.tensors["z"].dtype
    assert_close({"y": got.pop("y")}, {"y": want.pop("y")}, BOUND[dtype])
    assert_close(got, want, 2e-6)  # the state is float32 whatever the operands are


def set_block_length(monkeypatch, chunks: int) -> None:
    monkeypatch.setattr(triton_fwd, "fused_super_chunk", lambda chunk, *_: chunks * chunk)


@pytest.fixture(params=[1, 3], ids=lambda n: f"blocks_of_{n}")
def block_length(request, monkeypatch):
    set_block_length(monkeypatch, request.param)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_dense(tokens, block_length):
    for options in FLAGS[tokens % 2 :: 2]:
        compare(scan_call(2, tokens, dtype=torch.float32, **flags(*options)))


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed(packing, block_length):
    for options in FLAGS[::3]:
        call = scan_call(cu=PACKINGS[packing], dtype=torch.float32, **flags(*options))
        if packing != "no_sequences":
            compare(call)
            continue
        y, state = place(call)(impl="triton")
        assert y.shape == (1, 0, D) and (state is None or state.shape == (0, D, F))


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_batch_sizes(batch):
    for preserve in (False, True):
        compare(scan_call(batch, 2 * C + 1, dtype=torch.float32, preserve_row_norm=preserve))


@pytest.mark.parametrize("chunk", [1, 3, 16, 33, 1000])
@pytest.mark.parametrize("preserve", [False, True])
def test_chunk_sizes(chunk, preserve):
    """Chunks shorter and longer than a tile, multiples of one and not; the heuristic's own blocks."""
    call = scan_call(2, 70, chunk=chunk, steps=True, dtype=torch.float32, preserve_row_norm=preserve)
    compare(call)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("chunks", [1, 2])
def test_low_precision(dtype, chunks, monkeypatch):
    set_block_length(monkeypatch, chunks)
    for preserve in (False, True):
        compare(scan_call(2, 41, chunk=9, dtype=dtype, steps=True, state=True, preserve_row_norm=preserve))


STEPS = {  # of the chunks of one super-chunk, which one accumulator sums
    "zeros": [0.3, 0.0, 0.0, -0.2, 0.0, 0.1],
    "zeros_first_and_last": [0.0, 0.0, 0.3, 0.2, 0.0, 0.0],
    "far_apart": [1e-30, 0.3, 1e-21, 0.2, 1e-12, -1e-3],
    "falling": [0.3, 1e-8, 1e-16, 1e-24, 1e-32, 0.0],
}


@pytest.mark.parametrize("chunk", [5, 16])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_steps_of_a_super_chunk(steps, chunk, monkeypatch):
    set_block_length(monkeypatch, len(steps))
    for descriptors in (False, True) if DEVICE == "cpu" else (False,):
        monkeypatch.setattr(triton_launch, "DESCRIPTORS_SINCE", 0 if descriptors else 10**6)
        call = wide_call(40, 96, 6 * chunk + 1, chunk, steps=True)
        call.tensors["step_size"] = torch.tensor([[*steps, 0.5]] * 2)
        compare(call)


def test_steps_that_fall_and_fall(monkeypatch):
    """What one accumulator holds stays finite, whatever the steps and however large V."""
    chunks = 80
    set_block_length(monkeypatch, chunks)
    call = wide_call(40, 96, 2 * chunks, 2, steps=True)
    call.tensors["step_size"] = (0.3 ** torch.arange(chunks)).expand(2, -1).contiguous()
    call.tensors["v"] = 100 * call.tensors["v"]
    assert all(t.isfinite().all() for t in place(call)(impl="triton"))
    compare(call)


def test_steps_of_zero_write_nothing(monkeypatch):
    set_block_length(monkeypatch, 3)
    call = wide_call(40, 96, 49, 16, steps=True)
    call.tensors["step_size"] = torch.zeros(2, 4)
    state = place(call)(impl="triton")[1]
    assert_same({"state": state}, {"state": call.tensors["w0"].expand_as(state)})


def test_a_step_that_is_no_number_stays_in_its_sequence(monkeypatch):
    set_block_length(monkeypatch, 3)
    call = wide_call(40, 96, 49, 16, steps=True)
    call.tensors["step_size"] = torch.tensor([[0.1, torch.nan, 0.2, 0.0], [0.1, 0.2, 0.3, 0.0]])
    state = place(call)(impl="triton")[1]
    assert state[0].isnan().all() and state[1].isfinite().all()


def wide_call(d: int, f: int, tokens: int, chunk: int, **options):
    tensors = {
        "z": randn(2, tokens, f, dtype=torch.float32),
        "v": randn(2, tokens, d, seed=1, dtype=torch.float32) * 0.1,
        "w0": randn(d, f, seed=2, dtype=torch.float32),
    }
    call = scan_call(2, tokens, chunk=chunk, dtype=torch.float32, **options)
    call.tensors |= tensors
    return call


@pytest.mark.parametrize("d, f", [(1, 1), (40, 70), (32, 96)])
@pytest.mark.parametrize("preserve", [False, True])
def test_weight_shapes(d, f, preserve, block_length):
    """Several tiles each way, ragged and whole."""
    compare(wide_call(d, f, 41, 16, preserve_row_norm=preserve))


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.skipif(DEVICE == "cuda", reason="the choice is the GPU's there")
def test_descriptors(preserve, block_length, monkeypatch):
    """The sm_90 way of loading: in the interpreter it is only asked for."""
    monkeypatch.setattr(triton_launch, "DESCRIPTORS_SINCE", 0)
    used = []
    real = triton_launch.descriptor
    monkeypatch.setattr(triton_launch, "descriptor", lambda *a: used.append(real(*a)) or used[-1])
    compare(wide_call(40, 96, 41, 16, preserve_row_norm=preserve))
    assert used and None not in used
    compare(wide_call(40, 96, 41, 15, preserve_row_norm=preserve))  # a tile would pass its chunk's end
    used.clear()
    compare(wide_call(5, 7, 41, 16, preserve_row_norm=preserve))  # rows of no multiple of 16 bytes
    assert None in used


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.skipif(DEVICE == "cuda", reason="the choice is the GPU's there")
def test_tiles_of_a_gpu(architecture, monkeypatch):
    """The tiles a GPU would take, on shapes smaller than one and larger."""
    real = heuristics.forward_tiles

    def tiles(_, size, *rest, **options):
        return real(architecture, 2, *rest, **options)

    monkeypatch.setattr(triton_fwd, "forward_tiles", tiles)
    for chunk, preserve in ((150, False), (20, True)):
        compare(wide_call(140, 270, 161, chunk, preserve_row_norm=preserve))


ONE_PART = heuristics.Tiles(16, 16, 32, 16, 4, 1)
PARTS = {"none": {}, "of_y": {"more_d": 8}, "of_w": {"more_f": 16}, "both": {"more_d": 16, "more_f": 8}}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.skipif(DEVICE == "cuda", reason="the choice is the GPU's there")
def test_tiles_in_parts(parts, monkeypatch):
    """Second parts that are whole, ragged and past the end."""
    monkeypatch.setattr(triton_fwd, "forward_tiles", lambda *_, **__: replace(ONE_PART, **parts))
    for chunks, descriptors in ((1, 0), (2, 10**6)):
        set_block_length(monkeypatch, chunks)
        monkeypatch.setattr(triton_launch, "DESCRIPTORS_SINCE", descriptors)
        compare(wide_call(36, 40, 37, 16, steps=True, preserve_row_norm=chunks == 1))


def test_split_plan(monkeypatch):
    set_block_length(monkeypatch, 1)
    with use_plan("split"):
        for tokens in (0, 3, 13):
            compare(scan_call(2, tokens, dtype=torch.float32, steps=True, state=True))
        refused = place(scan_call(2, 13, dtype=torch.float32, preserve_row_norm=True))
        with pytest.raises(NotImplementedError, match="plan='split'.*preserve_row_norm=True"):
            refused(impl="triton")
    with pytest.raises(ValueError, match="plan must be one of fused, split, got 'fast'"), use_plan("fast"):
        pass


@pytest.mark.parametrize("preserve", [False, True])
def test_zero_target_is_the_plain_product(preserve, block_length):
    """Bit for bit: r is exactly 1 while nothing has been written."""
    call = place(scan_call(2, 3 * C + 1, dtype=torch.float32, preserve_row_norm=preserve))
    call.tensors["v"].zero_()
    whole = {"chunk_size": 100, "preserve_row_norm": False, "return_state": False}
    assert torch.equal(call(impl="triton")[0], call(impl="triton", **whole)[0])
    assert torch.equal(call(impl="triton")[1], call.tensors["w0"].expand(2, D, F))


def test_split_and_carry_is_one_shot(block_length):
    call = place(scan_call(2, 6 * C, dtype=torch.float32, preserve_row_norm=True))
    y, state = call(impl="triton")
    z, v = call.tensors["z"], call.tensors["v"]
    first, carried = call(z=z[:, : 3 * C], v=v[:, : 3 * C], impl="triton")
    second, final = call(z=z[:, 3 * C :], v=v[:, 3 * C :], state=carried, impl="triton")
    assert_close({"y": torch.cat([first, second], 1), "s": final}, {"y": y, "s": state}, 1e-6)


def test_repeats_bit_for_bit_and_reads_strided_views():
    call = place(scan_call(2, 25, dtype=torch.float32, preserve_row_norm=True, state=True))
    once = values(call, impl="triton")
    assert_same(values(call, impl="triton"), once)
    strided = {k: t.mT.contiguous().mT for k, t in call.tensors.items()}
    assert_same(values(call, impl="triton", **strided), once)


def test_poisoned_memory(block_length):
    """What is allocated is filled with NaN: nothing reads what nothing wrote."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for preserve in (False, True):
            compare(scan_call(2, 30, dtype=torch.float32, steps=True, preserve_row_norm=preserve))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def test_float64_is_refused():
    call = place(scan_call(1, 5))
    with pytest.raises(NotImplementedError, match="impl='triton' cannot run fast_weight_scan here.*float64"):
        call(impl="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's own limit")
def test_interpreted_bfloat16_is_refused():
    with pytest.raises(NotImplementedError, match="computes bfloat16 wrongly"):
        scan_call(1, 5, dtype=torch.bfloat16)(impl="triton")


SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 120: 101376}
SHAPES = [(1024, 3072), (2560, 9728), (4096, 14336)]


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_tiles_fit_their_architecture(architecture):
    """The documented model: operand stages in shared memory, accumulators in registers."""
    for (d, f), size, chunk, several in itertools.product(SHAPES, (2, 4), (64, 1024), (False, True)):
        t = heuristics.forward_tiles(architecture, size, 1, chunk, d, f, super_chunk=several)
        edges = max(t.t + t.y_columns, t.d + t.w_columns)
        assert t.stages * t.k * edges * size <= SHARED_MEMORY[architecture]
        assert max(t.t * t.y_columns, t.d * t.w_columns) / (32 * t.warps) <= 128


def test_two_programs_fit_where_registers_are_bounded():
    """Shared memory of a multiprocessor, 1 KiB of each block the driver's."""
    for tiles, _ in itertools.chain(*(heuristics._WIDE[a] for a in (90, 100))):
        assert tiles.registers is None or 32 * tiles.warps * tiles.registers <= 65536 // 2
    for t in heuristics._PARTS:
        edges = max(t.t + t.y_columns, t.d + t.w_columns)
        assert 2 * (t.stages * t.k * edges * 2 + 2048) <= 233472
        assert t.registers * 32 * t.warps <= 65536 // 2


def test_parts_are_chosen_where_they_fill_the_gpu():
    """A second part of y needs many columns; in a super-chunk the scores take its registers."""
    def parts(*sizes, **options):
        t = heuristics.forward_tiles(90, 2, *sizes, **options)
        return t.more_d > 0, t.more_f > 0

    assert parts(1, 1024, 4096, 14336, super_chunk=False) == (True, True)
    assert parts(1, 1024, 1024, 3072, super_chunk=False) == (False, True)
    assert not parts(1, 1024, 4096, 14336, super_chunk=True)[0]
    assert heuristics.forward_tiles(80, 2, 1, 1024, 4096, 14336, super_chunk=False).more_f == 0


def test_examples_of_the_heuristics():
    assert doctest.testmod(heuristics) == (0, 3)


@pytest.mark.parametrize("chunk", [1, 3, 64, 100, 288, 512, 1024, 4096])
@pytest.mark.parametrize("d, f", [*SHAPES, (16, 24), (0, 8)])
def test_blocks_are_whole_chunks(d, f, chunk):
    """Several of them where chunks are short, and fewer where a batch fills the launch."""
    block, batched = (heuristics.fused_super_chunk(chunk, d, f, rows) for rows in (1, 8))
    assert block % chunk == batched % chunk == 0
    assert chunk <= batched <= block <= max(chunk, 1024)
    if (d, f) in SHAPES and chunk <= 64:
        assert block >= 900
    if chunk in (512, 1024, 4096):
        assert block == chunk
    if (d, f) in SHAPES and chunk == 288:
        assert block > chunk


def test_newer_architectures_take_the_tiles_of_older_ones():
    def tiles(architecture):
        return heuristics.forward_tiles(architecture, 2, 1, 1024, 4096, 14336, super_chunk=False)

    assert tiles(89) == tiles(86) and tiles(103) == tiles(100) and tiles(130) == tiles(120)
    assert tiles(90) != tiles(80)
