"""Backward of the eager scan: see the derivation at the top of `eager`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_kernels.ops._gemm import row_tiles
from ttt_kernels.ops._row_norm import row_scale, square_norm
from ttt_kernels.ops.scan.eager import (
    Block,
    Operands,
    SuperChunk,
    blocks_of,
    initial_state,
)
from ttt_kernels.ops.scan.heuristics import super_chunk
from ttt_kernels.types import NORM_FLOOR, sequence_spans


@dataclass(frozen=True)
class Gradients:
    """The results, filled block by block. `norm` sums dr r per row, [D], over all chunks."""

    dy: Tensor
    dz: Tensor
    dv: Tensor
    dstep: Tensor
    norm: Tensor | None

    def store_values(self, ops: Operands, block: Block, tokens: slice, dscaled: Tensor) -> None:
        """From the gradient of sV, those of the step size and of V."""
        if ops.step_size is not None:
            per_token = (ops.values(block, tokens) * dscaled).sum(1)
            into = self.dstep[block.step_row, block.steps]
            into += per_token.view(len(into), -1).sum(1)
        self.dv[block.row, tokens] = dscaled.mul_(ops.token_steps(block, tokens))


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
    """dz, dv, dw0, dstep_size, dstate; the last two are empty where there was no such input.

    The state is recomputed in a copy of `carried` or, with `consume`, in it.
    """
    ops = Operands.of(z, v, w0, step_size, lr, preserve_row_norm)
    length = super_chunk(chunk_size, w0.shape[0], w0.shape[1], z.device.type)
    spans = sequence_spans(z.shape[0], z.shape[1], chunk_size, cu_seqlens)
    dw0 = torch.zeros_like(w0, dtype=ops.acc)
    dstart = torch.zeros_like(carried) if state is not None else carried.new_empty(0)
    grads = Gradients(
        dy,
        torch.empty_like(z),
        torch.zeros_like(v),
        carried.new_empty(0) if step_size is None else torch.zeros_like(step_size),
        None if ops.preserve is None else torch.zeros_like(ops.preserve),
    )
    for span in spans:
        # G lives where its final value belongs if that place is this sequence's alone.
        alone = state is None and len(spans) == 1
        grad = dw0 if alone else torch.zeros_like(dw0) if state is None else dstart[span.index]
        if dstate is not None:
            grad.copy_(dstate[span.index])
        weight, owned = carried[span.index], consume
        for block in reversed(blocks_of(span, chunk_size, length)):
            reached = return_state or not block.last  # does anything read the state after this block?
            if block.start == span.start:  # the state before the first write is known exactly
                known = initial_state(w0, state, span)
                weight = weight.copy_(known) if owned else known.to(ops.acc)
            elif reached and block.written > block.start:
                weight, owned = weight if owned else weight.clone(), True
                ops.write(block, weight, sign=-1)
            step = super_chunk_backward if block.is_super_chunk else chunk_backward
            step(ops, grads, block, weight, grad, reached)
        if state is None and not alone:
            dw0 += grad
    if grads.norm is not None:
        # d||w0|| = sum_n dr / max(||W_n||, floor) = sum_n dr r / ||w0||, in the direction w0 / ||w0||.
        dw0.addcmul_(w0.to(ops.acc), divide(grads.norm, ops.preserve)[:, None])
    return grads.dz, grads.dv, dw0.to(w0.dtype), grads.dstep, dstart


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: a row of zeros has no direction."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def norm_pull(dratio: Tensor, norm: Tensor) -> Tensor:
    """c = dr r / ||W||^2; no gradient through a norm below the floor."""
    return torch.where(norm > NORM_FLOOR**2, dratio / norm.clamp_min(NORM_FLOOR**2), 0)


def chunk_backward(ops, grads, block, weight, grad, reached) -> None:
    """One chunk, or the unwritten tail of one. `grad` is G after the block, and before it on return."""
    norm = None if ops.preserve is None else square_norm(weight)
    ratio = None if norm is None else row_scale(ops.preserve, norm)

    def scaled_dy(tokens: slice) -> Tensor:
        dy = grads.dy[block.row, tokens].to(ops.acc)
        return dy if ratio is None else dy * ratio

    for t in block.tiles(block.stop):
        dz = grads.dz[block.row, t]
        direct = dz.dtype == ops.acc
        result = ops.apply_transposed(scaled_dy(t), weight, out=dz if direct else None)
        if reached and block.written > block.start:
            result.addmm_(ops.scaled(block, t), grad)
            grads.store_values(ops, block, t, torch.mm(ops.keys(block, t), grad.t()))
        if not direct:
            dz.copy_(result)

    if ratio is None:
        for t in block.tiles(block.stop):
            grad.addmm_(scaled_dy(t).t(), ops.keys(block, t))
        return
    # dr r = sum_t dy'_t (W z_t) = diag(W (dY'^T Z)^T): from the product that G needs anyway.
    for rows in row_tiles(weight):
        product = torch.zeros_like(weight[rows])
        for t in block.tiles(block.stop):
            product.addmm_(scaled_dy(t)[:, rows].t(), ops.keys(block, t))
        dratio = torch.einsum("df,df->d", product, weight[rows])
        grads.norm[rows] += dratio
        pull = norm_pull(dratio, norm[rows])
        grad[rows] += product.addcmul_(weight[rows], pull[:, None], value=-1)


def super_chunk_backward(ops, grads, block, weight, grad, reached) -> None:
    """Several chunks at once; `weight` is the state before the block, `grad` as in `chunk_backward`."""
    part = SuperChunk(ops, block, weight)
    keys, scaled, w = part.keys, part.scaled, part.w
    dy = grads.dy[block.row, block.tokens].to(ops.acc, copy=True)
    if ops.preserve is not None:
        norms, same = part.row_norms()
        dy.mul_(row_scale(ops.preserve, norms)[part.chunk_of])
        dratio = torch.zeros_like(norms).index_add_(0, part.chunk_of, dy * part.raw)
        grads.norm.add_(dratio.sum(0))
        # cbar[j] = sum_{k >= j} c_k; a token of chunk k writes what chunks k + 1 .. read.
        cbar = norm_pull(dratio, norms).flip(0).cumsum(0).flip(0)
        after = cbar[1:].repeat_interleave(part.c, 0)
        pulled = after * scaled
        dy[:w] -= pulled

    mixed = (dy @ scaled.t()).mul_(part.earlier)
    dz = ops.apply_transposed(dy, weight).addmm_(mixed, keys[:w])
    dz[:w].addmm_(mixed.t(), keys)
    dscaled = part.scores.t() @ dy
    if ops.preserve is not None:
        gram = part.per_chunk(pulled) @ part.per_chunk(scaled).mT
        dz[:w] -= (gram @ part.per_chunk(keys)).flatten(0, 1)
        dscaled -= after * (part.raw[:w] + same)
    if reached:
        dz[:w].addmm_(scaled, grad)
        dscaled.addmm_(keys[:w], grad.t())
    grads.dz[block.row, block.tokens] = dz
    grads.store_values(ops, block, slice(block.start, block.written), dscaled)

    grad.addmm_(dy.t(), keys)
    if ops.preserve is not None:
        grad.addcmul_(weight, cbar[0][:, None], value=-1)
