"""Tensor parallel: every rank holds some columns of the fast weight, and the keys that belong to them.

    z = [z_1 .. z_R],  W = [W_1 .. W_R]        (split along F; v, step sizes and y are whole on every rank)
    y_t = R( sum_r W_r z_{r,t} ),   W_r <- W_r + s sum_t v_t z_{r,t}^T

so a rank writes its own columns and tells nobody. What needs whole rows does not need the weight: step
sizes come from `Kz = sum_r Z_r Z_r^T` (C x C per chunk) and row norms follow from it and from what is summed
anyway. With `raw_t = W_n z_t` the sum that a row-parallel layer forms,

    ||W_{n+1}[d]||^2 = ||W_n[d]||^2 + sum_{t in n} s v_t[d] (2 raw_t[d] + s (Kz V)_t[d]),

started from the summed `||w0[d]||^2`, and preservation scales raw by `||w0|| / max(||W_n||, 1e-5)`.

Gradients: DTensor placements say what is whole and what is a partial sum. v and the step sizes are whole
where step sizes and norms are computed, and their gradients from each rank's scan are partial sums.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, parallelize_module

from ttt_kernels.modules.mlp import FastWeightLinear, FastWeightMLP, read_and_write
from ttt_kernels.modules.rule import WriteRule
from ttt_kernels.ops import _checks as check
from ttt_kernels.ops.scan.api import fast_weight_scan
from ttt_kernels.ops.step_size.gram_rules import Clipped, Spectral
from ttt_kernels.types import NORM_FLOOR, ceil_div, compute_dtype, sequence_spans

POWER_ITERATIONS = 5  # what `spectral_step_size` does by default


class FastWeightParallel(ParallelStyle):
    """Parallel style of a `FastWeightMLP`: gate and up column-wise, down row-wise, the fast weight with it.

        plan = {"model.layers.0.mlp": FastWeightParallel(), ...}      # or tensor_parallel_plan(model)
        parallelize_module(model, mesh["tp"], plan)

    The MLP takes whole x [B, T, D] and returns whole y, as one under `ColwiseParallel` and `RowwiseParallel`
    with their defaults. gate, up and down weights become DTensors; `ttt_proj`, `ttt_conv` and the bias of
    down_proj stay whole, and their gradients are whole on every rank. Dense, padded and packed batches,
    all step sizes, both targets and row-norm preservation work as in one process.

    Precision: as `fast_weight_scan` on each rank's columns; partial sums of y are rounded to its dtype before
        they are added. Norms and Gram matrices in float32 (float64 for float64).
    Determinism: that of the collectives.
    Cost: that of the layer divided by the ranks; the target and Kv on every rank. Step size rules and row
        norms hold Gram matrices of all chunks, C float32 numbers per token each, until the backward; row
        norms take 2 C (F / R + D) FLOPs per token. What is communicated: `docs/parallel.md`.
    Limits: no caches (a call with one raises: use_cache=False), no adapters on down_proj, no unpatching
        afterwards.
    Raises:
        TypeError, ValueError: the module is no `FastWeightMLP`, is distributed already, or has an adapter;
            its weights are split in another way; the mesh has more than one dimension.

    Source: Megatron-style column and row parallelism (arXiv 1909.08053) of TTT-NTP (arXiv 2606.21803).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, FastWeightMLP):
            raise TypeError(f"module must be a FastWeightMLP, got {type(module).__name__}")
        if module.read_write is not read_and_write:
            raise ValueError("module must not be distributed already, got one that is")
        if type(module.down_proj) is not FastWeightLinear:
            raise TypeError(
                "down_proj must be free of adapters to be split over its columns, got "
                f"{type(module.down_proj).__name__}: merge the adapter first"
            )
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh must have one dimension, got {device_mesh.ndim}")
        split = _take_over if isinstance(module.down_proj.weight, DTensor) else self._split
        split(module, device_mesh)
        module.read_write = _ReadWriteColumns(device_mesh)
        return module

    def _split(self, module: FastWeightMLP, mesh: DeviceMesh) -> None:
        style, down = ColwiseParallel(), module.down_proj
        parallelize_module(module, mesh, {"gate_proj": style, "up_proj": style})
        weight = distribute_tensor(down.weight, mesh, [Shard(1)], src_data_rank=self.src_data_rank)
        down.weight = nn.Parameter(weight, requires_grad=down.weight.requires_grad)


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The entries of a `parallelize_module` plan for the fast-weight MLPs of `model`, by module name.

    The rest of the model is the caller's: add entries for attention and the other MLPs, or none. A model that
    `ttt_kernels.from_pretrained(path, tp_plan="auto")` has split needs no others.

    Raises:
        ValueError: the model has none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, FastWeightMLP)]
    if not names:
        raise ValueError(f"model must have been patched by patch_model, got a {type(model).__name__}")
    return {name: FastWeightParallel() for name in names}


def _take_over(module: FastWeightMLP, mesh: DeviceMesh) -> None:
    """Of a model that transformers split while it loaded it: gate and up stay, down is called as ours."""
    down, places = module.down_proj, {"gate_proj": Shard(0), "up_proj": Shard(0), "down_proj": Shard(1)}
    for name, place in places.items():
        weight = getattr(module, name).weight
        same = isinstance(weight, DTensor) and torch.equal(weight.device_mesh.mesh, mesh.mesh)
        if not same or weight.placements != (place,):
            raise ValueError(
                f"{name}.weight must be whole, or split along F over device_mesh like the others, got "
                f"{getattr(weight, 'placements', 'a whole one')}"
            )
    down.__dict__.pop("forward", None)  # what made it a row-parallel layer, version by version
    down._forward_pre_hooks.clear()
    down._forward_hooks.clear()
    if isinstance(down.bias, DTensor):  # the others are whole without one
        down.bias = nn.Parameter(down.bias.detach().to_local(), requires_grad=down.bias.requires_grad)


class _ReadWriteColumns:
    """In place of `read_and_write`: z of this rank's columns, v whole, w0 a DTensor split along F."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(
        self, z: Tensor, v: Tensor, w0: DTensor, *, rule: WriteRule, cu_seqlens: Tensor | None
    ) -> Tensor:
        z, v, w0 = check.autocast(z, v, w0.to_local())
        with torch.autocast(z.device.type, enabled=False):
            chunks = _Chunks(z, rule.chunk_size, cu_seqlens)
            kz = None
            if rule.inner_optimizer != "sgd" or rule.preserve_row_norm:
                kz = self.summed(chunks.gram(z))
            steps = _step_sizes(rule, kz, v, chunks)
            partial_steps = self.shared(steps) if isinstance(steps, Tensor) else steps
            y, _ = fast_weight_scan(
                z, self.shared(v), w0, chunk_size=rule.chunk_size, step_size=partial_steps,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
            y = self.summed(y)
            if rule.preserve_row_norm:
                norm = self.summed(w0.to(chunks.acc).square().sum(-1))
                y = _preserve_row_norms(y, v, kz, steps, norm, chunks)
            return y

    def plain(self, z: Tensor, v: None, w0: DTensor) -> Tensor:
        """The layer while its fast weight is disabled."""
        return self.summed(nn.functional.linear(z, w0.to_local()))

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks; its gradient is whole already."""
        split = DTensor.from_local(x, self.mesh, [Partial()], run_check=False)
        return split.redistribute(placements=[Replicate()]).to_local()

    def shared(self, x: Tensor) -> Tensor:
        """x, which is the same on all ranks, for uses whose gradients are to be summed over them."""
        whole = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])


class _Chunks:
    """The complete chunks of a batch, sequence after sequence, as one list of N."""

    def __init__(self, z: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> None:
        self.size, self.packed, self.acc = chunk_size, cu_seqlens is not None, compute_dtype(z.dtype)
        self.spans = sequence_spans(z.shape[0], z.shape[1], chunk_size, cu_seqlens)
        self.counts = [span.complete(chunk_size) for span in self.spans]

    def cut(self, x: Tensor) -> Tensor:
        """[N, C, n] of x [B, T, n], in the compute precision."""
        parts = [x.new_empty(0, self.size, x.shape[2])]
        for span, count in zip(self.spans, self.counts, strict=True):
            tokens = slice(span.start, span.start + count * self.size)
            parts.append(x[span.row, tokens].unflatten(0, (count, self.size)))
        return torch.cat(parts).to(self.acc)

    def gram(self, x: Tensor) -> Tensor:
        """[N, C, C]."""
        part = self.cut(x)
        return part @ part.mT

    def per_sequence(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of [N, ...], what belongs to each sequence."""
        return x.split(self.counts)

    def join(self, parts: list[Tensor]) -> Tensor:
        """One part per sequence, along the tokens or chunks of a batch."""
        return torch.cat(parts)[None] if self.packed else torch.stack(parts)


def _step_sizes(rule: WriteRule, kz: Tensor, v: Tensor, chunks: _Chunks) -> Tensor | float:
    """As `spectral_step_size` and `clipped_step_size`, from the Gram matrices of all columns."""
    if rule.inner_optimizer == "sgd":
        return rule.lr
    spectral = rule.inner_optimizer == "specnorm"
    values = chunks.cut(v)
    compute = Spectral(rule.lr, POWER_ITERATIONS) if spectral else Clipped(rule.lr, rule.max_norm)
    steps = compute(kz, values @ values.mT, values.mean(-1))
    parts = []
    for span, own in zip(chunks.spans, chunks.per_sequence(steps), strict=True):
        unwritten = ceil_div(span.stop - span.start, chunks.size) - len(own)
        parts.append(nn.functional.pad(own, (0, unwritten)))
    return chunks.join(parts)


def _preserve_row_norms(
    raw: Tensor, v: Tensor, kz: Tensor, steps: Tensor | float, norm: Tensor, chunks: _Chunks
) -> Tensor:
    """raw [B, T, D] scaled to the row norms of w0, `norm` [D] being their squares."""
    values, read = chunks.cut(v), chunks.cut(raw)
    scaled = values * (_per_chunk(steps, chunks) if isinstance(steps, Tensor) else steps)
    growth = (scaled * (2 * read + kz @ scaled)).sum(1)
    positive = norm > 0  # a row of zeros stays one, and has no direction
    target = torch.where(positive, norm, 1)
    parts = []
    for span, own in zip(chunks.spans, chunks.per_sequence(growth), strict=True):
        norms = torch.cat([norm[None], norm + own.cumsum(0)])
        ratio = (target / norms.clamp_min(NORM_FLOOR**2)).sqrt().where(positive, 0)
        tokens = span.stop - span.start
        ratio = ratio.repeat_interleave(chunks.size, 0)[:tokens]
        parts.append((raw[span.row, span.start : span.stop] * ratio).to(raw.dtype))
    return chunks.join(parts)


def _per_chunk(steps: Tensor, chunks: _Chunks) -> Tensor:
    """The step sizes of the complete chunks, [N, 1, 1]."""
    parts = [
        steps[span.step_row, span.step_offset : span.step_offset + count]
        for span, count in zip(chunks.spans, chunks.counts, strict=True)
    ]
    return torch.cat(parts)[:, None, None]
