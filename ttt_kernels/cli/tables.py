"""Tables for the terminal: one look, narrow enough for 80 columns."""

from __future__ import annotations

from collections.abc import Iterable

from ttt_kernels.cli.errors import require


def new_table(columns: Iterable[str], extra: str, left: int = 1):
    """A plain table whose first `left` columns hold words, the others numbers."""
    rich_table, box = require("rich.table", extra), require("rich.box", extra)
    columns = list(columns)
    padding = (0, 1) if len(columns) <= 8 else 0
    table = rich_table.Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding
    )
    for i, name in enumerate(columns):
        words = i < left  # may wrap; a number must not
        table.add_column(name, justify="left" if words else "right", no_wrap=not words)
    return table
