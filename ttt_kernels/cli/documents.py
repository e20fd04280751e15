"""Tables in documents, and the places between two marks that a command fills."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ttt_kernels.cli.errors import UserError


def markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown_head(columns: Sequence[str]) -> list[str]:
    return [markdown_row(columns), "|" + "---|" * len(columns)]


def marked(text: str, begin: str, end: str, what: str) -> tuple[int, int]:
    """Where the part between two marks starts and stops.

    Raises:
        UserError: `what` does not hold both, in this order, once.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{what} must hold the lines {begin} and {end}, in this order, once")
    return text.index(begin) + len(begin), text.index(end)


def fill(text: str, begin: str, end: str, what: str, new: str) -> str:
    start, stop = marked(text, begin, end, what)
    return f"{text[:start]}\n{new}\n{text[stop:]}"
