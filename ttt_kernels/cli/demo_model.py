"""What the demo reads with and what it reads: a model, a way to tokenise, and a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ttt_kernels.cli import demo_data
from ttt_kernels.cli.errors import UserError, require

EXTRA = "demo"
RANDOM_MARK = "RANDOM MODEL"
FALLBACK_MARK = "FALLBACK TEXT"
RANDOM_SIZE = {  # small enough for seconds on a CPU; one token is one byte
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Subject:
    """A causal language model and its tokeniser; None where one token is one byte."""

    name: str
    model: nn.Module
    encode: Callable[[str], list[int]]
    random: bool = False
    tokenizer: object | None = None

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def context(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)


@dataclass(frozen=True)
class Text:
    name: str
    content: str
    fallback: bool = False


def load_subject(
    source: str | None, cache: Path, window: int, seed: int, warn: Callable[[str, str], None]
) -> Subject:
    """The model of `--model`, else the default one, else a random one, and a word about it."""
    transformers = require("transformers", EXTRA)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if source is not None:
        return pretrained(source, source)
    for package in ("gguf", "accelerate"):  # what transformers needs to read the default model
        require(package, EXTRA)
    try:
        file = demo_data.fetch(demo_data.MODEL, cache)
    except demo_data.Unavailable as error:
        warn(RANDOM_MARK, f"the pretrained model cannot be had ({error})")
        return random_subject(window, seed)
    return pretrained(str(file.parent), demo_data.MODEL.title)


def pretrained(source: str, name: str) -> Subject:
    """A folder or hub name; in a folder without config.json, its only .gguf file."""
    transformers = require("transformers", EXTRA)
    options = gguf_options(Path(source))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model {source}: transformers cannot load it: {error}") from error

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return Subject(name, model.eval(), encode, tokenizer=tokenizer)


def gguf_options(folder: Path) -> dict[str, str]:
    if not folder.is_dir() or (folder / "config.json").exists():
        return {}
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(
            f"--model {folder}: the folder must hold config.json or exactly one .gguf file, "
            f"got {len(files)} .gguf files"
        )
    return {"gguf_file": files[0].name}


def random_subject(window: int, seed: int) -> Subject:
    transformers = require("transformers", EXTRA)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**RANDOM_SIZE, max_position_embeddings=window)
    model = transformers.LlamaForCausalLM(config).eval()
    return Subject(f"small random Llama ({RANDOM_MARK})", model, lambda s: list(s.encode()), True)


def load_text(file: Path | None, cache: Path, warn: Callable[[str, str], None]) -> Text:
    """The text of `--text`, else the default one, else prose that comes with Python."""
    if file is not None:
        try:
            return Text(file.name, file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {file}: cannot be read as UTF-8 text: {error}") from error
    try:
        content = demo_data.fetch(demo_data.TEXT, cache).read_text(encoding="utf-8")
        return Text(demo_data.TEXT.title, content)
    except demo_data.Unavailable as error:
        warn(FALLBACK_MARK, f"the default text cannot be had ({error}); --text takes your own")
    try:
        return Text(f"Python's help topics ({FALLBACK_MARK})", demo_data.builtin_text(), True)
    except demo_data.Unavailable as error:
        raise UserError(f"no text to read: {error}; pass a file with --text") from error


def cut_windows(subject: Subject, text: Text, window: int, count: int) -> Tensor:
    """Consecutive windows from the start of the text, int64 [count or fewer, window]."""
    if subject.context is not None and window > subject.context:
        raise UserError(
            f"--window must be at most the model's context of {subject.context}, got {window}"
        )
    ids = subject.encode(text.content)
    have = len(ids) // window
    if have < 1:
        raise UserError(
            f"{text.name} must have at least one window of {window} tokens, got {len(ids)} tokens: "
            "use a longer --text or a smaller --window"
        )
    kept = min(have, count)
    return torch.tensor(ids[: kept * window]).view(kept, window)
