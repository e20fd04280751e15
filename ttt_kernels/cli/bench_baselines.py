"""What an operation is timed against, and how its implementations are found.

- `reference` is the released formula, literally, one weight per chunk: the `reference` module of the op.
- `released-compiled` is `torch.compile` of that same function, with the compiler's defaults and without
  dynamic shapes. Compiling happens before the clock starts.
- Every other name of the package's `impl` argument is an implementation, wherever it can run.
- `plain` is the floor: the down-projection alone, which reads the slow weight and writes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ttt_kernels._config import IMPLEMENTATIONS
from ttt_kernels.cli import bench_formulas as formulas
from ttt_kernels.cli.bench_case import DTYPES, PREFILL, Case, Implementation, Operands, Operation
from ttt_kernels.cli.bench_parity import reference_parity
from ttt_kernels.ops import _implementations
from ttt_kernels.testing import ScanInputs
from ttt_kernels.types import compute_dtype

REFERENCE, COMPILED, PLAIN = "reference", "released-compiled", "plain"
KERNELS = tuple(name for name in IMPLEMENTATIONS if name not in ("auto", REFERENCE))


def implementations(
    released: Callable[..., Tensor],
    with_impl: Callable[[str], Callable[..., Tensor]],
    memory: Callable[[Case], int] = lambda case: 0,
    kernels: tuple[str, ...] = KERNELS,
) -> dict[str, Implementation]:
    """The released formula, it compiled, and `with_impl(name)` for every name of `impl`."""
    named = {
        name: Implementation(with_impl(name), why_not=functools.partial(why_not_named, name))
        for name in kernels
    }
    return {
        REFERENCE: Implementation(released, memory),
        COMPILED: Implementation(compiled(released), memory, why_not_compiled),
        **named,
    }


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile` of it, when it is first called: the compiler takes a second to import."""

    @functools.cache
    def program() -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=False)

    return lambda *leaves, **options: program()(*leaves, **options)


def why_not_named(name: str, case: Case) -> str | None:
    """What `_implementations.why_not_<name>` says; an implementation without one runs on any device.
    On a CPU kernels for GPUs are simulated, for tests: such times mean nothing."""
    why_not = getattr(_implementations, f"why_not_{name}", None)
    if why_not is None:
        return None
    if case.device == "cpu":
        return f"{name} kernels need a GPU (--device cuda)"
    return why_not(torch.device(case.device), DTYPES[case.dtype])


def why_not_compiled(case: Case) -> str | None:
    return why_not_compile(case.device)


@functools.cache
def why_not_compile(device: str) -> str | None:
    """The compiler's own answer on a trivial function: on a CPU it needs a C++ compiler, on a GPU Triton."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(1, device=device))
    except Exception as error:  # whatever it lacks, the row is left out and says so
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.compile cannot run here: {reason[0]}"
    return None


# --- the floor ------------------------------------------------------------------------------------
def plain_operands(case: Case, data: ScanInputs) -> Operands:
    return Operands((data.z, data.w0), {}, data.dy)


def plain_projection(z: Tensor, w0: Tensor, return_state: bool = False) -> Tensor:
    """`z @ w0.T`; on a CPU in the precision in which operands of 16 bits are multiplied there. It has no
    state to return."""
    dtype = multiply_dtype(z.device, z.dtype)
    return torch.nn.functional.linear(z.to(dtype), w0.to(dtype)).to(z.dtype)


def multiply_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return compute_dtype(dtype) if device.type == "cpu" else dtype


def rounded_once(z: Tensor, w0: Tensor, return_state: bool = False) -> Tensor:
    """The floor's contract: products accumulated in the compute precision, the result rounded once."""
    acc = compute_dtype(z.dtype)
    return (z.to(acc) @ w0.to(acc).t()).to(z.dtype)


FLOOR = Operation(
    operands=plain_operands,
    implementations={
        REFERENCE: Implementation(rounded_once),
        PLAIN: Implementation(plain_projection),
    },
    flops=formulas.plain_flops,
    traffic=formulas.plain_bytes,
    gemms=formulas.plain_gemms,
    parity=reference_parity,
    modes=("fwd", PREFILL, "fwd+bwd"),
)
FLOORED = {PLAIN: Implementation(plain_projection, instead=FLOOR)}
