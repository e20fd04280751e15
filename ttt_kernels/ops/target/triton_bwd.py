"""Gradients of the targets. dv is shifted back and masked once; what follows are library GEMMs:

    next token   moved_t = dv_{t - h} inside the chunk of t, else 0;  dx = moved P^T,  dP = x^T moved
    convolution  dmixed = dv P^T,  dP = mixed^T dv with mixed made again, and one kernel for
                 du_t = sum_k w_k dmixed_{t - (k - KW // 2)},  dw_k = sum_t dmixed_t u_{t + k - KW // 2}

Each program of the latter leaves the dw of its tokens in a row of its own; their sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops.target.heuristics import conv_tiles
from ttt_kernels.ops.target.triton_fwd import (
    by_tap,
    chunk_of,
    launch_tiles,
    mix,
    shifted,
    token_arguments,
)
from ttt_kernels.ops.triton_launch import architecture
from ttt_kernels.types import ceil_div


@triton.jit
def target_bwd_conv_kernel(
    u, weight, dmixed, du, dweight, first, stop, N, T, CHUNK, D, TAPS, PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """du [N, D]; dweight [token tiles, TAPS, D] float32, summed over the tokens of a tile."""
    i_t = tl.program_id(0)
    o_n = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, o_d < D
    m_out = m_n[:, None] & m_d[None, :]
    o_p, b_first, b_stop = chunk_of(first, stop, o_n, m_n, T, CHUNK, PACKED)
    i_corner = i_t.to(tl.int64) * BLOCK_T * D
    o_tile = tl.arange(0, BLOCK_T)[:, None] * D + o_d[None, :]
    p_weight = dweight + i_t.to(tl.int64) * TAPS * D + o_d
    b_dmixed = tl.load(dmixed + i_corner + o_tile, mask=m_out, other=0.0).to(tl.float32)
    b_du = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in range(TAPS):
        shift = k - TAPS // 2
        m_ahead = (o_p + shift >= b_first) & (o_p + shift < b_stop)
        m_back = (o_p - shift >= b_first) & (o_p - shift < b_stop)
        p_ahead, p_back = u + i_corner + shift * D + o_tile, dmixed + i_corner - shift * D + o_tile
        b_ahead = tl.load(p_ahead, mask=m_out & m_ahead[:, None], other=0.0).to(tl.float32)
        b_back = tl.load(p_back, mask=m_out & m_back[:, None], other=0.0).to(tl.float32)
        b_weight = tl.load(weight + k * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_du += b_back * b_weight[None, :]
        tl.store(p_weight + k * D, tl.sum(b_dmixed * b_ahead, 0), mask=m_d)
    tl.store(du + i_corner + o_tile, b_du.to(du.dtype.element_ty), mask=m_out)


def next_token_backward(dv, x, proj, chunk_size: int, horizon: int, cu_seqlens) -> tuple[Tensor, Tensor]:
    moved = shifted(dv, torch.empty_like(x), -horizon, chunk_size, cu_seqlens, erase=False)
    if proj is None:
        return moved, x.new_zeros(0)
    return moved @ proj.t(), x.flatten(0, 1).t() @ moved.flatten(0, 1)


def conv_backward(dv, u, weight, proj, chunk_size: int, cu_seqlens) -> tuple[Tensor, Tensor, Tensor]:
    where = token_arguments(u, chunk_size, cu_seqlens)
    dmixed, dproj = dv, u.new_zeros(0)
    if proj is not None:
        dproj = mix(u, weight, where).flatten(0, 1).t() @ dv.flatten(0, 1)
        dmixed = dv @ proj.t()
    du, taps = torch.empty_like(u), weight.shape[2]
    tile = conv_tiles(architecture(u.device))
    partial = u.new_empty(ceil_div(where["N"], tile.t), taps, u.shape[2], dtype=torch.float32)
    launch_tiles(
        target_bwd_conv_kernel, tile, where, u=u, weight=by_tap(weight), dmixed=dmixed, du=du,
        dweight=partial, TAPS=taps,
    )  # fmt: skip
    return du, partial.sum(0).t()[:, None].to(weight.dtype).contiguous(), dproj
