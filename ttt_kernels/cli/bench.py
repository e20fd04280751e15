"""`python -m ttt_kernels bench`: check, measure and time, all implementations in one run.

Every number has its hardware, its error and the machine's own GEMM and copy rates from the same rounds
beside it. An implementation whose parity check is red is not timed.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from ttt_kernels.cli.bench_baselines import COMPILED, PLAIN, REFERENCE, multiply_dtype
from ttt_kernels.cli.bench_case import DTYPES, Case, Implementation, Operation, Ring, run_once
from ttt_kernels.cli.bench_parity import forget
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.measure import (
    Timing,
    available_memory,
    cache_bytes,
    extra_memory,
    time_interleaved,
)

BASELINES = (REFERENCE, "eager", PLAIN)  # a row has its time over theirs, round by round
MEMORY_SHARE = 0.9  # of what is available; the rest is for everything else on the machine


@dataclass(frozen=True)
class Row:
    """One line of the results; `as_record` is its JSON form."""

    case: Case
    impl: str
    milliseconds: float
    milliseconds_p20: float
    milliseconds_p80: float
    repeats: int
    gflops: float  # GFLOP/s by the operation's formula
    gemm_gflops: float  # best GEMM rate of the same rounds
    gbytes: float | None  # GB/s by the operation's formula
    copy_gbytes: float | None  # what a copy read and wrote in the same rounds, GB/s
    extra_bytes: int
    error_ratio: float
    bound: str = "gemm"  # which of the two ceilings limits the operation in use
    use: str = "fwd"  # the mode, or what the operation is for
    ratios: Mapping[str, float] = field(default_factory=dict)  # median over rounds, by baseline

    @property
    def gemm_share(self) -> float:
        return self.gflops / self.gemm_gflops

    @property
    def copy_share(self) -> float | None:
        return None if self.gbytes is None else self.gbytes / self.copy_gbytes

    @property
    def extra_weights(self) -> float:
        return self.extra_bytes / self.case.weight_bytes

    def as_record(self) -> dict[str, object]:
        fields = asdict(self)
        case = fields.pop("case")
        ratios = {f"ratio_to_{name}": x for name, x in fields.pop("ratios").items()}
        shares = {
            "gemm_share": self.gemm_share,
            "copy_share": self.copy_share,
            "extra_weights": self.extra_weights,
        }
        return {"kind": "result", **case, **fields, **shares, **ratios}


@dataclass(frozen=True)
class Left:
    """A row that was not timed, and why."""

    case: Case
    impl: str
    kind: str  # "skipped" (not enough memory) or "refused" (wrong results)
    reason: str

    def as_record(self) -> dict[str, object]:
        fields = asdict(self)
        return {"kind": fields.pop("kind"), **fields.pop("case"), **fields}


@dataclass
class Results:
    rows: list[Row] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def add(self, other: Results) -> None:
        self.rows += other.rows
        self.left += other.left

    def records(self) -> list[dict[str, object]]:
        return [line.as_record() for line in (*self.rows, *self.left)]

    @property
    def refused(self) -> list[Left]:
        return [x for x in self.left if x.kind == "refused"]

    def find(self, impl: str, mode: str, chunk_size: int, **more: object) -> Row | None:
        """The row of an implementation; `more` are fields of its case."""
        wanted = {"mode": mode, "chunk_size": chunk_size, **more}
        rows = (r for r in self.rows if r.impl == impl)
        matches = (r for r in rows if all(getattr(r.case, k) == x for k, x in wanted.items()))
        return next(matches, None)


@dataclass(frozen=True)
class Candidate:
    """One implementation of one case, ready to be called."""

    case: Case
    impl: str
    call: Callable[[], tuple]


def measure_cases(
    cases: Sequence[Case],
    impls: Sequence[str] | None,
    repeats: int | None,
    say: Callable[[str], None] = lambda text: None,
    operations: dict[str, Operation] = OPERATIONS,
    keep: Callable[[list[dict]], None] = lambda records: None,
) -> Results:
    """Check, measure and time `impls` (None = all that can run) of every case; `keep` gets the records of
    those that share rounds as soon as they are there.

    Cases that differ only in mode share inputs and rounds. Chunk sizes do not, and the longest goes
    first: the reference frees gigabytes at short chunks, and for as long as the machine keeps them at
    hand every large allocation after that costs less than it does in a program of its own.
    """
    results, checked = Results(), {}
    for group in grouped(cases):
        op = operations[group[0].op]
        able = [i for i, x in op.implementations.items() if any(x.why_not(c) is None for c in group)]
        found = measure_group(group, op, list(impls or able), repeats, say, checked)
        keep(found.records())
        results.add(found)
    return results


def grouped(cases: Sequence[Case]) -> Iterator[list[Case]]:
    groups: dict[Case, list[Case]] = {}
    for case in sorted(cases, key=lambda case: -case.chunk_size):
        groups.setdefault(replace(case, mode="fwd"), []).append(case)
    yield from groups.values()


def measure_group(cases, op: Operation, impls, repeats, say, checked: dict) -> Results:
    results, device = Results(), torch.device(cases[0].device)
    if COMPILED in impls:
        torch.compiler.reset()  # it compiles a function for eight cases at most
    ready: dict[Candidate, tuple[int, float]] = {}  # extra memory, error
    data, rings = cases[0].inputs(), {}
    for case in cases:
        for impl in impls:
            left = cannot_run(case, impl, op)
            left = left or not_enough_memory(case, impl, op.implementations[impl], device)
            left = left or not_right(case, impl, op, say, checked)
            if left is None:
                work = op.of(impl)
                if id(work) not in rings:
                    rings[id(work)] = Ring(work.operands(case, data), cache_bytes(device))
                candidate = bind(case, impl, op, rings[id(work)])
                extra = attempt(case, impl, functools.partial(warmed_up, candidate, device))
                left = extra if isinstance(extra, Left) else None
            if left is not None:
                results.left.append(left)
                continue
            ready[candidate] = (extra, checked[check_key(case, impl)])
    forget()
    if ready:
        say(f"timing {len(ready)} candidates, interleaved")
        results.rows += timed_rows(ready, cases, op, repeats, device)
    return results


def check_key(case: Case, impl: str) -> tuple[Case, str]:
    """Modes, and cases that are the same when shortened, share a check."""
    return replace(case.short(), mode="fwd"), impl


def not_right(case: Case, impl: str, op: Operation, say, checked: dict) -> Left | None:
    key, work = check_key(case, impl), op.of(impl)
    if key not in checked:
        say(f"checking {describe(case)} {impl}")
        checked[key] = attempt(case, impl, lambda: work.parity(case, work, impl))
    if isinstance(checked[key], Left):
        return replace(checked[key], case=case)
    return wrong_results(case, impl, checked[key])


def attempt(case: Case, impl: str, action: Callable[[], object]) -> object | Left:
    """What an implementation gives, or what it says instead: one that fails does not cost the others."""
    try:
        return action()
    except NotImplementedError as error:
        return Left(case, impl, "skipped", str(error))
    except torch.OutOfMemoryError:
        return Left(case, impl, "skipped", "it ran out of memory")
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        kind = "skipped" if impl == COMPILED else "refused"  # what a compiler lacks is not our mistake
        return Left(case, impl, kind, f"it raised {type(error).__name__}: {text}")


def warmed_up(candidate: Candidate, device: torch.device) -> int:
    """The extra memory of a call that is not the first: that one compiles, where something compiles."""
    candidate.call()
    return extra_memory(candidate.call, device)


def bind(case: Case, impl: str, op: Operation, ring: Ring) -> Candidate:
    """Each call takes the next operands of the ring."""
    call = op.implementations[impl].call
    return Candidate(case, impl, lambda: run_once(call, ring.take(), case.mode))


def timed_rows(ready: Mapping, cases, op: Operation, repeats, device: torch.device) -> list[Row]:
    gemms = gemm_calls(cases, op, device)
    copy, copied = copy_call(device)
    ceilings = {"copy": copy, **{shape: call for shape, (call, _) in gemms.items()}}
    for call in ceilings.values():
        call()
    times = time_interleaved(
        {c: c.call for c in ready} | ceilings, repeats, device, shuffle=random.Random(0), sparse=ceilings
    )
    rate = max(flops / times[shape].median for shape, (_, flops) in gemms.items()) / 1e9
    bandwidth = copied / times["copy"].median / 1e9
    of_case = {(c.case, c.impl): times[c] for c in ready}
    rows = []
    for candidate, (extra, error) in ready.items():
        own = times[candidate]
        others = {name: of_case.get((candidate.case, name)) for name in BASELINES}
        ratios = {name: own.ratio_to(other) for name, other in others.items() if other is not None}
        work = op.of(candidate.impl)
        rows.append(row_of(candidate, work, own, (rate, bandwidth), extra, error, ratios))
    return rows


def row_of(
    candidate: Candidate,
    op: Operation,
    timing: Timing,
    ceilings: tuple[float, float],
    extra: int,
    error: float,
    ratios: Mapping[str, float] | None = None,
) -> Row:
    """`op`: the operation that the candidate computes, whose formulas count."""
    case, (rate, bandwidth) = candidate.case, ceilings
    backward = case.mode == "fwd+bwd"
    flops, traffic = (own[0] + own[1] * backward for own in (op.flops(case), op.traffic(case)))
    return Row(
        case=case,
        impl=candidate.impl,
        milliseconds=timing.median * 1e3,
        milliseconds_p20=timing.percentile(20) * 1e3,
        milliseconds_p80=timing.percentile(80) * 1e3,
        repeats=len(timing.seconds),
        gflops=flops / timing.median / 1e9,
        gemm_gflops=rate,
        gbytes=traffic / timing.median / 1e9,
        copy_gbytes=bandwidth,
        extra_bytes=extra,
        error_ratio=error,
        bound=op.bound,
        use=op.use or case.mode,
        ratios=ratios or {},
    )


def cannot_run(case: Case, impl: str, op: Operation) -> Left | None:
    if impl not in op.implementations:
        why_not = f"{case.op} has no such implementation"
    elif case.mode not in op.modes:
        why_not = f"{case.op} has no {'gradient' if case.mode == 'fwd+bwd' else case.mode}"
    else:
        why_not = op.implementations[impl].why_not(case)
    return None if why_not is None else Left(case, impl, "skipped", why_not)


def not_enough_memory(
    case: Case, impl: str, implementation: Implementation, device: torch.device
) -> Left | None:
    need, have = implementation.memory(case), available_memory(device)
    if have is None or need <= MEMORY_SHARE * have:
        return None
    return Left(case, impl, "skipped", f"needs about {gib(need)}, {gib(have)} available")


def gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def wrong_results(case: Case, impl: str, error: float) -> Left | None:
    """`not (error <= 1)` so that a NaN is red too."""
    if error <= 1.0:
        return None
    return Left(case, impl, "refused", f"parity is red: {error:.3g} times the error budget")


def gemm_calls(cases: Sequence[Case], op: Operation, device: torch.device) -> dict:
    """(call, FLOPs) of each product the cases are made of, as one plain `torch.mm` into a given
    output: a ceiling, so with operands as warm as they get. On a CPU in the precision in which the
    operands are multiplied there (float32 for bfloat16), elsewhere in the operands' own."""
    dtype = multiply_dtype(device, DTYPES[cases[0].dtype])
    generator = torch.Generator().manual_seed(3)
    calls = {}
    for m, k, n in sorted({shape for case in cases for shape in op.gemms(case)}):
        a = torch.randn(m, k, generator=generator).to(dtype).to(device)
        b = torch.randn(k, n, generator=generator).to(dtype).to(device)
        out = torch.empty(m, n, dtype=dtype, device=device)
        calls[m, k, n] = ((lambda a=a, b=b, out=out: torch.mm(a, b, out=out)), 2 * m * k * n)
    return calls


@functools.cache
def copy_call(device: torch.device) -> tuple[Callable[[], object], int]:
    """One copy whose source no cache holds, and the bytes it reads and writes. Made once: to touch so
    much memory for the first time takes long."""
    count = max(1 << (28 if device.type == "cuda" else 24), cache_bytes(device) // 4)
    source = torch.ones(count, device=device)
    into = torch.empty_like(source)
    return (lambda: into.copy_(source)), 2 * count * source.element_size()


def describe(case: Case) -> str:
    return f"{case.op} {case.shape} T={case.tokens} C={case.chunk_size} {case.dtype}"
