"""The scan's backward as fused kernels: blocks in reverse, the state recomputed by subtraction.

With G the gradient that reaches the state after block n, W_n the state it reads, and dY' = dY r (r = 1
without row-norm preservation), a block takes these launches:

    norm      r, c = (dr r) / ||W_n||^2, dY'                    only with row-norm preservation
    token     dZ = s V G + dY' W_n,   dV = s Z G^T              from rounded copies of G and W_n
    state     G <- G + dY'^T Z - diag(c) W_n,   W_{n-1} = W_n - s V^T Z

A launch covers block n of every sequence (`blocks`). `state` leaves block n and enters block n - 1 tile
by tile, in place, and emits the rounded copies that the next token launch reads. On the way it sums,
per tile and from its float32 accumulators, what belongs to the block that it enters:

    ds = <V^T Z, G>,    ||W||^2 = rowsum W^2,    dr = rowsum W * (dY^T Z)

The last block of a sequence is entered from the carried state, which is copied, never modified; the
state before the first block is the known one, to the bit. Partial sums lie in buffers of their own and
are added in a fixed order.

A super-chunk adds three launches, in `triton_bwd_super`; the state and token kernels here serve both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops._row_norm import square_norm
from ttt_kernels.ops.scan.blocks import BlockTable, block_table
from ttt_kernels.ops.scan.heuristics import backward_tiles, fused_super_chunk
from ttt_kernels.ops.scan.triton_bwd_super import SuperChunks
from ttt_kernels.ops.scan.triton_fwd import FLOOR, load_block, sum_partials, write_tokens
from ttt_kernels.ops.triton_launch import architecture, input_precision, launch
from ttt_kernels.types import ceil_div


@triton.jit
def scan_bwd_state_kernel(
    z, v, dy, dy_block, base, weight, shadow, grad, grad_shadow, ratio, pull, norms, products, dsteps,
    step_size, blocks, lr, D, F, CHUNK, BLOCK, base_stride, dstep_width,
    LEAVE: tl.constexpr, ENTER: tl.constexpr, SUBTRACT: tl.constexpr, HAS_GRAD: tl.constexpr,
    HAS_STEPS: tl.constexpr, PRESERVE: tl.constexpr, SUPER: tl.constexpr, SHADOW: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_C: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_D, BLOCK_F] of G and W: leave the block of a row, enter the one before it.

    Without LEAVE the row is the block to enter, for the last block of a sequence. `base` holds the
    state after the block to enter (SUBTRACT) or before it.
    """
    columns = tl.cdiv(D, BLOCK_D)
    tiles = columns * tl.cdiv(F, BLOCK_F)
    i_row = tl.program_id(0) // tiles
    i_tile = tl.program_id(0) % tiles
    i_d, i_f = i_tile % columns, i_tile // columns
    first, tokens, written, i_sequence, i_chunk, last = load_block(blocks, i_row)
    if LEAVE or last == 1:
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
        m_d, m_f = o_d < D, o_f < F
        m_w = m_d[:, None] & m_f[None, :]
        o_w = o_d[:, None].to(tl.int64) * F + o_f[None, :]
        i_state = i_sequence * D * F
        b_acc = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
        if LEAVE:
            p_dy = dy
            if PRESERVE and SUPER:
                p_dy = dy_block + (i_row.to(tl.int64) * BLOCK - first) * D
            b_acc = write_tokens(
                z, p_dy, first, 0, tokens, o_d, o_f, D, F, b_acc, EVEN_T, EVEN_D, EVEN_F, PRECISION, BLOCK_K
            )
            if PRESERVE:
                if not SUPER:
                    b_acc *= tl.load(ratio + i_sequence * D + o_d, mask=m_d, other=0.0)[:, None]
                b_pull = tl.load(pull + i_sequence * D + o_d, mask=m_d, other=0.0)
                b_acc -= b_pull[:, None] * tl.load(weight + i_state + o_w, mask=m_w, other=0.0)
            b_acc += tl.load(grad + i_state + o_w, mask=m_w, other=0.0)
            tl.store(grad + i_state + o_w, b_acc, mask=m_w)
            if SHADOW:
                tl.store(grad_shadow + i_state + o_w, b_acc.to(grad_shadow.dtype.element_ty), mask=m_w)
        if ENTER:
            if LEAVE:  # every block but the last of a sequence is full
                first -= BLOCK
                tokens, written = BLOCK, BLOCK
                i_chunk -= BLOCK // CHUNK
                tl.debug_barrier()  # other threads of this program have stored G
            b_w = tl.load(base + i_sequence * base_stride + o_w, mask=m_w, other=0.0).to(tl.float32)
            if SUBTRACT or HAS_GRAD and HAS_STEPS:
                for i_c in range(0, written, CHUNK):
                    b_acc = write_tokens(
                        z, v, first, i_c, i_c + CHUNK, o_d, o_f, D, F, tl.zeros_like(b_acc),
                        EVEN_C, EVEN_D, EVEN_F, PRECISION, BLOCK_K,
                    )  # fmt: skip
                    i_step = i_chunk + i_c // CHUNK
                    step = lr
                    if HAS_STEPS:
                        step = tl.load(step_size + i_step)
                        if HAS_GRAD:
                            b_g = tl.load(grad + i_state + o_w, mask=m_w, other=0.0)
                            dstep = tl.sum(tl.sum(b_acc * b_g, axis=1), axis=0)
                            tl.store(dsteps + i_step * dstep_width + i_tile, dstep)
                    if SUBTRACT:
                        b_w -= step * b_acc
            tl.store(weight + i_state + o_w, b_w, mask=m_w)
            if SHADOW:
                tl.store(shadow + i_state + o_w, b_w.to(shadow.dtype.element_ty), mask=m_w)
            if PRESERVE:
                o_part = (i_sequence * tl.cdiv(F, BLOCK_F) + i_f) * D + o_d
                tl.store(norms + o_part, tl.sum(b_w * b_w, axis=1), mask=m_d)
                if not SUPER:
                    b_acc = write_tokens(
                        z, dy, first, 0, tokens, o_d, o_f, D, F, tl.zeros_like(b_acc),
                        EVEN_T, EVEN_D, EVEN_F, PRECISION, BLOCK_K,
                    )  # fmt: skip
                    tl.debug_barrier()
                    b_w = tl.load(weight + i_state + o_w, mask=m_w, other=0.0)
                    tl.store(products + o_part, tl.sum(b_acc * b_w, axis=1), mask=m_d)


@triton.jit
def scan_bwd_norm_kernel(
    dy, dy_block, norms, products, w0_norms, ratio, pull, norm_grad, blocks, D, BLOCK, parts,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """r = ||w0|| / ||W||, c = (dr r) / ||W||^2, dY' = r dY of a block, and norm_grad += dr r."""
    columns, rows = tl.cdiv(D, BLOCK_D), tl.cdiv(BLOCK, BLOCK_T)
    i_d = tl.program_id(0) % columns
    i_t = tl.program_id(0) // columns % rows
    i_row = tl.program_id(0) // (columns * rows)
    first, tokens, _, i_sequence, _, _ = load_block(blocks, i_row)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    norm = sum_partials(norms, i_sequence, o_d, m_d, parts, D)
    b_ratio = tl.sqrt(tl.load(w0_norms + o_d, mask=m_d, other=0.0) / tl.maximum(norm, FLOOR))
    if i_t == 0:
        dratio = b_ratio * sum_partials(products, i_sequence, o_d, m_d, parts, D)
        o_s = i_sequence * D + o_d
        tl.store(ratio + o_s, b_ratio, mask=m_d)
        tl.store(pull + o_s, tl.where(norm > FLOOR, dratio / tl.maximum(norm, FLOOR), 0.0), mask=m_d)
        tl.store(norm_grad + o_s, tl.load(norm_grad + o_s, mask=m_d, other=0.0) + dratio, mask=m_d)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_y = (o_t < tokens)[:, None] & m_d[None, :]
    b_dy = tl.load(dy + (first + o_t)[:, None] * D + o_d[None, :], mask=m_y, other=0.0).to(tl.float32)
    p_block = dy_block + (i_row.to(tl.int64) * BLOCK + o_t)[:, None] * D + o_d[None, :]
    tl.store(p_block, (b_dy * b_ratio[None, :]).to(dy_block.dtype.element_ty), mask=m_y)


@triton.jit
def times_weight(
    a, weight, r_t, r_n, D, F, b, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """b [t, f] + a [t, d] weight [d, f], for rows r_t of a and columns r_n of the weight."""
    o_k = tl.arange(0, BLOCK_K)
    p_a = a + r_t[:, None] * D + o_k[None, :]
    p_w = weight + o_k[:, None].to(tl.int64) * F + r_n[None, :]
    for i_k in range(0, D, BLOCK_K):
        if EVEN_D:
            b_a, b_w = tl.load(p_a), tl.load(p_w)
        else:
            m_k = i_k + o_k < D
            b_a = tl.load(p_a, mask=m_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_k[:, None], other=0.0)
        b = tl.dot(b_a, b_w, b, input_precision=PRECISION)
        p_a += BLOCK_K
        p_w += BLOCK_K * F
    return b


@triton.jit
def times_weight_transposed(
    a, weight, r_t, r_n, F, b, EVEN_F: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """b [t, d] + a [t, f] weight [d, f]^T, for rows r_t of a and rows r_n of the weight."""
    o_k = tl.arange(0, BLOCK_K)
    p_a = a + r_t[:, None] * F + o_k[None, :]
    p_w = weight + r_n[:, None].to(tl.int64) * F + o_k[None, :]
    for i_k in range(0, F, BLOCK_K):
        if EVEN_F:
            b_a, b_w = tl.load(p_a + i_k), tl.load(p_w + i_k)
        else:
            m_k = (i_k + o_k < F)[None, :]
            b_a, b_w = tl.load(p_a + i_k, mask=m_k, other=0.0), tl.load(p_w + i_k, mask=m_k, other=0.0)
        b = tl.dot(b_a, tl.trans(b_w), b, input_precision=PRECISION)
    return b


@triton.jit
def scan_bwd_token_kernel(
    z, v, dy, dz, dv, shadow, grad_shadow, scores, mixed, extra, step_size, blocks,
    lr, D, F, CHUNK, BLOCK, value_tiles,
    HAS_DSTATE: tl.constexpr, HAS_STEPS: tl.constexpr, PRESERVE: tl.constexpr, SUPER: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_F: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs [0, value_tiles) make tiles [t, d] of dV, the others [t, f] of dZ.

    `dy` is dY' (with preservation a block of its own, `scores` and `mixed` as in `triton_bwd_super`).
    """
    is_value = tl.program_id(0) < value_tiles
    i_tile = tl.program_id(0) - tl.where(is_value, 0, value_tiles)
    rows = tl.cdiv(BLOCK, BLOCK_T)
    columns = tl.cdiv(tl.where(is_value, D, F), BLOCK_N)
    i_t, i_n = i_tile % rows, i_tile // rows % columns
    i_row = i_tile // (rows * columns)
    first, tokens, written, i_sequence, i_chunk, last = load_block(blocks, i_row)
    reached = written if HAS_DSTATE else written * (1 - last)  # tokens whose write G knows of
    start = i_t * BLOCK_T
    o_t = start + tl.arange(0, BLOCK_T)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    r_t = first + tl.minimum(o_t, tokens - 1)  # rows past the end repeat the last one, unstored
    i_local = i_row.to(tl.int64) * BLOCK if PRESERVE else first  # where the rows of dY' and `mixed` are
    i_state = i_sequence * D * F
    b_step = tl.where(o_t < written, lr, 0.0)
    if HAS_STEPS:
        b_step = tl.load(step_size + i_chunk + o_t // CHUNK, mask=o_t < written, other=0.0)
    b = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if is_value:
        if start < (written if SUPER else reached):
            r_n = o_n if EVEN_D else tl.minimum(o_n, D - 1)
            if start < reached:
                b = times_weight_transposed(
                    z, grad_shadow + i_state, r_t, r_n, F, b, EVEN_F, PRECISION, BLOCK_K
                )
            if SUPER and PRESERVE:
                b += tl.load(extra + (i_local + r_t - first)[:, None] * D + r_n[None, :])
            b *= b_step[:, None]
            if SUPER:
                b = later_readers(
                    dy + i_local * D, scores + first * BLOCK, start, o_t, r_n, tokens, written, b,
                    D, CHUNK, BLOCK, PRECISION, BLOCK_K,
                )  # fmt: skip
            m_v = (o_t < written)[:, None] & (o_n < D)[None, :]
            tl.store(dv + r_t[:, None] * D + o_n[None, :], b.to(dv.dtype.element_ty), mask=m_v)
    elif start < tokens:
        r_n = o_n if EVEN_F else tl.minimum(o_n, F - 1)
        if start < reached:
            b = times_weight(v, grad_shadow + i_state, r_t, r_n, D, F, b, EVEN_D, PRECISION, BLOCK_K)
            b = tl.where((o_t < written)[:, None], b * b_step[:, None], 0.0)
        b = times_weight(
            dy, shadow + i_state, i_local + r_t - first, r_n, D, F, b, EVEN_D, PRECISION, BLOCK_K
        )
        if SUPER:
            b = times_mixed(
                z + first * F, mixed + i_local * BLOCK, start, o_t, r_n, tokens, written, b,
                F, BLOCK, PRECISION, BLOCK_T, BLOCK_K,
            )  # fmt: skip
        m_z = (o_t < tokens)[:, None] & (o_n < F)[None, :]
        tl.store(dz + r_t[:, None] * F + o_n[None, :], b.to(dz.dtype.element_ty), mask=m_z)


@triton.jit
def later_readers(
    dy, scores, start, o_t, r_n, tokens, written, b, D, CHUNK, BLOCK,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """b [u, d] + sum over t in later chunks of P [t, u] dY''_t."""
    for i_k in range((start // CHUNK + 1) * CHUNK, tokens, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < tokens
        later = (o_k // CHUNK)[:, None] > (o_t // CHUNK)[None, :]
        m_p = later & m_k[:, None] & (o_t < written)[None, :]
        b_p = tl.load(scores + o_k[:, None].to(tl.int64) * BLOCK + o_t[None, :], mask=m_p, other=0.0)
        b_dy = tl.load(dy + o_k[:, None].to(tl.int64) * D + r_n[None, :], mask=m_k[:, None], other=0.0)
        b = tl.dot(tl.trans(b_p), b_dy, b, input_precision=PRECISION)
    return b


@triton.jit
def times_mixed(
    z, mixed, start, o_t, r_n, tokens, written, b, F, BLOCK,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """b [t, f] + (M + M^T) z, with M [t, u] for u <= t."""
    for i_k in range(0, tl.minimum(start + BLOCK_T, written), BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < written
        m_m = (o_k[None, :] <= o_t[:, None]) & m_k[None, :] & (o_t < tokens)[:, None]
        b_m = tl.load(mixed + o_t[:, None].to(tl.int64) * BLOCK + o_k[None, :], mask=m_m, other=0.0)
        b_z = tl.load(z + o_k[:, None].to(tl.int64) * F + r_n[None, :], mask=m_k[:, None], other=0.0)
        b = tl.dot(b_m, b_z, b, input_precision=PRECISION)
    if start < written:
        for i_k in range(start, tokens, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = o_k < tokens
            m_m = (o_k[:, None] >= o_t[None, :]) & m_k[:, None] & (o_t < written)[None, :]
            b_m = tl.load(mixed + o_k[:, None].to(tl.int64) * BLOCK + o_t[None, :], mask=m_m, other=0.0)
            b_z = tl.load(z + o_k[:, None].to(tl.int64) * F + r_n[None, :], mask=m_k[:, None], other=0.0)
            b = tl.dot(tl.trans(b_m), b_z, b, input_precision=PRECISION)
    return b


class Backward:
    """Buffers and launches of one call. `grad` is G and the state's gradient in the end."""

    def __init__(self, dy, dstate, carried, z, v, w0, step_size, lr, state, table, chunk, preserve) -> None:
        self.dy, self.z, self.v, self.table, self.carried = dy, z, v, table, carried
        self.start = w0 if state is None else state
        self.d, self.f = w0.shape
        self.preserve, self.has_dstate, self.has_steps = preserve, dstate is not None, step_size is not None
        self.chunk, self.super = chunk, table.length > chunk
        self.state_tile, self.token_tile = backward_tiles(
            architecture(z.device), z.element_size(), self.d, self.f, self.super
        )
        self.parts = ceil_div(self.f, self.state_tile.f)
        self.state_tiles = self.parts * ceil_div(self.d, self.state_tile.d)
        self.grad = torch.zeros_like(carried) if dstate is None else dstate.clone()
        self.weight = torch.empty_like(carried)
        self.rounded = z.dtype != torch.float32
        self.shadow = self.weight.to(z.dtype) if self.rounded else self.weight
        self.grad_shadow = self.grad.to(z.dtype) if self.rounded else self.grad
        self.steps = {"step_size": step_size if self.has_steps else self.weight, "lr": lr}
        self.dz, self.dv = torch.empty_like(z), torch.zeros_like(v)
        self.norm_buffers(w0)
        self.super_chunks = SuperChunks(self) if self.super else None
        width = self.state_tiles + (self.super_chunks.dstep_parts if self.super else 0)
        shape = (step_size.numel() if self.has_steps else 0, width)
        self.dsteps = torch.zeros(shape, dtype=torch.float32, device=z.device)
