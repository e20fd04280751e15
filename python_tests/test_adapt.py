"""`adapt`: equal to replacing the weights by hand, row by row, and gone when its block ends."""

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn

import ttt_kernels as ttt
from ttt_kernels.modules.state import FastWeightState
from ttt_kernels.patch import adapt as adapting

OPTIONS = {"lam": 0.5, "eta": 0.8, "cap": 0.7}
CASES = {
    "preserve": {},
    "plain": {"preserve_row_norm": False},
    "last pairs": {"last_k": 9},
    "two ahead": {"shift": 2},
    "no cap": {"cap": None},
}
GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def model_of(family: str = "llama", cfg=None, **changes) -> nn.Module:
    return tiny.patched(family, cfg, **changes).double()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def by_hand(model, family: str, x: Tensor, changes: dict, **options) -> tuple:
    """For one prompt: a plain model with the weights replaced, the cropped cache, and the writes."""
    plain, seen = tiny.build(family, **changes).double(), {}

    def keep(name: str, layer: int):
        def hook(module: nn.Module, args: tuple) -> None:
            seen.setdefault((name, layer), args[0])

        return hook

    slow = {i: plain.model.layers[i].mlp for i in tiny.LAYERS}
    for i, mlp in slow.items():
        mlp.register_forward_pre_hook(keep("x", i))
        mlp.down_proj.register_forward_pre_hook(keep("z", i))
    cache = new_cache()
    plain(x, past_key_values=cache)
    cache.crop(-1)
    writes = {}
    for i, fast in zip(tiny.LAYERS, tiny.fast_mlps(model), strict=True):
        w0 = slow[i].down_proj.weight
        writes[i] = ttt.ridge_write(seen["z", i], seen["x", i], w0, fast.ttt_proj.weight, **options)
        w0.data = writes[i].weight[0]
    return plain, cache, writes


def new_cache():
    from transformers import DynamicCache

    return DynamicCache()


def continued(plain, cache, x: Tensor, extra: Tensor) -> Tensor:
    return plain(torch.cat([x[:, -1:], extra], 1), past_key_values=copy.deepcopy(cache)).logits


@pytest.mark.parametrize("dtype, changes, known", [
    (torch.float32, {}, True), (torch.float32, {"mlp_bias": True}, False), (torch.bfloat16, {}, False),
])  # fmt: skip
def test_outputs_of_the_forward_are_used_where_they_are_exact(monkeypatch, dtype, changes, known):
    calls = []
    for name in ("ridge_write", "ridge_write_from_outputs"):
        real = getattr(adapting, name)
        monkeypatch.setattr(adapting, name, lambda *a, n=name, f=real, **o: calls.append(n) or f(*a, **o))
    model = tiny.patched("llama", **changes).to(dtype).eval()
    with ttt.adapt(model, tiny.ids(2, 20)):
        assert calls == ["ridge_write_from_outputs" if known else "ridge_write"] * len(tiny.LAYERS)
    calls.clear()
    for mlp in tiny.fast_mlps(model):
        mlp.down_proj.register_forward_hook(lambda module, args, y: 3 * y)
    with ttt.adapt(model, tiny.ids(2, 20)):
        assert calls == ["ridge_write"] * len(tiny.LAYERS)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equals_replacing_the_weights_by_hand(family, options):
    model, x, extra = model_of(family), tiny.ids(1, 30), tiny.ids(1, 13, seed=1)
    options = {**OPTIONS, **options}
    plain, cache, writes = by_hand(model, family, x, {}, **options)
    before = model(x, use_cache=False).logits
    with ttt.adapt(model, x, **options) as adapted:
        close(adapted.logits(extra), continued(plain, cache, x, extra))
        stepwise = [model(x[:, -1:], past_key_values=adapted.past_key_values).logits]
        for t in range(13):
            stepwise.append(
                model(extra[:, t : t + 1], past_key_values=adapted.past_key_values).logits
            )
        close(torch.cat(stepwise, 1), adapted.logits(extra))
        for i, write in writes.items():
            assert adapted.etas[i] == pytest.approx(write.eta.tolist(), rel=1e-9)
            w0 = model.model.layers[i].mlp.down_proj.weight
            assert adapted.deltas[i] == pytest.approx([(write.delta.norm() / w0.norm()).item()])
        y = adapted.generate(**GREEDY)
    mask = torch.ones_like(x)
    want = plain.generate(x, attention_mask=mask, past_key_values=copy.deepcopy(cache), **GREEDY)
    assert torch.equal(y, want)
    assert torch.equal(model(x, use_cache=False).logits, before)


@pytest.mark.parametrize("change", [{"mlp_bias": True}, {"sliding_window": 12}], ids=str)
def test_biases_and_sliding_windows(change):
    family = "mistral" if "sliding_window" in change else "llama"
    model, x, extra = model_of(family, **change), tiny.ids(1, 30), tiny.ids(1, 13, seed=1)
    plain, cache, _ = by_hand(model, family, x, change, **OPTIONS)
    with ttt.adapt(model, x, **OPTIONS) as adapted:
        close(adapted.logits(extra), continued(plain, cache, x, extra))


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padded_rows_equal_single_rows(family, side):
    model = model_of(family)
    rows, extra = [tiny.ids(1, n, seed=n) for n in (37, 21, 5, 1)], tiny.ids(4, 9, seed=7)
    x, mask, _ = tiny.pad(rows, side)
    with ttt.adapt(model, x, mask, **OPTIONS) as together:
        got, tokens = together.logits(extra), together.generate(**GREEDY)[:, 37:]
        assert together.state.positions == [36, 20, 4, 0]
        for b, row in enumerate(rows):
            assert torch.equal(together.input_ids[b, 37 - row.shape[1] :], row[0])
            with ttt.adapt(model, row, **OPTIONS) as alone:
                # rotary embeddings are float32, and their angles depend on nothing but the token
                torch.testing.assert_close(
                    got[b], alone.logits(extra[b : b + 1])[0], rtol=0, atol=1e-9
                )
                assert torch.equal(tokens[b], alone.generate(**GREEDY)[0, row.shape[1] :])
                for i in tiny.LAYERS:
                    assert together.etas[i][b] == pytest.approx(alone.etas[i][0], rel=1e-9)


def test_a_hole_in_the_mask_is_no_token():
    model, x = model_of(), tiny.ids(1, 20)
    mask = torch.ones_like(x)
    mask[0, 8:11] = 0
    with ttt.adapt(model, x, mask, **OPTIONS) as a, ttt.adapt(model, x[mask.bool()][None], **OPTIONS) as b:
        assert torch.equal(a.logits(), b.logits())


@pytest.mark.parametrize(
    "strategy",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["beams", "samples"],
)
def test_strategies(strategy):
    """Beams and samples share their prompt's weight."""
    model, x = model_of(), tiny.ids(2, 24)
    with ttt.adapt(model, x, **OPTIONS) as adapted:
        torch.manual_seed(0)
        y = adapted.generate(**{**GREEDY, **strategy})
        torch.manual_seed(0)
        assert torch.equal(adapted.generate(**{**GREEDY, **strategy}), y)
        assert y.shape == (len(x) * strategy.get("num_return_sequences", 1), 34)
        if "num_beams" in strategy:
            best = score(adapted, y)
            assert (best >= score(adapted, adapted.generate(**GREEDY)) - 1e-9).any()
            for b in range(2):
                with ttt.adapt(model, x[b : b + 1], **OPTIONS) as alone:
                    assert torch.equal(alone.generate(**GREEDY, **strategy)[0], y[b])


def score(adapted, y: Tensor) -> Tensor:
    new = y[:, adapted.input_ids.shape[1] :]
    logits = adapted.logits(new)[:, :-1].log_softmax(-1)
    return logits.gather(2, new[..., None]).sum((1, 2))


def test_a_prompt_without_pairs_changes_nothing():
    model, x = model_of(), tiny.ids(2, 1)
    with ttt.adapt(model, x) as adapted, ttt.disabled(model):
        plain = model(x).logits
        want = adapted.etas
    with ttt.adapt(model, x) as adapted:
        close(adapted.logits(), plain)
        assert adapted.deltas == {i: [0.0, 0.0] for i in tiny.LAYERS} and adapted.etas == want


# --- nothing is left behind ---------------------------------------------------------------------
def snapshot(model) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def test_nothing_stays_and_the_cache_is_refused():
    model, x = model_of(), tiny.ids(2, 24)
    weights, ordinary = snapshot(model), model(x, use_cache=False).logits
    tokens = model.generate(x, attention_mask=torch.ones_like(x), **GREEDY)
    with ttt.adapt(model, x, **OPTIONS) as adapted:
        cache, copied = adapted.past_key_values, copy.deepcopy(adapted.past_key_values)
        inside = adapted.logits()
        close(model(x[:, -1:], past_key_values=copied).logits, inside)
        assert torch.equal(model(x, use_cache=False).logits, ordinary)
        assert torch.equal(model.generate(x, attention_mask=torch.ones_like(x), **GREEDY), tokens)
        assert not torch.equal(inside[:, 0], ordinary[:, -1])
    for ended in (cache, copied):
        with pytest.raises(RuntimeError, match="adapt.. block that has ended"):
            model(x[:, -1:], past_key_values=ended)
        with pytest.raises(RuntimeError, match="carries fast weights, which a disabled model"):
            with ttt.disabled(model):
                model(x[:, -1:], past_key_values=ended)
    with pytest.raises(RuntimeError, match="block has ended"):
        adapted.generate(**GREEDY)
    with pytest.raises(RuntimeError, match="block has ended"):
        adapted.logits()
    assert adapted.state.nbytes == 0
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(x, use_cache=False).logits, ordinary)


def test_errors_nesting_and_repetition():
    model, x, other = model_of(), tiny.ids(1, 24), tiny.ids(1, 17, seed=4)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    ordinary = model(x, use_cache=False).logits
    with ttt.adapt(model, x, **OPTIONS) as adapted:
        first = adapted.logits()
    with pytest.raises(KeyError, match="mine"):
        with ttt.adapt(model, x, **OPTIONS):
            raise KeyError("mine")
    with pytest.raises(ValueError, match="lam must be"):
        with ttt.adapt(model, x, lam=-1.0):
            pass
    with ttt.adapt(model, x, **OPTIONS) as outer:
        with ttt.adapt(model, other, **OPTIONS) as inner:
            assert torch.equal(outer.logits(), first)
            second = inner.logits()
        assert torch.equal(outer.logits(), first)
        assert torch.equal(outer.logits(other), outer.logits(other))
    with ttt.adapt(model, other, **OPTIONS) as again:
        assert torch.equal(again.logits(), second) and not torch.equal(second, first)
    assert torch.equal(model(x, use_cache=False).logits, ordinary)
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_state_operations():
    model, x = model_of(), tiny.ids(3, 24)
    last = x[:, -1:]
    with ttt.adapt(model, x, **OPTIONS) as adapted:
        want, cache = adapted.logits(tiny.ids(3, 2)), adapted.past_key_values
        model(torch.cat([last, tiny.ids(3, 2)], 1), past_key_values=cache)
        assert adapted.state.positions == [23] * 3 and FastWeightState.of(cache).positions == [26] * 3
        cache.crop(-3)
        close(model(last, past_key_values=cache).logits, want[:, :1])
        cache.batch_select_indices(torch.tensor([2, 0]))
        got = model(tiny.ids(3, 2)[[2, 0], :1], past_key_values=cache).logits
        close(got, want[[2, 0], 1:2])
        with pytest.raises(ValueError, match="cannot be saved"):
            adapted.state.save("never.safetensors")
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(cache)
        model(x[:2], past_key_values=(mixed := new_cache()))
        both = FastWeightState.concat([FastWeightState.of(mixed), adapted.state])
        with pytest.raises(ValueError, match="must not mix requests of adapt"):
            read_with(model, both, 5)


def read_with(model, state: FastWeightState, batch: int) -> None:
    cache = new_cache()
    state.attach(cache)
    model(tiny.ids(batch, 1), past_key_values=cache)


def test_gradients_reach_the_input():
    model, x = model_of(), tiny.ids(1, 24)
    with torch.enable_grad(), ttt.adapt(model, x, **OPTIONS) as adapted:
        logits = adapted.logits(tiny.ids(1, 4, seed=2))
        gradient = torch.autograd.grad(logits.sum(), model.model.layers[0].mlp.up_proj.weight)[0]
        assert gradient.abs().max() > 0


def test_shift_follows_the_horizon():
    model, x = model_of(cfg=tiny.config(horizon=2)), tiny.ids(1, 24)
    with ttt.adapt(model, x) as a, ttt.adapt(model, x, shift=2) as b, ttt.adapt(model, x, shift=1) as c:
        assert torch.equal(a.logits(), b.logits()) and not torch.equal(a.logits(), c.logits())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model, x = tiny.patched().to(dtype), tiny.ids(2, 30)
    with ttt.adapt(model, x, **OPTIONS) as adapted, ttt.adapt(model_of(), x, **OPTIONS) as exact:
        assert adapted.state.layers[0].rows[0].weight[0].dtype == torch.float32
        error = (adapted.logits().double() - exact.logits()).norm() / exact.logits().norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]


# --- what is refused ----------------------------------------------------------------------------
def refuse(error: type, match: str, model, *args, **options) -> None:
    with pytest.raises(error, match=match):
        with ttt.adapt(model, *args, **options):
            pytest.fail("the block must not be entered")


def test_bad_arguments():
    model, x = model_of(), tiny.ids(2, 12)
    refuse(TypeError, "unexpected keyword argument 'lamb'", model, x, lamb=1.0)
    refuse(ValueError, "last_k must be", model, x, last_k=0)
    refuse(ValueError, "shift must be", model, x, shift=0)
    refuse(TypeError, r"input_ids must be an integer tensor \[B, T\], got torch.float32", model, x.float())
    refuse(TypeError, "input_ids must be an integer tensor .*got list", model, [[1, 2]])
    refuse(ValueError, r"attention_mask must have shape .*\(2, 12\).*got \(2, 11\)", model, x, x[:, 1:])
    refuse(ValueError, r"at least one token, got lengths \[0, 0\]", model, x, torch.zeros_like(x))
    refuse(ValueError, "must have been patched", tiny.build(), x)
    refuse(ValueError, "call model.eval", tiny.patched().train(), x)
    with ttt.adapt(model, x) as adapted:
        with pytest.raises(TypeError, match="got attention_mask, use_cache"):
            adapted.generate(use_cache=False, attention_mask=x)
        with pytest.raises(NotImplementedError, match="assisted .*, got prompt_lookup_num_tokens"):
            adapted.generate(prompt_lookup_num_tokens=3)
        with pytest.raises(ValueError, match="continuation must have one row per prompt, 2, got 3"):
            adapted.logits(tiny.ids(3, 4))


@pytest.mark.parametrize(
    "change", [{"target": "conv"}, {"target_source": "input_embed"}], ids=["conv", "embeddings"]
)
def test_other_targets_are_refused(change):
    refuse(NotImplementedError, "defined for target=", model_of(cfg=tiny.config(**change)), tiny.ids(1, 9))


def test_adapters_are_kept_or_refused():
    peft = pytest.importorskip("peft")
    for target, works in (("q_proj", True), ("down_proj", False)):
        config = peft.LoraConfig(target_modules=[target], task_type="CAUSAL_LM")
        model, x = peft.get_peft_model(model_of(), config).eval(), tiny.ids(1, 20)
        if not works:
            refuse(NotImplementedError, "layer 0: down_proj carries an adapter", model, x)
            continue
        with ttt.adapt(model, x, **OPTIONS) as a, ttt.adapt(model_of(), x, **OPTIONS) as b:
            assert torch.equal(a.generate(**GREEDY), b.generate(**GREEDY))
