"""How to choose, apart from how to compute: pure functions of sizes, each with a test.

**Super-chunk length.** Writing the state after every chunk of C tokens moves `8 D F` bytes (float32
read and write) for `4 C D F` FLOPs; below some C the state traffic costs more than the arithmetic.
A block of S >= C tokens writes once and adds the missing writes in attention form, `2 S (D + F)`
FLOPs per token. With a machine that does `balance` FLOPs in the time of one byte, the cost per token
in FLOPs is

    cost(S) = 4 D F  +  8 D F balance / S  +  2 S (D + F)        (last term only where S > C)

which is least at `S* = sqrt(4 D F balance / (D + F))`, independent of C.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

from ttt_kernels.types import ceil_div

# FLOPs a GEMM does in the time one byte of state is read or written. CPU: 177 GFLOP/s float32
# against about 20 GB/s on 2 cores; GPU: the bf16 rate and memory bandwidth of an H200, 788 / 4.0.
BALANCE = {"cpu": 9.0, "cuda": 197.0}

INTERPRETED = 0
# Multiprocessors of the largest GPU of an architecture: what has to be kept busy.
PROCESSORS = {INTERPRETED: 1, 80: 108, 86: 84, 90: 132, 100: 148, 120: 170}

# Tokens handled at a time inside one chunk, so that scratch memory does not grow with C.
TOKEN_TILE = 1024


def super_chunk(chunk_size: int, d: int, f: int, device_type: str) -> int:
    """Tokens per state write: a multiple of `chunk_size`, equal to it where chunks are long enough.

    >>> super_chunk(1024, 1024, 3072, "cpu")
    1024
    """
    balance = BALANCE.get(device_type, BALANCE["cuda"])
    best = math.sqrt(4 * d * f * balance / (d + f)) if d and f else 1
    return chunk_size * max(1, round(best / chunk_size))


def strip_width(columns: int) -> int:
    """Columns of the strips that `rescale` walks: so many that every multiprocessor has one, but not fewer
    than fill its products.

    >>> strip_width(1024), strip_width(8192)
    (16, 32)
    """
    return 32 if columns >= 32 * PROCESSORS[90] else 16


@dataclass(frozen=True)
class Tiles:
    """Tile of the fused scan kernels: y [t, d], W [d, f], and k of whatever is summed over.

    `more_d`, `more_f`: tiles have a second part beside the first, the forward's y [t, d + more_d], and
    W [d, f + more_f] also of the backward. `registers` a thread, where the compiler has to be held to them so
    that two programs share a multiprocessor: the tail of one then hides behind the other.

    Shared memory: stages * k * (the two operand edges) * itemsize, at most what a block of the
    architecture may have. Registers: float32 accumulators of a tile over 32 * warps threads.
    """

    t: int
    d: int
    f: int
    k: int
    warps: int
    stages: int
    registers: int | None = None
    more_d: int = 0
    more_f: int = 0

    @property
    def y_columns(self) -> int:
        return self.d + self.more_d

    @property
    def w_columns(self) -> int:
        return self.f + self.more_f

    @property
    def launch(self) -> dict[str, int]:
        """Launch options."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


# Candidates by architecture, and by how much slower than the first per FLOP each is taken to be: a smaller
# tile reads its operands more often.
_WIDE = {
    80: ((Tiles(128, 128, 128, 32, 8, 4), 1.0), (Tiles(64, 128, 64, 32, 4, 4), 1.25)),
    86: ((Tiles(128, 128, 128, 32, 8, 4), 1.0), (Tiles(64, 64, 64, 32, 4, 4), 1.4)),
    90: ((Tiles(128, 256, 128, 64, 8, 3), 1.0), (Tiles(128, 128, 128, 64, 8, 3, 128), 1.1),
         (Tiles(64, 128, 64, 64, 4, 4), 1.35)),
    100: ((Tiles(128, 256, 128, 64, 8, 3), 1.0), (Tiles(128, 128, 128, 64, 8, 3, 128), 1.15),
          (Tiles(64, 128, 64, 64, 4, 4), 1.5)),
    120: ((Tiles(128, 128, 128, 32, 8, 3), 1.0), (Tiles(64, 64, 64, 32, 4, 4), 1.4)),
}  # fmt: skip
# Besides, of the forward and of the backward's state, where accumulators need few registers beside them:
# tiles in two parts. There L2 bounds a tile: FLOPs of a multiprocessor while a byte arrives, and while a tile
# starts (1 us).
_PARTS = (Tiles(128, 128, 128, 32, 8, 5, 128, 64, 64), Tiles(128, 128, 128, 32, 8, 5, 128, 0, 64))
_FEED = {90: (88, 6.0e6), 100: (95, 12.1e6)}
_FLOAT32 = ((Tiles(64, 64, 64, 16, 4, 3), 1.0), (Tiles(32, 64, 32, 16, 4, 3), 1.4))
_INTERPRETER = ((Tiles(16, 16, 32, 16, 4, 1, more_d=8, more_f=16), 1.0),)


def known_architecture(architecture: int) -> int:
    """The newest architecture of the tables that is not newer."""
    return max((a for a in PROCESSORS if a <= architecture), default=80)


def forward_tiles(
    architecture: int, itemsize: int, blocks: int, tokens: int, d: int, f: int, *, super_chunk: bool
) -> Tiles:
    """Tiles of the forward step: the candidate with the least predicted time of one launch (`_step_time`)."""
    architecture = known_architecture(architecture)
    if not architecture:
        candidates = _INTERPRETER
    elif itemsize == 4:
        candidates = _FLOAT32
    elif architecture in _FEED:  # which knows what is slow
        # In a super-chunk the scores pass through registers that a second part of y would need.
        parts = [t for t in _PARTS if not (t.more_d and super_chunk)]
        candidates = [(tile, 1.0) for tile in (*(t for t, _ in _WIDE[architecture]), *parts)]
    else:
        candidates = _WIDE[architecture]
    sizes = architecture, itemsize, blocks, tokens, d, f, super_chunk
    return min(candidates, key=lambda c: _step_time(c[0], *sizes) * c[1])[0]


def _tile_time(
    t: Tiles, architecture: int, itemsize: int, rows: int, columns: int, summed: int, read: int, stored: int
) -> float:
    """Time of a tile [rows, columns] that sums over `summed` and then reads and stores so many bytes an
    element, in FLOPs that a multiprocessor could do.

    Where L2 bounds it, it multiplies or waits for its operands; its start and tail come on top, unless
    another program of the multiprocessor hides them and only waits with it for what L2 delivers.
    """
    feed, start = _FEED.get(architecture, (0, 0.0)) if itemsize == 2 else (0, 0.0)
    multiply, loads = 2 * rows * columns * summed, feed * itemsize * (rows + columns) * summed
    reads, tail = (feed * size * rows * columns for size in (read, read + stored))
    if t.registers is None and t.warps > 4:
        return start + max(multiply, loads) + tail
    return max(multiply, loads + reads, tail)


def _step_time(
    t: Tiles, architecture: int, itemsize: int, blocks: int, tokens: int, d: int, f: int, super_chunk: bool
) -> float:
    """Time of one launch of the forward step, in the same FLOPs.

    One launch holds `blocks` blocks of `tokens` tokens: apply tiles of 2 t d F FLOPs and write tiles of
    2 d f tokens FLOPs, handed to the multiprocessors longest first, so that it takes about

        max(longest tile, all tiles / multiprocessors)
    """
    machine = t, architecture, itemsize
    apply = _tile_time(*machine, t.t, t.y_columns, f + (tokens // 2 if super_chunk else 0), 0, itemsize)
    write = _tile_time(*machine, t.d, t.w_columns, tokens, 4, 4 + itemsize)
    reading = ceil_div(tokens, t.t) * ceil_div(d, t.y_columns)
    writing = ceil_div(d, t.d) * ceil_div(f, t.w_columns)
    return max(apply, write, blocks * (reading * apply + writing * write) / PROCESSORS[architecture])


@lru_cache(1024)
def fused_super_chunk(chunk_size: int, d: int, f: int, rows: int = 1) -> int:
    """Tokens per state write of the fused kernels: a multiple of `chunk_size`. `rows` of the batch share a
    launch.

    Of the lengths up to 1024 the one with the least time a token on sm_90 in 16 bits: a launch of the forward
    step (`_step_time`, or its bytes through memory if these take longer) and what it costs to start one and,
    for more than one chunk, the (S + C) F FLOPs a token of the scores, 1.4 times since L2 feeds their tiles.
    Longer blocks would make the forward of the largest models 1% faster, and take memory and the time of the
    backward. Chunks of more than 320 stand alone: there the backward and, with row norms, walking the chunks
    of a block cost more than rarer writes save, which this cost does not see.

    >>> fused_super_chunk(1024, 4096, 14336), fused_super_chunk(64, 4096, 14336)
    (1024, 1024)
    """
    if not d or not f or chunk_size > 320:
        return chunk_size
    processors, start = PROCESSORS[90], _FEED[90][1]

    def cost(length: int) -> float:
        sizes = 90, 2, rows, length, d, f, length > chunk_size
        tiles = forward_tiles(*sizes[:-1], super_chunk=sizes[-1])
        memory = 10 * d * f * rows * BALANCE["cuda"] / processors
        scores = length * (length + chunk_size) * f * rows / processors if length > chunk_size else 0
        return (3 * start + max(_step_time(tiles, *sizes), memory) + 1.4 * scores) / length

    unit = chunk_size * max(1, 128 // chunk_size)
    return min((chunk_size, *(n for n in range(unit, 1025, unit) if n > chunk_size)), key=cost)


# How one block is read and written. "fused": one launch for both. "split": the library's matrix product
# reads, a launch writes; only where y needs nothing after the product.
PLANS = ("fused", "split")
_PLAN: ContextVar[str | None] = ContextVar("ttt_kernels_scan_plan", default=None)


@contextmanager
def use_plan(plan: str) -> Iterator[None]:
    """Make the fused scan use a plan in this context: for benchmarks, which tell which one wins."""
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    token = _PLAN.set(plan)
    try:
        yield
    finally:
        _PLAN.reset(token)


def choose_plan(super_chunk: bool, preserve: bool, packed: bool) -> str:
    """The plan asked for, else "fused": by the model of `forward_tiles` its write tiles fill the waves
    that apply tiles leave half empty, and a library product could only save time inside a tile."""
    plan = _PLAN.get() or "fused"
    if plan == "split" and (super_chunk or preserve or packed):
        raise NotImplementedError(
            "plan='split' reads with one library product for each chunk, so it needs dense rows, chunks "
            "that are no super-chunks and preserve_row_norm=False; got "
            f"super_chunk={super_chunk}, preserve_row_norm={preserve}, packed={packed}"
        )
    return plan


def backward_tiles(
    architecture: int, itemsize: int, blocks: int, tokens: int, d: int, f: int
) -> tuple[Tiles, Tiles]:
    """Tiles of the backward's launches over tokens ([t, d], also of dZ) and over the state ([d, f]).

    Of `blocks` blocks of `tokens` tokens, in whole waves: a multiprocessor holds one token tile, and two
    of the state where their accumulators leave room, so that one multiplies while the other is stored. Those
    of the state may have a second part.
    """
    architecture = known_architecture(architecture)
    candidates = _FLOAT32 if itemsize == 4 else _WIDE.get(architecture, ())
    candidates = candidates if architecture else _INTERPRETER
    if d % 16 or f % 16:  # loads of single numbers pass through registers
        candidates = candidates[-1:]
    processors = PROCESSORS[architecture]

    def token_time(candidate: tuple[Tiles, float]) -> float:
        tile, slowness = candidate
        values, keys = (ceil_div(tokens, tile.t) * ceil_div(size, tile.d) for size in (d, f))
        total = blocks * (values * f + keys * 2 * d) / processors
        return tile.t * tile.d * max(f, 2 * d, total) * slowness

    def state_time(candidate: tuple[Tiles, float]) -> float:
        tile, slowness = candidate
        waves = ceil_div(blocks * ceil_div(d, tile.d) * ceil_div(f, tile.w_columns), processors)
        return waves * slowness * _tile_time(
            tile, architecture, itemsize, tile.d, tile.w_columns, tokens, 4, 4 + itemsize
        )

    small = [c for c in candidates if c[0].d * c[0].f <= 128 * 128]
    if architecture in _FEED and itemsize == 2 and len(candidates) > 1:
        small = [(tile, 1.0) for tile in (*(t for t, _ in small), _PARTS[1])]
    return min(candidates, key=token_time)[0], min(small, key=state_time)[0]
