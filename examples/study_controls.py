"""What the study compares fast weights with."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import ttt_kernels as ttt
from ttt_kernels.modules.mlp import FastWeightMLP, step_sizes
from ttt_kernels.modules.rule import WriteRule


@contextmanager
def read_from_donor(mlps: list[FastWeightMLP]) -> Iterator[None]:
    """Inside, row 0 of a batch of two reads the fast weights that row 1 writes.

    At every position row 0 sees as many writes as it would have made itself; only whose they are
    changes. With two equal rows nothing does.
    """
    before = [mlp.read_write for mlp in mlps]
    try:
        for mlp in mlps:
            mlp.read_write = donor_scan
        yield
    finally:
        for mlp, own in zip(mlps, before, strict=True):
            mlp.read_write = own


def donor_scan(z: Tensor, v: Tensor, w0: Tensor, *, rule: WriteRule, cu_seqlens: None) -> Tensor:
    """Chunk by chunk: both rows read row 1's state, and only row 1 writes it."""
    sizes = step_sizes(rule, z, v, cu_seqlens)
    writes = torch.stack([torch.zeros_like(v[1]), v[1]])
    state, read = None, []
    for n, start in enumerate(range(0, z.shape[1], rule.chunk_size)):
        t = slice(start, start + rule.chunk_size)
        y, state = ttt.fast_weight_scan(
            z[:, t], writes[:, t], w0, chunk_size=rule.chunk_size, state=state, return_state=True,
            step_size=sizes[:, n : n + 1] if isinstance(sizes, Tensor) else sizes,
            preserve_row_norm=rule.preserve_row_norm,
        )  # fmt: skip
        state = state[1:].repeat(2, 1, 1)
        read.append(y)
    return torch.cat(read, 1)


def shuffled(ids: Tensor, chunk: int, seed: int) -> Tensor:
    """The tokens of every chunk in random order: the same words, without what they say."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in ids.split(chunk)])


class LowRank(nn.Module):
    """W0 + B A, with B zero at first."""

    def __init__(self, rows: int, columns: int, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def add_static(model: nn.Module, layers: list[int], seed: int) -> list[nn.Parameter]:
    """A trainable update of the same down-projections that no document changes, with as many parameters
    as a projection P [D, D] has."""
    added = []
    for i in layers:
        linear = model.model.layers[i].mlp.down_proj
        rows, columns = linear.weight.shape
        update = LowRank(rows, columns, rows * rows // (rows + columns), seed + i)
        parametrize.register_parametrization(linear, "weight", update)
        added += update.parameters()
    return added


CITIES = "Paris London Cairo Tokyo Lima Oslo Rome Delhi Quito Dakar Seoul Hanoi".split()


def needle(filler: list[int], encode, length: int, depth: float, seed: int) -> tuple[Tensor, int]:
    """A text of `length` tokens that says a number at `depth` (0 to 1) and asks for it at the end.

    Returns:
        The tokens, and how many of the last ones are the answer.
    """
    rng = random.Random(seed)
    city, number = rng.choice(CITIES), " ".join(rng.choice("0123456789") for _ in range(6))
    fact = encode(f"\n\nThe secret number of {city} is {number}.\n\n")
    question, answer = encode(f"\n\nThe secret number of {city} is"), encode(f" {number}")
    room = length - len(fact) - len(question) - len(answer)
    place = int(depth * room)
    ids = [*filler[:place], *fact, *filler[place:room], *question, *answer]
    return torch.tensor(ids), len(answer)
