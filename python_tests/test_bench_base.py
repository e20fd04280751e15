"""`bench --base`: two trees, each in a process of its own, and the ratio of their paired times."""

import json
import shutil
import subprocess
import textwrap
from dataclasses import replace

import pytest

from ttt_kernels.cli import bench_base
from ttt_kernels.cli import bench_base_trees as trees
from ttt_kernels.cli.bench_case import SHAPES, Case
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.errors import UserError
from ttt_kernels.cli.main import main

TINY = Case("scan", "tiny", d=32, f=96, tokens=80, chunk_size=16)
GRID = "--shape tiny --T 80 --chunk-size 16 --repeats 3".split()

# A worker needs the public functions of a tree and nothing else of it.
STUB = """
    import os
    import torch

    def fast_weight_scan(z, v, w0, *, chunk_size, step_size=1.0, preserve_row_norm=False,
                         return_state=False, impl="auto"):
        if impl == "triton":
            raise NotImplementedError("no Triton here")
        if impl == "reference":
            os._exit(3)
        weight, outputs = w0.expand(z.shape[0], *w0.shape), []
        for keys, values in zip(z.split(chunk_size, 1), v.split(chunk_size, 1)):
            outputs.append(keys @ weight.mT)
            if keys.shape[1] == chunk_size:
                weight = weight + SCALE * step_size * (values.mT @ keys)
        print("noise on the standard output")
        return torch.cat(outputs, 1), weight if return_state else None

    def next_token_target(x, proj):
        raise TypeError("unreachable: the caller passes chunk_size")
"""


def stub(folder, scale: float = 1.0):
    """A folder with such a tree; `scale` is an error of its writes."""
    package = folder / "ttt_kernels"
    package.mkdir(parents=True, exist_ok=True)
    text = textwrap.dedent(STUB).replace("SCALE", str(scale))
    (package / "__init__.py").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", (32, 96))


def git(folder, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits of the stub, the first with wrong writes; the package seems to lie in it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = stub(tmp_path / "repository", 1.5)
    git(folder, "init", "-q")
    for message in ("first", "second"):
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", message)
        stub(folder)
    monkeypatch.setattr(trees, "HERE", folder)
    return folder


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the other tree -------------------------------------------------------------------------------
def test_any_ref_is_exported_as_it_was_committed(repository):
    stub(repository, 9.0)  # what is not committed is in no ref
    for ref, scale in (("HEAD", "1.0"), ("HEAD~1", "1.5"), (git(repository, "rev-parse", "HEAD"), "1.0")):
        with trees.base_tree(ref) as tree:
            text = (tree.root / "ttt_kernels" / "__init__.py").read_text()
            assert f"{scale} * step_size" in text and tree.label == ref
            assert tree.commit == git(repository, "rev-parse", ref)
        assert not tree.root.exists()
    assert git(repository, "worktree", "list").count("\n") == 0


def test_a_folder_is_a_tree_too(tmp_path):
    with trees.base_tree(str(stub(tmp_path / "other"))) as tree:
        assert tree == trees.Tree(tmp_path / "other", "other", None)
    assert tree.root.exists()


def test_what_is_no_tree_is_refused(repository, monkeypatch, tmp_path, capsys):
    assert main(["bench", *GRID, "--base", "nowhere"]) == 2
    assert "--base nowhere: neither a commit of this repository nor a folder" in capsys.readouterr().err
    monkeypatch.setattr(trees, "HERE", tmp_path)
    with pytest.raises(UserError, match="--base HEAD: .*not a git repository"), trees.base_tree("HEAD"):
        pass
    monkeypatch.setattr(trees.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--base HEAD: git is not installed"), trees.base_tree("HEAD"):
        pass


@pytest.mark.parametrize("suite", ["models", "streaming"])
def test_models_are_not_compared(suite, capsys):
    assert main(["bench", "--suite", suite, "--base", "HEAD"]) == 2
    assert f"--suite {suite} fixes the grid: it cannot be combined with --base" in capsys.readouterr().err


# --- the comparison -------------------------------------------------------------------------------
def test_two_trees_in_one_run(tmp_path, capfd):
    """This tree against a folder; what that one lacks is left out, with the reason."""
    lines, picture = tmp_path / "out.jsonl", tmp_path / "out.png"
    asked = ["bench", *GRID, "--op", "scan", "next_token_target", "conv_target"]
    base = stub(tmp_path / "old")
    assert main([*asked, "--base", str(base), "--output", str(lines), "--plot", str(picture)]) == 0
    shown = capfd.readouterr().out
    assert "This tree's time over that of old" in shown and "noise" not in shown
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert picture.read_bytes().startswith(b"\x89PNG")
    records = read(lines)
    assert records[0]["base"] == str(base) and records[0]["base_commit"] is None
    timed = [r for r in records if r["kind"] == "result"]
    modes, sides = ("fwd", "fwd+bwd"), ("eager", "eager@old")
    assert {(r["op"], r["mode"], r["impl"]) for r in timed} == {("scan", m, s) for m in modes for s in sides}
    assert all(0 < r["error_ratio"] <= 1 and r["milliseconds"] > 0 and r["repeats"] == 3 for r in timed)
    ratios = {r["mode"]: r for r in records if r["kind"] == "ratio"}
    assert ratios.keys() == set(modes)
    for r in ratios.values():
        assert (r["impl"], r["base"], r["repeats"], r["chunk_size"]) == ("eager", "old", 3, 16)
        assert 0 < r["ratio_p20"] <= r["ratio"] <= r["ratio_p80"]
    left = {(r["op"], r["impl"]): r["reason"] for r in records if r["kind"] == "skipped"}
    assert left["conv_target", "auto@old"].endswith("has no attribute 'conv_target'")
    assert "chunk_size" in left["next_token_target", "auto@old"]
    assert len(left) == 2


@pytest.mark.parametrize(("scale", "ref", "code"), [(1.0, "HEAD~1", 0), (1.003, "HEAD", 1)])
def test_wrong_results_are_not_timed(repository, tmp_path, scale, ref, code):
    """A wrong base is said to be; a wrong current tree is a failure."""
    stub(repository, scale)
    lines = tmp_path / "out.jsonl"
    asked = ["--mode", "fwd", "--impl", "eager", "--base", ref, "--output", str(lines)]
    assert main(["bench", *GRID, *asked]) == code
    (refused,) = read(lines)[1:]
    wrong = "eager" if code else f"eager@{ref}"
    assert refused["kind"] == "refused" and refused["impl"] == wrong
    assert "parity is red" in refused["reason"]


def test_a_crash_costs_only_its_own_rows(repository, tmp_path):
    lines = tmp_path / "out.jsonl"
    asked = ["--mode", "fwd", "--impl", "reference", "triton", "eager", "--base", "HEAD"]
    assert main(["bench", *GRID, *asked, "--output", str(lines)]) == 1
    found = {r["impl"]: r for r in read(lines)[1:] if r["kind"] != "ratio"}
    kinds = {impl: r["kind"] for impl, r in found.items()}
    assert kinds == {
        "reference": "refused", "reference@HEAD": "skipped", "triton": "skipped",
        "eager": "result", "eager@HEAD": "result",
    }  # fmt: skip
    assert "the process ended with code 3" in found["reference@HEAD"]["reason"]


def test_a_tree_that_cannot_be_imported_is_an_error(tmp_path, capsys):
    (stub(tmp_path) / "ttt_kernels" / "__init__.py").write_text("import absent_module")
    assert main(["bench", *GRID, "--base", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "cannot be imported: ModuleNotFoundError: No module named 'absent_module'" in shown


def test_operations_without_a_choice_are_compared_as_auto():
    """`WITH_IMPL` says which public functions take `impl`."""
    import inspect

    import ttt_kernels as ttt
    from ttt_kernels.cli.bench_worker import NAMES

    for op in OPERATIONS:
        takes = "impl" in inspect.signature(getattr(ttt, NAMES.get(op, op))).parameters
        assert takes == (op in bench_base.WITH_IMPL), op
    with_row = replace(TINY, op="conv_target")
    left = bench_base.not_comparable(with_row, "eager", OPERATIONS["conv_target"])
    assert left.reason == "with --base, conv_target is compared as auto"


def test_the_ratio_is_that_of_the_pairs():
    pair = bench_base.Pair(TINY, "eager", [0.5, 0.5])
    pair.timings[0].seconds += [1.0, 9.0, 4.0]
    pair.timings[1].seconds += [2.0, 9.0, 2.0]
    ratio = pair.ratio("old")
    assert (ratio.ratio, ratio.repeats, ratio.base) == (1.0, 3, "old")
    assert ratio.ratio_p20 == pytest.approx(0.7) and ratio.ratio_p80 == pytest.approx(1.6)
