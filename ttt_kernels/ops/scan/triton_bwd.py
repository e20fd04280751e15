"""The scan's backward as fused kernels: blocks in reverse, the state recomputed by subtraction.

With G the gradient that reaches the state after block n, W the state it reads, and dY' = dY r (r = 1
without row-norm preservation), a block takes these launches:

    enter     W <- W - s V^T Z,   ||W||^2 = rowsum W^2
    leave     dr = rowsum W * (dY^T Z)                           this and
    norm      r, c = (dr r) / ||W||^2, dY'                       this with row-norm preservation only
    token     dZ = s V G + dY' W,   dV = s Z G^T,   ds = <V, Z G^T>
    leave     G <- G + dY'^T Z - diag(c) W

A launch covers block n of every sequence (`blocks`). `enter` and `leave` own their tiles of W and G
and work in place, in float32; they emit copies rounded to the dtype of z, which `token` reads. The last
block of a sequence is entered from the carried state, which may lie where W does; the state before the
first block is the known one, to the bit. Partial sums lie in buffers of their own and are added in a
fixed order.

In a super-chunk the token kernel adds the attention form, and further launches prepare it: see
`triton_bwd_super`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.ops._row_norm import initial_weight_gradient, square_norm
from ttt_kernels.ops.scan.blocks import BlockTable, block_table
from ttt_kernels.ops.scan.heuristics import Tiles, backward_tiles, fused_super_chunk
from ttt_kernels.ops.scan.triton_bwd_state import scan_bwd_enter_kernel, scan_bwd_leave_kernel
from ttt_kernels.ops.scan.triton_bwd_super import (
    SuperChunks,
    add_later_readers,
    add_mixed,
    add_row_products,
)
from ttt_kernels.ops.scan.triton_fwd_step import FLOOR, load_block, piece, row_ratio, sum_partials
from ttt_kernels.ops.triton_launch import architecture, descriptors, input_precision, launch
from ttt_kernels.types import ceil_div


@triton.jit
def add_times_weight(
    a, weight, r_t, r_f, size, D, F, b, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """b [t, f] + a [t, d] weight [d, f], for rows r_t of a and columns r_f of the weight."""
    o_k = tl.arange(0, BLOCK_K)
    p_a = a + (r_t[:, None] * D + o_k[None, :])
    p_w = weight + (o_k[:, None] * F + r_f[None, :])
    for i_k in range(0, size, BLOCK_K):
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
    b_ratio = row_ratio(tl.load(w0_norms + o_d, mask=m_d, other=0.0), norm)
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
def token_steps(steps, lr, o_t, m_t, CHUNK, HAS_STEPS: tl.constexpr):
    """Step size of every token, 0 where it writes nothing."""
    if HAS_STEPS:
        return tl.load(steps + o_t // CHUNK, mask=m_t, other=0.0)
    else:
        return tl.where(m_t, lr, 0.0)


@triton.jit(do_not_specialize=["value_tiles"])
def scan_bwd_token_kernel(
    z, v, dy, dz, dv, shadow, grad_shadow, scores, mixed, extra, dsteps, step_size, blocks,
    lr, D, F, CHUNK, BLOCK, value_tiles,
    HAS_DSTATE: tl.constexpr, HAS_STEPS: tl.constexpr, PRESERVE: tl.constexpr, SUPER: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_F: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs [0, value_tiles) make tiles [t, d] of dV, the others [t, f] of dZ.

    With preservation `dy` (dY', dY'') holds the blocks of this launch, else all tokens.
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
    i_block = i_row.to(tl.int64) * BLOCK if PRESERVE else first  # the block's place in dy
    i_pair = i_row.to(tl.int64) * BLOCK * BLOCK
    i_state = i_sequence * D * F
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if is_value:
        if start < (written if SUPER else reached):
            b = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            r_d = o_n if EVEN_D else tl.minimum(o_n, D - 1)
            p_g = grad_shadow + i_state + i_n.to(tl.int64) * BLOCK_N * F
            r_n = r_d - i_n * BLOCK_N
            summed = tl.where(start < reached, F, 0)
            b = add_row_products(z + i_first * F, p_g, r_t, r_n, summed, F, b, EVEN_F, PRECISION, BLOCK_K)
            if SUPER:
                b = add_later_readers(
                    dy + i_block * D, scores + i_pair, start, o_t, r_d, tokens, b,
                    D, CHUNK, BLOCK, PRECISION, BLOCK_K,
                )  # fmt: skip
            b_step = token_steps(step_size + i_chunk, lr, o_t, m_t, CHUNK, HAS_STEPS)[:, None]
            b_dstep = tl.zeros([BLOCK_T], tl.float32)
            for i in tl.static_range(4):
                o_d = i_n * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
                o_v = i_first * D + (tl.arange(0, BLOCK_T)[:, None] * D + o_d[None, :])
                m_v = m_t[:, None] & (o_d < D)[None, :]
                b_q = piece(b, i, 4, BLOCK_T, BLOCK_N)
                if SUPER and PRESERVE:
                    b_q += tl.load(extra + (i_block - first) * D + o_v, mask=m_v, other=0.0)
                tl.store(dv + o_v, (b_q * b_step).to(dv.dtype.element_ty), mask=m_v)
                if HAS_STEPS:
                    b_v = tl.load(v + o_v, mask=m_v, other=0.0)
                    b_dstep += tl.sum(b_v.to(tl.float32) * b_q, axis=1)
            if HAS_STEPS:
                stop = tl.minimum(start + BLOCK_T, written)
                for i_c in range(start // CHUNK, tl.cdiv(stop, CHUNK)):
                    p_part = dsteps + (i_chunk + i_c) * rows * columns + i_t * columns + i_n
                    # As a column: Triton 3.7 cannot reduce a vector of sums of products for sm_100.
                    b_part = tl.where(o_t // CHUNK == i_c, b_dstep, 0.0)[:, None]
                    tl.store(p_part + tl.arange(0, 1), tl.sum(b_part, axis=0))
    elif start < tokens:
        b = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        r_f = o_n if EVEN_F else tl.minimum(o_n, F - 1)
        p_g = grad_shadow + i_state
        summed = tl.where(start < reached, D, 0)
        b = add_times_weight(v + i_first * D, p_g, r_t, r_f, summed, D, F, b, EVEN_D, PRECISION, BLOCK_K)
        b *= token_steps(step_size + i_chunk, lr, o_t, o_t < reached, CHUNK, HAS_STEPS)[:, None]
        b = tl.where(m_t[:, None], b, 0.0)
        p_dy = dy + (i_block + start) * D
        b = add_times_weight(p_dy, shadow + i_state, r_t, r_f, D, D, F, b, EVEN_D, PRECISION, BLOCK_K)
        if SUPER:
            b = add_mixed(
                z + first * F, mixed + i_pair, start, o_t, r_f, tokens, written, b,
                F, BLOCK, PRECISION, BLOCK_T, BLOCK_K,
            )  # fmt: skip
        p_z = dz + i_first * F + (tl.arange(0, BLOCK_T)[:, None] * F + o_n[None, :])
        tl.store(p_z, b.to(dz.dtype.element_ty), mask=(o_t < tokens)[:, None] & (o_n < F)[None, :])


class Backward:
    """Buffers and launches of one call. `grad` is G, in the end the gradient of the initial states."""

    def __init__(
        self, dy, dstate, carried, z, v, w0, step_size, lr, state, table: BlockTable, chunk, preserve, dense,
        consume,
    ) -> None:  # fmt: skip
        self.dy, self.z, self.v, self.table, self.carried = dy, z, v, table, carried
        self.initial = w0 if state is None else state
        self.d, self.f = w0.shape
        self.chunk, self.super = chunk, table.length > chunk
        self.preserve, self.has_dstate, self.has_steps = preserve, dstate is not None, step_size is not None
        rows = max((len(table.of(n)) for n in table.launches), default=0)
        self.token_tile, self.state_tile = backward_tiles(
            architecture(z.device), z.element_size(), rows, table.length, self.d, self.f
        )
        self.precision = input_precision(z.dtype)
        k = self.state_tile.k
        self.even_blocks = dense and table.length % k == 0 and z.shape[1] % k == 0
        self.rounded = z.dtype != torch.float32
        self.grad = torch.zeros_like(carried) if dstate is None else dstate.clone()
        self.weight = carried if consume else torch.empty_like(carried)
        self.shadow = torch.empty_like(carried, dtype=z.dtype) if self.rounded else self.weight
        self.grad_shadow = self.grad.to(z.dtype) if self.rounded else self.grad
        self.dz, self.dv = torch.empty_like(z), torch.zeros_like(v)
        self.steps = {"step_size": step_size if self.has_steps else carried, "lr": lr}
        self.parts = ceil_div(self.f, self.state_tile.w_columns)
        sequences, tokens = (table.sequences, rows * table.length) if preserve else (0, 0)
        self.norms, self.products = (self.float32(sequences, self.parts, self.d) for _ in range(2))
        self.ratio, self.pull = (self.float32(sequences, self.d) for _ in range(2))
        self.norm_grad = torch.zeros_like(self.ratio)
        self.w0_norms = square_norm(w0, torch.float32) if preserve else self.ratio
        self.dy_block = z.new_empty(tokens, self.d) if preserve else dy
        t = self.token_tile
        parts = ceil_div(table.length, t.t) * ceil_div(self.d, t.d)
        self.dsteps = torch.zeros_like(self.grad.new_empty(step_size.numel() if self.has_steps else 0, parts))
        self.super_chunks = SuperChunks(self) if self.super else None

    def float32(self, *shape: int) -> Tensor:
        return self.z.new_empty(shape, dtype=torch.float32)

    @property
    def chunks(self) -> dict:
        return dict(CHUNK=self.chunk, HAS_STEPS=self.has_steps, **self.steps)

    def state_cut(self, *, rescales: bool = False) -> dict:
        """Compile-time facts of the launches over tiles of the state. `rescales`: the sum between products,
        for which sm_100 moves it from its tensor memory to registers; a second program has no room then."""
        t = self.state_tile
        options = t.launch
        if rescales and architecture(self.z.device) >= 100:
            options.pop("maxnreg", None)
        return dict(
            D=self.d, F=self.f, PRECISION=self.precision, EVEN_D=self.d % t.d == 0,
            EVEN_F=self.f % t.w_columns == 0, BLOCK_D=t.d, BLOCK_F=t.f, MORE_F=t.more_f, BLOCK_K=t.k,
            **options,
        )  # fmt: skip

    def state_views(self, a: Tensor, even: bool) -> dict:
        """Descriptors of Z and `a` [tokens, D] for sums over tokens, if no tile of them is cut (`even`)."""
        t, z = self.state_tile, self.z.flatten(0, 1)
        wanted = {"z_columns": (z, t.k, t.f), "z_more": (z, t.k, t.more_f), "a_columns": (a, t.k, t.d)}
        return descriptors(wanted, even)

    def token_cut(self, t: Tiles, *, bounded: bool = False) -> dict:
        """The same of launches over tiles of tokens. `bounded`: in the registers that the tile asks for."""
        n = max(t.d, t.k)
        options = t.launch if bounded else replace(t, registers=None).launch
        return dict(
            D=self.d, F=self.f, BLOCK=self.table.length, PRECISION=self.precision, EVEN_D=self.d % n == 0,
            EVEN_F=self.f % n == 0, BLOCK_T=t.t, BLOCK_K=t.k, **options,
        )  # fmt: skip

    def state_tiles(self, blocks: Tensor) -> tuple[int]:
        return (len(blocks) * ceil_div(self.d, self.state_tile.d) * self.parts,)

    def enter(self, n: int, base: Tensor, *, last: bool, subtract: bool) -> None:
        """W of the blocks n that are the `last` of their sequence, or of all the blocks before n."""
        blocks = self.table.of(n)
        launch(
            scan_bwd_enter_kernel, self.state_tiles(blocks), z=self.z, v=self.v, base=base,
            weight=self.weight, shadow=self.shadow, norms=self.norms, blocks=blocks,
            BLOCK=self.table.length, base_stride=self.d * self.f if base.dim() == 3 else 0, LAST=last,
            SUBTRACT=subtract, PRESERVE=self.preserve, SUPER=self.super, SHADOW=self.rounded,
            EVEN_C=self.chunk % self.state_tile.k == 0, **self.chunks,
            **self.state_views(self.v.flatten(0, 1), self.chunk % self.state_tile.k == 0),
            **self.state_cut(rescales=self.super and self.has_steps),
        )  # fmt: skip

    def leave(self, n: int, *, ratio: bool) -> None:
        """G after block n becomes G before it; with `ratio`, the sums that have to come first."""
        blocks = self.table.of(n)
        local = self.super and self.preserve
        dy = self.dy_block if local else self.dy
        launch(
            scan_bwd_leave_kernel, self.state_tiles(blocks), z=self.z, dy=dy, weight=self.weight,
            grad=self.grad, grad_shadow=self.grad_shadow, products=self.products, ratio=self.ratio,
            pull=self.pull, blocks=blocks, BLOCK=self.table.length, RATIO=ratio, LOCAL=local,
            PRESERVE=self.preserve, SCALE=self.preserve and not self.super, SHADOW=self.rounded,
            EVEN_T=self.even_blocks,
            **self.state_views(dy.view(-1, self.d), self.even_blocks), **self.state_cut(),
        )  # fmt: skip

    def norm(self, n: int) -> None:
        """r, c and dY' of block n."""
        blocks = self.table.of(n)
        tile_t, tile_d = min(self.token_tile.t, 32), 64
        launch(
            scan_bwd_norm_kernel,
            (ceil_div(self.d, tile_d) * ceil_div(self.table.length, tile_t) * len(blocks),),
            dy=self.dy, dy_block=self.dy_block, norms=self.norms, products=self.products,
            w0_norms=self.w0_norms, ratio=self.ratio, pull=self.pull, norm_grad=self.norm_grad,
            blocks=blocks, D=self.d, BLOCK=self.table.length, parts=self.parts, BLOCK_T=tile_t,
            BLOCK_D=tile_d, num_warps=4,
        )  # fmt: skip

    def token(self, n: int) -> None:
        """dZ and dV of block n, and its step size gradients in parts."""
        blocks, t, part = self.table.of(n), self.token_tile, self.super_chunks
        rows = ceil_div(self.table.length, t.t) * len(blocks)
        value_tiles, key_tiles = (rows * ceil_div(size, t.d) for size in (self.d, self.f))
        launch(
            scan_bwd_token_kernel, (value_tiles + key_tiles,), z=self.z, v=self.v, dy=self.dy_block,
            dz=self.dz, dv=self.dv, shadow=self.shadow, grad_shadow=self.grad_shadow,
            scores=part.scores if part else self.z, mixed=part.mixed if part else self.z,
            extra=part.raw if part else self.z, dsteps=self.dsteps, blocks=blocks,
            value_tiles=value_tiles, HAS_DSTATE=self.has_dstate, PRESERVE=self.preserve,
            SUPER=self.super, BLOCK_N=t.d, **self.chunks, **self.token_cut(t, bounded=not self.super),
        )  # fmt: skip

    def run(self, return_state: bool) -> None:
        table, total = self.table, len(self.table.launches)
        for n in reversed(table.launches):
            if self.super:
                self.super_chunks.prepare(n)
            if n + 1 == total or len(table.of(n)) > len(table.of(n + 1)):  # some sequences end here
                if n:
                    self.enter(n, self.carried, last=True, subtract=return_state)
                else:
                    self.enter(n, self.initial, last=True, subtract=False)
            if self.super and self.preserve:
                self.super_chunks.block(n)
            elif self.preserve:
                self.leave(n, ratio=True)
                self.norm(n)
            self.token(n)
            self.leave(n, ratio=False)
            if n > 1:
                self.enter(n, self.weight, last=False, subtract=True)
            elif n:
                self.enter(n, self.initial, last=False, subtract=False)

    def dw0(self, w0: Tensor, state: Tensor | None) -> Tensor:
        """dw0 = the sum of G_0 over sequences that start from it + diag(sum dr / ||W|| / ||w0||) w0."""
        self.weight = self.shadow = self.grad_shadow = self.super_chunks = None  # their memory is needed
        norm_grad, squares = (self.norm_grad, self.w0_norms) if self.preserve else (None, None)
        return initial_weight_gradient(w0, self.grad if state is None else None, norm_grad, squares)


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
    consume: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dz, dv, dw0, dstep_size, dstate, as `eager_bwd.backward`."""
    batch, tokens = z.shape[:2]
    chunk = min(chunk_size, max(tokens, 1) + 1)  # the same chunks, and no overflow
    block = fused_super_chunk(chunk, *w0.shape, batch)
    table = block_table(batch, tokens, chunk, block, cu_seqlens, z.device)
    part = Backward(
        dy, dstate, carried, z, v, w0, step_size, lr, state, table, chunk, preserve_row_norm,
        cu_seqlens is None, consume,
    )  # fmt: skip
    part.run(return_state)
    dstep = part.dsteps.sum(1).view_as(step_size) if step_size is not None else carried.new_empty(0)
    dstart = part.grad if state is not None else carried.new_empty(0)
    return part.dz, part.dv, part.dw0(w0, state), dstep, dstart
