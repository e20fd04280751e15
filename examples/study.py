"""Does a trained projection make the model better on text it has never seen, and why?

    python examples/study.py                      # everything, in the order of PLAN
    python examples/study.py train:specnorm-0 evaluate:specnorm-0:test
    python examples/study_report.py               # tables and the picture

A step does only what is not in `--work` yet, so that all can be stopped and repeated. What is computed,
and what came out, is in docs/results.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import study_data as data
import study_model as models
import torch
from study_controls import add_static, needle, read_from_donor, shuffled
from torch import Tensor, nn

import ttt_kernels as ttt
from ttt_kernels.cli import demo_data
from ttt_kernels.cli.demo_model import load_text
from ttt_kernels.cli.demo_run import Captured, Observer

LENGTH, CHUNK, LAYERS = 2048, 128, (10, 15, 20, 25)
FIRST = LAYERS[0]
POOL, WARMUP = 96, 4
COUNTS = {"validation": 8, "test": 16, "shakespeare": 8, "manual": 8}
NEEDLES, DEPTHS = 4, (0.1, 0.35, 0.6, 0.85)
BF16 = True


@dataclass(frozen=True)
class Stage:
    """`steps` of one window's first `tokens` each, from `start` on in the seed's order of windows; an
    optimizer of its own, whose rate begins at `scale` times the run's. Short windows cost less."""

    steps: int
    tokens: int
    start: int
    scale: float

    def rate(self, step: int) -> float:
        """Linear warm-up, then cosine to a tenth."""
        warm = min(1.0, (step + 1) / WARMUP)
        return self.scale * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / self.steps)))


STAGES = (Stage(40, 1024, 0, 1.0), Stage(8, 2048, 40, 0.5))


@dataclass(frozen=True)
class Run:
    """One training. seed: which windows, in which order, and how the convolution starts. static: a
    static update in place of fast weights. base: the run of such an update that is applied, frozen."""

    seed: int
    rate: float
    rule: dict = field(default_factory=dict)
    static: bool = False
    base: str | None = None

    @property
    def config(self) -> ttt.TTTConfig:
        return ttt.TTTConfig(layers=LAYERS, chunk_size=CHUNK, preserve_row_norm=True, **self.rule)


def specnorm(lr: float) -> dict:
    return {"inner_optimizer": "specnorm", "lr": lr}


RUNS = {
    **{f"specnorm-{seed}": Run(seed, 2e-3, specnorm(0.2)) for seed in range(3)},
    "sgd-0": Run(0, 2e-3, {"inner_optimizer": "sgd", "lr": 5e-5}),
    "clip-0": Run(0, 2e-3, {"inner_optimizer": "clip", "lr": 1e-3, "max_norm": 200.0}),
    **{f"conv-{seed}": Run(seed, 2e-3, specnorm(0.2) | {"target": "conv"}) for seed in range(3)},
    "static-0": Run(0, 1e-3, static=True),
    "on-static-0": Run(0, 2e-3, specnorm(0.2), base="static-0"),
}
MAIN = [f"specnorm-{seed}" for seed in range(3)]
CONV = [f"conv-{seed}" for seed in range(3)]
SIDE = ["sgd-0", "clip-0", *CONV, "static-0", "on-static-0"]
PLAN = [
    *(f"capture:{name}" for name in ("train", *COUNTS, "shuffled-test")),
    *(f"{step}:{run}{of}" for run in RUNS for step, of in (("train", ""), ("evaluate", ":validation"))),
    *(f"evaluate:{run}:test" for run in MAIN + SIDE),
    *(f"control:{run}:test:{kind}" for run in (*MAIN, "on-static-0") for kind in ("other", "shuffled")),
    *(f"evaluate:{run}:{texts}" for run in MAIN for texts in ("shakespeare", "manual")),
    f"writes:{MAIN[0]}", f"export:{MAIN[0]}", "closed-form:0.1", "closed-form:0.5", "recall",
]  # fmt: skip


# --- texts ----------------------------------------------------------------------------------------
def texts(name: str, cache: Path, encode) -> list[data.Window]:
    if name == "train":
        return data.training_windows(data.fetch_addresses(cache), encode, LENGTH, POOL)
    if name in ("validation", "test"):
        return data.first_windows(data.split(data.fetch_addresses(cache), name), encode, LENGTH, COUNTS[name])
    if name == "shakespeare":
        text = load_text(None, cache, lambda mark, why: exit(f"{mark}: {why}")).content
    else:
        text = demo_data.builtin_text()
    ids = torch.tensor(encode(text))
    rows = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)][: COUNTS[name]]
    return [data.Window(f"{name} {i}", row) for i, row in enumerate(rows)]


def captured(work: Path, name: str) -> Iterator[dict]:
    """name, ids [T], hidden [T, D] and the plain model's losses `off` [T - 1] of every text."""
    files = sorted((work / "captured").glob(f"{name}-*.pt"))
    if not files:
        raise SystemExit(f"no captured texts {name!r}: run the capture command first")
    return (torch.load(file) for file in files)


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def prepare(model: nn.Module, run: Run) -> list[nn.Parameter]:
    """Put into the tail what `run` trains."""
    if run.static:
        return add_static(model, [i - FIRST for i in LAYERS], run.seed)
    trained = []
    torch.manual_seed(run.seed)
    for mlp in models.patch_tail(model, run.config, FIRST).values():
        trained.append(mlp.ttt_proj.weight)
        if run.config.target == "conv":  # as it starts, specnorm has no direction to scale
            nn.init.normal_(mlp.ttt_conv.weight, std=0.02)
            trained.append(mlp.ttt_conv.weight)
    return trained


class Study:
    """The steps of PLAN: each is a method, given the rest of its name."""

    def __init__(self, work: Path, cache: Path) -> None:
        self.work, self.cache = work, cache

    @cached_property
    def subject(self):
        return models.load(self.cache, LENGTH)

    def tail(self, base: str | None = None) -> nn.Module:
        """A copy of its own; with the static update of run `base`."""
        model = models.tail(copy.deepcopy(self.subject.model), FIRST)
        if base is not None:
            updated, _ = self.trained(base)
            for i in LAYERS:
                own, other = (m.model.layers[i - FIRST].mlp.down_proj for m in (model, updated))
                own.weight.data.copy_(other.weight.data)
        return model

    def capture(self, name: str) -> None:
        kind = name.removeprefix("shuffled-")
        for i, window in enumerate(texts(kind, self.cache, self.subject.encode)):
            file = self.work / "captured" / f"{name}-{i:03d}.pt"
            if not file.exists():
                ids = window.ids if kind == name else shuffled(window.ids, CHUNK, seed=i)
                hidden, off = models.capture(self.subject.model, ids, FIRST, BF16)
                write(file, {"name": window.name, "ids": ids, "hidden": hidden, "off": off})

    # --- training
    def train(self, name: str) -> None:
        run, files = RUNS[name], [self.stage_file(name, k) for k in range(len(STAGES))]
        if files[-1].exists():
            return
        model = self.tail(run.base).train()
        trained = prepare(model, run)
        for parameter in trained:
            parameter.requires_grad_(True)
        order = torch.randperm(POOL, generator=torch.Generator().manual_seed(run.seed)).tolist()
        for stage, file in zip(STAGES, files, strict=True):
            if file.exists():
                put(trained, torch.load(file))
            else:
                self.train_stage(model, trained, stage, run.rate, order[stage.start :], file)

    def train_stage(self, model, trained, stage: Stage, rate: float, order: list[int], file: Path) -> None:
        optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        start = resume(file, trained, optimizer)
        with (self.work / f"{file.stem}.jsonl").open("a") as log:
            for step in range(start, stage.steps):
                window = torch.load(self.work / "captured" / f"train-{order[step]:03d}.pt")
                for group in optimizer.param_groups:
                    group["lr"] = rate * stage.rate(step)
                gains = learn(model, window, stage.tokens)
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                print(json.dumps({"step": step, "on_minus_off": gains}), file=log, flush=True)
                saved = {"step": step + 1, "optimizer": optimizer.state_dict(), "trained": values(trained)}
                write(file.with_suffix(".resume"), saved)
        write(file, values(trained))
        file.with_suffix(".resume").unlink()

    def stage_file(self, name: str, stage: int) -> Path:
        return self.work / "trained" / f"{name}.stage{stage + 1}.pt"

    def trained(self, name: str) -> tuple[nn.Module, Run]:
        """The tail in eval mode with what run `name` learnt."""
        run, file = RUNS[name], self.stage_file(name, len(STAGES) - 1)
        if not file.exists():
            raise SystemExit(f"{name} has not been trained: run train:{name} first")
        model = self.tail(run.base).eval()
        put(prepare(model, run), torch.load(file))
        return model, run

    def export(self, name: str) -> None:
        """The projections for the whole model, in bfloat16, as the package ships them."""
        if self.projections.exists():
            return
        tail, run = self.trained(name)
        model = copy.deepcopy(self.subject.model)
        ttt.patch_model(model, run.config)
        for i in LAYERS:
            proj = tail.model.layers[i - FIRST].mlp.ttt_proj.weight.data
            model.model.layers[i].mlp.ttt_proj.weight.data = proj.to(torch.bfloat16)
        about = {
            "trained on": f"State of the Union addresses before {data.VALIDATION_FROM}",
            "run": f"{name}: " + ", ".join(f"{s.steps} steps of {s.tokens} tokens" for s in STAGES),
        }
        ttt.save_projections(model, self.projections, metadata=about)

    # --- evaluation: losses [texts, T - 1], in files
    def evaluate(self, name: str, on: str) -> None:
        """With the run's fast weights (or its static update)."""
        file = self.work / "losses" / f"{name}.{on}.pt"
        if file.exists():
            return
        model, _ = self.trained(name)
        rows = [models.tail_loss(model, t["hidden"], t["ids"], BF16) for t in captured(self.work, on)]
        write(file, torch.stack(rows))

    def control(self, name: str, on: str, kind: str) -> None:
        """Reading what another text, or the text itself shuffled, has written."""
        file = self.work / "losses" / f"{name}.{on}.{kind}.pt"
        if file.exists():
            return
        model, _ = self.trained(name)
        own = list(captured(self.work, on))
        donors = own[1:] + own[:1] if kind == "other" else list(captured(self.work, f"shuffled-{on}"))
        with read_from_donor([model.model.layers[i - FIRST].mlp for i in LAYERS]):
            rows = [pair_loss(model, text, donor) for text, donor in zip(own, donors, strict=True)]
        write(file, torch.stack(rows))

    def writes(self, name: str) -> None:
        """Of every layer: how close to rank one a chunk's write is, and how alike those of three texts."""
        file = self.work / "losses" / f"{name}.writes.json"
        if file.exists():
            return
        model, _ = self.trained(name)
        ratios: dict[int, list[float]] = {i: [] for i in LAYERS}
        sums: dict[int, list[Tensor]] = {i: [] for i in LAYERS}
        for _, text in zip(range(3), captured(self.work, "test"), strict=False):
            with Observer(model) as observer:
                models.tail_loss(model, text["hidden"], text["ids"], BF16)
            for i, seen in observer.captured.items():
                written = chunk_writes(seen)
                norms = [torch.linalg.matrix_norm(w, k) for w in written[::4] for k in (2, "fro")]
                ratios[i + FIRST] += [float(a / b) for a, b in zip(norms[::2], norms[1::2], strict=True)]
                sums[i + FIRST].append(sum(written).flatten())
        cosine = nn.functional.cosine_similarity
        found = {
            i: {
                "spectral over Frobenius norm": sum(ratios[i]) / len(ratios[i]),
                "cosine between texts": float(sum(cosine(s[k], s[k - 1], dim=0) for k in range(3)) / 3),
            }
            for i, s in sums.items()
        }
        file.write_text(json.dumps(found))

    # --- with the whole model and the exported projections
    @property
    def projections(self) -> Path:
        return self.work / "projections.safetensors"

    @cached_property
    def patched(self) -> nn.Module:
        model = copy.deepcopy(self.subject.model)
        ttt.load_projections(model, self.projections)
        return model

    def closed_form(self, eta: str) -> None:
        """The second half of every test text after a closed-form write of the first."""
        file = self.work / "losses" / f"ridge-{eta}.test.pt"
        if file.exists():
            return
        half, rows = LENGTH // 2, []
        for text in captured(self.work, "test"):
            prompt, rest = text["ids"][None, :half], text["ids"][None, half:]
            with models.precision(BF16):
                with ttt.adapt(self.patched, prompt, eta=float(eta), cap=float(eta)) as adapted:
                    logits = adapted.logits(rest)[0, :-1]
            rows.append(nn.functional.cross_entropy(logits.float(), rest[0], reduction="none"))
        write(file, torch.stack(rows))

    def recall(self) -> None:
        """Loss of a number said at some depth and asked for at the end: off and on."""
        file = self.work / "losses" / "recall.json"
        if file.exists():
            return
        found = {depth: [] for depth in DEPTHS}
        for seed, text in zip(range(NEEDLES), captured(self.work, "test"), strict=False):
            for depth in DEPTHS:
                ids, count = needle(text["ids"].tolist(), self.subject.encode, LENGTH, depth, seed)
                found[depth].append([answer_loss(self.patched, ids, count, on) for on in (False, True)])
        file.write_text(json.dumps(found))


def chunk_writes(seen: Captured) -> list[Tensor]:
    """s_n sum_t v_t z_t^T [D, F] of every chunk n."""
    chunk, sizes = seen.rule.chunk_size, seen.step_sizes()[0]
    pairs = zip(seen.z[0].float().split(chunk), seen.v[0].float().split(chunk), sizes, strict=True)
    return [s * v.T @ z for z, v, s in pairs]


def learn(model: nn.Module, window: dict, tokens: int) -> list[float]:
    """Adds to the gradients; on - off of a window not seen before, in quarters."""
    hidden, ids = (window[name][:tokens] for name in ("hidden", "ids"))
    with torch.enable_grad():
        losses = models.tail_loss(model, hidden, ids, BF16)
        losses.mean().backward()
    gains = (losses.detach() - window["off"][: len(losses)]).split(tokens // 4)
    return [gain.mean().item() for gain in gains]


def values(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.data for p in parameters]


def put(parameters: list[nn.Parameter], saved: list[Tensor]) -> None:
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.data.copy_(value)


def resume(file: Path, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """The next step of a training that was stopped, its state put in place."""
    if not file.with_suffix(".resume").exists():
        return 0
    saved = torch.load(file.with_suffix(".resume"))
    optimizer.load_state_dict(saved["optimizer"])
    put(trained, saved["trained"])
    return saved["step"]


def pair_loss(model: nn.Module, text: dict, donor: dict) -> Tensor:
    """Losses [T - 1] of `text`, run beside `donor`."""
    both = torch.stack([text["hidden"], donor["hidden"]])
    with models.precision(BF16):
        out = model.model(inputs_embeds=both, use_cache=False).last_hidden_state[0]
        return models.next_token_loss(model, out, text["ids"])


def answer_loss(model: nn.Module, ids: Tensor, count: int, on: bool) -> float:
    """Mean loss of the last `count` tokens."""
    call = {"input_ids": ids[None], "use_cache": False, "logits_to_keep": count + 1}
    with models.precision(BF16), nullcontext() if on else ttt.disabled(model):
        logits = model(**call).logits[0, :-1]
    return float(nn.functional.cross_entropy(logits.float(), ids[-count:]))


def run_step(study: Study, step: str) -> None:
    """One step of PLAN by its name."""
    name, *rest = step.split(":")
    getattr(study, name.replace("-", "_"))(*rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", default=PLAN, metavar="STEP", help="default: all of PLAN")
    parser.add_argument("--work", type=Path, default=Path("outputs/study"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/ttt_kernels"))
    args = parser.parse_args()
    study = Study(args.work, args.cache)
    for step in args.steps:
        start = time.perf_counter()
        with torch.no_grad():
            run_step(study, step)
        print(f"{step}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
