"""What `ridge_write` accepts."""

from __future__ import annotations

from collections.abc import Sequence

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
