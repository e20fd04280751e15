"""A small patched model against the plain one: what fast weights cost where they are used."""

from __future__ import annotations

import pytest
import torch

import ttt_kernels as ttt

pytest.importorskip("pytest_benchmark")
transformers = pytest.importorskip("transformers")

TOKENS = 256
SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TOKENS,
}


@pytest.mark.parametrize("fast_weights", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_bench_llama(benchmark, mode, fast_weights):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    if fast_weights:
        options = {"lr": 0.3, "inner_optimizer": "specnorm", "preserve_row_norm": True}
        ttt.patch_model(model, ttt.TTTConfig(layers=(0, 2), chunk_size=32, **options))
    ids = torch.randint(0, 256, (1, TOKENS))
    benchmark.group = f"llama {mode}"

    def step() -> torch.Tensor:
        with torch.set_grad_enabled(mode != "fwd"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if mode != "fwd":
            loss.backward()
        return loss

    assert bool(torch.isfinite(benchmark(step)))
