"""The kernels that a super-chunk needs besides the step: the products of its keys, and with row-norm
preservation the ratios of its chunks. See `triton_fwd`."""

from __future__ import annotations

import triton
import triton.language as tl

from ttt_kernels.ops.scan.triton_fwd_step import load_block, row_ratio, sum_partials


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
