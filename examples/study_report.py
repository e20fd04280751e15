"""Tables and the picture of the study, from what `study.py` has computed so far.

    python examples/study_report.py --work outputs/study --picture docs/images/results.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from study import CONV, COUNTS, DEPTHS, LENGTH, MAIN, RUNS, captured

EDGES = (0, 128, 256, 512, 768, 1024, 1280, 1536, 1792, LENGTH - 1)
RESAMPLES = 10_000
ON_STATIC = "on-static-0"


class Losses:
    """on - off per text and position, [texts, T - 1], of every condition that has been computed."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.off = {n: self._off(n) for n in COUNTS if any((work / "captured").glob(f"{n}-*.pt"))}

    def _off(self, texts: str) -> np.ndarray:
        return np.stack([t["off"].numpy() for t in captured(self.work, texts)])

    def change(self, run: str, texts: str, kind: str = "") -> np.ndarray | None:
        file = self.work / "losses" / f"{run}.{texts}{kind and '.' + kind}.pt"
        return torch.load(file).numpy() - self.off[texts] if file.exists() else None

    def paired(self, texts: str, kind: str) -> np.ndarray | None:
        """Own writes minus another's, mean over the seeds for which that was computed."""
        pairs = [(self.change(run, texts), self.change(run, texts, kind)) for run in MAIN]
        found = [own - other for own, other in pairs if own is not None and other is not None]
        return np.mean(found, 0) if found else None

    def main(self, texts: str, kind: str = "", runs: list[str] = MAIN) -> np.ndarray | None:
        """Mean over the seeds."""
        seeds = [c for run in runs if (c := self.change(run, texts, kind)) is not None]
        return np.mean(seeds, 0) if seeds else None


def interval(per_text: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95% bootstrap interval over texts."""
    draws = np.random.default_rng(0).integers(0, len(per_text), (RESAMPLES, len(per_text)))
    low, high = np.percentile(per_text[draws].mean(1), (2.5, 97.5))
    return float(per_text.mean()), float(low), float(high)


def by_position(change: np.ndarray) -> list[tuple[float, float, float]]:
    pairs = zip(EDGES, EDGES[1:], strict=False)
    return [interval(change[:, a:b].mean(1)) for a, b in pairs]


def conditions(losses: Losses) -> dict[str, np.ndarray]:
    """Every condition on the test addresses, by title."""
    found = {
        "specnorm, mean of the seeds": losses.main("test"),
        **{run: losses.change(run, "test") for run in MAIN},
        "conv target, mean of the seeds": losses.main("test", runs=CONV),
        "written by another address": losses.main("test", "other"),
        "written by the same, shuffled": losses.main("test", "shuffled"),
        **{run: losses.change(run, "test") for run in RUNS if run not in MAIN},
    }
    return {title: change for title, change in found.items() if change is not None}


def cell(value: tuple[float, float, float]) -> str:
    return f"{value[0]:+.4f} [{value[1]:+.4f}, {value[2]:+.4f}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def closed_form(losses: Losses) -> list[list[str]]:
    """The second half of every test text: plain, closed form, and the scan."""
    half, rows = LENGTH // 2, []
    off = losses.off["test"][:, half - 1 :]
    for file in sorted((losses.work / "losses").glob("ridge-*.test.pt")):
        change = (torch.load(file).numpy() - off).mean(1)
        rows.append([file.name.removesuffix(".test.pt"), cell(interval(change))])
    scan = losses.main("test")
    return rows if scan is None else [*rows, ["scan", cell(interval(scan[:, half - 1 :].mean(1)))]]


def print_all(losses: Losses) -> None:
    found = conditions(losses)
    print(f"{len(losses.off['test'])} test texts, on - off in nats per token, 95% interval over texts\n")
    positions = [f"{a}-{b - 1}" for a, b in zip(EDGES, EDGES[1:], strict=False)]
    whole = [[t, cell(interval(c.mean(1))), cell(interval(c[:, 3 * LENGTH // 4 :].mean(1)))]
             for t, c in found.items()]  # fmt: skip
    print(table(["condition", "all positions", "last quarter"], whole), "\n")
    columns = {t: by_position(c) for t, c in found.items()}
    rows = [[p, *(f"{c[i][0]:+.4f}" for c in columns.values())] for i, p in enumerate(positions)]
    print(table(["position", *columns], rows), "\n")
    for title, runs in (("specnorm", MAIN), ("conv target", CONV)):
        if (change := losses.main("test", runs=runs)) is None:
            continue
        rows = [[p, f"{losses.off['test'][:, a:b].mean():.4f}", cell(v)] for p, a, b, v in
                zip(positions, EDGES, EDGES[1:], by_position(change), strict=False)]  # fmt: skip
        print(table(["position", "off", f"{title}, mean of the seeds: on - off"], rows), "\n")
    for kind in ("other", "shuffled"):
        if (pair := losses.paired("test", kind)) is not None:
            print(f"own text minus {kind}: {cell(interval(pair.mean(1)))}")
            print("  by position: " + ", ".join(cell(v) for v in by_position(pair)))
    if ON_STATIC in found and "static-0" in found:
        print("\nfast weights trained on top of the static update, minus that update alone")
        for kind in ("", "other", "shuffled"):
            if (change := losses.change(ON_STATIC, "test", kind)) is not None:
                added = change - found["static-0"]
                print(f"{kind or 'own text'}: {cell(interval(added.mean(1)))}; by position "
                      + ", ".join(f"{v[0]:+.4f}" for v in by_position(added)))  # fmt: skip
    for texts in losses.off:
        if (change := losses.main(texts)) is not None:
            print(f"{texts}: {cell(interval(change.mean(1)))}, last quarter "
                  f"{cell(interval(change[:, 3 * LENGTH // 4 :].mean(1)))}")  # fmt: skip
    print("\n" + table(["tokens 1024 on", "on - off"], closed_form(losses)))
    for file in sorted((losses.work / "losses").glob("*.writes.json")):
        print(f"\n{file.name}")
        for layer, values in json.loads(file.read_text()).items():
            print(f"  layer {layer}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
    recall = losses.work / "losses" / "recall.json"
    if recall.exists():
        values = {float(d): np.array(v) for d, v in json.loads(recall.read_text()).items()}
        rows = [[f"{d}", *(f"{x:.3f}" for x in values[d].mean(0)), cell(interval(np.diff(values[d])[:, 0]))]
                for d in DEPTHS]  # fmt: skip
        print("\n" + table(["depth", "off", "on", "on - off"], rows))


def draw(losses: Losses, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = conditions(losses)
    middle = [(a + b) / 2 for a, b in zip(EDGES, EDGES[1:], strict=False)]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2))
    main = {"specnorm, mean of the seeds": "specnorm (3 seeds)"}
    conv = {"conv target, mean of the seeds": "conv target (3 seeds)"}
    panels = (
        ("How it writes", main | {"sgd-0": "sgd", "clip-0": "clip"} | conv),
        ("Controls", main | {t: t for t in found if t.startswith("written")} | {"static-0": "static update"}),
    )
    for axis, (title, titles) in zip(axes, panels, strict=False):
        for key, label in titles.items():
            if key in found:
                mean, low, high = np.array(by_position(found[key])).T
                axis.plot(middle, mean, marker="o", ms=3, label=label)
                axis.fill_between(middle, low, high, alpha=0.12)
        axis.axhline(0, color="gray", lw=0.8)
        axis.set(title=title, xlabel="position in the address", ylabel="on - off, nats per token")
        axis.legend(fontsize=8)
    names = [t for t in losses.off if losses.main(t) is not None]
    values = np.array([interval(losses.main(t).mean(1)) for t in names]).T
    axes[2].bar(names, values[0], yerr=np.abs(values[1:] - values[0]), capsize=3, color="tab:blue", alpha=0.7)
    axes[2].axhline(0, color="gray", lw=0.8)
    axes[2].set(title="Texts", ylabel="on - off, nats per token")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/study"))
    parser.add_argument("--picture", type=Path, default=Path("outputs/study/results.png"))
    args = parser.parse_args()
    losses = Losses(args.work)
    print_all(losses)
    draw(losses, args.picture)


if __name__ == "__main__":
    main()
