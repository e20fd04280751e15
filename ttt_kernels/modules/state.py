"""`FastWeightState`: what a patched model remembers of a batch of requests between calls."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import nn

from ttt_kernels.modules import state_io
from ttt_kernels.modules.layer_state import LayerState, Row, Slot, WriteRecord
from ttt_kernels.modules.rule import require_int

__all__ = ["FastWeightState", "LayerState", "Row", "Slot", "WriteRecord", "fast_mlps"]

CACHE_ATTRIBUTE = "fast_weights"


class FastWeightState:
    """The fast weights and open chunks of a batch of requests, layer by layer.

    It lives with a transformers cache: `FastWeightState.of(cache)` is that cache's state, and what
    is done to it is seen by the next call. Every batch operation acts on all layers, and on nothing
    else: to change the cache's keys too, use the cache's own methods, which include these. Copies
    share memory until one side is written.

    Attributes:
        layers: `LayerState` by decoder layer.
    """

    def __init__(self, layers: dict[int, LayerState]) -> None:
        self.layers = layers

    @classmethod
    def for_model(cls, model: nn.Module) -> FastWeightState:
        """An empty state for the fast-weight layers of `model`."""
        return cls({i: LayerState(mlp.signature()) for i, mlp in fast_mlps(model).items()})

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
        """Let `cache` continue with this state in place of its own (not a copy).

        Raises:
            TypeError: not a cache with layers.
            ValueError: the cache has been used by another model or configuration. Nothing has been
                changed then.
        """
        if not hasattr(cache, "layers"):
            raise TypeError(f"cache must be a transformers Cache, got {type(cache).__name__}")
        current = getattr(cache, CACHE_ATTRIBUTE, None)
        if current is not None and not current.is_blank():
            self.check(current, "the cache")
        for layer in cache.layers[:1]:
            if hasattr(layer, CACHE_ATTRIBUTE):
                setattr(layer, CACHE_ATTRIBUTE, self)
        for i, layer in self.layers.items():
            layer.columns = int(cache.get_seq_length(i))
            if i < len(cache.layers) and hasattr(cache.layers[i], "ttt"):
                cache.layers[i].ttt = layer
        setattr(cache, CACHE_ATTRIBUTE, self)

    # --- what it holds ----------------------------------------------------------------------------
    def __len__(self) -> int:
        """Requests."""
        return max((len(layer.rows) for layer in self.layers.values()), default=0)

    def is_blank(self) -> bool:
        """Whether no call has used it since it was made or reset."""
        return not any(layer.rows or layer.columns for layer in self.layers.values())

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
        """Bytes of all tensors held, shared ones and what `record_past` keeps included, once."""
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
        """Become what `snapshot` was; it stays valid. Crop the cache to the same length next."""
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
        require_int("count", count, minimum=0)
        cropped = {i: layer.cropped(count) for i, layer in self.layers.items()}
        for i, layer in self.layers.items():
            layer.rows, layer.columns = cropped[i], layer.columns - count

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
        """Write a safetensors file: weights, open chunks and counters, not logs or undo records.

        Raises:
            OSError: `path` is a folder, its folder does not exist, or it cannot be written.
            ValueError: the state of an `adapt` block.
        """
        state_io.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module) -> FastWeightState:
        """Read what `save` wrote, on the devices of `model`'s fast-weight layers.

        Raises:
            ValueError: not such a file, another format version, or a state of another model or
                configuration; the message names the difference.
        """
        return state_io.load(path, model)

    def check(self, other: FastWeightState, where: str = "the model") -> None:
        """Raise ValueError where `other` (the side of `where`) has other layers, rules or weights."""
        difference = self.difference(other, where)
        if difference:
            raise ValueError(f"the state is of another model: {difference}")

    def difference(self, other: FastWeightState, where: str = "the model") -> str | None:
        """What differs between the layers of both, in words."""
        if self.layers.keys() != other.layers.keys():
            return f"layers {sorted(self.layers)} in the state, {sorted(other.layers)} in {where}"
        for i, layer in self.layers.items():
            difference = layer.signature.difference(other.layers[i].signature, where)
            if difference:
                return f"layer {i}, {difference}"
        return None

    def _require_same(self, other: FastWeightState) -> None:
        if not isinstance(other, FastWeightState):
            raise TypeError(f"expected a FastWeightState, got {type(other).__name__}")
        other.check(self)


def fast_mlps(model: nn.Module) -> dict[int, nn.Module]:
    """Every fast-weight layer by `layer_index` (in order of appearance where none is set)."""
    from ttt_kernels.modules.mlp import FastWeightMLP

    mlps = [m for m in model.modules() if isinstance(m, FastWeightMLP)]
    if not mlps:
        raise ValueError(f"model must have fast-weight layers, got {type(model).__name__} without")
    return {n if m.layer_index is None else m.layer_index: m for n, m in enumerate(mlps)}
