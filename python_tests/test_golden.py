"""Parity with the released algorithms: stored outputs and every stored gradient, in float64."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from safetensors import safe_open
from torch.nn.functional import silu

import ttt_kernels as ttt

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted([*GOLDEN.glob("ntp_*.safetensors"), *GOLDEN.glob("inplace_*.safetensors")])
PARAMETERS = ("x", "gate", "up", "down", "proj", "conv", "target")
BOUND = 1e-10


def load(path: Path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        settings = {k: json.loads(v) for k, v in file.metadata().items()}
        return {k: file.get_tensor(k) for k in file.keys()}, settings  # noqa: SIM118


def forward(p: dict, settings: dict, impl: str) -> torch.Tensor:
    """A gated MLP whose down-projection is a fast weight, from the public ops alone."""
    chunk, lr = settings["chunk_size"], settings["lr"]
    z = silu(p["x"] @ p["gate"].T) * (p["x"] @ p["up"].T)
    if settings["method"] == "ttt_ntp":
        v = ttt.next_token_target(p["x"], p["proj"], chunk_size=chunk)
    else:
        v = ttt.conv_target(p["target"], p["conv"], p.get("proj"), chunk_size=chunk)
    step = lr
    if settings.get("inner_optimizer") == "specnorm":
        step = ttt.spectral_step_size(z, v, chunk_size=chunk, lr=lr)
    y, _ = ttt.fast_weight_scan(
        z,
        v,
        p["down"],
        chunk_size=chunk,
        step_size=step,
        preserve_row_norm=settings.get("norm_preserve", False),
        impl=impl,
    )
    return y


def test_every_released_variant_is_stored():
    variants = {path.name.rpartition("_B")[0] for path in FILES}
    ntp = {f"ntp_{o}_{n}" for o in ("sgd", "specnorm") for n in ("norm", "plain")}
    assert variants == ntp | {"inplace_proj", "inplace_noproj"}


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_matches_released_outputs_and_gradients(path, impl):
    stored, settings = load(path)
    p = {k: stored[k].clone().requires_grad_() for k in PARAMETERS if k in stored}
    y = forward(p, settings, impl)
    grads = torch.autograd.grad(y, list(p.values()), stored["dy"])
    got = {"y": y.detach()} | {f"d{k}": g for k, g in zip(p, grads, strict=True)}
    expected = {k for k in stored if k == "y" or (k.startswith("d") and k[1:] in stored)}
    assert got.keys() == expected - {"dy"}, "a stored gradient is not compared"
    assert_close(got, {k: stored[k] for k in got}, BOUND)
