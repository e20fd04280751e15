"""What can be benchmarked: one row an operation. A new one is a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ttt_kernels as ttt
from ttt_kernels._config import chosen_implementation
from ttt_kernels.cli.bench_case import DTYPES, Case, Implementation, Operands, Operation, run_once
from ttt_kernels.ops._implementations import why_not_triton
from ttt_kernels.ops.ridge import reference as ridge_reference
from ttt_kernels.ops.scan.heuristics import fused_super_chunk, use_plan
from ttt_kernels.ops.step_size import reference as step_size_reference
from ttt_kernels.ops.target import reference as target_reference
from ttt_kernels.testing import ScanInputs, check_scan, error_ratio
from ttt_kernels.testing.contract import RoundTo
from ttt_kernels.types import compute_dtype

CONV_TAPS = 5
GRAM_SLACK = 4.0


def scan_with(impl: str) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """y, or (y, state) where the caller asks for it with `return_state=True`."""

    def call(z, v, w0, **options):
        y, state = ttt.fast_weight_scan(z, v, w0, impl=impl, **options)
        return y if state is None else (y, state)

    return call


def no_triton(case: Case) -> str | None:
    """The interpreter is for tests: its times mean nothing."""
    if case.device == "cpu":
        return "Triton kernels need a GPU (--device cuda)"
    return why_not_triton(torch.device(case.device), DTYPES[case.dtype])


def no_split(case: Case) -> str | None:
    length = fused_super_chunk(case.chunk_size, case.d, case.f)
    if case.preserve_row_norm or length > case.chunk_size:
        return "the split plan is for long chunks without row norms"
    return no_triton(case)


def split_scan(*leaves, **options):
    with use_plan("split"):
        return scan_with("triton")(*leaves, **options)


def fused(call: Callable[..., Tensor], why_not=no_triton) -> Implementation:
    return Implementation(call, why_not=why_not)


def by_choice(impl: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operation without an `impl` argument, run by one."""

    def call(*args, **options):
        with chosen_implementation(impl):
            return op(*args, **options)

    return call


def scan_operands(case: Case, data: ScanInputs) -> Operands:
    """Writes of a trained model's size: spectral norm 0.3, as one number for all chunks."""
    steps = ttt.spectral_step_size(data.z, data.v, chunk_size=case.chunk_size, lr=0.3)
    steps = steps[steps > 0]
    options = {
        "chunk_size": case.chunk_size,
        "step_size": float(steps.median()) if len(steps) else 1.0,
        "preserve_row_norm": case.preserve_row_norm,
    }
    return Operands((data.z, data.v, data.w0), options, data.dy)


def scan_reference_memory(case: Case) -> int:
    """One weight per chunk: the writes, their running sum, the sum with w0; more for gradients."""
    copies = (3 if case.mode == "fwd" else 5) + (2 if case.preserve_row_norm else 0)
    itemsize = compute_dtype(DTYPES[case.dtype]).itemsize
    return copies * case.batch * case.chunks * case.d * case.f * itemsize


def scan_parity(case: Case, op: Operation, impl: str) -> float:
    """Values and gradients against the contract, block by block; see `ttt_kernels.testing`."""
    case = case.short()
    data = case.inputs(seed=1)
    options = op.operands(case, data).options
    return check_scan(op.implementations[impl].call, data, **options).worst


def reference_parity(case: Case, op: Operation, impl: str) -> float:
    """Values and gradients against the contract, and the reference in float64 as exact."""
    case, mode = case.short(), op.modes[-1]

    def operands() -> Operands:  # anew for every call: an operation may write its operands
        return op.operands(case, case.inputs(seed=1))

    reference = op.implementations["reference"].call
    actual = run_once(op.implementations[impl].call, operands(), mode)
    contract = run_once(op.contract or reference, operands(), mode)
    exact = run_once(reference, operands().in_dtype(torch.float64), mode)
    results = zip(actual, contract, exact, strict=True)
    return max(error_ratio(a, c, e) for a, c, e in results) / op.slack


def whole_projection(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A target with one product for all tokens. The gradient of P sums over them: the reference,
    chunk by chunk, rounds that long sum less than the contract of one GEMM allows."""

    def contract(u: Tensor, *weights: Tensor, **options) -> Tensor:
        acc = compute_dtype(u.dtype)
        *others, proj = (w.to(acc) for w in weights)
        return (reference(u.to(acc), *others, None, **options) @ proj).to(u.dtype)

    return contract


def next_token_operands(case: Case, data: ScanInputs) -> Operands:
    return Operands((data.x, data.proj), {"chunk_size": case.chunk_size}, data.dy)


def conv_operands(case: Case, data: ScanInputs) -> Operands:
    generator = torch.Generator().manual_seed(2)
    conv = torch.randn(case.d, 1, CONV_TAPS, generator=generator).to(data.x)
    return Operands((data.x, conv, data.proj), {"chunk_size": case.chunk_size}, data.dy)


def step_operands(**extra: float) -> Callable[[Case, ScanInputs], Operands]:
    def operands(case: Case, data: ScanInputs) -> Operands:
        generator = torch.Generator().manual_seed(2)
        dy = torch.randn(case.batch, case.chunks, generator=generator).to(data.z.device)
        options = {"chunk_size": case.chunk_size, "lr": 0.3, **extra}
        return Operands((data.z, data.v), options, dy)

    return operands


def pool(case: Case, data: ScanInputs) -> Tensor:
    """A float32 weight per row."""
    return data.w0.to(compute_dtype(data.w0.dtype)).repeat(case.batch, 1, 1)


def apply_operands(case: Case, data: ScanInputs) -> Operands:
    return Operands((data.z, pool(case, data)), {}, data.dy)


def apply_with(impl: str) -> Callable[..., Tensor]:
    return lambda z, weight: ttt.fast_weight_apply(z, weight, impl=impl)


def rounded_apply(z: Tensor, weight: Tensor) -> Tensor:
    return (z.to(weight.dtype) @ RoundTo.apply(weight, z.dtype).mT).to(z.dtype)


def update_operands(case: Case, data: ScanInputs) -> Operands:
    """One chunk."""
    chunk = slice(0, min(case.chunk_size, case.tokens))
    leaves = (pool(case, data), data.z[:, chunk], data.v[:, chunk])
    return Operands(leaves, {"step_size": 0.3}, data.dy)


def update_with(impl: str) -> Callable[..., Tensor]:
    def call(weight, z, v, **options):
        ttt.fast_weight_update_(weight, z, v, impl=impl, **options)
        return weight

    return call


def written(case: Case) -> int:
    return case.batch * min(case.chunk_size, case.tokens)


def ridge_operands(case: Case, data: ScanInputs) -> Operands:
    return Operands((data.z, data.x, data.w0, data.proj), {}, data.dy)


def ridge_released(z: Tensor, x: Tensor, w0: Tensor, proj: Tensor) -> Tensor:
    return torch.stack(
        [ridge_reference.ridge_write(a, b, w0, proj)[1] for a, b in zip(z, x, strict=True)]
    )


def ridge_flops(case: Case) -> tuple[int, int]:
    """Of what is computed here, with half a Gram matrix and D right-hand sides."""
    pairs, d, f = case.tokens - 1, case.d, case.f
    n = min(pairs, f)
    common = 2 * pairs * d * (d + 2 * f)
    return case.batch * (common + n * pairs * f + n**3 // 3 + 2 * n * n * d), 0


def per_token(forward: int, backward: int, case: Case) -> tuple[int, int]:
    tokens = case.batch * case.tokens
    return forward * tokens, backward * tokens


def gram_flops(case: Case) -> tuple[int, int]:
    forward = 2 * case.chunk_size * (case.d + case.f)
    return per_token(forward, 3 * forward, case)


def gram_gemms(case: Case) -> tuple[tuple[int, int, int], ...]:
    c = case.chunk_size
    return (c, case.f, c), (c, case.d, c)


def projection_gemms(case: Case) -> tuple[tuple[int, int, int], ...]:
    return ((case.batch * case.tokens, case.d, case.d),)


def gradient_memory(case: Case) -> int:
    """The chunk gradient G [D, F] in the compute precision; autograd keeps every chunk's."""
    itemsize = compute_dtype(DTYPES[case.dtype]).itemsize
    copies = 1 if case.mode == "fwd" else 3 * case.chunks
    return copies * case.batch * case.d * case.f * itemsize


def implementations(reference: Callable[..., Tensor], op: Callable[..., Tensor], memory=None) -> dict:
    """Of an operation whose implementation is chosen by name."""
    of_reference = Implementation(reference, memory) if memory else Implementation(reference)
    eager, triton = (Implementation(by_choice("eager", op)), fused(by_choice("triton", op)))
    return {"reference": of_reference, "eager": eager, "triton": triton}


OPERATIONS: dict[str, Operation] = {
    "scan": Operation(
        operands=scan_operands,
        implementations={
            "reference": Implementation(scan_with("reference"), scan_reference_memory),
            "eager": Implementation(scan_with("eager")),
            "triton": fused(scan_with("triton")),
            "triton-split": fused(split_scan, no_split),
        },
        flops=lambda c: per_token(4 * c.d * c.f, 10 * c.d * c.f, c),
        gemms=lambda c: ((c.tokens, c.f, c.d), (c.d, min(c.chunk_size, c.tokens), c.f)),
        parity=scan_parity,
        row_norm=True,
    ),
    "fast_weight_apply": Operation(
        operands=apply_operands,
        implementations=implementations(apply_with("reference"), apply_with("auto")),
        flops=lambda c: per_token(2 * c.d * c.f, 4 * c.d * c.f, c),
        traffic=lambda c: c.batch * c.weight_bytes,
        gemms=lambda c: ((c.tokens, c.f, c.d),),
        contract=rounded_apply,
        parity=reference_parity,
    ),
    "fast_weight_update_": Operation(
        operands=update_operands,
        implementations=implementations(update_with("reference"), update_with("auto")),
        flops=lambda c: (2 * c.d * c.f * written(c), 0),
        traffic=lambda c: 2 * c.batch * c.weight_bytes,
        gemms=lambda c: ((c.d, min(c.chunk_size, c.tokens), c.f),),
        modes=("fwd",),
        parity=reference_parity,
    ),
    "ridge_write": Operation(
        operands=ridge_operands,
        implementations={
            "reference": Implementation(ridge_released),
            "eager": Implementation(lambda *leaves: ttt.ridge_write(*leaves).delta),
        },
        flops=ridge_flops,
        gemms=lambda c: ((c.tokens, c.f, c.d), (c.d, c.tokens, c.f)),
        slack=GRAM_SLACK,
        modes=("fwd",),
        parity=reference_parity,
    ),
    "next_token_target": Operation(
        operands=next_token_operands,
        implementations=implementations(target_reference.next_token_target, ttt.next_token_target),
        flops=lambda c: per_token(2 * c.d**2, 4 * c.d**2, c),
        gemms=projection_gemms,
        contract=whole_projection(target_reference.next_token_target),
        parity=reference_parity,
    ),
    "conv_target": Operation(
        operands=conv_operands,
        implementations=implementations(target_reference.conv_target, ttt.conv_target),
        flops=lambda c: per_token(
            2 * c.d**2 + 2 * CONV_TAPS * c.d, 4 * c.d**2 + 4 * CONV_TAPS * c.d, c
        ),
        gemms=projection_gemms,
        contract=whole_projection(target_reference.conv_target),
        parity=reference_parity,
    ),
    "spectral_step_size": Operation(
        operands=step_operands(),
        implementations=implementations(
            step_size_reference.spectral, ttt.spectral_step_size, gradient_memory
        ),
        flops=gram_flops,
        gemms=gram_gemms,
        slack=GRAM_SLACK,
        parity=reference_parity,
    ),
    "clipped_step_size": Operation(
        operands=step_operands(max_norm=1.0),
        implementations=implementations(step_size_reference.clipped, ttt.clipped_step_size, gradient_memory),
        flops=gram_flops,
        gemms=gram_gemms,
        slack=GRAM_SLACK,
        parity=reference_parity,
    ),
}
