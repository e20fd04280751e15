"""The CUDA C++ kernels as this machine can run them: compiled by nvcc where there is a GPU, else built by
g++ with csrc/emulation, once, into build/. Test modules take the fixture `cuda_kernels`."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from source_tree import ROOT

from ttt_kernels import _extension
from ttt_kernels.ops.cuda_launch import SM80, SM90

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16]
PATHS = [SM80, SM90] if not GPU or torch.cuda.get_device_capability() == (9, 0) else [SM80]
SOURCE = ROOT / "csrc" / "emulation"
SANITIZED = "TTT_TESTS_SANITIZED"  # set by test_cuda_sanitized.py in the process it starts
# Orders of threads and times of asynchronous effects, csrc/emulation/control.h: (order, timing).
SCHEDULES = [(0, 1), (1, 0), (2, 2)]


def tool(name: str) -> str | None:
    """A build tool of this environment, activated or not, before one of the system."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


@cache
def emulated_library(sanitize: bool = False) -> Path:
    """Path of the built module. Skips the test where it cannot be built for want of a tool."""
    missing = [name for name in ("cmake", "ninja", "g++") if tool(name) is None]
    missing += ["pybind11"] * (importlib.util.find_spec("pybind11") is None)
    if missing:
        pytest.skip(f"the emulation is built with cmake, ninja, g++ and pybind11; missing: {missing}")
    build = ROOT / "build" / f"{'sanitized' if sanitize else 'emulation'}-{sys.implementation.cache_tag}"
    return cmake_build(SOURCE, build, f"-DTTT_SANITIZE={'ON' if sanitize else 'OFF'}")


def cmake_build(source: Path, build: Path, *options: str) -> Path:
    """The Python module that a CMakeLists.txt makes; what has not changed is not compiled again."""
    configure = ["-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", *options]
    build.parent.mkdir(exist_ok=True)
    with open(f"{build}.lock", "w") as lock:  # other processes of tests may be building it
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arguments in (configure, ["--build", build, "--parallel", "2"]):
            result = subprocess.run([tool("cmake"), *arguments], capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
    return next(build.glob("_C*.so"))


@cache
def emulated_module() -> ModuleType:
    path = emulated_library(sanitize=SANITIZED in os.environ)
    spec = importlib.util.spec_from_file_location("_C_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cuda_kernels():
    """`impl="cuda"` runs on DEVICE for a module's tests."""
    if GPU:
        if not _extension.available():
            pytest.skip(f"ttt_kernels._C: {_extension.why_not()}")
        yield _extension.load()
        return
    module, before = emulated_module(), _extension._attempt
    _extension._attempt = lambda: (module, None)
    yield module
    _extension._attempt = before


@pytest.fixture(params=SCHEDULES[:1] if GPU else SCHEDULES, ids=str)
def schedule(request, cuda_kernels):
    """The emulation's threads in several orders; a GPU has one of its own."""
    if cuda_kernels.emulated:
        cuda_kernels.set_schedule(*request.param, seed=1)
    yield
    if cuda_kernels.emulated:
        cuda_kernels.set_schedule(*SCHEDULES[0], seed=0)
