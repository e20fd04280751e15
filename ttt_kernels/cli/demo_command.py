"""`python -m ttt_kernels demo`: fast weights in a pretrained model on a real text."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import ttt_kernels as ttt
from ttt_kernels.cli import demo_picture, demo_report, fast_weights
from ttt_kernels.cli.arguments import positive_int
from ttt_kernels.cli.bench_command import check_device
from ttt_kernels.cli.demo_model import Subject, Text, cut_windows, load_subject, load_text
from ttt_kernels.cli.demo_report import DemoResult
from ttt_kernels.cli.demo_run import COMPARED, Observer, compare_scan, read
from ttt_kernels.cli.errors import UserError, require
from ttt_kernels.cli.measure import busy_warning, environment
from ttt_kernels.patch.model import PatchReport, patch_report

SHIPPED = Path(__file__).parent / "projections" / "smollm2-135m-instruct.safetensors"
TIMED_ROUNDS = 5


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="patch a pretrained model and read a real text",
        description="Patch a model, read a text in windows with fast weights off and on, and "
        "report parity, cost, loss by position and drift as tables, demo.json and demo.png. "
        "Without --model and --text: SmolLM2-135M-Instruct (a 93 MB download, once) with trained "
        "projections reads Hamlet.",
    )
    data = parser.add_argument_group("what reads what")
    data.add_argument("--model", metavar="DIR_OR_NAME", help="a Llama, Mistral or Qwen3 model")
    data.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text")
    data.add_argument("--window", metavar="T", type=positive_int, default=2048, help="tokens; default: 2048")
    data.add_argument("--windows", metavar="N", type=positive_int, default=8, help="at most; default: 8")
    data.add_argument(
        "--cache", type=Path, default=fast_weights.DEFAULT_CACHE, metavar="DIR",
        help=f"where downloads are kept; default: {fast_weights.DEFAULT_CACHE}",
    )  # fmt: skip
    group = parser.add_argument_group("fast weights")
    group.add_argument(
        "--projections", metavar="FILE",
        help="trained projections, with the settings they were trained with (`save_projections`); none: "
        "untrained ones. Default: the shipped ones, where the default model reads and no option below "
        "is given",
    )  # fmt: skip
    fast_weights.add_arguments(group)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the random gradient (and model)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/demo"), metavar="DIR",
        help="for demo.json and demo.png; default: outputs/demo",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    console_type = require("rich.console", "demo").Console
    require("matplotlib", "demo")
    console, log = console_type(), console_type(stderr=True)
    projections = choose_projections(args)
    fast_weights.fill_defaults(args)
    if projections is None:
        check_window(args.window, args.chunk_size)
    device = check_device(args.device)
    where = full_environment(device)
    if warning := busy_warning(where):
        log.print(warning, style="yellow", highlight=False)
    marks: dict[str, str] = {}

    def warn(mark: str, why: str) -> None:
        marks[mark] = why
        log.print(f"{mark}: {why}", style="bold yellow", highlight=False)

    log.print("loading the model and the text", style="dim")
    subject = load_subject(args.model, args.cache, args.window, args.seed, warn)
    text = load_text(args.text, args.cache, warn)
    if subject.random and args.projections is None:
        projections = None
    adaptation = Adaptation(fast_weights.make_config(args, subject.layers), projections)
    result = measure(args, subject, text, adaptation, marks, where, log)
    args.output.mkdir(parents=True, exist_ok=True)
    demo_report.write_json(args.output / "demo.json", result)
    demo_picture.draw(args.output / "demo.png", result)
    demo_report.print_result(result, console)
    console.print(f"Written to {args.output}: demo.json, demo.png", highlight=False)
    return 0 if result.scan.worst <= 1 else 1


@dataclass(frozen=True)
class Adaptation:
    """How the model gets fast weights: with `config`, or as the file `projections` says."""

    config: ttt.TTTConfig
    projections: Path | None

    def apply(self, model: torch.nn.Module) -> tuple[PatchReport, dict[str, str] | None]:
        """What was done, and the metadata of the projections, None where they are untrained."""
        if self.projections is None:
            return fast_weights.patch(model, self.config), None
        try:
            about = ttt.load_projections(model, self.projections)
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            raise UserError(f"--projections {self.projections}: {error}") from error
        return patch_report(model), about


def choose_projections(args: argparse.Namespace) -> Path | None:
    """A file, or None for untrained projections; from the options as they were given."""
    given = fast_weights.given(args)
    if args.projections is None:
        return None if given or args.model else SHIPPED
    if args.projections == "none":
        return None
    if given:
        raise UserError(f"--projections brings its own settings: leave out {', '.join(given)}")
    return Path(args.projections)


def full_environment(device: torch.device) -> dict[str, object]:
    transformers = require("transformers", "demo").__version__
    return {**environment(device), "ttt_kernels": ttt.__version__, "transformers": transformers}


def check_window(window: int, chunk_size: int) -> None:
    if chunk_size > window:
        raise UserError(
            f"--chunk-size must be at most --window ({window}), got {chunk_size}: "
            "only a complete chunk is written"
        )
    if window < 2:
        raise UserError("--window must be at least 2: a loss needs a next token")


def measure(
    args, subject: Subject, text: Text, adaptation: Adaptation, marks: dict, where: dict, log
) -> DemoResult:
    """Off, patch, on, compare; with a progress bar."""
    progress_type = require("rich.progress", "demo").Progress
    device = torch.device(args.device)
    windows = cut_windows(subject, text, args.window, args.windows).to(device)
    model = subject.model.to(device)
    with progress_type(console=log) as progress:

        def bar(title: str, steps: int):
            task = progress.add_task(title, total=steps)
            return lambda: progress.advance(task)

        off = read(model, windows, bar("fast weights off", len(windows)))
        report, about = adaptation.apply(model)
        config = report.config
        check_window(args.window, config.chunk_size)
        with Observer(model) as observer:
            on = read(model, windows, bar("fast weights on", len(windows)), observer.trace)
        middle = config.layers[len(config.layers) // 2]
        steps = len(COMPARED) * (1 + 2 * TIMED_ROUNDS)
        tick = bar("eager against reference", steps)
        scan = compare_scan(observer.captured[middle], TIMED_ROUNDS, args.seed, tick)
    log.print(str(report), style="dim", highlight=False)
    return DemoResult(
        marks=marks,
        model={
            "name": subject.name, "random": subject.random, "family": report.family,
            "layers": report.num_layers, "hidden_size": report.hidden_size,
            "intermediate_size": report.intermediate_size,
            "parameters_added": report.parameters_added,
        },
        text={
            "name": text.name, "fallback": text.fallback, "windows": len(windows),
            "window": args.window,
        },
        config={**asdict(config), "seed": args.seed},
        projections=about,
        environment=where,
        off=off, on=on, traces=observer.traces, scan=scan,
    )  # fmt: skip
