"""Stages that hang, crash, flood and fail: what one does costs nothing of the others."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from ttt_kernels.cli import verify_runner, verify_stages
from ttt_kernels.cli.verify_runner import Phase, Result, Runner, Stage


def python(script: str, name: str = "stage", limit: float = 60, **options) -> Stage:
    return Stage(name, (sys.executable, "-c", script), limit, **options)


def run(folder: Path, *phases: Phase, total: float = 120) -> dict[str, Result]:
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    runner = Runner(folder, logs, dict(os.environ), time.monotonic() + total, lambda result: None)
    runner.run(phases)
    return runner.results


def run_stage(folder: Path, script: str, **options) -> Result:
    return run(folder, Phase("only", [python(script, **options)], 100, 0))["stage"]


def first_number(log: Path) -> int:
    return int(log.read_text().split()[0])


def gone(pid: int) -> bool:
    """Ended; a zombie that nobody waits for has ended too."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


# --- one stage ------------------------------------------------------------------------------------
def test_a_stage_that_passes(tmp_path):
    result = run_stage(tmp_path, "import os; print(os.environ['X'], os.getcwd())", environment={"X": "seen"})
    assert (result.outcome, result.detail) == ("passed", "") and result.cpu_seconds > 0
    assert (tmp_path / "logs" / "stage.log").read_text().split() == ["seen", str(tmp_path)]


HANG = """
import signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_hang_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_runner, "GRACE_S", 0.5)
    result = run_stage(tmp_path, HANG, limit=5)
    assert result.outcome == "timed out" and result.detail.startswith("after 5 s")
    assert result.seconds < 30
    assert gone(first_number(tmp_path / "logs" / "stage.log"))


def test_what_a_stage_leaves_behind_is_ended(tmp_path):
    leave = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    assert run_stage(tmp_path, leave).outcome == "passed"
    assert gone(first_number(tmp_path / "logs" / "stage.log"))


def test_a_crash_is_named(tmp_path):
    result = run_stage(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert result.outcome == "failed" and "ended by SIGSEGV" in result.detail


def test_an_error_is_told(tmp_path):
    script = "print('a.cu(3): error: no such name'); print('build stopped'); raise SystemExit(3)"
    result = run_stage(tmp_path, script)
    assert (result.outcome, result.detail) == ("failed", "exit code 3, it said: a.cu(3): error: no such name")
    assert run_stage(tmp_path, "print('first'); exit('last')").detail == "exit code 1, it said: last"


def test_a_flood_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_runner, "LOG_BYTES", 1 << 20)
    result = run_stage(tmp_path, "while True: print('x' * 10000)")
    assert result.outcome == "failed" and "more than 1 MiB" in result.detail
    assert (tmp_path / "logs" / "stage.log").stat().st_size < 1 << 30


def test_bytes_that_are_no_text(tmp_path):
    result = run_stage(tmp_path, "import os; os.write(1, b'\\xff\\x00'); exit(1)")
    assert result.outcome == "failed"


def test_a_program_that_is_not_there(tmp_path):
    results = run(tmp_path, Phase("only", [Stage("stage", ("/no/such/program",), 5)], 10, 0))
    assert results["stage"].outcome == "failed" and "cannot be started" in results["stage"].detail


def test_a_tool_that_refuses_the_machine(tmp_path):
    script = "print('========= Error: Device not supported here'); exit(1)"
    result = run_stage(tmp_path, script, cannot=verify_stages.REFUSES)
    assert (result.outcome, result.detail) == ("skipped", "Device not supported here")
    assert run_stage(tmp_path, "exit(1)", cannot=verify_stages.REFUSES).outcome == "failed"


def test_a_stage_without_its_proof_has_not_passed(tmp_path):
    proof = "SUMMARY: 0 "
    assert run_stage(tmp_path, "print('== ERROR SUMMARY: 0 errors')", proof=proof).outcome == "passed"
    result = run_stage(tmp_path, "print('nothing was watched')", proof=proof)
    assert result.outcome == "failed" and "does not hold 'SUMMARY: 0 '" in result.detail


# --- tests inside a stage -------------------------------------------------------------------------
TESTS = """
import os, pytest
@pytest.mark.parametrize("x", ["a b", "c"])
def test_good(x): print("test::fake PASSED")
@pytest.mark.skip(reason="no GPU")
def test_skipped(): ...
@pytest.mark.xfail
def test_known(): assert False
def test_bad(): assert False, "wrong"
def test_end(): {end}
def test_never(): ...
"""


def run_tests(folder: Path, text: str, *options: str) -> Result:
    (folder / "test_it.py").write_text(text)
    options = ("-vv", "--tb=short", "-p", "no:cacheprovider", *options)
    command = (sys.executable, "-m", "pytest", *options, "test_it.py")
    return run(folder, Phase("only", [Stage("stage", command, 60, tests=True)], 60, 0))["stage"]


def test_tests_are_counted(tmp_path):
    result = run_tests(tmp_path, TESTS.format(end="pass"))
    assert result.outcome == "failed" and result.passed == 5
    assert result.failures == ("test_it.py::test_bad",)
    assert result.detail == "exit code 1, 5 passed, 1 failed, 1 skipped"
    result = run_tests(tmp_path, TESTS.format(end="pass"), "-k", "not bad")
    assert (result.outcome, result.detail) == ("passed", "5 passed, 1 skipped")


def test_a_crash_keeps_the_tests_before_it_and_names_its_own(tmp_path):
    result = run_tests(tmp_path, TESTS.format(end="os.abort()"))
    assert result.outcome == "failed" and result.passed == 3
    assert "ended by SIGABRT" in result.detail and result.detail.endswith("in test_it.py::test_end")


def test_tests_that_did_not_run_have_not_passed(tmp_path):
    result = run_tests(tmp_path, TESTS.format(end="pass"), "-k", "skipped")
    assert (result.outcome, result.detail) == ("skipped", "no test ran: (no GPU)")
    assert run_tests(tmp_path, TESTS, "-k", "absent").outcome == "skipped"
    assert run_tests(tmp_path, "import absent_module").outcome == "failed"
    assert run_stage(tmp_path, "", tests=True).outcome == "skipped"


# --- several stages -------------------------------------------------------------------------------
def test_one_stage_costs_nothing_of_the_others(tmp_path):
    stages = [
        python("import os; os.abort()", "crash"),
        python("import time; time.sleep(600)", "hang", limit=2),
        python("exit(1)", "wrong"),
        python("", "good"),
        python("", "after good", needs="good"),
        python("", "after wrong", needs="wrong"),
        python("", "impossible", why_not="no tool"),
    ]
    results = run(tmp_path, Phase("all", stages, 60, 0, jobs=2))
    outcomes = {name: result.outcome for name, result in results.items()}
    assert outcomes == {
        "crash": "failed", "hang": "timed out", "wrong": "failed", "good": "passed", "after good": "passed",
        "after wrong": "skipped", "impossible": "skipped",
    }  # fmt: skip
    assert "needs wrong, which failed" in results["after wrong"].detail
    assert results["impossible"].detail == "no tool"


def test_hangs_are_ended_together(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_runner, "GRACE_S", 1.0)
    stages = [python(HANG, name, limit=4) for name in "abcdef"]
    begun = time.monotonic()
    results = run(tmp_path, Phase("all", stages, 60, 0, jobs=6))
    assert {r.outcome for r in results.values()} == {"timed out"}
    assert time.monotonic() - begun < 4 + 6 * 2  # two signals ignored, by six
    assert all(gone(first_number(tmp_path / "logs" / f"{name}.log")) for name in "abcdef")


def test_an_error_of_the_runner_leaves_nothing_running(tmp_path):
    def done(result: Result) -> None:
        raise BrokenPipeError

    logs = tmp_path / "logs"
    logs.mkdir()
    runner = Runner(tmp_path, logs, dict(os.environ), time.monotonic() + 60, done)
    hang = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    wait = "import os, time\nwhile not os.path.exists('pid') or not open('pid').read(): time.sleep(0.05)"
    stages = [python(hang, "hang"), python(wait, "wait")]
    with pytest.raises(BrokenPipeError):
        runner.run([Phase("all", stages, 60, 0, jobs=2)])
    assert gone(int((tmp_path / "pid").read_text()))


def test_stages_run_together(tmp_path):
    meet = """
        import pathlib, sys, time
        pathlib.Path("{0}").touch()
        while not pathlib.Path("{1}").exists(): time.sleep(0.05)
    """
    stages = [python(re.sub("\n +", "\n", meet.format(*pair)), pair[0], 30) for pair in ("ab", "ba")]
    together = run(tmp_path, Phase("both", stages, 60, 0, jobs=2))
    assert {r.outcome for r in together.values()} == {"passed"}


def test_later_phases_keep_their_time(tmp_path):
    """The first would take all; the last gets what was kept for it."""
    first = Phase("first", [python("import time; time.sleep(600)", "long", limit=500)], 500, 1)
    queue = Phase("second", [python("import time; time.sleep(600)", f"q{i}") for i in range(3)], 2, 1)
    last = Phase("last", [python("", "last")], 60, 20)
    results = run(tmp_path, first, queue, last, total=26)
    assert results["long"].outcome == "timed out" and results["long"].seconds < 20
    assert results["q2"].detail == "no time was left to begin"
    assert results["last"].outcome == "passed"


def test_a_total_too_small_for_all_is_shared(tmp_path):
    phases = [Phase(n, [python("import time; time.sleep(600)", n)], 600, 100) for n in ("a", "b")]
    begun = time.monotonic()
    results = run(tmp_path, *phases, total=6)
    assert [r.detail[:5] for r in results.values()] == ["after", "after"]
    assert time.monotonic() - begun < 15


def test_interruption_keeps_results_and_leaves_nothing_running(tmp_path):
    hang = python("import os, time; print(os.getpid(), flush=True); time.sleep(600)", "hang")
    logs, done = tmp_path / "logs", []
    logs.mkdir()
    runner = Runner(tmp_path, logs, dict(os.environ), time.monotonic() + 60, done.append)

    def interrupt() -> None:
        while not ((log := logs / "hang.log").exists() and log.stat().st_size):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        phases = [[python("", "good"), hang, python("", "never")], [python("", "later")]]
        runner.run([Phase("some", stages, 60, 0) for stages in phases])
    assert [r.outcome for r in done] == ["passed", "interrupted", "skipped", "skipped"]
    assert gone(first_number(logs / "hang.log"))
