"""The scan with the compiled CUDA C++ kernels: csrc/kernels/scan says how they work.

A block is one chunk: W is written after each, whatever its length. (Where chunks are so short that state
traffic dominates, `triton` groups them.) This file owns the memory; the launches are made in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_kernels import _extension
from ttt_kernels.ops._row_norm import initial_weight_gradient, square_norm
from ttt_kernels.ops.cuda_launch import address, aligned, check_widths, kernel_path, place
from ttt_kernels.ops.scan.blocks import block_table
from ttt_kernels.types import ceil_div

NORM_COLUMNS = 64  # kNormColumns of csrc/include/ttt/scan.h


class Call:
    """The arguments that forward and backward share, and the memory they live in."""

    def __init__(self, z, v, w0, step_size, lr, cu_seqlens, chunk_size, preserve) -> None:
        self.z, self.v, self.w0, self.preserve = aligned(z), aligned(v), w0, preserve
        self.step_size = step_size
        self.d, self.f = w0.shape
        check_widths("fast_weight_scan", "w0", self.d, self.f)
        batch, tokens = z.shape[:2]
        chunk = min(chunk_size, max(tokens, 1) + 1)  # the same chunks, and no overflow
        self.table = block_table(batch, tokens, chunk, chunk, cu_seqlens, z.device)
        self.parts = ceil_div(self.f, NORM_COLUMNS)
        self.arguments = dict(
            path=kernel_path(z.device), d=self.d, f=self.f, chunk=chunk, tokens=batch * tokens,
            sequences=self.table.sequences, blocks=address(self.table.rows), offsets=list(self.table.offsets),
            z=address(self.z), z_stride=self.f, v=address(self.v), v_stride=self.d,
            step_size=address(step_size), lr=lr, preserve_row_norm=preserve, **place(z),
        )  # fmt: skip

    @property
    def empty(self) -> bool:
        """Nothing to launch?"""
        return not self.z.numel() or not self.w0.numel()

    def float32(self, *shape: int) -> Tensor:
        return self.z.new_empty(shape, dtype=torch.float32)

    def norms(self, sequences: int) -> Tensor | None:
        return self.float32(sequences, self.parts, self.d) if self.preserve else None

    def w0_norms(self, scratch: Tensor) -> Tensor | None:
        """Of w0, as the kernels sum them; `scratch` [D, F] float32 is overwritten."""
        norms = self.norms(1)
        if norms is not None:
            scratch.copy_(self.w0)
            _extension.load().scan_norms(
                weight=address(scratch), norms=address(norms), d=self.d, f=self.f, sequences=1,
                **place(self.z),
            )  # fmt: skip
        return norms


def forward(
    z: Tensor,
    v: Tensor,
    w0: Tensor,
    step_size: Tensor | None,
    lr: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    preserve_row_norm: bool,
    return_state: bool,
    save_state: bool,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the carried state, as `eager.forward`."""
    call = Call(z, v, w0, step_size, lr, cu_seqlens, chunk_size, preserve_row_norm)
    y = z.new_zeros(*z.shape[:2], call.d) if call.empty else z.new_empty(*z.shape[:2], call.d)
    sequences = call.table.sequences
    carried = call.float32(sequences, call.d, call.f)
    w0_norms = None if call.empty else call.w0_norms(carried[0])
    carried.copy_(w0 if state is None else state)
    if not call.empty:
        shadows = [z.new_empty(carried.shape) for _ in range(2)]
        norms = [call.norms(sequences) for _ in range(2)]
        _extension.load().scan_forward(
            y=address(y), y_stride=call.d, state=address(carried), write_last=return_state,
            shadow_0=address(shadows[0]), shadow_1=address(shadows[1]), norms_0=address(norms[0]),
            norms_1=address(norms[1]), w0_norms=address(w0_norms), **call.arguments,
        )  # fmt: skip
    # An empty tensor of its own: a view would keep the whole state alive.
    return y, carried if return_state or save_state else call.float32(0, call.d, call.f)


def backward(
    dy: Tensor,
    dstate: Tensor | None,
    carried: Tensor,
    z: Tensor,
    v: Tensor,
    w0: Tensor,
    step_size: Tensor | None,
    lr: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    preserve_row_norm: bool,
    return_state: bool,
    consume: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dz, dv, dw0, dstep_size, dstate, as `eager_bwd.backward`."""
    call = Call(z, v, w0, step_size, lr, cu_seqlens, chunk_size, preserve_row_norm)
    dy = aligned(dy)
    grad = torch.zeros_like(carried) if dstate is None else dstate.clone()
    dz, dv = torch.empty_like(z), torch.empty_like(v)
    dstep = carried.new_empty(0) if step_size is None else torch.empty_like(step_size)
    norm_grad = call.float32(len(carried), call.d) if preserve_row_norm else None
    if call.empty:
        for result in (dz, dv, dstep, norm_grad):
            if result is not None:
                result.zero_()
    else:
        launch_backward(
            call, dy, dstate, carried, state, return_state, consume, grad, dz, dv, dstep, norm_grad
        )
    squares = square_norm(w0, torch.float32) if preserve_row_norm else None
    dw0 = initial_weight_gradient(w0, grad if state is None else None, norm_grad, squares)
    return dz, dv, dw0, dstep, grad if state is not None else carried.new_empty(0)


def launch_backward(
    call, dy, dstate, carried, state, return_state, consume, grad, dz, dv, dstep, norm_grad
) -> None:
    weight = carried if consume else torch.empty_like(carried)
    shadows = call.z.new_empty(2, *carried.shape)
    w0_norms = call.w0_norms(shadows.view(torch.float32).view_as(carried)[0])  # until they are made
    shadow, grad_shadow = shadows
    initial = aligned(call.w0 if state is None else state)
    arguments = dict(
        dy=address(dy), dy_stride=call.d, initial=address(initial),
        initial_stride=0 if state is None else call.d * call.f,
        initial_is_float32=initial.dtype == torch.float32, carried=address(carried),
        carried_is_final=return_state, has_dstate=dstate is not None, grad=address(grad), dz=address(dz),
        dv=address(dv), dstep=address(dstep) if call.step_size is not None else None,
        norm_grad=address(norm_grad), w0_norms=address(w0_norms), weight=address(weight),
        shadow=address(shadow), grad_shadow=address(grad_shadow), **call.arguments,
    )  # fmt: skip
    extension = _extension.load()
    size = extension.scan_backward_workspace(workspace=None, **arguments)
    workspace = torch.empty(size, dtype=torch.uint8, device=call.z.device)
    extension.scan_backward(workspace=address(workspace), **arguments)
