"""Where complete chunks lie, for fused kernels: one launch covers many, of all rows and sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_kernels.ops.step_size.heuristics import group_size
from ttt_kernels.types import ceil_div, sequence_spans


@dataclass(frozen=True)
class Chunks:
    """Complete chunks, all rows and sequences together: `first` token of each, counted through [B * T],
    and `place` of its step size, counted through [B, columns]; int64 [n] on the device."""

    first: Tensor
    place: Tensor
    columns: int

    def groups(self, bytes_per_chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = group_size(len(self.first), bytes_per_chunk)
        for n in range(0, len(self.first), size):
            yield self.first[n : n + size], self.place[n : n + size]


def complete_chunks(z: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> Chunks:
    """Packed: synchronises with a GPU."""
    batch, tokens, device = z.shape[0], z.shape[1], z.device
    if cu_seqlens is None:
        columns = ceil_div(tokens, chunk_size)
        row = torch.arange(batch, device=device)[:, None]
        n = torch.arange(tokens // chunk_size, device=device)
        first, place = row * tokens + n * chunk_size, row * columns + n
        return Chunks(first.flatten(), place.flatten(), columns)
    spans = sequence_spans(batch, tokens, chunk_size, cu_seqlens)
    pairs = [
        (span.start + n * chunk_size, span.step_offset + n)
        for span in spans
        for n in range(span.complete(chunk_size))
    ]
    first, place = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).t().contiguous().to(device)
    return Chunks(first, place, sum(ceil_div(s.stop - s.start, chunk_size) for s in spans))
