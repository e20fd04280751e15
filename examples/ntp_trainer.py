"""The Hugging Face `Trainer` with what fast weights add: a learning rate of their own for the projections,
a warm-up of the writes' step size, and losses told apart by position."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import torch
from ntp_config import Settings, TrainSettings
from ntp_data import IGNORED
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

import ttt_kernels as ttt

BUCKETS = 8
ROWS = 1024  # positions whose float32 logits exist at a time in evaluation


def fast_mlps(model: nn.Module) -> list[ttt.FastWeightMLP]:
    return [m for m in model.modules() if isinstance(m, ttt.FastWeightMLP)]


def fast_parameters(model: nn.Module) -> list[nn.Parameter]:
    """ttt_proj and ttt_conv of every layer."""
    parts = [p for m in fast_mlps(model) for p in (m.ttt_proj, getattr(m, "ttt_conv", None))]
    return [part.weight for part in parts if part is not None]


def choose_trained(model: nn.Module, train: TrainSettings) -> None:
    """Set requires_grad. Under autocast the fast parameters are kept in float32 for the optimizer."""
    model.requires_grad_(train.what == "all")
    for parameter in fast_parameters(model):
        parameter.requires_grad_(True)
        if train.bf16:
            parameter.data = parameter.data.float()


class NTPTrainer(Trainer):
    """`projection_learning_rate` is that of `fast_parameters`; `args.learning_rate` of all others."""

    def __init__(self, *, projection_learning_rate: float, **options) -> None:
        super().__init__(**options)
        self.projection_learning_rate = projection_learning_rate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            fast = {id(p) for p in fast_parameters(model)}
            decayed = set(self.get_decay_parameter_names(model))
            groups = {"fast": [], "decayed": [], "other": []}
            for name, p in model.named_parameters():
                if p.requires_grad:
                    groups["fast" if id(p) in fast else "decayed" if name in decayed else "other"].append(p)
            settings = {
                "fast": {"lr": self.projection_learning_rate, "weight_decay": 0.0},
                "decayed": {"weight_decay": self.args.weight_decay},
                "other": {"weight_decay": 0.0},
            }
            used = [{"params": ps, **settings[name]} for name, ps in groups.items() if ps]
            self.optimizer = kind(used, **options)
        return self.optimizer

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of every token [B, T - 1] in place of logits, and its place in its document."""
        inputs = self._prepare_inputs(inputs)
        ids, labels = inputs["input_ids"], inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(input_ids=ids, position_ids=inputs["position_ids"], use_cache=False).logits
        losses = token_losses(logits, labels)
        counted = labels[:, 1:] != IGNORED
        places = inputs["position_ids"][:, 1:].masked_fill(~counted, IGNORED)
        mean = losses.sum() / counted.sum().clamp(min=1)
        return (mean, None, None) if prediction_loss_only else (mean, losses, places)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """float32 [B, T - 1]; 0 where the label is ignored."""
    rows = zip(logits[:, :-1].flatten(0, 1).split(ROWS), labels[:, 1:].flatten().split(ROWS), strict=True)
    entropy = nn.functional.cross_entropy
    losses = [entropy(x.float(), t, ignore_index=IGNORED, reduction="none") for x, t in rows]
    return torch.cat(losses).view(labels.shape[0], -1)


def perplexity_by_position(longest: int, buckets: int = BUCKETS):
    """A `compute_metrics`: perplexity of all tokens, and of each eighth of `longest` places that tokens
    can have in their document; eighths without a token are left out."""

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        losses, places = prediction.predictions, prediction.label_ids
        counted = places >= 0
        found = {"perplexity": float(np.exp(losses[counted].mean()))}
        for b in range(buckets):
            low, high = b * longest // buckets, (b + 1) * longest // buckets
            inside = (places >= low) & (places < high)
            if inside.any():
                found[f"perplexity_from_{low}"] = float(np.exp(losses[inside].mean()))
        return found

    return metrics


class InnerWarmup(TrainerCallback):
    """The writes' step size grows linearly to its configured value over the first `steps` steps.

    It follows from the step number alone, so a resumed run goes on with the right one.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.steps = steps
        self.rules = {mlp: mlp.rule for mlp in fast_mlps(model)}

    def on_step_begin(self, args, state, control, **_) -> None:
        scale = min(1.0, (state.global_step + 1) / self.steps) if self.steps else 1.0
        for mlp, rule in self.rules.items():
            mlp.rule = replace(rule, lr=rule.lr * scale)

    def on_train_end(self, args, state, control, **_) -> None:
        for mlp, rule in self.rules.items():
            mlp.rule = rule


def training_arguments(settings: Settings) -> TrainingArguments:
    t, evaluates = settings.train, bool(settings.data.validation)
    known = {f.name for f in fields(TrainingArguments)}
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    liger = {"fused_linear_cross_entropy": True, "rope": False, "rms_norm": False, "swiglu": False}
    return TrainingArguments(
        output_dir=settings.output,
        max_steps=t.steps,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.batch_size,
        gradient_accumulation_steps=t.accumulation,
        learning_rate=t.learning_rate,
        weight_decay=t.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=t.warmup_steps,
        max_grad_norm=t.max_grad_norm,
        **{checkpointing: t.gradient_checkpointing, checkpointing + "_kwargs": {"use_reentrant": False}},
        bf16=t.bf16,
        use_liger_kernel=t.liger,
        liger_kernel_config=liger if t.liger else None,
        seed=t.seed,
        logging_steps=t.log_every,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=t.evaluate_every if evaluates else None,
        save_steps=t.save_every,
        report_to=["tensorboard"] if t.tensorboard else [],
        remove_unused_columns=False,
        use_cpu=t.cpu,
    )
