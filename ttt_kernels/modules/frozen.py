"""Requests whose weight is given, read and never written: what `adapt` keeps in a cache for its block.

To the state, everything such a request has seen is one open chunk that nothing completes. So it can
be reordered, repeated and cropped like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from ttt_kernels.modules.layer_state import LayerState, Row, Slot, WriteRecord
from ttt_kernels.modules.row_store import RowStore


class FrozenWeight:
    """Weights [B, D, F] of one layer, readable until `close`: by copies of their state too."""

    def __init__(self, weight: Tensor) -> None:
        self.tensors: tuple[Tensor, ...] = (weight,)

    def close(self) -> None:
        self.tensors = ()

    def __deepcopy__(self, memo: dict) -> FrozenWeight:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("adapted weights cannot be pickled: they end with their adapt() block")


class FrozenSlot(Slot):
    """Request `index` of a `FrozenWeight`."""

    def __init__(self, weight: FrozenWeight, index: int) -> None:
        self.weight, self.index, self.shared = weight, index, True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight.tensors


def frozen_row(weight: FrozenWeight, index: int, position: int, record: WriteRecord) -> Row:
    """A request that has seen `position` tokens, `record` being the write that made its weight."""
    return Row(
        position=position, fill=position, unbroken=position, writes=1,
        weight=FrozenSlot(weight, index), log=[record],
    )  # fmt: skip


def is_frozen(row: Row) -> bool:
    return isinstance(row.weight, FrozenSlot)


def read_frozen(state: LayerState, z: Tensor, w0: Tensor, lengths: Sequence[int]) -> Tensor:
    """y [B, T, D] of the next tokens, each row with its own weight, and the state moved past them.

    Differentiable in z.
    """
    rows = state.rows
    if not all(map(is_frozen, rows)):
        raise ValueError("a batch must not mix requests of adapt() with others")
    if any(not row.weight.tensors for row in rows):
        raise RuntimeError(
            "the cache holds adapted weights of an adapt() block that has ended, and cannot be "
            "continued: open a new block, or start from an empty cache"
        )
    y = RowStore(state, w0, z.dtype).read(range(len(rows)), z)
    state.columns += z.shape[1]
    for row, length in zip(rows, lengths, strict=True):
        row.position += length
        row.fill += length
        row.unbroken = row.unbroken + length if length == z.shape[1] else 0
    return y
