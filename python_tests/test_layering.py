"""Imports go one way (CONTRIBUTING.md, Layout), read off the syntax tree of every file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from source_tree import PACKAGE, ROOT, python_files

# A file imports files of a lower rank, or of its own folder. `__init__` names everything lazily.
RANKS = {
    "types": 0, "_config": 0, "_extension": 0,
    "ops": 1,
    "modules": 2, "testing": 2, "_info": 2,
    "patch": 3,
    "distributed": 4,
    "cli": 5,
    "__main__": 6,
}  # fmt: skip
EVERYWHERE = {"torch", "numpy"}
LAZY_IN_PATCH = {"transformers", "safetensors"}
LAZY_IN_MODULES = {"safetensors", "matplotlib"}  # states in files, pictures
IMPLEMENTATION = re.compile(r"ttt_kernels\.ops\.(\w+)\.(reference|eager|triton|cuda)\w*$")


@dataclass(frozen=True)
class Import:
    target: str
    lazy: bool  # inside a function, or for a type checker only


def imports(source: str, module: str) -> Iterator[Import]:
    """Every import of a file, as absolute names; `from a import b` counts as a.b."""
    package = module if module.endswith("__init__") else module.rpartition(".")[0]
    package = package.removesuffix(".__init__")

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            yield from (Import(f"{base}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Constant) and node.value == "ttt_kernels._C":
            yield Import(node.value, lazy)  # import_module("ttt_kernels._C")
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        checker = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or function or checker)

    yield from visit(ast.parse(source), False)


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def third_party(module: str, found: Import) -> str | None:
    name = found.target.split(".")[0]
    if name in sys.stdlib_module_names | EVERYWHERE | {"ttt_kernels"}:
        return None
    if name == "triton":
        return None if "triton_" in module else "triton belongs in triton_*.py"
    if layer(module) == "cli":
        return None if found.lazy or name not in LAZY_IN_PATCH else f"{name} inside functions only"
    if name in LAZY_IN_PATCH and layer(module) == "patch":
        return None if found.lazy else f"{name} inside functions only"
    if name in LAZY_IN_MODULES and layer(module) == "modules":
        return None if found.lazy else f"{name} inside functions only"
    return f"{name} has no place in {layer(module)}"


def inside(module: str, found: Import) -> str | None:
    """Complaint about an import within the package."""
    target = found.target
    if target.startswith("ttt_kernels._C"):
        return None if layer(module) == "_extension" else "_C only through _extension"
    mine, theirs = layer(module), layer(target)
    if theirs not in RANKS:
        return None  # a name of the package's own __init__, such as __version__
    if mine == "__init__" and not found.lazy:
        return f"the package imports {theirs} eagerly"
    if mine in RANKS and mine != theirs and RANKS[mine] <= RANKS[theirs]:
        return f"{mine} must not import {theirs}"
    return implementations(module, found)


def implementations(module: str, found: Import) -> str | None:
    """`reference`, `eager`, `triton_*`, `cuda*`: private to their op, strangers to each other."""
    target = found.target
    parts = target.split(".")
    matches = (IMPLEMENTATION.match(".".join(parts[:n])) for n in range(4, len(parts) + 1))
    theirs = next(filter(None, matches), None)
    if theirs is None:
        return None
    if layer(module) != "ops":
        allowed = layer(module) in ("testing", "cli")
        return None if allowed else f"{target} is private: import {theirs[1]}.api"
    mine = IMPLEMENTATION.match(module)
    if module.split(".")[2] != theirs[1]:
        return f"{target} is private to {theirs[1]}"
    if mine and mine[2] != theirs[2]:
        return f"{mine[2]} must not import {theirs[2]}"
    if theirs[2] == "triton" and not mine and not found.lazy:
        return "triton_*.py inside functions only"
    return None


def violations(source: str, module: str) -> list[str]:
    found = []
    for item in imports(source, module):
        complaint = third_party(module, item)
        if item.target.startswith("ttt_kernels"):
            complaint = inside(module, item)
        if item.target.split(".")[0] == "python_tests":
            complaint = "the package must not know its tests"
        if complaint:
            found.append(f"{module}: {complaint}")
    return found


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_package_is_layered():
    files = python_files(PACKAGE)
    assert len(files) > 10
    assert not [v for p in files for v in violations(p.read_text(), module_name(p))]


def test_every_part_has_a_rank():
    parts = {layer(module_name(path)) for path in python_files(PACKAGE)} - {"__init__"}
    assert parts <= set(RANKS)


SCAN = "ttt_kernels.ops.scan"
BAD = [
    ("ttt_kernels.types", "from ttt_kernels.ops.scan import api"),
    ("ttt_kernels._config", "import ttt_kernels.types, ttt_kernels.ops"),
    (f"{SCAN}.api", "from ttt_kernels.modules.mlp import FastWeightMLP"),
    (f"{SCAN}.eager", "from ttt_kernels.ops.scan.reference import forward"),
    (f"{SCAN}.eager", "from . import reference"),
    (f"{SCAN}.reference", "from .eager import forward"),
    (f"{SCAN}.api", "from ttt_kernels.ops.target import eager"),
    (f"{SCAN}.api", "def f():\n    from ..target.reference import forward"),
    (f"{SCAN}.eager", "import triton"),
    (f"{SCAN}.registration", "from ttt_kernels.ops.scan import triton_fwd"),
    (f"{SCAN}.api", "def f():\n    import transformers"),
    (f"{SCAN}.api", "from ttt_kernels import _C"),
    (f"{SCAN}.api", "import importlib\nimportlib.import_module('ttt_kernels._C')"),
    ("ttt_kernels.modules.mlp", "from ttt_kernels.ops.scan.eager import forward"),
    ("ttt_kernels.modules.mlp", "def f():\n    from ttt_kernels.patch import model"),
    ("ttt_kernels.modules.mlp", "import ttt_kernels.testing.inputs"),
    ("ttt_kernels.modules.state_io", "import safetensors"),
    ("ttt_kernels.patch.model", "import transformers"),
    ("ttt_kernels.patch.model", "from ttt_kernels.cli import demo"),
    ("ttt_kernels.cli.demo", "from transformers import AutoModel"),
    ("ttt_kernels.testing.inputs", "from python_tests import helpers"),
    ("ttt_kernels.__init__", "from ttt_kernels.patch.config import TTTConfig"),
    ("ttt_kernels.types", "import rich"),
]
GOOD = [
    (f"{SCAN}.api", "from ttt_kernels.ops.scan import reference, eager\nfrom ..  import _checks"),
    (f"{SCAN}.eager_bwd", "from ttt_kernels.ops.scan.eager import Block"),
    (f"{SCAN}.eager", "from ...types import Span"),
    (f"{SCAN}.triton_fwd", "import triton"),
    (f"{SCAN}.registration", "def f():\n    from ttt_kernels.ops.scan import triton_fwd"),
    (f"{SCAN}.eager", "from ttt_kernels.ops.scan.heuristics import super_chunk"),
    ("ttt_kernels.modules.mlp", "from ttt_kernels.ops.scan.api import fast_weight_scan"),
    ("ttt_kernels.patch.model", "def f():\n    import transformers"),
    ("ttt_kernels.patch.model", "if TYPE_CHECKING:\n    import transformers"),
    ("ttt_kernels.cli.demo", "import ttt_kernels\ndef f():\n    import transformers, rich"),
    ("ttt_kernels._extension", "from ttt_kernels import __version__\nX = 'ttt_kernels._C'"),
]


@pytest.mark.parametrize(("module", "source"), BAD)
def test_refuses(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(("module", "source"), GOOD)
def test_accepts(module, source):
    assert not violations(source, module)


def test_import_is_light():
    """In a fresh process: nothing torch itself does not load, and no CUDA context."""
    script = """
        import sys, torch
        before = set(sys.modules)
        import ttt_kernels
        ttt_kernels.fast_weight_scan, ttt_kernels.spectral_step_size
        loaded = {name.split(".")[0] for name in set(sys.modules) - before}
        heavy = loaded & {"triton", "transformers", "safetensors", "rich", "matplotlib", "tqdm"}
        assert not heavy, heavy
        assert not torch.cuda.is_initialized()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
