"""Time, memory and machine: what a number needs beside it to be a result."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

BUSY = 0.7  # processes that wanted a core during the last minute, before this one started


@dataclass
class Timing:
    """Seconds of repeated calls; the spread is the 20th to the 80th percentile."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, percent: float) -> float:
        """Linear interpolation between the two nearest ranks."""
        ordered = sorted(self.seconds)
        rank = (len(ordered) - 1) * percent / 100
        low = int(rank)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def time_interleaved(
    calls: Mapping[object, Callable[[], object]],
    repeats: int,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> dict[object, Timing]:
    """Every call once per round, round after round (A B C A B C ...), so that a machine that slows
    down slows all of them. What a call returns is freed after its clock has stopped."""
    timings = {name: Timing() for name in calls}
    timed = gpu_timer(device) if device.type == "cuda" else cpu_timed
    for _ in range(repeats):
        for name, call in calls.items():
            timings[name].seconds.append(timed(call))
            tick()
    return timings


def cpu_timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def gpu_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Seconds between two events around a call, with a cold L2 cache: a buffer twice its size is
    overwritten before, which also gives the host time to queue the call's launches."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 1 << 26)
    cold = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def timed(call: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        cold.zero_()
        start.record()
        result = call()
        stop.record()
        torch.cuda.synchronize(device)
        del result
        return start.elapsed_time(stop) / 1e3

    return timed


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that `call` holds beyond what existed before it and the tensors it returns.

    Exact: on a CPU the sum of the allocator's own events, read through torch's profiler; on a GPU
    the caching allocator's peak. Scratch memory inside a BLAS library is not torch's and not seen.
    `call` must not free tensors that existed before it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        peak, result = cpu_peak(call)
    return max(0, peak - storage_bytes(tensors_in(result)))


def cpu_peak(call: Callable[[], object]) -> tuple[int, object]:
    """Highest running sum of the CPU allocator's events during `call`, and what it returned."""
    os.putenv("KINETO_LOG_LEVEL", "6")  # else the profiler writes its own progress to stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            live += event.nbytes()
            peak = max(peak, live)
    return peak, result


def tensors_in(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, or None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    entry = fields.get("MemAvailable")
    return None if entry is None else int(entry.split()[0]) * 1024


def environment(device: torch.device) -> dict[str, object]:
    """Hardware and versions, for every table, JSON file and picture. Call it before measuring."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def machine(environment: Mapping[str, object]) -> str:
    """The environment in one line."""
    threads = environment["threads"]
    plural = "" if threads == 1 else "s"
    return f"{environment['device']}, {threads} thread{plural}, torch {environment['torch']}"


def busy_warning(environment: Mapping[str, object]) -> str | None:
    """Threads of one product wait for each other: one busy neighbour can cost a factor of ten."""
    load = environment["load_before"]
    if load < BUSY:
        return None
    return f"load average {load:.1f} before the start: on a busy machine no time can be trusted"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's marketing name; its family and model where a hypervisor blanks that out."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name
