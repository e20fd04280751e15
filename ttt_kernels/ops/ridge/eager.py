"""The closed-form write with library GEMMs and Cholesky: half a Gram matrix, D right-hand sides.

With keys X [N, F], residual E = Y - X w0^T [N, D] and lam > 0, the two forms of one minimiser,

    dual    (N < F):   dW = A^T X,    (X X^T + lam I) A = E            Gram matrix [N, N]
    primal  (N >= F):  dW = B^T,      (X^T X + lam I) B = X^T E        Gram matrix [F, F]

Sums are formed apart from solving: those of the primal form add up over tokens, those of the dual
form over features, so either can be reduced over devices between the two steps. Keys are raised to
the compute precision a tile at a time, and only the lower triangle of a Gram matrix is formed; it is
factorised in place.

The smaller matrix is also the better conditioned one: the larger has at least |N - F| eigenvalues
equal to lam. In float32 the rounding of the Gram matrix itself perturbs the solution by about
10 eps cond, whatever solves it, so a factor that fails, or whose diagonal shows that this could exceed
TOLERANCE, is not used: sums and solve are done again in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_kernels.types import NORM_FLOOR, ceil_div, tiles

TOKEN_TILE = 1024  # tokens raised to the compute precision at a time
GRAM_TILE = 256  # rows of a Gram matrix formed at a time: N + 128 instead of N / 2 columns on average
FACTOR_TILE = 256  # columns of a Gram matrix factorised at a time
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Pairs:
    """N pairs of a key and of what its target is made from.

    keys [N, F] and source [N, D] as stored; w0 [D, F] and proj [D, D] in the compute precision, and so
    plain [N, D], what w0 makes of the keys, where that is known.
    """

    keys: Tensor
    source: Tensor
    w0: Tensor
    proj: Tensor | None
    plain: Tensor | None = None

    @classmethod
    def of(cls, z, x, w0, proj, y, last_k: int | None, shift: int) -> Pairs:
        count = max(len(z) - shift, 0)
        first = 0 if last_k is None else max(count - last_k, 0)
        plain = None if y is None else y[first:count]
        return cls(z[first:count], x[first + shift : count + shift], w0, proj, plain)

    @property
    def dtype(self) -> torch.dtype:
        return self.w0.dtype

    @property
    def dual(self) -> bool:
        return len(self.keys) < self.keys.shape[1]

    def to(self, dtype: torch.dtype) -> Pairs:
        """With `plain` anew: the known one is no better than the precision it came in."""
        proj = None if self.proj is None else self.proj.to(dtype)
        return Pairs(self.keys, self.source, self.w0.to(dtype), proj)

    def key_tile(self, tokens: slice) -> Tensor:
        return self.keys[tokens].to(self.dtype)

    def residual_tile(self, tokens: slice, out: Tensor | None = None) -> Tensor:
        """E = Y - X w0^T of some tokens."""
        source = self.source[tokens].to(self.dtype)
        out = source.new_empty(source.shape) if out is None else out
        if self.proj is None:
            out.copy_(source)
        else:
            torch.mm(source, self.proj, out=out)
        if self.plain is not None:
            return out.sub_(self.plain[tokens])
        return out.addmm_(self.key_tile(tokens), self.w0.t(), alpha=-1)


def square(size: int, like: Tensor, *, zero: bool) -> Tensor:
    """A matrix stored by columns, which LAPACK factorises where it lies."""
    make = torch.zeros if zero else torch.empty
    return make(size, size, dtype=like.dtype, device=like.device).mT


def dual_sums(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """X X^T [N, N], lower triangle, and E [N, D]."""
    count = len(pairs.keys)
    gram = square(count, pairs.w0, zero=False)
    residual = pairs.w0.new_empty(count, len(pairs.w0))
    for columns in tiles(count, TOKEN_TILE):
        keys = pairs.key_tile(columns)
        pairs.residual_tile(columns, out=residual[columns])
        for a in range(columns.start, count, GRAM_TILE):
            rows = slice(a, min(a + GRAM_TILE, count))
            width = min(rows.stop, columns.stop) - columns.start
            part = slice(columns.start, columns.start + width)
            torch.mm(pairs.key_tile(rows), keys[:width].t(), out=gram[rows, part])
    return gram, residual


def primal_sums(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """X^T X [F, F], lower triangle, and X^T E [F, D]."""
    width = pairs.keys.shape[1]
    gram = square(width, pairs.w0, zero=True)
    cross = pairs.w0.new_zeros(width, len(pairs.w0))
    for tokens in tiles(len(pairs.keys), TOKEN_TILE):
        keys = pairs.key_tile(tokens)
        cross.addmm_(keys.t(), pairs.residual_tile(tokens))
        for rows in tiles(width, GRAM_TILE):
            gram[rows, : rows.stop].addmm_(keys[:, rows].t(), keys[:, : rows.stop])
    return gram, cross


def rounding(float32: Tensor) -> float:
    """The unit in the last place of what its products read: TF32's where torch's switch allows that."""
    tf32 = float32.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return 2**-10 if tf32 else torch.finfo(float32.dtype).eps


def factorise_(gram: Tensor) -> bool:
    """gram <- its Cholesky factor, in the lower triangle, block column by block column; False where it has
    none. At once torch's would clear the upper triangle too, which costs as much as the factor."""
    size = len(gram)
    infos = torch.zeros(ceil_div(size, FACTOR_TILE), dtype=torch.int32, device=gram.device)
    for n, columns in enumerate(tiles(size, FACTOR_TILE)):
        done, width = columns.start, columns.stop - columns.start
        part = gram[done:, columns]
        if done:
            part.addmm_(gram[done:, :done], gram[columns, :done].mT, alpha=-1)
        corner, below = part[:width], part[width:]
        torch.linalg.cholesky_ex(corner, out=(corner, infos[n]))
        torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False, out=below)
    return not bool(infos.any())


def solve_(gram: Tensor, right: Tensor, lam: float) -> bool:
    """right <- (gram + lam I)^{-1} right, from the lower triangle of `gram`, which is overwritten.

    False, and no result, where the matrix is not positive definite to rounding, or a float32 factor
    too ill-conditioned to be trusted.
    """
    gram.diagonal().add_(lam)
    if not factorise_(gram):
        return False
    low, high = torch.aminmax(gram.diagonal())
    condition = (high.double() / low.double()).square().item()  # a lower bound, tight enough
    if gram.dtype == torch.float32 and not 10 * rounding(gram) * condition < TOLERANCE:
        return False
    torch.linalg.solve_triangular(gram, right, upper=False, out=right)
    torch.linalg.solve_triangular(gram.mT, right, upper=True, out=right)
    return True


def fit(pairs: Pairs, lam: float, out: Tensor) -> bool:
    """out [D, F] <- dW; False as in `solve_`."""
    gram, right = (dual_sums if pairs.dual else primal_sums)(pairs)
    if not solve_(gram, right, lam):
        return False
    del gram
    if not pairs.dual:
        out.copy_(right.t())
        return True
    for tokens in tiles(len(right), TOKEN_TILE):
        out.addmm_(right[tokens].t(), pairs.key_tile(tokens), beta=1 if tokens.start else 0)
    return True


def fit_or_raise(pairs: Pairs, lam: float, out: Tensor, prompt: int) -> None:
    """`fit`, again in float64 where that fails; an error where float64 fails too."""
    if fit(pairs, lam, out):
        return
    if pairs.dtype != torch.float64:
        double = torch.empty_like(out, dtype=torch.float64)
        if fit(pairs.to(torch.float64), lam, double):
            out.copy_(double)
            return
    if not bool(torch.isfinite(pairs.keys).all()):
        raise ValueError(f"z must be finite, got infinite or NaN keys in prompt {prompt}")
    name = "Z Z^T" if pairs.dual else "Z^T Z"
    raise ValueError(
        f"lam must be large enough to make {name} + lam I positive definite to rounding, "
        f"got lam = {lam} for prompt {prompt} with {len(pairs.keys)} pairs"
    )


def write(
    z: Sequence[Tensor],
    x: Sequence[Tensor],
    w0: Tensor,
    proj: Tensor | None,
    y: Sequence[Tensor],
    lam: float,
    eta: float,
    cap: float | None,
    last_k: int | None,
    shift: int,
    preserve_row_norm: bool,
    acc: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight and delta [B, D, F], eta [B], in `acc`; z [T_b, F] and x [T_b, D] of each prompt, and
    y [T_b, D] of each or of none."""
    size = (len(z), *w0.shape)
    weight, delta = w0.new_empty(size, dtype=acc), w0.new_empty(size, dtype=acc)
    used = w0.new_full((len(z),), eta, dtype=acc)
    proj = None if proj is None else proj.to(acc)
    for b, (keys, source, plain) in enumerate(zip(z, x, y or [None] * len(z), strict=True)):
        start = weight[b].copy_(w0)
        pairs = Pairs.of(keys, source, start, proj, plain, last_k, shift)
        if not len(pairs.keys):
            delta[b] = 0
            continue
        fit_or_raise(pairs, lam, delta[b], b)
        norm = torch.linalg.vector_norm(delta[b])
        if not bool(torch.isfinite(norm)):
            names = "x, w0 and proj" if plain is None else "x, w0, proj and y"
            raise ValueError(f"{names} must be finite, got a write of norm {norm} in prompt {b}")
        if cap is not None and norm > 0:
            used[b].clamp_(max=cap * torch.linalg.vector_norm(start) / norm)
        target = torch.linalg.vector_norm(start, dim=1)
        start.addcmul_(delta[b], used[b])
        if preserve_row_norm:
            moved = torch.linalg.vector_norm(start, dim=1).clamp_min_(NORM_FLOOR)
            start.mul_((target / moved)[:, None])
    return weight, delta, used
