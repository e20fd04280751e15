"""Every implementation stays inside the error budget, and the budget catches what it is there for."""

import pytest
import torch

import ttt_kernels as ttt
from ttt_kernels import testing
from ttt_kernels.testing.contract import RoundTo, emulate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(16, 250), (64, 450), (128, 384)]  # (chunk, tokens): super-chunks, a ragged end, an exact one


def steps_for(kind, batch, tokens, chunk):
    if kind == "number":
        return 0.3
    generator = torch.Generator().manual_seed(5)
    return 0.6 * torch.rand(batch, -(-tokens // chunk), generator=generator)


@pytest.mark.parametrize("impl", ["eager"])
@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("chunk, tokens", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scan_within_budget(dtype, chunk, tokens, preserve, kind, impl):
    data = testing.make_inputs(2, tokens, 48, 160, dtype=dtype, seed=chunk)

    def scan(*args, **options):
        return ttt.fast_weight_scan(*args, impl=impl, **options)

    report = testing.check_scan(
        scan,
        data,
        chunk_size=chunk,
        step_size=steps_for(kind, 2, tokens, chunk),
        preserve_row_norm=preserve,
    )
    assert report.within_budget, report


def test_inputs_exercise_the_write():
    """Drift of tens of percent: a budget on inputs that barely write would prove nothing."""
    data = testing.make_inputs(2, 450, 48, 160)
    exact = testing.exact_scan(data, chunk_size=64, step_size=0.3)
    w0 = data.w0.double()
    drift = (exact["state"] - w0).norm(dim=(1, 2)) / w0.norm()
    assert 0.1 < drift.min() and drift.max() < 1.0


def faulty_scan(fault):
    """A faithful emulation of the contract with one thing wrong."""

    def scan(z, v, w0, *, chunk_size, step_size, preserve_row_norm, return_state):
        stored = z.dtype
        z, v, w0 = z.float(), v.float(), w0.float()
        if fault == "learning rate off by 0.3%":
            step_size = step_size * 1.003
        if fault == "nothing":
            y, state = emulate(z, v, w0, step_size, chunk_size, preserve_row_norm, stored)
            return y.to(stored), state
        weight = previous = w0.expand(len(z), *w0.shape)
        outputs = []
        for a in range(0, z.shape[1], chunk_size):
            keys, values = z[:, a : a + chunk_size], v[:, a : a + chunk_size]
            read = previous if fault == "stale chunk" else weight
            outputs.append(keys @ RoundTo.apply(read, stored).mT)
            if keys.shape[1] < chunk_size and fault != "incomplete chunk written":
                continue
            if fault == "missing last token":
                keys, values = keys[:, :-2], values[:, :-2]
            previous, weight = weight, weight + step_size * (values.mT @ keys)
            if fault == "bfloat16 state":
                weight = RoundTo.apply(weight, torch.bfloat16)
        return torch.cat(outputs, 1).to(stored), weight

    return scan


FAULTS = [
    "stale chunk",
    "bfloat16 state",
    "learning rate off by 0.3%",
    "incomplete chunk written",
    "missing last token",
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_faithful_emulation_passes(dtype):
    data = testing.make_inputs(1, 250, 48, 160, dtype=dtype)
    assert testing.check_scan(faulty_scan("nothing"), data, chunk_size=32, step_size=0.3).within_budget


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_catches(fault, dtype):
    data = testing.make_inputs(1, 250, 48, 160, dtype=dtype)
    report = testing.check_scan(faulty_scan(fault), data, chunk_size=32, step_size=0.3)
    assert report.worst > 1.5, report


@pytest.mark.parametrize("fault", ["stale chunk", "learning rate off by 0.3%", "bfloat16 state"])
def test_loose_tolerances_do_not_catch(fault):
    """Why the budget exists: what passes `allclose(1e-2)` in bfloat16, or a global cosine."""
    data = testing.make_inputs(1, 250, 48, 160, dtype=torch.bfloat16)
    options = {"chunk_size": 32, "step_size": 0.3, "preserve_row_norm": False, "return_state": True}
    wrong, _ = faulty_scan(fault)(data.z, data.v, data.w0, **options)
    exact = testing.exact_scan(data, chunk_size=32, step_size=0.3)["y"]
    cosine = torch.nn.functional.cosine_similarity(wrong.double().flatten(), exact.flatten(), 0)
    assert cosine > 0.99


def test_error_ratio_rejects_what_it_cannot_compare():
    good = torch.ones(1, 4, 2)
    with pytest.raises(ValueError, match=r"actual must be \(1, 4, 2\) in torch.float32, got"):
        testing.error_ratio(good.bfloat16(), good, good.double())
    broken = good.clone()
    broken[0, 0, 0] = float("nan")
    assert testing.error_ratio(broken, good, good.double()) == float("inf")
    assert testing.error_ratio(good, good, good.double()) == 0.0


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("chunk", [4, 16, 64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_scan_has_the_properties(dtype, chunk, preserve):
    broken = testing.violations(
        ttt.fast_weight_scan, dtype=dtype, chunk_size=chunk, preserve_row_norm=preserve
    )
    assert broken == []


def test_violations_finds_what_is_broken():
    """A scan that writes each chunk before it reads it, ragged ones too, and mixes the rows."""

    def acausal(z, v, w0, *, chunk_size, step_size, preserve_row_norm, state, return_state):
        weight = w0.expand(len(z), *w0.shape) if state is None else state
        outputs = []
        for a in range(0, z.shape[1], chunk_size):
            keys, values = z[:, a : a + chunk_size], v[:, a : a + chunk_size]
            weight = weight + step_size * (values.mT @ keys).mean(0)
            outputs.append(keys @ weight.mT)
        return torch.cat(outputs, 1), weight

    broken = testing.violations(acausal)
    for expected in (
        "a batch row depends on the other rows",
        "the first chunk reads more than w0",
        "a token changes an earlier output",
        "an incomplete chunk is written",
    ):
        assert expected in broken
