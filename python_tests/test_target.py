"""Value targets: against the reference, and what must hold without one."""

import sys

import pytest
import torch
from helpers import Call, assert_close, assert_same, randn, results
from torch.nn.functional import conv1d

import ttt_kernels as ttt
from ttt_kernels.ops.target import eager, reference
from ttt_kernels.types import compute_dtype

D, C, BOUND = 6, 4, 1e-12
LENGTHS = (0, 1, 2, C - 1, C, C + 1, 2 * C, 2 * C + 1, 19)
PACKINGS = ([0, 19], [0, 0, 1, 4, 4, 6], [0, 5, 5, 17, 20, 20], [0, 0])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def ntp_call(batch=2, tokens=13, *, proj=True, cu=None, dtype=torch.float64, **options) -> Call:
    cu_seqlens = None if cu is None else torch.tensor(cu)
    batch, tokens = (batch, tokens) if cu is None else (1, cu[-1])
    tensors = {"x": randn(batch, tokens, D, dtype=dtype)}
    if proj:
        tensors["proj"] = randn(D, D, seed=1, dtype=dtype)
    else:
        options["proj"] = None
    return Call(ttt.next_token_target, tensors, {"chunk_size": C, "cu_seqlens": cu_seqlens, **options})


def conv_call(batch=2, tokens=13, *, taps=5, **options) -> Call:
    call = ntp_call(batch, tokens, **options)
    weight = randn(D, 1, taps, seed=2, dtype=call.tensors["x"].dtype)
    proj = {k: call.tensors[k] for k in call.tensors if k == "proj"}
    return Call(ttt.conv_target, {"u": call.tensors["x"], "conv_weight": weight, **proj}, call.options)


MAKERS = {
    "next": (ntp_call, reference.next_token_target),
    "conv": (conv_call, reference.conv_target),
}


@pytest.fixture(params=MAKERS)
def op(request):
    return MAKERS[request.param]


@pytest.fixture(params=[None, 2], ids=["one_tile", "small_tiles"])
def tile(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(eager, "TOKEN_TILE", request.param)


def compare(call: Call, formula, bound: float = BOUND) -> None:
    assert_close(results(call), results(Call(formula, call.tensors, call.options)), bound)


@pytest.mark.parametrize("proj", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_dense(op, tokens, proj, tile):
    for batch in (1, 2):
        compare(op[0](batch, tokens, proj=proj), op[1])


@pytest.mark.parametrize("proj", [False, True])
@pytest.mark.parametrize("cu", PACKINGS, ids=str)
def test_packed(op, cu, proj, tile):
    compare(op[0](cu=cu, proj=proj), op[1])


@pytest.mark.parametrize("chunk", [1, 2, 13, 100])
def test_chunk_sizes(op, chunk, tile):
    for cu in (None, [0, 3, 3, 13]):
        compare(op[0](2, 13, cu=cu, chunk_size=chunk), op[1])


def test_empty_batch(op):
    for proj in (False, True):
        call = op[0](0, 9, proj=proj)
        got = results(call)
        assert got["out0"].shape == (0, 9, D)
        assert all(got[f"d{k}"].shape == t.shape for k, t in call.tensors.items())
        assert not any(t.any() for t in got.values())


@pytest.mark.parametrize("horizon", [1, 2, C - 1, C, 5, 40])
def test_horizons(horizon, tile):
    for cu in (None, [0, 3, 3, 13]):
        compare(ntp_call(2, 13, cu=cu, horizon=horizon), reference.next_token_target)


@pytest.mark.parametrize("taps", [1, 3, 5, 9])
def test_taps(taps):
    """Windows longer than a chunk too."""
    for cu in (None, [0, 3, 3, 13]):
        compare(conv_call(2, 13, cu=cu, taps=taps), reference.conv_target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision(op, dtype):
    """One rounding of the compute precision's result: the reference is the contract here."""
    make, formula = op
    call = make(2, 19, dtype=dtype)
    got, want = results(call), results(Call(formula, call.tensors, call.options))
    assert all(t.dtype == dtype for t in got.values())
    exact = Call(formula, {k: t.double() for k, t in call.tensors.items()}, call.options)
    rounded = {k: t.to(dtype) for k, t in results(exact).items()}
    assert_close(got, rounded, 2 * torch.finfo(dtype).eps)
    assert_close(got, want, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    cu = [0, 3, 3, 8] if packed else None
    for make, formula in MAKERS.values():
        call = make(2, 7, cu=cu)
        names = list(call.tensors)
        for op in (call.op, formula):
            assert torch.autograd.gradcheck(
                lambda *t, op=op, call=call, names=names: op(
                    **dict(zip(names, t, strict=True)), **call.options
                ),
                list(call.leaves().values()),
            )


def test_next_token_is_a_shift():
    """By hand: identity projection, chunks of 4 of 10 tokens."""
    x = torch.arange(1.0, 11.0)[None, :, None]
    shifted = ttt.next_token_target(x, None, chunk_size=4)[0, :, 0]
    assert shifted.tolist() == [2, 3, 4, 0, 6, 7, 8, 0, 10, 0]
    shifted = ttt.next_token_target(x, None, chunk_size=4, horizon=2)[0, :, 0]
    assert shifted.tolist() == [3, 4, 0, 0, 7, 8, 0, 0, 0, 0]
    packed = ttt.next_token_target(x, None, chunk_size=4, cu_seqlens=torch.tensor([0, 2, 2, 8, 10]))
    assert packed[0, :, 0].tolist() == [2, 0, 4, 5, 6, 0, 8, 0, 10, 0]


def test_projection_is_used_as_stored():
    """x @ proj, not x @ proj.T."""
    x, proj = torch.eye(3)[None], torch.arange(9.0).view(3, 3)
    v = ttt.next_token_target(x, proj, chunk_size=3)
    assert torch.equal(v[0], torch.stack([proj[1], proj[2], torch.zeros(3)]))
    center = torch.ones(3, 1, 1)
    assert torch.equal(ttt.conv_target(x, center, proj, chunk_size=3)[0], proj)


def test_longest_chunk_is_the_whole_sequence(op):
    """sys.maxsize, an idiom for "one chunk", must not wrap around behind the first sequence."""
    for cu in (None, [0, 3, 8]):
        call = op[0](2, 8, cu=cu)
        assert torch.equal(call(chunk_size=sys.maxsize), call(chunk_size=8))


def test_conv_is_conv1d_of_each_chunk():
    call = conv_call(1, 10, proj=False)
    u, weight = call.tensors["u"], call.tensors["conv_weight"]
    for a, b in ((0, 4), (4, 8), (8, 10)):
        want = conv1d(u[0, a:b].T[None], weight, padding=2, groups=D)[0].T
        assert torch.allclose(call()[0, a:b], want, atol=1e-13)


@pytest.mark.parametrize("cu", [None, [0, 6, 6, 13]], ids=str)
def test_chunks_do_not_see_one_another(op, cu):
    """NaN in one chunk stays there; the rest keeps its bits."""
    call = op[0](1, 13, cu=cu)
    name = next(iter(call.tensors))
    clean, dirty = call(), call.tensors[name].clone()
    dirty[:, 8:10] = float("nan")
    a, b = (8, 12) if cu is None else (6, 10)
    got = call(**{name: dirty})
    assert torch.equal(got[:, :a], clean[:, :a]) and torch.equal(got[:, b:], clean[:, b:])
    assert got[:, a:b].isnan().any()


def test_linear_in_the_source(op):
    call = op[0]()
    name = next(iter(call.tensors))
    x, other = call.tensors[name], randn(2, 13, D, seed=9)
    want = 2 * call() - 3 * call(**{name: other})
    assert torch.allclose(call(**{name: 2 * x - 3 * other}), want, atol=1e-12)


def test_target_is_not_detached(op):
    call = op[0]()
    leaves = call.leaves()
    call(**leaves).sum().backward()
    assert all(t.grad.any() for t in leaves.values())


def test_rows_independent_and_repeatable(op):
    for dtype in DTYPES:
        call = op[0](3, 13, dtype=dtype)
        name, full = next(iter(call.tensors)), call()
        for b in range(3):
            assert torch.equal(call(**{name: call.tensors[name][b : b + 1]})[0], full[b])
        assert_same(results(call), results(call))


def test_strided_and_expanded(op):
    call = op[0](3, 13)
    want = results(call)
    for name, tensor in call.tensors.items():
        moved = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        assert_same(results(Call(call.op, {**call.tensors, name: moved}, call.options)), want)
    leaves = call.leaves()
    call(**leaves).sum().backward()  # an expanded output gradient
    dense = call.leaves()
    call(**dense).backward(torch.ones(3, 13, D, dtype=torch.float64))
    assert all(torch.equal(leaves[k].grad, dense[k].grad) for k in leaves)
    wide = call.leaves()
    call(**wide).backward(torch.ones(3, 13, 2 * D, dtype=torch.float64)[..., ::2])
    assert all(torch.equal(wide[k].grad, dense[k].grad) for k in wide)


def test_inputs_untouched_outputs_own_their_memory(op):
    for proj in (False, True):
        call = op[0](2, 13, proj=proj)
        leaves = call.leaves()
        v = call(**leaves)
        v.backward(direction := torch.ones_like(v))
        assert v.is_contiguous() and direction._version == 0
        for name, tensor in leaves.items():
            assert tensor._version == 0 and torch.equal(tensor, call.tensors[name])
            assert tensor.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()


def test_every_output_element_is_written(op):
    calls = [op[0](2, 13), op[0](cu=[0, 6, 6, 13], proj=False)]
    clean = [results(c) for c in calls]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all(), "the poison does not work"
        for call, want in zip(calls, clean, strict=True):
            assert_same(results(call), want)
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


def test_float16_accumulates_in_float32():
    """A sum that float16 cannot hold on the way, but can at the end."""
    d = 4
    x = torch.full((1, 2, d), 200.0, dtype=torch.float16)
    proj = torch.tensor([400.0, 400.0, -400.0, -400.0], dtype=torch.float16)[:, None].expand(d, d)
    assert compute_dtype(x.dtype) == torch.float32
    assert not ttt.next_token_target(x, proj, chunk_size=2).any()
