"""Is it right? Worst error of an implementation over the budget of its precision contract.

What the contract and exact arithmetic give is the same for all implementations of a case, and dear: the
last one is kept until `forget`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ttt_kernels.cli.bench_case import Case, Operands, Operation, run_once
from ttt_kernels.testing import ScanInputs, check_scan, contract_scan, error_ratio, exact_scan


def scan_parity(case: Case, op: Operation, impl: str) -> float:
    """Values, state and gradients against the contract, block by block; see `ttt_kernels.testing`."""
    data, options, yardstick = scan_yardstick(case.short(), op.operands)
    return check_scan(op.implementations[impl].call, data, yardstick=yardstick, **options).worst


@functools.lru_cache(maxsize=1)
def scan_yardstick(case: Case, make: Callable[[Case, ScanInputs], Operands]) -> tuple:
    data = case.inputs(seed=1)
    options = make(case, data).options
    return data, options, (contract_scan(data, **options), exact_scan(data, **options))


def reference_parity(case: Case, op: Operation, impl: str) -> float:
    """Values and gradients against the contract, and the reference in float64 as exact."""
    case, mode = case.short(), op.modes[-1]
    reference = op.implementations["reference"].call
    contract, exact = yardstick(case, mode, op.operands, op.contract or reference, reference)
    actual = run_once(op.implementations[impl].call, op.operands(case, case.inputs(seed=1)), mode)
    results = zip(actual, contract, exact, strict=True)
    return max(error_ratio(a, c, e) for a, c, e in results) / op.slack


@functools.lru_cache(maxsize=1)
def yardstick(case: Case, mode: str, make: Callable, contract: Callable, reference: Callable) -> tuple:
    """What the contract gives, and what is exact; operands anew for each, for an operation may write them."""
    of_contract = run_once(contract, make(case, case.inputs(seed=1)), mode)
    return of_contract, run_once(reference, make(case, case.inputs(seed=1)).in_dtype(torch.float64), mode)


def forget() -> None:
    """Give the memory back before something is timed."""
    scan_yardstick.cache_clear()
    yardstick.cache_clear()
