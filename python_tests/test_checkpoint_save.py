"""Saving: what is refused, and what a folder holds whenever saving stops."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn

import ttt_kernels as ttt

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

PROJ = "model.layers.0.mlp.ttt_proj.weight"
IDS = tiny_models.ids(2, 30)


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def other() -> nn.Module:
    """The same architecture, with other weights that write otherwise."""
    model = tiny_models.patched(cfg=tiny_models.config(lr=3.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def loads(folder: Path) -> str:
    """Which of the two models a folder holds; "nothing" where it cannot be loaded."""
    try:
        loaded = ttt.from_pretrained(folder)
    except (OSError, ValueError):
        return "nothing"
    got, cfg = loaded.state_dict(), ttt.TTTConfig.from_hf_config(loaded.config)
    for name, model in {"old": tiny_models.patched(), "new": other()}.items():
        equal = all(torch.equal(tensor, got[key]) for key, tensor in model.state_dict().items())
        if equal and cfg == ttt.TTTConfig.from_hf_config(model.config):
            return name
    return "a mixture"


@pytest.mark.parametrize("sizes", [("1GB", "50KB"), ("50KB", "1GB"), ("50KB", "100KB")])
def test_a_checkpoint_replaces_another(sizes: tuple[str, str], tmp_path: Path) -> None:
    kept = ("tokenizer.json", "model_card.md", "model-notes.safetensors", "optimizer.safetensors")
    for name in kept:
        (tmp_path / name).write_text("mine")
    ttt.save_pretrained(tiny_models.patched(), tmp_path, max_shard_size=sizes[0])
    assert loads(tmp_path) == "old"
    ttt.save_pretrained(other(), tmp_path, max_shard_size=sizes[1])
    assert loads(tmp_path) == "new"
    fresh = tmp_path / "fresh" / "folder"
    ttt.save_pretrained(other(), fresh, max_shard_size=sizes[1])
    assert files(tmp_path) == sorted((*files(fresh), *kept, "fresh"))


def test_whenever_it_stops_the_folder_is_old_new_or_nothing(tmp_path: Path, monkeypatch) -> None:
    """A copy of the folder before each operation on a file in it: had the process ended there."""
    folder, stops = tmp_path / "checkpoint", []
    ttt.save_pretrained(tiny_models.patched(), folder)
    for name in ("unlink", "replace"):
        operation = getattr(Path, name)

        def observed(self, *args, operation=operation, **kwargs):
            stops.append(tmp_path / f"stopped-{len(stops)}")
            shutil.copytree(folder, stops[-1])
            return operation(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, observed)
    ttt.save_pretrained(other(), folder, max_shard_size="200KB")
    monkeypatch.undo()
    assert loads(folder) == "new"
    assert loads(stops[0]) == "old"
    assert len(stops) > 6 and {loads(stopped) for stopped in stops[1:]} == {"nothing"}


def test_an_error_while_writing_leaves_what_was(tmp_path: Path, monkeypatch) -> None:
    ttt.save_pretrained(tiny_models.patched(), tmp_path)
    before, model = files(tmp_path), other()

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(model.config, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        ttt.save_pretrained(model, tmp_path)
    assert files(tmp_path) == before and loads(tmp_path) == "old"


def test_models_without_fast_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have been patched"):
        ttt.save_pretrained(tiny_models.build(), tmp_path / "c")
    outer = tiny_models.build()
    ttt.patch_model(outer.model, tiny_models.config())
    with pytest.raises(ValueError, match="model.config must hold the ttt_.* got {}"):
        ttt.save_pretrained(outer, tmp_path / "c")
    ttt.patch_model(outer, tiny_models.config())
    ttt.save_pretrained(outer, tmp_path / "c")
    model = tiny_models.patched()
    model.config.ttt_lr = 7.0
    with pytest.raises(ValueError, match="model.config must hold .*'ttt_lr': 7.0"):
        ttt.save_pretrained(model, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_state_dict_must_be_complete(tmp_path: Path) -> None:
    model = tiny_models.patched(tie_word_embeddings=True)
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    bad = {
        f"missing: {PROJ}": {n: t for n, t in weights.items() if n != PROJ},
        "unexpected: extra": {**weights, "extra": torch.zeros(1)},
        rf"another shape: {PROJ} \(\(3,\), not \(64, 64\)\)": {**weights, PROJ: torch.zeros(3)},
        f"{PROJ} must hold values": {**weights, PROJ: weights[PROJ].to("meta")},
        "missing: lm_head": {},
    }
    for message, state_dict in bad.items():
        with pytest.raises(ValueError, match=message):
            ttt.save_pretrained(model, tmp_path / "c", state_dict=state_dict)
    assert not (tmp_path / "c").exists()
    ttt.save_pretrained(model, tmp_path / "c", state_dict=weights)
    again = ttt.from_pretrained(tmp_path / "c").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OSError):
        ttt.save_pretrained(tiny_models.patched(), file)
    assert file.read_text() == "mine"


def test_adapters_are_refused_until_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_models.patched(), lora)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    injected = tiny_models.patched()
    injected.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused = (
        adapted, adapted.get_base_model(), injected, peft.get_peft_model(tiny_models.patched(), prompt),
    )  # fmt: skip
    for model in refused:
        with pytest.raises(ValueError, match="must be without adapters.*merge_and_unload"):
            ttt.save_pretrained(model, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    merged = adapted.merge_and_unload()
    ttt.save_pretrained(merged, tmp_path / "c")
    with torch.no_grad():
        assert torch.equal(ttt.from_pretrained(tmp_path / "c")(IDS).logits, merged(IDS).logits)
