"""What `fast_weight_scan` accepts. Everything is checked before anything is computed or written."""

from __future__ import annotations

from torch import Tensor

from ttt_kernels.ops import _checks as check
from ttt_kernels.types import ceil_div, chunk_count, compute_dtype


def check_operands(z: Tensor, v: Tensor, w0: Tensor) -> None:
    check.check_tensor("z", z, "[B, T, F]")
    check.check_tensor("v", v, "[B, T, D]")
    check.check_tensor("w0", w0, "[D, F]")
    check.check_float("z", z)
    if w0.shape[1] != z.shape[2]:
        raise ValueError(
            f"w0 must have shape [D, F] = (D, {z.shape[2]}) to match z, got {tuple(w0.shape)}"
        )
    check.check_like("w0", w0, "[D, F]", tuple(w0.shape), "z", z)
    shape = (z.shape[0], z.shape[1], w0.shape[0])
    check.check_like("v", v, "[B, T, D]", shape, "z and w0", z)


def check_step_size(step_size: object, z: Tensor, chunk_size: int, packed: bool) -> tuple:
    """(tensor or None, factor): a number is one step size for all chunks."""
    if not isinstance(step_size, Tensor):
        return None, check.check_finite_number("step_size", step_size)
    acc = compute_dtype(z.dtype)
    check.check_tensor("step_size", step_size, "[B, NC]")
    if step_size.dtype != acc:
        raise TypeError(
            f"step_size must be {check.dtype_name(acc)} for z in {check.dtype_name(z.dtype)}, "
            f"got {check.dtype_name(step_size.dtype)}"
        )
    check.check_device("step_size", step_size, "z", z)
    rows = z.shape[0]
    if not packed:  # packed: the number of chunks depends on values, checked where they are read
        shape = (rows, ceil_div(z.shape[1], chunk_size))
        check.check_like("step_size", step_size, "[B, NC]", shape, "z and chunk_size", step_size)
    return step_size, 1.0


def check_packed_steps(step_size, tokens: int, chunk_size: int, cu_seqlens: Tensor | None) -> None:
    """The part of `check_step_size` that needs the values of cu_seqlens."""
    if cu_seqlens is None or not isinstance(step_size, Tensor):
        return
    chunks = chunk_count(tokens, chunk_size, cu_seqlens)
    if tuple(step_size.shape) != (1, chunks):
        raise ValueError(
            f"step_size must have shape [1, NC] = (1, {chunks}) to match cu_seqlens and chunk_size, "
            f"got {tuple(step_size.shape)}"
        )


def check_state(state: object, z: Tensor, w0: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    if state is None:
        return None
    sequences = z.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    layout = "[B, D, F]" if cu_seqlens is None else "[S, D, F]"
    check.check_tensor("state", state, layout)
    shape = (sequences, *w0.shape)
    check.check_like("state", state, layout, shape, "z and w0", state)
    acc = compute_dtype(z.dtype)
    if state.dtype != acc:
        raise TypeError(
            f"state must be {check.dtype_name(acc)} for z in {check.dtype_name(z.dtype)}, "
            f"got {check.dtype_name(state.dtype)}"
        )
    check.check_device("state", state, "z", z)
    return state
