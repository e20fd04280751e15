"""How Triton kernels are launched on any device, and how their launches are recorded instead.

Every launch of the package goes through `launch`. Under `record` nothing runs: the launches that the
same host code would make, with meta tensors of a model's shape, come back as a list. That is what the
ahead-of-time compilation tests and the time predictions read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

DESCRIPTORS_SINCE = 90
AMD = 80  # pointers and modest tiles: shared memory is 64 KiB there
INTERPRETER = 0  # the architecture of Triton's interpreter


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `arguments` by parameter name, compile-time ones and num_warps included."""

    kernel: triton.runtime.jit.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, object]


@dataclass
class _Recording:
    architecture: int
    launches: list[Launch]


_RECORDING: ContextVar[_Recording | None] = ContextVar("ttt_kernels_triton_recording", default=None)


@contextmanager
def record(architecture: int) -> Iterator[list[Launch]]:
    """Collect launches for a GPU of `architecture` (80, 90, 100) without running them."""
    recording = _Recording(architecture, [])
    token = _RECORDING.set(recording)
    try:
        yield recording.launches
    finally:
        _RECORDING.reset(token)


def interpreted() -> bool:
    """Does Triton run its kernels in Python (TRITON_INTERPRET=1 when it was imported)?"""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> int:
    """10 * major + minor of a GPU's compute capability; INTERPRETER where Triton interprets."""
    recording = _RECORDING.get()
    if recording is not None:
        return recording.architecture
    if interpreted():
        return INTERPRETER
    if torch.version.hip is not None:
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def input_precision(dtype: torch.dtype) -> str:
    """`tl.dot` of float32 is IEEE float32 unless torch's own switch allows TF32, which AMD mostly lacks."""
    allowed = torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    tf32 = allowed and dtype == torch.float32
    return "tf32" if tf32 else "ieee"


def descriptor(x: Tensor, block: tuple[int, int]):
    """A tensor-memory-accelerator view of x [rows, columns], contiguous, read in tiles of `block`; None
    where the GPU (before sm_90) or the sizes (rows of a multiple of 16 bytes) do not allow one.

    Reads past the end of x give zeros.
    """
    bytes_per_row = x.shape[1] * x.element_size()
    if not 0 < x.numel() or len(x) >= 2**31:
        return None
    if architecture(x.device) < DESCRIPTORS_SINCE or bytes_per_row % 16 or x.data_ptr() % 16:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def descriptors(wanted: dict[str, tuple[Tensor, int, int]], whole: bool) -> dict:
    """Launch arguments: descriptors by name, of a tensor and the sides of its tiles (0: not needed, None),
    and DESCRIPTORS; None for all where one cannot be had, or unless `whole`."""
    views = {name: descriptor(x, block) for name, (x, *block) in wanted.items() if whole and 0 not in block}
    usable = whole and None not in views.values()
    return {**dict.fromkeys(wanted), **(views if usable else {}), "DESCRIPTORS": usable}


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """`kernel[grid](**arguments)` on the device of its tensors; an empty grid launches nothing."""
    recording = _RECORDING.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, grid, arguments))
        return
    if 0 in grid:
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    if device.type == "cpu":
        kernel[grid](**arguments)
        return
    with torch.cuda.device(device):
        kernel[grid](**arguments)
