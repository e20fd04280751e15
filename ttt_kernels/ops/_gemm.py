"""Products with a float32 weight that is applied in the operands' dtype, shared by the eager ops.

Low-precision operands are raised to float32 around the library GEMM: the same contract, and two
orders of magnitude faster on a CPU without native matrix units. The applied weight is the state
rounded to the operands' dtype, a few rows at a time, so that no second weight exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ttt_kernels.types import tiles

ROW_TILE = 256  # rows of a weight handled at a time where a temporary of the whole would cost memory


def row_tiles(weight: Tensor) -> Iterator[slice]:
    return tiles(len(weight), ROW_TILE)


def apply_rounded(
    keys: Tensor, weight: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """keys @ round(W)^T; keys [n, F] and W [D, F] in the compute precision of `dtype`."""
    if dtype == weight.dtype:
        return torch.mm(keys, weight.t(), out=out)
    out = keys.new_empty(len(keys), len(weight)) if out is None else out
    for rows in row_tiles(weight):
        out[:, rows] = keys @ weight[rows].to(dtype).to(weight.dtype).t()
    return out


def apply_rounded_transposed(
    dy: Tensor, weight: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """dy @ round(W): the gradient of `apply_rounded` with respect to the keys."""
    if dtype == weight.dtype:
        return torch.mm(dy, weight, out=out)
    out = dy.new_zeros(len(dy), weight.shape[1]) if out is None else out.zero_()
    for rows in row_tiles(weight):
        out.addmm_(dy[:, rows], weight[rows].to(dtype).to(weight.dtype))
    return out
