"""Every refusal: its type, and a message that names argument, expectation and what came."""

import re

import pytest
import torch

import ttt_kernels as ttt
from ttt_kernels import _config
from ttt_kernels.ops import _implementations
from ttt_kernels.types import read_cu_seqlens

B, T, D, F, C = 2, 9, 5, 7, 4
FLOATS = "float32, bfloat16, float16, float64"


def zeros(*shape, **options) -> torch.Tensor:
    return torch.zeros(*shape, **options)


def scan(**changes):
    arguments = {"z": zeros(B, T, F), "v": zeros(B, T, D), "w0": zeros(D, F), "chunk_size": C}
    return ttt.fast_weight_scan(**arguments | changes)


def packed_scan(**changes):
    arguments = {"z": zeros(1, T, F), "v": zeros(1, T, D), "cu_seqlens": bounds(0, 3, 9)}
    return scan(**arguments | changes)


def next_token(**changes):
    return ttt.next_token_target(**{"x": zeros(B, T, D), "proj": None, "chunk_size": C} | changes)


def conv(**changes):
    arguments = {"u": zeros(B, T, D), "conv_weight": zeros(D, 1, 5), "proj": None, "chunk_size": C}
    return ttt.conv_target(**arguments | changes)


def spectral(**changes):
    arguments = {"z": zeros(B, T, F), "v": zeros(B, T, D), "chunk_size": C, "lr": 0.3}
    return ttt.spectral_step_size(**arguments | changes)


def clipped(**changes):
    arguments = {"z": zeros(B, T, F), "v": zeros(B, T, D), "chunk_size": C, "lr": 0.3}
    return ttt.clipped_step_size(**arguments | {"max_norm": 1.0} | changes)


def bounds(*values, dtype=torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def refuses(op, changes: dict, kind: type, message: str) -> None:
    """`message` is the whole text; the arguments are left as they were."""
    tensors = {k: t for k, t in changes.items() if isinstance(t, torch.Tensor)}
    before = {k: t.clone() for k, t in tensors.items()}
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        op(**changes)
    for name, tensor in tensors.items():
        assert tensor._version == 0 and (tensor.is_meta or torch.equal(tensor, before[name]))


DOUBLE, META = {"dtype": torch.float64}, {"device": "meta"}

SCAN = [
    ({"z": [1.0]}, TypeError, "z must be a tensor [B, T, F], got list"),
    ({"v": None}, TypeError, "v must be a tensor [B, T, D], got NoneType"),
    ({"w0": 3}, TypeError, "w0 must be a tensor [D, F], got int"),
    ({"z": zeros(T, F)}, ValueError, "z must have shape [B, T, F], got (9, 7)"),
    ({"v": zeros(B, T, D, 1)}, ValueError, "v must have shape [B, T, D], got (2, 9, 5, 1)"),
    ({"w0": zeros(D)}, ValueError, "w0 must have shape [D, F], got (5,)"),
    (
        {"z": zeros(B, T, F, dtype=torch.int64)},
        TypeError,
        f"z must be one of {FLOATS}, got int64",
    ),
    (
        {"w0": zeros(F, D)},
        ValueError,
        "w0 must have shape [D, F] = (D, 7) to match z, got (7, 5)",
    ),
    ({"w0": zeros(D, F, **DOUBLE)}, TypeError,
     "w0 must have the dtype of z, float32, got float64"),
    ({"w0": zeros(D, F, **META)}, ValueError, "w0 must be on the device of z, cpu, got meta"),
    (
        {"v": zeros(B, T, F)},
        ValueError,
        "v must have shape [B, T, D] = (2, 9, 5) to match z and w0, got (2, 9, 7)",
    ),
    (
        {"v": zeros(B, T - 1, D)},
        ValueError,
        "v must have shape [B, T, D] = (2, 9, 5) to match z and w0, got (2, 8, 5)",
    ),
    (
        {"v": zeros(B, T, D, dtype=torch.bfloat16)},
        TypeError,
        "v must have the dtype of z and w0, float32, got bfloat16",
    ),
    ({"v": zeros(B, T, D, **META)}, ValueError,
     "v must be on the device of z and w0, cpu, got meta"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1, got 0"),
    ({"chunk_size": -3}, ValueError, "chunk_size must be >= 1, got -3"),
    ({"chunk_size": 4.0}, TypeError, "chunk_size must be an int >= 1, got float"),
    ({"chunk_size": True}, TypeError, "chunk_size must be an int >= 1, got bool"),
    ({"step_size": "0.3"}, TypeError, "step_size must be a number, got str"),
    ({"step_size": None}, TypeError, "step_size must be a number, got NoneType"),
    ({"step_size": float("nan")}, ValueError, "step_size must be finite, got nan"),
    ({"step_size": float("inf")}, ValueError, "step_size must be finite, got inf"),
    ({"step_size": zeros(3)}, ValueError, "step_size must have shape [B, NC], got (3,)"),
    (
        {"step_size": zeros(B, 2)},
        ValueError,
        "step_size must have shape [B, NC] = (2, 3) to match z and chunk_size, got (2, 2)",
    ),
    (
        {"step_size": zeros(1, 3)},
        ValueError,
        "step_size must have shape [B, NC] = (2, 3) to match z and chunk_size, got (1, 3)",
    ),
    (
        {"step_size": zeros(B, 3, **DOUBLE)},
        TypeError,
        "step_size must be float32 for z in float32, got float64",
    ),
    ({"step_size": zeros(B, 3, **META)}, ValueError,
     "step_size must be on the device of z, cpu, got meta"),
    ({"state": 0.0}, TypeError, "state must be a tensor [B, D, F], got float"),
    ({"state": zeros(D, F)}, ValueError, "state must have shape [B, D, F], got (5, 7)"),
    (
        {"state": zeros(1, D, F)},
        ValueError,
        "state must have shape [B, D, F] = (2, 5, 7) to match z and w0, got (1, 5, 7)",
    ),
    (
        {"state": zeros(B, D, F, dtype=torch.bfloat16)},
        TypeError,
        "state must be float32 for z in float32, got bfloat16",
    ),
    ({"state": zeros(B, D, F, **META)}, ValueError,
     "state must be on the device of z, cpu, got meta"),
    ({"cu_seqlens": bounds(0, 9)}, ValueError,
     "cu_seqlens needs a packed batch of one row (B = 1), got B = 2"),
    (
        {"impl": "fast"},
        ValueError,
        "impl must be one of auto, reference, eager, triton, cuda, got 'fast'",
    ),
    ({"impl": None}, ValueError,
     "impl must be one of auto, reference, eager, triton, cuda, got None"),
]  # fmt: skip


@pytest.mark.parametrize("changes, kind, message", SCAN, ids=[m for _, _, m in SCAN])
def test_scan(changes, kind, message):
    refuses(scan, changes, kind, message)


PACKED = [
    ({"cu_seqlens": [0, 9]}, TypeError, "cu_seqlens must be a tensor [S + 1], got list"),
    ({"cu_seqlens": zeros(2, 2)}, ValueError, "cu_seqlens must have shape [S + 1], got (2, 2)"),
    ({"cu_seqlens": zeros(2)}, TypeError, "cu_seqlens must be int32 or int64, got float32"),
    ({"cu_seqlens": bounds()}, ValueError,
     "cu_seqlens must have at least one entry, got an empty tensor"),
    ({"cu_seqlens": bounds(1, 9)}, ValueError,
     "cu_seqlens must start at 0 and end at T = 9, got 1 .. 9"),
    ({"cu_seqlens": bounds(0, 8)}, ValueError,
     "cu_seqlens must start at 0 and end at T = 9, got 0 .. 8"),
    ({"cu_seqlens": bounds(0)}, ValueError,
     "cu_seqlens must start at 0 and end at T = 9, got 0 .. 0"),
    (
        {"cu_seqlens": bounds(0, 5, 4, 9, dtype=torch.int32)},
        ValueError,
        "cu_seqlens must not decrease, got cu_seqlens[1] = 5 > cu_seqlens[2] = 4",
    ),
    (
        {"state": zeros(1, D, F)},
        ValueError,
        "state must have shape [S, D, F] = (2, 5, 7) to match z and w0, got (1, 5, 7)",
    ),
    (
        {"step_size": zeros(1, 4)},
        ValueError,
        "step_size must have shape [1, NC] = (1, 3) to match cu_seqlens and chunk_size, got (1, 4)",
    ),
    (
        {"step_size": zeros(2, 3)},
        ValueError,
        "step_size must have shape [1, NC] = (1, 3) to match cu_seqlens and chunk_size, got (2, 3)",
    ),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("changes, kind, message", PACKED, ids=[m for _, _, m in PACKED])
def test_packed_scan(changes, kind, message, impl):
    refuses(packed_scan, {**changes, "impl": impl}, kind, message)


@pytest.mark.parametrize("op", [next_token, conv, spectral, clipped])
@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1, got 0"),
        ({"chunk_size": "4"}, TypeError, "chunk_size must be an int >= 1, got str"),
        *[(c, k, m) for c, k, m in PACKED if c.keys() == {"cu_seqlens"}],
    ],
)
def test_chunks_and_packing_of_the_other_ops(op, changes, kind, message):
    if "cu_seqlens" in changes:
        refuses(op, {"cu_seqlens": bounds(0, 9)}, ValueError,
                "cu_seqlens needs a packed batch of one row (B = 1), got B = 2")  # fmt: skip
        one_row = {
            next_token: {"x": zeros(1, T, D)},
            conv: {"u": zeros(1, T, D)},
        }.get(op, {"z": zeros(1, T, F), "v": zeros(1, T, D)})
        changes = one_row | changes
    refuses(op, changes, kind, message)


TARGETS = [
    (next_token, {"x": 1}, TypeError, "x must be a tensor [B, T, D], got int"),
    (next_token, {"x": zeros(T, D)}, ValueError, "x must have shape [B, T, D], got (9, 5)"),
    (next_token, {"x": zeros(B, T, D, dtype=torch.bool)}, TypeError,
     f"x must be one of {FLOATS}, got bool"),
    (next_token, {"proj": [1]}, TypeError, "proj must be a tensor [D, D], got list"),
    (next_token, {"proj": zeros(D)}, ValueError, "proj must have shape [D, D], got (5,)"),
    (next_token, {"proj": zeros(D, F)}, ValueError,
     "proj must have shape [D, D] = (5, 5) to match x, got (5, 7)"),
    (next_token, {"proj": zeros(D, D, **DOUBLE)}, TypeError,
     "proj must have the dtype of x, float32, got float64"),
    (next_token, {"proj": zeros(D, D, **META)}, ValueError,
     "proj must be on the device of x, cpu, got meta"),
    (next_token, {"horizon": 0}, ValueError, "horizon must be >= 1, got 0"),
    (next_token, {"horizon": 1.5}, TypeError, "horizon must be an int >= 1, got float"),
    (conv, {"u": "u"}, TypeError, "u must be a tensor [B, T, D], got str"),
    (conv, {"u": zeros(B, T, D, dtype=torch.int32)}, TypeError,
     f"u must be one of {FLOATS}, got int32"),
    (conv, {"conv_weight": None}, TypeError,
     "conv_weight must be a tensor [D, 1, KW], got NoneType"),
    (conv, {"conv_weight": zeros(D, 5)}, ValueError,
     "conv_weight must have shape [D, 1, KW], got (5, 5)"),
    (conv, {"conv_weight": zeros(D, 2, 5)}, ValueError,
     "conv_weight must have shape [D, 1, KW] = (5, 1, 5) to match u, got (5, 2, 5)"),
    (conv, {"conv_weight": zeros(D, 1, 4)}, ValueError,
     "conv_weight must have an odd number of taps KW, got 4"),
    (conv, {"conv_weight": zeros(D, 1, 0)}, ValueError,
     "conv_weight must have an odd number of taps KW, got 0"),
    (conv, {"conv_weight": zeros(D, 1, 5, **DOUBLE)}, TypeError,
     "conv_weight must have the dtype of u, float32, got float64"),
    (conv, {"proj": zeros(F, D)}, ValueError,
     "proj must have shape [D, D] = (5, 5) to match u, got (7, 5)"),
]  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("op, changes, kind, message", TARGETS, ids=[m for *_, m in TARGETS])
def test_targets(op, changes, kind, message, autocast):
    if autocast and "float64" in message and "dtype of" in message:
        message = message.replace("float32, got", "bfloat16, got")  # float64 is never cast
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        refuses(op, changes, kind, message)


STEPS = [
    ({"z": None}, TypeError, "z must be a tensor [B, T, F], got NoneType"),
    ({"v": zeros(B, T)}, ValueError, "v must have shape [B, T, D], got (2, 9)"),
    ({"v": zeros(1, T, D)}, ValueError,
     "v must have shape [B, T, D] = (2, 9, 5) to match z, got (1, 9, 5)"),
    ({"z": zeros(B, T, F, dtype=torch.complex64)}, TypeError,
     f"z must be one of {FLOATS}, got complex64"),
    ({"v": zeros(B, T, D, dtype=torch.float16)}, TypeError,
     "v must have the dtype of z, float32, got float16"),
    ({"lr": "0.3"}, TypeError, "lr must be a number, got str"),
    ({"lr": zeros(())}, TypeError, "lr must be a number, got Tensor"),
    ({"lr": float("-inf")}, ValueError, "lr must be finite, got -inf"),
]  # fmt: skip


@pytest.mark.parametrize("op", [spectral, clipped])
@pytest.mark.parametrize("changes, kind, message", STEPS, ids=[m for _, _, m in STEPS])
def test_step_sizes(op, changes, kind, message):
    refuses(op, changes, kind, message)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_max_norm(value):
    refuses(clipped, {"max_norm": value}, ValueError,
            f"max_norm must be positive and finite, got {value}")  # fmt: skip
    refuses(clipped, {"max_norm": None}, TypeError, "max_norm must be a number, got NoneType")


def test_iterations():
    refuses(spectral, {"iterations": 0}, ValueError, "iterations must be >= 1, got 0")
    refuses(spectral, {"iterations": 5.0}, TypeError, "iterations must be an int >= 1, got float")


REASONS = {
    "triton": "impl='triton' cannot run fast_weight_scan here: triton is not installed",
    "cuda": "impl='cuda' cannot run fast_weight_scan here: its kernels take bfloat16 and float16, "
    "not float32",
}


@pytest.mark.parametrize("impl", REASONS)
def test_implementations_that_cannot_run_say_why(impl, monkeypatch):
    """Chosen by argument or by environment: no silent fallback."""
    monkeypatch.setattr(_implementations, "find_spec", lambda name: None)
    message = REASONS[impl]
    refuses(scan, {"impl": impl}, NotImplementedError, message)
    monkeypatch.setenv("TTT_KERNELS_IMPL", impl)
    refuses(scan, {}, NotImplementedError, message)
    scan(impl="eager")


def test_environment_knob(monkeypatch):
    monkeypatch.delenv("TTT_KERNELS_IMPL", raising=False)
    assert _config.default_implementation() == "auto"
    monkeypatch.setenv("TTT_KERNELS_IMPL", "fast")
    refuses(scan, {}, ValueError,
            "TTT_KERNELS_IMPL must be one of auto, reference, eager, triton, cuda, got 'fast'"
            )  # fmt: skip


@pytest.mark.parametrize("dtype, state", [(torch.float64, "float64"), (torch.bfloat16, "float32")])
def test_state_and_steps_follow_the_operands(dtype, state):
    name = str(dtype).removeprefix("torch.")
    wrong = torch.float32 if state == "float64" else torch.float64
    operands = {
        "z": zeros(B, T, F, dtype=dtype),
        "v": zeros(B, T, D, dtype=dtype),
        "w0": zeros(D, F, dtype=dtype),
    }
    got = str(wrong).removeprefix("torch.")
    for key, shape in (("state", (B, D, F)), ("step_size", (B, 3))):
        refuses(scan, {**operands, key: zeros(*shape, dtype=wrong)}, TypeError,
                f"{key} must be {state} for z in {name}, got {got}")  # fmt: skip


def test_a_refused_call_writes_nothing():
    """The error comes before the first write, even where it depends on values."""
    state = torch.ones(2, D, F)
    arguments = {"state": state, "step_size": torch.ones(1, 9), "cu_seqlens": bounds(0, 3, 9)}
    for impl in ("eager", "reference"):
        with pytest.raises(ValueError, match="step_size"):
            packed_scan(**arguments, impl=impl)
    assert state._version == 0 and torch.equal(state, torch.ones(2, D, F))


def test_boundaries_are_returned_as_checked():
    assert read_cu_seqlens(bounds(0, 0, 4, 9), 9) == [0, 0, 4, 9]


def test_good_neighbours_of_bad_input():
    """What looks odd and is right: the refusals above do not reach too far."""
    scan(z=zeros(0, T, F), v=zeros(0, T, D))
    scan(z=zeros(B, 0, F), v=zeros(B, 0, D), step_size=zeros(B, 0))
    scan(step_size=-1, chunk_size=10**12)
    packed_scan(cu_seqlens=bounds(0, 0, 9, 9, dtype=torch.int32))
    assert next_token(horizon=10**12).shape == (B, T, D)
    conv(conv_weight=zeros(D, 1, 99))
    spectral(lr=0, iterations=1)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_switches_are_booleans(value):
    operands = {"z": zeros(B, T, F), "v": zeros(B, T, D)}
    for name in ("preserve_row_norm", "return_state"):
        refuses(scan, {**operands, name: value}, TypeError, f"{name} must be True or False, got {value!r}")
