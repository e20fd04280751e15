"""How each call's facts reach the layers: as a kwarg from the inner model to every attention, then
by hand-over to the MLP of the same layer.

Both hooks are forward pre-hooks. The attention runs just before the MLP inside one layer forward,
so its hook also runs where gradient checkpointing recomputes a layer, and the kwargs are part of
what is recomputed. Hooks are plain objects, so that a patched model can be copied and pickled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttt_kernels.modules.facts import BatchFacts, hand_over

KWARG = "ttt_info"
_POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
_NO_CACHE = (
    "fast weights do not stream through a key/value cache yet: call the model, or generate(), "
    "with use_cache=False"
)


class ModelHook:
    """On the inner model: refuses caches, and reads the batch's layout from the call's arguments.

    Args:
        embeddings: the attribute that holds the token embedding when the layers write from it, else
            None.
        layers: the attribute that holds the decoder layers.
    """

    def __init__(self, embeddings: str | None, layers: str) -> None:
        self.embeddings = embeddings
        self.layers = layers

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if len(args) > len(_POSITIONAL):
            raise TypeError(
                f"a model with fast weights takes at most {len(_POSITIONAL)} positional arguments "
                f"({', '.join(_POSITIONAL)}), got {len(args)}: pass the others by name"
            )
        kwargs = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
        refuse_cache(kwargs)
        kwargs["use_cache"] = False
        embeddings = None
        if self.embeddings is not None:
            embeddings = self._embed(model, kwargs)
        valid, cu_seqlens = read_layout(kwargs)
        if not (valid is None and cu_seqlens is None and embeddings is None):
            kwargs[KWARG] = BatchFacts(valid, cu_seqlens, embeddings)
        return (), kwargs

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
    """On every layer's attention, which must not see our kwarg; hands it to the layer's MLP.

    `mlp` is None in layers without fast weights.
    """

    def __init__(self, mlp: nn.Module | None) -> None:
        self.mlp = mlp

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        facts = kwargs.pop(KWARG, None)
        if self.mlp is not None:
            hand_over(self.mlp, facts)
        return args, kwargs


def refuse_cache(kwargs: dict) -> None:
    """Rather than compute something else: what has been written cannot be carried along yet."""
    if kwargs.get("past_key_values") is not None:
        raise NotImplementedError(f"{_NO_CACHE} (past_key_values was given)")
    if kwargs.get("use_cache"):
        raise NotImplementedError(f"{_NO_CACHE} (use_cache=True was given)")
    if kwargs.get("cache") is not None:
        raise NotImplementedError(f"{_NO_CACHE} (cache was given: continuous batching)")


def read_layout(kwargs: dict) -> tuple[Tensor | None, Tensor | None]:
    """(valid [B, T], cu_seqlens [S + 1]) of a call to the inner model; both None for dense rows.

    Padding comes from a 2D attention_mask, packing from cu_seq_lens_q or, without a mask, from
    position_ids that do not count on by one (the rule of transformers' own block-diagonal mask).
    Costs one host synchronisation where a mask or position_ids are given, none under torch.compile.
    """
    embeddings = kwargs.get("inputs_embeds")
    shape = tuple((kwargs["input_ids"] if embeddings is None else embeddings).shape[:2])
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if mask is not None:
        _check_mask(mask, shape, packed=cu_seqlens is not None)
        valid = mask.bool()
        if torch.compiler.is_compiling():
            return valid, None
        return (None, None) if bool(valid.all()) else (valid, None)
    if cu_seqlens is not None:
        return None, cu_seqlens
    if positions is None:
        return None, None
    return None, _packed_boundaries(positions, shape)


def _check_mask(mask: object, shape: tuple[int, int], packed: bool) -> None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"{mask.dim()}D" if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            "attention_mask must be None or 2D [B, T] for a model with fast weights, because where "
            f"padding lies cannot be read from others, got {got}"
        )
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask must have shape [B, T] = {shape} to match the tokens, "
            f"got {tuple(mask.shape)}"
        )
    if packed:
        raise ValueError(
            "attention_mask must be None with cu_seq_lens_q, which packs without padding"
        )


def _packed_boundaries(positions: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """int64 [S + 1] over the flattened batch, or None where no row holds more than one sequence."""
    if positions.dim() != 2:
        raise ValueError(
            f"position_ids must have shape [B, T] = {shape}, got {tuple(positions.shape)}"
        )
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "under torch.compile, packing cannot be read from position_ids: pass cu_seq_lens_q for "
            "packed rows, an attention_mask for padded ones, or no position_ids for dense ones"
        )
    batch, length = shape
    positions = positions.expand(batch, length)
    restart = torch.ones(shape, dtype=torch.bool, device=positions.device)
    restart[:, 1:] = positions.diff(dim=1) != 1
    starts = restart.flatten().nonzero().flatten()
    if starts.numel() <= batch:
        return None
    return torch.cat([starts, starts.new_tensor([batch * length])])


def _checkpoints_reentrantly(layer: nn.Module) -> bool:
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant", True)
