"""The CUDA C++ scan against the reference and the precision contract: emulated, or compiled on a GPU."""

import pytest
import torch
from emulated import DEVICE, DTYPES, GPU, PATHS, cuda_kernels, schedule  # noqa: F401
from helpers import Call, assert_close, assert_same, gradients, kept_and_consumed, randn, results

import ttt_kernels as ttt
from ttt_kernels import testing
from ttt_kernels.ops.cuda_launch import use_path, why_not_cuda
from ttt_kernels.types import chunk_count

pytestmark = pytest.mark.usefixtures("cuda_kernels")
C, D, F = 4, 16, 24
BOUND = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
PACKINGS = {
    "lengths": [0, 9, 10, 14, 27],  # one token, one chunk, two and a rest
    "empty_sequences": [0, 0, 5, 5, 13, 13],
    "one": [0, 11],
}


@pytest.fixture(params=PATHS, ids=lambda path: f"sm{path}", autouse=True)
def path(request):
    with use_path(request.param):
        yield request.param


def scan_call(batch=2, tokens=13, *, chunk=C, d=D, f=F, dtype=torch.bfloat16, cu=None, **options) -> Call:
    """`fast_weight_scan` on random data, with a state and step sizes of its own."""
    cu_seqlens = None if cu is None else torch.tensor(cu)
    batch, tokens = (batch, tokens) if cu is None else (1, cu[-1])
    rows = batch if cu is None else len(cu) - 1
    tensors = {
        "z": randn(batch, tokens, f, dtype=dtype),
        "v": randn(batch, tokens, d, seed=1, dtype=dtype) * 0.1,
        "w0": randn(d, f, seed=2, dtype=dtype),
        "step_size": randn(batch, chunk_count(tokens, chunk, cu_seqlens), seed=3, dtype=torch.float32) * 0.4,
    }
    if options.pop("state", True):
        tensors["state"] = randn(rows, d, f, seed=4, dtype=torch.float32)
    tensors = {k: t.to(DEVICE) for k, t in tensors.items()}
    cu_seqlens = None if cu is None else cu_seqlens.to(DEVICE)
    fixed = {"chunk_size": chunk, "cu_seqlens": cu_seqlens, "return_state": True, "impl": "cuda"}
    return Call(ttt.fast_weight_scan, tensors, {**fixed, **options})


def exactly(call: Call) -> Call:
    """By the reference in float64, on the same numbers."""
    tensors = {k: t.double() for k, t in call.tensors.items()}
    return Call(call.op, tensors, {**call.options, "impl": "reference"})


def compare(call: Call) -> None:
    """Values and gradients."""
    dtype, exact = call.tensors["z"].dtype, exactly(call)
    got = {k: t.double() for k, t in results(call).items()}
    assert_close(got, results(exact), BOUND[dtype])


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preserve", [False, True])
def test_contract(dtype, preserve):
    """Errors per block within the budget of the declared precision; tiles cut every way."""
    inputs = testing.make_inputs(2, 75, 40, 136, dtype=dtype, device=DEVICE)
    steps = torch.rand(2, 3, device=DEVICE) * 0.3

    def scan(*args, **kwargs):
        return ttt.fast_weight_scan(*args, impl="cuda", **kwargs)

    report = testing.check_scan(scan, inputs, chunk_size=33, step_size=steps, preserve_row_norm=preserve)
    assert report.within_budget, report


@pytest.mark.parametrize("preserve", [False, True])
def test_several_tiles(preserve):
    """More tokens, rows and columns than a tile, with a ragged end of each."""
    inputs = testing.make_inputs(1, 290, 136, 264, dtype=torch.bfloat16, device=DEVICE)

    def scan(*args, **kwargs):
        return ttt.fast_weight_scan(*args, impl="cuda", **kwargs)

    report = testing.check_scan(scan, inputs, chunk_size=144, step_size=0.2, preserve_row_norm=preserve)
    assert report.within_budget, report


@pytest.mark.parametrize("tokens", [0, 1, 2, C - 1, C, C + 1, 2 * C, 2 * C + 1])
def test_lengths(tokens):
    compare(scan_call(2, tokens, preserve_row_norm=tokens % 2 == 0))


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_batch_sizes(batch):
    compare(scan_call(batch, 2 * C + 1, preserve_row_norm=batch == 7))


@pytest.mark.parametrize("chunk", [1, 3, 16, 33, 64, 1000])
def test_chunk_sizes(chunk):
    compare(scan_call(1, 70, chunk=chunk, preserve_row_norm=chunk % 2 == 0))


@pytest.mark.sanitize
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("preserve", [False, True])
def test_packed(packing, preserve):
    compare(scan_call(cu=PACKINGS[packing], preserve_row_norm=preserve))


@pytest.mark.parametrize("d, f", [(8, 8), (8, 136), (136, 8), (136, 200), (264, 392)])
def test_weight_shapes(d, f):
    """With one tile and with several, of 128 columns and of 192, and with half a pair of tiles."""
    compare(scan_call(1, 2 * C + 2, d=d, f=f, preserve_row_norm=d != f))


@pytest.mark.skipif(GPU, reason="a GPU has as many multiprocessors as it has")
@pytest.mark.parametrize("count", [1, 4, 7])
def test_multiprocessors(cuda_kernels, count):  # noqa: F811
    """Tiles are dealt to few and to more than there are, and to an odd number."""
    cuda_kernels.set_multiprocessors(count)
    try:
        compare(scan_call(cu=[0, 130, 135, 400], d=136, f=264, chunk=130, preserve_row_norm=True))
    finally:
        cuda_kernels.set_multiprocessors(2)


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("steps", [False, True])
def test_without_state(return_state, steps):
    """From w0, with a number or a tensor of step sizes; the last write only where it is asked for."""
    call = scan_call(2, 3 * C, state=False, return_state=return_state, preserve_row_norm=steps)
    if not steps:
        del call.tensors["step_size"]
        call.options["step_size"] = 0.3
    compare(call)


@pytest.mark.parametrize("preserve", [False, True])
def test_each_output_alone(preserve):
    """A gradient for y only, or for the state only."""
    call = scan_call(2, 2 * C + 2, preserve_row_norm=preserve)
    exact = exactly(call)
    for output in (0, 1):
        got, want = (
            gradients([c(**leaves)[output]], leaves)
            for c, leaves in ((call, call.leaves()), (exact, exact.leaves()))
        )
        assert_close({k: t.double() for k, t in got.items()}, want, BOUND[torch.bfloat16])


@pytest.mark.parametrize("preserve", [False, True])
def test_zero_target_is_the_plain_product(preserve):
    """Bit for bit: r is exactly 1 while nothing has been written."""
    call = scan_call(2, 3 * C + 1, state=False, preserve_row_norm=preserve)
    call.tensors["v"].zero_()
    whole = {"chunk_size": 100, "preserve_row_norm": False, "step_size": 1.0, "return_state": False}
    assert torch.equal(call()[0], call(**whole)[0])
    assert torch.equal(call()[1], call.tensors["w0"].float().expand(2, D, F))


def test_split_and_carry_is_one_shot():
    call = scan_call(2, 6 * C, preserve_row_norm=True, state=False)
    y, state = call()
    z, v, steps = (call.tensors[k] for k in ("z", "v", "step_size"))
    first, carried = call(z=z[:, : 3 * C], v=v[:, : 3 * C], step_size=steps[:, :3])
    second, final = call(z=z[:, 3 * C :], v=v[:, 3 * C :], step_size=steps[:, 3:], state=carried)
    assert_same({"y": torch.cat([first, second], 1), "state": final}, {"y": y, "state": state})


def test_rows_are_independent():
    call = scan_call(3, 2 * C + 1, preserve_row_norm=True)
    y, state = call()
    rows = {k: t[1:2] for k, t in call.tensors.items() if k != "w0"}
    alone = call(**rows)
    assert_same({"y": y[1:2], "state": state[1:2]}, {"y": alone[0], "state": alone[1]})


@pytest.mark.sanitize
def test_schedules_give_the_same_bits(schedule):  # noqa: F811
    """Whatever the order of threads, and whenever copies and products happen."""
    call = scan_call(1, 2 * 33 + 5, chunk=33, d=40, f=136, preserve_row_norm=True)
    once = results(call)
    assert_same(results(call), once)
    compare(call)


def test_strided_and_misaligned_views():
    call = scan_call(2, 25, preserve_row_norm=True)
    once = results(call)
    strided = {k: t.mT.contiguous().mT if t.dim() > 1 else t for k, t in call.tensors.items()}
    assert_same(results(Call(call.op, strided, call.options)), once)
    odd = {}
    for name, t in call.tensors.items():
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        odd[name] = room[1:].view_as(t).copy_(t)
    assert odd["z"].data_ptr() % 16
    y, state = call(**odd)
    assert_same({"out0": y, "out1": state}, {k: once[k] for k in ("out0", "out1")})


@pytest.mark.sanitize
@pytest.mark.parametrize("preserve", [False, True])
def test_in_the_saved_state(preserve):
    """The same bits as in a copy of it."""
    for cu, state in ((None, False), (None, True), (PACKINGS["lengths"], False)):
        call = scan_call(2, 19, cu=cu, state=state, preserve_row_norm=preserve)
        kept, consumed, overwritten = kept_and_consumed(call)
        assert_same(consumed, kept)
        assert overwritten


@pytest.mark.parametrize("preserve", [False, True])
def test_only_what_was_written_is_read(preserve):
    """Fresh memory is filled with NaN; so are the step sizes and targets of incomplete chunks."""
    call = scan_call(2, 5 * C + 1, preserve_row_norm=preserve)
    want = results(call)
    with torch.no_grad():
        call.tensors["step_size"][:, -1] = float("nan")
        call.tensors["v"][:, 5 * C :] = float("nan")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        got = results(call)
    finally:
        torch.use_deterministic_algorithms(before)
    assert_same(got, want)


def test_second_backward():
    call = scan_call(2, 3 * C + 2, preserve_row_norm=True)
    leaves = call.leaves()
    y, state = call(**leaves)
    loss = y.float().square().sum() + state.sin().sum()
    first, second = (torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2))
    assert_same(dict(enumerate(first)), dict(enumerate(second)))


REFUSALS = [
    ({"d": 12}, "w0 must have D and F that are multiples of 8, got D = 12, F = 24"),
    ({"f": 20}, "w0 must have D and F that are multiples of 8, got D = 16, F = 20"),
    ({"dtype": torch.float32}, "its kernels take bfloat16 and float16, not float32"),
]


@pytest.mark.parametrize("changes, message", REFUSALS, ids=[m for _, m in REFUSALS])
def test_refusals(changes, message):
    with pytest.raises(NotImplementedError, match=f"impl='cuda' cannot run fast_weight_scan here: {message}"):
        scan_call(**changes)()


@pytest.mark.skipif(GPU, reason="the emulated module is not in place")
def test_the_emulation_takes_cpu_tensors_only():
    assert why_not_cuda(torch.device("cpu"), torch.bfloat16) is None
    assert "emulated: it takes CPU tensors" in why_not_cuda(torch.device("cuda"), torch.bfloat16)
