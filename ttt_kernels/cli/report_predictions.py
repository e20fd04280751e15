"""Predicted times of the benchmark's GPU rows, as JSON lines that a report puts beside measurements.

A row is predicted from what it launches: Triton kernels, compiled ahead of time for the machine's
architecture and read (`testing.kernel_survey`), CUDA C++ kernels as the installed library has them
(`testing.cuda_launches`), and calls of torch. A row without an entry in `LAUNCHES` is not predicted, nor one
that would not fit into the machine's memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from ttt_kernels.cli.bench import MEMORY_SHARE
from ttt_kernels.cli.bench_case import Case
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.bench_suites import SUITES, SWEEPS
from ttt_kernels.testing import cuda_launches, kernel_survey
from ttt_kernels.testing.cuda_compiled import CudaReport
from ttt_kernels.testing.kernel_survey import Compiled, survey
from ttt_kernels.testing.roofline import MACHINES, Machine, Prediction, predict

FOLDER = "predicted"
BOTH = "fwd+bwd"
# What the modes of a row launch, as operations of the survey, by (op, impl).
LAUNCHES: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    ("scan", "triton"): {"fwd": ("scan fwd",), BOTH: ("scan fwd+bwd",), "prefill": ("scan prefill",)},
    ("scan", "triton-split"): {"fwd": ("scan fwd, split plan",)},
    ("scan", "reference"): {
        "fwd": ("released scan fwd",), BOTH: ("released scan fwd+bwd",), "prefill": ("released scan fwd",),
    },
    ("scan", "plain"): {
        "fwd": ("plain projection fwd",), BOTH: ("plain projection fwd+bwd",),
        "prefill": ("plain projection fwd",),
    },
    ("next_token_target", "triton"): {
        "fwd": ("next-token target fwd",), BOTH: ("next-token target fwd", "next-token target bwd"),
    },
    ("conv_target", "triton"): {
        "fwd": ("conv target fwd",), BOTH: ("conv target fwd", "conv target bwd"),
    },
    ("spectral_step_size", "triton"): {
        "fwd": ("step size fwd",), BOTH: ("step size fwd", "step size bwd"),
    },
    ("clipped_step_size", "triton"): {
        "fwd": ("clipped step size fwd",), BOTH: ("clipped step size fwd", "clipped step size bwd"),
    },
    ("fast_weight_apply", "triton"): {
        "fwd": ("decode apply",), BOTH: ("decode apply", "decode apply bwd"),
    },
    ("fast_weight_update_", "triton"): {"fwd": ("decode update",)},
}  # fmt: skip
_CUDA = ("scan", "spectral_step_size", "clipped_step_size", "fast_weight_apply", "fast_weight_update_")
LAUNCHES |= {(op, "cuda"): LAUNCHES[op, "triton"] for op in _CUDA}


@dataclass(frozen=True)
class Row:
    """One row of the benchmark, and the survey's cases of what it launches."""

    case: Case
    impl: str
    launches: tuple[kernel_survey.Case, ...]


def cases() -> list[Case]:
    """Every case of the suites for GPUs, and of the sweep on one."""
    of_suites = [case for suite in SUITES.values() for case in suite().cases if case.device == "cuda"]
    return list(dict.fromkeys([*of_suites, *SWEEPS["cuda"].cases()]))


def rows(cases: Iterable[Case]) -> list[Row]:
    """Those of the benchmark's rows that can be predicted."""
    return [
        Row(case, impl, tuple(surveyed(case, name, impl) for name in LAUNCHES[case.op, impl][case.mode]))
        for case in cases
        for impl in OPERATIONS[case.op].implementations
        if case.mode in LAUNCHES.get((case.op, impl), {})
        and (impl != "triton-split" or splits(case))
        and (impl != "cuda" or case.dtype in cuda_launches.DTYPES)
    ]


def splits(case: Case) -> bool:
    """The split plan is for long chunks; short ones become super-chunks."""
    from ttt_kernels.ops.scan.heuristics import fused_super_chunk

    longest = fused_super_chunk(case.chunk_size, case.d, case.f)
    return not case.preserve_row_norm and longest <= case.chunk_size


def surveyed(case: Case, operation: str, impl: str) -> kernel_survey.Case:
    """As `bench` calls it: row b has weight b, and an update writes one chunk."""
    return kernel_survey.Case(
        operation, case.shape, case.d, case.f, tokens=case.tokens,
        chunk_size=min(case.chunk_size, case.tokens), batch=case.batch, dtype=case.dtype,
        preserve_row_norm=case.preserve_row_norm, slots=False, impl="cuda" if impl == "cuda" else "triton",
    )  # fmt: skip


def records(rows: Sequence[Row], compiled: Sequence[Compiled], machine: Machine) -> list[dict]:
    """The lines of one machine: what it is, then one line a row."""
    room = MEMORY_SHARE * machine.memory_bytes
    of_case = {one.case: one for one in compiled if one.architecture == machine.architecture}
    environment = {
        "kind": "environment", "device": machine.device, "threads": 1,
        "torch": version("torch"), "triton": version("triton"), "machine": asdict(machine),
    }  # fmt: skip
    lines = [record(row, [of_case[c] for c in row.launches], machine) for row in rows]
    return [environment, *(line for line in lines if line["extra_bytes"] <= room)]


def record(row: Row, launched: Sequence[Compiled], machine: Machine) -> dict[str, object]:
    found = predict(machine, [step for one in launched for step in one.steps])
    op, backward = OPERATIONS[row.case.op].of(row.impl), row.case.mode == BOTH
    flops, moved = (own[0] + own[1] * backward for own in (op.flops(row.case), op.traffic(row.case)))
    extra = max(one.extra_bytes for one in launched)
    line = {
        "kind": "prediction", **asdict(row.case), "impl": row.impl,
        "milliseconds": found.seconds * 1e3,
        "device_milliseconds": found.device * 1e3,
        "host_milliseconds": found.host * 1e3,
        "roof_milliseconds": found.roof * 1e3,
        "launches": found.launches,
        "gflops": flops / found.seconds / 1e9,
        "gemm_gflops": machine.flops / 1e9,
        "gemm_share": flops / found.seconds / machine.flops,
        "gbytes": moved / found.seconds / 1e9,
        "copy_gbytes": machine.bandwidth / 1e9,
        "copy_share": moved / found.seconds / machine.bandwidth,
        "bound": op.bound,
        "counted_flops": found.flops,
        "counted_bytes": found.traffic,
        "extra_bytes": extra,
        "extra_weights": extra / row.case.weight_bytes,
        "largest": largest(found, launched),
    }  # fmt: skip
    return {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in line.items()}


def largest(found: Prediction, launched: Sequence[Compiled]) -> dict[str, object]:
    """The launch or library call that takes most of the time, and what its kernels were compiled to: the
    most registers and bytes of shared memory, the fewest blocks on a multiprocessor."""
    name, seconds = found.by_name[0]
    facts: dict[str, object] = {"name": name, "share": round(seconds / found.device, 3)}
    kernels = [report for one in launched for report in one.kernels if report.kernel == name]
    if kernels:
        facts["registers"] = max(report.registers for report in kernels)
        facts["shared_memory"] = max(report.shared_memory for report in kernels)
        facts["resident_blocks"] = min(report.resident_blocks for report in kernels)
    return facts


def write(folder: Path, processes: int, kernels: Mapping[int, Sequence[CudaReport]]) -> list[Path]:
    """Compile, predict, and write a file for every machine. Needs Triton; minutes when it has to compile.

    kernels: `cuda_launches.read_kernels()`. The rows of `cuda` are left out on an architecture without.
    """
    wanted = rows(cases())
    surveyed_cases = list(dict.fromkeys(case for row in wanted for case in row.launches))
    ours = [case for case in surveyed_cases if case.impl == "cuda"]
    architectures = sorted({machine.architecture for machine in MACHINES.values()})
    compiled = survey([case for case in surveyed_cases if case.impl != "cuda"], architectures, processes)
    for architecture, reports in kernels.items():
        compiled += cuda_launches.survey(ours, architecture, reports)
    written = []
    for name, machine in MACHINES.items():
        path = folder / FOLDER / f"{name.lower()}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = [row for row in wanted if row.impl != "cuda" or machine.architecture in kernels]
        lines = (json.dumps(line) + "\n" for line in records(mine, compiled, machine))
        path.write_text("".join(lines), encoding="utf-8")
        written.append(path)
    return written
