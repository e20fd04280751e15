"""Where the sequences of a call lie: read from the arguments of the inner model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ttt_kernels.modules.facts import BatchFacts

PROMPT_MASK = "fast_weight_prompt_mask"  # attribute of a cache that `generate` made


def read_layout(kwargs: dict) -> BatchFacts:
    """Padding and packing of the tokens of this call.

    Padding comes from a 2D attention_mask, of which a call with a cache brings the past too; packing
    from cu_seq_lens_q or, without a mask, from position_ids that do not count on by one (the rule of
    transformers' own block-diagonal mask). Costs one host synchronisation where a mask or position_ids
    are given, none under torch.compile.
    """
    embeddings = kwargs.get("inputs_embeds")
    shape = tuple((kwargs["input_ids"] if embeddings is None else embeddings).shape[:2])
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    positions, cu_seqlens = kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q")
    if cache is not None and (isinstance(mask, dict) or getattr(mask, "ndim", 0) == 4):
        valid = _prompt_padding(cache, positions, shape)
        if valid is not None:
            return _padding(valid) if valid.numel() else BatchFacts()
    if mask is not None:
        _check_mask(mask, shape, packed=cu_seqlens is not None)
        return _padding(_present(mask, shape, cache).bool())
    if cu_seqlens is None and positions is not None and (cache is None or shape[1] > 1):
        cu_seqlens = _packed_boundaries(positions, shape)
    if cu_seqlens is not None and (cache is not None or kwargs.get("use_cache")):
        raise NotImplementedError(
            "packed rows cannot stream: a cache row is one request. Call with use_cache=False, or "
            "pad the requests"
        )
    return BatchFacts(cu_seqlens=cu_seqlens)


def _padding(valid: Tensor) -> BatchFacts:
    if torch.compiler.is_compiling():
        return BatchFacts(valid)
    lengths = valid.sum(1).tolist()
    if all(n == valid.shape[1] for n in lengths):
        return BatchFacts()
    return BatchFacts(valid, lengths=lengths)


def _present(mask: Tensor, shape: tuple[int, int], cache: object) -> Tensor:
    """The columns of this call: the last T of a mask over past and present."""
    past = 0 if cache is None else int(cache.get_seq_length())
    batch, length = shape
    if tuple(mask.shape) != (batch, past + length):
        expected = "[B, T]" if not past else "[B, past + T]"
        raise ValueError(
            f"attention_mask must have shape {expected} = {(batch, past + length)} to match the "
            f"tokens, got {tuple(mask.shape)}"
        )
    return mask[:, past:]


def _prompt_padding(cache: object, positions: Tensor | None, shape: tuple) -> Tensor | None:
    """Valid tokens, where `generate` hands over only what it made of its 2D mask (static caches).

    From the mask that `PrepareCache` kept; else from position_ids: padding is before the last position
    0 of a row, in the first call only. None: unknown; empty: all are.
    """
    past = int(cache.get_seq_length())
    prompt = getattr(cache, PROMPT_MASK, None)
    if prompt is not None:
        known = prompt[:, past : past + shape[1]].bool()
        known = known.repeat_interleave(shape[0] // len(prompt), 0)
        return known if known.shape[1] in (0, shape[1]) else functional.pad(
            known, (0, shape[1] - known.shape[1]), value=True
        )  # fmt: skip
    if positions is None:
        return None
    if past:
        return positions.new_empty(0)
    columns = torch.arange(shape[1], device=positions.device)
    return columns >= ((positions.expand(shape) == 0) * columns).amax(1, keepdim=True)


def _check_mask(mask: object, shape: tuple[int, int], packed: bool) -> None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"{mask.dim()}D" if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            "attention_mask must be None or 2D [B, T] for a model with fast weights, because where "
            f"padding lies cannot be read from others, got {got}"
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
