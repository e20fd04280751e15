"""Exclusive prefix sums over the ranks of a group, several in flight at once.

torch.distributed has no scan. With x cut into R slices: an all_to_all gives rank j slice j of everybody's
x, rank j sums over the ranks, and a second all_to_all brings the sums back. Each rank sends and receives
2 |x| (R - 1) / R bytes in two steps; gathering everything takes (R - 1) |x| in one, a ring |x| in R - 1
steps one after another.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class PrefixSums:
    """For each tensor given to `push`, in order: the sum of those of the ranks before this one.

    With `reverse`: of the ranks after it. All ranks push tensors of the same shapes, which must not be
    modified before `results`. The work done between pushes, and between results, overlaps the communication.
    """

    def __init__(self, group: dist.ProcessGroup, reverse: bool) -> None:
        self.group, self.reverse = group, reverse
        self.sums: list[_PrefixSum] = []

    def push(self, x: Tensor) -> None:
        if self.sums:
            self.sums[-1].sum_over_ranks()
        self.sums.append(_PrefixSum(x, self.group, self.reverse))

    def results(self) -> Iterator[Tensor]:
        """In the order of `push`, each waited for when it is asked for."""
        for n, entry in enumerate(self.sums):
            if n == min(1, len(self.sums) - 1):  # later, so that what follows the first overlaps it
                self.sums[-1].sum_over_ranks()
            yield entry.wait()


class _PrefixSum:
    def __init__(self, x: Tensor, group: dist.ProcessGroup, reverse: bool) -> None:
        self.group, self.shape = group, x.shape
        ranks, me = dist.get_world_size(group), dist.get_rank(group)
        self.order = range(ranks)[::-1] if reverse else range(ranks)
        self.source = x.contiguous().view(-1)
        self.sizes = [len(part) for part in self.source.tensor_split(ranks)]
        self.mine = [self.sizes[me]] * ranks
        self.parts = self.source.new_empty(ranks, self.sizes[me])
        self.work = self._all_to_all(self.parts.view(-1), self.source, self.mine, self.sizes)

    def sum_over_ranks(self) -> None:
        """Between the two exchanges. Sums in rank order, as one process would."""
        self.work.wait()
        before = torch.zeros_like(self.parts)
        for rank, after in zip(self.order, self.order[1:], strict=False):
            torch.add(before[rank], self.parts[rank], out=before[after])
        self.parts, self.source = before, torch.empty_like(self.source)
        self.work = self._all_to_all(self.source, before.view(-1), self.sizes, self.mine)

    def wait(self) -> Tensor:
        self.work.wait()
        return self.source.view(self.shape)

    def _all_to_all(self, output: Tensor, source: Tensor, take: list[int], give: list[int]) -> dist.Work:
        return dist.all_to_all_single(output, source, take, give, group=self.group, async_op=True)
