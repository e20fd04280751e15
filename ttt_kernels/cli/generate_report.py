"""The record of one generation, as a small table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from ttt_kernels.cli.measure import machine
from ttt_kernels.cli.tables import new_table

EXTRA = "demo"


def print_record(record: dict, console) -> None:
    for mark, why in record["marks"].items():
        console.print(f"{mark}: {why}", style="bold yellow", highlight=False)
    console.print(f"\n[bold]{record['model']['name']}[/], method {record['method']}", highlight=False)
    console.print(machine(record["environment"]), highlight=False)
    table = new_table(("", "tokens", "tokens/s", "seconds"), EXTRA)
    prefill = [record[f"prefill_{name}"] for name in ("tokens_per_second", "seconds")]
    decode = [record[f"decode_{name}"] for name in ("tokens_per_second", "seconds")]
    table.add_row("prompt", str(record["prompt_tokens"]), *map(number, prefill))
    table.add_row("new", str(record["new_tokens"]), *map(number, decode))
    console.print(table)
    writes, refused = (sum(record[name].values()) for name in ("writes", "refused"))
    console.print(
        f"state {record['state_bytes'] / 2**20:.1f} MiB ({record['state_bytes']:,} bytes); "
        f"{writes} writes in {len(record['writes'])} layers, {refused} refused",
        highlight=False,
    )


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def write_json(path: Path, record: dict) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
