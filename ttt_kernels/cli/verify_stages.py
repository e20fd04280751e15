"""What `verify` runs on a machine: the stages, found by rules where files or registries can tell."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ttt_kernels._config import IMPLEMENTATIONS
from ttt_kernels.cli import verify_parity
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.bench_suites import SUITES
from ttt_kernels.cli.verify_runner import Phase, Stage

VALUES, COMPILED, MEMORY, RACES, SPEED = (
    "values and gradients", "machine code", "memory accesses", "races and barriers", "speed",
)  # fmt: skip
OF_KERNELS, OF_LIBRARIES = (VALUES, COMPILED, MEMORY, RACES, SPEED), (VALUES, SPEED)
ON_GPU, INTERPRETED, EMULATED, COMPILED_ONLY, ON_CPU = (
    "on the GPU", "interpreted", "emulated", "compiled only", "on the CPU",
)  # fmt: skip
KERNELS = ("triton", "cuda")  # implementations with kernels of their own
WITHOUT_GPU = {"reference": ON_CPU, "eager": ON_CPU, "triton": INTERPRETED, "cuda": EMULATED}
SANITIZERS = {"memcheck": MEMORY, "initcheck": MEMORY, "racecheck": RACES, "synccheck": RACES}
# A sandbox that shows a GPU need not let a tool instrument it.
REFUSES = r"((?:Device not supported|Unable to attach|Target application terminated before first)[^\n]*)"
SUFFIXED = {(9, 0): "90a", (10, 0): "100a"}  # architectures whose own instructions are used
ANY_GPU = "80-real;90a-real"
NO_GPU = "it needs a CUDA GPU"
TOTAL_S = {"gpu": 520.0, "cpu": 580.0}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Place:
    """Where the stages run: the copy of the tree, a folder for what they write, the environment, and
    what `verify_machine` found."""

    tree: Path
    output: Path
    environment: Mapping[str, str]
    machine: Mapping[str, object]

    @property
    def gpu(self) -> bool:
        return bool(self.machine.get("gpus"))

    def tool(self, name: str, *variables: str) -> str | None:
        """A program: named by a variable, of this Python's environment, of CUDA_HOME, on PATH, or in the
        toolkit's usual place."""
        candidates = [self.environment.get(variable) for variable in variables]
        candidates += [str(Path(sys.executable).with_name(name))]
        candidates += [f"{home}/bin/{name}" for home in [self.environment.get("CUDA_HOME")] if home]
        candidates += [name, f"/usr/local/cuda/bin/{name}"]
        path = self.environment.get("PATH")
        return next((found for c in candidates if c and (found := shutil.which(c, path=path))), None)


def module(name: str, *arguments: object) -> tuple[str, ...]:
    return sys.executable, "-m", name, *map(str, arguments)


def machine_phase() -> Phase:
    stage = Stage("machine", module("ttt_kernels.cli.verify_machine"), 45)
    return Phase("machine", [stage], 45, 15)


def phases(place: Place) -> list[Phase]:
    """After the machine is known. The times of a phase: at most, and what is kept for it."""
    checks = [*parity(place), *tests(place), *sanitizers(place)]
    jobs = min(16, int(place.machine.get("cores", 1)))
    info = Stage("info", module("ttt_kernels", "info"), 40)
    if place.gpu:
        times = {"build": (170, 60), "info": (40, 10), "checks": (300, 150), "benchmark": (240, 130)}
    else:
        times = {"build": (150, 60), "info": (40, 10), "checks": (500, 280), "benchmark": (90, 60)}
    return [
        Phase("build", [build(place)], *times["build"]),
        Phase("info", [info], *times["info"]),
        Phase("checks", checks, *times["checks"], jobs),
        Phase("benchmark", benchmarks(place), *times["benchmark"]),
    ]


def architectures(place: Place) -> str:
    """Machine code for the GPUs that are here and for no other; without one, for a check that it
    compiles."""
    found = {tuple(pair) for pair in place.machine.get("capabilities", ())}
    names = [SUFFIXED.get(pair, f"{pair[0]}{pair[1]}") for pair in sorted(found)]
    return ";".join(f"{name}-real" for name in names) or ANY_GPU


def build(place: Place) -> Stage:
    """setup.py calls CMake and puts `_C` beside the package's files, in the copy."""
    nvcc = place.tool("nvcc", "CUDACXX")
    missing = [name for name in ("cmake", "ninja") if place.tool(name) is None]
    missing += [name for name in ("pybind11", "setuptools") if find_spec(name) is None]
    why_not = "no nvcc on PATH, in CUDACXX or under CUDA_HOME" if nvcc is None else None
    if missing and nvcc:
        why_not = f"to build it needs {', '.join(missing)}"
    return Stage(
        "build",
        (sys.executable, "setup.py", "build_ext", "--inplace"),
        170,
        environment={"TTT_KERNELS_CUDA_ARCHS": architectures(place), "CUDACXX": nvcc or ""},
        why_not=why_not,
        shows=(("cuda", COMPILED, COMPILED_ONLY),),
    )


def test_files(place: Place) -> list[Path]:
    return sorted((place.tree / "python_tests").glob("test_*.py"))


def pytest_command(place: Place, *arguments: str | Path) -> tuple[str, ...]:
    """A line for each test, as soon as it has run."""
    relative = [a.relative_to(place.tree) if isinstance(a, Path) else a for a in arguments]
    return module("pytest", "-vv", "--tb=short", "--color=no", "-p", "no:cacheprovider", *relative)


Shows = tuple[tuple[str, str, str], ...]


def tests(place: Place) -> list[Stage]:
    """A stage for each test file, chosen by its name and text."""
    without = None if find_spec("pytest") else "pytest is not installed"
    ops = tuple(path.parent.name for path in place.tree.glob("ttt_kernels/ops/*/api.py"))
    stages = []
    for path in test_files(place):
        name = path.stem.removeprefix("test_")
        text = path.read_text(encoding="utf-8")
        chosen = tests_on_gpu(name, text) if place.gpu else tests_without_gpu(name, ops)
        if chosen is None:
            continue
        marker, shows = chosen
        command = pytest_command(place, *marker, path)
        needs = "build" if place.gpu and "cuda" in name.split("_") else None
        limit = 240 if place.gpu else 400  # cold caches and few cores
        stages.append(
            Stage(f"tests/{path.stem}", command, limit, ONE_THREAD, needs, without, tests=True, shows=shows)
        )
    return sorted(stages, key=lambda stage: "_compile" not in stage.name)  # the longest first


def tests_on_gpu(name: str, text: str) -> tuple[tuple[str, ...], Shows] | None:
    """Arguments for pytest, and what the file shows: `_triton`, `_cuda` in its name say whose kernels it
    tests; others count where they ask for a GPU. None for a file that has nothing for one."""
    words = name.split("_")
    if "sanitized" in words:
        return None
    for impl in KERNELS:
        if impl in words:
            return (), ((impl, VALUES, ON_GPU), (impl, COMPILED, ON_GPU))
    if re.search(r"\"cuda\" if|\.cuda\(", text):
        return (), ()
    return (("-m", "gpu"), ()) if "mark.gpu" in text else None


def tests_without_gpu(name: str, ops: tuple[str, ...]) -> tuple[tuple[str, ...], Shows] | None:
    """`_triton`: interpreted; `_cuda`, `emulation`: emulated; `_sanitized`: so, under AddressSanitizer;
    `_compile`: compiled ahead of time; and those of an operation, for what calls libraries."""
    words = name.split("_")
    if "triton" in words:
        return (), (("triton", VALUES, INTERPRETED),)
    if "sanitized" in words:
        return (), (("cuda", MEMORY, EMULATED),)
    if "cuda" in words or "emulation" in words:
        return (), (("cuda", VALUES, EMULATED),)
    if "compile" in words:
        return (), (("triton", COMPILED, COMPILED_ONLY),)
    if name == "golden" or name.startswith(ops):
        return (), (("eager", VALUES, ON_CPU), ("reference", VALUES, ON_CPU))
    return None


def parity(place: Place) -> list[Stage]:
    """A process for each implementation, so that one that spoils the GPU's context spoils no other; and
    for each operation, where kernels have to be compiled first."""
    device, how = ("cuda", dict.fromkeys(IMPLEMENTATIONS, ON_GPU)) if place.gpu else ("cpu", WITHOUT_GPU)
    environment = ONE_THREAD if place.gpu else {**ONE_THREAD, "TRITON_INTERPRET": "1"}
    stages = []
    for impl in IMPLEMENTATIONS[1:]:
        ops = [name for name, op in OPERATIONS.items() if verify_parity.implementations(op, [impl])]
        alone = place.gpu and impl in KERNELS and ops
        for name, group in {f"{impl}-{op}": [op] for op in ops}.items() if alone else [(impl, ops)]:
            options = ("--impl", impl, "--device", device, "--output", place.output / f"parity-{name}.jsonl")
            stages.append(
                Stage(
                    f"parity/{name}",
                    module("ttt_kernels.cli.verify_parity", *options, "--op", *group),
                    200, environment, tests=True, shows=((impl, VALUES, how[impl]),),
                    needs="build" if place.gpu and impl == "cuda" else None,
                    why_not=None if group else f"no operation has an implementation called {impl}",
                )
            )  # fmt: skip
    return stages


def sanitizers(place: Place) -> list[Stage]:
    """Under each tool every operation once, forward and backward; under memcheck also the tests that are
    marked for AddressSanitizer, whose shapes are odder. Each tensor is an allocation of its own there, so
    that the end of one is an end."""
    tool = place.tool("compute-sanitizer")
    why_not = None if place.gpu else NO_GPU
    if place.gpu and tool is None:
        why_not = "no compute-sanitizer under CUDA_HOME or on PATH"
    options = ("--error-exitcode", "1", "--report-api-errors", "no", "--print-limit", "20",
               "--target-processes", "application-only")  # fmt: skip
    once = ("ttt_kernels.cli.verify_parity", "--device", "cuda", "--dtype", "bfloat16", "--once", "--impl")
    works = {(name, impl): module(*once, impl) for impl in KERNELS for name in SANITIZERS}
    if marked := [path for path in test_files(place) if "mark.sanitize" in path.read_text(encoding="utf-8")]:
        works["memcheck", "cuda-tests"] = pytest_command(place, "-m", "sanitize", *marked)
    return [
        Stage(
            f"sanitizer/{name}-{work}",
            (tool or "compute-sanitizer", "--tool", name, *options, *command),
            240, {**ONE_THREAD, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            needs="build" if work != "triton" else None, why_not=why_not, cannot=REFUSES,
            proof=r"SUMMARY: 0 ", tests=True, shows=((work.partition("-")[0], SANITIZERS[name], ON_GPU),),
        )
        for (name, work), command in works.items()
    ]  # fmt: skip


def benchmarks(place: Place) -> list[Stage]:
    """Every row of the suites for a GPU, a process for each problem; without a GPU a few rows instead, so
    that the way to them is known to work."""
    groups = {f"benchmark/{name}": options for name, options in grids().items()}
    if not place.gpu:
        few = ("--op", "scan", "--shape", "qwen3-0.6b", "--T", 512, "--chunk-size", 256, "--mode", "fwd")
        groups = {"benchmark/cpu": (*few, "--impl", "reference", "eager", "--repeats", 3), **groups}
    no_rich = None if find_spec("rich") else "rich is not installed"
    stages = []
    for name, options in groups.items():
        why_not = NO_GPU if "cuda" in options and not place.gpu else no_rich
        output = place.output / f"{name.replace('/', '-')}.jsonl"
        shows = tuple((impl, SPEED, ON_GPU) for impl in KERNELS) if why_not else ()  # else its rows tell
        command = module("ttt_kernels", "bench", *options, "--output", output)
        stages.append(Stage(name, command, 90, why_not=why_not, shows=shows))
    return stages


def grids() -> dict[str, tuple]:
    """The cases of all suites for a GPU, as arguments of the benchmark: those of one problem together.
    Without torch.compile, which takes longer over hundreds of chunks than everything else."""
    groups: dict[tuple, dict[str, dict]] = {}
    cases = (case for suite in (make() for make in SUITES.values()) for case in suite.cases)
    for case in (case for case in cases if case.device == "cuda"):
        key = (case.op, case.shape, case.tokens, case.batch, case.dtype, case.preserve_row_norm)
        lists = groups.setdefault(key, {"--chunk-size": {}, "--mode": {}})
        lists["--chunk-size"][case.chunk_size] = lists["--mode"][case.mode] = None
    found = {}
    for (op, shape, tokens, batch, dtype, preserve), lists in groups.items():
        impls = [name for name in OPERATIONS[op].implementations if "compiled" not in name]
        options = [word for flag, values in lists.items() for word in (flag, *values)]
        found[f"{op}-{shape}-T{tokens}-B{batch}-{dtype}" + "-row_norm" * preserve] = (
            "--device", "cuda", "--op", op, "--shape", shape, "--T", tokens, "--batch", batch,
            "--dtype", dtype, *(["--preserve-row-norm"] * preserve), *options, "--impl", *impls,
        )  # fmt: skip
    return found
