"""Targets as library GEMMs and shifted copies. Chunk edges are a mask, not a loop.

Operands are raised to float32 around the GEMM, as in the scan; each result is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels.types import chunk_ranges, compute_dtype, tiles

TOKEN_TILE = 2048  # tokens raised to float32 at a time


def outside(x: Tensor, shift: int, chunk_size: int, cu_seqlens: Tensor | None) -> Tensor:
    """[T]: is token t + shift outside the chunk of token t?"""
    first, stop = chunk_ranges(x.shape[1], chunk_size, cu_seqlens, x.device)
    moved = torch.arange(x.shape[1], device=x.device) + shift
    return (moved < first) | (moved >= stop)


def multiply(a: Tensor, b: Tensor | None, out: Tensor) -> None:
    """out = a b for [B, T, D] a and [D, D] b in the compute precision, rounded once."""
    acc = compute_dtype(out.dtype)
    if b is None:
        out.copy_(a)
        return
    b = b.to(acc)
    for row in range(len(a)):
        for t in tiles(a.shape[1], TOKEN_TILE):
            out[row, t] = a[row, t].to(acc) @ b


def outer_sum(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """sum_t a_t^T b_t over rows and tokens, [D, D] in the dtype of `like`."""
    acc = compute_dtype(a.dtype)
    total = like.new_zeros(like.shape, dtype=acc)
    for row in range(len(a)):
        for t in tiles(a.shape[1], TOKEN_TILE):
            total.addmm_(a[row, t].to(acc).t(), b[row, t].to(acc))
    return total.to(like.dtype)


def next_token(x, proj, chunk_size, horizon, cu_seqlens) -> Tensor:
    v = torch.zeros_like(x)
    if horizon < x.shape[1]:
        multiply(x[:, horizon:], proj, v[:, : x.shape[1] - horizon])
    return v.masked_fill_(outside(x, horizon, chunk_size, cu_seqlens)[:, None], 0)


def next_token_backward(dv, x, proj, chunk_size, horizon, cu_seqlens) -> tuple[Tensor, Tensor]:
    dx = torch.zeros_like(x)
    dproj = x.new_zeros(0) if proj is None else torch.zeros_like(proj)
    if horizon < x.shape[1]:
        dv = dv.masked_fill(outside(x, horizon, chunk_size, cu_seqlens)[:, None], 0)
        dv = dv[:, : x.shape[1] - horizon]
        multiply(dv, None if proj is None else proj.t(), dx[:, horizon:])
        if proj is not None:
            dproj = outer_sum(x[:, horizon:], dv, proj)
    return dx, dproj


def shifted(x: Tensor, shift: int, skip: Tensor, row: int) -> Tensor:
    """x[row, t + shift] in the compute precision, 0 where `skip` says it is in another chunk."""
    acc = compute_dtype(x.dtype)
    moved = torch.roll(x[row].to(acc), -shift, 0)
    return moved.masked_fill_(skip[:, None], 0)


def mix(x: Tensor, weight: Tensor, skips: list[Tensor], row: int, sign: int) -> Tensor:
    """sum_k weight[:, k] x_{t + sign (k - pad)} inside the chunk: the convolution (sign 1) or its
    transpose (sign -1) of one row, [T, D] in the compute precision."""
    pad, acc = len(skips) // 2, compute_dtype(x.dtype)
    total = torch.zeros_like(x[row], dtype=acc)
    for k, skip in enumerate(skips):
        total.addcmul_(shifted(x, sign * (k - pad), skip, row), weight[:, 0, k].to(acc))
    return total


def edges(u: Tensor, taps: int, chunk_size: int, cu_seqlens, sign: int) -> list[Tensor]:
    pad = taps // 2
    return [outside(u, sign * (k - pad), chunk_size, cu_seqlens) for k in range(taps)]


def conv(u, weight, proj, chunk_size, cu_seqlens) -> Tensor:
    v, skips = torch.empty_like(u), edges(u, weight.shape[2], chunk_size, cu_seqlens, 1)
    for row in range(len(u)):
        mixed = mix(u, weight, skips, row, 1)
        v[row] = mixed if proj is None else mixed @ proj.to(mixed.dtype)
    return v


def conv_backward(dv, u, weight, proj, chunk_size, cu_seqlens) -> tuple[Tensor, Tensor, Tensor]:
    acc, taps = compute_dtype(u.dtype), weight.shape[2]
    forward_skips = edges(u, taps, chunk_size, cu_seqlens, 1)
    backward_skips = edges(u, taps, chunk_size, cu_seqlens, -1)
    du = torch.empty_like(u)
    dweight = torch.zeros_like(weight, dtype=acc)
    dproj = u.new_zeros(0) if proj is None else torch.zeros_like(proj, dtype=acc)
    for row in range(len(u)):
        dmixed = dv[row].to(acc)
        if proj is not None:
            dproj.addmm_(mix(u, weight, forward_skips, row, 1).t(), dmixed)
            dmixed = dmixed @ proj.t().to(acc)
        for k, skip in enumerate(forward_skips):
            dweight[:, 0, k] += (dmixed * shifted(u, k - taps // 2, skip, row)).sum(0)
        du[row] = mix(dmixed[None], weight, backward_skips, 0, -1)
    return du, dweight.to(weight.dtype), dproj if proj is None else dproj.to(proj.dtype)
