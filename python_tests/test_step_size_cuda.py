"""The CUDA C++ step sizes against the formula on G in float64: emulated, or compiled on a GPU."""

import pytest
import torch
from emulated import DEVICE, DTYPES, cuda_kernels, schedule  # noqa: F401
from helpers import Call, assert_close, assert_same, randn, results
from test_step_size import PACKINGS

import ttt_kernels as ttt
from ttt_kernels.ops.step_size import reference

pytestmark = pytest.mark.usefixtures("cuda_kernels")
OPS = {
    "spectral": (ttt.spectral_step_size, reference.spectral, {"iterations": 2}),
    "clipped": (ttt.clipped_step_size, reference.clipped, {"max_norm": 10.0}),
}


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv("TTT_KERNELS_IMPL", "cuda")


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def make(op, batch=2, tokens=13, *, chunk=4, cu=None, d=16, f=24, dtype=torch.bfloat16, **options) -> Call:
    batch, tokens = (batch, tokens) if cu is None else (1, cu[-1])
    function, _, parameter = OPS[op]
    tensors = {
        "z": randn(batch, tokens, f, dtype=dtype).to(DEVICE),
        "v": randn(batch, tokens, d, seed=1, dtype=dtype).to(DEVICE),
    }
    cu_seqlens = None if cu is None else torch.tensor(cu, device=DEVICE)
    fixed = {"chunk_size": chunk, "cu_seqlens": cu_seqlens, "lr": 0.3}
    return Call(function, tensors, {**fixed, **parameter, **options})


def compare(op: str, call: Call) -> None:
    exact = Call(OPS[op][1], {k: t.double() for k, t in call.tensors.items()}, call.options)
    got = call()
    assert got.dtype == torch.float32
    assert_close({"s": got.double()}, {"s": exact()}, 2e-5)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, tokens", [(0, 9), (1, 0), (1, 3), (2, 13), (7, 4)])
def test_dense(op, batch, tokens, dtype):
    call = make(op, batch, tokens, dtype=dtype)
    compare(op, call)
    steps = call()
    assert steps[:, : tokens // 4].all() and not steps[:, tokens // 4 :].any()


@pytest.mark.parametrize("cu", PACKINGS, ids=str)
def test_packed(op, cu):
    compare(op, make(op, cu=cu))


@pytest.mark.parametrize("chunk", [1, 16, 33, 150])
def test_several_tiles(op, chunk):
    compare(op, make(op, 1, 2 * chunk + 1, chunk=chunk, d=40, f=136))


@pytest.mark.parametrize("iterations", [1, 5])
def test_iterations(iterations):
    compare("spectral", make("spectral", chunk=5, iterations=iterations))


def test_a_clip_that_does_nothing():
    call = make("clipped", max_norm=1e9)
    assert torch.equal(call()[:, :3], torch.full((2, 3), 0.3, device=DEVICE))


def test_zero_target(op):
    """No update, no norm: the floor of sigma, and no clip."""
    call = make(op)
    call.tensors["v"].zero_()
    compare(op, call)


@pytest.mark.parametrize("name", ["z", "v"])
def test_nan_stays_in_its_chunk(op, name):
    """And is NaN there: a floor or a clip that swallowed it would give a finite step."""
    call = make(op, 1, 13)
    clean = call()
    call.tensors[name][:, 6, 3] = float("nan")
    got, hit = call(), torch.tensor([[False, True, False, False]], device=DEVICE)
    assert torch.equal(got.isnan(), hit) and torch.equal(got[~hit], clean[~hit])


@pytest.mark.sanitize
def test_schedules_give_the_same_bits(op, schedule):  # noqa: F811
    call = make(op, 1, 67, chunk=33, d=40, f=136)
    compare(op, call)
    assert_same({"s": call()}, {"s": call()})


def test_gradients(op):
    """Library products of Gram matrices: those of eager."""
    call = make(op, lr=100.0)
    exact = Call(OPS[op][1], {k: t.double() for k, t in call.tensors.items()}, call.options)
    got, want = results(call), results(exact)
    for name in ("dz", "dv"):
        assert_close({name: got[name].double()}, {name: want[name]}, 1e-2)


def test_refused_widths(op):
    with pytest.raises(NotImplementedError, match="must have D and F that are multiples of 8, got D = 12"):
        make(op, d=12)()
