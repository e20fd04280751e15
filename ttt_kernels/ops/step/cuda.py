"""The step with the compiled CUDA C++ kernels: csrc/kernels/step says how they work.

Nothing waits for the GPU: slots stay where they are. The gradients of the apply are those of `eager`,
library products: `registration` says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels import _extension
from ttt_kernels.ops.cuda_launch import WIDTH, address, aligned, check_widths, place


def rows_of_tokens(x: Tensor) -> Tensor:
    """x [B, T, N] as the kernels read it: features contiguous, everything else at multiples of 16 bytes."""
    strides = all(stride % WIDTH == 0 for stride in x.stride()[:2])
    return aligned(x if x.stride(2) == 1 and strides else x.contiguous())


def readable_pool(weight: Tensor) -> Tensor:
    """The pool, or a copy where the kernels cannot use it as it lies."""
    strides = all(stride % 4 == 0 for stride in weight.stride()[:2])
    readable = weight.stride(2) == 1 and strides and weight.data_ptr() % 16 == 0
    return weight if readable else weight.clone(memory_format=torch.contiguous_format)


def sizes(z: Tensor, weight: Tensor, slots: Tensor | None) -> dict:
    return dict(
        batch=z.shape[0], tokens=z.shape[1], d=weight.shape[1], f=weight.shape[2], pool=len(weight),
        z=address(z), z_batch_stride=z.stride(0), z_token_stride=z.stride(1), weight=address(weight),
        weight_stride=weight.stride(0), row_stride=weight.stride(1), slots=address(slots), **place(z),
    )  # fmt: skip


def apply(z: Tensor, weight: Tensor, row_scale: Tensor | None, slots: Tensor | None) -> Tensor:
    """y [B, T, D]."""
    batch, tokens = z.shape[:2]
    d, f = weight.shape[1:]
    check_widths("fast_weight_apply", "weight", d, f)
    if not z.numel() or not weight.numel():
        return z.new_zeros(batch, tokens, d)
    if slots is None and len(weight) == 1:  # one weight for all: a single row of all tokens
        z = z.reshape(1, -1, f)
    z = rows_of_tokens(z)
    weight = readable_pool(weight)
    row_scale = None if row_scale is None else row_scale.contiguous()
    slots = None if slots is None else slots.to(torch.int64)
    y = z.new_empty(*z.shape[:2], d)
    arguments = dict(row_scale=address(row_scale), y=address(y), **sizes(z, weight, slots))
    extension = _extension.load()
    size = extension.step_apply_workspace(workspace=None, **arguments)
    workspace = torch.empty(size, dtype=torch.uint8, device=z.device)
    extension.step_apply(workspace=address(workspace), **arguments)
    return y.view(batch, tokens, d)


def update_(
    weight: Tensor, z: Tensor, v: Tensor, step_size: Tensor | None, lr: float, slots: Tensor | None
) -> None:
    """weight[slot_b] += step_b * v_b^T z_b, one chunk, in place."""
    check_widths("fast_weight_update_", "weight", *weight.shape[1:])
    if not z.numel() or not weight.numel():
        return
    pool = readable_pool(weight)
    z, v = rows_of_tokens(z), rows_of_tokens(v)
    step_size = None if step_size is None else step_size.contiguous()
    slots = None if slots is None else slots.to(torch.int64)
    _extension.load().step_update(
        v=address(v), v_batch_stride=v.stride(0), v_token_stride=v.stride(1), step_size=address(step_size),
        lr=lr, **sizes(z, pool, slots),
    )  # fmt: skip
    if pool is not weight:
        weight.copy_(pool)
