"""Compiled kernels and predicted times as terminal tables, JSON, and the tables of a document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from ttt_kernels.cli.documents import fill, markdown_head, markdown_row, marked
from ttt_kernels.cli.errors import UserError
from ttt_kernels.cli.tables import new_table
from ttt_kernels.testing.kernel_report import KernelReport
from ttt_kernels.testing.kernel_survey import Case, Compiled
from ttt_kernels.testing.roofline import MACHINES, Machine

EXTRA = "bench"
BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"
KERNEL_COLUMNS = (
    "kernel", "tile", "w/s", "regs", "KB", "spill", "matrix", "16 B", "/SM", "copies", "used by",
)  # fmt: skip
ON_TERMINAL = 9  # the first of them fit into 80 columns
TIME_COLUMNS = ("operation", "C", "B", "launches", "ms", "roof ms", "limit", "weights")
# FLOPs per token and element of W that the method needs (docs/method.md): the yardstick of a share.
METHOD_FLOPS = {"scan fwd": 4, "scan fwd, split plan": 4, "scan fwd+bwd": 14}
PREDICTED = "Predicted, not measured: no GPU has run these kernels."


def kernel_users(compiled: Iterable[Compiled]) -> dict[KernelReport, list[str]]:
    """Every kernel once, and the operations that launch it."""
    users: dict[KernelReport, list[str]] = {}
    for one in compiled:
        for report in one.kernels:
            names = users.setdefault(report, [])
            if one.case.operation not in names:
                names.append(one.case.operation)
    return users


def kernel_rows(compiled: Iterable[Compiled]) -> list[tuple[str, ...]]:
    """A row for every tile of a kernel. Versions that differ in flags only share one: least to most."""
    groups: dict[tuple, dict[KernelReport, list[str]]] = {}
    for report, users in kernel_users(compiled).items():
        key = (report.kernel, report.dtype, report.block_sizes, report.warps, report.stages)
        groups.setdefault(key, {})[report] = users
    users = [list(dict.fromkeys(sum(group.values(), []))) for group in groups.values()]
    return [kernel_row(list(group), names) for group, names in zip(groups.values(), users, strict=True)]


def kernel_row(reports: Sequence[KernelReport], users: Sequence[str]) -> tuple[str, ...]:
    first = reports[0]
    matrix = {name: between(getattr(r, name) for r in reports) for name in ("wgmma", "tcgen05", "mma_sync")}
    copies = {name: between(getattr(r, name) for r in reports) for name in ("cp_async", "tma")}
    return (
        first.kernel.removesuffix("_kernel"),
        f"{first.dtype} {first.block_sizes}",
        f"{first.warps}/{first.stages}",
        between(r.registers for r in reports),
        between(round(r.shared_memory / 1024) for r in reports),
        between(r.spill_stores + r.spill_loads for r in reports),
        ", ".join(f"{count} {name}" for name, count in matrix.items() if count != "0") or "-",
        between(round(100 * r.wide_loads) for r in reports) + "%",
        between(r.resident_blocks for r in reports),
        ", ".join(f"{count} {name}" for name, count in copies.items() if count != "0") or "-",
        ", ".join(users),
    )


def between(numbers: Iterable[int]) -> str:
    low, *_, high = sorted([*numbers] * 2)
    return f"{low}" if low == high else f"{low}-{high}"


def time_row(one: Compiled, machine: Machine) -> tuple[str, ...]:
    predicted, limit = one.predict(machine), limit_seconds(one.case, machine)
    tokens = f", {one.case.tokens} tokens" if not chunked(one.case) and one.case.tokens > 1 else ""
    return (
        one.case.operation + tokens,
        str(one.case.chunk_size) if chunked(one.case) else "",
        str(one.case.batch),
        str(predicted.launches),
        f"{predicted.seconds * 1e3:.3g}",
        f"{predicted.roof * 1e3:.3g}",
        f"{limit / predicted.seconds:.0%}" if limit else "",
        f"{one.extra_bytes / (4 * one.case.d * one.case.f):.2f}",
    )


def chunked(case: Case) -> bool:
    return not case.operation.startswith("decode apply")


def limit_seconds(case: Case, machine: Machine) -> float:
    """What the method itself needs at the machine's rate: FLOPs of a scan, weights read in decode."""
    weight = case.d * case.f * case.batch
    if case.operation in METHOD_FLOPS:
        return METHOD_FLOPS[case.operation] * weight * case.tokens / machine.flops
    if case.operation == "decode apply":
        return 4 * weight / machine.bandwidth
    return 0.0


def machines_of(compiled: Sequence[Compiled]) -> list[Machine]:
    built = {one.architecture for one in compiled}
    return [machine for machine in MACHINES.values() if machine.architecture in built]


def shapes_of(compiled: Sequence[Compiled]) -> dict[str, list[Compiled]]:
    """By model; models whose layers are alike share a heading."""
    by_shape: dict[str, list[Compiled]] = {}
    for one in compiled:
        by_shape.setdefault(one.case.shape, []).append(one)
    merged: dict[str, list[Compiled]] = {}
    for shape, ones in by_shape.items():
        facts = [(o.case.operation, o.case.d, o.case.f, o.case.preserve_row_norm) for o in ones]
        twin = next(
            (
                name
                for name, others in merged.items()
                if facts == [(o.case.operation, o.case.d, o.case.f, o.case.preserve_row_norm) for o in others]
            ),
            None,
        )
        if twin is None:
            merged[shape] = ones
        else:
            merged = {f"{twin}, {shape}" if n == twin else n: o for n, o in merged.items()}
    return merged


def heading(machine: Machine, shape: str, case: Case) -> str:
    rows = ", row norms preserved" if case.preserve_row_norm else ""
    return f"{machine.name}, {shape} (D {case.d}, F {case.f}), bfloat16, T {case.tokens}{rows}"


def print_tables(console, compiled: Sequence[Compiled]) -> None:
    for architecture in dict.fromkeys(one.architecture for one in compiled):
        table = new_table(KERNEL_COLUMNS[:ON_TERMINAL], EXTRA, left=2)
        for row in kernel_rows(one for one in compiled if one.architecture == architecture):
            table.add_row(*row[:ON_TERMINAL])
        console.print(f"\n[bold]sm_{architecture}[/]", highlight=False)
        console.print(table)
    console.print(f"\n{PREDICTED}", highlight=False)
    for title, columns, rows in time_tables(compiled):
        table = new_table(columns, EXTRA)
        for row in rows:
            table.add_row(*row)
        console.print(f"\n[bold]{title}[/]", highlight=False)
        console.print(table)


def time_tables(compiled: Sequence[Compiled]) -> list[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
    """Title, columns, rows: every operation on the machine of an architecture that has numbers, then
    the scans on all machines."""
    machines = machines_of(compiled)
    main = MACHINES["H200"] if MACHINES["H200"] in machines else machines[0]
    shapes = shapes_of(compiled)
    tables: list[tuple] = [
        (
            heading(main, shape, ones[0].case),
            TIME_COLUMNS,
            [time_row(one, main) for one in ones if one.architecture == main.architecture],
        )
        for shape, ones in shapes.items()
    ]
    scans = [
        (shape, one.case)
        for shape, ones in shapes.items()
        for one in ones
        if one.architecture == main.architecture and one.case.operation in METHOD_FLOPS
    ]
    rows = [
        (f"{case.operation}, {shape}", str(case.chunk_size), *scan_times(compiled, case, machines))
        for shape, case in scans
    ]
    columns = ("operation", "C", *(f"{machine.name} ms" for machine in machines))
    return [*tables, ("Scans on all machines, and the share of the limit", columns, rows)]


def scan_times(compiled: Sequence[Compiled], case: Case, machines: Sequence[Machine]) -> list[str]:
    by_architecture = {one.architecture: one for one in compiled if one.case == case}
    cells = []
    for machine in machines:
        seconds = by_architecture[machine.architecture].predict(machine).seconds
        cells.append(f"{seconds * 1e3:.3g} ({limit_seconds(case, machine) / seconds:.0%})")
    return cells


# --- files ----------------------------------------------------------------------------------------
def write_json(path: Path, compiled: Sequence[Compiled]) -> None:
    facts = {"triton": version("triton"), "torch": version("torch")}
    kernels = [kernel_json(report, users) for report, users in kernel_users(compiled).items()]
    times = [
        {**asdict(one.case), "extra_bytes": one.extra_bytes, "predicted": asdict(one.predict(machine))}
        for machine in machines_of(compiled)
        for one in compiled
        if one.architecture == machine.architecture
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": facts, "kernels": kernels, "times": times}, indent=1) + "\n")


def kernel_json(report: KernelReport, users: Sequence[str]) -> dict[str, object]:
    derived = {"resident_blocks": report.resident_blocks, "wide_loads": report.wide_loads, "used_by": users}
    return {**asdict(report), "tile": {name: str(value) for name, value in report.tile}, **derived}


def markdown(compiled: Sequence[Compiled]) -> str:
    lines = [f"Compiled by Triton {version('triton')}."]
    for architecture in dict.fromkeys(one.architecture for one in compiled):
        rows = kernel_rows(one for one in compiled if one.architecture == architecture)
        lines += ["", f"### sm_{architecture}", "", *markdown_head(KERNEL_COLUMNS), *map(markdown_row, rows)]
    lines += ["", "### Predicted times", "", PREDICTED]
    for title, columns, rows in time_tables(compiled):
        lines += ["", f"**{title}**", "", *markdown_head(columns), *map(markdown_row, rows)]
    return "\n".join(lines)


def check_markers(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"--markdown must name an existing document, got {path}")
    marked(path.read_text(encoding="utf-8"), BEGIN, END, f"--markdown: {path}")


def write_markdown(path: Path, compiled: Sequence[Compiled]) -> None:
    """Replace what is between the markers."""
    text = path.read_text(encoding="utf-8")
    new = fill(text, BEGIN, END, f"--markdown: {path}", markdown(compiled))
    path.write_text(new, encoding="utf-8")
