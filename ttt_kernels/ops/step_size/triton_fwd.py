"""Step sizes, fused: one launch makes the Gram matrices of all chunks, then a rule on them.

**Gram matrices.** Kz = Z Z^T and Kv = V V^T are symmetric: a program makes the tile (i, j), j <= i, of
both and stores it with its mirror image. They lie in float32 scratch padded with zeros to whole tiles,
so that nothing that reads them needs a mask. The clip needs sum(Kz * Kv) only: each program sums its
tile, and nothing is stored.

**Power iteration.** With x_0 = V 1/D, K_i = Kz for even i and Kv for odd i, all of it is

    y_i = K_i x_i,   norm_i = max(sqrt(x_i . y_i), eps),   x_{i+1} = y_i / norm_i,   i = 0 .. L = 2 iterations

and sigma = (Kv a)^T (Kz b) of the specification is x_L . y_L / norm_L. One launch an i, over all
chunks and blocks of rows: one program a chunk would be one launch, but a multiprocessor reads no more
than 64 bytes a clock, and L + 1 matrices of 4 MB (C = 1024) have to pass through. A program needs
norm_{i-1}, sums it for itself from the two vectors it reads anyway, and so no launch waits for a scalar.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops.step_size.chunks import complete_chunks
from ttt_kernels.ops.step_size.gram_rules import NORMALIZE_EPS, SIGMA_FLOOR, Clipped, Spectral
from ttt_kernels.ops.step_size.heuristics import GRID_LIMIT, gram_tiles, iterate_tiles
from ttt_kernels.ops.triton_launch import architecture, descriptor, input_precision, launch
from ttt_kernels.types import ceil_div

SQUARE_EPS: tl.constexpr = tl.constexpr(NORMALIZE_EPS**2)


@triton.jit
def gram_tile(
    x, tiles, i_first, i_r, i_c, C, WIDTH, EVEN: tl.constexpr, DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (i_r, i_c) of X X^T of the chunk of C tokens that begins at row i_first; 0 outside it.
    `tiles`: x through a descriptor, where there is one."""
    o_t, o_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    i_row, i_column = i_first + i_r * BLOCK_T, i_first + i_c * BLOCK_T
    # Rows past the chunk repeat its last one, or are those of the next: zeroed at the end, and no mask
    # in the loop.
    r_r = tl.minimum(o_t, C - 1 - i_r * BLOCK_T)
    r_c = tl.minimum(o_t, C - 1 - i_c * BLOCK_T)
    p_r = x + i_row * WIDTH + (r_r[:, None] * WIDTH + o_k[None, :])
    p_c = x + i_column * WIDTH + (r_c[:, None] * WIDTH + o_k[None, :])
    b_gram = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for i_k in range(0, WIDTH, BLOCK_K):
        if DESCRIPTOR:
            b_r = tiles.load([i_row.to(tl.int32), i_k])
            b_c = tiles.load([i_column.to(tl.int32), i_k])
        elif EVEN:
            b_r, b_c = tl.load(p_r + i_k), tl.load(p_c + i_k)
        else:
            m_k = (i_k + o_k < WIDTH)[None, :]
            b_r = tl.load(p_r + i_k, mask=m_k, other=0.0)
            b_c = tl.load(p_c + i_k, mask=m_k, other=0.0)
        b_gram = tl.dot(b_r, tl.trans(b_c), b_gram, input_precision=PRECISION)
    m_r, m_c = i_r * BLOCK_T + o_t < C, i_c * BLOCK_T + o_t < C
    return tl.where(m_r[:, None] & m_c[None, :], b_gram, 0.0)


@triton.jit
def store_mirrored(gram, b_gram, i_n, i_r, i_c, PADDED, BLOCK_T: tl.constexpr):
    o_t = tl.arange(0, BLOCK_T)
    o_tile = o_t[:, None] * PADDED + o_t[None, :]
    gram += i_n.to(tl.int64) * PADDED * PADDED
    tl.store(gram + i_r.to(tl.int64) * BLOCK_T * PADDED + i_c * BLOCK_T + o_tile, b_gram)
    if i_r != i_c:
        mirror = gram + i_c.to(tl.int64) * BLOCK_T * PADDED + i_r * BLOCK_T + o_tile
        tl.store(mirror, tl.trans(b_gram))


@triton.jit(do_not_specialize_on_alignment=["first"])
def step_size_fwd_gram_kernel(
    z, v, z_tiles, v_tiles, first, kz, kv, partial, C, PADDED, F, D, STORE: tl.constexpr,
    SUM: tl.constexpr, EVEN_F: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (i_r, i_c) of Kz and Kv of chunk i_n. STORE: into kz, kv [chunks, PADDED, PADDED]. SUM: their
    product, summed, into partial [chunks, tiles, tiles]; the mirror image counts, and its place is 0."""
    side = PADDED // BLOCK_T
    i_r, i_c, i_n = tl.program_id(0) // side, tl.program_id(0) % side, tl.program_id(1)
    i_partial = (i_n * side + i_r) * side + i_c
    if i_c > i_r:
        if SUM:
            tl.store(partial + i_partial, 0.0)
        return
    i_first = tl.load(first + i_n)
    b_kz = gram_tile(
        z, z_tiles, i_first, i_r, i_c, C, F, EVEN_F, DESCRIPTORS, PRECISION, BLOCK_T, BLOCK_K
    )
    if STORE:
        store_mirrored(kz, b_kz, i_n, i_r, i_c, PADDED, BLOCK_T)
    b_kv = gram_tile(
        v, v_tiles, i_first, i_r, i_c, C, D, EVEN_D, DESCRIPTORS, PRECISION, BLOCK_T, BLOCK_K
    )
    if STORE:
        store_mirrored(kv, b_kv, i_n, i_r, i_c, PADDED, BLOCK_T)
    if SUM:
        tl.store(partial + i_partial, tl.sum(b_kz * b_kv) * tl.where(i_r == i_c, 1.0, 2.0))


@triton.jit
def step_size_fwd_iterate_kernel(
    gram, x, y, x_next, y_next, PADDED, FIRST: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x_next = y / sqrt(x . y) and y_next = K x_next: BLOCK_R rows of chunk i_n, vectors [chunks, PADDED].
    FIRST: there is no x, y is x_next."""
    i_r, i_n = tl.program_id(0), tl.program_id(1)
    o_r, o_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    i_vector = i_n.to(tl.int64) * PADDED
    i_row = i_vector + i_r * BLOCK_R
    p_gram = gram + i_row * PADDED + (o_r[:, None] * PADDED + o_c[None, :])
    b_product = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_square = tl.zeros([BLOCK_C], tl.float32)
    for i_c in range(0, PADDED, BLOCK_C):
        b_y = tl.load(y + i_vector + i_c + o_c)
        b_product += tl.load(p_gram + i_c) * b_y[None, :]
        if not FIRST:
            b_square += tl.load(x + i_vector + i_c + o_c) * b_y
    b_next = tl.sum(b_product, 1)
    if FIRST:
        tl.store(y_next + i_row + o_r, b_next)
    else:
        norm = tl.sqrt_rn(tl.maximum(tl.sum(b_square), SQUARE_EPS))
        tl.store(y_next + i_row + o_r, b_next / norm)
        tl.store(x_next + i_row + o_r, tl.load(y + i_row + o_r) / norm)


def scratch_bytes(z: Tensor, chunk_size: int) -> int:
    """Both Gram matrices of a chunk, in the largest tiles."""
    tile = gram_tiles(architecture(z.device), z.element_size(), chunk_size, GRID_LIMIT)
    return 8 * (ceil_div(chunk_size, tile.rows) * tile.rows) ** 2


@dataclass(frozen=True)
class Grams:
    """kz, kv [n, padded, padded] float32; `square` = ||G||_F^2 [n] float64. None: not asked for."""

    kz: Tensor | None
    kv: Tensor | None
    square: Tensor | None


def gram_matrices(z: Tensor, v: Tensor, first: Tensor, chunk_size: int, *, store: bool, norm: bool) -> Grams:
    tile = gram_tiles(architecture(z.device), z.element_size(), chunk_size, len(first))
    side = ceil_div(chunk_size, tile.rows)
    padded = side * tile.rows
    scratch = (len(first), padded, padded)
    kz, kv = (z.new_empty(scratch, dtype=torch.float32) if store else None for _ in range(2))
    partial = z.new_empty(len(first), side * side, dtype=torch.float32) if norm else None
    d, f = v.shape[2], z.shape[2]
    views = [descriptor(x.flatten(0, 1), (tile.rows, tile.k)) for x in (z, v)]
    described = z.element_size() == 2 and None not in views
    launch(
        step_size_fwd_gram_kernel, (side * side, len(first)), z=z, v=v,
        z_tiles=views[0] if described else None, v_tiles=views[1] if described else None, first=first,
        kz=kz, kv=kv, partial=partial, C=chunk_size, PADDED=padded, F=f, D=d, STORE=store, SUM=norm,
        EVEN_F=f % tile.k == 0, EVEN_D=d % tile.k == 0, DESCRIPTORS=described,
        PRECISION=input_precision(z.dtype), BLOCK_T=tile.rows, BLOCK_K=tile.k, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return Grams(kz, kv, partial.sum(1, dtype=torch.float64).clamp_min(0) if norm else None)


def iterate(
    grams: Grams, means: Tensor, first: Tensor, chunk_size: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """x and y of all L + 1 = 2 iterations + 1 steps, [L + 1, n, padded]; `means` = V 1/D [B * T]."""
    chunks, padded, _ = grams.kz.shape
    xs, ys = means.new_empty(2, 2 * iterations + 1, chunks, padded)
    xs[0, :, chunk_size:] = 0
    xs[0, :, :chunk_size] = means[first[:, None] + torch.arange(chunk_size, device=means.device)]
    tile = iterate_tiles(architecture(means.device), padded)
    for i in range(len(xs)):
        before = max(i - 1, 0)
        launch(
            step_size_fwd_iterate_kernel, (padded // tile.rows, chunks), gram=(grams.kz, grams.kv)[i % 2],
            x=xs[before], y=ys[before] if i else xs[0], x_next=xs[i], y_next=ys[i], PADDED=padded,
            FIRST=i == 0, BLOCK_R=tile.rows, BLOCK_C=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    return xs, ys


def token_means(v: Tensor) -> Tensor:
    return v.mean(-1, dtype=torch.float32).flatten()


def spectral_norm(xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma [n]; the squares x_i . y_i and the norms of all steps, [L + 1, n]."""
    squares = (xs * ys).sum(-1)
    norms = squares.clamp_min(NORMALIZE_EPS**2).sqrt()
    return squares[-1] / norms[-1], squares, norms


def forward(z, v, chunk_size: int, cu_seqlens, rule: Spectral | Clipped) -> Tensor:
    """[B, NC] float32; 0 for incomplete chunks, which are never written."""
    chunks = complete_chunks(z, chunk_size, cu_seqlens)
    steps = z.new_zeros(z.shape[0], chunks.columns, dtype=torch.float32)
    clipped = isinstance(rule, Clipped)
    means = None if clipped else token_means(v)
    for first, place in chunks.groups(1 if clipped else scratch_bytes(z, chunk_size)):
        grams = gram_matrices(z, v, first, chunk_size, store=not clipped, norm=clipped)
        if clipped:
            excess = (grams.square.sqrt() / rule.max_norm).clamp_min(1)
            step = (rule.lr / excess).float()
        else:
            sigma, *_ = spectral_norm(*iterate(grams, means, first, chunk_size, rule.iterations))
            step = rule.lr / sigma.clamp_min(SIGMA_FLOOR)
        steps.view(-1)[place] = step
    return steps
