"""Writing a pool of fast weights, and the gradient of reading it: sums of outer products, in place.

    update     W[n] += s_b sum_t v_t z_t^T                     n = slots[b], one program per row and tile
    gradient   P[n]  = sum_b sum_t dy_t z_t^T                  over the rows b with slots[b] = n, in order
               dW[n] = diag(r[n]) P[n],  dr[n] = sum_f P[n][:, f] W[n][:, f]

A tile [d, f] is a tensor-core product over tokens with float32 sums; the weight is read and written once.
The gradient goes over entries rather than rows, so that rows that share an entry are added by one
program in the order of the batch: no atomics, the same bits every time.

The slots are read here. A row whose slot is outside the pool is left out. An entry that a write names
twice would be a race: every program that would write to it finds that out, and writes NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops.step.heuristics import update_tiles
from ttt_kernels.ops.triton_launch import architecture, input_precision, launch
from ttt_kernels.types import ceil_div


@triton.jit
def entry_of_row(slots, i_b, pool, HAS_SLOTS: tl.constexpr):
    """Entry of row `i_b` (int64), and whether the pool has it."""
    n = i_b
    if HAS_SLOTS:
        n = tl.load(slots + i_b).to(tl.int64)
    return n, (n >= 0) & (n < pool)


@triton.jit
def add_outer_products(
    b_sum, v, z, i_b, stop, tokens, o_d, o_f, D, F, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr
):
    """b_sum [d, f] + sum over tokens [0, stop) of row i_b of v_t z_t^T."""
    m_d, m_f = o_d < D, o_f < F
    for i_t in range(0, stop, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t, row = o_t < stop, i_b * tokens + o_t
        # v is loaded as it is needed, [d, t]: `tl.trans` of a tile would keep sm_80 from copying ahead.
        b_v = tl.load(v + row[None, :] * D + o_d[:, None], mask=m_d[:, None] & m_t[None, :], other=0.0)
        b_z = tl.load(z + row[:, None] * F + o_f[None, :], mask=m_t[:, None] & m_f[None, :], other=0.0)
        b_sum = tl.dot(b_v, b_z, b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit(do_not_specialize=["rows", "tokens", "pool"])
def step_update_kernel(
    weight, z, v, step_size, lr, slots, rows, tokens, pool, D, F, stride_n, stride_d, stride_f,
    HAS_SLOTS: tl.constexpr, HAS_STEPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Program: rows of W fastest, so that neighbours share a tile of z; then columns of W, then i_b."""
    i_program = tl.program_id(0)
    tiles_d, tiles_f = tl.cdiv(D, BLOCK_D), tl.cdiv(F, BLOCK_F)
    o_d = i_program % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    o_f = i_program // tiles_d % tiles_f * BLOCK_F + tl.arange(0, BLOCK_F).to(tl.int64)
    i_b = (i_program // tiles_d // tiles_f).to(tl.int64)
    n, inside = entry_of_row(slots, i_b, pool, HAS_SLOTS)
    step = lr
    if HAS_STEPS:
        step = tl.load(step_size + i_b)
    if HAS_SLOTS:
        o_b = tl.arange(0, BLOCK_B)
        named = tl.sum((tl.load(slots + o_b, mask=o_b < rows, other=-1) == n).to(tl.int32))
        step = tl.where(named > 1, float("nan"), step)
    b_sum = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    stop = tl.where(inside, tokens, 0)
    b_sum = add_outer_products(b_sum, v, z, i_b, stop, tokens, o_d, o_f, D, F, PRECISION, BLOCK_T)
    p_w = weight + n * stride_n + o_d[:, None] * stride_d + o_f[None, :] * stride_f
    m_w = (o_d < D)[:, None] & (o_f < F)[None, :] & inside
    tl.store(p_w, tl.load(p_w, mask=m_w, other=0.0) + step * b_sum, mask=m_w)


@triton.jit(do_not_specialize=["rows", "tokens", "pool"])
def step_apply_bwd_pool_kernel(
    dweight, dscale, dy, z, weight, scale, slots, rows, tokens, pool, D, F,
    stride_n, stride_d, stride_f, stride_sn, stride_sd,
    HAS_SLOTS: tl.constexpr, HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dweight [N, D, F], and dscale [N, tiles of f, D] to be summed over its tiles."""
    i_program = tl.program_id(0)
    tiles_d, tiles_f = tl.cdiv(D, BLOCK_D), tl.cdiv(F, BLOCK_F)
    i_f = i_program // tiles_d % tiles_f
    o_d = i_program % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F).to(tl.int64)
    i_n = (i_program // tiles_d // tiles_f).to(tl.int64)
    m_d = o_d < D
    m_w = m_d[:, None] & (o_f < F)[None, :]
    b_sum = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    if HAS_SLOTS:
        for i_b in range(rows):
            n, _ = entry_of_row(slots, i_b, pool, HAS_SLOTS)
            stop = tl.where(n == i_n, tokens, 0)
            b_sum = add_outer_products(
                b_sum, dy, z, i_b, stop, tokens, o_d, o_f, D, F, PRECISION, BLOCK_T
            )
    else:
        b_sum = add_outer_products(b_sum, dy, z, i_n, tokens, tokens, o_d, o_f, D, F, PRECISION, BLOCK_T)
    if HAS_SCALE:
        row = weight + i_n * stride_n + o_d[:, None] * stride_d
        b_w = tl.load(row + o_f[None, :] * stride_f, mask=m_w, other=0.0)
        b_r = tl.sum(b_sum * b_w, 1)
        tl.store(dscale + (i_n * tiles_f + i_f) * D + o_d, b_r, mask=m_d)
        b_sum *= tl.load(scale + i_n * stride_sn + o_d * stride_sd, mask=m_d, other=0.0)[:, None]
    p_w = dweight + (i_n * D + o_d)[:, None] * F + o_f[None, :]
    tl.store(p_w, b_sum, mask=m_w)


def update_(
    weight: Tensor, z: Tensor, v: Tensor, step_size: Tensor | None, lr: float, slots: Tensor | None
) -> None:
    """weight[slot_b] += step_b * v_b^T z_b, one chunk, in place. `slots` stays where it is."""
    rows, tokens, f = z.shape
    d = weight.shape[1]
    tiles = update_tiles(architecture(z.device), z.element_size(), tokens, d, f)
    step_size = None if step_size is None else step_size.contiguous()
    launch(
        step_update_kernel, (rows * ceil_div(d, tiles.d) * ceil_div(f, tiles.f),),
        weight=weight, z=z, v=v, step_size=step_size, lr=lr, slots=slots, rows=rows, tokens=tokens,
        pool=len(weight), D=d, F=f,
        stride_n=weight.stride(0), stride_d=weight.stride(1), stride_f=weight.stride(2),
        HAS_SLOTS=slots is not None, HAS_STEPS=step_size is not None, PRECISION=input_precision(z.dtype),
        BLOCK_B=triton.next_power_of_2(max(rows, 1)),
        BLOCK_T=tiles.k, BLOCK_D=tiles.d, BLOCK_F=tiles.f, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def pool_gradients(
    dy: Tensor, z: Tensor, weight: Tensor, row_scale: Tensor | None, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dweight and drow_scale (empty without a row scale) of `apply`."""
    rows, tokens, f = z.shape
    pool, d = weight.shape[:2]
    if slots is None and pool == 1:  # one weight for all: a single row of all tokens
        rows, tokens = 1, rows * tokens
    tiles = update_tiles(architecture(z.device), z.element_size(), tokens, d, f)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    parts = None
    if row_scale is not None:
        parts = weight.new_empty(pool, ceil_div(f, tiles.f), d)
    scale_strides = (0, 0) if row_scale is None else row_scale.stride()
    launch(
        step_apply_bwd_pool_kernel, (pool * ceil_div(d, tiles.d) * ceil_div(f, tiles.f),),
        dweight=dweight, dscale=parts, dy=dy, z=z, weight=weight, scale=row_scale, slots=slots, rows=rows,
        tokens=tokens, pool=pool, D=d, F=f,
        stride_n=weight.stride(0), stride_d=weight.stride(1), stride_f=weight.stride(2),
        stride_sn=scale_strides[0], stride_sd=scale_strides[1],
        HAS_SLOTS=slots is not None, HAS_SCALE=row_scale is not None, PRECISION=input_precision(z.dtype),
        BLOCK_T=tiles.k, BLOCK_D=tiles.d, BLOCK_F=tiles.f, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return dweight, weight.new_empty(0) if parts is None else parts.sum(1)
