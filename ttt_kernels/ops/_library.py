"""How an implementation becomes a torch op.

`define`/`impl` + `register_fake`, called from a `torch.autograd.Function`: cheaper at the boundary
than `custom_op` and right under `torch.func.grad`, where `register_autograd` is not. The ops made
here have no autograd kernel: they are private, and only the Functions call them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "ttt_kernels"


def register_op(schema: str, implementation: Callable, fake: Callable):
    """Define `ttt_kernels::<schema>` and return its overload, ready to call."""
    name = f"{NAMESPACE}::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "CompositeExplicitAutograd")(implementation)
    torch.library.register_fake(name)(fake)
    return getattr(getattr(torch.ops, NAMESPACE), name.rpartition(":")[2]).default
