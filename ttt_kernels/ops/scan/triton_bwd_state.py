"""The state of the scan's backward: leave a block (G), enter the one before it (W). See `triton_bwd`.

Every program owns a tile [BLOCK_D, BLOCK_F + MORE_F] of its sequence's state and works in place, in float32.
What it sums over tokens is what the forward's write sums (`triton_fwd_step`); `a_columns` [k, d], `z_columns`
[k, f] and `z_more` are descriptors of dY' or V and of Z, or None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt_kernels.ops.scan.triton_fwd_step import load_block, piece, write_tokens


@triton.jit
def locate_tile(D, F, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, MORE_F: tl.constexpr):
    """Row of the block table, first row and column of the tile of the state, and which column of tiles."""
    columns = tl.cdiv(D, BLOCK_D)
    tiles = columns * tl.cdiv(F, BLOCK_F + MORE_F)
    i_row, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_part = i_tile // columns
    return i_row, i_tile % columns * BLOCK_D, i_part * (BLOCK_F + MORE_F), i_part


@triton.jit
def tile_piece(i_d, i_f, i: tl.constexpr, D, F, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of a piece from the corner of its tile of W, and their mask."""
    o_d, o_f = tl.arange(0, ROWS)[:, None], (i * WIDTH + tl.arange(0, WIDTH))[None, :]
    return o_d * F + o_f, (i_d + o_d < D) & (i_f + o_f < F)


@triton.jit
def row_sums(
    b, p_weight, i_d, i_f, D, F, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Row sums of W times a tile."""
    WIDTH: tl.constexpr = COLUMNS // PIECES
    sums = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(PIECES):
        if i_f + i * WIDTH < F:
            o_w, m_w = tile_piece(i_d, i_f, i, D, F, ROWS, WIDTH)
            b_w = tl.load(p_weight + o_w, mask=m_w, other=0.0)
            sums += tl.sum(b_w * piece(b, i, PIECES, ROWS, COLUMNS), axis=1)
    return sums


@triton.jit
def add_to_gradient(
    b, p_weight, p_grad, p_shadow, b_ratio, b_pull, i_d, i_f, D, F, SCALE: tl.constexpr,
    PRESERVE: tl.constexpr, SHADOW: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """G += r b - c W for a tile b."""
    WIDTH: tl.constexpr = COLUMNS // PIECES
    for i in tl.static_range(PIECES):
        if i_f + i * WIDTH < F:
            o_w, m_w = tile_piece(i_d, i_f, i, D, F, ROWS, WIDTH)
            b_g = piece(b, i, PIECES, ROWS, COLUMNS)
            if SCALE:
                b_g *= b_ratio
            if PRESERVE:
                b_g -= b_pull * tl.load(p_weight + o_w, mask=m_w, other=0.0)
            b_g += tl.load(p_grad + o_w, mask=m_w, other=0.0)
            tl.store(p_grad + o_w, b_g, mask=m_w)
            if SHADOW:
                tl.store(p_shadow + o_w, b_g.to(p_shadow.dtype.element_ty), mask=m_w)


@triton.jit
def subtract_from_state(
    b, p_base, p_weight, p_shadow, i_d, i_f, D, F, SUBTRACT: tl.constexpr, SHADOW: tl.constexpr,
    PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store `base` less a tile, and the rounded copy of that; its row sums of squares."""
    WIDTH: tl.constexpr = COLUMNS // PIECES
    sums = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(PIECES):
        if i_f + i * WIDTH < F:
            o_w, m_w = tile_piece(i_d, i_f, i, D, F, ROWS, WIDTH)
            b_w = tl.load(p_base + o_w, mask=m_w, other=0.0).to(tl.float32)
            if SUBTRACT:
                b_w -= tl.where(m_w, piece(b, i, PIECES, ROWS, COLUMNS), 0.0)
            sums += tl.sum(b_w * b_w, axis=1)
            tl.store(p_weight + o_w, b_w, mask=m_w)
            if SHADOW:
                tl.store(p_shadow + o_w, b_w.to(p_shadow.dtype.element_ty), mask=m_w)
    return sums


@triton.jit
def scan_bwd_leave_kernel(
    z, dy, weight, grad, grad_shadow, products, ratio, pull, blocks, z_columns, z_more, a_columns, D, F,
    BLOCK, RATIO: tl.constexpr, LOCAL: tl.constexpr, PRESERVE: tl.constexpr, SCALE: tl.constexpr,
    SHADOW: tl.constexpr, EVEN_T: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    MORE_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What dY^T Z of a block is for, on one tile: G += dY'^T Z - diag(c) W or, with RATIO, row sums of
    W * (dY^T Z), the gradient of r, which have to be complete before c is known.

    LOCAL: dy holds the launch's blocks, not all tokens. SCALE: dy is dY, and r scales the product.
    """
    i_row, i_d, i_f, i_part = locate_tile(D, F, BLOCK_D, BLOCK_F, MORE_F)
    first, tokens, _, i_sequence, _, _ = load_block(blocks, i_row)
    first_dy = i_row.to(tl.int64) * BLOCK if LOCAL else first
    b, b_m = write_tokens(
        z, dy, z_columns, z_more, a_columns, ratio, 1.0, first, first_dy, tokens, i_d, i_f, D, F, BLOCK,
        False, False, EVEN_T, EVEN_D, EVEN_F, DESCRIPTORS, PRECISION, BLOCK_D, BLOCK_F, MORE_F, BLOCK_K,
    )  # fmt: skip
    o_d = i_d + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_state = (i_sequence * D + i_d) * F + i_f
    p_weight = weight + i_state
    if RATIO:
        sums = row_sums(b, p_weight, i_d, i_f, D, F, 4, BLOCK_D, BLOCK_F)
        if MORE_F:
            sums += row_sums(b_m, p_weight + BLOCK_F, i_d, i_f + BLOCK_F, D, F, 2, BLOCK_D, MORE_F)
        tl.store(products + (i_sequence * tl.cdiv(F, BLOCK_F + MORE_F) + i_part) * D + o_d, sums, mask=m_d)
    else:
        b_ratio, b_pull = 1.0, 0.0
        if SCALE:
            b_ratio = tl.load(ratio + i_sequence * D + o_d, mask=m_d, other=0.0)[:, None]
        if PRESERVE:
            b_pull = tl.load(pull + i_sequence * D + o_d, mask=m_d, other=0.0)[:, None]
        p_grad, p_shadow = grad + i_state, grad_shadow + i_state
        add_to_gradient(
            b, p_weight, p_grad, p_shadow, b_ratio, b_pull, i_d, i_f, D, F,
            SCALE, PRESERVE, SHADOW, 4, BLOCK_D, BLOCK_F,
        )  # fmt: skip
        if MORE_F:
            add_to_gradient(
                b_m, p_weight + BLOCK_F, p_grad + BLOCK_F, p_shadow + BLOCK_F, b_ratio, b_pull, i_d,
                i_f + BLOCK_F, D, F, SCALE, PRESERVE, SHADOW, 2, BLOCK_D, MORE_F,
            )  # fmt: skip


@triton.jit
def scan_bwd_enter_kernel(
    z, v, base, weight, shadow, norms, step_size, blocks, z_columns, z_more, a_columns, lr, D, F, CHUNK,
    BLOCK, base_stride, LAST: tl.constexpr, SUBTRACT: tl.constexpr, HAS_STEPS: tl.constexpr,
    PRESERVE: tl.constexpr, SUPER: tl.constexpr, SHADOW: tl.constexpr, EVEN_C: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_F: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, MORE_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the state that a block reads: `base`, or `base` less the block's write.

    The block is that of a row if it is the last of its sequence (LAST), else the one before the row.
    """
    i_row, i_d, i_f, i_part = locate_tile(D, F, BLOCK_D, BLOCK_F, MORE_F)
    first, _, written, i_sequence, i_chunk, last = load_block(blocks, i_row)
    if last == 1 or not LAST:
        if not LAST:  # every block but the last of a sequence is full
            first -= BLOCK
            written = written * 0 + BLOCK
            i_chunk -= BLOCK // CHUNK
        b = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
        b_m = b
        if SUBTRACT:
            b, b_m = write_tokens(
                z, v, z_columns, z_more, a_columns, step_size + i_chunk, lr, first, first, written, i_d, i_f,
                D, F, CHUNK, HAS_STEPS, SUPER, EVEN_C, EVEN_D, EVEN_F, DESCRIPTORS, PRECISION,
                BLOCK_D, BLOCK_F, MORE_F, BLOCK_K,
            )  # fmt: skip
        i_corner = i_d.to(tl.int64) * F + i_f
        i_state = i_sequence * D * F + i_corner
        p_base = base + i_sequence * base_stride + i_corner
        p_weight, p_shadow = weight + i_state, shadow + i_state
        sums = subtract_from_state(
            b, p_base, p_weight, p_shadow, i_d, i_f, D, F, SUBTRACT, SHADOW, 4, BLOCK_D, BLOCK_F
        )
        if MORE_F:
            sums += subtract_from_state(
                b_m, p_base + BLOCK_F, p_weight + BLOCK_F, p_shadow + BLOCK_F, i_d, i_f + BLOCK_F, D, F,
                SUBTRACT, SHADOW, 2, BLOCK_D, MORE_F,
            )  # fmt: skip
        if PRESERVE:
            o_d = i_d + tl.arange(0, BLOCK_D)
            o_part = (i_sequence * tl.cdiv(F, BLOCK_F + MORE_F) + i_part) * D + o_d
            tl.store(norms + o_part, sums, mask=o_d < D)
