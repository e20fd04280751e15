"""The pictures of `report`. Measured: filled and solid; predicted: hollow and dashed, or hatched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ttt_kernels.cli.errors import require
from ttt_kernels.cli.report_records import Entry, baseline, speed_up
from ttt_kernels.testing.roofline import MACHINES

EXTRA = "bench"
# Told apart with any kind of colour vision (the palette of Okabe and Ito); also the order of tables.
COLOURS = {
    "reference": "#808080", "released-compiled": "#cc79a7", "plain": "#000000", "eager": "#0072b2",
    "triton": "#009e73", "triton-split": "#56b4e9", "cuda": "#d55e00", "patched": "#e69f00",
}  # fmt: skip
IMPLS = tuple(COLOURS)
EXAMPLE = MACHINES["H200"].name  # the one machine that is drawn where nothing was measured
BARS = (64, 256, 1024)  # chunk sizes that get a bar
MARKERS = {"scan": "o", "fast_weight_apply": "s", "fast_weight_update_": "D", "ridge_write": "P",
           "next_token_target": "^", "conv_target": "v", "spectral_step_size": "<",
           "clipped_step_size": ">"}  # fmt: skip
OTHER = "#f0e442"  # an implementation without a colour of its own
FEWEST_BARS = 10
NOTE = {"textcoords": "offset points", "fontsize": 7.5}
Panel = list[Entry]


@dataclass(frozen=True)
class Picture:
    """panels: which rows go together; none = there is nothing to draw, and `needs` says what is missing."""

    name: str
    title: str
    needs: str
    panels: Callable[[Sequence[Entry]], list[Panel]]
    draw: Callable[[object, Panel], None]

    @property
    def file(self) -> str:
        return f"bench-{self.name}.png"


# --- which rows -----------------------------------------------------------------------------------------
def drawable(entries: Iterable[Entry]) -> list[Entry]:
    """Timed operations of machines where something was measured, and predictions for one more."""
    timed = [e for e in entries if e.timed and e["d"]]
    places = {e.place for e in timed if not e.predicted} | {EXAMPLE}
    return [e for e in timed if e.place in places]


def by_place(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.place, []).append(entry)
    return dict(sorted(groups.items(), key=lambda item: item[0] == EXAMPLE))


def along(field: str, shown: str) -> Callable[[Sequence[Entry]], list[Panel]]:
    """For each machine and mode the scan whose rows cover most values of a field, at least two. `shown`: the
    field that is drawn; rows where it is 0 have no place on a logarithmic axis."""

    def panels(entries: Sequence[Entry]) -> list[Panel]:
        found = []
        scans = [e for e in drawable(entries) if e["op"] == "scan" and e[shown]]
        for ones in by_place(scans).values():
            for mode in ("fwd", "fwd+bwd"):
                lines: dict[tuple, Panel] = {}
                for e in (e for e in ones if e["mode"] == mode):
                    names = ("shape", "dtype", "batch", "preserve_row_norm", "tokens", "chunk_size")
                    lines.setdefault(tuple(e.identity(n) for n in names if n != field), []).append(e)
                best = max(lines.values(), key=lambda line: reach(line, field), default=[])
                if reach(best, field)[0] > 1:
                    found.append(best)
        return found

    return panels


def reach(line: Panel, field: str) -> tuple[int, int]:
    return len({e[field] for e in line}), sum(e["d"] * e["f"] * e["tokens"] for e in line)


def with_speed_up(entries: Sequence[Entry]) -> list[Panel]:
    """For each machine and model the plain scans (no row norms) of the length and dtype that most rows have;
    the longest, where that is open."""
    scans = [e for e in drawable(entries) if e["op"] == "scan" and e["impl"] != "plain"]
    scans = [e for e in scans if e["chunk_size"] in BARS and e["mode"] in ("fwd", "fwd+bwd")]
    scans = [e for e in scans if e["batch"] == 1 and not e["preserve_row_norm"]]
    counts = Counter((e.place, e["shape"], e["tokens"], e["dtype"]) for e in scans)
    best = {key[:2]: key for key in sorted(counts, key=lambda key: (counts[key], key))}
    chosen = [e for e in scans if best[e.place, e["shape"]] == (e.place, e["shape"], e["tokens"], e["dtype"])]
    panels = by_place(e for e in chosen if baseline(e, chosen) is not None).values()
    return [panel for panel in panels if {e["impl"] for e in panel} - {"reference"}]


def with_bytes(entries: Sequence[Entry]) -> list[Panel]:
    return list(by_place(e for e in drawable(entries) if e["gbytes"] and e["copy_gbytes"]).values())


# --- drawing --------------------------------------------------------------------------------------------
def lines_of(panel: Panel) -> Iterable[tuple[str, bool, Panel]]:
    """(implementation, predicted?, its rows)."""
    names = {e["impl"] for e in panel}
    for impl in [*(i for i in IMPLS if i in names), *sorted(names - set(IMPLS))]:
        for predicted in (False, True):
            rows = [e for e in panel if e["impl"] == impl and e.predicted == predicted]
            if rows:
                yield impl, predicted, rows


def style(impl: str, predicted: bool) -> dict[str, object]:
    colour = COLOURS.get(impl, OTHER)
    face = {"markerfacecolor": "white"} if predicted else {}
    return {"color": colour, "linestyle": "--" if predicted else "-", "marker": "o", "markersize": 5, **face}


def draw_time(axis, panel: Panel) -> None:
    """Time against chunk size, with the time that the same FLOPs take at the GEMM rate."""
    for impl, predicted, rows in lines_of(panel):
        rows = sorted(rows, key=lambda e: e["chunk_size"])
        x, y = [e["chunk_size"] for e in rows], [e["milliseconds"] for e in rows]
        axis.plot(x, y, **style(impl, predicted))
        if not predicted:
            low, high = ([e[f"milliseconds_{p}"] for e in rows] for p in ("p20", "p80"))
            axis.vlines(x, low, high, color=COLOURS.get(impl), linewidth=3, alpha=0.4)
    scans = [e for e in panel if e["impl"] != "plain"]
    floor = dict(sorted((e["chunk_size"], e["milliseconds"] * e["gemm_share"]) for e in scans))
    axis.plot(list(floor), list(floor.values()), "k:", linewidth=1)
    measured = any(not e.predicted for e in panel)
    axis.set_ylabel("time per call (ms)" + (", median, p20 - p80" if measured else ", predicted"))
    axis.set_xlabel("chunk size C (tokens)")
    powers_of_two(axis, {e["chunk_size"] for e in panel})
    log_axis(axis, [e["milliseconds"] for e in panel])


def draw_memory(axis, panel: Panel) -> None:
    """Peak memory beyond operands and results against tokens."""
    for impl, predicted, rows in lines_of(panel):
        rows = sorted(rows, key=lambda e: e["tokens"])
        y = [e["extra_bytes"] / 2**30 for e in rows]
        axis.plot([e["tokens"] for e in rows], y, **style(impl, predicted))
    axis.set_ylabel("extra peak memory (GiB)")
    axis.set_xlabel("tokens T")
    powers_of_two(axis, {e["tokens"] for e in panel})
    log_axis(axis, [e["extra_bytes"] / 2**30 for e in panel])


def draw_speed_up(axis, panel: Panel) -> None:
    """One bar a row: the reference's time over this one's. The longest chunks come first."""
    rows = [e for _, _, ones in lines_of(panel) for e in ones if e["impl"] != "reference"]
    rows.sort(key=lambda e: (-e["d"] * e["f"], e["mode"], -e["chunk_size"]))
    y, places, times = 0.0, [], [speed_up(e, panel) for e in rows]
    for before, e, faster in zip([None, *rows], rows, times, strict=False):
        y += 0.4 if before is not None and before.problem != e.problem else 0.0
        colour = COLOURS.get(e["impl"], OTHER)
        fill = {"facecolor": "white", "hatch": "////"} if e.predicted else {"facecolor": colour}
        axis.barh(y, faster, height=0.85, edgecolor=colour, linewidth=1, **fill)
        axis.annotate(f"{faster:.1f}x", (faster, y), xytext=(4, 0), va="center", **NOTE)
        places.append(y)
        y += 1
    names = [f"{e['shape']}, {e['mode']}, C {e['chunk_size']}: {e['impl']}" for e in rows]
    axis.set_yticks(places, names, fontsize=7)
    axis.set_ylim(max(y, FEWEST_BARS), -1)  # so that few bars are no thicker than many
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(min(0.8, *times), 1.6 * max(times))
    plain_numbers(axis.xaxis)
    axis.set_xlabel("times faster than reference\n(the released formula, multiplied in float32)")


def draw_roofline(axis, panel: Panel) -> None:
    """TFLOP/s against FLOPs a byte, both by the operations' formulas, under the machine's two ceilings."""
    gemm, copy = (max(e[name] for e in panel) / 1e3 for name in ("gemm_gflops", "copy_gbytes"))
    points = [(e["gflops"] / e["gbytes"], e["gflops"] / 1e3) for e in panel]
    ridge = gemm / copy
    low, high = (f(ridge, *(x for x, _ in points)) for f in (min, max))
    low, high = low / 3, high * 3
    axis.plot([low, ridge, high], [low * copy, gemm, gemm], color="black", linewidth=1.2)
    axis.annotate(f"GEMM {gemm:.3g} TFLOP/s", (high, gemm), xytext=(-4, 4), ha="right", **NOTE)
    axis.annotate(f"copy {copy:.3g} TB/s", (low * 1.3, low * 1.3 * copy), xytext=(6, -3), va="top", **NOTE)
    for e, (x, y) in zip(panel, points, strict=True):
        colour = COLOURS.get(e["impl"], OTHER)
        axis.plot(x, y, MARKERS.get(e["op"], "*"), color=colour, markersize=6, alpha=0.8,
                  markerfacecolor="white" if e.predicted else colour)  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs a byte, by formula")
    axis.set_ylabel("TFLOP/s")


TIME = Picture("time", "Time of the scan against the chunk size",
               "a scan at two chunk sizes", along("chunk_size", "milliseconds"), draw_time)  # fmt: skip
PICTURES = (
    Picture("roofline", "Where each operation stands under the roofline",
            "rows with GB/s beside GFLOP/s", with_bytes, draw_roofline),
    TIME,
    Picture("memory", "Memory of the scan against the tokens",
            "a scan at two lengths T", along("tokens", "extra_bytes"), draw_memory),
    Picture("speedup", "Speed-up over the released formula",
            "a scan beside its reference", with_speed_up, draw_speed_up),
)  # fmt: skip


# --- figures ------------------------------------------------------------------------------------------
def draw(path: Path, picture: Picture, panels: Sequence[Panel]) -> None:
    require("matplotlib", EXTRA).use("Agg")
    figures = require("matplotlib.figure", EXTRA)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    bars = max(len(panel) for panel in panels) if picture.draw is draw_speed_up else 0
    width, height = (6.2 * columns if columns > 1 else 8), max(4.2, 0.17 * bars) * rows + 0.9
    figure = figures.Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        picture.draw(axis, panel)
        axis.set_title(heading(panel), fontsize=8.5)
        axis.grid(alpha=0.25, which="major")
        axis.set_axisbelow(True)
    figure.suptitle(picture.title, fontsize=12)
    legend(figure, picture, [e for panel in panels for e in panel])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def heading(panel: Panel) -> str:
    """Measured or predicted, the machine, and what all rows of the panel share."""
    measured = [e for e in panel if not e.predicted]
    kinds = "PREDICTED, NOT MEASURED" if not measured else "MEASURED"
    kinds += " AND PREDICTED" if 0 < len(measured) < len(panel) else ""
    facts = [f"torch {measured[-1].environment['torch']}"] if measured else []
    for name, field in (("", "op"), ("", "mode"), ("", "shape"), ("T ", "tokens"), ("C ", "chunk_size"),
                        ("B ", "batch"), ("", "dtype")):  # fmt: skip
        if len({e[field] for e in panel}) == 1:
            facts.append(f"{name}{panel[0][field]}")
    if all(e["preserve_row_norm"] for e in panel):
        facts.append("row norms preserved")
    return f"{kinds}: {panel[0].place}\n{', '.join(facts)}"


def legend(figure, picture: Picture, entries: Sequence[Entry]) -> None:
    line, patch = require("matplotlib.lines", EXTRA).Line2D, require("matplotlib.patches", EXTRA).Patch
    bars, dots = picture.draw is draw_speed_up, picture.draw is draw_roofline
    handles = []
    for impl in dict.fromkeys(impl for impl, _, _ in lines_of(list(entries))):
        if not (bars and impl == "reference"):
            handles.append(patch(color=COLOURS.get(impl, OTHER), label=impl))
    if dots:
        for op in dict.fromkeys(e["op"] for e in entries):
            marker = MARKERS.get(op, "*")
            handles.append(line([], [], color="0.4", marker=marker, linestyle="", label=op))
    for predicted, label in ((False, "measured"), (True, "predicted")):
        if not any(e.predicted == predicted for e in entries):
            continue
        if bars:
            face = {"facecolor": "white", "hatch": "////"} if predicted else {"facecolor": "0.4"}
            handles.append(patch(edgecolor="0.4", label=label, **face))
        else:
            look = style("", predicted) | {"color": "0.4"} | ({"linestyle": ""} if dots else {})
            handles.append(line([], [], label=label, **look))
    if picture.draw is draw_time:
        handles.append(line([], [], color="black", linestyle=":", label="the FLOPs at the GEMM rate"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize=8)


def powers_of_two(axis, values: Iterable[int]) -> None:
    values = sorted(values)
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [str(v) for v in values], rotation=45 if len(values) > 6 else 0)
    axis.minorticks_off()


def log_axis(axis, values: Sequence[float]) -> None:
    """Ticks at 1, 2 and 5 in plain numbers, over a range wide enough to hold some of them."""
    axis.set_yscale("log")
    axis.set_ylim(min(values) / 2, max(values) * 2)
    plain_numbers(axis.yaxis)


def plain_numbers(axis) -> None:
    ticker = require("matplotlib.ticker", EXTRA)
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())
