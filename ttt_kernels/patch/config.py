"""`TTTConfig`: which layers carry fast weights, how they write, and how a config stores that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ttt_kernels.modules.rule import WriteRule, require_choice, require_int

PROJ_INITS = ("diag_shared", "small", "identity")
PREFIX = "ttt_"

# The released names. The In-Place TTT release writes only the first six; TTT-NTP adds the others.
_SHARED_FIELDS = ("ttt_mode", "ttt_layers", "ttt_chunk", "ttt_lr", "ttt_proj", "ttt_target")
_NTP_FIELDS = (
    "ttt_inner_opt", "ttt_norm_preserve", "ttt_proj_init", "ttt_conv", "ttt_predict_mode",
)  # fmt: skip
# Ours, for what the released format cannot say.
_OWN_FIELDS = ("ttt_max_norm", "ttt_horizon")
HF_FIELDS = (*_SHARED_FIELDS, *_NTP_FIELDS, *_OWN_FIELDS)
_REQUIRED = ("ttt_mode", "ttt_layers", "ttt_chunk", "ttt_lr")


@dataclass(frozen=True, kw_only=True)
class TTTConfig(WriteRule):
    """Which layers of a model carry fast weights, and how all of them write.

    Args:
        layers: indices of decoder layers, each once, in any order (kept sorted). `patch_model`
            checks that the model has them.
        proj_init: how a new P starts. "diag_shared": N(0, 0.02^2) on the diagonal, the same in
            every layer. "small": dense N(0, (0.02 / sqrt(D))^2). "identity". None stands for
            "diag_shared", and is the only choice without P (`use_proj=False`).
        chunk_size, lr, inner_optimizer, max_norm, preserve_row_norm, target, target_source,
            horizon, use_proj: as in `WriteRule`.

    Raises:
        TypeError, ValueError: an unknown field, a field of the wrong type or value, or fields that
            contradict; the message names the field, what it may be and what came.
    """

    layers: tuple[int, ...]
    proj_init: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        if self.use_proj:
            object.__setattr__(self, "proj_init", self.proj_init or "diag_shared")
            require_choice("proj_init", self.proj_init, PROJ_INITS)
        elif self.proj_init is not None:
            raise ValueError(
                f"proj_init needs use_proj=True and must be None without, got {self.proj_init!r}"
            )

    @classmethod
    def recipe(cls, name: str) -> TTTConfig:
        """The released settings of a backbone.

        TTT-NTP: "llama-3.1-8b", "mistral-7b-v0.3", "qwen3-4b", "qwen3-0.6b". In-Place TTT:
        "llama-3.1-8b-in-place" (without layer 36, which the released list names and the model does
        not have).

        For Qwen3-4B the release contradicts itself: the checkpoint's config says specnorm without
        row-norm preservation, its README (and the paper) sgd with it. This is the config's version;
        `dataclasses.replace(cfg, inner_optimizer="sgd", preserve_row_norm=True)` is the other.
        """
        if name not in _RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(_RECIPES)}, got {name!r}")
        return cls(**_RECIPES[name])

    @classmethod
    def from_hf_config(cls, hf_config: object) -> TTTConfig:
        """Read the `ttt_*` fields of a transformers config (or of a mapping such as config.json).

        A config with none of the fields only TTT-NTP writes (`ttt_conv`, `ttt_predict_mode`,
        `ttt_inner_opt`, `ttt_norm_preserve`, `ttt_proj_init`) is an In-Place TTT one: its release
        always convolves. `ttt_layers` may be a list or its JSON string.

        Raises:
            ValueError: an unknown or missing `ttt_*` field, `ttt_mode` not true, or a bad value.
        """
        fields = _hf_fields(hf_config)
        in_place = not any(name in fields for name in _NTP_FIELDS)
        conv = fields.get("ttt_conv", in_place)
        if not isinstance(conv, bool):
            raise TypeError(f"ttt_conv must be true or false, got {conv!r}")
        mode = fields.get("ttt_predict_mode")
        if mode not in (None, "next") or (conv and mode is not None):
            raise ValueError(
                f'ttt_predict_mode must be "next" without ttt_conv and absent with it, got {mode!r}'
            )
        return cls(
            layers=_parsed_layers(fields["ttt_layers"]),
            chunk_size=fields["ttt_chunk"],
            lr=fields["ttt_lr"],
            inner_optimizer=fields.get("ttt_inner_opt", "sgd"),
            max_norm=fields.get("ttt_max_norm"),
            preserve_row_norm=fields.get("ttt_norm_preserve", False),
            target="conv" if conv else "next_token",
            target_source=fields.get("ttt_target", "hidden_states"),
            horizon=fields.get("ttt_horizon", 1),
            use_proj=fields.get("ttt_proj", True),
            proj_init=fields.get("ttt_proj_init"),
        )

    def to_hf_fields(self) -> dict[str, object]:
        """The `ttt_*` fields for a model config; `from_hf_config` reads them back exactly."""
        fields: dict[str, object] = {
            "ttt_mode": True,
            "ttt_layers": list(self.layers),
            "ttt_chunk": self.chunk_size,
            "ttt_lr": self.lr,
            "ttt_inner_opt": self.inner_optimizer,
            "ttt_norm_preserve": self.preserve_row_norm,
            "ttt_proj": self.use_proj,
            "ttt_conv": self.target == "conv",
            "ttt_target": self.target_source,
        }
        optional = {
            "ttt_proj_init": self.proj_init,
            "ttt_predict_mode": "next" if self.target == "next_token" else None,
            "ttt_max_norm": self.max_norm,
            "ttt_horizon": None if self.horizon == 1 else self.horizon,
        }
        return fields | {name: value for name, value in optional.items() if value is not None}


def _checked_layers(layers: object) -> tuple[int, ...]:
    if isinstance(layers, (str, bytes)) or not hasattr(layers, "__iter__"):
        raise TypeError(f"layers must be a sequence of layer indices, got {layers!r}")
    layers = tuple(layers)
    if not layers:
        raise ValueError("layers must name at least one layer, got none")
    for layer in layers:
        require_int("layers", layer, minimum=0)
    if len(set(layers)) != len(layers):
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        raise ValueError(f"layers must name each layer once, got {twice} more than once")
    return tuple(sorted(layers))


def _parsed_layers(layers: object) -> object:
    if not isinstance(layers, str):
        return layers
    try:
        return json.loads(layers)
    except json.JSONDecodeError as error:
        raise ValueError(f"ttt_layers must be a list or its JSON text, got {layers!r}") from error


def _hf_fields(hf_config: object) -> dict[str, object]:
    """The config's own `ttt_*` fields, names and `ttt_mode` checked."""
    source = hf_config if isinstance(hf_config, Mapping) else vars(hf_config)
    fields = {name: value for name, value in source.items() if name.startswith(PREFIX)}
    unknown = sorted(set(fields) - set(HF_FIELDS))
    if unknown:
        raise ValueError(
            f"unknown field(s) {', '.join(unknown)} in the model config; "
            f"known are {', '.join(HF_FIELDS)}"
        )
    missing = [name for name in _REQUIRED if fields.get(name) is None]
    if missing:
        raise ValueError(f"the model config must have {', '.join(_REQUIRED)}; missing: "
                         f"{', '.join(missing)}")  # fmt: skip
    if fields["ttt_mode"] is not True:
        raise ValueError(
            f"ttt_mode must be true for a model with fast weights, got {fields['ttt_mode']!r}"
        )
    return fields


_EVERY_SIXTH = (0, 6, 12, 18, 24, 30)
_RECIPES: dict[str, dict] = {
    "llama-3.1-8b": dict(
        layers=_EVERY_SIXTH, chunk_size=1024, lr=0.3, inner_optimizer="specnorm",
        preserve_row_norm=True, proj_init="small",
    ),
    "mistral-7b-v0.3": dict(
        layers=_EVERY_SIXTH, chunk_size=1024, lr=0.15, preserve_row_norm=True,
        proj_init="diag_shared",
    ),
    "qwen3-4b": dict(
        layers=_EVERY_SIXTH, chunk_size=1024, lr=3.0, inner_optimizer="specnorm",
        proj_init="diag_shared",
    ),
    "qwen3-0.6b": dict(
        layers=(0, 4, 8, 12, 16, 20, 24), chunk_size=1024, lr=2.6, preserve_row_norm=True,
        proj_init="diag_shared",
    ),
    "llama-3.1-8b-in-place": dict(
        layers=_EVERY_SIXTH, chunk_size=4096, lr=3.0, target="conv", proj_init="diag_shared",
    ),
}  # fmt: skip
