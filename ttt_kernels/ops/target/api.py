"""`next_token_target` and `conv_target`: validate, call."""

from __future__ import annotations

from torch import Tensor

from ttt_kernels.ops import _checks as check
from ttt_kernels.ops._implementations import requested_implementation
from ttt_kernels.ops._library import without_autocast
from ttt_kernels.ops.target import reference, validation
from ttt_kernels.ops.target.registration import ConvFunction, NextTokenFunction


def next_token_target(
    x: Tensor,
    proj: Tensor | None,
    *,
    chunk_size: int,
    horizon: int = 1,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """What each token writes in TTT-NTP: a projection of a later token of its chunk.

        v_t = x_{t + horizon} P   if t + horizon is in the chunk (and sequence) of t, else 0

    Equivalent to `(x @ proj)` shifted by `horizon` inside each chunk: the last `horizon` tokens of a
    chunk write nothing. The target is not detached.

    Args:
        x: MLP input [B, T, D], float32, bfloat16, float16 or float64; any strides.
        proj: `ttt_proj.weight` [D, D], dtype of x, used as stored (not transposed); None = identity.
        chunk_size: tokens per chunk, C >= 1. With C <= horizon every target is 0.
        horizon: how many tokens ahead, >= 1. The paper trains with 1.
        cu_seqlens: int32 or int64 [S + 1] for S sequences packed in one row (B = 1).

    Returns:
        v [B, T, D], dtype of x.

    Precision: products accumulated in float32 (float64 for float64), v rounded once. On a GPU the
        projection is `torch.mm` and follows torch's switches (TF32, reduced-precision reductions).
    Determinism: bitwise repeatable.
    Cost: 2 D^2 FLOPs per token forward, 4 D^2 backward; x is not copied.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: TTT-NTP (arXiv 2606.21803), next-token-prediction target.
    """
    check.check_tensor("x", x, "[B, T, D]")
    validation.check_proj_rank(proj)
    x, proj = check.autocast(x, proj)
    validation.check_source("x", x)
    validation.check_proj(proj, "x", x)
    check.check_positive_int("chunk_size", chunk_size)
    check.check_positive_int("horizon", horizon)
    check.check_cu_seqlens(cu_seqlens, x.shape[0])
    impl = requested_implementation("auto")
    if impl == "reference":
        return without_autocast(reference.next_token_target)(x, proj, chunk_size, horizon, cu_seqlens)
    proj = None if proj is None else proj.contiguous()
    return NextTokenFunction.apply(x.contiguous(), proj, chunk_size, horizon, cu_seqlens, impl)


def conv_target(
    u: Tensor,
    conv_weight: Tensor,
    proj: Tensor | None,
    *,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """What each token writes in In-Place TTT: a short convolution of its chunk, projected.

        v_t = (sum_k conv_weight[:, 0, k] * u_{t + k - KW // 2}) P

    with zeros outside the chunk (and sequence) of t. Equivalent to `conv1d(u_chunk^T, conv_weight,
    padding=KW // 2, groups=D)^T @ proj` for each chunk on its own.

    Args:
        u: source [B, T, D] (the MLP input or the token embeddings), float32, bfloat16, float16 or
            float64; any strides.
        conv_weight: [D, 1, KW], KW odd (the released models use 5), dtype of u.
        proj: [D, D], dtype of u, used as stored; None = identity.
        chunk_size: tokens per chunk, C >= 1; it may be shorter than the window.
        cu_seqlens: int32 or int64 [S + 1] for S sequences packed in one row (B = 1).

    Returns:
        v [B, T, D], dtype of u.

    Precision: sums and products in float32 (float64 for float64), v rounded once. On a GPU the
        convolution is rounded to u.dtype where a projection follows, as is the gradient between the
        two, and the projection is `torch.mm` and follows torch's switches.
    Determinism: bitwise repeatable.
    Cost: 2 D^2 + 2 KW D FLOPs per token forward, twice that backward.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: In-Place TTT (arXiv 2604.06169).
    """
    check.check_tensor("u", u, "[B, T, D]")
    check.check_tensor("conv_weight", conv_weight, "[D, 1, KW]")
    validation.check_proj_rank(proj)
    u, conv_weight, proj = check.autocast(u, conv_weight, proj)
    validation.check_source("u", u)
    check.check_positive_int("chunk_size", chunk_size)
    validation.check_conv(conv_weight, u)
    validation.check_proj(proj, "u", u)
    check.check_cu_seqlens(cu_seqlens, u.shape[0])
    impl = requested_implementation("auto")
    if impl == "reference":
        return without_autocast(reference.conv_target)(u, conv_weight, proj, chunk_size, cu_seqlens)
    proj = None if proj is None else proj.contiguous()
    return ConvFunction.apply(
        u.contiguous(), conv_weight.contiguous(), proj, chunk_size, cu_seqlens, impl
    )
