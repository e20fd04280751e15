"""The parts of docs/benchmarks.md that `report` writes, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ttt_kernels.cli.bench_report import number
from ttt_kernels.cli.documents import markdown_head, markdown_row
from ttt_kernels.cli.report_pictures import IMPLS
from ttt_kernels.cli.report_records import REFUSED, SKIPPED, TARGET, Entry, speed_up
from ttt_kernels.testing.roofline import MACHINES, Machine

Column = tuple[str, Callable[[Entry], str]]
REACHED = {True: "yes", False: "no", None: "not measured"}


# --- measured -----------------------------------------------------------------------------------------
def measured(entries: Sequence[Entry]) -> str:
    """A chapter a machine, a table an operation, and the targets."""
    shown = [e for e in entries if not e.predicted]
    parts = [line for ones in grouped(shown, lambda e: e.place) for line in chapter(ones)]
    return "\n".join(parts) if parts else "Nothing has been measured yet."


def chapter(entries: Sequence[Entry]) -> list[str]:
    lines = [f"### {entries[0].place}", "", *dict.fromkeys(taken(e) for e in entries)]
    rows = [e for e in entries if e.timed or e.kind == REFUSED]
    for ones in grouped(rows, topic):
        lines += ["", *table(ones, result_columns(ones))]
    lines += [f"\nNot timed: {why}" for why in dict.fromkeys(map(skipped, entries)) if why]
    targets = [e for e in entries if e.kind == TARGET]
    if targets:
        lines += ["", *markdown_head(("target", "wanted", "measured", "reached")), *map(verdict, targets)]
    return [*lines, ""]


def taken(entry: Entry) -> str:
    """In what circumstances, a line each."""
    where = entry.environment
    facts = [entry.versions, *(str(where[k]) for k in ("model", "text", "date") if where.get(k))]
    if where.get("commit"):
        facts.append(f"commit {str(where['commit'])[:10]}" + (" and changes" if where.get("dirty") else ""))
    return f"- {', '.join(facts)}; load {where['load_before']:.1f} before the start"


def skipped(entry: Entry) -> str:
    return f"{title(entry)}, {case_text(entry)}: {entry['reason']}." if entry.kind == SKIPPED else ""


def verdict(entry: Entry) -> str:
    value = entry["measured"]
    cells = (entry["target"], entry["wanted"], "" if value is None else f"{value:.3g}")
    return markdown_row((*map(str, cells), REACHED[entry["reached"]]))


# --- tables of rows -------------------------------------------------------------------------------------
def grouped(entries: Iterable[Entry], by: Callable[[Entry], object]) -> list[list[Entry]]:
    groups: dict[object, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(by(entry), []).append(entry)
    return list(groups.values())


def topic(entry: Entry) -> tuple:
    """What one table is about."""
    return title(entry), entry.identity("dtype"), entry.identity("preserve_row_norm")


def title(entry: Entry) -> str:
    return str(entry["op"] or entry["suite"])


def case_text(entry: Entry) -> str:
    return ", ".join(f"{name} {cell(entry)}" for name, cell in CASE_COLUMNS if cell(entry))


def text(name: str) -> Callable[[Entry], str]:
    def cell(entry: Entry) -> str:
        value = entry.identity(name)
        return "" if value is None else str(value)

    return cell


def widths(entry: Entry) -> str:
    return f"{entry['d']} x {entry['f']}" if entry["d"] else ""


def layers(entry: Entry) -> str:
    return f"{entry['layers']} of {entry['of_layers']}, {entry['weights']}" if entry["layers"] else ""


def row_norms(entry: Entry) -> str:
    return "preserved" if entry["preserve_row_norm"] else ""


CASE_COLUMNS: tuple[Column, ...] = (
    ("model", text("shape")), ("D x F", widths), ("layers", layers), ("dtype", text("dtype")),
    ("row norms", row_norms), ("B", text("batch")), ("T", text("tokens")), ("C", text("chunk_size")),
    ("mode", text("mode")), ("call", text("call")), ("impl", text("impl")),
)  # fmt: skip


def table(entries: Sequence[Entry], columns: Sequence[Column]) -> list[str]:
    """What all rows share stands in the heading, and columns without a cell are left out."""
    rows = sorted(entries, key=rank(entries))
    first = rows[0]
    shared = [(n, c) for n, c in CASE_COLUMNS if n != "impl" and len({c(e) for e in rows}) == 1]
    heading = ", ".join([f"**{title(first)}**", *(f"{n} {c(first)}" for n, c in shared if c(first))])
    shown = [(n, c) for n, c in CASE_COLUMNS if (n, c) not in shared]
    shown += [(n, c) for n, c in columns if any(c(e) for e in rows)]
    cells = (markdown_row(c(e) for _, c in shown) for e in rows)
    return [heading, "", *markdown_head([n for n, _ in shown]), *cells]


def rank(entries: Sequence[Entry]) -> Callable[[Entry], tuple]:
    """Models as they come, small batches and long chunks first, baselines before what they are for."""
    models = list(dict.fromkeys(e["shape"] for e in entries))

    def key(e: Entry) -> tuple:
        impl = IMPLS.index(e["impl"]) if e["impl"] in IMPLS else len(IMPLS)
        case = (e["batch"] or 0, e["tokens"] or 0, -(e["chunk_size"] or 0), e["mode"] or "", e["call"] or "")
        return models.index(e["shape"]), *case, impl, str(e["impl"])

    return key


def result_columns(entries: Sequence[Entry]) -> list[Column]:
    def faster(entry: Entry) -> str:
        times = speed_up(entry, entries)
        return "" if times is None else f"{times:.2f}"

    large = max((e["gflops"] or 0 for e in entries), default=0) > 1e4
    unit, scale = ("TFLOP/s", 1e-3) if large else ("GFLOP/s", 1)
    return [
        ("ms", milliseconds), ("p20-p80", spread), ("tokens/s", of("tokens_per_second", number)),
        (unit, of("gflops", lambda x: f"{x * scale:.0f}")), ("of GEMM", share("gemm")),
        ("of copy", share("copy")), ("faster", faster),
        ("extra weights", of("extra_weights", "{:.2f}".format)),
        ("peak MiB", of("peak_bytes", mebibytes)), ("state MiB", of("state_bytes", mebibytes)),
        ("error", of("error_ratio", "{:.2f}".format)),
    ]  # fmt: skip


def share(ceiling: str) -> Callable[[Entry], str]:
    """Of the ceiling that limits the operation, and of no other."""

    def cell(entry: Entry) -> str:
        shown = entry[f"{ceiling}_share"] is not None and entry["bound"] in (None, ceiling)
        return f"{entry[f'{ceiling}_share']:.0%}" if shown else ""

    return cell


def of(name: str, write: Callable[[float], str]) -> Callable[[Entry], str]:
    return lambda entry: "" if entry[name] is None else write(entry[name])


def milliseconds(entry: Entry) -> str:
    return number(entry["milliseconds"]) if entry.timed else f"{entry.kind}: {entry['reason']}"


def spread(entry: Entry) -> str:
    low, high = entry["milliseconds_p20"], entry["milliseconds_p80"]
    return "" if low is None else f"{number(low)}-{number(high)}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}"


# --- predicted ----------------------------------------------------------------------------------------
def predicted(entries: Sequence[Entry]) -> str:
    """A table an operation: every machine's time, and beside it what was measured there."""
    mine = [e for e in entries if e.predicted]
    seen = {e.key: e for e in entries if not e.predicted and (e.timed or e.kind == REFUSED)}
    parts = [line for ones in grouped(mine, topic) for line in [*prediction_table(ones, seen), ""]]
    return "\n".join(parts) if parts else "Nothing has been predicted yet."


def prediction_table(entries: Sequence[Entry], seen: dict[tuple, Entry]) -> list[str]:
    """One row a case and implementation, from the first machine's entry of it."""
    of_row = {(e.place, row_of(e)): e for e in entries}
    machines = [m for m in MACHINES.values() if any(e.place == m.name for e in entries)]
    first = {row_of(e): e for e in reversed(entries)}
    rows = sorted(first.values(), key=entries.index)
    columns = [c for m in machines for c in machine_columns(m, of_row, seen)]
    main = next((m for m in machines if m is MACHINES["H200"]), machines[0])

    def on_main(write: Callable[[Entry], str]) -> Callable[[Entry], str]:
        def cell(entry: Entry) -> str:
            found = of_row.get((main.name, row_of(entry)))
            return "" if found is None else write(found)

        return cell

    columns += [
        (f"{main.name}: launches", on_main(of("launches", str))),
        ("of GEMM", on_main(share("gemm"))),
        ("of copy", on_main(share("copy"))),
        ("extra weights", on_main(of("extra_weights", "{:.2f}".format))),
        ("most time", on_main(largest)),
    ]
    return table(rows, columns)


def row_of(entry: Entry) -> tuple:
    return entry.key[1:]


def machine_columns(machine: Machine, of_row: dict, seen: dict[tuple, Entry]) -> list[Column]:
    """Predicted; where something was measured there, that too, and measured over predicted."""

    def guess(entry: Entry) -> str:
        found = of_row.get((machine.name, row_of(entry)))
        return "" if found is None else number(found["milliseconds"])

    def fact(entry: Entry) -> str:
        found = seen.get((machine.name, *row_of(entry)))
        return "" if found is None else milliseconds(found)

    def ratio(entry: Entry) -> str:
        key = (machine.name, row_of(entry))
        found = seen.get((machine.name, *row_of(entry)))
        if found is None or not found.timed or key not in of_row:
            return ""
        return f"{found['milliseconds'] / of_row[key]['milliseconds']:.2f}"

    parts = (("predicted ms", guess), ("measured ms", fact), ("measured / predicted", ratio))
    return [(f"{machine.name}: {part}", cell) for part, cell in parts]


def largest(entry: Entry) -> str:
    """The kernel or library call with most of the time, and what it was compiled to."""
    facts = entry["largest"]
    name = f"{facts['name'].removesuffix('_kernel')} {facts['share']:.0%}"
    if "registers" not in facts:
        return name
    room = f"{facts['shared_memory'] / 1024:.0f} KB, {facts['resident_blocks']}/SM"
    return f"{name}: {facts['registers']} regs, {room}"


# --- machines -----------------------------------------------------------------------------------------
QUANTITIES: tuple[tuple[str, str, float, str], ...] = (
    ("multiprocessors", "processors", 1, "{:.0f}"),
    ("bf16 products, data sheet, TFLOP/s", "peak_flops", 1e12, "{:.0f}"),
    ("bf16 products, reached, TFLOP/s", "flops", 1e12, "{:.0f}"),
    ("float32 products, reached, TFLOP/s", "float32_flops", 1e12, "{:.0f}"),
    ("memory, GB", "memory_bytes", 1e9, "{:.0f}"),
    ("memory, data sheet, TB/s", "peak_bandwidth", 1e12, "{:.2f}"),
    ("memory, reached, TB/s", "bandwidth", 1e12, "{:.2f}"),
    ("L2, MB", "l2_bytes", 1e6, "{:.0f}"),
    ("L2 to all multiprocessors, TB/s", "l2_bandwidth", 1e12, "{:.1f}"),
)


def machines() -> str:
    """What predictions rest on; every number with where it comes from."""
    sources: dict[str, int] = {}
    rows = []
    for name, field, unit, form in QUANTITIES:
        cells = []
        for machine in MACHINES.values():
            source = sources.setdefault(machine.sources[field], len(sources) + 1)
            cells.append(f"{form.format(getattr(machine, field) / unit)} [{source}]")
        rows.append(markdown_row((name, *cells)))
    head = markdown_head(("", *(machine.name for machine in MACHINES.values())))
    notes = [f"{count}. {source[0].upper()}{source[1:]}." for source, count in sources.items()]
    return "\n".join([*head, *rows, "", "Sources:", "", *notes])
