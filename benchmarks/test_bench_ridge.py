"""The closed-form write in both of its forms, against the released formulation.

`python -m ttt_kernels bench --op ridge_write --mode fwd --chunk-size 1` is the same comparison at the
size of a model.
"""

from __future__ import annotations

import pytest

from ttt_kernels.cli.bench import bind
from ttt_kernels.cli.bench_registry import OPERATIONS, Case

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("tokens", [257, 1025], ids=["dual", "primal"])
@pytest.mark.parametrize("impl", OPERATIONS["ridge_write"].implementations)
def test_bench(benchmark, impl, tokens):
    case = Case("ridge_write", "ci", d=128, f=384, tokens=tokens, chunk_size=1)
    operation = OPERATIONS["ridge_write"]
    benchmark.group = f"ridge_write T={tokens}"
    benchmark.extra_info["gflop"] = operation.flops(case)[0] / 1e9
    benchmark.extra_info["error_ratio"] = error = operation.parity(case, operation, impl)
    assert error <= 1
    benchmark(bind(case, impl, operation, case.inputs()).call)
