"""Argument checks shared by the ops: each error names the argument, the expectation and what came."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ttt_kernels.types import FLOAT_DTYPES

MAX_FLOAT = sys.float_info.max


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object, layout: str) -> Tensor:
    """`layout` is a shape in words such as "[B, T, F]"; only its rank is checked here."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(value).__name__}")
    rank = layout.count(",") + 1
    if value.dim() != rank:
        raise ValueError(f"{name} must have shape {layout}, got {tuple(value.shape)}")
    return value


def check_float(name: str, value: Tensor) -> None:
    if value.dtype not in FLOAT_DTYPES:
        names = ", ".join(dtype_name(d) for d in FLOAT_DTYPES)
        raise TypeError(f"{name} must be one of {names}, got {dtype_name(value.dtype)}")


def check_like(name: str, value: Tensor, layout: str, shape: tuple, like: str, other: Tensor) -> None:
    """Shape, dtype and device of `value`, the latter two those of the argument called `like`."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {layout} = {tuple(shape)} to match {like}, got {tuple(value.shape)}"
        )
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {like}, {dtype_name(other.dtype)}, got {dtype_name(value.dtype)}"
        )
    check_device(name, value, like, other)


def check_device(name: str, value: Tensor, like: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {like}, {other.device}, got {value.device}")


def check_positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int >= 1, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return value


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_finite_number(name: str, value: object, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # Comparisons, because torch.compile makes a float symbolic and math.isfinite takes none of those.
    if not -MAX_FLOAT <= value <= MAX_FLOAT or (positive and value <= 0):
        raise ValueError(f"{name} must be {'positive and ' if positive else ''}finite, got {value}")
    return float(value)


def check_cu_seqlens(cu_seqlens: object, batch: int) -> Tensor | None:
    """Type and rank only: the values are read, and checked, where the op runs."""
    if cu_seqlens is None:
        return None
    check_tensor("cu_seqlens", cu_seqlens, "[S + 1]")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {dtype_name(cu_seqlens.dtype)}")
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must have at least one entry, got an empty tensor")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a packed batch of one row (B = 1), got B = {batch}")
    return cu_seqlens


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands in the autocast dtype when autocast is on (float32 state and steps are not passed).

    Resolved here rather than with `register_autocast`, which would demote float32 state too.
    """
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
