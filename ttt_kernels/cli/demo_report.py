"""The demo's result: one record, shown as tables and written as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ttt_kernels.cli.demo_run import LayerTrace, Pass, ScanComparison
from ttt_kernels.cli.measure import machine
from ttt_kernels.cli.tables import new_table

EXTRA = "demo"
BUCKETS = 8


@dataclass(frozen=True)
class Bucket:
    """Tokens [start, stop) of a window; losses are means over windows, in nats per token."""

    start: int
    stop: int
    off: float
    on: float
    change: float
    change_error: float | None  # standard error over windows; None with fewer than two


@dataclass(frozen=True)
class DemoResult:
    """All that is reported. `marks`: what is not the real thing (model, text), and why. `projections`:
    how they were made; None where they are untrained."""

    marks: dict[str, str]
    model: dict[str, object]
    text: dict[str, object]
    config: dict[str, object]
    projections: dict[str, str] | None
    environment: dict[str, object]
    off: Pass
    on: Pass
    traces: dict[int, LayerTrace]
    scan: ScanComparison

    def bucket(self, start: int, stop: int) -> Bucket:
        """Loss of predicting tokens start .. stop - 1; token 0 is not predicted."""
        part = slice(max(start - 1, 0), stop - 1)
        off, on = self.off.nll[:, part].double(), self.on.nll[:, part].double()
        change = (on - off).mean(1)
        error = standard_error(change)
        return Bucket(start, stop, *(float(t.mean()) for t in (off, on, change)), error)

    @property
    def window(self) -> int:
        return self.off.nll.shape[1] + 1

    @property
    def total(self) -> Bucket:
        return self.bucket(0, self.window)

    @property
    def buckets(self) -> list[Bucket]:
        edges = [self.window * i // BUCKETS for i in range(BUCKETS + 1)]
        return [self.bucket(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > max(a, 1)]

    def layer_summary(self, layer: int) -> dict[str, object]:
        """Over all windows: mean and largest write, drift after each chunk (mean over windows)."""
        trace = self.traces[layer]
        writes, drift = torch.tensor(trace.writes), torch.tensor(trace.drift)
        return {
            "layer": layer,
            "write_mean": float(writes.mean()),
            "write_max": float(writes.max()),
            "drift_at_end": float(drift[:, -1].mean()),
            "write_by_chunk": writes.mean(0).tolist(),
            "drift_by_chunk": drift.mean(0).tolist(),
        }

    def as_record(self) -> dict[str, object]:
        scan = asdict(self.scan)
        return {
            "marks": self.marks,
            "environment": self.environment,
            "model": self.model,
            "text": self.text,
            "config": self.config,
            "projections": self.projections,
            "loss": {
                "total": asdict(self.total),
                "by_position": [asdict(b) for b in self.buckets],
                "seconds_off": self.off.seconds,
                "seconds_on": self.on.seconds,
            },
            "layers": [self.layer_summary(i) for i in self.traces],
            "scan": scan,
        }


def standard_error(values: Tensor) -> float | None:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None


def write_json(path: Path, result: DemoResult) -> None:
    path.write_text(json.dumps(result.as_record(), indent=2) + "\n", encoding="utf-8")


def print_result(result: DemoResult, console) -> None:
    for mark, why in result.marks.items():
        console.print(f"{mark}: {why}", style="bold yellow", highlight=False)
    m, t = result.model, result.text
    console.print(
        f"\n[bold]{m['name']}[/]\n"
        f"{m['family']}, {m['layers']} layers, D {m['hidden_size']}, F {m['intermediate_size']}; "
        f"reads {t['windows']} windows of {t['window']} tokens of {t['name']}\n"
        f"{machine(result.environment)}",
        highlight=False,
    )
    scan = result.scan
    parts = (
        (
            f"The scan of layer {scan.layer} on the model's own z and v "
            f"(T {scan.tokens}, D {scan.d}, F {scan.f})",
            scan_table(result),
        ),
        ("Loss by position in the window (nats per token)", loss_table(result)),
        ("Writes: ||s dW|| / ||W|| per chunk, ||W - w0|| / ||w0|| at the end", layer_table(result)),
    )
    for title, table in parts:
        console.print(f"\n[bold]{title}[/]", highlight=False)
        console.print(table)
    console.print("\n" + conclusion(result), highlight=False)


def scan_table(result: DemoResult):
    scan = result.scan
    names = ("impl", "mode", "ms", "p20 - p80", "extra MiB", "weights", "error")
    table = new_table(names, EXTRA, left=2)
    for row in scan.rows:
        table.add_row(
            row.impl, row.mode, f"{row.milliseconds:.1f}",
            f"{row.milliseconds_p20:.1f} - {row.milliseconds_p80:.1f}",
            f"{row.extra_bytes / 2**20:.1f}", f"{row.extra_bytes / (4 * scan.d * scan.f):.1f}",
            f"{max(scan.parity[row.impl].values()):.2f}",
        )  # fmt: skip
    return table


def loss_table(result: DemoResult):
    table = new_table(("tokens", "off", "on", "change (std. error over windows)"), EXTRA)
    for b in result.buckets:
        table.add_row(f"{b.start} - {b.stop - 1}", f"{b.off:.4f}", f"{b.on:.4f}", with_error(b))
    table.add_section()
    b = result.total
    table.add_row("all", f"{b.off:.4f}", f"{b.on:.4f}", with_error(b))
    return table


def with_error(b: Bucket) -> str:
    error = "" if b.change_error is None else f" ({b.change_error:.4f})"
    return f"{b.change:+.4f}{error}"


def layer_table(result: DemoResult):
    table = new_table(("layer", "mean write", "largest write", "drift"), EXTRA)
    for layer in result.traces:
        s = result.layer_summary(layer)
        numbers = (s["write_mean"], s["write_max"], s["drift_at_end"])
        table.add_row(str(layer), *(f"{x:.2%}" for x in numbers))
    return table


def conclusion(result: DemoResult) -> str:
    """What the numbers say, whichever way they point."""
    scan, total = result.scan, result.total
    eager, reference = (scan.row(i, "fwd+bwd") for i in ("eager", "reference"))
    parity = "within" if scan.worst <= 1 else "OUTSIDE"
    lines = [
        f"Parity: {parity} the error budget of the precision contract (worst {scan.worst:.2f}, "
        "good is at most 1).",
        f"Eager, forward and backward: {reference.milliseconds / eager.milliseconds:.1f} times "
        f"the reference's speed in {eager.extra_bytes / max(reference.extra_bytes, 1):.1%} of its "
        "extra memory.",
        f"Reading took {result.off.seconds:.1f} s with fast weights off and "
        f"{result.on.seconds:.1f} s with them on.",
        verdict(total, result.projections),
    ]
    return "\n".join(lines)


def verdict(total: Bucket, projections: dict[str, str] | None) -> str:
    if total.change != total.change:
        return "Fast weights on: the loss is not a number; the writes are too large, see the drift."
    word = "higher (worse)" if total.change > 0 else "lower (better)"
    return (
        f"Fast weights on: the loss is {abs(total.change):.4f} nats per token {word}. Their "
        f"projections are {describe(projections)}."
    )


def describe(projections: dict[str, str] | None) -> str:
    if projections is None:
        return "untrained: it takes training to make the writes useful"
    return f"trained on: {projections.get('trained on', 'a text that their file does not name')}"
