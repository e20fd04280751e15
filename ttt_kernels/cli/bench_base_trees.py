"""The trees that `bench --base` compares, and the process that each of them gets, seen from here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ttt_kernels
from ttt_kernels.cli import bench_worker
from ttt_kernels.cli.bench_case import Implementation
from ttt_kernels.cli.errors import UserError

HERE = Path(ttt_kernels.__file__).resolve().parents[1]


# --- the other tree -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tree:
    """A folder that holds the package. `label` goes behind the "@" of its rows; the current tree has
    none."""

    root: Path
    label: str
    commit: str | None


def current_tree() -> Tree:
    return Tree(HERE, "", None)


@contextmanager
def base_tree(ref: str) -> Iterator[Tree]:
    """The package as a commit has it, exported for a while; or a folder with a tree of its own."""
    if (Path(ref) / "ttt_kernels" / "__init__.py").is_file():
        yield Tree(Path(ref).resolve(), Path(ref).resolve().name, None)
        return
    if shutil.which("git") is None:
        raise UserError(f"--base {ref}: git is not installed, and no folder of this name has a ttt_kernels")
    git(ref, "rev-parse", "--git-dir")
    commit = git(ref, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    with tempfile.TemporaryDirectory() as scratch:
        archive, root = Path(scratch) / "tree.zip", Path(scratch) / "tree"
        git(ref, "archive", "--format=zip", f"--output={archive}", commit, "ttt_kernels")
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(root)
        yield Tree(root, ref, commit)


def git(ref: str, *arguments: str) -> str:
    """What git says of the repository around the package."""
    done = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True)
    if done.returncode:
        unknown = "neither a commit of this repository nor a folder with a ttt_kernels in it"
        raise UserError(f"--base {ref}: {done.stderr.strip() or unknown}")
    return done.stdout.strip()


# --- a worker, seen from here ---------------------------------------------------------------------
class WorkerError(Exception):
    """What went wrong in a worker; `kind` is the type of its exception."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Worker:
    """The process of one tree; a context."""

    def __init__(self, tree: Tree, scratch: Path) -> None:
        self.tree, self.scratch = tree, scratch
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.stop()
        command = [sys.executable, bench_worker.__file__, str(self.tree.root), str(torch.get_num_threads())]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=self.scratch)
        self.answer()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def __enter__(self) -> Worker:
        try:
            self.start()
        except WorkerError as error:
            self.stop()
            raise UserError(f"--base: the package in {self.tree.root} cannot be imported: {error}") from None
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def revive(self) -> None:
        """A new process where this one has died."""
        if self.process.poll() is not None:
            self.start()

    def row_name(self, impl: str) -> str:
        return f"{impl}@{self.tree.label}" if self.tree.label else impl

    def kind_of(self, failure: WorkerError) -> str:
        """An older tree may lack things; the current one may only say that it cannot."""
        fine = self.tree.label or failure.kind == "NotImplementedError"
        return "skipped" if fine else "refused"

    def ask(self, do: str, **request):
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead, and `answer` says so
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError("WorkerDied", f"the process ended with code {self.process.wait()}")
        fields = json.loads(line)
        if "error" in fields:
            raise WorkerError(fields["error"], fields["text"])
        return fields["value"]


class Remote(torch.autograd.Function):
    """An operation that a worker computes, forward and backward, so that parity checks can have it."""

    @staticmethod
    def forward(ctx, worker: Worker, request: dict, options: dict, *leaves: Tensor):
        ctx.save_for_backward(*leaves)
        ctx.call = (worker, request, options)
        results = computed(ctx.call, leaves, None)
        return results[0] if len(results) == 1 else results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        leaves = ctx.saved_tensors
        return None, None, None, *computed(ctx.call, leaves, list(grads))[-len(leaves) :]


def computed(call: tuple, leaves: Sequence[Tensor], grads: list[Tensor] | None) -> tuple[Tensor, ...]:
    worker, request, options = call
    operands, results = worker.scratch / "operands.pt", worker.scratch / "results.pt"
    torch.save({"leaves": list(leaves), "options": options, "grads": grads}, operands)
    worker.ask("run", operands=str(operands), results=str(results), **request)
    return tuple(t.to(leaves[0].device) for t in torch.load(results, weights_only=True))


def remote(worker: Worker, op: str, impl: str, device: str) -> Implementation:
    request = {"op": op, "impl": impl, "device": device}
    return Implementation(lambda *leaves, **options: Remote.apply(worker, request, options, *leaves))
