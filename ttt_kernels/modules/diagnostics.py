"""What fast weights did to a request: how large each write was, and how far the weight has drifted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from ttt_kernels.modules.frozen import is_frozen
from ttt_kernels.modules.layer_state import Row
from ttt_kernels.modules.rule import WriteRule
from ttt_kernels.modules.state import FastWeightState

LINES = 40  # of a printed table
COLUMNS = ("layer", "request", "writes", "refused", "step", "sigma", "mean write", "max write", "drift")


@dataclass(frozen=True)
class RequestWrites:
    """One request in one layer.

    Args:
        writes, refused: complete chunks written, and left out because they were not finite.
        rows: those of them that were recorded, in order.
    """

    layer: int
    request: int
    writes: int
    refused: int
    rows: tuple[dict, ...]

    @classmethod
    def of(cls, layer: int, request: int, row: Row, rule: WriteRule) -> RequestWrites:
        whole = is_frozen(row)  # one write from the whole prompt
        rows = []
        for record in row.log:
            spectral = rule.inner_optimizer == "specnorm" and not whole and record.step_size
            rows.append({
                "layer": layer,
                "request": request,
                "chunk": 0 if whole else record.position // rule.chunk_size - 1,
                **asdict(record),
                "sigma": rule.lr / record.step_size if spectral else None,
            })  # fmt: skip
        return cls(layer, request, row.writes, row.refused, tuple(rows))

    def cells(self) -> list[str]:
        counts = [str(n) for n in (self.layer, self.request, self.writes, self.refused)]
        kept = [row for row in self.rows if not row["refused"]]
        if not kept:
            return [*counts, *"-----"]
        steps, sizes = ([row[name] for row in kept] for name in ("step_size", "relative_write"))
        sigmas = [row["sigma"] for row in kept if row["sigma"] is not None]
        means = (f"{fmean(x):.3g}" if x else "-" for x in (steps, sigmas))
        return [*counts, *means, *map(_percent, (fmean(sizes), max(sizes), kept[-1]["drift"]))]


@dataclass(frozen=True)
class Diagnostics:
    """The recorded writes of a batch. `str()` is a table, `rows` the data, `plot` a picture.

    Args:
        requests: by layer, then request.
    """

    requests: tuple[RequestWrites, ...]

    @classmethod
    def of(cls, state: FastWeightState) -> Diagnostics:
        return cls(
            tuple(
                RequestWrites.of(i, b, row, layer.signature.rule)
                for i, layer in state.layers.items()
                for b, row in enumerate(layer.rows)
            )
        )

    @property
    def rows(self) -> list[dict]:
        """One per recorded write: layer, request, chunk, the fields of `WriteRecord`, and sigma, the
        spectral norm that "specnorm" divides by (None with others)."""
        return [row for r in self.requests for row in r.rows]

    @property
    def refused(self) -> int:
        """Writes left out because they were not finite, recorded or not."""
        return sum(r.refused for r in self.requests)

    @property
    def unrecorded(self) -> int:
        """Writes that happened while recording was off."""
        return sum(r.writes + r.refused - len(r.rows) for r in self.requests)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw writes, drift and step sizes over tokens, a line per layer. Needs matplotlib.

        Raises:
            ValueError: no write was recorded.
        """
        from ttt_kernels.modules.diagnostics_picture import draw

        if not self.rows:
            raise ValueError(f"there must be recorded writes to draw, got none. {self._remark()}")
        draw(self, path)

    def __str__(self) -> str:
        lines = [COLUMNS, *(r.cells() for r in self.requests[:LINES])]
        widths = [max(len(line[n]) for line in lines) for n in range(len(COLUMNS))]
        text = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
        if len(self.requests) > LINES:
            text.append(f"... {len(self.requests) - LINES} more in .requests")
        return "\n".join([*text, *self._extremes(), self._remark()]).rstrip()

    def _extremes(self) -> list[str]:
        kept = [row for row in self.rows if not row["refused"]]
        names = {"relative_write": "largest write", "drift": "largest drift"} if kept else {}
        return [_extreme(title, name, kept) for name, title in names.items()]

    def _remark(self) -> str:
        if self.unrecorded:
            return (
                f"{self.unrecorded} writes were not recorded: call record_writes() on the state "
                "before the first token"
            )
        return "" if self.rows else "No chunk has been completed."


def _extreme(title: str, name: str, rows: Sequence[dict]) -> str:
    row = max(rows, key=lambda row: row[name])
    place = f"layer {row['layer']}, request {row['request']}, at token {row['position']}"
    return f"{title} {_percent(row[name])} ({place})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
