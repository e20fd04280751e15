"""States in files: safetensors, with everything that is not a tensor as JSON in the metadata."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ttt_kernels.modules.rule import WriteRule

if TYPE_CHECKING:
    from ttt_kernels.modules.state import FastWeightState, Row

FORMAT = "ttt_kernels.state"
VERSION = 1
COUNTERS = ("position", "fill", "writes", "refused")


def save(state: FastWeightState, path: str | os.PathLike) -> None:
    """`layers.<i>.w0` (a sample) and `layers.<i>.rows.<b>.{weight,scale,keys,inputs}`."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    layers = {}
    for i, layer in state.layers.items():
        tensors[f"layers.{i}.w0"] = layer.signature.sample
        for b, row in enumerate(layer.rows):
            tensors |= _row_tensors(f"layers.{i}.rows.{b}.", row)
        layers[i] = {
            "rule": asdict(layer.signature.rule),
            "shape": layer.signature.shape,
            "rows": [{name: getattr(row, name) for name in COUNTERS} for row in layer.rows],
        }
    metadata = {"format": FORMAT, "version": str(VERSION), "layers": json.dumps(layers)}
    tensors = {name: t.detach().cpu().clone() for name, t in tensors.items()}
    save_file(tensors, os.fspath(path), metadata)


def _row_tensors(prefix: str, row: Row) -> dict[str, Tensor]:
    parts = {}
    if row.weight is not None:
        parts |= dict(zip(("weight", "scale"), map(row.weight.__getitem__, range(len(row.weight.tensors))), strict=False))
    if row.fill:
        parts |= {"keys": row.chunk[0][: row.fill], "inputs": row.chunk[1][: row.fill]}
    return {prefix + name: t for name, t in parts.items()}


def load(empty: FastWeightState, path: str | os.PathLike, model: nn.Module) -> FastWeightState:
    """Fill `empty`, the state of `model`."""
    from safetensors import safe_open

    from ttt_kernels.modules.state import FastWeightState, LayerSignature, LayerState

    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"path must be a safetensors file, got {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path must hold a saved FastWeightState, got another file: {path}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"path must hold format version {VERSION}, got version {metadata.get('version')}: {path}"
        )
    known = {f.name for f in fields(WriteRule)}
    found = {}
    for name, layer in json.loads(metadata["layers"]).items():
        rule = WriteRule(**{k: v for k, v in layer["rule"].items() if k in known})
        sample = tensors[f"layers.{name}.w0"]
        found[int(name)] = LayerState(LayerSignature(rule, tuple(layer["shape"]), sample))
        found[int(name)].saved = layer["rows"]
    loaded = FastWeightState(found)
    loaded.check(empty)
    return loaded
