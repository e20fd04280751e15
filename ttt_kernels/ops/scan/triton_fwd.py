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

The first launch of all writes no tokens into W_0: it copies the initial state to float32, rounds it and
sums its rows exactly as every later launch does, so that an unchanged W gives r = 1 bit for bit.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops.scan.blocks import COLUMNS, BlockTable, block_table
from ttt_kernels.ops.scan.heuristics import Tiles, choose_plan, forward_tiles, fused_super_chunk
from ttt_kernels.ops.triton_launch import architecture, descriptor, input_precision, launch
from ttt_kernels.types import NORM_FLOOR, ceil_div

TABLE: tl.constexpr = tl.constexpr(COLUMNS)
FLOOR: tl.constexpr = tl.constexpr(NORM_FLOOR**2)


@triton.jit
def load_block(blocks, i_block):
    """first token, tokens, written, sequence, chunk, last: a row of the block table."""
    row = blocks + i_block * TABLE
    return (
        tl.load(row),
        tl.load(row + 1).to(tl.int32),
        tl.load(row + 2).to(tl.int32),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5).to(tl.int32),
    )


@triton.jit
def sum_partials(norms, i_sequence, o_d, m_d, parts, D):
    """Square row norms from the sums over f tiles [sequences, parts, D], in a fixed order."""
    total = tl.zeros_like(o_d).to(tl.float32)
    row = norms + i_sequence * parts * D
    for i in range(parts):
        total += tl.load(row + i * D + o_d, mask=m_d, other=0.0)
    return total


@triton.jit
def row_ratio(w0_norm, norm):
    """r from square norms, rounded correctly: equal norms give exactly 1."""
    return tl.sqrt_rn(tl.div_rn(w0_norm, tl.maximum(norm, FLOOR)))


@triton.jit(do_not_specialize=["apply_tiles"])
def scan_fwd_step_kernel(
    z, v, y, raw, base, state, shadow, next_shadow, norms, next_norms, w0_norms, step_size, scores,
    blocks, z_rows, z_columns, v_columns, w_rows, lr, D, F, CHUNK, BLOCK, base_stride, norm_parts,
    apply_tiles, WRITE_LAST: tl.constexpr, NO_TOKENS: tl.constexpr, HAS_STEPS: tl.constexpr,
    PRESERVE: tl.constexpr, SUPER: tl.constexpr, EVEN_F: tl.constexpr, EVEN_D: tl.constexpr,
    EVEN_C: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs [0, apply_tiles) apply, the others write; see the top of the file. `z_rows` [t, k],
    `z_columns` [k, f], `v_columns` [k, d] and `w_rows` [d, k] are descriptors of z, v and the shadow,
    or all None."""
    i_program = tl.program_id(0)
    columns = tl.cdiv(D, BLOCK_D)
    if i_program < apply_tiles:
        rows = tl.cdiv(BLOCK, BLOCK_T)
        i_t = i_program % rows
        i_d = (i_program // rows) % columns
        i_block = (i_program // (rows * columns)).to(tl.int64)
        first, tokens, written, i_sequence, _, _ = load_block(blocks, i_block)
        if i_t * BLOCK_T < tokens:
            o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
            o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            m_y = (o_t < tokens)[:, None] & m_d[None, :]
            # Rows past the end repeat the last one: they are not stored, and need no mask. Offsets
            # inside a tile are 32 bits wide, those of its corner 64: registers are what is scarce.
            r_t = tl.minimum(tl.arange(0, BLOCK_T), tokens - 1 - i_t * BLOCK_T)[:, None]
            r_d = tl.arange(0, BLOCK_D)
            if not EVEN_D:
                r_d = tl.minimum(r_d, D - 1 - i_d * BLOCK_D)
            b_y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            o_k = tl.arange(0, BLOCK_K)
            i_row = first + i_t * BLOCK_T
            p_z = (z + i_row * F) + (r_t * F + o_k[None, :])
            p_w = (shadow + (i_sequence * D + i_d * BLOCK_D) * F) + (r_d[:, None] * F + o_k[None, :])
            for i_k in range(0, F, BLOCK_K):
                if DESCRIPTORS:
                    b_z = z_rows.load([i_row.to(tl.int32), i_k])
                    b_w = w_rows.load([(i_sequence * D).to(tl.int32) + i_d * BLOCK_D, i_k])
                elif EVEN_F:
                    b_z, b_w = tl.load(p_z + i_k), tl.load(p_w + i_k)
                else:
                    m_k = (i_k + o_k < F)[None, :]
                    b_z = tl.load(p_z + i_k, mask=m_k, other=0.0)
                    b_w = tl.load(p_w + i_k, mask=m_k, other=0.0)
                b_y = tl.dot(b_z, tl.trans(b_w), b_y, input_precision=PRECISION)
            if SUPER:
                # Writes of the block that the last token of the tile has already seen.
                seen = tl.minimum((i_t * BLOCK_T + BLOCK_T - 1) // CHUNK * CHUNK, written)
                for i_u in range(0, seen, BLOCK_K):
                    o_u = i_u + o_k
                    m_u = o_u < seen
                    earlier = (o_u // CHUNK)[None, :] < (o_t // CHUNK)[:, None]
                    p_p = (scores + i_block * BLOCK * BLOCK) + ((i_t * BLOCK_T + r_t) * BLOCK + o_u[None, :])
                    p_v = (v + (first + i_u) * D) + (o_k[:, None] * D + o_d[None, :])
                    if EVEN_C:  # whole tiles of tokens are seen, or none
                        b_p, b_v = tl.load(p_p), tl.load(p_v, mask=m_d[None, :], other=0.0)
                    else:
                        b_p = tl.load(p_p, mask=m_u[None, :], other=0.0)
                        b_v = tl.load(p_v, mask=m_u[:, None] & m_d[None, :], other=0.0)
                    b_p = tl.where(earlier, b_p, 0.0)  # what is not earlier may be anything
                    b_y = tl.dot(b_p, b_v, b_y, input_precision=PRECISION)
            if PRESERVE and SUPER:
                p_y = (raw + i_block * BLOCK * D) + (o_t[:, None] * D + o_d[None, :])
                tl.store(p_y, b_y, mask=m_y)
            else:
                if PRESERVE:
                    norm = sum_partials(norms, i_sequence, o_d, m_d, norm_parts, D)
                    w0_norm = sum_partials(w0_norms, 0, o_d, m_d, norm_parts, D)
                    b_y *= row_ratio(w0_norm, norm)[None, :]
                p_y = (y + i_row * D) + (tl.arange(0, BLOCK_T)[:, None] * D + o_d[None, :])
                tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_y)
    else:
        i_tile = i_program - apply_tiles
        i_d = i_tile % columns
        i_f = (i_tile // columns) % tl.cdiv(F, BLOCK_F)
        i_block = (i_tile // (columns * tl.cdiv(F, BLOCK_F))).to(tl.int64)
        first, tokens, written, i_sequence, i_chunk, last = load_block(blocks, i_block)
        if NO_TOKENS or (written > 0 and (WRITE_LAST or last == 0)):
            o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
            corner = i_d.to(tl.int64) * BLOCK_D * F + i_f * BLOCK_F
            p_base = base + i_sequence * base_stride + corner
            p_state, p_shadow = state + i_sequence * D * F + corner, next_shadow + i_sequence * D * F + corner
            b_u = write_tokens(
                z, v, z_columns, v_columns, step_size + i_chunk, lr, first, 0 if NO_TOKENS else written,
                i_d, i_f, D, F, CHUNK, HAS_STEPS and not NO_TOKENS, SUPER, EVEN_C, EVEN_D, EVEN_F,
                DESCRIPTORS, PRECISION, BLOCK_D, BLOCK_F, BLOCK_K,
            )  # fmt: skip
            # In quarters: a whole tile of W beside its update would not fit in registers.
            left, right = halve(b_u, BLOCK_D, BLOCK_F)
            sums = tl.zeros([BLOCK_D], tl.float32)
            for i_h in tl.static_range(2):
                parts = halve(left if i_h == 0 else right, BLOCK_D, BLOCK_F // 2)
                for i_q in tl.static_range(2):
                    o_n = (2 * i_h + i_q) * (BLOCK_F // 4) + tl.arange(0, BLOCK_F // 4)
                    m_w = (o_d < D)[:, None] & (i_f * BLOCK_F + o_n < F)[None, :]
                    o_w = tl.arange(0, BLOCK_D)[:, None] * F + o_n[None, :]
                    b_w = tl.load(p_base + o_w, mask=m_w, other=0.0).to(tl.float32) + parts[i_q]
                    sums += store_state(b_w, p_state + o_w, p_shadow + o_w, m_w)
            if PRESERVE:
                p_n = next_norms + (i_sequence * tl.cdiv(F, BLOCK_F) + i_f) * D + o_d
                tl.store(p_n, sums, mask=o_d < D)


@triton.jit
def halve(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def store_state(b_w, p_state, p_shadow, m_w):
    """Store a tile of W and its rounded copy; the row sums of its squares."""
    tl.store(p_state, b_w, mask=m_w)
    tl.store(p_shadow, b_w.to(p_shadow.dtype.element_ty), mask=m_w)
    b_w = tl.where(m_w, b_w, 0.0)  # columns past the end hold repeated ones
    return tl.sum(b_w * b_w, axis=1)


@triton.jit
def next_scale(scale, step, starts):
    """For a sum of chunks, each times its own step, in one accumulator: it holds the sum so far over `scale`,
    the step of the last chunk that counts, and is multiplied by `factor` where the next one `starts`. A
    chunk whose step is 0, or 2^-60 of the one before, does not count: its operands are to be read as zero.

    Returns:
        scale, factor and whether the chunk counts.
    """
    counts = (tl.abs(step) > tl.abs(scale) * 8.673617379884035e-19) | (step != step)  # NaN counts
    factor = tl.where(starts & counts & (scale != 0), tl.div_rn(scale, tl.where(counts, step, 1.0)), 1.0)
    return tl.where(counts, step, scale), factor, counts


@triton.jit
def write_tokens(
    z, v, z_columns, v_columns, steps, lr, first, length, i_d, i_f, D, F, CHUNK, HAS_STEPS: tl.constexpr,
    SUPER: tl.constexpr, EVEN_C: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum over `length` tokens of s_t v_t z_t^T, for one tile of W; see `next_scale` for chunks of a block
    that have step sizes of their own."""
    EACH: tl.constexpr = SUPER and HAS_STEPS
    o_d, o_f = i_d * BLOCK_D + tl.arange(0, BLOCK_D), i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    o_k = tl.arange(0, BLOCK_K)
    # Columns past the end repeat the last one: what they make is not stored.
    r_d = o_d if EVEN_D else tl.minimum(o_d, D - 1)
    r_f = o_f if EVEN_F else tl.minimum(o_f, F - 1)
    p_v = (v + first * D) + (o_k[:, None] * D + r_d[None, :])
    p_z = (z + first * F) + (o_k[:, None] * F + r_f[None, :])
    span = CHUNK if EACH else length
    tiles = tl.cdiv(span, BLOCK_K)
    scale = lr * 0
    b_g = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    for i_n in range(0, length // CHUNK * tiles if EACH else tiles):
        i_tile = i_n % tiles if EACH else i_n
        i_k = i_n // tiles * CHUNK + i_tile * BLOCK_K if EACH else i_n * BLOCK_K
        if EACH:
            scale, factor, counts = next_scale(scale, tl.load(steps + i_n // tiles), i_tile == 0)
            b_g *= factor
        if DESCRIPTORS:
            i_t = first.to(tl.int32) + i_k
            if EACH:  # what lies before the first token is read as zero
                i_t = tl.where(counts, i_t, -BLOCK_K)
            b_v, b_z = v_columns.load([i_t, i_d * BLOCK_D]), z_columns.load([i_t, i_f * BLOCK_F])
        else:
            q_v, q_z = p_v + i_k.to(tl.int64) * D, p_z + i_k.to(tl.int64) * F
            if EVEN_C and not EACH:
                b_v, b_z = tl.load(q_v), tl.load(q_z)
            else:
                m_t = (i_tile * BLOCK_K + o_k < (tl.where(counts, span, 0) if EACH else span))[:, None]
                b_v, b_z = tl.load(q_v, mask=m_t, other=0.0), tl.load(q_z, mask=m_t, other=0.0)
        b_g = tl.dot(tl.trans(b_v), b_z, b_g, input_precision=PRECISION)
    if EACH:
        return b_g * scale
    else:
        return b_g * (tl.load(steps) if HAS_STEPS else lr)


@triton.jit
def scan_fwd_scores_kernel(
    z, scores, step_size, blocks, lr, F, CHUNK, BLOCK,
    HAS_STEPS: tl.constexpr, EVEN_F: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """P [t, u] = s_u (z_t . z_u) for u in a chunk not later than that of t, tiles on and below the
    diagonal. Readers mask the chunk relation they want; what no reader reads is not written."""
    rows = tl.cdiv(BLOCK, BLOCK_T)
    i_t, i_u = tl.program_id(0) % rows, tl.program_id(0) // rows % rows
    i_block = tl.program_id(0) // (rows * rows)
    first, tokens, written, _, i_chunk, _ = load_block(blocks, i_block)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_u = i_u * BLOCK_T + tl.arange(0, BLOCK_T)
    seen = tl.minimum(((i_t * BLOCK_T + BLOCK_T - 1) // CHUNK + 1) * CHUNK, written)
    if i_t * BLOCK_T < tokens and i_u * BLOCK_T < seen:
        b_p = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        o_k = tl.arange(0, BLOCK_K)
        p_t = z + (first + tl.minimum(o_t, tokens - 1))[:, None] * F + o_k[None, :]
        p_u = z + (first + tl.minimum(o_u, tokens - 1))[:, None] * F + o_k[None, :]
        for i_k in range(0, F, BLOCK_K):
            if EVEN_F:
                b_t, b_u = tl.load(p_t + i_k), tl.load(p_u + i_k)
            else:
                m_k = (i_k + o_k < F)[None, :]
                b_t = tl.load(p_t + i_k, mask=m_k, other=0.0)
                b_u = tl.load(p_u + i_k, mask=m_k, other=0.0)
            b_p = tl.dot(b_t, tl.trans(b_u), b_p, input_precision=PRECISION)
        if ALIGNED:  # whole chunks of a multiple of 16 tokens: the mask splits no vector store
            written = written // 16 * 16
        m_u = o_u < written
        if HAS_STEPS:
            b_p *= tl.load(step_size + i_chunk + o_u // CHUNK, mask=m_u, other=0.0)[None, :]
        else:
            b_p *= lr
        p_p = (scores + i_block.to(tl.int64) * BLOCK * BLOCK) + (o_t[:, None] * BLOCK + o_u[None, :])
        tl.store(p_p, b_p.to(scores.dtype.element_ty), mask=(o_t < tokens)[:, None] & m_u[None, :])


@triton.jit
def scan_fwd_rescale_kernel(
    raw, y, v, norms, w0_norms, step_size, scores, blocks, lr, D, CHUNK, BLOCK, norm_parts,
    HAS_STEPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = r_k raw for the chunks k of a super-chunk in order, one strip of columns a program."""
    columns = tl.cdiv(D, BLOCK_D)
    i_d, i_block = tl.program_id(0) % columns, (tl.program_id(0) // columns).to(tl.int64)
    first, tokens, written, i_sequence, i_chunk, _ = load_block(blocks, i_block)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    norm = sum_partials(norms, i_sequence, o_d, m_d, norm_parts, D)
    w0_norm = sum_partials(w0_norms, 0, o_d, m_d, norm_parts, D)
    for i_c in range(0, tokens, CHUNK):
        ratio = row_ratio(w0_norm, norm)[None, :]
        step = tl.load(step_size + i_chunk + i_c // CHUNK) if HAS_STEPS else lr
        growth = tl.zeros([BLOCK_D], tl.float32)
        for i_t in range(i_c, tl.minimum(i_c + CHUNK, tokens), BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            m_t = o_t < tl.minimum(i_c + CHUNK, tokens)
            m_y = m_t[:, None] & m_d[None, :]
            p_raw = raw + (i_block * BLOCK + o_t)[:, None] * D + o_d[None, :]
            b_raw = tl.load(p_raw, mask=m_y, other=0.0)
            r_t = (first + o_t)[:, None]
            tl.store(y + r_t * D + o_d[None, :], (b_raw * ratio).to(y.dtype.element_ty), mask=m_y)
            if i_c < written:
                b_same = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
                for i_u in range(i_c, i_c + CHUNK, BLOCK_T):
                    o_u = i_u + tl.arange(0, BLOCK_T)
                    m_u = o_u < i_c + CHUNK
                    p_p = (scores + i_block * BLOCK * BLOCK) + (o_t[:, None] * BLOCK + o_u[None, :])
                    b_p = tl.load(p_p, mask=m_t[:, None] & m_u[None, :], other=0.0)
                    p_v = v + (first + o_u)[:, None] * D + o_d[None, :]
                    b_v = tl.load(p_v, mask=m_u[:, None] & m_d[None, :], other=0.0)
                    b_same = tl.dot(b_p, b_v, b_same, input_precision=PRECISION)
                b_v = tl.load(v + r_t * D + o_d[None, :], mask=m_y, other=0.0).to(tl.float32)
                growth += step * tl.sum(b_v * (2 * b_raw + b_same), axis=0)
        norm += growth


NO_VIEWS = dict(z_rows=None, z_columns=None, v_columns=None, w_rows=None, DESCRIPTORS=False)


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
        self.steps = {"step_size": step_size if step_size is not None else z.new_empty(1), "lr": lr}
        self.has_steps = step_size is not None
        self.tiles = self.choose_tiles()
        self.parts = ceil_div(self.f, self.tiles.f)
        self.precision = input_precision(z.dtype)
        self.empty = z.new_empty(1)
        self.group = range(0)  # launches whose scores are at hand

    def choose_tiles(self) -> Tiles:
        arch, size = architecture(self.z.device), self.z.element_size()
        blocks = max((len(self.table.of(n)) for n in self.table.launches), default=0)
        return forward_tiles(arch, size, blocks, self.table.length, self.d, self.f)

    def float32(self, *shape: int) -> Tensor:
        return self.z.new_empty(shape, dtype=torch.float32)

    def norm_buffer(self, sequences: int) -> Tensor:
        """Row sums of W^2 over each f tile."""
        shape = (sequences, self.parts, self.d) if self.preserve else (1,)
        return self.float32(*shape)

    def views(self, shadow: Tensor) -> dict:
        """Descriptors of z, v and the shadow, or None for all where one cannot be had. A tile of tokens
        must not reach past its chunk: nothing masks it."""
        t = self.tiles
        z, v, w = self.z.flatten(0, 1), self.v.flatten(0, 1), shadow.flatten(0, 1)
        wanted = {"z_rows": (z, (t.t, t.k)), "z_columns": (z, (t.k, t.f)), "v_columns": (v, (t.k, t.d)),
                  "w_rows": (w, (t.d, t.k))}  # fmt: skip
        views = {name: descriptor(x, block) for name, (x, block) in wanted.items()}
        whole = self.chunk % t.k == 0 and None not in views.values()
        return {**views, "DESCRIPTORS": True} if whole else NO_VIEWS

    @property
    def cut(self) -> dict:
        """Compile-time facts and sizes that every launch of the step shares."""
        t = self.tiles
        return dict(
            D=self.d, F=self.f, CHUNK=self.chunk, BLOCK=self.table.length, HAS_STEPS=self.has_steps,
            PRESERVE=self.preserve, SUPER=self.super, PRECISION=self.precision,
            EVEN_F=self.f % t.k == 0 and self.f % t.f == 0, EVEN_D=self.d % t.d == 0,
            EVEN_C=self.chunk % t.k == 0, BLOCK_T=t.t, BLOCK_D=t.d, BLOCK_F=t.f, BLOCK_K=t.k,
            **t.launch, **self.steps,
        )  # fmt: skip

    def start(self, initial: Tensor, state: Tensor, shadow: Tensor, norms: Tensor) -> None:
        """state = float32(initial), with its rounded copy and row sums: a write of no tokens."""
        column = torch.arange(COLUMNS, device=state.device) == 3  # the sequence, made where it is needed
        rows = torch.arange(len(state), device=state.device)[:, None] * column
        grid = (len(state) * ceil_div(self.d, self.tiles.d) * self.parts,)
        launch(
            scan_fwd_step_kernel, grid, z=self.z, v=self.v, y=self.z, raw=self.empty, base=initial,
            state=state, shadow=shadow, next_shadow=shadow, norms=norms, next_norms=norms,
            w0_norms=norms, scores=self.z, blocks=rows, norm_parts=self.parts,
            base_stride=self.d * self.f if initial.dim() == 3 else 0, apply_tiles=0, WRITE_LAST=True,
            NO_TOKENS=True, **NO_VIEWS, **self.cut,
        )  # fmt: skip

    def scores(self, n: int) -> Tensor:
        """P of the super-chunks of launch n, [blocks, block, block] in the dtype of z. Made for as many
        launches at a time as take a quarter of a float32 weight: few would not fill a GPU."""
        if not self.super:
            return self.empty
        length, offsets = self.table.length, self.table.offsets
        if n not in self.group:
            limit = offsets[n] + max(len(self.table.of(n)), self.d * self.f // (2 * length**2))
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
        columns = ceil_div(self.d, t.d)
        apply_tiles = len(blocks) * columns * ceil_div(self.table.length, t.t)
        if plan == "split":
            tokens = slice(n * self.table.length, (n + 1) * self.table.length)
            y[:, tokens] = self.z[:, tokens] @ shadows[0].mT
            apply_tiles = 0
        write_tiles = len(blocks) * columns * self.parts if write else 0
        launch(
            scan_fwd_step_kernel, (apply_tiles + write_tiles,), z=self.z, v=self.v, y=y, raw=raw,
            base=state, state=state, shadow=shadows[0], next_shadow=shadows[1], norms=norms[0],
            next_norms=norms[1], w0_norms=w0_norms, scores=scores, blocks=blocks,
            base_stride=self.d * self.f, norm_parts=self.parts, apply_tiles=apply_tiles,
            WRITE_LAST=write_last, NO_TOKENS=False, **self.views(shadows[0]), **self.cut,
        )  # fmt: skip
        if self.super and self.preserve:
            width = min(t.d, 32)  # many short strips: each program walks its chunks one after another
            launch(
                scan_fwd_rescale_kernel, (ceil_div(self.d, width) * len(blocks),), raw=raw, y=y,
                v=self.v, norms=norms[0], w0_norms=w0_norms, scores=scores, blocks=blocks, D=self.d,
                CHUNK=self.chunk, BLOCK=self.table.length, norm_parts=self.parts,
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
    block = fused_super_chunk(chunk_size, d, f)
    table = block_table(z.shape[0], z.shape[1], chunk_size, block, cu_seqlens, z.device)
    run = Forward(z, v, w0, step_size, lr, table, chunk_size, preserve_row_norm)
    plan = choose_plan(run.super, preserve_row_norm, cu_seqlens is not None)
    y = z.new_empty(*z.shape[:2], d)
    carried = run.float32(table.sequences, d, f)
    shadows = [z.new_empty(table.sequences, d, f) for _ in range(2)]
    norms = [run.norm_buffer(table.sequences) for _ in range(2)]
    w0_norms = run.norm_buffer(1)
    if preserve_row_norm:  # in memory that the next launch fills
        run.start(w0, carried[:1], shadows[0][:1], w0_norms)
    run.start(w0 if state is None else state, carried, shadows[0], norms[0])
    raw = run.empty
    if run.super and preserve_row_norm:
        raw = run.float32(table.sequences * table.length, d)
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
