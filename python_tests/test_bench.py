"""The benchmark: what it measures is exact where it can be, and a wrong result is never timed."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from ttt_kernels.cli import bench, bench_baselines, bench_report, measure
from ttt_kernels.cli.bench_case import (
    ALL_MODES,
    DTYPES,
    MODES,
    SHAPES,
    Case,
    Implementation,
    Ring,
    run_once,
)
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.bench_suites import SUITES
from ttt_kernels.cli.main import main

CPU = torch.device("cpu")
TINY = Case("scan", "tiny", d=32, f=96, tokens=80, chunk_size=16)


def cases(op: str = "scan", modes: tuple[str, ...] = MODES) -> list[Case]:
    return [replace(TINY, op=op, chunk_size=c, mode=m) for c in (16, 32) for m in modes]


@pytest.fixture
def tiny_shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", (32, 96))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A small cache to overflow, and nothing compiled: test_bench_baselines.py compiles."""
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 1 << 18)
    monkeypatch.setattr(bench_baselines, "why_not_compile", lambda device: "not here")


# --- the meters ---------------------------------------------------------------------------------
def test_extra_memory_counts_what_is_held_at_once_and_not_returned():
    def call():
        a = torch.empty(1000, 1000)  # 4 MB
        b = torch.empty(500, 1000)  # 6 MB held
        del a
        c = torch.empty(1000, 1000)  # 6 MB held
        return b, c[:10]  # of which everything is returned: a view keeps its storage

    def scratch():
        keep = torch.empty(1000, 1000)
        for _ in range(3):
            torch.empty(2000, 1000)
        return keep

    assert measure.extra_memory(call, CPU) == 0
    assert measure.extra_memory(scratch, CPU) == 8_000_000
    assert measure.extra_memory(lambda: None, CPU) == 0


def test_extra_memory_sees_inside_custom_ops():
    """A dispatch mode would not: the op is one call to it."""
    operands = OPERATIONS["scan"].operands(TINY, TINY.inputs())
    call = OPERATIONS["scan"].implementations["eager"].call
    assert measure.extra_memory(lambda: run_once(call, operands, "fwd"), CPU) >= TINY.weight_bytes


def test_reference_memory_is_estimated_within_a_factor():
    op = OPERATIONS["scan"]
    for mode in MODES:
        for preserve in (False, True):
            case = replace(TINY, tokens=640, mode=mode, preserve_row_norm=preserve)
            operands = op.operands(case, case.inputs())
            reference = op.implementations["reference"]
            used = measure.extra_memory(
                lambda c=case, o=operands, r=reference: run_once(r.call, o, c.mode), CPU
            )
            assert 0.7 < reference.memory(case) / used < 1.6, (mode, preserve)


def test_percentiles():
    timing = measure.Timing([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.median, timing.percentile(0), timing.percentile(100)) == (3.0, 1.0, 5.0)
    assert math.isclose(timing.percentile(20), 1.8)
    assert measure.Timing([2.0]).percentile(80) == 2.0


def test_calls_are_interleaved():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "AB"}
    times = measure.time_interleaved(calls, 3, CPU)
    assert order == list("ABABAB")
    assert all(len(t.seconds) == 3 for t in times.values())


def test_shuffled_rounds_hold_every_call_once():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ABCD"}
    measure.time_interleaved(calls, 20, CPU, shuffle=random.Random(0))
    turns = [tuple(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert len(turns) == 20 and all(sorted(turn) == list("ABCD") for turn in turns)
    assert len(set(turns)) > 10


def test_sparse_calls_are_spread_over_the_rounds():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "AB"}
    times = measure.time_interleaved(calls, 17, CPU, sparse="B")
    assert "".join(order) == "ABABABAB" + "AAAAAB" + "AAAAAAAAB"
    assert len(times["A"].seconds) == 17 and len(times["B"].seconds) == 6


def test_rounds_end_when_their_time_is_used_up(monkeypatch):
    assert list(measure.rounds(3)) == [0, 1, 2]
    monkeypatch.setattr(measure, "ROUNDS_SECONDS", 0.0)
    assert len(list(measure.rounds(None))) == measure.MIN_ROUNDS
    monkeypatch.setattr(measure, "ROUNDS_SECONDS", 60.0)
    assert len(list(measure.rounds(None))) == measure.MAX_ROUNDS


def test_ratios_are_paired_by_round():
    """A machine that becomes ten times slower changes no ratio of a round."""
    own, other = measure.Timing([1.0, 10.0, 1.0]), measure.Timing([2.0, 20.0, 20.0])
    assert own.ratio_to(other) == 0.5 and other.ratio_to(own) == 2.0
    with pytest.raises(ValueError):
        own.ratio_to(measure.Timing([1.0]))


def test_inputs_rotate_among_more_copies_than_a_cache_holds():
    op = OPERATIONS["scan"]
    operands = op.operands(TINY, TINY.inputs())
    assert operands.nbytes == sum(t.nbytes for t in (*operands.leaves, operands.dy))
    ring = Ring(operands, cache=3 * operands.nbytes + 1)
    turns = [ring.take() for _ in range(10)]
    assert sum(o.nbytes for o in ring.copies) > 3 * operands.nbytes + 1 and len(ring.copies) == 5
    assert len({o.leaves[0].data_ptr() for o in turns}) == 5 and turns[0] is turns[5] is operands
    for copy in ring.copies:
        assert all(torch.equal(a, b) for a, b in zip(copy.leaves, operands.leaves, strict=True))
    assert Ring(operands, cache=0).copies == [operands]


def test_the_cache_is_the_largest_that_the_machine_reports(monkeypatch, tmp_path):
    for i, size in enumerate(("32K", "1024K", "16M")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    monkeypatch.setattr(measure, "CPU_CACHES", tmp_path)
    assert measure.cache_bytes(CPU) == 16 << 20
    monkeypatch.setattr(measure, "CPU_CACHES", tmp_path / "none")
    assert measure.cache_bytes(CPU) == measure.UNKNOWN_CACHE


# --- the table of operations ----------------------------------------------------------------------
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_is_measured(op):
    results = bench.measure_cases(cases(op, ALL_MODES), None, 1)
    possible = cases(op, OPERATIONS[op].modes)
    assert {x.reason for x in results.left} <= {f"{op} has no gradient", f"{op} has no prefill"}
    able = [x for x in OPERATIONS[op].implementations.values() if x.why_not(TINY) is None]
    assert len(able) >= 2 and len(results.rows) == len(possible) * len(able)
    for row in results.rows:
        assert row.gflops > 0 and row.gemm_gflops > 0 and row.error_ratio <= 1
        assert row.gbytes > 0 and row.copy_gbytes > 0
        assert row.ratios.keys() >= {"reference", "eager"} and row.ratios.get(row.impl, 1.0) == 1.0
    ceilings = {(row.case.chunk_size, row.gemm_gflops) for row in results.rows}
    assert len(ceilings) == len({row.case.chunk_size for row in results.rows})  # one for all modes


def test_what_needs_a_gpu_is_left_out_and_said_where_it_is_asked_for():
    results = bench.measure_cases([TINY], ["triton"], 1)
    assert not results.rows
    assert [x.reason for x in results.left] == ["triton kernels need a GPU (--device cuda)"]


def test_both_ceilings_stand_beside_a_row_and_one_is_said_to_bind():
    decode = bench.measure_cases([replace(TINY, op="fast_weight_apply", tokens=1)], ["eager"], 1).rows[0]
    scan = bench.measure_cases([TINY], ["eager"], 1).rows[0]
    assert (decode.bound, decode.use, scan.bound, scan.use) == ("copy", "decode", "gemm", "fwd")
    moved = decode.case.weight_bytes + 4 * (TINY.d + TINY.f)
    assert math.isclose(decode.gbytes, moved / decode.milliseconds / 1e6)
    for row in (decode, scan):
        assert row.copy_share == row.gbytes / row.copy_gbytes
        assert row.gemm_share == row.gflops / row.gemm_gflops


def test_the_floor_does_less_work_and_is_rated_by_its_own():
    rows = {row.impl: row for row in bench.measure_cases([TINY], ["eager", "plain"], 1).rows}
    work = {impl: row.gflops * row.milliseconds * 1e6 for impl, row in rows.items()}
    assert math.isclose(work["eager"], 2 * work["plain"])
    assert math.isclose(work["plain"], 2 * TINY.d * TINY.f * TINY.tokens)
    assert math.isclose(rows["eager"].ratios["plain"] * rows["plain"].ratios["eager"], 1.0)


@pytest.mark.parametrize("op", ["scan", "conv_target", "spectral_step_size"])
def test_low_precision(op):
    rows = bench.measure_cases([replace(TINY, op=op, dtype="bfloat16")], ["eager"], 1).rows
    assert rows[0].error_ratio <= 1 and DTYPES[rows[0].case.dtype] == torch.bfloat16


def faulty(z, v, w0, **options):
    """The learning rate is off by 0.3%."""
    options["step_size"] *= 1.003
    return OPERATIONS["scan"].implementations["eager"].call(z, v, w0, **options)


def test_every_parity_check_sees_an_error_of_a_third_of_a_percent():
    for name, op in OPERATIONS.items():
        eager = op.implementations["eager"].call

        def wrong(*leaves, eager=eager, **options):
            result = eager(*leaves, **options)
            return tuple(1.003 * r for r in result) if isinstance(result, tuple) else 1.003 * result

        with_wrong = replace(op, implementations={**op.implementations, "x": Implementation(wrong)})
        case = replace(TINY, op=name)
        assert op.parity(case, op, "eager") <= 1 < op.parity(case, with_wrong, "x"), name


def with_faulty() -> dict:
    op = OPERATIONS["scan"]
    added = {**op.implementations, "faulty": Implementation(faulty)}
    return {**OPERATIONS, "scan": replace(op, implementations=added)}


def test_a_red_parity_check_refuses_to_time():
    results = bench.measure_cases(cases(), ["eager", "faulty"], 1, operations=with_faulty())
    assert {row.impl for row in results.rows} == {"eager"}
    assert len(results.refused) == len(cases())
    assert all(x.impl == "faulty" and "parity is red" in x.reason for x in results.refused)


def test_a_floor_that_is_wrong_is_refused_too():
    op = OPERATIONS["scan"]
    floor = op.of("plain")
    wrong = Implementation(lambda *leaves, **options: 1.003 * bench_baselines.plain_projection(*leaves))
    floor = replace(floor, implementations={**floor.implementations, "plain": wrong})
    added = {**op.implementations, "plain": replace(wrong, instead=floor)}
    operations = {**OPERATIONS, "scan": replace(op, implementations=added)}
    results = bench.measure_cases([TINY], ["eager", "plain"], 1, operations=operations)
    assert [row.impl for row in results.rows] == ["eager"]
    assert [x.impl for x in results.refused] == ["plain"]


def test_each_length_and_batch_is_timed_and_checked_once():
    said = []
    swept = [replace(TINY, tokens=t, batch=b) for t in (600, 700) for b in (1, 2)]
    assert len(bench.measure_cases(swept, ["eager"], 1, said.append).rows) == 4
    assert sum("checking" in text for text in said) == 1


def test_an_implementation_that_says_it_cannot_is_left_out_with_its_reason():
    def cannot(*leaves, **options):
        raise NotImplementedError("only on Sundays")

    op = OPERATIONS["scan"]
    added = {**op.implementations, "sunday": Implementation(cannot)}
    operations = {**OPERATIONS, "scan": replace(op, implementations=added)}
    results = bench.measure_cases(cases(), ["eager", "sunday", "unheard"], 1, operations=operations)
    assert {row.impl for row in results.rows} == {"eager"}
    reasons = {(x.impl, x.kind, x.reason) for x in results.left}
    assert reasons == {
        ("sunday", "skipped", "only on Sundays"),
        ("unheard", "skipped", "scan has no such implementation"),
    }
    assert {x.case for x in results.left} == set(cases())


def test_an_implementation_that_fails_is_refused_and_costs_the_others_nothing():
    def fails(*leaves, **options):
        raise RuntimeError("illegal memory access\nsecond line")

    def too_large(*leaves, **options):
        raise torch.OutOfMemoryError("40 GiB")

    op = OPERATIONS["scan"]
    added = {"fails": Implementation(fails), "large": Implementation(too_large), **op.implementations}
    operations = {**OPERATIONS, "scan": replace(op, implementations=added)}
    results = bench.measure_cases([TINY], ["fails", "large", "eager"], 1, operations=operations)
    assert [row.impl for row in results.rows] == ["eager"]
    assert [(x.impl, x.kind, x.reason) for x in results.left] == [
        ("fails", "refused", "it raised RuntimeError: illegal memory access"),
        ("large", "skipped", "it ran out of memory"),
    ]


def test_a_result_that_is_not_a_number_is_red():
    assert bench.wrong_results(TINY, "x", float("nan")).kind == "refused"
    assert bench.wrong_results(TINY, "x", float("inf")).kind == "refused"
    assert bench.wrong_results(TINY, "x", 1.0) is None


def test_what_does_not_fit_is_skipped_and_said(monkeypatch):
    monkeypatch.setattr(bench, "available_memory", lambda device: 10_000)
    results = bench.measure_cases([TINY], None, 1)
    assert [row.impl for row in results.rows] == ["eager", "plain"]
    assert [(x.impl, x.kind) for x in results.left] == [("reference", "skipped")]
    assert "available" in results.left[0].reason


# --- the command ----------------------------------------------------------------------------------
def test_command_writes_lines_table_and_plot(tmp_path, capsys, tiny_shape):
    lines, picture = tmp_path / "sub" / "out.jsonl", tmp_path / "sub" / "out.png"
    grid = "--shape tiny --T 80 --chunk-size 16 32 --repeats 2 --preserve-row-norm".split()
    assert main(["bench", *grid, "--output", str(lines), "--plot", str(picture)]) == 0
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert records[0]["kind"] == "environment" and records[0]["torch"] == torch.__version__
    rows = records[1:]
    assert len(rows) == 12 and {r["kind"] for r in rows} == {"result"}
    wanted = {"milliseconds", "milliseconds_p20", "gflops", "gemm_share", "extra_weights",
              "error_ratio", "chunk_size", "impl", "mode", "ratio_to_reference", "ratio_to_eager",
              "ratio_to_plain", "gbytes", "copy_share", "bound", "use"}  # fmt: skip
    assert wanted <= rows[0].keys() and rows[0]["preserve_row_norm"] is True
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "reference" in shown and "eager" in shown and "GFLOP/s" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_the_kind_of_picture_is_checked_before_measuring(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "measure_group", lambda *args: pytest.fail("it measured"))
    for name in ("a.foo", "a"):
        assert main(["bench", "--plot", str(tmp_path / name)]) == 2
        assert "--plot must end in one of" in capsys.readouterr().err


def test_command_fails_where_a_result_is_wrong(monkeypatch, tmp_path, capsys, tiny_shape):
    monkeypatch.setitem(OPERATIONS, "scan", with_faulty()["scan"])
    lines = tmp_path / "out.jsonl"
    grid = "--shape tiny --T 80 --chunk-size 16 --mode fwd --repeats 1 --impl eager faulty".split()
    assert main(["bench", *grid, "--output", str(lines)]) == 1
    assert "parity is red" in capsys.readouterr().out
    kinds = [json.loads(line)["kind"] for line in lines.read_text().splitlines()]
    assert kinds == ["environment", "result", "refused"]


def test_targets_are_reported_not_asserted(capsys):
    suite = SUITES["foundation"]()
    assert {c.tokens for c in suite.cases} == {8192} and len(suite.cases) == 6
    empty = [t.judge(bench.Results()) for t in suite.targets]
    assert all(t["measured"] is None and t["reached"] is None for t in empty)

    def row(impl: str, case: Case, milliseconds: float) -> bench.Row:
        return bench.Row(case, impl, milliseconds, 1, 1, 1, 90.0, 100.0, None, None, 12, 0.5)

    rows = [row(i, c, 10.0 * (i == "reference") + 4.0) for c in suite.cases
            for i in ("reference", "eager")]  # fmt: skip
    judged = {t.text: t.judge(bench.Results(rows)) for t in suite.targets}
    assert judged["fwd, C = 1024: share of the GEMM rate"]["reached"] is True
    faster = {k: t for k, t in judged.items() if "speed-up" in k}
    assert len(faster) == 6 and {t["measured"] for t in faster.values()} == {3.5}
    assert [t["reached"] for t in faster.values()] == [False, True, True, False, True, True]
    bench_report.print_results(bench.Results(rows), measure.environment(CPU), list(judged.values()))
    shown = capsys.readouterr().out
    assert "yes" in shown and " no" in shown and "…" not in shown


def test_the_gpu_suite_judges_every_row_it_times():
    """Every target finds its rows, and only those: fed with made-up times, each gives a number."""
    suite = SUITES["triton"]()
    assert {c.device for c in suite.cases} == {suite.device} == {"cuda"}
    assert {c.dtype for c in suite.cases} == {"bfloat16"}

    def row(impl: str, case: Case) -> bench.Row:
        milliseconds = {"reference": 9.0, "triton": 2.0}[impl] * (1 + case.batch)
        return bench.Row(case, impl, milliseconds, 1, 1, 1, 70.0, 100.0, 90.0, 100.0, 12, 0.5)

    results = bench.Results([row(i, c) for c in suite.cases for i in ("reference", "triton")])
    judged = [t.judge(results) for t in suite.targets]
    assert all(t["measured"] is not None for t in judged) and len(judged) == 19
    assert {t["measured"] for t in judged if "decode" in t["target"]} == {0.9}
    assert {t["measured"] for t in judged if "speed-up" in t["target"]} == {4.5}


def test_a_suite_names_the_device_it_is_for(capsys):
    assert main(["bench", "--suite", "foundation", "--device", "cuda"]) == 2
    assert "--suite foundation is defined for --device cpu, got cuda" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "--suite", "triton"]) == 2
        assert "torch finds no usable GPU here" in capsys.readouterr().err
