"""The source tree: where it is, what belongs to it, which version it is, and a copy of it."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ttt_kernels
from ttt_kernels.cli.errors import UserError

MARKS = ("CMakeLists.txt", "setup.py", "csrc", "python_tests", "ttt_kernels")
LEDGER = "python_tests/gpu_ledger.md"
RESULTS = "benchmarks/results"
# Dot files apart from those of the project, build products, what the demo and this command write.
_NOT_SOURCE = re.compile(r"\.(?!ci$|gitignore$)|(build|dist|outputs|__pycache__)$|.*\.(egg-info|so)$")


@dataclass(frozen=True)
class Version:
    """`commit` is None without git; `sha256` is that of the names and contents of all files."""

    commit: str | None
    dirty: bool
    sha256: str

    @property
    def short(self) -> str:
        return self.commit[:7] if self.commit else f"sha{self.sha256[:7]}"

    def __str__(self) -> str:
        if self.commit is None:
            return f"no git, sha256 {self.sha256[:16]}"
        return f"{self.commit[:7]} ({'dirty' if self.dirty else 'clean'}), sha256 {self.sha256[:16]}"


def find_tree() -> Path:
    """The folder this package is in, or else the current one, where that is a source tree."""
    for folder in (Path(ttt_kernels.__file__).resolve().parents[1], Path.cwd()):
        if all((folder / name).exists() for name in MARKS):
            return folder
    raise UserError(
        "verify builds and tests the source tree: run it in one (a folder with "
        f"{', '.join(MARKS)}), git or not"
    )


def git(tree: Path, *arguments: str) -> str | None:
    """What git says of the repository whose root is `tree`; None without one, or without git."""
    if not (tree / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-c", "safe.directory=*", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def source_files(tree: Path) -> list[Path]:
    """What git tracks or would track; without git every file but build products. Relative, sorted."""
    listing = git(tree, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    if listing is not None:
        names = {Path(name) for name in listing.split("\0") if name}
    else:
        names = {path.relative_to(tree) for path in tree.rglob("*")}
        names = {name for name in names if not any(map(_NOT_SOURCE.match, name.parts))}
    return sorted(name for name in names if (tree / name).is_file())


def version(tree: Path, files: Iterable[Path]) -> Version:
    """Of a tree; what earlier runs of this command wrote does not make it dirty."""
    digest = hashlib.sha256()
    for name in files:
        if name.as_posix() != LEDGER and not name.is_relative_to(RESULTS):
            content = hashlib.sha256((tree / name).read_bytes()).hexdigest()
            digest.update(f"{name.as_posix()}\0{content}\n".encode())
    commit = git(tree, "rev-parse", "HEAD")
    changes = git(tree, "status", "--porcelain", "--", ".", f":!{LEDGER}", f":!{RESULTS}")
    return Version(commit.strip() if commit else None, bool(changes), digest.hexdigest())


def copy_tree(tree: Path, files: Iterable[Path], target: Path) -> None:
    """Contents alone: the copy is writable whatever the tree is."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tree / name, target / name)


def writable(folder: Path) -> bool:
    """Whether files can be made there; the folder is made if it can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
