"""`python -m ttt_kernels kernels`: the Triton kernels compiled for GPUs that are not there, and predicted."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from ttt_kernels.cli import kernels_report
from ttt_kernels.cli.arguments import positive_int
from ttt_kernels.cli.bench_case import SHAPES
from ttt_kernels.cli.errors import UserError, require
from ttt_kernels.testing.kernel_report import complaints
from ttt_kernels.testing.kernel_survey import Case, survey

ARCHITECTURES = (80, 90, 100)
CHUNK_SIZES = (1024, 64)
# As in the recipes (`TTTConfig.recipe`): models whose row norms are kept.
PRESERVING = ("llama-3.1-8b", "mistral-7b", "qwen3-0.6b")
SCANS = ("scan fwd", "scan fwd+bwd")
STEP_SIZES = ("step size fwd", "step size bwd", "clipped step size fwd", "clipped step size bwd")
TARGETS = ("next-token target fwd", "next-token target bwd", "conv target fwd", "conv target bwd")
DECODE = ("decode apply", "decode apply bwd")
DECODE_SIZES = ((1, 1), (1, 16), (64, 1))  # tokens of a request, requests


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "kernels",
        help="compile the Triton kernels without a GPU, and predict their times",
        description="Compile every Triton kernel that a layer of the chosen models launches, for each "
        "architecture, and read the machine code: registers, spills, shared memory, tensor-core "
        "instructions, width of loads, occupancy. From these and a roofline the time of each operation is "
        "predicted. No GPU is needed and nothing is measured. docs/kernels.md explains the columns.",
    )
    parser.add_argument("--architectures", nargs="+", type=int, choices=ARCHITECTURES, metavar="SM",
                        default=ARCHITECTURES, help="of 80, 90, 100; default: all")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), metavar="NAME", default=tuple(SHAPES),
                        help=f"of {', '.join(SHAPES)}; default: all")  # fmt: skip
    parser.add_argument("--processes", type=positive_int, default=2, metavar="N",
                        help="kernels compiled at a time; default: 2")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE",
                        help="write the tables between the markers of this document")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    console = require("rich.console", "bench").Console()
    if find_spec("triton") is None:
        raise UserError("triton is needed here and not installed: pip install 'ttt_kernels[triton]'")
    if args.markdown:
        kernels_report.check_markers(args.markdown)
    try:
        compiled = survey(cases(args.shapes), sorted(args.architectures), args.processes)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    kernels_report.print_tables(console, compiled)
    if args.json:
        kernels_report.write_json(args.json, compiled)
    if args.markdown:
        kernels_report.write_markdown(args.markdown, compiled)
    found = [text for report in kernels_report.kernel_users(compiled) for text in complaints(report)]
    for text in found:
        console.print(text, style="yellow", highlight=False)
    return 1 if found else 0


def cases(shapes: list[str]) -> list[Case]:
    """What the tables show: training and prefill at T = 32768, decode, for each model."""
    return [case for shape in shapes for case in model_cases(shape)]


def model_cases(shape: str) -> list[Case]:
    d, f = SHAPES[shape]
    layer = dict(shape=shape, d=d, f=f, preserve_row_norm=shape in PRESERVING)
    split = () if shape in PRESERVING else (Case("scan fwd, split plan", **layer),)
    return [
        *split,
        *(Case(op, chunk_size=c, **layer) for c in CHUNK_SIZES for op in (*SCANS, *STEP_SIZES)),
        *(Case(op, **layer) for op in TARGETS),
        *(Case(op, tokens=tokens, batch=batch, **layer) for op in DECODE for tokens, batch in DECODE_SIZES),
        Case("decode update", tokens=1, **layer),
    ]
