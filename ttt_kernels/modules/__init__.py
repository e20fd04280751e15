"""Neural-network modules made of the ops. They know torch, and no model library.

`rule.WriteRule` says how a layer writes, `facts.BatchFacts` what one call's batch looks like, and
`mlp.FastWeightMLP` is the gated MLP whose down-projection is a fast weight. `state.FastWeightState` is
what a batch of requests carries from call to call (`layer_state` in one layer, `state_io` in files),
`streaming` one call with it, on rows that `row_store` finds, reads and writes.
"""

from ttt_kernels.modules.facts import BatchFacts
from ttt_kernels.modules.mlp import FastWeightMLP
from ttt_kernels.modules.rule import WriteRule

__all__ = ["BatchFacts", "FastWeightMLP", "WriteRule"]
