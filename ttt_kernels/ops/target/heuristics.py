"""How to choose, apart from how to compute: pure functions of sizes, each with a test.

**Projection.** x P is a plain GEMM of 2 D^2 FLOPs per token, and stays with the library. A fused kernel
would save a pass only if there were one: the shift is a view (row t of the result comes from row t + h
of x), and of the result only the h last rows of a chunk are erased, h D of C D elements. The backward
copies dv once, shifted and masked, which turns both of its GEMMs into plain ones; the copy moves 4 D
bytes for 4 D^2 FLOPs, 5% of their time at D = 4096 and 20% at D = 1024 (788 TFLOP/s, 4.0 TB/s). A
convolution ahead of the GEMM would have to be done again for each of its D / BLOCK_D column tiles.

**Tiles.** Everything else here moves memory: a program covers [t, d] of one tensor, wide enough for
16-byte accesses of whole warps. The convolution's window is read again for every tap, from the L1 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from ttt_kernels.ops.scan.heuristics import known_architecture


@dataclass(frozen=True)
class Tiles:
    """[t, d] elements of a program: t * d / (32 * warps) float32 sums in the registers of a thread."""

    t: int
    d: int
    warps: int


_INTERPRETER = Tiles(16, 16, 4)


def shift_tiles(architecture: int) -> Tiles:
    return Tiles(32, 256, 4) if known_architecture(architecture) else _INTERPRETER


def conv_tiles(architecture: int) -> Tiles:
    """Backward, a program writes one row of weight gradients for its t tokens: 4 KW / (2 t) of the bytes
    of a 2-byte operand."""
    return Tiles(64, 64, 8) if known_architecture(architecture) else _INTERPRETER
