"""Properties of a scan that need no reference: what must hold bit for bit, or to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ttt_kernels.testing.inputs import ScanInputs, make_inputs
from ttt_kernels.types import compute_dtype

Scan = Callable[..., tuple[Tensor, Tensor]]


def violations(
    scan: Scan,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    chunk_size: int = 16,
    chunks: int = 3,
    preserve_row_norm: bool = False,
) -> list[str]:
    """The properties that `scan` breaks, each as a sentence; empty when it is sound.

    Args:
        scan: called as `scan(z, v, w0, chunk_size=, step_size=, preserve_row_norm=, state=,
            return_state=True)`, like `fast_weight_scan`; returns (y, state).
        dtype, device: of the inputs, which are [3, chunks * chunk_size + 1, *].
        chunk_size, chunks: complete chunks before one more token that must not be written.
        preserve_row_norm: which read to check.
    """
    data = make_inputs(3, chunks * chunk_size + 1, 40, 72, dtype=dtype, device=device, seed=7)

    def run(z=data.z, v=data.v, w0=data.w0, state=None) -> tuple[Tensor, Tensor]:
        return scan(
            z, v, w0, chunk_size=chunk_size, step_size=0.3, preserve_row_norm=preserve_row_norm,
            state=state, return_state=True,
        )  # fmt: skip

    with torch.no_grad():
        checks = (_exact(run, data, chunk_size), _rounded(run, data, chunk_size, preserve_row_norm))
        return [message for check in checks for holds, message in check if not holds]


def _exact(run: Scan, data: ScanInputs, c: int) -> Iterator[tuple[bool, str]]:
    y, state = run()
    again, state_again = run()
    yield torch.equal(y, again) and torch.equal(state, state_again), "two runs differ"
    alone, state_alone = run(z=data.z[1:2], v=data.v[1:2])
    same = torch.equal(alone, y[1:2]) and torch.equal(state_alone, state[1:2])
    yield same, "a batch row depends on the other rows"
    quiet, start = run(v=torch.zeros_like(data.v))
    yield torch.equal(start, data.w0.to(start.dtype).expand_as(start)), "a zero target moves the state"
    first, _ = run(z=data.z[:, :c], v=data.v[:, :c])
    yield torch.equal(first, quiet[:, :c]), "the first chunk reads more than w0"

    late = data.z.clone()
    late[:, c + 3] = 1.0
    moved, _ = run(z=late)
    changed = (moved != y).any(-1).any(0)
    yield not changed[: c + 3].any(), "a token changes an earlier output"
    yield not changed[c + 4 : 2 * c].any(), "a token changes another output of its own chunk"
    yield bool(changed[2 * c :].any()), "a token does not reach the chunks after it"

    tail = data.v.clone()
    tail[:, -1] = float("nan")
    unread, state_unread = run(v=tail)
    yield torch.equal(unread, y) and torch.equal(state_unread, state), "an incomplete chunk is written"
    before = [t.clone() for t in (data.z, data.v, data.w0, state)]
    run(state=state)
    kept = all(map(torch.equal, before, (data.z, data.v, data.w0, state)))
    yield kept, "an argument is modified"


def _rounded(run: Scan, data: ScanInputs, c: int, preserve: bool) -> Iterator[tuple[bool, str]]:
    y, state = run()
    eps = torch.finfo(data.z.dtype).eps
    state_eps = torch.finfo(compute_dtype(data.z.dtype)).eps

    def close(a: Tensor, b: Tensor, unit: float) -> bool:
        return bool(((a.double() - b.double()).abs().max() <= 8 * unit * b.double().abs().max()).item())

    half, carried = run(z=data.z[:, : 2 * c], v=data.v[:, : 2 * c])
    rest, final = run(z=data.z[:, 2 * c :], v=data.v[:, 2 * c :], state=carried)
    whole = close(torch.cat([half, rest], 1), y, eps) and close(final, state, 4 * state_eps)
    yield whole, "splitting the sequence and carrying the state changes the result"
    w0 = data.w0.to(state.dtype)
    _, doubled = run(v=2 * data.v)
    yield close(doubled - w0, 2 * (state - w0), 16 * state_eps), "the write is not linear in v"
    if preserve:  # columns of y scale with rows of w0, whatever their size
        scaled, _ = run(w0=2 * data.w0, state=state)
        unscaled, _ = run(state=state)
        yield close(scaled, 2 * unscaled, eps), "the applied rows do not have the norms of w0"
