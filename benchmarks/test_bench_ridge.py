"""The closed-form write in both of its forms, against the released formulation.

`python -m ttt_kernels bench --op ridge_write --mode fwd --chunk-size 2048` is the same comparison at the
size of a model.
"""

from __future__ import annotations

import pytest

from ttt_kernels.cli.bench import bind
from ttt_kernels.cli.bench_baselines import COMPILED
from ttt_kernels.cli.bench_case import Case, Ring
from ttt_kernels.cli.bench_registry import OPERATIONS

pytest.importorskip("pytest_benchmark")

RIDGE = OPERATIONS["ridge_write"]


@pytest.mark.parametrize("tokens", [257, 1025], ids=["dual", "primal"])
@pytest.mark.parametrize("impl", [name for name in RIDGE.implementations if name != COMPILED])
def test_bench(benchmark, impl, tokens):
    case = Case("ridge_write", "ci", d=128, f=384, tokens=tokens, chunk_size=tokens)
    benchmark.group, op = f"ridge_write T={tokens}", RIDGE.of(impl)
    benchmark.extra_info["gflop"] = op.flops(case)[0] / 1e9
    benchmark.extra_info["error_ratio"] = error = op.parity(case, op, impl)
    assert error <= 1
    benchmark(bind(case, impl, RIDGE, Ring(op.operands(case, case.inputs()), cache=0)).call)
