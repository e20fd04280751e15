"""`python -m ttt_kernels bench --compare A B`: do two runs agree?

Times of two runs differ with the machine's mood; what should not is the ratio of an implementation to a
baseline of the same run and case. Each row of both files gives a pair of such ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ttt_kernels.cli.arguments import flags
from ttt_kernels.cli.bench import BASELINES
from ttt_kernels.cli.bench_case import Case
from ttt_kernels.cli.errors import UserError, require
from ttt_kernels.cli.tables import new_table

EXTRA = "bench"
SHOWN = 10  # rows of the table: those that differ most
KEY = (*(field.name for field in fields(Case)), "impl")
Lines = Mapping[tuple, Mapping[str, object]]


@dataclass(frozen=True)
class Pair:
    """One row's time over its baseline's, in each file."""

    row: Mapping[str, object]
    baseline: str
    first: float
    second: float

    @property
    def difference(self) -> float:
        """Of the larger to the smaller: 0.05 is 5%, whichever file comes first."""
        return max(self.first, self.second) / min(self.first, self.second) - 1


def run(args: argparse.Namespace) -> int:
    """Exit code 0 however far they are apart: how much is too much is the reader's decision."""
    allowed = ("compare", "run")
    given = [name for name, value in vars(args).items() if value is not None and name not in allowed]
    if given:
        raise UserError(f"--compare measures nothing: it cannot be combined with {flags(sorted(given))}")
    first, second = (read(path) for path in args.compare)
    pairs = paired(first, second)
    if not pairs:
        raise UserError("--compare: the files have no row in common that has a baseline")
    report(pairs, len(first.keys() ^ second.keys()))
    return 0


def read(path: Path) -> Lines:
    """The results of operations in a file of JSON lines; of several about the same row the last."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        results = [r for r in records if r["kind"] == "result" and "op" in r]
        return {tuple(r[name] for name in KEY): r for r in results}
    except OSError as error:
        raise UserError(f"--compare: cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--compare: {path} must hold the JSON lines that --output writes") from None


def paired(first: Lines, second: Lines) -> list[Pair]:
    """A pair for each row of both, against the first baseline that both runs timed beside it. Of two
    baselines the later one has the pair: the other's would be its inverse."""
    pairs = []
    for key in first.keys() & second.keys():
        for baseline in BASELINES:
            if baseline == key[-1]:
                break
            ratios = ratio(first, key, baseline), ratio(second, key, baseline)
            if None not in ratios:
                pairs.append(Pair(first[key], baseline, *ratios))
                break
    return sorted(pairs, key=lambda pair: -pair.difference)


def ratio(lines: Lines, key: tuple, baseline: str) -> float | None:
    """That of paired rounds; of medians in files from before there were such."""
    row, other = lines[key], lines.get((*key[:-1], baseline))
    known = row.get(f"ratio_to_{baseline}")
    if known is None and other is not None:
        return row["milliseconds"] / other["milliseconds"]
    return known


def report(pairs: list[Pair], alone: int) -> None:
    console = require("rich.console", EXTRA).Console()
    columns = ("op", "mode", "impl", "over", "DxF", "T", "C", "B", "first", "second", "apart")
    table = new_table(columns, EXTRA, left=4)
    for pair in pairs[:SHOWN]:
        row = pair.row
        table.add_row(
            row["op"], row["mode"], row["impl"], pair.baseline, f"{row['d']}x{row['f']}", str(row["tokens"]),
            str(row["chunk_size"]), str(row["batch"]), f"{pair.first:.3g}", f"{pair.second:.3g}",
            f"{pair.difference:.1%}",
        )  # fmt: skip
    console.print(table)
    differences = [pair.difference for pair in pairs]
    more = f"; rows in one file only: {alone}" if alone else ""
    console.print(
        f"\n{len(pairs)} ratios: apart by {statistics.median(differences):.2%} in the median, "
        f"{max(differences):.2%} at worst{more}",
        highlight=False,
        soft_wrap=True,
    )
