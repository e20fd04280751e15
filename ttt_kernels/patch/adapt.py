"""`adapt`: one closed-form write per prompt, which a cache carries for as long as a block lasts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ttt_kernels.modules.diagnostics import Diagnostics
from ttt_kernels.modules.facts import BatchFacts
from ttt_kernels.modules.frozen import FrozenWeight, frozen_row
from ttt_kernels.modules.layer_state import LayerState, WriteRecord
from ttt_kernels.modules.mlp import FastWeightMLP
from ttt_kernels.modules.sharding import is_sharded
from ttt_kernels.modules.state import FastWeightState
from ttt_kernels.ops.ridge.api import RidgeWrite, ridge_write, ridge_write_from_outputs
from ttt_kernels.ops.ridge.registration import ridge_dtype
from ttt_kernels.patch.families import find_decoder
from ttt_kernels.patch.hooks import KWARG, disabled, model_hook

_OURS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "past_key_values", "use_cache")
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
_EXPANDING = ("num_beams", "num_return_sequences")  # rows per prompt; a filled cache is not expanded
_READ = _ASSISTED + _EXPANDING


@contextmanager
def adapt(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    lam: float = 1.0,
    eta: float = 0.1,
    cap: float | None = 0.1,
    last_k: int | None = 8192,
    shift: int | None = None,
    preserve_row_norm: bool = True,
) -> Iterator[Adapted]:
    """Adapt a patched model to prompts in closed form, for the time of a block.

        with ttt_kernels.adapt(model, ids) as adapted:
            y = adapted.generate(max_new_tokens=64)

    One plain forward over the prompts (fast weights off) fills a key/value cache, and on the way each
    patched layer's weight is fitted by `ridge_write` to that layer's own keys and inputs, prompt by
    prompt. Decoding goes on from that cache without the prompt's last token, which is read again with
    the adapted weights; they stay as they are from then on.

    No parameter is modified: the weights are per-request state of the block's own cache. Other calls
    of the model, inside and after, are what they always were, however the block ends; blocks may be
    nested and repeated. Once it has ended, its cache and copies of it raise where they are continued.

    Args:
        model: patched by `patch_model`, in eval mode.
        input_ids: prompts [B, T].
        attention_mask: [B, T], 0 at padding, which may lie anywhere in a row. None: no padding.
        lam, eta, cap, last_k, preserve_row_norm: as in `ridge_write`, whatever the configuration
            says of writes chunk by chunk.
        shift: as in `ridge_write`; None: the configuration's `horizon`.

    Returns:
        On entry, an `Adapted`.

    Precision: as `ridge_write`, and `fast_weight_apply` in decoding.
    Cost: one forward without its vocabulary projection, and one `ridge_write` per patched layer. Only
        one layer's keys are held at a time; 4 D F bytes per prompt and patched layer stay (8 D F in
        float64).
    Limits: no gradient flows into the adapted weights.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; a model that is not
            patched, or in training mode; a prompt without tokens.
        NotImplementedError: the configuration's target is not `next_token` of `hidden_states`, for
            which the closed form is not defined; an adapter around down_proj.

    Source: TTT-NTP (arXiv 2606.21803), section 3.4.
    """
    decoder, _ = find_decoder(model)
    mlps = model_hook(model).mlps
    _check_model(decoder, mlps)
    prompts = Prompts.of(input_ids, attention_mask)
    options = {
        "lam": lam, "eta": eta, "cap": cap, "last_k": last_k, "shift": shift,
        "preserve_row_norm": preserve_row_norm,
    }  # fmt: skip
    state = FastWeightState.for_model(model)
    fits = {mlp: Fit(state.layers[i], prompts, options) for i, mlp in mlps.items()}
    cache = _read_plainly(model, prompts, fits)
    adapted = Adapted(model, prompts, cache, state, fits.values())
    try:
        yield adapted
    finally:
        adapted._close()


class Adapted:
    """Prompts and the weights fitted to them. Valid inside the `adapt` block that made it.

    Attributes:
        input_ids, attention_mask: [B, T] the prompts, their tokens moved to the end of their rows.
        past_key_values: the cache of all their tokens but the last; calling the model with it moves it
            on. `generate` and `logits` start from the prompts every time and leave it alone.
        state: the adapted weights and their reports; a `FastWeightState`.
        etas: step size used, per layer and prompt.
        deltas: ||delta|| / ||w0|| of the minimiser, per layer and prompt.
    """

    def __init__(self, model: nn.Module, prompts: Prompts, cache, state, fits) -> None:
        self.model = model
        self.input_ids, self.attention_mask = prompts.input_ids, prompts.attention_mask
        self.state = state
        fits = list(fits)
        self.etas = {i: fit.etas for i, fit in zip(state.layers, fits, strict=True)}
        self.deltas = {i: fit.deltas for i, fit in zip(state.layers, fits, strict=True)}
        self._weights = [fit.weight for fit in fits]
        self._prompt = cache

    @cached_property
    def past_key_values(self):
        cache = self._fresh()
        for layer in cache.layers:  # in the caller's hands: some operations write in place
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        return cache

    def generate(self, **options) -> Tensor:
        """`model.generate` from the prompts, with any of its options that concern decoding.

        Returns:
            What `generate` returns: the prompts as in `input_ids`, then the new tokens.

        Raises:
            TypeError: an option that the prompts bring (`input_ids`, `attention_mask`, the cache).
            NotImplementedError: assisted decoding.
        """
        taken = sorted(options.keys() & set(_OURS))
        if taken:
            raise TypeError(f"options must not hold what the prompts bring, got {', '.join(taken)}")
        config = options.get("generation_config") or self.model.generation_config
        wanted = {name: options.get(name, getattr(config, name, None)) for name in _READ}
        assisted = [name for name in _ASSISTED if wanted[name]]
        if assisted:
            raise NotImplementedError(
                "assisted decoding cannot go on from a filled cache (transformers 5 reads the prompt "
                f"twice), got {', '.join(assisted)}"
            )
        cache = self._fresh(max(wanted[name] or 1 for name in _EXPANDING))
        return self.model.generate(
            input_ids=self.input_ids, attention_mask=self.attention_mask, past_key_values=cache,
            **options,
        )  # fmt: skip

    def logits(self, continuation: Tensor | None = None) -> Tensor:
        """Next-token logits [B, 1 + N, V] after the prompts and each token of `continuation` [B, N]."""
        ids, mask = self.input_ids[:, -1:], self.attention_mask
        if continuation is not None:
            _check_ids("continuation", continuation, len(ids))
            ids = torch.cat([ids, continuation], 1)
            mask = torch.cat([mask, torch.ones_like(continuation)], 1)
        positions = _positions(mask)[:, -ids.shape[1] :]
        cache = self._fresh()
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits

    def __str__(self) -> str:
        return str(Diagnostics.of(self.state))

    def _fresh(self, rows_per_prompt: int = 1):
        """A cache that stands before the prompts' last token. Tensors are shared: none is written in
        place."""
        if self._prompt is None:
            raise RuntimeError("the adapt() block has ended, and its weights with it: open a new one")
        cache, state = copy.copy(self._prompt), self.state.clone()
        cache.layers = [copy.copy(layer) for layer in self._prompt.layers]
        if rows_per_prompt > 1:
            cache.batch_repeat_interleave(rows_per_prompt)
            state.repeat(rows_per_prompt)
        state.attach(cache)
        return cache

    def _close(self) -> None:
        for weight in self._weights:
            weight.close()
        self._prompt = None


@dataclass(frozen=True)
class Prompts:
    """A batch padded on the left: input_ids and attention_mask [B, T], real tokens of each row."""

    input_ids: Tensor
    attention_mask: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None) -> Prompts:
        """From padding anywhere, so that the last column holds the last token of every row."""
        _check_ids("input_ids", input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
            shape = getattr(attention_mask, "shape", None)
            got = type(attention_mask).__name__ if shape is None else tuple(shape)
            raise ValueError(
                f"attention_mask must have shape [B, T] = {tuple(input_ids.shape)} like input_ids, "
                f"got {got}"
            )
        valid = attention_mask.bool()
        lengths = valid.sum(1).tolist()
        if min(lengths, default=0) == 0:
            raise ValueError(f"every prompt must have at least one token, got lengths {lengths}")
        order = valid.to(torch.uint8).argsort(dim=1, stable=True)[:, -max(lengths) :]
        mask = valid.gather(1, order).to(torch.long)
        return cls(input_ids.gather(1, order), mask, lengths)

    def split(self, x: Tensor) -> list[Tensor]:
        """The tokens of each row of x [B, T, N]; views."""
        return [row[-length:] for row, length in zip(x, self.lengths, strict=True)]


class Fit:
    """Sees what one layer reads in the plain forward, and leaves the write in the layer's state."""

    def __init__(self, state: LayerState, prompts: Prompts, options: dict) -> None:
        self.state, self.prompts, self.options = state, prompts, options

    def __call__(self, mlp: FastWeightMLP, x: Tensor, z: Tensor, y: Tensor) -> None:
        """x [B, T, D], z [B, T, F] and y [B, T, D] of the layer."""
        w0, down = mlp.slow_weight.detach(), mlp.down_proj
        usable = down.bias is None and not (down._forward_hooks or down._forward_pre_hooks)  # y is z w0^T
        z, y = self.prompts.split(z), self.prompts.split(y)
        shift = self.options["shift"]
        options = {**self.options, "shift": mlp.rule.horizon if shift is None else shift}

        def write(x: Tensor, proj: Tensor | None) -> RidgeWrite:
            x = self.prompts.split(x)
            if usable and y[0].dtype == ridge_dtype(z, x, w0, proj):
                return ridge_write_from_outputs(z, x, y, w0, proj, **options)
            return ridge_write(z, x, w0, proj, **options)

        self._keep(write(x, None) if mlp.ttt_proj is None else mlp.ttt_proj(x, write), w0)

    def _keep(self, write: RidgeWrite, w0: Tensor) -> None:
        norm = torch.linalg.vector_norm
        w0 = w0.to(write.weight.dtype)
        size = norm(w0)
        drift = torch.stack([norm(weight - w0) for weight in write.weight]) / size
        self.etas = write.eta.tolist()
        self.deltas = (norm(write.delta, dim=(1, 2)) / size).tolist()
        self.weight = FrozenWeight(write.weight)
        self.state.rows = [
            frozen_row(
                self.weight, b, length - 1,
                WriteRecord(length, eta, eta * delta, moved, refused=False),
            )
            for b, (length, eta, delta, moved) in enumerate(
                zip(self.prompts.lengths, self.etas, self.deltas, drift.tolist(), strict=True)
            )
        ]  # fmt: skip


def _read_plainly(model: nn.Module, prompts: Prompts, fits: Mapping[nn.Module, Fit]):
    """The cache of the prompts without their last token; every layer's `fits` has been called."""
    from transformers import DynamicCache

    decoder, _ = find_decoder(model)
    cache = DynamicCache()  # full length in every layer: sliding windows could not be cropped
    padded = min(prompts.lengths) < prompts.input_ids.shape[1]
    with torch.no_grad(), disabled(model):
        decoder(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask if padded else None,
            position_ids=_positions(prompts.attention_mask),
            past_key_values=cache,
            use_cache=True,
            **{KWARG: BatchFacts(disabled=True, observe=lambda mlp, *seen: fits[mlp](mlp, *seen))},
        )
    cache.crop(-1)
    return cache if cache.get_seq_length() else DynamicCache()  # keys of no tokens are not expanded


def _check_model(decoder: nn.Module, mlps: Mapping[int, FastWeightMLP]) -> None:
    if decoder.training:
        raise ValueError("model must be in eval mode, got one in training mode: call model.eval()")
    for i, mlp in mlps.items():
        rule = mlp.rule
        if (rule.target, rule.target_source) != ("next_token", "hidden_states"):
            raise NotImplementedError(
                'the closed-form write is defined for target="next_token" of '
                f'target_source="hidden_states", got "{rule.target}" of "{rule.target_source}"'
            )
        if is_sharded(mlp.slow_weight):
            raise NotImplementedError(
                f"layer {i}: down_proj.weight must be whole for the closed-form write, got a DTensor"
            )
        if hasattr(mlp.down_proj, "base_layer"):
            raise NotImplementedError(
                f"layer {i}: down_proj carries an adapter, which the closed-form write cannot see: "
                "merge it first"
            )


def _check_ids(name: str, ids: object, batch: int | None = None) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor [B, T], got {got}")
    if batch is not None and len(ids) != batch:
        raise ValueError(f"{name} must have one row per prompt, {batch}, got {len(ids)}")


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
