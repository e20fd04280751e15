"""`disabled(model)`: the model before `patch_model`, for one thread and one block."""

import copy
import threading

import pytest
import tiny_models as tiny
import torch
from streams import close, greedy, model_of, whole

import ttt_kernels as ttt


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_disabled_is_the_unpatched_model(family, bias):
    if bias and family != "llama":
        pytest.skip("only Llama has a bias")
    changes = {"mlp_bias": True} if bias else {}
    model, plain = tiny.patched(family, **changes), tiny.build(family, **changes)
    x, mask, _ = tiny.pad([tiny.ids(1, n, seed=n) for n in (30, 21)], "left")
    with torch.no_grad(), ttt.disabled(model):
        for kwargs in ({}, {"attention_mask": mask}, {"use_cache": False}):
            assert torch.equal(model(x, **kwargs).logits, plain(x, **kwargs).logits)
        assert type(model(x).past_key_values.layers[0]) is type(plain(x).past_key_values.layers[0])
        assert torch.equal(greedy(model, x), greedy(plain, x))
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(greedy(model, x, **static), greedy(plain, x, **static))
    assert not torch.equal(whole(model, x), whole(plain, x))


def test_disabled_in_training():
    model, plain, x = tiny.patched(), tiny.build(), tiny.ids(2, 30)
    for m in (model, plain):
        m.train()
        m.gradient_checkpointing_enable({"use_reentrant": False})
    with ttt.disabled(model):
        loss = model(x, labels=x).loss
    loss.backward()  # recomputes after the block
    plain(x, labels=x).loss.backward()
    want, got = tiny.gradients(plain), tiny.gradients(model)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not any("ttt_" in name for name in got)


@torch.no_grad()
def test_disabled_nests_and_ends_with_errors():
    model, plain, x = tiny.patched(), tiny.build(), tiny.ids(2, 30)
    on, off = whole(model, x), whole(plain, x)
    with ttt.disabled(model):
        with ttt.disabled(model):
            pass
        with pytest.raises(KeyError), ttt.disabled(model):
            raise KeyError
        assert torch.equal(whole(model, x), off)
    assert torch.equal(whole(model, x), on)
    with ttt.disabled(model.model):
        assert torch.equal(whole(model, x), off)
        assert torch.equal(whole(copy.deepcopy(model), x), on)
    with pytest.raises(ValueError, match="must have been patched by patch_model"), ttt.disabled(plain):
        pass


@torch.no_grad()
def test_disabled_in_one_thread_only():
    model, x = tiny.patched(), tiny.ids(2, 30)
    on, seen = whole(model, x), []
    with ttt.disabled(model):
        thread = threading.Thread(target=lambda: seen.append(whole(model, x)))
        thread.start()
        thread.join()
        assert not torch.equal(whole(model, x), on)
    assert torch.equal(seen[0], on)


@torch.no_grad()
def test_disabled_does_not_touch_states():
    model, x = model_of(), tiny.ids(2, 13)
    cache = model(x).past_key_values
    state = ttt.FastWeightState.of(cache)
    with ttt.disabled(model):
        with pytest.raises(RuntimeError, match="a disabled model cannot continue"):
            model(x, past_key_values=cache)
        other = model(x).past_key_values
    assert state.positions == [13, 13] and cache.get_seq_length() == 13
    with pytest.raises(RuntimeError, match=r"have seen \(0\), got 13"):
        model(x, past_key_values=other)
    tail = tiny.ids(2, 9, seed=3)
    close(
        model(tail, past_key_values=cache).logits, whole(model, torch.cat([x, tail], 1))[:, 13:]
    )


def test_disabled_compiles():
    torch._dynamo.reset()
    model, plain, x = tiny.patched(), tiny.build(), tiny.ids(2, 30)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        on = compiled(x).logits
        with ttt.disabled(model):
            torch.testing.assert_close(compiled(x, use_cache=False).logits, whole(plain, x))
        assert torch.equal(compiled(x).logits, on)
    torch._dynamo.reset()
