"""Both released targets, literally, chunk by chunk. The specification of the target ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from ttt_kernels.types import compute_dtype, sequence_spans


def _chunks(batch: int, tokens: int, chunk_size: int, cu_seqlens: Tensor | None):
    for span in sequence_spans(batch, tokens, chunk_size, cu_seqlens):
        for a in range(span.start, span.stop, chunk_size):
            yield span.row, a, min(a + chunk_size, span.stop)


def next_token_target(x, proj, chunk_size, horizon=1, cu_seqlens=None) -> Tensor:
    """v_t = x_{t + horizon} P for t and t + horizon in the same chunk, else 0."""
    acc = compute_dtype(x.dtype)
    rows = [[x.new_zeros(0, x.shape[2], dtype=acc)] for _ in range(x.shape[0])]
    for row, a, b in _chunks(x.shape[0], x.shape[1], chunk_size, cu_seqlens):
        sources = x[row, a:b].to(acc)[horizon:]
        target = sources if proj is None else sources @ proj.to(acc)
        rows[row].append(torch.cat([target, target.new_zeros(b - a - len(target), x.shape[2])]))
    return _stack(rows, x)


def conv_target(u, conv_weight, proj, chunk_size, cu_seqlens=None) -> Tensor:
    """v = conv(u) P: depthwise over time, zero padding inside each chunk, no bias."""
    acc = compute_dtype(u.dtype)
    rows = [[u.new_zeros(0, u.shape[2], dtype=acc)] for _ in range(u.shape[0])]
    weight, pad = conv_weight.to(acc), conv_weight.shape[2] // 2
    for row, a, b in _chunks(u.shape[0], u.shape[1], chunk_size, cu_seqlens):
        series = u[row, a:b].to(acc).t()[None]
        mixed = conv1d(series, weight, padding=pad, groups=u.shape[2])[0].t()
        rows[row].append(mixed if proj is None else mixed @ proj.to(acc))
    return _stack(rows, u)


def _stack(rows, like: Tensor) -> Tensor:
    if not rows:
        return like.clone()
    return torch.stack([torch.cat(parts) for parts in rows]).to(like.dtype)
