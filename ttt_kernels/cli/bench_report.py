"""Benchmark results as a table, JSON lines and a plot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ttt_kernels.cli import report_pictures
from ttt_kernels.cli.bench import Results, Row
from ttt_kernels.cli.bench_case import Case
from ttt_kernels.cli.errors import require
from ttt_kernels.cli.measure import machine
from ttt_kernels.cli.report_records import Entry
from ttt_kernels.cli.tables import new_table

EXTRA = "bench"


def print_results(results: Results, environment: dict, targets: list[dict]) -> None:
    console = require("rich.console", EXTRA).Console()
    console.print(machine(environment), highlight=False)
    for rows in problems(results.rows).values():
        console.print(f"\n[bold]{heading(rows)}[/]", highlight=False)
        console.print(results_table(rows))
    for left in results.left:
        case = left.case
        console.print(
            f"{left.kind}: {case.op} {case.shape} C={case.chunk_size} {case.mode} {left.impl}: "
            f"{left.reason}",
            style="bold red" if left.kind == "refused" else "yellow",
            highlight=False,
        )
    if targets:
        console.print("\n[bold]Targets[/]")
        console.print(targets_table(targets))


def problems(rows: Iterable[Row]) -> dict[Case, list[Row]]:
    """Rows that differ only in chunk size, mode and implementation, together."""
    groups: dict[Case, list[Row]] = {}
    for row in rows:
        groups.setdefault(replace(row.case, chunk_size=1, mode="fwd"), []).append(row)
    return groups


def heading(rows: list[Row]) -> str:
    case = rows[0].case
    row_norm = ", row norms preserved" if case.preserve_row_norm else ""
    gemm = max(row.gemm_gflops for row in rows)
    return (
        f"{case.op}, {case.shape} (D {case.d}, F {case.f}), B {case.batch}, T {case.tokens}, "
        f"{case.dtype}{row_norm}; best GEMM of the run {gemm:.0f} GFLOP/s"
    )


def results_table(rows: list[Row]):
    bound = "copy" if any(row.bound == "copy" for row in rows) else "GEMM"
    names = (
        "C", "mode", "impl", "ms", "p20-p80", "GFLOP/s", bound, "faster", "MiB", "weights", "error",
    )  # fmt: skip
    table = new_table(names, EXTRA, left=3)
    previous = None
    for row in rows:
        if previous is not None and row.case != previous:
            table.add_section()
        table.add_row(*cells(row, rows))
        previous = row.case
    return table


def cells(row: Row, rows: list[Row]) -> list[str]:
    case = row.case
    return [
        str(case.chunk_size), case.mode, row.impl.removeprefix("released-"), number(row.milliseconds),
        f"{number(row.milliseconds_p20)}-{number(row.milliseconds_p80)}", f"{row.gflops:.0f}",
        ceiling_share(row, rows), speed_up(row, rows), f"{row.extra_bytes / 2**20:.0f}",
        f"{row.extra_weights:.1f}", f"{row.error_ratio:.2f}",
    ]  # fmt: skip


def ceiling_share(row: Row, rows: list[Row]) -> str:
    """Of the GEMM rate; of the copy rate where moving bytes is what bounds the operation."""
    if all(other.bound == "gemm" for other in rows):
        return f"{row.gemm_share:.0%}"
    return "-" if row.copy_share is None else f"{row.copy_share:.0%}"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def speed_up(row: Row, rows: Iterable[Row]) -> str:
    """Times faster than the reference on the same case."""
    for other in rows:
        if other.case == row.case and other.impl == "reference":
            return f"{other.milliseconds / row.milliseconds:.2f}"
    return "-"


def targets_table(targets: list[dict]):
    table = new_table(("target", "wanted", "measured", "reached"), EXTRA)
    words = {True: "[green]yes[/]", False: "[red]no[/]", None: "not measured"}
    for target in targets:
        value = "-" if target["measured"] is None else f"{target['measured']:.3g}"
        table.add_row(target["target"], target["wanted"], value, words[target["reached"]])
    return table


def plot(path: Path, results: Results, environment: dict) -> None:
    """Time against chunk size, one panel per problem and mode, with the time a GEMM would take."""
    panels: dict[Case, list[Entry]] = {}
    for row in results.rows:
        panels.setdefault(replace(row.case, chunk_size=1), []).append(Entry(row.as_record(), environment))
    picture = replace(report_pictures.TIME, title="Time against the chunk size")
    report_pictures.draw(path, picture, list(panels.values()))
