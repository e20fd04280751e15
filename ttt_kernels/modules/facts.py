"""What one call's batch looks like, and how a layer's attention hands that to its MLP.

A decoder layer calls `mlp(x)` with nothing else. Whoever runs just before it in the same layer (a
pre-hook of the attention, alive inside a checkpointed recompute too) leaves the facts here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ttt_kernels.modules.layer_state import LayerState


@dataclass(frozen=True, eq=False)
class BatchFacts:
    """Where the sequences of a batch [B, T] lie. Without any field: B dense rows.

    Args:
        valid: bool [B, T], False at padding, which may lie anywhere in a row.
        cu_seqlens: int32 or int64 [S + 1], boundaries of S packed sequences in the B * T tokens of
            the flattened batch; each starts from the slow weight. Not together with `valid`.
        embeddings: token embeddings [B, T, D], for `target_source="input_embed"`.
        lengths: real tokens of each row, with `valid`, where the host knows them already.
        state: what this layer carries from call to call, moved on by this one. Not together with
            `cu_seqlens`. None: every sequence starts from the slow weight and nothing is kept.
        disabled: compute the plain MLP; nothing is read or written.
        observe: with `disabled`, called with the MLP, its input x, its keys z and its output y, with bias
            and hooks.
    """

    valid: Tensor | None = None
    cu_seqlens: Tensor | None = None
    embeddings: Tensor | None = None
    lengths: Sequence[int] | None = None
    state: LayerState | None = None
    disabled: bool = False
    observe: Callable[[nn.Module, Tensor, Tensor, Tensor], None] | None = None


@dataclass(frozen=True, eq=False)
class RowOrder:
    """Moves the real tokens of every padded row to its front, and back; no host synchronisation.

    A token then counts its chunk from its row's first real token, and padding comes last, where it
    can only write after everything has been read.
    """

    order: Tensor
    inverse: Tensor
    valid: Tensor

    @classmethod
    def of(cls, valid: Tensor) -> RowOrder:
        order = torch.argsort(valid.logical_not().to(torch.uint8), dim=1, stable=True)
        return cls(order, torch.argsort(order, dim=1), valid)

    def front(self, x: Tensor) -> Tensor:
        """[B, T, N] with the real tokens first and zeros for padding."""
        x = x.masked_fill(self.valid.logical_not()[..., None], 0)
        return x.gather(1, self.order[..., None].expand(x.shape))

    def back(self, y: Tensor) -> Tensor:
        """The inverse; zeros at padding."""
        y = y.gather(1, self.inverse[..., None].expand(y.shape))
        return y.masked_fill(self.valid.logical_not()[..., None], 0)


_LOCAL = threading.local()


def hand_over(mlp: nn.Module, facts: BatchFacts | None) -> None:
    """Leave `facts` for the next call of `mlp`: per thread, but not where dynamo traces."""
    if torch.compiler.is_compiling():
        mlp._facts = facts
    else:
        _LOCAL.slot = (mlp, facts)


def drop_hand_over(*_: object) -> None:
    """Forget what this thread left and nobody took: a call that failed inside a layer."""
    if not torch.compiler.is_compiling():
        _LOCAL.slot = (None, None)


def take_over(mlp: nn.Module) -> BatchFacts | None:
    """What was left for this call of `mlp`, once."""
    if torch.compiler.is_compiling():
        facts, mlp._facts = mlp._facts, None
        return facts
    owner, facts = getattr(_LOCAL, "slot", (None, None))
    if owner is not mlp:
        return None
    _LOCAL.slot = (None, None)
    return facts
