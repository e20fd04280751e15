"""Draw the pictures of docs/streaming.md and docs/ridge.md from what this machine does.

    python docs/pictures.py            # two PNG files into docs/images, half a minute on 2 cores

Needs the `demo` extra. Interleaved calls, medians; the machine is named in each picture. The pictures of
docs/benchmarks.md come from JSON lines: `python -m ttt_kernels report`.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure

import ttt_kernels as ttt
from ttt_kernels import testing
from ttt_kernels.cli.measure import environment
from ttt_kernels.ops.ridge import reference as released

IMAGES = Path(__file__).parent / "images"
CHUNK, PROMPT, TOKENS = 64, 40, 240


def small_llama() -> transformers.LlamaForCausalLM:
    """SmolLM2-135M's shape with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def decode(model, ids, cache, t: int):
    start = time.perf_counter()
    out = model(ids[:, t : t + 1], past_key_values=cache)
    return 1e3 * (time.perf_counter() - start), out.logits


@torch.no_grad()
def streaming(machine: str) -> None:
    model = small_llama()
    ids = torch.randint(0, 49152, (1, PROMPT + TOKENS), generator=torch.Generator().manual_seed(1))
    layers = tuple(range(0, 30, 5))
    config = ttt.TTTConfig(
        layers=layers, chunk_size=CHUNK, lr=0.3, inner_optimizer="specnorm", preserve_row_norm=True
    )
    ttt.patch_model(model, config)
    with ttt.disabled(model):
        plain = model(ids[:, :PROMPT]).past_key_values
    patched = model(ids[:, :PROMPT]).past_key_values
    whole = model(ids, use_cache=False).logits
    off, on, errors = [], [], []
    for t in range(PROMPT, PROMPT + TOKENS):
        with ttt.disabled(model):
            off.append(decode(model, ids, plain, t)[0])
        milliseconds, logits = decode(model, ids, patched, t)
        on.append(milliseconds)
        errors.append(((logits[:, 0] - whole[:, t]).norm() / whole[:, t].norm()).item())

    positions = range(PROMPT + 1, PROMPT + TOKENS + 1)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for times, color, name in ((off, "0.55", "fast weights off"), (on, "tab:orange", "on")):
        label = f"{name}, median {statistics.median(times):.1f} ms"
        left.plot(positions, times, color=color, lw=1, label=label)
    for n in range(CHUNK, PROMPT + TOKENS + 1, CHUNK):
        left.axvline(n, color="tab:blue", ls=":", lw=1, label="a chunk is written" if n == CHUNK else None)
    left.set(xlabel="tokens of the request", ylabel="time of one token (ms)", title="Decode", ylim=(0, None))
    right.semilogy(positions, errors, ".", color="tab:green", ms=4)
    right.set(xlabel="tokens of the request", ylabel="relative difference of the logits", ylim=(1e-8, 1e-4),
              title="Token by token against one pass, float32")  # fmt: skip
    left.legend(loc="lower right", fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(f"Random Llama of SmolLM2's shape, 6 of 30 layers, chunk {CHUNK}; {machine}", fontsize=10)
    figure.savefig(IMAGES / "streaming.png", dpi=130)


@torch.no_grad()
def ridge(machine: str) -> None:
    d, f, lengths = 1024, 3072, (256, 512, 1024, 2048, 3072, 4096)
    calls = {
        "released (LU, F right-hand sides)": [],
        "ridge_write (Cholesky, D right-hand sides)": [],
        "ridge_write_from_outputs": [],
    }
    for n in lengths:
        data = testing.make_inputs(1, n + 1, d, f)
        arguments = (data.z, data.x, data.w0, data.proj)
        y = data.z @ data.w0.T
        runs = (
            lambda a=arguments: released.ridge_write(a[0][0], a[1][0], *a[2:]),
            lambda a=arguments: ttt.ridge_write(*a),
            lambda a=arguments, y=y: ttt.ridge_write_from_outputs(*a[:2], y, *a[2:]),
        )
        seconds = [[], [], []]
        for _ in range(8):
            for run, times in zip(runs, seconds, strict=True):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
        for times, milliseconds in zip(seconds, calls.values(), strict=True):
            milliseconds.append(1e3 * statistics.median(times[1:]))

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axis = figure.subplots()
    for (label, milliseconds), color in zip(calls.items(), ("0.55", "tab:cyan", "tab:blue"), strict=True):
        axis.plot(lengths, milliseconds, "o-", color=color, label=label)
    slow, _, fast = calls.values()
    for n, a, b in zip(lengths, slow, fast, strict=True):
        axis.annotate(
            f"{a / b:.1f}x", (n, a), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    axis.axvline(f, color="k", ls=":", lw=1, label="N = F: dual form left, primal right")
    axis.set(xlabel="pairs N of the prompt", ylabel="time of one layer (ms)", ylim=(0, 1.15 * max(slow)),
             title=f"Closed-form write, D {d}, F {f}, float32\n{machine}")  # fmt: skip
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(IMAGES / "ridge.png", dpi=130)


if __name__ == "__main__":
    where = environment(torch.device("cpu"))
    name = f"{where['device']}, {where['threads']} threads, torch {where['torch']}"
    streaming(name)
    ridge(name)
