"""Runs stages: each a process group with a log and a time limit of its own, so that a hang or a crash
in one costs nothing of the others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, TIMED_OUT, SKIPPED, INTERRUPTED = (
    "passed", "failed", "timed out", "skipped", "interrupted",
)  # fmt: skip
BAD = (FAILED, TIMED_OUT, INTERRUPTED)
LOG_BYTES = 16 << 20
# What ends a run early and keeps its results. Set even where they were ignored, as in a background job of a
# shell: stages would inherit that, and go on when they are told to end.
ENDINGS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 3.0  # between asking a process to end and asking less politely
NO_TESTS = 5  # pytest's exit code where nothing was collected
_TEST = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b(.*?)(?: +\[ *\d+%\])?$", re.M)
_ERROR = re.compile(r"\berror: |CMake Error|^FAILED:", re.I)
_BEGUN = re.compile(r"^(\S+::\S*)", re.M)


@dataclass(frozen=True)
class Stage:
    """One process.

    Args:
        name: of its line in the summary and of its log.
        command: run in the copy of the tree.
        limit: seconds after which it is ended.
        environment: variables it gets beside those of the machine.
        needs: name of a stage that must have passed before.
        why_not: why it cannot run on this machine, where that is known beforehand.
        cannot: what its log says where that turns out only then; its first group is the reason.
        proof: a pattern that its log must hold to pass.
        tests: whether its log has a line for each test; one that ran none has not passed.
        shows: what it verifies if it passes, as (implementation, what, how).
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None
    why_not: str | None = None
    cannot: str | None = None
    proof: str = ""
    tests: bool = False
    shows: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Phase:
    """Stages that run together, `jobs` at a time, for at most `limit` seconds; earlier phases leave
    `reserve` seconds for it."""

    name: str
    stages: Sequence[Stage]
    limit: float
    reserve: float
    jobs: int = 1


@dataclass(frozen=True)
class Result:
    """A stage after its end; `failures` are names of tests."""

    stage: Stage
    outcome: str
    detail: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    passed: int = 0
    failures: tuple[str, ...] = ()

    def as_record(self) -> dict[str, object]:
        return {
            "kind": "stage", "name": self.stage.name, "outcome": self.outcome, "detail": self.detail,
            "seconds": round(self.seconds, 2), "cpu_seconds": round(self.cpu_seconds, 2),
            "passed": self.passed, "failures": list(self.failures),
            "command": list(self.stage.command),
        }  # fmt: skip


class Runner:
    """Runs phases in `folder`, logs into `logs`, hands every result to `done` as soon as it is there.

    Nothing runs past `end`, a time of `time.monotonic()`.
    """

    def __init__(
        self,
        folder: Path,
        logs: Path,
        environment: Mapping[str, str],
        end: float,
        done: Callable[[Result], None],
    ) -> None:
        self.folder, self.logs, self.environment = folder, logs, environment
        self.end, self.done = end, done
        self.results: dict[str, Result] = {}

    def run(self, phases: Sequence[Phase]) -> None:
        """Every stage gets a result, also where the time is up or Ctrl-C ends it all. In the main thread."""
        before = {number: signal.signal(number, signal.default_int_handler) for number in ENDINGS}
        try:
            self._run(phases)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self, phases: Sequence[Phase]) -> None:
        left = max(0.0, self.end - time.monotonic())
        wanted = sum(phase.reserve for phase in phases)
        scale = min(1.0, left / wanted) if wanted else 1.0
        try:
            for number, phase in enumerate(phases):
                reserved = scale * sum(later.reserve for later in phases[number + 1 :])
                self._run_phase(phase, min(time.monotonic() + phase.limit, self.end - reserved))
        except KeyboardInterrupt:
            for stage in (stage for phase in phases for stage in phase.stages):
                if stage.name not in self.results:
                    self._finish(Result(stage, SKIPPED, "interrupted by the user before it began"))
            raise

    def _run_phase(self, phase: Phase, end: float) -> None:
        waiting, running = list(phase.stages), []
        try:
            while waiting or running:
                while waiting and len(running) < phase.jobs:
                    if (process := self._start(waiting[0], end)) is not None:
                        running.append(process)
                    waiting.pop(0)
                running = self._still(running)
        except KeyboardInterrupt:
            for process in running:
                process.end(INTERRUPTED, "by the user")
            while running:
                running = self._still(running)
            raise
        finally:
            for process in running:
                process.kill()

    def _start(self, stage: Stage, end: float) -> _Process | None:
        needed = self.results.get(stage.needs) if stage.needs else None
        if stage.why_not:
            self._finish(Result(stage, SKIPPED, stage.why_not))
        elif stage.needs and (needed is None or needed.outcome != PASSED):
            why = "did not run" if needed is None else f"{needed.outcome}: {needed.detail}"
            self._finish(Result(stage, SKIPPED, f"needs {stage.needs}, which {why}"))
        elif (seconds := min(stage.limit, end - time.monotonic())) < 1.0:
            self._finish(Result(stage, TIMED_OUT, "no time was left to begin"))
        else:
            log = self.logs / f"{stage.name.replace('/', '-')}.log"
            environment = {**self.environment, **stage.environment}
            try:
                return _Process(stage, log, self.folder, environment, seconds)
            except OSError as error:
                self._finish(Result(stage, FAILED, f"cannot be started: {error}"))
        return None

    def _still(self, running: Sequence[_Process]) -> list[_Process]:
        """Those that run on; the results of the others are handed on."""
        left = []
        for process in running:
            if (result := process.poll()) is None:
                left.append(process)
            else:
                self._finish(result)
        if left:
            time.sleep(0.05)
        return left

    def _finish(self, result: Result) -> None:
        self.results[result.stage.name] = result
        self.done(result)


class _Process:
    """A stage that runs: leader of a process group, output in a log."""

    def __init__(
        self, stage: Stage, log: Path, folder: Path, environment: Mapping[str, str], limit: float
    ) -> None:
        self.stage, self.log, self.folder, self.limit = stage, log, folder, limit
        self.started, self.usage = time.monotonic(), None
        self.ending: tuple[str, str] | None = None  # outcome and detail, once it has been told to end
        self.signals = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
        self.next_signal = 0.0
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                stage.command, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def poll(self) -> Result | None:
        """The result, once the process has ended or cannot be ended."""
        if self._exited():
            self.kill()  # whatever it left running would hold the GPU
            return self._result(*self.ending) if self.ending else self._judge(self.process.returncode)
        if self.ending is None:
            if time.monotonic() - self.started > self.limit:
                self.end(TIMED_OUT, f"after {self.limit:.0f} s")
            elif self.log.stat().st_size > LOG_BYTES:
                self.signals = [signal.SIGKILL]  # it writes on as long as it lives
                self.end(FAILED, f"it wrote more than {LOG_BYTES >> 20} MiB")
        elif time.monotonic() > self.next_signal:
            if not self.signals:
                outcome, detail = self.ending
                return self._result(outcome, f"{detail}; it could not be ended and may still run")
            self._signal(self.signals.pop(0))
            self.next_signal = time.monotonic() + GRACE_S
        return None

    def end(self, outcome: str, detail: str) -> None:
        """Have `poll` end the group: as Ctrl-C would (pytest then tells where it was), politely, then not."""
        self.ending = self.ending or (outcome, detail)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _exited(self) -> bool:
        if self.process.returncode is None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.usage = usage
        return self.process.returncode is not None

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass  # nobody is left in the group

    def _judge(self, code: int) -> Result:
        text = self.text()
        cannot = self.stage.cannot and re.search(self.stage.cannot, text)
        if cannot:
            return self._result(SKIPPED, cannot[1].strip())
        if code == 0 and not re.search(self.stage.proof, text):
            return self._result(FAILED, f"its log does not hold {self.stage.proof!r}")
        if code == 0:
            return self._result(PASSED, "")
        if code == NO_TESTS and self.stage.tests:
            return self._result(SKIPPED, "no test ran: it holds none for this machine")
        if code < 0:
            return self._result(FAILED, f"ended by {signal.Signals(-code).name}")
        return self._result(FAILED, f"exit code {code}")

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _result(self, outcome: str, detail: str) -> Result:
        text = self.text()
        tests = _TEST.findall(text) if self.stage.tests else []
        passed = sum(kind in ("PASSED", "XFAIL", "XPASS") for _, kind, _ in tests)
        failures = tuple(name for name, kind, _ in tests if kind in ("FAILED", "ERROR"))
        skipped = [rest.strip() for _, kind, rest in tests if kind == "SKIPPED"]
        if outcome == PASSED and self.stage.tests and not passed:
            reason = Counter(skipped).most_common(1)[0][0] if skipped else "it ran none"
            outcome, detail = SKIPPED, f"no test ran: {reason}"
        counts = {"passed": passed, "failed": len(failures), "skipped": len(skipped)}
        parts = [detail] if detail else []
        if outcome != SKIPPED:
            parts += [f"{count} {word}" for word, count in counts.items() if count]
        if outcome in BAD:
            parts += self._where(text, {name for name, _, _ in tests})
        usage = self.usage
        return Result(
            self.stage, outcome, ", ".join(parts), time.monotonic() - self.started,
            usage.ru_utime + usage.ru_stime if usage else 0.0, passed, failures,
        )  # fmt: skip

    def _where(self, text: str, finished: set[str]) -> list[str]:
        """The test it was in when it ended; the first error it told of, or else its last words."""
        if self.stage.tests:
            begun = [name for name in _BEGUN.findall(text) if name not in finished]
            if begun and not any(name.startswith(begun[-1]) for name in finished):
                return [f"in {begun[-1]}"]
            return []
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        told = [line for line in lines if _ERROR.search(line)][:1] or lines[-1:] or ["nothing"]
        return [f"it said: {told[0][:200]}".replace(f"{self.folder}/", "")]
