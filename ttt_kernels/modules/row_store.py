"""`RowStore`: where the weights and open chunks of the rows lie, and reading and writing them there.

Rows whose tensors lie together are read, kept and written together; which ones do is found anew in
every call, because rows are reordered, copied and dropped in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from ttt_kernels.modules.layer_state import LayerState, Row, slots_of
from ttt_kernels.ops._row_norm import row_scale, square_norm
from ttt_kernels.ops.step.api import fast_weight_apply, fast_weight_update_
from ttt_kernels.types import NORM_FLOOR, compute_dtype


class RowStore:
    """The rows of one layer's state during a call. Methods take row numbers `rows` and their tokens,
    in the same order.

    Args:
        state: the layer's.
        w0: slow weight [D, F], in any dtype.
        dtype: of the call's keys.
    """

    def __init__(self, state: LayerState, w0: Tensor, dtype: torch.dtype) -> None:
        self.state, self.stored, self.dtype = state, w0, dtype
        self.rule = state.signature.rule
        self.acc = compute_dtype(dtype)

    @cached_property
    def w0(self) -> Tensor:
        """W0 in the dtype of the call: once, and only where it is used."""
        return self.stored.to(self.dtype)

    @property
    def slow(self) -> Tensor:
        """W0 as the weight of a row that has not been written, [D, F] in the state's precision."""
        return self.w0.to(self.acc)

    # --- reading ----------------------------------------------------------------------------------
    def read(self, rows: Sequence[int], z: Tensor) -> Tensor:
        """Each row with its own weight; one launch for the rows whose weights lie together."""
        groups = self.blocks(rows)
        if len(groups) == 1:
            return self._read_block(*groups[0], z)
        y = z.new_empty(*z.shape[:2], len(self.w0))
        for tensors, places, members in groups:
            index = _index(members, z.device)
            y[index] = self._read_block(tensors, places, members, z[index])
        return y

    def _read_block(self, tensors, places, members, z: Tensor) -> Tensor:
        if tensors is None:
            y = functional.linear(z, self.w0)
            scale = self._slow_scale()
            return y if scale is None else (y * scale).to(y.dtype)
        weight, scale, slots = _choose(tensors, places)
        return fast_weight_apply(z, weight, row_scale=scale, slots=slots)

    def blocks(self, rows: Sequence[int]) -> list[tuple]:
        """(tensors or None for W0, places in them, members of `rows`), by where the weights lie."""
        groups: dict[int, tuple] = {}
        for n, b in enumerate(rows):
            row = self.state.rows[b]
            tensors = row.weight.tensors if row.writes else None
            key = 0 if tensors is None else tensors[0].data_ptr()
            _, places, members = groups.setdefault(key, (tensors, [], []))
            places.append(row.weight.index if row.writes else 0)
            members.append(n)
        return list(groups.values())

    def weights(self, rows: Sequence[int]) -> Tensor | None:
        """Weights [n, D, F] to start a scan from; None where every row still reads W0."""
        groups = self.blocks(rows)
        if len(groups) == 1:
            tensors, places, _ = groups[0]
            if tensors is None:
                return None
            weight, _, slots = _choose(tensors, places)
            return weight if slots is None else weight[slots]
        slow = self.slow
        rows = [self.state.rows[b] for b in rows]
        return torch.stack([row.weight[0] if row.writes else slow for row in rows])

    # --- keeping ----------------------------------------------------------------------------------
    def open_chunks(self, z: Tensor, u: Tensor) -> None:
        """A place for every row's open chunk, all together where none has one."""
        missing = [row for row in self.state.rows if row.chunk is None]
        size = self.rule.chunk_size
        if missing:
            buffers = (t.new_empty(len(missing), size, t.shape[2]) for t in (z, u))
            for row, slot in zip(missing, slots_of(*buffers), strict=True):
                row.chunk = slot
        for row in self.state.rows:
            if row.chunk.tensors[0].dtype != z.dtype:
                if row.fill:
                    raise ValueError(
                        f"the open chunk holds {row.chunk.tensors[0].dtype} keys and the call must "
                        f"bring the same, got {z.dtype}: keep autocast as it was"
                    )
                row.chunk = slots_of(*(t.new_empty(1, size, t.shape[2]) for t in (z, u)))[0]

    def keep(self, rows: Sequence[int], z: Tensor, u: Tensor) -> None:
        self._own_chunks(rows)
        groups = defaultdict(list)
        for n, b in enumerate(rows):
            row = self.state.rows[b]
            groups[row.chunk.tensors[0].data_ptr(), row.fill].append(n)
        for (_, fill), members in groups.items():
            slots = [self.state.rows[rows[n]].chunk for n in members]
            places = _places([slot.index for slot in slots], z.device)
            for buffer, tokens in zip(slots[0].tensors, (z, u), strict=True):
                tokens = tokens if len(members) == len(rows) else tokens[_index(members, z.device)]
                buffer[places, fill : fill + z.shape[1]] = tokens
        for b in rows:
            self.state.rows[b].fill += z.shape[1]
            self.state.rows[b].position += z.shape[1]

    def _own_chunks(self, rows: Sequence[int]) -> None:
        """Before writing to open chunks: copy those that somebody else may still read."""
        shared = [self.state.rows[b] for b in rows if self.state.rows[b].chunk.shared]
        if not shared:
            return
        new = [t.new_empty(len(shared), *t.shape[1:]) for t in shared[0].chunk.tensors]
        for row, slot in zip(shared, slots_of(*new), strict=True):
            for part in (0, 1):
                slot[part][: row.fill] = row.chunk[part][: row.fill]
            row.chunk = slot

    # --- writing ----------------------------------------------------------------------------------
    def write(self, rows: Sequence[int], keys: Tensor, v: Tensor, steps: Tensor) -> None:
        self.own_weights(rows)
        for tensors, places, members in self.blocks(rows):
            weight, _, slots = _choose(tensors, places)
            picked = pick(members, keys, v, steps) if len(members) < len(rows) else (keys, v, steps)
            fast_weight_update_(weight, *picked[:2], step_size=picked[2], slots=slots)
            if self.rule.preserve_row_norm:
                index = slice(places[0], places[-1] + 1) if slots is None else slots
                tensors[1][index] = self._row_scale(weight if slots is None else weight[slots])

    def own_weights(self, rows: Sequence[int]) -> None:
        """Weights that may be written in place, for every row; counts the write that follows."""
        members = [self.state.rows[b] for b in rows]
        lone = [row for row in members if row.weight is None or row.weight.shared]
        old = [row.weight if row.writes else None for row in lone]
        self._allot(lone)
        for row, source in zip(lone, old, strict=True):
            row.weight[0].copy_(self.w0 if source is None else source[0])
        for row in members:
            if row.writes == 0 and row not in lone:  # reserved, not yet filled
                row.weight[0].copy_(self.w0)
            row.writes += 1

    def reserve(self, rows: Sequence[int]) -> None:
        """One block for the weights of all rows that will be written first in this call."""
        self._allot([self.state.rows[b] for b in rows if self.state.rows[b].writes == 0])

    def _allot(self, members: list[Row]) -> None:
        if members:
            shape = (len(members), *self.w0.shape)
            new = [self.w0.new_empty(shape, dtype=self.acc)]
            if self.rule.preserve_row_norm:
                new.append(self.w0.new_empty(shape[:2], dtype=self.acc))
            for row, slot in zip(members, slots_of(*new), strict=True):
                row.weight = slot

    def adopt(self, rows: Sequence[int], weight: Tensor) -> None:
        """`weight` [n, D, F] becomes the weights of `rows`: in their places, or as their place."""
        members = [self.state.rows[b] for b in rows]
        scale = [self._row_scale(weight)] if self.rule.preserve_row_norm else []
        everyone = len(rows) == len(self.state.rows)
        if everyone or any(row.weight is None or row.weight.shared for row in members):
            for row, slot in zip(members, slots_of(weight, *scale), strict=True):
                row.weight = slot
            return
        for n, row in enumerate(members):
            for part, value in enumerate((weight, *scale)):
                row.weight[part].copy_(value[n])

    # --- row norms --------------------------------------------------------------------------------
    def _slow_norms(self) -> tuple[Tensor, Tensor | None]:
        """||W0||^2 per row [D], and the scale at which W0 itself is read if that is not 1 (rows
        shorter than the floor)."""
        if self.state.norms is None:
            squares = square_norm(self.slow)
            short = bool((squares < NORM_FLOOR**2).any())
            scale = row_scale(squares, squares) if short else None
            self.state.norms = squares, scale
        return self.state.norms

    def _slow_scale(self) -> Tensor | None:
        return self._slow_norms()[1] if self.rule.preserve_row_norm else None

    def _row_scale(self, weight: Tensor) -> Tensor:
        """[n, D]: ||w0|| / max(||W||, floor)."""
        return row_scale(self._slow_norms()[0], square_norm(weight))


def _choose(tensors: tuple[Tensor, ...], places: list[int]) -> tuple:
    """(weight, scale or None, slots or None): a view where the places are consecutive."""
    found = _places(places, tensors[0].device)
    weight, scale = tensors if len(tensors) == 2 else (tensors[0], None)
    if isinstance(found, slice):
        return weight[found], None if scale is None else scale[found], None
    return weight, scale, found


def _places(places: list[int], device: torch.device) -> slice | Tensor:
    start = places[0]
    consecutive = places == list(range(start, start + len(places)))
    return slice(start, start + len(places)) if consecutive else _index(places, device)


def _index(places: list[int], device: torch.device) -> Tensor:
    """int64 on the device, where the host does not wait for it as it does when a list is the index."""
    return torch.tensor(places).to(device, non_blocking=True)


def pick(members: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t[members] for t in tensors)
