"""Step sizes with library GEMMs: the Gram matrices of a group of chunks, then a rule on them.

Chunks go in groups of bounded memory. The backward forms the Gram matrices again and stores nothing:
dZ = (dKz + dKz^T) Z, and dV likewise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ttt_kernels.ops.step_size.gram_rules import Clipped, Spectral
from ttt_kernels.types import chunk_count, compute_dtype, sequence_spans

GROUP_ELEMENTS = 1 << 22  # Gram matrix elements of a group of chunks: 16 MiB in float32

Rule = Spectral | Clipped


def groups(z: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> Iterator[tuple]:
    """(row, tokens, step row, steps): slices of consecutive complete chunks of one sequence."""
    size = max(1, GROUP_ELEMENTS // chunk_size**2)
    for span in sequence_spans(z.shape[0], z.shape[1], chunk_size, cu_seqlens):
        full = span.complete(chunk_size)
        for n in range(0, full, size):
            m = min(n + size, full)
            tokens = slice(span.start + n * chunk_size, span.start + m * chunk_size)
            yield span.row, tokens, span.step_row, slice(span.step_offset + n, span.step_offset + m)


def chunked(x: Tensor, row: int, tokens: slice, chunk_size: int) -> Tensor:
    return x[row, tokens].to(compute_dtype(x.dtype)).view(-1, chunk_size, x.shape[2])


def forward(z, v, chunk_size: int, cu_seqlens, rule: Rule) -> Tensor:
    """[B, NC]; 0 for incomplete chunks, which are never written."""
    count = chunk_count(z.shape[1], chunk_size, cu_seqlens)
    steps = z.new_zeros(z.shape[0], count, dtype=compute_dtype(z.dtype))
    for row, tokens, step_row, chunks in groups(z, chunk_size, cu_seqlens):
        keys, values = chunked(z, row, tokens, chunk_size), chunked(v, row, tokens, chunk_size)
        steps[step_row, chunks] = rule(keys @ keys.mT, values @ values.mT, values.mean(-1))
    return steps


def backward(dsteps, z, v, chunk_size: int, cu_seqlens, rule: Rule) -> tuple[Tensor, Tensor]:
    """dz, dv: the Gram matrices are formed again, nothing per chunk is stored."""
    dz, dv = torch.zeros_like(z), torch.zeros_like(v)
    for row, tokens, step_row, chunks in groups(z, chunk_size, cu_seqlens):
        keys, values = chunked(z, row, tokens, chunk_size), chunked(v, row, tokens, chunk_size)
        grams = (keys @ keys.mT, values @ values.mT, values.mean(-1))
        dkz, dkv, dmean = rule.backward(dsteps[step_row, chunks], *grams)
        dz[row, tokens] = ((dkz + dkz.mT) @ keys).flatten(0, 1)
        dvalues = (dkv + dkv.mT) @ values + (dmean / v.shape[2])[..., None]
        dv[row, tokens] = dvalues.flatten(0, 1)
    return dz, dv
