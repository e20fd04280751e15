"""Shared by the tests that stream patched models: models, references without a cache, distances."""

from __future__ import annotations

import tiny_models as tiny
import torch
import transformers
from torch import Tensor
from transformers import StaticCache

V5 = int(transformers.__version__.split(".")[0]) >= 5
VARIANTS = {
    "sgd": {},
    "specnorm": {"inner_optimizer": "specnorm", "lr": 0.5, "preserve_row_norm": True},
    "conv": {"target": "conv", "target_source": "input_embed"},
}
NEW = 20


def model_of(family: str = "llama", variant: str = "sgd", **changes):
    return tiny.patched(family, tiny.config(**VARIANTS[variant]), **changes).double()


@torch.no_grad()
def whole(model, x: Tensor) -> Tensor:
    """Logits without any cache."""
    return model(x, use_cache=False).logits


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def greedy(model, x: Tensor, **options) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(x, **{"attention_mask": torch.ones_like(x), **options})


def by_hand(model, x: Tensor, new: int = NEW) -> Tensor:
    """Greedy, re-running everything for every token."""
    for _ in range(new):
        x = torch.cat([x, whole(model, x)[:, -1:].argmax(-1)], 1)
    return x


def static_cache(model, length: int = 64):
    return StaticCache(config=model.config, max_cache_len=length)
