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
