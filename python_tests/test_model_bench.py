"""`bench --suite models`: whole models, patched against plain, at sizes for a test."""

import json
from dataclasses import replace

import pytest
import tiny_models as tiny
import torch

import ttt_kernels as ttt
from ttt_kernels.cli import bench_models_shapes as shapes
from ttt_kernels.cli import bench_models_suite as suite
from ttt_kernels.cli import demo_data, demo_model, report_records
from ttt_kernels.cli.bench_models import DECODE, PATCHED, PLAIN, PREFILL, SIDES, twin_of
from ttt_kernels.cli.main import main
from ttt_kernels.cli.measure import Timing

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
WIDTHS = {
    "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 560,
}  # fmt: skip
TINY = tuple(replace(s, sizes={**s.sizes, **WIDTHS}) for s in shapes.SHAPES)
PLAN = shapes.Plan(40, 16, layers=8, chunk_size=8, steps=6, batches=(1, 2))
STATE_BYTES = 4 * 64 * 128  # of one fast weight
LARGE = 1 << 40


@pytest.fixture
def tiny_plans(monkeypatch):
    monkeypatch.setattr(shapes, "SHAPES", TINY)
    monkeypatch.setattr(shapes, "CPU_PLANS", {name: PLAN for name in shapes.NAMES})


def subject(**changes) -> shapes.Subject:
    return shapes.random_model(TINY[0], replace(PLAN, **changes), CPU)


# --- what is measured -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("qwen3-0.6b", 596_049_920), ("qwen3-4b", 4_022_468_096), ("llama-3.1-8b", 8_030_261_248)],
)
def test_shapes_are_those_of_the_released_models(shape, parameters):
    """With all layers, by the parameters the released models have."""
    found = next(s for s in shapes.SHAPES if s.name == shape)
    config = getattr(transformers, f"{found.family}Config")(**found.sizes, **found.options)
    with torch.device("meta"):
        model = getattr(transformers, f"{found.family}ForCausalLM")(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    plan = replace(PLAN, layers=None, tokens=8, prompt=8, batches=(1,), dtype=torch.bfloat16)
    need = shapes.bytes_needed(found, plan, found.sizes["num_hidden_layers"])
    state = len([i for i in found.recipe.layers]) * 4 * config.hidden_size * config.intermediate_size
    assert 1 <= need / (2 * parameters + state) < 1.01


def test_few_layers_keep_the_recipe_s_share_of_fast_weights():
    for shape in shapes.SHAPES:
        plan = shapes.CPU_PLANS[shape.name]
        recipe = shape.recipe.layers
        assert plan.layers % shape.period == 0
        kept = [i for i in recipe if i < plan.layers]
        assert kept == list(recipe[: plan.layers // shape.period]) and kept
        whole = len(recipe) / shape.sizes["num_hidden_layers"]
        assert len(kept) / plan.layers == pytest.approx(whole, rel=0.15)
        part = shapes.vocabulary(shape, plan.layers) / shape.sizes["vocab_size"]
        assert part == pytest.approx(plan.layers / shape.sizes["num_hidden_layers"], rel=1e-3)


@pytest.mark.parametrize("plan", [*shapes.CPU_PLANS.values(), shapes.GPU_PLAN])
def test_plans_are_in_whole_chunks(plan):
    """At least one chunk is read with a written weight, and no token that is decoded fills one."""
    for tokens in (plan.tokens, plan.prompt):
        assert tokens % plan.chunk_size == 0 and tokens >= 2 * plan.chunk_size
    assert 3 < plan.steps < plan.chunk_size


def test_layers_are_left_out_where_memory_asks_for_it():
    shape, plan = TINY[0], replace(PLAN, layers=None)
    need = {n: shapes.bytes_needed(shape, plan, n) / shapes.MEMORY_SHARE for n in (28, 12, 8, 4)}
    assert shapes.layers_that_fit(shape, plan, None) == shapes.layers_that_fit(shape, plan, LARGE) == 28
    assert shapes.layers_that_fit(shape, plan, int(need[12]) + 1) == 12
    assert shapes.layers_that_fit(shape, plan, int(need[12])) == 8
    assert shapes.layers_that_fit(shape, replace(plan, layers=6), LARGE) == 6
    with pytest.raises(shapes.Skip, match="4 layers need about .* available"):
        shapes.layers_that_fit(shape, plan, int(need[4]))


# --- how it is measured ---------------------------------------------------------------------------
def test_rows_of_a_model():
    found = subject()
    rows = suite.measure(found, 3)
    assert [(r.call, r.batch, r.tokens, r.work) for r in rows] == [
        (PREFILL, 1, 40, 40), (DECODE, 1, 16, 1), (DECODE, 2, 16, 2)
    ]  # fmt: skip
    parameters = sum(p.nbytes for p in found.model.parameters())
    prefill, decode, both = rows
    tails = 4 * 2 * 8 * (128 + 64)  # one open chunk of z and x in each of two layers
    assert prefill.state_bytes >= 2 * STATE_BYTES and decode.state_bytes <= 2 * STATE_BYTES + tails + 1024
    assert both.state_bytes == 2 * decode.state_bytes
    keys_and_values = 2 * 8 * 22 * 2 * 16 * 4  # of 22 tokens
    for row in rows:
        assert row.peak_bytes[PATCHED] > row.peak_bytes[PLAIN] > parameters
    assert decode.peak_bytes[PLAIN] > parameters + keys_and_values
    grown = {side: both.peak_bytes[side] - decode.peak_bytes[side] for side in SIDES}
    assert grown[PATCHED] - grown[PLAIN] >= decode.state_bytes - tails
    record = decode.as_record()
    assert record["patched"] == [0, 4] and (record["layers"], record["of_layers"]) == (8, 28)
    assert (record["vocabulary"], record["of_vocabulary"]) == (160, 560)
    assert (record["kind"], record["op"], record["suite"]) == ("result", "model", "models")
    assert record["repeats"] == PLAN.steps - 2 and prefill.as_record()["repeats"] == 3
    assert set(prefill.gemm_share) == set(SIDES) and decode.gemm_share is None


def test_the_ratio_is_that_of_the_pairs():
    timings = {PLAIN: Timing([1.0, 8.0, 2.0]), PATCHED: Timing([2.0, 8.0, 3.0])}
    row = suite.ShapeRow({}, PREFILL, 1, 8, timings, 8, dict.fromkeys(SIDES, 1), 0)
    record = row.as_record()
    assert record["ratio"] == 1.5 and record["tokens_per_second"] == {PLAIN: 4.0, PATCHED: 8 / 3}
    assert record["ratio_p20"] == pytest.approx(1.2) and record["ratio_p80"] == pytest.approx(1.8)


def test_flops_of_a_prefill():
    found = subject()
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128
    plain = 40 * 8 * (2 * layer + 2 * 40 * 4 * 16)
    assert suite.flops(found, PLAIN, 40) == plain
    assert suite.flops(found, PATCHED, 40) == plain + 40 * 2 * (2 * 64 * 128 + 2 * 64 * 64)


def spoil(twin, what: str) -> None:
    for mlp in tiny.fast_mlps(twin):
        weight = mlp.ttt_proj.weight.data
        weight.fill_({"nothing written": 0.0, "not finite": float("inf")}[what])


@pytest.mark.parametrize("what", ["nothing written", "not finite"])
def test_wrong_models_are_refused(what):
    found = subject()
    models = {PLAIN: found.model, PATCHED: twin_of(found.model, found.config)}
    suite.check(models, found.ids[:1, :16], 8)
    spoil(models[PATCHED], what)
    words = {"nothing written": "still the plain one's", "not finite": "2 writes .* got"}[what]
    with pytest.raises(suite.WrongResults, match=words):
        suite.check(models, found.ids[:1, :16], 8)


def test_another_model_is_refused():
    one, other = subject(), subject()
    with torch.no_grad():
        other.model.lm_head.weight.mul_(1.01)
    models = {PLAIN: one.model, PATCHED: twin_of(other.model, other.config)}
    with pytest.raises(suite.WrongResults, match=r"before the first write .* differ by 0\.01"):
        suite.check(models, one.ids[:1, :16], 8)


# --- the command ----------------------------------------------------------------------------------
def unavailable(artefact, folder):
    raise demo_data.Unavailable("no network")


def test_command(tiny_plans, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo_data, "fetch", unavailable)
    lines = tmp_path / "lines.jsonl"
    assert main(["bench", "--suite", "models", "--repeats", "2", "--output", str(lines)]) == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    words = shown.replace("\n", " ")
    assert "8 of 28 layers" in words and "fast weights in 0, 4" in words
    assert "skipped: smollm2-135m: the pretrained model cannot be had (no network)" in words
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert records[0]["kind"] == "environment"
    rows = [(r["shape"], r["call"], r["batch"]) for r in records if r["kind"] == "result"]
    calls = ((PREFILL, 1), (DECODE, 1), (DECODE, 2))
    assert rows == [(s.name, *call) for s in TINY for call in calls]
    entries = report_records.newest(report_records.read(tmp_path))  # every row is one of its own
    assert len([e for e in entries if e.timed]) == 2 * len(rows)


def test_the_pretrained_model(tiny_plans, monkeypatch, tmp_path):
    text = demo_model.Text("words", "x" * 100)
    found = demo_model.Subject("tiny", tiny.build(), lambda s: [7] * len(s))
    monkeypatch.setattr(shapes, "load_subject", lambda *a: found)
    monkeypatch.setattr(shapes, "load_text", lambda *a: text)
    loaded = shapes.load(shapes.SMOLLM, replace(PLAN, tokens=80), CPU)
    assert loaded.weights == "pretrained" and loaded.plan.tokens == 80 and loaded.ids.shape == (2, 80)
    assert [r.tokens for r in suite.measure(loaded, 1)] == [80, 16, 16]
    long = replace(PLAN, tokens=LARGE)  # longer than the model's context of 256
    with pytest.raises(shapes.Skip, match="words has 100 tokens, 248 are needed"):
        shapes.load(shapes.SMOLLM, long, CPU)


def test_a_wrong_model_fails_the_command(tiny_plans, monkeypatch, capsys):
    monkeypatch.setattr(suite, "NAMES", ("qwen3-0.6b",))
    monkeypatch.setattr(suite, "AGREEMENT", {torch.float32: -1.0})
    assert main(["bench", "--suite", "models"]) == 1
    assert "refused: qwen3-0.6b: before the first write" in capsys.readouterr().out


def test_a_model_in_bfloat16():
    found = subject(dtype=torch.bfloat16, batches=(1,))
    assert found.model.dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32
    rows = suite.measure(found, 1)
    assert all(row.about["dtype"] == "bfloat16" for row in rows)
    assert ttt.FastWeightMLP in {type(m) for m in twin_of(found.model, found.config).modules()}


@pytest.mark.parametrize("more", [["--T", "64"], ["--impl", "eager"], ["--plot", "x.png"]])
def test_the_suite_takes_no_grid(more, capsys):
    assert main(["bench", "--suite", "models", *more]) == 2
    assert f"--suite models fixes the grid: it cannot be combined with {more[0]}" in capsys.readouterr().err
