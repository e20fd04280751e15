"""The files of the project, for the tests that read them."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ttt_kernels"
_NOT_OURS = re.compile(r"\.(?!ci$|gitignore$)|(build|dist|outputs|__pycache__)$|.*\.(egg-info|so)$")


def _git_listing() -> str:
    if shutil.which("git") is None:
        return ""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


@cache
def project_files() -> tuple[Path, ...]:
    """What git tracks or would track; in an unpacked archive, every file outside build folders."""
    found = [ROOT / name for name in _git_listing().split("\0") if name]
    if not found:
        parts = ((path, path.relative_to(ROOT).parts) for path in ROOT.rglob("*"))
        found = [path for path, names in parts if not any(map(_NOT_OURS.match, names))]
    return tuple(sorted(path for path in set(found) if path.is_file()))


def python_files(folder: Path = ROOT) -> list[Path]:
    return [p for p in project_files() if p.suffix == ".py" and p.is_relative_to(folder)]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
