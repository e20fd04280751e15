"""The settings of a training run: a YAML file, strictly read.

Every key is a field below; an unknown one, a missing one or one of another type is an error that names
it. `--set section.key=value` on the command line replaces single values.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import ttt_kernels as ttt

TRAINED = ("projection", "projection+conv", "all")


class SettingsError(ValueError):
    """A setting is wrong; the message names it, what it may be and what came."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """path: a folder or hub name of a Llama, Mistral or Qwen3 model (with its tokenizer).
    gguf_file: in that folder, where the weights are one. dtype: of the weights; the trained projections
    are float32 under bf16 autocast whatever it is. attention: as transformers names it."""

    path: str
    gguf_file: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """train, validation: file patterns (relative to the working directory); a .txt file is one
    document, a line of a .jsonl file is one, in its field "text". block_size: tokens of a row.
    prepend_bos: begin every document with the tokenizer's begin-of-sequence token, which Llama 3 and
    Mistral expect. append_eos: end every document with the tokenizer's end-of-sequence token."""

    train: list[str]
    validation: list[str] = field(default_factory=list)
    block_size: int
    prepend_bos: bool = False
    append_eos: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """what: the parameters that learn. learning_rate: of the backbone (with "all");
    projection_learning_rate: of ttt_proj and ttt_conv. warmup_steps: of both, then cosine to 0.
    inner_lr_warmup_steps: the writes' own step size grows linearly to its value over these.
    batch_size: rows on each device; accumulation: batches per step. liger: fused linear
    cross-entropy of liger-kernel (a GPU is needed)."""

    what: str = "projection"
    steps: int
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 0.0
    projection_learning_rate: float
    weight_decay: float = 0.0
    warmup_steps: int = 0
    inner_lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = True
    bf16: bool = True
    liger: bool = False
    seed: int = 0
    log_every: int = 1
    evaluate_every: int = 100
    save_every: int = 100
    tensorboard: bool = False
    cpu: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """fast_weights: the fields of `ttt_kernels.TTTConfig`, or {recipe: NAME} with fields that replace
    the recipe's."""

    model: ModelSettings
    fast_weights: dict
    data: DataSettings
    train: TrainSettings
    output: str

    def __post_init__(self) -> None:
        self.fast_weight_config()
        train, data = self.train, self.data
        if train.what not in TRAINED:
            raise SettingsError(f"train.what must be one of {', '.join(TRAINED)}, got {train.what!r}")
        if train.what == "all" and train.learning_rate <= 0:
            raise SettingsError('train.learning_rate must be > 0 with train.what "all": the backbone learns')
        if train.what != "all" and train.learning_rate:
            raise SettingsError(f'train.learning_rate needs train.what "all", got {train.what!r}')
        chunk = self.fast_weight_config().chunk_size
        if data.block_size <= chunk:
            raise SettingsError(
                f"data.block_size must be > fast_weights.chunk_size = {chunk}, or nothing that is "
                f"written is ever read; got {data.block_size}"
            )
        self._check_target()

    def _check_target(self) -> None:
        conv = self.fast_weight_config().target == "conv"
        if self.train.what == "projection" and conv:
            raise SettingsError(
                'train.what must be "projection+conv" or "all" with target "conv": a convolution that '
                "stays zero writes nothing"
            )
        if self.train.what == "projection+conv" and not conv:
            raise SettingsError('train.what "projection+conv" needs fast_weights.target "conv"')

    def fast_weight_config(self) -> ttt.TTTConfig:
        fields = dict(self.fast_weights)
        try:
            if "recipe" in fields:
                return dataclasses.replace(ttt.TTTConfig.recipe(fields.pop("recipe")), **fields)
            return ttt.TTTConfig(**fields)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"fast_weights: {error}") from error


def read_settings(file: Path, changes: list[str] = ()) -> Settings:
    """From YAML, with `changes` of the form section.key=value."""
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise SettingsError(f"{file} must hold a mapping, got {type(values).__name__}")
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals:
            raise SettingsError(f"--set takes section.key=value, got {change!r}")
        *sections, key = path.split(".")
        place = values
        for name in sections:
            place = place.setdefault(name, {})
        place[key] = yaml.safe_load(text)
    return build(Settings, values, "")


def build(kind: type, values: object, where: str):
    """A dataclass from nested mappings, names and types checked."""
    if not isinstance(values, dict):
        raise SettingsError(f"{where or 'the file'} must be a mapping, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(map(str, set(values) - set(fields)))
    if unknown:
        raise SettingsError(f"unknown {where}{', '.join(unknown)}; known are {', '.join(fields)}")
    missing = sorted(n for n, f in fields.items() if n not in values and _required(f))
    if missing:
        raise SettingsError(f"missing: {', '.join(where + name for name in missing)}")
    return kind(**{n: _checked(hints[n], v, f"{where}{n}") for n, v in values.items()})


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _checked(kind: object, value: object, name: str):
    if dataclasses.is_dataclass(kind):
        return build(kind, value, name + ".")
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        if not isinstance(value, list):
            raise SettingsError(f"{name} must be a list, got {value!r}")
        return [_checked(item, v, name) for v in value]
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in options and isinstance(value, str):  # YAML reads 1e-3, without a dot, as text
        try:
            value = float(value)
        except ValueError:
            pass
    if float in options and type(value) is int:
        value = float(value)
    if type(value) not in options:
        wanted = " or ".join("null" if k is types.NoneType else k.__name__ for k in options)
        raise SettingsError(f"{name} must be {wanted}, got {value!r}")
    return value
