"""Patched models on every kind of batch: padded, packed, embedded."""

import pytest
import tiny_models as tiny
import torch
from torch import Tensor

VARIANTS = {
    "sgd": {},
    "specnorm": {"inner_optimizer": "specnorm", "lr": 0.5, "preserve_row_norm": True},
    "conv": {"target": "conv", "target_source": "input_embed"},
}


@torch.no_grad()
def logits(model, x: Tensor | None = None, **kwargs) -> Tensor:
    return model(x, **kwargs).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def model_of(family: str, variant: str = "sgd"):
    return tiny.patched(family, tiny.config(**VARIANTS[variant])).double()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padded_rows_equal_single_rows(family, side, variant):
    model = model_of(family, variant)
    rows = [tiny.ids(1, n, seed=n) for n in (37, 21, 5)]
    x, mask, places = tiny.pad(rows, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, x, attention_mask=mask, position_ids=positions)
    for b, row in enumerate(rows):
        close(got[b, places[b]], logits(model, row)[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_rows_equal_single_rows(family, variant):
    model = model_of(family, variant)
    rows = [tiny.ids(1, n, seed=n) for n in (20, 3, 22)]
    want = torch.cat([logits(model, row) for row in rows], 1)
    x = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    close(logits(model, x, position_ids=positions), want)
    cu = torch.tensor([0, 20, 23, 45], dtype=torch.int32)
    close(logits(model, x, position_ids=positions, cu_seq_lens_q=cu, cu_seq_lens_k=cu), want)


def test_packing_in_several_rows():
    model = model_of("llama")
    rows = [tiny.ids(1, n, seed=n) for n in (20, 12, 5, 27)]
    want = torch.cat([logits(model, row)[0] for row in rows])
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows]).view(2, 32)
    got = logits(model, torch.cat(rows, 1).view(2, 32), position_ids=positions)
    close(got.flatten(0, 1), want)


def test_plain_positions_and_full_masks_are_dense_rows():
    model, x = model_of("llama"), tiny.ids(2, 30)
    want = logits(model, x)
    assert torch.equal(logits(model, x, attention_mask=torch.ones_like(x)), want)
    assert torch.equal(logits(model, x, position_ids=torch.arange(30)[None]), want)
    shifted = torch.arange(7, 37)[None].expand(2, 30)  # rotary embeddings are float32
    torch.testing.assert_close(logits(model, x, position_ids=shifted), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["hidden_states", "input_embed"])
def test_embeddings_instead_of_ids(source):
    model = tiny.patched("llama", tiny.config(target_source=source)).double()
    x = tiny.ids(2, 30)
    embeddings = model.get_input_embeddings()(x).detach()
    assert torch.equal(logits(model, inputs_embeds=embeddings), logits(model, x))


def test_sources_differ():
    x = tiny.ids(2, 30)
    a, b = (
        logits(tiny.patched("llama", tiny.config(target_source=s)), x)
        for s in ("hidden_states", "input_embed")
    )
    assert not torch.equal(a, b) and torch.equal(a[:, : tiny.CHUNK], b[:, : tiny.CHUNK])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generates_without_a_cache(family):
    """As re-running the whole sequence for each token, left padding included."""
    model = model_of(family)
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": False}
    rows, singles = [tiny.ids(1, n, seed=n) for n in (19, 11)], []
    for row in rows:
        y = row
        for _ in range(12):
            y = torch.cat([y, logits(model, y)[:, -1:].argmax(-1)], 1)
        assert torch.equal(model.generate(row, attention_mask=torch.ones_like(row), **options), y)
        singles.append(y[0, row.shape[1] :])
    x, mask, _ = tiny.pad(rows, "left")
    both = model.generate(x, attention_mask=mask, **options)
    assert torch.equal(both[:, x.shape[1] :], torch.stack(singles))


def test_caches_are_the_models_own_choice():
    """As without the patch: made in eval mode by default, left out in training."""
    model, x = tiny.patched(), tiny.ids(1, 12)
    assert model(x).past_key_values.get_seq_length() == 12
    assert model(x, use_cache=False).past_key_values is None
    assert model.train()(x).past_key_values is None


def test_batches_that_cannot_be_read_are_refused():
    model, x = tiny.patched(), tiny.ids(2, 12)
    mask = torch.ones_like(x)
    with pytest.raises(NotImplementedError, match="attention_mask must be None or 2D .*got 4D"):
        model(x, attention_mask=torch.zeros(2, 1, 12, 12))
    with pytest.raises(NotImplementedError, match="attention_mask must be None or 2D .*got dict"):
        model.model(x, attention_mask={"full_attention": None})
    with pytest.raises(ValueError, match=r"shape \[B, T\] = \(2, 12\) .*got \(2, 13\)"):
        model(x, attention_mask=torch.ones(2, 13))
    cu = torch.tensor([0, 5, 24])
    with pytest.raises(ValueError, match="attention_mask must be None with cu_seq_lens_q"):
        model(x, attention_mask=mask, cu_seq_lens_q=cu)
    with pytest.raises(ValueError, match=r"position_ids must have shape .*got \(3, 2, 12\)"):
        model(x, position_ids=torch.zeros(3, 2, 12, dtype=torch.long))
    with pytest.raises(TypeError, match="at most 5 positional arguments .*got 6"):
        model.model(x, mask, None, None, None, False)
