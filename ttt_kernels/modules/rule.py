"""`WriteRule`: how one layer writes its fast weight. Plain data, checked on creation."""

from __future__ import annotations

import math
from dataclasses import dataclass

CONV_TAPS = 5
INNER_OPTIMIZERS = ("sgd", "specnorm", "clip")
TARGETS = ("next_token", "conv")
TARGET_SOURCES = ("hidden_states", "input_embed")


@dataclass(frozen=True, kw_only=True)
class WriteRule:
    """How a fast weight is written after each complete chunk: `W += s * sum_t v_t z_t^T`.

    Args:
        chunk_size: tokens per chunk, C.
        lr: inner learning rate, > 0.
        inner_optimizer: the step size s. "sgd": lr. "specnorm": lr / (spectral norm of the chunk's
            gradient). "clip": lr * min(1, max_norm / (its Frobenius norm)).
        max_norm: the bound of "clip", > 0; None with the others.
        preserve_row_norm: scale each row of the applied weight to the norm of the slow one.
        target: what token t writes. "next_token" (TTT-NTP): P^T u_{t + horizon}. "conv" (In-Place
            TTT): a depthwise convolution of u over 5 tokens, then P.
        target_source: u. "hidden_states": the MLP's input. "input_embed": the token embeddings.
        horizon: how many tokens ahead "next_token" looks; 1 with "conv".
        use_proj: whether P exists (False: the identity, and no parameter).

    Raises:
        TypeError, ValueError: a field of the wrong type or value, or fields that contradict.

    Source: TTT-NTP (arXiv 2606.21803), In-Place TTT (arXiv 2604.06169).
    """

    chunk_size: int
    lr: float
    inner_optimizer: str = "sgd"
    max_norm: float | None = None
    preserve_row_norm: bool = False
    target: str = "next_token"
    target_source: str = "hidden_states"
    horizon: int = 1
    use_proj: bool = True

    def __post_init__(self) -> None:
        require_int("chunk_size", self.chunk_size)
        require_int("horizon", self.horizon)
        require_choice("inner_optimizer", self.inner_optimizer, INNER_OPTIMIZERS)
        require_choice("target", self.target, TARGETS)
        require_choice("target_source", self.target_source, TARGET_SOURCES)
        require_bool("preserve_row_norm", self.preserve_row_norm)
        require_bool("use_proj", self.use_proj)
        object.__setattr__(self, "lr", require_positive("lr", self.lr))
        self._check_clip()
        self._check_window()

    def _check_clip(self) -> None:
        if self.inner_optimizer == "clip":
            if self.max_norm is None:
                raise ValueError('max_norm must be given with inner_optimizer="clip", got None')
            object.__setattr__(self, "max_norm", require_positive("max_norm", self.max_norm))
        elif self.max_norm is not None:
            raise ValueError(
                f'max_norm needs inner_optimizer="clip" and must be None with '
                f'"{self.inner_optimizer}", got {self.max_norm}'
            )

    def _check_window(self) -> None:
        if self.target == "conv":
            if self.horizon != 1:
                raise ValueError(
                    f'horizon needs target="next_token" and must be 1 with "conv", '
                    f"got {self.horizon}"
                )
            if self.chunk_size < CONV_TAPS:
                raise ValueError(
                    f'chunk_size must be >= {CONV_TAPS}, the convolution window of target="conv", '
                    f"got {self.chunk_size}"
                )
        elif self.chunk_size <= self.horizon:
            raise ValueError(
                f"chunk_size must be > horizon = {self.horizon}, or nothing is ever written, "
                f"got {self.chunk_size}"
            )


def require_int(name: str, value: object, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
    return value


def require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def require_positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number > 0, got {value!r}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    return float(value)
