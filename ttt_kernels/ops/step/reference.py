"""Read and write of a pool of fast weights, literally. The specification of the ops.

Each row's weight is gathered, so memory grows as B * D * F: use it to check. `apply` is
differentiable by autograd, twice too.
"""

from __future__ import annotations

from torch import Tensor


def gathered(weight: Tensor, slots: Tensor | None) -> Tensor:
    """The entry of each row [B, ...], or the one that all share [1, ...]."""
    return weight if slots is None else weight[slots.long()]


def apply(z: Tensor, weight: Tensor, row_scale: Tensor | None, slots: Tensor | None) -> Tensor:
    """y [B, T, D]; arguments as in `api.fast_weight_apply`."""
    y = z.to(weight.dtype) @ gathered(weight, slots).mT
    if row_scale is not None:
        y = y * gathered(row_scale, slots)[:, None]
    return y.to(z.dtype)


def update_(
    weight: Tensor, z: Tensor, v: Tensor, step_size: Tensor | float, slots: Tensor | None
) -> None:
    """weight[slot_b] += step_b * v_b^T z_b; arguments as in `api.fast_weight_update_`."""
    write = v.to(weight.dtype).mT @ z.to(weight.dtype)
    if isinstance(step_size, Tensor):
        step_size = step_size[:, None, None]
    write = write * step_size
    if slots is None:
        weight += write
    else:
        weight.index_add_(0, slots.long(), write)
