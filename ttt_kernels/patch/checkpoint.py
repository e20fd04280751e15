"""Patched models in files: whole checkpoints, which transformers' loaders read and write, and files of
the added parameters alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ttt_kernels.modules.mlp import FastWeightLinear
from ttt_kernels.modules.sharding import is_sharded
from ttt_kernels.patch.config import PREFIX, TTTConfig
from ttt_kernels.patch.families import find_decoder
from ttt_kernels.patch.hooks import model_hook
from ttt_kernels.patch.model import PatchReport, patch_model, patch_report, unpatch_model

FORMAT = "ttt_kernels.projections"
VERSION = "1"
_HEADER = ("format", "version", "config", "backbone")
_BACKBONE = ("family", "num_layers", "hidden_size", "intermediate_size")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_ADAPTER = ("base_layer", "modules_to_save")  # attributes of PEFT's modules around others
_HUB = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision",
    "subfolder", "token", "trust_remote_code",
)  # fmt: skip
_CODE = ("code_revision", "trust_remote_code")  # those of _HUB that only classes are loaded with


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a patched model as a checkpoint: config with `ttt_*` fields, generation config, safetensors.

        save_pretrained(model, path)
        model = from_pretrained(path)       # equal bit for bit

    Equivalent to `model.save_pretrained(path)`, which writes the same files, with what it leaves out:
    the checks below, and files that appear in `path` only when all of them are complete, `config.json`
    last. A folder that was being replaced while the process ended holds the old checkpoint, or none
    that anything would load; never parts of two. Other files in it (a tokenizer) are left alone,
    weights of before are removed.

    Args:
        model: patched by `patch_model`; a `*ForCausalLM` or the inner `*Model`.
        path: folder, made where there is none.
        max_shard_size: bytes, or text such as "200MB"; weights beyond it go into several files.
        state_dict: the complete weights, for a model that holds only parts of them (FSDP): what
            `torch.distributed.checkpoint.state_dict.get_model_state_dict` returns with
            `full_state_dict=True`. Call it on one process only, then.

    Raises:
        ValueError: the model is not patched, holds adapters (merge them first, or save them with their
            own method and the projections with `save_projections`), or is sharded and `state_dict` was
            not given; `state_dict` has a key too many or too few, or a wrong shape; the `ttt_*` fields
            of `model.config` were changed after patching. Nothing has been written then.
        OSError: `path` is a file, or cannot be written.
    """
    config = _required_report(model).config
    _refuse_adapters(model)
    stored = {name: value for name, value in vars(model.config).items() if name.startswith(PREFIX)}
    if stored != config.to_hf_fields():
        raise ValueError(
            f"model.config must hold the ttt_* fields in force, {config.to_hf_fields()}, got {stored}: "
            "call patch_model on this model, not on a part of it only, and leave the fields alone"
        )
    own = model.state_dict()
    if state_dict is not None:
        _check_same("state_dict", state_dict, own)
    _refuse_parts(own if state_dict is None else state_dict, offloaded=_is_dispatched(model))
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as staged:
        options = {} if state_dict is None else {"state_dict": dict(state_dict)}
        model.save_pretrained(staged, max_shard_size=max_shard_size, **options)
        (folder / "config.json").unlink(missing_ok=True)
        for old in folder.iterdir():
            if _WEIGHTS.fullmatch(old.name):
                old.unlink()
        for new in sorted(Path(staged).iterdir(), key=lambda file: file.name == "config.json"):
            new.replace(folder / new.name)


def from_pretrained(
    path: str | os.PathLike, cfg: TTTConfig | None = None, **kwargs
) -> nn.Module:
    """Load a checkpoint with fast weights: a patched model in eval mode, ready to generate.

    Equivalent to transformers' `from_pretrained` of the class that the checkpoint names, except that
    the model is patched before its weights are read, and that they must fit exactly. Reads what
    `save_pretrained` writes and the released layouts (TTT-NTP and In-Place TTT), sharded or not:
    `ttt_*` fields in config.json, weights `layers.<i>.mlp.ttt_proj.weight` and `ttt_conv.weight`.

    Args:
        path: a folder, or a name on the hub.
        cfg: in place of the `ttt_*` fields of the checkpoint's config.
        kwargs: as in transformers: `dtype` (here the checkpoint's own by default, in every version),
            `device_map`, `attn_implementation`, `revision`, `config`, ...

    Raises:
        ValueError: a key is missing, one too many, or of another shape (the message names them), of
            the backbone or the fast weights; the config has no `ttt_*` fields, unknown or contradictory
            ones; layers that do not exist; quantised down-projections; an adapter beside the checkpoint
            (adapter_config.json). No weight is ever left at a random value.
        TypeError: a model of another family; `output_loading_info` or `ignore_mismatched_sizes`.
        OSError: there is no checkpoint.
    """
    taken = sorted({"output_loading_info", "ignore_mismatched_sizes"} & kwargs.keys())
    if taken:
        raise TypeError(f"kwargs must not hold {', '.join(taken)}: whatever does not fit raises")
    if not {"dtype", "torch_dtype"} & kwargs.keys():
        kwargs["dtype"] = "auto"
    _refuse_adapter_files(path, kwargs)
    cls = _model_class(path, kwargs)
    model, info = _patching(cls, cfg).from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    model.__class__ = cls  # the subclass has done its work
    shapes = (entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])
    _check_keys(f"checkpoint {path}", info["missing_keys"], info["unexpected_keys"], shapes)
    if info["error_msgs"]:
        raise ValueError(f"checkpoint {path} cannot be loaded: {'; '.join(info['error_msgs'])}")
    _refuse_quantised(model)
    return model


def save_projections(
    model: nn.Module,
    file: str | os.PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what `patch_model` added (`ttt_proj`, `ttt_conv`) and the configuration to one small file.

    For training that leaves the backbone as it was. A safetensors file; names as in a checkpoint,
    `model.layers.<i>.mlp.ttt_proj.weight`. It appears only when it is complete.

    Args:
        model: patched by `patch_model`; adapters around it are left out.
        file: name of the file, in a folder that exists.
        metadata: more text to keep in the file's header, such as how the weights were made.
        state_dict: the complete added parameters of a sharded model, as for `save_pretrained`; more
            than those is ignored, `ignore_frozen_params=True` is enough.

    Raises:
        TypeError, ValueError: the model is not patched, or has nothing to save (`use_proj=False`);
            sharded weights without `state_dict`; metadata that is not text, or of a name taken by the
            format. Nothing has been written then.
        OSError: the file cannot be written.
    """
    report = _required_report(model)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(report.config.to_hf_fields()),
        "backbone": json.dumps(_backbone(report)),
    }
    header |= _checked_metadata({} if metadata is None else metadata)
    own = _added_parameters(model)
    if not own:
        raise ValueError("model must have ttt_proj or ttt_conv to save, got use_proj=False and no conv")
    tensors = own
    if state_dict is not None:
        given = {"model." + key[key.find("layers.") :]: t for key, t in state_dict.items()}
        tensors = {name: t for name, t in given.items() if name in own}
        _check_same("state_dict", tensors, own)
    _refuse_parts(tensors)
    _write({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, Path(file), header)


def load_projections(model: nn.Module, file: str | os.PathLike) -> dict[str, str]:
    """Load a file written by `save_projections`, onto the backbone it belongs to.

    A plain model is patched with the file's configuration; a patched one must have an equal one.
    Parameter objects stay, and so do their device and dtype, to which values are rounded.

    Args:
        model: as for `patch_model`; neither sharded nor offloaded.
        file: name of the file.

    Returns:
        The `metadata` it was saved with.

    Raises:
        ValueError: not such a file; of another format version; of a backbone of another family, depth
            or width; another configuration is in force; a key too many or too few, or a wrong shape.
            The model is as it was then.
        OSError: there is no such file.
    """
    header, tensors = _read(file)
    cfg = TTTConfig.from_hf_config(json.loads(header["config"]))
    plain = patch_report(model) is None
    report = patch_model(model, cfg)
    try:
        expected = json.loads(header["backbone"])
        if _backbone(report) != expected:
            raise ValueError(f"model must be like the file's, {expected}, got {_backbone(report)}")
        own = _added_parameters(model)
        _check_same(f"file {file}", tensors, own)
        _refuse_parts(own)
    except BaseException:
        if plain:
            unpatch_model(model)
        raise
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return {name: text for name, text in header.items() if name not in _HEADER}


def _required_report(model: nn.Module) -> PatchReport:
    report = patch_report(model)
    if report is None:
        raise ValueError("model must have been patched by patch_model, got a plain one")
    return report


def _refuse_adapters(model: nn.Module) -> None:
    peft_model = hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False)
    if peft_model or any(hasattr(m, name) for m in model.modules() for name in _ADAPTER):
        raise ValueError(
            "model must be without adapters, for which a checkpoint has no place: merge them first "
            "(merge_and_unload), or save them with their own save_pretrained and the projections with "
            "save_projections"
        )


def _refuse_adapter_files(path: str | os.PathLike, kwargs: Mapping[str, object]) -> None:
    """transformers would load another base model with them, or leave them out where there is no PEFT."""
    from transformers.utils import find_adapter_config_file

    hub = {name: kwargs[name] for name in _HUB if name in kwargs and name not in _CODE}
    if find_adapter_config_file(os.fspath(path), **hub) is not None:
        raise ValueError(
            f"checkpoint {path} must be without adapters, got adapter_config.json: load the model from a "
            "folder of its own, and put the adapter around it with peft.PeftModel.from_pretrained"
        )


def _refuse_quantised(model: nn.Module) -> None:
    """Loaders replace linear layers, or the tensors in them, where `patch_model` no longer looks."""
    for i, mlp in model_hook(model).mlps.items():
        linear = getattr(mlp.down_proj, "base_layer", mlp.down_proj)
        weight = getattr(linear, "weight", None)
        plain = type(weight) is nn.Parameter or is_sharded(weight)
        if not (plain and isinstance(linear, FastWeightLinear)):
            raise ValueError(
                f"layer {i}: down_proj must stay a plain linear layer, because its weight is written: "
                f"exclude it from quantisation, got {type(linear).__name__} of {type(weight).__name__}"
            )


def _refuse_parts(tensors: Mapping[str, Tensor], offloaded: bool = False) -> None:
    """Weights that are not whole and at hand here."""
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            raise ValueError(
                f"{name} must be whole, got a part of it (DTensor): save with state_dict="
                "get_model_state_dict(..., full_state_dict=True), load before sharding"
            )
        if tensor.is_meta and not offloaded:
            raise ValueError(f"{name} must hold values, got one on the meta device or offloaded")


def _is_dispatched(model: nn.Module) -> bool:
    """Then transformers fetches what is offloaded."""
    return bool(getattr(model, "hf_device_map", None))


def _check_same(what: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    common = got.keys() & expected.keys()
    shapes = (
        f"{name} ({tuple(got[name].shape)}, not {tuple(expected[name].shape)})"
        for name in common
        if got[name].shape != expected[name].shape
    )
    _check_keys(what, expected.keys() - common, got.keys() - common, shapes)


def _check_keys(
    what: str, missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str]
) -> None:
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    found = [f"{kind}: {', '.join(keys)}" for kind, names in kinds.items() if (keys := sorted(names))]
    if found:
        raise ValueError(f"{what} must have exactly the model's keys, got {'; '.join(found)}")


def _model_class(path: str | os.PathLike, kwargs: Mapping[str, object]) -> type:
    """The class that the checkpoint names, else the causal language model of its model type."""
    import transformers

    config = kwargs.get("config")
    if config is None or isinstance(config, (str, os.PathLike)):
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        config = transformers.AutoConfig.from_pretrained(path if config is None else config, **hub)
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            return cls
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _patching(cls: type, cfg: TTTConfig | None) -> type:
    """`cls`, whose instances are patched when they are made: on the meta device, before their weights
    are read and whatever is put around modules then."""

    def __init__(self, *args, **kwargs):
        cls.__init__(self, *args, **kwargs)
        patch_model(self, cfg)

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


def _added_parameters(model: nn.Module) -> dict[str, Tensor]:
    decoder, family = find_decoder(model)
    return {
        f"model.{family.layers}.{i}.{family.mlp}.{name}.weight": part.weight
        for i, mlp in model_hook(decoder).mlps.items()
        for name in ("ttt_proj", "ttt_conv")
        if (part := getattr(mlp, name, None)) is not None
    }


def _backbone(report: PatchReport) -> dict[str, object]:
    return {name: getattr(report, name) for name in _BACKBONE}


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"metadata must map text to text, got {name!r}: {text!r}")
        if name in _HEADER:
            raise ValueError(f"metadata must not hold {', '.join(_HEADER)}, got {name!r}")
    return dict(metadata)


def _write(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
    from safetensors.torch import save_file

    if file.is_dir():
        raise IsADirectoryError(f"file must be a file, got a folder: {file}")
    with TemporaryDirectory(dir=file.parent, prefix=".saving-") as staged:
        save_file(tensors, Path(staged, file.name), header)
        Path(staged, file.name).replace(file)


def _read(file: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(file), "pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"file must be a safetensors file, got {file}: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"file must have been written by save_projections, got another: {file}")
    if header.get("version") != VERSION:
        raise ValueError(
            f"file must be of format version {VERSION}, got {header.get('version')}: {file}"
        )
    return header, tensors
