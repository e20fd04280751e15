"""Blocks of a batch as tables for fused kernels: one launch covers block n of every sequence.

A block is one chunk, or a super-chunk of several (see `heuristics`). Row i of a table describes one
block: COLUMNS int64 numbers, read by the programs that work on it.

    first    index of its first token in the flattened [B * T] tokens
    tokens   how many it has
    written  how many of them lie in complete chunks
    sequence index of its sequence: which state it belongs to
    chunk    index of its first chunk in the flattened step sizes
    last     1 for the last block of its sequence
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_kernels.types import ceil_div, sequence_spans

COLUMNS = 6


@dataclass(frozen=True)
class BlockTable:
    """`rows` [blocks, COLUMNS] int64 on the device; launch n covers rows [offsets[n], offsets[n + 1]).

    `length`: tokens of the longest block; `sequences`: states there are.
    """

    rows: Tensor
    offsets: tuple[int, ...]
    length: int
    sequences: int

    @property
    def launches(self) -> range:
        return range(len(self.offsets) - 1)

    def of(self, n: int) -> Tensor:
        """The rows of launch n, [sequences that have a block n, COLUMNS]."""
        return self.rows[self.offsets[n] : self.offsets[n + 1]]


def block_table(
    batch: int,
    tokens: int,
    chunk_size: int,
    block: int,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> BlockTable:
    """Blocks of `block` tokens (a multiple of `chunk_size`). Packed: synchronises with a GPU."""
    if cu_seqlens is None:
        return _dense(batch, tokens, chunk_size, block, device)
    rows: list[list[tuple]] = []
    spans = sequence_spans(batch, tokens, chunk_size, cu_seqlens)
    for span in spans:
        full = span.start + span.complete(chunk_size) * chunk_size
        for n, a in enumerate(range(span.start, span.stop, block)):
            b = min(a + block, span.stop)
            if n == len(rows):
                rows.append([])
            chunk = span.step_offset + (a - span.start) // chunk_size
            rows[n].append((a, b - a, max(0, min(b, full) - a), span.index, chunk, b == span.stop))
    flat = [row for launch in rows for row in launch]
    offsets = [0]
    for launch in rows:
        offsets.append(offsets[-1] + len(launch))
    longest = max((row[1] for row in flat), default=0)
    table = torch.tensor(flat, dtype=torch.int64, device=device).view(-1, COLUMNS)
    return BlockTable(table, tuple(offsets), longest, len(spans))


def _dense(batch: int, tokens: int, chunk_size: int, block: int, device: torch.device) -> BlockTable:
    """On the device throughout: nothing is copied to it, so that a graph can capture the call. In few
    launches: small models have time for few."""
    count = ceil_div(tokens, block) if batch else 0
    start = torch.arange(0, count * block, block, device=device)[:, None]
    row = torch.arange(batch, device=device)[None, :]
    full = tokens // chunk_size * chunk_size
    columns = (
        torch.add(start, row, alpha=tokens),
        (tokens - start).clamp(max=block),
        (full - start).clamp(0, block),
        row,
        torch.add(start // chunk_size, row, alpha=ceil_div(tokens, chunk_size)),
        (start + (block - tokens + 1)).clamp(0, 1),  # 1 once start + block >= tokens
    )
    shape = (count, batch)
    rows = torch.stack([c.expand(shape) for c in columns], dim=-1).view(-1, COLUMNS)
    offsets = tuple(n * batch for n in range(count + 1))
    return BlockTable(rows, offsets, min(block, tokens), batch)
