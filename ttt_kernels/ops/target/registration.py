"""The targets as torch ops and autograd Functions; conventions as in `ops/scan/registration.py`."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ttt_kernels.ops._implementations import resolve_implementation
from ttt_kernels.ops._library import register_op
from ttt_kernels.ops.target import eager

# "cuda" has no kernels of its own here: a target is a library product and, for a convolution, five sums.
LIBRARY = ("eager", "cuda")


def _forward(impl, operand, op):
    """The module whose functions are called like the ops."""
    if resolve_implementation(impl, operand, op) in LIBRARY:
        return eager
    from ttt_kernels.ops.target import triton_fwd

    return triton_fwd


def _backward(impl, operand, op):
    if resolve_implementation(impl, operand, op) in LIBRARY:
        return eager
    from ttt_kernels.ops.target import triton_bwd

    return triton_bwd


def _next_token(x, proj, chunk_size, horizon, cu_seqlens, impl):
    module = _forward(impl, x, "next_token_target")
    return module.next_token(x, proj, chunk_size, horizon, cu_seqlens)


def _next_token_fake(x, proj, chunk_size, horizon, cu_seqlens, impl):
    return x.new_empty(x.shape)


def _next_token_backward(dv, x, proj, chunk_size, horizon, cu_seqlens, impl):
    module = _backward(impl, x, "next_token_target")
    return module.next_token_backward(dv, x, proj, chunk_size, horizon, cu_seqlens)


def _next_token_backward_fake(dv, x, proj, chunk_size, horizon, cu_seqlens, impl):
    return x.new_empty(x.shape), _like(proj, x)


def _conv(u, conv_weight, proj, chunk_size, cu_seqlens, impl):
    return _forward(impl, u, "conv_target").conv(u, conv_weight, proj, chunk_size, cu_seqlens)


def _conv_fake(u, conv_weight, proj, chunk_size, cu_seqlens, impl):
    return u.new_empty(u.shape)


def _conv_backward(dv, u, conv_weight, proj, chunk_size, cu_seqlens, impl):
    module = _backward(impl, u, "conv_target")
    return module.conv_backward(dv, u, conv_weight, proj, chunk_size, cu_seqlens)


def _conv_backward_fake(dv, u, conv_weight, proj, chunk_size, cu_seqlens, impl):
    return u.new_empty(u.shape), conv_weight.new_empty(conv_weight.shape), _like(proj, u)


def _like(t, other):
    return other.new_empty(0) if t is None else t.new_empty(t.shape)


next_token_fwd = register_op(
    "next_token_target_fwd(Tensor x, Tensor? proj, SymInt chunk_size, SymInt horizon, "
    "Tensor? cu_seqlens, str impl) -> Tensor",
    _next_token,
    _next_token_fake,
)
next_token_bwd = register_op(
    "next_token_target_bwd(Tensor dv, Tensor x, Tensor? proj, SymInt chunk_size, SymInt horizon, "
    "Tensor? cu_seqlens, str impl) -> (Tensor, Tensor)",
    _next_token_backward,
    _next_token_backward_fake,
)
conv_fwd = register_op(
    "conv_target_fwd(Tensor u, Tensor conv_weight, Tensor? proj, SymInt chunk_size, "
    "Tensor? cu_seqlens, str impl) -> Tensor",
    _conv,
    _conv_fake,
)
conv_bwd = register_op(
    "conv_target_bwd(Tensor dv, Tensor u, Tensor conv_weight, Tensor? proj, SymInt chunk_size, "
    "Tensor? cu_seqlens, str impl) -> (Tensor, Tensor, Tensor)",
    _conv_backward,
    _conv_backward_fake,
)


class NextTokenFunction(torch.autograd.Function):
    @staticmethod
    # Arguments by name: without gradients torch.compile does not trace `*args` here.
    def forward(x, proj, chunk_size, horizon, cu_seqlens, impl):
        return next_token_fwd(x, proj, chunk_size, horizon, cu_seqlens, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, proj, ctx.chunk_size, ctx.horizon, cu_seqlens, ctx.impl = inputs
        ctx.save_for_backward(x, proj, cu_seqlens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dv):
        x, proj, cu_seqlens = ctx.saved_tensors
        dx, dproj = next_token_bwd(
            dv.contiguous(), x, proj, ctx.chunk_size, ctx.horizon, cu_seqlens, ctx.impl
        )
        return dx, None if proj is None else dproj, *(None,) * 4


class ConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(u, conv_weight, proj, chunk_size, cu_seqlens, impl):
        return conv_fwd(u, conv_weight, proj, chunk_size, cu_seqlens, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        u, conv_weight, proj, ctx.chunk_size, cu_seqlens, ctx.impl = inputs
        ctx.save_for_backward(u, conv_weight, proj, cu_seqlens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dv):
        u, conv_weight, proj, cu_seqlens = ctx.saved_tensors
        du, dweight, dproj = conv_bwd(
            dv.contiguous(), u, conv_weight, proj, ctx.chunk_size, cu_seqlens, ctx.impl
        )
        return du, dweight, None if proj is None else dproj, *(None,) * 3
