"""What must hold of `fast_weight_scan` whatever a reference says.

Where bits are compared across different ways of cutting the work, the data is made of small
integers and powers of two: every sum is then exact in any order, so that the libraries' choice of
blocking cannot hide (or excuse) a difference.
"""

import pytest
import torch
from helpers import C, Call, D, assert_close, assert_same, gradients, randn, results, scan_call
from torch.nn.functional import linear

from ttt_kernels.ops.scan import eager, eager_bwd

T = 4 * C + 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FULL = {"state": True, "steps": True, "preserve_row_norm": True}

pytestmark = pytest.mark.parametrize("chunks_per_block", [1, 3], indirect=True)


@pytest.fixture(autouse=True)
def chunks_per_block(request, monkeypatch):
    for module in (eager, eager_bwd):
        monkeypatch.setattr(module, "super_chunk", lambda chunk, *_: request.param * chunk)
    return request.param


def exact_call(tokens=T, dtype=torch.float32, **options) -> Call:
    """Integers of at most 2 in size and a step of 1/4: no sum is ever rounded."""
    call = scan_call(2, tokens, dtype=dtype, **options)
    call.tensors = {k: t.round().clamp(-2, 2) for k, t in call.tensors.items()}
    call.tensors["v"] = call.tensors["z"][..., :D].flip(1).contiguous()
    if "step_size" in call.options:
        call.options["step_size"] = 0.25
    return call


# Equality with the plain layer


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_target_is_the_plain_layer(dtype, preserve):
    call = exact_call(dtype=dtype, preserve_row_norm=preserve)
    z, w0 = call.tensors["z"], call.tensors["w0"]
    y, state = call(v=torch.zeros_like(call.tensors["v"]))
    assert torch.equal(y, linear(z, w0))
    assert torch.equal(state, w0.to(state.dtype).expand_as(state))


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_chunk_is_the_plain_layer(dtype, preserve):
    """On any data: one GEMM over the sequence in the compute precision, rounded once."""
    call = scan_call(1, 13, chunk=13, dtype=dtype, preserve_row_norm=preserve)
    z, w0 = call.tensors["z"], call.tensors["w0"]
    acc = torch.promote_types(dtype, torch.float32)
    assert torch.equal(call()[0][0], linear(z[0].to(acc), w0.to(acc)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_applied_weight_is_the_state_rounded_once(dtype):
    """Forward and backward read the same rounded weight; the state itself stays as it was."""
    call = scan_call(1, 13, chunk=13, dtype=dtype, state=True)
    z, state = call.tensors["z"], call.tensors["state"]
    rounded = state.to(dtype).float()
    assert not torch.equal(rounded, state)
    z.requires_grad_()
    y, final = call(step_size=0.0)
    assert torch.equal(y[0], linear(z[0].float(), rounded[0]).to(dtype)) and torch.equal(final, state)
    dy = randn(*y.shape, seed=8, dtype=dtype)
    (dz,) = torch.autograd.grad(y, z, dy)
    assert torch.equal(dz[0], (dy[0].float() @ rounded[0]).to(dtype))


@pytest.mark.parametrize("preserve", [False, True])
def test_zero_step_is_the_plain_layer(preserve):
    call = exact_call(preserve_row_norm=preserve)
    assert torch.equal(call(step_size=0.0)[0], linear(call.tensors["z"], call.tensors["w0"]))


# Independence


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_rows_are_independent(dtype):
    call = scan_call(3, T, dtype=dtype, **FULL)
    y, state = call()
    for b in range(3):
        parts = {k: t if k == "w0" else t[b : b + 1] for k, t in call.tensors.items()}
        alone = call(**parts)
        assert torch.equal(alone[0][0], y[b]) and torch.equal(alone[1][0], state[b])


def test_packed_sequences_are_independent():
    cu = [0, 5, 5, 18, 21]
    call = scan_call(cu=cu, **FULL)
    packed = results(call)
    first_step = 0
    for s, (a, b) in enumerate(zip(cu, cu[1:], strict=False)):
        count = -(-(b - a) // C)
        parts = {
            "z": call.tensors["z"][:, a:b],
            "v": call.tensors["v"][:, a:b],
            "step_size": call.tensors["step_size"][:, first_step : first_step + count],
            "state": call.tensors["state"][s : s + 1],
        }
        first_step += count
        y, state = call(**parts, cu_seqlens=None)
        assert torch.equal(y, packed["out0"][:, a:b])
        assert torch.equal(state[0], packed["out1"][s])


@pytest.mark.parametrize("t", [0, 1, C - 1, C, 2 * C + 1, 4 * C, T - 1])
def test_causality(t):
    """Token t reaches its own output and the chunks after its own, and nothing else."""
    call = scan_call(2, T, preserve_row_norm=True, state=True)
    y, state = call()
    changed = {k: call.tensors[k].clone() for k in ("z", "v")}
    for tensor in changed.values():
        tensor[:, t] += 1.0
    y2, state2 = call(**changed)
    moved = (y != y2).any(-1)
    after = (t // C + 1) * C
    complete = after <= T
    expected = torch.zeros(T, dtype=torch.bool)
    expected[t] = True
    expected[after:] = complete
    assert torch.equal(moved, expected.expand(2, T))
    assert torch.equal(state, state2) != complete


def test_gradients_are_causal():
    """The transpose of causality: an output gradient reaches its own key and earlier chunks."""
    call = scan_call(1, T, preserve_row_norm=True)
    leaves = call.leaves()
    t = 2 * C + 1
    call(**leaves)[0][0, t].sum().backward()
    for name, own in (("z", t), ("v", None)):
        reached = leaves[name].grad[0].ne(0).any(-1)
        expected = torch.arange(T) < 2 * C
        if own is not None:
            expected[own] = True
        assert torch.equal(reached, expected), name


# Algebra


def test_affine_in_v_and_in_step_size():
    call = scan_call(2, T, state=True)
    v, other = call.tensors["v"], randn(2, T, D, seed=7)
    zero = call(v=torch.zeros_like(v))
    got, a, b = (call(v=x) for x in (2 * v - 3 * other, v, other))
    for i in (0, 1):
        want = 2 * a[i] - 3 * b[i] + 2 * zero[i]
        assert torch.allclose(got[i], want, rtol=1e-11, atol=1e-11)
        assert torch.allclose(call(v=2 * v, step_size=0.15)[i], a[i], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_final_state_is_the_sum_of_writes(dtype):
    call = exact_call(dtype=dtype)
    z, v, w0 = (call.tensors[k].double() for k in ("z", "v", "w0"))
    full = T // C * C
    want = w0 + 0.25 * v[:, :full].mT @ z[:, :full]
    assert torch.equal(call()[1].double(), want)


@pytest.mark.parametrize("cuts", [[0, C, T], [0, 2 * C, 3 * C, T], [0, 0, 4 * C, T]])
@pytest.mark.parametrize("preserve", [False, True])
def test_split_and_carry_equals_one_shot(cuts, preserve):
    """Values, bit for bit where every sum is exact, and all gradients through the carried state."""

    def split(z, v, w0, state=None, **options):
        outputs = []
        for a, b in zip(cuts, cuts[1:], strict=False):
            y, state = call.op(z[:, a:b], v[:, a:b], w0, state=state, **options)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    call = exact_call()
    whole, parts = call(), Call(split, call.tensors, call.options)()
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    for state in (False, True):
        call = scan_call(2, T, preserve_row_norm=preserve, state=state)
        assert_close(results(Call(split, call.tensors, call.options)), results(call), 1e-11)


def test_result_does_not_depend_on_blocks(monkeypatch):
    call = exact_call()
    y, state = call()
    for length in (1, 2, 5, 100):
        monkeypatch.setattr(eager, "super_chunk", lambda chunk, *_, n=length: n * chunk)
        y2, state2 = call()
        assert torch.equal(y, y2) and torch.equal(state, state2)


def test_returning_the_state_changes_nothing_else():
    call = scan_call(2, T, **FULL)
    y, none = call(return_state=False)
    assert none is None and torch.equal(y, call()[0])
    leaves = call.leaves()
    without = gradients([call(**leaves, return_state=False)[0]], leaves)
    assert_close(gradients([call(**leaves)[0]], leaves), without, 1e-12)


def test_repeatable_bit_for_bit():
    for dtype in DTYPES:
        call = scan_call(2, T, dtype=dtype, **FULL)
        assert_same(results(call), results(call))


# What is never read, and what is never written


def test_incomplete_chunk_is_never_written():
    call = scan_call(2, T, **FULL)
    clean = results(call)
    v, steps, z = (call.tensors[k].clone() for k in ("v", "step_size", "z"))
    v[:, 4 * C :] = float("nan")
    steps[:, 4] = float("nan")
    dirty = Call(call.op, {**call.tensors, "v": v, "step_size": steps}, call.options)
    got = results(dirty)
    assert_same(got, clean)
    assert not got["dv"][:, 4 * C :].any() and not got["dstep_size"][:, 4].any()
    z[:, 4 * C :] = float("nan")
    y, state = call(z=z)
    assert torch.equal(state, clean["out1"])
    assert torch.equal(y[:, : 4 * C], clean["out0"][:, : 4 * C])


def test_incomplete_chunk_of_a_packed_sequence_is_never_written():
    call = scan_call(cu=[0, 6, 7, 13], **FULL)
    clean = results(call)
    v, steps = call.tensors["v"].clone(), call.tensors["step_size"].clone()
    v[:, [4, 5, 6, 11, 12]] = float("nan")
    steps[:, [1, 2, 4]] = float("nan")
    tensors = {**call.tensors, "v": v, "step_size": steps}
    assert_same(results(Call(call.op, tensors, call.options)), clean)


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_are_never_modified(packed):
    call = scan_call(2, T, cu=[0, 6, 6, T] if packed else None, **FULL)
    leaves = call.leaves()
    leaves["cu_seqlens"] = call.options["cu_seqlens"]
    outputs = call(**leaves)
    directions = [torch.ones_like(t) for t in outputs]
    torch.autograd.backward(outputs, directions)
    for name, tensor in leaves.items():
        if tensor is not None:
            assert tensor._version == 0, name
            assert torch.equal(tensor, {**call.tensors, **call.options}[name]), name
    assert all(torch.equal(t, torch.ones_like(t)) for t in directions)


@pytest.mark.parametrize("tokens", [0, 1, T])
def test_outputs_are_contiguous_and_alias_nothing(tokens):
    call = scan_call(2, tokens, state=True)
    outputs = call()
    owners = {t.untyped_storage().data_ptr() for t in call.tensors.values() if t.numel()}
    for t in outputs:
        assert t.is_contiguous()
        assert not t.numel() or t.untyped_storage().data_ptr() not in owners
    assert not tokens or outputs[0].untyped_storage() is not outputs[1].untyped_storage()


def test_every_output_element_is_written():
    """torch fills `empty` with NaN in this mode."""
    calls = [scan_call(2, T, **FULL), scan_call(2, 3), scan_call(cu=[0, 6, 6, 7, T], **FULL)]
    clean = [results(c) for c in calls]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all(), "the poison does not work"
        for call, want in zip(calls, clean, strict=True):
            assert_same(results(call), want)
    finally:
        torch.use_deterministic_algorithms(False)


# Layouts


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values with gaps and another order of axes in memory."""
    wide = t.new_full((*t.shape, 2), float("nan"))
    wide[..., 0] = t
    return wide[..., 0].transpose(0, -1).contiguous().transpose(0, -1)[...]


@pytest.mark.parametrize("name", ["z", "v", "w0", "step_size", "state"])
def test_strided_inputs(name):
    call = scan_call(2, T, **FULL)
    tensors = {**call.tensors, name: strided(call.tensors[name])}
    assert not tensors[name].is_contiguous()
    leaves = call.leaves()
    leaves[name] = tensors[name].requires_grad_()
    grads = gradients(list(call(**leaves)), leaves)
    assert_same(grads, {k: t for k, t in results(call).items() if k in grads})


@pytest.mark.parametrize("name", ["z", "v", "step_size", "state"])
def test_expanded_inputs(name):
    call = scan_call(3, T, **FULL)
    row = call.tensors[name][:1].clone().requires_grad_()
    y, state = call(**{name: row.expand(3, *row.shape[1:])})
    full = row.detach().repeat(3, *[1] * (row.dim() - 1)).requires_grad_()
    y2, state2 = call(**{name: full})
    assert torch.equal(y, y2) and torch.equal(state, state2)
    (got,) = torch.autograd.grad(y.sum() + state.sum(), row)
    (want,) = torch.autograd.grad(y2.sum() + state2.sum(), full)
    assert torch.equal(got, want.sum(0, keepdim=True))


@pytest.mark.parametrize("layout", ["expanded", "strided", "sliced"])
def test_output_gradients_of_any_layout(layout):
    call = scan_call(2, T, **FULL)
    make = {
        "expanded": lambda t: t.new_ones(()).expand(t.shape),
        "strided": lambda t: strided(randn(*t.shape)),
        "sliced": lambda t: randn(*t.shape[:-1], t.shape[-1] + 3)[..., 2:-1],
    }[layout]
    grads = []
    for finish in (lambda t: t, torch.Tensor.contiguous):
        leaves = call.leaves()
        outputs = call(**leaves)
        directions = [finish(make(t)) for t in outputs]
        grads.append(torch.autograd.grad(outputs, list(leaves.values()), directions))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# Derivatives


def test_second_backward_and_no_double_backward():
    call = scan_call(2, T, **FULL)
    leaves = call.leaves()
    loss = sum(t.square().sum() for t in call(**leaves))
    grads = [torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    (dz,) = torch.autograd.grad(loss, [leaves["z"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dz.sum().backward()


def test_changing_the_returned_state_before_backward_raises():
    """The backward starts from it; silently wrong gradients are not an option."""
    call = scan_call(2, T, **FULL)
    y, state = call(**call.leaves())
    with torch.no_grad():
        state.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_gradient_without_request():
    call = scan_call(2, T, **FULL)
    assert not any(t.requires_grad for t in call())
    with torch.no_grad():
        assert not any(t.requires_grad for t in call(**call.leaves()))
    assert all(t.requires_grad for t in call(**call.leaves()))
