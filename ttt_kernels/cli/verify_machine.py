"""What is verified on, as JSON: a stage of `verify`, since asking a broken driver can hang."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from ttt_kernels._info import info
from ttt_kernels.cli.measure import cpu_name


def machine() -> dict[str, object]:
    """`gpus` and `capabilities` list the CUDA devices that torch can use."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    versions = info().versions
    return {
        "kind": "machine",
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "capabilities": [list(torch.cuda.get_device_capability(i)) for i in range(count)],
        "driver": driver() if count else None,
        "cuda": torch.version.cuda,
        **{name: versions[name] for name in ("ttt_kernels", "python", "torch", "triton", "transformers")},
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def driver() -> str:
    """Version of the NVIDIA driver, from its tool or from the kernel."""
    if tool := shutil.which("nvidia-smi"):
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[0] if found else "unknown"


if __name__ == "__main__":
    print(json.dumps(machine()))
