"""What a benchmark is made of: cases, operands, implementations, operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ttt_kernels.testing import ScanInputs, make_inputs
from ttt_kernels.types import ceil_div, compute_dtype

MODES = ("fwd", "fwd+bwd")
PREFILL = "prefill"  # forward without gradients that returns the state too: a request's prompt
ALL_MODES = ("fwd", PREFILL, "fwd+bwd")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
SHAPES = {  # (D, F) of the released backbones
    "llama-3.1-8b": (4096, 14336),
    "mistral-7b": (4096, 14336),
    "qwen3-4b": (2560, 9728),
    "qwen3-0.6b": (1024, 3072),
}


@dataclass(frozen=True)
class Case:
    """One problem; implementations of it are comparable."""

    op: str
    shape: str
    d: int
    f: int
    tokens: int
    chunk_size: int
    mode: str = "fwd"
    dtype: str = "float32"
    batch: int = 1
    preserve_row_norm: bool = False
    device: str = "cpu"

    @property
    def chunks(self) -> int:
        return ceil_div(self.tokens, self.chunk_size)

    @property
    def weight_bytes(self) -> int:
        """One float32 weight, the unit of extra memory."""
        return 4 * self.d * self.f

    def inputs(self, seed: int = 0) -> ScanInputs:
        size = (self.batch, self.tokens, self.d, self.f)
        return make_inputs(*size, dtype=DTYPES[self.dtype], device=self.device, seed=seed)

    def short(self) -> Case:
        """The same widths and chunks, with just enough tokens for writes, super-chunks, a tail."""
        tokens = max(2 * self.chunk_size + self.chunk_size // 2, 512)
        return replace(self, batch=1, tokens=min(self.tokens, tokens))


@dataclass(frozen=True)
class Operands:
    """`call(*leaves, **options)` is the operation; `dy` is a gradient for its result."""

    leaves: tuple[Tensor, ...]
    options: dict[str, object]
    dy: Tensor

    def in_dtype(self, dtype: torch.dtype) -> Operands:
        leaves = tuple(t.to(dtype) for t in self.leaves)
        return Operands(leaves, self.options, self.dy.to(compute_dtype(dtype)))

    def clone(self) -> Operands:
        return Operands(tuple(t.clone() for t in self.leaves), self.options, self.dy.clone())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.leaves, self.dy))


MOST_COPIES = 64  # as in bench_worker: enough for one weight of a released model in any cache so far


class Ring:
    """Operands and as many copies as together exceed a cache of `cache` bytes, at most MOST_COPIES, taken
    in turn: a call finds its inputs in memory, as the layers of a model do, and not in the cache."""

    def __init__(self, operands: Operands, cache: int) -> None:
        copies = min(ceil_div(cache, operands.nbytes), MOST_COPIES)
        self.copies = [operands, *(operands.clone() for _ in range(copies))]
        self._turns = itertools.cycle(self.copies)

    def take(self) -> Operands:
        return next(self._turns)


@dataclass(frozen=True)
class Implementation:
    """`memory(case)` estimates the bytes it needs, so that a hopeless run is not started;
    `why_not(case)` says why it cannot run a case at all. `instead`: the operation that it is an
    implementation of where that is another one, timed in the same rounds: a floor, or one that is given
    more."""

    call: Callable[..., Tensor]
    memory: Callable[[Case], int] = lambda case: 0
    why_not: Callable[[Case], str | None] = lambda case: None
    instead: Operation | None = None


@dataclass(frozen=True)
class Operation:
    """A row of the table.

    operands: from a case and its random inputs.
    flops, traffic: (forward, backward) per call; the formulas stand in `bench_formulas`.
    gemms: (m, k, n) of the matrix products it is made of; their best rate is the ceiling.
    parity: worst error of an implementation over the budget of its precision contract.
    contract: the contract in plain torch, for `reference_parity`; None = the reference.
    slack: how many times the budget it may use. The Gram form squares the condition number of the
        literal formula, which is the contract it is held against.
    row_norm: whether preserve_row_norm means anything here.
    modes: those it has; without a gradient, "fwd" alone.
    bound: the ceiling that limits it in use, "gemm" or "copy".
    use: what it is for where the mode does not say it.
    """

    operands: Callable[[Case, ScanInputs], Operands]
    implementations: Mapping[str, Implementation]
    flops: Callable[[Case], tuple[int, int]]
    traffic: Callable[[Case], tuple[int, int]]
    gemms: Callable[[Case], tuple[tuple[int, int, int], ...]]
    parity: Callable[[Case, Operation, str], float]
    contract: Callable[..., Tensor] | None = None
    slack: float = 1.0
    row_norm: bool = False
    modes: tuple[str, ...] = MODES
    bound: str = "gemm"
    use: str | None = None

    def of(self, impl: str) -> Operation:
        """The operation that `impl` implements: this one, or another that is timed beside it."""
        return self.implementations[impl].instead or self


def run_once(call: Callable[..., Tensor | tuple], operands: Operands, mode: str) -> tuple:
    """The result; with "fwd+bwd" also the gradient of every leaf, with "prefill" also the state."""
    if mode != "fwd+bwd":
        carry = {"return_state": True} if mode == PREFILL else {}
        with torch.no_grad():
            result = call(*operands.leaves, **operands.options, **carry)
        return result if isinstance(result, tuple) else (result,)
    leaves = [t.detach().requires_grad_() for t in operands.leaves]
    result = call(*leaves, **operands.options)
    if not result.requires_grad:  # the step sizes of chunks that are not full are constants
        return (result, *map(torch.zeros_like, leaves))
    dy = operands.dy.to(result.dtype)  # a leaf that the result does not need has the gradient 0
    return (result.detach(), *torch.autograd.grad(result, leaves, dy, materialize_grads=True))
