"""The scan's forward as fused kernels: one launch reads W_n and writes W_{n+1}.

A launch covers block n of every sequence (`blocks`) with the union of two tile grids:

    apply tiles [t, d]   y = r * (z round(W_n)^T + P v)       from the rounded copy of W_n
    write tiles [d, f]   W_{n+1} = W_n + sum s v^T z          float32, in place: each tile is its own

The write emits the rounded copy of W_{n+1} into a second buffer, since the first is still being read,
and the row sums of W_{n+1}^2 of its columns, from which the next launch makes r. The apply tiles are
the longer ones and come first, so that write tiles fill the last wave.

A block of one chunk has no P. In a super-chunk P [t, u] = s_u (z_u . z_t), u in an earlier chunk of the
block: `scores` makes it, for many blocks at a time. With row-norm preservation W_k of the chunks inside
the block is never formed: the apply tiles leave raw = W_k z in float32 and `rescale` walks the chunks with
||W_{k+1}||^2 = ||W_k||^2 + sum_t s v (2 raw + (same-chunk P) v).

The kernels are in `triton_fwd_step` and `triton_fwd_super`.

The first launch of all writes no tokens into W_0: it copies the initial state to float32, rounds it and
sums its rows exactly as every later launch does, so that an unchanged W gives r = 1 bit for bit.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from ttt_kernels.ops.scan.blocks import BlockTable, block_table
from ttt_kernels.ops.scan.heuristics import (
    Tiles,
    choose_plan,
    forward_tiles,
    fused_super_chunk,
    strip_width,
)
from ttt_kernels.ops.scan.triton_fwd_step import scan_fwd_step_kernel
from ttt_kernels.ops.scan.triton_fwd_super import scan_fwd_rescale_kernel, scan_fwd_scores_kernel
from ttt_kernels.ops.triton_launch import architecture, descriptors, input_precision, launch
from ttt_kernels.types import ceil_div


class Forward:
    """Buffers and launches of one call."""

    def __init__(
        self,
        z: Tensor,
        v: Tensor,
        w0: Tensor,
        step_size: Tensor | None,
        lr: float,
        table: BlockTable,
        chunk_size: int,
        preserve: bool,
    ) -> None:
        self.z, self.v, self.table = z, v, table
        self.d, self.f = w0.shape
        self.chunk, self.preserve = chunk_size, preserve
        self.super = table.length > chunk_size
        self.length = ceil_div(table.length, 8) * 8  # rows of the scores start at multiples of 16 bytes
        self.steps = {"step_size": step_size if step_size is not None else z.new_empty(1), "lr": lr}
        self.has_steps = step_size is not None
        self.tiles = self.choose_tiles()
        self.parts = ceil_div(self.f, self.tiles.w_columns)
        self.precision = input_precision(z.dtype)
        self.empty = z.new_empty(1)
        self.group = range(0)  # launches whose scores are at hand

    def choose_tiles(self) -> Tiles:
        arch, size = architecture(self.z.device), self.z.element_size()
        blocks = max((len(self.table.of(n)) for n in self.table.launches), default=0)
        return forward_tiles(
            arch, size, blocks, self.table.length, self.d, self.f, super_chunk=self.super
        )

    def float32(self, *shape: int) -> Tensor:
        return self.z.new_empty(shape, dtype=torch.float32)

    def norm_buffer(self, sequences: int) -> Tensor:
        """Row sums of W^2 over each f tile."""
        shape = (sequences, self.parts, self.d) if self.preserve else (1,)
        return self.float32(*shape)

    def views(self, shadow: Tensor, scores: Tensor, whole: bool) -> dict:
        """Descriptors of what a launch reads, if no tile of tokens is cut by its chunk: nothing masks it."""
        t = self.tiles
        z, v, w, p = (x.flatten(0, 1) for x in (self.z, self.v, shadow, scores if self.super else self.z))
        wanted = {
            "z_rows": (z, t.t, t.k), "z_columns": (z, t.k, t.f), "z_more": (z, t.k, t.more_f),
            "v_columns": (v, t.k, t.d), "v_more": (v, t.k, self.super * t.more_d),
            "w_rows": (w, t.d, t.k), "w_more": (w, t.more_d, t.k), "p_rows": (p, self.super * t.t, t.k),
        }  # fmt: skip
        return descriptors(wanted, whole and self.chunk % t.k == 0)

    @property
    def cut(self) -> dict:
        """Compile-time facts and sizes that every launch of the step shares."""
        t = self.tiles
        return dict(
            D=self.d, F=self.f, CHUNK=self.chunk, BLOCK=self.length, HAS_STEPS=self.has_steps,
            PRESERVE=self.preserve, SUPER=self.super, PRECISION=self.precision,
            EVEN_F=self.f % t.k == self.f % t.w_columns == 0,
            EVEN_D=self.d % t.d == self.d % t.y_columns == 0, EVEN_C=self.chunk % t.k == 0, BLOCK_T=t.t,
            BLOCK_D=t.d, BLOCK_F=t.f, BLOCK_K=t.k, MORE_D=t.more_d, MORE_F=t.more_f, **t.launch, **self.steps,
        )  # fmt: skip

    def start(self, initial: Tensor, state: Tensor, shadow: Tensor, norms: Tensor) -> None:
        """state = float32(initial), with its rounded copy and row sums: a write of no tokens."""
        grid = (len(state) * ceil_div(self.d, self.tiles.d) * self.parts,)
        launch(
            scan_fwd_step_kernel, grid, z=self.z, v=self.v, y=self.z, raw=self.empty, base=initial,
            state=state, shadow=shadow, next_shadow=shadow, norms=norms, next_norms=norms,
            w0_norms=norms, scores=self.z, blocks=self.table.rows, norm_parts=self.parts,
            base_stride=self.d * self.f if initial.dim() == 3 else 0, apply_tiles=0, WRITE_LAST=True,
            NO_TOKENS=True, **self.views(shadow, self.z, False), **self.cut,
        )  # fmt: skip

    def scores(self, n: int) -> Tensor:
        """P of the super-chunks of launch n, [blocks, block, block] in the dtype of z. Made for as many
        launches at a time as take half of a float32 weight: few would not fill a GPU."""
        if not self.super:
            return self.empty
        length, offsets = self.length, self.table.offsets
        if n not in self.group:
            most = 2 * self.d * self.f // (self.z.element_size() * length**2)
            limit = offsets[n] + max(len(self.table.of(n)), most)
            stop = max(n + 1, bisect_right(offsets, limit) - 1)
            blocks, t = self.table.rows[offsets[n] : offsets[stop]], self.tiles
            self.group_scores = None  # before its successor is allocated
            self.group, self.group_scores = range(n, stop), self.z.new_empty(len(blocks), length, length)
            grid = (ceil_div(length, t.t) ** 2 * len(blocks),)
            launch(
                scan_fwd_scores_kernel, grid, z=self.z, scores=self.group_scores,
                blocks=blocks, F=self.f, CHUNK=self.chunk, BLOCK=length, HAS_STEPS=self.has_steps,
                EVEN_F=self.f % t.k == 0, ALIGNED=self.chunk % 16 == 0, PRECISION=self.precision,
                BLOCK_T=t.t, BLOCK_K=t.k, num_warps=t.warps, num_stages=t.stages, **self.steps,
            )  # fmt: skip
        return self.group_scores[offsets[n] - offsets[self.group.start] :]

    def step(
        self, n, y, raw, state, shadows, norms, w0_norms, *, write, write_last, plan="fused"
    ) -> None:
        """Launch n: y of block n from the first shadow; with `write`, the state after it."""
        blocks, t, scores = self.table.of(n), self.tiles, self.scores(n)
        apply_tiles = len(blocks) * ceil_div(self.d, t.y_columns) * ceil_div(self.length, t.t)
        if plan == "split":
            tokens = slice(n * self.table.length, (n + 1) * self.table.length)
            y[:, tokens] = self.z[:, tokens] @ shadows[0].mT
            apply_tiles = 0
        write_tiles = len(blocks) * ceil_div(self.d, t.d) * self.parts if write else 0
        launch(
            scan_fwd_step_kernel, (apply_tiles + write_tiles,), z=self.z, v=self.v, y=y, raw=raw,
            base=state, state=state, shadow=shadows[0], next_shadow=shadows[1], norms=norms[0],
            next_norms=norms[1], w0_norms=w0_norms, scores=scores, blocks=blocks,
            base_stride=self.d * self.f, norm_parts=self.parts, apply_tiles=apply_tiles,
            WRITE_LAST=write_last, NO_TOKENS=False, **self.views(shadows[0], scores, True), **self.cut,
        )  # fmt: skip
        if self.super and self.preserve:
            # Many short strips, since each program walks its chunks one after another.
            width = min(t.d, strip_width(len(blocks) * self.d))
            launch(
                scan_fwd_rescale_kernel, (ceil_div(self.d, width) * len(blocks),), raw=raw, y=y,
                v=self.v, norms=norms[0], w0_norms=w0_norms, scores=scores, blocks=blocks, D=self.d,
                CHUNK=self.chunk, BLOCK=self.length, norm_parts=self.parts,
                HAS_STEPS=self.has_steps, PRECISION=self.precision, BLOCK_T=min(t.t, 64),
                BLOCK_D=width, num_warps=4, num_stages=2, **self.steps,
            )  # fmt: skip


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
    """y [B, T, D] and the carried state, as `eager.forward`."""
    d, f = w0.shape
    chunk_size = min(chunk_size, max(z.shape[1], 1) + 1)  # the same chunks, and no overflow
    block = fused_super_chunk(chunk_size, d, f, z.shape[0])
    table = block_table(z.shape[0], z.shape[1], chunk_size, block, cu_seqlens, z.device)
    run = Forward(z, v, w0, step_size, lr, table, chunk_size, preserve_row_norm)
    plan = choose_plan(run.super, preserve_row_norm, cu_seqlens is not None)
    y = z.new_empty(*z.shape[:2], d)
    carried = run.float32(table.sequences, d, f)
    shadows = [z.new_empty(table.sequences, d, f) for _ in range(2)]
    norms = [run.norm_buffer(table.sequences) for _ in range(2)]
    w0_norms = run.norm_buffer(1)
    if preserve_row_norm and state is not None:  # in memory that the next launch fills
        run.start(w0, carried[:1], shadows[0][:1], w0_norms)
    run.start(w0 if state is None else state, carried, shadows[0], norms[0])
    if preserve_row_norm and state is None:
        w0_norms = norms[0][:1].clone()
    raw = run.empty
    if run.super and preserve_row_norm:
        raw = run.float32(table.sequences * run.length, d)
    for n in table.launches:
        more = n + 1 < len(table.launches)
        run.step(
            n, y, raw, carried, shadows, norms, w0_norms, write=more or return_state,
            write_last=return_state, plan=plan,
        )  # fmt: skip
        shadows.reverse()
        norms.reverse()
    # An empty tensor of its own: a view would keep the whole state alive.
    return y, carried if return_state or save_state else run.float32(0, d, f)
