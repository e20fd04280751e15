"""The only place that reads the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

IMPLEMENTATIONS = ("auto", "reference", "eager", "triton", "cuda")


def default_implementation() -> str:
    """TTT_KERNELS_IMPL: what `impl="auto"` means here; "auto" lets the package choose."""
    name = os.environ.get("TTT_KERNELS_IMPL", "auto")
    if name not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"TTT_KERNELS_IMPL must be one of {names}, got {name!r}")
    return name


@contextmanager
def chosen_implementation(name: str) -> Iterator[None]:
    """Make `impl="auto"` mean `name` in this process for a while: for benchmarks and tests of what has
    no `impl` argument."""
    before = os.environ.get("TTT_KERNELS_IMPL")
    os.environ["TTT_KERNELS_IMPL"] = name
    try:
        yield
    finally:
        os.environ.pop("TTT_KERNELS_IMPL")
        if before is not None:
            os.environ["TTT_KERNELS_IMPL"] = before


def compiling_environment() -> dict[str, str]:
    """The environment for a process in which Triton is to compile, not to interpret."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
