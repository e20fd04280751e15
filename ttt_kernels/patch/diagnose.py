"""`diagnostics`: of a model reading a text, or of what a state has recorded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttt_kernels.modules.diagnostics import Diagnostics
from ttt_kernels.modules.state import FastWeightState
from ttt_kernels.patch.families import find_decoder
from ttt_kernels.patch.hooks import model_hook


def diagnostics(
    model_or_state: object, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Diagnostics:
    """How large the writes of fast weights are, and how far the weights drift.

        print(ttt_kernels.diagnostics(model, ids))      # reads ids, recording

        state = ttt_kernels.FastWeightState.for_model(model)
        state.record_writes()                           # or: what generate() does, recording
        state.attach(cache)
        model.generate(ids, past_key_values=cache)
        print(ttt_kernels.diagnostics(cache))

    Per layer, request and complete chunk: the relative write ||s dW|| / ||W||, the drift
    ||W - w0|| / ||w0|| after it (Frobenius norms; of the raw weight, before row norms are restored),
    the step size s, and whether the write was refused because it was not finite.

    Args:
        model_or_state: a patched model in eval mode, which then reads `input_ids` once; or a
            `FastWeightState`, or the transformers cache it lives with, for what was recorded.
        input_ids, attention_mask: [B, T], with a model only.

    Returns:
        Diagnostics: `str()` is a table, `.rows` plain data, `.plot(path)` draws a picture.

    Cost: recording copies the weight at each write, and computes three norms of it.
    Raises:
        TypeError, ValueError: neither, or a model without `input_ids` [B, T], in training mode, disabled or
            not patched.
    """
    if isinstance(model_or_state, nn.Module):
        if input_ids is None:
            raise TypeError("input_ids must be given with a model: the text that it is to read")
        return Diagnostics.of(_recorded(model_or_state, input_ids, attention_mask))
    if input_ids is not None or attention_mask is not None:
        raise TypeError("input_ids and attention_mask need a model, got a state or cache with them")
    if isinstance(model_or_state, FastWeightState):
        return Diagnostics.of(model_or_state)
    if not hasattr(model_or_state, "get_seq_length"):
        raise TypeError(
            "model_or_state must be a patched model, a FastWeightState or a transformers cache, "
            f"got {type(model_or_state).__name__}"
        )
    return Diagnostics.of(FastWeightState.of(model_or_state))


def _recorded(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> FastWeightState:
    from transformers import DynamicCache

    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        got = getattr(input_ids, "shape", None)
        got = type(input_ids).__name__ if got is None else tuple(got)
        raise ValueError(f"input_ids must be a tensor [B, T], got {got}")
    decoder, _ = find_decoder(model)
    if model_hook(model).is_disabled():
        raise ValueError("model must not be disabled: its fast weights would write nothing")
    if decoder.training:
        raise ValueError("model must be in eval mode, got one in training mode: call model.eval()")
    state, cache = FastWeightState.for_model(model), DynamicCache()
    state.record_writes()
    state.attach(cache)
    positions = None
    if attention_mask is not None:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
    return state
