"""What one decoded token asks of a device, layer by layer: which ops, and never to wait for it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ttt_kernels.modules.layer_state import LayerSignature, LayerState, Row, slots_of
from ttt_kernels.modules.rule import WriteRule
from ttt_kernels.modules.streaming import stream

CHUNK, WIDTH, KEYS = 8, 16, 48
MOVES = {"copy_", "index_put_", "_to_copy"}


class Ops(TorchDispatchMode):
    """Names of the ops that run, views left out; copies to the device must not block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_to_copy":
            assert kwargs["non_blocking"]
        if not func.is_view and name not in ("detach", "lift_fresh"):
            self.names.append(name)
        return func(*args, **kwargs)


def decoding(rows: list[int], preserve: bool) -> LayerState:
    """Requests that have been written, whose weights lie at `rows` of one pool; their chunks are open.

    The tensors have no values: whoever reads one on the host gets an error.
    """
    rule = WriteRule(chunk_size=CHUNK, lr=0.1, preserve_row_norm=preserve)
    state = LayerState(LayerSignature(rule, (WIDTH, KEYS), torch.empty(0)))
    pool = [meta(max(rows) + 1, WIDTH, KEYS, dtype=torch.float32)]
    pool += [meta(max(rows) + 1, WIDTH, dtype=torch.float32)] if preserve else []
    weights = slots_of(*pool)
    chunks = slots_of(meta(len(rows), CHUNK, KEYS), meta(len(rows), CHUNK, WIDTH))
    state.rows = [
        Row(position=CHUNK + 1, fill=1, writes=1, weight=weights[n], chunk=chunk)
        for n, chunk in zip(rows, chunks, strict=True)
    ]
    return state


def meta(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("rows, moved", [([1, 2, 3, 4], 0), ([3, 0, 2, 5], 1)])
def test_a_token_is_one_read_and_two_copies(rows, moved, preserve, monkeypatch):
    """Scattered rows also send their places."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it does not know this device
    state = decoding(rows, preserve)
    z, u, w0 = meta(len(rows), 1, KEYS), meta(len(rows), 1, WIDTH), meta(WIDTH, KEYS)
    with Ops() as ops:
        y = stream(state, z, u, w0, lengths=None, terms=None, tracked=False)
    assert y.shape == (len(rows), 1, WIDTH) and all(row.fill == 2 for row in state.rows)
    assert ops.names.count("step_apply") == 1
    assert sum(name in MOVES for name in ops.names) == 2 + moved
    assert set(ops.names) <= {"step_apply", *MOVES}
