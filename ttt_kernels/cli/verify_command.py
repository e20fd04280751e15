"""`python -m ttt_kernels verify`: build, test, sanitise, measure; what this machine can, and say what not."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path

from ttt_kernels import _config
from ttt_kernels.cli import verify_report, verify_stages, verify_tree
from ttt_kernels.cli.arguments import positive_int
from ttt_kernels.cli.errors import UserError
from ttt_kernels.cli.verify_runner import BAD, PASSED, Phase, Result, Runner
from ttt_kernels.cli.verify_stages import Place

INTERRUPTED = 130
OUTPUT = {"PYTHONUNBUFFERED": "1", "COLUMNS": "250"}  # at once, and unabridged
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PIP_NO_INDEX": "1"}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="build, test and measure all that can be on this machine, and say what cannot",
        description="Copy the source tree, build it for the GPUs that are here, and run tests, "
        "compute-sanitizer, error budgets and benchmarks, each stage with a time limit of its own. On a "
        "GPU the results go into python_tests/gpu_ledger.md and benchmarks/results. Offline; no "
        "git, no write access to the tree and no GPU is needed. docs/verify.md explains the stages.",
    )
    parser.add_argument("--stage", nargs="+", metavar="NAME",
                        help="only these: names or patterns, such as build tests '*cuda*'")  # fmt: skip
    parser.add_argument("--total", type=positive_int, metavar="SECONDS",
                        help="for everything; default: 520 with a GPU, 580 without")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/verify of the tree")
    parser.add_argument("--keep", action="store_true", help="keep the copy of the tree, and say where it is")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    begun, now = time.monotonic(), datetime.now(timezone.utc)
    tree = verify_tree.find_tree()
    check_patterns(args.stage, tree)
    files = verify_tree.source_files(tree)
    state = verify_tree.version(tree, files)
    output = output_folder(args.output, tree, f"{now:%Y%m%d-%H%M%S}-{state.short}")
    scratch = Path(tempfile.mkdtemp(prefix="ttt-verify-"))
    try:
        verify_tree.copy_tree(tree, files, scratch / "tree")
        verification = Verification(tree, state, now, output, scratch)
        verification.run(args.stage, begun, args.total)
        return verification.report(complete=not args.stage)
    finally:
        if args.keep:
            say(f"the copy of the tree is kept: {scratch / 'tree'}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)


def say(text: str) -> None:
    """Progress; standard output is for the summary."""
    print(text, file=sys.stderr, flush=True)


def output_folder(asked: Path | None, tree: Path, name: str) -> Path:
    """A folder for this run: where asked, else in the tree, in the current folder, or a temporary one."""
    elsewhere = (Path.cwd() / "ttt-verify", Path(tempfile.gettempdir()) / f"ttt-verify-{os.getuid()}")
    candidates = [asked] if asked else [tree / "outputs" / "verify", *elsewhere]
    for folder in candidates:
        if verify_tree.writable(folder / name / "logs"):
            return (folder / name).resolve()
    tried = ", ".join(map(str, candidates))
    raise UserError(f"--output must be a folder that can be written into, got {tried}")


class Verification:
    """One run: its folders, its results, and what becomes of them."""

    def __init__(
        self, tree: Path, state: verify_tree.Version, now: datetime, output: Path, scratch: Path
    ) -> None:
        self.tree, self.state, self.now = tree, state, now
        self.output, self.scratch = output, scratch
        self.results: list[Result] = []
        self.machine: dict[str, object] = {}
        self.interrupted = False

    def run(self, patterns: Sequence[str] | None, begun: float, total: float | None) -> None:
        environment = self.environment()
        end = begun + (total or verify_stages.TOTAL_S["cpu"])
        runner = Runner(self.scratch / "tree", self.output / "logs", environment, end, self.done)
        say(f"results and logs: {self.output}")
        try:
            runner.run([verify_stages.machine_phase()])
            self.machine = self.read_machine()
            self.record({"kind": "version", "date": self.date, **asdict(self.state)})
            self.record({"kind": "machine", **self.machine})
            place = Place(self.scratch / "tree", self.output, environment, self.machine)
            if place.gpu and total is None:
                runner.end = begun + verify_stages.TOTAL_S["gpu"]
            runner.run(choose(verify_stages.phases(place), patterns))
        except KeyboardInterrupt:
            self.interrupted = True

    def environment(self) -> dict[str, str]:
        """What every stage gets: the copy first on the path, caches in the scratch folder, no network, and
        none of the variables that would change what is tested."""
        environment = {**_config.compiling_environment(), **OFFLINE, **OUTPUT}
        for name in ("TTT_KERNELS_IMPL", "PYTEST_ADDOPTS", "MAKEFLAGS"):
            environment.pop(name, None)
        path = [str(self.scratch / "tree"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        for variable in ("TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            environment[variable] = str(self.scratch / variable.lower())
            (self.scratch / variable.lower()).mkdir()
        return environment

    def log(self, name: str) -> list[str]:
        """What a stage that passed wrote."""
        passed = [result.stage.name for result in self.results if result.outcome == PASSED]
        path = self.output / "logs" / f"{name}.log"
        return [path.read_text(encoding="utf-8").strip()] if name in passed else []

    def read_machine(self) -> dict[str, object]:
        """Empty where asking failed: then nothing is tried on a GPU, and the stage's line says so."""
        lines = [line for log in self.log("machine") for line in log.splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else {}

    @property
    def date(self) -> str:
        return f"{self.now:%Y-%m-%d %H:%M} UTC"

    def done(self, result: Result) -> None:
        self.results.append(result)
        self.record(result.as_record())
        say("{:<11} {:<44} {:>5}  {}".format(*verify_report.result_row(result)).rstrip())

    def record(self, line: dict[str, object]) -> None:
        """At once: whatever happens later, this is kept."""
        with (self.output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def timing_files(self) -> list[Path]:
        """Also those of a benchmark that was ended."""
        return sorted([*self.output.glob("benchmark-*.jsonl"), *self.output.glob("benchmark-*.partial")])

    def report(self, complete: bool) -> int:
        """Print and write it all; exit code 0 if nothing failed."""
        parity = verify_report.read_records(sorted(self.output.glob("parity-*.jsonl")))
        timings = verify_report.read_timings(self.timing_files())
        rows = verify_report.what_is_verified(self.results, timings)
        seconds = sum(result.cpu_seconds for result in self.results)
        text = "\n\n".join(
            [
                f"{self.date}, commit {self.state}, {verify_report.where(self.machine)}",
                *self.log("info"),
                verify_report.summary(self.results),
                "Error over its budget (good: at most 1), worst case of each implementation\n"
                + "\n".join(verify_report.ratio_lines(parity) or ["not measured"]),
                verify_report.remaining(rows),
                f"{seconds:.0f} CPU seconds. Logs, ratios and timings: {self.output}",
            ]
        )
        (self.output / "summary.txt").write_text(text + "\n", encoding="utf-8")
        print(text)
        if self.machine.get("gpus"):
            self.publish(parity, complete and not self.interrupted)
        if self.interrupted:
            return INTERRUPTED
        return int(any(result.outcome in BAD for result in self.results))

    def publish(self, parity: Sequence[dict], complete: bool) -> None:
        """The ledger's entry and the benchmark's rows: into the tree after a complete run that can write
        there; in any case into the output folder."""
        name = verify_report.slug(str(self.machine["gpus"][0]))
        rows = Path(verify_tree.RESULTS) / name / f"{self.now:%Y-%m-%d}-{self.state.short}.jsonl"
        lines = "".join(p.read_text(encoding="utf-8") for p in self.timing_files())
        entry = verify_report.ledger_entry(self.date, self.machine, self.state, self.results, parity,
                                           f"`{rows}`" if lines else "none")  # fmt: skip
        (self.output / "ledger_entry.md").write_text(entry, encoding="utf-8")
        if not complete:
            return say("not a complete run: its entry is not added to the ledger")
        try:
            if lines:
                (self.tree / rows).parent.mkdir(parents=True, exist_ok=True)
                with (self.tree / rows).open("a", encoding="utf-8") as file:
                    file.write(lines)
            ledger = self.tree / verify_tree.LEDGER
            ledger.write_text(verify_report.append_entry(ledger.read_text(encoding="utf-8"), entry), "utf-8")
        except OSError as error:
            return say(f"the tree cannot be written to ({error}): entry and rows are in {self.output} alone")
        say(f"added to {ledger} and {self.tree / rows}" if lines else f"added to {ledger}")


def check_patterns(patterns: Sequence[str] | None, tree: Path) -> None:
    """Before anything is copied: a pattern names a stage of a machine with a GPU, or of one without."""
    if patterns is None:
        return
    machines, environment = ({}, {"gpus": ["any"]}), _config.compiling_environment()
    places = [Place(tree, Path(), environment, machine) for machine in machines]
    known = dict.fromkeys(s.name for place in places for p in verify_stages.phases(place) for s in p.stages)
    for pattern in patterns:
        if not matching(known, [pattern]):
            raise UserError(f"--stage {pattern} names none of: {', '.join(known)}")


def choose(phases: Sequence[Phase], patterns: Sequence[str] | None) -> list[Phase]:
    """The stages that a pattern names, and those they need."""
    if patterns is None:
        return list(phases)
    stages = {stage.name: stage for phase in phases for stage in phase.stages}
    if missing := [pattern for pattern in patterns if not matching(stages, [pattern])]:
        raise UserError(f"--stage {' '.join(missing)}: on this machine there is only {', '.join(stages)}")
    names = matching(stages, patterns)
    names |= {stages[name].needs for name in names}
    return [replace(phase, stages=[s for s in phase.stages if s.name in names]) for phase in phases]


def matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    return {n for n in names if any(fnmatch(n, p) or n.startswith(f"{p}/") for p in patterns)}
