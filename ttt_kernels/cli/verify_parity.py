"""Error of every implementation over its budget on small shapes: a stage of `verify`.

One line a case, as pytest prints one a test, and the ratios as JSON lines. With `--once` the operation
only runs, forward and backward: something small for compute-sanitizer to watch.
"""

from __future__ import annotations

import argparse
import json
import math
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ttt_kernels._config import IMPLEMENTATIONS
from ttt_kernels.cli.bench_case import DTYPES, Case, Operation, run_once
from ttt_kernels.cli.bench_registry import OPERATIONS

DEFAULT_DTYPES = ("float32", "bfloat16", "float16")
DECODE = "fast_weight_apply"


def cases(name: str, op: Operation, dtype: str, device: str) -> Iterator[Case]:
    """Several chunks and a ragged tail; chunks of a super-chunk's length and shorter ones; sizes that a
    tile divides and, on a CPU, sizes that none does."""
    d, f, tokens, chunks = (256, 768, 650, (256, 64)) if device == "cuda" else (48, 80, 130, (48, 16))
    for length in (tokens, 1) if name == DECODE else (tokens,):
        for chunk in chunks:
            for preserve in (False, True) if op.row_norm else (False,):
                yield Case(
                    name, "small", d, f, tokens=length, chunk_size=chunk, mode=op.modes[-1], dtype=dtype,
                    preserve_row_norm=preserve, device=device,
                )  # fmt: skip


def implementations(op: Operation, chosen: Sequence[str] | None) -> list[str]:
    """Those of the package; a benchmark also times others."""
    names = [name for name in op.implementations if name.partition("-")[0] in IMPLEMENTATIONS]
    return [name for name in names if not chosen or name.partition("-")[0] in chosen]


def why_not(case: Case, op: Operation, impl: str) -> str | None:
    """On a CPU the operation itself says so: Triton's interpreter, of no use to a benchmark, is welcome."""
    if case.device == "cpu" and "-" not in impl:
        return None
    return op.implementations[impl].why_not(case)


def attempt(case: Case, op: Operation, impl: str, once: bool) -> tuple[str, str, float | None]:
    """Outcome, what to say of it, and the ratio where there is one; infinity where it raised."""
    if reason := why_not(case, op, impl):
        return "SKIPPED", f"({reason})", None
    work = op.of(impl)
    try:
        if once:
            run_once(op.implementations[impl].call, work.operands(case, case.inputs(seed=1)), case.mode)
            if case.device == "cuda":
                torch.cuda.synchronize()
            return "PASSED", "", None
        ratio = work.parity(case, work, impl)
    except NotImplementedError as error:
        return "SKIPPED", f"({error})", None
    except Exception:
        traceback.print_exc()
        return "FAILED", "it raised", math.inf
    return "PASSED" if ratio <= 1 else "FAILED", f"{ratio:.2f} of its error budget", ratio


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ttt_kernels.cli.verify_parity", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=tuple(OPERATIONS), default=tuple(OPERATIONS))
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS[1:])
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=DEFAULT_DTYPES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--once", action="store_true")
    return parser.parse_args(arguments)


def label(case: Case, impl: str) -> str:
    norm = "-row_norm" if case.preserve_row_norm else ""
    return f"{case.op}::{impl}::{case.dtype}-T{case.tokens}-C{case.chunk_size}{norm}"


def record(case: Case, impl: str, ratio: float) -> dict[str, object]:
    return {
        "kind": "parity", "op": case.op, "impl": impl, "dtype": case.dtype, "device": case.device,
        "tokens": case.tokens, "chunk_size": case.chunk_size,
        "preserve_row_norm": case.preserve_row_norm, "error_ratio": ratio,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    outcomes = set()
    chosen = ((name, impl) for name in args.op for impl in implementations(OPERATIONS[name], args.impl))
    for name, impl in chosen:
        op = OPERATIONS[name]
        for case in (case for dtype in args.dtype for case in cases(name, op, dtype, args.device)):
            print(label(case, impl), flush=True)  # where it is, should it not come back
            outcome, text, ratio = attempt(case, op, impl, args.once)
            outcomes.add(outcome)
            print(label(case, impl), outcome, text, flush=True)
            if args.output and ratio is not None:
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record(case, impl, ratio)) + "\n")
    return int("FAILED" in outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
