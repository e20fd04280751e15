"""The demo on a tiny model: what it reports is what a model with fast weights does."""

import argparse
import hashlib
import json
import math
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch

import ttt_kernels as ttt
from ttt_kernels.cli import demo_command, demo_data, demo_model, demo_run
from ttt_kernels.cli.demo_data import Artefact, Unavailable
from ttt_kernels.cli.main import main

pytest.importorskip("transformers")
WORDS = "to be or not that is the question whether tis nobler in mind suffer".split()
SMALL = ["--window", "48", "--windows", "3", "--chunk-size", "8", "--layers", "0", "2"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {w: i for i, w in enumerate(["?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    tiny_models.build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "speech.txt"
    file.write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(200)))
    return file


@pytest.fixture
def arguments(model_folder, text_file, tmp_path):
    own = ["--model", str(model_folder), "--text", str(text_file)]
    return ["demo", *own, *SMALL, "--output", str(tmp_path / "new" / "out")]


@pytest.fixture
def offline(monkeypatch):
    def refuse(artefact, folder):
        raise Unavailable(f"no network for {artefact.requirement}")

    monkeypatch.setattr(demo_data, "download", refuse)


def read_record(folder) -> dict:
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "demo.json").read_text())


def test_own_model_and_text(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    record = read_record(tmp_path / "new" / "out")
    assert record["marks"] == {} and record["model"]["random"] is False
    assert record["text"] == {"name": "speech.txt", "fallback": False, "windows": 3, "window": 48}
    assert record["config"]["layers"] == [0, 2] and record["config"]["chunk_size"] == 8
    assert record["environment"]["torch"] == torch.__version__
    total = record["loss"]["total"]
    assert math.isclose(total["on"] - total["off"], total["change"], abs_tol=1e-9)
    assert total["change"] != 0 and total["change_error"] > 0
    assert [b["start"] for b in record["loss"]["by_position"]] == list(range(0, 48, 6))
    assert [x["layer"] for x in record["layers"]] == [0, 2]
    assert len(record["layers"][0]["drift_by_chunk"]) == 6
    scan = record["scan"]
    assert scan["layer"] == 2 and (scan["d"], scan["f"], scan["tokens"]) == (64, 128, 48)
    assert max(scan["parity"]["eager"].values()) <= 1
    assert {(r["impl"], r["mode"]) for r in scan["rows"]} == {
        (i, m) for i in ("reference", "eager") for m in ("fwd", "fwd+bwd")
    }
    shown = capsys.readouterr()
    assert "speech.txt" in shown.out and "within the error budget" in shown.out
    assert "fast weights on" in shown.err and "RANDOM" not in shown.out
    assert max(len(line) for line in shown.out.splitlines()) <= 80


def test_options_reach_the_model(arguments, tmp_path):
    more = "--inner-optimizer clip --max-norm 0.5 --lr 0.1 --no-preserve-row-norm --horizon 2"
    assert main([*arguments, *more.split(), "--proj-init", "identity"]) == 0
    config = read_record(tmp_path / "new" / "out")["config"]
    wanted = {"inner_optimizer": "clip", "max_norm": 0.5, "lr": 0.1, "preserve_row_norm": False,
              "horizon": 2, "proj_init": "identity"}  # fmt: skip
    assert wanted.items() <= config.items()


def test_trained_projections_are_used_and_named(arguments, tmp_path, capsys):
    trained = tiny_models.patched()
    file = tmp_path / "p.safetensors"
    ttt.save_projections(trained, file, metadata={"trained on": "old speeches"})
    keep = [a for a in arguments if a not in ("--chunk-size", "8", "--layers", "0", "2")]
    assert main([*keep, "--projections", str(file)]) == 0
    record = read_record(tmp_path / "new" / "out")
    assert record["projections"] == {"trained on": "old speeches"}
    assert record["config"]["layers"] == [0, 2] and record["config"]["lr"] == 2.0
    assert "projections are trained on: old speeches" in " ".join(capsys.readouterr().out.split())
    small = [*keep, "--chunk-size", "8", "--layers", "0", "2", "--lr", "2"]
    small += ["--inner-optimizer", "sgd", "--no-preserve-row-norm"]
    assert main([*small, "--projections", "none"]) == 0
    untrained = read_record(tmp_path / "new" / "out")
    assert untrained["projections"] is None
    assert untrained["loss"]["total"]["off"] == record["loss"]["total"]["off"]
    assert untrained["loss"]["total"]["on"] != record["loss"]["total"]["on"]
    assert "projections are untrained" in " ".join(capsys.readouterr().out.split())


def test_shipped_projections_are_the_default_of_the_default_model_only(tmp_path):
    def chosen(*arguments):
        parser = argparse.ArgumentParser()
        demo_command.add_parser(parser.add_subparsers())
        return demo_command.choose_projections(parser.parse_args(["demo", *arguments]))

    assert chosen() == chosen("--window", "512") == demo_command.SHIPPED
    assert chosen("--projections", "none") is chosen("--model", "m") is chosen("--lr", "1") is None
    assert chosen("--model", "m", "--projections", "f") == Path("f")


def test_shipped_projections_are_complete():
    from safetensors import safe_open

    with safe_open(demo_command.SHIPPED, "pt") as file:
        config = ttt.TTTConfig.from_hf_config(json.loads(file.metadata()["config"]))
        names = {f"model.layers.{i}.mlp.ttt_proj.weight" for i in config.layers}
        assert set(file.keys()) == names
        assert all(torch.isfinite(file.get_tensor(n)).all() for n in names)
        assert {tuple(file.get_tensor(n).shape) for n in names} == {(576, 576)}
        assert "State of the Union" in file.metadata()["trained on"]
    assert (demo_command.SHIPPED.parent / "README.md").exists()


def test_everything_is_marked_when_nothing_can_be_had(offline, tmp_path, capsys):
    """Random model, Python's own help as text: said on the screen and in the file."""
    folder = tmp_path / "out"
    small = ["--window", "32", "--windows", "2", "--chunk-size", "8", "--layers", "1"]
    assert main(["demo", *small, "--cache", str(tmp_path), "--output", str(folder)]) == 0
    record = read_record(folder)
    assert record["marks"].keys() == {"RANDOM MODEL", "FALLBACK TEXT"}
    assert "no network" in record["marks"]["RANDOM MODEL"]
    assert record["model"]["random"] and record["text"]["fallback"]
    assert "RANDOM MODEL" in record["model"]["name"]
    shown = capsys.readouterr()
    for mark in record["marks"]:
        assert mark in shown.out and mark in shown.err


def test_drift_is_that_of_the_carried_state():
    """The replay of the writes ends where the scan's own state does."""
    model = tiny_models.patched(cfg=tiny_models.config(inner_optimizer="specnorm", lr=0.3))
    with demo_run.Observer(model) as observer:
        demo_run.read(model, tiny_models.ids(1, 43), lambda: None, observer.trace)
    for layer, seen in observer.captured.items():
        steps = seen.step_sizes()
        _, state = ttt.fast_weight_scan(
            seen.z, seen.v, seen.w0, chunk_size=tiny_models.CHUNK, step_size=steps, return_state=True
        )
        trace = observer.traces[layer]
        assert len(trace.writes[0]) == 43 // tiny_models.CHUNK
        want = (state[0] - seen.w0).norm() / seen.w0.norm()
        assert math.isclose(trace.drift[0][-1], float(want), rel_tol=1e-4)
        assert all(not mlp.down_proj._forward_pre_hooks for mlp in observer.layers.values())


def test_loss_is_that_of_the_model():
    model = tiny_models.build()
    ids = tiny_models.ids(2, 40)
    got = demo_run.read(model, ids, lambda: None).nll
    want = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert got.shape == (2, 39) and torch.isclose(got.mean(), want, atol=1e-5)
    logits = torch.randn(40, 98)
    assert torch.allclose(demo_run.nll(logits, ids[0], rows=7), demo_run.nll(logits, ids[0]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--layers", "0", "9"], ["layers", "0..3", "[9]"]),
        (["--layers", "1", "1"], ["layers", "once", "[1]"]),
        (["--window", "512"], ["--window", "context", "256", "512"]),
        (["--window", "240"], ["speech.txt", "240", "200 tokens"]),
        (["--max-norm", "1"], ["max_norm", "clip"]),
        (["--inner-optimizer", "clip"], ["max_norm", "clip"]),
        (["--lr", "-1"], ["lr", "-1"]),
        (["--text", "absent.txt"], ["--text", "absent.txt"]),
        (["--model", "absent/model/here"], ["--model", "absent/model/here"]),
        (["--projections", "p.safetensors"], ["--projections", "leave out", "--chunk-size"]),
    ],
)
def test_bad_arguments(arguments, changes, words, capsys):
    assert main([*arguments, *changes]) == 2
    shown = capsys.readouterr().err
    assert all(word in shown for word in words) and "Traceback" not in shown, shown


def test_folder_without_a_model(tmp_path, arguments, capsys):
    assert main([*arguments, "--model", str(tmp_path)]) == 2
    assert "exactly one .gguf file" in capsys.readouterr().err


# --- fetching ---------------------------------------------------------------------------------------
@pytest.fixture
def archive(tmp_path):
    file = tmp_path / "thing.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("thing/data.bin", b"content")
    return file


@pytest.fixture
def artefact(archive):
    return Artefact(
        requirement="thing==1",
        archive_sha256=demo_data.sha256_of(archive),
        member="thing/data.bin",
        sha256=hashlib.sha256(b"content").hexdigest(),
        title="a thing",
    )


def test_fetch_keeps_what_it_checked(artefact, archive, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo_data, "download", lambda a, folder: calls.append(a) or archive)
    cache = tmp_path / "cache"
    file = demo_data.fetch(artefact, cache)
    assert file.read_bytes() == b"content" and demo_data.fetch(artefact, cache) == file
    assert len(calls) == 1
    file.write_bytes(b"damaged")
    assert demo_data.fetch(artefact, cache).read_bytes() == b"content" and len(calls) == 2
    assert [p for p in cache.rglob("*") if p.is_file()] == [file]


def test_fetch_refuses_another_file(artefact, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "download", lambda a, folder: archive)
    with pytest.raises(Unavailable, match="not the expected file"):
        demo_data.fetch(replace(artefact, sha256="0" * 64), tmp_path / "cache")


def test_download_pins_the_archive_and_passes_on_the_reason(artefact, tmp_path, monkeypatch):
    def run(command, **options):
        assert "--require-hashes" in command and "--no-deps" in command
        pinned = (tmp_path / "requirements.txt").read_text()
        assert pinned == f"thing==1 --hash=sha256:{artefact.archive_sha256}\n"
        return SimpleNamespace(returncode=1, stderr="WARNING: slow\nERROR: no such thing\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(Unavailable, match="thing==1: ERROR: no such thing"):
        demo_data.download(artefact, tmp_path)


def test_fallback_text_is_long_prose():
    assert len(demo_data.builtin_text()) > 100_000
    subject = demo_model.random_subject(64, seed=0)
    text = demo_model.Text("x", demo_data.builtin_text())
    assert demo_model.cut_windows(subject, text, 64, 5).shape == (5, 64)
