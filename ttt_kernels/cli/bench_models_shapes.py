"""The models of `bench --suite models`: SmolLM2 with its weights, and the released backbones' shapes with
random ones, cut to what a machine can hold and time."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import ttt_kernels as ttt
from ttt_kernels.cli import fast_weights
from ttt_kernels.cli.bench import MEMORY_SHARE, gib
from ttt_kernels.cli.demo_model import load_subject, load_text
from ttt_kernels.cli.errors import UserError, require
from ttt_kernels.cli.measure import available_memory

EXTRA = "demo"
SMOLLM = "smollm2-135m"


class Skip(Exception):
    """This model is not measured here; the message says why."""


@dataclass(frozen=True)
class Plan:
    """How much of a model is measured. `layers`: at most so many; None = all.

    tokens, prompt: of the prefill that is timed, and of the one before decoding; in whole chunks.
    steps: decoded tokens, fewer than a chunk.
    """

    tokens: int
    prompt: int
    layers: int | None = None
    chunk_size: int = 256
    steps: int = 24
    batches: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Shape:
    """A released backbone: `sizes` are fields of its transformers config."""

    name: str
    family: str
    sizes: Mapping[str, int]
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def recipe(self) -> ttt.TTTConfig:
        return ttt.TTTConfig.recipe(self.name)

    @property
    def period(self) -> int:
        """Layers from one fast weight to the next: fewer would change how many of them have one."""
        return self.recipe.layers[1] - self.recipe.layers[0]


SHAPES = (
    Shape("qwen3-0.6b", "Qwen3", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936,
    }, {"tie_word_embeddings": True}),
    Shape("qwen3-4b", "Qwen3", {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
    }, {"tie_word_embeddings": True}),
    Shape("llama-3.1-8b", "Llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    }),
)  # fmt: skip
NAMES = (SMOLLM, *(shape.name for shape in SHAPES))
CPU_PLANS = {  # a round of all layers would take minutes
    SMOLLM: Plan(2048, 512),
    "qwen3-0.6b": Plan(2048, 512, layers=8),
    "qwen3-4b": Plan(512, 512, layers=6),
    "llama-3.1-8b": Plan(512, 512, layers=6),
}
GPU_PLAN = Plan(32768, 2048, chunk_size=1024, steps=64, batches=(1, 8), dtype=torch.bfloat16)


def plan_for(name: str, device: torch.device) -> Plan:
    return CPU_PLANS[name] if device.type == "cpu" else GPU_PLAN


@dataclass(frozen=True)
class Subject:
    """A model to be measured, the text it reads, [B, T] int64, and how it is patched."""

    name: str
    model: nn.Module
    ids: Tensor
    config: ttt.TTTConfig
    plan: Plan
    of_layers: int
    of_vocabulary: int
    weights: str  # "pretrained" or "random"

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def head_dim(self) -> int:
        config = self.model.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def vocabulary(self) -> int:
        return self.model.config.vocab_size


def load(name: str, plan: Plan, device: torch.device) -> Subject:
    """Raises Skip where the model cannot be had or does not fit."""
    if name == SMOLLM:
        return smollm(plan, device)
    return random_model(next(shape for shape in SHAPES if shape.name == name), plan, device)


def smollm(plan: Plan, device: torch.device) -> Subject:
    """Patched as the demo does it: six layers, evenly spaced."""

    def refuse(mark: str, why: str) -> None:
        raise Skip(why)

    cache = fast_weights.DEFAULT_CACHE
    try:
        found = load_subject(None, cache, plan.tokens, 0, refuse)
        text = load_text(None, cache, refuse)
    except UserError as error:
        raise Skip(str(error)) from None
    chunk, steps = plan.chunk_size, plan.steps
    tokens = min(plan.tokens, (found.context - steps) // chunk * chunk)
    plan = replace(plan, tokens=tokens, prompt=min(plan.prompt, tokens))
    need = length(plan)
    ids = torch.tensor(found.encode(text.content)[:need])
    if len(ids) < need:
        raise Skip(f"{text.name} has {len(ids)} tokens, {need} are needed")
    options = argparse.Namespace(**{**fast_weights.DEFAULTS, "chunk_size": chunk})
    return Subject(
        name=SMOLLM,
        model=found.model.to(device, plan.dtype),
        ids=ids.repeat(max(plan.batches), 1).to(device),
        config=fast_weights.make_config(options, found.layers),
        plan=plan,
        of_layers=found.layers,
        of_vocabulary=found.model.config.vocab_size,
        weights="pretrained",
    )


def random_model(shape: Shape, plan: Plan, device: torch.device) -> Subject:
    transformers = require("transformers", EXTRA)
    layers = layers_that_fit(shape, plan, available_memory(device))
    recipe = shape.recipe
    sizes = {**shape.sizes, "num_hidden_layers": layers, "vocab_size": vocabulary(shape, layers)}
    config = getattr(transformers, f"{shape.family}Config")(
        **sizes, **shape.options, max_position_embeddings=2 * length(plan)
    )
    torch.manual_seed(0)
    with default_dtype(plan.dtype), device:
        model = getattr(transformers, f"{shape.family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    size = (max(plan.batches), length(plan))
    patched = tuple(i for i in recipe.layers if i < layers)
    return Subject(
        name=shape.name,
        model=model,
        ids=torch.randint(sizes["vocab_size"], size, generator=generator).to(device),
        config=replace(recipe, layers=patched, chunk_size=plan.chunk_size),
        plan=plan,
        of_layers=shape.sizes["num_hidden_layers"],
        of_vocabulary=shape.sizes["vocab_size"],
        weights="random",
    )


def length(plan: Plan) -> int:
    return max(plan.tokens, plan.prompt + plan.steps)


def vocabulary(shape: Shape, layers: int) -> int:
    """Cut like the layers, so that the product with it keeps its share of a token's time."""
    return shape.sizes["vocab_size"] * layers // shape.sizes["num_hidden_layers"]


def layers_that_fit(shape: Shape, plan: Plan, available: int | None) -> int:
    """As many as the plan wants; where they do not fit, fewer, in whole periods of the recipe."""
    full, period = shape.sizes["num_hidden_layers"], shape.period
    wanted = min(plan.layers or full, full)
    candidates = [wanted, *(n for n in range(full // period * period, 0, -period) if n < wanted)]
    for layers in candidates:
        if available is None or bytes_needed(shape, plan, layers) <= MEMORY_SHARE * available:
            return layers
    need = bytes_needed(shape, plan, candidates[-1])
    raise Skip(f"{candidates[-1]} layers need about {gib(need)}, {gib(available)} available")


def bytes_needed(shape: Shape, plan: Plan, layers: int) -> int:
    """Weights, two caches, the state and one layer's activations."""
    s, itemsize = shape.sizes, plan.dtype.itemsize
    d, f, kv = s["hidden_size"], s["intermediate_size"], s["num_key_value_heads"] * s["head_dim"]
    heads = s["num_attention_heads"] * s["head_dim"]
    layer = 2 * d * heads + 2 * d * kv + 3 * d * f
    embeddings = vocabulary(shape, layers) * d * (1 if shape.options.get("tie_word_embeddings") else 2)
    batch = max(plan.batches)
    held = max(plan.tokens, batch * plan.prompt)  # tokens in a cache
    fast = len([i for i in shape.recipe.layers if i < layers])
    state = fast * batch * (4 * d * f + plan.chunk_size * (d + f) * itemsize)
    activations = held * (4 * f + 8 * d) * itemsize
    return itemsize * (layers * (layer + 4 * kv * held) + embeddings) + state + activations


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
