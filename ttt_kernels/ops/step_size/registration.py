"""The step sizes as torch ops and one autograd Function; conventions as in `ops/scan`.

A rule is (kind, lr, parameter): ("spectral", lr, iterations) or ("clipped", lr, max_norm).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ttt_kernels.ops._implementations import resolve_implementation
from ttt_kernels.ops._library import register_op
from ttt_kernels.ops.step_size import cuda, eager
from ttt_kernels.ops.step_size.gram_rules import Clipped, Spectral
from ttt_kernels.types import ceil_div, compute_dtype

RULES = {
    "spectral": lambda lr, parameter: Spectral(lr, int(parameter)),
    "clipped": Clipped,
}


def _triton_forward(*args):
    from ttt_kernels.ops.step_size import triton_fwd

    return triton_fwd.forward(*args)


def _triton_backward(*args):
    from ttt_kernels.ops.step_size import triton_bwd

    return triton_bwd.backward(*args)


# "cuda" has no kernels of its own for the gradient: it is library products of Gram matrices.
FORWARD = {"eager": eager.forward, "triton": _triton_forward, "cuda": cuda.forward}
BACKWARD = {"eager": eager.backward, "triton": _triton_backward, "cuda": eager.backward}


def _forward(z, v, chunk_size, cu_seqlens, kind, lr, parameter, impl):
    forward = FORWARD[resolve_implementation(impl, z, f"{kind}_step_size")]
    return forward(z, v, chunk_size, cu_seqlens, RULES[kind](lr, parameter))


def _forward_fake(z, v, chunk_size, cu_seqlens, kind, lr, parameter, impl):
    if cu_seqlens is None:
        count = ceil_div(z.shape[1], chunk_size)
    else:  # how many chunks packed sequences have depends on values
        count = torch.library.get_ctx().new_dynamic_size()
    return z.new_empty(z.shape[0], count, dtype=compute_dtype(z.dtype))


def _backward(dsteps, z, v, chunk_size, cu_seqlens, kind, lr, parameter, impl):
    backward = BACKWARD[resolve_implementation(impl, z, f"{kind}_step_size")]
    return backward(dsteps, z, v, chunk_size, cu_seqlens, RULES[kind](lr, parameter))


def _backward_fake(dsteps, z, v, chunk_size, cu_seqlens, kind, lr, parameter, impl):
    return z.new_empty(z.shape), v.new_empty(v.shape)


_ARGUMENTS = (
    "Tensor z, Tensor v, SymInt chunk_size, Tensor? cu_seqlens, str kind, float lr, float parameter, "
    "str impl"
)
step_size_fwd = register_op(f"step_size_fwd({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
step_size_bwd = register_op(
    f"step_size_bwd(Tensor dsteps, {_ARGUMENTS}) -> (Tensor, Tensor)", _backward, _backward_fake
)


class StepSizeFunction(torch.autograd.Function):
    @staticmethod
    def forward(z, v, chunk_size, cu_seqlens, kind, lr, parameter, impl):  # by name: see the targets
        return step_size_fwd(z, v, chunk_size, cu_seqlens, kind, lr, parameter, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, v, chunk_size, cu_seqlens, *rule_and_impl = inputs
        ctx.save_for_backward(z, v, cu_seqlens)
        ctx.settings = (chunk_size, rule_and_impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, dsteps):
        z, v, cu_seqlens = ctx.saved_tensors
        chunk_size, rule_and_impl = ctx.settings
        dz, dv = step_size_bwd(dsteps.contiguous(), z, v, chunk_size, cu_seqlens, *rule_and_impl)
        return dz, dv, *(None,) * 6
