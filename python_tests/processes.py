"""Tests in several processes: gloo on this machine, no network, no GPU.

    def worker(rank, world_size, x):            # at the top level of an importable module
        y = x.clone()
        torch.distributed.all_reduce(y)
        return y

    first, second = processes.run(worker, 2, torch.ones(3))

Every launch imports torch and transformers anew in each process, some seconds: let one worker do
several checks.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT_S = 120
_EARLIER_S = 5  # a process that hangs writes where, before it is ended
# gloo looks up the machine's own name otherwise, which need not resolve; tiny models want one thread
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


class ProcessesFailed(AssertionError):
    """A worker raised, died or hung; the message holds the traceback of every process."""


def run(worker: Callable, world_size: int, *args, limit_s: float = LIMIT_S) -> list:
    """What `worker(rank, world_size, *args)` returns in each of `world_size` gloo processes, by rank.

    Args:
        worker: a function at the top level of a module; the processes import that module by name.
        world_size: how many processes; the process group is there when the worker starts.
        args: handed to every worker, by pickling.
        limit_s: time for everything, after which the processes are ended.

    Returns:
        The results, through `torch.save`: tensors on the CPU and whatever can be pickled.

    Raises:
        ProcessesFailed: with the tracebacks, also of processes that hang.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = mp.start_processes(
            _process, (world_size, folder, limit_s, worker, args), world_size, join=False
        )
        deadline, done = time.monotonic() + limit_s, False
        try:
            while not done and time.monotonic() < deadline:
                done = context.join(timeout=max(0.1, deadline - time.monotonic()))
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise ProcessesFailed(f"process {error.error_index} failed\n{_logs(folder)}") from error
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        if not done:
            raise ProcessesFailed(f"not finished after {limit_s} s\n{_logs(folder)}")
        return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(world_size)]


def _process(
    rank: int, world_size: int, folder: Path, limit_s: float, worker: Callable, args: tuple
) -> None:
    os.environ.update(_ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    with open(folder / f"{rank}.log", "w", encoding="utf-8") as log:
        faulthandler.enable(log)
        faulthandler.dump_traceback_later(max(1, limit_s - _EARLIER_S), file=log)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
            )
            torch.save(worker(rank, world_size, *args), folder / f"{rank}.pt")
            dist.barrier()  # nobody closes the connections while another process still uses them
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=log)
            log.flush()
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()


def _logs(folder: Path) -> str:
    logs = sorted(folder.glob("*.log"))
    return "\n".join(f"--- process {p.stem}:\n{p.read_text(encoding='utf-8')}" for p in logs)
