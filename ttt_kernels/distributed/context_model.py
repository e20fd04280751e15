"""A patched model of which every rank runs a part of the sequence."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ttt_kernels.distributed.context import Settings, run_scan
from ttt_kernels.distributed.groups import agree, check_lengths, process_group
from ttt_kernels.modules.facts import BatchFacts
from ttt_kernels.modules.mlp import read_and_write, step_sizes
from ttt_kernels.modules.rule import WriteRule
from ttt_kernels.ops import _checks as check
from ttt_kernels.patch.hooks import KWARG, ModelHook, model_hook


def context_parallel(model: nn.Module, group: dist.ProcessGroup | DeviceMesh) -> Handle:
    """Let the fast weights of a patched model run across the ranks of `group`.

        handle = context_parallel(model, mesh["cp"])
        logits = model(ids[:, mine], position_ids=positions[:, mine], use_cache=False).logits

    Every rank then calls the model with its part of the sequence, in rank order; parts may differ in
    length but must not cut a chunk. Each layer's fast weights read and write as if one process had read
    the whole. Attention across ranks is somebody else's: `torch.distributed.tensor.experimental.
    context_parallel` with its load balancer off (which would reorder tokens), Ulysses, or any other that
    keeps the order of the tokens. The loss needs no token of another rank either, as long as each rank is
    given the labels of its tokens.

    Args:
        model: a model that `patch_model` has patched, on every rank with the same parameters.
        group: a process group, or a mesh of one dimension.

    Returns:
        A handle: `remove()` makes it a model of one process again. A deepcopy of the model made while it
        is in force runs across the ranks too, and has no handle: copy before, or after `remove()`.

    Gradients: parameters get this rank's contribution; the sum over the group is the gradient, as data
        parallelism over the same ranks forms it.
    Limits: no caches, padding, packed rows, closed-form writes, torch.compile or ranks without tokens:
        refused when called, on all ranks, as is any other argument that is wrong on one of them.
        `disabled` works, on all ranks at once.
    Raises:
        TypeError, ValueError: not a patched model, or one that is distributed already.
    """
    group, hook = process_group(group), model_hook(model)
    taken = [i for i, mlp in hook.mlps.items() if mlp.read_write is not read_and_write]
    if taken:
        raise ValueError(f"model must not be distributed already, got layers {taken} that are")
    return Handle(hook, group)


class Handle:
    """What `context_parallel` does to a model; `remove` undoes it, once."""

    def __init__(self, hook: ModelHook, group: dist.ProcessGroup) -> None:
        self.hook, self.scan = hook, _ReadWriteAcrossRanks(group)
        hook.agreement = self.agreement = _AgreeOnBatch(group)
        for mlp in hook.mlps.values():
            mlp.read_write = self.scan

    def remove(self) -> None:
        """Afterwards it does nothing, whatever else has been installed since."""
        if self.hook.agreement is self.agreement:
            self.hook.agreement = None
        for mlp in self.hook.mlps.values():
            if mlp.read_write is self.scan:
                mlp.read_write = read_and_write


class _OfGroup:
    """Holds a process group, which is of this process: copies of a model share it, files cannot."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict) -> _OfGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model that runs across ranks cannot be pickled: remove() its handle first")


class _ReadWriteAcrossRanks(_OfGroup):
    """In place of `read_and_write`; what could go wrong on one rank alone was refused by the hook."""

    def __call__(
        self, z: Tensor, v: Tensor, w0: Tensor, *, rule: WriteRule, cu_seqlens: Tensor | None
    ) -> Tensor:
        z, v, w0 = check.autocast(z, v, w0)
        steps, lr = step_sizes(rule, z, v, cu_seqlens), 1.0
        if not isinstance(steps, Tensor):
            steps, lr = None, steps
        settings = Settings(lr, rule.chunk_size, rule.preserve_row_norm, False, "auto")
        return run_scan(self.group, (z, v, w0, steps, None), settings)[0]


class _AgreeOnBatch(_OfGroup):
    """`ModelHook.agreement`, around the reading of the batch: one agreement for all layers."""

    def __call__(
        self, hook: ModelHook, decoder: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        problem, facts, tokens, disabled = None, {}, 0, False
        try:
            args, kwargs = hook.read(decoder, args, kwargs)
            self.check(kwargs[KWARG], kwargs)
            (batch, tokens), disabled = _shape(kwargs), kwargs[KWARG].disabled
            facts = {
                "the batch size": batch,
                "whether fast weights are disabled": disabled,
                "training mode": decoder.training,
                "whether gradients are on": torch.is_grad_enabled(),
            }
        except Exception as error:  # whatever it is, the others must hear of it
            problem = error
        lengths = agree(self.group, tokens, facts, problem)
        if 0 in lengths:
            raise ValueError(
                f"every rank must hold tokens of the sequence, got {lengths}: use fewer ranks"
            )
        if not disabled:
            check_lengths(lengths, next(iter(hook.mlps.values())).rule.chunk_size)
        return args, {**kwargs, "use_cache": False}

    @staticmethod
    def check(batch: BatchFacts, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            raise NotImplementedError("a model whose fast weights run across ranks cannot be compiled")
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise NotImplementedError(
                "a model whose fast weights run across ranks cannot stream: its ranks hold different "
                "tokens of one request. Call it without a cache (use_cache=False)"
            )
        if batch.observe is not None:
            raise NotImplementedError(
                "the closed-form write sees the tokens of one rank only: remove() the handle of "
                "context_parallel first"
            )
        if batch.valid is not None or batch.cu_seqlens is not None:
            what = "padding in attention_mask" if batch.valid is not None else "packed sequences"
            raise NotImplementedError(
                f"chunks are counted from the first token of the whole sequence, got {what}: give every "
                "rank dense rows"
            )


def _shape(kwargs: dict) -> tuple[int, int]:
    ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if (ids is None) == (embeddings is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    return tuple((ids if embeddings is None else embeddings).shape[:2])
