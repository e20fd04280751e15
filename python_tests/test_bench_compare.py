"""`bench --compare`: how far two runs are apart."""

import json
import math
from pathlib import Path

import pytest

from ttt_kernels.cli import bench_compare
from ttt_kernels.cli.bench import Row
from ttt_kernels.cli.bench_case import Case
from ttt_kernels.cli.main import main

CASE = Case("scan", "tiny", d=32, f=96, tokens=80, chunk_size=16)


def write(path, times, ratios=(), case=CASE) -> str:
    """A file with a row for each implementation."""
    records = [{"kind": "environment", "threads": 1}]
    for impl, milliseconds in times.items():
        own = dict(ratios).get(impl, {})
        row = Row(case, impl, milliseconds, 1, 1, 1, 1.0, 1.0, 1.0, 1.0, 0, 0.5, ratios=own)
        records.append(row.as_record())
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def pairs(a: str, b: str) -> dict:
    found = bench_compare.paired(bench_compare.read(Path(a)), bench_compare.read(Path(b)))
    return {(pair.row["impl"], pair.baseline): pair for pair in found}


def test_a_machine_of_another_speed_agrees(tmp_path, capsys):
    a = write(tmp_path / "a", {"reference": 8.0, "eager": 2.0, "plain": 1.0})
    b = write(tmp_path / "b", {"reference": 80.0, "eager": 20.0, "plain": 10.0})
    found = pairs(a, b)
    assert found.keys() == {("eager", "reference"), ("plain", "reference")}  # each ratio once
    assert {pair.difference for pair in found.values()} == {0.0}
    assert main(["bench", "--compare", a, b]) == 0
    assert "2 ratios: apart by 0.00% in the median, 0.00% at worst" in capsys.readouterr().out


def test_the_median_and_the_worst(tmp_path, capsys):
    a = write(tmp_path / "a", {"reference": 8.0, "eager": 2.0, "plain": 1.0, "cuda": 4.0})
    b = write(tmp_path / "b", {"reference": 8.0, "eager": 2.2, "plain": 1.0, "cuda": 3.2, "other": 1.0})
    differences = {impl: pair.difference for (impl, _), pair in pairs(a, b).items()}
    assert differences.keys() == {"eager", "plain", "cuda"}
    assert math.isclose(differences["eager"], 0.1) and math.isclose(differences["cuda"], 0.25)
    assert main(["bench", "--compare", a, b]) == 0
    shown = capsys.readouterr().out
    assert "3 ratios: apart by 10.00% in the median, 25.00% at worst; rows in one file only: 1" in shown
    assert shown.index("cuda") < shown.index("eager")  # the worst first


def test_ratios_of_rounds_come_before_ratios_of_medians(tmp_path):
    times = {"reference": 8.0, "eager": 2.0}
    a = write(tmp_path / "a", times, {"eager": {"reference": 0.3}})
    b = write(tmp_path / "b", times, {"eager": {"reference": 0.36}})
    pair = pairs(a, b)["eager", "reference"]
    assert (pair.first, pair.second) == (0.3, 0.36)


def test_without_the_reference_the_next_baseline_counts(tmp_path):
    times = {"eager": 8.0, "plain": 2.0}
    found = pairs(write(tmp_path / "a", times), write(tmp_path / "b", times))
    assert found.keys() == {("plain", "eager")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("not JSON\n", "must hold the JSON lines that --output writes"),
        ('{"kind": "result", "op": "scan"}\n', "must hold the JSON lines that --output writes"),
        ('{"kind": "environment"}\n', "no row in common"),
    ],
)
def test_files_that_cannot_be_compared(tmp_path, capsys, content, message):
    a = write(tmp_path / "a", {"reference": 8.0, "eager": 2.0})
    if content is not None:
        (tmp_path / "b").write_text(content)
    assert main(["bench", "--compare", a, str(tmp_path / "b")]) == 2
    assert message in capsys.readouterr().err


def test_what_a_comparison_would_ignore_is_refused(tmp_path, capsys):
    a = write(tmp_path / "a", {"reference": 8.0, "eager": 2.0})
    assert main(["bench", "--compare", a, a, "--T", "64", "--repeats", "3"]) == 2
    assert "it cannot be combined with --repeats, --T" in capsys.readouterr().err
