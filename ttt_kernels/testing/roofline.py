"""How long a list of kernel launches would take: a *prediction* from counted work and compiled occupancy.

A launch is programs (tiles) handed to multiprocessors as they become free. One tile of `flops` FLOPs that
streams `loads` bytes of operands while it multiplies and moves `tail` bytes after that, some of which it
reads, takes

    multiply = max(flops / (rate / SMs), loads / (L2 rate / SMs))        tail = tail bytes / (L2 rate / SMs)
    alone on its multiprocessor:     rounds * FILL + multiply + tail      (nothing hides start and end)
    with r - 1 others beside it:     max(rounds * FILL / r, multiply, tail, reads / (L2 rate / SMs))
    of a program whose tiles overlap: the same, without a start of its own

where reads are the loads and what the tail reads: side by side, tiles share what L2 gives.

and the launch, with the tiles in the order of the grid, each to the multiprocessor that is free first,

    max(busiest multiprocessor, bytes through device memory / bandwidth) + launch gap.

An operation is the sum of its launches and library calls, or the time the host needs to launch them, if
that is longer. What is left out: dependent instruction latency, bank conflicts, clock changes, tiles that
find their operands in L2 less often than assumed. It is a lower bound with occupancy and waves in it, not
a measurement: print it as predicted.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

FILL = 1.0e-6  # first loads of a tile until its products run: about two memory latencies
LAUNCH_GAP = 2.0e-6  # between two kernels of a stream
HOST_LAUNCH = 12.0e-6  # the host's part of a launch through Triton's Python launcher
HOST_KERNEL = 4.0e-6  # of one from C++, its tensor maps included
HOST_CALL = 5.0e-6  # and of a call of torch; none is paid when a captured graph is replayed

# Share of the GEMM rate that mma.sync, the matrix instruction of sm_80, can reach: on Hopper as published
# microbenchmarks have it, on sm_100 assumed to be as much a clock as there.
MMA_SYNC: Mapping[int, float] = MappingProxyType({90: 0.63, 100: 0.31})


@dataclass(frozen=True)
class Machine:
    """A GPU. `flops` and `bandwidth` are what large library calls reach, the peaks are datasheets'.

    Args:
        name: of the GPU.
        device: what the driver calls it, so that measurements find their predictions.
        architecture: 10 * major + minor.
        processors: multiprocessors.
        peak_flops, peak_bandwidth: bf16 dense FLOP/s and bytes/s, datasheet.
        memory_bytes: its memory, datasheet.
        flops, bandwidth: bf16 GEMM and copy (bytes read + written), measured or assumed.
        float32_flops: IEEE float32 GEMM, which has no tensor cores; assumed.
        l2_bandwidth: bytes/s from L2 to all multiprocessors, assumed.
        l2_bytes: its size.
        sources: where each number comes from, by the name of its field.
    """

    name: str
    device: str
    architecture: int
    processors: int
    peak_flops: float
    peak_bandwidth: float
    memory_bytes: int
    flops: float
    bandwidth: float
    float32_flops: float
    l2_bandwidth: float
    l2_bytes: int
    sources: Mapping[str, str] = field(compare=False)


# What an H200 was seen to reach, over its datasheet: other machines are assumed to reach the same.
_FLOPS, _BANDWIDTH = 788e12, 4.0e12
_REACHED, _COPIED = _FLOPS / 989e12, _BANDWIDTH / 4.8e12
_SHARE = "assumed: the share of the data sheet that an H200 reaches"
_ASSUMED = {
    "flops": _SHARE,
    "bandwidth": _SHARE,
    "float32_flops": "assumed: the share of the data sheet (float32) that bf16 reaches on an H200",
}
_MEASURED = {
    **_ASSUMED,
    "flops": "measured once: large bf16 GEMM on random data",
    "bandwidth": "measured once: device-to-device copy",
}
_MB = 1_000_000


def _sources(sheet: str, l2_bandwidth: str, l2_bytes: str, reached: Mapping[str, str]) -> dict[str, str]:
    of_sheet = dict.fromkeys(("processors", "peak_flops", "peak_bandwidth", "memory_bytes"), sheet)
    return {**of_sheet, **reached, "l2_bandwidth": l2_bandwidth, "l2_bytes": l2_bytes}


_HOPPER_L2 = "assumed: the bytes a clock of the A100, at 1.755 GHz", "NVIDIA H100 whitepaper"
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "A100": Machine(
            "A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 80, 108, 312e12, 2.04e12, 80_000 * _MB,
            312e12 * _REACHED, 2.04e12 * _COPIED, 19.5e12 * _REACHED, 7.2e12, 40 * _MB,
            _sources(
                "NVIDIA A100 80 GB data sheet (SXM)",
                "assumed: the whitepaper's 5120 bytes a clock, all of them reached, at 1.41 GHz",
                "NVIDIA A100 whitepaper", _ASSUMED,
            ),
        ),
        "H100": Machine(
            "H100 SXM", "NVIDIA H100 80GB HBM3", 90, 132, 989e12, 3.35e12, 80_000 * _MB,
            989e12 * _REACHED, 3.35e12 * _COPIED, 67e12 * _REACHED, 9.0e12, 50 * _MB,
            _sources("NVIDIA H100 data sheet (SXM)", *_HOPPER_L2, _ASSUMED),
        ),
        "H200": Machine(
            "H200 SXM", "NVIDIA H200", 90, 132, 989e12, 4.8e12, 141_000 * _MB,
            _FLOPS, _BANDWIDTH, 67e12 * _REACHED, 9.0e12, 50 * _MB,
            _sources("NVIDIA H200 data sheet (SXM)", *_HOPPER_L2, _MEASURED),
        ),
        "B200": Machine(
            "B200 HGX", "NVIDIA B200", 100, 148, 2250e12, 8.0e12, 180_000 * _MB,
            2250e12 * _REACHED, 8.0e12 * _COPIED, 75e12 * _REACHED, 18.9e12, 126 * _MB,
            _sources(
                "NVIDIA HGX B200 data sheet, an eighth of it",
                "assumed: twice the bytes a clock of the A100 (two dies), at 1.85 GHz",
                "assumed: in no data sheet; as reported by its users", _ASSUMED,
            ),
        ),
    }
)  # fmt: skip


def machine_called(device: str) -> Machine | None:
    """The machine whose driver calls it that; None for others, slices (MIG) and variants among them."""
    return next((machine for machine in MACHINES.values() if machine.device == device), None)


@dataclass(frozen=True)
class Tiles:
    """`count` programs that do the same. Bytes and FLOPs are those of one.

    Args:
        count, flops, loads, tail: as at the top of the file.
        tail_reads: bytes of the tail that are read.
        rounds: how often a tile has to wait for its own results before it can load on.
        overlap: one program makes several, and multiplies one while it does the tail of another.
    """

    count: int
    flops: float = 0.0
    loads: float = 0.0
    tail: float = 0.0
    rounds: int = 1
    tail_reads: float = 0.0
    overlap: bool = False


@dataclass(frozen=True)
class Work:
    """What one launch does: tiles in the order of the grid, and the bytes it moves through device memory
    when whatever is read again is found in L2."""

    tiles: tuple[Tiles, ...]
    traffic: float

    @property
    def flops(self) -> float:
        return sum(t.count * t.flops for t in self.tiles)


@dataclass(frozen=True)
class Step:
    """One launch. `resident`: its blocks on a multiprocessor at a time (`KernelReport`); `host`: the host's
    seconds; `speed`: share of the GEMM rate that its matrix instructions reach."""

    name: str
    work: Work
    resident: int
    host: float = HOST_LAUNCH
    speed: float = 1.0


@dataclass(frozen=True)
class LibraryCall:
    """A call of torch between the launches: a GEMM, a reduction, a copy. `float32`: of such operands."""

    name: str
    flops: float
    traffic: float
    float32: bool = False

    def bound(self, machine: Machine) -> float:
        """Seconds that its products or its bytes take, whichever is more."""
        rate = machine.float32_flops if self.float32 else machine.flops
        return max(self.flops / rate, self.traffic / machine.bandwidth)


@dataclass(frozen=True)
class Prediction:
    """Seconds of one operation on one machine, predicted.

    Args:
        seconds: the larger of device and host time.
        device, host: their own times.
        by_name: device seconds of each kernel and library call.
        launches: kernels launched, library calls included.
        flops, traffic: summed over the launches.
        roof: seconds that flops and traffic alone allow at the machine's reached rates.
    """

    machine: str
    seconds: float
    device: float
    host: float
    by_name: tuple[tuple[str, float], ...]
    launches: int
    flops: float
    traffic: float
    roof: float


def predict(machine: Machine, steps: Iterable[Step | LibraryCall]) -> Prediction:
    """The time of these launches one after another; see the top of the file.

    >>> gemm = Work((Tiles(132, flops=2 * 128 * 128 * 4096),), traffic=0)
    >>> round(predict(MACHINES["H200"], [Step("gemm", gemm, resident=2)]).device * 1e6, 1)
    25.5
    """
    steps = list(steps)
    by_name: dict[str, float] = {}
    for step in steps:
        by_name[step.name] = by_name.get(step.name, 0.0) + step_seconds(machine, step)
    flops = sum(s.flops if isinstance(s, LibraryCall) else s.work.flops for s in steps)
    slow = sum(s.flops for s in steps if isinstance(s, LibraryCall) and s.float32)
    products = (flops - slow) / machine.flops + slow / machine.float32_flops
    traffic = sum(s.traffic if isinstance(s, LibraryCall) else s.work.traffic for s in steps)
    device = sum(by_name.values())
    host = sum(HOST_CALL if isinstance(s, LibraryCall) else s.host for s in steps)
    return Prediction(
        machine=machine.name,
        seconds=max(device, host),
        device=device,
        host=host,
        by_name=tuple(sorted(by_name.items(), key=lambda item: -item[1])),
        launches=len(steps),
        flops=flops,
        traffic=traffic,
        roof=max(products, traffic / machine.bandwidth),
    )


@cache
def step_seconds(machine: Machine, step: Step | LibraryCall) -> float:
    if isinstance(step, LibraryCall):
        return LAUNCH_GAP + step.bound(machine)
    if step.resident < 1:
        raise ValueError(f"resident must be >= 1 for {step.name} to run at all, got {step.resident}")
    memory = step.work.traffic / machine.bandwidth
    return LAUNCH_GAP + max(busiest(machine, step.work.tiles, step.resident, step.speed), memory)


def tile_seconds(machine: Machine, tile: Tiles, resident: int, speed: float = 1.0) -> float:
    share = machine.processors
    rate, feed = speed * machine.flops / share, machine.l2_bandwidth / share
    multiply, tail = max(tile.flops / rate, tile.loads / feed), tile.tail / feed
    start, reads = tile.rounds * FILL, (tile.loads + tile.tail_reads) / feed
    if resident == 1 and not tile.overlap:
        return start + multiply + tail
    return max(start / resident, multiply, tail, reads)


def busiest(machine: Machine, tiles: Iterable[Tiles], resident: int, speed: float = 1.0) -> float:
    """When the last multiprocessor is done, if each tile goes to the one that is free first."""
    free, last = [0.0] * machine.processors, 0.0
    for group in tiles:
        seconds = tile_seconds(machine, group, resident, speed)
        left = group.count
        if max(free) == min(free):  # whole rounds at once
            rounds, left = divmod(left, machine.processors)
            free = [t + rounds * seconds for t in free]
        for _ in range(left):
            heapq.heapreplace(free, free[0] + seconds)
        if group.overlap:
            last = group.tail * machine.processors / machine.l2_bandwidth
    # Tiles side by side hide each other's start; the first ones have nobody to hide theirs. Nor has the last
    # tile of a program whose tiles overlap anything beside its tail.
    starts = resident > 1 or last > 0
    return max(free) + last + (FILL if starts and any(free) else 0.0)
