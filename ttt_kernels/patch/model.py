"""`patch_model` and `unpatch_model`: fast weights in and out of a transformers model, in place."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ttt_kernels.modules.facts import drop_hand_over
from ttt_kernels.modules.mlp import (
    FastWeightMLP,
    TargetWeight,
    read_and_write,
    replace_slow_linear,
    slow_linear,
)
from ttt_kernels.modules.sharding import is_fsdp_module, is_sharded
from ttt_kernels.patch.cache import generating, install_prepare, remove_prepare
from ttt_kernels.patch.config import PREFIX, TTTConfig
from ttt_kernels.patch.families import Family, find_decoder, has_class
from ttt_kernels.patch.hooks import AttentionHook, ModelHook, model_hook
from ttt_kernels.types import compute_dtype

INIT_STD = 0.02
INIT_SEED = 1234567
_ATTRIBUTE = "_ttt_patch"


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` did.

    Args:
        family: row of the family table.
        config: the configuration in force.
        num_layers: decoder layers of the model; `config.layers` of them carry fast weights.
        hidden_size, intermediate_size: D and F of each fast weight [D, F].
        dtype: of the slow weights, and of the added parameters.
        parameters_added: elements of all `ttt_proj` and `ttt_conv` weights together.
        state_bytes: fast-weight state of one sequence, all layers together (float32; float64 for a
            float64 model). The backward and each packed sequence hold one per layer at a time.
    """

    family: str
    config: TTTConfig
    num_layers: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    parameters_added: int
    state_bytes: int

    def __str__(self) -> str:
        c = self.config
        dtype = str(self.dtype).removeprefix("torch.")
        rows = (
            ("family", f"{self.family}, {dtype}"),
            ("layers", f"{', '.join(map(str, c.layers))} of {self.num_layers}"),
            ("fast weight", f"{self.hidden_size} x {self.intermediate_size} per layer"),
            ("write", f"every {c.chunk_size} tokens, {c.inner_optimizer}, lr {c.lr:g}"
                      + (f", max_norm {c.max_norm:g}" if c.max_norm is not None else "")),
            ("target", f"{c.target} of {c.target_source}"
                       + (f", horizon {c.horizon}" if c.horizon > 1 else "")
                       + (f", P starts {c.proj_init}" if c.use_proj else ", no P")),
            ("row norms", "preserved" if c.preserve_row_norm else "free"),
            ("parameters", f"{self.parameters_added:,} added"),
            ("state", f"{self.state_bytes / 2**20:.1f} MiB per sequence"),
        )  # fmt: skip
        return "\n".join(f"{name:<12}{value}" for name, value in rows)


@dataclass(eq=False)
class _Patch:
    """All that unpatching needs; kept on the inner model.

    The model gets a config of its own, since several may have been built from one.
    """

    family: Family
    originals: dict[int, tuple[nn.Module, nn.Linear]]
    config_before: object
    config: object
    report: PatchReport | None = None
    hooks: list = field(default_factory=list)
    configured: list[nn.Module] = field(default_factory=list)
    generating: list[nn.Module] = field(default_factory=list)


def patch_model(model: nn.Module, cfg: TTTConfig | None = None) -> PatchReport:
    """Give layers of a Llama, Mistral or Qwen3 model fast weights, in place.

    The MLP of each layer in `cfg.layers` is replaced by a `FastWeightMLP` that holds the same
    parameter objects; classes are untouched, other models are not affected, `state_dict` keys stay
    as they are and `layers.<i>.mlp.ttt_proj.weight` (and `ttt_conv.weight`) are added. Then:

    - padded batches (2D attention_mask) give each row what it gets alone; the MLP's output is 0 at
      padding. Packed rows (`cu_seq_lens_q`, or position_ids without a mask) start anew at each
      sequence;
    - gradient checkpointing, several threads, `torch.compile(fullgraph=True)`, adapters around the
      linear layers, copying and pickling work;
    - in eval mode fast weights stream: they live with the call's key/value cache (see
      `FastWeightState`), so `generate()`, with any cache and strategy that needs one, and decoding by
      hand continue where the cache stands. In training mode caches are not read.

    Args:
        model: a `*ForCausalLM`, the inner `*Model`, or a PEFT model around one.
        cfg: what to do; None reads the `ttt_*` fields of `model.config`. The fields are written to
            the model's config either way, so that saving the model keeps them; it becomes a copy,
            since other models may share it.

    Returns:
        What was done. Patching again with an equal `cfg` returns the same report and does nothing.

    Raises:
        TypeError, ValueError, RuntimeError: another family, layers that do not exist, a quantised
            down_proj, hooks, offloading or sharding already on the MLP, another configuration already
            in force. Nothing has been changed then.
    """
    decoder, family = find_decoder(model)
    if cfg is None:
        cfg = TTTConfig.from_hf_config(decoder.config)
    if not isinstance(cfg, TTTConfig):
        raise TypeError(f"cfg must be a TTTConfig or None, got {type(cfg).__name__}")
    patch: _Patch | None = decoder.__dict__.get(_ATTRIBUTE)
    if patch is not None:
        if patch.report.config != cfg:
            raise ValueError(
                f"cfg must equal the configuration already in force (call unpatch_model first), "
                f"{patch.report.config}, got {cfg}"
            )
        _install_around(model, decoder, patch)
        return patch.report
    _refuse_fsdp(model, "patch")
    layers = getattr(decoder, family.layers)
    originals = {i: _checked_mlp(layers, i, family) for i in _existing(cfg.layers, len(layers))}
    patch = _Patch(family, originals, decoder.config, _own_config(decoder.config, cfg))
    try:
        added = [_install_layer(decoder, patch, i, cfg) for i in originals]
        patch.report = _report(decoder, family, cfg, added)
        _install_hooks(decoder, patch)
        _install_around(model, decoder, patch)
    except BaseException:
        _remove(model, decoder, patch)
        raise
    decoder.__dict__[_ATTRIBUTE] = patch
    return patch.report


def unpatch_model(model: nn.Module) -> None:
    """Undo `patch_model`: the original MLP modules, bit for bit, and the config object of before.

    The slow weights are kept as they are now, training included, and so are adapters that were put
    around them since. The added parameters (`ttt_proj`, `ttt_conv`) are dropped: save them first if
    they have been trained. What was set in the config since is dropped with the copy that it is.

    Raises:
        ValueError: the model is not patched.
        RuntimeError: a patched MLP has been replaced, or given offloading hooks, since. Nothing has
            been changed then.
    """
    decoder, family = find_decoder(model)
    patch: _Patch | None = decoder.__dict__.get(_ATTRIBUTE)
    if patch is None:
        raise ValueError(f"model must have been patched by patch_model, got a plain {family.name}")
    _refuse_fsdp(model, "unpatch")
    for i in patch.originals:
        mlp = getattr(getattr(decoder, family.layers)[i], family.mlp)
        if not isinstance(mlp, FastWeightMLP):
            raise RuntimeError(
                f"layer {i} must hold its FastWeightMLP to be unpatched, got {type(mlp).__name__}"
            )
        if mlp.read_write is not read_and_write:
            raise RuntimeError(f"layer {i} must not be split over processes to be unpatched")
        if is_sharded(mlp.slow_weight):
            raise RuntimeError(f"layer {i}: down_proj.weight must be whole to be unpatched, got a DTensor")
        if hasattr(mlp.down_proj, "_hf_hook"):  # bound to the layer that is to be taken out
            raise RuntimeError(
                f"layer {i}: down_proj carries offloading hooks: remove them first "
                "(accelerate.hooks.remove_hook_from_submodules)"
            )
    _remove(model, decoder, patch)
    del decoder.__dict__[_ATTRIBUTE]


def patch_report(model: nn.Module) -> PatchReport | None:
    """What `patch_model` did to the model; None where it is not patched."""
    decoder, _ = find_decoder(model)
    patch: _Patch | None = decoder.__dict__.get(_ATTRIBUTE)
    return None if patch is None else patch.report


def _refuse_fsdp(model: nn.Module, verb: str) -> None:
    """Which parameters each module gathers and reduces is settled by `fully_shard`."""
    sharded = next((name for name, m in model.named_modules() if is_fsdp_module(m)), None)
    if sharded is not None:
        raise RuntimeError(
            f"model must not be sharded yet, got fully_shard on {sharded or 'the model'}: {verb} it "
            "before, since modules put in later would be left out of it"
        )


def _existing(wanted: tuple[int, ...], count: int) -> tuple[int, ...]:
    absent = [i for i in wanted if i >= count]
    if absent:
        raise ValueError(
            f"layers must be within 0..{count - 1}, the model has {count} decoder layers, "
            f"got {absent}"
        )
    return wanted


def _checked_mlp(layers: nn.ModuleList, i: int, family: Family) -> tuple[nn.Module, nn.Linear]:
    """Layer i's MLP and the linear layer that holds its W0; raises where it cannot be patched."""
    layer = layers[i]
    if not has_class(layer, family.layer_class):
        raise TypeError(f"layer {i} must be a {family.layer_class}, got {type(layer).__name__}")
    mlp = getattr(layer, family.mlp)
    if mlp._forward_hooks or mlp._forward_pre_hooks or hasattr(mlp, "_hf_hook"):
        raise RuntimeError(
            f"layer {i}: the MLP carries forward hooks (or offloading hooks), which replacing it "
            "would lose: patch the model before they are installed"
        )
    try:
        return mlp, slow_linear(mlp)
    except (TypeError, RuntimeError) as error:
        raise type(error)(f"layer {i}: {error}") from error


def _install_layer(decoder: nn.Module, patch: _Patch, i: int, cfg: TTTConfig) -> int:
    """Replace layer i's MLP; the number of parameters added."""
    mlp, _ = patch.originals[i]
    activation = None
    if not hasattr(mlp, "act_fn"):  # a class-level replacement (Liger) fuses the activation
        from transformers.activations import ACT2FN

        activation = ACT2FN[decoder.config.hidden_act]
    fast = FastWeightMLP(mlp, cfg, activation)
    fast.layer_index = i
    if fast.ttt_proj is not None:
        weight = fast.ttt_proj.weight
        if not weight.is_meta:  # a model that is to be loaded
            with torch.no_grad():
                weight.copy_(_initial_proj(cfg.proj_init, fast.hidden_size, i))
    setattr(getattr(decoder, patch.family.layers)[i], patch.family.mlp, fast)
    return sum(m.weight.numel() for m in fast.modules() if isinstance(m, TargetWeight))


def _initial_proj(kind: str, dim: int, layer: int) -> Tensor:
    """P [D, D] in float32 on the CPU, from generators of its own: the same on every machine."""
    if kind == "identity":
        return torch.eye(dim)
    if kind == "diag_shared":
        generator = torch.Generator().manual_seed(INIT_SEED)
        return torch.diag(INIT_STD * torch.randn(dim, generator=generator))
    generator = torch.Generator().manual_seed(INIT_SEED + layer)
    return INIT_STD / dim**0.5 * torch.randn(dim, dim, generator=generator)


def _report(decoder: nn.Module, family: Family, cfg: TTTConfig, added: list[int]) -> PatchReport:
    layers = getattr(decoder, family.layers)
    mlp = getattr(layers[cfg.layers[0]], family.mlp)
    dtype = getattr(mlp.down_proj, "base_layer", mlp.down_proj).weight.dtype
    size = mlp.hidden_size * mlp.intermediate_size * compute_dtype(dtype).itemsize
    return PatchReport(
        family=family.name,
        config=cfg,
        num_layers=len(layers),
        hidden_size=mlp.hidden_size,
        intermediate_size=mlp.intermediate_size,
        dtype=dtype,
        parameters_added=sum(added),
        state_bytes=size * len(cfg.layers),
    )


def _install_hooks(decoder: nn.Module, patch: _Patch) -> None:
    family, cfg = patch.family, patch.report.config
    layers = getattr(decoder, family.layers)
    embeddings = family.embeddings if cfg.target_source == "input_embed" else None
    mlps = {i: getattr(layers[i], family.mlp) for i in patch.originals}
    hook = ModelHook(embeddings, family.layers, mlps)
    patch.hooks.append(decoder.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
    patch.hooks.append(decoder.register_forward_hook(drop_hand_over, always_call=True))
    for i, layer in enumerate(layers):
        attention = getattr(layer, family.attention)
        own = AttentionHook(hook, i if i in mlps else None)
        patch.hooks.append(
            attention.register_forward_pre_hook(own, with_kwargs=True, prepend=True)
        )


def _install_around(model: nn.Module, decoder: nn.Module, patch: _Patch) -> None:
    """What concerns the modules around the decoder, as far as `model` reaches and is not done yet."""
    for module in model.modules():
        if vars(module).get("config") is patch.config_before:
            module.config = patch.config
            patch.configured.append(module)
    outer = generating(model)
    if outer is not None and not any(outer is done for done in patch.generating):
        install_prepare(outer, model_hook(decoder))
        patch.generating.append(outer)


def _remove(model: nn.Module, decoder: nn.Module, patch: _Patch) -> None:
    """Undo whatever part of `patch` is in place, whichever module it was installed through."""
    family = patch.family
    for hook in patch.hooks:
        hook.remove()
    for i, (mlp, linear) in patch.originals.items():
        layer = getattr(decoder, family.layers)[i]
        fast = getattr(layer, family.mlp)
        if isinstance(fast, FastWeightMLP):  # adapters may have been put around its parts
            mlp.gate_proj, mlp.up_proj, mlp.down_proj = fast.gate_proj, fast.up_proj, fast.down_proj
            mlp.training = linear.training = fast.training
            setattr(layer, family.mlp, mlp)
        replace_slow_linear(mlp, linear)
    for outer in patch.generating:
        remove_prepare(outer)
    for module in (*patch.configured, *model.modules()):
        if vars(module).get("config") is patch.config:
            module.config = patch.config_before


def _own_config(config: object, cfg: TTTConfig) -> object:
    own = copy.copy(config)
    for name in [name for name in vars(own) if name.startswith(PREFIX)]:
        delattr(own, name)
    for name, value in cfg.to_hf_fields().items():
        setattr(own, name, value)
    return own
