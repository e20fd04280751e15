"""Which implementation runs: what `impl="auto"` means, and why an explicit choice cannot run."""

from __future__ import annotations

import torch

from ttt_kernels import _config


def choose_implementation(device_type: str) -> tuple[str, str]:
    """What `impl="auto"` means on a device type, and why."""
    if device_type == "cpu":
        return "eager", "library GEMMs on one float32 state are the CPU implementation"
    return "eager", f"no fused kernel is available for {device_type} yet; eager runs on any device"


def resolve_implementation(impl: str, device: torch.device, op: str) -> str:
    """A name that can run `op` here. An explicit one never falls back."""
    if impl not in _config.IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(_config.IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "auto":
        impl = _config.default_implementation()
    if impl == "auto":
        impl, _ = choose_implementation(device.type)
    if impl in ("triton", "cuda"):
        raise NotImplementedError(
            f"impl={impl!r}: this version of ttt_kernels has no {impl} kernels for {op}; "
            "use impl='eager' or 'auto'"
        )
    return impl
