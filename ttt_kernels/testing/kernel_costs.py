"""FLOPs and bytes of each kernel's launches, from the arguments they are launched with.

One small function a kernel, named after it: arguments by name, and the number of `programs` of the grid,
-> `Work`. A kernel without one is an error.
Blocks are counted as full; bytes of operands that many programs read again count once in `traffic` and
every time in `loads`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ttt_kernels.testing.roofline import Tiles, Work
from ttt_kernels.types import ceil_div

Arguments = Mapping[str, Any]
FLOAT32 = 4


def work_of(launch) -> Work:
    """What one recorded launch does.

    Raises:
        NotImplementedError: a kernel without a cost function.
    """
    name = launch.kernel.fn.__name__
    if name not in COSTS:
        raise NotImplementedError(f"{name} has no cost function in ttt_kernels/testing/kernel_costs.py")
    return COSTS[name]({**launch.arguments, "programs": math.prod(launch.grid)})


# --- scan, forward --------------------------------------------------------------------------------
def scan_fwd_step(a: Arguments) -> Work:
    d, f, t, k = a["D"], a["F"], a["BLOCK"], a["CHUNK"]
    bt, bd, size = a["BLOCK_T"], a["BLOCK_D"], a["z"].element_size()
    y_columns, w_columns = bd + a["MORE_D"], a["BLOCK_F"] + a["MORE_F"]
    blocks = len(a["state"] if a["NO_TOKENS"] else a["blocks"])
    y_size = FLOAT32 if a["PRESERVE"] and a["SUPER"] else size
    traffic = 0.0
    tiles = []
    if a["apply_tiles"]:
        for i in range(ceil_div(t, bt)):
            seen = (i * bt + bt - 1) // k * k if a["SUPER"] else 0
            tiles.append(
                Tiles(
                    blocks * ceil_div(d, y_columns),
                    flops=2.0 * bt * y_columns * (f + seen),
                    loads=size * (bt + y_columns) * float(f + seen),
                    tail=y_size * bt * y_columns,
                )
            )
        scores = size * t * t / 2 if a["SUPER"] else 0
        traffic += blocks * (size * (d * f + t * f) + y_size * t * d + scores)
    written = 0 if a["NO_TOKENS"] else t
    count = a["programs"] - a["apply_tiles"]  # of the write
    if count:
        read, area = a["base"].element_size(), bd * w_columns
        state = read + FLOAT32 + size
        loads = float(size * (bd + w_columns) * written)
        tiles.append(
            Tiles(count, 2.0 * area * written, loads, float(state * area), tail_reads=float(read * area))
        )
        traffic += blocks * (state * d * f + size * written * (d + (0 if a["apply_tiles"] else f)))
    return Work(tuple(tiles), traffic)


def scan_fwd_scores(a: Arguments) -> Work:
    f, t, k, bt = a["F"], a["BLOCK"], a["CHUNK"], a["BLOCK_T"]
    size, blocks = a["z"].element_size(), len(a["blocks"])
    rows = ceil_div(t, bt)
    below = sum(ceil_div(min(t, ((i * bt + bt - 1) // k + 1) * k), bt) for i in range(rows))
    tile = Tiles(blocks * below, 2.0 * bt * bt * f, size * 2.0 * bt * f, float(size * bt * bt))
    return Work((tile,), float(blocks * (size * t * f + size * below * bt * bt)))


def scan_fwd_rescale(a: Arguments) -> Work:
    d, t, k, width = a["D"], a["BLOCK"], a["CHUNK"], a["BLOCK_D"]
    size, blocks = a["v"].element_size(), len(a["blocks"])
    moved = t * width * (FLOAT32 + 2 * size)
    loads = moved + size * t * (k + width * ceil_div(k, a["BLOCK_T"]))
    tile = Tiles(blocks * ceil_div(d, width), 2.0 * t * k * width, float(loads), rounds=ceil_div(t, k))
    return Work((tile,), float(blocks * (d / width * moved + size * t * k)))


# --- scan, backward -------------------------------------------------------------------------------
def scan_bwd_leave(a: Arguments) -> Work:
    read = FLOAT32 if a["RATIO"] else FLOAT32 * (1 + a["PRESERVE"])
    return _state_tiles(a, a["BLOCK"], read, 0 if a["RATIO"] else FLOAT32 + _rounded_copy(a))


def scan_bwd_enter(a: Arguments) -> Work:
    return _state_tiles(
        a, a["BLOCK"] * a["SUBTRACT"], a["base"].element_size(), FLOAT32 + _rounded_copy(a)
    )


def _rounded_copy(a: Arguments) -> int:
    return a["z"].element_size() if a["SHADOW"] else 0


def _state_tiles(a: Arguments, summed: int, read: int, stored: int) -> Work:
    """Tiles of the state that sum over `summed` tokens; `read` and `stored`: bytes an element after that."""
    d, f, size = a["D"], a["F"], a["z"].element_size()
    bd, bf = a["BLOCK_D"], a["BLOCK_F"] + a["MORE_F"]
    moved, area = read + stored, bd * bf
    loads, tail, reads = (float(n) for n in (size * (bd + bf) * summed, moved * area, read * area))
    tile = Tiles(a["programs"], 2.0 * area * summed, loads, tail, tail_reads=reads)
    return Work((tile,), float(len(a["blocks"]) * (moved * d * f + size * summed * (d + f))))


def scan_bwd_norm(a: Arguments) -> Work:
    size, elements = a["dy"].element_size(), a["BLOCK_T"] * a["BLOCK_D"]
    loads = 2 * size * elements + FLOAT32 * a["parts"] * a["BLOCK_D"]
    parts = 2 * FLOAT32 * a["parts"] * a["D"]
    tile = Tiles(a["programs"], loads=float(loads))
    return Work((tile,), float(len(a["blocks"]) * (2 * size * a["BLOCK"] * a["D"] + parts)))


def scan_bwd_token(a: Arguments) -> Work:
    d, f, t, size = a["D"], a["F"], a["BLOCK"], a["z"].element_size()
    bt, bn, blocks = a["BLOCK_T"], a["BLOCK_N"], len(a["blocks"])
    value = f + (t / 2 if a["SUPER"] else 0)  # summed over by a tile of dV, and of dZ
    key = 2 * d + (t + bt if a["SUPER"] else 0)
    counts = ((a["value_tiles"], value), (a["programs"] - a["value_tiles"], key))
    tail = float(size * bt * bn)
    tiles = tuple(Tiles(c, 2.0 * bt * bn * n, float(size * (bt + bn) * n), tail) for c, n in counts)
    weights, tokens = 2 * size * d * f, size * t * (2 * f + 3 * d)
    return Work(tiles, float(blocks * (weights + tokens + (size * t * t if a["SUPER"] else 0))))


def scan_bwd_scores(a: Arguments) -> Work:
    d, f, t, bt = a["D"], a["F"], a["BLOCK"], a["BLOCK_T"]
    size, blocks, rows = a["z"].element_size(), len(a["blocks"]), ceil_div(a["BLOCK"], a["BLOCK_T"])
    products = f * a["MAKE_P"] + d * a["MAKE_M"]
    out = size * (a["MAKE_P"] + a["MAKE_M"]) * bt * bt
    count = blocks * rows * (rows + 1) // 2
    tile = Tiles(count, 2.0 * bt * bt * products, float(2 * size * bt * products), float(out))
    return Work((tile,), float(blocks * size * t * products + count * out))


def scan_bwd_read(a: Arguments) -> Work:
    d, f, t, bt, bd = a["D"], a["F"], a["BLOCK"], a["BLOCK_T"], a["BLOCK_D"]
    size, blocks = a["z"].element_size(), len(a["blocks"])
    summed = f + t / 2
    tile = Tiles(a["programs"], 2.0 * bt * bd * summed, size * (bt + bd) * summed, float(FLOAT32 * bt * bd))
    return Work((tile,), float(blocks * (size * (d * f + t * f + t * t / 2) + FLOAT32 * t * d)))


def scan_bwd_rescale(a: Arguments) -> Work:
    d, t, k, width = a["D"], a["BLOCK"], a["CHUNK"], a["BLOCK_D"]
    size, blocks = a["v"].element_size(), len(a["blocks"])
    moved = t * width * (4 * FLOAT32 + 6 * size)  # raw twice in and out; dy, v twice, dy', pulled
    loads = moved + size * t * (k + width * ceil_div(k, a["BLOCK_T"]))
    tile = Tiles(a["programs"], 2.0 * t * k * width, float(loads), rounds=2 * ceil_div(t, k))
    return Work((tile,), float(blocks * (d / width * moved + size * t * k)))


# --- step sizes -----------------------------------------------------------------------------------
def step_size_fwd_gram(a: Arguments) -> Work:
    d, f, t, bt = a["D"], a["F"], a["C"], a["BLOCK_T"]
    size, chunks, side = a["z"].element_size(), len(a["first"]), a["PADDED"] // a["BLOCK_T"]
    count = chunks * side * (side + 1) // 2
    stored = 2 * 2 * FLOAT32 * bt * bt if a["STORE"] else 0
    tile = Tiles(count, 2.0 * bt * bt * (d + f), 2.0 * size * bt * (d + f), float(stored))
    grams = 2 * FLOAT32 * a["PADDED"] ** 2 if a["STORE"] else 0
    return Work((tile,), float(chunks * (size * t * (d + f) + grams)))


def step_size_fwd_iterate(a: Arguments) -> Work:
    return _matvec(a["programs"], a["PADDED"], a["BLOCK_R"], a["BLOCK_C"])


def step_size_bwd_iterate(a: Arguments) -> Work:
    return _matvec(a["programs"], a["PADDED"], a["BLOCK_R"], a["BLOCK_C"])


def _matvec(programs: int, padded: int, rows: int, columns: int) -> Work:
    """Rows of a float32 matrix times a vector: bytes only."""
    loads = FLOAT32 * padded * (rows + 2)
    tile = Tiles(programs, loads=float(loads), tail=2.0 * FLOAT32 * rows)
    return Work((tile,), float(programs * rows * padded * FLOAT32))


def step_size_bwd_project(a: Arguments) -> Work:
    rows, bf, size, width = a["BLOCK_R"], a["BLOCK_F"], a["x"].element_size(), a["WIDTH"]
    loads = a["C"] * (size * bf + FLOAT32 * rows)
    tile = Tiles(a["programs"], 2.0 * a["C"] * rows * bf, float(loads), float(FLOAT32 * rows * bf))
    traffic = len(a["first"]) * (size * a["C"] * width + FLOAT32 * a["COUNT"] * (width + a["C"]))
    return Work((tile,), float(traffic))


def step_size_bwd_expand(a: Arguments) -> Work:
    bt, bf, size, width = a["BLOCK_T"], a["BLOCK_F"], a["dx"].element_size(), a["WIDTH"]
    tile = Tiles(a["programs"], loads=float(FLOAT32 * a["COUNT"] * (bt + bf)), tail=float(size * bt * bf))
    traffic = len(a["first"]) * (size * a["C"] * width + FLOAT32 * a["COUNT"] * (width + a["C"]))
    return Work((tile,), float(traffic))


def step_size_bwd_clip(a: Arguments) -> Work:
    bt, bf, c, size, width = a["BLOCK_T"], a["BLOCK_F"], a["C"], a["x"].element_size(), a["WIDTH"]
    products = 2 if a["SPLIT"] else 1  # a float32 factor as the sum of two of 16 bits
    loads = c * (FLOAT32 * bt + size * bf)
    tile = Tiles(a["programs"], 2.0 * products * c * bt * bf, float(loads), float(size * bt * bf))
    return Work((tile,), float(len(a["first"]) * (2 * size * c * width + FLOAT32 * c * c)))


# --- targets ---------------------------------------------------------------------------------------
def target_fwd_shift(a: Arguments) -> Work:
    erased = a["SHIFT"] / a["CHUNK"]  # the rows whose source lies in another chunk
    passes = abs(erased) if a["ERASE"] else 2 - abs(erased)
    return _pointwise(a, a["x"], passes)


def target_fwd_conv(a: Arguments) -> Work:
    return _pointwise(a, a["u"], 2, again=a["TAPS"] - 1)


def target_bwd_conv(a: Arguments) -> Work:
    return _pointwise(a, a["u"], 3, again=2 * (a["TAPS"] - 1))


def _pointwise(a: Arguments, like, passes: float, again: int = 0) -> Work:
    """`passes` over [N, D] elements like those of a tensor, `again` of them from a cache."""
    size = like.element_size()
    tile = Tiles(a["programs"], loads=float(size * (passes + again) * a["BLOCK_T"] * a["BLOCK_D"]))
    return Work((tile,), float(size * passes * a["N"] * a["D"]))


# --- decode ---------------------------------------------------------------------------------------
def step_apply_matvec(a: Arguments) -> Work:
    return _read_pool(a, 1, 1)


def step_apply_tokens(a: Arguments) -> Work:
    return _read_pool(a, a["tokens"], a["BLOCK_T"])


def _read_pool(a: Arguments, tokens: int, bt: int) -> Work:
    """Every row its own weight; a program reads [BLOCK_D, part] of it."""
    size, part = a["z"].element_size(), min(a["part"], a["F"])
    loads = part * (FLOAT32 * a["BLOCK_D"] + size * bt)
    flops = 2.0 * a["BLOCK_D"] * part * bt if bt > 1 else 0.0  # one token: no tensor cores
    tail = a["y"].element_size() * a["BLOCK_D"] * bt
    traffic = a["rows"] * (FLOAT32 * a["D"] * a["F"] + size * tokens * a["F"]) + _bytes(a["y"])
    return Work((Tiles(a["programs"], flops, float(loads), float(tail)),), float(traffic))


def step_apply_sum(a: Arguments) -> Work:
    moved = a["BLOCK"] * (FLOAT32 * a["splits"] + a["y"].element_size())
    return Work((Tiles(a["programs"], loads=float(moved)),), float(_bytes(a["partial"]) + _bytes(a["y"])))


def step_update(a: Arguments) -> Work:
    d, f, size = a["D"], a["F"], a["z"].element_size()
    tail = 2 * FLOAT32 * a["BLOCK_D"] * a["BLOCK_F"]
    return _outer(a, a["rows"] * (2 * FLOAT32 * d * f + size * a["tokens"] * (d + f)), tail)


def step_apply_bwd_pool(a: Arguments) -> Work:
    d, f, size = a["D"], a["F"], a["z"].element_size()
    written = FLOAT32 * (2 if a["HAS_SCALE"] else 1)
    tail = written * a["BLOCK_D"] * a["BLOCK_F"]
    return _outer(a, a["pool"] * written * d * f + a["rows"] * size * a["tokens"] * (d + f), tail)


def _outer(a: Arguments, traffic: float, tail: float) -> Work:
    """A tile [BLOCK_D, BLOCK_F] of a sum of outer products over the tokens of a row."""
    bd, bf, size = a["BLOCK_D"], a["BLOCK_F"], a["z"].element_size()
    flops, loads = 2.0 * a["tokens"] * bd * bf, float(size * a["tokens"] * (bd + bf))
    return Work((Tiles(a["programs"], flops, loads, float(tail)),), float(traffic))


def _bytes(tensor) -> int:
    return tensor.numel() * tensor.element_size()


COSTS: Mapping[str, Callable[[Arguments], Work]] = {
    f"{cost.__name__}_kernel": cost
    for cost in (
        scan_fwd_step,
        scan_fwd_scores,
        scan_fwd_rescale,
        scan_bwd_leave,
        scan_bwd_enter,
        scan_bwd_norm,
        scan_bwd_token,
        scan_bwd_scores,
        scan_bwd_read,
        scan_bwd_rescale,
        step_size_fwd_gram,
        step_size_fwd_iterate,
        step_size_bwd_iterate,
        step_size_bwd_project,
        step_size_bwd_expand,
        step_size_bwd_clip,
        target_fwd_shift,
        target_fwd_conv,
        target_bwd_conv,
        step_apply_matvec,
        step_apply_tokens,
        step_apply_sum,
        step_update,
        step_apply_bwd_pool,
    )
}
