"""The scan's backward as fused kernels: blocks in reverse, the state recomputed by subtraction.

With G the gradient that reaches the state after block n, W the state it reads, and dY' = dY r (r = 1
without row-norm preservation), a block takes these launches:

    norm      r, c = (dr r) / ||W||^2, dY'                      only with row-norm preservation
    token     dZ = s V G + dY' W,   dV = s Z G^T                from rounded copies of G and W
    state     G <- G + dY'^T Z - diag(c) W,   W <- W - s V^T Z  the last with V, Z of the block before

A launch covers block n of every sequence (`blocks`). `state` leaves block n and enters block n - 1 tile
by tile, in place, and emits the rounded copies that the next token launch reads. On the way it sums,
per tile and from its float32 accumulators, what belongs to the block that it enters:

    ds = <V^T Z, G>,    ||W||^2 = rowsum W^2,    dr = rowsum W * (dY^T Z)

The last block of a sequence is entered from the carried state, which is copied, never modified; the
state before the first block is the known one, to the bit. Partial sums lie in buffers of their own and
are added in a fixed order.

In a super-chunk the token kernel adds the attention form, and further launches prepare it: see
`triton_bwd_super`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops._row_norm import square_norm
from ttt_kernels.ops.scan.blocks import BlockTable, block_table
from ttt_kernels.ops.scan.heuristics import backward_tiles, fused_super_chunk
from ttt_kernels.ops.scan.triton_bwd_super import (
    SuperChunks,
    add_later_readers,
    add_mixed,
    add_row_products,
)
from ttt_kernels.ops.scan.triton_fwd import FLOOR, halve, load_block, sum_partials
from ttt_kernels.ops.triton_launch import architecture, input_precision, launch
from ttt_kernels.types import ceil_div


@triton.jit
def quarter(x, i: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns [i, i + 1) COLUMNS / 4: a whole tile of the state beside x would not fit in registers."""
    left, right = halve(x, ROWS, COLUMNS)
    left, right = halve(left if i < 2 else right, ROWS, COLUMNS // 2)
    return left if i % 2 == 0 else right


@triton.jit
def tile_quarter(i_d, i_f, i: tl.constexpr, D, F, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr):
    """Offsets of a quarter from the corner of its tile of W, and their mask."""
    o_d = tl.arange(0, BLOCK_D)[:, None]
    o_f = (i * (BLOCK_F // 4) + tl.arange(0, BLOCK_F // 4))[None, :]
    return o_d * F + o_f, (i_d * BLOCK_D + o_d < D) & (i_f * BLOCK_F + o_f < F)


@triton.jit
def add_outer_products(
    a, z, tokens, i_d, i_f, D, F, b, EVEN_T: tl.constexpr, EVEN_D: tl.constexpr,
    EVEN_F: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """b [d, f] + the sum of a_t z_t^T over tokens; a and z point at the first."""
    o_k = tl.arange(0, BLOCK_K)
    # Columns past the end repeat the last one: what they make is not stored.
    o_d, o_f = i_d * BLOCK_D + tl.arange(0, BLOCK_D), i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    r_d = o_d if EVEN_D else tl.minimum(o_d, D - 1)
    r_f = o_f if EVEN_F else tl.minimum(o_f, F - 1)
    p_a = a + (o_k[:, None] * D + r_d[None, :])
    p_z = z + (o_k[:, None] * F + r_f[None, :])
    for i_k in range(0, tokens, BLOCK_K):
        if EVEN_T:
            b_a, b_z = tl.load(p_a), tl.load(p_z)
        else:
            m_k = (i_k + o_k < tokens)[:, None]
            b_a, b_z = tl.load(p_a, mask=m_k, other=0.0), tl.load(p_z, mask=m_k, other=0.0)
        b = tl.dot(tl.trans(b_a), b_z, b, input_precision=PRECISION)
        p_a += BLOCK_K * D
        p_z += BLOCK_K * F
    return b


@triton.jit
def add_times_weight(
    a, weight, r_t, r_f, D, F, b, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """b [t, f] + a [t, d] weight [d, f], for rows r_t of a and columns r_f of the weight."""
    o_k = tl.arange(0, BLOCK_K)
    p_a = a + (r_t[:, None] * D + o_k[None, :])
    p_w = weight + (o_k[:, None] * F + r_f[None, :])
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
def inner_product(
    b, p_grad, i_d, i_f, D, F, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr
):
    """<b, G> over one tile."""
    total = 0.0
    for i in tl.static_range(4):
        o_w, m_w = tile_quarter(i_d, i_f, i, D, F, BLOCK_D, BLOCK_F)
        b_g = tl.load(p_grad + o_w, mask=m_w, other=0.0)
        total += tl.sum(tl.sum(quarter(b, i, BLOCK_D, BLOCK_F) * b_g, axis=1), axis=0)
    return total


@triton.jit
def scan_bwd_state_kernel(
    z, v, dy, dy_block, base, weight, shadow, grad, grad_shadow, ratio, pull, norms, products, dsteps,
    step_size, blocks, lr, D, F, CHUNK, BLOCK, base_stride, dstep_width,
    LEAVE: tl.constexpr, ENTER: tl.constexpr, SUBTRACT: tl.constexpr, HAS_GRAD: tl.constexpr,
    HAS_STEPS: tl.constexpr, PRESERVE: tl.constexpr, SUPER: tl.constexpr, SHADOW: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_C: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [d, f] of G and W: leave the block of a row, enter the one before it.

    Without LEAVE the row is the block to enter, for the last block of a sequence. `base` holds the
    state after the block to enter (SUBTRACT) or before it. `dy_block` is dY'' in a super-chunk with
    preservation; else r scales the product with dY.
    """
    columns = tl.cdiv(D, BLOCK_D)
    tiles = columns * tl.cdiv(F, BLOCK_F)
    i_row, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_d, i_f = i_tile % columns, i_tile // columns
    first, tokens, written, i_sequence, i_chunk, last = load_block(blocks, i_row)
    if LEAVE or last == 1:
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        corner = i_d.to(tl.int64) * BLOCK_D * F + i_f * BLOCK_F
        i_state = i_sequence * D * F + corner
        zero = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
        if LEAVE:
            p_dy = dy + first * D
            if PRESERVE and SUPER:
                p_dy = dy_block + i_row.to(tl.int64) * BLOCK * D
            b = add_outer_products(
                p_dy, z + first * F, tokens, i_d, i_f, D, F, zero,
                EVEN_T, EVEN_D, EVEN_F, PRECISION, BLOCK_D, BLOCK_F, BLOCK_K,
            )  # fmt: skip
            if PRESERVE:
                b_pull = tl.load(pull + i_sequence * D + o_d, mask=m_d, other=0.0)[:, None]
                if not SUPER:
                    b *= tl.load(ratio + i_sequence * D + o_d, mask=m_d, other=0.0)[:, None]
            for i in tl.static_range(4):
                o_w, m_w = tile_quarter(i_d, i_f, i, D, F, BLOCK_D, BLOCK_F)
                b_g = quarter(b, i, BLOCK_D, BLOCK_F)
                b_g += tl.load(grad + i_state + o_w, mask=m_w, other=0.0)
                if PRESERVE:
                    b_g -= b_pull * tl.load(weight + i_state + o_w, mask=m_w, other=0.0)
                tl.store(grad + i_state + o_w, b_g, mask=m_w)
                if SHADOW:
                    tl.store(grad_shadow + i_state + o_w, b_g.to(shadow.dtype.element_ty), mask=m_w)
        if ENTER:
            if LEAVE:  # every block but the last of a sequence is full
                first -= BLOCK
                tokens, written = tokens * 0 + BLOCK, tokens * 0 + BLOCK
                i_chunk -= BLOCK // CHUNK
                tl.debug_barrier()  # other threads of this program have stored G
            p_v, p_z = v + first * D, z + first * F
            b = zero
            if HAS_STEPS and (SUBTRACT or HAS_GRAD):
                for i_c in range(0, written, CHUNK):
                    b_c = add_outer_products(
                        p_v + i_c * D, p_z + i_c * F, CHUNK, i_d, i_f, D, F, tl.zeros_like(zero),
                        EVEN_C, EVEN_D, EVEN_F, PRECISION, BLOCK_D, BLOCK_F, BLOCK_K,
                    )  # fmt: skip
                    i_step = i_chunk + i_c // CHUNK
                    if HAS_GRAD:
                        dstep = inner_product(b_c, grad + i_state, i_d, i_f, D, F, BLOCK_D, BLOCK_F)
                        tl.store(dsteps + i_step * dstep_width + i_tile, dstep)
                    b += tl.load(step_size + i_step) * b_c
            elif SUBTRACT:
                b = add_outer_products(
                    p_v, p_z, written, i_d, i_f, D, F, zero,
                    EVEN_C, EVEN_D, EVEN_F, PRECISION, BLOCK_D, BLOCK_F, BLOCK_K,
                ) * lr  # fmt: skip
            squares = tl.zeros([BLOCK_D], tl.float32)
            for i in tl.static_range(4):
                o_w, m_w = tile_quarter(i_d, i_f, i, D, F, BLOCK_D, BLOCK_F)
                p_base = base + i_sequence * base_stride + corner
                b_w = tl.load(p_base + o_w, mask=m_w, other=0.0).to(tl.float32)
                if SUBTRACT:
                    b_w -= tl.where(m_w, quarter(b, i, BLOCK_D, BLOCK_F), 0.0)
                squares += tl.sum(b_w * b_w, axis=1)
                tl.store(weight + i_state + o_w, b_w, mask=m_w)
                if SHADOW:
                    tl.store(shadow + i_state + o_w, b_w.to(shadow.dtype.element_ty), mask=m_w)
            if PRESERVE:
                o_part = (i_sequence * tl.cdiv(F, BLOCK_F) + i_f) * D + o_d
                tl.store(norms + o_part, squares, mask=m_d)
                if not SUPER:
                    b = add_outer_products(
                        dy + first * D, p_z, tokens, i_d, i_f, D, F, zero,
                        EVEN_T, EVEN_D, EVEN_F, PRECISION, BLOCK_D, BLOCK_F, BLOCK_K,
                    )  # fmt: skip
                    tl.debug_barrier()
                    sums = tl.zeros([BLOCK_D], tl.float32)
                    for i in tl.static_range(4):
                        o_w, m_w = tile_quarter(i_d, i_f, i, D, F, BLOCK_D, BLOCK_F)
                        b_w = tl.load(weight + i_state + o_w, mask=m_w, other=0.0)
                        sums += tl.sum(b_w * quarter(b, i, BLOCK_D, BLOCK_F), axis=1)
                    tl.store(products + o_part, sums, mask=m_d)


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
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    m_y = (o_t < tokens)[:, None] & m_d[None, :]
    b_dy = tl.load(dy + (first + o_t)[:, None] * D + o_d[None, :], mask=m_y, other=0.0).to(tl.float32)
    p_block = dy_block + (i_row.to(tl.int64) * BLOCK + o_t)[:, None] * D + o_d[None, :]
    tl.store(p_block, (b_dy * b_ratio[None, :]).to(dy_block.dtype.element_ty), mask=m_y)


@triton.jit
def scan_bwd_token_kernel(
    z, v, dy, dz, dv, shadow, grad_shadow, scores, mixed, extra, step_size, blocks,
    lr, D, F, CHUNK, BLOCK, value_tiles,
    HAS_DSTATE: tl.constexpr, HAS_STEPS: tl.constexpr, PRESERVE: tl.constexpr, SUPER: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_F: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs [0, value_tiles) make tiles [t, d] of dV, the others [t, f] of dZ.

    With preservation `dy` (dY', dY'') and `mixed` hold the blocks of this launch, else all tokens.
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
    m_t = o_t < written
    r_t = tl.minimum(tl.arange(0, BLOCK_T), tokens - 1 - start)  # rows past the end repeat the last one
    i_first = first + start
    i_block = i_row.to(tl.int64) * BLOCK if PRESERVE else first  # the block's place in dy and mixed
    i_state = i_sequence * D * F
    b_step = tl.where(m_t, lr, 0.0)
    if HAS_STEPS:
        b_step = tl.load(step_size + i_chunk + o_t // CHUNK, mask=m_t, other=0.0)
    b = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if is_value:
        if start < (written if SUPER else reached):
            r_d = o_n if EVEN_D else tl.minimum(o_n, D - 1)
            if start < reached:
                p_g = grad_shadow + i_state + i_n.to(tl.int64) * BLOCK_N * F
                r_n = r_d - i_n * BLOCK_N
                b = add_row_products(z + i_first * F, p_g, r_t, r_n, F, b, EVEN_F, PRECISION, BLOCK_K)
            if SUPER and PRESERVE:
                b += tl.load(extra + (i_block + start) * D + r_t[:, None] * D + r_d[None, :])
            b *= b_step[:, None]
            if SUPER:
                b = add_later_readers(
                    dy + i_block * D, scores + first * BLOCK, start, o_t, r_d, tokens, written, b,
                    D, CHUNK, BLOCK, PRECISION, BLOCK_K,
                )  # fmt: skip
            p_v = dv + i_first * D + (tl.arange(0, BLOCK_T)[:, None] * D + o_n[None, :])
            tl.store(p_v, b.to(dv.dtype.element_ty), mask=m_t[:, None] & (o_n < D)[None, :])
    elif start < tokens:
        r_f = o_n if EVEN_F else tl.minimum(o_n, F - 1)
        if start < reached:
            p_g = grad_shadow + i_state
            b = add_times_weight(v + i_first * D, p_g, r_t, r_f, D, F, b, EVEN_D, PRECISION, BLOCK_K)
            b = tl.where(m_t[:, None], b * b_step[:, None], 0.0)
        p_dy = dy + (i_block + start) * D
        b = add_times_weight(p_dy, shadow + i_state, r_t, r_f, D, F, b, EVEN_D, PRECISION, BLOCK_K)
        if SUPER:
            b = add_mixed(
                z + first * F, mixed + i_block * BLOCK, start, o_t, r_f, tokens, written, b,
                F, BLOCK, PRECISION, BLOCK_T, BLOCK_K,
            )  # fmt: skip
        p_z = dz + i_first * F + (tl.arange(0, BLOCK_T)[:, None] * F + o_n[None, :])
        tl.store(p_z, b.to(dz.dtype.element_ty), mask=(o_t < tokens)[:, None] & (o_n < F)[None, :])


class Backward:
    """Buffers and launches of one call. `grad` is G, in the end the gradient of the initial states."""

    def __init__(
        self, dy, dstate, carried, z, v, w0, step_size, lr, state, table: BlockTable, chunk, preserve, dense
    ) -> None:
        self.dy, self.z, self.v, self.table, self.carried = dy, z, v, table, carried
        self.initial = w0 if state is None else state
        self.d, self.f = w0.shape
        self.chunk, self.super = chunk, table.length > chunk
        self.preserve, self.has_dstate, self.has_steps = preserve, dstate is not None, step_size is not None
        rows = max((len(table.of(n)) for n in table.launches), default=0)
        self.tiles = backward_tiles(
            architecture(z.device), z.element_size(), rows, table.length, self.d, self.f
        )
        self.precision = input_precision(z.dtype)
        self.even_blocks = dense and table.length % self.tiles.k == 0 and z.shape[1] % self.tiles.k == 0
        self.grad = torch.zeros_like(carried) if dstate is None else dstate.clone()
        self.weight = torch.empty_like(carried)
        self.rounded = z.dtype != torch.float32
        self.shadow = torch.empty_like(carried, dtype=z.dtype) if self.rounded else self.weight
        self.grad_shadow = self.grad.to(z.dtype) if self.rounded else self.grad
        self.dz, self.dv = torch.empty_like(z), torch.zeros_like(v)
        self.steps = {"step_size": step_size if self.has_steps else carried, "lr": lr}
        self.parts = ceil_div(self.f, self.tiles.f)
        self.state_tiles = self.parts * ceil_div(self.d, self.tiles.d)
        sequences, tokens = (table.sequences, rows * table.length) if preserve else (0, 0)
        self.norms, self.products = (self.float32(sequences, self.parts, self.d) for _ in range(2))
        self.ratio, self.pull = (self.float32(sequences, self.d) for _ in range(2))
        self.norm_grad = torch.zeros_like(self.ratio)
        self.w0_norms = square_norm(w0.float()) if preserve else self.ratio
        self.dy_block = z.new_empty(tokens, self.d) if preserve else dy
        parts = self.state_tiles + (SuperChunks.dstep_parts(self) if self.super else 0)
        self.dsteps = torch.zeros(
            step_size.numel() if self.has_steps else 0, parts, dtype=torch.float32, device=z.device
        )
        self.super_chunks = SuperChunks(self) if self.super else None

    def float32(self, *shape: int) -> Tensor:
        return self.z.new_empty(shape, dtype=torch.float32)

    @property
    def sizes(self) -> dict:
        """Sizes and compile-time facts that several kernels share."""
        t = self.tiles
        return dict(
            D=self.d, F=self.f, CHUNK=self.chunk, BLOCK=self.table.length, HAS_STEPS=self.has_steps,
            PRESERVE=self.preserve, PRECISION=self.precision, EVEN_D=self.d % max(t.d, t.f, t.k) == 0,
            EVEN_F=self.f % max(t.f, t.k) == 0, BLOCK_K=t.k, num_warps=t.warps, num_stages=t.stages,
            **self.steps,
        )  # fmt: skip

    def state(self, n: int, base: Tensor, *, leave: bool, enter: bool, subtract: bool) -> None:
        """Leave block n and enter the one before it, or, without `leave`, enter block n."""
        blocks, t = self.table.of(n), self.tiles
        launch(
            scan_bwd_state_kernel, (len(blocks) * self.state_tiles,), z=self.z, v=self.v, dy=self.dy,
            dy_block=self.dy_block, base=base, weight=self.weight, shadow=self.shadow, grad=self.grad,
            grad_shadow=self.grad_shadow, ratio=self.ratio, pull=self.pull, norms=self.norms,
            products=self.products, dsteps=self.dsteps, blocks=blocks,
            base_stride=self.d * self.f if base.dim() == 3 else 0, dstep_width=self.dsteps.shape[1],
            LEAVE=leave, ENTER=enter, SUBTRACT=subtract, HAS_GRAD=leave or self.has_dstate,
            SUPER=self.super, SHADOW=self.rounded, EVEN_T=self.even_blocks,
            EVEN_C=self.chunk % t.k == 0, BLOCK_D=t.d, BLOCK_F=t.f, **self.sizes,
        )  # fmt: skip

    def norm(self, n: int) -> None:
        """r, c and dY' of block n."""
        blocks = self.table.of(n)
        tile_t, tile_d = min(self.tiles.t, 32), 64
        launch(
            scan_bwd_norm_kernel,
            (ceil_div(self.d, tile_d) * ceil_div(self.table.length, tile_t) * len(blocks),),
            dy=self.dy, dy_block=self.dy_block, norms=self.norms, products=self.products,
            w0_norms=self.w0_norms, ratio=self.ratio, pull=self.pull, norm_grad=self.norm_grad,
            blocks=blocks, D=self.d, BLOCK=self.table.length, parts=self.parts, BLOCK_T=tile_t,
            BLOCK_D=tile_d, num_warps=4,
        )  # fmt: skip

    def token(self, n: int) -> None:
        """dZ and dV of block n."""
        blocks, t, part = self.table.of(n), self.tiles, self.super_chunks
        rows = ceil_div(self.table.length, t.t) * len(blocks)
        value_tiles, key_tiles = (rows * ceil_div(size, t.f) for size in (self.d, self.f))
        launch(
            scan_bwd_token_kernel, (value_tiles + key_tiles,), z=self.z, v=self.v, dy=self.dy_block,
            dz=self.dz, dv=self.dv, shadow=self.shadow, grad_shadow=self.grad_shadow,
            scores=part.scores if part else self.z, mixed=part.mixed if part else self.z,
            extra=part.raw if part else self.z, blocks=blocks, value_tiles=value_tiles,
            HAS_DSTATE=self.has_dstate, SUPER=self.super, BLOCK_T=t.t, BLOCK_N=t.f, **self.sizes,
        )  # fmt: skip

    def run(self, return_state: bool) -> None:
        table, total = self.table, len(self.table.launches)
        if self.super:
            self.super_chunks.prepare()
        for n in reversed(table.launches):
            if n + 1 == total or len(table.of(n)) > len(table.of(n + 1)):  # sequences that end here
                base, subtract = (self.carried, return_state) if n else (self.initial, False)
                self.state(n, base, leave=False, enter=True, subtract=subtract)
            if self.super and self.preserve:
                self.super_chunks.block(n)
            elif self.preserve:
                self.norm(n)
            self.token(n)
            base, subtract = (self.weight, True) if n > 1 else (self.initial, False)
            self.state(n, base, leave=True, enter=n > 0, subtract=subtract)

    def dw0(self, w0: Tensor, state: Tensor | None) -> Tensor:
        """dw0 = the sum of G_0 over sequences that start from it + diag(sum dr / ||W|| / ||w0||) w0."""
        dw0 = self.grad.sum(0) if state is None else torch.zeros_like(w0, dtype=torch.float32)
        if self.preserve:
            # A row of zeros has no direction.
            squares = self.w0_norms
            pull = torch.where(squares > 0, self.norm_grad.sum(0) / torch.where(squares > 0, squares, 1), 0)
            dw0.addcmul_(w0.float(), pull[:, None])
        return dw0.to(w0.dtype)


def backward(
    dy: Tensor,
    dstate: Tensor | None,
    carried: Tensor,
    z: Tensor,
    v: Tensor,
    w0: Tensor,
    step_size: Tensor | None,
    lr: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    preserve_row_norm: bool,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dz, dv, dw0, dstep_size, dstate, as `eager_bwd.backward`."""
    batch, tokens = z.shape[:2]
    chunk = min(chunk_size, max(tokens, 1) + 1)  # the same chunks, and no overflow
    block = fused_super_chunk(chunk, *w0.shape)
    table = block_table(batch, tokens, chunk, block, cu_seqlens, z.device)
    part = Backward(
        dy, dstate, carried, z, v, w0, step_size, lr, state, table, chunk, preserve_row_norm,
        cu_seqlens is None,
    )  # fmt: skip
    part.run(return_state)
    dstep = part.dsteps.sum(1).view_as(step_size) if step_size is not None else carried.new_empty(0)
    dstart = part.grad if state is not None else carried.new_empty(0)
    return part.dz, part.dv, part.dw0(w0, state), dstep, dstart
