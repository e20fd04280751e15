"""Step sizes with the compiled CUDA C++ kernels: csrc/kernels/step_size says how they work.

The backward is that of `eager`, library products of Gram matrices: `registration` says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels import _extension
from ttt_kernels.ops.cuda_launch import address, aligned, check_widths, place
from ttt_kernels.ops.step_size.chunks import complete_chunks
from ttt_kernels.ops.step_size.gram_rules import Clipped, Spectral


def forward(z, v, chunk_size: int, cu_seqlens, rule: Spectral | Clipped) -> Tensor:
    """[B, NC] float32; 0 for incomplete chunks, which are never written."""
    spectral = isinstance(rule, Spectral)
    d, f = v.shape[2], z.shape[2]
    check_widths("spectral_step_size" if spectral else "clipped_step_size", "v and z", d, f)
    chunks = complete_chunks(z, chunk_size, cu_seqlens)
    steps = z.new_zeros(z.shape[0], chunks.columns, dtype=torch.float32)
    z, v = aligned(z.contiguous()), aligned(v.contiguous())
    extension = _extension.load()
    arguments = dict(
        spectral=spectral, d=d, f=f, chunk=chunk_size, z=address(z), z_stride=f, v=address(v), v_stride=d,
        lr=rule.lr, iterations=rule.iterations if spectral else 0,
        max_norm=0.0 if spectral else rule.max_norm, **place(z),
    )  # fmt: skip

    def bytes_for(count: int) -> int:
        return extension.step_size_workspace(chunks=count, first=None, step=None, workspace=None, **arguments)

    for first, index in chunks.groups(bytes_for(1)):
        step = steps.new_empty(len(first))
        workspace = torch.empty(bytes_for(len(first)), dtype=torch.uint8, device=z.device)
        extension.step_size(
            chunks=len(first), first=address(first), step=address(step), workspace=address(workspace),
            **arguments,
        )  # fmt: skip
        steps.view(-1)[index] = step
    return steps
