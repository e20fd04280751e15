"""One call of one layer with a carried state: any split of a sequence gives what one shot gives.

The tokens of a call fall into a head that completes the open chunk, a body of whole chunks and a tail
that stays open:

    head   read with the row's own weight, then the chunk is written from what was kept of it
    body   `fast_weight_scan` from the row's weight, which returns the next one
    tail   read, and kept

A write depends on nothing outside its chunk (targets and step sizes never look beyond), so it is
computed when the chunk fills, whichever calls brought the tokens. Decoding is a tail or a head of one
token: it reads one weight per row, copies none, and keeps two vectors.

A write that would make the weight non-finite is refused: the chunk is read, skipped and counted. So is
one beyond the range of the keys' dtype (65504 in float16), to which the weight is rounded when it is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ttt_kernels.modules.frozen import is_frozen, read_frozen
from ttt_kernels.modules.layer_state import LayerState, Row, WriteRecord, undo_depth
from ttt_kernels.modules.row_store import RowStore, pick
from ttt_kernels.ops.scan.api import fast_weight_scan
from ttt_kernels.ops.step.api import fast_weight_update_

SAFE_WRITE = 1e30  # a write below it in every element keeps any finite float32 weight finite

Terms = Callable[[Tensor, Tensor], tuple[Tensor, "Tensor | float"]]
"""Keys [n, T, F] and target inputs [n, T, D] of whole chunks -> targets v and step sizes."""


def stream(
    state: LayerState,
    z: Tensor,
    u: Tensor,
    w0: Tensor,
    *,
    lengths: Sequence[int] | None,
    terms: Terms,
    tracked: bool,
) -> Tensor:
    """y [B, T, D] of the next tokens of every row, and the state moved past them.

    z [B, T, F], u [B, T, D]: keys and target inputs; of row b the first `lengths[b]` tokens are real
    (None: all). y is 0 at the others. With `tracked`, y is differentiable within the call, and the
    carried state a constant.
    """
    state.open(z.shape[0])
    lengths = [z.shape[1]] * len(state.rows) if lengths is None else lengths
    if torch.is_autocast_enabled(z.device.type):
        dtype = torch.get_autocast_dtype(z.device.type)
        z, u = z.to(dtype), u.to(dtype)
    if any(map(is_frozen, state.rows)):
        return read_frozen(state, z, w0, lengths)
    y = Stream(RowStore(state, w0, z.dtype), terms).differentiable(z, u, lengths) if tracked else None
    with torch.inference_mode(False), torch.no_grad():
        step = Stream(RowStore(state, w0.detach(), z.dtype), terms)
        value = step.run(z.detach(), u.detach(), lengths)
    state.columns += z.shape[1]
    for row, length in zip(state.rows, lengths, strict=True):
        row.unbroken = row.unbroken + length if length == z.shape[1] else 0
    if y is None:
        return value
    return torch.where(_mask(step.refused, y), value, y) if step.refused else y


class Stream:
    """The rows of one call. Methods take row numbers `rows` and their tokens, in the same order."""

    def __init__(self, store: RowStore, terms: Terms) -> None:
        self.store, self.terms = store, terms
        self.state, self.rule = store.state, store.rule
        self.refused: set[int] = set()
        self.largest = torch.finfo(store.dtype).max

    def run(self, z: Tensor, u: Tensor, lengths: Sequence[int]) -> Tensor:
        rows, chunk_size = self.state.rows, self.rule.chunk_size
        self.store.open_chunks(z, u)
        length = z.shape[1]
        whole = all(n == length for n in lengths)
        if whole and all(row.fill + length <= chunk_size for row in rows):
            return self._head(range(len(rows)), z, u)
        places = defaultdict(list)
        for b, row in enumerate(rows):
            places[row.fill, lengths[b]].append(b)
        if whole and len(places) == 1:
            return self._advance(range(len(rows)), z, u)
        self.store.reserve([b for b, r in enumerate(rows) if r.fill + lengths[b] >= chunk_size])
        y = z.new_zeros(*z.shape[:2], len(self.store.w0))
        for (_, n), group in places.items():
            y[group, :n] = self._advance(group, z[group, :n], u[group, :n])
        for row in rows:
            row.weight = row.weight if row.writes else None
        return y

    def _advance(self, rows: Sequence[int], z: Tensor, u: Tensor) -> Tensor:
        """Rows at one place in their chunks, with equally many tokens: head, body, tail."""
        length, chunk_size = z.shape[1], self.rule.chunk_size
        fill = self.state.rows[rows[0]].fill
        head = min(length, chunk_size - fill) if fill else 0
        stop = head + (length - head) // chunk_size * chunk_size
        parts = []
        if head:
            parts.append(self._head(rows, z[:, :head], u[:, :head]))
        if stop > head:
            parts.append(self._body(rows, z[:, head:stop], u[:, head:stop]))
        if length > stop:
            parts.append(self._head(rows, z[:, stop:], u[:, stop:]))
        if not parts:
            return z.new_zeros(len(rows), 0, len(self.store.w0))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _head(self, rows: Sequence[int], z: Tensor, u: Tensor) -> Tensor:
        """Tokens of the open chunk: read, keep, and write the chunk where that completes it."""
        y = self.store.read(rows, z)
        self.store.keep(rows, z, u)
        full = [b for b in rows if self.state.rows[b].fill == self.rule.chunk_size]
        if full:
            self._write(full)
        return y

    def _body(self, rows: Sequence[int], z: Tensor, u: Tensor) -> Tensor:
        """Whole chunks, with nothing open before them; one by one where each leaves a record."""
        chunks = z.shape[1] // self.rule.chunk_size
        single = undo_depth(self.rule.chunk_size) if self.state.record_past else 0
        single = chunks if self.state.record_writes else min(single, chunks)
        stop = (chunks - single) * self.rule.chunk_size
        parts = [self._whole(rows, z[:, :stop], u[:, :stop])] if stop else []
        if single:
            parts.append(self._chunk_by_chunk(rows, z[:, stop:], u[:, stop:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _whole(self, rows: Sequence[int], z: Tensor, u: Tensor) -> Tensor:
        v, steps = self.terms(z, u)
        y, final = self._scan(z, v, steps, self.store.weights(rows), return_state=True)
        finite = self._readable(final)
        if self.largest < SAFE_WRITE:  # float16: a weight on the way there may have been too large
            finite = finite & torch.isfinite(y).flatten(1).all(1)
        finite = finite.tolist()
        good = [n for n, ok in enumerate(finite) if ok]
        self.store.adopt([rows[n] for n in good], final if all(finite) else final[good])
        for n in good:
            self.state.rows[rows[n]].writes += z.shape[1] // self.rule.chunk_size
            self.state.rows[rows[n]].position += z.shape[1]
        for n, ok in enumerate(finite):
            if not ok:
                y[n : n + 1] = self._chunk_by_chunk([rows[n]], z[n : n + 1], u[n : n + 1])
        return y

    def _chunk_by_chunk(self, rows: Sequence[int], z: Tensor, u: Tensor) -> Tensor:
        chunks = zip(*(t.split(self.rule.chunk_size, 1) for t in (z, u)), strict=True)
        return torch.cat([self._head(rows, *chunk) for chunk in chunks], 1)

    def _scan(self, z, v, steps, weight, return_state) -> tuple[Tensor, Tensor | None]:
        return fast_weight_scan(
            z, v, self.store.w0, chunk_size=self.rule.chunk_size, step_size=steps,
            preserve_row_norm=self.rule.preserve_row_norm, state=weight, return_state=return_state,
        )  # fmt: skip

    # --- writing ----------------------------------------------------------------------------------
    def _write(self, rows: Sequence[int]) -> None:
        """The complete chunks of `rows`: W += s V^T Z, each as a whole or not at all."""
        state, members = self.state, [self.state.rows[b] for b in rows]
        keys, inputs = (torch.stack([row.chunk[part] for row in members]) for part in (0, 1))
        v, steps = self.terms(keys, inputs)
        if not isinstance(steps, Tensor):
            steps = keys.new_full((len(rows),), steps, dtype=self.store.acc)
        steps = steps.flatten()
        bound = v.abs().amax((1, 2)) * keys.abs().amax((1, 2)).to(self.store.acc) * steps.abs()
        bound = bound * keys.shape[1]
        if self.largest < SAFE_WRITE:  # float16: what is there already counts
            bound = bound + torch.stack([self._weight_of(row).abs().amax() for row in members])
        safe = (bound < min(SAFE_WRITE, self.largest)).tolist()
        if state.record_past:
            for row in members:
                row.remember(self.rule.chunk_size)
        together = [n for n, ok in enumerate(safe) if ok and not state.record_writes]
        if together:
            self.store.write([rows[n] for n in together], *pick(together, keys, v, steps))
        for n, row in enumerate(members):
            if n not in together:
                self._write_checked(rows[n], keys[n : n + 1], v[n : n + 1], steps[n : n + 1])
            row.fill = 0

    def _write_checked(self, b: int, keys: Tensor, v: Tensor, steps: Tensor) -> None:
        """On a copy of one row's weight, which takes its place if it is finite."""
        row = self.state.rows[b]
        before = self._weight_of(row)
        after = before.clone()[None]
        fast_weight_update_(after, keys, v, step_size=steps)
        ok = bool(self._readable(after)) and bool(torch.isfinite(steps).all())
        if self.state.record_writes:
            row.log.append(self._record(b, before, after[0], steps, ok))
        if not ok:
            row.refused += 1
            self.refused.add(b)
            return
        row.weight = None
        self.store.adopt([b], after)
        row.writes += 1

    def _weight_of(self, row: Row) -> Tensor:
        return row.weight[0] if row.writes else self.store.slow

    def _readable(self, weight: Tensor) -> Tensor:
        """bool [n], of weights [n, D, F]: finite, and still so in the dtype of the keys."""
        size = torch.maximum(weight.amax((1, 2)), -weight.amin((1, 2)))  # NaN where one is
        return size <= self.largest

    def _record(self, b: int, before: Tensor, after: Tensor, steps: Tensor, ok: bool) -> WriteRecord:
        slow = self.store.slow
        kept = after if ok else before
        norm = torch.linalg.vector_norm
        values = (steps[0], norm(after - before) / norm(before), norm(kept - slow) / norm(slow))
        row = self.state.rows[b]
        done = (row.writes + row.refused + 1) * self.rule.chunk_size
        return WriteRecord(done, *(float(x) for x in values), refused=not ok)

    # --- gradients --------------------------------------------------------------------------------
    def differentiable(self, z: Tensor, u: Tensor, lengths: Sequence[int]) -> Tensor:
        """y alone, through one scan over [open chunk, new tokens] of each row."""
        y = []
        for b, row in enumerate(self.state.rows):
            old = [] if row.chunk is None else [row.chunk[p][None, : row.fill].clone() for p in (0, 1)]
            new = [t[b : b + 1, : lengths[b]] for t in (z, u)]
            if row.fill:
                new = [torch.cat(pair, 1) for pair in zip(old, new, strict=True)]
            v, steps = self.terms(*new)
            weight = row.weight[0][None].clone() if row.writes else None
            out = self._scan(new[0], v, steps, weight, return_state=False)[0][:, row.fill :]
            y.append(functional.pad(out, (0, 0, 0, z.shape[1] - lengths[b])))
        return torch.cat(y)


def _mask(rows: set[int], like: Tensor) -> Tensor:
    mask = torch.zeros(like.shape[0], 1, 1, dtype=torch.bool, device=like.device)
    mask[list(rows)] = True
    return mask
