"""What the step ops accept. Everything is checked before anything is computed or written."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels.ops import _checks as check
from ttt_kernels.types import compute_dtype


def check_pool(z: Tensor, weight: Tensor) -> None:
    """The fast weights, in the compute precision of z."""
    check.check_float("z", z)
    if weight.shape[2] != z.shape[2]:
        raise ValueError(
            f"weight must have shape [N, D, F] = (N, D, {z.shape[2]}) to match z, "
            f"got {tuple(weight.shape)}"
        )
    check_compute_dtype("weight", weight, z)


def check_compute_dtype(name: str, value: Tensor, z: Tensor) -> None:
    acc = compute_dtype(z.dtype)
    if value.dtype != acc:
        raise TypeError(
            f"{name} must be {check.dtype_name(acc)} for z in {check.dtype_name(z.dtype)}, "
            f"got {check.dtype_name(value.dtype)}"
        )
    check.check_device(name, value, "z", z)


def check_row_scale(row_scale: object, z: Tensor, weight: Tensor) -> None:
    if row_scale is None:
        return
    check.check_tensor("row_scale", row_scale, "[N, D]")
    shape = tuple(weight.shape[:2])
    check.check_like("row_scale", row_scale, "[N, D]", shape, "weight", row_scale)
    check_compute_dtype("row_scale", row_scale, z)


def check_slots(slots: object, z: Tensor, weight: Tensor, *, shared: bool) -> None:
    """Type and shape: the values are checked where the op runs (`read_slots`). `shared`: without
    slots, one weight may serve all rows."""
    rows, pool = z.shape[0], weight.shape[0]
    if slots is None:
        if pool != rows and not (shared and pool == 1):
            or_shared = " or N = 1" if shared else ""
            raise ValueError(f"weight without slots needs N = B = {rows}{or_shared}, got N = {pool}")
        return
    check.check_tensor("slots", slots, "[B]")
    if slots.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slots must be int32 or int64, got {check.dtype_name(slots.dtype)}")
    check.check_like("slots", slots, "[B]", (rows,), "z", slots)
    check.check_device("slots", slots, "z", z)


def read_slots(slots: Tensor | None, pool: int, *, distinct: bool) -> list[int] | None:
    """Slots as a host list, checked. Synchronises when the tensor is on a GPU."""
    if slots is None:
        return None
    values = slots.tolist()
    for b, n in enumerate(values):
        if not 0 <= n < pool:
            raise ValueError(f"slots must be in [0, N) = [0, {pool}), got slots[{b}] = {n}")
    if distinct and len(set(values)) < len(values):
        raise ValueError(f"slots must be distinct to be written, got {values}")
    return values


def check_update_step(step_size: object, z: Tensor) -> tuple[Tensor | None, float]:
    """(tensor or None, factor): a number is one step size for all rows."""
    if not isinstance(step_size, Tensor):
        return None, check.check_finite_number("step_size", step_size)
    check.check_tensor("step_size", step_size, "[B]")
    check.check_like("step_size", step_size, "[B]", (z.shape[0],), "z", step_size)
    check_compute_dtype("step_size", step_size, z)
    return step_size, 1.0


def check_writable(weight: Tensor) -> None:
    """Entries that share memory (an expanded weight) cannot be written one by one."""
    if any(s == 0 and n > 1 for n, s in zip(weight.shape, weight.stride(), strict=True)):
        raise ValueError(
            "weight must have memory of its own for every entry, "
            f"got an expanded tensor with strides {tuple(weight.stride())}"
        )


def check_no_gradient(**tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise RuntimeError(
                f"fast_weight_update_ is not differentiable, and {name} requires a gradient: "
                "call it under torch.no_grad(), or use fast_weight_scan to train"
            )
