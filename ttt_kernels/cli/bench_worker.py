"""One side of `bench --base`: a process that imports the package from a given folder and runs its ops.

`python bench_worker.py ROOT`; then one JSON request a line on the standard input and one answer a line on
the standard output. Both sides run this very file, from the current tree, so that crossing the process
boundary costs both alike; clocks are read in here. Of the package under ROOT only the public functions are
used. Tensors travel through files.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

NAMES = {"scan": "fast_weight_scan"}  # where the benchmark's name of an op is not the public one
MOST_COPIES = 64  # enough for one weight of a released model in any cache so far
TURN_SECONDS = 0.02  # a turn lasts at least this long; its time is the median of its calls


def load_meter():
    """The current tree's stopwatch, by its file: `ttt_kernels` may be another tree here."""
    spec = importlib.util.spec_from_file_location("_ttt_meter", Path(__file__).with_name("measure.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Side:
    """The operations of one tree, and the calls that are to be timed."""

    def __init__(self, root: Path) -> None:
        sys.path[0] = str(root)  # in the place of this file's folder
        import ttt_kernels

        found = Path(ttt_kernels.__file__).resolve().parents[1]
        if found != root.resolve():
            raise ImportError(f"ttt_kernels must come from {root}, got the one in {found}")
        self.package, self.meter = ttt_kernels, load_meter()
        self.loaded: dict[str, Callable[[], tuple]] = {}
        self.timers: dict[str, Callable] = {"cpu": self.meter.cpu_timed}

    def call(self, op: str, impl: str, leaves, options: dict):
        """The result of an operation: a tensor, or the scan's (y, state)."""
        function = getattr(self.package, NAMES.get(op, op))
        chosen = {} if impl == "auto" else {"impl": impl}
        result = function(*leaves, **options, **chosen)
        if op == "scan":
            y, state = result
            return y if state is None else result
        if op == "fast_weight_update_":
            return leaves[0]
        return result.delta if op == "ridge_write" else result

    def run(self, op: str, impl: str, device: str, operands: str, results: str) -> None:
        """Once, from file to file: values, and gradients where those of the results are given."""
        data = torch.load(operands, map_location=device, weights_only=True)
        values = self.once(op, impl, data, data["grads"])
        torch.save([t.cpu() for t in values], results)

    def load(self, key: str, op: str, impl: str, mode: str, device: str, operands: str) -> int:
        """Keep a call ready to be timed; the extra memory of one. Calls take turns with copies of the
        operands, so that they find them in memory and not in the cache."""
        data = torch.load(operands, map_location=device, weights_only=True)
        if mode == "prefill":
            data["options"]["return_state"] = True
        nbytes = data["dy"].nbytes + sum(t.nbytes for t in data["leaves"])
        copies = min(-(-self.meter.cache_bytes(torch.device(device)) // nbytes), MOST_COPIES)
        ring = itertools.cycle([data, *(copy.deepcopy(data) for _ in range(copies))])

        def call() -> tuple:
            data = next(ring)
            return self.once(op, impl, data, [data["dy"]] if mode == "fwd+bwd" else None)

        self.loaded[key] = call
        call()  # compiles, where something compiles
        return self.meter.extra_memory(call, torch.device(device))

    def once(self, op: str, impl: str, data: dict, grads) -> tuple:
        """(results, [gradient of every leaf])."""
        if grads is None:
            with torch.no_grad():
                return as_tuple(self.call(op, impl, data["leaves"], data["options"]))
        leaves = [t.detach().requires_grad_() for t in data["leaves"]]
        results = as_tuple(self.call(op, impl, leaves, data["options"]))
        if not any(r.requires_grad for r in results):  # constants
            return (*results, *map(torch.zeros_like, leaves))
        grads = [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
        found = torch.autograd.grad(results, leaves, grads, materialize_grads=True)
        return (*(r.detach() for r in results), *found)

    def turn(self, key: str, device: str) -> float:
        """Seconds of one call: the median of as many as a turn holds."""
        if device not in self.timers:
            self.timers[device] = self.meter.gpu_timer(torch.device(device))
        seconds = []
        while not seconds or sum(seconds) < TURN_SECONDS:
            seconds.append(self.timers[device](self.loaded[key]))
        return self.meter.Timing(seconds).median

    def forget(self) -> None:
        self.loaded.clear()


def as_tuple(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def serve(root: Path, threads: int, requests, answers) -> None:
    """Answer until the requests end; an error is an answer too."""

    def answer(**fields) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    def attempt(action: Callable) -> None:
        try:
            answer(value=action())
        except Exception as error:
            answer(error=type(error).__name__, text=str(error))

    torch.set_num_threads(threads)
    sides: list[Side] = []
    attempt(lambda: sides.append(Side(root)))
    for line in requests if sides else ():
        request = json.loads(line)
        method = getattr(sides[0], request.pop("do"))
        attempt(lambda method=method, request=request: method(**request))


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints does not disturb the answers
    serve(Path(sys.argv[1]), int(sys.argv[2]), sys.stdin, answers)
