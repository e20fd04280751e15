"""Row-norm preservation from square norms: one expression for everybody who must agree bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels.types import NORM_FLOOR


def square_norm(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Square row norms [..., D] of weights [..., D, F], computed in `dtype` (None: their own). Always
    this function, so that W = w0 gives a ratio of exactly one."""
    return torch.linalg.vector_norm(weight, dim=-1, dtype=dtype).square_()


def row_scale(preserve: Tensor, norm: Tensor) -> Tensor:
    """r = ||w0|| / max(||W||, floor), from square norms."""
    return (preserve / norm.clamp_min(NORM_FLOOR**2)).sqrt_()
