"""Fast weights over several processes, on torch.distributed and DTensor.

`context`: the sequence is split over the ranks, and `prefix` hands each its starting state;
`context_model`: so in a patched model. `tensor`: the columns of every fast weight are split. `groups`: who
takes part, and refusing together.
"""

from ttt_kernels.distributed.context import context_parallel_scan
from ttt_kernels.distributed.context_model import context_parallel
from ttt_kernels.distributed.tensor import FastWeightParallel, tensor_parallel_plan

__all__ = [
    "FastWeightParallel",
    "context_parallel",
    "context_parallel_scan",
    "tensor_parallel_plan",
]
