"""The state's place in a transformers cache.

A cache is a list of layer objects on which transformers calls `reorder_cache`, `crop`, `reset` and so
on. The layers that carry fast weights become instances of a subclass of their own class, with the
same `__dict__`, that passes each of those on to its `LayerState`, kept as `.ttt`. The state of all
layers is the cache's attribute `fast_weights`. Whatever copies the cache copies both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ttt_kernels.modules.layer_state import LayerState
from ttt_kernels.modules.mlp import FastWeightMLP
from ttt_kernels.modules.state import CACHE_ATTRIBUTE, FastWeightState
from ttt_kernels.patch.layout import PROMPT_MASK

PREPARE = "_prepare_cache_for_generation"


class CropGuard:
    """Mixed into the class of a cache's first layer, which is cropped before all others: where the
    fast weights of any layer cannot follow, nothing is cropped."""

    _layer_type = None  # transformers registers subclasses that inherit one
    fast_weights: FastWeightState | None = None

    def crop(self, *args, **kwargs) -> None:
        if self.fast_weights is not None:
            length = self._length_after_crop(*args, **kwargs)
            for state in self.fast_weights.layers.values():
                state.crop_to(length, dry=True)
        super().crop(*args, **kwargs)

    def _length_after_crop(self, *args, **kwargs) -> int:
        """The argument's meaning differs between versions: only its effect on a copy is looked at
        (tensors are shared, cropping replaces them)."""
        copy = _rebuild(_base(type(self)), None)
        copy.__dict__ = dict(self.__dict__)
        copy.crop(*args, **kwargs)
        return int(copy.get_seq_length())

    def __reduce__(self):
        """By its base: a class made at run time cannot be found by name."""
        mixin = FastWeightCacheLayer if isinstance(self, FastWeightCacheLayer) else CropGuard
        return _rebuild, (_base(type(self)), mixin), self.__dict__


class FastWeightCacheLayer(CropGuard):
    """Mixed into the class of a cache layer; see `cache_layer_class`."""

    ttt: LayerState

    def activate_past_recording(self) -> None:
        """Rolling back is about to be needed (assisted decoding)."""
        self.ttt.record_past = True
        if hasattr(super(), "activate_past_recording"):
            super().activate_past_recording()

    def reset(self) -> None:
        super().reset()
        self.ttt.reset()
        self.ttt.columns = int(self.get_seq_length())  # 4.57 only zeroes what a dynamic layer holds

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.ttt.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.ttt.select([i for i in range(len(self.ttt.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        indices = indices.cpu() if isinstance(indices, Tensor) else indices
        self.ttt.select(torch.arange(len(self.ttt.rows))[indices].tolist())

    def crop(self, *args, **kwargs) -> None:
        super().crop(*args, **kwargs)
        self.ttt.crop_to(int(self.get_seq_length()))


@functools.cache
def cache_layer_class(base: type, mixin: type = FastWeightCacheLayer) -> type:
    return type("FastWeight" + base.__name__, (mixin, base), {})


def _base(kind: type) -> type:
    """The class of a cache layer before it was converted."""
    return kind.__bases__[1] if issubclass(kind, CropGuard) else kind


def _rebuild(base: type, mixin: type | None = FastWeightCacheLayer) -> object:
    return object.__new__(base if mixin is None else cache_layer_class(base, mixin))


def _mix(cache: object, i: int, mixin: type | None) -> object:
    """Layer i of `cache`, which becomes its own class with `mixin` in front."""
    layer = cache.layers[i]
    new = _rebuild(_base(type(layer)), mixin)
    new.__dict__ = layer.__dict__  # static addresses and flags survive
    cache.layers[i] = new
    return new


def layer_state(cache: object, mlps: Mapping[int, FastWeightMLP], i: int) -> LayerState:
    """The state of layer i in `cache`, which is converted on first sight.

    Raises:
        RuntimeError: the cache's keys and its fast weights have seen different tokens.
        ValueError: they are of another model, or of another configuration.
    """
    layer = cache.layers[i] if i < len(cache.layers) else None
    if not isinstance(layer, FastWeightCacheLayer) or not layer.ttt.belongs_to(mlps[i]):
        convert(cache, mlps)
        layer = cache.layers[i]
    length = layer.get_seq_length()
    if isinstance(length, int):  # not where asking would wait for the device
        _check_length(length, layer.ttt)
    return layer.ttt


def _check_length(length: int, state: LayerState) -> None:
    if length != state.columns:
        raise RuntimeError(
            f"the cache must hold the tokens that its fast weights have seen ({state.columns}), got "
            f"{length}: it was filled by the model unpatched, disabled or in training mode, or by "
            "another model, or an earlier call failed half-way. Start from an empty cache"
        )


def convert(cache: object, mlps: Mapping[int, FastWeightMLP]) -> None:
    """Give the layers of `cache` that belong to `mlps` their states."""
    if not hasattr(cache, "layers") or hasattr(cache, "self_attention_cache"):
        raise TypeError(
            "past_key_values must be a decoder's transformers Cache with layers, "
            f"got {type(cache).__name__}"
        )
    empty = FastWeightState({i: LayerState(mlp.signature()) for i, mlp in mlps.items()})
    state = getattr(cache, CACHE_ATTRIBUTE, None)
    used = any(isinstance(layer, CropGuard) for layer in cache.layers)
    if state is None or (used and state.is_blank() and state.difference(empty)):
        state = empty  # a cache that was reset may serve another model
    state.check(empty)
    while len(cache.layers) <= max(mlps):  # caches that grow as they are used
        grow = getattr(cache, "layer_class_to_replicate", None)
        if grow is None:
            raise ValueError(
                f"past_key_values must have the model's layers, at least {max(mlps) + 1}, got "
                f"{len(cache.layers)} in a {type(cache).__name__} that cannot grow: it was made for "
                "a smaller model"
            )
        cache.layers.append(grow())
    for i in mlps:
        if not isinstance(cache.layers[i], FastWeightCacheLayer):
            _check_length(int(cache.layers[i].get_seq_length()), state.layers[i])
    setattr(cache, CACHE_ATTRIBUTE, state)
    for i, layer in enumerate(cache.layers):
        if i in mlps:
            _mix(cache, i, FastWeightCacheLayer).ttt = state.layers[i]
            state.layers[i].give_to(mlps[i])
        elif isinstance(layer, CropGuard) or i == 0:
            _mix(cache, i, CropGuard if i == 0 else None)
    cache.layers[0].fast_weights = state


def has_tokens(cache: object) -> bool:
    """Whether fast weights have been carried in `cache`."""
    state = getattr(cache, CACHE_ATTRIBUTE, None)
    return state is not None and any(layer.columns for layer in state.layers.values())


class PrepareCache:
    """In place of a model's `_prepare_cache_for_generation`, on the instance.

    `generate` makes its cache there, before the first forward, and knows what comes: that tokens will
    be taken back (assisted decoding), and where the prompt is padded, which with a static cache it
    later says in 4D masks only. Fast weights count on the host, so the decoding step is not compiled.
    """

    def __init__(self, model: nn.Module, hook: object) -> None:
        self.model, self.hook = model, hook

    def __call__(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        early_exit = getattr(generation_config, "assistant_early_exit", None)
        if early_exit is not None and not self.hook.is_disabled():
            raise NotImplementedError(
                "a model with fast weights cannot draft for itself with fewer layers, which need a "
                f"state of their own, got assistant_early_exit={early_exit}: use "
                "prompt_lookup_num_tokens or an assistant_model"
            )
        result = getattr(type(self.model), PREPARE)(
            self.model, generation_config, model_kwargs, generation_mode, *args, **kwargs
        )
        cache = model_kwargs.get("past_key_values")
        if cache is None or self.hook.is_disabled():
            return result
        convert(cache, self.hook.mlps)
        setattr(cache, PROMPT_MASK, model_kwargs.get("attention_mask"))
        generation_config.disable_compile = True
        assisted = "assisted" in str(generation_mode).lower()
        if assisted or getattr(generation_config, "is_assistant", False):
            getattr(cache, CACHE_ATTRIBUTE).record_past()
        return result


def install_prepare(model: nn.Module, hook: object) -> None:
    outer = generating(model)
    if outer is not None:
        outer.__dict__[PREPARE] = PrepareCache(outer, hook)


def remove_prepare(model: nn.Module) -> None:
    outer = generating(model)
    if outer is not None:
        outer.__dict__.pop(PREPARE, None)


def generating(model: nn.Module) -> nn.Module | None:
    """The module whose `generate` runs: `model`, or what an adapter is around."""
    outer = model.get_base_model() if hasattr(model, "get_base_model") else model
    return outer if hasattr(type(outer), PREPARE) else None
