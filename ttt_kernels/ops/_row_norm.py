"""Row-norm preservation from square norms: one expression for everybody who must agree bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels.types import NORM_FLOOR, tiles


def square_norm(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Square row norms [..., D] of weights [..., D, F], computed in `dtype` (None: their own). Always
    this function, so that W = w0 gives a ratio of exactly one."""
    return torch.linalg.vector_norm(weight, dim=-1, dtype=dtype).square_()


def row_scale(preserve: Tensor, norm: Tensor) -> Tensor:
    """r = ||w0|| / max(||W||, floor), from square norms."""
    return (preserve / norm.clamp_min(NORM_FLOOR**2)).sqrt_()


def initial_weight_gradient(
    w0: Tensor, grad: Tensor | None, norm_grad: Tensor | None, squares: Tensor | None
) -> Tensor:
    """dw0 = sum of G_0 + diag(sum dr r / ||w0||^2) w0, rounded to the dtype of w0.

    grad: G_0 [S, D, F] of the sequences that start from w0, which may be overwritten; None: none does.
    norm_grad, squares: sums of dr r over the chunks of each sequence [S, D], and square row norms of w0;
    None without row-norm preservation.
    """
    if grad is None:
        dw0 = torch.zeros_like(w0, dtype=torch.float32)
    else:
        dw0 = grad[0] if len(grad) == 1 else grad.sum(0)
    if norm_grad is not None:  # a row of zeros has no direction
        pull = torch.where(squares > 0, norm_grad.sum(0) / torch.where(squares > 0, squares, 1), 0)
        for rows in tiles(len(w0), 256):
            dw0[rows].addcmul_(w0[rows].float(), pull[rows, None])
    return dw0.to(w0.dtype)
