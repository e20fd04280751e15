"""`fast_weight_apply` and `fast_weight_update_`: validate, choose, call."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels.ops import _checks as check
from ttt_kernels.ops._implementations import requested_implementation
from ttt_kernels.ops._library import without_autocast
from ttt_kernels.ops.step import reference, validation
from ttt_kernels.ops.step.registration import ApplyFunction, step_apply, step_update


def fast_weight_apply(
    z: Tensor,
    weight: Tensor,
    *,
    row_scale: Tensor | None = None,
    slots: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Read fast weights, each row its own.

        y_t = row_scale[n] * (weight[n] z_t),   n = slots[b], for every t of row b

    Equivalent to gathering `weight[slots]` and multiplying (`ops/step/reference.py`), but no weight
    is ever copied: a server keeps more requests in the pool than there are rows in a batch.

    Args:
        z: keys [B, T, F], float32, bfloat16, float16 or float64; any strides.
        weight: fast weights [N, D, F], float32 (float64 for float64); any strides.
        row_scale: [N, D], dtype of weight: the scale of row-norm preservation. None = 1.
        slots: int32 or int64 [B] in [0, N), the entry of each row; may repeat. None: row b reads
            entry b (N = B), or all rows read the only one (N = 1).
        impl: as in `fast_weight_scan`.

    Returns:
        y [B, T, D] in the dtype of z.

    Precision: operands in z.dtype, products accumulated in float32 (float64 for float64), the applied
        weight is `weight` rounded to z.dtype, y is rounded once, after the row scale. Under autocast
        z is cast to the autocast dtype, weight and row_scale are not. In the backward of "triton" the
        product of dy and row_scale is an operand, rounded to z.dtype.
    Determinism: bitwise repeatable. With `slots`, a row's bits do not depend on the other rows.
    Cost: 2 D F FLOPs per token forward, 4 D F backward (2 D F where only z needs a gradient, 6 D F
        with a row scale), and 4 D F bytes read per row: what bounds decode. "triton" and "cuda" take
        one launch; two, and float32 scratch of up to 16 outputs, where a weight has too few rows to
        fill the GPU ("cuda": only with more than 8 tokens a row). They read an entry once for up to 128
        tokens (64 in float32) of a row, and again, side by side, for more tokens and for rows with the
        same slot: from the GPU's cache if that still has it. Without slots, rows that share the only
        weight count as one row.
    Limits: one derivative. Slots that lie on a GPU are read on the host, which waits for the GPU, by
        every implementation but "triton" and "cuda" (its gradients do too: they are library products,
        those of "eager"). These two never wait, and cannot raise: a row whose slot
        is not in [0, N) reads nothing and gives NaN.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value (of slots
            where they are read on the host).
        NotImplementedError: an implementation that does not exist for this device.

    Source: TTT-NTP (arXiv 2606.21803) and In-Place TTT (arXiv 2604.06169), decoding.
    """
    check.check_tensor("z", z, "[B, T, F]")
    check.check_tensor("weight", weight, "[N, D, F]")
    (z,) = check.autocast(z)
    validation.check_pool(z, weight)
    validation.check_row_scale(row_scale, z, weight)
    validation.check_slots(slots, z, weight, shared=True)
    impl = requested_implementation(impl)
    if impl == "reference":
        validation.read_slots(slots, len(weight), distinct=False)
        return without_autocast(reference.apply)(z, weight, row_scale, slots)
    tracked = any(t is not None and t.requires_grad for t in (z, weight, row_scale))
    call = ApplyFunction.apply if tracked and torch.is_grad_enabled() else step_apply
    return call(z.contiguous(), weight, row_scale, slots, impl)


def fast_weight_update_(
    weight: Tensor,
    z: Tensor,
    v: Tensor,
    *,
    step_size: float | Tensor,
    slots: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Write one chunk into fast weights, in place.

        weight[n] += step_size_b * sum_t v_t z_t^T,   n = slots[b], over all tokens t of row b

    Equivalent to the write of one complete chunk in `fast_weight_scan`. No other entry is touched.

    Args:
        weight: fast weights [N, D, F], float32 (float64 for float64), modified. Any strides, but
            every entry has memory of its own.
        z: keys [B, C, F], float32, bfloat16, float16 or float64; any strides.
        v: value targets [B, C, D], dtype of z. Row t is what token t writes.
        step_size: a number, or [B] in the dtype of weight.
        slots: int32 or int64 [B] in [0, N), the entry of each row, all distinct. None: row b writes
            entry b (N = B).
        impl: as in `fast_weight_scan`.

    Precision: operands in z.dtype, products and sums in the dtype of weight.
    Determinism: bitwise repeatable; a row's bits do not depend on the other rows.
    Cost: 2 D F FLOPs per token and 8 D F bytes of weight per row. Extra memory: none that grows with
        D F.
    Limits: not differentiable. Values are not screened: a non-finite z or v makes the entry so.
        Slots that lie on a GPU are read on the host, which waits for the GPU, by every implementation
        but "triton" and "cuda". These two never wait, and cannot raise: a row whose slot is not in [0, N)
        writes nothing, and an entry that several slots name becomes NaN.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value (of slots
            where they are read on the host), before anything is written.
        RuntimeError: an argument requires a gradient while gradients are on.
        NotImplementedError: an implementation that does not exist for this device.

    Source: TTT-NTP (arXiv 2606.21803) and In-Place TTT (arXiv 2604.06169), decoding.
    """
    check.check_tensor("weight", weight, "[N, D, F]")
    check.check_tensor("z", z, "[B, C, F]")
    check.check_tensor("v", v, "[B, C, D]")
    z, v = check.autocast(z, v)
    validation.check_pool(z, weight)
    shape = (z.shape[0], z.shape[1], weight.shape[1])
    check.check_like("v", v, "[B, C, D]", shape, "z and weight", z)
    steps, lr = validation.check_update_step(step_size, z)
    validation.check_slots(slots, z, weight, shared=False)
    validation.check_writable(weight)
    validation.check_no_gradient(weight=weight, z=z, v=v, step_size=steps)
    impl = requested_implementation(impl)
    if impl == "reference":
        validation.read_slots(slots, len(weight), distinct=True)
        without_autocast(reference.update_)(weight, z, v, lr if steps is None else steps, slots)
        return
    step_update(weight, z.contiguous(), v.contiguous(), steps, lr, slots, impl)
