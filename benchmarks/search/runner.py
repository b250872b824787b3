"""Runs what has no row yet, each trial and seed in a process of its own; see :mod:`benchmarks.search`."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch

from apex_fast.training.locks import FolderLock, hold
from apex_fast.training.phases import duration
from apex_fast.training.settings import SettingsError
from benchmarks.search.rows import Results
from benchmarks.search.trials import ROOT, ROW, TRIAL, Job, Suite, flat

RUNS, RESULTS = Path("runs") / "recipe", ROOT / "benchmarks" / "results"
LOG = "log.txt"
WORKER = (sys.executable, str(Path(__file__).with_name("worker.py")))
"""The command that a folder is handed to."""
POLL = 0.2
"""Seconds between two looks at the processes."""

_STOPPED = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals that come from outside: a process that one of them ended has not failed."""

Say = Callable[[str], None]


def results_path(suite: str, device: str, results: Path = RESULTS) -> Path:
    """File of a suite's rows."""
    return results / device / "recipe" / f"{suite}.jsonl"


def select(jobs: Sequence[Job], only: str | None) -> list[Job]:
    """The jobs that the pattern ``only`` means: a trial, ``trial-seed-n``, or either after ``suite/``."""
    if only is None:
        return list(jobs)
    found = []
    for job in jobs:
        names = [job.trial.name, job.name]
        names += [f"{job.suite.name}/{name}" for name in names]
        if any(fnmatch.fnmatchcase(name, only) for name in names):
            found.append(job)
    return found


@dataclasses.dataclass
class _Running:
    job: Job
    folder: Path
    process: subprocess.Popen[bytes]
    lock: FolderLock
    begun: float


class Queue:
    """The jobs of some suites on one kind of device.

    device: cpu or cuda. runs: folder of the runs. results: folder of the results. retry: whether trials that failed
    are run again, from their beginning.
    """

    def __init__(
        self,
        suites: Sequence[Suite],
        *,
        device: str,
        only: str | None = None,
        runs: Path = RUNS,
        results: Path = RESULTS,
        retry: bool = False,
        say: Say = print,
    ) -> None:
        """Raises SettingsError, with all that is wrong, if the config of a chosen trial cannot be used."""
        self.device, self.runs, self.retry, self.say = device, runs, retry, say
        self.jobs = select([job for suite in suites for job in suite.jobs()], only)
        problems = []
        for job in self.jobs:
            try:
                _ = job.settings
            except SettingsError as error:
                problems.append(str(error))
        if problems:
            raise SettingsError("\n".join(dict.fromkeys(problems)))
        self.results = {suite.name: Results(results_path(suite.name, device, results)) for suite in suites}
        for found in self.results.values():
            if found.damaged:
                say(f"careful: {found.path} has {found.damaged} lines that cannot be read; they are passed over")

    def folder(self, job: Job) -> Path:
        """Where the job runs."""
        kind = "" if self.device == "cpu" else f"-{self.device}"
        return self.runs / f"{job.suite.name}{kind}" / job.name

    def left(self) -> list[Job]:
        """What has no row yet, in the order in which it is run."""
        return [job for job in self.jobs if not self._done(job)]

    def _done(self, job: Job) -> bool:
        row = self.results[job.suite.name].current(job)
        return row is not None and not ("failed" in row and self.retry)

    def estimate(self, job: Job) -> float | None:
        """Seconds that the job may take in all, from the finished rows of its suite; None if there are none."""
        rows = [row for row in self.results[job.suite.name].rows.values() if "failed" not in row]
        if not job.trains:
            times = [row["wall_seconds"] for row in rows if not row["steps"]]
            return statistics.median(times) if times else None
        paces = [
            max(row["wall_seconds"], row["seconds"]) / (row["steps"] * row["batch"]) for row in rows if row["steps"]
        ]
        settings = job.settings
        pictures = settings["max_train_steps"] * settings["train_batch_size"] * settings["gradient_accumulation_steps"]
        return statistics.median(paces) * pictures if paces else None

    def describe(self, jobs: int = 1) -> list[str]:
        """What is left, a line each, with estimates."""
        left, lines, total, unknown = self.left(), [], 0.0, 0
        for job in left:
            seconds, folder = self.estimate(job), self.folder(job)
            steps = sorted(int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*"))
            begun = f", begun: step {steps[-1]}" if steps and self._is_of(job, folder) else ""
            lines.append(f"{job.suite.name}/{job.name}: {'about ' + duration(seconds) if seconds else '?'}{begun}")
            total, unknown = total + (seconds or 0.0), unknown + (seconds is None)
        times = [f"about {duration(total / jobs)}"] if unknown < len(left) else []
        times += [f"{unknown} without an estimate, for their suites have no such row"] if unknown else []
        lines.append("; ".join([f"{len(left)} of {len(self.jobs)} left", *times]))
        return lines

    # ---- running

    def run(self, *, jobs: int = 1, threads: int | None = None, max_minutes: float | None = None) -> int:
        """Runs what is left, ``jobs`` at a time, each with ``threads`` threads (None: the cores shared out, or
        OMP_NUM_THREADS). Asked to stop by SIGINT, SIGTERM or the time, it has the runs save a checkpoint and returns.

        Returns:
            0: everything has a row. 3: something is left. 128 + signal: stopped by one.
        """
        end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        waiting, running = self.left(), list[_Running]()
        if threads is None:
            threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // jobs)))
        received: list[int] = []

        def heed(number: int, frame: FrameType | None) -> None:
            received.append(number)
            for one in running if len(received) > 1 else ():
                one.process.kill()

        before = {number: signal.signal(number, heed) for number in (signal.SIGINT, signal.SIGTERM)}
        asked = False
        try:
            while waiting or running:
                late = end is not None and time.monotonic() >= end
                if (received or late) and not asked:
                    asked = True
                    self.say(f"{'the time is up' if late else 'stopping'}: the runs save a checkpoint")
                    for one in running:
                        one.process.terminate()
                while waiting and len(running) < jobs and not asked:
                    if (started := self._start(waiting.pop(0), threads)) is not None:
                        running.append(started)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    self._take(one)
                if asked and not running:
                    break
                if running:
                    time.sleep(POLL)
        finally:
            for one in running:
                one.process.kill()
                one.process.wait()
                one.lock.release()
            for number, handler in before.items():
                signal.signal(number, handler)
        left = len(self.left())
        self.say(f"{left} of {len(self.jobs)} left" if left else f"all {len(self.jobs)} have a row")
        return 128 + received[0] if received else 3 if left else 0

    def _start(self, job: Job, threads: int) -> _Running | None:
        folder, results = self.folder(job), self.results[job.suite.name]
        name = f"{job.suite.name}/{job.name}"
        try:
            lock = hold(folder.parent / ".queue" / job.name, self.say, otherwise="let it finish")
        except SettingsError:
            self.say(f"{name}: another queue runs it")
            return None
        failed = results.current(job) is not None  # which is why it is run again
        if failed or not self._is_of(job, folder):
            if any(not path.name.startswith(TRIAL) for path in folder.glob("*")) and not (folder / TRIAL).exists():
                lock.release()
                raise SettingsError(f"{folder} holds something that this queue has not written; move it away")
            shutil.rmtree(folder, ignore_errors=True)
        if failed:
            # From here on it is a run that has begun, like any other: it goes on where it is stopped.
            results.mark(job)
        folder.mkdir(parents=True, exist_ok=True)
        row = self._finished(folder, job)
        if row is not None:  # by a process whose queue was gone before it could take the row
            results.add(job, row)
            lock.release()
            self.say(f"{name}: {_told(row)}")
            return None
        if results.current(job) is None:
            results.mark(job)
        _write(folder / TRIAL, self.asked(job))
        self.say(f"{name}: begins" if not any(folder.glob("checkpoint-*")) else f"{name}: goes on")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        # The profiler that reads torch's allocator announces itself otherwise.
        environment.setdefault("KINETO_LOG_LEVEL", "99")
        with (folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [*WORKER, str(folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C reaches this process alone, which then asks the others.
                start_new_session=True,
            )
        return _Running(job, folder, process, lock, time.monotonic())

    def _take(self, one: _Running) -> None:
        name, code = f"{one.job.suite.name}/{one.job.name}", one.process.returncode
        assert one.process.stdin is not None
        one.process.stdin.close()
        row = self._finished(one.folder, one.job)
        if row is None and code < 0 and -code not in _STOPPED:
            row = self._broken(one, f"its process crashed with signal {-code}: {_tail(one.folder / LOG)}")
        one.lock.release()
        if row is None:
            # What a trial dies of is in its row. An error without one is this program's or its installation's.
            stopped = code < 0 or code >= 128
            reason = f"stopped (exit code {code})" if stopped else f"could not be run: {_tail(one.folder / LOG)}"
            self.say(f"{name}: {reason}; the next run goes on with it")
            return
        self.results[one.job.suite.name].add(one.job, row)
        self.say(f"{name}: {_told(row)}")

    def asked(self, job: Job) -> dict[str, object]:
        """What the process of a job is told."""
        return {
            "suite": job.suite.name,
            "trial": job.trial.name,
            "seed": job.seed,
            "why": job.trial.why,
            "set": job.changes,
            "settings": job.settings,
            "evaluation": job.evaluation,
            "curve_samples": job.suite.curve_samples,
            "device": self.device,
        }

    def _is_of(self, job: Job, folder: Path) -> bool:
        """Whether what lies in ``folder`` is a run with the settings of ``job``."""
        try:
            asked = json.loads((folder / TRIAL).read_text(encoding="utf-8"))
            same_curve = not job.trains or asked["curve_samples"] == job.suite.curve_samples
            return same_curve and job.same_result(flat(asked["settings"]))
        except (OSError, ValueError, KeyError):
            return False

    def _finished(self, folder: Path, job: Job) -> dict[str, object] | None:
        """The row that a process has left in ``folder``, as far as it is scored as ``job`` asks."""
        try:
            row = json.loads((folder / ROW).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return row if row["evaluation"] == job.evaluation else None

    def _broken(self, one: _Running, problem: str) -> dict[str, object]:
        """The row of a process that has ended without leaving one."""
        settings, asked = one.job.settings, self.asked(one.job)
        return {
            **{name: asked[name] for name in ("suite", "trial", "seed", "why", "set", "evaluation")},
            "steps": settings["max_train_steps"],
            "batch": settings["train_batch_size"] * settings["gradient_accumulation_steps"],
            "failed": problem,
            "wall_seconds": round(time.monotonic() - one.begun, 3),
        }


def device_of(name: str) -> str:
    """cpu or cuda, for ``auto`` what this machine has."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _write(path: Path, values: dict[str, object]) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _told(row: dict[str, object]) -> str:
    if "failed" in row:
        return f"failed: {str(row['failed']).splitlines()[0]}"
    scores: dict[str, dict[str, float]] = row["scores"]  # type: ignore[assignment]
    shown = scores.get("1") or next(iter(scores.values()))
    found = f"distance {shown['frechet']:.2f}, accuracy {shown['accuracy']:.3f}, diversity {shown['diversity']:.2f}"
    return f"{found}; {duration(float(row['wall_seconds']))}"  # type: ignore[arg-type]


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    # An error begins with its kind and ends with what to do.
    return last if len(last) <= 400 else f"{last[:200]} ... {last[-200:]}"
