"""The kernel of the scan's forward that reads W_n and writes W_{n+1}: see `triton_fwd`.

A tile may have a second, narrower part with an accumulator of its own: [128, 128 + 64] multiplies as often
for each byte of its operands as a power of two between 128 and 256 would, and its 96 accumulator registers
a thread leave room for a second program on the multiprocessor, behind which its start and tail hide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt_kernels.ops.scan.blocks import COLUMNS
from ttt_kernels.types import NORM_FLOOR

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


@triton.jit
def halve(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def piece(x, i: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns [i, i + 1) COLUMNS / PIECES of a tile, in 2 or 4 pieces."""
    left, right = halve(x, ROWS, COLUMNS)
    half = left if 2 * i < PIECES else right
    if PIECES == 4:
        left, right = halve(half, ROWS, COLUMNS // 2)
        half = left if i % 2 == 0 else right
    return half


@triton.jit
def next_scale(scale, kept, step):
    """For a sum of chunks, each times its own step, in one accumulator: it holds the sum so far over `scale`,
    and is multiplied by `factor` where the next chunk starts. A chunk whose step is 0, or 2^-60 of `kept`,
    the largest so far, is added with so small a step that nothing of it remains: what is loaded must not
    depend on the steps, or it could not be loaded ahead.

    Returns:
        scale, kept, factor.
    """
    least = tl.maximum(tl.abs(kept) * 8.673617379884035e-19, 1e-37)
    counts = (tl.abs(step) > least) | (step != step)  # NaN counts
    kept = tl.where(counts & ((tl.abs(step) > tl.abs(kept)) | (step != step)), step, kept)
    after = tl.where(counts, step, tl.where(kept == 0, 0.0, least))
    return after, kept, tl.where(after == 0, 1.0, tl.div_rn(scale, tl.where(after == 0, 1.0, after)))


@triton.jit(do_not_specialize=["apply_tiles"])
def scan_fwd_step_kernel(
    z, v, y, raw, base, state, shadow, next_shadow, norms, next_norms, w0_norms, step_size, scores,
    blocks, z_rows, z_columns, z_more, v_columns, v_more, w_rows, w_more, p_rows, lr, D, F, CHUNK, BLOCK,
    base_stride, norm_parts, apply_tiles, WRITE_LAST: tl.constexpr, NO_TOKENS: tl.constexpr,
    HAS_STEPS: tl.constexpr, PRESERVE: tl.constexpr, SUPER: tl.constexpr, EVEN_F: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_C: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, MORE_D: tl.constexpr, BLOCK_F: tl.constexpr,
    MORE_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs [0, apply_tiles) apply, tiles [BLOCK_T, BLOCK_D + MORE_D] of y; the others write, tiles
    [BLOCK_D, BLOCK_F + MORE_F] of W. MORE_*: 0, or the width of a second part.

    `z_rows` [t, k], `z_columns` [k, f], `v_columns` [k, d], `w_rows` [d, k] and `p_rows` [t, k] are
    descriptors of z, v, the shadow and the scores, `*_more` those of second parts; or all are None.
    NO_TOKENS: one program for each tile of every state, which only copies `base`.
    """
    i_program = tl.program_id(0)
    if i_program < apply_tiles:
        WIDTH: tl.constexpr = BLOCK_D + MORE_D
        rows, columns = tl.cdiv(BLOCK, BLOCK_T), tl.cdiv(D, WIDTH)
        i_t = i_program % rows * BLOCK_T
        i_d = i_program // rows % columns * WIDTH
        i_block = (i_program // (rows * columns)).to(tl.int64)
        first, tokens, written, i_sequence, _, _ = load_block(blocks, i_block)
        if i_t < tokens:
            o_t = i_t + tl.arange(0, BLOCK_T)
            o_k = tl.arange(0, BLOCK_K)
            # Rows past the end repeat the last one: they are not stored, and need no mask. Offsets
            # inside a tile are 32 bits wide, those of its corner 64: registers are what is scarce.
            r_t = tl.minimum(tl.arange(0, BLOCK_T), tokens - 1 - i_t)[:, None]
            i_row, i_w = first + i_t, i_sequence * D + i_d
            p_z = (z + i_row * F) + (r_t * F + o_k[None, :])
            p_w = row_pointers(shadow + i_w * F, D - i_d, F, o_k, EVEN_D, BLOCK_D)
            b_y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            if MORE_D:
                p_m = row_pointers(shadow + (i_w + BLOCK_D) * F, D - i_d - BLOCK_D, F, o_k, EVEN_D, MORE_D)
                b_m = tl.zeros([BLOCK_T, MORE_D], tl.float32)
            for i_k in range(0, F, BLOCK_K):
                b_z = load_rows(z_rows, i_row, p_z, i_k, o_k, F, EVEN_F, DESCRIPTORS)
                b_w = load_rows(w_rows, i_w, p_w, i_k, o_k, F, EVEN_F, DESCRIPTORS)
                b_y = tl.dot(b_z, tl.trans(b_w), b_y, input_precision=PRECISION)
                if MORE_D:
                    b_w = load_rows(w_more, i_w + BLOCK_D, p_m, i_k, o_k, F, EVEN_F, DESCRIPTORS)
                    b_m = tl.dot(b_z, tl.trans(b_w), b_m, input_precision=PRECISION)
            if SUPER:
                # Writes of the block that the last token of the tile has already seen.
                seen = tl.minimum((i_t + BLOCK_T - 1) // CHUNK * CHUNK, written)
                own = (o_t // CHUNK * CHUNK)[:, None]  # where the chunk of a token starts
                i_p = i_block * BLOCK + i_t
                p_p = (scores + i_p * BLOCK) + (r_t * BLOCK + o_k[None, :])
                for i_u in range(0, seen, BLOCK_K):
                    o_u = i_u + o_k
                    b_p = load_rows(p_rows, i_p, p_p, i_u, o_k, seen, EVEN_C, DESCRIPTORS)
                    b_p = tl.where(o_u[None, :] < own, b_p, 0.0)  # what is not earlier may be anything
                    m_u = o_u < seen
                    p_v = v + (first + i_u) * D
                    b_v = load_targets(
                        v_columns, first + i_u, p_v, i_d, o_k, m_u, D, EVEN_C, DESCRIPTORS, BLOCK_D
                    )
                    b_y = tl.dot(b_p, b_v, b_y, input_precision=PRECISION)
                    if MORE_D:
                        i_m = i_d + BLOCK_D
                        b_v = load_targets(
                            v_more, first + i_u, p_v, i_m, o_k, m_u, D, EVEN_C, DESCRIPTORS, MORE_D
                        )
                        b_m = tl.dot(b_p, b_v, b_m, input_precision=PRECISION)
            SCALE: tl.constexpr = PRESERVE and not SUPER
            p_y = raw + (i_block * BLOCK + i_t) * D if PRESERVE and SUPER else y + i_row * D
            store_y(
                b_y, p_y, norms, w0_norms, i_sequence, norm_parts, tokens - i_t, i_d, D,
                SCALE, BLOCK_T, BLOCK_D,
            )  # fmt: skip
            if MORE_D:
                store_y(
                    b_m, p_y, norms, w0_norms, i_sequence, norm_parts, tokens - i_t, i_d + BLOCK_D, D, SCALE,
                    BLOCK_T, MORE_D,
                )  # fmt: skip
    else:
        WIDTH: tl.constexpr = BLOCK_F + MORE_F
        i_tile = i_program - apply_tiles
        columns, parts = tl.cdiv(D, BLOCK_D), tl.cdiv(F, WIDTH)
        i_d = i_tile % columns * BLOCK_D
        i_part = i_tile // columns % parts
        i_block = (i_tile // (columns * parts)).to(tl.int64)
        i_f = i_part * WIDTH
        if NO_TOKENS:
            first, written, i_sequence, i_chunk, last = i_block * 0, 0, i_block, 0, 1
        else:
            first, _, written, i_sequence, i_chunk, last = load_block(blocks, i_block)
        if NO_TOKENS or (written > 0 and (WRITE_LAST or last == 0)):
            i_corner = i_d.to(tl.int64) * F + i_f
            i_state = i_sequence * D * F + i_corner
            p_state, p_shadow = state + i_state, next_shadow + i_state
            p_base = base + i_sequence * base_stride + i_corner if NO_TOKENS else p_state
            b_u, b_m = write_tokens(
                z, v, z_columns, z_more, v_columns, step_size + i_chunk, lr, first, first, written, i_d, i_f,
                D, F, CHUNK, HAS_STEPS and not NO_TOKENS, SUPER, EVEN_C, EVEN_D, EVEN_F, DESCRIPTORS,
                PRECISION, BLOCK_D, BLOCK_F, MORE_F, BLOCK_K,
            )  # fmt: skip
            left = F - i_f
            sums = add_to_state(b_u, p_base, p_state, p_shadow, D - i_d, left, F, 4, BLOCK_D, BLOCK_F)
            if MORE_F:
                p_base, p_state, p_shadow = p_base + BLOCK_F, p_state + BLOCK_F, p_shadow + BLOCK_F
                left -= BLOCK_F
                sums += add_to_state(b_m, p_base, p_state, p_shadow, D - i_d, left, F, 2, BLOCK_D, MORE_F)
            if PRESERVE:
                o_d = i_d + tl.arange(0, BLOCK_D)
                tl.store(next_norms + (i_sequence * parts + i_part) * D + o_d, sums, mask=o_d < D)


@triton.jit
def row_pointers(x, left, size, o_k, EVEN: tl.constexpr, ROWS: tl.constexpr):
    """To the first columns of rows, of which `left` are left: those past the end repeat the last."""
    r = tl.arange(0, ROWS)
    if not EVEN:
        r = tl.minimum(r, left - 1)
    return x + (r[:, None] * size + o_k[None, :])


@triton.jit
def load_rows(view, i_row, p, i_k, o_k, size, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Columns i_k and on of the rows of a tile: of its descriptor or at its pointers."""
    if DESCRIPTORS:
        return view.load([i_row.to(tl.int32), i_k])
    elif EVEN:
        return tl.load(p + i_k)
    else:
        return tl.load(p + i_k, mask=(i_k + o_k < size)[None, :], other=0.0)


@triton.jit
def load_targets(
    view, i_t, p_v, i_d, o_k, m_t, D, EVEN_C: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDTH: tl.constexpr
):
    """V of the tokens of a tile, zero past the end; `p_v` points at the first of them."""
    if DESCRIPTORS:
        return view.load([i_t.to(tl.int32), i_d])
    else:
        o_d = i_d + tl.arange(0, WIDTH)
        mask = (o_d < D)[None, :] if EVEN_C else m_t[:, None] & (o_d < D)[None, :]
        return tl.load(p_v + (o_k[:, None] * D + o_d[None, :]), mask=mask, other=0.0)


@triton.jit
def store_y(
    b_y, p_y, norms, w0_norms, i_sequence, parts, left, i_d, D,
    SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store a tile of y, of which `left` rows are left, times r with SCALE."""
    o_t, o_d = tl.arange(0, ROWS), i_d + tl.arange(0, COLUMNS)
    m_d = o_d < D
    if SCALE:
        norm = sum_partials(norms, i_sequence, o_d, m_d, parts, D)
        w0_norm = sum_partials(w0_norms, 0, o_d, m_d, parts, D)
        b_y *= row_ratio(w0_norm, norm)[None, :]
    mask = (o_t < left)[:, None] & m_d[None, :]
    tl.store(p_y + (o_t[:, None] * D + o_d[None, :]), b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def add_to_state(
    b_u, p_base, p_state, p_shadow, rows, columns, F,
    PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store `base` plus a tile, of which `rows` and `columns` are left, and the rounded copy of that; its row
    sums of squares. In 2 or 4 pieces: a whole tile of W beside its update would not fit in registers. The
    branch around a piece keeps the compiler from loading all of them at once."""
    WIDTH: tl.constexpr = COLUMNS // PIECES
    o_d = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(PIECES):
        if i * WIDTH < columns:
            o_f = (i * WIDTH + tl.arange(0, WIDTH))[None, :]
            o_w, m_w = o_d * F + o_f, (o_d < rows) & (o_f < columns)
            b_w = tl.load(p_base + o_w, mask=m_w, other=0.0).to(tl.float32)
            b_w += piece(b_u, i, PIECES, ROWS, COLUMNS)
            tl.store(p_state + o_w, b_w, mask=m_w)
            tl.store(p_shadow + o_w, b_w.to(p_shadow.dtype.element_ty), mask=m_w)
            b_w = tl.where(m_w, b_w, 0.0)  # columns past the end hold repeated ones
            sums += tl.sum(b_w * b_w, axis=1)
    return sums


@triton.jit
def column_pointers(x, i_c, size, o_k, EVEN: tl.constexpr, COLUMNS: tl.constexpr):
    """To columns i_c and on of rows o_k: those past the end repeat the last, what they make is not stored."""
    o_c = i_c + tl.arange(0, COLUMNS)
    if not EVEN:
        o_c = tl.minimum(o_c, size - 1)
    return x + (o_k[:, None] * size + o_c[None, :])


@triton.jit
def load_tokens(view, i_t, i_c, p, m_t, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Columns i_c and on of the rows of some tokens: of their descriptor or at their pointers."""
    if DESCRIPTORS:
        return view.load([i_t, i_c])
    elif EVEN:
        return tl.load(p)
    else:
        return tl.load(p, mask=m_t, other=0.0)


@triton.jit
def write_tokens(
    z, v, z_columns, z_more, v_columns, steps, lr, first, first_v, length, i_d, i_f, D, F, CHUNK,
    HAS_STEPS: tl.constexpr, SUPER: tl.constexpr, EVEN_C: tl.constexpr, EVEN_D: tl.constexpr,
    EVEN_F: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr, MORE_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum over `length` tokens of s_t v_t z_t^T, for both parts of a tile of W (the first twice if there is
    no second); see `next_scale` for chunks of a block that have step sizes of their own. `first`, `first_v`:
    where the tokens start in z and in v."""
    EACH: tl.constexpr = SUPER and HAS_STEPS
    o_k = tl.arange(0, BLOCK_K)
    p_v = column_pointers(v + first_v * D, i_d, D, o_k, EVEN_D, BLOCK_D)
    p_z = column_pointers(z + first * F, i_f, F, o_k, EVEN_F, BLOCK_F)
    b_g = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    b_m = b_g
    if MORE_F:
        p_m = column_pointers(z + first * F, i_f + BLOCK_F, F, o_k, EVEN_F, MORE_F)
        b_m = tl.zeros([BLOCK_D, MORE_F], tl.float32)
    span = CHUNK if EACH else length
    tiles = tl.cdiv(span, BLOCK_K)
    scale = lr * 0
    kept = scale
    for i_n in range(0, length // CHUNK * tiles if EACH else tiles):
        i_tile = i_n % tiles if EACH else i_n
        i_k = i_n // tiles * CHUNK + i_tile * BLOCK_K if EACH else i_n * BLOCK_K
        if EACH:
            after, kept, factor = next_scale(scale, kept, tl.load(steps + i_n // tiles))
            factor = tl.where(i_tile == 0, factor, 1.0)
            scale = after
            b_g *= factor
            if MORE_F:
                b_m *= factor
        m_t = (i_tile * BLOCK_K + o_k < span)[:, None]
        i_t, i_v = first.to(tl.int32) + i_k, first_v.to(tl.int32) + i_k
        o_z, o_v = i_k.to(tl.int64) * F, i_k.to(tl.int64) * D
        b_v = load_tokens(v_columns, i_v, i_d, p_v + o_v, m_t, EVEN_C, DESCRIPTORS)
        b_z = load_tokens(z_columns, i_t, i_f, p_z + o_z, m_t, EVEN_C, DESCRIPTORS)
        b_g = tl.dot(tl.trans(b_v), b_z, b_g, input_precision=PRECISION)
        if MORE_F:
            b_z = load_tokens(z_more, i_t, i_f + BLOCK_F, p_m + o_z, m_t, EVEN_C, DESCRIPTORS)
            b_m = tl.dot(tl.trans(b_v), b_z, b_m, input_precision=PRECISION)
    if not EACH:
        scale = tl.load(steps, mask=length > 0, other=0.0) if HAS_STEPS else lr
    return b_g * scale, b_m * scale
