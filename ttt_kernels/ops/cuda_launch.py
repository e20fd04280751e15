"""How the compiled CUDA C++ kernels are called: what of a tensor crosses the border, and which kernels run.

The border is `ttt_kernels._C`: addresses, sizes, strides and the stream as integers (csrc/README.md). In
the emulated build of it (csrc/emulation, for tests) the same calls run on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from ttt_kernels import _extension

DTYPES = (torch.bfloat16, torch.float16)
WIDTH = 8  # features come in pieces of 16 bytes
SM80, SM90 = 80, 90
_PATH: ContextVar[int | None] = ContextVar("ttt_kernels_cuda_path", default=None)


@contextmanager
def use_path(path: int) -> Iterator[None]:
    """Make the scan take the kernels of Ampere (80) or Hopper (90) in this context: for benchmarks, and for
    tests of both where one device runs both."""
    if path not in (SM80, SM90):
        raise ValueError(f"path must be {SM80} or {SM90}, got {path!r}")
    token = _PATH.set(path)
    try:
        yield
    finally:
        _PATH.reset(token)


@cache
def _device(index: int) -> dict:
    """What the extension says of a GPU, once: a context has to be made for it."""
    return next(d for d in _extension.load().device_query()["devices"] if d["index"] == index)


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
    asked = _PATH.get()
    if _extension.load().emulated:
        return asked or SM80
    hopper = _device(_index(device))["image"] == "sm_90a"
    if asked == SM90 and not hopper:
        raise NotImplementedError("path 90 needs a GPU that runs the image sm_90a; ttt.info() names them")
    return asked or (SM90 if hopper else SM80)


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
