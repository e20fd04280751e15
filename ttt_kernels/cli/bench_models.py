"""`python -m ttt_kernels bench --suite streaming`: what fast weights cost a model that streams.

The plain model and the patched one share their slow weights and take turns, call by call.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

import ttt_kernels as ttt
from ttt_kernels.cli import bench_report, fast_weights
from ttt_kernels.cli.bench_lines import JsonLines
from ttt_kernels.cli.bench_suites import Target
from ttt_kernels.cli.demo_model import Subject, load_subject, load_text
from ttt_kernels.cli.errors import UserError
from ttt_kernels.cli.measure import Timing, machine, time_interleaved
from ttt_kernels.cli.tables import new_table

EXTRA = "demo"  # the packages that load a model
PLAIN, PATCHED = "plain", "patched"
PREFILL, DECODE, WRITE = "prefill", "decode", "decode+write"
SIDES = (PLAIN, PATCHED)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """Tokens. `prompt` is read before decoding, in whole chunks; `steps` then fit into one."""

    prefill: int = 4096
    prompt: int = 1024
    steps: int = 200
    chunk_size: int = 256


@dataclass(frozen=True)
class ModelRow:
    """One kind of call; milliseconds are medians over the rounds.

    "decode" reads tokens inside a chunk, whose weight has been written before; "decode+write" the
    token that fills one, every `chunk_size` tokens.
    """

    call: str
    tokens: int  # of one call
    milliseconds: dict[str, float]
    milliseconds_p20: dict[str, float]
    milliseconds_p80: dict[str, float]
    repeats: int
    state_bytes: int

    @property
    def ratio(self) -> float:
        return self.milliseconds[PATCHED] / self.milliseconds[PLAIN]

    def as_record(self) -> dict[str, object]:
        return {"kind": "result", "suite": "streaming", **asdict(self), "ratio": self.ratio}


@dataclass
class ModelResults:
    rows: list[ModelRow] = field(default_factory=list)

    def ratio(self, call: str) -> float | None:
        return next((row.ratio for row in self.rows if row.call == call), None)


TARGETS = (
    Target("decode between writes: patched over plain", 1.10, False, lambda r: r.ratio(DECODE)),
    Target("prefill: patched over plain", 1.35, False, lambda r: r.ratio(PREFILL)),
)


def run(args: argparse.Namespace, where: dict, console) -> int:
    """Exit code 0: targets are reported, not asserted."""

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    def refuse(mark: str, why: str) -> None:
        raise UserError(f"--suite streaming is about the pretrained model and a real text: {why}")

    sizes = Sizes()
    say("loading the model and the text")
    cache = fast_weights.DEFAULT_CACHE
    subject = load_subject(None, cache, sizes.prefill, 0, refuse)
    text = load_text(None, cache, refuse)
    need = max(sizes.prefill, sizes.prompt + args.repeats * sizes.chunk_size)
    ids = torch.tensor([subject.encode(text.content)[:need]])
    patched = patched_twin(subject, sizes)
    where = {**where, "model": subject.name, "text": text.name}
    with JsonLines(args.output, where) as lines:
        models = {PLAIN: subject.model, PATCHED: patched}
        results = measure(models, ids, sizes, args.repeats, say, lines.add)
        targets = [t.judge(results) for t in TARGETS]
        lines.add(targets)
    report(results, where, targets)
    return 0


def patched_twin(subject: Subject, sizes: Sizes) -> nn.Module:
    """Another model with the same parameter objects, patched as the demo does."""
    options = argparse.Namespace(**{**fast_weights.DEFAULTS, "chunk_size": sizes.chunk_size})
    return twin_of(subject.model, fast_weights.make_config(options, subject.layers))


def twin_of(model: nn.Module, config: ttt.TTTConfig) -> nn.Module:
    """Another model with the same parameter objects, patched."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    fast_weights.patch(twin, config)
    return twin


def measure(
    models: dict[str, nn.Module],
    ids: Tensor,
    sizes: Sizes,
    repeats: int,
    say: Say = lambda text: None,
    keep: Callable[[list[dict]], None] = lambda records: None,
) -> ModelResults:
    """`ids` [1, T]: at least `prefill` tokens, and `prompt` + `repeats` chunks."""
    turns = Turns(models, ids)
    results = ModelResults()

    def add(call: str, tokens: int, times: dict[str, Timing]) -> None:
        held = ttt.FastWeightState.of(turns.caches[PATCHED]).nbytes
        results.rows.append(row_of(call, tokens, times, held))
        keep([results.rows[-1].as_record()])

    say(f"prefill of {sizes.prefill} tokens, {repeats} interleaved rounds")
    turns.restart(sizes.chunk_size)  # the first call of a process is slow
    add(PREFILL, sizes.prefill, joined(turns.restart(sizes.prefill) for _ in range(repeats)))
    say(f"decoding {sizes.steps} tokens after {sizes.prompt}, interleaved")
    turns.restart(sizes.prompt)
    add(DECODE, 1, joined(turns.advance(1) for _ in range(sizes.steps)))
    say(f"{repeats} tokens that fill a chunk")
    writes = []
    for n in range(repeats):
        turns.advance(sizes.prompt + (n + 1) * sizes.chunk_size - 1 - turns.position)
        writes.append(turns.advance(1))
    add(WRITE, 1, joined(writes))
    return results


class Turns:
    """Both models at the same place of a text, each with its own cache; who begins alternates."""

    def __init__(self, models: dict[str, nn.Module], ids: Tensor) -> None:
        self.models, self.ids = models, ids
        self.caches: dict[str, object] = {}
        self.position = 0
        self.order = SIDES

    def restart(self, count: int) -> dict[str, Timing]:
        """Read the first `count` tokens anew; the time of each model."""
        self.caches, self.position = {}, 0
        return self.advance(count)

    def advance(self, count: int) -> dict[str, Timing]:
        part = self.ids[:, self.position : self.position + count]
        self.position += count

        def call(side: str) -> None:
            self.caches[side] = forward(self.models[side], part, self.caches.get(side))

        self.order = self.order[::-1]
        return time_interleaved({s: lambda s=s: call(s) for s in self.order}, 1, self.ids.device)


def joined(rounds: Iterable[dict[str, Timing]]) -> dict[str, Timing]:
    rounds = list(rounds)
    return {s: Timing([x for times in rounds for x in times[s].seconds]) for s in SIDES}


@torch.no_grad()
def forward(model: nn.Module, ids: Tensor, cache: object) -> object:
    """Logits of the last token, and the cache that the call used or made."""
    return model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).past_key_values


def row_of(call: str, tokens: int, times: dict[str, Timing], held: int) -> ModelRow:
    def milliseconds(value: Callable[[Timing], float]) -> dict[str, float]:
        return {side: value(timing) * 1e3 for side, timing in times.items()}

    return ModelRow(
        call=call,
        tokens=tokens,
        milliseconds=milliseconds(lambda t: t.median),
        milliseconds_p20=milliseconds(lambda t: t.percentile(20)),
        milliseconds_p80=milliseconds(lambda t: t.percentile(80)),
        repeats=len(times[PLAIN].seconds),
        state_bytes=held,
    )


def report(results: ModelResults, where: dict, targets: list[dict]) -> None:
    console = bench_report.require("rich.console", EXTRA).Console()
    console.print(f"{machine(where)}\n{where['model']}\n", highlight=False)
    names = ("call", "tokens", "plain ms", "p20-p80", "patched ms", "p20-p80", "ratio")
    table = new_table(names, EXTRA)
    for row in results.rows:
        cells = [cell for side in SIDES for cell in spread(row, side)]
        table.add_row(row.call, str(row.tokens), *cells, f"{row.ratio:.3f}")
    console.print(table)
    held = results.rows[-1].state_bytes
    console.print(f"state {held / 2**20:.1f} MiB ({held:,} bytes)", highlight=False)
    console.print("\n[bold]Targets[/]")
    console.print(bench_report.targets_table(targets))


def spread(row: ModelRow, side: str) -> tuple[str, str]:
    number = bench_report.number
    low, high = row.milliseconds_p20[side], row.milliseconds_p80[side]
    return number(row.milliseconds[side]), f"{number(low)}-{number(high)}"
