"""The fused targets: against the specification in float64, and what must hold without one.

Interpreted where there is no GPU, compiled where there is one.
"""

import sys
from collections import Counter

import pytest
import torch
from helpers import Call, assert_close, assert_same, randn, results
from test_target import LENGTHS, PACKINGS, C, conv_call, ntp_call

from ttt_kernels.ops.target import eager, heuristics, reference, registration

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
OPS = {
    "next_token": (ntp_call, reference.next_token_target),
    "conv": (conv_call, reference.conv_target),
}


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("TTT_KERNELS_IMPL", "triton")


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def make(op, batch=2, tokens=13, *, dtype=torch.float32, **options) -> Call:
    call = OPS[op][0](batch, tokens, dtype=dtype, **options)
    cu_seqlens = call.options["cu_seqlens"]
    if cu_seqlens is not None:
        call.options["cu_seqlens"] = cu_seqlens.to(DEVICE)
    return Call(call.op, {k: t.to(DEVICE) for k, t in call.tensors.items()}, call.options)


def compare(op: str, call: Call) -> dict[str, torch.Tensor]:
    """The results, after a comparison with the formula on the same numbers in float64. The bound holds
    the second rounding of a low-precision convolution too."""
    got, dtype = results(call), next(iter(call.tensors.values())).dtype
    exact = Call(OPS[op][1], {k: t.double() for k, t in call.tensors.items()}, call.options)
    assert all(t.dtype == dtype and t.is_contiguous() for t in got.values())
    bound = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert_close({k: t.double() for k, t in got.items()}, results(exact), bound)
    return got


@pytest.mark.parametrize("proj", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_dense(op, tokens, proj):
    compare(op, make(op, 2, tokens, proj=proj))


@pytest.mark.parametrize("proj", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_batches(op, batch, proj):
    compare(op, make(op, batch, 9, proj=proj))


@pytest.mark.parametrize("proj", [False, True])
@pytest.mark.parametrize("cu", PACKINGS, ids=str)
def test_packed(op, cu, proj):
    compare(op, make(op, cu=cu, proj=proj))


@pytest.mark.parametrize("chunk", [1, 2, 13, 100])
def test_chunk_sizes(op, chunk):
    """Chunks shorter than the window, too."""
    for cu in (None, [0, 3, 3, 13]):
        compare(op, make(op, cu=cu, chunk_size=chunk))


@pytest.mark.parametrize("horizon", [2, C - 1, C, 5, 40, sys.maxsize])
def test_horizons(horizon):
    for cu, proj in ((None, True), (None, False), ([0, 3, 3, 13], True)):
        compare("next_token", make("next_token", cu=cu, proj=proj, horizon=horizon))


@pytest.mark.parametrize("taps", [1, 3, 9])
def test_taps(taps):
    for cu in (None, [0, 3, 3, 13]):
        compare("conv", make("conv", cu=cu, taps=taps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cu", [None, [0, 30, 47]], ids=str)
def test_several_tiles(op, cu, dtype):
    """More tokens and features than a program takes, and rows that end inside a tile."""
    call = make(op, 2, 47, cu=cu, chunk_size=20, dtype=dtype)
    d = 34 if DEVICE == "cpu" else 300
    shapes = {"x": (d,), "u": (d,), "proj": (d, d), "conv_weight": (d, 1, 5)}
    for seed, (name, tensor) in enumerate(call.tensors.items()):
        rows = tensor.shape[:2] if name in "xu" else ()
        call.tensors[name] = randn(*rows, *shapes[name], seed=seed, dtype=dtype).to(DEVICE)
    compare(op, call)


def test_longest_chunk_is_the_whole_sequence(op):
    for cu in (None, [0, 3, 8]):
        call = make(op, 2, 8, cu=cu)
        assert torch.equal(call(chunk_size=sys.maxsize), call(chunk_size=8))


@pytest.mark.parametrize("cu", [None, [0, 6, 6, 13]], ids=str)
def test_chunks_do_not_see_one_another(op, cu):
    """NaN in one chunk stays there, and so does its gradient's; the rest keeps its bits."""
    call = make(op, 1, 13, cu=cu)
    name = next(iter(call.tensors))
    clean, dirty = results(call), call.tensors[name].clone()
    dirty[:, 8:10] = float("nan")
    a, b = (8, 12) if cu is None else (6, 10)
    got = call(**{name: dirty})
    assert torch.equal(got[:, :a], clean["out0"][:, :a]) and torch.equal(got[:, b:], clean["out0"][:, b:])
    assert got[:, a:b].isnan().any()
    leaf, dv = call.tensors[name].requires_grad_(), torch.ones_like(got)
    (want,) = torch.autograd.grad(call(), leaf, dv)
    dv[:, 8:10] = float("nan")
    (grad,) = torch.autograd.grad(call(), leaf, dv)
    assert torch.equal(grad[:, :a], want[:, :a]) and torch.equal(grad[:, b:], want[:, b:])
    assert grad[:, a:b].isnan().any()


def test_float16_accumulates_in_float32():
    """A sum that float16 cannot hold on the way, but can at the end."""
    u = torch.tensor([200.0, 200, 100, 100], dtype=torch.float16, device=DEVICE)[None, :, None]
    weight = torch.tensor([[[300.0, 300, -600]]], dtype=torch.float16, device=DEVICE)
    call = Call(make("conv").op, {"u": u, "conv_weight": weight}, {"proj": None, "chunk_size": 4})
    assert call().flatten().tolist() == [-60000, 60000, 30000, 60000]


def test_repeatable_and_every_element_written(op):
    for options in ({"proj": True}, {"cu": [0, 6, 6, 13], "proj": False}):
        call = make(op, **options)
        clean = results(call)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert torch.empty(3, device=DEVICE).isnan().all(), "the poison does not work"
            assert_same(results(call), clean)
        finally:
            torch.use_deterministic_algorithms(False)


def test_inputs_untouched_outputs_own_their_memory(op):
    for proj in (False, True):
        call = make(op, proj=proj)
        leaves = call.leaves()
        v = call(**leaves)
        v.backward(direction := torch.ones_like(v))
        assert v.is_contiguous() and direction._version == 0
        for name, tensor in leaves.items():
            assert tensor._version == 0 and torch.equal(tensor, call.tensors[name])
            assert tensor.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()


def test_which_implementation_runs(op, monkeypatch):
    call = make(op)
    monkeypatch.setenv("TTT_KERNELS_IMPL", "reference")
    assert torch.equal(call(), Call(OPS[op][1], call.tensors, call.options)())
    monkeypatch.setenv("TTT_KERNELS_IMPL", "triton")
    with pytest.raises(NotImplementedError, match=f"{op}_target here.* not float64"):
        call(**{k: t.double() for k, t in call.tensors.items()})
    asked = []
    for name in ("next_token", "next_token_backward", "conv", "conv_backward"):
        function = getattr(eager, name)

        def spy(*args, function=function, name=name):
            asked.append(name)
            return function(*args)

        monkeypatch.setattr(registration.eager, name, spy)
    results(call)
    assert not asked
    for impl in ("eager", "auto"):
        monkeypatch.setenv("TTT_KERNELS_IMPL", impl)
        results(make(op, dtype=torch.float64))
        assert asked == [op, f"{op}_backward"]
        asked.clear()


# Choices


def test_tiles_by_architecture():
    for architecture in (80, 90, 100, 103):
        shift, conv = heuristics.shift_tiles(architecture), heuristics.conv_tiles(architecture)
        for tile in (shift, conv):
            assert tile.d % 8 == 0 and tile.t * tile.d // (32 * tile.warps) <= 64
    assert heuristics.shift_tiles(0) == heuristics.conv_tiles(0)


@pytest.mark.parametrize("chunk", [64, 1024])
def test_launches_of_a_model(chunk):
    """One launch a pass over the tokens, however many chunks there are."""
    from ttt_kernels.ops.target import triton_bwd, triton_fwd
    from ttt_kernels.ops.triton_launch import record

    x, proj, weight = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        for shape in ((1, 32768, 4096), (4096, 4096), (4096, 1, 5))
    )
    with record(90) as recorded:
        assert triton_fwd.next_token(x, proj, chunk, 1, None).shape == x.shape
        triton_bwd.next_token_backward(x, x, proj, chunk, 1, None)
        assert triton_fwd.conv(x, weight, proj, chunk, None).shape == x.shape
        triton_bwd.conv_backward(x, x, weight, proj, chunk, None)
    names = Counter(launch.kernel.fn.__name__.removeprefix("target_") for launch in recorded)
    assert names == {"fwd_shift_kernel": 2, "fwd_conv_kernel": 2, "bwd_conv_kernel": 1}
    tile = heuristics.shift_tiles(90)
    assert recorded[0].grid == (32768 // tile.t, 4096 // tile.d)
