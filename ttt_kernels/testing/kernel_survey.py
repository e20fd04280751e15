"""All kernels of some layers, compiled for some architectures: what tests and `python -m ttt_kernels kernels`
read. Compilation happens in a process of its own, because Triton decides when it is imported whether it
compiles or interprets."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ttt_kernels import _config
from ttt_kernels.testing import roofline
from ttt_kernels.testing.kernel_report import KernelReport
from ttt_kernels.testing.roofline import LibraryCall, Machine, Prediction, Step, Work, predict


@dataclass(frozen=True)
class Case:
    """One operation of one layer.

    Args:
        operation: a key of `triton_workloads.OPERATIONS`.
        shape: name of the model; d, f: its widths.
        tokens: of a row of the batch. chunk_size: of the scan and the update.
        batch: rows. sequences: > 0 packs that many into the one row.
        dtype: "bfloat16", "float16" or "float32".
        preserve_row_norm: of the scan, or a row scale in decode.
        carried: a state comes in and goes out.
        slots: in decode, rows name their weight in a larger pool; else row b has weight b.
        impl: whose kernels, "triton" or "cuda" (`cuda_launches`).
    """

    operation: str
    shape: str
    d: int
    f: int
    tokens: int = 32768
    chunk_size: int = 1024
    batch: int = 1
    sequences: int = 0
    dtype: str = "bfloat16"
    preserve_row_norm: bool = False
    carried: bool = False
    slots: bool = True
    impl: str = "triton"


@dataclass(frozen=True)
class Compiled:
    """One case on one architecture.

    Args:
        case, architecture: which.
        launches: report and work of every launch, in order.
        library: torch's own calls between them.
        extra_bytes: the most memory it holds beyond operands and results.
    """

    case: Case
    architecture: int
    launches: tuple[tuple[KernelReport, Work], ...]
    library: tuple[LibraryCall, ...]
    extra_bytes: int

    @property
    def kernels(self) -> tuple[KernelReport, ...]:
        """Each once, in the order of first use."""
        return tuple(dict.fromkeys(report for report, _ in self.launches))

    @property
    def steps(self) -> list[Step | LibraryCall]:
        """What a machine's time is predicted from."""
        host = roofline.HOST_KERNEL if self.case.impl == "cuda" else roofline.HOST_LAUNCH

        def step(report: KernelReport, work: Work) -> Step:
            old = report.mma_sync and not (report.wgmma or report.tcgen05)
            speed = roofline.MMA_SYNC.get(self.architecture, 1.0) if old else 1.0
            return Step(report.kernel, work, report.resident_blocks, host, speed)

        return [*(step(*launch) for launch in self.launches), *self.library]

    def predict(self, machine: Machine) -> Prediction:
        return predict(machine, self.steps)


def survey(cases: Iterable[Case], architectures: Sequence[int], processes: int = 2) -> list[Compiled]:
    """Compile what these cases, with impl="triton", launch. Works on any Linux machine with Triton installed;
    no GPU.

    Args:
        cases: what to record.
        architectures: of 80, 90, 100: targets.
        processes: how many kernels are compiled at a time.

    Raises:
        RuntimeError: with Triton's own message, if a kernel cannot be compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request"), Path(folder, "answer")
        request.write_bytes(pickle.dumps((tuple(cases), tuple(architectures), processes)))
        command = [sys.executable, "-m", "ttt_kernels.testing.triton_compile", str(request), str(answer)]
        done = subprocess.run(
            command, env=_config.compiling_environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"kernels could not be compiled:\n{done.stderr[-4000:]}")
        return pickle.loads(answer.read_bytes())
