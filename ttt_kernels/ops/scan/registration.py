"""The scan as torch ops: `ttt_kernels::scan_fwd`, `ttt_kernels::scan_bwd` and the autograd Function.

Fixed arity: what a call does not have or need is an empty tensor. Outputs are contiguous and alias
nothing. The Function is what `api` calls.

The backward recomputes the state in place, by subtraction. `scan_bwd` does so in a copy of what the
forward saved; `scan_bwd_consume` is the same but for that copy: it overwrites `carried`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ttt_kernels.ops._implementations import resolve_implementation
from ttt_kernels.ops._library import register_op
from ttt_kernels.ops.scan import cuda, eager, eager_bwd
from ttt_kernels.ops.scan.validation import check_packed_steps
from ttt_kernels.types import compute_dtype


def _triton_forward(*args):
    from ttt_kernels.ops.scan import triton_fwd

    return triton_fwd.forward(*args)


def _triton_backward(*args):
    from ttt_kernels.ops.scan import triton_bwd

    return triton_bwd.backward(*args)


FORWARD = {"eager": eager.forward, "triton": _triton_forward, "cuda": cuda.forward}
BACKWARD = {"eager": eager_bwd.backward, "triton": _triton_backward, "cuda": cuda.backward}


def _forward(
    z, v, w0, step_size, lr, state, cu_seqlens, chunk_size, preserve_row_norm, return_state,
    save_state, impl,
):  # fmt: skip
    check_packed_steps(step_size, z.shape[1], chunk_size, cu_seqlens)
    return FORWARD[resolve_implementation(impl, z, "fast_weight_scan")](
        z, v, w0, step_size, lr, state, cu_seqlens, chunk_size, preserve_row_norm, return_state,
        save_state,
    )  # fmt: skip


def _forward_fake(
    z, v, w0, step_size, lr, state, cu_seqlens, chunk_size, preserve_row_norm, return_state,
    save_state, impl,
):  # fmt: skip
    sequences = z.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    carried = (sequences if return_state or save_state else 0, *w0.shape)
    y = z.new_empty(z.shape[0], z.shape[1], w0.shape[0])
    return y, z.new_empty(carried, dtype=compute_dtype(z.dtype))


def _backward(
    dy, dstate, carried, z, v, w0, step_size, lr, state, cu_seqlens, chunk_size,
    preserve_row_norm, return_state, impl, *, consume,
):  # fmt: skip
    return BACKWARD[resolve_implementation(impl, z, "fast_weight_scan")](
        dy, dstate, carried, z, v, w0, step_size, lr, state, cu_seqlens, chunk_size,
        preserve_row_norm, return_state, consume,
    )  # fmt: skip


def _backward_fake(
    dy, dstate, carried, z, v, w0, step_size, lr, state, cu_seqlens, chunk_size,
    preserve_row_norm, return_state, impl,
):  # fmt: skip
    return (
        z.new_empty(z.shape),
        v.new_empty(v.shape),
        w0.new_empty(w0.shape),
        carried.new_empty((0,) if step_size is None else step_size.shape),
        carried.new_empty((0,) if state is None else state.shape),
    )


scan_fwd = register_op(
    "scan_fwd(Tensor z, Tensor v, Tensor w0, Tensor? step_size, float lr, Tensor? state, "
    "Tensor? cu_seqlens, SymInt chunk_size, bool preserve_row_norm, bool return_state, "
    "bool save_state, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_BACKWARD_SCHEMA = (
    "{}(Tensor dy, Tensor? dstate, {} carried, Tensor z, Tensor v, Tensor w0, "
    "Tensor? step_size, float lr, Tensor? state, Tensor? cu_seqlens, SymInt chunk_size, "
    "bool preserve_row_norm, bool return_state, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
scan_bwd = register_op(
    _BACKWARD_SCHEMA.format("scan_bwd", "Tensor"),
    functools.partial(_backward, consume=False),
    _backward_fake,
)
scan_bwd_consume = register_op(
    _BACKWARD_SCHEMA.format("scan_bwd_consume", "Tensor(a!)"),
    functools.partial(_backward, consume=True),
    _backward_fake,
)


def _may_consume(dy: Tensor, carried: Tensor, return_state: bool) -> bool:
    """May the backward that runs now overwrite the state that the forward saved?

    Not where the caller has it too, as the second output, nor where autograd keeps the graph for another
    backward. Nor while a compiler traces: what it makes of one backward serves them all; nor for a batch of
    gradients (`is_grads_batched`), which is one call of the op each. (Hooks on saved tensors that hand out
    what they keep for themselves have that overwritten.)
    """
    if torch.compiler.is_compiling() or return_state or carried.is_inference():
        return False
    if torch._C._functorch.is_batchedtensor(dy) or torch._C._functorch.is_legacy_batchedtensor(dy):
        return False
    # Private to torch, which asks the same for AOTAutograd's donated buffers; without it every graph is kept.
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is not None and not keeps_graph()


class ScanFunction(torch.autograd.Function):
    """Arguments and results of `scan_fwd`. One derivative: the backward is not differentiable."""

    @staticmethod
    def forward(*args):
        return scan_fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        (z, v, w0, step_size, lr, state, cu_seqlens, chunk_size, preserve, return_state, _, impl) = inputs
        carried = output[1]
        ctx.save_for_backward(carried, z, v, w0, step_size, state, cu_seqlens)
        ctx.settings = (lr, chunk_size, preserve, return_state, impl)
        ctx.set_materialize_grads(False)
        if not return_state:
            ctx.mark_non_differentiable(carried)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dcarried: Tensor | None):
        carried, z, v, w0, step_size, state, cu_seqlens = ctx.saved_tensors
        lr, chunk_size, preserve, return_state, impl = ctx.settings
        dy = z.new_zeros(*z.shape[:2], w0.shape[0]) if dy is None else dy.contiguous()
        dstate = dcarried.contiguous() if return_state and dcarried is not None else None
        if _may_consume(dy, carried, return_state):
            # Beforehand: should this backward fail midway, torch refuses another one of the same graph.
            torch.autograd.graph.increment_version(carried)
            run = scan_bwd_consume
        else:
            run = scan_bwd
        dz, dv, dw0, dstep, dstart = run(
            dy, dstate, carried, z, v, w0, step_size, lr, state, cu_seqlens, chunk_size, preserve,
            return_state, impl,
        )  # fmt: skip
        dstep = None if step_size is None else dstep
        dstart = None if state is None else dstart
        return dz, dv, dw0, dstep, None, dstart, *(None,) * 6
