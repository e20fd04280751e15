"""`info()`: what is installed and built, which devices there are, and what `impl="auto"` picks."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from ttt_kernels import __version__, _config, _extension
from ttt_kernels.ops.cuda_launch import compiled_ops, describe_kernels


@dataclass(frozen=True)
class Info:
    """What `info()` found. `str()` of it is a table for people; the fields are for programs.

    Args:
        versions: component -> version, or the reason it is missing in parentheses.
        extension: what was compiled into `ttt_kernels._C`, or why it is not there.
        devices: one line a device. Where there is no GPU, the last line says why.
        auto: device type -> (implementation, reason) of `fast_weight_scan(..., impl="auto")`.
    """

    versions: dict[str, str]
    extension: str
    devices: tuple[str, ...]
    auto: dict[str, tuple[str, str]]

    def __str__(self) -> str:
        rows = list(self.versions.items())
        rows.append(("extension", self.extension))
        rows += [("device", device) for device in self.devices]
        rows += [(f"auto on {kind}", f"{name}: {why}") for kind, (name, why) in self.auto.items()]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def info() -> Info:
    """Versions, build, devices and the automatic choices of this process.

    It asks the CUDA runtime, and so creates a context on each GPU; a machine without a GPU or a
    driver is reported, not an error. Nothing but torch is imported.
    """
    return Info(_versions(), _describe_extension(), _devices(), _automatic_choices())


def _versions() -> dict[str, str]:
    return {
        "ttt_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "transformers": _installed("transformers"),
    }


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"


def _describe_extension() -> str:
    reason = _extension.why_not()
    if reason is not None:
        return reason
    module = _extension.load()
    built = ", ".join(module.cuda_architectures)
    ops = ", ".join(compiled_ops()) or "nothing: it holds the device query only"
    return f"built with CUDA {module.cuda_runtime_version()} for {built}; impl='cuda' runs {ops}"


def _devices() -> tuple[str, ...]:
    cpu = f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    gpus = _compiled_query() if _extension.available() else _torch_query()
    return (cpu, *gpus)


def _compiled_query() -> list[str]:
    found = _extension.load().device_query()
    if found["error"] is not None:
        return [f"no CUDA device: {found['error']}"]
    return [_describe_device(device) for device in found["devices"]] or ["no CUDA device"]


def _describe_device(device: dict) -> str:
    if "name" not in device:
        return f"cuda:{device['index']}: {device['error']}"
    capability = ".".join(map(str, device["compute_capability"]))
    if device["image"]:
        runs = f"loads {device['image']}: impl='cuda' runs {describe_kernels(device['image'])}"
    else:
        runs = f"loads no compiled image, so not impl='cuda' ({device['error']})"
    return (
        f"cuda:{device['index']}: {device['name']}, compute {capability}, "
        f"{device['multiprocessors']} multiprocessors, {device['memory_bytes'] / 2**30:.0f} GiB, "
        f"{device['shared_memory_per_block_bytes'] // 1024} KiB shared memory, {runs}"
    )


def _torch_query() -> list[str]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch finds no GPU or driver" if built else "this torch is built for the CPU only"
        return [f"no CUDA device: {why}"]
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {facts.name}, compute {facts.major}.{facts.minor}, "
            f"{facts.multi_processor_count} multiprocessors, {facts.total_memory / 2**30:.0f} GiB"
        )
    return found


def _automatic_choices() -> dict[str, tuple[str, str]]:
    from ttt_kernels.ops._implementations import choose_implementation

    asked = _config.default_implementation()
    if asked != "auto":
        choice = (asked, "set by TTT_KERNELS_IMPL in the environment")
        return {"cpu": choice, "cuda": choice}
    return {kind: choose_implementation(kind) for kind in ("cpu", "cuda")}
