"""Targets: kernels that know where chunks end, around library GEMMs (`heuristics` says why).

    next token   v = x[h:] P row by row over all tokens at once, then the rows whose t + h lies in
                 another chunk are erased; without P one shifted copy
    convolution  mixed_t = sum_k w_k u_{t + k - KW // 2} inside the chunk, in float32, rounded; v = mixed P

A dense batch needs no table: the chunk of token t of its row is t // C. Packed sequences come with two
numbers a token, where its chunk begins and ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops.target.heuristics import Tiles, conv_tiles, shift_tiles
from ttt_kernels.ops.triton_launch import architecture, launch
from ttt_kernels.types import ceil_div, chunk_ranges


@triton.jit
def chunk_of(first, stop, o_n, m_n, T, CHUNK, PACKED: tl.constexpr):
    """Position in their row of tokens o_n [B * T], and where their chunks begin and end in it."""
    o_p = o_n % T
    if PACKED:
        return o_p, tl.load(first + o_p, mask=m_n, other=0), tl.load(stop + o_p, mask=m_n, other=0)
    b_first = o_p - o_p % CHUNK
    return o_p, b_first, tl.minimum(b_first + CHUNK, T)


@triton.jit
def target_fwd_shift_kernel(
    x, out, first, stop, N, T, CHUNK, D, SHIFT, ERASE: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_t = x_{t + SHIFT}, or 0 where that is in another chunk. ERASE: only these zeros are stored."""
    o_n = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, o_d < D
    o_p, b_first, b_stop = chunk_of(first, stop, o_n, m_n, T, CHUNK, PACKED)
    m_in = (o_p + SHIFT >= b_first) & (o_p + SHIFT < b_stop)
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_T
    o_tile = tl.arange(0, BLOCK_T)[:, None] * D + o_d[None, :]
    if ERASE:
        zero = tl.zeros([BLOCK_T, BLOCK_D], out.dtype.element_ty)
        tl.store(out + i_row * D + o_tile, zero, mask=(m_n & ~m_in)[:, None] & m_d[None, :])
    else:
        b_x = tl.load(x + (i_row + SHIFT) * D + o_tile, mask=(m_n & m_in)[:, None] & m_d[None, :], other=0.0)
        tl.store(out + i_row * D + o_tile, b_x, mask=m_n[:, None] & m_d[None, :])


@triton.jit
def target_fwd_conv_kernel(
    u, weight, mixed, first, stop, N, T, CHUNK, D, TAPS, PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mixed [N, D] from u [N, D] and weight [TAPS, D]."""
    o_n = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, o_d < D
    o_p, b_first, b_stop = chunk_of(first, stop, o_n, m_n, T, CHUNK, PACKED)
    i_corner = tl.program_id(0).to(tl.int64) * BLOCK_T * D
    o_tile = tl.arange(0, BLOCK_T)[:, None] * D + o_d[None, :]
    b_mixed = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in range(TAPS):
        shift = k - TAPS // 2
        m_in = m_n & (o_p + shift >= b_first) & (o_p + shift < b_stop)
        b_u = tl.load(u + i_corner + shift * D + o_tile, mask=m_in[:, None] & m_d[None, :], other=0.0)
        b_weight = tl.load(weight + k * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_mixed += b_u.to(tl.float32) * b_weight[None, :]
    tl.store(mixed + i_corner + o_tile, b_mixed.to(mixed.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])


def token_arguments(x: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> dict:
    """What `chunk_of` reads. Packed: synchronises with a GPU."""
    batch, tokens, d = x.shape
    first = stop = None
    if cu_seqlens is not None:
        first, stop = chunk_ranges(tokens, chunk_size, cu_seqlens, x.device)
        first, stop = first.int(), stop.int()
    chunk_size = min(chunk_size, max(tokens, 1))  # the same chunks, and no overflow
    return {
        "first": first, "stop": stop, "N": batch * tokens, "T": tokens, "CHUNK": chunk_size, "D": d,
        "PACKED": cu_seqlens is not None,
    }  # fmt: skip


def launch_tiles(kernel, tile: Tiles, where: dict, **arguments) -> None:
    """A program for every tile of [N, D]."""
    grid = (ceil_div(where["N"], tile.t), ceil_div(where["D"], tile.d))
    launch(kernel, grid, **where, **arguments, BLOCK_T=tile.t, BLOCK_D=tile.d, num_warps=tile.warps)


def shifted(x: Tensor, out: Tensor, shift: int, chunk_size: int, cu_seqlens, *, erase: bool) -> Tensor:
    """out_t = x_{t + shift} inside the chunk of t, else 0; `erase` only the latter."""
    where = token_arguments(x, chunk_size, cu_seqlens)
    shift = max(min(shift, x.shape[1]), -x.shape[1])
    tile = shift_tiles(architecture(x.device))
    launch_tiles(target_fwd_shift_kernel, tile, where, x=x, out=out, SHIFT=shift, ERASE=erase)
    return out


def next_token(x, proj, chunk_size: int, horizon: int, cu_seqlens) -> Tensor:
    v = torch.empty_like(x)
    if proj is None:
        return shifted(x, v, horizon, chunk_size, cu_seqlens, erase=False)
    rows, targets = x.flatten(0, 1)[horizon:], v.flatten(0, 1)
    torch.mm(rows, proj, out=targets[: len(rows)])
    return shifted(x, v, horizon, chunk_size, cu_seqlens, erase=True)


def mix(u: Tensor, weight: Tensor, where: dict) -> Tensor:
    """The convolution of each chunk, in the dtype of u."""
    mixed = torch.empty_like(u)
    launch_tiles(
        target_fwd_conv_kernel, conv_tiles(architecture(u.device)), where, u=u, weight=by_tap(weight),
        mixed=mixed, TAPS=weight.shape[2],
    )  # fmt: skip
    return mixed


def by_tap(weight: Tensor) -> Tensor:
    """[D, 1, KW] as [KW, D], so that neighbouring threads read neighbouring numbers."""
    return weight[:, 0].t().contiguous()


def conv(u, weight, proj, chunk_size: int, cu_seqlens) -> Tensor:
    mixed = mix(u, weight, token_arguments(u, chunk_size, cu_seqlens))
    return mixed if proj is None else mixed @ proj
