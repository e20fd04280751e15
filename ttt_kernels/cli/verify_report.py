"""What `verify` says: the summary, what remains unverified, the entry of the GPU ledger."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ttt_kernels._config import IMPLEMENTATIONS
from ttt_kernels.cli import verify_stages as stages
from ttt_kernels.cli.verify_runner import BAD, PASSED, SKIPPED, Result
from ttt_kernels.cli.verify_tree import Version

NOTHING_YET = "Not yet run on a GPU."
NO = "no"
STRENGTH = (
    stages.COMPILED_ONLY, stages.ON_CPU, stages.INTERPRETED, stages.EMULATED, stages.ON_GPU,
)  # fmt: skip


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text; the last column takes what it needs, within reason."""
    lines = [list(columns), *([*row[:-1], textwrap.shorten(row[-1], 160)] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) - 1)]
    padded = [[*(text.ljust(w) for text, w in zip(line, widths, strict=False)), line[-1]] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def result_row(result: Result) -> tuple[str, ...]:
    return result.outcome, result.stage.name, f"{result.seconds:.0f} s", result.detail


def summary(results: Iterable[Result]) -> str:
    return table(("outcome", "stage", "time", "what it says"), map(result_row, results))


def read_records(paths: Iterable[Path]) -> list[dict]:
    """JSON lines of files that a stage may have been writing when it was ended."""
    records = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def read_timings(paths: Iterable[Path]) -> list[dict]:
    """Rows of the benchmark, each with the name of its stage."""
    return [
        {**record, "stage": path.name.partition(".jsonl")[0].replace("-", "/", 1)}
        for path in paths
        for record in read_records([path])
        if record.get("kind") == "result" and "impl" in record
    ]


def where(machine: Mapping[str, object]) -> str:
    if not machine:
        return "on a machine that could not be asked"
    return f"{', '.join(machine['gpus']) or 'no GPU'}, {machine['cpu']}, torch {machine['torch']}"


def worst_ratios(parity: Iterable[Mapping]) -> dict[str, Mapping]:
    """The case with the largest error over its budget, for each implementation."""
    worst: dict[str, Mapping] = {}
    for record in parity:
        known = worst.get(record["impl"])
        if known is None or record["error_ratio"] > known["error_ratio"]:
            worst[record["impl"]] = record
    return worst


def ratio_lines(parity: Iterable[Mapping]) -> list[str]:
    return [
        f"{impl} {r['error_ratio']:.2f} ({r['op']}, {r['dtype']}, C = {r['chunk_size']}, {r['device']})"
        for impl, r in worst_ratios(parity).items()
    ]


def what_is_verified(
    results: Sequence[Result], timings: Sequence[Mapping]
) -> list[tuple[str, str, str, str]]:
    """(implementation, what, how, by which stages or why not), for everything there is to verify."""
    claims: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for result in results:
        for impl, what, how in result.stage.shows:
            claim = (result.outcome, how, result.detail if result.outcome == SKIPPED else result.stage.name)
            claims.setdefault((impl, what), []).append(claim)
    for row in timings:  # whatever became of the stage afterwards
        impl, how = row["impl"].partition("-")[0], stages.ON_GPU if row["device"] == "cuda" else stages.ON_CPU
        claims.setdefault((impl, stages.SPEED), []).append((PASSED, how, row["stage"]))
    return [
        (impl, what, *verdict(claims.get((impl, what), [])))
        for impl in IMPLEMENTATIONS[1:]
        for what in (stages.OF_KERNELS if impl in stages.KERNELS else stages.OF_LIBRARIES)
    ]


def verdict(claims: Sequence[tuple[str, str, str]]) -> tuple[str, str]:
    """How it is verified, and by what. One stage that failed outweighs all that passed."""
    if bad := sorted({name for outcome, _, name in claims if outcome in BAD}):
        return NO, "not passed: " + brief(bad)
    if passed := [(how, name) for outcome, how, name in claims if outcome == PASSED]:
        best = max((how for how, _ in passed), key=STRENGTH.index)
        return best, brief(sorted({name for how, name in passed if how == best}))
    reasons = sorted({reason for _, _, reason in claims})
    return NO, reasons[0] if reasons else "no stage of this run shows it"


def brief(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def remaining(rows: Iterable[Sequence[str]]) -> str:
    return table(("implementation", "what", "verified", "by, or why not"), rows)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def ledger_entry(
    date: str,
    machine: Mapping[str, object],
    version: Version,
    results: Sequence[Result],
    parity: Sequence[Mapping],
    timings: str,
) -> str:
    """A section of `python_tests/gpu_ledger.md`."""
    device = ", ".join(machine["gpus"])
    lines = [
        f"## {date}: {device}",
        "",
        f"- commit {version}",
        f"- driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"triton {machine['triton']}, Python {machine['python']}, {machine['cpu']}",
    ]
    for outcome in dict.fromkeys(r.outcome for r in results):
        group = [r for r in results if r.outcome == outcome]
        lines.append(f"- {outcome}: " + "; ".join(map(in_ledger, group)))
    lines.append(f"- worst error over its budget: {'; '.join(ratio_lines(parity)) or 'not measured'}")
    lines.append(f"- timings: {timings}")
    return "\n".join(lines) + "\n"


def in_ledger(result: Result) -> str:
    """In a few words, and without the folders of the machine."""
    if result.outcome != PASSED:
        detail = re.sub(r"(?<![\w.])/(?:[^\s/'\":;,]+/)+", ".../", result.detail)
        return f"{result.stage.name}: {textwrap.shorten(detail, 120)}"
    return f"{result.stage.name} ({result.passed})" if result.passed else result.stage.name


def append_entry(ledger: str, entry: str) -> str:
    """The ledger with one more section, and without the sentence that there is none."""
    kept = ledger.replace(NOTHING_YET, "").rstrip()
    return f"{kept}\n\n{entry}"
