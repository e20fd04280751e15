"""How an implementation becomes a torch op.

`define`/`impl` + `register_fake`, called from a `torch.autograd.Function`: cheaper at the boundary
than `custom_op` and right under `torch.func.grad`, where `register_autograd` is not. The ops made
here have no autograd kernel: they are private, and only the Functions call them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = "ttt_kernels"


def register_op(schema: str, implementation: Callable, fake: Callable):
    """Define `ttt_kernels::<schema>` and return its overload, ready to call."""
    name = f"{NAMESPACE}::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "CompositeExplicitAutograd")(without_autocast(implementation))
    torch.library.register_fake(name)(fake)
    return getattr(getattr(torch.ops, NAMESPACE), name.rpartition(":")[2]).default


def without_autocast(function: Callable) -> Callable:
    """Operands were cast where the op was called; the float32 products inside stay float32."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call
