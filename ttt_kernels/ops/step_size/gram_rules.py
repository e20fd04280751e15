"""A step size as a function of a chunk's Gram matrices, and its gradient.

G = V^T Z [D, F] is never formed: with Kz = Z Z^T and Kv = V V^T (C x C), every vector of the power
iteration is Z^T b or V^T a, so

    ||V^T a||^2 = a^T Kv a,  G Z^T b = V^T (Kz b),  G^T V^T a = Z^T (Kv a),  ||G||_F^2 = sum(Kz * Kv).

A rule takes kz, kv [n, C, C] and mean = V 1/D [n, C] of n chunks and gives s [n]; `backward` takes ds
[n] and gives the gradients of the three, through every iteration. It is written out because autograd
is not available below the dispatcher, where torch ops run; the tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NORMALIZE_EPS = 1e-8
SIGMA_FLOOR = 1e-6


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


class Unit:
    """x divided by its norm sqrt(x^T K x), at least NORMALIZE_EPS; K symmetric."""

    def __init__(self, gram: Tensor, x: Tensor) -> None:
        self.x, self.image = x, matvec(gram, x)
        square = (x * self.image).sum(-1, keepdim=True)
        self.free = square >= NORMALIZE_EPS**2  # below, the norm is a constant
        self.norm = square.clamp_min(NORMALIZE_EPS**2).sqrt()
        self.value = x / self.norm

    def backward(self, dvalue: Tensor, dgram: Tensor) -> Tensor:
        """dx; adds the other gradient to `dgram`."""
        along = (dvalue * self.value).sum(-1, keepdim=True) / self.norm**2
        along = torch.where(self.free, along, 0)
        dgram.sub_(0.5 * outer(along * self.x, self.x))
        return dvalue / self.norm - along * self.image


@dataclass(frozen=True)
class Spectral:
    """lr / max(sigma, floor): power iteration from the normalised column mean of G."""

    lr: float
    iterations: int

    def __call__(self, kz: Tensor, kv: Tensor, mean: Tensor) -> Tensor:
        *_, left, right = self._iterate(kz, kv, mean)
        sigma = (matvec(kv, left.value) * matvec(kz, right.value)).sum(-1)
        return self.lr / sigma.clamp_min(SIGMA_FLOOR)

    def _iterate(self, kz: Tensor, kv: Tensor, mean: Tensor) -> list[Unit]:
        """The normalised vectors in order: b, then a and b of each iteration."""
        units = [Unit(kz, mean)]
        for _ in range(self.iterations):
            units.append(Unit(kv, matvec(kz, units[-1].value)))
            units.append(Unit(kz, matvec(kv, units[-1].value)))
        return units

    def backward(self, ds, kz, kv, mean) -> tuple[Tensor, Tensor, Tensor]:
        units = self._iterate(kz, kv, mean)
        a, b = units[-2].value, units[-1].value
        image_a, image_b = matvec(kv, a), matvec(kz, b)
        sigma = (image_a * image_b).sum(-1)
        dsigma = -ds * self.lr / sigma.clamp_min(SIGMA_FLOOR) ** 2
        dsigma = torch.where(sigma >= SIGMA_FLOOR, dsigma, 0)[..., None]
        dkz, dkv = outer(dsigma * image_a, b), outer(dsigma * image_b, a)
        da, db = dsigma * matvec(kv, image_b), dsigma * matvec(kz, image_a)
        for i in range(len(units) - 1, 0, -2):
            before, left, right = units[i - 2].value, units[i - 1], units[i]
            dx = right.backward(db, dkz)  # right.x = Kv a
            dkv += outer(dx, left.value)
            dx = left.backward(da + matvec(kv, dx), dkv)  # left.x = Kz b
            dkz += outer(dx, before)
            da, db = torch.zeros_like(da), matvec(kz, dx)
        return dkz, dkv, units[0].backward(db, dkz)


@dataclass(frozen=True)
class Clipped:
    """lr * min(1, max_norm / ||G||_F), in float64: one number a chunk, and any max_norm fits."""

    lr: float
    max_norm: float

    def __call__(self, kz: Tensor, kv: Tensor, mean: Tensor) -> Tensor:
        excess = (self._norm(kz, kv) / self.max_norm).clamp_min(1)
        return (self.lr / excess).to(kz.dtype)

    @staticmethod
    def _norm(kz: Tensor, kv: Tensor) -> Tensor:
        return (kz * kv).sum((-1, -2)).double().clamp_min(0).sqrt()

    def backward(self, ds, kz, kv, mean) -> tuple[Tensor, Tensor, Tensor]:
        norm = self._norm(kz, kv)
        pull = -0.5 * self.lr * self.max_norm * ds.double() / norm**3
        pull = torch.where(norm > self.max_norm, pull, 0).to(kz.dtype)[..., None, None]
        return pull * kv, pull * kz, torch.zeros_like(mean)
