"""The released formula, literally: one weight per chunk. This is the specification of the scan.

Memory grows as NC * D * F; use it to check, not to train. Differentiable by autograd, twice too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels.types import NORM_FLOOR, ceil_div, compute_dtype, sequence_spans


def scan(
    z: Tensor,
    v: Tensor,
    w0: Tensor,
    step_size: Tensor | float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    chunk_size: int,
    preserve_row_norm: bool,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the final state [B or S, D, F]; arguments as in `api.fast_weight_scan`."""
    if cu_seqlens is None:
        return dense_scan(z, v, w0, step_size, state, chunk_size, preserve_row_norm)
    outputs, states = [], []
    for s in sequence_spans(z.shape[0], z.shape[1], chunk_size, cu_seqlens):
        chunks = slice(s.step_offset, s.step_offset + ceil_div(s.stop - s.start, chunk_size))
        y, final = dense_scan(
            z[:, s.start : s.stop],
            v[:, s.start : s.stop],
            w0,
            step_size[:, chunks] if isinstance(step_size, Tensor) else step_size,
            None if state is None else state[s.index : s.index + 1],
            chunk_size,
            preserve_row_norm,
        )
        outputs.append(y)
        states.append(final)
    if not outputs:
        return z.new_zeros(1, 0, w0.shape[0]), w0.new_zeros(0, *w0.shape, dtype=compute_dtype(z.dtype))
    return torch.cat(outputs, 1), torch.cat(states, 0)


def dense_scan(z, v, w0, step_size, state, chunk_size, preserve_row_norm):
    """All W_n at once: W_n = W_0 + sum of the writes before it, then y_t = R(W_n) z_t."""
    (batch, tokens, _), (d, f) = z.shape, w0.shape
    acc, c, full = compute_dtype(z.dtype), chunk_size, tokens // chunk_size
    start = w0.to(acc).expand(batch, d, f) if state is None else state

    keys = z[:, : full * c].reshape(batch, full, c, f).to(acc)
    values = v[:, : full * c].reshape(batch, full, c, d).to(acc)
    writes = values.transpose(-1, -2) @ keys
    if isinstance(step_size, Tensor):
        writes = writes * step_size[:, :full, None, None].to(acc)
    else:
        writes = writes * step_size
    weights = torch.cat([start[:, None], start[:, None] + writes.cumsum(1)], 1)

    applied = weights
    if preserve_row_norm:
        norm = torch.linalg.vector_norm(weights, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
        applied = weights * (torch.linalg.vector_norm(w0.to(acc), dim=-1, keepdim=True) / norm)
    y = keys @ applied[:, :full].transpose(-1, -2)
    tail = z[:, full * c :].to(acc) @ applied[:, full].transpose(-1, -2)
    y = torch.cat([y.reshape(batch, full * c, d), tail], 1)
    return y.to(z.dtype), weights[:, full].contiguous()
