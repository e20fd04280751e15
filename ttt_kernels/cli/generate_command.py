"""`python -m ttt_kernels generate`: continue a prompt with fast weights, and say what it cost."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

import ttt_kernels as ttt
from ttt_kernels.cli import fast_weights, generate_report
from ttt_kernels.cli.arguments import finite_float, positive_int
from ttt_kernels.cli.bench_command import check_device
from ttt_kernels.cli.demo_command import full_environment
from ttt_kernels.cli.demo_model import Subject, load_subject
from ttt_kernels.cli.errors import UserError, require
from ttt_kernels.cli.generate_run import Generation, Sampling, run_ridge, run_streaming

EXTRA = "demo"
METHODS = ("scan", "ridge", "off")
RANDOM_CONTEXT = 8192  # of the model in place of one that cannot be had
RIDGE = {"lam": 1.0, "eta": 0.1, "cap": 0.1, "last_k": 8192}
# What the closed-form write reads of the fast-weight options; all else is about writing by chunks.
RIDGE_SHARES = ("layers", "preserve_row_norm", "horizon", "proj_init")
STATES = """\
A state is the memory of what was read, not the text: --save-state writes the fast weights (with the
open chunk) as they are once the whole prompt has been read, before anything is generated, and
--load-state starts a new prompt from them. The attention sees the new prompt only, and its positions
start at 0. The state must be of the same model and fast-weight options."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a prompt with fast weights",
        description="Read a prompt with a patched model and continue it: the text goes to standard "
        "output, progress and a table of tokens per second, state and writes to standard error. "
        "Without --model: SmolLM2-135M-Instruct (a 93 MB download, once).",
        epilog=STATES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("what reads what")
    data.add_argument("--model", metavar="DIR_OR_NAME", help="a Llama, Mistral or Qwen3 model")
    data.add_argument("--prompt-file", type=Path, metavar="FILE", help="UTF-8 text to read")
    data.add_argument("--prompt", metavar="TEXT", help="read after the file, or alone")
    data.add_argument("--prompt-tokens", metavar="N", type=positive_int, help="only the first N tokens")
    data.add_argument("--chat", action="store_true", help="as a user's message in the chat template")
    data.add_argument(
        "--cache", type=Path, default=fast_weights.DEFAULT_CACHE, metavar="DIR",
        help=f"where downloads are kept; default: {fast_weights.DEFAULT_CACHE}",
    )  # fmt: skip
    _add_decoding(parser.add_argument_group("decoding (greedy, unless --temperature or --top-p)"))
    group = parser.add_argument_group("fast weights")
    group.add_argument(
        "--method", choices=METHODS, default="scan",
        help="scan: write after every chunk, of the prompt and of what is generated; ridge: one "
        "closed-form write from the prompt; off: the plain model. Default: scan",
    )  # fmt: skip
    group.add_argument("--save-state", type=Path, metavar="F", help="after the prompt; scan only")
    group.add_argument("--load-state", type=Path, metavar="F", help="before the prompt; scan only")
    fast_weights.add_arguments(group)
    ridge = parser.add_argument_group("the closed-form write (--method ridge)")
    ridge.add_argument("--lam", type=finite_float, help="ridge; default: 1")
    ridge.add_argument("--eta", type=finite_float, help="step size; default: 0.1")
    ridge.add_argument("--cap", type=finite_float, help="relative size of the write at most; default: 0.1")
    ridge.add_argument("--last-k", metavar="N", type=positive_int, help="tokens used; default: 8192")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything reported, and the text")
    parser.set_defaults(run=run)


def _add_decoding(group) -> None:
    group.add_argument("--max-new-tokens", metavar="N", type=positive_int, default=64, help="default: 64")
    group.add_argument("--temperature", type=finite_float, metavar="X", help="sample; default: greedy")
    group.add_argument("--top-p", type=finite_float, metavar="X", help="sample from the nucleus")
    group.add_argument("--num-beams", metavar="N", type=positive_int, default=1, help="default: 1")
    group.add_argument("--seed", type=int, default=0, help="of the sampling (and a random model)")


def run(args: argparse.Namespace) -> int:
    log = require("rich.console", EXTRA).Console(stderr=True)
    check_method(args)
    sampling = make_sampling(args)
    text = prompt_text(args)
    check_folders(args)
    device = check_device(args.device)
    where = full_environment(device)
    marks: dict[str, str] = {}

    def warn(mark: str, why: str) -> None:
        marks[mark] = why
        log.print(f"{mark}: {why}", style="bold yellow", highlight=False)

    fast_weights.fill_defaults(args)
    log.print("loading the model", style="dim")
    subject = load_subject(args.model, args.cache, RANDOM_CONTEXT, args.seed, warn)
    ids = prompt_ids(subject, text, args).to(device)
    config = patch(args, subject)
    subject.model.to(device)
    torch.manual_seed(args.seed)
    generation = generate(args, subject, ids, sampling, log)
    continuation = decode(subject, generation.new_ids)
    print(continuation, flush=True)
    record = {
        "marks": marks,
        "environment": where,
        "model": {"name": subject.name, "random": subject.random},
        "method": args.method,
        "config": config,
        "decoding": {**asdict(sampling), "seed": args.seed},
        "text": continuation,
        **generation.as_record(),
    }
    generate_report.print_record(record, log)
    if args.json:
        generate_report.write_json(args.json, record)
    return 0


# --- what makes sense together --------------------------------------------------------------------
def check_method(args: argparse.Namespace) -> None:
    """An option that `--method` has no use for is an error, not ignored."""
    method = args.method
    useless = [] if method == "ridge" else fast_weights.given(args, tuple(RIDGE))
    if method != "scan":
        chunked = [n for n in fast_weights.DEFAULTS if method == "off" or n not in RIDGE_SHARES]
        useless += fast_weights.given(args, ("save_state", "load_state", *chunked))
    if useless:
        why = {
            "scan": "writes chunk by chunk",
            "ridge": "writes once, in closed form, for this prompt alone",
            "off": "has no fast weights",
        }
        raise UserError(f"--method {method} {why[method]}: it cannot take {', '.join(useless)}")


def make_sampling(args: argparse.Namespace) -> Sampling:
    if args.temperature is not None and args.temperature <= 0:
        raise UserError(
            f"--temperature must be > 0, got {args.temperature:g}; leave it out for greedy decoding"
        )
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p must be in (0, 1], got {args.top_p:g}")
    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.num_beams)


def check_folders(args: argparse.Namespace) -> None:
    """Before minutes of work, not after them."""
    for flag, file in (("--save-state", args.save_state), ("--json", args.json)):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{flag} {file}: the folder {file.parent} does not exist")
        if file is not None and file.is_dir():
            raise UserError(f"{flag} {file}: must be a file, got a folder")


# --- the prompt -----------------------------------------------------------------------------------
def prompt_text(args: argparse.Namespace) -> str:
    parts = []
    if args.prompt_file is not None:
        try:
            parts.append(args.prompt_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            file = args.prompt_file
            raise UserError(f"--prompt-file {file}: cannot be read as UTF-8 text: {error}") from error
    if args.prompt is not None:
        parts.append(args.prompt)
    if not parts:
        raise UserError("nothing to read: give --prompt-file FILE, --prompt TEXT or both")
    return "\n\n".join(parts)


def prompt_ids(subject: Subject, text: str, args: argparse.Namespace) -> torch.Tensor:
    """int64 [1, T], with the special tokens that the tokeniser puts around a text."""
    tokenizer = subject.tokenizer
    if args.chat:
        if getattr(tokenizer, "chat_template", None) is None:
            raise UserError(f"--chat: {subject.name} has no chat template")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
    plain = tokenizer is None or args.chat  # the template brings its own special tokens
    ids = subject.encode(text) if plain else tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise UserError("the prompt must have at least one token, got none")
    ids = ids[: args.prompt_tokens]
    new, context = args.max_new_tokens, subject.context
    if context is not None and len(ids) + new > context:
        raise UserError(
            f"the prompt and --max-new-tokens must fit the model's context of {context} tokens, got "
            f"{len(ids)} + {new}: --prompt-tokens N reads the first N tokens only"
        )
    return torch.tensor([ids])


def decode(subject: Subject, ids: list[int]) -> str:
    if subject.tokenizer is None:
        return bytes(ids).decode(errors="replace")
    return subject.tokenizer.decode(ids, skip_special_tokens=True)


# --- running --------------------------------------------------------------------------------------
def patch(args: argparse.Namespace, subject: Subject) -> dict[str, object]:
    """The model as `--method` needs it, and the options in force."""
    if args.method == "off":
        return {}
    if getattr(subject.model.config, "ttt_mode", None):
        raise UserError(
            f"--model {args.model}: its config says that it was trained with fast weights, and the "
            "command line starts from new projections: patch it from Python, with "
            "patch_model(model), and load its ttt_proj weights"
        )
    config = fast_weights.make_config(args, subject.layers)
    fast_weights.patch(subject.model, config)
    if args.method == "scan":
        return asdict(config)
    return {**{name: getattr(config, name) for name in RIDGE_SHARES}, **ridge_options(args)}


def ridge_options(args: argparse.Namespace) -> dict[str, object]:
    options = {name: getattr(args, name) for name in RIDGE}
    return {name: RIDGE[name] if value is None else value for name, value in options.items()}


def generate(args, subject: Subject, ids: torch.Tensor, sampling: Sampling, log) -> Generation:
    progress = require("rich.progress", EXTRA).Progress
    model = subject.model
    state = load_state(args.load_state, model) if args.load_state else None
    with progress(console=log, transient=True) as bars:

        def bar(title: str, steps: int):
            task = bars.add_task(title, total=steps)
            return lambda done: bars.update(task, completed=done)

        if args.method == "ridge":
            options = {**ridge_options(args), "preserve_row_norm": args.preserve_row_norm}
            return run_ridge(model, ids, sampling, bar, options)
        generation = run_streaming(model, ids, sampling, bar, state)
    if args.save_state:
        try:
            generation.after_prompt.save(args.save_state)
        except OSError as error:
            raise UserError(f"--save-state {args.save_state}: cannot be written: {error}") from error
    return generation


def load_state(file: Path, model: torch.nn.Module) -> ttt.FastWeightState:
    try:
        state = ttt.FastWeightState.load(file, model)
    except (OSError, ValueError) as error:
        raise UserError(f"--load-state {file}: {error}") from error
    if len(state) != 1:
        raise UserError(f"--load-state {file}: must hold the state of one request, got {len(state)}")
    return state
