"""The report: what is read from JSON lines, what stands beside what, and that the document is up to date."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from ttt_kernels.cli import bench, bench_base, measure, report_pictures, report_predictions, report_tables
from ttt_kernels.cli.bench_case import Case
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.errors import UserError
from ttt_kernels.cli.main import main
from ttt_kernels.cli.report_command import filled
from ttt_kernels.cli.report_records import Entry, newest, read, speed_up
from ttt_kernels.testing.kernel_survey import Compiled
from ttt_kernels.testing.roofline import MACHINES, LibraryCall

ROOT = Path(__file__).parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
H200 = MACHINES["H200"]
CASE = Case("scan", "small", 64, 128, tokens=512, chunk_size=64, dtype="bfloat16", device="cuda")


def environment(device: str = H200.device, date: str = "2026-01-01") -> dict:
    return {"kind": "environment", "device": device, "threads": 2, "torch": "2.0", "load_before": 0.1,
            "date": date}  # fmt: skip


def timed(kind: str, impl: str, milliseconds: float, case: Case = CASE, **more) -> dict:
    rates = {"gflops": 90.0, "gemm_gflops": 100.0, "gemm_share": 0.9, "gbytes": 3.0, "copy_gbytes": 10.0}
    own = {"milliseconds_p20": milliseconds, "milliseconds_p80": milliseconds}
    if kind == "prediction":
        own = {"largest": {"name": "torch.mm", "share": 1.0}, "launches": 3}
    return {"kind": kind, **asdict(case), "impl": impl, "milliseconds": milliseconds, **own, **rates,
            "extra_bytes": 4096, "extra_weights": 0.5, **more}  # fmt: skip


def left(kind: str, impl: str, reason: str = "why") -> dict:
    return {"kind": kind, **asdict(CASE), "impl": impl, "reason": reason}


@pytest.fixture
def write(tmp_path):
    def lines(name: str, *records: dict) -> Path:
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return tmp_path / "results"

    return lines


def rows(table: str) -> list[list[str]]:
    lines = (line.strip("|").split("|") for line in table.splitlines() if line[:2] == "| ")
    return [[cell.strip() for cell in line] for line in lines]


def column(table: str, name: str) -> list[str]:
    head, *body = rows(table)
    return [row[head.index(name)] for row in body]


# --- the committed document ---------------------------------------------------------------------------
def test_the_document_is_what_the_command_writes():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert filled(text, newest(read(RESULTS)), "docs/benchmarks.md") == text, "python -m ttt_kernels report"


def test_every_field_of_the_lines_is_documented():
    """Those of all committed lines, and of what none is committed of."""
    lines = [line for path in RESULTS.rglob("*.jsonl") for line in path.read_text("utf-8").splitlines()]
    records = [json.loads(line) for line in lines]
    row = bench.Row(CASE, "eager", 1, 1, 1, 7, 1, 1, 1, 1, 4, 0.5, ratios=dict.fromkeys(bench.BASELINES, 1))
    records += [row.as_record(), bench.Left(CASE, "eager", "skipped", "why").as_record()]
    records += [bench_base.Ratio(CASE, "eager", "old", 1, 1, 1, 7).as_record()]
    records += [measure.environment(torch.device("cpu"))]
    section = DOCUMENT.read_text("utf-8").split("## Fields of the JSON lines")[1].split("\n## ")[0]
    documented = set(re.findall(r"`(\w+)`", section))
    written = set().union(*records, *(r["largest"] for r in records if "largest" in r))
    assert written <= documented


def test_the_predictions_are_those_of_the_suites_and_machines():
    """A changed suite or machine needs `python -m ttt_kernels report --predict`."""
    wanted = {(row.case, row.impl) for row in report_predictions.rows(report_predictions.cases())}
    for name, machine in MACHINES.items():
        path = RESULTS / report_predictions.FOLDER / f"{name.lower()}.jsonl"
        first, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        assert first["machine"] == asdict(machine)
        found = {(Case(**{k: line[k] for k in asdict(CASE)}), line["impl"]) for line in lines}
        assert found <= wanted and {impl for _, impl in wanted - found} <= {"reference"}
        assert all(line["extra_bytes"] < machine.memory_bytes for line in lines)
        assert all(line["milliseconds"] >= line["roof_milliseconds"] > 0 for line in lines)


# --- what is read ---------------------------------------------------------------------------------------
def test_a_measurement_stands_beside_its_prediction(write):
    guesses = [timed("prediction", "triton", 2.0), timed("prediction", "eager", 5.0)]
    write("predicted/a.jsonl", environment(), *guesses)
    write("nvidia-h200/a.jsonl", environment(), timed("result", "triton", 3.0))
    other = environment("NVIDIA H100 80GB HBM3")
    folder = write("predicted/b.jsonl", other, timed("prediction", "triton", 4.0))
    entries = newest(read(folder))
    table = report_tables.predicted(entries)
    assert column(table, "H200 SXM: predicted ms") == ["5", "2"]  # eager, then triton
    assert column(table, "H200 SXM: measured ms") == ["", "3"]
    assert column(table, "H200 SXM: measured / predicted") == ["", "1.50"]
    assert column(table, "H100 SXM: predicted ms") == ["", "4"]
    assert "H100 SXM: measured ms" not in table  # nothing was
    measured = report_tables.measured(entries)
    assert column(measured, "ms") == ["3"] and "### H200 SXM" in measured  # and no prediction among them


@pytest.mark.parametrize("device", ["NVIDIA H200 NVL", "NVIDIA H200 MIG 1g.18gb", "NVIDIA H100 PCIe"])
def test_another_machine_is_not_set_beside_a_prediction(write, device):
    write("predicted/a.jsonl", environment(), timed("prediction", "triton", 2.0))
    folder = write("other/a.jsonl", environment(device), timed("result", "triton", 3.0))
    entries = newest(read(folder))
    assert "measured ms" not in report_tables.predicted(entries)
    assert f"### {device}, 2 threads" in report_tables.measured(entries)


def test_another_row_is_not_set_beside_a_prediction(write):
    write("predicted/a.jsonl", environment(), timed("prediction", "triton", 2.0))
    others = [replace(CASE, **{k: v}) for k, v in (("tokens", 99), ("mode", "fwd+bwd"), ("batch", 2))]
    folder = write("gpu/a.jsonl", environment(), *(timed("result", "triton", 3.0, case) for case in others))
    assert "measured ms" not in report_tables.predicted(newest(read(folder)))


def test_the_newest_result_counts(write):
    """The later date, whatever the file is called; then the later line."""
    lines = [timed("result", "eager", milliseconds) for milliseconds in (1.0, 2.0)]
    write("a/a.jsonl", environment(date="2026-03-01"), *lines)
    folder = write("a/b.jsonl", environment(date="2026-02-01"), timed("result", "eager", 3.0))
    assert [e["milliseconds"] for e in newest(read(folder))] == [2.0]


def test_lines_without_a_newer_field_are_of_its_default(write):
    old = timed("result", "eager", 1.0)
    del old["preserve_row_norm"], old["batch"]
    folder = write("a/a.jsonl", environment(), old, timed("result", "eager", 2.0))
    assert [e["milliseconds"] for e in newest(read(folder))] == [2.0]


def test_a_refused_row_has_no_time(write):
    red = left("refused", "triton", "parity is red")
    write("predicted/a.jsonl", environment(), timed("prediction", "triton", 2.0))
    folder = write("gpu/a.jsonl", environment(), timed("result", "triton", 1.0), red)
    entries = newest(read(folder))
    assert column(report_tables.measured(entries), "ms") == ["refused: parity is red"]
    table = report_tables.predicted(entries)
    assert column(table, "H200 SXM: measured ms") == ["refused: parity is red"]
    assert "measured / predicted" not in table
    write("gpu/b.jsonl", environment(date="2026-05-05"), timed("result", "triton", 4.0))
    assert column(report_tables.measured(newest(read(folder))), "ms") == ["4"]


def test_a_skipped_row_keeps_its_older_time(write):
    folder = write("gpu/a.jsonl", environment(), timed("result", "triton", 1.0), left("skipped", "triton"))
    assert [e.kind for e in newest(read(folder))] == ["result"]
    folder = write("gpu/a.jsonl", environment(), left("skipped", "triton", "no memory"))
    shown = report_tables.measured(newest(read(folder)))
    assert "Not timed: scan, model small" in shown and "impl triton: no memory." in shown


def model_row(**more) -> dict:
    sides = {name: {"plain": 2.0 * k, "patched": 3.0 * k} for k, name in enumerate(
        ("milliseconds", "milliseconds_p20", "milliseconds_p80", "tokens_per_second", "peak_bytes"), 1)}
    about = {"suite": "models", "op": "model", "shape": "qwen3-4b", "layers": 6, "of_layers": 36,
             "weights": "random", "dtype": "float32", "patched": [0, 6]}  # fmt: skip
    return {"kind": "result", **about, "call": "decode", "batch": 1, "tokens": 512, **sides, "ratio": 1.25,
            "gemm_share": None, "state_bytes": 2**20, **more}  # fmt: skip


def test_a_model_is_a_row_for_each_side(write):
    folder = write("cpu/a.jsonl", environment("Some CPU"), model_row())
    table = report_tables.measured(newest(read(folder)))
    assert column(table, "impl") == ["plain", "patched"] and column(table, "tokens/s") == ["8", "12"]
    assert column(table, "faster") == ["1.00", "0.80"]  # by the median of the pairs
    shared = "layers 6 of 36, random, dtype float32, B 1, T 512, call decode"
    assert f"**model**, model qwen3-4b, {shared}\n" in table


def test_a_refused_model_has_no_times(write):
    red = {"kind": "refused", "suite": "models", "op": "model", "shape": "qwen3-4b", "reason": "wrong writes"}
    folder = write("cpu/a.jsonl", environment("Some CPU"), model_row(), model_row(shape="other"), red)
    kinds = {(e["shape"], e.kind) for e in newest(read(folder))}
    assert kinds == {("qwen3-4b", "refused"), ("other", "result")}
    write("cpu/b.jsonl", environment("Some CPU", "2026-07-01"), model_row())
    assert {e.kind for e in newest(read(folder))} == {"result"}


def test_the_speed_up_is_over_the_same_problem(write):
    twice = replace(CASE, tokens=1024)
    folder = write(
        "a/a.jsonl", environment(), timed("result", "reference", 8.0), timed("result", "eager", 2.0),
        timed("result", "eager", 1.0, twice), timed("prediction", "reference", 100.0),
        timed("result", "triton", 1.0, ratio_to_reference=0.1),
    )  # fmt: skip
    entries = newest(read(folder))
    found = {(e["impl"], e["tokens"]): speed_up(e, entries) for e in entries if not e.predicted}
    assert found == {
        ("reference", 512): 1.0, ("eager", 512): 4.0, ("eager", 1024): None,
        ("triton", 512): pytest.approx(10.0),
    }  # fmt: skip


def test_rows_of_bench_are_understood():
    """As it writes them today, not as this file imagines them."""
    op, lines = OPERATIONS["scan"], []
    for impl, seconds in (("reference", 9.0), ("eager", 2.0), ("plain", 1.0)):
        candidate, timing = bench.Candidate(CASE, impl, tuple), measure.Timing([seconds])
        ratios = {"reference": seconds / 9.0}
        row = bench.row_of(candidate, op.of(impl), timing, (100.0, 10.0), 4096, 0.5, ratios)
        lines.append(row.as_record())
    where = measure.environment(torch.device("cpu"))
    entries = newest([Entry(line, where) for line in lines])
    table = report_tables.measured(entries)
    assert column(table, "impl") == ["reference", "plain", "eager"]
    assert column(table, "faster") == ["1.00", "9.00", "4.50"]
    assert all(column(table, name)[-1] for name in ("ms", "p20-p80", "of GEMM", "error"))
    assert report_pictures.PICTURES[0].panels(entries)  # the roofline has FLOPs and bytes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", 'line 1: must be a JSON object with a "kind"'),
        ("[1]", 'line 1: must be a JSON object with a "kind"'),
        ('{"impl": "eager"}', 'line 1: must be a JSON object with a "kind"'),
        ('{"kind": "result"}', 'line 1: a "result" before any "environment"'),
    ],
)
def test_bad_lines_are_refused(tmp_path, text, words):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UserError, match="bad.jsonl, " + words):
        read(tmp_path)


# --- predictions ------------------------------------------------------------------------------------------
def predicted_rows(extra_bytes: int) -> list[dict]:
    row = next(r for r in report_predictions.rows([CASE]) if r.impl == "plain")
    calls = (LibraryCall("torch.mm", 1e12, 1e6), LibraryCall("torch.copy_", 0.0, 1e6))
    compiled = [Compiled(case, 90, (), calls, extra_bytes) for case in row.launches]
    return report_predictions.records([row], compiled, H200)


def test_a_prediction_is_a_row_of_bench():
    where, line = predicted_rows(4096)
    assert where["device"] == H200.device
    assert where["machine"]["sources"]["l2_bandwidth"].startswith("assumed")
    assert {k: line[k] for k in asdict(CASE)} == asdict(CASE) and line["kind"] == "prediction"
    assert line["milliseconds"] == pytest.approx(1e15 / H200.flops, rel=0.01)
    assert line["gflops"] == pytest.approx(2 * 64 * 128 * 512 / line["milliseconds"] / 1e6, rel=1e-4)
    assert line["largest"] == {"name": "torch.mm", "share": pytest.approx(0.998, abs=1e-3)}


def test_what_does_not_fit_is_left_out():
    assert len(predicted_rows(H200.memory_bytes)) == 1


# --- the command ------------------------------------------------------------------------------------------
PARTS = ("pictures", "measured", "predicted", "machines")
MARKS = "\n".join(f"<!-- report: {name} -->\n<!-- report: end of {name} -->" for name in PARTS)


def everything(write) -> Path:
    """Two machines, chunk sizes and lengths, measured and predicted."""
    for device, folder in ((H200.device, "gpu"), ("Some CPU", "cpu")):
        cases = [CASE, replace(CASE, chunk_size=256), replace(CASE, tokens=1024)]
        times = (("reference", 9.0), ("new", 3.0))
        lines = [timed("result", impl, milliseconds, c) for c in cases for impl, milliseconds in times]
        results = write(f"{folder}/a.jsonl", environment(device), *lines)
    guesses = [timed("prediction", impl, 2.0, c) for c in cases for impl in ("reference", "triton")]
    write("predicted/a.jsonl", environment(), *guesses)
    return results


def test_the_command_writes_tables_and_pictures(write, tmp_path, capsys):
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{MARKS}\nafter\n")
    folder = everything(write)
    assert main(["report", "--results", str(folder), "--document", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "### Some CPU, 2 threads" in text
    for picture in report_pictures.PICTURES:
        assert (tmp_path / "images" / picture.file).read_bytes().startswith(b"\x89PNG")
        assert f"](images/{picture.file})" in text
    assert filled(text, newest(read(folder)), "doc.md") == text  # again, into its own output


def test_a_picture_without_rows_is_not_drawn(write, tmp_path, capsys):
    document, folder = tmp_path / "doc.md", write("cpu/a.jsonl", environment("Some CPU"))
    document.write_text(MARKS)
    stale = tmp_path / "images" / "bench-time.png"
    stale.parent.mkdir()
    stale.write_bytes(b"")
    assert main(["report", "--results", str(folder), "--document", str(document)]) == 0
    wanted = "Time of the scan against the chunk size: no picture yet, it needs a scan at two chunk sizes."
    assert wanted in document.read_text() and "no picture yet" in capsys.readouterr().out
    assert not list(tmp_path.glob("images/*"))
    assert "Nothing has been measured yet." in document.read_text()


def test_measured_and_predicted_share_a_panel(write):
    panels = report_pictures.TIME.panels(newest(read(everything(write))))
    titles = [report_pictures.heading(panel) for panel in panels]
    assert [t.splitlines()[0] for t in titles] == [
        "MEASURED: Some CPU, 2 threads", "MEASURED AND PREDICTED: H200 SXM",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--results": "nowhere"}, "--results must name a folder of JSON lines"),
        ({"--document": "nowhere.md"}, "--document must name an existing document"),
        ({}, "must hold the lines <!-- report: pictures -->"),
    ],
)
def test_bad_arguments(tmp_path, capsys, change, words):
    document = tmp_path / "doc.md"
    document.write_text("no marks")
    given = {"--results": str(tmp_path), "--document": str(document), **change}
    assert main(["report", *(x for pair in given.items() for x in pair)]) == 2
    assert words in capsys.readouterr().err and document.read_text() == "no marks"
