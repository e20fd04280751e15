"""What a compiled kernel is made of, and what an architecture has room for. Nothing here needs Triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Limits:
    """One multiprocessor, and what one block of it may use (CUDA C++ Programming Guide, compute
    capabilities). Shared memory in bytes; `tensor_columns`: tensor memory, 128 lanes x 4 bytes each."""

    shared_per_block: int
    shared_per_processor: int
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536
    tensor_columns: int = 0


LIMITS: Mapping[int, Limits] = MappingProxyType(
    {
        80: Limits(166_912, 167_936),
        86: Limits(101_376, 102_400, threads=1536, blocks=16),
        89: Limits(101_376, 102_400, threads=1536, blocks=24),
        90: Limits(232_448, 233_472),
        100: Limits(232_448, 233_472, tensor_columns=512),
        120: Limits(101_376, 102_400, threads=1536, blocks=24),
    }
)
# The driver takes this much shared memory of every block for itself.
RESERVED_SHARED = 1024
# Registers are given to warps in units of this many.
REGISTER_UNIT = 256
# Rows a dot needs to fill the warp-group instructions of sm_90 and the fifth generation of sm_100.
TENSOR_ROWS = 64


@dataclass(frozen=True)
class KernelReport:
    """One kernel as compiled for one architecture, with one choice of tile.

    Args:
        kernel: its name.
        architecture: 80, 90, 100: the target it was compiled for.
        dtype: element type of the widest matrix product's operands, or of the first pointer.
        tile: its compile-time arguments, BLOCK_* and flags, as written.
        warps, stages: launch options. threads: of a block, helper warps included.
        registers: of a thread.
        spill_stores, spill_loads: bytes moved to and from local memory by the spilling instructions,
            each counted once, as `ptxas -v` counts them; loop_spills: those in the innermost loops that
            multiply, which are paid again and again. stack: bytes of local memory of a thread.
        shared_memory: bytes of a block. tensor_memory: columns (sm_100).
        dots: (M, N, K, operand type) of every matrix product in the source, as Triton sees them.
        wgmma, tcgen05, mma_sync: matrix instructions in the PTX, of sm_90, sm_100 and sm_80.
        cp_async, tma: asynchronous copies in the PTX: of 16 bytes a thread; of a whole tile.
        load_bytes, store_bytes: bytes that one thread's global loads (stores) in the machine code
            move, each instruction counted once, keyed by the instruction's width.
        wgmma_waits: products on sm_90 that are waited for before the next one starts. Where registers of
            accumulators are short, or something else defines them on the way, ptxas makes that of all, and
            nobody hears its warning (C7510 and on).
    """

    kernel: str
    architecture: int
    dtype: str
    tile: tuple[tuple[str, object], ...]
    warps: int
    stages: int
    threads: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    loop_spills: int
    shared_memory: int
    tensor_memory: int
    dots: tuple[tuple[int, int, int, str], ...]
    wgmma: int
    tcgen05: int
    mma_sync: int
    cp_async: int
    tma: int
    load_bytes: tuple[tuple[int, int], ...]
    store_bytes: tuple[tuple[int, int], ...]
    wgmma_waits: int = 0

    @property
    def limits(self) -> Limits:
        return LIMITS[self.architecture]

    @property
    def fits(self) -> bool:
        """Nothing at compile time checks this: a kernel that does not fit fails when launched."""
        return (
            self.shared_memory <= self.limits.shared_per_block
            and self.tensor_memory <= self.limits.tensor_columns
        )

    @property
    def resident_blocks(self) -> int:
        """Blocks that one multiprocessor holds at a time; 0 if not even one fits.

        The least of what threads, registers, shared memory and tensor memory allow:
        registers are given to each warp in units of 256 (floor per quarter of the register file),
        shared memory to each block with 1 KiB on top for the driver.
        """
        limits, warps = self.limits, self.threads // 32
        per_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        warps_by_registers = limits.registers // 4 // max(per_warp, 1) * 4
        room = [
            limits.blocks,
            limits.threads // self.threads,
            warps_by_registers // warps,
            limits.shared_per_processor // (self.shared_memory + RESERVED_SHARED),
        ]
        if self.tensor_memory:
            room.append(limits.tensor_columns // self.tensor_memory)
        return min(room) if self.fits else 0

    @property
    def occupancy(self) -> float:
        """Resident warps over the most the multiprocessor can hold."""
        return self.resident_blocks * self.threads / self.limits.threads

    @property
    def wants_tensor_cores(self) -> bool:
        """Has it a product of 16-bit operands large enough for the architecture's own instruction?"""
        return any(m >= TENSOR_ROWS and dtype in ("bf16", "f16") for m, _, _, dtype in self.dots)

    @property
    def wide_loads(self) -> float:
        """Fraction of the loaded bytes that come by 16-byte (or whole-tile) instructions."""
        return 1.0 if self.tma else wide_share(self.load_bytes)

    @property
    def wide_stores(self) -> float:
        return wide_share(self.store_bytes)

    @property
    def block_sizes(self) -> str:
        """The tile in short: "T128 D256 K64", with its second part "D128+64"."""
        more = {n.removeprefix("MORE_"): f"+{v}" for n, v in self.tile if n.startswith("MORE_") and v}
        sizes = ((n.removeprefix("BLOCK_"), v) for n, v in self.tile if n.startswith("BLOCK_"))
        return " ".join(f"{name}{value}{more.get(name, '')}" for name, value in sizes)


def wide_share(by_width: tuple[tuple[int, int], ...]) -> float:
    total = sum(moved for _, moved in by_width)
    return sum(moved for width, moved in by_width if width >= 16) / total if total else 1.0


@dataclass(frozen=True)
class Accepted:
    """What a kernel may do that others may not, and why: bytes it may spill, bytes of these in the innermost
    loops that multiply, and the least share of its loaded bytes that must come 16 at a time (scalars, masks
    of single elements and row sums are narrow by nature); whether its wgmma may be serialised."""

    spills: int = 0
    loop_spills: int = 0
    wide_loads: float = 0.5
    serialised: bool = False
    why: str = ""


_SHARED = "after its products: held to 128 registers, so that two programs share a multiprocessor"
ACCEPTED: Mapping[str, Accepted] = MappingProxyType(
    {
        "scan_fwd_step_kernel": Accepted(200, why=_SHARED),
        "scan_bwd_enter_kernel": Accepted(100, why=_SHARED),
        "scan_bwd_leave_kernel": Accepted(100, why=_SHARED),
        "scan_bwd_token_kernel": Accepted(128, 8, why="its 128 x 256 tile on sm_100"),
        "scan_bwd_norm_kernel": Accepted(
            wide_loads=0.2, why="half of what it reads are sums per row of W, few columns at a time"
        ),
        "step_apply_tokens_kernel": Accepted(
            serialised=True, why="it waits for memory: a float32 weight read for 64 tokens or fewer"
        ),
        "target_bwd_conv_kernel": Accepted(16, why="sm_80, once a tile"),
    }
)


def complaints(report: KernelReport, accepted: Accepted | None = None) -> list[str]:
    """What is wrong with a compiled kernel: the empty list is what a test wants.

    Args:
        report: the kernel.
        accepted: what to let pass; default: the kernel's entry in `ACCEPTED`, or nothing.
    """
    accepted = accepted or ACCEPTED.get(report.kernel, Accepted())
    found = []
    where = f"{report.kernel} sm_{report.architecture} {report.dtype} {report.block_sizes}"
    limits = report.limits
    if report.spill_stores + report.spill_loads > accepted.spills:
        found.append(f"spills {report.spill_stores} + {report.spill_loads} bytes")
    if report.loop_spills > accepted.loop_spills:
        found.append(f"spills {report.loop_spills} bytes in a loop that multiplies")
    if report.shared_memory > limits.shared_per_block:
        found.append(f"{report.shared_memory} bytes of shared memory, at most {limits.shared_per_block}")
    if report.tensor_memory > limits.tensor_columns:
        found.append(f"{report.tensor_memory} columns of tensor memory, at most {limits.tensor_columns}")
    if report.fits and not report.resident_blocks:
        found.append(f"not one block fits: {report.threads} threads of {report.registers} registers")
    if report.wants_tensor_cores:
        native = {80: report.mma_sync, 90: report.wgmma, 100: report.tcgen05}.get(report.architecture, 1)
        name = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}.get(report.architecture)
        if not native:
            found.append(f"no {name} for {report.dots}")
        elif report.architecture >= 90 and report.mma_sync:
            found.append(f"{report.mma_sync} products by mma.sync of sm_80 beside {name}: {report.dots}")
    if 1 < report.wgmma <= report.wgmma_waits and not accepted.serialised:
        found.append(f"wgmma is serialised: {report.wgmma_waits} waits for {report.wgmma} products")
    if report.wide_loads < accepted.wide_loads:
        found.append(f"only {report.wide_loads:.0%} of the loaded bytes by 16-byte loads")
    return [f"{where}: {text}" for text in found]
