"""What can be benchmarked: one row an operation. A new one is a row.

| use | rows |
|---|---|
| training | scan and the targets, "fwd" and "fwd+bwd" |
| prefill | scan, "prefill": no gradients, and the state comes back |
| decode | fast_weight_apply (T = tokens of a call) and fast_weight_update_ (one chunk) |
| ridge | ridge_write |
| step size | spectral_step_size and clipped_step_size |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ttt_kernels as ttt
from ttt_kernels._config import chosen_implementation
from ttt_kernels.cli import bench_formulas as formulas
from ttt_kernels.cli.bench_baselines import FLOORED, REFERENCE, implementations, why_not_named
from ttt_kernels.cli.bench_case import DTYPES, PREFILL, Case, Implementation, Operands, Operation
from ttt_kernels.cli.bench_formulas import CONV_TAPS
from ttt_kernels.cli.bench_parity import reference_parity, scan_parity
from ttt_kernels.ops.ridge import reference as ridge_reference
from ttt_kernels.ops.scan import reference as scan_reference
from ttt_kernels.ops.scan.heuristics import fused_super_chunk, use_plan
from ttt_kernels.ops.step import reference as step_reference
from ttt_kernels.ops.step_size import reference as step_size_reference
from ttt_kernels.ops.target import reference as target_reference
from ttt_kernels.testing import ScanInputs
from ttt_kernels.testing.contract import RoundTo
from ttt_kernels.types import compute_dtype

GRAM_SLACK = 4.0


def by_choice(op: Callable[..., Tensor]) -> Callable[[str], Callable[..., Tensor]]:
    """`by_choice(op)(impl)`: an operation without an `impl` argument, run by one."""

    def with_impl(impl: str) -> Callable[..., Tensor]:
        def call(*args, **options):
            with chosen_implementation(impl):
                return op(*args, **options)

        return call

    return with_impl


# --- scan -----------------------------------------------------------------------------------------
def scan_with(impl: str) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """y, or (y, state) where the caller asks for it with `return_state=True`."""

    def call(z, v, w0, **options):
        y, state = ttt.fast_weight_scan(z, v, w0, impl=impl, **options)
        return y if state is None else (y, state)

    return call


def released_scan(z, v, w0, *, step_size, return_state=False, **options):
    y, state = scan_reference.scan(z, v, w0, step_size, None, None, **options)
    return (y, state) if return_state else y


def split_scan(*leaves, **options):
    with use_plan("split"):
        return scan_with("triton")(*leaves, **options)


def no_split(case: Case) -> str | None:
    length = fused_super_chunk(case.chunk_size, case.d, case.f)
    if case.preserve_row_norm or length > case.chunk_size:
        return "the split plan is for long chunks without row norms"
    return why_not_named("triton", case)


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
    copies = (5 if case.mode == "fwd+bwd" else 3) + (2 if case.preserve_row_norm else 0)
    itemsize = compute_dtype(DTYPES[case.dtype]).itemsize
    return copies * case.batch * case.chunks * case.d * case.f * itemsize


# --- targets and step sizes -----------------------------------------------------------------------
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


def gradient_memory(case: Case) -> int:
    """The chunk gradient G [D, F] in the compute precision; autograd keeps every chunk's."""
    itemsize = compute_dtype(DTYPES[case.dtype]).itemsize
    copies = 3 * case.chunks if case.mode == "fwd+bwd" else 1
    return copies * case.batch * case.d * case.f * itemsize


# --- decode ---------------------------------------------------------------------------------------
def pool(case: Case, data: ScanInputs) -> Tensor:
    """A float32 weight per row."""
    return data.w0.to(compute_dtype(data.w0.dtype)).repeat(case.batch, 1, 1)


def apply_operands(case: Case, data: ScanInputs) -> Operands:
    return Operands((data.z, pool(case, data)), {}, data.dy)


def apply_with(impl: str) -> Callable[..., Tensor]:
    return lambda z, weight: ttt.fast_weight_apply(z, weight, impl=impl)


def released_apply(z: Tensor, weight: Tensor) -> Tensor:
    return step_reference.apply(z, weight, None, None)


def rounded_apply(z: Tensor, weight: Tensor) -> Tensor:
    return (z.to(weight.dtype) @ RoundTo.apply(weight, z.dtype).mT).to(z.dtype)


def update_operands(case: Case, data: ScanInputs) -> Operands:
    """One chunk."""
    chunk = slice(0, formulas.written(case))
    leaves = (pool(case, data), data.z[:, chunk], data.v[:, chunk])
    return Operands(leaves, {"step_size": 0.3}, data.dy)


def update_with(impl: str) -> Callable[..., Tensor]:
    def call(weight, z, v, **options):
        ttt.fast_weight_update_(weight, z, v, impl=impl, **options)
        return weight

    return call


def released_update(weight: Tensor, z: Tensor, v: Tensor, *, step_size: float) -> Tensor:
    step_reference.update_(weight, z, v, step_size, None)
    return weight


# --- closed-form write ----------------------------------------------------------------------------
def ridge_operands(case: Case, data: ScanInputs) -> Operands:
    return Operands((data.z, data.x, data.w0, data.proj), {}, data.dy)


def ridge_known_operands(case: Case, data: ScanInputs) -> Operands:
    """With the outputs that the forward before the write has computed."""
    z, x, w0, proj = ridge_operands(case, data).leaves
    acc = compute_dtype(z.dtype)
    return Operands((z, x, z.to(acc) @ w0.to(acc).mT, w0, proj), {}, data.dy)


def released_ridge(z: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
    """It computes the outputs, also where they come between x and the weights."""
    *_, w0, proj = weights
    return torch.stack(
        [ridge_reference.ridge_write(a, b, w0, proj)[1] for a, b in zip(z, x, strict=True)]
    )


def ridge_delta(*leaves: Tensor) -> Tensor:
    return ttt.ridge_write(*leaves).delta


def ridge_known_delta(*leaves: Tensor) -> Tensor:
    return ttt.ridge_write_from_outputs(*leaves).delta


def ridge_gemms(case: Case) -> formulas.Products:
    return (case.tokens, case.f, case.d), (case.d, case.tokens, case.f)


RIDGE_KNOWN = Operation(
    operands=ridge_known_operands,
    implementations={
        REFERENCE: Implementation(released_ridge),
        "eager-outputs": Implementation(ridge_known_delta),
    },
    flops=formulas.ridge_known_flops,
    traffic=formulas.ridge_known_bytes,
    gemms=ridge_gemms,
    slack=GRAM_SLACK,
    modes=("fwd",),
    parity=reference_parity,
    use="ridge",
)

OPERATIONS: dict[str, Operation] = {
    "scan": Operation(
        operands=scan_operands,
        implementations={
            **implementations(released_scan, scan_with, scan_reference_memory),
            "triton-split": Implementation(split_scan, why_not=no_split),
            **FLOORED,
        },
        flops=formulas.scan_flops,
        traffic=formulas.scan_bytes,
        gemms=formulas.scan_gemms,
        parity=scan_parity,
        row_norm=True,
        modes=("fwd", PREFILL, "fwd+bwd"),
    ),
    "fast_weight_apply": Operation(
        operands=apply_operands,
        implementations={**implementations(released_apply, apply_with), **FLOORED},
        flops=formulas.apply_flops,
        traffic=formulas.apply_bytes,
        gemms=formulas.plain_gemms,
        contract=rounded_apply,
        parity=reference_parity,
        bound="copy",
        use="decode",
    ),
    "fast_weight_update_": Operation(
        operands=update_operands,
        implementations=implementations(released_update, update_with),
        flops=formulas.update_flops,
        traffic=formulas.update_bytes,
        gemms=formulas.update_gemms,
        modes=("fwd",),
        parity=reference_parity,
        bound="copy",
        use="decode",
    ),
    "ridge_write": Operation(
        operands=ridge_operands,
        implementations={
            **implementations(released_ridge, lambda impl: ridge_delta, kernels=("eager",)),
            "eager-outputs": Implementation(ridge_known_delta, instead=RIDGE_KNOWN),
        },
        flops=formulas.ridge_flops,
        traffic=formulas.ridge_bytes,
        gemms=ridge_gemms,
        slack=GRAM_SLACK,
        modes=("fwd",),
        parity=reference_parity,
        use="ridge",
    ),
    "next_token_target": Operation(
        operands=next_token_operands,
        implementations=implementations(target_reference.next_token_target, by_choice(ttt.next_token_target)),
        flops=formulas.next_token_flops,
        traffic=formulas.next_token_bytes,
        gemms=formulas.projection_gemms,
        contract=whole_projection(target_reference.next_token_target),
        parity=reference_parity,
    ),
    "conv_target": Operation(
        operands=conv_operands,
        implementations=implementations(target_reference.conv_target, by_choice(ttt.conv_target)),
        flops=formulas.conv_flops,
        traffic=formulas.conv_bytes,
        gemms=formulas.projection_gemms,
        contract=whole_projection(target_reference.conv_target),
        parity=reference_parity,
    ),
    "spectral_step_size": Operation(
        operands=step_operands(),
        implementations=implementations(
            step_size_reference.spectral, by_choice(ttt.spectral_step_size), gradient_memory
        ),
        flops=formulas.gram_flops,
        traffic=formulas.gram_bytes,
        gemms=formulas.gram_gemms,
        slack=GRAM_SLACK,
        parity=reference_parity,
        use="step size",
    ),
    "clipped_step_size": Operation(
        operands=step_operands(max_norm=1.0),
        implementations=implementations(
            step_size_reference.clipped, by_choice(ttt.clipped_step_size), gradient_memory
        ),
        flops=formulas.gram_flops,
        traffic=formulas.gram_bytes,
        gemms=formulas.gram_gemms,
        slack=GRAM_SLACK,
        parity=reference_parity,
        use="step size",
    ),
}
