"""What the command line says instead of a traceback."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """Something the caller can put right: printed as one message, exit code 2."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or name the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = module.split(".")[0]
        raise UserError(
            f"{package} is needed here and not installed: pip install 'ttt_kernels[{extra}]'"
        ) from None
