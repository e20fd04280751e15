"""The demo's picture: loss, its change, the writes, and the cost of the scan."""

from __future__ import annotations

from pathlib import Path

from ttt_kernels.cli.demo_report import DemoResult
from ttt_kernels.cli.errors import require
from ttt_kernels.cli.measure import machine
from ttt_kernels.cli.report_pictures import COLOURS

EXTRA = "demo"
OFF, ON = "#8c8c8c", "#d95f02"


def draw(path: Path, result: DemoResult) -> None:
    matplotlib = require("matplotlib", EXTRA)
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", EXTRA)
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    draw_loss(axes[0, 0], result)
    draw_change(axes[0, 1], result)
    draw_parity(axes[0, 2], result)
    draw_drift(axes[1, 0], result, pyplot.get_cmap("viridis"))
    draw_cost(axes[1, 1], result, "time per call (ms)", lambda r: r.milliseconds)
    draw_cost(axes[1, 2], result, "extra peak memory (MiB)", lambda r: r.extra_bytes / 2**20)
    figure.suptitle(heading(result), fontsize=12)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def heading(result: DemoResult) -> str:
    m, t, c = result.model, result.text, result.config
    made = f"untrained ({c['proj_init']})" if result.projections is None else "trained"
    lines = [
        f"{m['name']} reading {t['name']}: {t['windows']} windows of {t['window']} tokens",
        f"fast weights in layers {', '.join(map(str, c['layers']))}; chunk {c['chunk_size']}, "
        f"{c['inner_optimizer']}, lr {c['lr']:g}; projections {made}",
        machine(result.environment),
    ]
    return "\n".join([*result.marks, *lines])


def draw_loss(axis, result: DemoResult) -> None:
    centres = [(b.start + b.stop) / 2 for b in result.buckets]
    axis.plot(centres, [b.off for b in result.buckets], "o-", color=OFF, label="fast weights off")
    axis.plot(centres, [b.on for b in result.buckets], "s--", color=ON, label="fast weights on")
    axis.set(xlabel="position in the window (tokens)", ylabel="loss (nats per token)")
    axis.set_title("Loss by position")
    finish(axis)


def draw_change(axis, result: DemoResult) -> None:
    buckets = result.buckets
    centres = [(b.start + b.stop) / 2 for b in buckets]
    errors = [b.change_error or 0.0 for b in buckets]
    axis.axhline(0, color="black", linewidth=1)
    axis.errorbar(
        centres, [b.change for b in buckets], errors, fmt="o-", color=ON, capsize=4,
        label="on - off, standard error over windows",
    )  # fmt: skip
    axis.set(xlabel="position in the window (tokens)", ylabel="change of the loss (nats per token)")
    axis.set_title(f"Change of the loss, mean {result.total.change:+.4f} (above 0 is worse)")
    finish(axis)


def draw_parity(axis, result: DemoResult) -> None:
    parity = result.scan.parity
    names = list(next(iter(parity.values())))
    draw_bars(axis, names, {impl: [r[n] for n in names] for impl, r in parity.items()})
    axis.axhline(1, color="red", linewidth=1.2, linestyle="--", label="budget")
    axis.set(ylabel="error / error budget", ylim=(0, max(1.35, 1.2 * result.scan.worst)))
    axis.set_title("Parity with float64, values and gradients")
    finish(axis)


def draw_drift(axis, result: DemoResult, colours) -> None:
    layers = list(result.traces)
    for i, layer in enumerate(layers):
        summary = result.layer_summary(layer)
        chunks = range(1, len(summary["drift_by_chunk"]) + 1)
        colour = colours(0.9 * i / max(len(layers) - 1, 1))
        label = f"layer {layer}: {summary['write_mean']:.2%} a write"
        percent = [100 * x for x in summary["drift_by_chunk"]]
        axis.plot(chunks, percent, "o-", markersize=3, color=colour, label=label)
    axis.set(xlabel="chunks written", ylabel="drift ||W - w0|| / ||w0|| (%)", ylim=(0, None))
    axis.set_title("Drift, and mean size of a write ||s dW|| / ||W||")
    finish(axis)


def draw_cost(axis, result: DemoResult, label: str, value) -> None:
    scan = result.scan
    modes = list(dict.fromkeys(r.mode for r in scan.rows))
    impls = list(dict.fromkeys(r.impl for r in scan.rows))
    values = {impl: [value(scan.row(impl, mode)) for mode in modes] for impl in impls}
    draw_bars(axis, modes, values, "{:.1f}")
    axis.set(ylabel=label)
    axis.set_title(f"Scan of layer {scan.layer}: T {scan.tokens}, D {scan.d}, F {scan.f}")
    axis.margins(y=0.2)
    finish(axis)


def draw_bars(axis, groups: list[str], values: dict[str, list[float]], form: str = "") -> None:
    """One group of bars per name, one bar per implementation."""
    width = 0.8 / len(values)
    for i, (impl, heights) in enumerate(values.items()):
        at = [g + (i - (len(values) - 1) / 2) * width for g in range(len(groups))]
        bars = axis.bar(at, heights, width * 0.95, label=impl, color=COLOURS.get(impl))
        if form:
            axis.bar_label(bars, [form.format(h) for h in heights], fontsize=9)
    axis.set_xticks(range(len(groups)), groups)


def finish(axis) -> None:
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=9)
