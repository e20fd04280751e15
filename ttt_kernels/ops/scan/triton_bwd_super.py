"""What a super-chunk adds to the scan's backward: its writes in attention form.

With P [t, u] = s_u (z_t . z_u) for u in an earlier chunk than t, a block of several chunks reads
`raw = W z + P v`, so that (`eager` has the derivation)

    dV  = s Z G^T + P^T dY''             dZ = s V G + dY'' W + (M + M^T) Z
    M [t, u] = s_u (dY''_t . v_u)        for u in an earlier chunk

Without row-norm preservation dY'' = dY, and P and M of every block come from one launch before the
first block. With it each block first takes

    apply    raw, by the forward's step kernel
    rescale  along the chunks k: ||W_k||^2, r_k, c_k = (dr r)_k / ||W_k||^2; then in reverse, with
             cbar = sum of c over the later chunks: dY'' = r dY - cbar s v and
             dV += s extra, extra = -cbar (raw + (same-chunk P) v)
    scores   M, where u <= t in the same chunk gets -(cbar s v)_t . s v_u, and half of it on the diagonal

so that M has entries for u <= t only, and M + M^T is what multiplies Z.

The step size gradient takes the exact products before they are rounded: sum_t (z_t . z_u) (dY''_t . v_u)
from the accumulators of `scores`, sum_d v extra from `rescale`, <V^T Z, G> from the state kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops.scan.blocks import BlockTable
from ttt_kernels.ops.scan.triton_fwd import FLOOR, Forward, load_block, scan_fwd_step_kernel, sum_partials
from ttt_kernels.ops.triton_launch import launch
from ttt_kernels.types import ceil_div


@triton.jit
def row_products(
    a, b, r_t, r_u, size, acc, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """acc [t, u] + a_t . b_u, for rows of `size` numbers."""
    o_k = tl.arange(0, BLOCK_K)
    p_a = a + r_t[:, None] * size + o_k[None, :]
    p_b = b + r_u[:, None] * size + o_k[None, :]
    for i_k in range(0, size, BLOCK_K):
        if EVEN:
            b_a, b_b = tl.load(p_a + i_k), tl.load(p_b + i_k)
        else:
            m_k = (i_k + o_k < size)[None, :]
            b_a, b_b = tl.load(p_a + i_k, mask=m_k, other=0.0), tl.load(p_b + i_k, mask=m_k, other=0.0)
        acc = tl.dot(b_a, tl.trans(b_b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def scan_bwd_scores_kernel(
    z, v, dy, pulled, scores, mixed, dsteps, step_size, blocks,
    lr, D, F, CHUNK, BLOCK, dstep_width, dstep_offset,
    HAS_STEPS: tl.constexpr, PRESERVE: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """M, without preservation P too, and the step size gradient of P: one tile [t, u], u <= t.

    Readers mask the chunk relation they want; what no reader reads is not written. With preservation
    `dy` (dY''), `pulled` (-cbar s v) and `mixed` are those of the launch's blocks only.
    """
    rows = tl.cdiv(BLOCK, BLOCK_T)
    i_t, i_u = tl.program_id(0) % rows, tl.program_id(0) // rows % rows
    i_row = tl.program_id(0) // (rows * rows)
    first, tokens, written, _, i_chunk, _ = load_block(blocks, i_row)
    if i_u <= i_t and i_t * BLOCK_T < tokens and i_u * BLOCK_T < written:
        o_t, o_u = i_t * BLOCK_T + tl.arange(0, BLOCK_T), i_u * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t, m_u = o_t < tokens, o_u < written
        r_t, r_u = tl.minimum(o_t, tokens - 1), first + tl.minimum(o_u, tokens - 1)
        i_local = i_row.to(tl.int64) * BLOCK if PRESERVE else first
        c_t, c_u = (o_t // CHUNK)[:, None], (o_u // CHUNK)[None, :]
        earlier = (c_u < c_t) & m_t[:, None] & m_u[None, :]
        b_zero = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        b_step = tl.where(m_u, lr, 0.0)
        if HAS_STEPS:
            b_step = tl.load(step_size + i_chunk + o_u // CHUNK, mask=m_u, other=0.0)
        b_m = row_products(dy, v, i_local + r_t, r_u, D, b_zero, EVEN_D, PRECISION, BLOCK_K)
        b_m = tl.where(earlier, b_m, 0.0)
        if HAS_STEPS or not PRESERVE:
            b_p = row_products(z, z, first + r_t, r_u, F, b_zero, EVEN_F, PRECISION, BLOCK_K)
            if HAS_STEPS:
                b_dstep = tl.sum(b_p * b_m, axis=0)
                i_part = dstep_offset + i_t * rows + i_u
                stop = tl.minimum((i_u + 1) * BLOCK_T, written)
                for i_c in range(i_u * BLOCK_T // CHUNK, tl.cdiv(stop, CHUNK)):
                    dstep = tl.sum(tl.where(o_u // CHUNK == i_c, b_dstep, 0.0), axis=0)
                    tl.store(dsteps + (i_chunk + i_c) * dstep_width + i_part, dstep)
            if not PRESERVE:
                p_p = scores + (first + o_t)[:, None] * BLOCK + o_u[None, :]
                b_p = (b_p * b_step[None, :]).to(scores.dtype.element_ty)
                tl.store(p_p, b_p, mask=m_t[:, None] & m_u[None, :])
        if PRESERVE:
            if (i_t * BLOCK_T) // CHUNK <= (i_u * BLOCK_T + BLOCK_T - 1) // CHUNK:
                b_g = row_products(pulled, v, i_local + r_t, r_u, D, b_zero, EVEN_D, PRECISION, BLOCK_K)
                share = tl.where(o_u[None, :] < o_t[:, None], 1.0, 0.5)
                same = (c_u == c_t) & (o_u[None, :] <= o_t[:, None]) & m_t[:, None]
                b_m += tl.where(same, b_g * share, 0.0)
        p_m = mixed + (i_local + o_t)[:, None] * BLOCK + o_u[None, :]
        b_m = (b_m * b_step[None, :]).to(mixed.dtype.element_ty)
        tl.store(p_m, b_m, mask=m_t[:, None] & m_u[None, :])


@triton.jit
def scan_bwd_rescale_kernel(
    raw, dy, v, dy_block, pulled, norms, w0_norms, ratios, pulls, pull, norm_grad, dsteps, scores,
    step_size, blocks, lr, D, CHUNK, BLOCK, parts, dstep_width, dstep_offset,
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
        b_ratio = tl.sqrt(w0_norm / tl.maximum(norm, FLOOR))
        dratio = tl.zeros([BLOCK_D], tl.float32)
        growth = tl.zeros([BLOCK_D], tl.float32)
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
                    p_p = scores + (first + o_t)[:, None] * BLOCK + o_u[None, :]
                    b_p = tl.load(p_p, mask=(o_t < stop)[:, None] & m_u[None, :], other=0.0)
                    p_v = v + (first + o_u)[:, None] * D + o_d[None, :]
                    b_v = tl.load(p_v, mask=m_u[:, None] & m_d[None, :], other=0.0)
                    b_same = tl.dot(b_p, b_v, b_same, input_precision=PRECISION)
                b_v = tl.load(v + o_y, mask=m_y, other=0.0).to(tl.float32)
                growth += tl.sum(b_v * (2 * b_raw + b_same), axis=0)
                tl.store(p_raw, b_raw + b_same, mask=m_y)
        dratio *= b_ratio
        total += dratio
        o_c = i_c // CHUNK * D
        tl.store(p_ratio + o_c, b_ratio, mask=m_d)
        tl.store(p_pull + o_c, tl.where(norm > FLOOR, dratio / tl.maximum(norm, FLOOR), 0.0), mask=m_d)
        if i_c < written:
            norm += growth * (tl.load(step_size + i_chunk + i_c // CHUNK) if HAS_STEPS else lr)
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
        dstep = tl.zeros([BLOCK_D], tl.float32)
        for i_t in range(i_c, stop, BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            m_y = (o_t < stop)[:, None] & m_d[None, :]
            o_y = (first + o_t)[:, None] * D + o_d[None, :]
            o_local = (i_local + o_t)[:, None] * D + o_d[None, :]
            b_v = tl.load(v + o_y, mask=m_y, other=0.0).to(tl.float32)
            b_dy = tl.load(dy + o_y, mask=m_y, other=0.0).to(tl.float32)
            b_extra = -after[None, :] * tl.load(raw + o_local, mask=m_y, other=0.0)
            b_pulled = -after[None, :] * (step * b_v)
            tl.store(raw + o_local, b_extra, mask=m_y)
            tl.store(pulled + o_local, b_pulled.to(pulled.dtype.element_ty), mask=m_y)
            b_dy = b_ratio[None, :] * b_dy + b_pulled
            tl.store(dy_block + o_local, b_dy.to(dy_block.dtype.element_ty), mask=m_y)
            dstep += tl.sum(b_v * b_extra, axis=0)
        if HAS_STEPS:
            if i_c < written:
                p_dstep = dsteps + (i_chunk + i_k) * dstep_width + dstep_offset + i_d
                tl.store(p_dstep, tl.sum(dstep, axis=0))
        after += tl.load(p_pull + i_k * D, mask=m_d, other=0.0)
    tl.store(pull + i_sequence * D + o_d, after, mask=m_d)
