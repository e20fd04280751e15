"""The only importer of `ttt_kernels._C`, the compiled part of the package.

The package works without it; whoever needs it asks here and gets the module or the reason.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from ttt_kernels import __version__

_NOT_BUILT = (
    "not built: to build it, install ttt_kernels with nvcc on PATH, in CUDACXX or under CUDA_HOME"
)


@cache
def _attempt() -> tuple[ModuleType | None, str | None]:
    """The module and None, or None and why it cannot be used."""
    try:
        module = import_module("ttt_kernels._C")
    except ModuleNotFoundError as error:
        if error.name != "ttt_kernels._C":
            return None, f"cannot be imported: {error}"
        return None, _NOT_BUILT
    except ImportError as error:
        return None, f"cannot be imported: {error}"
    if module.version != __version__:
        return None, f"built for version {module.version}, this is {__version__}: install again"
    return module, None


def load() -> ModuleType:
    """`ttt_kernels._C`.

    Raises:
        ImportError: it was not built, does not load here, or is of another version; says which.
    """
    module, reason = _attempt()
    if module is None:
        raise ImportError(f"ttt_kernels._C: {reason}", name="ttt_kernels._C")
    return module


def available() -> bool:
    return _attempt()[0] is not None


def why_not() -> str | None:
    """Why `load` would raise, or None."""
    return _attempt()[1]
