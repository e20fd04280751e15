"""The demo's measurements on a model that is in use: losses, writes, and the scan at its shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import ttt_kernels as ttt
from ttt_kernels.cli.bench_case import MODES, Operands, run_once
from ttt_kernels.cli.bench_registry import OPERATIONS
from ttt_kernels.cli.measure import extra_memory, synchronize, time_interleaved
from ttt_kernels.modules import FastWeightMLP, WriteRule
from ttt_kernels.testing import ScanInputs, check_scan
from ttt_kernels.types import ceil_div

Tick = Callable[[], None]


@dataclass
class Pass:
    """One reading of all windows. nll [windows, T - 1], nats per token."""

    nll: Tensor
    seconds: float

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.nll).all())


@dataclass
class LayerTrace:
    """[window][chunk]: ||s dW|| / ||W|| of a write, and ||W - w0|| / ||w0|| after it."""

    writes: list[list[float]] = field(default_factory=list)
    drift: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Captured:
    """What one layer's scan was given: z [1, T, F], v [1, T, D], w0 [D, F]."""

    layer: int
    rule: WriteRule
    z: Tensor
    v: Tensor
    w0: Tensor

    def step_sizes(self) -> Tensor:
        """[1, NC], from the public ops, as the layer computed them."""
        rule, chunk = self.rule, {"chunk_size": self.rule.chunk_size}
        if rule.inner_optimizer == "specnorm":
            return ttt.spectral_step_size(self.z, self.v, lr=rule.lr, **chunk)
        if rule.inner_optimizer == "clip":
            return ttt.clipped_step_size(
                self.z, self.v, lr=rule.lr, max_norm=rule.max_norm, **chunk
            )
        chunks = ceil_div(self.z.shape[1], rule.chunk_size)
        return torch.full((self.z.shape[0], chunks), rule.lr, device=self.z.device)


@dataclass(frozen=True)
class ScanRow:
    impl: str
    mode: str
    milliseconds: float
    milliseconds_p20: float
    milliseconds_p80: float
    extra_bytes: int


@dataclass(frozen=True)
class ScanComparison:
    layer: int
    tokens: int
    d: int
    f: int
    parity: dict[str, dict[str, float]]  # implementation -> result -> error over its budget
    rows: list[ScanRow]

    @property
    def worst(self) -> float:
        return max(ratio for ratios in self.parity.values() for ratio in ratios.values())

    def row(self, impl: str, mode: str) -> ScanRow:
        return next(r for r in self.rows if (r.impl, r.mode) == (impl, mode))


def fast_layers(model: nn.Module) -> dict[int, FastWeightMLP]:
    """The patched MLPs by layer index, which is the last number in their name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FastWeightMLP):
            found[max(int(p) for p in name.split(".") if p.isdigit())] = module
    return found


def read(
    model: nn.Module, windows: Tensor, tick: Tick, after: Callable[[], None] = lambda: None
) -> Pass:
    """Loss of every next token; `after` each window (not timed) something may look at the model."""
    losses, seconds = [], 0.0
    for ids in windows:
        start = time.perf_counter()
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            synchronize(ids.device)
            seconds += time.perf_counter() - start
            losses.append(nll(logits, ids))
        after()
        tick()
    return Pass(torch.stack(losses).cpu(), seconds)


def nll(logits: Tensor, ids: Tensor, rows: int = 256) -> Tensor:
    """-log p of each next token, a few positions at a time: a vocabulary of floats is large."""
    pairs = zip(logits[:-1].split(rows), ids[1:].split(rows), strict=True)
    cross_entropy = nn.functional.cross_entropy
    return torch.cat([cross_entropy(p.float(), t, reduction="none") for p, t in pairs])


class Observer:
    """Sees what each fast-weight layer reads and writes, through hooks on its down_proj."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = fast_layers(model)
        self.traces = {i: LayerTrace() for i in self.layers}
        self.captured: dict[int, Captured] = {}
        self._hooks = [
            mlp.down_proj.register_forward_pre_hook(self._hook(i, mlp))
            for i, mlp in self.layers.items()
        ]

    def _hook(self, layer: int, mlp: FastWeightMLP):
        def capture(module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
            z, v = (t.detach() for t in args)
            self.captured[layer] = Captured(layer, mlp.rule, z, v, module.weight.detach())

        return capture

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def trace(self) -> None:
        """Replay the writes of the window just read, chunk by chunk."""
        for layer, seen in self.captured.items():
            writes, drift = replay(seen)
            self.traces[layer].writes.append(writes)
            self.traces[layer].drift.append(drift)


def replay(seen: Captured) -> tuple[list[float], list[float]]:
    """Relative size of each write, and the drift of the raw weight after it (before row norms)."""
    w0 = seen.w0.float()
    weight, start = w0.clone(), w0.norm()
    writes, drift = [], []
    steps, chunk_size = seen.step_sizes(), seen.rule.chunk_size
    for n in range(seen.z.shape[1] // chunk_size):
        t = slice(n * chunk_size, (n + 1) * chunk_size)
        write = steps[0, n] * (seen.v[0, t].float().t() @ seen.z[0, t].float())
        writes.append(float(write.norm() / weight.norm()))
        weight += write
        drift.append(float((weight - w0).norm() / start))
    return writes, drift


COMPARED = ("reference", "eager")


def compare_scan(seen: Captured, repeats: int, seed: int, tick: Tick) -> ScanComparison:
    """Reference and eager on the z, v and step sizes that the model itself produced."""
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(seen.v.shape, generator=generator).to(seen.v)
    options = {
        "chunk_size": seen.rule.chunk_size,
        "preserve_row_norm": seen.rule.preserve_row_norm,
        "step_size": seen.step_sizes(),
    }
    known = OPERATIONS["scan"].implementations
    implementations = {name: known[name].call for name in COMPARED}
    none = seen.z.new_empty(0)
    inputs = ScanInputs(z=seen.z, v=seen.v, w0=seen.w0, x=none, proj=none, dy=dy)
    parity = {}
    for name, call in implementations.items():
        parity[name] = check_scan(call, inputs, **options).ratios
        tick()
    operands = Operands((seen.z, seen.v, seen.w0), options, dy)
    calls = {
        (name, mode): lambda call=call, mode=mode: run_once(call, operands, mode)
        for mode in MODES
        for name, call in implementations.items()
    }
    memory = {key: extra_memory(call, seen.z.device) for key, call in calls.items()}
    times = time_interleaved(calls, repeats, seen.z.device, tick)
    rows = [
        ScanRow(name, mode, t.median * 1e3, t.percentile(20) * 1e3, t.percentile(80) * 1e3,
                memory[name, mode])
        for (name, mode), t in times.items()
    ]  # fmt: skip
    d, f = seen.w0.shape
    return ScanComparison(seen.layer, seen.z.shape[1], d, f, parity, rows)
