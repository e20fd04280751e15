"""The supported model families: rows of one table, told apart by class names.

A family is a decoder whose layers call `self_attn(..., **kwargs)` and then `mlp(x)` with a gated
MLP. To add one, add a row; if it needs more than names, it is another kind of model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """Class and attribute names of one transformers model family."""

    name: str
    model_class: str
    layer_class: str
    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    embeddings: str = "embed_tokens"


FAMILIES = (
    Family("llama", "LlamaModel", "LlamaDecoderLayer"),
    Family("mistral", "MistralModel", "MistralDecoderLayer"),
    Family("qwen3", "Qwen3Model", "Qwen3DecoderLayer"),
)


def has_class(module: object, name: str) -> bool:
    """By name along the MRO: a wrapper's subclass (FSDP) counts, and nothing needs importing."""
    return any(cls.__name__ == name for cls in type(module).__mro__)


def find_decoder(model: nn.Module) -> tuple[nn.Module, Family]:
    """The inner `*Model` (`model` may be it, a `*ForCausalLM` or a PEFT model), and its row."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    outer = model.get_base_model() if hasattr(model, "get_base_model") else model
    for candidate in (outer, getattr(outer, "base_model", None)):
        for family in FAMILIES:
            if candidate is not None and has_class(candidate, family.model_class):
                return candidate, family
    supported = ", ".join(f"{family.name} ({family.model_class})" for family in FAMILIES)
    raise TypeError(
        f"model must be of a supported family, {supported}, or contain one as its base model, "
        f"got {type(model).__name__}"
    )
