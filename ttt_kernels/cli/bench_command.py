"""Arguments of `python -m ttt_kernels bench`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from ttt_kernels.cli import (
    bench_base,
    bench_compare,
    bench_models,
    bench_models_suite,
    bench_report,
    verify_tree,
)
from ttt_kernels.cli.arguments import flags, positive_int
from ttt_kernels.cli.bench import measure_cases
from ttt_kernels.cli.bench_case import ALL_MODES, DTYPES, MODES, SHAPES, Case
from ttt_kernels.cli.bench_lines import JsonLines
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.bench_suites import SUITES, SWEEPS, Suite
from ttt_kernels.cli.errors import UserError, require
from ttt_kernels.cli.measure import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    ROUNDS_SECONDS,
    busy_warning,
    environment,
)

FIXED_REPEATS = 5  # of what does not choose for itself
GRID_DEFAULTS = {
    "op": ["scan"],
    "shape": ["qwen3-0.6b"],
    "tokens": [2048],
    "chunk_size": [64, 256, 1024],
    "dtype": ["float32"],
    "mode": list(MODES),
    "batch": 1,
    "preserve_row_norm": False,
}
MODEL_SUITES = {"streaming": bench_models.run, bench_models_suite.SUITE: bench_models_suite.run}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time the operations against the reference",
        description="Time every implementation of an operation in one interleaved run, with the "
        "machine's GEMM and copy rates, extra peak memory and the error over the precision contract's budget "
        "beside each time. docs/benchmarks.md explains the columns.",
    )
    impls = sorted({name for op in OPERATIONS.values() for name in op.implementations})
    grid = parser.add_argument_group("the grid (every combination is measured)")
    for flag, names, default in (
        ("--op", OPERATIONS, "scan"),
        ("--shape", SHAPES, "qwen3-0.6b"),
        ("--dtype", DTYPES, "float32"),
        ("--mode", ALL_MODES, " ".join(MODES)),
    ):
        grid.add_argument(flag, **several(names, default))
    grid.add_argument("--T", dest="tokens", metavar="T", nargs="+", type=positive_int,
                      help="tokens; default: 2048")  # fmt: skip
    grid.add_argument("--chunk-size", metavar="C", nargs="+", type=positive_int,
                      help="default: 64 256 1024")  # fmt: skip
    grid.add_argument("--batch", metavar="B", type=positive_int, help="default: 1")
    grid.add_argument("--preserve-row-norm", action="store_const", const=True, help="for the scan")
    parser.add_argument(
        "--suite", choices=(*SUITES, *MODEL_SUITES),
        help="instead of the grid. cpu: everything at sizes for a CPU; sweep: the scan against T, C, B and "
        "D x F (also with --device cuda); foundation, triton (a GPU): with targets; models (also with "
        "--device cuda) and streaming: whole models, patched against plain",
    )  # fmt: skip
    parser.add_argument(
        "--base", metavar="REF",
        help="compare with another commit (its package, not its compiled extension), or with a folder "
        "that holds a tree, side by side in two processes",
    )  # fmt: skip
    parser.add_argument("--impl", **several(impls, "all there are"))
    parser.add_argument("--repeats", metavar="N", type=positive_int,
                        help=f"rounds; default: what {ROUNDS_SECONDS:g} seconds hold, {MIN_ROUNDS} to "
                        f"{MAX_ROUNDS}; {FIXED_REPEATS} of a model")  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda; default: cpu, or what the suite is for")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON lines")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture: time against C")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar="FILE",
        help="measure nothing: how far the ratios of two files of JSON lines are apart",
    )  # fmt: skip
    parser.set_defaults(run=run)


def several(names: Iterable[str], default: str) -> dict[str, object]:
    """Options of an argument that takes some of `names`."""
    return {
        "nargs": "+",
        "choices": tuple(names),
        "metavar": "NAME",
        "help": f"of {', '.join(names)}; default: {default}",
    }


def run(args: argparse.Namespace) -> int:
    if args.compare:
        return bench_compare.run(args)
    console = require("rich.console", "bench").Console(stderr=True)
    check_files(args)
    suite = make_suite(args)
    args.device = args.device or "cpu"
    device = check_device(args.device)
    where = environment(device)
    if warning := busy_warning(where):
        console.print(warning, style="yellow", highlight=False)
    if args.suite in MODEL_SUITES:
        args.repeats = args.repeats or FIXED_REPEATS
        return MODEL_SUITES[args.suite](args, where, console)
    cases = grid(args) if suite is None else list(suite.cases)
    if args.base:
        return bench_base.run(args, cases, where, console)
    impls = args.impl or (None if suite is None else suite.impls)
    where = where if suite is None else {**where, "suite": args.suite}
    with JsonLines(args.output, where) as lines:
        results = measure_cases(
            cases, impls, args.repeats, say=lambda text: console.print(text, style="dim"), keep=lines.add
        )
        targets = [] if suite is None else [t.judge(results) for t in suite.targets]
        lines.add(targets)
    bench_report.print_results(results, where, targets)
    if args.plot and results.rows:
        bench_report.plot(args.plot, results, where)
    if not results.rows and not results.refused:
        raise UserError("nothing was measured: every combination was skipped, for the reasons above")
    return 1 if results.refused else 0


def check_files(args: argparse.Namespace) -> None:
    """Before anything is measured: minutes of work are not lost to a mistyped folder."""
    for name, path in (("output", args.output), ("plot", args.plot)):
        if path is None:
            continue
        if (path.exists() and not path.is_file()) or not verify_tree.writable(path.parent):
            raise UserError(f"--{name} must be a file in a folder that can be written into, got {path}")
    if args.plot:
        known = require("matplotlib.backend_bases", "bench").FigureCanvasBase.get_supported_filetypes()
        if args.plot.suffix[1:].lower() not in known:
            raise UserError(f"--plot must end in one of {', '.join(sorted(known))}, got {args.plot}")


def make_suite(args: argparse.Namespace) -> Suite | None:
    """The suite of cases that was asked for, if one was; args.device becomes the one it is for."""
    if args.suite == "sweep" and args.device in SWEEPS:
        suite = SUITES["sweep"](args.device)
    else:
        suite = SUITES[args.suite]() if args.suite in SUITES else None
    if args.suite:
        anywhere = args.suite == bench_models_suite.SUITE
        default = (args.device if anywhere else None) or "cpu"
        check_suite(args, default if suite is None else suite.device)
    return suite


def check_device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no usable GPU here")
    return torch.device(name)


def grid(args: argparse.Namespace) -> list[Case]:
    given = {k: getattr(args, k) for k in GRID_DEFAULTS}
    g = {k: GRID_DEFAULTS[k] if value is None else value for k, value in given.items()}
    for op in g["op"]:
        if g["preserve_row_norm"] and not OPERATIONS[op].row_norm:
            raise UserError(f"--preserve-row-norm is for --op scan, got --op {op} too")
    return [
        Case(
            op, shape, *SHAPES[shape], tokens=tokens, chunk_size=chunk_size, mode=mode, dtype=dtype,
            batch=g["batch"], preserve_row_norm=g["preserve_row_norm"], device=args.device,
        )
        for op in g["op"]
        for shape in g["shape"]
        for tokens in g["tokens"]
        for dtype in g["dtype"]
        for chunk_size in g["chunk_size"]
        for mode in g["mode"]
    ]  # fmt: skip


def check_suite(args: argparse.Namespace, device: str) -> None:
    """A suite fixes the grid and the device."""
    given = [k for k in GRID_DEFAULTS if getattr(args, k) is not None]
    if args.suite in MODEL_SUITES:
        given += [k for k in ("impl", "plot", "base") if getattr(args, k) is not None]
    if given:
        raise UserError(f"--suite {args.suite} fixes the grid: it cannot be combined with {flags(given)}")
    if args.device not in (None, device):
        raise UserError(f"--suite {args.suite} is defined for --device {device}, got {args.device}")
    args.device = device
