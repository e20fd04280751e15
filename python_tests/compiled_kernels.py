"""Kernels made to be judged: a program that compiles them for an architecture, without a GPU, and prints
what `kernel_report` says, as JSON. `test_kernels_compile.py` runs it where Triton does not interpret."""

import json
import sys

import torch
import triton
import triton.language as tl

from ttt_kernels.ops.triton_launch import launch, record
from ttt_kernels.testing.kernel_report import complaints
from ttt_kernels.testing.triton_compile import compile_launches


@triton.jit
def product_kernel(
    a, b, c, N, K, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """c = a b^T, one tile a program; rows of a are STRIDE elements apart, element by element."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    b_c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        b_a = tl.load(a + (o_m[:, None] * K + k + o_k[None, :]) * STRIDE)
        b_b = tl.load(b + (o_n[:, None] * K + k + o_k[None, :]) * STRIDE)
        b_c = tl.dot(b_a, tl.trans(b_b), b_c)
    tl.store(c + o_m[:, None] * N + o_n[None, :], b_c.to(c.dtype.element_ty))


VARIANTS = {
    "good": dict(STRIDE=1, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    "spilling": dict(STRIDE=1, BLOCK_M=256, BLOCK_N=128, BLOCK_K=32, num_warps=2, num_stages=2),
    "too large": dict(STRIDE=1, BLOCK_M=128, BLOCK_N=256, BLOCK_K=128, num_warps=8, num_stages=4),
    "narrow": dict(STRIDE=2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2),
}


def main(architecture: int) -> None:
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    a, b, c = meta(512, 2 * 256), meta(512, 2 * 256), meta(512, 512)
    with record(architecture) as launches:
        for variant in VARIANTS.values():
            grid = (512 // variant["BLOCK_M"], 512 // variant["BLOCK_N"])
            launch(product_kernel, grid, a=a, b=b, c=c, N=512, K=256, **variant)
        launch(product_kernel, (4, 4), a=a, b=b, c=c, N=512, K=256, **VARIANTS["good"])
    *reports, again = compile_launches(launches, architecture)
    facts = {
        name: {
            "complaints": complaints(report),
            "registers": report.registers,
            "spilled in the loop": report.loop_spills,
            "shared_memory": report.shared_memory,
            "dots": report.dots,
            "native": {80: report.mma_sync, 90: report.wgmma, 100: report.tcgen05}[architecture],
            "resident_blocks": report.resident_blocks,
            "wide_loads": report.wide_loads,
        }
        for name, report in zip(VARIANTS, reports, strict=True)
    }
    print(json.dumps({"facts": facts, "compiled once": again is reports[0]}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
