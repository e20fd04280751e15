"""Builds the programs of csrc/tests: kernels, the emulation and a main function that runs them under every
schedule. A mutant is such a program with one file changed.

    programs = Programs(folder)
    programs.run(programs.build("gemm"), "write", file)
    change = Change("tests/gemm_sm80.cu", "__syncthreads();")
    mutant = programs.mutant("gemm", ["tests/gemm_sm80.cu"], [change])
    programs.run(mutant, "check", file)  # fails, and says why
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from source_tree import ROOT

SOURCES = ROOT / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++")
FLAGS = (
    "-std=c++17 -O1 -ffp-contract=off -fPIC -DTTT_WITH_SM90 "
    "-Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -Wno-unused"
).split()
SANITIZERS = ["-fsanitize=address"]
EMULATION = sorted(path for path in (SOURCES / "emulation").glob("*.cpp") if path.stem != "device")
PROGRAMS = {
    "gemm": sorted((SOURCES / "tests").glob("gemm_*")),
    "scan": [SOURCES / "tests/scan_problem.cpp", *sorted((SOURCES / "kernels/scan").glob("*.cu"))],
}
LIMIT_S = 120  # of a program: the emulation reports what hangs, so that none should need it


@dataclass(frozen=True)
class Change:
    """Replaces `old`, which the file has once or `count` times, by `new`."""

    file: str  # relative to csrc
    old: str
    new: str = "(void)0;"
    count: int = 1

    def apply(self, folder: Path) -> None:
        path = folder / self.file
        text = path.read_text()
        found = text.count(self.old)
        assert found == self.count, f"{self.file} has {self.old!r} {found} times, {self.count} expected"
        path.write_text(text.replace(self.old, self.new))


class Programs:
    """Everything lies in `folder`; objects are compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def run(self, program: Path, mode: str, file: Path) -> subprocess.CompletedProcess:
        """`mode` write: one schedule, the outputs into `file`; check: all of them, the same bits?"""
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        command = [str(program), mode, str(file)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=environment
        )

    def build(self, name: str, *, sanitized: bool = False) -> Path:
        program = self.folder / f"{name}{'_sanitized' * sanitized}"
        if not program.exists():
            self._link(program, self._objects(name, sanitized), sanitized)
        return program

    def mutant(self, name: str, units: list[str], changes: list[Change], *, sanitized: bool = False) -> Path:
        """The program with `changes`, of which `units` (relative to csrc) are compiled anew."""
        folder = self.folder / f"mutant_{len(list(self.folder.glob('mutant_*')))}"
        for part in ("emulation", "include", "kernels", "tests"):
            shutil.copytree(SOURCES / part, folder / part)
        for change in changes:
            change.apply(folder)
        objects = [self._compile(folder / unit, folder, sanitized) for unit in units]
        replaced = {Path(unit).name for unit in units}
        others = self._objects(name, sanitized)
        others = [path for path in others if path.stem.removesuffix("_sanitized") not in replaced]
        self._link(folder / name, objects + others, sanitized)
        return folder / name

    def library(self, name: str, sources: list[Path]) -> Path:
        """A shared library of these sources and the emulation."""
        path = self.folder / name
        objects = [self._object(source, False) for source in [*sources, *EMULATION]]
        _call([COMPILER, "-shared", *map(str, objects), "-o", str(path)])
        return path

    def _objects(self, name: str, sanitized: bool) -> list[Path]:
        sources = [*PROGRAMS[name], SOURCES / "tests/runner.cpp", *EMULATION]
        return [self._object(source, sanitized) for source in sources]

    def _object(self, source: Path, sanitized: bool) -> Path:
        path = self.folder / f"{source.name}{'_sanitized' * sanitized}.o"
        return path if path.exists() else self._compile(source, SOURCES, sanitized)

    def _compile(self, source: Path, root: Path, sanitized: bool) -> Path:
        folder = self.folder if root == SOURCES else root
        path = folder / f"{source.name}{'_sanitized' * sanitized}.o"
        includes = [f"-I{root / 'emulation'}", f"-I{root / 'include'}", f"-I{root}"]
        flags = [*FLAGS, *includes, *(SANITIZERS if sanitized else [])]
        _call([COMPILER, *flags, "-c", "-x", "c++", str(source), "-o", str(path)])
        return path

    def _link(self, program: Path, objects: list[Path], sanitized: bool) -> None:
        _call([COMPILER, *(SANITIZERS if sanitized else []), *map(str, objects), "-o", str(program)])


def _call(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, " ".join(command) + "\n" + result.stderr
