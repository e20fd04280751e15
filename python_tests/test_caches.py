"""Patched models stream through caches, called by hand: any split of the tokens is one pass."""

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from streams import V5, VARIANTS, close, model_of, static_cache, whole
from transformers import DynamicCache

import ttt_kernels as ttt


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_any_split_equals_one_shot(family, variant):
    model, x = model_of(family, variant), tiny.ids(2, 45)
    want = whole(model, x)
    model.train()
    close(model(x).logits, want)
    model.eval()
    for calls in ([45], [1] * 45, [13] + [1] * 32, [8, 8, 29], [7, 1, 1, 30, 6]):
        cache, parts = None, []
        for part in x.split(calls, 1):
            out = model(part, past_key_values=cache)
            cache = out.past_key_values
            parts.append(out.logits)
        close(torch.cat(parts, 1), want)
        assert ttt.FastWeightState.of(cache).positions == [45, 45]


@pytest.mark.parametrize("make", [DynamicCache, static_cache], ids=["dynamic", "static"])
@torch.no_grad()
def test_caches_from_the_user(make):
    model, x = model_of(), tiny.ids(2, 30)
    cache = make(model) if make is static_cache else make()
    parts = [model(p, past_key_values=cache, use_cache=True).logits for p in x.split([13, 1, 16], 1)]
    close(torch.cat(parts, 1), whole(model, x))
    cache.reset()
    assert len(ttt.FastWeightState.of(cache)) == 0
    if not cache.get_seq_length():  # before transformers 5.18 a dynamic cache keeps its tokens, zeroed
        close(model(x, past_key_values=cache).logits, whole(model, x))


@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padded_prompts_by_hand(side):
    """The mask covers past and present; tokens that come later follow each row's own last."""
    model = model_of("llama", "specnorm")
    rows = [tiny.ids(1, n, seed=n) for n in (21, 13, 5)]
    x, mask, places = tiny.pad(rows, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(x, attention_mask=mask, position_ids=positions)
    cache, tails = out.past_key_values, tiny.ids(3, 12, seed=4)
    state = ttt.FastWeightState.of(cache)
    assert state.positions == [21, 13, 5]
    more = [out.logits]
    for n in range(12):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        position = (mask.sum(-1) - 1)[:, None]
        step = tails[:, n : n + 1]
        more.append(
            model(step, attention_mask=mask, position_ids=position, past_key_values=cache).logits
        )
    got = torch.cat(more, 1)
    for b, row in enumerate(rows):
        want = whole(model, torch.cat([row, tails[b : b + 1]], 1))[0]
        close(torch.cat([got[b, places[b]], got[b, 21:]]), want)


@torch.no_grad()
def test_masked_tokens_while_decoding():
    model = model_of()
    x, y = tiny.ids(2, 12), tiny.ids(2, 30, seed=1)
    cache = model(x).past_key_values
    mask = torch.ones(2, 12, dtype=torch.long)
    for n in range(30):
        keep = torch.tensor([[1], [int(n % 3 == 0)]])
        mask = torch.cat([mask, keep], 1)
        position = (mask.sum(-1) - 1)[:, None]
        out = model(y[:, n : n + 1], attention_mask=mask, position_ids=position, past_key_values=cache)
    assert ttt.FastWeightState.of(cache).positions == [42, 22]
    close(out.logits[0, -1], whole(model, torch.cat([x, y], 1))[0, -1])


def test_crop_of_a_cache():
    model, x = model_of(), tiny.ids(2, 30)
    with torch.no_grad():
        cache = model(x[:, :21]).past_key_values
        cache.crop(-3 if V5 else 18)
        close(model(x[:, 18:], past_key_values=cache).logits, whole(model, x)[:, 18:])
        cache = model(x[:, :21]).past_key_values
        with pytest.raises(RuntimeError, match="only 5 tokens of the open chunk"):
            cache.crop(-6 if V5 else 15)
        cache = model(x[:, :21]).past_key_values
        cache.crop(-21 if V5 else 0)
        close(model(x, past_key_values=cache).logits, whole(model, x))


@torch.no_grad()
def test_restored_snapshots_go_with_a_cropped_cache():
    """Further back than `crop` reaches alone, and as often as wanted."""
    model, x = model_of("llama", "specnorm"), tiny.ids(2, 45)
    cache = model(x[:, :13]).past_key_values
    state = ttt.FastWeightState.of(cache)
    snapshot = state.snapshot()
    for _ in range(2):
        model(tiny.ids(2, 20, seed=8), past_key_values=cache)
        state.restore(snapshot)
        with pytest.raises(RuntimeError, match=r"have seen \(13\), got 33"):
            model(x[:, 13:], past_key_values=cache)
        cache.crop(-20 if V5 else 13)
        assert state.positions == [13, 13]
    close(model(x[:, 13:], past_key_values=cache).logits, whole(model, x)[:, 13:])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
@torch.no_grad()
def test_prompt_is_reused_by_copying_its_cache(clone):
    model, x, tail = model_of(), tiny.ids(2, 13), tiny.ids(2, 19, seed=5)
    cache = model(x).past_key_values
    twin = clone(cache)
    first = model(tail, past_key_values=twin).logits
    assert torch.equal(model(tail, past_key_values=cache).logits, first)
    close(first, whole(model, torch.cat([x, tail], 1))[:, 13:])
    assert ttt.FastWeightState.of(twin).layers[0] is twin.layers[0].ttt


@torch.no_grad()
def test_batch_operations_of_a_cache():
    model, x, tail = model_of(), tiny.ids(2, 13), tiny.ids(4, 19, seed=5)
    cache = model(x).past_key_values
    cache.batch_repeat_interleave(2)
    got = model(tail, past_key_values=cache).logits
    close(got, whole(model, torch.cat([x.repeat_interleave(2, 0), tail], 1))[:, 13:])
    cache.batch_select_indices(torch.tensor([3, 1]))
    more = tiny.ids(2, 9, seed=6)
    want = torch.cat([x[[1, 0]], tail[[3, 1]], more], 1)
    close(model(more, past_key_values=cache).logits, whole(model, want)[:, -9:])


@torch.no_grad()
def test_state_without_its_keys(tmp_path):
    """What was written survives in a file and serves a new conversation."""
    model, x, tail = model_of(), tiny.ids(1, 19), tiny.ids(1, 9, seed=5)
    cache = model(x).past_key_values
    state = ttt.FastWeightState.of(cache)
    state.save(tmp_path / "state.safetensors")
    fresh = DynamicCache()
    loaded = ttt.FastWeightState.load(tmp_path / "state.safetensors", model)
    loaded.attach(fresh)
    got = model(tail, past_key_values=fresh).logits
    assert ttt.FastWeightState.of(fresh).positions == [28] and fresh.get_seq_length() == 9
    assert not torch.allclose(got, whole(model, tail), atol=1e-3)
    again = copy.deepcopy(cache)
    ttt.FastWeightState.load(tmp_path / "state.safetensors", model).attach(again)
    close(model(tail, past_key_values=again).logits, model(tail, past_key_values=cache).logits)


def test_gradients_in_eval_mode():
    """One call in eval mode trains as training mode does."""
    model, x = model_of(), tiny.ids(2, 30)

    def grads():
        model.zero_grad()
        model(x).logits.square().mean().backward()
        return {n: g.clone() for n, g in tiny.gradients(model).items()}

    got = grads()
    model.train()
    want = grads()
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name])


def test_low_precision_streams():
    for dtype in (torch.bfloat16, torch.float32):
        model, x = tiny.patched().to(dtype), tiny.ids(2, 30)
        with torch.no_grad():
            want = whole(model, x)
            cache, parts = None, []
            for part in x.split([13] + [1] * 17, 1):
                out = model(part, past_key_values=cache)
                cache = out.past_key_values
                parts.append(out.logits)
        error = (torch.cat(parts, 1) - want).double().norm() / want.double().norm()
        assert error < {torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]


@torch.no_grad()
def test_caches_of_others_are_refused():
    model, x = model_of(), tiny.ids(1, 12)
    plain = tiny.build().double()
    with pytest.raises(RuntimeError, match=r"have seen \(0\), got 12: it was filled by the model"):
        model(x, past_key_values=plain(x).past_key_values)
    model.train()
    trained = model(x, use_cache=True).past_key_values
    cache = model.eval()(x).past_key_values
    with pytest.raises(RuntimeError, match=r"have seen \(0\), got 12"):
        model(x, past_key_values=trained)
    model.train()
    with pytest.raises(RuntimeError, match="training starts every sequence from the slow"):
        model(x, past_key_values=cache)
    model.eval()
    other = tiny.patched("llama", tiny.config(lr=3.0)).double()
    state = ttt.FastWeightState.of(cache)
    with pytest.raises(ValueError, match="another model: layer 0, lr: 2.0 in the state, 3.0 in"):
        fresh = DynamicCache()
        state.clone().attach(fresh)
        other(x, past_key_values=fresh)
    with pytest.raises(ValueError, match="holds 1 requests .*got a batch of 2"):
        fresh = DynamicCache()
        state.attach(fresh)
        model(tiny.ids(2, 3), past_key_values=fresh)


@torch.no_grad()
def test_what_cannot_stream_is_refused():
    model, x = model_of(), tiny.ids(1, 12)
    with pytest.raises(NotImplementedError, match="continuous batching .*name no requests"):
        model.model(x, cache=object())
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    assert model(x, position_ids=positions).past_key_values is None
    with pytest.raises(NotImplementedError, match="packed rows cannot stream"):
        model(x, position_ids=positions, use_cache=True)
    with pytest.raises(NotImplementedError, match="packed rows cannot stream"):
        model(x, position_ids=positions, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"\[B, past \+ T\] = \(1, 24\) .*got \(1, 12\)"):
        cache = model(x).past_key_values
        model(x, past_key_values=cache, attention_mask=torch.ones(1, 12))


def test_compiled_models_do_not_stream():
    torch._dynamo.reset()
    model, x = tiny.patched(), tiny.ids(1, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match="compiled model .* cannot stream"):
        compiled(x, use_cache=True)
    torch._dynamo.reset()
