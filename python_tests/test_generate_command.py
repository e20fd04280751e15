"""`python -m ttt_kernels generate` and `bench --suite streaming` on a tiny model."""

import json
from types import SimpleNamespace

import pytest
import tiny_models as tiny
import torch

import ttt_kernels as ttt
from ttt_kernels.cli import bench_models, demo_data, fast_weights
from ttt_kernels.cli.main import main

pytest.importorskip("transformers")
from transformers import DynamicCache  # noqa: E402

WORDS = [f"w{n}" for n in range(tiny.SIZES["vocab_size"] - 3)]
OPTIONS = ["--layers", "0", "2", "--chunk-size", "8", "--lr", "2", "--proj-init", "identity"]
NEW = 12


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", bos_token="<s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    tiny.build().save_pretrained(folder)
    return folder


@pytest.fixture
def texts():
    """Two texts, 29 and 13 tokens long."""
    return [" ".join(WORDS[i * i * n % len(WORDS)] for i in range(length))
            for n, length in ((1, 29), (3, 13))]  # fmt: skip


@pytest.fixture
def call(folder, tmp_path, capsys):
    """Runs the command; the record it wrote, with what it printed."""

    def call(*arguments) -> SimpleNamespace:
        file = tmp_path / "record.json"
        fixed = ["--model", folder, "--max-new-tokens", NEW, "--json", file]
        assert main(["generate", *map(str, [*fixed, *arguments])]) == 0
        shown = capsys.readouterr()
        record = json.loads(file.read_text())
        assert shown.out == record["text"] + "\n"
        return SimpleNamespace(shown=shown.err, **record)

    return call


@pytest.fixture
def fails(folder, capsys):
    def fails(*arguments) -> str:
        try:
            code = main(["generate", "--model", str(folder), *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        shown = capsys.readouterr()
        assert code == 2 and "Traceback" not in shown.err and shown.out == ""
        return shown.err

    return fails


def patched(**changes):
    model = tiny.build()
    fixed = {**fast_weights.DEFAULTS, "layers": (0, 2), "chunk_size": 8, "lr": 2.0}
    ttt.patch_model(model, ttt.TTTConfig(**{**fixed, "proj_init": "identity", **changes}))
    return model


def ids_of(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer(text)["input_ids"]])


def new_ids(model, ids, **options) -> list[int]:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()


# --- what is generated --------------------------------------------------------------------------
def test_scan(call, texts, tokenizer, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(texts[0])
    got = call("--prompt-file", file, *OPTIONS)
    ids = ids_of(tokenizer, texts[0])
    assert got.new_ids == new_ids(patched(), ids)
    assert got.text == tokenizer.decode(got.new_ids, skip_special_tokens=True)
    assert (got.prompt_tokens, got.new_tokens, got.method) == (29, NEW, "scan")
    done = (29 + NEW - 1) // 8  # the last token is never read
    assert got.writes == {"0": done, "2": done} and got.refused == {"0": 0, "2": 0}
    weight = 4 * (64 * 128 + 64)  # and the row scales
    assert got.state_bytes == 2 * (weight + 4 * 8 * (128 + 64))
    assert got.prefill_tokens_per_second > 0 and got.decode_tokens_per_second > 0
    assert got.config["chunk_size"] == 8 and got.environment["torch"] == torch.__version__
    assert "29" in got.shown and f"{2 * done} writes in 2 layers, 0 refused" in got.shown
    assert max(len(line) for line in got.shown.splitlines()) <= 80


def test_off_is_the_plain_model(call, texts, tokenizer):
    got = call("--prompt", texts[0], "--method", "off")
    assert got.new_ids == new_ids(tiny.build(), ids_of(tokenizer, texts[0]))
    assert (got.config, got.state_bytes, got.writes) == ({}, 0, {})


def test_ridge(call, texts, tokenizer):
    options = ["--proj-init", "identity", "--layers", "0", "2", "--eta", "0.5", "--cap", "2"]
    got = call("--prompt", texts[0], "--method", "ridge", *options)
    ids = ids_of(tokenizer, texts[0])
    with ttt.adapt(patched(), ids, eta=0.5, cap=2.0) as adapted:
        want = adapted.generate(max_new_tokens=NEW, do_sample=False)
    assert got.new_ids == want[0, 29:].tolist() != new_ids(tiny.build(), ids)
    assert got.state_bytes >= 2 * 4 * 64 * 128
    assert got.config == {
        "layers": [0, 2], "preserve_row_norm": True, "horizon": 1, "proj_init": "identity",
        "lam": 1.0, "eta": 0.5, "cap": 2.0, "last_k": 8192,
    }  # fmt: skip


def test_file_and_prompt_and_prompt_tokens(call, texts, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(texts[0])
    both = call("--prompt-file", file, "--prompt", texts[1], *OPTIONS)
    assert both.prompt_tokens == 42
    assert both.new_ids == call("--prompt", " ".join(texts), *OPTIONS).new_ids
    cut = call("--prompt-file", file, "--prompt", texts[1], "--prompt-tokens", 29, *OPTIONS)
    assert cut.new_ids == call("--prompt", texts[0], *OPTIONS).new_ids


@pytest.mark.parametrize("words", [1, 29])
def test_beams(call, texts, tokenizer, words):
    text = " ".join(texts[0].split()[:words])
    got = call("--prompt", text, "--num-beams", 3, *OPTIONS)
    assert got.new_ids == new_ids(patched(), ids_of(tokenizer, text), num_beams=3)


def test_sampling_is_seeded(call, texts):
    def sample(seed: int, *options) -> list[int]:
        return call("--prompt", texts[0], "--seed", seed, *options, *OPTIONS).new_ids

    warm = ["--temperature", "1.5"]
    assert sample(0, *warm) == sample(0, *warm) != sample(1, *warm)
    greedy = sample(0)
    assert sample(1, "--top-p", "1e-6") == greedy != sample(0, *warm)


def test_random_model_is_marked(monkeypatch, tmp_path, capsys):
    def refuse(artefact, folder):
        raise demo_data.Unavailable("no network")

    monkeypatch.setattr(demo_data, "download", refuse)
    small = ["--max-new-tokens", "3", "--chunk-size", "8", "--cache", str(tmp_path)]
    assert main(["generate", "--prompt", "to be or not to be", *small]) == 0
    shown = capsys.readouterr()
    assert "RANDOM MODEL: the pretrained model cannot be had (no network)" in shown.err and shown.out


def test_chat_template(folder, texts, tokenizer, call, tmp_path, monkeypatch):
    chat = tmp_path / "chat"
    with_template = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    ending = "{% if add_generation_prompt %} w0{% endif %}"
    with_template.chat_template = "<s> {{ messages[0]['content'] }}" + ending
    with_template.save_pretrained(chat)
    tiny.build().save_pretrained(chat)
    got = call("--model", chat, "--prompt", texts[0], "--chat", *OPTIONS)
    assert got.prompt_tokens == 31
    want = new_ids(patched(), torch.cat([torch.tensor([[1]]), ids_of(tokenizer, texts[0] + " w0")], 1))
    assert got.new_ids == want


# --- states ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("second", [1, 13])
def test_saved_and_loaded_is_carried(call, texts, tokenizer, tmp_path, beams, second):
    """The file holds what one process has after reading the first text."""
    texts[1] = " ".join(texts[1].split()[:second])
    state = tmp_path / "state.safetensors"
    options = [*OPTIONS, "--num-beams", beams]
    saved = call("--prompt", texts[0], "--save-state", state, *options)
    assert saved.new_ids == call("--prompt", texts[0], *options).new_ids
    loaded = call("--prompt", texts[1], "--load-state", state, *options)

    model, ids = patched(), [ids_of(tokenizer, text) for text in texts]
    with torch.no_grad():
        cache = model(ids[0], use_cache=True).past_key_values
    carried = ttt.FastWeightState.of(cache)
    assert carried.positions == ttt.FastWeightState.load(state, model).positions == [29]
    carried.repeat(beams)
    fresh = DynamicCache()
    carried.attach(fresh)
    assert loaded.new_ids == new_ids(model, ids[1], past_key_values=fresh, num_beams=beams)
    assert loaded.new_ids != call("--prompt", texts[1], *options).new_ids
    assert loaded.writes == {i: (29 + second + NEW - 1) // 8 for i in ("0", "2")}
    assert loaded.prompt_tokens == second


def test_states_chain(call, texts, tmp_path):
    """Reading in two pieces, each with a state of its own."""
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    call("--prompt", texts[0], "--save-state", first, *OPTIONS)
    call("--prompt", texts[1], "--load-state", first, "--save-state", second, *OPTIONS)
    assert ttt.FastWeightState.load(second, patched()).positions == [42]
    call("--prompt", texts[1], "--load-state", second, "--save-state", second, *OPTIONS)
    assert ttt.FastWeightState.load(second, patched()).positions == [55]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--prompt-file", "--prompt"]),
        (["--prompt-file", "absent.txt"], ["--prompt-file", "absent.txt"]),
        (["--prompt", ""], ["at least one token"]),
        (["--prompt", "w1", "--max-new-tokens", "256"], ["context of 256", "1 + 256"]),
        (["--prompt", "w1", "--temperature", "0"], ["--temperature", "> 0", "greedy"]),
        (["--prompt", "w1", "--top-p", "1.5"], ["--top-p", "(0, 1]", "1.5"]),
        (["--prompt", "w1", "--method", "lora"], ["--method", "lora", "ridge"]),
        (["--prompt", "w1", "--chat"], ["--chat", "chat template"]),
        (["--prompt", "w1", "--layers", "9"], ["layers", "0..3", "[9]"]),
        (["--prompt", "w1", "--lam", "1"], ["--method scan", "--lam"]),
        (["--prompt", "w1", "--method", "off", "--lr", "1", "--load-state", "x"],
         ["--method off", "no fast weights", "--load-state, --lr"]),
        (["--prompt", "w1", "--method", "ridge", "--save-state", "x", "--chunk-size", "8"],
         ["--method ridge", "--save-state, --chunk-size"]),
        (["--prompt", "w1", "--method", "ridge", "--eta", "0.1", "--lam", "-1"], ["lam", "positive"]),
        (["--prompt", "w1", "--load-state", "absent.safetensors"], ["--load-state", "absent"]),
        (["--prompt", "w1", "--save-state", "absent/x.safetensors"], ["--save-state", "absent"]),
        (["--prompt", "w1", "--save-state", "."], ["--save-state .", "must be a file, got a folder"]),
        (["--prompt", "w1", "--json", "."], ["--json .", "must be a file, got a folder"]),
        (["--prompt", "w1", "--json", "absent/x.json"], ["--json", "absent"]),
    ],
)  # fmt: skip
def test_bad_arguments(fails, arguments, words):
    shown = fails(*arguments)
    assert all(word in shown for word in words), shown


def test_states_of_others_are_refused(call, fails, texts, tmp_path):
    state = tmp_path / "state.safetensors"
    call("--prompt", texts[0], "--save-state", state, *OPTIONS)
    shown = fails("--prompt", "w1", "--load-state", state, *OPTIONS, "--chunk-size", "16")
    assert "chunk_size: 8 in the state, 16 in the model" in shown
    state.write_bytes(b"nothing of the kind")
    assert "safetensors" in fails("--prompt", "w1", "--load-state", state, *OPTIONS)


def test_trained_checkpoints_are_refused(fails, folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    patched().save_pretrained(tmp_path)
    shown = fails("--model", tmp_path, "--prompt", "w1")
    assert "trained with fast weights" in shown and "patch_model" in shown


# --- the benchmark --------------------------------------------------------------------------------
def test_streaming_benchmark(folder):
    subject = SimpleNamespace(model=tiny.build(), layers=4)
    sizes = bench_models.Sizes(prefill=40, prompt=16, steps=5, chunk_size=8)
    twin = bench_models.patched_twin(subject, sizes)
    plain, fast = dict(subject.model.named_parameters()), dict(twin.named_parameters())
    assert all(fast[name] is parameter for name, parameter in plain.items())
    models = {bench_models.PLAIN: subject.model, bench_models.PATCHED: twin}
    results = bench_models.measure(models, tiny.ids(1, 40), sizes, repeats=3)
    rows = {row.call: row for row in results.rows}
    assert {name: (r.tokens, r.repeats) for name, r in rows.items()} == {
        bench_models.PREFILL: (40, 3), bench_models.DECODE: (1, 5), bench_models.WRITE: (1, 3)
    }  # fmt: skip
    weights = 4 * 4 * (64 * 128 + 64)
    assert all(r.state_bytes == weights + 4 * 4 * 8 * (128 + 64) for r in rows.values())
    judged = [target.judge(results) for target in bench_models.TARGETS]
    assert [t["measured"] for t in judged] == [
        rows[bench_models.DECODE].ratio, rows[bench_models.PREFILL].ratio
    ]  # fmt: skip
    assert all(t["reached"] == (t["measured"] <= float(t["wanted"][3:])) for t in judged)
    empty = bench_models.ModelResults()
    assert all(t.judge(empty)["reached"] is None for t in bench_models.TARGETS)


def test_streaming_benchmark_command(monkeypatch, tmp_path, capsys, folder):
    from ttt_kernels.cli import demo_model

    text = demo_model.Text("words", " ".join(WORDS * 2))
    monkeypatch.setattr(bench_models, "Sizes", lambda: SIZES)
    monkeypatch.setattr(bench_models, "load_text", lambda *a: text)
    monkeypatch.setattr(
        bench_models, "load_subject", lambda *a: demo_model.pretrained(str(folder), "tiny")
    )
    lines = tmp_path / "out" / "lines.jsonl"
    assert main(["bench", "--suite", "streaming", "--repeats", "2", "--output", str(lines)]) == 0
    shown = capsys.readouterr().out
    assert "decode+write" in shown and "MiB" in shown and "prefill: patched over" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80
    kinds = [json.loads(line)["kind"] for line in lines.read_text().splitlines()]
    assert kinds == ["environment", "result", "result", "result", "target", "target"]


SIZES = bench_models.Sizes(prefill=40, prompt=16, steps=5, chunk_size=8)


@pytest.mark.parametrize("more", [["--T", "64"], ["--impl", "eager"], ["--plot", "x.png"]])
def test_streaming_benchmark_takes_no_grid(more, capsys):
    assert main(["bench", "--suite", "streaming", *more]) == 2
    shown = capsys.readouterr().err
    assert "--suite streaming" in shown and more[0] in shown


def test_streaming_benchmark_needs_the_real_model(monkeypatch, tmp_path, capsys):
    def refuse(artefact, folder):
        raise demo_data.Unavailable("no network")

    monkeypatch.setattr(demo_data, "fetch", refuse)
    assert main(["bench", "--suite", "streaming"]) == 2
    assert "pretrained model" in capsys.readouterr().err
