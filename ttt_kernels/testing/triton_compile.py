"""Recorded launches turned into machine code and read, for any NVIDIA architecture and without a GPU.

Triton compiles through its own launch path: `JITFunction.warmup` specialises the arguments of a recorded
launch (types, divisibility by 16, ones, compile-time values) exactly as a launch would, for the target
that a stand-in driver names. What the cubin holds is read by `machine_code`.

It works in a process where Triton does not interpret; `kernel_survey` starts one, as
`python -m ttt_kernels.testing.triton_compile REQUEST ANSWER`.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from ttt_kernels.ops.triton_launch import Launch, interpreted
from ttt_kernels.testing.kernel_costs import work_of
from ttt_kernels.testing.kernel_report import KernelReport
from ttt_kernels.testing.kernel_survey import Case, Compiled
from ttt_kernels.testing.machine_code import bytes_by_width, disassemble
from ttt_kernels.testing.triton_workloads import record_case

WARP = 32


class _TargetOnly:
    """As much of a driver as compilation asks for. A target is a device index of its own, since
    Triton keeps what it compiled by device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, WARP)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(
    launches: Sequence[Launch], architecture: int, processes: int = 2
) -> list[KernelReport]:
    """The report of the kernel of each launch, in order. Equal specialisations are compiled once.

    Args:
        launches: from `triton_launch.record(architecture)`.
        architecture: the target, 10 * major + minor.
        processes: how many compile at a time. Triton's own cache on disk serves all of them.

    Raises:
        RuntimeError: Triton interprets kernels in this process, or cannot compile one (in its words).
    """
    if interpreted():
        raise RuntimeError("Triton interprets kernels here (TRITON_INTERPRET): nothing would be compiled")
    keys = [specialisation(launch) for launch in launches]
    distinct = dict(zip(keys, launches, strict=True))
    # Forked: a child finds the launches, which hold no data, where they are.
    global _forked
    _forked = list(distinct.values())
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        work = [pool.submit(_compile_forked, i, architecture) for i in range(len(_forked))]
        try:
            reports = dict(zip(distinct, (w.result() for w in work), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure: nobody waits for the others
    return [reports[key] for key in keys]


_forked: list[Launch] = []


def _compile_forked(index: int, architecture: int) -> KernelReport:
    launch = _forked[index]
    try:
        return compile_launch(launch, architecture)
    except Exception as error:
        reasons = [str(e) for e in (error, error.__cause__) if e is not None]
        given = {n: v for n, v in launch.arguments.items() if isinstance(v, (int, float, str, type(None)))}
        name = f"{launch.kernel.fn.__name__} for sm_{architecture}"
        raise RuntimeError("\n".join([f"{name} with {given}", *reasons])) from None


def specialisation(launch: Launch) -> tuple:
    """What makes Triton compile another version. Finer than Triton's own key is harmless."""

    def of(name: str, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, TensorDescriptor):
            return value.base.dtype, tuple(value.block_shape)
        if isinstance(value, int) and not isinstance(value, bool) and name not in constants:
            return value == 1, value % 16 == 0, abs(value) < 2**31
        return type(value) if isinstance(value, float) and name not in constants else value

    parameters = launch.kernel.params
    constants = {p.name for p in parameters if p.is_constexpr} | (
        set(launch.arguments) - {p.name for p in parameters}
    )
    facts = {name: of(name, value) for name, value in launch.arguments.items()}
    return launch.kernel, tuple(sorted(facts.items(), key=lambda item: item[0]))


def compile_launch(launch: Launch, architecture: int) -> KernelReport:
    triton.runtime.driver.set_active(_TargetOnly(architecture))
    compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    return read(launch, compiled, architecture)


def read(launch: Launch, compiled, architecture: int) -> KernelReport:
    """Triton's metadata, PTX and cubin of one kernel as a report."""
    ptx, usage, code = compiled.asm["ptx"], *disassemble(compiled.asm["cubin"])
    dots = _dots(compiled.asm["ttir"])
    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    tile = tuple((n, v) for n, v in launch.arguments.items() if n in constants)
    inner = code.multiplying_loops()
    loads, stores = bytes_by_width(code.opcodes, ("LDG", "LDGSTS")), bytes_by_width(code.opcodes, ("STG",))
    return KernelReport(
        kernel=launch.kernel.fn.__name__,
        architecture=architecture,
        dtype=dots[0][3] if dots else _first_pointer(launch),
        tile=tile,
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        threads=int(re.search(r"\.(?:req|max)ntid (\d+)", ptx)[1]),
        registers=usage["REG"],
        stack=usage["STACK"],
        spill_stores=sum(bytes_by_width(code.opcodes, ("STL",)).values()),
        spill_loads=sum(bytes_by_width(code.opcodes, ("LDL",)).values()),
        loop_spills=sum(sum(bytes_by_width(loop, ("STL", "LDL")).values()) for loop in inner),
        shared_memory=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        dots=tuple(dots),
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        mma_sync=ptx.count("mma.sync.aligned"),
        cp_async=ptx.count("cp.async.cg"),
        tma=ptx.count("cp.async.bulk.tensor"),
        load_bytes=tuple(sorted(loads.items())),
        store_bytes=tuple(sorted(stores.items())),
        wgmma_waits=code.wgmma_waits,
    )


def _first_pointer(launch: Launch) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
    tensors = (a for a in launch.arguments.values() if isinstance(a, torch.Tensor))
    return next((names[t.dtype] for t in tensors if t.dtype in names), "")


def _dots(ttir: str) -> list[tuple[int, int, int, str]]:
    """(M, N, K, operand type) of each tl.dot, largest first."""
    found = re.findall(r"tt\.dot .*?: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>", ttir)
    dots = [(int(m), int(n), int(k), dtype) for m, k, dtype, n in found]
    return sorted(set(dots), key=lambda d: (-d[0] * d[1] * d[2], d))


def compile_cases(cases: Sequence[Case], architectures: Sequence[int], processes: int) -> list[Compiled]:
    results = []
    for architecture in architectures:
        recorded = [record_case(case, architecture) for case in cases]
        launches = [launch for r in recorded for launch in r.launches]
        work = [work_of(launch) for launch in launches]
        pairs = iter(zip(compile_launches(launches, architecture, processes), work, strict=True))
        for case, r in zip(cases, recorded, strict=True):
            mine = tuple(islice(pairs, len(r.launches)))
            results.append(Compiled(case, architecture, mine, r.library, r.extra_bytes))
    return results


def main(request: str, answer: str) -> None:
    cases, architectures, processes = pickle.loads(Path(request).read_bytes())
    try:
        compiled = compile_cases(cases, architectures, processes)
    except RuntimeError as error:
        sys.exit(str(error))
    Path(answer).write_bytes(pickle.dumps(compiled))


if __name__ == "__main__":
    main(*sys.argv[1:])
