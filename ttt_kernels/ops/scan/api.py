"""`fast_weight_scan`: validate, choose, call."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels.ops import _checks as check
from ttt_kernels.ops._implementations import requested_implementation
from ttt_kernels.ops._library import without_autocast
from ttt_kernels.ops.scan import reference, validation
from ttt_kernels.ops.scan.registration import ScanFunction, scan_fwd


def fast_weight_scan(
    z: Tensor,
    v: Tensor,
    w0: Tensor,
    *,
    chunk_size: int,
    step_size: float | Tensor = 1.0,
    preserve_row_norm: bool = False,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Read a sequence through a fast weight that is rewritten after every chunk.

    For chunk n = 0, 1, ... of `chunk_size` tokens, with `W_0 = w0` (or `state`):

        y_t     = R(W_n) z_t                                 for every t in chunk n
        W_{n+1} = W_n + step_size_n * sum_{t in n} v_t z_t^T  only if chunk n is complete

    `R` scales row d by `||w0[d]|| / max(||W[d]||, 1e-5)` with `preserve_row_norm`, else it is the
    identity; it acts on the applied weight only. Equivalent to stacking every `W_n` and multiplying
    (`ops/scan/reference.py`), without ever holding more than one.

    Args:
        z: keys [B, T, F], float32, bfloat16, float16 or float64; any strides.
        v: value targets [B, T, D], dtype of z. Row t is what token t writes: the shift to the next
            token is already in it (`next_token_target`).
        w0: slow weight [D, F], dtype of z: `down_proj.weight`.
        chunk_size: tokens per chunk, C >= 1.
        step_size: a number, or float32 [B, NC] with NC = ceil(T / C) (packed: [1, sum of the
            sequences' NC], in order); float64 with float64 operands. Differentiable. The entry of an
            incomplete chunk is not read.
        preserve_row_norm: apply `R`.
        state: carried weight, float32 [B, D, F] ([S, D, F] packed), float64 with float64 operands;
            differentiable and never modified. Chunks count from the first token of this call.
        cu_seqlens: int32 or int64 [S + 1], boundaries of S sequences packed in one row (B = 1); each
            starts from `w0` (or its `state`) and counts its own chunks.
        return_state: also return the state after the last complete chunk.
        impl: "auto", "reference", "eager", "triton" or "cuda" (bfloat16 and float16, D and F multiples
            of 8). An explicit choice never falls back. TTT_KERNELS_IMPL overrides "auto".

    Returns:
        y [B, T, D] in the dtype of z, and the state [B or S, D, F] (None without `return_state`).

    Precision: operands in z.dtype, products accumulated and state held in float32 (float64 for
        float64), the applied weight is the state rounded to z.dtype, y is rounded once. float32 is
        IEEE float32 unless torch's TF32 switch allows otherwise. Under autocast z, v and w0 are
        cast to the autocast dtype, state and step_size are not.
    Determinism: bitwise repeatable on one device and configuration.
    Cost: 4 D F FLOPs per token forward, 10 D F backward, and about 8 D F / max(C, S*) bytes of state
        traffic per token (`ops/scan/heuristics.py`). Extra memory, whatever T and C, in float32 weights:
        eager one forward (one per sequence where gradients are needed), two in the backward; triton and
        cuda per sequence two (float32: three) forward, three (float32: two) in the backward. Where chunks are
        short triton takes half of one more, at least 2 MiB, and with row norms 8 KiB for each row of w0. The
        backward works in the state that the forward has saved; with `return_state` or
        `retain_graph=True`, and under torch.compile, it needs one more.
    Limits: one derivative (the reference has more); under `create_graph=True` a gradient that does not
        depend on y comes back without a graph. Causality holds for finite values: where several
        short chunks are computed together, a NaN in one reaches the outputs of its neighbours. triton
        stores products of their keys in the dtype of z: in float16 keys of a norm above 256 overflow.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        NotImplementedError: an implementation that does not exist for this device.

    Source: TTT-NTP (arXiv 2606.21803) and In-Place TTT (arXiv 2604.06169).
    """
    z, v, w0 = (check.check_tensor(n, t, s) for n, t, s in _operands(z, v, w0))
    z, v, w0 = check.autocast(z, v, w0)
    validation.check_operands(z, v, w0)
    check.check_positive_int("chunk_size", chunk_size)
    check.check_bool("preserve_row_norm", preserve_row_norm)
    check.check_bool("return_state", return_state)
    check.check_cu_seqlens(cu_seqlens, z.shape[0])
    steps, lr = validation.check_step_size(step_size, z, chunk_size, cu_seqlens is not None)
    validation.check_state(state, z, w0, cu_seqlens)
    impl = requested_implementation(impl)
    if impl == "reference":
        validation.check_packed_steps(steps, z.shape[1], chunk_size, cu_seqlens)
        y, final = without_autocast(reference.scan)(
            z, v, w0, lr if steps is None else steps, state, cu_seqlens,
            chunk_size=chunk_size, preserve_row_norm=preserve_row_norm,
        )  # fmt: skip
        return y, final if return_state else None
    inputs = (z, v, w0, steps, state)
    save_state = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    z, v, w0, steps, state = (None if t is None else t.contiguous() for t in inputs)
    scan = ScanFunction.apply if save_state else scan_fwd
    y, final = scan(
        z, v, w0, steps, lr, state, cu_seqlens, chunk_size, preserve_row_norm,
        return_state, save_state, impl,
    )  # fmt: skip
    return y, final if return_state else None


def _operands(z, v, w0):
    return ("z", z, "[B, T, F]"), ("v", v, "[B, T, D]"), ("w0", w0, "[D, F]")
