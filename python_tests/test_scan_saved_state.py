"""The state that the forward saves: overwritten by the last backward of a graph, and by no other. That the
fused kernels compute the same in it is in test_scan_triton_bwd.py and test_scan_cuda.py."""

from itertools import pairwise

import pytest
import torch
from helpers import C, D, assert_same, kept_and_consumed, randn, scan_call
from test_scan_values import FLAGS, LENGTHS, PACKINGS, flags
from torch._dynamo import compiled_autograd
from torch._functorch.aot_autograd import aot_function, make_boxed_compiler
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import ttt_kernels as ttt
from ttt_kernels.cli.measure import extra_memory
from ttt_kernels.ops.scan import eager, eager_bwd, registration

DY = randn(2, 14, D, seed=50)


def inputs():
    """z, v, w0: leaves of three chunks and a rest."""
    return list(scan_call(2, 14).leaves().values())


def scan(z, v, w0, **options):
    return ttt.fast_weight_scan(z, v, w0, chunk_size=C, step_size=0.3, **options)[0]


def gradients(y, leaves, **options):
    """As `Tensor.backward` leaves them."""
    y.backward(DY, inputs=leaves, **options)
    return [t.grad for t in leaves]


def assert_equal(got, want):
    assert_same(dict(enumerate(got)), dict(enumerate(want)))


def offloaded(leaves):
    with save_on_cpu():
        y = scan(*leaves)
    return gradients(y, leaves)


def recomputed(leaves, use_reentrant, **options):
    return gradients(checkpoint(scan, *leaves, use_reentrant=use_reentrant), leaves, **options)


def by_compiled_autograd(leaves):
    y = scan(*leaves)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        return gradients(y, leaves)


def batched(y, leaves):
    """The second of a batch of gradients; one call of the backward for each."""
    found = torch.autograd.grad(y, leaves, torch.stack([2 * DY, DY]), is_grads_batched=True)
    return [g[1] for g in found]


CONSUMED = {
    "backward": lambda x: gradients(scan(*x), x),
    "grad": lambda x: torch.autograd.grad(scan(*x), x, DY),
    "checkpoint": lambda x: recomputed(x, False),
    "save_on_cpu": offloaded,
}
KEPT = {
    "retain_graph": lambda x: gradients(scan(*x), x, retain_graph=True),
    "create_graph": lambda x: torch.autograd.grad(scan(*x), x, DY, create_graph=True),
    "return_state": lambda x: gradients(scan(*x, return_state=True), x),
    "checkpoint_retain": lambda x: recomputed(x, False, retain_graph=True),
    "vjp": lambda x: torch.func.vjp(scan, *(t.detach() for t in x))[1](DY),
    "batched": lambda x: batched(scan(*x), x),
    "compile": lambda x: gradients(torch.compile(scan, fullgraph=True, backend="aot_eager")(*x), x),
    "compiled_autograd": by_compiled_autograd,
}


@pytest.fixture
def told(monkeypatch):
    """Whether each backward was to consume the saved state, in order."""
    told = []

    def backward(*args):
        told.append(args[-1])
        return eager_bwd.backward(*args)

    monkeypatch.setitem(registration.BACKWARD, "eager", backward)
    torch._dynamo.reset()
    return told


@pytest.mark.parametrize("way", [*CONSUMED, *KEPT])
def test_when(way, told):
    """The same bits in any case."""
    got, want = {**CONSUMED, **KEPT}[way](inputs()), KEPT["retain_graph"](inputs())
    assert told == [*([way in CONSUMED] * (2 if way == "batched" else 1)), False]
    assert_equal(got, want)


def test_reentrant_checkpoint(told):
    """Its graph is made in each backward, whether or not the outer one is kept."""
    leaves = inputs()
    y = checkpoint(scan, *leaves, use_reentrant=True)
    for retain in (True, False):
        y.backward(DY, retain_graph=retain)
    assert told == [True, True]
    assert_equal([t.grad / 2 for t in leaves], KEPT["retain_graph"](inputs()))


def test_where_torch_does_not_tell(told, monkeypatch):
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    gradients(scan(*(x := inputs())), x)
    assert told == [False]


def test_traced_without_dynamo():
    """The op that overwrites says so: what AOTAutograd traces on its own serves many backwards."""
    leaves = inputs()
    y = aot_function(scan, make_boxed_compiler(lambda graph, _: graph))(*leaves)
    want = KEPT["retain_graph"](inputs())
    for retain in (True, True, False):
        assert_equal(torch.autograd.grad(y, leaves, DY, retain_graph=retain), want)


def test_a_graph_kept_and_then_freed():
    leaves = inputs()
    y = scan(*leaves)
    first, *others = (torch.autograd.grad(y, leaves, DY, retain_graph=more) for more in (True, True, False))
    for other in others:
        assert_equal(other, first)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, leaves, DY)


def test_parts_of_the_output():
    """One backward each: the second one frees what the first one has kept."""
    leaves = inputs()
    parts = scan(*leaves).split(7, 1)
    for part, retain in zip(parts, (True, False), strict=True):
        part.backward(torch.ones_like(part), retain_graph=retain)
    want = [torch.zeros_like(t) for t in leaves]
    for i in (0, 1):
        part = scan(*leaves).split(7, 1)[i]
        for into, grad in zip(want, torch.autograd.grad(part.sum(), leaves, retain_graph=True), strict=True):
            into += grad
    assert_equal([t.grad for t in leaves], want)


def test_returned_state_is_left_alone():
    leaves = inputs()
    y, state = ttt.fast_weight_scan(*leaves, chunk_size=C, return_state=True)
    before = state.detach().clone()
    torch.autograd.backward((y, state), (DY, torch.ones_like(state)))
    assert torch.equal(state, before)


def test_after_a_failure(monkeypatch):
    """A backward that fails has used up what was saved, and the next one is refused rather than wrong."""

    def fail(*args):
        raise MemoryError

    leaves = inputs()
    y = scan(*leaves)
    with monkeypatch.context() as broken:
        broken.setitem(registration.BACKWARD, "eager", fail)
        with pytest.raises(MemoryError):
            torch.autograd.grad(y, leaves, DY)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, leaves, DY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [8, 64])
def test_saves_a_weight(chunk, dtype):
    """Of peak memory; the rest is scratch for tiles."""
    d, f = 192, 256
    leaves = [randn(*shape, dtype=dtype).requires_grad_() for shape in ((1, 260, f), (1, 260, d), (d, f))]

    def extra(retain_graph):
        return extra_memory(lambda: call(retain_graph), torch.device("cpu"))

    def call(retain_graph):
        y, _ = ttt.fast_weight_scan(*leaves, chunk_size=chunk, step_size=1e-3)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=retain_graph)

    assert extra(True) - extra(False) >= 4 * d * f


@pytest.mark.parametrize("chunks", [1, 3])
def test_every_kind_of_block(chunks, monkeypatch):
    for module in (eager, eager_bwd):
        monkeypatch.setattr(module, "super_chunk", lambda chunk, *_: chunks * chunk)
    packings = [cu for cu in PACKINGS.values() if len(cu) > 1]
    longest = [*LENGTHS, *(max(b - a for a, b in pairwise(cu)) for cu in packings)]
    for *options, _ in FLAGS[::2]:
        calls = [scan_call(2, tokens, **flags(*options, False)) for tokens in LENGTHS]
        calls += [scan_call(cu=cu, **flags(*options, False)) for cu in packings]
        for call, tokens in zip(calls, longest, strict=True):
            kept, consumed, overwritten = kept_and_consumed(call)
            assert_same(consumed, kept)
            assert overwritten == (tokens > chunks * C)  # one block begins and ends with what is known
