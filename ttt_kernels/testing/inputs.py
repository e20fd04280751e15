"""Random inputs that look like a model's: what a kernel sees in use, never zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True)
class ScanInputs:
    """z [B, T, F], v [B, T, D], w0 [D, F] of one dtype; x [B, T, D] and proj [D, D] that made v;
    dy [B, T, D] a gradient for the output."""

    z: Tensor
    v: Tensor
    w0: Tensor
    x: Tensor
    proj: Tensor
    dy: Tensor


def make_inputs(
    batch: int = 1,
    tokens: int = 256,
    d: int = 64,
    f: int = 192,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    write_scale: float = 0.005,
) -> ScanInputs:
    """Model-like inputs from a seeded CPU generator, so that every device gets the same numbers.

    x is a normalised hidden state with a per-feature scale and slowly varying tokens (neighbours
    correlate, as text does); z = silu(x Wg^T) * (x Wu^T) is sparse and heavy-tailed like a gated MLP;
    weights are N(0, 1/fan_in); v = x_{t+1} P, P = N(0, write_scale^2 / D). Values are rounded to
    `dtype` once and are exact in it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    noise = normal(batch, tokens, d)
    x = noise + 0.5 * torch.roll(noise, 1, 1) if tokens else noise
    x = torch.nn.functional.rms_norm(x, (d,)) * (0.5 + torch.rand(d, generator=generator))
    gate, up = normal(f, d) / d**0.5, normal(f, d) / d**0.5
    z = silu(x @ gate.t()) * (x @ up.t())
    proj = normal(d, d) * (write_scale / d**0.5)
    v = torch.cat([x[:, 1:] @ proj, x.new_zeros(batch, min(tokens, 1), d)], 1)
    tensors = (z, v, normal(d, f) / f**0.5, x, proj, normal(batch, tokens, d))
    return ScanInputs(*(t.to(dtype).to(device) for t in tensors))
