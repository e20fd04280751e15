"""The error budget: an implementation may be as wrong as its precision contract, and not more.

Per (batch row, chunk) block, against float64: RMS error at most 1.25x and largest error at most 2x
the contract's own, each plus half an ulp of the block's largest value. Blocks matter: a stale chunk
or a state held in bfloat16 hides in a global average and in a loose `allclose`, not here.

Two things keep the estimate honest. Where results are stored in the compute precision (float32 for
float32) the contract rounds nothing but its own sums, so one block's largest error is a single draw:
it is compared with the largest over the whole result. And blocks of under 256 values get the slack
that their sampling error asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_kernels.testing.contract import Results, contract_scan, exact_scan, results
from ttt_kernels.testing.inputs import ScanInputs
from ttt_kernels.types import compute_dtype

RMS_FACTOR = 1.25
MAX_FACTOR = 2.0
PER_TOKEN = ("y", "dz", "dv")


@dataclass(frozen=True)
class BudgetReport:
    """`ratios[name]`: worst block's error over its budget, for each result; at most 1 is good."""

    ratios: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.ratios.values(), default=0.0)

    @property
    def within_budget(self) -> bool:
        return self.worst <= 1.0

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {r:.2f}" for k, r in self.ratios.items())
        return f"error over budget (good: at most 1): {parts}"


def error_ratio(
    actual: Tensor, contract: Tensor, exact: Tensor, *, chunk_size: int | None = None
) -> float:
    """Worst block's error as a share of its budget; infinity where `actual` is not finite.

    Args:
        actual, contract: results of the same shape and dtype.
        exact: the float64 result.
        chunk_size: tokens per block of a [B, T, *] result; None = one block.
    """
    if actual.shape != exact.shape or actual.dtype != contract.dtype:
        raise ValueError(
            f"actual must be {tuple(exact.shape)} in {contract.dtype}, "
            f"got {tuple(actual.shape)} in {actual.dtype}"
        )
    errors, allowed = actual.double() - exact, contract.double() - exact
    if not bool(torch.isfinite(errors).all()):
        return float("inf")
    half_ulp = 0.5 * torch.finfo(contract.dtype).eps
    stored_exactly = contract.dtype == compute_dtype(contract.dtype)
    worst = 0.0
    for part in _blocks(actual, chunk_size):
        if not exact[part].numel():
            continue
        floor = half_ulp * exact[part].abs().max()
        slack = small_sample_slack(exact[part].numel())
        peak_allowed = allowed.abs().max() if stored_exactly else allowed[part].abs().max()
        rms = _rms(errors[part]) / (RMS_FACTOR * slack * _rms(allowed[part]) + floor)
        peak = errors[part].abs().max() / (MAX_FACTOR * slack * peak_allowed + floor)
        worst = max(worst, *(float(r.nan_to_num(0.0)) for r in (rms, peak)))
    return worst


def small_sample_slack(count: int) -> float:
    """Two RMS estimates of one error from `count` values each differ by a factor whose logarithm has
    standard deviation 1 / sqrt(count): four of them, where a block is too small to estimate from."""
    return math.exp(4 / math.sqrt(count)) if count < 256 else 1.0


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()


def _blocks(t: Tensor, chunk_size: int | None) -> Iterator[tuple]:
    if chunk_size is None:
        yield (...,)
        return
    for row in range(t.shape[0]):
        for a in range(0, t.shape[1], chunk_size):
            yield row, slice(a, a + chunk_size)


def check_scan(
    scan: Callable[..., tuple[Tensor, Tensor]],
    inputs: ScanInputs,
    *,
    chunk_size: int,
    step_size: float | Tensor = 1.0,
    preserve_row_norm: bool = False,
    yardstick: tuple[Results, Results] | None = None,
) -> BudgetReport:
    """Error of a scan and of its gradients over the budget.

    Args:
        scan: called as `scan(z, v, w0, chunk_size=, step_size=, preserve_row_norm=,
            return_state=True)`, like `fast_weight_scan`; returns (y, state), differentiable.
        inputs: from `make_inputs`; their dtype sets the contract.
        yardstick: `contract_scan` and `exact_scan` of the same inputs and options, where several scans
            are held against it.
    """
    options = {"chunk_size": chunk_size, "preserve_row_norm": preserve_row_norm}

    def call(z, v, w0, step):
        return scan(z, v, w0, step_size=step, return_state=True, **options)

    actual: Results = results(call, inputs, step_size, inputs.z.dtype)
    if yardstick is None:
        yardstick = tuple(f(inputs, step_size=step_size, **options) for f in (contract_scan, exact_scan))
    contract, exact = yardstick
    ratios = {}
    for name in exact:
        got = actual[name].to(compute_dtype(inputs.z.dtype)) if name == "state" else actual[name]
        blocks = chunk_size if name in PER_TOKEN else None
        ratios[name] = error_ratio(got, contract[name], exact[name], chunk_size=blocks)
    return BudgetReport(ratios)
