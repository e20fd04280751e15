"""How to choose, apart from how to compute: pure functions of sizes, each with a test.

**Gram or matvec form.** The power iteration needs `2 iterations + 1` products with Kz = Z Z^T and
Kv = V V^T. They can be formed once, C (D + F) FLOPs per token (one triangle), and then read 4 C bytes
per token and product; or each product is Z (Z^T b), two reads of the 2-byte operand and no GEMM.
`seconds_per_token` predicts both. At the sizes of released models the matvec form wins nowhere by more
than 2%, so there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from ttt_kernels.ops.scan.heuristics import PROCESSORS, known_architecture
from ttt_kernels.types import ceil_div

# FLOP/s and bytes/s that a large GPU of an architecture reaches: 90 as measured on an H200, the others
# assumed.
RATES = {80: (250e12, 1.7e12), 90: (788e12, 4.0e12), 100: (1800e12, 6.4e12)}
FUSED_EFFICIENCY = 0.8  # of the library's GEMM rate

# Scratch of one group of chunks: both Gram matrices and, backward, the thin products.
GROUP_BYTES = 64 << 20
GRID_LIMIT = 65535  # programs along the second and third axis of a grid


@dataclass(frozen=True)
class Tiles:
    """Tile of a step-size kernel: `rows` by `columns` of its result, `k` of what is summed over.

    Shared memory: stages * k * (rows + columns) * itemsize. Registers: rows * columns float32
    accumulators over 32 * warps threads, twice that where a Gram kernel sums Kz * Kv.
    """

    rows: int
    columns: int
    k: int
    warps: int
    stages: int


_GRAM = {
    80: (Tiles(128, 128, 32, 8, 4), Tiles(64, 64, 64, 4, 4)),
    86: (Tiles(128, 128, 32, 8, 4), Tiles(64, 64, 64, 4, 4)),
    90: (Tiles(128, 128, 64, 8, 4), Tiles(64, 64, 64, 4, 4)),
    100: (Tiles(128, 128, 64, 8, 4), Tiles(64, 64, 64, 4, 4)),
    120: (Tiles(128, 128, 32, 8, 4), Tiles(64, 64, 64, 4, 4)),
}
_GRAM_FLOAT32 = (Tiles(64, 64, 16, 4, 3), Tiles(32, 32, 16, 4, 3))
_GRAM_INTERPRETER = (Tiles(16, 16, 32, 4, 1),)


def gram_tiles(architecture: int, itemsize: int, chunk_size: int, chunks: int) -> Tiles:
    """Square tiles of a triangle: the largest that is no longer than a chunk and, over all chunks,
    makes a tile for every multiprocessor; else the smallest."""
    architecture = known_architecture(architecture)
    rows = _GRAM_FLOAT32 if itemsize == 4 else _GRAM.get(architecture, ())
    rows = rows if architecture else _GRAM_INTERPRETER

    def fills(tile: Tiles) -> bool:
        side = ceil_div(chunk_size, tile.rows)
        enough = chunks * side * (side + 1) // 2 >= PROCESSORS[architecture]
        return enough and tile.rows <= chunk_size

    return next((t for t in rows if fills(t)), rows[-1])


def iterate_tiles(architecture: int, padded: int) -> Tiles:
    """A product of a Gram matrix and a vector: rows of a program, columns read at a time. `padded` is
    a multiple of the Gram tile, so that both divide it."""
    if not known_architecture(architecture):
        return Tiles(16, 16, 1, 4, 1)
    return Tiles(min(32, padded & -padded), min(128, padded & -padded), 1, 4, 1)


def project_tiles(architecture: int, itemsize: int) -> Tiles:
    """w^T X: 16 vectors (the least a tensor core takes) by columns of X, k tokens at a time."""
    if not known_architecture(architecture):
        return Tiles(16, 32, 16, 4, 1)
    return Tiles(16, 64, 32, 4, 3) if itemsize == 4 else Tiles(16, 128, 64, 4, 4)


def expand_tiles(architecture: int) -> Tiles:
    """sum of outer products: tokens by columns of the gradient."""
    if not known_architecture(architecture):
        return Tiles(16, 32, 1, 4, 1)
    return Tiles(64, 128, 1, 4, 2)


_CLIP = {
    80: (Tiles(128, 128, 32, 8, 3), Tiles(64, 128, 32, 4, 3)),
    86: (Tiles(64, 128, 32, 4, 3),),
    90: (Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 4, 3)),
    100: (Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 4, 3)),
    120: (Tiles(64, 128, 32, 4, 3),),
}


def clip_tiles(architecture: int, itemsize: int, chunk_size: int) -> Tiles:
    """K X of the clip's gradient, K in float32: shared memory stages * k * (4 rows + itemsize columns)."""
    architecture = known_architecture(architecture)
    if not architecture:
        return Tiles(16, 32, 16, 4, 1)
    rows = (Tiles(64, 64, 16, 4, 3),) if itemsize == 4 else _CLIP[architecture]
    return next((t for t in rows if t.rows <= chunk_size), rows[-1])


def group_size(chunks: int, bytes_per_chunk: int) -> int:
    """Chunks handled together: as many as GROUP_BYTES allow, in groups of equal size.

    >>> group_size(33, GROUP_BYTES // 32)
    17
    """
    most = max(1, min(GROUP_BYTES // bytes_per_chunk, GRID_LIMIT))
    return ceil_div(chunks, ceil_div(chunks, most)) if chunks else 1


def seconds_per_token(
    chunk_size: int, d: int, f: int, iterations: int = 5, architecture: int = 90, *,
    backward: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """(Gram form, matvec form): predicted time of the spectral step size per token, 2-byte operands.

        gemm    = max(C (D + F) (1 + 128 / C) / rate, pass)      both triangles of the diagonal tiles
        product = 4 C / bandwidth                                reading Kz or Kv once
        pass    = 2 (D + F) / bandwidth                          reading Z and V once

        forward   Gram   gemm + (2 iterations + 3) product       two of them write
                  matvec 2 iterations passes                     each iteration reads Z and V twice
        backward  Gram   gemm + (4 iterations + 3) product + 2 passes
                  matvec (4 iterations + 2) passes

    On an H200 at C = 1024 the Gram form takes 0.51 of the time of the matvec form at 4096 x 14336, 0.58
    at 2560 x 9728 and 1.02 at 1024 x 3072; forward and backward together 0.42, 0.48 and 0.85.
    """
    flops, bandwidth = RATES[max(a for a in RATES if a <= architecture)]
    read_all = 2 * (d + f) / bandwidth
    gemm = max((chunk_size + 128) * (d + f) / (FUSED_EFFICIENCY * flops), read_all)
    product = 4 * chunk_size / bandwidth
    if backward:
        gram = gemm + (4 * iterations + 3) * product + 2 * read_all
        return gram, (4 * iterations + 2) * read_all
    return gemm + (2 * iterations + 3) * product, 2 * iterations * read_all
