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

from ttt_kernels.types import ceil_div

# FLOPs a GEMM does in the time one byte of state is read or written. CPU: 177 GFLOP/s float32
# against about 20 GB/s on 2 cores; GPU: the bf16 rate and memory bandwidth of an H200, 788 / 4.0.
BALANCE = {"cpu": 9.0, "cuda": 197.0}

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


def fused_super_chunk(chunk_size: int, d: int, f: int) -> int:
    """Tokens per state write of the fused kernels: a multiple of `chunk_size`.

    They read and write the state (10 D F bytes with its rounded copy) while they multiply, so that a
    block costs the longer of the two, and the attention form only its lower triangle. Per token, in FLOPs:

        cost(S) = max(4 D F, 10 D F balance / S)  +  S (D + F)        (last term only where S > C)

    which is least at `min(2.5 balance, sqrt(10 D F balance / (D + F)))`: one of the two multiples of
    C around it.

    >>> fused_super_chunk(1024, 4096, 14336), fused_super_chunk(64, 4096, 14336)
    (1024, 512)
    """
    balance = BALANCE["cuda"]

    def cost(length: int) -> float:
        attention = length * (d + f) if length > chunk_size else 0
        return max(4 * d * f, 10 * d * f * balance / length) + attention

    best = min(2.5 * balance, math.sqrt(10 * d * f * balance / (d + f))) if d and f else 1
    chunks = max(1, math.floor(best / chunk_size))
    return min((chunks * chunk_size, (chunks + 1) * chunk_size), key=cost)


@dataclass(frozen=True)
class Tiles:
    """Tile of the fused scan kernels: y [t, d], W [d, f], and k of whatever is summed over.

    Shared memory: stages * k * (the two operand edges) * itemsize, at most what a block of the
    architecture may have. Registers: t * d or d * f float32 accumulators over 32 * warps threads.
    `registers` a thread, where the compiler has to be held to them so that two programs share a
    multiprocessor: the tail of one then hides behind the other.
    """

    t: int
    d: int
    f: int
    k: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        """Launch options."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


INTERPRETED = 0
# Multiprocessors of the largest GPU of an architecture: what has to be kept busy.
PROCESSORS = {INTERPRETED: 1, 80: 108, 86: 84, 90: 132, 100: 148, 120: 170}
# Candidates by (architecture, bytes of an operand), and by how much slower than the first per FLOP each
# is taken to be: a smaller tile reads its operands more often.
_WIDE = {
    80: ((Tiles(128, 128, 128, 32, 8, 4), 1.0), (Tiles(64, 128, 64, 32, 4, 4), 1.25)),
    86: ((Tiles(128, 128, 128, 32, 8, 4), 1.0), (Tiles(64, 64, 64, 32, 4, 4), 1.4)),
    90: ((Tiles(128, 256, 128, 64, 8, 3), 1.0), (Tiles(128, 128, 128, 64, 8, 3, 128), 1.1),
         (Tiles(64, 128, 64, 64, 4, 4), 1.35)),
    100: ((Tiles(128, 256, 128, 64, 8, 3), 1.0), (Tiles(128, 128, 128, 64, 8, 3, 128), 1.15),
          (Tiles(64, 128, 64, 64, 4, 4), 1.5)),
    120: ((Tiles(128, 128, 128, 32, 8, 3), 1.0), (Tiles(64, 64, 64, 32, 4, 4), 1.4)),
}  # fmt: skip
_FLOAT32 = ((Tiles(64, 64, 64, 16, 4, 3), 1.0), (Tiles(32, 64, 32, 16, 4, 3), 1.4))
_INTERPRETER = ((Tiles(16, 16, 32, 16, 4, 1), 1.0),)


def known_architecture(architecture: int) -> int:
    """The newest architecture of the tables that is not newer."""
    return max((a for a in PROCESSORS if a <= architecture), default=80)


def forward_tiles(
    architecture: int, itemsize: int, blocks: int, tokens: int, d: int, f: int
) -> Tiles:
    """Tiles of the forward step: the candidate with the least predicted time of one launch.

    One launch holds `blocks` blocks of `tokens` tokens: apply tiles of 2 t d F FLOPs and write tiles of
    2 d f tokens FLOPs, handed to the multiprocessors longest first, so that it takes about

        max(longest tile, all tiles / multiprocessors) * slowness of the candidate
    """
    architecture = known_architecture(architecture)
    if not architecture:
        candidates = _INTERPRETER
    elif itemsize == 4:
        candidates = _FLOAT32
    else:
        candidates = _WIDE[architecture]

    def time(candidate: tuple[Tiles, float]) -> float:
        tile, slowness = candidate
        apply, write = tile.t * tile.d * f, tile.d * tile.f * tokens
        rows, columns = ceil_div(tokens, tile.t), ceil_div(d, tile.d)
        total = blocks * columns * (rows * apply + ceil_div(f, tile.f) * write)
        return max(apply, write, total / PROCESSORS[architecture]) * slowness

    return min(candidates, key=time)[0]


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
    of the state where their accumulators leave room, so that one multiplies while the other is stored.
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
        tiles = blocks * ceil_div(d, tile.d) * ceil_div(f, tile.f)
        return tile.d * tile.f * ceil_div(tiles, processors) * slowness

    small = [c for c in candidates if c[0].d * c[0].f <= 128 * 128]
    return min(candidates, key=token_time)[0], min(small, key=state_time)[0]
