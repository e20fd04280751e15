"""A patched model on the CUDA C++ kernels, all of them at once, against the same model on eager."""

import pytest
import torch
from emulated import DEVICE, cuda_kernels  # noqa: F401
from helpers import assert_close
from test_modules_triton import RULES, both
from tiny_models import config, gradients, ids, pad, patched

import ttt_kernels as ttt

pytestmark = pytest.mark.usefixtures("cuda_kernels")
BOUND = 3e-2  # of bfloat16 through two layers


@pytest.fixture(params=RULES)
def model(request):
    rule = config(layers=(1,), **RULES[request.param])
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 40}
    return patched("llama", rule, **sizes).to(DEVICE, torch.bfloat16)


def test_training_step(model):
    x = ids(2, 19).to(DEVICE)

    def run() -> dict:
        model.train().zero_grad()
        result = model(x, labels=x)
        result.loss.backward()
        return {"logits": result.logits.detach()} | {k: g.clone() for k, g in gradients(model).items()}

    eager, cuda = both(run, "cuda")
    assert len(eager) > 15
    assert_close(cuda, eager, BOUND)


def test_a_padded_batch_streams(model):
    """Prefill, then token by token: each request has its own weight and its own place in its chunk."""
    x, mask, _ = pad([ids(1, 11), ids(1, 6, seed=1)], "left")
    x, mask = x.to(DEVICE), mask.to(DEVICE)

    def run() -> dict:
        with torch.no_grad():
            out = model(x, attention_mask=mask, use_cache=True)
            logits, longer = [out.logits[:, -1]], mask
            for token in range(7):
                longer = torch.cat([longer, longer.new_ones(2, 1)], 1)
                step = {"attention_mask": longer, "past_key_values": out.past_key_values, "use_cache": True}
                out = model(x.new_full((2, 1), token), **step)
                logits.append(out.logits[:, -1])
        writes = torch.tensor([r.writes for r in ttt.diagnostics(out.past_key_values).requests])
        return {"logits": torch.stack(logits), "writes": writes}

    eager, cuda = both(run, "cuda")
    assert int(eager["writes"].min()) >= 1
    assert_close(cuda, eager, BOUND)
