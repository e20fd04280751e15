"""What nvcc made of the CUDA C++ kernels: a built library, or an object file, read kernel by kernel.

It needs no GPU and no nvcc, but the disassembler (`machine_code`) and `c++filt`. How much dynamic shared
memory a kernel is launched with stands in no machine code: it is the size of a struct in `csrc`, for which a
C++ compiler is asked. `python docs/cuda_table.py` writes the tables of `docs/cuda.md`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ttt_kernels.testing.kernel_report import RESERVED_SHARED, Accepted, KernelReport
from ttt_kernels.testing.kernel_report import complaints as general_complaints
from ttt_kernels.testing.machine_code import Code, bytes_by_width, disassemble_all, run_tool

WARP = 32
PROBE = "device_image_kernel"  # of the device query: one thread, left out
SHARED_ACCESSES = {"LDS", "STS", "LDSM", "LDGSTS", "ATOMS", "UTMALDG", "UTMASTG"}
TYPES = {"__nv_bfloat16": "bf16", "__half": "f16", "float": "f32"}
# Names of the template arguments that are numbers.
PARAMETERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "scan_bwd_state_kernel": ("use",),
        "sm90_scan_fwd_step_kernel": ("BLOCK_N",),
        "sm90_scan_bwd_state_kernel": ("BLOCK_N", "use"),
        "sm90_scan_bwd_token_kernel": ("BLOCK_N",),
        "step_apply_matvec_kernel": ("BLOCK_D", "BLOCK_T"),
    }
)
USES = ("enter", "products", "leave")  # StateUse of csrc/kernels/scan/launches.h
# The struct in shared memory with which a kernel is launched, {BLOCK_N} as in `tile`; one that is not here
# uses none.
_SM80, _SM90 = "scan::sm80::Storage<bfloat16>", "scan::sm90::Storage<{BLOCK_N}>"
_WIDTHS = (128, 192)  # values of BLOCK_N
STORAGE: Mapping[str, str] = MappingProxyType(
    {
        "scan_fwd_step_kernel": _SM80,
        "scan_bwd_state_kernel": _SM80,
        "scan_bwd_token_kernel": _SM80,
        "sm90_scan_fwd_step_kernel": _SM90,
        "sm90_scan_bwd_state_kernel": _SM90,
        "sm90_scan_bwd_token_kernel": _SM90,
        "step_apply_tokens_kernel": "gemm::Stages<bfloat16>",
        "step_update_kernel": "gemm::Stages<bfloat16>",
        "step_size_fwd_gram_kernel": "gemm::Stages<bfloat16>",
        "step_size_fwd_iterate_kernel": "step_size_kernels::Sums",
        "step_size_fwd_spectral_kernel": "step_size_kernels::Sums",
        "step_size_fwd_clip_kernel": "step_size_kernels::Sums",
    }
)
STORAGE_SOURCES = (
    "kernels/scan/sm80_tiles.cuh", "kernels/scan/sm90_tiles.cuh", "kernels/step_size/step_size.cu",
)  # fmt: skip
# Kernels of matrix products: without matrix instructions, or with others than their own, they would be slow.
PRODUCTS = frozenset(name for name, struct in STORAGE.items() if not struct.endswith("Sums"))
_SUMS = Accepted(wide_loads=0.0, why="a thread adds numbers that lie a row apart; a few thousand in all")
_TURNS = Accepted(800, why="192 accumulators a thread; after the products, while another tile is multiplied")
ACCEPTED: Mapping[str, Accepted] = MappingProxyType(
    {
        "sm90_scan_fwd_step_kernel": _TURNS,
        "sm90_scan_bwd_state_kernel": _TURNS,
        "sm90_scan_bwd_token_kernel": _TURNS,
        "scan_bwd_ratio_kernel": _SUMS,
        "scan_bwd_dstep_kernel": _SUMS,
        "step_size_fwd_spectral_kernel": _SUMS,
        "step_size_fwd_iterate_kernel": Accepted(wide_loads=0.4, why="a norm beside the rows of K"),
        "scan_bwd_scale_kernel": Accepted(wide_loads=0.2, why="the ratios of rows beside dY, from L1"),
        "scan_round_kernel": Accepted(wide_loads=0.0, why="a quad of 16-bit numbers is 8 bytes"),
        "step_apply_tokens_kernel": Accepted(wide_loads=0.4, why="row scales, once a tile"),
        "step_apply_matvec_kernel": Accepted(
            32, wide_loads=0.15, why="keys, 8 bytes for 16 of the weight, come from L1 once a token"
        ),
    }
)


@dataclass(frozen=True)
class CudaReport(KernelReport):
    """Of a kernel of `csrc`. `tile` has the template arguments that are numbers; `stages` and `dots` are not
    known."""


# --- reading --------------------------------------------------------------------------------------
def image_of(cubin: Path) -> str:
    """As ptxas noted it inside: the tools of CUDA 12 leave the letter of `sm_90a` out of a file's name."""
    noted = re.search(rb"-arch (sm_\w+)", cubin.read_bytes())
    return noted[1].decode() if noted else cubin.suffixes[-2].removeprefix(".")


def read_library(library: Path, storage: Mapping[str, int]) -> dict[str, list[CudaReport]]:
    """Reports by image (`sm_80`, `sm_90a`, ...), of the kernels in a library or an object file.

    Args:
        library: the file.
        storage: bytes of dynamic shared memory by struct, from `storage_bytes`.
    """
    images: dict[str, list[CudaReport]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_tool("cuobjdump", "-xelf", "all", str(library.resolve()), folder=Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            image = image_of(cubin)
            found = disassemble_all(cubin.read_bytes())
            names = demangle(found)
            images.setdefault(image, []).extend(
                read_kernel(names[mangled], image, *facts, storage)
                for mangled, facts in found.items()
                if PROBE not in names[mangled]
            )
    order = {image: sorted(reports, key=_place) for image, reports in images.items()}
    return dict(sorted(order.items(), key=lambda item: int(re.findall(r"\d+", item[0])[0])))


def demangle(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def read_kernel(
    signature: str, image: str, usage: dict[str, int], code: Code, storage: Mapping[str, int]
) -> CudaReport:
    """`signature` is such as `void ttt::(anonymous namespace)::a_kernel<__half, 4>(ttt::Parameters)`."""
    plain = _without_namespaces(signature)
    name, arguments = re.search(r"(\w+)(?:<([^()]*(?:\(\w+\)\d+)?)>)?\(", plain).groups()
    arguments = arguments.split(", ") if arguments else []
    types = [TYPES[a] for a in arguments if a in TYPES]
    numbers = [int(re.findall(r"\d+$", a)[0]) for a in arguments if a not in TYPES]
    tile = tuple(zip(PARAMETERS.get(name, ()), numbers, strict=True))
    instructions = [opcode.partition(".")[0] for opcode in code.opcodes]
    inner = code.multiplying_loops()
    if "THREADS" not in usage:
        raise RuntimeError(f"{name} has no __launch_bounds__: how many threads are in a block of it?")
    struct = STORAGE.get(name, "").format(**dict(tile))
    if not struct and SHARED_ACCESSES & set(instructions):
        raise RuntimeError(f"{name} uses shared memory: STORAGE must name the struct it is launched with")
    return CudaReport(
        kernel=name,
        architecture=int(re.findall(r"\d+", image)[0]),
        dtype=types[0] if types else "",
        tile=tile,
        warps=usage["THREADS"] // WARP,
        stages=0,
        threads=usage["THREADS"],
        registers=usage["REG"],
        stack=usage["STACK"],
        spill_stores=sum(bytes_by_width(code.opcodes, ("STL",)).values()),
        spill_loads=sum(bytes_by_width(code.opcodes, ("LDL",)).values()),
        loop_spills=sum(sum(bytes_by_width(loop, ("STL", "LDL")).values()) for loop in inner),
        shared_memory=max(usage["SHARED"] - RESERVED_SHARED, 0) + storage.get(struct, 0),
        tensor_memory=0,
        dots=(),
        wgmma=instructions.count("HGMMA"),
        tcgen05=instructions.count("UTCHMMA"),
        mma_sync=instructions.count("HMMA"),
        cp_async=instructions.count("LDGSTS"),
        tma=instructions.count("UTMALDG"),
        load_bytes=tuple(sorted(bytes_by_width(code.opcodes, ("LDG", "LDGSTS")).items())),
        store_bytes=tuple(sorted(bytes_by_width(code.opcodes, ("STG",)).items())),
        wgmma_waits=code.wgmma_waits,
    )


def _without_namespaces(signature: str) -> str:
    return re.sub(r"(?:\w+|\(anonymous namespace\))::", "", signature)


def _place(report: CudaReport) -> tuple:
    return report.kernel.removeprefix("sm90_"), report.kernel, report.tile, report.dtype


# --- judging --------------------------------------------------------------------------------------
def complaints(report: CudaReport) -> list[str]:
    """What is wrong with a compiled kernel: what `kernel_report` finds, and instructions that it lacks."""
    found = general_complaints(report, ACCEPTED.get(report.kernel, Accepted()))
    where = f"{report.kernel} sm_{report.architecture} {report.dtype} {report.block_sizes}"
    hopper = report.kernel.startswith("sm90_")
    if hopper and not (report.wgmma and report.tma):
        found.append(f"{where}: {report.wgmma} wgmma and {report.tma} loads by TMA")
    if report.kernel in PRODUCTS and not hopper and not (report.mma_sync and report.cp_async):
        found.append(f"{where}: {report.mma_sync} mma.sync and {report.cp_async} cp.async")
    if report.kernel in PRODUCTS and hopper and report.mma_sync:
        found.append(f"{where}: {report.mma_sync} products by mma.sync of sm_80")
    return found


# --- showing --------------------------------------------------------------------------------------
COLUMNS = ("kernel", "threads", "regs", "spill", "KB", "matrix", "copies", "16 B loads", "16 B stores", "/SM")


def table(reports: Iterable[CudaReport]) -> list[tuple[str, ...]]:
    """A row for each kernel of an image; versions of it (operand types, sizes) share one, least to most."""
    groups: dict[str, list[CudaReport]] = {}
    for report in reports:
        use = "".join(f" {USES[n]}" for name, n in report.tile if name == "use")
        groups.setdefault(report.kernel.removesuffix("_kernel") + use, []).append(report)
    return [(name, *_row(group)) for name, group in groups.items()]


def _row(group: list[CudaReport]) -> tuple[str, ...]:
    matrix = {"wgmma": [r.wgmma for r in group], "mma": [r.mma_sync for r in group]}
    copies = {"TMA": [r.tma for r in group], "cp.async": [r.cp_async for r in group]}

    def counts(named: dict[str, list[int]]) -> str:
        return ", ".join(f"{_between(n)} {name}" for name, n in named.items() if any(n)) or "-"

    return (
        _between([r.threads for r in group]),
        _between([r.registers for r in group]),
        _between([r.spill_stores + r.spill_loads for r in group]),
        _between([round(r.shared_memory / 1024) for r in group]),
        counts(matrix),
        counts(copies),
        _between([round(100 * r.wide_loads) for r in group]) + "%",
        _between([round(100 * r.wide_stores) for r in group]) + "%",
        _between([r.resident_blocks for r in group]),
    )


def _between(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low}-{high}"


# --- sources --------------------------------------------------------------------------------------
def storage_bytes(csrc: Path) -> dict[str, int]:
    """Bytes of dynamic shared memory for each struct that kernels are launched with, as a C++ compiler counts
    them.

    Args:
        csrc: the folder; its headers for the CPU serve, the structs are the same.
    """
    includes = [f'#include "{header}"' for header in STORAGE_SOURCES]
    structs = sorted({s.format(BLOCK_N=width) for s in STORAGE.values() for width in _WIDTHS})
    facts = [f"extern const int bytes_of_{i} = shared_bytes<{s}>();" for i, s in enumerate(structs)]
    source = "\n".join([*includes, "using namespace ttt;", *facts])
    folders = [f"-I{csrc / name}" for name in ("emulation", "include", ".")]
    command = ["c++", "-std=c++17", "-S", "-O0", "-w", *folders, "-x", "c++", "-", "-o", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=True)
    found = re.findall(r"^bytes_of_(\w+):\s+\.long\s+(\d+)", done.stdout, re.M)
    return {structs[int(i)]: int(n) for i, n in found}
