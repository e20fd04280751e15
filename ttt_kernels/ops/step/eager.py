"""One step with library GEMMs on views of the pool: no weight is copied, on any device.

Rows go one by one, because each has a weight of its own; without slots they are one batched product.
The gradients of y_t = r (W z_t), with P = dY^T Z of one row:

    dZ = (dY r) W,  dW += diag(r) P,  dr += sum_f P[:, f] W[:, f]

summed over the rows that share an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels.ops._gemm import apply_rounded, apply_rounded_transposed, row_tiles
from ttt_kernels.types import tiles

TOKEN_TILE = 1024  # tokens raised to float32 at a time


def entries(weight: Tensor, slots: list[int] | None) -> list[int]:
    """The pool entry of each row; a pool of one without slots is a single row (see `as_rows`)."""
    return list(range(len(weight))) if slots is None else slots


def as_rows(z: Tensor, weight: Tensor, slots: list[int] | None) -> Tensor:
    """z, with all tokens in one row where all share one weight."""
    return z.flatten(0, 1)[None] if slots is None and len(weight) == 1 else z


def apply(z: Tensor, weight: Tensor, row_scale: Tensor | None, slots: list[int] | None) -> Tensor:
    """y [B, T, D]."""
    y = z.new_empty(z.shape[0], z.shape[1], weight.shape[1])
    keys, out = as_rows(z, weight, slots), as_rows(y, weight, slots)
    stored_exactly = z.dtype == weight.dtype
    if slots is None and stored_exactly and len(weight) > 1:
        torch.bmm(keys, weight.mT, out=out)
        return y if row_scale is None else y.mul_(row_scale[:, None])
    direct = stored_exactly and row_scale is None
    for b, n in enumerate(entries(weight, slots)):
        for t in tiles(keys.shape[1], TOKEN_TILE):
            part = out[b, t]
            raw = apply_rounded(
                keys[b, t].to(weight.dtype), weight[n], z.dtype, part if direct else None
            )
            if not direct:
                part.copy_(raw if row_scale is None else raw.mul_(row_scale[n]))
    return y


def apply_backward(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    slots: list[int] | None,
    need_pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz, dweight, drow_scale; the last two empty without `need_pool` (or without a row scale)."""
    acc = weight.dtype
    dz = torch.empty_like(z)
    dweight = weight.new_zeros(weight.shape) if need_pool else None
    dscale = weight.new_zeros(row_scale.shape) if need_pool and row_scale is not None else None
    rows = (as_rows(t, weight, slots) for t in (dy, z, dz))
    for n, dy_row, keys_row, dz_row in zip(entries(weight, slots), *rows, strict=True):
        for t in tiles(len(keys_row), TOKEN_TILE):
            grad, keys = dy_row[t].to(acc), keys_row[t].to(acc)
            scaled = grad if row_scale is None else grad * row_scale[n]
            dz_row[t] = apply_rounded_transposed(scaled, weight[n], z.dtype)
            if dscale is not None:
                for r in row_tiles(weight[n]):
                    product = grad[:, r].t() @ keys
                    dscale[n, r] += torch.einsum("df,df->d", product, weight[n, r])
            if dweight is not None:
                dweight[n].addmm_(scaled.t(), keys)
    dweight, dscale = (weight.new_empty(0) if t is None else t for t in (dweight, dscale))
    return dz, dweight, dscale


def update_(
    weight: Tensor, z: Tensor, v: Tensor, step_size: Tensor | None, lr: float,
    slots: list[int] | None,
) -> None:  # fmt: skip
    """weight[slot_b] += step_b * v_b^T z_b, one chunk, in place."""
    acc = weight.dtype
    for b, n in enumerate(entries(weight, slots)):
        step = lr if step_size is None else step_size[b]
        for t in tiles(z.shape[1], TOKEN_TILE):
            scaled = v[b, t].to(acc) * step
            weight[n].addmm_(scaled.t(), z[b, t].to(acc))
