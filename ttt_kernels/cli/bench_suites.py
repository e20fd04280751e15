"""Named sets of cases with targets for eager. A target is reported, never asserted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ttt_kernels.cli.bench import Results
from ttt_kernels.cli.bench_case import MODES, SHAPES, Case


@dataclass(frozen=True)
class Target:
    """`measured` is None where a row it needs was not timed."""

    text: str
    limit: float
    at_least: bool
    measured: Callable[[Results], float | None]

    def judge(self, results: Results) -> dict[str, object]:
        value = self.measured(results)
        reached = None
        if value is not None:
            reached = value >= self.limit if self.at_least else value <= self.limit
        sign = ">=" if self.at_least else "<="
        wanted = f"{sign} {self.limit:g}"
        return {
            "kind": "target", "target": self.text, "wanted": wanted, "measured": value,
            "reached": reached,
        }  # fmt: skip


@dataclass(frozen=True)
class Suite:
    cases: tuple[Case, ...]
    targets: tuple[Target, ...]


def ratio(above: tuple[str, str, int], below: tuple[str, str, int]) -> Callable:
    """Time of one (impl, mode, chunk size) over that of another."""

    def measured(results: Results) -> float | None:
        a, b = results.find(*above), results.find(*below)
        return None if a is None or b is None else a.milliseconds / b.milliseconds

    return measured


def gemm_share(results: Results) -> float | None:
    row = results.find("eager", "fwd", 1024)
    return None if row is None else row.gemm_share


def most_memory(results: Results) -> float | None:
    return max((r.extra_weights for r in results.rows if r.impl == "eager"), default=None)


def foundation() -> Suite:
    """The released formula against eager where a layer of Qwen3-0.6B reads 8192 tokens."""
    shape, chunks = "qwen3-0.6b", (64, 256, 1024)
    cases = tuple(
        Case("scan", shape, *SHAPES[shape], tokens=8192, chunk_size=c, mode=mode)
        for c in chunks
        for mode in MODES
    )
    wanted = {"fwd": (5.0, 2.5, 1.4), "fwd+bwd": (5.0, 1.8, 1.25)}
    targets = [
        Target("fwd, C = 1024: share of the GEMM rate", 0.85, True, gemm_share),
        Target(
            "fwd: time at C = 64 over time at C = 1024", 1.6, False,
            ratio(("eager", "fwd", 64), ("eager", "fwd", 1024)),
        ),
        *(
            Target(
                f"{mode}, C = {c}: speed-up over the reference", limit, True,
                ratio(("reference", mode, c), ("eager", mode, c)),
            )
            for mode, limits in wanted.items()
            for c, limit in zip(chunks, limits, strict=True)
        ),
        Target("all rows: extra memory, float32 weights", 3.0, False, most_memory),
    ]  # fmt: skip
    return Suite(cases, tuple(targets))


SUITES: dict[str, Callable[[], Suite]] = {"foundation": foundation}
