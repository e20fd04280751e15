"""The only place that reads the environment."""

from __future__ import annotations

import os

IMPLEMENTATIONS = ("auto", "reference", "eager", "triton", "cuda")


def default_implementation() -> str:
    """TTT_KERNELS_IMPL: what `impl="auto"` means here; "auto" lets the package choose."""
    name = os.environ.get("TTT_KERNELS_IMPL", "auto")
    if name not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"TTT_KERNELS_IMPL must be one of {names}, got {name!r}")
    return name


def compiling_environment() -> dict[str, str]:
    """The environment for a process in which Triton is to compile, not to interpret."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
