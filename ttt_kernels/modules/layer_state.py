"""`LayerState`: what one patched layer remembers of each request between calls.

A request's memory is a `Row`: its fast weight, the tokens of its open chunk, counters. Rows are cheap
to copy because they point into tensors (`Slot`): whoever wants to write to a slot that somebody else
may still read copies it first. Reordering beams, snapshots and clones cost nothing until the next
write.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from weakref import ref

import torch
from torch import Tensor, nn

from ttt_kernels.modules.rule import WriteRule
from ttt_kernels.types import ceil_div

UNDO_TOKENS = 32  # while recording, chunk boundaries this close behind can be undone; at least one


@dataclass(frozen=True, eq=False)
class LayerSignature:
    """What a layer's state belongs to: the rule, the shape [D, F] and a few values of W0 (empty where
    they are not at hand)."""

    rule: WriteRule
    shape: tuple[int, int]
    sample: Tensor

    def difference(self, other: LayerSignature, where: str = "the model") -> str | None:
        """What differs, in words ("chunk_size: 8 in the state, 16 in the model")."""
        mine, theirs = asdict(self.rule), asdict(other.rule)
        mine["shape"], theirs["shape"] = tuple(self.shape), tuple(other.shape)
        for name in mine:
            if mine[name] != theirs[name]:
                return f"{name}: {mine[name]!r} in the state, {theirs[name]!r} in {where}"
        known = len(self.sample) and len(other.sample)
        if known and not torch.equal(self.sample, other.sample):
            return "the values of down_proj.weight: other slow weights of the same shape"
        return None


@dataclass(eq=False)
class Slot:
    """Place `index` in tensors [N, ...]. `shared`: someone else may read it too, so never write."""

    tensors: tuple[Tensor, ...]
    index: int
    shared: bool = False

    def __getitem__(self, part: int) -> Tensor:
        return self.tensors[part][self.index]


def undo_depth(chunk_size: int) -> int:
    """Chunk boundaries that `record_past` keeps."""
    return max(1, ceil_div(UNDO_TOKENS, chunk_size))


def slots_of(*tensors: Tensor) -> list[Slot]:
    return [Slot(tensors, i) for i in range(len(tensors[0]))]


@dataclass(frozen=True)
class WriteRecord:
    """One complete chunk, recorded with `LayerState.record_writes`.

    Args:
        position: tokens of the request up to the end of the chunk.
        step_size: s.
        relative_write: ||s dW|| / ||W|| with W before the write.
        drift: ||W - W0|| / ||W0|| after it.
        refused: whether it was left out because it was not finite.
    """

    position: int
    step_size: float
    relative_write: float
    drift: float
    refused: bool


@dataclass(eq=False)
class Row:
    """One request in one layer.

    Args:
        position: tokens seen, padding excluded.
        fill: of which in the open chunk.
        writes, refused: complete chunks written, and left out because they were not finite.
        unbroken: how many of the latest batch columns were tokens of this request.
        weight: (W [D, F], with row-norm preservation its row scale [D]); None while writes == 0,
            when the request reads W0.
        chunk: (keys [C, F], target inputs [C, D]) of the open chunk, the first `fill` valid.
        log: with `record_writes`.
        undo: with `record_past`, this row as it was just before its latest writes.
    """

    position: int = 0
    fill: int = 0
    writes: int = 0
    refused: int = 0
    unbroken: int = 0
    weight: Slot | None = None
    chunk: Slot | None = None
    log: list[WriteRecord] = field(default_factory=list)
    undo: tuple[Row, ...] = ()

    def share(self) -> Row:
        """A copy that sees the same tensors; both copy them before they write."""
        for slot in (self.weight, self.chunk):
            if slot is not None:
                slot.shared = True
        return replace(self, log=list(self.log))

    def without(self, count: int, chunk_size: int) -> Row:
        """This row before its latest `count` tokens."""
        if count == 0:
            return self
        if count > self.unbroken:
            raise RuntimeError(
                f"cannot remove {count} tokens: padding lies among them, or the request has only "
                f"{self.unbroken} since; restore a snapshot instead"
            )
        kept, undo = self, list(self.undo)
        while kept.position - kept.fill > self.position - count:
            if not undo:
                raise RuntimeError(
                    f"cannot remove {count} tokens: they reach behind a chunk boundary, where the "
                    f"fast weight was written, and only {kept.fill} tokens of the open chunk can "
                    "be dropped. Restore a snapshot, or call activate_past_recording() on the "
                    "cache first"
                )
            kept = undo.pop()
        back = kept.share()
        back.fill -= kept.position - (self.position - count)
        back.position, back.unbroken = self.position - count, self.unbroken - count
        back.undo = tuple(undo)
        return back

    def remember(self, chunk_size: int) -> None:
        """Keep what this row is now, its chunk full and unwritten, to come back to."""
        weight = self.weight if self.writes else None
        before = replace(self.share(), weight=weight, undo=())
        self.undo = (*self.undo, before)[-undo_depth(chunk_size) :]


class LayerState:
    """The rows of one layer; None of them before the first call."""

    def __init__(self, signature: LayerSignature) -> None:
        self.signature = signature
        self.rows: list[Row] = []
        self.columns = 0  # batch columns seen, padding included: the length of the key/value cache
        self.record_past = False
        self.record_writes = False
        self.norms: tuple[Tensor, Tensor | None] | None = None  # of W0, see streaming.slow_norms
        self._owner: tuple[ref, WriteRule] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_owner": None}  # elsewhere, layers are compared anew

    def belongs_to(self, mlp: nn.Module) -> bool:
        """Whether this has been compared with `mlp`, as it writes now: cheap enough for every call."""
        return self._owner is not None and self._owner[0]() is mlp and self._owner[1] is mlp.rule

    def give_to(self, mlp: nn.Module) -> None:
        """Note that this matches `mlp`."""
        self._owner = ref(mlp), mlp.rule

    def open(self, batch: int) -> None:
        """Rows for the first call; later calls must bring as many."""
        if not self.rows:
            self.rows = [Row() for _ in range(batch)]
        if len(self.rows) != batch:
            raise ValueError(
                f"the state holds {len(self.rows)} requests and the call must bring as many, "
                f"got a batch of {batch}"
            )

    def select(self, indices: Iterable[int]) -> None:
        """Row n becomes what row `indices[n]` was; rows may repeat or disappear."""
        indices = [i % len(self.rows) for i in indices] if self.rows else []
        self.rows = [self.rows[i].share() if n else self.rows[i] for i, n in _repeats(indices)]

    def crop(self, count: int) -> None:
        """Forget the latest `count` batch columns of every row: all rows, or an error and none."""
        self.rows = self.cropped(count)
        self.columns -= count

    def cropped(self, count: int) -> list[Row]:
        """The rows that `crop` leaves; nothing is changed yet."""
        chunk_size = self.signature.rule.chunk_size
        return [row.without(count, chunk_size) for row in self.rows]

    def crop_to(self, length: int, dry: bool = False) -> None:
        """Follow keys that were cropped to `length` columns; with `dry` only raise if that cannot be.

        What has been forgotten already (a snapshot was restored) is not forgotten twice.
        """
        if length == 0 and all(row.position <= self.columns for row in self.rows):
            if not dry:
                self.reset()
        elif self.columns > length and dry:
            self.cropped(self.columns - length)
        elif self.columns > length:
            self.crop(self.columns - length)

    def reset(self) -> None:
        self.rows, self.columns = [], 0

    def clone(self) -> LayerState:
        new = LayerState(self.signature)
        new.take(self)
        new.record_past, new.record_writes = self.record_past, self.record_writes
        new._owner = self._owner
        return new

    def take(self, other: LayerState) -> None:
        self.rows, self.columns = [row.share() for row in other.rows], other.columns

    def tensors(self) -> list[Tensor]:
        rows = [r for row in self.rows for r in (row, *row.undo)]
        slots = [s for r in rows for s in (r.weight, r.chunk) if s is not None]
        return list({t.data_ptr(): t for slot in slots for t in slot.tensors}.values())


def _repeats(indices: Iterable[int]) -> list[tuple[int, bool]]:
    """Each index with whether it came before."""
    seen, pairs = set(), []
    for i in indices:
        pairs.append((i, i in seen))
        seen.add(i)
    return pairs
