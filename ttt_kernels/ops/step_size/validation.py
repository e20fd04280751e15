"""What the step-size ops accept."""

from __future__ import annotations

from torch import Tensor

from ttt_kernels.ops import _checks as check


def check_operands(z, v, chunk_size, cu_seqlens) -> tuple[Tensor, Tensor]:
    """z and v checked, in the autocast dtype and contiguous."""
    check.check_tensor("z", z, "[B, T, F]")
    check.check_tensor("v", v, "[B, T, D]")
    z, v = check.autocast(z, v)
    check.check_float("z", z)
    shape = (z.shape[0], z.shape[1], v.shape[2])
    check.check_like("v", v, "[B, T, D]", shape, "z", z)
    check.check_positive_int("chunk_size", chunk_size)
    check.check_cu_seqlens(cu_seqlens, z.shape[0])
    return z.contiguous(), v.contiguous()
