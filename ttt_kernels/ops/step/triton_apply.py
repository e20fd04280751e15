"""Reading a pool of fast weights: y_b = r[n] * (round(W[n]) z_b), n = slots[b], float32 sums.

The weight is the traffic: 4 D F bytes per row, read once, rounded to the keys' dtype in registers. A
program owns rows [d] of one weight, reads tiles [d, f] along F, and either

    one token     multiplies tiles with the keys elementwise into a float32 tile, summed over f at the end
    more tokens   multiplies [d, f] with [f, t] on tensor cores; every weight tile serves all t tokens

Programs of rows of the batch, and of token tiles, that read the same weight tile are neighbours, so that
an entry named by several slots is likely still cached. With `splits` parts of F the programs leave
partial sums, float32 [splits, B, T, D], and a second launch adds them in order: no atomics.

The slots are read here. A row whose slot is outside the pool reads nothing and gives NaN.

The gradient of the keys, dz_b = round(W[n])^T (r[n] * dy_b), is the same read of the transposed pool with
the scale on the way in. That of the pool lies with the writes, in `triton_update`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops.step.heuristics import apply_tiles
from ttt_kernels.ops.step.triton_update import entry_of_row, pool_gradients
from ttt_kernels.ops.triton_launch import architecture, input_precision, launch
from ttt_kernels.types import ceil_div

# Where the row scale goes.
NOWHERE: tl.constexpr = tl.constexpr(0)
OUTPUTS: tl.constexpr = tl.constexpr(1)
KEYS: tl.constexpr = tl.constexpr(2)
SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["rows", "pool", "splits"])
def step_apply_matvec_kernel(
    y, z, weight, scale, slots, rows, pool, splits, part, D, F,
    stride_n, stride_d, stride_f, stride_sn, stride_sd,
    HAS_SLOTS: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One token: y [splits, B, D] of z [B, F]. Program: i_b fastest, then split, then rows of W."""
    i_program = tl.program_id(0)
    i_b = (i_program % rows).to(tl.int64)
    i_s = (i_program // rows) % splits
    i_d = i_program // rows // splits
    n, inside = entry_of_row(slots, i_b, pool, HAS_SLOTS)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    o_f = tl.arange(0, BLOCK_F).to(tl.int64)
    m_d = o_d < D
    p_w = weight + n * stride_n + o_d[:, None] * stride_d
    p_z = z + i_b * F + o_f
    b_sum = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    start = i_s * part
    stop = tl.where(inside, tl.minimum(start + part, F), start)
    for i_f in tl.range(start, stop, BLOCK_F, num_stages=STAGES):  # copies ahead, though no dot follows
        m_f = i_f + o_f < F
        b_z = tl.load(p_z + i_f, mask=m_f, other=0.0).to(tl.float32)
        if SCALE == KEYS:
            b_z *= tl.load(scale + n * stride_sn + (i_f + o_f) * stride_sd, mask=m_f, other=0.0)
        b_w = tl.load(p_w + (i_f + o_f)[None, :] * stride_f, mask=m_d[:, None] & m_f[None, :], other=0.0)
        b_sum += b_w.to(z.dtype.element_ty).to(tl.float32) * b_z[None, :]
    b_y = tl.sum(b_sum, 1)
    if SCALE == OUTPUTS:
        b_y *= tl.load(scale + n * stride_sn + o_d * stride_sd, mask=m_d & inside, other=0.0)
    b_y = tl.where(inside, b_y, float("nan"))
    tl.store(y + (i_s * rows + i_b) * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["rows", "tokens", "pool", "splits"])
def step_apply_tokens_kernel(
    y, z, weight, scale, slots, rows, tokens, pool, splits, part, D, F,
    stride_n, stride_d, stride_f, stride_sn, stride_sd,
    HAS_SLOTS: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """y [splits, B, T, D] of z [B, T, F]. Program: token tile fastest, then i_b, split, rows of W."""
    i_program = tl.program_id(0)
    tiles = tl.cdiv(tokens, BLOCK_T)
    i_t = i_program % tiles
    i_b = (i_program // tiles % rows).to(tl.int64)
    i_s = i_program // tiles // rows % splits
    i_d = i_program // tiles // rows // splits
    n, inside = entry_of_row(slots, i_b, pool, HAS_SLOTS)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    o_f = tl.arange(0, BLOCK_F).to(tl.int64)
    m_t, m_d = o_t < tokens, o_d < D
    p_w = weight + n * stride_n + o_d[:, None] * stride_d
    p_z = z + (i_b * tokens + o_t)[None, :] * F + o_f[:, None]
    b_y = tl.zeros([BLOCK_D, BLOCK_T], tl.float32)
    start = i_s * part
    stop = tl.where(inside, tl.minimum(start + part, F), start)
    for i_f in range(start, stop, BLOCK_F):
        m_f = i_f + o_f < F
        b_z = tl.load(p_z + i_f, mask=m_f[:, None] & m_t[None, :], other=0.0)
        if SCALE == KEYS:
            b_s = tl.load(scale + n * stride_sn + (i_f + o_f) * stride_sd, mask=m_f, other=0.0)
            b_z = (b_z.to(tl.float32) * b_s[:, None]).to(b_z.dtype)
        b_w = tl.load(p_w + (i_f + o_f)[None, :] * stride_f, mask=m_d[:, None] & m_f[None, :], other=0.0)
        b_y = tl.dot(b_w.to(b_z.dtype), b_z, b_y, input_precision=PRECISION)
    if SCALE == OUTPUTS:
        b_s = tl.load(scale + n * stride_sn + o_d * stride_sd, mask=m_d & inside, other=0.0)
        b_y *= b_s[:, None]
    b_y = tl.where(inside, b_y, float("nan"))
    p_y = y + ((i_s * rows + i_b) * tokens + o_t)[:, None] * D + o_d[None, :]
    tl.store(p_y, tl.trans(b_y).to(y.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit
def step_apply_sum_kernel(y, partial, count, splits: tl.constexpr, BLOCK: tl.constexpr):
    """y [count] = sum over splits of partial [splits, count], in order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p = partial + o
    b_y = tl.load(p, mask=o < count, other=0.0)
    for _ in tl.static_range(1, splits):
        p += count
        b_y += tl.load(p, mask=o < count, other=0.0)
    tl.store(y + o, b_y.to(y.dtype.element_ty), mask=o < count)


def apply(z: Tensor, weight: Tensor, row_scale: Tensor | None, slots: Tensor | None) -> Tensor:
    """y [B, T, D]. `slots` stays where it is: nothing is read on the host."""
    mode = NOWHERE if row_scale is None else OUTPUTS
    return _read(z, weight, row_scale, slots, mode)


def apply_backward(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    slots: Tensor | None,
    need_pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz, dweight, drow_scale; the last two empty without `need_pool` (or without a row scale)."""
    mode = NOWHERE if row_scale is None else KEYS
    dz = _read(dy, weight.mT, row_scale, slots, mode)
    if not need_pool:
        return dz, weight.new_empty(0), weight.new_empty(0)
    return dz, *pool_gradients(dy, z, weight, row_scale, slots)


def _read(keys: Tensor, weight: Tensor, scale: Tensor | None, slots: Tensor | None, mode) -> Tensor:
    """round(weight[n]) keys_b, with the scale before, after or not at all."""
    out = keys.new_empty(keys.shape[0], keys.shape[1], weight.shape[1])
    if slots is None and len(weight) == 1:  # one weight for all: a single row of all tokens
        rows, tokens = 1, keys.shape[0] * keys.shape[1]
    else:
        rows, tokens = keys.shape[0], keys.shape[1]
    d, f = weight.shape[1:]
    if 0 in (rows, tokens, d, f):
        return out.zero_()
    along_d = weight.stride(2) != 1 and weight.stride(1) == 1
    tiles = apply_tiles(architecture(keys.device), keys.element_size(), tokens, d, f, along_d)
    split = tiles.splits > 1
    y = keys.new_empty(tiles.splits, rows, tokens, d, dtype=torch.float32) if split else out
    programs = ceil_div(tokens, tiles.t) * rows * tiles.splits * ceil_div(d, tiles.d)
    scale_strides = (0, 0) if scale is None else scale.stride()
    shared = dict(
        y=y, z=keys, weight=weight, scale=scale, slots=slots, rows=rows, pool=len(weight),
        splits=tiles.splits, part=ceil_div(ceil_div(f, tiles.f), tiles.splits) * tiles.f, D=d, F=f,
        stride_n=weight.stride(0), stride_d=weight.stride(1), stride_f=weight.stride(2),
        stride_sn=scale_strides[0], stride_sd=scale_strides[1],
        HAS_SLOTS=slots is not None, SCALE=mode, BLOCK_D=tiles.d, BLOCK_F=tiles.f,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if tiles.t == 1:
        launch(step_apply_matvec_kernel, (programs,), **shared, STAGES=tiles.stages)
    else:
        launch(
            step_apply_tokens_kernel, (programs,), **shared,
            tokens=tokens, PRECISION=input_precision(keys.dtype), BLOCK_T=tiles.t,
        )  # fmt: skip
    if split:
        count = out.numel()
        grid = (ceil_div(count, SUM_BLOCK),)
        launch(
            step_apply_sum_kernel, grid, y=out, partial=y, count=count, splits=tiles.splits, BLOCK=SUM_BLOCK,
            num_warps=4,
        )  # fmt: skip
    return out
