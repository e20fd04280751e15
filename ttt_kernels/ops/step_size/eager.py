"""Step sizes in Gram form: G = V^T Z [D, F] is never formed.

With Kz = Z Z^T and Kv = V V^T (C x C), every vector of the power iteration is Z^T b or V^T a, so

    ||V^T a||^2 = a^T Kv a,   G Z^T b = V^T (Kz b),   G^T V^T a = Z^T (Kv a),   ||G||_F^2 = sum Kz * Kv

and a step size is a small function of the two Gram matrices. Its gradient is autograd's, through
every iteration; dZ = (dKz + dKz^T) Z and likewise dV. Chunks go in groups of bounded memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ttt_kernels.types import chunk_count, compute_dtype, sequence_spans

NORMALIZE_EPS = 1e-8
SIGMA_FLOOR = 1e-6
GROUP_ELEMENTS = 1 << 22  # Gram matrix elements of a group of chunks: 16 MiB in float32

StepRule = Callable[[Tensor, Tensor, Tensor], Tensor]  # Kz, Kv, mean over D of V


def spectral_rule(lr: float, iterations: int) -> StepRule:
    def rule(kz: Tensor, kv: Tensor, mean: Tensor) -> Tensor:
        b = unit(kz, mean)
        for _ in range(iterations):
            a = unit(kv, matvec(kz, b))
            b = unit(kz, matvec(kv, a))
        sigma = (matvec(kv, a) * matvec(kz, b)).sum(-1)
        return lr / sigma.clamp_min(SIGMA_FLOOR)

    return rule


def clipped_rule(lr: float, max_norm: float) -> StepRule:
    def rule(kz: Tensor, kv: Tensor, mean: Tensor) -> Tensor:
        square = (kz * kv).sum((-1, -2))
        # A norm below max_norm is not clipped, so the square root is never taken near 0.
        return lr * max_norm / square.clamp_min(max_norm**2).sqrt()

    return rule


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def unit(gram: Tensor, vector: Tensor) -> Tensor:
    """The vector divided by its norm x^T K x, at least NORMALIZE_EPS."""
    square = (vector * matvec(gram, vector)).sum(-1, keepdim=True)
    return vector / square.clamp_min(NORMALIZE_EPS**2).sqrt()


def groups(z: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> Iterator[tuple]:
    """(row, tokens, step row, steps): slices of consecutive complete chunks of one sequence."""
    size = max(1, GROUP_ELEMENTS // chunk_size**2)
    for span in sequence_spans(z.shape[0], z.shape[1], chunk_size, cu_seqlens):
        full = span.complete(chunk_size)
        for n in range(0, full, size):
            m = min(n + size, full)
            tokens = slice(span.start + n * chunk_size, span.start + m * chunk_size)
            yield span.row, tokens, span.step_row, slice(span.step_offset + n, span.step_offset + m)


def chunked(x: Tensor, row: int, tokens: slice, chunk_size: int) -> Tensor:
    return x[row, tokens].to(compute_dtype(x.dtype)).view(-1, chunk_size, x.shape[2])


def forward(z, v, chunk_size: int, cu_seqlens, rule: StepRule) -> Tensor:
    """[B, NC]; 0 for incomplete chunks, which are never written."""
    count = chunk_count(z.shape[1], chunk_size, cu_seqlens)
    steps = z.new_zeros(z.shape[0], count, dtype=compute_dtype(z.dtype))
    for row, tokens, step_row, chunks in groups(z, chunk_size, cu_seqlens):
        keys, values = chunked(z, row, tokens, chunk_size), chunked(v, row, tokens, chunk_size)
        steps[step_row, chunks] = rule(keys @ keys.mT, values @ values.mT, values.mean(-1))
    return steps


def backward(dsteps, z, v, chunk_size: int, cu_seqlens, rule: StepRule) -> tuple[Tensor, Tensor]:
    """dz, dv: the Gram matrices are formed again, nothing per chunk is stored."""
    dz, dv = torch.zeros_like(z), torch.zeros_like(v)
    for row, tokens, step_row, chunks in groups(z, chunk_size, cu_seqlens):
        keys, values = chunked(z, row, tokens, chunk_size), chunked(v, row, tokens, chunk_size)
        inputs = (keys @ keys.mT, values @ values.mT, values.mean(-1))
        with torch.enable_grad():
            inputs = [t.requires_grad_() for t in inputs]
            steps = rule(*inputs)
        dkz, dkv, dmean = torch.autograd.grad(
            steps, inputs, dsteps[step_row, chunks], allow_unused=True, materialize_grads=True
        )
        dz[row, tokens] = ((dkz + dkz.mT) @ keys).flatten(0, 1)
        dvalues = (dkv + dkv.mT) @ values + (dmean / v.shape[2])[..., None]
        dv[row, tokens] = dvalues.flatten(0, 1)
    return dz, dv
