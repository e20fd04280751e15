"""How long a list of kernel launches would take: a *prediction* from counted work and compiled occupancy.

A launch is programs (tiles) handed to multiprocessors as they become free. One tile of `flops` FLOPs that
streams `loads` bytes of operands while it multiplies and moves `tail` bytes after that takes

    multiply = max(flops / (rate / SMs), loads / (L2 rate / SMs))        tail = tail bytes / (L2 rate / SMs)
    alone on its multiprocessor:     rounds * FILL + multiply + tail      (nothing hides start and end)
    with r - 1 others beside it:     max(rounds * FILL / r, multiply, tail)

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
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

FILL = 1.0e-6  # first loads of a tile until its products run: about two memory latencies
LAUNCH_GAP = 2.0e-6  # between two kernels of a stream
HOST_LAUNCH = 12.0e-6  # the host's part of a launch through Triton's Python launcher
HOST_CALL = 5.0e-6  # and of a call of torch; neither is paid when a captured graph is replayed


@dataclass(frozen=True)
class Machine:
    """A GPU. `flops` and `bandwidth` are what large library calls reach, the peaks are datasheets'.

    Args:
        name: of the GPU.
        architecture: 10 * major + minor.
        processors: multiprocessors.
        peak_flops, peak_bandwidth: bf16 dense FLOP/s and bytes/s, datasheet.
        flops, bandwidth: bf16 GEMM and copy (bytes read + written), measured or assumed.
        l2_bandwidth: bytes/s from L2 to all multiprocessors, assumed.
        l2_bytes: its size.
        source: where flops and bandwidth come from.
    """

    name: str
    architecture: int
    processors: int
    peak_flops: float
    peak_bandwidth: float
    flops: float
    bandwidth: float
    l2_bandwidth: float
    l2_bytes: int
    source: str


def _assumed(name, architecture, processors, peak_flops, peak_bandwidth, l2_bandwidth, l2_bytes) -> Machine:
    """The same fractions of the datasheet as were measured on an H200."""
    flops, bandwidth = peak_flops * 788 / 989, peak_bandwidth * 4.0 / 4.8
    return Machine(
        name, architecture, processors, peak_flops, peak_bandwidth, flops, bandwidth, l2_bandwidth, l2_bytes,
        "assumed: the fractions of the datasheet that an H200 reaches",
    )  # fmt: skip


_MB = 1_000_000
# L2: 5120 bytes a clock (A100 whitepaper) at 1.41 GHz; the same a clock assumed for Hopper at 1.755 GHz,
# twice that for the two dies of a B200 at 1.85 GHz.
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "A100": _assumed("A100 SXM 80 GB", 80, 108, 312e12, 2.04e12, 7.2e12, 40 * _MB),
        "H100": _assumed("H100 SXM", 90, 132, 989e12, 3.35e12, 9.0e12, 50 * _MB),
        "H200": Machine(
            "H200 SXM", 90, 132, 989e12, 4.8e12, 788e12, 4.0e12, 9.0e12, 50 * _MB,
            "measured once: bf16 GEMM on random data, device-to-device copy",
        ),
        "B200": _assumed("B200 HGX", 100, 148, 2250e12, 8.0e12, 18.9e12, 126 * _MB),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """`count` programs that do the same. Bytes and FLOPs are those of one. `rounds`: how often it has to
    wait for its own results before it can load on."""

    count: int
    flops: float = 0.0
    loads: float = 0.0
    tail: float = 0.0
    rounds: int = 1


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
    """One launch. `resident`: its blocks on a multiprocessor at a time (`KernelReport`)."""

    name: str
    work: Work
    resident: int


@dataclass(frozen=True)
class LibraryCall:
    """A call of torch between the launches: a GEMM, a reduction, a copy."""

    name: str
    flops: float
    traffic: float


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
    traffic = sum(s.traffic if isinstance(s, LibraryCall) else s.work.traffic for s in steps)
    device = sum(by_name.values())
    host = sum(HOST_CALL if isinstance(s, LibraryCall) else HOST_LAUNCH for s in steps)
    return Prediction(
        machine=machine.name,
        seconds=max(device, host),
        device=device,
        host=host,
        by_name=tuple(sorted(by_name.items(), key=lambda item: -item[1])),
        launches=len(steps),
        flops=flops,
        traffic=traffic,
        roof=max(flops / machine.flops, traffic / machine.bandwidth),
    )


@cache
def step_seconds(machine: Machine, step: Step | LibraryCall) -> float:
    if isinstance(step, LibraryCall):
        return LAUNCH_GAP + max(step.flops / machine.flops, step.traffic / machine.bandwidth)
    if step.resident < 1:
        raise ValueError(f"resident must be >= 1 for {step.name} to run at all, got {step.resident}")
    memory = step.work.traffic / machine.bandwidth
    return LAUNCH_GAP + max(busiest(machine, step.work.tiles, step.resident), memory)


def tile_seconds(machine: Machine, tile: Tiles, resident: int) -> float:
    share = machine.processors
    feed = machine.l2_bandwidth / share
    multiply, tail = max(tile.flops / (machine.flops / share), tile.loads / feed), tile.tail / feed
    start = tile.rounds * FILL
    return start + multiply + tail if resident == 1 else max(start / resident, multiply, tail)


def busiest(machine: Machine, tiles: Iterable[Tiles], resident: int) -> float:
    """When the last multiprocessor is done, if each tile goes to the one that is free first."""
    free = [0.0] * machine.processors
    for group in tiles:
        seconds = tile_seconds(machine, group, resident)
        left = group.count
        if max(free) == min(free):  # whole rounds at once
            rounds, left = divmod(left, machine.processors)
            free = [t + rounds * seconds for t in free]
        for _ in range(left):
            heapq.heapreplace(free, free[0] + seconds)
    # Tiles side by side hide each other's start; the first ones have nobody to hide theirs.
    return max(free) + (FILL if resident > 1 and any(free) else 0.0)
