"""`TTTConfig`: what it accepts, what it refuses and says, and the released config fields."""

import dataclasses
import json
import subprocess
import sys

import pytest

import ttt_kernels as ttt

BASE = {"layers": (0, 2), "chunk_size": 16, "lr": 0.3}
RELEASED_NTP = {
    "ttt_layers": [0, 6, 12, 18, 24, 30],
    "ttt_mode": True,
    "ttt_proj": True,
    "ttt_proj_init": "diag_shared",
    "ttt_conv": False,
    "ttt_predict_mode": "next",
    "ttt_target": "hidden_states",
    "ttt_chunk": 1024,
    "ttt_norm_preserve": True,
    "ttt_inner_opt": "sgd",
    "ttt_lr": 0.15,
}
RELEASED_IN_PLACE = {
    "ttt_layers": [0, 6, 12, 18, 24, 30],
    "ttt_mode": True,
    "ttt_proj": True,
    "ttt_lr": 3,
    "ttt_chunk": 4096,
}
RECIPES = ("llama-3.1-8b", "mistral-7b-v0.3", "qwen3-4b", "qwen3-0.6b", "llama-3.1-8b-in-place")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1, got 0"),
        ({"chunk_size": 16.0}, TypeError, "chunk_size must be an int >= 1, got 16.0"),
        ({"chunk_size": True}, TypeError, "chunk_size must be an int >= 1, got True"),
        ({"chunk_size": 1}, ValueError, "chunk_size must be > horizon = 1, .*got 1"),
        ({"horizon": 16}, ValueError, "chunk_size must be > horizon = 16, .*got 16"),
        ({"horizon": 0}, ValueError, "horizon must be >= 1, got 0"),
        ({"target": "conv", "horizon": 2}, ValueError, 'horizon needs target="next_token".*got 2'),
        ({"target": "conv", "chunk_size": 4}, ValueError, "chunk_size must be >= 5, .*got 4"),
        ({"target": "previous"}, ValueError, "target must be one of next_token, conv, got 'prev"),
        ({"target_source": "x"}, ValueError, "target_source must be one of hidden_states, .*'x'"),
        ({"lr": 0}, ValueError, "lr must be finite and > 0, got 0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite and > 0, got nan"),
        ({"lr": float("inf")}, ValueError, "lr must be finite and > 0, got inf"),
        ({"lr": "0.3"}, TypeError, "lr must be a number > 0, got '0.3'"),
        (
            {"inner_optimizer": "adam"},
            ValueError,
            "inner_optimizer must be one of sgd, specnorm, c",
        ),
        ({"inner_optimizer": "clip"}, ValueError, "max_norm must be given .*got None"),
        ({"max_norm": 1.0}, ValueError, 'max_norm needs inner_optimizer="clip" .*"sgd", got 1.0'),
        (
            {"inner_optimizer": "clip", "max_norm": -1},
            ValueError,
            "max_norm must be finite and > 0",
        ),
        ({"preserve_row_norm": 1}, TypeError, "preserve_row_norm must be True or False, got 1"),
        ({"use_proj": "yes"}, TypeError, "use_proj must be True or False, got 'yes'"),
        ({"use_proj": False, "proj_init": "small"}, ValueError, "proj_init needs use_proj=True"),
        ({"proj_init": "zeros"}, ValueError, "proj_init must be one of diag_shared, small, identi"),
        ({"layers": ()}, ValueError, "layers must name at least one layer, got none"),
        ({"layers": (0, 2, 0)}, ValueError, r"layers must name each layer once, got \[0\]"),
        ({"layers": (-1,)}, ValueError, "layers must be >= 0, got -1"),
        ({"layers": (0.0,)}, TypeError, "layers must be an int >= 0, got 0.0"),
        ({"layers": "0,2"}, TypeError, "layers must be a sequence of layer indices, got '0,2'"),
        ({"layers": 2}, TypeError, "layers must be a sequence of layer indices, got 2"),
        ({"learning_rate": 1.0}, TypeError, "unexpected keyword argument 'learning_rate'"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        ttt.TTTConfig(**{**BASE, **change})


def test_normal_form():
    cfg = ttt.TTTConfig(layers=[4, 0, 2], chunk_size=16, lr=1)
    assert cfg.layers == (0, 2, 4)
    assert cfg == ttt.TTTConfig(layers=range(0, 5, 2), chunk_size=16, lr=1.0)
    assert (cfg.proj_init, type(cfg.lr)) == ("diag_shared", float)
    assert ttt.TTTConfig(**BASE, use_proj=False).proj_init is None
    assert hash(cfg) == hash(dataclasses.replace(cfg))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 2.0


def test_recipes():
    llama, mistral, qwen4, qwen06, in_place = map(ttt.TTTConfig.recipe, RECIPES)
    assert llama.layers == mistral.layers == qwen4.layers == (0, 6, 12, 18, 24, 30)
    assert qwen06.layers == (0, 4, 8, 12, 16, 20, 24)
    assert [c.lr for c in (llama, mistral, qwen4, qwen06, in_place)] == [0.3, 0.15, 3.0, 2.6, 3.0]
    assert [c.inner_optimizer for c in (llama, mistral, qwen4, qwen06)] == (
        ["specnorm", "sgd", "specnorm", "sgd"]
    )
    assert [c.preserve_row_norm for c in (llama, mistral, qwen4, qwen06)] == (
        [True, True, False, True]
    )
    assert (llama.proj_init, qwen4.proj_init) == ("small", "diag_shared")
    assert (in_place.target, in_place.chunk_size) == ("conv", 4096)
    with pytest.raises(ValueError, match="recipe must be one of llama-3.1-8b, .*got 'gpt2'"):
        ttt.TTTConfig.recipe("gpt2")


def test_reads_released_fields():
    assert ttt.TTTConfig.from_hf_config(RELEASED_NTP) == ttt.TTTConfig.recipe("mistral-7b-v0.3")
    as_text = {**RELEASED_NTP, "ttt_layers": json.dumps(RELEASED_NTP["ttt_layers"])}
    assert ttt.TTTConfig.from_hf_config(as_text) == ttt.TTTConfig.recipe("mistral-7b-v0.3")
    in_place = ttt.TTTConfig.recipe("llama-3.1-8b-in-place")
    assert ttt.TTTConfig.from_hf_config(RELEASED_IN_PLACE) == in_place
    assert ttt.TTTConfig.from_hf_config({"hidden_size": 8, **RELEASED_IN_PLACE}) == in_place


def test_writes_what_was_released():
    assert ttt.TTTConfig.recipe("mistral-7b-v0.3").to_hf_fields() == RELEASED_NTP


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"inner_optimizer": "clip", "max_norm": 1e-5},
        {"target": "conv", "target_source": "input_embed"},
        {"horizon": 3, "proj_init": "small"},
        {"use_proj": False, "preserve_row_norm": True, "inner_optimizer": "specnorm"},
    ],
)
def test_round_trip_is_exact(change):
    cfg = ttt.TTTConfig(**BASE, **change)
    fields = cfg.to_hf_fields()
    assert all(name.startswith("ttt_") for name in fields)
    assert ttt.TTTConfig.from_hf_config(json.loads(json.dumps(fields))) == cfg


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_round_trip(name):
    cfg = ttt.TTTConfig.recipe(name)
    assert ttt.TTTConfig.from_hf_config(cfg.to_hf_fields()) == cfg


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"ttt_clip_tau": 1e-5},
            ValueError,
            r"unknown field\(s\) ttt_clip_tau .*known are ttt_mode",
        ),
        ({"ttt_mode": False}, ValueError, "ttt_mode must be true .*got False"),
        ({"ttt_chunk": None}, ValueError, "missing: ttt_chunk"),
        ({"ttt_predict_mode": "same"}, ValueError, "ttt_predict_mode must be \"next\".*got 'same'"),
        ({"ttt_conv": True}, ValueError, 'ttt_predict_mode must be "next" without ttt_conv'),
        ({"ttt_conv": 1}, TypeError, "ttt_conv must be true or false, got 1"),
        (
            {"ttt_layers": "0,6"},
            ValueError,
            "ttt_layers must be a list or its JSON text, got '0,6'",
        ),
        ({"ttt_layers": [0, 6, 6]}, ValueError, "layers must name each layer once"),
        ({"ttt_inner_opt": "clip"}, ValueError, "max_norm must be given"),
    ],
)
def test_refuses_config_fields(change, error, message):
    with pytest.raises(error, match=message):
        ttt.TTTConfig.from_hf_config({**RELEASED_NTP, **change})


def test_needs_fields():
    with pytest.raises(ValueError, match="missing: ttt_mode, ttt_layers, ttt_chunk, ttt_lr"):
        ttt.TTTConfig.from_hf_config({"hidden_size": 8})


def test_needs_no_transformers():
    code = (
        "import sys, ttt_kernels as ttt; ttt.TTTConfig.recipe('qwen3-4b'); ttt.patch_model; "
        "assert 'transformers' not in sys.modules and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
