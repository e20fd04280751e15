"""Builds ttt_kernels._C with CMake where nvcc is found, and installs pure Python where it is not.

Metadata is in pyproject.toml, the compile recipe in CMakeLists.txt; this file only joins the two.
It imports no torch and needs no network, no git and no GPU. Its two knobs are in CONTRIBUTING.md.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = os.environ.get("TTT_KERNELS_CUDA_ARCHS", "")
MAX_JOBS = os.environ.get("MAX_JOBS", "2")


def find_nvcc() -> tuple[str | None, str]:
    """The compiler, or None and why there is none."""
    if ARCHITECTURES == "none":
        return None, "TTT_KERNELS_CUDA_ARCHS=none"
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("CUDACXX"), home and os.path.join(home, "bin", "nvcc"), "nvcc"]
    found = next(filter(None, (shutil.which(name) for name in candidates if name)), None)
    return found, "no nvcc on PATH, in CUDACXX or under CUDA_HOME"


def tool(name: str) -> str:
    """A build tool of this environment, activated or not, before one of the system."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"ttt_kernels: {name} is needed to build with nvcc: pip install {name}")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # pip's isolated environment has another path each time; the headers get one that stays, so
        # that a second install finds nothing to compile.
        headers = build / f"pybind11-{pybind11.__version__}"
        if not headers.exists():
            shutil.copytree(Path(pybind11.__file__).parent, headers)
        architectures = f"-DTTT_CUDA_ARCHITECTURES={ARCHITECTURES}"
        configure = ["-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DCMAKE_CUDA_COMPILER={NVCC}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dpybind11_DIR={headers}/share/cmake/pybind11"]
        configure += [architectures if ARCHITECTURES else "-UTTT_CUDA_ARCHITECTURES"]
        compile_ = ["--build", str(build), "--parallel", MAX_JOBS]
        package_root = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        install = ["--install", str(build), "--prefix", str(package_root)]
        for arguments in (configure, compile_, install):
            subprocess.run([tool("cmake"), *arguments], check=True)


class BuildPython(build_py):
    def run(self) -> None:
        if NVCC is None:
            print(f"ttt_kernels: {WHY_NOT}: installing without CUDA kernels", file=sys.stderr)
        super().run()


NVCC, WHY_NOT = find_nvcc()
setup(
    ext_modules=[Extension("ttt_kernels._C", sources=[])] if NVCC else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)
