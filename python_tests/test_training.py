"""The training recipe in examples/, on tiny random models."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from source_tree import ROOT

import ttt_kernels as ttt

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
yaml = pytest.importorskip("yaml")
sys.path.insert(0, str(ROOT / "examples"))

import ntp_trainer  # noqa: E402
import train_ntp  # noqa: E402
from ntp_config import Settings, SettingsError, build, read_settings  # noqa: E402
from ntp_data import PackedBlocks, read_documents  # noqa: E402

CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
BLOCK = 40


def settings(output, **train) -> Settings:
    options = {"steps": 4, "projection_learning_rate": 0.01, "bf16": False, "cpu": True,
               "gradient_checkpointing": False, "save_every": 100, **train}  # fmt: skip
    conv = options.get("what") == "projection+conv"
    fast = {"layers": [0, 2], "chunk_size": 8, "lr": 2.0, "target": "conv" if conv else "next_token"}
    return build(Settings, {
        "model": {"path": "none"}, "fast_weights": fast, "data": {"train": [], "block_size": BLOCK},
        "train": options, "output": str(output),
    }, "")  # fmt: skip


def blocks(rows: int = 12, seed: int = 0) -> PackedBlocks:
    """Documents of 1 to 30 tokens that count up, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    while sum(map(len, documents)) < rows * BLOCK:
        start, length = torch.randint(1, 31, (2,), generator=generator).tolist()
        documents.append([3 + (start + i) % 40 for i in range(length)])
    return PackedBlocks(documents, BLOCK)


def train(wanted: Settings, resume=None, validation=None):
    transformers.set_seed(wanted.train.seed)
    model = tiny_models.build()
    trainer = train_ntp.make_trainer(wanted, model, blocks(), validation)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_documents_begin_and_end_as_asked(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "xy"}\n{"text": "z"}\n')

    class Letters:
        bos_token_id, eos_token_id = 1, None

        def __call__(self, text, **_):
            return {"input_ids": [ord(c) for c in text]}

    def rows(**options):
        return PackedBlocks.from_files([f"{tmp_path}/a.jsonl"], Letters(), 5, **options)

    assert rows(prepend_bos=True, append_eos=False).ids.tolist() == [[1, 120, 121, 1, 122]]
    with pytest.raises(SettingsError, match="data.append_eos must be false"):
        rows(prepend_bos=False, append_eos=True)


# --- settings -------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_shipped_settings_are_valid(file):
    wanted = read_settings(file)
    assert wanted.output == f"outputs/{file.stem}" and wanted.train.warmup_steps > 0


def test_every_released_recipe_has_settings():
    recipes = {yaml.safe_load(f.read_text())["fast_weights"].get("recipe") for f in CONFIGS}
    assert recipes == {None, "llama-3.1-8b", "mistral-7b-v0.3", "qwen3-4b", "qwen3-0.6b",
                       "llama-3.1-8b-in-place"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.step=3", "unknown train.step; known are what, steps"),
        ("colour=red", "unknown colour"),
        ("fast_weights.chunks=8", "fast_weights: .*chunks"),
        ("fast_weights.recipe=gpt", "recipe must be one of"),
        ("train.steps=many", "train.steps must be int, got 'many'"),
        ("train.bf16=1", "train.bf16 must be bool, got 1"),
        ("data.train=a.txt", "data.train must be a list"),
        ("model.gguf_file=3", "model.gguf_file must be str or null"),
        ("train.what=everything", "train.what must be one of projection"),
        ("train.what=all", "train.learning_rate must be > 0"),
        ("train.learning_rate=1e-5", 'needs train.what "all"'),
        ("train.what=projection+conv", 'needs fast_weights.target "conv"'),
        ("fast_weights.target=conv", "stays zero writes nothing"),
        ("data.block_size=1024", "must be > fast_weights.chunk_size = 1024"),
        ("train.steps", "--set takes section.key=value"),
    ],
)
def test_wrong_settings_name_the_key(change, message):
    file = ROOT / "examples" / "configs" / "llama-3.1-8b.yaml"
    with pytest.raises(SettingsError, match=message):
        read_settings(file, [change])


def test_changes_replace_single_values():
    file = ROOT / "examples" / "configs" / "llama-3.1-8b.yaml"
    changed = read_settings(file, ["train.projection_learning_rate=1e-3", "fast_weights.chunk_size=512"])
    assert changed.train.projection_learning_rate == 1e-3
    expected = replace(ttt.TTTConfig.recipe("llama-3.1-8b"), chunk_size=512)
    assert changed.fast_weight_config() == expected


def test_a_missing_setting_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("output: here\n")
    with pytest.raises(SettingsError, match="missing: data, fast_weights, model, train"):
        read_settings(tmp_path / "c.yaml")


# --- documents ------------------------------------------------------------------------------------
def test_rows_keep_the_boundaries_of_documents():
    data = PackedBlocks([[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]], 4)
    assert len(data) == 2  # 11 tokens, the last 3 fill no row
    assert [x.tolist() for x in data[0].values()] == [[5, 6, 7, 8], [0, 1, 2, 0], [-100, 6, 7, -100]]
    assert [x.tolist() for x in data[1].values()] == [
        [9, 10, 11, 12], [0, 0, 1, 2], [-100, -100, 11, 12],
    ]  # fmt: skip


def test_documents_are_read_from_text_and_json_lines(tmp_path):
    (tmp_path / "b.txt").write_text("two\nlines")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "three", "year": 1}\n')
    assert list(read_documents([f"{tmp_path}/*.*"])) == ["one", "three", "two\nlines"]
    with pytest.raises(SettingsError, match="no file matches"):
        list(read_documents([f"{tmp_path}/none*"]))
    (tmp_path / "c.pdf").write_text("")
    with pytest.raises(SettingsError, match="must be .txt or .jsonl, got c.pdf"):
        list(read_documents([f"{tmp_path}/c.pdf"]))
    with pytest.raises(SettingsError, match="must fill a row of block_size = 8, got 3 tokens"):
        PackedBlocks([[1, 2, 3]], 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_attention_and_fast_weights_restart_with_every_document(family, attention, training):
    model = tiny_models.patched(family, attn_implementation=attention).train(training)
    documents = [tiny_models.ids(1, n, seed=n)[0].tolist() for n in (19, 30, 9, 22)]
    data = PackedBlocks(documents, BLOCK)
    batch = [torch.stack([data[i][name] for i in range(2)]) for name in ("input_ids", "position_ids")]
    packed = model(input_ids=batch[0], position_ids=batch[1], use_cache=False).logits
    pieces = {(0, 0): documents[0], (0, 19): documents[1][:21], (1, 0): documents[1][21:],
              (1, 9): documents[2], (1, 18): documents[3]}  # fmt: skip
    for (row, start), tokens in pieces.items():
        alone = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        torch.testing.assert_close(packed[row, start : start + len(tokens)], alone, rtol=1e-4, atol=1e-5)


# --- training -------------------------------------------------------------------------------------
def parameters(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("what", ["projection", "projection+conv", "all"])
def test_what_is_chosen_learns_and_nothing_else(what, tmp_path):
    wanted = settings(tmp_path, what=what, learning_rate=1e-4 if what == "all" else 0.0)
    before = tiny_models.build()
    ttt.patch_model(before, wanted.fast_weight_config())
    model, _ = train(wanted)
    before, after = parameters(before), parameters(model)
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    fast = {n for n in after if "ttt_" in n}
    if what == "all":
        assert moved == set(after)
        largest = {n: float((after[n] - before[n]).abs().max()) for n in after}
        assert max(v for n, v in largest.items() if n not in fast) < 1e-3 < min(largest[n] for n in fast)
    else:
        assert moved == fast and len(fast) == (4 if what == "projection+conv" else 2)


def test_the_loss_falls(tmp_path):
    wanted = settings(tmp_path, steps=30, what="all", learning_rate=3e-3, warmup_steps=3)
    validation = blocks(4, seed=1)
    model, trainer = train(wanted, validation=validation)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(rates) == rates[3] and rates[-1] < 0.02 * max(rates)  # warm-up, then cosine


def state_of(model) -> dict[str, torch.Tensor]:
    return {n: p for n, p in parameters(model).items() if "ttt_" in n}


@pytest.mark.parametrize("bf16", [False, True])
def test_resuming_is_bit_exact(bf16, tmp_path):
    own = {"steps": 5, "accumulation": 2, "bf16": bf16, "inner_lr_warmup_steps": 4, "warmup_steps": 2,
           "gradient_checkpointing": True}  # fmt: skip
    whole, _ = train(settings(tmp_path / "whole", **own))
    train(settings(tmp_path / "part", **own, save_every=2))
    resumed, trainer = train(settings(tmp_path / "part", **own), resume=str(tmp_path / "part/checkpoint-2"))
    assert trainer.state.global_step == 5
    expected, got = state_of(whole), state_of(resumed)
    assert all(torch.equal(expected[n], got[n]) for n in expected)
    untrained = state_of(tiny_models.patched(cfg=settings(tmp_path).fast_weight_config()))
    assert not any(torch.equal(expected[n], untrained[n]) for n in expected)


def test_checkpointing_activations_changes_nothing(tmp_path):
    plain, _ = train(settings(tmp_path / "a"))
    saving, _ = train(settings(tmp_path / "b", gradient_checkpointing=True))
    for name, value in state_of(plain).items():
        torch.testing.assert_close(state_of(saving)[name], value, rtol=1e-4, atol=1e-6)


def test_projections_are_float32_under_autocast(tmp_path):
    wanted = settings(tmp_path, bf16=True)
    model = tiny_models.build().to(torch.bfloat16)
    trainer = train_ntp.make_trainer(wanted, model, blocks(), blocks(4))
    trainer.train()
    assert {p.dtype for p in ntp_trainer.fast_parameters(model)} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_perplexity"]))


def test_step_size_of_the_writes_warms_up(tmp_path):
    seen = []

    class Look(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **_):
            seen.extend({mlp.rule.lr for mlp in ntp_trainer.fast_mlps(model)})

    wanted = settings(tmp_path, steps=5, accumulation=2, inner_lr_warmup_steps=4)
    model = tiny_models.build()
    trainer = train_ntp.make_trainer(wanted, model, blocks(), None)
    trainer.add_callback(Look())
    trainer.train()
    assert seen == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert {mlp.rule.lr for mlp in ntp_trainer.fast_mlps(model)} == {2.0}


def test_perplexity_by_position(tmp_path):
    model, data = tiny_models.build(), blocks(3)
    trainer = train_ntp.make_trainer(settings(tmp_path, batch_size=2), model, blocks(), data)
    got = trainer.evaluate()
    losses, places = [], []
    for row in data:
        out = model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False)
        keep = row["labels"][1:] != -100
        loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], row["input_ids"][1:], reduction="none")
        losses.append(loss[keep])
        places.append(row["position_ids"][1:][keep])
    losses, places = torch.cat(losses).detach(), torch.cat(places)
    assert got["eval_perplexity"] == pytest.approx(float(losses.mean().exp()), rel=1e-4)
    for low in range(0, 30, 5):
        inside = (places >= low) & (places < low + 5)
        expected = float(losses[inside].mean().exp())
        assert got[f"eval_perplexity_from_{low}"] == pytest.approx(expected, rel=1e-4)
    assert "eval_perplexity_from_30" not in got  # no document is that long


def test_a_model_from_a_gguf_file_can_be_trained(tmp_path):
    model = tiny_models.build()
    model.is_quantized, model.hf_quantizer = True, SimpleNamespace(is_trainable=False)
    model.config.quantization_config = SimpleNamespace(quant_method="gguf")
    with pytest.raises(ValueError, match="quantized"):
        train_ntp.make_trainer(settings(tmp_path), model, blocks(), None)
    ttt.unpatch_model(model)
    train_ntp.without_quantization_marks(model)
    train_ntp.make_trainer(settings(tmp_path, steps=1), model, blocks(), None).train()
    assert not hasattr(model.config, "quantization_config")


def test_liger_replaces_the_loss_only(tmp_path):
    arguments = ntp_trainer.training_arguments(settings(tmp_path, liger=True))
    assert arguments.use_liger_kernel
    on = {name for name, wanted in arguments.liger_kernel_config.items() if wanted}
    assert on == {"fused_linear_cross_entropy"}


# --- the command ----------------------------------------------------------------------------------
@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with a model, texts and settings."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "we the people of a more perfect union".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", eos_token="?"
    ).save_pretrained(tmp_path / "model")
    tiny_models.build().save_pretrained(tmp_path / "model")
    (tmp_path / "speech.txt").write_text(" ".join(words[i * i % 8] for i in range(300)))
    wanted = yaml.safe_load((ROOT / "examples" / "configs" / "laptop.yaml").read_text())
    wanted["model"] = {"path": "model"}
    wanted["fast_weights"] |= {"layers": [1], "chunk_size": 8}
    wanted["data"] = {"train": ["*.txt"], "validation": ["speech.txt"], "block_size": 40}
    wanted["train"] |= {"steps": 2, "evaluate_every": 1, "cpu": True, "tensorboard": False}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(wanted | {"output": "out"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command(project, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_ntp.py", "run.yaml", "--set", "train.save_every=1"])
    train_ntp.main()
    assert "validation metrics" in capsys.readouterr().out
    assert Path("out/checkpoint-1/optimizer.pt").exists()
    model = tiny_models.build()
    about = ttt.load_projections(model, "out/projections.safetensors")
    assert about == {"trained on": "*.txt", "steps": "2"}
    fresh = tiny_models.build()
    ttt.patch_model(fresh, ttt.TTTConfig.from_hf_config(model.config))
    assert not torch.equal(*(ntp_trainer.fast_parameters(m)[0] for m in (model, fresh)))


def test_command_saves_a_whole_model_where_all_of_it_learns(project, monkeypatch):
    more = ["train.what=all", "train.learning_rate=1e-4", "train.tensorboard=true"]
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(sys, "argv", ["train_ntp.py", "run.yaml", *(f"--set={m}" for m in more)])
    train_ntp.main()
    model = ttt.from_pretrained("out/final")
    assert len(ntp_trainer.fast_mlps(model)) == 1
    assert list(Path("out").glob("runs/**/events.*"))


def test_command_reports_wrong_settings(project, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_ntp.py", "run.yaml", "--set", "train.speed=9"])
    with pytest.raises(SystemExit):
        train_ntp.main()
    assert "unknown train.speed" in capsys.readouterr().err


def test_losses_of_tokens_match_the_trainers(tmp_path):
    """What evaluation reports per token is what training minimises."""
    model, data = tiny_models.build(), blocks(2)
    trainer = train_ntp.make_trainer(settings(tmp_path), model, data, data)
    batch = {name: torch.stack([data[i][name] for i in range(2)]) for name in data[0]}
    with torch.no_grad():
        expected = model.train()(**batch).loss
    loss, losses, places = trainer.prediction_step(model.eval(), SimpleNamespace(**batch).__dict__, False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert losses.shape == places.shape == (2, BLOCK - 1)
