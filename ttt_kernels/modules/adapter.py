"""A low-rank adapter (PEFT's LoRA) around `down_proj`: the fast weight is that of W0 + BA.

LoRA returns `base_layer(z) + B A z`. With the fast weight in the base layer that is `(W0 + BA + S) z`, what
the merged weight gives, as long as reading is linear in the weight. Row-norm preservation is not: there the
base layer reads with `W0 + BA` and leaves out what the adapter is about to add,

    base_layer(z) = R(W0 + BA + S) z - B A z.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from ttt_kernels.modules.sharding import is_sharded

Scan = Callable[[Tensor, Tensor, Tensor], Tensor]


def with_adapter(scan: Scan, down_proj: nn.Module, preserve_row_norm: bool) -> Scan:
    """`scan` (z, v, W0) -> y, as the base layer of `down_proj` must run it.

    Cost: nothing without an adapter or without row-norm preservation; else BA [D, F] is formed in every call,
    2 D F r FLOPs, which decoding feels: merge the adapter before.

    Raises:
        NotImplementedError: the merged weight would give something else (see `_added_weight`).
    """
    added = _added_weight(down_proj, preserve_row_norm)
    if added is None:
        return scan

    def adapted(z: Tensor, v: Tensor, w0: Tensor) -> Tensor:
        return scan(z, v, w0 + added.to(w0.dtype)) - functional.linear(z, added.to(z.dtype))

    return adapted


def _added_weight(down_proj: nn.Module, preserve_row_norm: bool) -> Tensor | None:
    """BA [D, F] of the active adapters where the base layer must know it, differentiable; else None.

    Raises:
        NotImplementedError: an active adapter is no plain LoRA: many scale what the base layer is given or
            returns, and the fast weight with it (IA3, BOFT, OFT, HRA, DoRA); or, with row-norm preservation,
            it differs between the rows of the batch, or its parts are sharded by themselves.
    """
    active = getattr(down_proj, "active_adapters", ())
    if not active or down_proj.disable_adapters or down_proj.merged:
        return None
    known = getattr(down_proj, "lora_A", None)
    variants = getattr(down_proj, "lora_variant", {})
    for name in active:
        if known is None or name in variants:
            got = type(down_proj).__module__ if known is None else variants[name]
            raise NotImplementedError(
                f"the adapter {name!r} on down_proj must be a plain LoRA, got {got}: others may change "
                "what the base layer is given or returns, the fast weight included. Merge it, or leave "
                "down_proj out"
            )
    if not preserve_row_norm:
        return None
    hooks = down_proj._forward_pre_hooks.values()
    if any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks):
        raise NotImplementedError(
            "row-norm preservation needs the weight that the adapter on down_proj adds, which is known for "
            "LoRA without adapter_names only: merge it, or leave down_proj out"
        )
    added = [down_proj.get_delta_weight(name) for name in active if name in known]
    if any(is_sharded(weight) for weight in added):
        raise NotImplementedError(
            "row-norm preservation needs the weight that the adapter on down_proj adds, but its parts are "
            "sharded by themselves: shard the MLP or the decoder layer instead"
        )
    return sum(added[1:], added[0]) if added else None
