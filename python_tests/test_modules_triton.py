"""A patched model on the Triton kernels, all of them at once, against the same model on eager."""

import pytest
import torch
from helpers import assert_close
from tiny_models import config, gradients, ids, pad, patched

from ttt_kernels._config import chosen_implementation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = {
    "specnorm": {"inner_optimizer": "specnorm", "lr": 0.3, "preserve_row_norm": True},
    "clip_conv": {"inner_optimizer": "clip", "lr": 2.0, "max_norm": 0.1, "target": "conv"},
}


def both(run, kernels: str = "triton") -> tuple:
    """What `run` returns on eager and on the kernels."""
    results = []
    for impl in ("eager", kernels):
        with chosen_implementation(impl):
            results.append(run())
    return tuple(results)


@pytest.fixture(params=RULES)
def model(request):
    rule = config(layers=(1,), **RULES[request.param])
    return patched("llama", rule, num_hidden_layers=2, hidden_size=32, intermediate_size=40).to(DEVICE)


def test_training_step(model):
    x = ids(2, 19).to(DEVICE)

    def run() -> dict:
        model.train().zero_grad()
        result = model(x, labels=x)
        result.loss.backward()
        return {"logits": result.logits.detach()} | {k: g.clone() for k, g in gradients(model).items()}

    eager, triton = both(run)
    assert len(eager) > 15
    assert_close(triton, eager, 5e-5)


def test_packed_rows(model):
    """Sequences of different length in one row, one of them shorter than a chunk."""
    x = ids(1, 20).to(DEVICE)
    positions = torch.cat([torch.arange(n) for n in (5, 11, 4)])[None].to(DEVICE)
    eager, triton = both(lambda: {"y": model(x, position_ids=positions, use_cache=False).logits.detach()})
    assert_close(triton, eager, 2e-5)


def test_generation_of_a_padded_batch(model):
    x, mask, _ = pad([ids(1, 11), ids(1, 6, seed=1)], "left")
    options = {"max_new_tokens": 7, "do_sample": False, "attention_mask": mask.to(DEVICE)}
    eager, triton = both(lambda: model.generate(x.to(DEVICE), **options))
    assert eager.shape[1] > x.shape[1] and torch.equal(triton, eager)
