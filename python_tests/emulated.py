"""The CUDA C++ kernels as this machine can run them: compiled by nvcc where there is a GPU, else built by
g++ with csrc/emulation, once, into build/."""

from __future__ import annotations

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
from source_tree import ROOT

SOURCE = ROOT / "csrc" / "emulation"


def tool(name: str) -> str | None:
    """A build tool of this environment, activated or not, before one of the system."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


@cache
def emulated_library(sanitize: bool = False) -> Path:
    """Path of the built module. Skips the test where it cannot be built for want of a tool."""
    missing = [name for name in ("cmake", "ninja", "g++") if tool(name) is None]
    if missing or importlib.util.find_spec("pybind11") is None:
        pytest.skip(f"the emulation is built with cmake, ninja, g++ and pybind11; missing: {missing}")
    kind = "sanitized" if sanitize else "emulation"
    build = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}"
    configure = ["-S", SOURCE, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DTTT_SANITIZE={'ON' if sanitize else 'OFF'}"]
    for arguments in (configure, ["--build", build, "--parallel", "2"]):
        result = subprocess.run([tool("cmake"), *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return next(build.glob("_C_emulated*.so"))


@cache
def emulated_module() -> ModuleType:
    return load_module(emulated_library())


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
