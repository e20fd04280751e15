"""The JSON lines of `bench --output`: nothing that was measured is lost."""

import json
import os
from pathlib import Path

import pytest

from ttt_kernels.cli import bench, bench_baselines
from ttt_kernels.cli.bench_case import SHAPES
from ttt_kernels.cli.bench_lines import JsonLines
from ttt_kernels.cli.main import main


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def partial_of(path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def test_the_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "folder" / "out.jsonl"
    partial = partial_of(path)
    with JsonLines(path, {"threads": 2}) as lines:
        lines.add([{"kind": "result"}])
        assert read(partial) == [{"kind": "environment", "threads": 2}, {"kind": "result"}]
        assert not path.exists()
        lines.add([])
        lines.add({"kind": kind} for kind in ("skipped", "target"))
    assert [r["kind"] for r in read(path)] == ["environment", "result", "skipped", "target"]
    assert not partial.exists()


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with JsonLines(None, {}) as lines:
        lines.add([{"kind": "result"}])
    assert not list(tmp_path.iterdir())


def test_a_link_stays_one(tmp_path):
    link, path = tmp_path / "link.jsonl", tmp_path / "out.jsonl"
    link.symlink_to(path)
    with JsonLines(link, {}):
        pass
    assert link.is_symlink() and [r["kind"] for r in read(path)] == ["environment"]


def test_only_a_file_is_replaced(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert main(["bench", "--output", str(tmp_path / "pipe")]) == 2
    assert "--output must be a file" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_run_that_ends_early_keeps_its_lines(tmp_path, capsys, error):
    path = tmp_path / "out.jsonl"
    path.write_text("older\n")
    with pytest.raises(error), JsonLines(path, {}) as lines:
        lines.add([{"kind": "result"}])
        raise error
    kept = partial_of(path)
    assert path.read_text() == "older\n" and [r["kind"] for r in read(kept)] == ["environment", "result"]
    assert f"what was measured until then is in {kept}" in capsys.readouterr().err


def test_an_interrupted_benchmark_keeps_its_rows(monkeypatch, tmp_path, capsys):
    lines, calls, measured = tmp_path / "out.jsonl", iter([True, False]), bench.measure_group

    def interrupted(*args):
        if not next(calls):
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setitem(SHAPES, "tiny", (32, 96))
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 1 << 18)
    monkeypatch.setattr(bench_baselines, "why_not_compile", lambda device: "not here")
    monkeypatch.setattr(bench, "measure_group", interrupted)
    grid = "--shape tiny --T 80 --chunk-size 16 32 --mode fwd --repeats 1 --impl eager".split()
    assert main(["bench", *grid, "--output", str(lines)]) == 130
    rows = read(partial_of(lines))
    assert [(r["kind"], r.get("chunk_size")) for r in rows] == [("environment", None), ("result", 32)]
    assert not lines.exists() and ".partial" in capsys.readouterr().err
