"""`spectral_step_size` and `clipped_step_size`: validate, call."""

from __future__ import annotations

from torch import Tensor

from ttt_kernels.ops import _checks as check
from ttt_kernels.ops._implementations import requested_implementation
from ttt_kernels.ops._library import without_autocast
from ttt_kernels.ops.step_size import reference
from ttt_kernels.ops.step_size.registration import StepSizeFunction
from ttt_kernels.ops.step_size.validation import check_operands


def spectral_step_size(
    z: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    lr: float,
    iterations: int = 5,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Step sizes that give each chunk's write a spectral norm of about `lr`.

        s_n = lr / max(sigma_n, 1e-6),   sigma_n = largest singular value of G_n = V_n^T Z_n

    by `iterations` power iterations from the normalised column mean of G, each vector divided by
    max(norm, 1e-8). Equivalent to running them on G (`ops/step_size/reference.py`), but in Gram form
    (Kz = Z Z^T, Kv = V V^T): the D x F matrix is never formed. The gradient goes through every
    iteration.

    Args:
        z: keys [B, T, F], float32, bfloat16, float16 or float64; any strides.
        v: value targets [B, T, D], dtype of z, as given to `fast_weight_scan`.
        chunk_size: tokens per chunk, C >= 1.
        lr: inner learning rate, finite.
        iterations: power iterations, >= 1 (the released models use 5).
        cu_seqlens: int32 or int64 [S + 1] for S sequences packed in one row (B = 1).

    Returns:
        s float32 [B, NC] (float64 for float64), NC = ceil(T / C), packed [1, sum of the sequences'
        NC]. 0 for incomplete chunks, which are never written. Feed it to `fast_weight_scan`.

    Precision: operands in z.dtype, everything else float32 (float64 for float64).
    Determinism: bitwise repeatable.
    Cost: 2 C (D + F) FLOPs per token forward, three times that backward, O(C^2) memory. The fused kernels
        make one triangle of each Gram matrix, C (D + F), and backward that again and
        8 (iterations + 1) (D + F). Reading `cu_seqlens` synchronises with a GPU.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: TTT-NTP (arXiv 2606.21803), inner optimizer "specnorm".
    """
    z, v = check_operands(z, v, chunk_size, cu_seqlens)
    lr = check.check_finite_number("lr", lr)
    check.check_positive_int("iterations", iterations)
    impl = requested_implementation("auto")
    if impl == "reference":
        return without_autocast(reference.spectral)(z, v, chunk_size, lr, iterations, cu_seqlens)
    return StepSizeFunction.apply(
        z, v, chunk_size, cu_seqlens, "spectral", lr, float(iterations), impl
    )


def clipped_step_size(
    z: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    lr: float,
    max_norm: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Step sizes that keep the Frobenius norm of each chunk's gradient at most `max_norm`.

        s_n = lr * min(1, max_norm / ||G_n||_F),   ||G_n||_F^2 = sum(Kz * Kv),  G_n = V_n^T Z_n

    Equivalent to clipping G, which is never formed.

    Args:
        z, v, chunk_size, lr, cu_seqlens: as in `spectral_step_size`.
        max_norm: the paper's tau, > 0.

    Returns, precision, determinism: as in `spectral_step_size`.
    Cost: 2 C (D + F) FLOPs per token forward, three times that backward. The fused kernels: C (D + F)
        forward, in which no Gram matrix is stored; backward that again and, for chunks that are
        clipped, 2 C (D + F), twice where operands have 16 bits.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: In-Place TTT (arXiv 2604.06169), update clipping.
    """
    z, v = check_operands(z, v, chunk_size, cu_seqlens)
    lr = check.check_finite_number("lr", lr)
    max_norm = check.check_finite_number("max_norm", max_norm, positive=True)
    impl = requested_implementation("auto")
    if impl == "reference":
        return without_autocast(reference.clipped)(z, v, chunk_size, lr, max_norm, cu_seqlens)
    return StepSizeFunction.apply(z, v, chunk_size, cu_seqlens, "clipped", lr, max_norm, impl)
