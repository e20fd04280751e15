"""What `python -m ttt_kernels verify` runs on a machine, how it measures errors, and what it concludes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from source_tree import ROOT
from test_verify import HOPPER, MACHINE
from test_verify_runner import python

from ttt_kernels._config import IMPLEMENTATIONS
from ttt_kernels.cli import bench_command, verify_parity, verify_report, verify_stages
from ttt_kernels.cli import main as main_command
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.bench_suites import SUITES
from ttt_kernels.cli.verify_runner import Result, Stage
from ttt_kernels.cli.verify_stages import Place
from ttt_kernels.cli.verify_tree import LEDGER


# --- the table of stages --------------------------------------------------------------------------
@pytest.fixture
def tools(tmp_path, monkeypatch) -> str:
    """A folder with all programs that a stage may want."""
    for name in ("nvcc", "cmake", "ninja", "compute-sanitizer"):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return str(tmp_path / "bin")


def stages_of(machine: dict, path: str, tree: Path = ROOT) -> dict[str, Stage]:
    place = Place(tree, Path("out"), {"PATH": path, "CUDA_HOME": "/none"}, machine)
    return {stage.name: stage for phase in verify_stages.phases(place) for stage in phase.stages}


@pytest.mark.parametrize("machine", [MACHINE, HOPPER])
def test_every_implementation_is_verified(machine, tools):
    stages = stages_of(machine, tools)
    how = "on the GPU" if machine is HOPPER else "interpreted"
    for impl in IMPLEMENTATIONS[1:]:
        assert any(name.startswith(f"parity/{impl}") for name in stages)
    for name in {path.stem for path in (ROOT / "python_tests").glob("test_*_triton*.py")}:
        assert ("triton", "values and gradients", how) in stages[f"tests/{name}"].shows
    assert {n for n in stages if n.startswith("sanitizer/")} - {"sanitizer/memcheck-cuda-tests"} == {
        f"sanitizer/{tool}-{impl}" for tool in verify_stages.SANITIZERS for impl in verify_stages.KERNELS
    }
    possible = [stage for stage in stages.values() if stage.name.startswith("sanitizer/")]
    assert all((stage.why_not is None) == (machine is HOPPER) for stage in possible)
    timed = [name for name in stages if name.startswith("benchmark/")]
    assert ("benchmark/cpu" in timed) == (machine is MACHINE) and len(timed) > 3


@pytest.mark.parametrize("machine", [MACHINE, HOPPER])
def test_the_phases_fit_into_the_total(machine):
    place = Place(ROOT, Path("out"), {}, machine)
    phases = [verify_stages.machine_phase(), *verify_stages.phases(place)]
    total = verify_stages.TOTAL_S["gpu" if place.gpu else "cpu"]
    assert sum(phase.reserve for phase in phases) < total <= (540 if place.gpu else 600) - 15
    assert all(phase.reserve <= phase.limit for phase in phases)


def test_every_case_of_the_suites_for_a_gpu_is_timed():
    """Read back by the benchmark's own arguments; a problem with two chunk sizes has both in all modes."""
    parser = main_command.build_parser()
    timed = {
        case
        for options in verify_stages.grids().values()
        for case in bench_command.grid(parser.parse_args(["bench", *map(str, options)]))
    }
    cases = {case for make in SUITES.values() for case in make().cases}
    assert {case for case in cases if case.device == "cuda"} <= timed


def test_only_the_gpus_present_are_built_for(tools):
    def built(*capabilities) -> str:
        machine = {**HOPPER, "gpus": ["x"] * len(capabilities), "capabilities": list(map(list, capabilities))}
        return stages_of(machine, tools)["build"].environment["TTT_KERNELS_CUDA_ARCHS"]

    assert built((9, 0), (9, 0)) == "90a-real"
    assert built((8, 0), (10, 0)) == "80-real;100a-real"
    assert built((8, 9)) == "89-real"
    assert stages_of(MACHINE, tools)["build"].environment["TTT_KERNELS_CUDA_ARCHS"] == "80-real;90a-real"


def test_missing_tools_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_stages, "find_spec", lambda name: None)
    monkeypatch.setattr(Place, "tool", lambda *_: None)
    stages = stages_of(HOPPER, str(tmp_path))
    assert "nvcc" in stages["build"].why_not
    assert "compute-sanitizer" in stages["sanitizer/memcheck-triton"].why_not
    assert "pytest" in stages["tests/test_scan_triton"].why_not
    timed = [stage.why_not for name, stage in stages.items() if name.startswith("benchmark/")]
    assert set(timed) == {"rich is not installed"}


def test_files_are_chosen_by_name_and_text(tmp_path, tools):
    names = ("cli", "cuda_sanitized", "emulation", "golden", "kernels_compile", "ridge", "scan_triton_bwd")
    files = {f"test_{name}.py": "" for name in names}
    files["test_scan_cuda.py"] = "@pytest.mark.sanitize"
    files["test_extension.py"] = "@pytest.mark.gpu"
    files["test_torch_ops.py"] = "x.cuda()"
    (tmp_path / "python_tests").mkdir()
    (tmp_path / "ttt_kernels" / "ops" / "ridge").mkdir(parents=True)
    (tmp_path / "ttt_kernels" / "ops" / "ridge" / "api.py").touch()
    for name, text in files.items():
        (tmp_path / "python_tests" / name).write_text(text)

    def chosen(machine: dict) -> dict[str, set]:
        stages = stages_of(machine, tools, tmp_path)
        tests = {n.removeprefix("tests/test_"): s for n, s in stages.items() if n.startswith("tests/")}
        assert all(stage.tests for stage in tests.values())
        return {name: {claim[::2] for claim in stage.shows} for name, stage in tests.items()}

    library = {("eager", "on the CPU"), ("reference", "on the CPU")}
    assert chosen(MACHINE) == {
        **dict.fromkeys(("scan_cuda", "cuda_sanitized", "emulation"), {("cuda", "emulated")}),
        "scan_triton_bwd": {("triton", "interpreted")}, "ridge": library, "golden": library,
        "kernels_compile": {("triton", "compiled only")},
    }  # fmt: skip
    assert chosen(HOPPER) == {
        "scan_cuda": {("cuda", "on the GPU")}, "scan_triton_bwd": {("triton", "on the GPU")},
        "extension": set(), "torch_ops": set(),
    }  # fmt: skip
    stages = stages_of(HOPPER, tools, tmp_path)
    assert stages["tests/test_scan_cuda"].needs == "build" and not stages["tests/test_torch_ops"].needs
    assert "-m" in stages["tests/test_extension"].command[3:]
    command = stages["sanitizer/memcheck-cuda-tests"].command
    assert command[-3:] == ("-m", "sanitize", "python_tests/test_scan_cuda.py")


# --- parity, as a stage ---------------------------------------------------------------------------
def test_parity_is_measured(tmp_path, capsys):
    output = tmp_path / "parity.jsonl"
    options = ["--op", "scan", "conv_target", "--impl", "eager", "--dtype", "bfloat16"]
    assert verify_parity.main([*options, "--output", str(output)]) == 0
    ratios = verify_report.read_records([output])
    begun, ended = [lines[i::2] for lines in [capsys.readouterr().out.splitlines()] for i in (0, 1)]
    assert [line.split()[:2] for line in ended] == [[name, "PASSED"] for name in begun]
    assert len(ratios) == len(begun) == 6
    assert all(0 < r["error_ratio"] <= 1 and r["impl"] == "eager" for r in ratios)


def test_parity_that_is_red_or_raises_fails(tmp_path, monkeypatch, capsys):
    output = tmp_path / "parity.jsonl"
    answers = iter([1.5, RuntimeError("sticky"), NotImplementedError("later")])

    def parity(*_):
        answer = next(answers, 0.5)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setitem(OPERATIONS, "scan", replace(OPERATIONS["scan"], parity=parity))
    options = ["--op", "scan", "--impl", "eager", "--dtype", "float32", "--output", str(output)]
    assert verify_parity.main(options) == 1
    outcomes = [line.split()[1] for line in capsys.readouterr().out.splitlines()[1::2]]
    assert outcomes == ["FAILED", "FAILED", "SKIPPED", "PASSED"]
    ratios = verify_report.read_records([output])
    assert [r["error_ratio"] for r in ratios] == [1.5, float("inf"), 0.5]
    assert verify_report.ratio_lines(ratios) == ["eager inf (scan, float32, C = 48, cpu)"]


def test_parity_can_only_run_what_it_would_measure(monkeypatch, capsys):
    options = ["--op", "fast_weight_update_", "--impl", "eager", "--dtype", "float32", "--once"]
    assert verify_parity.main(options) == 0
    assert capsys.readouterr().out.count("PASSED") == 2


# --- the report -----------------------------------------------------------------------------------
def verdict(*claims: tuple[str, str]) -> tuple[str, str]:
    """Of stages s0, s1, ... that ended so and show triton's values so."""
    results = [
        Result(python("", f"s{i}", shows=(("triton", "values and gradients", how),)), outcome, "why")
        for i, (outcome, how) in enumerate(claims)
    ]
    rows = verify_report.what_is_verified(results, [])
    assert [row[0] for row in rows] == ["reference"] * 2 + ["eager"] * 2 + ["triton"] * 5 + ["cuda"] * 5
    return next(row[2:] for row in rows if row[:2] == ("triton", "values and gradients"))


def test_the_strongest_evidence_counts_and_a_failure_more():
    weak, strong = ("passed", "compiled only"), ("passed", "on the GPU")
    assert verdict(*[strong] * 5) == ("on the GPU", "s0, s1, s2 and 2 more")
    assert verdict(weak, strong, strong) == ("on the GPU", "s1, s2")
    assert verdict(weak, ("skipped", "on the GPU")) == ("compiled only", "s0")
    assert verdict(strong, ("failed", "on the GPU")) == ("no", "not passed: s1")
    assert verdict(strong, ("timed out", "interpreted")) == ("no", "not passed: s1")
    assert verdict(("skipped", "on the GPU")) == ("no", "why")
    assert verdict() == ("no", "no stage of this run shows it")


def test_the_ledger_names_no_folder_of_the_machine():
    detail = "exit code 1, it said: '/usr/lib/x.h:3: error', see a/b.cu and " + "/ho" + "me/me/c.cu"
    assert verify_report.in_ledger(Result(python("", "build"), "failed", detail)) == (
        "build: exit code 1, it said: '.../x.h:3: error', see a/b.cu and .../c.cu"
    )


def test_half_a_line_is_no_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"b": ')
    assert verify_report.read_records([tmp_path / "a.jsonl"]) == [{"a": 1}]


def test_the_ledger_tells_the_truth():
    """The sentence stays until there is an entry."""
    text = (ROOT / LEDGER).read_text(encoding="utf-8")
    assert (verify_report.NOTHING_YET in text) == ("\n## " not in text)
