"""What a cubin holds, whoever compiled it: resource usage and machine code, through the disassembler that
Triton's package carries, or the one on PATH. Triton itself is not imported."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Code:
    """Machine code: opcodes in order, and (first, last) of every stretch that a branch goes back over."""

    opcodes: list[str]
    loops: list[tuple[int, int]]

    @property
    def wgmma_waits(self) -> int:
        """Warp-group products of sm_90 after which a wait comes before the next one."""
        is_wait = [op.startswith("WARPGROUP.DEPBAR") for op in self.opcodes
                   if op.startswith(("HGMMA", "WARPGROUP.DEPBAR"))]  # fmt: skip
        return sum(wait and not before for before, wait in zip(is_wait, is_wait[1:], strict=False))

    def multiplying_loops(self) -> list[list[str]]:
        """The innermost loops that hold matrix instructions: of each the shortest stretch that it lies in. (A
        branch back from code that was moved out of a loop goes over a long one.)"""
        products = [i for i, op in enumerate(self.opcodes) if "MMA" in op]
        around = [[(a, b) for a, b in self.loops if a <= i <= b] for i in products]
        inner = {min(loops, key=lambda loop: loop[1] - loop[0]) for loops in around if loops}
        return [self.opcodes[a : b + 1] for a, b in sorted(inner)]


def parse_code(text: str) -> Code:
    """What nvdisasm prints: lines such as `.L_x_2:` and `/*0a40*/   @!P0 LDG.E.128 R4, [R2.64] ;`."""
    opcodes, labels, loops, last_exit = [], {}, [], -1
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)(.*)", line):
            predicate, opcode, rest = found.groups()
            target = re.search(r"`\((\.L_\w+)\)", rest)
            # Behind an EXIT lies what was moved out of the way: a branch from there back is no loop.
            if target and labels.get(target[1], -1) > last_exit:
                loops.append((labels[target[1]], len(opcodes)))
            if opcode == "EXIT" and not predicate:
                last_exit = len(opcodes)
            opcodes.append(opcode)
    return Code(opcodes, loops)


def disassemble(cubin: bytes) -> tuple[dict[str, int], Code]:
    """Resource usage (REG, STACK, SHARED, ...) and the machine code of a cubin's only kernel."""
    (kernel,) = disassemble_all(cubin).values()
    return kernel


def disassemble_all(cubin: bytes) -> dict[str, tuple[dict[str, int], Code]]:
    """The same of every kernel, by its mangled name. THREADS: of a block, where the source bounds them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        text = run_tool("nvdisasm", file.name)
    parts = re.split(r"^\s*\.section\s+([^\s,]+).*$", text, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    kernels = {}
    for name, line in re.findall(r"Function (\S+):\s*\n(.*)", usage):
        numbers = {resource: int(n) for resource, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        info = sections.get(f".nv.info.{name}", "")
        if threads := re.search(r"EIATTR_MAX_THREADS.*?\.word\s+(\w+)", info, re.S):
            numbers["THREADS"] = int(threads[1], 0)
        kernels[name] = numbers, parse_code(sections.get(f".text.{name}", ""))
    if any("REG" not in numbers or not code.opcodes for numbers, code in kernels.values()):
        raise RuntimeError("the disassembly of a cubin was not understood: " + (usage + text)[:200])
    return kernels


def run_tool(name: str, *arguments: str, folder: Path | None = None) -> str:
    """What `cuobjdump` or `nvdisasm` prints, run in `folder`.

    Raises:
        FileNotFoundError: neither the toolkit on PATH nor Triton's package has it.
    """
    command = [find_tool(name), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def find_tool(name: str) -> str:
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton else None
    found = str(bundled) if bundled and bundled.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in a triton package nor on PATH")
    return found


def bytes_by_width(opcodes: Iterable[str], names: tuple[str, ...]) -> Counter[int]:
    """Bytes a thread moves by the instructions of these names, by width of the instruction."""
    moved: Counter[int] = Counter()
    for opcode in opcodes:
        name, *modifiers = opcode.split(".")
        if name in names:
            width = next((w for m, w in _WIDTHS.items() if m in modifiers), 4)
            moved[width] += width
    return moved


_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
