"""The JSON lines that `bench --output` writes while it measures; their fields stand in docs/benchmarks.md."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

Record = Mapping[str, object]


class JsonLines:
    """A context in which lines are added as they are measured; the environment is the first.

    They go into FILE.<process>.partial, which takes the place of FILE at the end: a run that ends early keeps
    its lines there, an older FILE stays as it was, and two runs do not mix.

    Args:
        path: FILE, or None to write nothing.
        environment: of `measure.environment`, and what else holds for all lines.
    """

    def __init__(self, path: Path | None, environment: Record) -> None:
        self.path, self.environment = path and path.resolve(), environment
        self.partial = path and self.path.with_name(f"{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> JsonLines:
        if self.partial is not None:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.write_text("", encoding="utf-8")
            self.add([{"kind": "environment", **self.environment}])
        return self

    def add(self, records: Iterable[Record]) -> None:
        """Written when this returns."""
        if self.partial is not None:
            with self.partial.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.partial is None:
            return
        if kind is None:
            os.replace(self.partial, self.path)
        else:
            print(f"ttt_kernels: what was measured until then is in {self.partial}", file=sys.stderr)
