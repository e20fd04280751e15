"""`ridge_write`, and `ridge_write_from_outputs` which spares a product: validate, call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_kernels.ops import _checks as check
from ttt_kernels.ops.ridge import validation
from ttt_kernels.ops.ridge.registration import ridge_dtype, ridge_write_op


class RidgeWrite(NamedTuple):
    """weight [B, D, F] to decode with; delta [B, D, F], the minimiser; eta [B], the share of it in
    `weight`. float32 (float64 where an argument is)."""

    weight: Tensor
    delta: Tensor
    eta: Tensor


def ridge_write(
    z: Tensor | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    w0: Tensor,
    proj: Tensor | None,
    *,
    lam: float = 1.0,
    eta: float = 0.1,
    cap: float | None = 0.1,
    last_k: int | None = 8192,
    shift: int = 1,
    preserve_row_norm: bool = True,
) -> RidgeWrite:
    """One write from a whole prompt in closed form, from the activations of one plain forward.

    With keys X = z[:-shift] and targets Y = (x @ proj)[shift:], the last `last_k` pairs of them,

        delta  = argmin_M ||Y - X (w0 + M)^T||_F^2 + lam ||M||_F^2
               = E^T (X X^T + lam I)^{-1} X,    E = Y - X w0^T
        weight = w0 + eta' delta,               eta' = min(eta, cap ||w0||_F / ||delta||_F)

    and, with `preserve_row_norm`, row d of weight scaled to the norm of row d of w0. Equivalent to the
    released formulation (`ops/ridge/reference.py`), with half the Gram matrix, Cholesky and D
    right-hand sides in place of LU and F.

    Args:
        z: keys [B, T, F], or one tensor [T_b, F] per prompt where lengths differ (views of a padded
            batch will do); float32, bfloat16, float16 or float64.
        x: MLP inputs [B, T, D], or [T_b, D] per prompt. The dtypes of z, x, w0 and proj may differ.
        w0: slow weight [D, F]: `down_proj.weight`.
        proj: [D, D], used as stored, or None for the identity.
        lam: ridge, > 0.
        eta: step size.
        cap: largest norm of the write as a share of that of w0; None = no cap.
        last_k: pairs used, counted from the end; None = all.
        shift: how many tokens ahead the target lies, >= 1.
        preserve_row_norm: scale the rows.

    Returns:
        RidgeWrite(weight, delta, eta). A prompt of at most `shift` tokens has no pairs: delta = 0.

    Precision: float32 (float64 where an argument is), whatever autocast says. Where the float32
        Cholesky factor fails or is too ill-conditioned to be trusted to 1e-3, that prompt is solved
        in float64; nearly every prompt on a GPU whose float32 products torch's switch lets round to TF32.
    Determinism: bitwise repeatable; a prompt's bits do not depend on the others.
    Cost: with N pairs and n = min(N, F), per prompt 2 N D^2 + 4 N D F + n N F (1 + 256 / n) + n^3 / 3
        + 2 n^2 D FLOPs. Extra memory: n (n + D) values and tiles of 1024 tokens, doubled in float64.
    Limits: for inference: no gradient is recorded. Synchronises with a GPU.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or value; keys or a write
            that are not finite; a lam too small for the matrix to be positive definite in float64.

    Source: TTT-NTP (arXiv 2606.21803), section 3.4.
    """
    return _ridge_write(z, x, None, w0, proj, lam, eta, cap, last_k, shift, preserve_row_norm)


_KEYWORDS = [p for p in signature(ridge_write).parameters.values() if p.kind is p.KEYWORD_ONLY]
OPTIONS: Mapping[str, object] = MappingProxyType({p.name: p.default for p in _KEYWORDS})


def ridge_write_from_outputs(
    z: Tensor | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    w0: Tensor,
    proj: Tensor | None,
    **options: object,
) -> RidgeWrite:
    """`ridge_write` where the forward has kept its outputs too: their product with w0 is not done again.

    Args:
        z, x, w0, proj: as in `ridge_write`.
        y: plain outputs z @ w0^T [B, T, D], without a bias, or [T_b, D] per prompt, in the compute precision:
            rounded further they would round the residual. Their values are trusted.
        **options: lam, eta, cap, last_k, shift, preserve_row_norm of `ridge_write`, with its defaults.

    Returns:
        What `ridge_write` returns. Where a prompt is solved in float64, y is computed again, in float64.

    Precision: as `ridge_write`.
    Cost: 2 N D F FLOPs less than `ridge_write`, which at N = 2 D, F = 3 D is a quarter.
    Raises:
        TypeError, ValueError: as `ridge_write`; y of another precision than the result's; another option.

    Source: TTT-NTP (arXiv 2606.21803), section 3.4.
    """
    if unknown := sorted(options.keys() - OPTIONS.keys()):
        raise TypeError(f"options must be of {', '.join(OPTIONS)}, got {', '.join(unknown)}")
    settings = {**OPTIONS, **options}.values()
    return _ridge_write(z, x, validation.prompts("y", y, "D"), w0, proj, *settings)


def _ridge_write(z, x, y, w0, proj, lam, eta, cap, last_k, shift, preserve_row_norm) -> RidgeWrite:
    """y: None where it is to be computed."""
    validation.check_weights(w0, proj)
    z, x = validation.prompts("z", z, "F"), validation.prompts("x", x, "D")
    validation.check_prompts(z, x, w0)
    if y is not None:
        validation.check_outputs(y, x, w0, ridge_dtype(z, x, w0, proj))
    lam = check.check_finite_number("lam", lam, positive=True)
    eta = check.check_finite_number("eta", eta)
    if cap is not None:
        cap = check.check_finite_number("cap", cap, positive=True)
    if last_k is not None:
        check.check_positive_int("last_k", last_k)
    check.check_positive_int("shift", shift)
    check.check_bool("preserve_row_norm", preserve_row_norm)
    with torch.no_grad():
        result = ridge_write_op(
            z, x, w0, proj, y or (), lam, eta, cap, last_k, shift, preserve_row_norm
        )
    return RidgeWrite(*result)
