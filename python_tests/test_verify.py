"""`python -m ttt_kernels verify` on stages that end quickly, and on trees without git, with changes, or that
cannot be written to. The real stages run in the command, not here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT, project_files
from test_verify_runner import python

from ttt_kernels.cli import verify_command, verify_report, verify_stages
from ttt_kernels.cli import verify_tree as trees
from ttt_kernels.cli.errors import UserError
from ttt_kernels.cli.main import main
from ttt_kernels.cli.verify_runner import Phase, Stage
from ttt_kernels.cli.verify_stages import Place

MACHINE = {
    "gpus": [], "capabilities": [], "driver": None, "cuda": None, "python": "3.12", "torch": "2.11",
    "triton": "3.6", "cpu": "a processor", "cores": 2,
}  # fmt: skip
HOPPER = {**MACHINE, "gpus": ["NVIDIA H200"], "capabilities": [[9, 0]], "driver": "580.1", "cuda": "13.0"}


# --- the tree -------------------------------------------------------------------------------------
@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A source tree without git, with what a build leaves in one."""
    folder = tmp_path / "somewhere" / "tree"
    files = {
        "setup.py": "", "CMakeLists.txt": "", "csrc/a.cu": "x", "ttt_kernels/__init__.py": "",
        ".ci/run": "", "ttt_kernels/_C.so": "binary", "build/x.o": "binary", ".venv/bin/python": "",
        "outputs/demo/a.png": "", "python_tests/__pycache__/a.pyc": "", trees.LEDGER: LEDGER,
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(trees, "find_tree", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


LEDGER = f"# GPU ledger\n\nText.\n\n{verify_report.NOTHING_YET}\n"
SOURCES = {".ci/run", "CMakeLists.txt", "csrc/a.cu", trees.LEDGER, "setup.py", "ttt_kernels/__init__.py"}


def names(folder: Path) -> set[str]:
    return {path.as_posix() for path in trees.source_files(folder)}


def commit_all(folder: Path) -> None:
    (folder / ".gitignore").write_text("*.so\nbuild/\noutputs/\n__pycache__/\n.venv/\n")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "all")):
        subprocess.run(["git", *command], cwd=folder, check=True)


def test_a_tree_without_git(tree):
    assert names(tree) == SOURCES
    state = trees.version(tree, trees.source_files(tree))
    assert state.commit is None and "no git, sha256" in str(state)
    (tree / trees.LEDGER).write_text("another entry")
    assert trees.version(tree, trees.source_files(tree)) == state
    (tree / "csrc/a.cu").write_text("y")
    assert trees.version(tree, trees.source_files(tree)).sha256 != state.sha256


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_tree_with_git(tree):
    commit_all(tree)
    assert names(tree) == SOURCES | {".gitignore"}
    state = trees.version(tree, trees.source_files(tree))
    assert len(state.commit) == 40 and not state.dirty and "(clean)" in str(state)
    (tree / trees.LEDGER).write_text("another entry")
    assert not trees.version(tree, trees.source_files(tree)).dirty
    (tree / "new.py").touch()
    (tree / "csrc/a.cu").unlink()
    assert names(tree) == (SOURCES | {".gitignore", "new.py"}) - {"csrc/a.cu"}
    assert trees.version(tree, trees.source_files(tree)).dirty


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_tree_inside_the_repository_of_something_else(tree):
    commit_all(tree.parent)
    assert trees.version(tree, trees.source_files(tree)).commit is None


def test_a_copy_is_writable_and_leaves_builds_behind(tree, tmp_path):
    (tree / "setup.py").chmod(0o444)
    trees.copy_tree(tree, trees.source_files(tree), tmp_path / "copy")
    assert names(tmp_path / "copy") == SOURCES and not list((tmp_path / "copy").rglob("*.so"))
    assert (tmp_path / "copy" / "setup.py").stat().st_mode & 0o200


def test_this_tree_is_found():
    assert trees.find_tree() == ROOT
    mine = {path.relative_to(ROOT) for path in project_files()}
    assert set(trees.source_files(ROOT)) == mine


# --- the command ----------------------------------------------------------------------------------
def fake(monkeypatch, machine: dict, *stages: Stage) -> None:
    """These stages instead of the real ones."""
    asked = Stage("machine", (sys.executable, "-c", f"print({json.dumps(machine)!r})"), 30)
    monkeypatch.setattr(verify_stages, "machine_phase", lambda: Phase("machine", [asked], 30, 1))
    monkeypatch.setattr(verify_stages, "phases", lambda place: [Phase("all", stages, 60, 1)])


def only_run(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


SHOWS = (("triton", "values and gradients", "interpreted"),)
GOOD = python("print('t::a PASSED')", "good", tests=True, shows=SHOWS)


def test_without_a_gpu(tree, tmp_path, monkeypatch, capsys):
    fake(monkeypatch, MACHINE, GOOD, python("", "none", why_not="it needs a CUDA GPU"))
    assert main(["verify"]) == 0
    shown, folder = capsys.readouterr().out, only_run(tree / "outputs" / "verify")
    assert re.search(r"passed +good .*1 passed", shown) and re.search(r"skipped +none .*a CUDA GPU", shown)
    assert re.search(r"triton +values and gradients +interpreted +good", shown)
    assert re.search(r"cuda +speed +no ", shown)
    assert [r["kind"] for r in records(folder)] == ["stage", "version", "machine", "stage", "stage"]
    assert (folder / "summary.txt").read_text().strip() == shown.strip()
    assert (tree / trees.LEDGER).read_text() == LEDGER and not list(folder.glob("*.md"))
    assert (folder / "logs" / "good.log").exists()


def test_a_failure_is_the_exit_code(tree, monkeypatch, capsys):
    fake(monkeypatch, MACHINE, python("exit(1)", "bad"), GOOD)
    assert main(["verify"]) == 1
    assert main(["verify", "--stage", "go*"]) == main(["verify", "--stage", "good"]) == 0
    assert main(["verify", "--stage", "absent"]) == 2
    assert "--stage absent names none of: bad, good" in capsys.readouterr().err


def test_a_mistyped_stage_costs_nothing(tree, monkeypatch, capsys):
    fake(monkeypatch, MACHINE, GOOD)
    monkeypatch.setattr(trees, "copy_tree", lambda *args: pytest.fail("it copied"))
    assert main(["verify", "--stage", "good", "absent"]) == 2
    assert "absent" in capsys.readouterr().err and not (tree / "outputs" / "verify").exists()


def test_a_stage_of_other_machines_is_not_left_out_in_silence():
    with pytest.raises(UserError, match="--stage parity/cuda-scan: on this machine there is only good"):
        verify_command.choose([Phase("checks", [GOOD], 9, 1)], ["good", "parity/cuda-scan"])


def test_rows_of_a_benchmark_that_was_ended_count(tmp_path):
    lines = '{"kind": "environment"}\n{"kind": "result", "impl": "cuda"}\n{"kind": "res'
    paths = [tmp_path / "benchmark-scan-x.jsonl.123.partial", tmp_path / "benchmark-scan-y.jsonl"]
    for path in paths:
        path.write_text(lines)
    stages = [r["stage"] for r in verify_report.read_timings(paths)]
    assert stages == ["benchmark/scan-x", "benchmark/scan-y"]


def test_what_a_chosen_stage_needs_is_run_too(tree, monkeypatch, capsys):
    fake(monkeypatch, MACHINE, python("", "first"), python("", "second", needs="first"), GOOD)
    assert main(["verify", "--stage", "second"]) == 0
    assert re.findall(r"^passed +(\w+)", capsys.readouterr().out, re.M) == ["machine", "first", "second"]


def test_a_machine_that_cannot_be_asked(tree, monkeypatch, capsys):
    fake(monkeypatch, MACHINE, GOOD)
    hang = Stage("machine", (sys.executable, "-c", "import time; time.sleep(600)"), 2)
    monkeypatch.setattr(verify_stages, "machine_phase", lambda: Phase("machine", [hang], 30, 1))
    assert main(["verify"]) == 1
    assert re.search(r"timed out +machine", shown := capsys.readouterr().out) and "passed     good" in shown


def on_gpu(monkeypatch) -> None:
    """Stages of a GPU machine that write what the real ones write, into the folder of the run."""
    fake(monkeypatch, HOPPER)

    def phases(place: Place) -> list[Phase]:
        ratio = {"kind": "parity", "op": "scan", "impl": "triton", "dtype": "bfloat16", "device": "cuda",
                 "chunk_size": 64, "error_ratio": 0.5}  # fmt: skip
        row = {"kind": "result", "impl": "triton", "device": "cuda"}
        lines = {"parity-triton.jsonl": ratio, "benchmark-triton.jsonl": row}
        write = "".join(
            f"open({str(place.output / name)!r}, 'w').write({json.dumps(line)!r} + '\\n')\n"
            for name, line in lines.items()
        )
        stages = [python(write, "benchmark/triton"), python("exit(1)", "tests/bad"), GOOD]
        return [Phase("all", stages, 60, 1)]

    monkeypatch.setattr(verify_stages, "phases", phases)


def test_with_a_gpu(tree, monkeypatch, capsys):
    on_gpu(monkeypatch)
    assert main(["verify"]) == 1
    ledger = (tree / trees.LEDGER).read_text()
    assert verify_report.NOTHING_YET not in ledger and ledger.startswith("# GPU ledger\n\nText.\n\n## ")
    for words in ("NVIDIA H200", "no git, sha256", "driver 580.1, CUDA 13.0, torch 2.11, triton 3.6",
                  "passed: machine; benchmark/triton; good (1)", "failed: tests/bad: exit code 1",
                  "triton 0.50 (scan, bfloat16, C = 64, cuda)"):  # fmt: skip
        assert words in ledger, words
    (rows,) = (tree / trees.RESULTS / "nvidia-h200").glob("*.jsonl")
    assert json.loads(rows.read_text())["impl"] == "triton" and str(rows.relative_to(tree)) in ledger
    assert re.search(r"triton +speed +on the GPU +benchmark/triton", capsys.readouterr().out)
    assert main(["verify"]) == 1
    assert (tree / trees.LEDGER).read_text().count("\n## ") == 2 and rows.read_text().count("\n") == 2


def test_part_of_a_run_is_not_in_the_ledger(tree, monkeypatch):
    on_gpu(monkeypatch)
    assert main(["verify", "--stage", "good"]) == 0
    assert (tree / trees.LEDGER).read_text() == LEDGER
    assert (only_run(tree / "outputs" / "verify") / "ledger_entry.md").exists()


def test_a_tree_that_cannot_be_written_to(tree, tmp_path, monkeypatch, capsys):
    """As root every permission is granted, so files stand where folders would have to be."""
    on_gpu(monkeypatch)
    shutil.rmtree(tree / "outputs")
    (tree / "outputs").touch()
    (tree / trees.LEDGER).unlink()
    (tree / trees.LEDGER).mkdir()
    assert main(["verify"]) == 1
    folder = only_run(tmp_path / "ttt-verify")
    assert "NVIDIA H200" in (folder / "ledger_entry.md").read_text()
    assert (folder / "benchmark-triton.jsonl").exists() and str(folder) in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["verify", "--output", str(tmp_path / "file")]) == 2
    assert "--output" in capsys.readouterr().err


def test_the_copy_goes_or_is_kept(tree, monkeypatch, capsys):
    script = "import os; print(os.getcwd(), os.environ['PYTHONPATH'], os.environ.get('TTT_KERNELS_IMPL'))"
    fake(monkeypatch, MACHINE, python(script, "place"))
    for option in ((), ("--keep",)):
        monkeypatch.setenv("PYTHONPATH", "elsewhere")
        monkeypatch.setenv("TTT_KERNELS_IMPL", "eager")
        assert main(["verify", "--output", str(tree / f"out{len(option)}"), *option]) == 0
        log = (only_run(tree / f"out{len(option)}") / "logs" / "place.log").read_text().split()
        assert log[1:] == [f"{log[0]}{os.pathsep}elsewhere", "None"]
        assert Path(log[0]).exists() == bool(option)
    assert log[0] in capsys.readouterr().err
    shutil.rmtree(Path(log[0]).parent)


def test_interruption_reports_what_was_done(tree, monkeypatch, capsys):
    stop = python(f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(600)", "stop")
    fake(monkeypatch, MACHINE, GOOD, stop)
    assert main(["verify"]) == verify_command.INTERRUPTED
    assert re.search(r"passed +good(.|\n)*interrupted +stop", capsys.readouterr().out)
