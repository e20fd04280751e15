"""The scan's precision contract emulated in plain torch, and the exact result beside it.

Contract: operands in z.dtype, products and state in float32, the applied weight is the state rounded
to z.dtype, y rounded once. Gradients follow from it with rounding transparent, each rounded once; where
the gradient of the raw output (dy r) or of the state is an operand of a product, it is in z.dtype too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels.ops.scan import reference
from ttt_kernels.testing.inputs import ScanInputs
from ttt_kernels.types import NORM_FLOOR, compute_dtype

Results = dict[str, Tensor]
"""y, state, dz, dv, dw0 and, with a tensor step size, dstep_size."""


class RoundTo(torch.autograd.Function):
    """Round to a dtype and back; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class RoundGrad(torch.autograd.Function):
    """Nothing forward; the gradient is rounded to a dtype and back."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.to(ctx.dtype).to(grad.dtype), None


def emulate(z, v, w0, step_size, chunk_size, preserve_row_norm, dtype) -> tuple[Tensor, Tensor]:
    """y and state of operands already in float32 whose stored dtype is `dtype`."""
    weight = w0.expand(z.shape[0], *w0.shape)
    target = torch.linalg.vector_norm(w0, dim=-1)
    outputs = [z.new_zeros(z.shape[0], 0, w0.shape[0])]
    for n, a in enumerate(range(0, z.shape[1], chunk_size)):
        keys, values = z[:, a : a + chunk_size], v[:, a : a + chunk_size]
        y = RoundGrad.apply(keys @ RoundTo.apply(weight, dtype).mT, dtype)
        if preserve_row_norm:
            norm = torch.linalg.vector_norm(weight, dim=-1).clamp_min(NORM_FLOOR)
            y = y * (target / norm)[:, None]
        outputs.append(y)
        if keys.shape[1] == chunk_size:
            step = step_size[:, n, None, None] if isinstance(step_size, Tensor) else step_size
            weight = weight + RoundGrad.apply(step * (values.mT @ keys), dtype)
    return torch.cat(outputs, 1), weight


def results(scan, inputs: ScanInputs, step_size, dtype: torch.dtype) -> Results:
    """Values and gradients of `scan(z, v, w0, step_size) -> (y, state)` for the loss
    sum(y * dy) + mean(state^2), with everything in `dtype`."""
    names = ["z", "v", "w0"]
    leaves = [getattr(inputs, n).detach().to(dtype).requires_grad_() for n in names]
    if isinstance(step_size, Tensor):
        step_size = step_size.detach().to(compute_dtype(dtype)).requires_grad_()
        leaves.append(step_size)
        names.append("step_size")
    y, state = scan(*leaves[:3], step_size)
    loss = (y * inputs.dy.to(y.dtype)).sum() + state.square().mean()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)  # without a write, v has none
    named = {"d" + n: g for n, g in zip(names, grads, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def exact_scan(inputs: ScanInputs, *, chunk_size, step_size=1.0, preserve_row_norm=False) -> Results:
    """The reference in float64, on the inputs as stored."""

    def scan(z, v, w0, step):
        return reference.scan(
            z, v, w0, step, None, None, chunk_size=chunk_size, preserve_row_norm=preserve_row_norm
        )

    return results(scan, inputs, step_size, torch.float64)


def contract_scan(
    inputs: ScanInputs, *, chunk_size, step_size=1.0, preserve_row_norm=False
) -> Results:
    """The contract: what a faithful implementation may be wrong by."""
    stored = inputs.z.dtype
    acc = compute_dtype(stored)

    def scan(z, v, w0, step):
        return emulate(z, v, w0, step, chunk_size, preserve_row_norm, stored)

    raw = results(scan, inputs, step_size, acc)
    kept = ("state", "dstep_size")
    return {k: t if k in kept else t.to(stored) for k, t in raw.items()}
