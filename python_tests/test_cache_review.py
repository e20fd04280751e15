"""A cache goes on with the model and configuration it was filled by, and what is refused changes
nothing."""

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from helpers import randn
from streams import V5, close, greedy, model_of, static_cache, whole
from test_streaming import C, D, layer, streamed
from transformers import DynamicCache

import ttt_kernels as ttt
from ttt_kernels.modules.layer_state import LayerState

OTHERS = [({"lr": 3.0}, "layer 0, lr: 2.0 in the state, 3.0"), ({"chunk_size": 4}, "chunk_size: 8")]


def repatched(**changes):
    """A patched model, its cache, and a function that patches it anew."""
    model = model_of()

    def again() -> None:
        ttt.unpatch_model(model)
        ttt.patch_model(model, tiny.config(**changes))

    return model, again


# --- another model or configuration -------------------------------------------------------------
@pytest.mark.parametrize("changes, message", OTHERS)
@torch.no_grad()
def test_a_live_cache_is_not_continued_with_another_configuration(changes, message):
    (model, again), x = repatched(**changes), tiny.ids(1, 13)
    cache = model(x).past_key_values
    again()
    for used in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        with pytest.raises(ValueError, match=f"of another model: .*{message}"):
            model(x[:, :1], past_key_values=used)
        assert used.get_seq_length() == 13 and ttt.FastWeightState.of(used).positions == [13]


@torch.no_grad()
def test_a_live_cache_is_continued_by_an_equal_model():
    (model, again), x = repatched(), tiny.ids(1, 30)
    twin = copy.deepcopy(model)
    cache = model(x[:, :13]).past_key_values
    parts = [m(p, past_key_values=cache).logits
             for m, p in zip((twin, model), x[:, 13:].split([9, 8], 1), strict=True)]  # fmt: skip
    close(torch.cat(parts, 1), whole(model, x)[:, 13:])
    again()
    model(x[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_live_cache_is_not_continued_by_other_weights_or_another_rule():
    model, x = model_of(), tiny.ids(1, 13)
    cache = model(x).past_key_values
    other = copy.deepcopy(model)
    other.model.layers[2].mlp.down_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="layer 2, the values of down_proj.weight"):
        other(x[:, :1], past_key_values=copy.deepcopy(cache))
    mlp = model.model.layers[2].mlp
    mlp.rule = tiny.config(lr=5.0)
    with pytest.raises(ValueError, match="layer 2, lr: 2.0 in the state, 5.0 in the model"):
        model(x[:, :1], past_key_values=cache)


@torch.no_grad()
def test_attach_refuses_the_state_of_another_model():
    model, other, x = model_of(), tiny.patched("llama", tiny.config(lr=3.0)).double(), tiny.ids(1, 13)
    cache, foreign = model(x).past_key_values, other(x).past_key_values
    mine = ttt.FastWeightState.of(cache)
    with pytest.raises(ValueError, match="lr: 3.0 in the state, 2.0 in the cache"):
        ttt.FastWeightState.of(foreign).attach(cache)
    assert ttt.FastWeightState.of(cache) is mine and cache.layers[0].ttt is mine.layers[0]
    close(model(x, past_key_values=cache).logits, whole(model, torch.cat([x, x], 1))[:, 13:])


@pytest.mark.parametrize("layers", [(0, 2), (1,), (0, 1, 3)])
@torch.no_grad()
def test_a_cache_that_was_reset_serves_another_configuration(layers):
    (model, again), x = repatched(lr=3.0, layers=layers, proj_init="identity"), tiny.ids(1, 30)
    cache = static_cache(model)
    model(x, past_key_values=cache)
    cache.reset()
    again()
    close(model(x, past_key_values=cache).logits, whole(model, x))
    assert sorted(ttt.FastWeightState.of(cache).layers) == list(layers)


# --- cropping -----------------------------------------------------------------------------------
@pytest.mark.parametrize("layers", [(0, 2), (1, 3)], ids=["first", "later"])
@torch.no_grad()
def test_a_refused_crop_changes_no_layer(layers):
    model = tiny.patched("llama", tiny.config(layers=layers)).double()
    x = tiny.ids(2, 40)
    cache = model(x[:, :26]).past_key_values
    for used in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        with pytest.raises(RuntimeError, match="only 2 tokens of the open chunk"):
            used.crop(-6 if V5 else 20)
        assert [used.get_seq_length(i) for i in range(4)] == [26] * 4
        assert ttt.FastWeightState.of(used).positions == [26, 26]
        used.crop(-2 if V5 else 24)
        assert [used.get_seq_length(i) for i in range(4)] == [24] * 4
        close(model(x[:, 24:], past_key_values=used).logits, whole(model, x)[:, 24:])


@torch.no_grad()
def test_one_layer_that_cannot_follow_keeps_all():
    model, x = model_of(), tiny.ids(2, 40)
    cache = model(x[:, :13]).past_key_values
    ttt.FastWeightState.of(cache).layers[0].record_past = True
    for part in x[:, 13:26].split(1, 1):
        model(part, past_key_values=cache)
    twin = copy.deepcopy(cache)
    ttt.FastWeightState.of(twin).clone().attach(twin)
    for used in (cache, twin):
        with pytest.raises(RuntimeError, match="only 2 tokens of the open chunk"):
            used.crop(-6 if V5 else 20)
        assert [used.get_seq_length(i) for i in range(4)] == [26] * 4
        close(model(x[:, 26:], past_key_values=used).logits, whole(model, x)[:, 26:])


# --- early exit ---------------------------------------------------------------------------------
def test_early_exit_is_refused():
    model, x = model_of(), tiny.ids(1, 12)
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(NotImplementedError, match="assistant_early_exit=1"):
        greedy(model, x, assistant_early_exit=1)
    assert model.config.to_dict() == before
    assert greedy(model, x).shape == (1, 32)


@torch.no_grad()
def test_caches_of_smaller_models_are_refused():
    model, x = model_of(), tiny.ids(1, 12)
    cache = static_cache(tiny.build(num_hidden_layers=2))
    with pytest.raises(ValueError, match="at least 3, got 2 in a StaticCache that cannot grow"):
        model(x, past_key_values=cache)


# --- prompts of one token, files ----------------------------------------------------------------
@torch.no_grad()
def test_adapt_expands_prompts_of_one_token():
    model, x = model_of(), tiny.ids(2, 1)
    with ttt.adapt(model, x) as adapted:
        got = adapted.generate(max_new_tokens=4, do_sample=False, num_beams=2)
        assert adapted.past_key_values.get_seq_length() == 0
    with ttt.disabled(model):
        want = greedy(model, x, max_new_tokens=4, num_beams=2)
    assert torch.equal(got, want)


@torch.no_grad()
def test_states_are_not_saved_where_there_is_no_file(tmp_path):
    state = ttt.FastWeightState.of(model_of()(tiny.ids(1, 9), past_key_values=DynamicCache()).past_key_values)
    with pytest.raises(IsADirectoryError, match=f"must be a file, got a folder: {tmp_path}"):
        state.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="in a folder that exists, got .*absent"):
        state.save(tmp_path / "absent" / "x")


# --- float16 ------------------------------------------------------------------------------------
@pytest.mark.parametrize("calls", [[3 * C], [1] * (3 * C), [C + 3, 2 * C - 3]])
@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_writes_that_float16_cannot_read_are_refused(calls, preserve, recorded):
    """Finite in float32, but the weight is rounded when it is read."""
    mlp = layer(torch.float16, lr=1e5, preserve_row_norm=preserve)
    state = LayerState(mlp.signature())
    state.record_writes = recorded
    x = randn(2, 3 * C, D, dtype=torch.float16)
    x[1] *= 1e-3  # what this request writes is small enough
    y = streamed(mlp, x, calls, state)
    assert [(row.writes, row.refused) for row in state.rows] == [(0, 3), (3, 0)]
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("calls", [[9 * C], [1] * (9 * C)])
def test_many_writes_do_not_add_up_beyond_float16(calls):
    mlp = layer(torch.float16, lr=1e2)
    state = LayerState(mlp.signature())
    y = streamed(mlp, randn(1, C, D, dtype=torch.float16).repeat(1, 9, 1), calls, state)
    (row,) = state.rows
    assert 1 < row.writes < 9 and row.writes + row.refused == 9
    assert row.weight[0].abs().max() <= torch.finfo(torch.float16).max
    assert torch.isfinite(row.weight[0]).all() and y.shape == (1, 9 * C, D)
