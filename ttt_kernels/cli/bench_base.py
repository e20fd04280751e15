"""`python -m ttt_kernels bench --base REF`: the current tree against another commit, in one run.

Each tree gets a worker process (`bench_worker`), the current one too, and the two take turns. What
counts is the ratio of each round's pair: noise that lasts longer than a pair hits both of its sides.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ttt_kernels.cli import bench, bench_report
from ttt_kernels.cli.bench_base_trees import Tree, Worker, WorkerError, base_tree, current_tree, remote
from ttt_kernels.cli.bench_case import Case, Operation
from ttt_kernels.cli.bench_lines import JsonLines
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.errors import UserError
from ttt_kernels.cli.measure import Timing, rounds, time_interleaved
from ttt_kernels.cli.tables import new_table

WITH_IMPL = ("scan", "fast_weight_apply", "fast_weight_update_")  # the public op takes `impl`
BY_NAME = ("reference", "eager", "triton", "cuda")
PAUSE_SECONDS = 0.02  # idle threads of a process spin this long before they sleep
CEILING_ROUNDS = 4


# --- measuring ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ratio:
    """Time of the current tree over the base's, pair by pair: under 1 the current one is faster."""

    case: Case
    impl: str
    base: str
    ratio: float  # median over the rounds
    ratio_p20: float
    ratio_p80: float
    repeats: int

    def as_record(self) -> dict[str, object]:
        fields = asdict(self)
        return {"kind": "ratio", **fields.pop("case"), **fields}


@dataclass
class Comparison:
    results: bench.Results = field(default_factory=bench.Results)
    ratios: list[Ratio] = field(default_factory=list)

    def add(self, other: Comparison) -> None:
        self.results.add(other.results)
        self.ratios += other.ratios

    def records(self) -> list[dict[str, object]]:
        return [*self.results.records(), *(ratio.as_record() for ratio in self.ratios)]


@dataclass(eq=False)
class Pair:
    """One implementation of one case, loaded under `key` in both workers; the current one is first."""

    case: Case
    impl: str
    errors: list[float]
    extra: list[int] = field(default_factory=list)
    timings: tuple[Timing, Timing] = field(default_factory=lambda: (Timing(), Timing()))

    @property
    def key(self) -> str:
        return f"{self.case.mode} {self.impl}"

    def ratio(self, base: str) -> Ratio:
        current, other = (timing.seconds for timing in self.timings)
        pairs = Timing([a / b for a, b in zip(current, other, strict=True)])
        spread = pairs.percentile(20), pairs.percentile(80)
        return Ratio(self.case, self.impl, base, pairs.median, *spread, len(current))


def measure(
    cases: Sequence[Case],
    impls: Sequence[str] | None,
    repeats: int | None,
    workers: tuple[Worker, Worker],
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[list[dict]], None] = lambda records: None,
) -> Comparison:
    """Check, load and time every case in both workers: the current tree's first, then the base's. `keep` gets
    the records of those that share rounds as soon as they are there."""
    comparison = Comparison()
    for group in bench.grouped(cases):
        found = compare(group, impls, repeats, workers, say)
        keep(found.records())
        comparison.add(found)
    return comparison


def compare(
    group: Sequence[Case], impls: Sequence[str] | None, repeats: int | None, workers: tuple, say: Callable
) -> Comparison:
    """Cases that share rounds."""
    comparison = Comparison()
    results, op, checked = comparison.results, OPERATIONS[group[0].op], {}
    for worker in workers:
        worker.revive()
        worker.ask("forget")
    pairs = []
    for case in group:
        for impl in impls or default_impls(case, op):
            left = not_comparable(case, impl, op)
            found = [left] if left else check(case, impl, op, workers, checked, say)
            results.left += found
            pairs += [] if found else [Pair(case, impl, [checked[w, impl] for w in workers])]
    pairs = [pair for pair in pairs if load(pair, op, workers, results)]
    if pairs:
        say(f"timing {len(pairs)} pairs, interleaved")
        try:
            results.rows += time_pairs(pairs, op, repeats, workers)
        except WorkerError as failure:
            results.left += [bench.Left(p.case, p.impl, "refused", str(failure)) for p in pairs]
        else:
            comparison.ratios += [pair.ratio(workers[1].tree.label) for pair in pairs]
    return comparison


def default_impls(case: Case, op: Operation) -> list[str]:
    """Without the reference, which is there to be read."""
    if case.op not in WITH_IMPL:
        return ["auto"]
    known = {impl: op.implementations[impl] for impl in BY_NAME[1:] if impl in op.implementations}
    return [impl for impl, found in known.items() if found.why_not(case) is None]


def check(case: Case, impl: str, op: Operation, workers, checked: dict, say) -> list[bench.Left]:
    """What keeps either side from being timed. One check, in `checked`, is for all modes."""
    left = []
    for worker in workers:
        name = worker.row_name(impl)
        try:
            if (worker, impl) not in checked:
                say(f"checking {bench.describe(case)} {name}")
                worker.revive()
                checked[worker, impl] = parity(case, impl, op, worker)
            wrong = bench.wrong_results(case, name, checked[worker, impl])
        except WorkerError as failure:
            wrong = bench.Left(case, name, worker.kind_of(failure), str(failure))
        left += [wrong] if wrong else []
    return left


def load(pair: Pair, op: Operation, workers, results: bench.Results) -> bool:
    """Both sides ready and warm, with the same bits from one file."""
    path = workers[0].scratch / "timed.pt"
    operands = op.operands(pair.case, pair.case.inputs())
    data = {"leaves": list(operands.leaves), "options": operands.options, "dy": operands.dy}
    torch.save(data, path)
    names = {"op": pair.case.op, "impl": pair.impl, "mode": pair.case.mode, "device": pair.case.device}
    for worker in workers:
        try:
            pair.extra.append(worker.ask("load", key=pair.key, operands=str(path), **names))
        except WorkerError as failure:
            left = bench.Left(pair.case, worker.row_name(pair.impl), worker.kind_of(failure), str(failure))
            results.left.append(left)
            return False
    return True


def not_comparable(case: Case, impl: str, op: Operation) -> bench.Left | None:
    known = BY_NAME if case.op in WITH_IMPL else ("auto",)
    if impl not in known:
        reason = f"with --base, {case.op} is compared as {', '.join(known)}"
        return bench.Left(case, impl, "skipped", reason)
    if case.mode not in op.modes:
        return bench.Left(case, impl, "skipped", f"{case.op} has no mode {case.mode}")
    if impl not in op.implementations:
        return None  # "auto", or a worker says that it has none
    left = bench.cannot_run(case, impl, op)
    device = torch.device(case.device)
    return left or bench.not_enough_memory(case, impl, op.implementations[impl], device)


def parity(case: Case, impl: str, op: Operation, worker: Worker) -> float:
    """The check of the current tree's registry, on the worker's values and gradients."""
    with_worker = {**op.implementations, "worker": remote(worker, case.op, impl, case.device)}
    return op.parity(case, replace(op, implementations=with_worker), "worker")


def time_pairs(pairs: list[Pair], op: Operation, repeats: int | None, workers) -> list[bench.Row]:
    """Round after round, every pair, then the ceilings; who of a pair begins alternates."""
    cases = [pair.case for pair in pairs]
    device = torch.device(cases[0].device)
    gemms, (copy, copied) = bench.gemm_calls(cases, op, device), bench.copy_call(device)
    calls = {"copy": copy, **{shape: call for shape, (call, _) in gemms.items()}}
    for call in calls.values():
        call()
    ceilings = {name: Timing() for name in calls}
    for n in rounds(repeats):
        for pair in pairs:
            for side in (0, 1) if n % 2 == 0 else (1, 0):
                time.sleep(PAUSE_SECONDS)
                turn = workers[side].ask("turn", key=pair.key, device=pair.case.device)
                pair.timings[side].seconds.append(turn)
        if n < CEILING_ROUNDS:
            for name, timing in time_interleaved(calls, 1, device).items():
                ceilings[name].seconds += timing.seconds
    rate = max(flops / ceilings[shape].median for shape, (_, flops) in gemms.items()) / 1e9
    bandwidth = copied / ceilings["copy"].median / 1e9
    return [
        bench.row_of(
            bench.Candidate(pair.case, worker.row_name(pair.impl), lambda: ()), op, timing,
            (rate, bandwidth), extra, error,
        )
        for pair in pairs
        for worker, timing, extra, error in zip(workers, pair.timings, pair.extra, pair.errors, strict=True)
    ]  # fmt: skip


# --- the command ----------------------------------------------------------------------------------
def run(args: argparse.Namespace, cases: Sequence[Case], where: dict, console) -> int:
    """Exit code 1 where the current tree gave a wrong result or failed."""

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    with ExitStack() as stack:
        base = stack.enter_context(base_tree(args.base))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trees = current_tree(), base
        workers = tuple(stack.enter_context(Worker(tree, scratch)) for tree in trees)
        where = {**where, "base": args.base, "base_commit": base.commit}
        lines = stack.enter_context(JsonLines(args.output, where))
        comparison = measure(cases, args.impl, args.repeats, workers, say, lines.add)
    results = comparison.results
    bench_report.print_results(results, where, [])
    report(comparison, base)
    if args.plot and results.rows:
        bench_report.plot(args.plot, results, where)
    if not results.rows and not results.refused:
        raise UserError("nothing was compared: every combination was skipped, for the reasons above")
    return 1 if any("@" not in left.impl for left in results.refused) else 0


def report(comparison: Comparison, base: Tree) -> None:
    console = bench_report.require("rich.console", bench_report.EXTRA).Console()
    name = base.label + (f" ({base.commit[:10]})" if base.commit else "")
    console.print(f"\n[bold]This tree's time over that of {name}[/], median of pairs", highlight=False)
    columns = ("op", "shape", "mode", "impl", "T", "C", "ratio", "p20-p80", "rounds")
    table = new_table(columns, bench_report.EXTRA, left=4)
    for r in comparison.ratios:
        case = r.case
        table.add_row(
            case.op, case.shape, case.mode, r.impl, str(case.tokens), str(case.chunk_size),
            f"{r.ratio:.3f}", f"{r.ratio_p20:.3f}-{r.ratio_p80:.3f}", str(r.repeats),
        )  # fmt: skip
    console.print(table)
