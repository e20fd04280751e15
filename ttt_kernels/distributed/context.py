"""Context parallel: every rank holds a part of the sequence and reads with the weight it would have had.

Writes add up, so the weight at the first token of rank r is that of the sequence plus everything the
ranks before it write: `S_r = W_0 + sum_{q < r} delta_q`, `delta_q = sum_{t of q} s_t v_t z_t^T`. Forward:

    delta_r;  P_r = exclusive prefix sum of delta over the ranks;  y = scan of the part from W_0 + P_r

so that what is applied, rounded and scaled is what one process applies, row norms included. Backward, with
dS_r the gradient that the rank's own scan sends to its starting state:

    E_r = sum_{q > r} dS_q;   dv_t += s_t E_r z_t,   dz_t += s_t E_r^T v_t,   ds_n += sum_t v_t^T E_r z_t

**Overlap.** A row of W reads and writes nothing of other rows, so the state travels in slices of rows:
while one is on its way, the next is computed, and so the reads of those that have arrived.

No token crosses a boundary: targets and step sizes never look beyond their chunk, and chunks are not cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from ttt_kernels.distributed.groups import agree, check_lengths, process_group
from ttt_kernels.distributed.prefix import PrefixSums
from ttt_kernels.ops import _checks as check
from ttt_kernels.ops._implementations import requested_implementation
from ttt_kernels.ops.scan import validation
from ttt_kernels.ops.scan.registration import scan_bwd, scan_fwd
from ttt_kernels.ops.step.api import fast_weight_apply, fast_weight_update_
from ttt_kernels.types import ceil_div, compute_dtype, tiles

MAX_SLICES = 4
MIN_SLICE_ROWS = 256  # below, the products of a slice are no longer efficient


def context_parallel_scan(
    z: Tensor,
    v: Tensor,
    w0: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh,
    chunk_size: int,
    step_size: float | Tensor = 1.0,
    preserve_row_norm: bool = False,
    state: Tensor | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`fast_weight_scan` of a sequence whose parts lie on the ranks of `group`, in rank order.

        cat over ranks of y = fast_weight_scan(cat of z, cat of v, w0, ...)[0]

    Every rank of the group calls it, with the same arguments except for z, v and step_size.

    Args:
        z, v: this rank's tokens, keys [B, T_r, F] and targets [B, T_r, D]. T_r may differ between
            ranks and must be a multiple of `chunk_size`, except on the last rank that has any tokens.
        w0: slow weight [D, F], the same everywhere.
        group: a process group, or a mesh of one dimension.
        chunk_size, preserve_row_norm, impl: as in `fast_weight_scan` ("reference" is refused).
        step_size: a number, or [B, ceil(T_r / C)] for this rank's chunks.
        state: carried weight [B, D, F] before the first token of the whole sequence, the same everywhere.
        return_state: also return the state after the last complete chunk of the whole sequence.

    Returns:
        y [B, T_r, D], and the state [B, D, F], the same on every rank (None without `return_state`).

    Gradients: z, v and step_size get theirs. w0 and state get this rank's contribution: for the loss that
        is the sum of the ranks' losses, the gradient is the sum over the group, as data parallelism forms
        it. Every rank must run the backward.
    Precision: as `fast_weight_scan`: the state is summed in float32 (float64 for float64), in rank order.
        Gradients of low-precision operands are summed in float32 and rounded once more.
    Determinism: bitwise repeatable for a fixed split.
    Cost: 6 D F FLOPs per token forward and 14 D F backward instead of 4 and 10. Each rank sends and
        receives 8 B D F (R - 1) / R bytes forward and as many backward (`return_state`: 4 B D F more, in
        both). Extra memory: two float32 states until the backward, and up to four on their way.
    Limits: dense rows only. One derivative. Before anything else the ranks compare their arguments, which
        waits for the device.
    Raises:
        TypeError, ValueError, NotImplementedError: as `fast_weight_scan`; a split that cuts chunks;
            arguments that differ between ranks. On every rank, whichever caused it.

    Source: the update is additive (TTT-NTP, arXiv 2606.21803, and In-Place TTT, arXiv 2604.06169).
    """
    group = process_group(group)
    arguments, problem, facts, tokens = None, None, {}, 0
    try:
        arguments = _checked(z, v, w0, chunk_size, step_size, preserve_row_norm, state, return_state, impl)
        facts, tokens = _shared_facts(arguments), z.shape[1]
    except Exception as error:  # whatever it is, the others must hear of it
        problem = error
    check_lengths(agree(group, tokens, facts, problem), chunk_size)
    return run_scan(group, *arguments)


@dataclass(frozen=True)
class Settings:
    """What all ranks have in common."""

    lr: float
    chunk_size: int
    preserve_row_norm: bool
    return_state: bool
    impl: str


def _checked(z, v, w0, chunk_size, step_size, preserve_row_norm, state, return_state, impl) -> tuple:
    for name, tensor, layout in (("z", z, "[B, T, F]"), ("v", v, "[B, T, D]"), ("w0", w0, "[D, F]")):
        check.check_tensor(name, tensor, layout)
    z, v, w0 = check.autocast(z, v, w0)
    validation.check_operands(z, v, w0)
    check.check_positive_int("chunk_size", chunk_size)
    check.check_bool("preserve_row_norm", preserve_row_norm)
    check.check_bool("return_state", return_state)
    steps, lr = validation.check_step_size(step_size, z, chunk_size, packed=False)
    validation.check_state(state, z, w0, None)
    impl = requested_implementation(impl)
    if impl == "reference":
        raise NotImplementedError("impl='reference' does not run across ranks; use 'eager' or 'auto'")
    return (z, v, w0, steps, state), Settings(lr, chunk_size, preserve_row_norm, return_state, impl)


def _shared_facts(arguments: tuple) -> dict[str, object]:
    """What would send the ranks to different collectives, or mix their results up, if it differed."""
    tensors, settings = arguments
    z, _, w0, steps, state = tensors
    return {
        "the batch size of z": z.shape[0],
        "the shape of w0": tuple(w0.shape),
        "the dtype of z": str(z.dtype),
        "the kind of step_size": "number" if steps is None else "tensor",
        "whether state is given": state is not None,
        "which arguments require gradients": _tracked(*tensors),
        **vars(settings),
    }


def _tracked(*tensors: Tensor | None) -> tuple[bool, ...]:
    if not torch.is_grad_enabled():
        return (False,) * len(tensors)
    return tuple(t is not None and t.requires_grad for t in tensors)


def run_scan(group, tensors: tuple, settings: Settings) -> tuple[Tensor, Tensor | None]:
    """The scan of checked arguments, on which the ranks have agreed."""
    if any(_tracked(*tensors)):
        return ContextParallelScan.apply(*tensors, group, settings)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return _forward(*tensors, group, settings, save=False)[:2]


def row_slices(rows: int) -> list[slice]:
    """Rows of the state that travel together."""
    count = min(MAX_SLICES, max(1, rows // MIN_SLICE_ROWS))
    return list(tiles(rows, max(1, ceil_div(rows, count))))


def _is_last(group) -> bool:
    return dist.get_rank(group) == dist.get_world_size(group) - 1


def _forward(z, v, w0, steps, state, group, how: Settings, save: bool) -> tuple:
    """y, the final state, and what the backward needs: (starting state, carried) of every slice."""
    last, acc = _is_last(group), compute_dtype(z.dtype)
    z, steps = z.contiguous(), None if steps is None else steps.contiguous()
    slices, sums = row_slices(len(w0)), PrefixSums(group, reverse=False)
    for rows in slices:
        sums.push(_written(z, v[..., rows], steps, how, last))
    outputs, saved, final = [], [], []
    for rows, before in zip(slices, sums.results(), strict=True):
        start = w0[rows].to(acc) if state is None else state[:, rows]
        start = before + start
        y, carried = scan_fwd(
            z, v[..., rows].contiguous(), w0[rows].contiguous(), steps, how.lr, start, None,
            how.chunk_size, how.preserve_row_norm, how.return_state and last, save, how.impl,
        )  # fmt: skip
        outputs.append(y)
        final.append(carried)
        saved += [start, carried] if save else []
    total = None
    if how.return_state:
        shape = (len(z), *w0.shape)
        total = torch.cat(final, 1) if last else z.new_empty(shape, dtype=acc)
        dist.broadcast(total, group_src=dist.get_world_size(group) - 1, group=group)
    return torch.cat(outputs, -1), total, saved


def _written(z: Tensor, v: Tensor, steps: Tensor | None, how: Settings, last: bool) -> Tensor:
    """delta [B, d, F]: what this rank's complete chunks write. Nobody needs that of the last rank."""
    delta = z.new_zeros(z.shape[0], v.shape[2], z.shape[2], dtype=compute_dtype(z.dtype))
    full = 0 if last else z.shape[1] // how.chunk_size * how.chunk_size
    chunk = how.chunk_size if steps is not None else max(full, 1)
    for n, tokens in enumerate(tiles(full, chunk)):
        step = how.lr if steps is None else steps[:, n]
        fast_weight_update_(delta, z[:, tokens], v[:, tokens], step_size=step, impl=how.impl)
    return delta


class ContextParallelScan(torch.autograd.Function):
    """`_forward`, differentiable in z, v, w0, steps and state."""

    @staticmethod
    def forward(ctx, z, v, w0, steps, state, group, how):
        with torch.autocast(z.device.type, enabled=False):
            y, final, saved = _forward(z, v, w0, steps, state, group, how, save=True)
        ctx.save_for_backward(z, v, w0, steps, *saved)
        ctx.group, ctx.how, ctx.has_state = group, how, state is not None
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        z, v, w0, steps, *saved = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            if ctx.how.return_state:  # a sum of what it is on every rank, where the scan produced it
                dfinal = dfinal.contiguous().clone()
                last = dist.get_world_size(ctx.group) - 1
                dist.reduce(dfinal, group_dst=last, group=ctx.group)
            grads = _Gradients(z, v, w0, steps, ctx.how)
            dstarts = grads.run(dy, dfinal, saved, ctx.group)
        dw0 = grads.w0 if ctx.has_state else grads.w0 + dstarts.sum(0)
        return (
            grads.z.to(z.dtype),
            grads.v.to(v.dtype),
            dw0.to(w0.dtype),
            grads.steps,
            dstarts if ctx.has_state else None,
            None,
            None,
        )


class _Gradients:
    """Sums of the backward, in the compute precision."""

    def __init__(self, z: Tensor, v: Tensor, w0: Tensor, steps: Tensor | None, how: Settings) -> None:
        acc = compute_dtype(z.dtype)
        self.operands, self.how = (z.contiguous(), v, w0, steps), how
        self.z, self.v, self.w0 = (torch.zeros_like(t, dtype=acc) for t in (z, v, w0))
        self.steps = None if steps is None else torch.zeros_like(steps)

    def run(self, dy: Tensor, dfinal: Tensor | None, saved: list[Tensor], group) -> Tensor:
        """Fills the sums; this rank's gradient of the starting state [B, D, F]."""
        last = _is_last(group)
        slices, dstarts = row_slices(len(self.w0)), []
        sums = PrefixSums(group, reverse=True)
        for rows, start, carried in zip(slices, saved[::2], saved[1::2], strict=True):
            dstate = dfinal[:, rows].contiguous() if self.how.return_state and last else None
            dstarts.append(self.add_scan(rows, dy[..., rows].contiguous(), dstate, start, carried))
            sums.push(dstarts[-1])
        for rows, after in zip(slices, sums.results(), strict=True):
            if not last:
                self.add_write(rows, after)
        return torch.cat(dstarts, 1)

    def add_scan(self, rows: slice, dy, dstate, start, carried) -> Tensor:
        (z, v, w0, steps), how = self.operands, self.how
        dz, dv, dw0, dsteps, dstart = scan_bwd(
            dy, dstate, carried, z, v[..., rows].contiguous(), w0[rows].contiguous(), steps, how.lr, start,
            None, how.chunk_size, how.preserve_row_norm, dstate is not None, how.impl,
        )  # fmt: skip
        self.z += dz
        self.v[..., rows] = dv
        self.w0[rows] = dw0
        if steps is not None:
            self.steps += dsteps
        return dstart

    def add_write(self, rows: slice, after: Tensor) -> None:
        """What the writes of this rank get from the ranks after it, `after` being E [B, d, F]."""
        (z, v, _, steps), how = self.operands, self.how
        chunks = z.shape[1] // how.chunk_size
        full = slice(0, chunks * how.chunk_size)
        keys, values = z[:, full], v[:, full, rows]
        step: Tensor | float = how.lr
        if steps is not None:
            step = steps[:, :chunks].repeat_interleave(how.chunk_size, 1)[..., None]
            keys = keys.to(steps.dtype)  # their gradient is a sum with cancellation: not rounded before
        read = fast_weight_apply(keys, after, impl=how.impl)
        self.v[:, full, rows] += step * read
        self.z[:, full] += step * fast_weight_apply(values, after.mT, impl=how.impl)
        if steps is not None:
            self.steps[:, :chunks] += (values * read).unflatten(1, (chunks, how.chunk_size)).sum((2, 3))
