"""What the benchmark's rows stand on: formulas held against what really runs, baselines, inputs."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ttt_kernels import _config
from ttt_kernels.cli import bench, bench_baselines
from ttt_kernels.cli.bench_case import PREFILL, SHAPES, Case, run_once
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.bench_suites import SUITES, SWEEPS

TINY = Case("scan", "tiny", d=32, f=96, tokens=64, chunk_size=16, batch=2)
ROWS = [(op, mode) for op, row in OPERATIONS.items() for mode in row.modes]
FLOORS = [(op, mode) for op, mode in ROWS if "plain" in OPERATIONS[op].implementations]


def ran(op: str, impl: str, mode: str, dtype: str = "float32"):
    """(case, operation, operands, results) of one call."""
    case = replace(TINY, op=op, mode=mode, dtype=dtype)
    work = OPERATIONS[op].of(impl)
    operands = work.operands(case, case.inputs())
    return case, work, operands, run_once(work.implementations[impl].call, operands, mode)


# --- the formulas ---------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "mode", "impl"),
    [(*row, "reference") for row in ROWS] + [(*row, "plain") for row in FLOORS],
)
def test_bytes_are_those_of_the_operands_and_results(op, mode, impl, dtype):
    case, work, operands, results = ran(op, impl, mode, dtype)
    read = sum(t.nbytes for t in operands.leaves)
    forward, backward = work.traffic(case)
    if mode == "fwd+bwd":
        result, *gradients = results
        assert forward == read + result.nbytes
        assert backward == read + operands.dy.nbytes + sum(t.nbytes for t in gradients)
    else:
        assert forward == read + sum(t.nbytes for t in results)


@pytest.mark.parametrize("impl", ["reference", "plain"])
def test_flops_are_those_that_torch_counts(impl):
    """Every token is in a complete chunk here. The scan's gradients recompute the state, which the
    released formula does not: there the formula is that of the docstring."""
    for op, mode in (FLOORS if impl == "plain" else ROWS):
        if op in ("scan", "fast_weight_apply", "fast_weight_update_"):
            with FlopCounterMode(display=False) as counter:
                case, work, _, _ = ran(op, impl, mode)
            with FlopCounterMode(display=False) as inputs:  # the scan's step size takes some
                work.operands(case, case.inputs())
            forward, backward = work.flops(case)
            recomputed = 2 * case.d * case.f * case.batch * case.tokens * (op == "scan" and impl != "plain")
            wanted = forward + (backward - recomputed) * (mode == "fwd+bwd")
            assert counter.get_total_flops() - inputs.get_total_flops() == wanted, (op, mode)


def test_prefill_returns_the_state():
    _, _, _, (y, state) = ran("scan", "eager", PREFILL)
    assert y.shape == (2, 64, 32) and state.shape == (2, 32, 96)
    assert len(ran("scan", "eager", "fwd")[3]) == 1


@pytest.mark.parametrize("op", OPERATIONS)
def test_inputs_are_never_zeros(op):
    """A value target of a chunk's last token may be: it writes nothing."""
    case = replace(TINY, op=op)
    for leaf in OPERATIONS[op].operands(case, case.inputs()).leaves:
        assert (leaf != 0).double().mean() > 0.9 and leaf.double().std() > 0


# --- the baselines --------------------------------------------------------------------------------
def test_every_name_of_impl_is_an_implementation():
    names = set(_config.IMPLEMENTATIONS) - {"auto"}
    for op in OPERATIONS.keys() - {"ridge_write"}:
        assert names | {"released-compiled"} <= OPERATIONS[op].implementations.keys(), op
    assert {"plain"} <= OPERATIONS["scan"].implementations.keys()


def test_why_not_is_the_packages_own_answer(monkeypatch):
    gpu = replace(TINY, device="cuda", dtype="bfloat16")
    asked = []

    def why_not(device, dtype):
        asked.append((device, dtype))
        return "no such kernels"

    monkeypatch.setattr(bench_baselines._implementations, "why_not_cuda", why_not, raising=False)
    cuda = OPERATIONS["scan"].implementations["cuda"]
    assert cuda.why_not(gpu) == "no such kernels"
    assert asked == [(torch.device("cuda"), torch.bfloat16)]
    assert cuda.why_not(TINY) == "cuda kernels need a GPU (--device cuda)"
    assert OPERATIONS["scan"].implementations["eager"].why_not(gpu) is None


def test_where_nothing_can_be_compiled_the_row_is_left_out(monkeypatch):
    def compile(*args, **options):
        raise RuntimeError("no C++ compiler\nand more about it")

    monkeypatch.setattr(torch, "compile", compile)
    bench_baselines.why_not_compile.cache_clear()
    try:
        results = bench.measure_cases([TINY], ["released-compiled", "eager"], 1)
    finally:
        bench_baselines.why_not_compile.cache_clear()
    assert [row.impl for row in results.rows] == ["eager"]
    assert [x.reason for x in results.left] == ["torch.compile cannot run here: no C++ compiler"]


def test_the_released_formula_is_compiled(monkeypatch):
    """What is timed is the compiled reference, and it is right."""
    if reason := bench_baselines.why_not_compile("cpu"):
        pytest.skip(reason)
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 0)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    rows = bench.measure_cases([replace(TINY, mode="fwd")], ["released-compiled"], 1).rows
    assert [row.impl for row in rows] == ["released-compiled"] and rows[0].error_ratio <= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert not torch._dynamo.utils.counters["graph_break"]


# --- the suites -----------------------------------------------------------------------------------
@pytest.mark.parametrize("device", SWEEPS)
def test_an_axis_of_a_sweep_changes_one_thing(device):
    sweep = SWEEPS[device]
    changed = {"T": {"tokens"}, "C": {"chunk_size"}, "B": {"batch"}, "D x F": {"shape", "d", "f"}}
    for name, axis in sweep.axes().items():
        assert len(axis) >= 3 and sweep.base in axis
        for case in axis:
            differing = {k for k, x in vars(case).items() if x != getattr(sweep.base, k)}
            assert differing in (set(), changed[name], changed[name] - {"shape"}), (name, case)
        sizes = [tuple(getattr(case, k) for k in changed[name] - {"shape"}) for case in axis]
        assert sizes == sorted(set(sizes))
    suite = SUITES["sweep"](device)
    assert suite.device == device and {case.device for case in suite.cases} == {device}
    assert len(suite.cases) == len(set(suite.cases))


def test_the_cpu_suite_has_every_operation_in_every_mode_and_the_sweeps():
    suite = SUITES["cpu"]()
    assert {(case.op, case.mode) for case in suite.cases} >= {
        row for row in ROWS if row != ("fast_weight_apply", "fwd+bwd")
    }  # decoding is not trained
    assert set(SWEEPS["cpu"].cases()) <= set(suite.cases) and len(suite.cases) == len(set(suite.cases))
    assert {case.device for case in suite.cases} == {"cpu"} and suite.impls is None
    for case in suite.cases:
        assert SHAPES.get(case.shape, (case.d, case.f)) == (case.d, case.f)
