"""The closed-form write as a torch op. It has no gradient: `api` calls it without one."""

from __future__ import annotations

import torch

from ttt_kernels.ops._library import register_op
from ttt_kernels.ops.ridge import eager


def ridge_dtype(z, x, w0, proj) -> torch.dtype:
    """Compute precision of operands that need not have one dtype."""
    tensors = (*z, *x, w0, *(() if proj is None else (proj,)))
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _write(z, x, w0, proj, y, *settings):
    return eager.write(z, x, w0, proj, y, *settings, ridge_dtype(z, x, w0, proj))


def _write_fake(z, x, w0, proj, y, *settings):
    acc = ridge_dtype(z, x, w0, proj)
    shape = (len(z), *w0.shape)
    return (
        w0.new_empty(shape, dtype=acc),
        w0.new_empty(shape, dtype=acc),
        w0.new_empty(len(z), dtype=acc),
    )


ridge_write_op = register_op(
    "ridge_write(Tensor[] z, Tensor[] x, Tensor w0, Tensor? proj, Tensor[] y, float lam, float eta, "
    "float? cap, SymInt? last_k, SymInt shift, bool preserve_row_norm) -> (Tensor, Tensor, Tensor)",
    _write,
    _write_fake,
)
