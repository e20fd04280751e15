"""What a stranger's `pip install` does, with and without nvcc, on a copy of the source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from source_tree import project_files, relative

PROJECT = ("pyproject.toml", "setup.py", "MANIFEST.in", "CMakeLists.txt", "README.md")
LICENSES = ("LICENSE", "NOTICE")
HERE = os.path.dirname(sys.executable)
PATH_WITH_TOOLS = os.pathsep.join([HERE, os.environ.get("PATH", "")])
needs_nvcc = pytest.mark.skipif(
    shutil.which(os.environ.get("CUDACXX", "nvcc")) is None, reason="no nvcc to compile with"
)


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy, so that building leaves nothing in the checkout and reads nothing built there."""
    for path in project_files():
        name = relative(path)
        if name in PROJECT + LICENSES or name.startswith(("csrc/", "ttt_kernels/")):
            target = tmp_path / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return tmp_path / "source"


def environment(**changes: str) -> dict[str, str]:
    """This environment without any way to find nvcc, unless `changes` brings one."""
    hidden = ("CUDACXX", "CUDA_HOME", "PYTHONPATH", "TTT_KERNELS_CUDA_ARCHS", "TTT_KERNELS_IMPL")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, "PATH": HERE, **changes}


def run(*command: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def install(source: Path, target: Path, env: dict[str, str]) -> str:
    """Output of pip, the build's own included."""
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps"]
    result = run(*pip, "--upgrade", "--target", target, source, cwd=source, env=env)
    return result.stdout + result.stderr


# An editable install of the checkout would lend its `_C` to the package under test.
NO_CHECKOUT = """
import sys
sys.meta_path = [f for f in sys.meta_path if not f.__module__.startswith("__editable__")]
"""


def python(target: Path, script: str, env: dict[str, str]) -> str:
    """Runs a script that finds the installed package, and not the checkout."""
    script = NO_CHECKOUT + textwrap.dedent(script)
    env = {**env, "PYTHONPATH": str(target)}
    return run(sys.executable, "-c", script, cwd=target, env=env).stdout


def test_without_nvcc(source, tmp_path):
    env, target = environment(), tmp_path / "target"
    output = install(source, target, env)
    notices = [line for line in output.splitlines() if line.strip().startswith("ttt_kernels: ")]
    said = "ttt_kernels: no nvcc on PATH, in CUDACXX or under CUDA_HOME: "
    assert [line.strip() for line in notices] == [said + "installing without CUDA kernels"]
    assert not list(target.rglob("*.so"))
    script = """
        import ttt_kernels
        from ttt_kernels import _extension
        assert not _extension.available()
        print(ttt_kernels.__file__)
        print(ttt_kernels.info())
    """
    where, _, report = python(target, script, env).partition("\n")
    assert Path(where).is_relative_to(target)
    assert "not built: " in report
    licenses = {p.name for p in target.glob("*.dist-info/licenses/*")}
    assert licenses == set(LICENSES)
    shipped = {p.suffix for p in (target / "ttt_kernels" / "cli" / "projections").iterdir()}
    assert shipped == {".md", ".safetensors"}


def test_metadata_needs_no_torch(source):
    """No torch, no network, no git: each raises or is out of reach while metadata is made."""
    script = """
        import socket, sys
        class NoTorch:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "triton"):
                    raise RuntimeError(f"{name} imported at metadata time")
        sys.meta_path.insert(0, NoTorch())
        def refuse(*_):
            raise RuntimeError("network used at metadata time")
        socket.socket.connect = refuse
        from setuptools import build_meta
        assert build_meta.get_requires_for_build_wheel() == []
        folder = build_meta.prepare_metadata_for_build_wheel(".")
        text = open(folder + "/METADATA").read()
        assert "Name: ttt" in text and "Requires-Dist: torch>=2.11" in text
    """
    env = environment(PATH=str(source / "no-such-folder"))
    run(sys.executable, "-c", textwrap.dedent(script), cwd=source, env=env)


def test_extension_can_be_declined(source):
    script = "import setup; assert setup.NVCC is None and 'none' in setup.WHY_NOT"
    env = environment(TTT_KERNELS_CUDA_ARCHS="none", PATH=PATH_WITH_TOOLS)
    script = "import sys; sys.argv = ['setup.py', '--name']; sys.path.insert(0, '.')\n" + script
    run(sys.executable, "-c", script, cwd=source, env=env)


@needs_nvcc
def test_with_nvcc_twice(source, tmp_path):
    env = environment(PATH=PATH_WITH_TOOLS, TTT_KERNELS_CUDA_ARCHS="90a-real;90-virtual")
    target = tmp_path / "target"
    output = install(source, target, env)
    assert "Building CUDA object" in output and "sm90_forward_step.cu" in output
    # What ptxas has to say does not fail a build: that it makes every wgmma wait, for one.
    assert "Performance Loss" not in output
    script = """
        from ttt_kernels import _extension
        module = _extension.load()
        assert module.cuda_architectures == ("90a-real", "90-virtual"), module.cuda_architectures
        query = module.device_query()
        assert query["devices"] or query["error"].startswith("cudaError"), query
    """
    python(target, script, env)
    again = install(source, target, env)
    assert "Building" not in again.replace("Building wheel", "")
    assert list(target.rglob("_C*.so"))


@needs_nvcc
def test_cmake_alone(source, tmp_path):
    env, build = environment(PATH=PATH_WITH_TOOLS), tmp_path / "build"
    options = ["-DTTT_CUDA_ARCHITECTURES=80-real", f"-DPython_EXECUTABLE={sys.executable}"]
    run("cmake", "-B", build, *options, cwd=source, env=env)
    output = run("cmake", "--build", build, "--parallel", "2", cwd=source, env=env).stdout
    assert "forward_step.cu" in output and "sm90_" not in output  # no kernels of an architecture left out
    script = "import _C; assert _C.cuda_architectures == ('80-real',); print(_C.device_query())"
    assert "devices" in python(build, script, env)
