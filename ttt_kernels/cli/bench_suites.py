"""Named sets of cases with targets. A target is reported, never asserted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ttt_kernels.cli.bench import Results
from ttt_kernels.cli.bench_baselines import COMPILED, PLAIN, REFERENCE
from ttt_kernels.cli.bench_case import MODES, PREFILL, SHAPES, Case


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
    """`impls`: those of the suite; None = all that can run."""

    cases: tuple[Case, ...]
    targets: tuple[Target, ...] = ()
    device: str = "cpu"
    impls: tuple[str, ...] | None = None


def ratio(above: tuple[str, str, int], below: tuple[str, str, int], **case: object) -> Callable:
    """Time of one (impl, mode, chunk size) over that of another; `case` are fields of both cases."""

    def measured(results: Results) -> float | None:
        a, b = results.find(*above, **case), results.find(*below, **case)
        return None if a is None or b is None else a.milliseconds / b.milliseconds

    return measured


def share(impl: str, mode: str, chunk_size: int, kind: str = "gemm_share", **case: object) -> Callable:
    """Share of a ceiling that a row reaches."""

    def measured(results: Results) -> float | None:
        row = results.find(impl, mode, chunk_size, **case)
        return None if row is None else getattr(row, kind)

    return measured


def most_memory(impl: str) -> Callable:
    def measured(results: Results) -> float | None:
        rows = (r for r in results.rows if r.impl == impl and r.case.op == "scan")
        return max((r.extra_weights for r in rows), default=None)

    return measured


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
        Target("fwd, C = 1024: share of the GEMM rate", 0.85, True, share("eager", "fwd", 1024)),
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
        Target("all rows: extra memory, float32 weights", 3.0, False, most_memory("eager")),
    ]  # fmt: skip
    return Suite(cases, tuple(targets))


def triton() -> Suite:
    """The fused kernels on a large GPU: one layer of each released shape reads 32768 tokens."""
    shapes = {"llama-3.1-8b": 0.80, "qwen3-4b": 0.75, "qwen3-0.6b": 0.60}
    common = {"dtype": "bfloat16", "device": "cuda"}
    scans = [
        Case("scan", shape, *SHAPES[shape], tokens=32768, chunk_size=c, mode=mode, **common)
        for shape in shapes
        for c in (1024, 64)
        for mode in MODES
    ]
    big, batches = "llama-3.1-8b", (1, 8, 64)
    decode = [
        Case("fast_weight_apply", big, *SHAPES[big], tokens=1, chunk_size=1, batch=b, **common)
        for b in batches
    ]
    fused = ("triton", "fwd", 1024)
    targets = [
        *(
            Target(f"{shape}, fwd, C = 1024: share of the GEMM rate", limit, True,
                   share(*fused, shape=shape))
            for shape, limit in shapes.items()
        ),
        *(
            Target(f"{shape}, fwd: time at C = 64 over time at C = 1024", 1.2, False,
                   ratio(("triton", "fwd", 64), fused, shape=shape))
            for shape in shapes
        ),
        *(
            Target(f"{shape}, fwd+bwd, C = 1024: share of the GEMM rate", 0.65, True,
                   share("triton", "fwd+bwd", 1024, shape=shape))
            for shape in shapes
        ),
        Target("scan, all rows: extra memory, float32 weights", 3.0, False, most_memory("triton")),
        *(
            Target(f"{shape}, {mode}, C = 1024: speed-up over the reference", limit, True,
                   ratio(("reference", mode, 1024), ("triton", mode, 1024), shape=shape))
            for shape in shapes
            for mode, limit in {"fwd": 2.0, "fwd+bwd": 3.0}.items()
        ),
        *(
            Target(f"decode apply, {b} requests: share of the copy rate", 0.85, True,
                   share("triton", "fwd", 1, "copy_share", op="fast_weight_apply", batch=b))
            for b in batches
        ),
    ]  # fmt: skip
    return Suite((*scans, *decode), tuple(targets), "cuda")


@dataclass(frozen=True)
class Sweep:
    """How the cost of the scan grows: from `base`, one thing at a time. Rows of an axis are those that
    differ from `base` in it alone."""

    base: Case
    tokens: tuple[int, ...]
    chunk_sizes: tuple[int, ...]
    batches: tuple[int, ...]
    shapes: dict[str, tuple[int, int]]  # (D, F)

    def axes(self) -> dict[str, tuple[Case, ...]]:
        """By axis: "T", "C", "B" and "D x F", in order, forward."""
        return {
            "T": tuple(replace(self.base, tokens=t) for t in self.tokens),
            "C": tuple(replace(self.base, chunk_size=c) for c in self.chunk_sizes),
            "B": tuple(replace(self.base, batch=b) for b in self.batches),
            "D x F": tuple(replace(self.base, shape=n, d=d, f=f) for n, (d, f) in self.shapes.items()),
        }

    def cases(self) -> tuple[Case, ...]:
        """Those of all axes, in all modes that train."""
        forward = dict.fromkeys(case for axis in self.axes().values() for case in axis)
        return tuple(replace(case, mode=mode) for case in forward for mode in MODES)


def by_size(*sizes: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {f"{d}x{f}": (d, f) for d, f in sizes}


SWEEPS = {
    "cpu": Sweep(
        Case("scan", "512x1536", 512, 1536, tokens=2048, chunk_size=256),
        tokens=(512, 1024, 2048, 4096),
        chunk_sizes=(32, 64, 128, 256, 512, 1024, 2048),
        batches=(1, 2, 4),
        shapes={**by_size((256, 768), (512, 1536), (768, 2304)), "qwen3-0.6b": SHAPES["qwen3-0.6b"]},
    ),
    "cuda": Sweep(
        Case("scan", "qwen3-4b", *SHAPES["qwen3-4b"], tokens=32768, chunk_size=1024, dtype="bfloat16",
             device="cuda"),
        tokens=(4096, 8192, 16384, 32768, 65536),
        chunk_sizes=(64, 128, 256, 512, 1024, 2048, 4096),
        batches=(1, 2, 4),
        shapes={name: SHAPES[name] for name in ("qwen3-0.6b", "qwen3-4b", "llama-3.1-8b")},
    ),
}  # fmt: skip


def sweep(device: str = "cpu") -> Suite:
    """Time and memory of the scan against T, C, B and D x F. On a GPU the released formula is not compiled,
    which would take longer than everything else."""
    kernels = (COMPILED,) if device == "cpu" else ("triton", "cuda")
    return Suite(SWEEPS[device].cases(), device=device, impls=(REFERENCE, *kernels, "eager", PLAIN))


def cpu() -> Suite:
    """Everything that a CPU measures within minutes: every operation at the Qwen3-0.6B shape, then the
    sweeps of the scan."""
    shape = "qwen3-0.6b"

    def case(op: str, tokens: int, chunk_size: int, **more: object) -> Case:
        return Case(op, shape, *SHAPES[shape], tokens=tokens, chunk_size=chunk_size, **more)

    scans = [case("scan", 2048, c, mode=mode) for c in (64, 256, 1024) for mode in MODES]
    prefill = case("scan", 2048, 256, mode=PREFILL)
    others = [
        case(*row, mode=mode, **more)
        for mode in MODES
        for *row, more in (
            ("scan", 2048, 256, {"dtype": "bfloat16"}),
            ("scan", 2048, 256, {"preserve_row_norm": True}),
            ("next_token_target", 2048, 256, {}),
            ("conv_target", 2048, 256, {}),
            ("spectral_step_size", 1024, 256, {}),
            ("clipped_step_size", 1024, 256, {}),
        )
    ]
    decode = [
        case(*row, batch=batch)
        for row in (("fast_weight_apply", 1, 1), ("fast_weight_update_", 256, 256))
        for batch in (1, 8)
    ]
    ridge = [case("ridge_write", t, t) for t in (1024, 2049, 4096)]  # fewer pairs than F, and more
    cases = (*scans, prefill, *others, *decode, *ridge, *SWEEPS["cpu"].cases())
    return Suite(tuple(dict.fromkeys(cases)))


SUITES: dict[str, Callable[..., Suite]] = {
    "cpu": cpu, "sweep": sweep, "foundation": foundation, "triton": triton,
}  # fmt: skip
