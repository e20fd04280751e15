"""House rules, held by a test. A check is a function from a source text to its complaints, so that
each is also shown a text it must refuse."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial

import pytest
from source_tree import PACKAGE, ROOT, functions, project_files, python_files, relative

DOCUMENTS = [p for p in project_files() if p.suffix == ".md" and "golden" not in p.parts]
# Implementations of an op are private whatever their names; `api.py` is what the limit is about.
PRIVATE_FILES = re.compile(r"ops/\w+/(reference|eager|triton|cuda|registration)\w*\.py$")

KERNEL_FILES = re.compile(r"ttt_kernels/ops/\w+/triton_\w+\.py$")


# --- checks ---------------------------------------------------------------------------------------
def too_long(source: str, limit: int) -> list[str]:
    count = source.count("\n")
    return [f"{count} lines, at most {limit}"] if count > limit else []


def long_functions(source: str, limit: int = 80, device_limit: int = 150) -> list[str]:
    """Without the docstring, which is meant to be complete. Device code is what Triton compiles."""
    found = []
    for function in functions(ast.parse(source)):
        on_device = any(ast.unparse(d).startswith("triton.jit") for d in function.decorator_list)
        limit_here = device_limit if on_device else limit
        first = function.body[0]
        text = ast.get_docstring(function, clean=False)
        docstring = 0 if text is None else first.end_lineno - first.lineno + 1
        size = function.end_lineno - function.lineno + 1 - docstring
        if size > limit_here:
            found.append(f"{function.name} has {size} lines, at most {limit_here}")
    return found


def many_parameters(source: str, limit: int = 10) -> list[str]:
    found = []
    for function in functions(ast.parse(source)):
        a = function.args
        names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls", "ctx")])
        if count > limit and not function.name.startswith("_"):
            found.append(f"{function.name} has {count} parameters, at most {limit}")
    return found


def environment_reads(source: str) -> list[str]:
    names = {"environ", "environb", "getenv"}
    found = []
    for node in ast.walk(ast.parse(source)):
        attribute = isinstance(node, ast.Attribute) and node.attr in names
        imported = isinstance(node, ast.ImportFrom) and node.module == "os"
        if attribute or (imported and names & {alias.name for alias in node.names}):
            found.append(f"line {node.lineno}: the environment is read in _config.py only")
    return found


def prints(source: str) -> list[str]:
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    bad = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
    return [f"line {n.lineno}: print outside the command line" for n in bad]


def _is_code(text: str) -> bool:
    """Statements that nobody writes as prose or as a formula."""
    try:
        body = ast.parse(textwrap.dedent(text)).body
    except (SyntaxError, ValueError):
        return False
    blocks = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If,
              ast.With, ast.Try)  # fmt: skip
    for node in body:
        value = getattr(node, "value", None)
        plain = isinstance(node, (ast.Expr, ast.Assign, ast.Return))
        if isinstance(node, blocks) or (plain and isinstance(value, ast.Call)):
            return True
    return False


def commented_out_code(source: str) -> list[str]:
    found, block, start = [], [], 0
    for number, line in enumerate([*source.splitlines(), ""], 1):
        match = re.match(r"\s*#(?!!)( ?.*)$", line)
        if match:
            start = start if block else number
            block.append(match[1].removeprefix(" "))
            continue
        if block and (_is_code("\n".join(block)) or any(map(_is_code, block))):
            found.append(f"line {start}: commented-out code")
        block = []
    return found


def commented_out_cpp(source: str) -> list[str]:
    lines = enumerate(source.splitlines(), 1)
    code = r"\s*//.*([)\]];|=.*;|return\b.*;|\{)\s*$"  # prose may end with a semicolon
    return [f"line {n}: commented-out code" for n, s in lines if re.match(code, s)]


def _without_comments(source: str) -> str:
    """C++ with the comments and strings emptied; lines stay where they are."""
    literal = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"'
    return re.sub(literal, lambda m: "\n" * m[0].count("\n"), source, flags=re.S)


def long_cpp_functions(source: str, limit: int = 150) -> list[str]:
    """From the brace that opens a body to the one that closes it."""
    text, found, opened = _without_comments(source), [], []
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            head = re.split(r"[;{}]", text[: brace.start()])[-1].strip()
            opened.append((brace.start(), head))
        elif opened:
            start, head = opened.pop()
            size = text.count("\n", start, brace.end()) + 1
            if size > limit and ")" in head and not re.match(r"(namespace|class|struct|enum|extern)\b", head):
                found.append(f"{head.splitlines()[-1]} has {size} lines, at most {limit}")
    return found


# What a file of csrc may not hold, which files that is said of, and why.
CPP_RULES = (
    (r"\basm\b", r"csrc/(?!include/ttt/primitives/|emulation/)", "PTX is in include/ttt/primitives only"),
    (r"<<<", r"csrc/(?!kernels/device/)", "kernels are launched by ttt::launch"),
    (r"\b__shared__\b", r"csrc/(?!include/ttt/primitives/platform)", "shared memory is ttt::shared_storage"),
    (r"\batomic[A-Z]\w*\s*\(", r"csrc/(include|kernels)/", "sums are made in an order of their own"),
    (r"#include.*\b(torch|ATen|c10)/", r"csrc/", "csrc knows no torch"),
    (r"#include.*(pybind11|Python\.h)", r"csrc/(include|kernels)/", "only the bindings know Python"),
    (r"#include.*(cuda|\.cuh|host\.h)", r"csrc/(bindings/|include/ttt/(?!host)\w+\.h)", "plain C++ only"),
)


def cpp_rules(source: str, name: str) -> list[str]:
    # Without comments, but with the names of what is included.
    lines = re.sub(r"//[^\n]*", "", source).splitlines()
    rules = [(pattern, why) for pattern, files, why in CPP_RULES if re.match(files, name)]
    return [f"line {n}: {why}" for n, s in enumerate(lines, 1) for p, why in rules if re.search(p, s)]


MACHINE = re.compile(
    r"(?<![\w.$}~-])/(?:opt|root|home|work|mnt|srv|tmp|Users)/"  # a folder of somebody's machine
    r"|pypi\.org|python[h]osted|npm[j]s|debian\.org|pytorch\.org/whl|\.py[e]nv"  # of a registry
    r"|--(?:extra-)?index-url|--find-[l]inks"
)


def machine_traces(source: str) -> list[str]:
    lines = enumerate(source.splitlines(), 1)
    return [f"line {n}: {m[0]!r}" for n, s in lines for m in [MACHINE.search(s)] if m]


def missing_paths(text: str) -> list[str]:
    """Paths of this project named in a document: in backticks, in links or after `python`. A bare
    file name stands for any file called so."""
    quoted = re.findall(r"`([^`\n]+)`", text) + re.findall(r"\]\(([^)#\s]+)\)", text)
    quoted += re.findall(r"^\s*python3? (\S+\.py)", text, re.M)
    path = re.compile(r"\.?[\w-]+(/[\w.-]+)*(/|\.(py|md|toml|txt|cpp|cu|h))")
    paths = [q for q in quoted if path.fullmatch(q)]
    names = {p.name for p in project_files()}
    bases = (ROOT, PACKAGE, ROOT / "csrc", ROOT / "docs")
    missing = [p for p in paths if p not in names and not any((b / p).exists() for b in bases)]
    return [f"{p} does not exist" for p in missing]


def missing_targets(text: str) -> list[str]:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M))
    return [f"make {name} does not exist" for name in sorted(named - targets)]


def subcommands(text: str) -> set[str]:
    return set(re.findall(r"python -m ttt_kernels ([a-z]+)", text))


def readme_shape(text: str) -> list[str]:
    lines = text.splitlines()
    fences = [n for n, line in enumerate(lines, 1) if line.startswith("```")]
    found = [f"{len(lines)} lines, at most 100"] if len(lines) > 100 else []
    return found if fences and fences[0] <= 15 else [*found, "no code by line 15"]


# --- the project --------------------------------------------------------------------------------
def complaints(check: Callable[[str], list[str]], paths) -> list[str]:
    return [f"{relative(p)}: {c}" for p in paths for c in check(p.read_text(encoding="utf-8"))]


def compiled_files() -> list:
    return [p for p in project_files() if p.suffix in (".cu", ".cuh", ".cpp", ".h")]


def in_command_line(path) -> bool:
    return path.is_relative_to(PACKAGE / "cli") or path == PACKAGE / "__main__.py"


def test_files_are_small():
    kernels = [p for p in python_files() if KERNEL_FILES.search(relative(p))]
    others = [p for p in python_files() if p not in kernels]
    assert kernels and not complaints(partial(too_long, limit=400), others)
    assert not complaints(partial(too_long, limit=500), [*kernels, *compiled_files()])
    assert not complaints(partial(too_long, limit=80), [ROOT / "setup.py"])


def test_functions_are_small():
    assert not complaints(long_functions, python_files())
    assert not complaints(long_cpp_functions, compiled_files())


def test_csrc_keeps_its_rules():
    assert not [c for p in compiled_files() for c in complaints(partial(cpp_rules, name=relative(p)), [p])]


def test_public_functions_have_few_parameters():
    public = [p for p in python_files(PACKAGE) if not PRIVATE_FILES.search(relative(p))]
    assert not complaints(many_parameters, public)


def test_environment_is_read_in_one_place():
    others = [p for p in python_files(PACKAGE) if p.name != "_config.py"]
    assert not complaints(environment_reads, others)


def test_only_the_command_line_prints():
    assert not complaints(prints, [p for p in python_files(PACKAGE) if not in_command_line(p)])


def test_no_commented_out_code():
    assert not complaints(commented_out_code, python_files())
    assert not complaints(commented_out_cpp, compiled_files())


def test_no_traces_of_a_machine():
    readable = [p for p in project_files() if p.suffix not in (".safetensors", ".png", ".gguf")]
    assert not complaints(machine_traces, readable)


def test_documents_name_what_exists():
    assert not complaints(missing_paths, DOCUMENTS)
    assert not complaints(missing_targets, [*DOCUMENTS, ROOT / ".ci" / "run"])


def test_documented_subcommands_answer():
    makefile = (ROOT / "Makefile").read_text().replace("$(PY)", "python")
    named = set().union(*(subcommands(t) for t in [makefile, *(p.read_text() for p in DOCUMENTS)]))
    assert {"info", "demo", "bench"} <= named
    for name in sorted(named):
        command = [sys.executable, "-m", "ttt_kernels", name, "--help"]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, f"{name}: {answer.stderr}"
        assert name in answer.stdout


def test_readme_is_short_and_starts_with_code():
    assert not complaints(readme_shape, [ROOT / "README.md"])


# --- every check can fail -----------------------------------------------------------------------
BAD = [
    (partial(too_long, limit=400), "x\n" * 401),
    (long_functions, "def f():\n" + "    x = 1\n" * 80),
    (long_functions, "def f():\n    '''a\n    b'''\n" + "    x = 1\n" * 80),
    (long_functions, "@triton.jit\ndef f():\n" + "    x = 1\n" * 150),
    (many_parameters, "def f(a, b, c, d, e, *, f, g, h, i, j, k): ..."),
    (environment_reads, "import os\nx = os.environ['A']"),
    (environment_reads, "from os import getenv"),
    (prints, "def f():\n    print(1)"),
    (commented_out_code, "x = 1\n# y = f(x)\n"),
    (commented_out_code, "# for i in range(3):\n#     x += i\n"),
    (commented_out_cpp, "  // launch(grid, block);\n"),
    (commented_out_cpp, "  // int x = y;\n"),
    (long_cpp_functions, "void f(int a,\n       int b) {\n" + "  x();\n" * 149 + "}\n"),
    (partial(cpp_rules, name="csrc/kernels/a/a.cu"), 'asm volatile("bar.sync 0;");'),
    (partial(cpp_rules, name="csrc/kernels/a/a.cuh"), "a_kernel<<<1, 1>>>();"),
    (partial(cpp_rules, name="csrc/include/ttt/a.cuh"), "__shared__ float x[4];"),
    (partial(cpp_rules, name="csrc/kernels/a/a.cu"), "atomicAdd(x, 1.0f);"),
    (partial(cpp_rules, name="csrc/bindings/a.cpp"), "#include <torch/extension.h>"),
    (partial(cpp_rules, name="csrc/kernels/a/a.cu"), "#include <pybind11/pybind11.h>"),
    (partial(cpp_rules, name="csrc/bindings/a.cpp"), "#include <cuda_runtime.h>"),
    (partial(cpp_rules, name="csrc/include/ttt/a.h"), '#include "ttt/host.h"'),
    (machine_traces, "path = '" + "/ho" + "me/me/data'"),
    (machine_traces, "pip install --" + "index-url x"),
    (missing_paths, "see `docs/no_such_page.md`"),
    (missing_paths, "see `no_such_file.py`"),
    (missing_paths, "see [it](no/such/folder/)"),
    (missing_targets, "run `make coffee`"),
    (readme_shape, "text\n" * 20),
    (readme_shape, "```\n" + "text\n" * 100),
]
GOOD = [
    (long_functions, "@triton.jit\ndef f():\n" + "    x = 1\n" * 149),
    (many_parameters, "def f(self, a, b, c, d, e, f, g, h, i, j): ..."),
    (commented_out_code, "# y = x W^T, and G = V^T Z\n# pass\n# a -> b\n#!/usr/bin/env python\n"),
    (commented_out_cpp, "// The list is ours, and is applied per target;\n// so it is.\n"),
    (long_cpp_functions, "namespace a {\nvoid f() {\n" + "  x();\n" * 148 + "}\n}\n"),
    (long_cpp_functions, "struct A {  // f() {\n" + "  int f(){ return 1; }\n" * 200 + "};\n"),
    (partial(cpp_rules, name="csrc/kernels/device/device.cu"), "a_kernel<<<1, 1>>>();  // asm"),
    (partial(cpp_rules, name="csrc/include/ttt/host.h"), "#include <cuda_runtime.h>"),
    (machine_traces, "#!/usr/bin/env bash\ncd a/work/b; echo ${HOME}/opt/x"),
    (missing_paths, "`README.md`, `ttt_kernels/ops/`, `impl=\"auto\"`, `state/dtype`"),
    (missing_targets, "run `make test`; they make coffee"),
]


@pytest.mark.parametrize(("check", "source"), BAD)
def test_check_refuses(check, source):
    assert check(source)


@pytest.mark.parametrize(("check", "source"), GOOD)
def test_check_accepts(check, source):
    assert not check(source)
