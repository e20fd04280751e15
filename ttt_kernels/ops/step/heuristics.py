"""How the step kernels cut their work: pure functions of sizes, each with a test.

Reading a fast weight is bound by memory, and memory gives its bandwidth only while enough bytes are on
their way: bandwidth times latency. One row alone (a batch of one, in decode) is the hard case, and the
only one the choice looks at: a row's bits must not depend on how many others there are. Its time is
taken to be

    bytes     = 4 D F                                             the float32 weight, once
    share     = min(1, programs resident at once * bytes each has on the way / (bandwidth * LATENCY))
    seconds   = max(bytes / (bandwidth * share), 2 T D F / (rate * busy processors / processors))
              + keys read again by every row of tiles / cache bandwidth
              + [splits > 1] (LAUNCH + partial sums written and read)

and the candidate with the least wins. Splitting F fills a GPU that D alone cannot, for a second launch.

The table holds data-sheet numbers of the largest GPU of an architecture. They choose; they promise nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ttt_kernels.types import ceil_div

INTERPRETED = 0  # Triton's interpreter: small tiles, so that small tests see many
LATENCY = 0.8e-6  # seconds from asking for a tile to asking for the next in its place
LAUNCH = 2.5e-6  # seconds of a second, dependent launch
CACHE = 2.5  # bandwidth of the last-level cache, in units of the memory's
MATVEC_ELEMENTS = 2048  # of a tile: four 16-byte copies in every of 128 threads
RESIDENT = 8  # programs of 128 threads on a multiprocessor, by their registers
SPLITS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Device:
    """processors; memory bandwidth in bytes/s; shared memory of a block in bytes; bf16 FLOP/s."""

    processors: int
    bandwidth: float
    shared: int
    rate: float


DEVICES = {
    80: Device(108, 2.0e12, 166912, 312e12),
    86: Device(84, 0.9e12, 101376, 142e12),
    90: Device(132, 4.8e12, 232448, 989e12),
    100: Device(148, 8.0e12, 232448, 2250e12),
    120: Device(170, 1.8e12, 101376, 210e12),
}


def device(architecture: int) -> Device:
    """The newest architecture of the table that is not newer."""
    return DEVICES[max((a for a in DEVICES if a <= architecture), default=80)]


@dataclass(frozen=True)
class ApplyTiles:
    """A program reads tiles [d, f] of one weight for t tokens, along one of `splits` parts of F.

    t = 1: a matrix-vector product in registers. Else a tensor-core product of t >= 16 tokens: fewer are
    padded, which costs nothing where bytes count. Tiles arrive in shared memory `stages - 1` ahead of
    their use: stages * (4 d f + itemsize t f) bytes.
    """

    t: int
    d: int
    f: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class UpdateTiles:
    """A program adds to one tile [d, f] of one weight, k tokens at a time; stages * itemsize * k (d + f)
    bytes of shared memory, d f float32 accumulators."""

    d: int
    f: int
    k: int
    warps: int
    stages: int


@lru_cache(maxsize=1024)  # asked in every layer for every token
def apply_tiles(
    architecture: int, itemsize: int, tokens: int, d: int, f: int, along_d: bool = False
) -> ApplyTiles:
    """Tiles to apply weights [d, f] to `tokens` >= 1 tokens of every row. `along_d`: the weight is contiguous
    along d rather than f (the transposed read of the backward).

    >>> apply_tiles(90, 2, 1, 4096, 14336)
    ApplyTiles(t=1, d=8, f=256, splits=1, warps=4, stages=4)
    """
    if architecture == INTERPRETED:
        t = 1 if tokens == 1 else 16
        return ApplyTiles(t, 16, 32, splits=min(2, ceil_div(f, 32)), warps=4, stages=1)
    candidates = _apply_candidates(device(architecture), itemsize, tokens, f, along_d)
    return min(candidates, key=lambda c: apply_seconds(architecture, itemsize, c, tokens, d, f))


def _apply_candidates(gpu: Device, itemsize: int, tokens: int, f: int, along_d: bool) -> Iterator[ApplyTiles]:
    if tokens == 1:
        for d in (128, 64, 32) if along_d else (8, 4, 2, 1):
            yield from _split(ApplyTiles(1, d, MATVEC_ELEMENTS // d, 1, 4, 4), f)
        return
    t = next((t for t in (16, 32, 64) if tokens <= t or itemsize == 4 and t == 64), 128)
    # One warp for 16 rows of weight: a second would round the same ones again.
    few = (64, 32) if along_d else (64, 32, 16)  # along d, 16 floats would be half a cache line
    for d in {16: few, 32: few, 64: (64, 32), 128: (128,)}[t]:
        k = (2048 if itemsize == 4 else 4096) // d if t <= 32 else 32 if itemsize == 4 else 64
        room = gpu.shared if t == 128 else gpu.shared // 2  # two programs on a multiprocessor
        stages = min(4, max(2, room // (k * (4 * d + itemsize * t))))
        yield from _split(ApplyTiles(t, d, k, 1, d // 16, stages), f)


def _split(tiles: ApplyTiles, f: int) -> Iterator[ApplyTiles]:
    """`tiles` with every number of parts that leaves each a tile."""
    for splits in SPLITS:
        if splits == 1 or splits <= f // tiles.f:
            yield replace(tiles, splits=splits)


def apply_seconds(
    architecture: int, itemsize: int, tiles: ApplyTiles, tokens: int, d: int, f: int, rows: int = 1
) -> float:
    """Predicted time to apply the weights of `rows` rows; the formula is at the top of this file."""
    gpu = device(architecture)
    columns = ceil_div(d, tiles.d)
    programs = rows * columns * ceil_div(tokens, tiles.t) * tiles.splits
    stage = 4 * tiles.d * min(tiles.f, f)
    footprint = tiles.stages * (4 * tiles.d + itemsize * tiles.t) * tiles.f
    resident = max(1, min(RESIDENT * 4 // tiles.warps, gpu.shared // footprint))
    on_the_way = min(programs, resident * gpu.processors) * stage * (tiles.stages - 1)
    share = min(1.0, on_the_way / (gpu.bandwidth * LATENCY))
    seconds = rows * 4 * d * f / (gpu.bandwidth * share)
    if tiles.t > 1:
        rate = gpu.rate if itemsize == 2 else gpu.rate / 16
        padded = ceil_div(tokens, tiles.t) * tiles.t
        waves = ceil_div(programs, gpu.processors) * gpu.processors / programs
        seconds = max(seconds, rows * 2 * padded * d * f * waves / rate)
    seconds += rows * columns * tokens * f * itemsize / (CACHE * gpu.bandwidth)
    if tiles.splits > 1:
        seconds += LAUNCH + 2 * tiles.splits * rows * tokens * d * 4 / gpu.bandwidth
    return seconds


def update_tiles(architecture: int, itemsize: int, tokens: int, d: int, f: int) -> UpdateTiles:
    """Tiles to write `tokens` tokens into every row's weight [d, f]: the largest of which one weight still
    has one for each multiprocessor.

    >>> update_tiles(90, 2, 1024, 4096, 14336)
    UpdateTiles(d=128, f=128, k=64, warps=8, stages=3)
    """
    if architecture == INTERPRETED:
        return UpdateTiles(16, 32, 16, warps=4, stages=1)
    gpu = device(architecture)
    if itemsize == 4:
        return UpdateTiles(64, 64, 16, warps=4, stages=3)
    k = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    enough = ceil_div(d, 128) * ceil_div(f, 128) >= gpu.processors
    edge, warps = (128, 8) if enough else (64, 4)
    room = gpu.shared if edge == 128 else gpu.shared // 2  # registers leave the larger alone
    stages = min(3, room // (itemsize * k * 2 * edge))
    return UpdateTiles(edge, edge, k, warps, stages)
