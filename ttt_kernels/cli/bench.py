"""`python -m ttt_kernels bench`: check, measure and time, all implementations in one run.

Every number has its hardware, its error and the machine's own GEMM rate from the same rounds beside
it. An implementation whose parity check is red is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from ttt_kernels.cli.bench_case import DTYPES, Case, Implementation, Operation, run_once
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.measure import Timing, available_memory, extra_memory, time_interleaved
from ttt_kernels.testing import ScanInputs
from ttt_kernels.types import compute_dtype

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
    gbytes: float | None  # GB/s by the operation's formula, where one bounds it
    copy_gbytes: float | None  # what a copy read and wrote in the same rounds, GB/s
    extra_bytes: int
    error_ratio: float

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
        shares = {
            "gemm_share": self.gemm_share,
            "copy_share": self.copy_share,
            "extra_weights": self.extra_weights,
        }
        return {"kind": "result", **case, **fields, **shares}


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
    repeats: int,
    say: Callable[[str], None] = lambda text: None,
    operations: dict[str, Operation] = OPERATIONS,
) -> Results:
    """Check, measure and time `impls` (None = all that can run) of every case.

    Cases that differ only in mode share inputs and rounds. Chunk sizes do not, and the longest goes
    first: the reference frees gigabytes at short chunks, and for as long as the machine keeps them at
    hand every large allocation after that costs less than it does in a program of its own.
    """
    results = Results()
    for group in grouped(cases):
        op = operations[group[0].op]
        able = [i for i, x in op.implementations.items() if any(x.why_not(c) is None for c in group)]
        measure_group(group, op, list(impls or able), repeats, say, results)
    return results


def grouped(cases: Sequence[Case]) -> Iterator[list[Case]]:
    groups: dict[Case, list[Case]] = {}
    for case in sorted(cases, key=lambda case: -case.chunk_size):
        groups.setdefault(replace(case, mode="fwd"), []).append(case)
    yield from groups.values()


def measure_group(cases, op: Operation, impls, repeats: int, say, results: Results) -> None:
    device = torch.device(cases[0].device)
    data = cases[0].inputs()
    errors: dict[tuple[int, str], float] = {}
    candidates, memory = [], {}
    for case in cases:
        for impl in impls:
            implementation = op.implementations[impl]
            left = cannot_run(case, impl, op)
            left = left or not_enough_memory(case, impl, implementation, device)
            if left is None:
                key = (case.chunk_size, impl)
                if key not in errors:
                    say(f"checking {describe(case)} {impl}")
                    errors[key] = op.parity(case, op, impl)
                left = wrong_results(case, impl, errors[key])
            if left is not None:
                results.left.append(left)
                continue
            candidate = bind(case, impl, op, data)
            memory[candidate] = extra_memory(candidate.call, device)  # also its warm-up
            candidates.append(candidate)
    if not candidates:
        return
    gemms = gemm_calls(cases, op, device)
    copy, copied = copy_call(device) if op.traffic else (None, 0)
    for call, _ in gemms.values():
        call()
    say(f"timing {len(candidates)} candidates, {repeats} interleaved rounds")
    calls = {c: c.call for c in candidates} | {shape: call for shape, (call, _) in gemms.items()}
    if copy is not None:
        calls["copy"] = copy
    times = time_interleaved(calls, repeats, device)
    bandwidth = copied / times["copy"].median / 1e9 if copy is not None else None
    rate = max(flops / times[shape].median for shape, (_, flops) in gemms.items()) / 1e9
    for candidate in candidates:
        error = errors[candidate.case.chunk_size, candidate.impl]
        ceilings = (rate, bandwidth)
        row = row_of(candidate, op, times[candidate], ceilings, memory[candidate], error)
        results.rows.append(row)


def bind(case: Case, impl: str, op: Operation, data: ScanInputs) -> Candidate:
    operands, call = op.operands(case, data), op.implementations[impl].call
    return Candidate(case, impl, lambda: run_once(call, operands, case.mode))


def row_of(
    candidate: Candidate, op: Operation, timing: Timing, ceilings: tuple, extra: int, error: float
) -> Row:
    case, (rate, bandwidth) = candidate.case, ceilings
    forward_only = op.traffic is not None and case.mode == "fwd"
    forward, backward = op.flops(case)
    flops = forward if case.mode == "fwd" else forward + backward
    return Row(
        case=case,
        impl=candidate.impl,
        milliseconds=timing.median * 1e3,
        milliseconds_p20=timing.percentile(20) * 1e3,
        milliseconds_p80=timing.percentile(80) * 1e3,
        repeats=len(timing.seconds),
        gflops=flops / timing.median / 1e9,
        gemm_gflops=rate,
        gbytes=op.traffic(case) / timing.median / 1e9 if forward_only else None,
        copy_gbytes=bandwidth,
        extra_bytes=extra,
        error_ratio=error,
    )


def cannot_run(case: Case, impl: str, op: Operation) -> Left | None:
    why_not = op.implementations[impl].why_not(case)
    if case.mode not in op.modes:
        why_not = f"{case.op} has no gradient"
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
    output. On a CPU in the precision in which the operands are multiplied there (float32 for
    bfloat16), elsewhere in the operands' own."""
    dtype = DTYPES[cases[0].dtype]
    dtype = compute_dtype(dtype) if device.type == "cpu" else dtype
    generator = torch.Generator().manual_seed(3)
    calls = {}
    for m, k, n in sorted({shape for case in cases for shape in op.gemms(case)}):
        a = torch.randn(m, k, generator=generator).to(dtype).to(device)
        b = torch.randn(k, n, generator=generator).to(dtype).to(device)
        out = torch.empty(m, n, dtype=dtype, device=device)
        calls[m, k, n] = ((lambda a=a, b=b, out=out: torch.mm(a, b, out=out)), 2 * m * k * n)
    return calls


def copy_call(device: torch.device) -> tuple[Callable[[], object], int]:
    """One copy too large for a cache, and the bytes it reads and writes."""
    count = 1 << (28 if device.type == "cuda" else 24)
    source = torch.ones(count, device=device)
    into = torch.empty_like(source)
    return (lambda: into.copy_(source)), 2 * count * source.element_size()


def describe(case: Case) -> str:
    return f"{case.op} {case.shape} T={case.tokens} C={case.chunk_size} {case.dtype}"
