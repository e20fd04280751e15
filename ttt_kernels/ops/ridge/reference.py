"""The released closed-form write of one prompt, literally: LU, and one right-hand side per column of
w0 in the dual form. The specification of the op, and the baseline of its benchmark."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels.types import NORM_FLOOR, compute_dtype


def ridge_write(
    z: Tensor,
    x: Tensor,
    w0: Tensor,
    proj: Tensor | None,
    *,
    lam: float = 1.0,
    eta: float = 0.1,
    cap: float | None = 0.1,
    last_k: int | None = 8192,
    shift: int = 1,
    preserve_row_norm: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight [D, F], delta [D, F] and eta [] of z [T, F] and x [T, D]."""
    acc = compute_dtype(z.dtype)
    z, x, w0 = z.to(acc), x.to(acc), w0.to(acc)
    values = x if proj is None else x @ proj.to(acc)
    keys, values = z[: max(len(z) - shift, 0)], values[shift:]
    if last_k is not None:
        keys, values = keys[-last_k:], values[-last_k:]
    residual = values - keys @ w0.t()
    if len(keys) < keys.shape[1]:
        gram = keys @ keys.t()
        gram.diagonal().add_(lam)
        delta = residual.t() @ torch.linalg.solve(gram, keys)
    else:
        gram = keys.t() @ keys
        gram.diagonal().add_(lam)
        delta = torch.linalg.solve(gram, keys.t() @ residual).t()
    size, norm = torch.linalg.matrix_norm(w0), torch.linalg.matrix_norm(delta)
    used = torch.full_like(norm, eta)
    if cap is not None and norm > 0:
        used = used.minimum(cap * size / norm)
    weight = w0 + used * delta
    if preserve_row_norm:
        target = torch.linalg.vector_norm(w0, dim=1, keepdim=True)
        moved = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        weight = weight * (target / moved.clamp_min(NORM_FLOOR))
    return weight, delta, used
