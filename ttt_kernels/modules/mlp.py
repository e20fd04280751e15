"""`FastWeightMLP`: a gated MLP whose down-projection is read and written while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn

from ttt_kernels.modules.adapter import with_adapter
from ttt_kernels.modules.facts import BatchFacts, RowOrder, take_over
from ttt_kernels.modules.layer_state import LayerSignature, LayerState
from ttt_kernels.modules.rule import CONV_TAPS, WriteRule
from ttt_kernels.modules.sharding import is_fsdp_module, is_sharded
from ttt_kernels.modules.streaming import stream
from ttt_kernels.ops.scan.api import fast_weight_scan
from ttt_kernels.ops.step_size.api import clipped_step_size, spectral_step_size
from ttt_kernels.ops.target.api import conv_target, next_token_target
from ttt_kernels.types import FLOAT_DTYPES

SAMPLE = 8  # rows and columns of W0 that tell one model's slow weights from another's
PLAIN = object()  # in place of a scan: the slow layer as it was, bias and all


class FastWeightLinear(nn.Linear):
    """The slow weight W0 [D, F], called as a module so that wrappers and sharding hooks see it.

    It shares everything with the `nn.Linear` it is taken from, the parameter objects included.
    """

    @classmethod
    def take(cls, linear: nn.Linear) -> FastWeightLinear:
        new = cls.__new__(cls)
        new.__dict__ = linear.__dict__
        return new

    def forward(self, z: Tensor, v: Tensor | None = None, scan: object = None) -> Tensor:
        """z [B, T, F], v [B, T, D] -> y [B, T, D], bias added. `scan`: (z, v, W0) -> y, or PLAIN."""
        if scan is None:
            raise RuntimeError(
                "the fast-weight down_proj was called without its MLP: the forward of "
                "FastWeightMLP has been replaced, and its fast weights would be off silently. "
                "Apply the other patch before ttt_kernels, or leave these layers out of it"
            )
        if scan is PLAIN:
            return super().forward(z)
        _refuse_quantised(self.weight)
        y = scan(z, v, self.weight)
        return y if self.bias is None else y + self.bias


class TargetWeight(nn.Module):
    """A parameter of the value target, used only inside its own call (see `FastWeightLinear`).

    Deliberately not an `nn.Linear` or `nn.Conv1d`: quantisers and adapters would take it for one,
    and P is applied as stored, `x @ weight`.
    """

    def __init__(self, *shape: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, device=like.device, dtype=like.dtype))

    def forward(self, u: Tensor, use: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return use(u, self.weight)

    def extra_repr(self) -> str:
        return "x".join(map(str, self.weight.shape))


class FastWeightMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` with a down-projection that is written chunk by chunk.

        z = act(gate_proj(x)) * up_proj(x)
        v = target(u)                            u = x or the token embeddings
        y = fast_weight_scan(z, v, down_proj.weight, step_size=s) + down_proj.bias

    Equivalent to the plain MLP while `ttt_proj` (or `ttt_conv`) is zero, as it is here at first:
    initialise it before use. The module keeps nothing between calls: a call starts from the slow
    weight, or from the `LayerState` that its facts bring and that it moves on.

    Args:
        mlp: a module with `gate_proj`, `up_proj`, `down_proj` (plain `nn.Linear`, or an adapter
            with such a `base_layer`) and, unless `activation` is given, `act_fn`. It is not
            modified, except that an adapter's `base_layer` becomes a `FastWeightLinear`; the new
            module holds the same parameter objects.
        rule: how it writes.
        activation: in place of `mlp.act_fn`.

    Attributes:
        gate_proj, up_proj, down_proj: the slow weights.
        ttt_proj: P, with `.weight` [D, D] in the dtype of W0; None without `rule.use_proj`.
        ttt_conv: with `.weight` [D, 1, 5], for `rule.target == "conv"` only.
        layer_index: of the decoder layer it is in; None outside a model.
        read_write: what a call without a state does with z, v and W0: `read_and_write`, or what
            `ttt_kernels.distributed` puts in its place where the work is split over processes. That
            may have a method `plain`, (z, v, W0) -> y, for a disabled call.

    Precision: as the ops declare it; operands in the dtype of x.
    Cost: as `fast_weight_scan`, plus 2 D^2 FLOPs per token for P.
    Raises:
        TypeError: a part is missing, or down_proj holds no plain [D, F] weight (quantised).
        RuntimeError: down_proj.forward is already replaced on the instance.

    Source: TTT-NTP (arXiv 2606.21803), In-Place TTT (arXiv 2604.06169).
    """

    def __init__(
        self, mlp: nn.Module, rule: WriteRule, activation: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        linear = slow_linear(mlp)
        if not isinstance(rule, WriteRule):
            raise TypeError(f"rule must be a WriteRule, got {type(rule).__name__}")
        self.rule = rule
        self.hidden_size, self.intermediate_size = linear.weight.shape
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn if activation is None else activation
        replace_slow_linear(self, FastWeightLinear.take(linear))
        d, w0 = self.hidden_size, linear.weight
        self.ttt_proj = TargetWeight(d, d, like=w0).train(mlp.training) if rule.use_proj else None
        if rule.target == "conv":
            self.ttt_conv = TargetWeight(d, 1, CONV_TAPS, like=w0).train(mlp.training)
        self.training = mlp.training
        self.layer_index: int | None = None
        self.read_write = read_and_write
        self._facts: BatchFacts | None = None

    def forward(self, x: Tensor, facts: BatchFacts | None = None) -> Tensor:
        """x [B, T, D] -> y [B, T, D]; `facts` default to those handed over for this call.

        Padding (`facts.valid` False) reads and writes nothing, and y is 0 there.
        """
        handed = take_over(self)
        facts = facts or handed or BatchFacts()
        if facts.disabled:
            z = self._keys(x)
            if facts.observe is not None:
                self._require_whole("be written in closed form")
            y = self.down_proj(z, scan=getattr(self.read_write, "plain", PLAIN))
            if facts.observe is not None:
                facts.observe(self, x, z, y)
            return y
        u = self._source(x, facts)
        if facts.valid is not None:
            rows = RowOrder.of(facts.valid)
            lengths = facts.lengths
            if facts.state is not None and lengths is None:
                lengths = facts.valid.sum(1).tolist()
            y = self._run(rows.front(x), None if u is x else rows.front(u), facts.state, lengths)
            return rows.back(y)
        if facts.cu_seqlens is not None:
            if facts.state is not None:
                raise ValueError("facts must not bring cu_seqlens and a state: packed rows have none")
            flat = (1, x.shape[0] * x.shape[1], x.shape[2])
            u = None if u is x else u.reshape(flat)
            return self._scan(x.reshape(flat), u, facts.cu_seqlens).view(x.shape)
        return self._run(x, u, facts.state, None)

    @property
    def slow_weight(self) -> Tensor:
        """W0 [D, F], without what an adapter adds to it."""
        return getattr(self.down_proj, "base_layer", self.down_proj).weight

    def signature(self) -> LayerSignature:
        """What a state of this layer must match."""
        self._require_whole("stream: call without a cache (use_cache=False)")
        w0 = self.slow_weight.detach()
        _refuse_quantised(w0)
        rule = WriteRule(**{f.name: getattr(self.rule, f.name) for f in fields(WriteRule)})
        sample = torch.empty(0)
        if not (w0.is_meta or is_sharded(w0)):  # offloaded or sharded: not at hand between calls
            rows, columns = (max(1, n // SAMPLE) for n in w0.shape)
            sample = w0[::rows, ::columns][:SAMPLE, :SAMPLE].flatten().float().cpu()
        return LayerSignature(rule, tuple(w0.shape), sample)

    def _require_whole(self, what: str) -> None:
        """A write is refused or done as a whole, and a request's weight lies in one place."""
        if self.read_write is not read_and_write:
            raise NotImplementedError(
                f"a fast weight whose work is split over processes cannot {what}"
            )

    def _source(self, x: Tensor, facts: BatchFacts) -> Tensor:
        if self.rule.target_source == "hidden_states":
            return x
        if facts.embeddings is None:
            raise RuntimeError(
                'target_source="input_embed" needs the token embeddings of this call '
                "(BatchFacts.embeddings), got none: call the MLP through its patched model"
            )
        return facts.embeddings

    def _keys(self, x: Tensor) -> Tensor:
        z = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if z.shape[-1] != self.intermediate_size and self.read_write is read_and_write:
            raise RuntimeError(
                f"the keys must have all {self.intermediate_size} columns, got {z.shape[-1]}: "
                "gate_proj and up_proj are split over processes, and step sizes and row norms of some "
                "columns would be wrong silently. Use parallelize_module(model, mesh, "
                "ttt_kernels.distributed.tensor_parallel_plan(model))"
            )
        return z

    def _run(self, x: Tensor, u: Tensor, state: LayerState | None, lengths) -> Tensor:
        """Rows with their real tokens in front."""
        if state is None:
            return self._scan(x, u, None)
        self._require_whole("stream: call without a cache (use_cache=False)")
        parts = (self.ttt_proj, getattr(self, "ttt_conv", None))
        if any(is_fsdp_module(part) for part in parts):
            raise NotImplementedError(
                "ttt_proj and ttt_conv must not be sharded by themselves in a model that streams: they "
                "are called where a chunk completes, which the other processes need not do at the same "
                "time. Shard their MLP or decoder layer instead, or call without a cache "
                "(use_cache=False)"
            )
        shape = (self.hidden_size, self.intermediate_size)
        if state.signature.shape != shape:
            raise ValueError(
                f"facts.state must be of a layer [D, F] = {shape}, got {state.signature.shape}"
            )

        def scan(z: Tensor, u: Tensor, w0: Tensor) -> Tensor:
            leaves = (z, u, w0, *(part.weight for part in parts if part is not None))
            tracked = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
            return stream(
                state, z, u, w0, lengths=lengths, terms=self._terms, tracked=tracked
            )

        return self._down(self._keys(x), x if u is None else u, scan)

    def _scan(self, x: Tensor, u: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        z, v = self._keys(x), self._target(x if u is None else u, cu_seqlens)
        scan = partial(self.read_write, rule=self.rule, cu_seqlens=cu_seqlens)
        return self._down(z, v, scan)

    def _down(self, z: Tensor, v: Tensor, scan: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        scan = with_adapter(scan, self.down_proj, self.rule.preserve_row_norm)
        return self.down_proj(z, v, scan=scan)

    def _terms(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor | float]:
        """What the tokens write, and the step size of every chunk."""
        v = self._target(u, None)
        return v, step_sizes(self.rule, z, v, None)

    def _target(self, u: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        chunks = {"chunk_size": self.rule.chunk_size, "cu_seqlens": cu_seqlens}

        def target(u: Tensor, proj: Tensor | None) -> Tensor:
            if self.rule.target == "next_token":
                return next_token_target(u, proj, horizon=self.rule.horizon, **chunks)
            return self.ttt_conv(u, lambda u, conv: conv_target(u, conv, proj, **chunks))

        return target(u, None) if self.ttt_proj is None else self.ttt_proj(u, target)

    def extra_repr(self) -> str:
        return f"rule={self.rule}"


def step_sizes(
    rule: WriteRule, z: Tensor, v: Tensor, cu_seqlens: Tensor | None
) -> Tensor | float:
    """The step size of every chunk under `rule`: a number, or [B, NC]."""
    chunks = {"chunk_size": rule.chunk_size, "cu_seqlens": cu_seqlens}
    if rule.inner_optimizer == "specnorm":
        return spectral_step_size(z, v, lr=rule.lr, **chunks)
    if rule.inner_optimizer == "clip":
        return clipped_step_size(z, v, lr=rule.lr, max_norm=rule.max_norm, **chunks)
    return rule.lr


def read_and_write(
    z: Tensor, v: Tensor, w0: Tensor, *, rule: WriteRule, cu_seqlens: Tensor | None
) -> Tensor:
    """y of sequences that start from the slow weight and leave no state."""
    y, _ = fast_weight_scan(
        z, v, w0, chunk_size=rule.chunk_size, step_size=step_sizes(rule, z, v, cu_seqlens),
        preserve_row_norm=rule.preserve_row_norm, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return y


def slow_linear(mlp: nn.Module) -> nn.Linear:
    """The plain `nn.Linear` that holds W0, checked; inside an adapter it is the `base_layer`."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        if not isinstance(getattr(mlp, name, None), nn.Module):
            raise TypeError(f"mlp must have a module {name}, got {type(mlp).__name__} without it")
    linear = getattr(mlp.down_proj, "base_layer", mlp.down_proj)
    if is_sharded(getattr(linear, "weight", None)):
        raise RuntimeError(
            "down_proj.weight must be whole, got a DTensor: patch the model before fully_shard or tensor "
            "parallelism, which then take the added weights too"
        )
    if type(linear) is not nn.Linear:
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        raise TypeError(
            f"down_proj must be a plain torch.nn.Linear (adapters around one are fine, quantised "
            f"layers are not), got {kind}"
        )
    if linear.weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"down_proj.weight must be floating point, got {linear.weight.dtype}")
    _refuse_quantised(linear.weight)
    if "forward" in linear.__dict__:
        raise RuntimeError(
            "down_proj.forward is already replaced on the instance (tensor parallelism or "
            "offloading hooks): patch the model before they are installed"
        )
    return linear


def _refuse_quantised(weight: Tensor) -> None:
    """Some quantisers keep `nn.Linear` and the dtype, and put a wrapper of tensors in the weight's place."""
    if hasattr(weight, "__tensor_flatten__") and not is_sharded(weight):
        raise TypeError(
            "down_proj.weight must be a plain tensor, not a wrapper around others (quantised), got "
            f"{type(weight).__module__}.{type(weight).__qualname__}"
        )


def replace_slow_linear(mlp: nn.Module, linear: nn.Linear) -> None:
    """Put `linear` where `slow_linear` found its own: `mlp.down_proj`, or inside its adapter."""
    if hasattr(mlp.down_proj, "base_layer"):
        mlp.down_proj.base_layer = linear
    else:
        mlp.down_proj = linear
