"""Random models of every supported family, small enough for one test."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ttt_kernels as ttt

FAMILIES = ("llama", "mistral", "qwen3")
LAYERS = (0, 2)
CHUNK = 8
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 98,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def build(family: str = "llama", **changes) -> nn.Module:
    """A causal language model in eval mode, the same weights every time."""
    import transformers

    own = {"llama": {}, "mistral": {"sliding_window": None}, "qwen3": {"head_dim": 16}}[family]
    name = family.capitalize()
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **own, **changes})
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for layer in model.model.layers:
        if layer.mlp.down_proj.bias is not None:
            nn.init.normal_(layer.mlp.down_proj.bias)
    return model


def config(**changes) -> ttt.TTTConfig:
    return ttt.TTTConfig(**{"layers": LAYERS, "chunk_size": CHUNK, "lr": 2.0, **changes})


def fast_mlps(model: nn.Module) -> list[ttt.FastWeightMLP]:
    return [m for m in model.modules() if isinstance(m, ttt.FastWeightMLP)]


def patched(family: str = "llama", cfg: ttt.TTTConfig | None = None, **changes) -> nn.Module:
    """A patched model whose projections (and convolutions) are dense and large enough to matter."""
    model = build(family, **changes)
    ttt.patch_model(model, cfg or config())
    generator = torch.Generator().manual_seed(3)
    for mlp in fast_mlps(model):
        for part in (mlp.ttt_proj, getattr(mlp, "ttt_conv", None)):
            if part is not None:
                noise = torch.randn(part.weight.shape, generator=generator)
                part.weight.data += 0.05 * noise.to(part.weight.dtype)
    return model


def ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, tokens), generator=generator)


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor, list[slice]]:
    """Input ids [B, T], attention mask, and where each row's tokens are."""
    length = max(r.shape[1] for r in rows)
    x = torch.zeros(len(rows), length, dtype=torch.long)
    mask, places = torch.zeros_like(x), []
    for b, row in enumerate(rows):
        n = row.shape[1]
        start = {"left": length - n, "right": 0, "both": (length - n) // 2}[side]
        places.append(slice(start, start + n))
        x[b, places[-1]], mask[b, places[-1]] = row[0], 1
    return x, mask, places


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
