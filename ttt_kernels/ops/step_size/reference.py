"""Step sizes from the chunk gradient G = V^T Z itself, literally. The specification of the ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ttt_kernels.types import chunk_count, compute_dtype, sequence_spans

NORMALIZE_EPS = 1e-8
SIGMA_FLOOR = 1e-6


def spectral(z, v, chunk_size, lr, iterations=5, cu_seqlens=None) -> Tensor:
    """lr / sigma(G): power iteration from the normalised column mean of G."""

    def step(g: Tensor) -> Tensor:
        right = normalize(g.mean(0), dim=0, eps=NORMALIZE_EPS)
        for _ in range(iterations):
            left = normalize(g @ right, dim=0, eps=NORMALIZE_EPS)
            right = normalize(g.t() @ left, dim=0, eps=NORMALIZE_EPS)
        return lr / (left @ (g @ right)).clamp_min(SIGMA_FLOOR)

    return _per_chunk(z, v, chunk_size, cu_seqlens, step)


def clipped(z, v, chunk_size, lr, max_norm, cu_seqlens=None) -> Tensor:
    """lr * min(1, max_norm / ||G||_F)."""

    def step(g: Tensor) -> Tensor:
        return lr * max_norm / torch.linalg.matrix_norm(g).clamp_min(max_norm)

    return _per_chunk(z, v, chunk_size, cu_seqlens, step)


def _per_chunk(z: Tensor, v: Tensor, chunk_size: int, cu_seqlens: Tensor | None, step) -> Tensor:
    """`step` of every complete chunk; 0 for incomplete ones, which are never written."""
    acc = compute_dtype(z.dtype)
    count = chunk_count(z.shape[1], chunk_size, cu_seqlens)
    rows = [[z.new_zeros((), dtype=acc)] * count for _ in range(z.shape[0])]
    for span in sequence_spans(z.shape[0], z.shape[1], chunk_size, cu_seqlens):
        for n in range(span.complete(chunk_size)):
            t = slice(span.start + n * chunk_size, span.start + (n + 1) * chunk_size)
            g = v[span.row, t].to(acc).t() @ z[span.row, t].to(acc)
            rows[span.step_row][span.step_offset + n] = step(g)
    if not rows or not count:
        return z.new_zeros(z.shape[0], count, dtype=acc)
    return torch.stack([torch.stack(row) for row in rows])
