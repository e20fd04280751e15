"""Results of `bench` and predictions, read from JSON lines: what is shown beside what.

A file holds any number of runs, each an "environment" line and the lines that follow it. Of several lines
about the same row of the same machine the newest counts: the latest `date` of an environment, and after
that the last in the order of the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path

from ttt_kernels.cli.bench_case import Case
from ttt_kernels.cli.errors import UserError
from ttt_kernels.cli.measure import machine
from ttt_kernels.testing.roofline import Machine, machine_called

CASE_FIELDS = tuple(field.name for field in fields(Case))
# What makes two lines speak of the same row; most of the others are of rows that time a model.
IDENTITY = (*CASE_FIELDS, "suite", "call", "weights", "layers", "inner_optimizer", "impl", "target")
PREDICTION, RESULT, REFUSED, SKIPPED, TARGET = "prediction", "result", "refused", "skipped", "target"
KINDS = (PREDICTION, RESULT, REFUSED, SKIPPED, TARGET)
DEFAULTS = {field.name: field.default for field in fields(Case) if field.default is not MISSING}


@dataclass(frozen=True, eq=False)
class Entry:
    """One line, and the environment it belongs to."""

    record: Mapping[str, object]
    environment: Mapping[str, object]

    def __getitem__(self, name: str) -> object:
        """A field of the line; None where this kind of line has none."""
        return self.record.get(name)

    @property
    def kind(self) -> str:
        return self.record["kind"]

    @property
    def predicted(self) -> bool:
        return self.kind == PREDICTION

    @property
    def timed(self) -> bool:
        return self.kind in (PREDICTION, RESULT)

    @cached_property
    def gpu(self) -> Machine | None:
        """The machine of `testing.roofline` that this is about."""
        return machine_called(str(self.environment["device"]))

    @cached_property
    def place(self) -> str:
        """The machine, for headings; measurements and predictions of a GPU have the same."""
        if self.gpu is not None:
            return self.gpu.name
        count = self.environment["threads"]
        return f"{self.environment['device']}, {count} thread{'' if count == 1 else 's'}"

    @property
    def versions(self) -> str:
        """Machine and versions as the environment has them."""
        return machine(self.environment)

    @cached_property
    def key(self) -> tuple:
        """Equal for a measurement and a prediction of the same row of the same machine."""
        return self.place, *(self.identity(name) for name in IDENTITY)

    @cached_property
    def problem(self) -> tuple:
        """The key without the implementation: rows that can be compared."""
        return self.place, *(self.identity(name) for name in IDENTITY if name != "impl")

    def identity(self, name: str) -> object:
        """Lines of an operation from before a field existed have its default."""
        return self.record.get(name, DEFAULTS.get(name) if "d" in self.record else None)

    def speaks_of(self, other: Entry) -> bool:
        """Does what identifies this line, which may be less than a whole row (a model that was refused),
        fit the other one too?"""
        known = (name for name in IDENTITY if name in self.record)
        return all(self.record[name] == other.identity(name) for name in known)


def read(folder: Path) -> list[Entry]:
    """Every line of every JSON-lines file under a folder that a report shows, the newest last.

    Raises:
        UserError: no such folder, or a line that is not understood, by file and number.
    """
    if not folder.is_dir():
        raise UserError(f"--results must name a folder of JSON lines, got {folder}")
    entries = [entry for path in sorted(folder.rglob("*.jsonl")) for entry in read_file(path)]
    return sorted(entries, key=lambda entry: str(entry.environment.get("date", "")))


def read_file(path: Path) -> Iterable[Entry]:
    environment = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            kind = record["kind"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f'{path}, line {number}: must be a JSON object with a "kind"') from None
        if kind == "environment":
            environment = record
        elif environment is None:
            raise UserError(f'{path}, line {number}: a "{kind}" before any "environment"')
        elif kind in KINDS:
            for one in sides(record):
                yield Entry(one, environment)


def sides(record: Mapping[str, object]) -> Iterable[Mapping[str, object]]:
    """A line that times a model in two ways, the plain one first, as one line each."""
    times = record.get("milliseconds")
    if not isinstance(times, Mapping):
        yield record
        return
    first = next(iter(times))
    for impl in times:
        mine = {name: x[impl] if isinstance(x, Mapping) else x for name, x in record.items()}
        ratio = 1.0 if impl == first else mine.get("ratio")
        yield {**mine, "impl": impl, f"ratio_to_{first}": ratio}


def newest(entries: Sequence[Entry]) -> list[Entry]:
    """One entry a row, the oldest first. Predictions and measurements are apart.

    A refused measurement replaces older ones of its row, so that no time stands for wrong results; one
    that was only skipped does not.
    """
    topics: dict[tuple, list[Entry]] = {}
    for entry in entries:
        about = (entry.predicted, entry.place, *(entry.identity(n) for n in ("op", "suite", "shape")))
        kept = topics.setdefault(about, [])
        old = [e for e in kept if entry.speaks_of(e) or e.speaks_of(entry)]
        if entry.kind != SKIPPED or all(e.kind == SKIPPED for e in old):
            topics[about] = [e for e in kept if e not in old] + [entry]
    return [entry for kept in topics.values() for entry in kept]


def baseline(entry: Entry, entries: Iterable[Entry]) -> Entry | None:
    """What a row is compared with: the reference on the same problem; for a model the plain one."""
    name = "reference" if entry["d"] else "plain"
    alike = (e for e in entries if e.timed and e["impl"] == name and e.predicted == entry.predicted)
    return next((e for e in alike if e.problem == entry.problem), None)


def speed_up(entry: Entry, entries: Iterable[Entry]) -> float | None:
    """Its baseline's time over its own; the median of the rounds' ratios where the run has kept it."""
    slow = baseline(entry, entries)
    if slow is None or not entry.timed:
        return None
    ratio = entry[f"ratio_to_{slow['impl']}"]
    return 1 / ratio if ratio else slow["milliseconds"] / entry["milliseconds"]
