"""`python -m ttt_kernels bench --suite models`: tokens a second and peak memory of whole models, patched
against plain. Both share their slow weights and take turns, call by call."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import ttt_kernels as ttt
from ttt_kernels.cli import bench_report
from ttt_kernels.cli.bench_lines import JsonLines
from ttt_kernels.cli.bench_models import (
    DECODE,
    PATCHED,
    PLAIN,
    PREFILL,
    SIDES,
    Turns,
    forward,
    joined,
    twin_of,
)
from ttt_kernels.cli.bench_models_shapes import EXTRA, NAMES, Skip, Subject, load, plan_for
from ttt_kernels.cli.errors import UserError
from ttt_kernels.cli.measure import Timing, extra_memory, machine, time_interleaved
from ttt_kernels.cli.tables import new_table

SUITE, OP = "models", "model"
# Before the first write both compute the same with other products: RMS of the difference over RMS.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
Say = Callable[[str], None]


@dataclass(frozen=True)
class ShapeRow:
    """One kind of call of one model. `ratio`: the patched model's time over the plain one's, the median
    of the rounds' pairs. `tokens`: read by a prefill, or there before decoding."""

    about: Mapping[str, object]  # the model, as in `about_model`
    call: str
    batch: int
    tokens: int
    timings: Mapping[str, Timing]
    work: int  # tokens of one call, all rows together
    peak_bytes: Mapping[str, int]
    state_bytes: int
    gemm_share: Mapping[str, float] | None = None

    @property
    def pairs(self) -> Timing:
        both = zip(self.timings[PATCHED].seconds, self.timings[PLAIN].seconds, strict=True)
        return Timing([patched / plain for patched, plain in both])

    def of_sides(self, value: Callable[[Timing], float]) -> dict[str, float]:
        return {side: value(self.timings[side]) for side in SIDES}

    @property
    def tokens_per_second(self) -> dict[str, float]:
        return self.of_sides(lambda t: self.work / t.median)

    def as_record(self) -> dict[str, object]:
        pairs = self.pairs
        return {
            "kind": "result", "suite": SUITE, "op": OP, **self.about, "call": self.call,
            "batch": self.batch, "tokens": self.tokens,
            "milliseconds": self.of_sides(lambda t: 1e3 * t.median),
            "milliseconds_p20": self.of_sides(lambda t: 1e3 * t.percentile(20)),
            "milliseconds_p80": self.of_sides(lambda t: 1e3 * t.percentile(80)),
            "tokens_per_second": self.tokens_per_second,
            "peak_bytes": dict(self.peak_bytes), "state_bytes": self.state_bytes,
            "gemm_share": self.gemm_share, "ratio": pairs.median,
            "ratio_p20": pairs.percentile(20), "ratio_p80": pairs.percentile(80),
            "repeats": len(pairs.seconds),
        }  # fmt: skip


@dataclass(frozen=True)
class ModelLeft:
    """A model that was not timed: "skipped", or "refused" because it computes wrong results."""

    shape: str
    kind: str
    reason: str

    def as_record(self) -> dict[str, object]:
        return {"kind": self.kind, "suite": SUITE, "op": OP, "shape": self.shape, "reason": self.reason}


@dataclass
class SuiteResults:
    rows: list[ShapeRow] = field(default_factory=list)
    left: list[ModelLeft] = field(default_factory=list)


def run(args: argparse.Namespace, where: dict, console) -> int:
    """Exit code 1 where a model was refused."""
    results = SuiteResults()
    device = torch.device(args.device)

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    with JsonLines(args.output, where) as lines:
        for name in NAMES:
            say(f"loading {name}")
            found: list[ShapeRow | ModelLeft] = []
            try:
                subject = load(name, plan_for(name, device), device)
                found = measure(subject, args.repeats, say)
                results.rows += found
            except (Skip, torch.OutOfMemoryError) as error:
                found = [ModelLeft(name, "skipped", str(error))]
                results.left += found
            except WrongResults as error:
                found = [ModelLeft(name, "refused", str(error))]
                results.left += found
            lines.add(line.as_record() for line in found)
            subject = None
            gc.collect()  # hooks of a patched model refer to one another
    report(results, where)
    if not results.rows and not results.left:
        raise UserError("nothing was measured")
    return 1 if any(left.kind == "refused" for left in results.left) else 0


class WrongResults(Exception):
    """The patched model does not compute what it should."""


# --- measuring ------------------------------------------------------------------------------------
def measure(subject: Subject, repeats: int, say: Say = lambda text: None) -> list[ShapeRow]:
    """Checked, then memory, then `repeats` interleaved prefills and `plan.steps` decoded tokens."""
    plan, about = subject.plan, about_model(subject)
    models = {PLAIN: subject.model, PATCHED: twin_of(subject.model, subject.config)}
    say(f"checking {heading(about)}")
    check(models, subject.ids[:1, : plan.prompt], plan.chunk_size)
    ids = subject.ids[:1, : plan.tokens]
    say(f"prefill of {plan.tokens} tokens, {repeats} interleaved rounds")
    rows = [prefill_row(subject, models, about, ids, repeats)]
    for batch in plan.batches:
        say(f"decoding {plan.steps} tokens after {plan.prompt}, batch {batch}, interleaved")
        rows.append(decode_row(subject, models, about, batch))
    return rows


def prefill_row(subject: Subject, models: dict, about: dict, ids: Tensor, repeats: int) -> ShapeRow:
    peaks = {side: peak(models[side], ids, None) for side in SIDES}  # also their warm-up
    turns, gemm = Turns(models, ids), Gemm(subject, ids.shape[1])
    timings = []
    for _ in range(repeats):
        timings.append(turns.restart(ids.shape[1]))
        gemm.time()
    timings = joined(timings)
    shares = {s: flops(subject, s, ids.shape[1]) / timings[s].median / gemm.rate for s in SIDES}
    held = ttt.FastWeightState.of(turns.caches[PATCHED]).nbytes
    return ShapeRow(about, PREFILL, 1, ids.shape[1], timings, ids.numel(), peaks, held, shares)


def decode_row(subject: Subject, models: dict, about: dict, batch: int) -> ShapeRow:
    plan = subject.plan
    turns = Turns(models, subject.ids[:batch])
    turns.restart(plan.prompt)
    turns.advance(1)  # the first call with one token is slow
    timings = joined(turns.advance(1) for _ in range(plan.steps - 2))
    state = ttt.FastWeightState.of(turns.caches[PATCHED]).nbytes
    last = turns.ids[:, turns.position : turns.position + 1]
    held = {PLAIN: 0, PATCHED: state}
    peaks = {side: held[side] + peak(models[side], last, turns.caches[side]) for side in SIDES}
    return ShapeRow(about, DECODE, batch, plan.prompt, timings, batch, peaks, state)


def peak(model: nn.Module, ids: Tensor, cache) -> int:
    """Most bytes held during a call: the parameters and what the call adds. Without a cache that includes
    the one it makes; with one, the copy by which keys and values grow, so that those before it, kept
    alive here, are not counted twice. Fast weights that were there come on top."""
    layers = [] if cache is None else cache.layers
    kept = [(layer.keys, layer.values) for layer in layers]
    extra = extra_memory(lambda: forward(model, ids, cache), ids.device)
    del kept
    return sum(p.nbytes for p in model.parameters()) + extra


class Gemm:
    """The ceiling: one plain product of the MLP's shape, timed in the same rounds."""

    def __init__(self, subject: Subject, tokens: int) -> None:
        config, device = subject.model.config, subject.ids.device
        d, f = config.hidden_size, config.intermediate_size
        a = torch.randn(tokens, d, device=device, dtype=subject.plan.dtype)
        b = torch.randn(d, f, device=device, dtype=subject.plan.dtype)
        out = torch.empty(tokens, f, device=device, dtype=subject.plan.dtype)
        self.call, self.flops, self.timing = (lambda: torch.mm(a, b, out=out)), 2 * tokens * d * f, Timing()
        self.device = device
        self.call()

    def time(self) -> None:
        self.timing.seconds += time_interleaved({"gemm": self.call}, 1, self.device)["gemm"].seconds

    @property
    def rate(self) -> float:
        return self.flops / self.timing.median


def flops(subject: Subject, side: str, tokens: int) -> int:
    """Of a prefill: 2 per weight and token, causal attention; a fast weight 2DF more for its write and
    2D^2 for its target. Without step sizes, norms and the one token that meets the vocabulary."""
    config = subject.model.config
    weights = sum(p.numel() for p in subject.model.model.layers.parameters() if p.ndim == 2)
    attention = 2 * tokens * config.num_attention_heads * subject.head_dim * config.num_hidden_layers
    d, f = config.hidden_size, config.intermediate_size
    fast = len(subject.config.layers) if side == PATCHED else 0
    return tokens * (2 * weights + attention + fast * 2 * d * (f + d))


def check(models: Mapping[str, nn.Module], ids: Tensor, chunk_size: int) -> None:
    """Nothing is written before the first chunk is full: until then both models agree. After it every
    layer has written as often as there are chunks, and the logits are finite and others.

    Raises:
        WrongResults: where this does not hold.
    """

    @torch.no_grad()
    def logits(side: str, part: Tensor, cache=None):
        out = models[side](input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits.float(), out.past_key_values

    plain, patched = (logits(side, ids[:, :chunk_size])[0] for side in SIDES)
    apart = distance(patched, plain)
    if not apart <= AGREEMENT[models[PLAIN].dtype]:
        raise WrongResults(f"before the first write the patched model's logits differ by {apart:.2g} (RMS)")
    plain, (patched, cache) = logits(PLAIN, ids)[0], logits(PATCHED, ids)
    state, chunks = ttt.FastWeightState.of(cache), ids.shape[1] // chunk_size
    wrong = {i: rows for i, rows in state.writes.items() if set(rows) != {chunks}}
    if wrong or not bool(torch.isfinite(patched).all()):
        raise WrongResults(f"{chunks} writes and finite logits are due, got {wrong or 'non-finite logits'}")
    if chunks > 1 and torch.equal(patched, plain):
        raise WrongResults("after writes the patched model's logits are still the plain one's")


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


# --- what is said ---------------------------------------------------------------------------------
def about_model(subject: Subject) -> dict[str, object]:
    return {
        "shape": subject.name, "weights": subject.weights, "layers": subject.layers,
        "of_layers": subject.of_layers, "patched": list(subject.config.layers),
        "vocabulary": subject.vocabulary, "of_vocabulary": subject.of_vocabulary,
        "chunk_size": subject.config.chunk_size, "inner_optimizer": subject.config.inner_optimizer,
        "dtype": str(subject.plan.dtype).removeprefix("torch."), "device": subject.ids.device.type,
    }  # fmt: skip


def heading(about: Mapping[str, object]) -> str:
    """Words without a number are whole."""
    parts = [f"{about['shape']}, {about['weights']} weights", about["dtype"], f"chunk {about['chunk_size']}"]
    parts.append(f"{about['layers']} of {about['of_layers']} layers")
    parts.append(f"fast weights in {', '.join(map(str, about['patched']))}")
    if about["vocabulary"] != about["of_vocabulary"]:
        parts.append(f"{about['vocabulary']} of {about['of_vocabulary']} words")
    return "; ".join(parts)


def report(results: SuiteResults, where: dict) -> None:
    console = bench_report.require("rich.console", EXTRA).Console()
    console.print(machine(where), highlight=False)
    number = bench_report.number
    columns = ("call", "B", "tokens", "plain", "patched", "ratio", "p20-p80", "GEMM", "GiB", "GiB patched")
    models: dict[str, list[ShapeRow]] = {}
    for row in results.rows:
        models.setdefault(heading(row.about), []).append(row)
    for title, rows in models.items():
        console.print(f"\n[bold]{title}[/]", highlight=False)
        table = new_table(columns, EXTRA)
        for row in rows:
            speed, pairs = row.tokens_per_second, row.pairs
            table.add_row(
                row.call, str(row.batch), str(row.tokens), number(speed[PLAIN]), number(speed[PATCHED]),
                f"{pairs.median:.3f}", f"{pairs.percentile(20):.3f}-{pairs.percentile(80):.3f}",
                "-" if row.gemm_share is None else f"{row.gemm_share[PATCHED]:.0%}",
                *(f"{row.peak_bytes[side] / 2**30:.2f}" for side in SIDES),
            )  # fmt: skip
        console.print(table)
    console.print("plain, patched: tokens/s; ratio: patched over plain time; GiB: peak memory", style="dim")
    for left in results.left:
        style = "bold red" if left.kind == "refused" else "yellow"
        console.print(f"{left.kind}: {left.shape}: {left.reason}", style=style, highlight=False)
