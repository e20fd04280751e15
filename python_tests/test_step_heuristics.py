"""How the step kernels cut their work: tiles that fit, splits where rows are few, and the time model."""

import dataclasses
import doctest
import itertools

import pytest

from ttt_kernels.ops.step import heuristics
from ttt_kernels.ops.step.heuristics import apply_seconds, apply_tiles, update_tiles

MODELS = [(4096, 14336), (2560, 9728), (1024, 3072), (576, 1536)]
ARCHITECTURES = [80, 86, 89, 90, 100, 103, 120]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit(architecture, itemsize):
    """Shared memory, 16-byte rows of every tile, and whole warps."""
    shared = heuristics.device(architecture).shared
    for (d, f), tokens, along_d in itertools.product(MODELS, [1, 2, 16, 33, 100, 1024], [False, True]):
        a = apply_tiles(architecture, itemsize, tokens, d, f, along_d)
        assert a.stages * a.f * (4 * a.d + itemsize * a.t) <= shared
        assert (a.t == 1) == (tokens == 1) and (a.d >= 32 if along_d else a.f >= 32)
        assert a.d * a.f >= 4 * 32 * a.warps  # a 16-byte copy in every thread
        u = update_tiles(architecture, itemsize, tokens, d, f)
        assert u.stages * itemsize * u.k * (u.d + u.f) <= shared
        assert u.d * u.f <= 64 * 32 * u.warps  # accumulators in registers


@pytest.mark.parametrize("d, f", MODELS)
def test_decode_fills_the_memory_system(d, f):
    """One row alone: no second launch, and at least 85% of the bandwidth by the model."""
    for architecture in (80, 90, 100):
        tiles = apply_tiles(architecture, 2, 1, d, f)
        seconds = apply_seconds(architecture, 2, tiles, 1, d, f)
        assert tiles.splits == 1
        assert 4 * d * f / seconds > 0.85 * heuristics.device(architecture).bandwidth


def test_f_is_split_where_rows_are_few():
    assert apply_tiles(90, 2, 1, 64, 1 << 20).splits > 1
    assert apply_tiles(90, 2, 64, 1024, 3072).splits > 1
    assert apply_tiles(90, 2, 1024, 4096, 14336).splits == 1
    assert apply_tiles(90, 2, 1, 64, 1).splits == 1  # nothing to split


@pytest.mark.parametrize("tokens", [1, 4, 64, 1024])
def test_the_choice_is_the_fastest_candidate(tokens):
    d, f = 1024, 3072
    chosen = apply_tiles(90, 2, tokens, d, f)
    best = apply_seconds(90, 2, chosen, tokens, d, f)
    for splits in heuristics.SPLITS:
        other = dataclasses.replace(chosen, splits=splits)
        assert best <= apply_seconds(90, 2, other, tokens, d, f)


def test_predicted_time():
    """More rows take longer, but less than in proportion where one does not fill the GPU; a larger weight
    takes longer; nothing is faster than memory."""
    tiles = apply_tiles(90, 2, 1, 576, 1536)
    one, eight = (apply_seconds(90, 2, tiles, 1, 576, 1536, rows=rows) for rows in (1, 8))
    assert one < eight <= 8 * one
    bytes_ = 4 * 576 * 1536
    assert eight >= 8 * bytes_ / heuristics.device(90).bandwidth
    assert apply_seconds(90, 2, tiles, 1, 576, 3072) > one


def test_unknown_architectures_take_the_nearest_older():
    assert heuristics.device(89) is heuristics.DEVICES[86]
    assert heuristics.device(103) is heuristics.DEVICES[100]
    assert heuristics.device(75) is heuristics.DEVICES[80]


def test_examples():
    result = doctest.testmod(heuristics)
    assert result.attempted == 2 and not result.failed
