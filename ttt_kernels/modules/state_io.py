"""States in files: safetensors, with everything that is not a tensor as JSON in the metadata."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ttt_kernels.modules.frozen import is_frozen
from ttt_kernels.modules.layer_state import LayerSignature, LayerState, Row, Slot
from ttt_kernels.modules.rule import WriteRule

if TYPE_CHECKING:
    from ttt_kernels.modules.state import FastWeightState

FORMAT = "ttt_kernels.state"
VERSION = 1
COUNTERS = ("position", "fill", "writes", "refused")


def save(state: FastWeightState, path: str | os.PathLike) -> None:
    """`layers.<i>.w0` (a sample) and `layers.<i>.rows.<b>.{weight,scale,keys,inputs}`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    layers = {}
    if any(is_frozen(row) for layer in state.layers.values() for row in layer.rows):
        raise ValueError("the state of an adapt() block cannot be saved: it ends with its block")
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
    if os.path.isdir(path):
        raise IsADirectoryError(f"path must be a file, got a folder: {path}")
    folder = os.path.dirname(os.fspath(path)) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"path must be in a folder that exists, got {path}")
    try:
        save_file(tensors, os.fspath(path), metadata)
    except SafetensorError as error:
        raise OSError(f"path cannot be written, got {path}: {error}") from error


def _row_tensors(prefix: str, row: Row) -> dict[str, Tensor]:
    parts = {}
    if row.writes:
        names = ("weight", "scale")[: len(row.weight.tensors)]
        parts |= {name: row.weight[part] for part, name in enumerate(names)}
    if row.fill:
        parts |= {"keys": row.chunk[0][: row.fill], "inputs": row.chunk[1][: row.fill]}
    return {prefix + name: t for name, t in parts.items()}


def load(path: str | os.PathLike, model: nn.Module) -> FastWeightState:
    from safetensors import SafetensorError, safe_open

    from ttt_kernels.modules.state import FastWeightState, fast_mlps

    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path must be a safetensors file, got {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path must hold a saved FastWeightState, got another file: {path}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"path must hold format version {VERSION}, got version {metadata.get('version')}: {path}"
        )
    stored = {int(i): layer for i, layer in json.loads(metadata["layers"]).items()}
    state = FastWeightState({})
    for i, layer in stored.items():
        rule, sample = WriteRule(**layer["rule"]), tensors[f"layers.{i}.w0"]
        state.layers[i] = LayerState(LayerSignature(rule, tuple(layer["shape"]), sample))
    state.check(FastWeightState.for_model(model))
    for i, mlp in fast_mlps(model).items():
        device = mlp.slow_weight.device
        for b, counters in enumerate(stored[i]["rows"]):
            prefix = f"layers.{i}.rows.{b}."
            parts = {n: tensors.get(prefix + n) for n in ("weight", "scale", "keys", "inputs")}
            parts = {name: t.to(device) for name, t in parts.items() if t is not None}
            state.layers[i].rows.append(_row(counters, parts, mlp.rule.chunk_size))
    return state


def _row(counters: dict[str, int], parts: dict[str, Tensor], chunk_size: int) -> Row:
    row = Row(**counters)
    if "weight" in parts:
        row.weight = Slot(tuple(parts[n][None] for n in ("weight", "scale") if n in parts), 0)
    if row.fill:
        buffers = []
        for name in ("keys", "inputs"):
            tokens = parts[name]
            buffers.append(tokens.new_empty(1, chunk_size, tokens.shape[1]))
            buffers[-1][0, : row.fill] = tokens
        row.chunk = Slot(tuple(buffers), 0)
    return row
