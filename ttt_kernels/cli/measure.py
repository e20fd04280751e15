"""Time, memory and machine: what a number needs beside it to be a result."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS = 7, 101  # where the caller does not say how many
ROUNDS_SECONDS = 4.0  # more than the fewest rounds as long as they take no longer than this
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # where Linux describes them
UNKNOWN_CACHE = 1 << 26
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

    def ratio_to(self, other: Timing) -> float:
        """Median of the ratios of each round: noise that lasts a round hits both of its sides."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def time_interleaved(
    calls: Mapping[object, Callable[[], object]],
    repeats: int | None,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
    *,
    shuffle: random.Random | None = None,
    sparse: Collection[object] = (),
) -> dict[object, Timing]:
    """Every call once per round, round after round, so that a machine that slows down slows all of them.

    What a call returns is freed after its clock has stopped. `repeats`: rounds; None = as many as fit into
    some seconds. `shuffle`: a new order in every round (else A B C A B C ...), so that none always
    follows the same other. `sparse`: names that need fewer rounds, the first four and every eighth.
    """
    timings = {name: Timing() for name in calls}
    timed = gpu_timer(device) if device.type == "cuda" else cpu_timed
    for n in rounds(repeats):
        names = [name for name in calls if name not in sparse or n < 4 or n % 8 == 0]
        if shuffle is not None:
            shuffle.shuffle(names)
        for name in names:
            timings[name].seconds.append(timed(calls[name]))
            tick()
    return timings


def rounds(repeats: int | None) -> Iterator[int]:
    """0, 1, ... `repeats` - 1; with None until the time is used up."""
    if repeats is not None:
        yield from range(repeats)
        return
    start = time.perf_counter()
    for n in range(MAX_ROUNDS):
        if n >= MIN_ROUNDS and time.perf_counter() - start > ROUNDS_SECONDS:
            return
        yield n


def cpu_timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def gpu_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Seconds between two events around a call, with a cold L2 cache: a buffer twice its size is
    overwritten before, which also gives the host time to queue the call's launches."""
    cold = torch.empty(2 * cache_bytes(device), dtype=torch.int8, device=device)

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


def cache_bytes(device: torch.device) -> int:
    """The largest cache between the cores and the memory, as the machine reports it."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", UNKNOWN_CACHE)
    units = {"K": 1 << 10, "M": 1 << 20}
    try:
        found = [path.read_text().strip() for path in CPU_CACHES.glob("index*/size")]
    except OSError:
        found = []
    return max((int(size[:-1]) * units[size[-1]] for size in found), default=UNKNOWN_CACHE)


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
        "cache_bytes": cache_bytes(device),
        "load_before": os.getloadavg()[0],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
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
