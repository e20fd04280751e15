"""How to choose: super-chunk lengths against their own cost model, and implementations."""

import math

import pytest
import torch
from helpers import randn, scan_call

import ttt_kernels as ttt
from ttt_kernels.ops._implementations import choose_implementation
from ttt_kernels.ops.scan import eager
from ttt_kernels.ops.scan.heuristics import BALANCE, super_chunk

SHAPES = [(1024, 3072), (2560, 9728), (4096, 14336), (576, 1536), (16, 24), (7, 5000)]
CHUNKS = [1, 3, 64, 100, 256, 1024, 4096]


def cost(length: int, d: int, f: int, balance: float, chunk: int) -> float:
    """FLOPs per token, as the module documents it."""
    attention = 2 * length * (d + f) if length > chunk else 0
    return 4 * d * f + 8 * d * f * balance / length + attention


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("d, f", SHAPES)
def test_is_a_positive_multiple_of_the_chunk(d, f, chunk, device):
    length = super_chunk(chunk, d, f, device)
    assert isinstance(length, int) and length >= chunk and length % chunk == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("d, f", SHAPES)
def test_is_near_the_brute_force_minimum(d, f, chunk, device):
    """Within 1% of the cheapest multiple of the chunk, where that is more than one chunk. One chunk
    alone has no attention term: there S* itself decides."""
    balance = BALANCE[device]
    length = super_chunk(chunk, d, f, device)
    best = math.sqrt(4 * d * f * balance / (d + f))
    assert abs(length - best) <= chunk / 2 or length == chunk > best
    candidates = range(2 * chunk, max(4 * int(best), 3 * chunk), chunk)
    costs = [cost(s, d, f, balance, chunk) for s in candidates]
    if length > chunk:
        assert cost(length, d, f, balance, chunk) <= 1.01 * min(costs)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("d, f", SHAPES)
def test_best_length_is_a_stationary_point(d, f, device):
    """With chunks of one token the choice is free: no other length is cheaper, bar rounding."""
    balance = BALANCE[device]
    length = super_chunk(1, d, f, device)
    costs = {s: cost(s, d, f, balance, 1) for s in range(2, 20 * length + 100)}
    cheapest = min(costs, key=costs.get)
    assert abs(length - cheapest) <= 1


def test_long_chunks_stand_alone():
    for d, f in SHAPES:
        for device in BALANCE:
            best = math.sqrt(4 * d * f * BALANCE[device] / (d + f))
            chunk = math.ceil(best)
            assert super_chunk(chunk, d, f, device) == chunk
            assert super_chunk(10 * chunk, d, f, device) == 10 * chunk


def test_degenerate_shapes_and_unknown_devices():
    assert super_chunk(8, 0, 7, "cpu") == super_chunk(8, 7, 0, "cpu") == 8
    assert super_chunk(64, 1024, 3072, "xpu") == super_chunk(64, 1024, 3072, "cuda")


def test_recipe_shapes_on_a_cpu():
    """The numbers a reader can check by hand: sqrt(4 D F 9 / (D + F)) = 166 for Qwen3-0.6B."""
    assert super_chunk(64, 1024, 3072, "cpu") == 192
    assert super_chunk(1024, 1024, 3072, "cpu") == 1024
    assert super_chunk(16, 4096, 14336, "cpu") == 16 * 21


def test_the_scan_asks_for_it(monkeypatch):
    """The choice is made with the sizes of the call, once per call."""
    asked = []

    def spy(*sizes):
        asked.append(sizes)
        return sizes[0]

    monkeypatch.setattr(eager, "super_chunk", spy)
    w0 = randn(3, 11)
    ttt.fast_weight_scan(randn(1, 9, 11), randn(1, 9, 3), w0, chunk_size=2)
    assert asked == [(2, 3, 11, "cpu")]


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps"])
def test_auto_means_eager_and_says_why(device):
    name, reason = choose_implementation(device)
    assert name == "eager" and len(reason.split()) > 4
    assert device == "cpu" or device in reason


def test_auto_is_what_it_says(monkeypatch):
    call = scan_call()
    monkeypatch.delenv("TTT_KERNELS_IMPL", raising=False)
    auto, chosen = call(impl="auto"), call(impl=choose_implementation("cpu")[0])
    assert torch.equal(auto[0], chosen[0]) and torch.equal(auto[1], chosen[1])
    monkeypatch.setenv("TTT_KERNELS_IMPL", "reference")
    assert torch.equal(call()[0], call(impl="reference")[0])
    assert torch.equal(call(impl="eager")[0], chosen[0])  # an explicit choice is not overridden
