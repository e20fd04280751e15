"""The step as torch ops and one autograd Function; conventions as in `ops/scan/registration.py`.

`step_update` is declared as writing its first argument and returns nothing.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ttt_kernels.ops._implementations import resolve_implementation
from ttt_kernels.ops._library import register_op
from ttt_kernels.ops.step import cuda, eager
from ttt_kernels.ops.step.validation import read_slots


def _triton_apply(*args):
    from ttt_kernels.ops.step import triton_apply

    return triton_apply.apply(*args)


def _triton_apply_backward(*args):
    from ttt_kernels.ops.step import triton_apply

    return triton_apply.apply_backward(*args)


def _triton_update(*args):
    from ttt_kernels.ops.step import triton_update

    return triton_update.update_(*args)


APPLY = {"eager": eager.apply, "triton": _triton_apply, "cuda": cuda.apply}
# Decoding is not trained much: "cuda" has no kernels of its own for gradients, but the library's products.
APPLY_BACKWARD = {
    "eager": eager.apply_backward,
    "triton": _triton_apply_backward,
    "cuda": eager.apply_backward,
}
UPDATE = {"eager": eager.update_, "triton": _triton_update, "cuda": cuda.update_}
ON_DEVICE = (_triton_apply, _triton_apply_backward, _triton_update, cuda.apply, cuda.update_)


def _places(slots, weight, function, distinct):
    """The slots as `function` takes them. Eager needs numbers on the host, and they are checked; the kernels
    read the tensor, which is checked only where that does not wait for a GPU."""
    if slots is None:
        return None
    on_device = function in ON_DEVICE
    places = None if on_device and slots.is_cuda else read_slots(slots, len(weight), distinct=distinct)
    return slots.contiguous() if on_device else places


def _apply(z, weight, row_scale, slots, impl):
    apply = APPLY[resolve_implementation(impl, z, "fast_weight_apply")]
    return apply(z, weight, row_scale, _places(slots, weight, apply, False))


def _apply_fake(z, weight, row_scale, slots, impl):
    return z.new_empty(z.shape[0], z.shape[1], weight.shape[1])


def _apply_backward(dy, z, weight, row_scale, slots, need_pool, impl):
    backward = APPLY_BACKWARD[resolve_implementation(impl, z, "fast_weight_apply")]
    return backward(dy, z, weight, row_scale, _places(slots, weight, backward, False), need_pool)


def _apply_backward_fake(dy, z, weight, row_scale, slots, need_pool, impl):
    scale = (0,) if row_scale is None or not need_pool else row_scale.shape
    pool = weight.shape if need_pool else (0,)
    return z.new_empty(z.shape), weight.new_empty(pool), weight.new_empty(scale)


def _update(weight, z, v, step_size, lr, slots, impl):
    update = UPDATE[resolve_implementation(impl, z, "fast_weight_update_")]
    update(weight, z, v, step_size, lr, _places(slots, weight, update, True))


def _update_fake(weight, z, v, step_size, lr, slots, impl):
    return None


step_apply = register_op(
    "step_apply(Tensor z, Tensor weight, Tensor? row_scale, Tensor? slots, str impl) -> Tensor",
    _apply,
    _apply_fake,
)
step_apply_bwd = register_op(
    "step_apply_bwd(Tensor dy, Tensor z, Tensor weight, Tensor? row_scale, Tensor? slots, "
    "bool need_pool, str impl) -> (Tensor, Tensor, Tensor)",
    _apply_backward,
    _apply_backward_fake,
)
step_update = register_op(
    "step_update(Tensor(a!) weight, Tensor z, Tensor v, Tensor? step_size, float lr, "
    "Tensor? slots, str impl) -> ()",
    _update,
    _update_fake,
)


class ApplyFunction(torch.autograd.Function):
    """Arguments and result of `step_apply`. One derivative: the backward is not differentiable."""

    @staticmethod
    def forward(*args):
        return step_apply(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, weight, row_scale, slots, ctx.impl = inputs
        ctx.save_for_backward(z, weight, row_scale, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        z, weight, row_scale, slots = ctx.saved_tensors
        need_pool = any(ctx.needs_input_grad[1:3])
        dz, dweight, dscale = step_apply_bwd(
            dy.contiguous(), z, weight, row_scale, slots, need_pool, ctx.impl
        )
        if not need_pool:
            dweight = dscale = None
        return dz, dweight, None if row_scale is None else dscale, None, None
