"""The launches of the CUDA C++ kernels, described for `roofline`: tiles, bytes and FLOPs of each.

What C++ launches nobody can record without a GPU. So `Extension` stands in for `ttt_kernels._C`: it takes
the very calls that ops/*/cuda.py make, for tensors of a model's sizes, and notes what the host loops of
csrc/kernels would launch; library calls and memory are those of the Python code. Registers and shared memory
come from the library (`cuda_compiled`). Tiles are counted as full; sums of row norms, 4 bytes for 64
elements, are not counted.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from ttt_kernels import _extension
from ttt_kernels.ops.cuda_launch import SM80, SM90, use_path
from ttt_kernels.testing import cuda_compiled
from ttt_kernels.testing.cuda_compiled import USES, CudaReport
from ttt_kernels.testing.kernel_survey import Case, Compiled
from ttt_kernels.testing.roofline import MACHINES, Tiles, Work
from ttt_kernels.types import ceil_div

CSRC = Path(__file__).resolve().parents[2] / "csrc"
IMAGES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}  # what an architecture loads
SIZE, FLOAT32 = 2, 4  # bytes of an operand, of a number of the state
STATE = 2 * FLOAT32 + SIZE  # read, written, and its rounded copy written
ROWS = 128  # of every tile of a product
SUM_COLUMNS = 64  # of a state, that a partial sum of a row covers
ROUND = "scan_round_kernel"  # makes shadows and row norms of states
DTYPES = {"bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Launch:
    """`kernel` and `tile` as in its `CudaReport`."""

    kernel: str
    work: Work
    tile: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Products:
    """How a family of kernels multiplies: tiles [ROWS, columns], the operands in slabs of `slab` steps of K.

    Args:
        prefix: of the kernels' names.
        columns, slab: as above.
        cluster: blocks whose tiles lie one below the other and that load the right operand once.
        overlap: a block multiplies one tile while it does the end of another, and loads run on from tile to
            tile; else every product waits for its first slabs.
    """

    prefix: str
    columns: int
    slab: int
    cluster: int = 1
    overlap: bool = False

    @property
    def version(self) -> tuple[tuple[str, int], ...]:
        """Template arguments of its kernels."""
        return (("BLOCK_N", self.columns),) if self.prefix else ()

    def tiles(self, count, height, width, depth, tail, *, reads=0, times=1, right=SIZE) -> Tiles:
        """Of `count` matrices [height, width]: `times` products over `depth`, one accumulator, then `tail`
        bytes an element, `reads` of them read. `right`: bytes of an element of the right operand."""
        area, steps = ROWS * self.columns, times * ceil_div(depth, self.slab) * self.slab
        return Tiles(
            count * ceil_div(height, self.cluster * ROWS) * self.cluster * ceil_div(width, self.columns),
            flops=2.0 * area * depth * times,
            loads=float(steps * (SIZE * ROWS + right * self.columns / self.cluster)),
            tail=float(tail * area),
            rounds=0 if self.overlap else times,
            tail_reads=float(reads * area),
            overlap=self.overlap,
        )


AMPERE = Products("", columns=128, slab=32)  # gemm_sm80.cuh
HOPPER = Products("sm90_", columns=192, slab=64, cluster=2, overlap=True)  # sm90_pipeline.cuh
NARROW = replace(HOPPER, columns=128)
STATE_TOKENS = 1024  # kStateTokens: a write takes no less than one of so many tokens


# --- scan -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Blocks:
    """Those of one launch: `count` of `tokens` tokens each, with a state [d, f] each."""

    count: int
    tokens: int
    d: int
    f: int

    def work(self, tiles: Iterable[Tiles], state: int, keys: int, values: int) -> Work:
        """`state`, `keys` and `values`: bytes moved for an element of [d, f], [tokens, f] and [tokens, d]."""
        moved = state * self.d * self.f + self.tokens * (keys * self.f + values * self.d)
        return Work(tuple(tiles), float(self.count * moved))


def forward_step(path: Products, b: Blocks, write: bool) -> Launch:
    """forward_step.cu: y = Z W^T, and W += V^T Z in place, rounded into a copy."""
    tiles = [path.tiles(b.count, b.tokens, b.d, b.f, SIZE)]
    if write:
        tiles.append(path.tiles(b.count, b.d, b.f, b.tokens, STATE, reads=FLOAT32))
    work = b.work(tiles, SIZE + STATE * write, SIZE, SIZE * (1 + write))
    return Launch(f"{path.prefix}scan_fwd_step_kernel", work, path.version)


def state_step(path: Products, b: Blocks, use: str, *, depth: int, preserve: bool = False) -> Launch:
    """state_step.cu: A^T Z over `depth` tokens, and what `use` does with the state."""
    moved = {"enter": STATE, "products": FLOAT32, "leave": STATE + FLOAT32 * preserve}[use]
    operands, reads = SIZE if depth else 0, FLOAT32 * (1 + (use == "leave" and preserve))
    work = b.work([path.tiles(b.count, b.d, b.f, depth, moved, reads=reads)], moved, operands, operands)
    return Launch(f"{path.prefix}scan_bwd_state_kernel", work, (*path.version, ("use", USES.index(use))))


def token_step(path: Products, b: Blocks, *, reached: bool, dstep: bool) -> Launch:
    """token_step.cu: dV = Z G^T and sums of V * dV; dZ = V G + dY W. Without `reached` no G."""
    read_v = SIZE * (reached and dstep)
    tiles = (
        path.tiles(b.count, b.tokens, b.d, b.f * reached, SIZE + read_v, reads=read_v),
        path.tiles(b.count, b.tokens, b.f, b.d, SIZE, times=1 + reached),
    )
    work = b.work(tiles, SIZE * (1 + reached), SIZE * (1 + reached), SIZE * (2 + reached))
    return Launch(f"{path.prefix}scan_bwd_token_kernel", work, path.version)


def stream(kernel: str, count: int, moved: int, of_block: int) -> Launch:
    """A kernel bound by bytes: `moved` for each of `count` things, `of_block` of them a block of threads."""
    tiles = Tiles(ceil_div(count, of_block), loads=float(moved * of_block))
    return Launch(kernel, Work((tiles,), float(count * moved)))


def scan_forward(path: Products, steps: Sequence[Blocks], chunk: int, write_last: bool) -> Iterator[Launch]:
    """scan_forward.cu."""
    yield stream(ROUND, steps[0].count * steps[0].d * steps[0].f, FLOAT32 + SIZE, 64 * ROWS)
    for n, b in enumerate(steps):
        yield forward_step(path, b, b.tokens == chunk and (write_last or n + 1 < len(steps)))


def scan_backward(
    path: Products, steps: Sequence[Blocks], chunk: int, dstep: bool, *, carried_is_final: bool,
    has_dstate: bool, preserve_row_norm: bool, initial_is_float32: bool, **_,
) -> Iterator[Launch]:  # fmt: skip
    """scan_backward.cu."""
    elements, parts = steps[0].count * steps[0].d * steps[0].f, ceil_div(steps[0].f, SUM_COLUMNS)
    if has_dstate:
        yield stream(ROUND, elements, FLOAT32 + SIZE, 64 * ROWS)
    for n in reversed(range(len(steps))):
        b, last, complete = steps[n], n + 1 == len(steps), steps[n].tokens == chunk
        if n == 0:
            initial = FLOAT32 if initial_is_float32 else SIZE
            yield stream(ROUND, elements, initial + FLOAT32 + SIZE, 64 * ROWS)
        else:
            yield state_step(path, b, "enter", depth=b.tokens * (complete and (carried_is_final or not last)))
        if preserve_row_norm:
            yield state_step(path, b, "products", depth=b.tokens)
            yield stream("scan_bwd_ratio_kernel", b.count * b.d, FLOAT32 * (3 * parts + 4), 256)
            yield stream("scan_bwd_scale_kernel", b.count * b.tokens * b.d, 2 * SIZE, 256 * 8)
        yield token_step(path, b, reached=complete and (has_dstate or not last), dstep=dstep)
        yield state_step(path, b, "leave", depth=b.tokens, preserve=preserve_row_norm)
    if dstep:
        sums = ceil_div(steps[0].tokens, ROWS) * ceil_div(steps[0].d, path.columns)
        yield stream("scan_bwd_dstep_kernel", sum(b.count for b in steps), FLOAT32 * sums, 256 // 32)


def products_of(path: int, processors: int, first: Blocks) -> Products:
    """Of a scan whose first launch has these blocks (tile_columns in sm90_forward_step.cu)."""
    if path == SM80:
        return AMPERE
    write, clusters = max(first.tokens, STATE_TOKENS), max(1, processors // HOPPER.cluster)

    def cost(products: Products) -> int:
        pairs = (products.tiles(first.count, height, width, 0, 0).count // products.cluster
                 for height, width in ((first.tokens, first.d), (first.d, first.f)))  # fmt: skip
        total = next(pairs) * first.f + next(pairs) * write
        return max(first.f, ceil_div(total, clusters * write) * write) * products.columns

    return NARROW if 6 * cost(NARROW) < 5 * cost(HOPPER) else HOPPER


# --- decode ---------------------------------------------------------------------------------------
def apply_splits(processors: int, b: Blocks) -> int:
    """Parts of F (step_apply.cu)."""
    tiles = ceil_div(b.tokens, ROWS) * ceil_div(b.d, ROWS)
    return max(1, min(2 * processors // tiles, 16, b.f // 512)) if b.tokens > 8 else 1


def step_apply(processors: int, b: Blocks) -> Iterator[Launch]:
    """step_apply.cu: few tokens without tensor cores, more as tiles."""
    if b.tokens <= 8:
        rows = next((n for n in (4, 2) if b.count * b.d // n >= 8 * processors), 1)
        version = ("BLOCK_D", rows), ("BLOCK_T", next(n for n in (1, 4, 8) if n >= b.tokens))
        loads = b.f * (4 * rows * FLOAT32 + SIZE * b.tokens)  # four warps, and keys through L1
        tiles = Tiles(ceil_div(b.count * ceil_div(b.d, rows), 4), loads=float(loads))
        yield Launch("step_apply_matvec_kernel", b.work([tiles], FLOAT32, SIZE, SIZE), version)
        return
    splits = apply_splits(processors, b)
    part = ceil_div(ceil_div(b.f, splits), AMPERE.slab) * AMPERE.slab
    y = SIZE if splits == 1 else FLOAT32
    tiles = AMPERE.tiles(b.count * splits, b.tokens, b.d, part, y, right=FLOAT32)
    yield Launch("step_apply_tokens_kernel", b.work([tiles], FLOAT32, SIZE, y * splits))
    if splits > 1:
        yield stream("step_apply_sum_kernel", b.count * b.tokens * b.d, FLOAT32 * splits + SIZE, 4 * 128)


# --- step sizes -----------------------------------------------------------------------------------
def step_size(spectral: bool, chunks: int, chunk: int, d: int, f: int, iterations: int) -> Iterator[Launch]:
    """step_size.cu: Gram matrices below the diagonal and their mirror image, then reads of them."""
    side = ceil_div(chunk, ROWS)
    padded, triangle = side * ROWS, chunks * side * (side + 1) // 2
    grams = tuple(AMPERE.tiles(triangle, ROWS, ROWS, n, 2 * FLOAT32) for n in (f, d))
    traffic = chunks * (SIZE * chunk * (d + f) + 2 * FLOAT32 * padded**2)
    yield Launch("step_size_fwd_gram_kernel", Work(grams, float(traffic)))
    if not spectral:
        yield stream("step_size_fwd_clip_kernel", chunks, 2 * FLOAT32 * padded**2, 1)
        return
    yield stream("step_size_fwd_mean_kernel", chunks * padded, SIZE * d, 4)
    reads = Tiles(chunks * padded // 16, loads=float(FLOAT32 * padded * (16 + 2)))
    for _ in range(2 * iterations + 1):
        yield Launch("step_size_fwd_iterate_kernel", Work((reads,), float(FLOAT32 * chunks * padded**2)))
    yield stream("step_size_fwd_spectral_kernel", chunks, 2 * FLOAT32 * padded, 1)


# --- in place of the library ----------------------------------------------------------------------
class Extension:
    """The bindings of `ttt_kernels._C` for a GPU of so many multiprocessors: they only note launches."""

    emulated = True  # takes any tensors; `use_path` says whose kernels

    def __init__(self, processors: int) -> None:
        self.processors = processors
        self.launches: list[Launch] = []

    def scan_norms(self, *, sequences, d, f, **_) -> None:
        self.launches.append(stream(ROUND, sequences * d * f, FLOAT32, 64 * ROWS))

    def scan_forward(self, *, path, offsets, chunk, tokens, d, f, write_last, **_) -> None:
        steps = _blocks(offsets, chunk, tokens, d, f)
        self.launches += scan_forward(products_of(path, self.processors, steps[0]), steps, chunk, write_last)

    def scan_backward_workspace(self, *, offsets, chunk, tokens, d, f, **options) -> int:
        count, block, taken = offsets[1], min(chunk, tokens), []
        if options["preserve_row_norm"]:
            parts = ceil_div(f, SUM_COLUMNS)
            taken += [FLOAT32 * count * d * n for n in (parts, parts, 1, 1)]
            taken += [SIZE * min(count * block, tokens) * d]
        if options["step_size"] is not None:
            taken += [FLOAT32 * offsets[-1] * ceil_div(block, ROWS) * ceil_div(d, ROWS)]
        return sum(ceil_div(n, 256) * 256 for n in taken)

    def scan_backward(self, *, path, offsets, chunk, tokens, d, f, dstep, **options) -> None:
        steps = _blocks(offsets, chunk, tokens, d, f)
        path = products_of(path, self.processors, steps[0])
        self.launches += scan_backward(path, steps, chunk, dstep is not None, **options)

    def step_apply_workspace(self, *, batch, tokens, d, f, **_) -> int:
        splits = apply_splits(self.processors, Blocks(batch, tokens, d, f))
        return 0 if splits == 1 else FLOAT32 * splits * batch * tokens * d

    def step_apply(self, *, batch, tokens, d, f, **_) -> None:
        self.launches += step_apply(self.processors, Blocks(batch, tokens, d, f))

    def step_update(self, *, batch, tokens, d, f, **_) -> None:
        tiles = AMPERE.tiles(batch, d, f, tokens, 2 * FLOAT32)
        work = Blocks(batch, tokens, d, f).work([tiles], 2 * FLOAT32, SIZE, SIZE)
        self.launches.append(Launch("step_update_kernel", work))

    def step_size_workspace(self, *, chunks, chunk, **_) -> int:
        padded = ceil_div(chunk, ROWS) * ROWS
        return FLOAT32 * chunks * (2 * padded + 4) * padded

    def step_size(self, *, spectral, chunks, chunk, d, f, iterations, **_) -> None:
        self.launches += step_size(spectral, chunks, chunk, d, f, iterations)


def _blocks(offsets: Sequence[int], chunk: int, tokens: int, d: int, f: int) -> list[Blocks]:
    """Of every launch. Packed sequences, whose lengths only the device knows, are not described."""
    count = offsets[1]
    if any(b - a != count for a, b in zip(offsets, offsets[1:], strict=False)):
        raise NotImplementedError("launches are described for sequences of one length")
    length = tokens // count
    return [Blocks(count, min(chunk, length - n * chunk), d, f) for n in range(len(offsets) - 1)]


@contextmanager
def record(architecture: int) -> Iterator[list[Launch]]:
    """Collect what ops/*/cuda.py would launch on a GPU of that architecture; in the whole process."""
    extension = Extension(next(m.processors for m in MACHINES.values() if m.architecture == architecture))
    path = SM90 if architecture == 90 else SM80
    with mock.patch.object(_extension, "load", lambda: extension), use_path(path):
        yield extension.launches


# --- with what was compiled -----------------------------------------------------------------------
def read_kernels(csrc: Path = CSRC) -> dict[int, list[CudaReport]]:
    """The kernels of the installed library by architecture.

    Raises:
        RuntimeError: they cannot be read here; says why.
    """
    try:
        module = _extension.load()
        if module.emulated:
            raise RuntimeError("ttt_kernels._C is emulated and holds no machine code")
        images = cuda_compiled.read_library(Path(module.__file__), cuda_compiled.storage_bytes(csrc))
    except ImportError as error:
        raise RuntimeError(str(error)) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"the compiled library cannot be read: {error}") from None
    return {arch: images[image] for arch, image in IMAGES.items() if image in images}


def survey(cases: Iterable[Case], architecture: int, reports: Sequence[CudaReport]) -> list[Compiled]:
    """Of cases with impl="cuda", with what `read_kernels` has for the architecture. Needs Triton."""
    from ttt_kernels.testing.triton_workloads import record_case

    found = []
    for case in cases:
        recorded, dtypes = record_case(case, architecture), (DTYPES[case.dtype], "")
        launches = tuple((report_of(one, reports, dtypes), one.work) for one in recorded.launches)
        found.append(Compiled(case, architecture, launches, recorded.library, recorded.extra_bytes))
    return found


def report_of(launch: Launch, reports: Sequence[CudaReport], dtypes: Sequence[str]) -> CudaReport:
    """Of several versions that differ in what they read, the one with fewest blocks on a multiprocessor."""
    name = launch.kernel, launch.tile
    versions = [r for r in reports if (r.kernel, r.tile) == name and r.dtype in dtypes]
    if not versions:
        raise LookupError(f"{launch.kernel} {dict(launch.tile)} is not in the compiled library")
    return min(versions, key=lambda r: r.resident_blocks)
