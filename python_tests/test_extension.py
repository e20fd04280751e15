"""The compiled part and what is said of it: `_extension`, `_config`, `info()`."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import ttt_kernels as ttt
from ttt_kernels import _config, _extension, _info

NAME = "ttt_kernels._C"


@pytest.fixture
def fresh(monkeypatch):
    """Forgets what was loaded, before and after."""
    _extension._attempt.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    _extension._attempt.cache_clear()


def test_answers_agree():
    if _extension.available():
        assert _extension.why_not() is None
        assert _extension.load().version == ttt.__version__
    else:
        with pytest.raises(ImportError, match="ttt_kernels._C: "):
            _extension.load()
        assert _extension.why_not()


def test_absence_is_explained(fresh):
    fresh.setitem(sys.modules, NAME, None)  # how Python marks a module that must not be found
    assert not _extension.available()
    with pytest.raises(ImportError, match="not built: .* nvcc on PATH") as caught:
        _extension.load()
    assert caught.value.name == NAME


def test_failure_to_load_is_explained(fresh):
    def broken(_):
        raise ImportError("libcudart.so.13: cannot open shared object file")

    fresh.setattr(_extension, "import_module", broken)
    assert "cannot be imported: libcudart.so.13" in _extension.why_not()


def test_build_of_another_version_is_refused(fresh):
    fresh.setitem(sys.modules, NAME, SimpleNamespace(version="0.0.1"))
    assert "built for version 0.0.1, this is " + ttt.__version__ in _extension.why_not()


@pytest.mark.skipif(not _extension.available(), reason=f"{NAME} is {_extension.why_not()}")
def test_query_is_polite():
    module = _extension.load()
    assert all(name.endswith(("-real", "-virtual")) for name in module.cuda_architectures)
    assert int(module.cuda_runtime_version().partition(".")[0]) >= 12
    found = module.device_query()
    if found["error"] is None:
        for device in found["devices"]:
            assert device["memory_bytes"] > 0 and (device["image"] or device["error"])
    else:
        assert found["devices"] == [] and found["error"].startswith("cudaError")


@pytest.mark.gpu
@pytest.mark.skipif(not _extension.available(), reason=f"{NAME} is {_extension.why_not()}")
def test_every_gpu_runs_a_compiled_image():
    devices = _extension.load().device_query()["devices"]
    assert devices
    for device in devices:
        assert device["error"] is None and device["image"].startswith("sm_")


# --- environment ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", _config.IMPLEMENTATIONS)
def test_environment_names_an_implementation(monkeypatch, name):
    monkeypatch.setenv("TTT_KERNELS_IMPL", name)
    assert _config.default_implementation() == name


def test_environment_is_checked(monkeypatch):
    monkeypatch.setenv("TTT_KERNELS_IMPL", "fast")
    with pytest.raises(ValueError, match="TTT_KERNELS_IMPL must be one of auto, .*, got 'fast'"):
        _config.default_implementation()


def test_environment_may_be_silent(monkeypatch):
    monkeypatch.delenv("TTT_KERNELS_IMPL", raising=False)
    assert _config.default_implementation() == "auto"


# --- info -----------------------------------------------------------------------------------------
def test_info_tells_all(monkeypatch):
    monkeypatch.delenv("TTT_KERNELS_IMPL", raising=False)
    found = ttt.info()
    assert found.versions["ttt_kernels"] == ttt.__version__
    assert found.auto["cpu"][0] == "eager" and found.auto["cpu"][1]
    assert set(found.auto) == {"cpu", "cuda"}
    text = str(found)
    for part in ("torch", "triton", "extension", "device", "auto on cpu", "auto on cuda"):
        assert part in text
    assert _extension.why_not() is None or _extension.why_not() in text


def test_info_follows_the_environment(monkeypatch):
    monkeypatch.setenv("TTT_KERNELS_IMPL", "reference")
    name, why = ttt.info().auto["cpu"]
    assert name == "reference" and "TTT_KERNELS_IMPL" in why


def test_info_reports_a_missing_package():
    assert _info._installed("a-package-that-does-not-exist") == "(not installed)"


def _pretend(monkeypatch, **query):
    module = SimpleNamespace(
        device_query=lambda: query,
        cuda_architectures=("90a-real", "100-virtual"),
        cuda_runtime_version=lambda: "13.0",
    )
    monkeypatch.setattr(_extension, "_attempt", lambda: (module, None))
    return str(ttt.info())


def test_info_reports_a_missing_driver(monkeypatch):
    text = _pretend(monkeypatch, devices=[], error="cudaErrorInsufficientDriver: too old")
    assert "CUDA 13.0 for 90a-real, 100-virtual" in text
    assert "no CUDA device: cudaErrorInsufficientDriver: too old" in text


def test_info_reports_images(monkeypatch):
    facts = {
        "name": "GPU", "compute_capability": (9, 0), "multiprocessors": 132,
        "memory_bytes": 141 * 2**30, "shared_memory_per_block_bytes": 232448,
    }  # fmt: skip
    devices = [
        {"index": 0, **facts, "image": "sm_90a", "error": None},
        {"index": 1, **facts, "image": None, "error": "cudaErrorNoKernelImageForDevice: none"},
        {"index": 2, "error": "cudaErrorInvalidDevice: gone"},
    ]
    text = _pretend(monkeypatch, devices=devices, error=None)
    assert "cuda:0: GPU, compute 9.0, 132 multiprocessors, 141 GiB, 227 KiB" in text
    assert "runs sm_90a" in text
    assert "no compiled image (cudaErrorNoKernelImageForDevice: none)" in text
    assert "cuda:2: cudaErrorInvalidDevice: gone" in text
