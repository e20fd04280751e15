"""How each call's facts reach the layers: as a kwarg from the inner model to every attention, then
by hand-over to the MLP of the same layer.

Both hooks are forward pre-hooks. The attention runs just before the MLP inside one layer forward,
so its hook also runs where gradient checkpointing recomputes a layer, and the kwargs are part of
what is recomputed. Hooks are plain objects, so that a patched model can be copied and pickled.

The model's hook reads what concerns the whole batch (padding, packing, whether fast weights are
disabled), the attention's what concerns its layer: its state in the call's cache.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ttt_kernels.modules.facts import BatchFacts, drop_hand_over, hand_over
from ttt_kernels.modules.mlp import FastWeightMLP
from ttt_kernels.patch.cache import has_tokens, layer_state
from ttt_kernels.patch.families import find_decoder
from ttt_kernels.patch.layout import read_layout

KWARG = "ttt_info"
_POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
_LOCAL = threading.local()


class ModelHook:
    """On the inner model: reads the batch's layout from the call's arguments.

    Args:
        embeddings: the attribute that holds the token embedding when the layers write from it, else
            None.
        layers: the attribute that holds the decoder layers.
        mlps: the fast-weight MLPs by layer.

    `agreement` is called in place of `read`, which it must call, where ranks share a sequence.
    """

    agreement: Callable[[ModelHook, nn.Module, tuple, dict], tuple[tuple, dict]] | None = None

    def __init__(
        self, embeddings: str | None, layers: str, mlps: Mapping[int, FastWeightMLP]
    ) -> None:
        self.embeddings = embeddings
        self.layers = layers
        self.mlps = mlps
        self.disabled_in_graphs = 0

    def __getstate__(self) -> dict[str, object]:
        """A copy leaves no block by itself: it is made outside of all."""
        return {**self.__dict__, "disabled_in_graphs": 0}

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.agreement is not None:
            return self.agreement(self, model, args, kwargs)
        return self.read(model, args, kwargs)

    def read(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        drop_hand_over()
        if len(args) > len(_POSITIONAL):
            raise TypeError(
                f"a model with fast weights takes at most {len(_POSITIONAL)} positional arguments "
                f"({', '.join(_POSITIONAL)}), got {len(args)}: pass the others by name"
            )
        kwargs = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
        if self.is_disabled():
            refuse_live_cache(kwargs)
            return (), {KWARG: BatchFacts(disabled=True), **kwargs}  # `adapt` brings its own
        refuse_caches(model, kwargs)
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache") is None:
            if model.training or torch.compiler.is_compiling():
                kwargs["use_cache"] = False
        facts = read_layout(kwargs)
        if self.embeddings is not None:
            facts = replace(facts, embeddings=self._embed(model, kwargs))
        if facts.cu_seqlens is not None:
            kwargs["use_cache"] = False
        return (), {**kwargs, KWARG: facts}

    def is_disabled(self) -> bool:
        """In this thread. Graphs are shared by threads, and so is what they are traced with."""
        if torch.compiler.is_compiling():
            return self.disabled_in_graphs > 0
        return _disabled()[id(self)] > 0

    def _embed(self, model: nn.Module, kwargs: dict) -> Tensor:
        """The token embeddings, computed once and passed on in place of the ids."""
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = getattr(model, self.embeddings)(kwargs.pop("input_ids"))
        embeddings = kwargs["inputs_embeds"]
        if embeddings.requires_grad and _checkpoints_reentrantly(getattr(model, self.layers)[0]):
            raise NotImplementedError(
                'target_source="input_embed" shares the token embeddings between layers, which '
                "reentrant gradient checkpointing cannot differentiate: use "
                'gradient_checkpointing_enable({"use_reentrant": False})'
            )
        return embeddings


class AttentionHook:
    """On every layer's attention, which must not see our kwarg; hands it to the layer's MLP, with the
    layer's state in the cache that this call fills.

    `index` is None in layers without fast weights.
    """

    def __init__(self, model_hook: ModelHook, index: int | None) -> None:
        self.model_hook = model_hook
        self.index = index

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        facts = kwargs.pop(KWARG, None)
        if self.index is not None:
            mlps, cache = self.model_hook.mlps, kwargs.get("past_key_values")
            streams = cache is not None and not attention.training and facts is not None
            if streams and not facts.disabled:
                facts = replace(facts, state=layer_state(cache, mlps, self.index))
            hand_over(mlps[self.index], facts)
        return args, kwargs


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, calls of `model` are those of the model before `patch_model`, bit for bit.

        with ttt_kernels.disabled(model):
            plain = model.generate(ids)

    Fast weights are neither read nor written. It holds for the calling thread (compiled graphs: for
    all), may be nested, and ends with the block, errors included. A cache belongs to one side: going
    on inside with one that has fast weights, or outside with one filled inside, raises.

    Raises:
        ValueError: the model is not patched.
    """
    hook = model_hook(model)
    counts = _disabled()
    counts[id(hook)] += 1
    hook.disabled_in_graphs += 1
    try:
        yield
    finally:
        counts[id(hook)] -= 1
        hook.disabled_in_graphs -= 1


def model_hook(model: nn.Module) -> ModelHook:
    decoder, family = find_decoder(model)
    for hook in decoder._forward_pre_hooks.values():
        if isinstance(hook, ModelHook):
            return hook
    raise ValueError(f"model must have been patched by patch_model, got a plain {family.name}")


def _disabled() -> Counter:
    """How often each model hook is disabled in this thread."""
    if not hasattr(_LOCAL, "counts"):
        _LOCAL.counts = Counter()
    return _LOCAL.counts


def refuse_live_cache(kwargs: dict) -> None:
    if has_tokens(kwargs.get("past_key_values")):
        raise RuntimeError(
            "past_key_values carries fast weights, which a disabled model cannot continue: "
            "start from an empty cache"
        )


def refuse_caches(model: nn.Module, kwargs: dict) -> None:
    """Rather than compute something else."""
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            "continuous batching cannot carry fast weights: its calls name no requests, so a state "
            "cannot be found for them (cache was given). Use generate()"
        )
    cache = kwargs.get("past_key_values")
    if torch.compiler.is_compiling() and (cache is not None or kwargs.get("use_cache")):
        raise NotImplementedError(
            "a compiled model with fast weights cannot stream: call it without a cache "
            "(use_cache=False), or stream without torch.compile"
        )
    if model.training and cache is not None and int(cache.get_seq_length()) > 0:
        raise RuntimeError(
            "past_key_values holds tokens, and training starts every sequence from the slow "
            "weights: call model.eval() to continue a cache"
        )


def _checkpoints_reentrantly(layer: nn.Module) -> bool:
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant", True)
