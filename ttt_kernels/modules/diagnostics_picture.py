"""The picture of `Diagnostics`: writes, drift and step sizes over tokens."""

from __future__ import annotations

import os
from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ttt_kernels.modules.diagnostics import Diagnostics

PANELS = (
    ("relative_write", "write ||s dW|| / ||W|| (%)", 100),
    ("drift", "drift ||W - w0|| / ||w0|| (%)", 100),
    ("step_size", "step size s", 1),
)


def draw(report: Diagnostics, path: str | os.PathLike) -> None:
    """One line per layer: the mean over requests, and their range where there are several."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot() needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    layers = list(dict.fromkeys(r.layer for r in report.requests))
    requests = len({r.request for r in report.requests})
    for axis, (name, label, factor) in zip(figure.subplots(1, 3), PANELS, strict=True):
        for n, layer in enumerate(layers):
            colour = colormaps["viridis"](0.9 * n / max(len(layers) - 1, 1))
            _draw_layer(axis, report, layer, name, factor, colour)
        axis.set(xlabel="tokens of the request", ylabel=label, xlim=(0, None))
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", ncols=1 + len(layers) // 17)
    refused = f", {report.refused} writes refused (crosses)" if report.refused else ""
    several = f": mean and range of {requests} requests" if requests > 1 else ""
    figure.suptitle(f"Fast-weight writes by layer{several}{refused}", fontsize=12)
    figure.savefig(path, dpi=120)


def _draw_layer(axis, report: Diagnostics, layer: int, name: str, factor: float, colour) -> None:
    kept, refused = defaultdict(list), []
    for row in report.rows:
        if row["layer"] == layer and row["refused"]:
            refused.append(row["position"])
        elif row["layer"] == layer:
            kept[row["position"]].append(factor * row[name])
    tokens = sorted(kept)
    means = [fmean(kept[t]) for t in tokens]
    axis.plot(tokens, means, "o-", markersize=3, color=colour, label=f"layer {layer}")
    if any(len(values) > 1 for values in kept.values()):
        low, high = ([pick(kept[t]) for t in tokens] for pick in (min, max))
        axis.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
    if refused:
        axis.plot(refused, [0] * len(refused), "x", color="red", clip_on=False)
