"""What the target ops accept."""

from __future__ import annotations

from torch import Tensor

from ttt_kernels.ops import _checks as check


def check_source(name: str, value: Tensor) -> None:
    check.check_tensor(name, value, "[B, T, D]")
    check.check_float(name, value)


def check_proj_rank(proj: object) -> None:
    if proj is not None:
        check.check_tensor("proj", proj, "[D, D]")


def check_proj(proj: Tensor | None, name: str, source: Tensor) -> None:
    """`proj` is used as stored, v = x @ proj: square, no transpose."""
    if proj is not None:
        d = source.shape[2]
        check.check_like("proj", proj, "[D, D]", (d, d), name, source)


def check_conv(conv_weight: object, source: Tensor) -> None:
    check.check_tensor("conv_weight", conv_weight, "[D, 1, KW]")
    d, taps = source.shape[2], conv_weight.shape[2]
    check.check_like("conv_weight", conv_weight, "[D, 1, KW]", (d, 1, taps), "u", source)
    if taps % 2 == 0:
        raise ValueError(f"conv_weight must have an odd number of taps KW, got {taps}")
