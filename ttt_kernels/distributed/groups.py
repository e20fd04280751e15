"""Who takes part, and refusing together: an error on one rank alone would leave the others waiting."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def process_group(group: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
    """The process group that `group` names; this process must be in it."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                "group must be a process group or a mesh of one dimension (mesh['name'] takes one of "
                f"several), got a mesh of {group.ndim}"
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}"
        )
    return group


def agree(
    group: dist.ProcessGroup, tokens: int, facts: dict[str, object], problem: Exception | None
) -> list[int]:
    """The tokens of every rank, where all ranks are ready to go on with equal `facts`.

    One small collective, on the host. A `problem` on any rank, or facts that differ, raise on all.
    """
    answers: list = [None] * dist.get_world_size(group)
    complaint = None if problem is None else f"{type(problem).__name__}: {problem}"
    dist.all_gather_object(answers, (complaint, tokens, facts), group=group)
    if problem is not None:
        raise problem
    for rank, (complaint, _, _) in enumerate(answers):
        if complaint is not None:
            raise ValueError(f"rank {rank} of the group refused its arguments: {complaint}")
    for name in facts:
        values = [theirs.get(name) for *_, theirs in answers]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} must be the same on all ranks of the group, got {values}")
    return [count for _, count, _ in answers]


def check_lengths(lengths: list[int], chunk_size: int) -> None:
    """Chunks must not be cut: only the last rank with tokens may end inside one."""
    for rank, count in enumerate(lengths):
        if count % chunk_size and any(lengths[rank + 1 :]):
            raise ValueError(
                f"every rank but the last must hold a multiple of chunk_size = {chunk_size} tokens, "
                f"got {lengths}"
            )
