"""The state of the scan's backward: leave a block (G), enter the one before it (W). See `triton_bwd`.

Every program owns a tile [d, f] of its sequence's state and works in place, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt_kernels.ops.scan.triton_fwd import halve, load_block, next_scale


@triton.jit
def quarter(x, i: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns [i, i + 1) COLUMNS / 4: a whole tile of the state beside x would not fit in registers."""
    left, right = halve(x, ROWS, COLUMNS)
    left, right = halve(left if i < 2 else right, ROWS, COLUMNS // 2)
    return left if i % 2 == 0 else right


@triton.jit
def tile_quarter(i_d, i_f, i: tl.constexpr, D, F, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr):
    """Offsets of a quarter from the corner of its tile of W, and their mask."""
    o_d = tl.arange(0, BLOCK_D)[:, None]
    o_f = (i * (BLOCK_F // 4) + tl.arange(0, BLOCK_F // 4))[None, :]
    return o_d * F + o_f, (i_d * BLOCK_D + o_d < D) & (i_f * BLOCK_F + o_f < F)


@triton.jit
def outer_products(
    a, z, tokens, i_d, i_f, D, F, EVEN_T: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile [d, f] of the sum of a_t z_t^T over tokens; a and z point at the first."""
    b = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    o_k = tl.arange(0, BLOCK_K)
    # Columns past the end repeat the last one: what they make is not stored.
    o_d, o_f = i_d * BLOCK_D + tl.arange(0, BLOCK_D), i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    r_d = o_d if EVEN_D else tl.minimum(o_d, D - 1)
    r_f = o_f if EVEN_F else tl.minimum(o_f, F - 1)
    p_a = a + (o_k[:, None] * D + r_d[None, :])
    p_z = z + (o_k[:, None] * F + r_f[None, :])
    for i_k in range(0, tokens, BLOCK_K):
        if EVEN_T:
            b_a, b_z = tl.load(p_a), tl.load(p_z)
        else:
            m_k = (i_k + o_k < tokens)[:, None]
            b_a, b_z = tl.load(p_a, mask=m_k, other=0.0), tl.load(p_z, mask=m_k, other=0.0)
        b = tl.dot(tl.trans(b_a), b_z, b, input_precision=PRECISION)
        p_a += BLOCK_K * D
        p_z += BLOCK_K * F
    return b


@triton.jit
def scaled_outer_products(
    a, z, steps, tokens, CHUNK, i_d, i_f, D, F, EVEN_C: tl.constexpr, EVEN_D: tl.constexpr,
    EVEN_F: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same of whole chunks, each times its own step, in one loop, so that loads run ahead across
    chunks."""
    o_k = tl.arange(0, BLOCK_K)
    o_d, o_f = i_d * BLOCK_D + tl.arange(0, BLOCK_D), i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    r_d = o_d if EVEN_D else tl.minimum(o_d, D - 1)
    r_f = o_f if EVEN_F else tl.minimum(o_f, F - 1)
    tiles = tl.cdiv(CHUNK, BLOCK_K)
    b = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    scale = tl.zeros((), tl.float32)
    for i in range(0, tokens // CHUNK * tiles):
        i_tile = i % tiles
        i_k = i // tiles * CHUNK + i_tile * BLOCK_K
        p_a = a + i_k * D + (o_k[:, None] * D + r_d[None, :])
        p_z = z + i_k * F + (o_k[:, None] * F + r_f[None, :])
        scale, factor, counts = next_scale(scale, tl.load(steps + i // tiles), i_tile == 0)
        m_k = (i_tile * BLOCK_K + o_k < tl.where(counts, CHUNK, 0))[:, None]
        b_a, b_z = tl.load(p_a, mask=m_k, other=0.0), tl.load(p_z, mask=m_k, other=0.0)
        b = tl.dot(tl.trans(b_a), b_z, b * factor, input_precision=PRECISION)
    return b * scale


@triton.jit
def scan_bwd_leave_kernel(
    z, dy, weight, grad, grad_shadow, products, ratio, pull, blocks, D, F, BLOCK,
    RATIO: tl.constexpr, LOCAL: tl.constexpr, PRESERVE: tl.constexpr, SCALE: tl.constexpr,
    SHADOW: tl.constexpr, EVEN_T: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What dY^T Z of a block is for, on one tile [d, f]: G += dY'^T Z - diag(c) W or, with RATIO, row sums
    of W * (dY^T Z), the gradient of r, which have to be complete before c is known.

    LOCAL: dy holds the launch's blocks, not all tokens. SCALE: dy is dY, and r scales the product.
    """
    columns = tl.cdiv(D, BLOCK_D)
    tiles = columns * tl.cdiv(F, BLOCK_F)
    i_row, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_d, i_f = i_tile % columns, i_tile // columns
    first, tokens, _, i_sequence, _, _ = load_block(blocks, i_row)
    b = outer_products(
        dy + (i_row.to(tl.int64) * BLOCK if LOCAL else first) * D, z + first * F, tokens,
        i_d, i_f, D, F, EVEN_T, EVEN_D, EVEN_F, PRECISION, BLOCK_D, BLOCK_F, BLOCK_K,
    )  # fmt: skip
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_state = (i_sequence * D + i_d * BLOCK_D) * F + i_f * BLOCK_F
    if RATIO:
        sums = tl.zeros([BLOCK_D], tl.float32)
        for i in tl.static_range(4):
            o_w, m_w = tile_quarter(i_d, i_f, i, D, F, BLOCK_D, BLOCK_F)
            b_w = tl.load(weight + i_state + o_w, mask=m_w, other=0.0)
            sums += tl.sum(b_w * quarter(b, i, BLOCK_D, BLOCK_F), axis=1)
        tl.store(products + (i_sequence * tl.cdiv(F, BLOCK_F) + i_f) * D + o_d, sums, mask=m_d)
    else:
        if SCALE:
            b *= tl.load(ratio + i_sequence * D + o_d, mask=m_d, other=0.0)[:, None]
        if PRESERVE:
            b_pull = tl.load(pull + i_sequence * D + o_d, mask=m_d, other=0.0)[:, None]
        for i in tl.static_range(4):
            o_w, m_w = tile_quarter(i_d, i_f, i, D, F, BLOCK_D, BLOCK_F)
            b_g = quarter(b, i, BLOCK_D, BLOCK_F)
            if PRESERVE:
                b_g -= b_pull * tl.load(weight + i_state + o_w, mask=m_w, other=0.0)
            b_g += tl.load(grad + i_state + o_w, mask=m_w, other=0.0)
            tl.store(grad + i_state + o_w, b_g, mask=m_w)
            if SHADOW:
                tl.store(grad_shadow + i_state + o_w, b_g.to(grad_shadow.dtype.element_ty), mask=m_w)


@triton.jit
def scan_bwd_enter_kernel(
    z, v, base, weight, shadow, norms, step_size, blocks, lr, D, F, CHUNK, BLOCK, base_stride,
    LAST: tl.constexpr, SUBTRACT: tl.constexpr, HAS_STEPS: tl.constexpr, PRESERVE: tl.constexpr,
    SUPER: tl.constexpr, SHADOW: tl.constexpr, EVEN_C: tl.constexpr, EVEN_D: tl.constexpr,
    EVEN_F: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [d, f] of the state that a block reads: `base`, or `base` less the block's write.

    The block is that of a row if it is the last of its sequence (LAST), else the one before the row.
    """
    columns = tl.cdiv(D, BLOCK_D)
    tiles = columns * tl.cdiv(F, BLOCK_F)
    i_row, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_d, i_f = i_tile % columns, i_tile // columns
    first, _, written, i_sequence, i_chunk, last = load_block(blocks, i_row)
    if last == 1 or not LAST:
        if not LAST:  # every block but the last of a sequence is full
            first -= BLOCK
            written = written * 0 + BLOCK
            i_chunk -= BLOCK // CHUNK
        i_corner = i_d.to(tl.int64) * BLOCK_D * F + i_f * BLOCK_F
        i_state = i_sequence * D * F + i_corner
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        if SUBTRACT:
            p_v, p_z = v + first * D, z + first * F
            step = lr
            if SUPER and HAS_STEPS:
                step = 1.0
                b = scaled_outer_products(
                    p_v, p_z, step_size + i_chunk, written, CHUNK, i_d, i_f, D, F,
                    EVEN_C, EVEN_D, EVEN_F, PRECISION, BLOCK_D, BLOCK_F, BLOCK_K,
                )  # fmt: skip
            else:
                if HAS_STEPS:
                    step = tl.load(step_size + i_chunk, mask=written > 0, other=0.0)
                b = outer_products(
                    p_v, p_z, written, i_d, i_f, D, F,
                    EVEN_C, EVEN_D, EVEN_F, PRECISION, BLOCK_D, BLOCK_F, BLOCK_K,
                )  # fmt: skip
        squares = tl.zeros([BLOCK_D], tl.float32)
        for i in tl.static_range(4):
            o_w, m_w = tile_quarter(i_d, i_f, i, D, F, BLOCK_D, BLOCK_F)
            p_base = base + i_sequence * base_stride + i_corner
            b_w = tl.load(p_base + o_w, mask=m_w, other=0.0).to(tl.float32)
            if SUBTRACT:
                b_w -= tl.where(m_w, step * quarter(b, i, BLOCK_D, BLOCK_F), 0.0)
            squares += tl.sum(b_w * b_w, axis=1)
            tl.store(weight + i_state + o_w, b_w, mask=m_w)
            if SHADOW:
                tl.store(shadow + i_state + o_w, b_w.to(shadow.dtype.element_ty), mask=m_w)
        if PRESERVE:
            o_part = (i_sequence * tl.cdiv(F, BLOCK_F) + i_f) * D + o_d
            tl.store(norms + o_part, squares, mask=o_d < D)
