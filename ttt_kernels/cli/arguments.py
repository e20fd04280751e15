"""Argument types shared by the subcommands."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return value


def finite_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def flags(names: Iterable[str]) -> str:
    """Arguments as the user writes them, from their names in the parsed ones."""
    return ", ".join("--" + ("T" if name == "tokens" else name.replace("_", "-")) for name in names)
