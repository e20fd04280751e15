"""Reading a prompt and continuing it, with the clock, the progress bars and the state in view."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ttt_kernels as ttt
from ttt_kernels.cli.errors import UserError, require
from ttt_kernels.cli.measure import synchronize

EXTRA = "demo"
BLOCK = 1024  # tokens read between two looks at the progress bar

Bar = Callable[[str, int], Callable[[int], None]]
"""(title, steps) -> what is told how many steps are done."""


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    num_beams: int = 1

    def options(self) -> dict[str, object]:
        """For `generate`; nothing is left to the model's own generation config but its end."""
        options = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.temperature is None and self.top_p is None:
            return {**options, "do_sample": False}
        one = {"temperature": self.temperature, "top_p": self.top_p}
        one = {name: 1.0 if value is None else value for name, value in one.items()}
        return {**options, "do_sample": True, "top_k": 0, **one}


@dataclass(frozen=True)
class Generation:
    """What came out and what it cost. `after_prompt`: the state between reading and generating."""

    prompt_tokens: int
    new_ids: list[int]
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int  # the first new token comes out of the prefill
    state_bytes: int
    writes: dict[int, int]  # by layer
    refused: dict[int, int]
    after_prompt: ttt.FastWeightState | None = None

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        return self.decode_steps / self.decode_seconds if self.decode_steps else None

    def as_record(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.new_ids),
            "new_ids": self.new_ids,
            "prefill_seconds": self.prefill_seconds,
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_seconds": self.decode_seconds,
            "decode_tokens_per_second": self.decode_rate,
            "state_bytes": self.state_bytes,
            "writes": self.writes,
            "refused": self.refused,
        }


class Watch:
    """A logits processor that changes nothing: it is called once per step, before the token."""

    def __init__(self, device: torch.device, bar: Callable[[int], None], first: Callable[[], None]):
        self.device, self.bar, self.first = device, bar, first
        self.steps = 0
        self.begun: float | None = None  # when the logits of the first new token were there

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.begun is None:
            synchronize(self.device)
            self.begun = time.perf_counter()
            self.first()
        self.steps += 1
        self.bar(self.steps)
        return scores


def run_streaming(
    model: nn.Module,
    ids: Tensor,
    sampling: Sampling,
    bar: Bar,
    state: ttt.FastWeightState | None = None,
) -> Generation:
    """`ids` [1, T] through a patched model (from `state`, if given) or a plain one."""
    cache = require("transformers", EXTRA).DynamicCache(config=model.config)
    if state is not None:
        state.attach(cache)
    patched = any(isinstance(m, ttt.FastWeightMLP) for m in model.modules())
    after_prompt: list[ttt.FastWeightState] = []

    def keep() -> None:
        if patched:
            after_prompt.append(ttt.FastWeightState.of(cache).clone())
            after_prompt[0].select([0])

    start = time.perf_counter()
    read(model, ids[:, :-1], cache, bar("reading", ids.shape[1]))
    if sampling.num_beams > 1 and ids.shape[1] > 1:
        cache.batch_repeat_interleave(sampling.num_beams)
    elif state is not None:
        state.repeat(sampling.num_beams)
    watch = Watch(ids.device, bar("generating", sampling.max_new_tokens), keep)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
    out = continue_prompt(model.generate, sampling, watch, **inputs)
    end = time.perf_counter()
    final = ttt.FastWeightState.of(cache) if patched else None
    kept = after_prompt[0] if after_prompt else None
    return generation(ids, out, (start, end), watch, final, kept)


def read(model: nn.Module, ids: Tensor, cache, bar: Callable[[int], None]) -> None:
    """Everything but the last token of the prompt, which `generate` reads itself."""
    done = 0
    for part in ids.split(BLOCK, 1) if ids.shape[1] else ():
        with torch.no_grad():
            model.base_model(input_ids=part, past_key_values=cache, use_cache=True)
        done += part.shape[1]
        bar(done)
    bar(done + 1)


def run_ridge(
    model: nn.Module, ids: Tensor, sampling: Sampling, bar: Bar, options: Mapping[str, object]
) -> Generation:
    """One plain forward and one closed-form write per layer; the prefill's time has both."""
    done = bar("reading", ids.shape[1])
    start = time.perf_counter()
    with ExitStack() as stack:
        try:
            adapted = stack.enter_context(ttt.adapt(model, ids, **options))
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"--method ridge: {error}") from error
        done(ids.shape[1])
        watch = Watch(ids.device, bar("generating", sampling.max_new_tokens), lambda: None)
        out = continue_prompt(adapted.generate, sampling, watch)
        end = time.perf_counter()
        return generation(ids, out, (start, end), watch, adapted.state, None)


def continue_prompt(call: Callable[..., Tensor], sampling: Sampling, watch: Watch, **arguments):
    processors = require("transformers", EXTRA).LogitsProcessorList([watch])
    return call(**arguments, **sampling.options(), logits_processor=processors)


def generation(
    ids: Tensor, out: Tensor, clock: tuple[float, float], watch: Watch, state, after_prompt
) -> Generation:
    synchronize(ids.device)
    start, end = clock
    writes = {} if state is None else {i: rows[0] for i, rows in state.writes.items()}
    refused = {} if state is None else {i: rows[0] for i, rows in state.refused.items()}
    return Generation(
        prompt_tokens=ids.shape[1],
        new_ids=out[0, ids.shape[1] :].tolist(),
        prefill_seconds=watch.begun - start,
        decode_seconds=end - watch.begun,
        decode_steps=watch.steps - 1,
        state_bytes=0 if state is None else state.nbytes,
        writes=writes,
        refused=refused,
        after_prompt=after_prompt,
    )
