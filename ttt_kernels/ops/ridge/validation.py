"""What `ridge_write` accepts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels.ops import _checks as check


def prompts(name: str, value: object, letter: str) -> tuple[Tensor, ...]:
    """The prompts of a batch [B, T, .], or of a sequence of tensors [T_b, .]."""
    if isinstance(value, Tensor):
        check.check_tensor(name, value, f"[B, T, {letter}]")
        check.check_float(name, value)
        return value.unbind(0)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(
            f"{name} must be a tensor [B, T, {letter}] or a sequence of tensors [T_b, {letter}], "
            f"got {type(value).__name__}"
        )
    for b, prompt in enumerate(value):
        check.check_tensor(f"{name}[{b}]", prompt, f"[T_b, {letter}]")
        check.check_float(f"{name}[{b}]", prompt)
    return tuple(value)


def check_weights(w0: object, proj: object) -> None:
    check.check_tensor("w0", w0, "[D, F]")
    check.check_float("w0", w0)
    if proj is None:
        return
    check.check_tensor("proj", proj, "[D, D]")
    check.check_float("proj", proj)
    d = w0.shape[0]
    check.check_like("proj", proj, "[D, D]", (d, d), "w0", proj)
    check.check_device("proj", proj, "w0", w0)


def check_prompts(z: Sequence[Tensor], x: Sequence[Tensor], w0: Tensor) -> None:
    """Every prompt has tokens of the widths of w0, and x as many as z."""
    if len(x) != len(z):
        raise ValueError(f"x must have as many prompts as z, {len(z)}, got {len(x)}")
    d, f = w0.shape
    for b, (keys, source) in enumerate(zip(z, x, strict=True)):
        names = {f"z[{b}]": (keys, (len(keys), f), "F"), f"x[{b}]": (source, (len(keys), d), "D")}
        for name, (value, shape, letter) in names.items():
            like = "w0" if letter == "F" else f"z[{b}] and w0"
            check.check_like(name, value, f"[T_b, {letter}]", shape, like, value)
            check.check_device(name, value, "w0", w0)


def check_outputs(y: Sequence[Tensor], x: Sequence[Tensor], w0: Tensor, acc: torch.dtype) -> None:
    """As many tokens as x. Rounded to fewer bits they would round the residual, so that is refused."""
    if len(y) != len(x):
        raise ValueError(f"y must have as many prompts as z, {len(x)}, got {len(y)}")
    for b, (plain, source) in enumerate(zip(y, x, strict=True)):
        check.check_like(f"y[{b}]", plain, "[T_b, D]", tuple(source.shape), f"x[{b}]", plain)
        check.check_device(f"y[{b}]", plain, "w0", w0)
        if plain.dtype != acc:
            wanted, got = check.dtype_name(acc), check.dtype_name(plain.dtype)
            raise TypeError(f"y[{b}] must be {wanted}, the compute precision, got {got}")
