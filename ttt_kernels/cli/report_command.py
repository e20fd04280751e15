"""`python -m ttt_kernels report`: tables and pictures of the benchmarks' document, from the JSON lines."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ttt_kernels.cli import report_pictures, report_predictions, report_tables, verify_tree
from ttt_kernels.cli.arguments import positive_int
from ttt_kernels.cli.documents import fill
from ttt_kernels.cli.errors import UserError, require
from ttt_kernels.cli.report_records import Entry, newest, read
from ttt_kernels.testing import cuda_launches
from ttt_kernels.testing.cuda_compiled import CudaReport

RESULTS, DOCUMENT, IMAGES = "benchmarks/results", "docs/benchmarks.md", "images"


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="write the tables and pictures of docs/benchmarks.md from the JSON lines",
        description="Read every JSON-lines file of the results, measurements by `bench` and predictions by "
        "`report --predict`, and write the tables between the marks of a document and its pictures. "
        "A prediction stands beside the measurement of the same row of the same GPU, with their ratio; of "
        "several measurements of a row the newest counts. The defaults are for the project's root.",
    )
    parser.add_argument("--results", type=Path, default=Path(RESULTS), metavar="DIR",
                        help=f"default: {RESULTS}")  # fmt: skip
    parser.add_argument("--document", type=Path, default=Path(DOCUMENT), metavar="FILE",
                        help=f"default: {DOCUMENT}")  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR",
                        help="default: images beside the document")  # fmt: skip
    parser.add_argument("--predict", action="store_true",
                        help="first compile the kernels and write the predictions anew; minutes")  # fmt: skip
    parser.add_argument("--processes", type=positive_int, default=2, metavar="N",
                        help="kernels compiled at a time; default: 2")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    console = require("rich.console", "bench").Console()
    require("matplotlib", "bench")
    if not args.document.is_file():
        raise UserError(f"--document must name an existing document, got {args.document}")
    images = args.images or args.document.parent / IMAGES
    if not verify_tree.writable(images):
        raise UserError(f"--images must be a folder that can be written into, got {images}")
    if args.predict:
        kernels, missing_kernels = cuda_kernels()
        for path in predictions(args.results, args.processes, kernels):
            console.print(f"wrote {path}", highlight=False)
        if missing_kernels:
            console.print(f"cuda is not predicted: {missing_kernels}", style="yellow", highlight=False)
    entries = newest(read(args.results))
    text = args.document.read_text(encoding="utf-8")
    link = os.path.relpath(images, args.document.parent)
    args.document.write_text(filled(text, entries, str(args.document), link), encoding="utf-8")
    console.print(f"wrote {args.document}", highlight=False)
    for picture in report_pictures.PICTURES:
        panels = picture.panels(entries)
        if panels:
            report_pictures.draw(images / picture.file, picture, panels)
            console.print(f"wrote {images / picture.file}", highlight=False)
        else:
            (images / picture.file).unlink(missing_ok=True)
            console.print(missing(picture), style="yellow", highlight=False)
    return 0


def cuda_kernels() -> tuple[dict[int, list[CudaReport]], str | None]:
    """Those of the installed library by architecture, and what is missing."""
    try:
        found = cuda_launches.read_kernels()
    except RuntimeError as error:
        return {}, str(error)
    lacking = [image for architecture, image in cuda_launches.IMAGES.items() if architecture not in found]
    return found, f"the library has no image {', '.join(lacking)}" if lacking else None


def predictions(results: Path, processes: int, kernels: dict[int, list[CudaReport]]) -> list[Path]:
    if find_spec("triton") is None:
        raise UserError("--predict compiles with triton, which is not installed: "
                        "pip install 'ttt_kernels[triton]'")  # fmt: skip
    try:
        return report_predictions.write(results, processes, kernels)
    except RuntimeError as error:
        raise UserError(str(error)) from None


def filled(text: str, entries: Sequence[Entry], what: str, images: str = IMAGES) -> str:
    """A document with its marked parts written anew; `images` is the pictures' folder, seen from it."""
    parts = {
        "pictures": pictures(entries, images),
        "measured": report_tables.measured(entries),
        "predicted": report_tables.predicted(entries),
        "machines": report_tables.machines(),
    }
    for name, new in parts.items():
        text = fill(text, f"<!-- report: {name} -->", f"<!-- report: end of {name} -->", what, new)
    return text


def pictures(entries: Sequence[Entry], folder: str) -> str:
    lines = []
    for picture in report_pictures.PICTURES:
        shown = f"![{picture.title}]({folder}/{picture.file})"
        lines += [shown if picture.panels(entries) else missing(picture), ""]
    return "\n".join(lines).rstrip()


def missing(picture: report_pictures.Picture) -> str:
    return f"{picture.title}: no picture yet, it needs {picture.needs}."
