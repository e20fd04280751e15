"""The targets as torch ops and autograd Functions; conventions as in `ops/scan/registration.py`."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ttt_kernels.ops._library import register_op
from ttt_kernels.ops.target import eager


def _like(t, other):
    return other.new_empty(0) if t is None else t.new_empty(t.shape)


next_token_fwd = register_op(
    "next_token_target_fwd(Tensor x, Tensor? proj, SymInt chunk_size, SymInt horizon, "
    "Tensor? cu_seqlens) -> Tensor",
    eager.next_token,
    lambda x, proj, chunk_size, horizon, cu_seqlens: x.new_empty(x.shape),
)
next_token_bwd = register_op(
    "next_token_target_bwd(Tensor dv, Tensor x, Tensor? proj, SymInt chunk_size, SymInt horizon, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor)",
    eager.next_token_backward,
    lambda dv, x, proj, chunk_size, horizon, cu_seqlens: (x.new_empty(x.shape), _like(proj, x)),
)
conv_fwd = register_op(
    "conv_target_fwd(Tensor u, Tensor conv_weight, Tensor? proj, SymInt chunk_size, "
    "Tensor? cu_seqlens) -> Tensor",
    eager.conv,
    lambda u, conv_weight, proj, chunk_size, cu_seqlens: u.new_empty(u.shape),
)
conv_bwd = register_op(
    "conv_target_bwd(Tensor dv, Tensor u, Tensor conv_weight, Tensor? proj, SymInt chunk_size, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    eager.conv_backward,
    lambda dv, u, conv_weight, proj, chunk_size, cu_seqlens: (
        u.new_empty(u.shape),
        conv_weight.new_empty(conv_weight.shape),
        _like(proj, u),
    ),
)


class NextTokenFunction(torch.autograd.Function):
    @staticmethod
    def forward(x, proj, chunk_size, horizon, cu_seqlens):
        return next_token_fwd(x, proj, chunk_size, horizon, cu_seqlens)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, proj, ctx.chunk_size, ctx.horizon, cu_seqlens = inputs
        ctx.save_for_backward(x, proj, cu_seqlens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dv):
        x, proj, cu_seqlens = ctx.saved_tensors
        dx, dproj = next_token_bwd(
            dv.contiguous(), x, proj, ctx.chunk_size, ctx.horizon, cu_seqlens
        )
        return dx, None if proj is None else dproj, None, None, None


class ConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(u, conv_weight, proj, chunk_size, cu_seqlens):
        return conv_fwd(u, conv_weight, proj, chunk_size, cu_seqlens)

    @staticmethod
    def setup_context(ctx, inputs, output):
        u, conv_weight, proj, ctx.chunk_size, cu_seqlens = inputs
        ctx.save_for_backward(u, conv_weight, proj, cu_seqlens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dv):
        u, conv_weight, proj, cu_seqlens = ctx.saved_tensors
        du, dweight, dproj = conv_bwd(
            dv.contiguous(), u, conv_weight, proj, ctx.chunk_size, cu_seqlens
        )
        return du, dweight, None if proj is None else dproj, None, None
