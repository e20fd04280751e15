"""The CUDA C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the tests marked `sanitize`,
in a process of their own with the emulation built for it. Tensors are allocated by the sanitizer's malloc, so
that a read or write past the end of one is seen, and so is one past the end of shared memory."""

import os
import subprocess
import sys

import pytest
from emulated import GPU, SANITIZED, emulated_library
from source_tree import ROOT

TESTS = ["test_scan_cuda.py", "test_step_cuda.py", "test_step_size_cuda.py"]


@pytest.mark.skipif(GPU, reason="compute-sanitizer does this on a GPU: python -m ttt_kernels verify")
def test_no_sanitizer_complains():
    emulated_library(sanitize=True)
    asked = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    found = asked.stdout.strip()
    if not os.path.isabs(found):
        pytest.skip("g++ comes without libasan")
    env = {
        **os.environ,
        "LD_PRELOAD": found,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        SANITIZED: "1",
        "OMP_NUM_THREADS": "1",
    }
    tests = [ROOT / "python_tests" / name for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "sanitize", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "skipped" not in result.stdout.splitlines()[-1]
