"""The fast-weight options of the command line, and a model patched as they say."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ttt_kernels as ttt
from ttt_kernels.cli.arguments import finite_float, positive_int
from ttt_kernels.cli.errors import UserError
from ttt_kernels.modules.rule import INNER_OPTIMIZERS, TARGET_SOURCES, TARGETS
from ttt_kernels.patch.config import PROJ_INITS

DEFAULT_CACHE = Path(".cache/ttt_kernels")
DEFAULT_LAYERS = 6
DEFAULTS = {
    "layers": None,
    "chunk_size": 128,
    "lr": 0.3,
    "inner_optimizer": "specnorm",
    "max_norm": None,
    "preserve_row_norm": True,
    "target": "next_token",
    "target_source": "hidden_states",
    "horizon": 1,
    "proj_init": "diag_shared",
}


def add_arguments(group) -> None:
    """Options that are None where not given; `fill_defaults` completes them."""
    group.add_argument("--layers", metavar="I", nargs="+", type=int, help="default: six, evenly spaced")
    group.add_argument("--chunk-size", metavar="C", type=positive_int, help="default: 128")
    group.add_argument("--lr", type=finite_float, help="default: 0.3")
    group.add_argument("--inner-optimizer", choices=INNER_OPTIMIZERS, help="default: specnorm")
    group.add_argument("--max-norm", type=finite_float, help="for --inner-optimizer clip")
    group.add_argument(
        "--preserve-row-norm", action=argparse.BooleanOptionalAction, help="default: on"
    )
    group.add_argument("--target", choices=TARGETS, help="default: next_token")
    group.add_argument("--target-source", choices=TARGET_SOURCES, help="default: hidden_states")
    group.add_argument("--horizon", type=positive_int, help="tokens ahead; default: 1")
    group.add_argument("--proj-init", choices=PROJ_INITS, help="default: diag_shared")


def given(args: argparse.Namespace, names=tuple(DEFAULTS)) -> list[str]:
    """Which of the options `names` the caller has set, as they are written."""
    return ["--" + name.replace("_", "-") for name in names if getattr(args, name) is not None]


def fill_defaults(args: argparse.Namespace) -> None:
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def make_config(args: argparse.Namespace, layer_count: int) -> ttt.TTTConfig:
    """From options that have been completed."""
    options = {name: getattr(args, name) for name in DEFAULTS}
    if options["layers"] is None:
        step = max(1, layer_count // DEFAULT_LAYERS)
        options["layers"] = range(0, layer_count, step)[:DEFAULT_LAYERS]
    options["layers"] = tuple(options["layers"])
    try:
        return ttt.TTTConfig(**options)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def patch(model: torch.nn.Module, config: ttt.TTTConfig):
    try:
        return ttt.patch_model(model, config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the model cannot be patched: {error}") from error
