"""Gradients of the step sizes, fused. Nothing is stored by the forward: Gram matrices and power iteration
are made again.

**Spectral.** With the notation of `triton_fwd` and u_i = x_i / norm_i, the gradient g_i of sigma with
respect to x_i starts at g_L = y_L / norm_L and goes back, i = L-1 .. 0, one launch each, by

    along_i = g_{i+1} . x_{i+1}   (0 where the norm is the constant eps)
    g_i     = (K_i g_{i+1} - along_i x_{i+1}) / norm_i
    dK_i    = h_i u_i^T,   h_i = g_{i+1} - along_i u_i / 2,   h_L = norm_L u_L / 2

so that dZ = (dK + dK^T) Z is a sum of few outer products, over even i (over odd i for V):

    dZ = sum_i h_i (u_i^T Z) + u_i (h_i^T Z),   and for V also g_0 1^T / D

`project` makes the thin products, reading Z once; `expand` adds the outer products, writing dZ once:
8 (iterations + 1) FLOPs per element instead of 2 C for the product with dK. It costs what reading and
writing the operand costs at any C, and C has to be under 24 before dK Z would have fewer FLOPs.

**Clipped.** dZ = 2 p Kv Z and dV = 2 p Kz V with one number p a chunk: a GEMM. Its float32 factor, and
the vectors of `project`, go to 16-bit matrix units as the sum of two 16-bit numbers, scaled to at most
1. Chunks that are not clipped have p = 0 and multiply nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops.step_size.chunks import complete_chunks
from ttt_kernels.ops.step_size.gram_rules import SIGMA_FLOOR, Clipped, Spectral
from ttt_kernels.ops.step_size.heuristics import clip_tiles, expand_tiles, iterate_tiles, project_tiles
from ttt_kernels.ops.step_size.triton_fwd import (
    SQUARE_EPS,
    gram_matrices,
    iterate,
    scratch_bytes,
    spectral_norm,
    token_means,
)
from ttt_kernels.ops.triton_launch import architecture, input_precision, launch
from ttt_kernels.types import ceil_div


@triton.jit
def dot_float32(b_a, b_x, b_sum, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """b_sum + a x for float32 a, |a| <= 1, and x of any type: a as two 16-bit numbers where x has 16."""
    if SPLIT:
        b_high = b_a.to(b_x.dtype)
        b_sum = tl.dot(b_high, b_x, b_sum)
        b_sum = tl.dot((b_a - b_high.to(tl.float32)).to(b_x.dtype), b_x, b_sum)
    else:
        b_sum = tl.dot(b_a, b_x, b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit
def step_size_bwd_iterate_kernel(
    gram, g_next, x_next, u, square, g, h, PADDED, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """g_i and h_i from g_{i+1} and x_{i+1}: BLOCK_R rows of chunk i_n, vectors [chunks, PADDED]."""
    i_r, i_n = tl.program_id(0), tl.program_id(1)
    o_r, o_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    i_vector = i_n.to(tl.int64) * PADDED
    i_row = i_vector + i_r * BLOCK_R
    p_gram = gram + i_row * PADDED + (o_r[:, None] * PADDED + o_c[None, :])
    b_product = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_along = tl.zeros([BLOCK_C], tl.float32)
    for i_c in range(0, PADDED, BLOCK_C):
        b_g = tl.load(g_next + i_vector + i_c + o_c)
        b_product += tl.load(p_gram + i_c) * b_g[None, :]
        b_along += b_g * tl.load(x_next + i_vector + i_c + o_c)
    b_square = tl.load(square + i_n)
    norm = tl.sqrt_rn(tl.maximum(b_square, SQUARE_EPS))
    along = tl.where(b_square >= SQUARE_EPS, tl.sum(b_along), 0.0)
    b_g = (tl.sum(b_product, 1) - along * tl.load(x_next + i_row + o_r)) / norm
    tl.store(g + i_row + o_r, b_g)
    b_h = tl.load(g_next + i_row + o_r) - 0.5 * along * tl.load(u + i_row + o_r)
    tl.store(h + i_row + o_r, b_h)


@triton.jit(do_not_specialize_on_alignment=["first"])
def step_size_bwd_project_kernel(
    x, first, vectors, products, C, PADDED, WIDTH, COUNT, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """products [chunks, COUNT, WIDTH] = w^T X of each chunk, for vectors w [chunks, COUNT, PADDED]."""
    i_f, i_r, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_t, o_f = tl.arange(0, BLOCK_T), i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_r, m_f = o_r < COUNT, o_f < WIDTH
    p_w = vectors + i_n.to(tl.int64) * COUNT * PADDED + (o_r[:, None] * PADDED + o_t[None, :])
    p_x = x + tl.load(first + i_n) * WIDTH
    b_sum = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    for i_t in range(0, C, BLOCK_T):
        # Past the chunk vectors are 0, and rows repeat its last one: another chunk is never read.
        p_tile = p_x + (tl.minimum(o_t, C - 1 - i_t)[:, None] * WIDTH + o_f[None, :])
        b_x = tl.load(p_tile) if EVEN else tl.load(p_tile, mask=m_f[None, :], other=0.0)
        b_w = tl.load(p_w + i_t, mask=m_r[:, None], other=0.0)
        b_sum = dot_float32(b_w, b_x, b_sum, SPLIT, PRECISION)
        p_x += BLOCK_T * WIDTH
    p_products = products + i_n.to(tl.int64) * COUNT * WIDTH + (o_r[:, None] * WIDTH + o_f[None, :])
    tl.store(p_products, b_sum, mask=m_r[:, None] & m_f[None, :])


@triton.jit(do_not_specialize_on_alignment=["first"])
def step_size_bwd_expand_kernel(
    dx, first, vectors, products, constant, C, PADDED, WIDTH, COUNT,
    HAS_CONSTANT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dX = constant 1^T + sum_r vectors_r products_r^T: a [t, f] tile of chunk i_n."""
    i_f, i_t, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_t, o_f = tl.arange(0, BLOCK_T), i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < WIDTH
    m_vector = i_t * BLOCK_T + o_t < PADDED  # what lies between C and it is 0
    b_dx = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    if HAS_CONSTANT:
        b_dx += tl.load(constant + i_n * PADDED + i_t * BLOCK_T + o_t, mask=m_vector, other=0.0)[:, None]
    p_vector = vectors + i_n.to(tl.int64) * COUNT * PADDED + i_t * BLOCK_T + o_t
    p_product = products + i_n.to(tl.int64) * COUNT * WIDTH + o_f
    for _ in range(COUNT):
        b_left = tl.load(p_vector, mask=m_vector, other=0.0)
        b_dx += b_left[:, None] * tl.load(p_product, mask=m_f, other=0.0)[None, :]
        p_vector += PADDED
        p_product += WIDTH
    p_dx = dx + (tl.load(first + i_n) + i_t * BLOCK_T) * WIDTH + (o_t[:, None] * WIDTH + o_f[None, :])
    m_dx = (i_t * BLOCK_T + o_t < C)[:, None] & m_f[None, :]
    tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_dx)


@triton.jit(do_not_specialize_on_alignment=["first"])
def step_size_bwd_clip_kernel(
    x, gram, dx, first, shrink, factor, C, PADDED, WIDTH, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dX = factor (shrink K) X: a [t, f] tile of chunk i_n. A factor of 0 multiplies nothing."""
    side = tl.cdiv(C, BLOCK_T)
    i_t, i_f, i_n = tl.program_id(0) % side, tl.program_id(0) // side, tl.program_id(1)
    o_t, o_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < WIDTH
    b_factor, b_shrink = tl.load(factor + i_n), tl.load(shrink + i_n)
    i_first = tl.load(first + i_n)
    r_t = tl.minimum(o_t, C - 1 - i_t * BLOCK_T)
    i_row = i_n.to(tl.int64) * PADDED + i_t * BLOCK_T
    p_gram = gram + i_row * PADDED + (r_t[:, None] * PADDED + o_k[None, :])
    p_x = x + i_first * WIDTH
    b_dx = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for i_k in range(0, tl.where(b_factor == 0, 0, C), BLOCK_K):
        p_tile = p_x + (tl.minimum(o_k, C - 1 - i_k)[:, None] * WIDTH + o_f[None, :])
        b_x = tl.load(p_tile) if EVEN else tl.load(p_tile, mask=m_f[None, :], other=0.0)
        b_dx = dot_float32(tl.load(p_gram + i_k) * b_shrink, b_x, b_dx, SPLIT, PRECISION)
        p_x += BLOCK_K * WIDTH
    p_dx = dx + (i_first + i_t * BLOCK_T) * WIDTH + (o_t[:, None] * WIDTH + o_f[None, :])
    m_dx = (i_t * BLOCK_T + o_t < C)[:, None] & m_f[None, :]
    tl.store(p_dx, (b_factor * b_dx).to(dx.dtype.element_ty), mask=m_dx)


def outer_products(x: Tensor, dx: Tensor, first: Tensor, u: Tensor, h: Tensor, scale: Tensor,
                   constant: Tensor | None, chunk_size: int) -> None:  # fmt: skip
    """dx = scale (constant 1^T + sum_i h_i (u_i^T X) + u_i (h_i^T X)) of each chunk.

    u, h [i, n, padded]; constant [n, padded]; scale [n].
    """
    u, h = u.transpose(0, 1), h.transpose(0, 1)
    vectors, partners = torch.cat([u, h], 1), torch.cat([h, u], 1)
    largest = vectors.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    vectors /= largest
    partners *= largest * scale[:, None, None]
    chunks, count, padded = vectors.shape
    width = x.shape[2]
    products = vectors.new_empty(chunks, count, width)
    arch, split = architecture(x.device), x.dtype != torch.float32
    tile = project_tiles(arch, x.element_size())
    grid = (ceil_div(width, tile.columns), ceil_div(count, tile.rows), chunks)
    launch(
        step_size_bwd_project_kernel, grid, x=x, first=first, vectors=vectors, products=products,
        C=chunk_size, PADDED=padded, WIDTH=width, COUNT=count, SPLIT=split,
        EVEN=width % tile.columns == 0, PRECISION=input_precision(x.dtype),
        BLOCK_R=tile.rows, BLOCK_T=tile.k, BLOCK_F=tile.columns, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    tile = expand_tiles(arch)
    grid = (ceil_div(width, tile.columns), ceil_div(chunk_size, tile.rows), chunks)
    launch(
        step_size_bwd_expand_kernel, grid, dx=dx, first=first, vectors=partners, products=products,
        constant=None if constant is None else constant * scale[:, None], C=chunk_size,
        PADDED=padded, WIDTH=width, COUNT=count, HAS_CONSTANT=constant is not None,
        BLOCK_T=tile.rows, BLOCK_F=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def spectral_group(ds, z, v, dz, dv, first, chunk_size: int, means: Tensor, rule: Spectral) -> None:
    grams = gram_matrices(z, v, first, chunk_size, store=True, norm=False)
    xs, ys = iterate(grams, means, first, chunk_size, rule.iterations)
    sigma, squares, norms = spectral_norm(xs, ys)
    us = xs / norms[..., None]
    hs = torch.empty_like(us)
    hs[-1] = 0.5 * norms[-1, :, None] * us[-1]
    chunks, padded, _ = grams.kz.shape
    tile = iterate_tiles(architecture(z.device), padded)
    g_next = ys[-1] / norms[-1, :, None]
    for i in reversed(range(len(xs) - 1)):
        g = torch.empty_like(g_next)
        launch(
            step_size_bwd_iterate_kernel, (padded // tile.rows, chunks), gram=(grams.kz, grams.kv)[i % 2],
            g_next=g_next, x_next=xs[i + 1], u=us[i], square=squares[i], g=g, h=hs[i], PADDED=padded,
            BLOCK_R=tile.rows, BLOCK_C=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
        g_next = g
    dsigma = torch.where(sigma < SIGMA_FLOOR, 0, -ds * rule.lr / sigma**2)
    outer_products(z, dz, first, us[0::2], hs[0::2], dsigma, None, chunk_size)
    outer_products(v, dv, first, us[1::2], hs[1::2], dsigma, g_next / v.shape[2], chunk_size)


def clipped_group(ds, z, v, dz, dv, first, chunk_size: int, rule: Clipped) -> None:
    grams = gram_matrices(z, v, first, chunk_size, store=True, norm=True)
    norm = grams.square.sqrt()
    pull = -0.5 * rule.lr * rule.max_norm * ds.double() / norm**3
    pull = torch.where(norm <= rule.max_norm, 0, pull)  # NaN stays NaN
    multiply(grams.kv, z, dz, first, 2 * pull, chunk_size)
    multiply(grams.kz, v, dv, first, 2 * pull, chunk_size)


def multiply(gram: Tensor, x: Tensor, dx: Tensor, first: Tensor, factor: Tensor, chunk_size: int) -> None:
    """dx = factor K X of each chunk; factor [n] float64."""
    # No entry of a Gram matrix is larger than the largest of its diagonal.
    largest = gram.diagonal(dim1=1, dim2=2).amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    width = x.shape[2]
    tile = clip_tiles(architecture(x.device), x.element_size(), chunk_size)
    grid = (ceil_div(chunk_size, tile.rows) * ceil_div(width, tile.columns), len(first))
    launch(
        step_size_bwd_clip_kernel, grid, x=x, gram=gram, dx=dx, first=first, shrink=1 / largest,
        factor=(factor * largest).float(), C=chunk_size, PADDED=gram.shape[1], WIDTH=width,
        SPLIT=x.dtype != torch.float32,
        EVEN=width % tile.columns == 0, PRECISION=input_precision(x.dtype),
        BLOCK_T=tile.rows, BLOCK_F=tile.columns, BLOCK_K=tile.k, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def backward(dsteps, z, v, chunk_size: int, cu_seqlens, rule: Spectral | Clipped) -> tuple[Tensor, Tensor]:
    """dz, dv; 0 for the tokens of incomplete chunks."""
    chunks = complete_chunks(z, chunk_size, cu_seqlens)
    complete = len(chunks.first) * chunk_size == z.shape[0] * z.shape[1]
    dz, dv = (torch.empty_like(x) if complete else torch.zeros_like(x) for x in (z, v))
    clipped = isinstance(rule, Clipped)
    means = None if clipped else token_means(v)
    scratch = scratch_bytes(z, chunk_size)
    scratch += 0 if clipped else 8 * (rule.iterations + 1) * max(z.shape[2], v.shape[2])
    for first, place in chunks.groups(scratch):
        ds = dsteps.view(-1)[place]
        if clipped:
            clipped_group(ds, z, v, dz, dv, first, chunk_size, rule)
        else:
            spectral_group(ds, z, v, dz, dv, first, chunk_size, means, rule)
    return dz, dv
