"""The model of the study: SmolLM2-135M-Instruct, cut where training has to begin.

Layers below the first fast weight compute the same in every run. Their output is computed once and
kept (`capture`), and what runs from then on is the rest of the model (`tail`).
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import ttt_kernels as ttt
from ttt_kernels.cli.demo_model import Subject, load_subject

ROWS = 512  # positions whose logits exist at a time: a vocabulary of floats is large


def load(cache: Path, context: int) -> Subject:
    def refuse(mark: str, why: str) -> None:
        raise SystemExit(f"the study needs the pretrained model: {why}")

    subject = load_subject(None, cache, context, 0, refuse)
    subject.model.requires_grad_(False)
    return subject


def precision(bf16: bool):
    """bf16 autocast over float32 weights, or plain float32."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


def next_token_loss(model: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    """-log p [T - 1] of every next token, from the decoder's output [T, D]."""
    pairs = zip(hidden[:-1].split(ROWS), ids[1:].split(ROWS), strict=True)
    entropy = nn.functional.cross_entropy
    return torch.cat([entropy(model.lm_head(h).float(), t, reduction="none") for h, t in pairs])


@torch.no_grad()
def capture(model: nn.Module, ids: Tensor, first: int, bf16: bool) -> tuple[Tensor, Tensor]:
    """What enters layer `first` [T, D], and the loss [T - 1] of the plain model."""
    seen = []
    hook = model.model.layers[first].register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    try:
        with precision(bf16):
            out = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            return seen[0], next_token_loss(model, out, ids)
    finally:
        hook.remove()


def tail(model: nn.Module, first: int) -> nn.Module:
    """`model` without its first layers, in place; call it with `inputs_embeds`."""
    model.model.layers = model.model.layers[first:]
    return model


def tail_loss(model: nn.Module, hidden: Tensor, ids: Tensor, bf16: bool) -> Tensor:
    """As `next_token_loss`, from what enters the tail [T, D]; differentiable."""
    with precision(bf16):
        out = model.model(inputs_embeds=hidden[None], use_cache=False).last_hidden_state[0]
        return next_token_loss(model, out, ids)


def patch_tail(model: nn.Module, config: ttt.TTTConfig, first: int) -> dict[int, nn.Module]:
    """Fast weights in the tail; `config.layers` count from the whole model's first. By layer."""
    from dataclasses import replace

    shifted = replace(config, layers=tuple(i - first for i in config.layers))
    ttt.patch_model(model, shifted)
    return {i: model.model.layers[i - first].mlp for i in config.layers}
