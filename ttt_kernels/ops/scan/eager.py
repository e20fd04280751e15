"""The scan with library GEMMs: one float32 state per sequence, updated in place, on any device.

A sequence is cut into blocks. Where chunks are long a block is one chunk, read and written in tiles
of tokens. Where chunks are short a block is a *super-chunk* of several: W is written once per block
and the writes inside it are added in attention form,

    y_t = W z_t + sum_{u in an earlier chunk of the block} (z_u . z_t) s_u v_u,

so the cost does not depend on the chunk length (see `heuristics`).

The backward walks the blocks in reverse and recomputes the state by subtraction, W -= (sV)^T Z, so
nothing is stored per chunk. With G the gradient that reaches the state after the block:

    d(sV) = Z G^T,  dZ = (sV) G + dY' W,  G <- G + dY'^T Z - diag(c) W

where dY' = dY r and c = (dr r) / ||W||^2 under row-norm preservation (r = ||w0|| / ||W|| per row),
else dY' = dY and c = 0. In a super-chunk, chunk k reads W_k = W + (writes before k), so the gradient
-diag(c_k) W_k of its norm reaches those writes too. With cbar_j = sum_{k >= j} c_k most of it folds
into dY'' = dY' - cbar (sV); what is left is one same-chunk term in dZ and one in d(sV).

Low-precision operands are raised to float32 around the library GEMM (`ops/_gemm.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ttt_kernels.ops._gemm import apply_rounded, apply_rounded_transposed
from ttt_kernels.ops._row_norm import row_scale, square_norm
from ttt_kernels.ops.scan.heuristics import TOKEN_TILE, super_chunk
from ttt_kernels.types import Span, compute_dtype, sequence_spans


@dataclass(frozen=True)
class Block:
    """Tokens [start, stop) of a row, of which [start, written) are in complete chunks and written."""

    row: int
    start: int
    stop: int
    written: int
    chunk: int
    step_row: int
    step_offset: int
    last: bool  # the last block of its sequence

    @property
    def is_super_chunk(self) -> bool:
        return self.stop - self.start > self.chunk

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def steps(self) -> slice:
        """Where the written chunks stand in `step_size[step_row]`."""
        count = (self.written - self.start) // self.chunk
        return slice(self.step_offset, self.step_offset + count)

    def tiles(self, stop: int) -> Iterator[slice]:
        """Token ranges that cover [start, stop): whole super-chunks, or tiles of a long chunk."""
        length = self.stop - self.start if self.is_super_chunk else TOKEN_TILE
        for a in range(self.start, stop, max(length, 1)):
            yield slice(a, min(a + length, stop))


def blocks_of(span: Span, chunk: int, length: int) -> list[Block]:
    """Tokens past the last complete chunk are read only; they join the last super-chunk."""
    full = span.start + span.complete(chunk) * chunk
    blocks = []
    for a in range(span.start, span.stop, length):
        b = min(a + length, span.stop)
        offset = span.step_offset + (a - span.start) // chunk
        written = max(a, min(b, full))
        blocks.append(Block(span.row, a, b, written, chunk, span.step_row, offset, b == span.stop))
    return blocks


@dataclass(frozen=True)
class Operands:
    """The inputs of one call, read in the compute precision."""

    z: Tensor
    v: Tensor
    step_size: Tensor | None
    lr: float
    preserve: Tensor | None  # square row norms of w0, [D]

    @classmethod
    def of(cls, z, v, w0, step_size, lr, preserve_row_norm) -> Operands:
        squares = square_norm(w0.to(compute_dtype(z.dtype))) if preserve_row_norm else None
        return cls(z, v, step_size, lr, squares)

    @property
    def acc(self) -> torch.dtype:
        return compute_dtype(self.z.dtype)

    def keys(self, block: Block, tokens: slice) -> Tensor:
        return self.z[block.row, tokens].to(self.acc)

    def values(self, block: Block, tokens: slice) -> Tensor:
        return self.v[block.row, tokens].to(self.acc)

    def scaled(self, block: Block, tokens: slice) -> Tensor:
        """s_t v_t of written tokens, always a new tensor."""
        return self.values(block, tokens) * self.token_steps(block, tokens)

    def token_steps(self, block: Block, tokens: slice) -> Tensor | float:
        if self.step_size is None:
            return self.lr
        steps = self.step_size[block.step_row, block.steps].to(self.acc)
        if not block.is_super_chunk:
            return steps
        return steps.repeat_interleave(block.chunk)[: tokens.stop - tokens.start, None]

    def write(self, block: Block, weight: Tensor, sign: int = 1) -> None:
        """W += sign * (sV)^T Z over the written tokens of the block, in place."""
        for t in block.tiles(block.written):
            weight.addmm_(self.scaled(block, t).t(), self.keys(block, t), alpha=sign)

    def apply(self, keys: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """keys @ round(W)^T."""
        return apply_rounded(keys, weight, self.z.dtype, out)

    def apply_transposed(self, dy: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """dy @ round(W): the gradient of `apply` with respect to the keys."""
        return apply_rounded_transposed(dy, weight, self.z.dtype, out)


def initial_state(w0: Tensor, state: Tensor | None, span: Span) -> Tensor:
    """W_0 of a sequence [D, F]: to read, not to write."""
    return w0 if state is None else state[span.index]


def forward(
    z: Tensor,
    v: Tensor,
    w0: Tensor,
    step_size: Tensor | None,
    lr: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    preserve_row_norm: bool,
    return_state: bool,
    save_state: bool,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the carried state.

    The carried state is the final one with `return_state`; else, with `save_state`, the one the last
    block *read*, which is all the backward needs (its write reaches no output); else empty.
    """
    ops = Operands.of(z, v, w0, step_size, lr, preserve_row_norm)
    length = super_chunk(chunk_size, w0.shape[0], w0.shape[1], z.device.type)
    spans = sequence_spans(z.shape[0], z.shape[1], chunk_size, cu_seqlens)
    y = z.new_empty(z.shape[0], z.shape[1], w0.shape[0])
    keep = return_state or save_state
    carried = w0.new_empty((len(spans) if keep else 0, *w0.shape), dtype=ops.acc)
    scratch = None if keep else torch.empty_like(w0, dtype=ops.acc)
    for span in spans:
        weight = carried[span.index] if keep else scratch
        weight.copy_(initial_state(w0, state, span))
        for block in blocks_of(span, chunk_size, length):
            out = y[block.row, block.tokens]
            if block.is_super_chunk:
                read_super_chunk(ops, block, weight, out)
            else:
                read_chunk(ops, block, weight, out)
            if return_state or not block.last:
                ops.write(block, weight)
    return y, carried


def read_chunk(ops: Operands, block: Block, weight: Tensor, out: Tensor) -> None:
    """out = R(W) z for the tokens of (a part of) one chunk."""
    ratio = None if ops.preserve is None else row_scale(ops.preserve, square_norm(weight))
    direct = ratio is None and ops.z.dtype == ops.acc
    for t in block.tiles(block.stop):
        part = out[t.start - block.start : t.stop - block.start]
        raw = ops.apply(ops.keys(block, t), weight, out=part if direct else None)
        if not direct:
            part.copy_(raw if ratio is None else raw.mul_(ratio))


class SuperChunk:
    """What forward and backward of a super-chunk both need; W is the state before the block.

    keys [n, F], scaled = sV [w, D], chunk_of [n] (chunk index of a token), `earlier` [n, w] (may
    token t read the write of token u?), scores = Z Z^T where earlier, raw = W_k z [n, D] (which the
    backward needs only under row-norm preservation).
    """

    def __init__(self, ops: Operands, block: Block, weight: Tensor) -> None:
        n, self.w, self.c = block.stop - block.start, block.written - block.start, block.chunk
        self.ops, self.weight = ops, weight
        self.keys = ops.keys(block, block.tokens)
        self.scaled = ops.scaled(block, slice(block.start, block.written))
        self.chunk_of = torch.arange(n, device=weight.device) // self.c
        self.earlier = self.chunk_of[: self.w] < self.chunk_of[:, None]
        self.scores = (self.keys @ self.keys[: self.w].t()).mul_(self.earlier)

    @cached_property
    def raw(self) -> Tensor:
        return self.ops.apply(self.keys, self.weight).addmm_(self.scores, self.scaled)

    def per_chunk(self, x: Tensor) -> Tensor:
        return x[: self.w].view(-1, self.c, x.shape[1])

    def row_norms(self) -> tuple[Tensor, Tensor]:
        """Square row norms of every W_k, [chunks + 1, D], without forming one:
        ||W_{k+1}||^2 = ||W_k||^2 + sum_t (sV)_t (2 W_k z_t + P_t), P = Kz (sV) inside the chunk.
        Returns them and P [w, D]."""
        keys = self.per_chunk(self.keys)
        same = ((keys @ keys.mT) @ self.per_chunk(self.scaled)).flatten(0, 1)
        growth = self.per_chunk(self.scaled * (2 * self.raw[: self.w] + same)).sum(1)
        start = square_norm(self.weight)[None]
        return torch.cat([start, start + growth.cumsum(0)]), same


def read_super_chunk(ops: Operands, block: Block, weight: Tensor, out: Tensor) -> None:
    """out = R(W_k) z for the tokens of several chunks, from the state before the first of them."""
    part = SuperChunk(ops, block, weight)
    if ops.preserve is None:
        out.copy_(part.raw)
    else:
        norms, _ = part.row_norms()
        out.copy_(part.raw.mul_(row_scale(ops.preserve, norms)[part.chunk_of]))
