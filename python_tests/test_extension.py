"""The compiled part and what is said of it: `_extension`, `_config`, `info()`."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

import ttt_kernels as ttt
from ttt_kernels import _config, _extension, _info
from ttt_kernels.ops import cuda_launch

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


def _call(name: str) -> dict:
    """Arguments of a binding: a tiny shape, and addresses of this process, which no kernel may ever see."""
    at = MEMORY.data_ptr()
    place = dict(device=0, stream=0, bfloat16=True)
    sizes = dict(d=8, f=8, z=at, v=at, z_stride=8, v_stride=8, **place)
    scan = dict(path=80, chunk=4, tokens=4, sequences=1, blocks=at, offsets=[0, 1], step_size=None, lr=1.0,
                preserve_row_norm=False, w0_norms=None, **sizes)  # fmt: skip
    step = dict(batch=1, tokens=1, d=8, f=8, pool=1, z=at, z_batch_stride=8, z_token_stride=8, weight=at,
                weight_stride=64, row_stride=8, slots=None, **place)  # fmt: skip
    forward = dict(y=at, y_stride=8, state=at, write_last=True, shadow_0=at, shadow_1=at, norms_0=None,
                   norms_1=None)  # fmt: skip
    backward = dict(dy=at, dy_stride=8, initial=at, initial_stride=0, initial_is_float32=True, carried=at,
                    carried_is_final=True, has_dstate=False, grad=at, dz=at, dv=at, dstep=None,
                    norm_grad=None, weight=at, shadow=at, grad_shadow=at, workspace=at)  # fmt: skip
    update = dict(v=at, v_batch_stride=8, v_token_stride=8, step_size=None, lr=1.0)
    sizing = dict(spectral=True, chunk=4, chunks=1, first=at, lr=1.0, iterations=5, max_norm=1.0, step=at,
                  workspace=at)  # fmt: skip
    return {
        "scan_norms": dict(weight=at, norms=at, d=8, f=8, sequences=1, **place),
        "scan_forward": {**scan, **forward},
        "scan_backward": {**scan, **backward},
        "step_apply": dict(row_scale=None, y=at, workspace=at, **step),
        "step_update": {**step, **update},
        "step_size": {**sizes, **sizing},
    }[name]


MEMORY = torch.zeros(1 << 16)
CALLS = ("scan_norms", "scan_forward", "scan_backward", "step_apply", "step_update", "step_size")


@pytest.fixture
def compiled():
    if not _extension.available():
        pytest.skip(f"{NAME} is {_extension.why_not()}")
    return _extension.load()


def test_every_op_is_compiled(compiled):
    assert cuda_launch.compiled_ops() == list(cuda_launch.OPS)


@pytest.mark.parametrize("name", CALLS)
def test_calls_without_a_driver_are_polite(compiled, name):
    """An error of the runtime becomes an exception that names the call and the cause."""
    if compiled.device_query()["devices"]:
        pytest.skip("there is a GPU, on which these addresses mean nothing")
    said = f"{name}: cudaError(InsufficientDriver|NoDevice): "
    with pytest.raises(RuntimeError, match=said):
        getattr(compiled, name)(**_call(name))
    with pytest.raises(RuntimeError, match=said):
        getattr(compiled, name)(**{**_call(name), "device": 99})


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_taken_by_name(compiled, name):
    """One too few, one too many, one of another type: nothing is called."""
    call, arguments = getattr(compiled, name), _call(name)
    with pytest.raises(TypeError, match=f"{name} has no argument colour"):
        call(**arguments, colour=1)
    for left_out in arguments:
        with pytest.raises(TypeError, match=f"{name} needs the argument {left_out}$"):
            call(**{k: v for k, v in arguments.items() if k != left_out})
    with pytest.raises(TypeError, match=f"{name} got a value of another type for d$"):
        call(**{**arguments, "d": "wide"})


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


def _pretend(monkeypatch, ops=("scan_forward", "step_size"), **query):
    module = SimpleNamespace(
        device_query=lambda: query,
        cuda_architectures=("90a-real", "100-virtual"),
        cuda_runtime_version=lambda: "13.0",
        **dict.fromkeys(ops),
    )
    monkeypatch.setattr(_extension, "_attempt", lambda: (module, None))
    return str(ttt.info())


def test_info_reports_a_missing_driver(monkeypatch):
    text = _pretend(monkeypatch, devices=[], error="cudaErrorInsufficientDriver: too old")
    assert "CUDA 13.0 for 90a-real, 100-virtual" in text
    assert "no CUDA device: cudaErrorInsufficientDriver: too old" in text
    assert "impl='cuda' runs fast_weight_scan, spectral_step_size, clipped_step_size\n" in text


def test_info_reports_a_build_without_kernels(monkeypatch):
    text = _pretend(monkeypatch, ops=(), devices=[], error="cudaErrorNoDevice: none")
    assert "impl='cuda' runs nothing: it holds the device query only" in text


def test_info_reports_images(monkeypatch):
    facts = {
        "name": "GPU", "compute_capability": (9, 0), "multiprocessors": 132,
        "memory_bytes": 141 * 2**30, "shared_memory_per_block_bytes": 232448,
    }  # fmt: skip
    devices = [
        {"index": 0, **facts, "image": "sm_90a", "error": None},
        {"index": 1, **facts, "image": None, "error": "cudaErrorNoKernelImageForDevice: none"},
        {"index": 2, "error": "cudaErrorInvalidDevice: gone"},
        {"index": 3, **facts, "image": "sm_80", "error": None},
    ]
    text = _pretend(monkeypatch, devices=devices, error=None)
    assert "cuda:0: GPU, compute 9.0, 132 multiprocessors, 141 GiB, 227 KiB" in text
    devices = dict(line.split("cuda:")[1].split(": ", 1) for line in text.splitlines() if "cuda:" in line)
    assert "loads sm_90a: impl='cuda' runs the scan with its sm_90a kernels" in devices["0"]
    assert "loads no compiled image, so not impl='cuda' (cudaErrorNoKernelImage" in devices["1"]
    assert "loads sm_80: impl='cuda' runs the kernels of sm_80" in devices["3"]
    assert "cuda:2: cudaErrorInvalidDevice: gone" in text
