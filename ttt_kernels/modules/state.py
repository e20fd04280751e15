"""`FastWeightState`: what patched layers remember of each request between calls.

A request's memory in one layer is a `Row`: its fast weight, the tokens of its open chunk, counters.
Rows are cheap to copy because they point into tensors (`Slot`): whoever wants to write to a slot that
somebody else may still read copies it first. Reordering beams, snapshots and clones cost nothing
until the next write.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from ttt_kernels.modules import state_io
from ttt_kernels.modules.rule import WriteRule

CACHE_ATTRIBUTE = "fast_weights"
UNDO_TOKENS = 32  # while recording, chunk boundaries this close behind can be undone; at least one


@dataclass(frozen=True, eq=False)
class LayerSignature:
    """What a layer's state belongs to: the rule, the shape [D, F] and a few values of W0."""

    rule: WriteRule
    shape: tuple[int, int]
    sample: Tensor

    def difference(self, other: LayerSignature) -> str | None:
        """What differs, in words ("chunk_size: 8 in the state, 16 in the model")."""
        mine, theirs = asdict(self.rule), asdict(other.rule)
        mine["shape"], theirs["shape"] = tuple(self.shape), tuple(other.shape)
        for name in mine:
            if mine[name] != theirs[name]:
                return f"{name}: {mine[name]!r} in the state, {theirs[name]!r} in the model"
        if not torch.equal(self.sample, other.sample):
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
        before = replace(self.share(), undo=())
        self.undo = (*self.undo, before)[-max(1, -(-UNDO_TOKENS // chunk_size)) :]


class LayerState:
    """The rows of one layer; None of them before the first call."""

    def __init__(self, signature: LayerSignature) -> None:
        self.signature = signature
        self.rows: list[Row] = []
        self.columns = 0  # batch columns seen, padding included: the length of the key/value cache
        self.record_past = False
        self.record_writes = False
        self.norms: tuple[Tensor, Tensor | None] | None = None  # of W0, see streaming.slow_norms

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
        self.rows = [self.rows[i].share() if n else self.rows[i] for i, n in _repeats(indices)]

    def crop(self, count: int) -> None:
        """Forget the latest `count` batch columns of every row: all rows, or an error and none."""
        chunk_size = self.signature.rule.chunk_size
        self.rows = [row.without(count, chunk_size) for row in self.rows]
        self.columns -= count

    def reset(self) -> None:
        self.rows, self.columns = [], 0

    def clone(self) -> LayerState:
        new = LayerState(self.signature)
        new.take(self)
        new.record_past, new.record_writes = self.record_past, self.record_writes
        return new

    def take(self, other: LayerState) -> None:
        self.rows, self.columns = [row.share() for row in other.rows], other.columns

    def tensors(self) -> list[Tensor]:
        rows = [r for row in self.rows for r in (row, *row.undo)]
        slots = [s for r in rows for s in (r.weight, r.chunk) if s is not None]
        return list({t.data_ptr(): t for slot in slots for t in slot.tensors}.values())


class FastWeightState:
    """The fast weights and open chunks of a batch of requests, layer by layer.

    It lives with a transformers cache: `FastWeightState.of(cache)` is that cache's state, and what
    is done to it is seen by the next call. Every batch operation acts on all layers. Copies share
    memory until one side is written.

    Attributes:
        layers: `LayerState` by decoder layer.

    Source: issue of serving TTT-NTP (arXiv 2606.21803) and In-Place TTT (arXiv 2604.06169) models.
    """

    def __init__(self, layers: dict[int, LayerState]) -> None:
        self.layers = layers

    @classmethod
    def for_model(cls, model: nn.Module) -> FastWeightState:
        """An empty state for the fast-weight layers of `model`."""
        return cls({i: LayerState(s) for i, s in model_signatures(model).items()})

    @classmethod
    def of(cls, cache: object) -> FastWeightState:
        """The state that lives with a transformers cache.

        Raises:
            ValueError: the cache has none (no patched model has used it).
        """
        state = getattr(cache, CACHE_ATTRIBUTE, None)
        if state is None:
            raise ValueError(
                f"cache must have been used by a patched model, got a {type(cache).__name__} "
                "without fast weights"
            )
        return state

    def attach(self, cache: object) -> None:
        """Let `cache` continue with this state in place of its own (not a copy)."""
        if not hasattr(cache, "layers"):
            raise TypeError(f"cache must be a transformers Cache, got {type(cache).__name__}")
        for i, layer in self.layers.items():
            layer.columns = int(cache.get_seq_length(i))
            if i < len(cache.layers) and hasattr(cache.layers[i], "ttt"):
                cache.layers[i].ttt = layer
        setattr(cache, CACHE_ATTRIBUTE, self)

    # --- what it holds ----------------------------------------------------------------------------
    def __len__(self) -> int:
        """Requests."""
        return max((len(layer.rows) for layer in self.layers.values()), default=0)

    @property
    def positions(self) -> list[int]:
        """Tokens seen by each request, padding excluded."""
        return [row.position for row in self._first()]

    @property
    def writes(self) -> dict[int, list[int]]:
        """Chunks written, per layer and request."""
        return {i: [row.writes for row in layer.rows] for i, layer in self.layers.items()}

    @property
    def refused(self) -> dict[int, list[int]]:
        """Chunks left out because their write was not finite, per layer and request."""
        return {i: [row.refused for row in layer.rows] for i, layer in self.layers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, shared ones once, snapshots held elsewhere excluded."""
        return sum(t.nbytes for layer in self.layers.values() for t in layer.tensors())

    def __repr__(self) -> str:
        return (
            f"FastWeightState(layers={sorted(self.layers)}, positions={self.positions}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    def _first(self) -> list[Row]:
        return next(iter(self.layers.values())).rows if self.layers else []

    # --- batch operations -------------------------------------------------------------------------
    def reset(self) -> None:
        """Forget everything: every request reads the slow weights again."""
        for layer in self.layers.values():
            layer.reset()

    def clone(self) -> FastWeightState:
        """An independent state; memory is shared until one of the two is written."""
        return FastWeightState({i: layer.clone() for i, layer in self.layers.items()})

    snapshot = clone

    def restore(self, snapshot: FastWeightState) -> None:
        """Become what `snapshot` was; it stays valid. The cache's keys are the caller's to crop."""
        self._require_same(snapshot)
        for i, layer in self.layers.items():
            layer.take(snapshot.layers[i])

    def select(self, indices: Iterable[int]) -> None:
        """Request n becomes what request `indices[n]` was: keep some, repeat some, reorder."""
        indices = [int(i) for i in indices]
        if any(not -len(self) <= i < len(self) for i in indices):
            raise IndexError(f"indices must be requests 0..{len(self) - 1}, got {indices}")
        for layer in self.layers.values():
            layer.select(indices)

    reorder = select

    def repeat(self, times: int) -> None:
        """Each request `times` times in a row."""
        self.select([i for i in range(len(self)) for _ in range(times)])

    @classmethod
    def concat(cls, states: Iterable[FastWeightState]) -> FastWeightState:
        """The requests of several states of one model in one batch; memory is shared."""
        states = list(states)
        if not states:
            raise ValueError("states must hold at least one FastWeightState, got none")
        new = states[0].clone()
        for other in states[1:]:
            new._require_same(other)
            for i, layer in new.layers.items():
                layer.rows += [row.share() for row in other.layers[i].rows]
                layer.columns = max(layer.columns, other.layers[i].columns)
        return new

    def crop(self, count: int) -> None:
        """Forget the latest `count` tokens of every request, exactly.

        Inside the open chunk always; behind a chunk boundary only where it was recorded.

        Raises:
            RuntimeError: they cannot be forgotten exactly. Nothing has been changed then.
        """
        cropped = {i: layer.clone() for i, layer in self.layers.items()}
        for layer in cropped.values():
            layer.crop(count)
        for i, layer in self.layers.items():
            layer.rows, layer.columns = cropped[i].rows, cropped[i].columns

    def record_writes(self, on: bool = True) -> None:
        """Log a `WriteRecord` for every write from now on; each write then costs a copy of W."""
        for layer in self.layers.values():
            layer.record_writes = on

    def record_past(self, on: bool = True) -> None:
        """Keep what `crop` needs to go back over a chunk boundary: one more weight per request."""
        for layer in self.layers.values():
            layer.record_past = on

    # --- files ------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file: weights, open chunks and counters, not logs or undo records."""
        state_io.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module) -> FastWeightState:
        """Read what `save` wrote, on the devices of `model`'s fast-weight layers.

        Raises:
            ValueError: not such a file, another format version, or a state of another model or
                configuration; the message names the difference.
        """
        return state_io.load(cls.for_model(model), path, model)

    def check(self, other: FastWeightState) -> None:
        """Raise ValueError where `other` (the model's side) has other layers, rules or weights."""
        if self.layers.keys() != other.layers.keys():
            raise ValueError(
                f"the state is of another model: layers {sorted(self.layers)} in the state, "
                f"{sorted(other.layers)} in the model"
            )
        for i, layer in self.layers.items():
            difference = layer.signature.difference(other.layers[i].signature)
            if difference:
                raise ValueError(f"the state is of another model: layer {i}, {difference}")

    def _require_same(self, other: FastWeightState) -> None:
        if not isinstance(other, FastWeightState):
            raise TypeError(f"expected a FastWeightState, got {type(other).__name__}")
        other.check(self)


def model_signatures(model: nn.Module) -> dict[int, LayerSignature]:
    """Of every fast-weight layer, by `layer_index` (in order of appearance where none is set)."""
    from ttt_kernels.modules.mlp import FastWeightMLP

    mlps = [m for m in model.modules() if isinstance(m, FastWeightMLP)]
    if not mlps:
        raise ValueError(f"model must have fast-weight layers, got {type(model).__name__} without")
    return {n if m.layer_index is None else m.layer_index: m.signature() for n, m in enumerate(mlps)}


def _repeats(indices: Iterable[int]) -> list[tuple[int, bool]]:
    """Each index with whether it came before."""
    seen, pairs = set(), []
    for i in indices:
        pairs.append((i, i in seen))
        seen.add(i)
    return pairs
