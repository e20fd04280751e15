"""Files of the added parameters alone: bit for bit onto the backbone they belong to, or an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ttt_kernels as ttt

pytest.importorskip("transformers")

IDS = tiny_models.ids(2, 30)
PROJ = "model.layers.{}.mlp.ttt_proj.weight"
CONV = "model.layers.{}.mlp.ttt_conv.weight"


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def rewrite(file: Path, tensors: dict | None = None, **changes: str | None) -> None:
    texts = {n: t for n, t in {**header(file), **changes}.items() if t is not None}
    save_file(load_file(file) if tensors is None else tensors, file, texts)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model, file = tiny_models.patched(), tmp_path / "p.safetensors"
    ttt.save_projections(model, file)
    return model, file


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("mistral", {"inner_optimizer": "clip", "max_norm": 0.7, "horizon": 2}),
        ("qwen3", {"target": "conv", "target_source": "input_embed"}),
        ("llama", {"target": "conv", "use_proj": False, "lr": 0.01}),
    ],
)
def test_round_trip(family: str, changes: dict, tmp_path: Path) -> None:
    cfg = tiny_models.config(**changes)
    model, file = tiny_models.patched(family, cfg), tmp_path / "p.safetensors"
    about = {"data": "none", "made by": "a test"}
    ttt.save_projections(model, file, metadata=about)
    assert set(load_file(file)) == {n for n in model.state_dict() if ".ttt_" in n}
    again = tiny_models.build(family)
    assert ttt.load_projections(again, file) == about
    assert ttt.patch_model(again).config == cfg
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert file.stat().st_size < 100_000 and len(os.listdir(tmp_path)) == 1


def test_onto_a_patched_model_parameters_stay(saved) -> None:
    model, file = saved
    again = tiny_models.build()
    ttt.patch_model(again, tiny_models.config())
    before = dict(again.named_parameters())
    assert ttt.load_projections(again, file) == {}
    assert all(parameter is before[name] for name, parameter in again.named_parameters())
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    ttt.unpatch_model(again)
    assert torch.equal(again(IDS).logits, tiny_models.build()(IDS).logits)


def test_inner_and_outer_models_share_files(saved, tmp_path: Path) -> None:
    model, file = saved
    inner = tiny_models.build().model
    ttt.load_projections(inner, file)
    assert torch.equal(inner(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    again = tmp_path / "inner.safetensors"
    ttt.save_projections(inner, again)
    one, two = load_file(file), load_file(again)
    assert header(again) == header(file)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_models_dtype_is_kept(saved) -> None:
    model, file = saved
    half = tiny_models.build().bfloat16()
    ttt.load_projections(half, file)
    got = half.state_dict()[PROJ.format(0)]
    assert torch.equal(got, model.state_dict()[PROJ.format(0)].bfloat16())


def test_adapters_around_the_model(saved, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, file = saved
    lora = peft.LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["ttt_proj"])
    adapted = peft.get_peft_model(tiny_models.patched(), lora)
    trained = [p for n, p in adapted.named_parameters() if "ttt_proj.modules_to_save" in n]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1.0)
    ttt.save_projections(adapted, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")[PROJ.format(0)], trained[0])
    ttt.load_projections(adapted, file)
    assert torch.equal(trained[0], model.state_dict()[PROJ.format(0)])


def test_another_configuration_in_force(saved) -> None:
    _, file = saved
    for changes in ({"lr": 3.0}, {"layers": (0,)}, {"proj_init": "small"}, {"chunk_size": 16}):
        model = tiny_models.patched(cfg=tiny_models.config(**changes))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match="must equal the configuration already in force"):
            ttt.load_projections(model, file)
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "family, changes, differs",
    [
        ("qwen3", {}, "'family': 'qwen3'"),
        ("llama", {"hidden_size": 32}, "'hidden_size': 32"),
        ("llama", {"intermediate_size": 64}, "'intermediate_size': 64"),
        ("llama", {"num_hidden_layers": 6}, "'num_layers': 6"),
    ],
)
def test_another_backbone(saved, family: str, changes: dict, differs: str) -> None:
    _, file = saved
    model = tiny_models.build(family, **changes)
    with pytest.raises(ValueError, match=f"model must be like the file's.* got .*{differs}"):
        ttt.load_projections(model, file)
    assert not tiny_models.fast_mlps(model)


def test_damaged_files_name_their_keys(saved) -> None:
    _, file = saved
    whole = load_file(file)
    one, two = PROJ.format(0), PROJ.format(2)
    cases = {
        f"missing: {two}$": {one: whole[one]},
        f"unexpected: {PROJ.format(1)}$": {**whole, PROJ.format(1): torch.eye(64)},
        f"unexpected: {CONV.format(0)}$": {**whole, CONV.format(0): torch.ones(64, 1, 5)},
        rf"another shape: {one} \(\(64, 32\), not \(64, 64\)\)$": {**whole, one: torch.ones(64, 32)},
    }
    for message, tensors in cases.items():
        rewrite(file, tensors)
        model = tiny_models.build()
        with pytest.raises(ValueError, match=f"p.safetensors must have exactly .*{message}"):
            ttt.load_projections(model, file)
        assert not tiny_models.fast_mlps(model)


def test_files_of_other_kinds(saved, tmp_path: Path) -> None:
    _, file = saved
    fields = json.loads(header(file)["config"])
    for changes, message in (
        ({"version": "2"}, "version 1, got 2"),
        ({"format": "pt"}, "written by save_projections"),
        ({"config": json.dumps({**fields, "ttt_colour": 1})}, "unknown field.*ttt_colour"),
        ({"config": json.dumps({**fields, "ttt_layers": [0, 9]})}, r"within 0\.\.3"),
    ):
        original = file.read_bytes()
        rewrite(file, **changes)
        model = tiny_models.build()
        with pytest.raises(ValueError, match=message):
            ttt.load_projections(model, file)
        assert not tiny_models.fast_mlps(model)
        file.write_bytes(original)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        ttt.load_projections(tiny_models.build(), file)
    with pytest.raises(FileNotFoundError):
        ttt.load_projections(tiny_models.build(), tmp_path / "absent")


def test_saving_is_checked_and_whole(saved, tmp_path: Path, monkeypatch) -> None:
    model, file = saved
    before = file.read_bytes()
    for metadata, error in (({"config": "x"}, ValueError), ({"lr": 3}, TypeError), ({3: "x"}, TypeError)):
        with pytest.raises(error, match="metadata must"):
            ttt.save_projections(model, file, metadata=metadata)
    with pytest.raises(ValueError, match="must have been patched"):
        ttt.save_projections(tiny_models.build(), file)
    with pytest.raises(ValueError, match="use_proj=False"):
        ttt.save_projections(tiny_models.patched(cfg=tiny_models.config(use_proj=False)), file)
    with pytest.raises(ValueError, match=f"state_dict must have .* missing: {PROJ.format(0)}"):
        ttt.save_projections(model, file, state_dict={})
    with pytest.raises(IsADirectoryError):
        ttt.save_projections(model, tmp_path)

    def full(tensors, path, header) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        ttt.save_projections(model, file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_a_given_state_dict_may_hold_more(saved, tmp_path: Path) -> None:
    model, _ = saved
    weights = {f"base_model.model.{n}": t + 1 for n, t in model.state_dict().items()}
    ttt.save_projections(model, tmp_path / "q.safetensors", state_dict=weights)
    got = load_file(tmp_path / "q.safetensors")
    assert torch.equal(got[PROJ.format(2)], model.state_dict()[PROJ.format(2)] + 1)
