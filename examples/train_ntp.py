"""Continual next-token-prediction training of a model with fast weights.

    python examples/train_ntp.py examples/configs/laptop.yaml
    python examples/train_ntp.py CONFIG --set train.steps=10 --set output=outputs/try
    python examples/train_ntp.py CONFIG --resume outputs/try/checkpoint-100
    torchrun --nproc-per-node 8 examples/train_ntp.py CONFIG

The settings are in `ntp_config.py`, what they mean in docs/training.md. The folder `output` gets the
Trainer's checkpoints (whole models, to resume from), then `projections.safetensors` (ttt_proj and
ttt_conv alone, unless the backbone was trained too) or the whole model in `final`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from ntp_config import ModelSettings, Settings, SettingsError, read_settings
from ntp_data import PackedBlocks
from ntp_trainer import (
    InnerWarmup,
    NTPTrainer,
    choose_trained,
    perplexity_by_position,
    training_arguments,
)
from torch import nn

import ttt_kernels as ttt


def load_model(m: ModelSettings) -> nn.Module:
    dtype = getattr(torch, m.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise SettingsError(f"model.dtype must be the name of a torch dtype, got {m.dtype!r}")
    options = {} if m.gguf_file is None else {"gguf_file": m.gguf_file}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        m.path, dtype=dtype, attn_implementation=m.attention, **options
    )
    return model if m.gguf_file is None else without_quantization_marks(model)


def without_quantization_marks(model: nn.Module) -> nn.Module:
    """A GGUF file's weights become plain linear layers, yet transformers 5 goes on calling the model
    quantised, and would neither train nor save it."""
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    return model


def load_tokenizer(m: ModelSettings):
    options = {} if m.gguf_file is None else {"gguf_file": m.gguf_file}
    return transformers.AutoTokenizer.from_pretrained(m.path, **options)


def make_trainer(
    settings: Settings, model: nn.Module, train: PackedBlocks, validation: PackedBlocks | None
) -> NTPTrainer:
    """`model` is patched, and what learns is chosen, here."""
    ttt.patch_model(model, settings.fast_weight_config())
    choose_trained(model, settings.train)
    return NTPTrainer(
        projection_learning_rate=settings.train.projection_learning_rate,
        model=model,
        args=training_arguments(settings),
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=perplexity_by_position(settings.data.block_size),
        callbacks=[InnerWarmup(model, settings.train.inner_lr_warmup_steps)],
    )


def run(settings: Settings, resume: str | None) -> None:
    transformers.set_seed(settings.train.seed)
    data, tokenizer = settings.data, load_tokenizer(settings.model)

    def blocks(patterns: list[str]) -> PackedBlocks:
        return PackedBlocks.from_files(
            patterns, tokenizer, data.block_size, prepend_bos=data.prepend_bos, append_eos=data.append_eos
        )

    validation = blocks(data.validation) if data.validation else None
    model = load_model(settings.model)
    trainer = make_trainer(settings, model, blocks(data.train), validation)
    trainer.train(resume_from_checkpoint=resume)
    if validation is not None:
        trainer.log_metrics("validation", trainer.evaluate())
    if not trainer.is_world_process_zero():
        return
    if settings.train.what == "all":
        ttt.save_pretrained(model, Path(settings.output) / "final")
        tokenizer.save_pretrained(Path(settings.output) / "final")
    else:
        about = {"trained on": ", ".join(data.train), "steps": str(settings.train.steps)}
        ttt.save_projections(model, Path(settings.output) / "projections.safetensors", metadata=about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="changes")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="a checkpoint folder of the same run")
    args = parser.parse_args()
    try:
        run(read_settings(args.config, args.changes), args.resume)
    except SettingsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
