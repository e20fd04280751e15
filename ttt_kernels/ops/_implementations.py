"""Which implementation runs: what `impl="auto"` means, and why an explicit choice cannot run."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ttt_kernels import _config
from ttt_kernels.ops.cuda_launch import why_not_cuda

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_CAPABILITY = (8, 0)


def choose_implementation(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16
) -> tuple[str, str]:
    """What `impl="auto"` means on a device for operands of a dtype, and why."""
    if torch.device(device).type == "cpu":
        return "eager", "library GEMMs on one float32 state are the CPU implementation"
    why_not = why_not_triton(torch.device(device), dtype)
    if why_not is None:
        return "triton", "fused kernels, compiled by Triton when first used"
    return "eager", f"it runs on any device; not triton: {why_not}"


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take operands of `dtype` on `device`; None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu":
        return _why_not_interpreter(dtype)
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"there is no GPU that Triton can use as device {device.type!r}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < TRITON_CAPABILITY:
        return f"its kernels need compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    return _why_not_interpreter(dtype) if _interpreted() else None


def _interpreted() -> bool:
    from ttt_kernels.ops.triton_launch import interpreted

    return interpreted()


def _why_not_interpreter(dtype: torch.dtype) -> str | None:
    if not _interpreted():
        return "it needs a GPU (on a CPU only its interpreter runs: TRITON_INTERPRET=1, for tests)"
    if dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly; it takes float32 and float16"
    return None


def requested_implementation(impl: str) -> str:
    """`impl` checked, and "auto" replaced by what TTT_KERNELS_IMPL says. For the public functions."""
    if impl not in _config.IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(_config.IMPLEMENTATIONS)}, got {impl!r}")
    return _config.default_implementation() if impl == "auto" else impl


def resolve_implementation(impl: str, operand: Tensor, op: str) -> str:
    """The implementation of a requested one that runs `op` on tensors like `operand`. An explicit one
    never falls back. For the body of a registered op, where a compiler does not look."""
    if impl == "auto":
        impl, _ = choose_implementation(operand.device, operand.dtype)
    if impl == "triton":
        why_not = why_not_triton(operand.device, operand.dtype)
        if why_not is not None:
            raise NotImplementedError(f"impl='triton' cannot run {op} here: {why_not}")
    if impl == "cuda":
        why_not = why_not_cuda(operand.device, operand.dtype)
        if why_not is not None:
            raise NotImplementedError(f"impl='cuda' cannot run {op} here: {why_not}")
    return impl
