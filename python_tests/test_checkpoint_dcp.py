"""`torch.distributed.checkpoint`: in and out, one process and two that hold a part each (FSDP2)."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import tiny_models
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import ttt_kernels as ttt

pytest.importorskip("transformers")

IDS = tiny_models.ids(2, 30)
PROJ = "model.layers.0.mlp.ttt_proj.weight"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def plain_patched() -> nn.Module:
    """What a checkpoint is read into: patched, and nothing trained."""
    model = tiny_models.build()
    ttt.patch_model(model, tiny_models.config())
    return model


def read(model: nn.Module, folder: Path) -> None:
    weights = get_model_state_dict(model)
    dcp.load(weights, checkpoint_id=folder)
    set_model_state_dict(model, weights)


def test_one_process(tmp_path: Path) -> None:
    model = tiny_models.patched(tie_word_embeddings=True)
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path)
    again = tiny_models.build(tie_word_embeddings=True)
    ttt.patch_model(again, tiny_models.config())
    read(again, tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_what_does_not_fit(tmp_path: Path) -> None:
    dcp.save(get_model_state_dict(tiny_models.build()), checkpoint_id=tmp_path / "plain")
    with pytest.raises((RuntimeError, dcp.api.CheckpointException), match=PROJ):
        read(plain_patched(), tmp_path / "plain")
    weights = {**get_model_state_dict(tiny_models.patched()), PROJ: torch.zeros(3)}
    dcp.save(weights, checkpoint_id=tmp_path / "shape")
    with pytest.raises((ValueError, dcp.api.CheckpointException), match=PROJ):
        read(plain_patched(), tmp_path / "shape")
    dcp.save(get_model_state_dict(tiny_models.patched()), checkpoint_id=tmp_path / "patched")
    stored = set(dcp.FileSystemReader(tmp_path / "patched").read_metadata().state_dict_metadata)
    ignored = stored - get_model_state_dict(tiny_models.build()).keys()  # dcp.load would say nothing
    assert ignored == {PROJ, PROJ.replace("0", "2")}


def test_between_the_formats(tmp_path: Path) -> None:
    model = tiny_models.patched()
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    weights = torch.load(tmp_path / "whole.pt")
    ttt.save_pretrained(plain_patched(), tmp_path / "hf", state_dict=weights)
    again = ttt.from_pretrained(tmp_path / "hf")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    dcp.save(get_model_state_dict(again), checkpoint_id=tmp_path / "back")
    third = plain_patched()
    read(third, tmp_path / "back")
    assert torch.equal(third(IDS).logits, model(IDS).logits)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def save_and_read_parts(rank: int, world_size: int, folder: Path) -> None:
    model = tiny_models.patched()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ttt_proj" in name)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sharded(model)

    for save in (ttt.save_pretrained, ttt.save_projections):
        with pytest.raises(ValueError, match="must be whole, got a part of it"):
            save(model, folder / "refused")
    with pytest.raises(ValueError, match="must be whole"):
        ttt.load_projections(model, folder / "file.safetensors")

    whole, trained = (get_model_state_dict(model, options=options) for options in (WHOLE, TRAINED))
    if rank == 0:
        ttt.save_pretrained(model, folder / "hf", max_shard_size="50KB", state_dict=whole)
        ttt.save_projections(model, folder / "trained.safetensors", state_dict=trained)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "dcp-from-two")

    again = sharded(plain_patched())
    read(again, folder / "dcp-from-one")
    got = get_model_state_dict(again, options=WHOLE)
    if rank == 0:
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_two_processes_and_one(tmp_path: Path) -> None:
    model = tiny_models.patched()
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path / "dcp-from-one")
    ttt.save_projections(model, tmp_path / "file.safetensors")
    processes.run(save_and_read_parts, 2, tmp_path)
    expected = model(IDS).logits
    from_dcp, from_trained = plain_patched(), tiny_models.build()
    read(from_dcp, tmp_path / "dcp-from-two")
    ttt.load_projections(from_trained, tmp_path / "trained.safetensors")
    for again in (from_dcp, from_trained, ttt.from_pretrained(tmp_path / "hf")):
        assert torch.equal(again(IDS).logits, expected)
    assert not (tmp_path / "refused").exists()
