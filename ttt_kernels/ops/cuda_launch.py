"""How the compiled CUDA C++ kernels are called: what of a tensor crosses the border, and which kernels run.

The border is `ttt_kernels._C`: addresses, sizes, strides and the stream as integers (csrc/README.md). In
the emulated build of it (csrc/emulation, for tests) the same calls run on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ttt_kernels import _extension

DTYPES = (torch.bfloat16, torch.float16)
WIDTH = 8  # features come in pieces of 16 bytes
SM80, SM90 = 80, 90
HOPPER_IMAGE = "sm_90a"  # where a device loads it, the kernels made for it run there
# Public op -> the binding that says whether it was compiled.
OPS = {
    "fast_weight_scan": "scan_forward",
    "fast_weight_apply": "step_apply",
    "fast_weight_update_": "step_update",
    "spectral_step_size": "step_size",
    "clipped_step_size": "step_size",
}
_asked: dict[str, int | None] = {"path": None}
_images: dict[int, dict] = {}


@contextmanager
def use_path(path: int) -> Iterator[None]:
    """Make the scan take the kernels of Ampere (80) or Hopper (90) in this process for a while: for
    benchmarks, and for tests of both where one device runs both. No context variable: backwards run in
    autograd's threads."""
    if path not in (SM80, SM90):
        raise ValueError(f"path must be {SM80} or {SM90}, got {path!r}")
    before, _asked["path"] = _asked["path"], path
    try:
        yield
    finally:
        _asked["path"] = before


def _device(index: int) -> dict:
    """What the extension says of a GPU. It has to make a context for it, and so is asked once, or again
    where it found no image it could run: that may have been for want of memory."""
    if _images.get(index, {}).get("image") is None:
        _images[index] = _extension.load().describe_device(index)
    return _images[index]


def why_not_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot take operands of `dtype` on `device`; None where they can."""
    if dtype not in DTYPES:
        return f"its kernels take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    reason = _extension.why_not()
    if reason is not None:
        return f"ttt_kernels._C: {reason}"
    module = _extension.load()
    if module.emulated:
        return None if device.type == "cpu" else "this extension is emulated: it takes CPU tensors"
    if device.type != "cuda":
        return f"its kernels need a CUDA device, got tensors on {device.type!r}"
    facts = _device(_index(device))
    if facts.get("image") is None:
        built = " ".join(module.cuda_architectures)
        return f"the GPU loads none of what was compiled ({built}): {facts['error']}"
    return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def kernel_path(device: torch.device) -> int:
    """The kernels that run there: those of Hopper where the device loads the image made for it."""
    asked = _asked["path"]
    if _extension.load().emulated:
        return asked or SM80
    hopper = _device(_index(device))["image"] == HOPPER_IMAGE
    if asked == SM90 and not hopper:
        raise NotImplementedError(
            f"path {SM90} needs a GPU that runs the image {HOPPER_IMAGE}; ttt.info() names them"
        )
    return asked or (SM90 if hopper else SM80)


def compiled_ops() -> list[str]:
    """The public ops that the extension, which must be there, holds."""
    module = _extension.load()
    return [op for op, binding in OPS.items() if hasattr(module, binding)]


def describe_kernels(image: str) -> str:
    """Which kernels `impl="cuda"` runs on a device that loads this image."""
    if image == HOPPER_IMAGE:
        return "the scan with its sm_90a kernels (TMA, wgmma), the rest with those of sm_80"
    return "the kernels of sm_80 (cp.async, mma.sync)"


def place(operand: Tensor) -> dict:
    """Where a call runs, and the type of its operands."""
    where = {"device": 0, "stream": 0, "bfloat16": operand.dtype == torch.bfloat16}
    if operand.is_cuda:
        where["device"] = operand.get_device()
        where["stream"] = torch.cuda.current_stream(operand.device).cuda_stream
    return where


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it does not begin at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def check_widths(op: str, name: str, d: int, f: int) -> None:
    if d % WIDTH or f % WIDTH:
        raise NotImplementedError(
            f"impl='cuda' cannot run {op} here: {name} must have D and F that are multiples of {WIDTH}, "
            f"got D = {d}, F = {f}"
        )
