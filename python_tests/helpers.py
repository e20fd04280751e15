"""Shared by the op tests: small random calls, their results and gradients, and distances.

Shapes are odd and tiny on purpose: what can go wrong here is indexing, not size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import torch
from source_tree import ROOT
from torch import Tensor

import ttt_kernels as ttt
from ttt_kernels.types import chunk_count, compute_dtype

D, F, C = 5, 7, 4  # rows and columns of the fast weight, tokens per chunk


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal, the same for a shape, seed and precision everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@dataclass
class Call:
    """One call of an op: the differentiable tensors by name, in order, and everything else."""

    op: Callable
    tensors: dict[str, Tensor]
    options: dict = field(default_factory=dict)

    def __call__(self, **changes):
        """The result of the op, with `changes` to tensors or options."""
        return self.op(**{**self.tensors, **self.options, **changes})

    def leaves(self) -> dict[str, Tensor]:
        """Fresh leaves that require gradients."""
        return {k: t.detach().clone().requires_grad_() for k, t in self.tensors.items()}


def scan_call(
    batch: int = 2,
    tokens: int = 13,
    *,
    chunk: int = C,
    dtype: torch.dtype = torch.float64,
    state: bool = False,
    steps: bool = False,
    cu: list[int] | None = None,
    seed: int = 0,
    **options,
) -> Call:
    """`fast_weight_scan` on random data; `cu` packs sequences into one row, whatever `batch` is."""
    acc = compute_dtype(dtype)
    cu_seqlens = None if cu is None else torch.tensor(cu)
    batch, tokens = (batch, tokens) if cu is None else (1, cu[-1])
    tensors = {
        "z": randn(batch, tokens, F, seed=seed, dtype=dtype),
        "v": randn(batch, tokens, D, seed=seed + 1, dtype=dtype) * 0.3,
        "w0": randn(D, F, seed=seed + 2, dtype=dtype),
    }
    if steps:
        count = chunk_count(tokens, chunk, cu_seqlens)
        tensors["step_size"] = randn(batch, count, seed=seed + 3, dtype=acc) * 0.4
    else:
        options.setdefault("step_size", 0.3)
    if state:
        rows = batch if cu is None else len(cu) - 1
        tensors["state"] = randn(rows, D, F, seed=seed + 4, dtype=acc)
    return Call(
        ttt.fast_weight_scan,
        tensors,
        {"chunk_size": chunk, "cu_seqlens": cu_seqlens, "return_state": True, **options},
    )


def apply_call(
    batch: int = 3,
    tokens: int = 5,
    *,
    slots: list[int] | None = None,
    pool: int | None = None,
    dtype: torch.dtype = torch.float64,
    scale: bool = False,
    **options,
) -> Call:
    """`fast_weight_apply` on random data; without slots the pool has one weight per row."""
    acc, pool = compute_dtype(dtype), pool or batch
    tensors = {
        "z": randn(batch, tokens, F, dtype=dtype),
        "weight": randn(pool, D, F, seed=2, dtype=acc),
    }
    if scale:
        tensors["row_scale"] = randn(pool, D, seed=3, dtype=acc)
    where = None if slots is None else torch.tensor(slots)
    return Call(ttt.fast_weight_apply, tensors, {"slots": where, **options})


def gradients(outputs: list[Tensor], leaves: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """d<name> of every leaf, for random output gradients that depend on position and shape only."""
    directions = [randn(*t.shape, seed=50 + i, dtype=t.dtype) for i, t in enumerate(outputs)]
    live = [(t, d) for t, d in zip(outputs, directions, strict=True) if t.requires_grad]
    grads = torch.autograd.grad(
        [t for t, _ in live],
        list(leaves.values()),
        [d for _, d in live],
        allow_unused=True,
        materialize_grads=True,
        **options,
    )
    return {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def results(call: Call, **changes) -> dict[str, Tensor]:
    """Outputs by position, and the gradient of every tensor."""
    leaves = call.leaves()
    outputs = call(**leaves, **changes)
    outputs = [outputs] if isinstance(outputs, Tensor) else [t for t in outputs if t is not None]
    grads = gradients(outputs, leaves)
    return {f"out{i}": t.detach() for i, t in enumerate(outputs)} | grads


def kept_and_consumed(call: Call, **changes) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """Gradients of a scan's y where autograd keeps the graph for another backward, which leaves the saved
    state alone, and where it does not; and whether that one has overwritten the state."""
    leaves = call.leaves()
    y, _ = call(**leaves, return_state=False, **changes)
    saved = y.grad_fn.saved_tensors[0]
    before = saved.clone()
    kept = gradients([y], leaves, retain_graph=True)
    assert torch.equal(saved, before)
    consumed = gradients([y], leaves)
    return kept, consumed, not torch.equal(saved, before)


def error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius distance; what should be 0 has to be exactly that. NaN counts as inf."""
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, want.shape, got.dtype)
    scale = want.double().norm()
    distance = (got.double() - want.double()).norm()
    value = (distance / scale if scale > 0 else distance.sign()).item()
    return value if value == value else float("inf")


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    assert got.keys() == want.keys()
    errors = {k: error(got[k], want[k]) for k in want}
    wrong = {k: f"{e:.1e}" for k, e in errors.items() if not e <= bound}
    assert not wrong, f"relative error above {bound:.0e}: {wrong}"


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same bits."""
    assert got.keys() == want.keys()
    wrong = [k for k in want if not torch.equal(got[k], want[k])]
    assert not wrong, f"bits differ in {wrong}"


class Fence(NamedTuple):
    """A fenced block of a document; `line` of its opening, `excuse` from a comment right above it."""

    line: int
    language: str
    code: str
    excuse: str


def code_fences(document: str | Path) -> list[Fence]:
    text = (ROOT / document).read_text(encoding="utf-8")
    pattern = r"^(?:<!-- not run: (.+) -->\n)?(```)(\w*)\n(.*?)^```$"
    found = re.finditer(pattern, text, re.M | re.S)
    return [Fence(text.count("\n", 0, m.start(2)) + 1, m[3], m[4], m[1] or "") for m in found]


def documented_code(document: str | Path) -> list[CodeType]:
    """The Python blocks of a document that are to run, in order, compiled with its line numbers."""
    blocks = [f for f in code_fences(document) if f.language == "python" and not f.excuse]
    return [compile("\n" * f.line + f.code, str(ROOT / document), "exec") for f in blocks]
