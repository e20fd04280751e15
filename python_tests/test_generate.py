"""`generate` of patched models: every strategy and cache gives what re-running everything gives."""

import copy
import inspect
import pickle
import threading

import pytest
import tiny_models as tiny
import torch
from streams import NEW, V5, VARIANTS, by_hand, greedy, model_of

import ttt_kernels as ttt

OPTIONS = {
    "plain": {},
    "static": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 5},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy(family, options):
    model, x = model_of(family, "specnorm"), tiny.ids(3, 21)
    assert torch.equal(greedy(model, x, **options), by_hand(model, x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_left_padded_rows_are_generated_as_alone(variant, options):
    if not V5 and "prefill_chunk_size" in options:
        pytest.skip("transformers 4.57 numbers the positions of padded chunked prompts wrongly")
    model = model_of("llama", variant)
    rows = [tiny.ids(1, n, seed=n) for n in (21, 13, 5)]
    x, mask, _ = tiny.pad(rows, "left")
    outputs = {"output_logits": True, "return_dict_in_generate": True}
    got = greedy(model, x, attention_mask=mask, **options, **outputs)
    for b, row in enumerate(rows):
        alone = greedy(model, row, **outputs)
        assert torch.equal(got.sequences[b, 21:], alone.sequences[0, row.shape[1] :])
        logits = torch.stack([step[b] for step in got.logits])
        torch.testing.assert_close(logits, torch.cat(alone.logits), rtol=0, atol=1e-5)


@torch.no_grad()
def test_late_conversion_of_a_static_cache():
    """Patched below the head, `generate` hands over a 4D mask; padding is read from positions."""
    model = tiny.build("llama").double()
    ttt.patch_model(model.model, tiny.config())
    other = model_of()
    for own, theirs in zip(tiny.fast_mlps(model), tiny.fast_mlps(other), strict=True):
        own.ttt_proj.load_state_dict(theirs.ttt_proj.state_dict())
    x, mask, _ = tiny.pad([tiny.ids(1, n, seed=n) for n in (21, 9)], "left")
    options = {"attention_mask": mask, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(greedy(model, x, **options), greedy(other, x, attention_mask=mask))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("static", [False, True])
def test_beams(family, static):
    model, x = model_of(family), tiny.ids(2, 13)
    options = {"num_beams": 4, "num_return_sequences": 2}
    cached = {"cache_implementation": "static"} if static else {}
    want = greedy(model, x, use_cache=False, **options)
    assert torch.equal(greedy(model, x, **options, **cached), want)


def test_sampling():
    model, x = model_of(), tiny.ids(2, 13)

    def sample(**options):
        torch.manual_seed(5)
        return greedy(model, x, do_sample=True, num_return_sequences=3, **options)

    assert torch.equal(sample(), sample(use_cache=False))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("chunk_size", [4, 8, 64])
@pytest.mark.parametrize("kind", ["prompt_lookup", "assistant"])
def test_assisted_decoding(family, kind, chunk_size):
    """Rejected tokens are taken back exactly, over chunk boundaries too."""
    model = tiny.patched(family, tiny.config(chunk_size=chunk_size)).double()
    x = tiny.ids(1, 21).repeat(1, 2)
    if kind == "prompt_lookup":
        options = {"prompt_lookup_num_tokens": 5, "eos_token_id": 10_000}  # 4.57 needs one
    else:
        assistant = tiny.patched(family, tiny.config(lr=1.9)).double()
        assistant.generation_config.num_assistant_tokens = 5
        options = {"assistant_model": assistant}
    got = greedy(model, x, max_new_tokens=30, **options)
    want = by_hand(model, x, 30)
    assert torch.equal(got[:, : want.shape[1]], want)  # 4.57 may return one token more


@torch.no_grad()
def test_generation_continues():
    model, x = model_of(), tiny.ids(2, 13)
    first = greedy(model, x, max_new_tokens=7, return_dict_in_generate=True)
    second = greedy(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=13)
    assert torch.equal(second, by_hand(model, x, 20))


def test_sliding_window():
    model = tiny.patched("mistral", sliding_window=10).double()
    x = tiny.ids(2, 21)
    assert torch.equal(greedy(model, x), greedy(model, x, use_cache=False))


def test_threads_generate_apart():
    model = model_of()
    prompts = [tiny.ids(1, n, seed=n) for n in (9, 13, 17, 21)]
    want, got = [greedy(model, p) for p in prompts], {}

    def work(n):
        got[n] = [greedy(model, prompts[n]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(y, want[n]) for n in range(4) for y in got[n])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copied_models_generate(clone):
    model, x = model_of(), tiny.ids(2, 13)
    want = greedy(model, x)
    twin = clone(model)
    assert torch.equal(greedy(twin, x), want)
    ttt.unpatch_model(twin)
    assert torch.equal(greedy(model, x), want)
    assert torch.equal(greedy(twin, x), greedy(tiny.build().double(), x))


def test_adapted_models_generate():
    peft = pytest.importorskip("peft", reason="needs peft")
    model, x = tiny.patched(), tiny.ids(2, 13)
    options = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapter = peft.get_peft_model(model, options).eval()
    for name, p in adapter.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn_like(p)
    options = {"max_new_tokens": NEW, "do_sample": False}
    got = adapter.generate(input_ids=x, attention_mask=torch.ones_like(x), **options)
    assert torch.equal(got, by_hand(adapter, x))


def test_signature_of_the_override():
    """`generate` calls it by position, and its arguments differ between versions."""
    from ttt_kernels.patch.cache import PREPARE

    model = tiny.patched()
    own = inspect.signature(getattr(type(model), PREPARE))
    assert list(own.parameters)[1:4] == ["generation_config", "model_kwargs", "generation_mode"]
    assert PREPARE in vars(model)
    ttt.unpatch_model(model)
    assert PREPARE not in vars(model)
