"""Vocabulary shared by every op: where chunks lie, and in which precision they are computed.

Torch only. Nothing here knows an op, a model or an implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NORM_FLOOR = 1e-5  # row norms are divided by at least this under row-norm preservation


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of products, sums and fast-weight state for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tiles(stop: int, size: int) -> Iterator[slice]:
    """[0, stop) in slices of `size`."""
    for a in range(0, stop, size):
        yield slice(a, min(a + size, stop))


@dataclass(frozen=True)
class Span:
    """One sequence: tokens `[start, stop)` of batch row `row`, with a state and chunks of its own.

    A dense batch is B spans of one row each; a packed batch is S spans of row 0.

    Args:
        row: batch row of z, v and y.
        start, stop: token range in that row.
        index: position of the sequence's state in `state [B or S, D, F]`.
        step_row, step_offset: its chunk n has step size `step_size[step_row, step_offset + n]`.
    """

    row: int
    start: int
    stop: int
    index: int
    step_row: int
    step_offset: int

    def complete(self, chunk_size: int) -> int:
        """Number of complete chunks: the only ones that are written."""
        return (self.stop - self.start) // chunk_size


def read_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """Sequence boundaries as a host list, checked. Synchronises when the tensor is on a GPU."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at T = {tokens}, got {bounds[0]} .. {bounds[-1]}"
        )
    for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if b < a:
            raise ValueError(
                f"cu_seqlens must not decrease, got cu_seqlens[{i}] = {a} > cu_seqlens[{i + 1}] = {b}"
            )
    return bounds


def sequence_spans(batch: int, tokens: int, chunk_size: int, cu_seqlens: Tensor | None) -> list[Span]:
    """The sequences of a dense (`cu_seqlens is None`) or packed batch, in order."""
    if cu_seqlens is None:
        return [Span(b, 0, tokens, b, b, 0) for b in range(batch)]
    bounds = read_cu_seqlens(cu_seqlens, tokens)
    spans, offset = [], 0
    for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        spans.append(Span(0, a, b, i, 0, offset))
        offset += ceil_div(b - a, chunk_size)
    return spans


def chunk_count(tokens: int, chunk_size: int, cu_seqlens: Tensor | None) -> int:
    """NC: chunks of one batch row, or of all packed sequences together; incomplete ones count."""
    if cu_seqlens is None:
        return ceil_div(tokens, chunk_size)
    bounds = read_cu_seqlens(cu_seqlens, tokens)
    return sum(ceil_div(b - a, chunk_size) for a, b in zip(bounds, bounds[1:], strict=False))


def chunk_ranges(
    tokens: int, chunk_size: int, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First and last-plus-one token of the chunk each token lies in, as int64 [T] on `device`."""
    t = torch.arange(tokens, device=device)
    chunk_size = min(chunk_size, max(tokens, 1))  # the same chunks, and no overflow
    if cu_seqlens is None:
        first = t - t % chunk_size
        return first, (first + chunk_size).clamp(max=tokens)
    bounds = torch.tensor(read_cu_seqlens(cu_seqlens, tokens), device=device)
    owner = torch.searchsorted(bounds, t, right=True) - 1
    start, stop = bounds[owner], bounds[owner + 1]
    first = t - (t - start) % chunk_size
    return first, torch.minimum(first + chunk_size, stop)
