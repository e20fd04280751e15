"""Recognising what torch.distributed has split, without importing it: that takes long."""

from __future__ import annotations


def is_sharded(weight: object) -> bool:
    """Whether it is a DTensor."""
    return hasattr(weight, "device_mesh")


def is_fsdp_module(module: object) -> bool:
    """Whether `fully_shard` was applied to it: it gathers its parameters for the time of its own calls."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
