"""Each operation and implementation at a size a CI machine does in milliseconds.

Speed is measured here, never asserted; what the numbers rest on is asserted (parity). The registry
is the one of `python -m ttt_kernels bench`, less what takes seconds to compile.
"""

from __future__ import annotations

import pytest

from ttt_kernels.cli.bench import bind
from ttt_kernels.cli.bench_baselines import COMPILED
from ttt_kernels.cli.bench_case import Case, Ring
from ttt_kernels.cli.bench_registry import OPERATIONS

pytest.importorskip("pytest_benchmark")

CHUNK_SIZES = (16, 64)


def small(op: str, mode: str, chunk_size: int) -> Case:
    return Case(op, "ci", d=128, f=384, tokens=512, chunk_size=chunk_size, mode=mode)


TRIPLES = [
    (op, impl, mode)
    for op, row in OPERATIONS.items()
    for impl, implementation in row.implementations.items()
    for mode in row.modes
    if impl != COMPILED and implementation.why_not(small(op, mode, CHUNK_SIZES[0])) is None
]


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize(("op", "impl", "mode"), TRIPLES)
def test_bench(benchmark, op, impl, mode, chunk_size):
    case = small(op, mode, chunk_size)
    work = OPERATIONS[op].of(impl)
    forward, backward = work.flops(case)
    benchmark.group = f"{op} {mode} C={chunk_size}"
    benchmark.extra_info["gflop"] = (forward + backward * (mode == "fwd+bwd")) / 1e9
    benchmark.extra_info["error_ratio"] = error = work.parity(case, work, impl)
    assert error <= 1
    alone = Ring(work.operands(case, case.inputs()), cache=0)  # warm: what a cache can hold stays in it
    benchmark(bind(case, impl, OPERATIONS[op], alone).call)
