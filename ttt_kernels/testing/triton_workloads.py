"""What a model's layer asks of the Triton kernels, or of those in CUDA C++, as recorded launches: nothing
runs, nothing is allocated.

Each operation is a call of the host function that a GPU would run, on meta tensors of the layer's sizes.
The library calls between the launches are recorded too, and the memory that the tensors would take.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import ttt_kernels.ops
from ttt_kernels.ops.scan import reference
from ttt_kernels.ops.scan import registration as scan
from ttt_kernels.ops.scan.heuristics import use_plan
from ttt_kernels.ops.step import registration as step
from ttt_kernels.ops.step_size import registration as step_size
from ttt_kernels.ops.target import triton_bwd as triton_target_bwd
from ttt_kernels.ops.target import triton_fwd as triton_target_fwd
from ttt_kernels.ops.triton_launch import Launch, record
from ttt_kernels.testing import cuda_launches
from ttt_kernels.testing.kernel_survey import Case
from ttt_kernels.testing.roofline import LibraryCall
from ttt_kernels.types import ceil_div

CONV_TAPS = 5
RECORDERS = {"triton": record, "cuda": cuda_launches.record}


@dataclass(frozen=True)
class Recorded:
    """One operation: its launches and library calls, and the most bytes it holds beyond its operands and
    results."""

    launches: tuple[Launch | cuda_launches.Launch, ...]
    library: tuple[LibraryCall, ...]
    extra_bytes: int


class _LibraryCalls(TorchDispatchMode):
    """Notes what torch itself computes."""

    ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
    FILL = ("new_zeros", "zeros_like", "new_full", "full_like", "new_ones", "ones_like")  # read nothing
    OVERWRITE = ("copy_", "fill_", "zero_")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LibraryCall] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, writes, before = func.overloadpacket.__name__, func._schema.is_mutable, _tensors((args, kwargs))
        fresh = _new_tensors(before, out)
        if name not in self.ALLOCATE and (writes or fresh):
            overwrites = name in self.OVERWRITE or func._overloadname == "out"
            twice = _tensors(out) if writes and not overwrites else []
            traffic = sum(map(_bytes, [*([] if name in self.FILL else before), *fresh, *twice]))
            plain = getattr(torch.ops.aten, name.removesuffix("_"), None)  # in place: the same product
            count = flop_registry.get(plain)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            single = bool(before) and before[0].dtype == torch.float32
            self.calls.append(LibraryCall(f"torch.{name}", float(flops), float(traffic), single))
        return out


class _Memory(TorchDispatchMode):
    """Notes how many bytes are alive at once, while `launches` are forgotten: they hold tensors."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.launches.clear()
        out = func(*args, **(kwargs or {}))
        for t in _new_tensors(_tensors((args, kwargs)), out):
            self._alive[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return out


def _tensors(tree: object) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _new_tensors(before: list[Tensor], out: object) -> list[Tensor]:
    """Results in memory of their own: no views, nothing written in place."""
    known = {t.untyped_storage()._cdata for t in before}
    return [t for t in _tensors(out) if t.untyped_storage()._cdata not in known]


def _bytes(t: Tensor) -> int:
    """What reading it once moves: an expanded tensor is no larger than its storage."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def record_case(case: Case, architecture: int) -> Recorded:
    """The launches of `case` on a GPU of that architecture."""
    call, recording = OPERATIONS[case.operation](case), RECORDERS[case.impl]
    with recording(architecture) as launches, _LibraryCalls() as library:
        call()
    with recording(architecture) as forgotten, _Memory(forgotten) as memory:
        returned = sum(t.numel() * t.element_size() for t in _tensors(call()))
    return Recorded(tuple(launches), tuple(library.calls), max(0, memory.peak - returned))


# --- operations: from a case, a call without arguments ----------------------------------------------
def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _lengths(case: Case) -> Tensor | None:
    """Packed: sequences of unequal length. On the host, since they are read there."""
    if not case.sequences:
        return None
    cuts = torch.linspace(0, 1, case.sequences + 1) ** 1.5 * case.tokens
    return cuts.round().to(torch.int64)


def _scan_operands(case: Case) -> tuple:
    dtype = getattr(torch, case.dtype)
    chunks = ceil_div(case.tokens, case.chunk_size) + case.sequences
    return (
        _meta(case.batch, case.tokens, case.f, dtype=dtype),
        _meta(case.batch, case.tokens, case.d, dtype=dtype),
        _meta(case.d, case.f, dtype=dtype),
        _meta(case.batch, chunks),
        1.0,
        _meta(max(case.batch, case.sequences), case.d, case.f) if case.carried else None,
        _lengths(case),
        case.chunk_size,
        case.preserve_row_norm,
        case.carried,
    )


def _scan_forward(case: Case) -> Callable:
    operands = _scan_operands(case)
    return lambda: scan.FORWARD[case.impl](*operands, False)


def _scan_prefill(case: Case) -> Callable:
    """What a prompt does: the state after its last chunk is wanted."""
    *operands, _ = _scan_operands(case)
    return lambda: scan.FORWARD[case.impl](*operands, True, False)


def _scan_split(case: Case) -> Callable:
    """The plan in which the library reads."""
    call = _scan_forward(case)

    def split() -> object:
        with use_plan("split"):
            return call()

    return split


def _scan_both(case: Case) -> Callable:
    """What training does: the forward keeps its last state, the backward starts from it."""
    operands = _scan_operands(case)
    dy = _meta(case.batch, case.tokens, case.d, dtype=getattr(torch, case.dtype))
    dstate = _meta(max(case.batch, case.sequences), case.d, case.f) if case.carried else None

    def call() -> tuple:
        y, carried = scan.FORWARD[case.impl](*operands, True)
        return y, *scan.BACKWARD[case.impl](dy, dstate, carried, *operands, not case.carried)

    return call


def _released(case: Case, backward: bool = False) -> Callable:
    """The released formula, by torch alone: what kernels are compared with."""
    z, v, w0, *_ = _scan_operands(case)
    options = {"chunk_size": case.chunk_size, "preserve_row_norm": case.preserve_row_norm}

    def call(*leaves: Tensor) -> Tensor:
        return reference.scan(*leaves, 1.0, None, None, **options)[0]

    return _by_torch(call, (z, v, w0), backward)


def _plain(case: Case, backward: bool = False) -> Callable:
    """The down-projection without fast weights."""
    z, _, w0, *_ = _scan_operands(case)
    return _by_torch(lambda z, w0: z @ w0.mT, (z, w0), backward)


def _by_torch(call: Callable, leaves: tuple[Tensor, ...], backward: bool) -> Callable:
    """`leaves`: z first, w0 last."""
    if not backward:
        return lambda: call(*leaves)
    dy = leaves[0].new_empty(*leaves[0].shape[:2], len(leaves[-1]))

    def both() -> tuple:
        mine = [t.detach().requires_grad_() for t in leaves]
        y = call(*mine)
        return y, *torch.autograd.grad(y, mine, dy)

    return both


def _step_size(case: Case, kind: str, backward: bool = False) -> Callable:
    z, v, *_ = _scan_operands(case)
    rule = step_size.RULES[kind](1.0, 5)
    operands = (z, v, case.chunk_size, _lengths(case), rule)
    if backward:
        dsteps = _meta(case.batch, ceil_div(case.tokens, case.chunk_size) + case.sequences)
        return lambda: step_size.BACKWARD[case.impl](dsteps, *operands)
    return lambda: step_size.FORWARD[case.impl](*operands)


def _target(case: Case, name: str, *extra: object, backward: bool = False) -> Callable:
    """`extra`: what `name` takes between its projection and the sequence lengths."""
    dtype = getattr(torch, case.dtype)
    x, dv = (_meta(case.batch, case.tokens, case.d, dtype=dtype) for _ in range(2))
    weight = (_meta(case.d, 1, CONV_TAPS, dtype=dtype),) if name == "conv" else ()
    proj = _meta(case.d, case.d, dtype=dtype)
    operands = (x, *weight, proj, case.chunk_size, *extra, _lengths(case))
    if backward:
        return lambda: getattr(triton_target_bwd, f"{name}_backward")(dv, *operands)
    return lambda: getattr(triton_target_fwd, name)(*operands)


def _decode_operands(case: Case, tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, pool, slots: one weight a request; with slots one more in the pool."""
    z = _meta(case.batch, tokens, case.f, dtype=getattr(torch, case.dtype))
    if not case.slots:
        return z, _meta(case.batch, case.d, case.f), None
    return z, _meta(case.batch + 1, case.d, case.f), _meta(case.batch, dtype=torch.int64)


def _scale(case: Case, pool: Tensor) -> Tensor | None:
    return _meta(*pool.shape[:2]) if case.preserve_row_norm else None


def _apply(case: Case) -> Callable:
    z, pool, slots = _decode_operands(case, case.tokens)
    return lambda: step.APPLY[case.impl](z, pool, _scale(case, pool), slots)


def _apply_backward(case: Case) -> Callable:
    z, pool, slots = _decode_operands(case, case.tokens)
    dy = z.new_empty(case.batch, case.tokens, case.d)
    return lambda: step.APPLY_BACKWARD[case.impl](dy, z, pool, _scale(case, pool), slots, True)


def _update(case: Case) -> Callable:
    z, pool, slots = _decode_operands(case, case.chunk_size)
    v = z.new_empty(case.batch, case.chunk_size, case.d)
    return lambda: step.UPDATE[case.impl](pool, z, v, _meta(case.batch), 1.0, slots)


OPERATIONS: Mapping[str, Callable[[Case], Callable]] = MappingProxyType(
    {
        "scan fwd": _scan_forward,
        "scan fwd, split plan": _scan_split,
        "scan fwd+bwd": _scan_both,
        "scan prefill": _scan_prefill,
        "released scan fwd": _released,
        "released scan fwd+bwd": partial(_released, backward=True),
        "plain projection fwd": _plain,
        "plain projection fwd+bwd": partial(_plain, backward=True),
        "step size fwd": partial(_step_size, kind="spectral"),
        "step size bwd": partial(_step_size, kind="spectral", backward=True),
        "clipped step size fwd": partial(_step_size, kind="clipped"),
        "clipped step size bwd": partial(_step_size, kind="clipped", backward=True),
        "next-token target fwd": lambda case: _target(case, "next_token", 1),
        "next-token target bwd": lambda case: _target(case, "next_token", 1, backward=True),
        "conv target fwd": lambda case: _target(case, "conv"),
        "conv target bwd": lambda case: _target(case, "conv", backward=True),
        "decode apply": _apply,
        "decode apply bwd": _apply_backward,
        "decode update": _update,
    }
)


def kernels() -> dict[str, object]:
    """Every kernel of the package by name: the functions called *_kernel of its triton_*.py files."""
    found = {}
    for module in pkgutil.walk_packages(ttt_kernels.ops.__path__, "ttt_kernels.ops."):
        if module.name.rpartition(".")[2].startswith("triton_"):
            names = vars(importlib.import_module(module.name))
            found |= {name: value for name, value in names.items() if name.endswith("_kernel")}
    return found
