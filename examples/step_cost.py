"""What fast weights add to a training step: patched over unpatched, medians of interleaved rounds.

    python examples/step_cost.py --threads 2

A Llama of SmolLM2-135M's shape with random weights, all of it trained, forward and backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import transformers
from torch import nn

import ttt_kernels as ttt

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def step(model: nn.Module, ids: torch.Tensor) -> float:
    """Seconds of one forward and backward."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return time.perf_counter() - start


def measure(tokens: int, rounds: int, config: ttt.TTTConfig) -> dict[str, float]:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).train()
    ids = torch.randint(SHAPE["vocab_size"], (1, tokens))
    times: dict[str, list[float]] = {"unpatched": [], "patched": []}
    for _ in range(rounds + 1):
        times["unpatched"].append(step(model, ids))
        ttt.patch_model(model, config)
        times["patched"].append(step(model, ids))
        ttt.unpatch_model(model)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {**medians, "ratio": medians["patched"] / medians["unpatched"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--inner-optimizer", choices=("sgd", "specnorm"), default="specnorm")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = ttt.TTTConfig(
        layers=range(0, 30, 5), chunk_size=args.chunk_size, lr=0.1, preserve_row_norm=True,
        inner_optimizer=args.inner_optimizer,
    )  # fmt: skip
    print(json.dumps({**vars(args), **measure(args.tokens, args.rounds, config)}))


if __name__ == "__main__":
    main()
