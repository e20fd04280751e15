"""The time model: every term of it, by a launch in which only that term matters."""

import doctest
from dataclasses import fields, replace

import pytest

from ttt_kernels.testing import roofline
from ttt_kernels.testing.roofline import (
    FILL,
    HOST_CALL,
    HOST_LAUNCH,
    LAUNCH_GAP,
    MACHINES,
    LibraryCall,
    Step,
    Tiles,
    Work,
    busiest,
    machine_called,
    predict,
    tile_seconds,
)

H200 = MACHINES["H200"]
SMS = H200.processors


def product(count: int, resident: int = 2, **tile) -> Step:
    return Step("product", Work((Tiles(count, **tile),), traffic=0.0), resident)


def test_the_example_in_the_docstring():
    assert doctest.testmod(roofline).attempted > 0
    assert doctest.testmod(roofline).failed == 0


def test_a_full_wave_of_products_runs_at_the_machine_rate():
    step = product(SMS, flops=1e9)
    assert predict(H200, [step]).device == pytest.approx(SMS * 1e9 / H200.flops + FILL + LAUNCH_GAP)


@pytest.mark.parametrize("count", [1, SMS - 1, SMS])
def test_a_wave_costs_the_same_however_empty(count):
    assert busiest(H200, [Tiles(count, flops=1e9)], 1) == busiest(H200, [Tiles(SMS, flops=1e9)], 1)


def test_one_tile_more_than_a_wave_is_a_second_wave():
    one, two = (busiest(H200, [Tiles(n, flops=1e9)], 1) for n in (SMS, SMS + 1))
    assert two == pytest.approx(2 * one)


def test_short_tiles_fill_what_long_ones_leave():
    """The union of two grids: half the multiprocessors take the long tiles, the rest all the short."""
    long, short = Tiles(SMS // 2, flops=4e9), Tiles(2 * SMS, flops=1e9)
    together = busiest(H200, [long, short], 2)
    apart = busiest(H200, [long], 2) + busiest(H200, [short], 2)
    assert together == pytest.approx(4e9 * SMS / H200.flops + FILL)
    assert together < 0.7 * apart


def test_a_tile_alone_hides_nothing():
    tile = Tiles(1, flops=1e8, tail=1e5)
    multiply, tail = 1e8 * SMS / H200.flops, 1e5 * SMS / H200.l2_bandwidth
    assert tile_seconds(H200, tile, resident=1) == pytest.approx(FILL + multiply + tail)
    assert tile_seconds(H200, tile, resident=2) == pytest.approx(max(multiply, tail))


def test_a_tile_is_fed_from_the_cache():
    flops, starved = Tiles(1, flops=1e8), Tiles(1, flops=1e8, loads=1e7)
    assert tile_seconds(H200, starved, 2) == pytest.approx(1e7 * SMS / H200.l2_bandwidth)
    assert tile_seconds(H200, starved, 2) > tile_seconds(H200, flops, 2)


def test_what_the_tail_reads_comes_from_the_cache_too():
    """Beside another tile, which multiplies meanwhile; alone the tail comes after the loads anyway."""
    tile = Tiles(1, loads=6e5, tail=5e5, tail_reads=2e5)
    share = H200.l2_bandwidth / SMS
    assert tile_seconds(H200, tile, 2) == pytest.approx(8e5 / share)
    assert tile_seconds(H200, tile, 1) == pytest.approx(FILL + 11e5 / share)


def test_tiles_of_one_program_overlap():
    """As two programs side by side, but nothing hides the last tail."""
    tiles = Tiles(10 * SMS, flops=1e8, tail=1e5)
    turns = replace(tiles, rounds=0, overlap=True)
    assert tile_seconds(H200, turns, 1) == tile_seconds(H200, tiles, 2) < tile_seconds(H200, tiles, 1)
    last = 1e5 * SMS / H200.l2_bandwidth
    assert busiest(H200, [turns], 1) == pytest.approx(busiest(H200, [tiles], 2) + last)


def test_dependent_rounds_wait():
    once, often = Tiles(1), Tiles(1, rounds=8)
    assert tile_seconds(H200, often, 1) == pytest.approx(8 * tile_seconds(H200, once, 1))
    assert tile_seconds(H200, often, 4) == pytest.approx(2 * FILL)


def test_memory_bounds_a_launch():
    step = Step("copy", Work((Tiles(SMS),), traffic=4e9), resident=8)
    assert predict(H200, [step]).device == pytest.approx(4e9 / H200.bandwidth + LAUNCH_GAP)


def test_launches_add_up_by_name_and_against_the_host():
    tiny, call = product(1, flops=1.0), LibraryCall("torch.mul", 0.0, 8.0)
    many = predict(H200, [tiny] * 100 + [call] * 10)
    assert many.launches == 110
    assert many.host == pytest.approx(100 * HOST_LAUNCH + 10 * HOST_CALL)
    assert many.seconds == many.host > many.device
    assert dict(many.by_name)["product"] == pytest.approx(100 * predict(H200, [tiny]).device)


def test_a_library_product_runs_at_the_machine_rate():
    call = LibraryCall("torch.mm", 7.88e12, 1e9)
    assert predict(H200, [call]).device == pytest.approx(7.88e12 / H200.flops + LAUNCH_GAP)


@pytest.mark.parametrize("resident", [1, 2])
def test_no_prediction_beats_the_roof(resident):
    for tiles in ((Tiles(200, 1e9, 1e6, 1e5),), (Tiles(64, 1e9), Tiles(500, 1e7, 1e5, 1e5))):
        found = predict(H200, [Step("any", Work(tiles, traffic=1e8), resident)])
        assert found.device > found.roof > 0


def test_a_kernel_that_does_not_fit_has_no_time():
    with pytest.raises(ValueError, match="resident must be >= 1 for product to run at all, got 0"):
        predict(H200, [product(1, resident=0)])


def test_float32_products_have_no_tensor_cores():
    call = LibraryCall("torch.bmm", 1e12, 1e6, float32=True)
    found = predict(H200, [call])
    assert found.device == pytest.approx(1e12 / H200.float32_flops + LAUNCH_GAP)
    assert found.device > found.roof == pytest.approx(1e12 / H200.float32_flops)


def test_machines_reach_less_than_their_datasheets():
    assert {m.architecture for m in MACHINES.values()} == {80, 90, 100}
    for machine in MACHINES.values():
        assert machine.flops < machine.peak_flops
        assert machine.bandwidth < machine.peak_bandwidth
        assert machine.float32_flops < machine.flops / 4


def test_every_number_of_a_machine_has_a_source():
    """And what is assumed says so: everything but data sheets and what an H200 was seen to reach."""
    for machine in MACHINES.values():
        numbers = {f.name for f in fields(machine)} - {"name", "device", "architecture", "sources"}
        assert set(machine.sources) == numbers
        assert machine.sources["l2_bandwidth"].startswith("assumed")
        measured = {name for name, text in machine.sources.items() if text.startswith("measured")}
        assert measured == ({"flops", "bandwidth"} if machine is H200 else set())


def test_a_machine_is_found_by_the_driver_s_name():
    assert machine_called("NVIDIA H200") is H200
    assert machine_called("NVIDIA H100 PCIe") is machine_called("cpu") is None
