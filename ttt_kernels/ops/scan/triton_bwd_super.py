"""What a super-chunk adds to the scan's backward: the writes inside it, in attention form.

With P [t, u] = z_t . z_u for u in an earlier chunk than t, a block of several chunks reads
raw = W z + P (s v), so that (`eager` has the derivation)

    dV = s (Z G^T + P^T dY'')            dZ = s V G + dY'' W + (M + M^T) Z
    M [t, u] = s_u (dY''_t . v_u)        for u in an earlier chunk

Without row-norm preservation dY'' = dY: P and M of every block come from one launch before the first
block. With it P does, and each block takes these launches before its token launch:

    read     raw, in float32
    rescale  along the chunks k: ||W_k||^2, r_k and c_k = (dr r)_k / ||W_k||^2; then back, with cbar the
             sum of c over later chunks: dY'' = r dY - cbar s v, and dV gets s extra besides, where
             extra = -cbar (raw + (same-chunk P) (s v))
    scores   M, which for u < t in the same chunk is -s_u ((cbar s v)_t . v_u), half of that for u = t

M has entries for u <= t only, so that M + M^T is what multiplies Z.
"""

from __future__ import annotations

from bisect import bisect_left

import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops.scan.triton_fwd_step import FLOOR, load_block, row_ratio, sum_partials
from ttt_kernels.ops.triton_launch import launch
from ttt_kernels.types import ceil_div


@triton.jit
def add_row_products(
    a, b, r_a, r_b, summed, size, acc, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """acc + a b^T, for rows r_a of a and r_b of b, of `size` numbers each, all or none `summed`."""
    o_k = tl.arange(0, BLOCK_K)
    p_a = a + (r_a[:, None] * size + o_k[None, :])
    p_b = b + (r_b[:, None] * size + o_k[None, :])
    for i_k in range(0, summed, BLOCK_K):
        if EVEN:
            b_a, b_b = tl.load(p_a + i_k), tl.load(p_b + i_k)
        else:
            m_k = (i_k + o_k < size)[None, :]
            b_a, b_b = tl.load(p_a + i_k, mask=m_k, other=0.0), tl.load(p_b + i_k, mask=m_k, other=0.0)
        acc = tl.dot(b_a, tl.trans(b_b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_earlier_writes(
    v, scores, steps, lr, start, o_t, r_d, tokens, written, b, D, CHUNK, BLOCK,
    HAS_STEPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """b [t, d] + sum over u in earlier chunks of P [t, u] s_u v_u. Pointers at token 0 of the block."""
    seen = tl.minimum((start + BLOCK_T - 1) // CHUNK * CHUNK, written)
    for i_k in range(0, seen, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < seen
        m_p = (o_t < tokens)[:, None] & (o_k < BLOCK)[None, :]
        b_p = tl.load(scores + (o_t[:, None] * BLOCK + o_k[None, :]), mask=m_p, other=0.0)
        b_v = tl.load(v + (o_k[:, None] * D + r_d[None, :]), mask=m_k[:, None], other=0.0)
        step = lr
        if HAS_STEPS:
            step = tl.load(steps + o_k // CHUNK, mask=m_k, other=0.0)[None, :]
        earlier = (o_k // CHUNK)[None, :] < (o_t // CHUNK)[:, None]
        b_p = tl.where(earlier & m_k[None, :], b_p.to(tl.float32) * step, 0.0).to(b_v.dtype)
        b = tl.dot(b_p, b_v, b, input_precision=PRECISION)
    return b


@triton.jit
def add_later_readers(
    dy, scores, start, o_u, r_d, tokens, b, D, CHUNK, BLOCK,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """b [u, d] + sum over t in later chunks of P [t, u] dY''_t. Pointers at token 0 of the block."""
    for i_k in range((start // CHUNK + 1) * CHUNK, tokens, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < tokens
        m_p = m_k[:, None] & (o_u < BLOCK)[None, :]
        b_p = tl.load(scores + (o_k[:, None] * BLOCK + o_u[None, :]), mask=m_p, other=0.0)
        b_p = tl.where((o_k // CHUNK)[:, None] > (o_u // CHUNK)[None, :], b_p, 0.0)
        b_dy = tl.load(dy + (o_k[:, None] * D + r_d[None, :]), mask=m_k[:, None], other=0.0)
        b = tl.dot(tl.trans(b_p), b_dy, b, input_precision=PRECISION)
    return b


@triton.jit
def add_mixed(
    z, mixed, start, o_t, r_f, tokens, written, b, F, BLOCK,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """b [t, f] + (M + M^T) Z. Pointers at token 0 of the block."""
    for i_k in range(0, tl.minimum(start + BLOCK_T, written), BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < written
        m_m = (o_t < tokens)[:, None] & (o_k < BLOCK)[None, :]
        b_m = tl.load(mixed + (o_t[:, None] * BLOCK + o_k[None, :]), mask=m_m, other=0.0)
        b_m = tl.where((o_k[None, :] <= o_t[:, None]) & m_k[None, :], b_m, 0.0)
        b_z = tl.load(z + (o_k[:, None] * F + r_f[None, :]), mask=m_k[:, None], other=0.0)
        b = tl.dot(b_m, b_z, b, input_precision=PRECISION)
    for i_k in range(start, tl.where(start < written, tokens, start), BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < tokens
        m_m = m_k[:, None] & (o_t < BLOCK)[None, :]
        b_m = tl.load(mixed + (o_k[:, None] * BLOCK + o_t[None, :]), mask=m_m, other=0.0)
        b_m = tl.where((o_k[:, None] >= o_t[None, :]) & (o_t < written)[None, :], b_m, 0.0)
        b_z = tl.load(z + (o_k[:, None] * F + r_f[None, :]), mask=m_k[:, None], other=0.0)
        b = tl.dot(tl.trans(b_m), b_z, b, input_precision=PRECISION)
    return b


@triton.jit
def scan_bwd_read_kernel(
    z, v, shadow, raw, scores, step_size, blocks, lr, D, F, CHUNK, BLOCK,
    HAS_STEPS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """raw = W z + P v for a tile [t, d] of a block, in float32."""
    rows, columns = tl.cdiv(BLOCK, BLOCK_T), tl.cdiv(D, BLOCK_D)
    i_t, i_d = tl.program_id(0) % rows, tl.program_id(0) // rows % columns
    i_row = tl.program_id(0) // (rows * columns)
    first, tokens, written, i_sequence, i_chunk, _ = load_block(blocks, i_row)
    start = i_t * BLOCK_T
    if start < tokens:
        o_t, o_d = start + tl.arange(0, BLOCK_T), i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        r_d = o_d if EVEN_D else tl.minimum(o_d, D - 1)
        b = add_row_products(
            z + (first + start) * F, shadow + (i_sequence * D + i_d * BLOCK_D) * F,
            tl.minimum(tl.arange(0, BLOCK_T), tokens - 1 - start), r_d - i_d * BLOCK_D, F, F,
            tl.zeros([BLOCK_T, BLOCK_D], tl.float32), EVEN_F, PRECISION, BLOCK_K,
        )  # fmt: skip
        b = add_earlier_writes(
            v + first * D, scores + i_row.to(tl.int64) * BLOCK * BLOCK, step_size + i_chunk, lr, start,
            o_t, r_d, tokens, written, b, D, CHUNK, BLOCK, HAS_STEPS, PRECISION, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        p_raw = raw + i_row.to(tl.int64) * BLOCK * D + (o_t[:, None] * D + o_d[None, :])
        tl.store(p_raw, b, mask=(o_t < tokens)[:, None] & (o_d < D)[None, :])


@triton.jit
def scan_bwd_scores_kernel(
    z, v, dy, pulled, scores, mixed, step_size, blocks, lr, D, F, CHUNK, BLOCK,
    MAKE_P: tl.constexpr, MAKE_M: tl.constexpr, HAS_STEPS: tl.constexpr, PRESERVE: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_F: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """P and M for one tile [t, u]. Readers mask the relation they want: other entries may be anything.

    With preservation `dy` (dY'') and `pulled` (-cbar s v) hold the blocks of this launch only.
    """
    rows = tl.cdiv(BLOCK, BLOCK_T)
    i_t, i_u = tl.program_id(0) % rows, tl.program_id(0) // rows % rows
    i_row = tl.program_id(0) // (rows * rows)
    first, tokens, written, _, i_chunk, _ = load_block(blocks, i_row)
    limit = (i_t + 1) * BLOCK_T
    if PRESERVE and MAKE_P:  # `rescale` reads all of a chunk's own products
        limit = ((limit - 1) // CHUNK + 1) * CHUNK
    if i_t * BLOCK_T < tokens and i_u * BLOCK_T < tl.minimum(limit, written):
        o_t, o_u = i_t * BLOCK_T + tl.arange(0, BLOCK_T), i_u * BLOCK_T + tl.arange(0, BLOCK_T)
        r_t, r_u = tl.minimum(o_t, tokens - 1), tl.minimum(o_u, tokens - 1)
        i_block = i_row.to(tl.int64) * BLOCK if PRESERVE else first
        i_pair = i_row.to(tl.int64) * BLOCK * BLOCK
        o_tile = o_t[:, None] * BLOCK + o_u[None, :]
        m_tile = (o_t < tokens)[:, None] & (o_u < BLOCK)[None, :]
        zero = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        if MAKE_P:
            p_z = z + first * F
            b = add_row_products(p_z, p_z, r_t, r_u, F, F, zero, EVEN_F, PRECISION, BLOCK_K)
            tl.store(scores + i_pair + o_tile, b.to(scores.dtype.element_ty), mask=m_tile)
        if MAKE_M:
            p_v, p_dy, p_pulled = v + first * D, dy + i_block * D, pulled + i_block * D
            c_t, c_u = (o_t // CHUNK)[:, None], (o_u // CHUNK)[None, :]
            b = add_row_products(p_dy, p_v, r_t, r_u, D, D, zero, EVEN_D, PRECISION, BLOCK_K)
            b = tl.where(c_u < c_t, b, 0.0)
            if PRESERVE:
                if i_t * BLOCK_T // CHUNK <= (i_u * BLOCK_T + BLOCK_T - 1) // CHUNK:
                    b_g = add_row_products(p_pulled, p_v, r_t, r_u, D, D, zero, EVEN_D, PRECISION, BLOCK_K)
                    b_g *= tl.where(o_u[None, :] < o_t[:, None], 1.0, 0.5)
                    b += tl.where((c_u == c_t) & (o_u[None, :] <= o_t[:, None]), b_g, 0.0)
            b_step = tl.where(o_u < written, lr, 0.0)
            if HAS_STEPS:
                b_step = tl.load(step_size + i_chunk + o_u // CHUNK, mask=o_u < written, other=0.0)
            b = (b * b_step[None, :]).to(mixed.dtype.element_ty)
            tl.store(mixed + i_pair + o_tile, b, mask=m_tile)


@triton.jit
def scan_bwd_rescale_kernel(
    raw, dy, v, dy_block, pulled, norms, w0_norms, ratios, pulls, pull, norm_grad, scores,
    step_size, blocks, lr, D, CHUNK, BLOCK, parts,
    HAS_STEPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One strip of columns of a block: along its chunks and back. `raw` becomes `extra` in place."""
    columns = tl.cdiv(D, BLOCK_D)
    i_d, i_row = tl.program_id(0) % columns, tl.program_id(0) // columns
    first, tokens, written, i_sequence, i_chunk, _ = load_block(blocks, i_row)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_local = i_row.to(tl.int64) * BLOCK
    p_ratio = ratios + i_row.to(tl.int64) * tl.cdiv(BLOCK, CHUNK) * D + o_d
    p_pull = pulls + i_row.to(tl.int64) * tl.cdiv(BLOCK, CHUNK) * D + o_d
    norm = sum_partials(norms, i_sequence, o_d, m_d, parts, D)
    w0_norm = tl.load(w0_norms + o_d, mask=m_d, other=0.0)
    total = tl.zeros([BLOCK_D], tl.float32)
    for i_c in range(0, tokens, CHUNK):
        b_ratio = row_ratio(w0_norm, norm)
        dratio = tl.zeros([BLOCK_D], tl.float32)
        growth = tl.zeros([BLOCK_D], tl.float32)
        step = lr
        if HAS_STEPS:
            step = tl.load(step_size + i_chunk + i_c // CHUNK, mask=i_c < written, other=0.0)
        stop = tl.minimum(i_c + CHUNK, tokens)
        for i_t in range(i_c, stop, BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            m_y = (o_t < stop)[:, None] & m_d[None, :]
            o_y = (first + o_t)[:, None] * D + o_d[None, :]
            p_raw = raw + (i_local + o_t)[:, None] * D + o_d[None, :]
            b_raw = tl.load(p_raw, mask=m_y, other=0.0)
            dratio += tl.sum(tl.load(dy + o_y, mask=m_y, other=0.0).to(tl.float32) * b_raw, axis=0)
            if i_c < written:
                b_same = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
                for i_u in range(i_c, stop, BLOCK_T):
                    o_u = i_u + tl.arange(0, BLOCK_T)
                    m_u = o_u < stop
                    p_p = scores + (i_local + o_t)[:, None] * BLOCK + o_u[None, :]
                    b_p = tl.load(p_p, mask=(o_t < stop)[:, None] & (o_u < BLOCK)[None, :], other=0.0)
                    b_p = tl.where(m_u[None, :], b_p, 0.0)
                    p_v = v + (first + o_u)[:, None] * D + o_d[None, :]
                    b_v = tl.load(p_v, mask=m_u[:, None] & m_d[None, :], other=0.0)
                    b_same = tl.dot(b_p, b_v, b_same, input_precision=PRECISION)
                b_same *= step
                b_v = tl.load(v + o_y, mask=m_y, other=0.0).to(tl.float32)
                growth += tl.sum(b_v * (2 * b_raw + b_same), axis=0)
                tl.store(p_raw, b_raw + b_same, mask=m_y)
        dratio *= b_ratio
        total += dratio
        o_c = i_c // CHUNK * D
        tl.store(p_ratio + o_c, b_ratio, mask=m_d)
        tl.store(p_pull + o_c, tl.where(norm > FLOOR, dratio / tl.maximum(norm, FLOOR), 0.0), mask=m_d)
        norm += step * growth
    p_total = norm_grad + i_sequence * D + o_d
    tl.store(p_total, tl.load(p_total, mask=m_d, other=0.0) + total, mask=m_d)

    tl.debug_barrier()
    after = tl.zeros([BLOCK_D], tl.float32)  # cbar
    for i in range(0, tokens, CHUNK):
        i_k = (tokens - 1 - i) // CHUNK
        i_c = i_k * CHUNK
        stop = tl.minimum(i_c + CHUNK, tokens)
        b_ratio = tl.load(p_ratio + i_k * D, mask=m_d, other=0.0)
        step = lr
        if HAS_STEPS:
            step = tl.load(step_size + i_chunk + i_k, mask=i_c < written, other=0.0)
        for i_t in range(i_c, stop, BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            m_y = (o_t < stop)[:, None] & m_d[None, :]
            o_y = (first + o_t)[:, None] * D + o_d[None, :]
            o_local = (i_local + o_t)[:, None] * D + o_d[None, :]
            b_v = tl.load(v + o_y, mask=m_y & (i_c < written), other=0.0).to(tl.float32)
            b_dy = tl.load(dy + o_y, mask=m_y, other=0.0).to(tl.float32)
            b_extra = -after[None, :] * tl.load(raw + o_local, mask=m_y, other=0.0)
            b_pulled = -after[None, :] * (step * b_v)
            tl.store(raw + o_local, b_extra, mask=m_y)
            tl.store(pulled + o_local, b_pulled.to(pulled.dtype.element_ty), mask=m_y)
            b_dy = b_ratio[None, :] * b_dy + b_pulled
            tl.store(dy_block + o_local, b_dy.to(dy_block.dtype.element_ty), mask=m_y)
        after += tl.load(p_pull + i_k * D, mask=m_d, other=0.0)
    tl.store(pull + i_sequence * D + o_d, after, mask=m_d)


class SuperChunks:
    """Buffers and launches that a `Backward` (`run`) of super-chunks has besides its own."""

    def __init__(self, run) -> None:
        self.run = run
        length = run.table.length
        local = len(run.dy_block) if run.preserve else 0  # tokens of one launch
        self.raw = run.float32(local, run.d)
        self.pulled = run.z.new_empty(local, run.d)
        chunks = local // length * ceil_div(length, run.chunk)
        self.ratios, self.pulls = (run.float32(chunks, run.d) for _ in range(2))
        self.group = range(0)  # launches whose P (without preservation also M) are at hand
        self.group_scores = self.group_mixed = run.z.new_empty(0, length, length)

    def make_scores(self, blocks: Tensor, scores: Tensor, mixed: Tensor, *, make_p, make_m) -> None:
        run = self.run
        launch(
            scan_bwd_scores_kernel,
            (ceil_div(run.table.length, run.token_tile.t) ** 2 * len(blocks),),
            z=run.z, v=run.v, dy=run.dy_block, pulled=self.pulled, scores=scores, mixed=mixed,
            blocks=blocks, MAKE_P=make_p, MAKE_M=make_m, PRESERVE=run.preserve, **run.chunks,
            **run.token_cut(run.token_tile),
        )  # fmt: skip

    def prepare(self, n: int) -> None:
        """`scores` and `mixed` of launch n, [blocks, block, block]. What does not depend on the state is
        made for as many launches at a time as take an eighth of a float32 weight."""
        run, length, offsets = self.run, self.run.table.length, self.run.table.offsets
        if n not in self.group:
            # Before their successors are allocated: the views of launch n + 1 hold them too.
            self.group_scores = self.group_mixed = self.scores = self.mixed = None
            limit = max(len(run.table.of(n)), run.d * run.f // (2 * run.z.element_size() * length**2))
            start = min(n, bisect_left(offsets, offsets[n + 1] - limit))
            blocks, self.group = run.table.rows[offsets[start] : offsets[n + 1]], range(start, n + 1)
            self.group_scores = run.z.new_empty(len(blocks), length, length)
            widest = len(run.table.of(0)) if run.preserve else len(blocks)
            self.group_mixed = run.z.new_empty(widest, length, length)
            both = (self.group_scores, self.group_mixed)
            self.make_scores(blocks, *both, make_p=True, make_m=not run.preserve)
        place = offsets[n] - offsets[self.group.start]
        self.scores = self.group_scores[place:]
        self.mixed = self.group_mixed if run.preserve else self.group_mixed[place:]

    def block(self, n: int) -> None:
        """With preservation: dY'', M, extra (in `raw`) and the gradients of the norms of block n."""
        run, t = self.run, self.run.state_tile  # narrower than tiles of tokens: dV has few columns
        blocks, length, width = run.table.of(n), run.table.length, min(t.d, 64)
        columns = ceil_div(run.d, t.d)
        launch(
            scan_bwd_read_kernel, (ceil_div(length, t.t) * columns * len(blocks),), z=run.z, v=run.v,
            shadow=run.shadow, raw=self.raw, scores=self.scores, blocks=blocks, BLOCK_D=t.d,
            **run.chunks, **run.token_cut(t),
        )  # fmt: skip
        launch(
            scan_bwd_rescale_kernel, (ceil_div(run.d, width) * len(blocks),), raw=self.raw, dy=run.dy,
            v=run.v, dy_block=run.dy_block, pulled=self.pulled, norms=run.norms,
            w0_norms=run.w0_norms, ratios=self.ratios, pulls=self.pulls, pull=run.pull,
            norm_grad=run.norm_grad, scores=self.scores, blocks=blocks, D=run.d, BLOCK=length,
            parts=run.parts, PRECISION=run.precision, BLOCK_T=min(t.t, 64), BLOCK_D=width,
            num_warps=8, num_stages=2, **run.chunks,
        )  # fmt: skip
        self.make_scores(blocks, self.scores, self.mixed, make_p=False, make_m=True)
