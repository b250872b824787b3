"""What a run tells: a progress bar or plain lines, ``metrics.jsonl``, and TensorBoard or Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from torch import Tensor

from apex_fast.extras import require
from apex_fast.training.checkpoint import no_space
from apex_fast.training.phases import duration


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, each with ``step``. Lines of steps after ``keep_until`` (a resumed run
    repeats them) are dropped on opening.

    A line for which there is no space is left out, which ``say`` (standard error if None) is told once: the run goes on
    to its next checkpoint, which tells what it needs."""

    def __init__(self, path: Path, *, keep_until: int, say: Callable[[str], None] | None = None) -> None:
        kept: list[str] = []
        if path.is_file() and keep_until > 0:
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= keep_until:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # a line cut short by a kill
        temporary = path.with_name(path.name + ".new")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        # Unbuffered: what could not be written must not come back at the next line, or at the end.
        self._file = path.open("ab", buffering=0)
        self._path, self._say, self._told = path, say, False

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line; null stands for a number that is not finite, which JSON does not know."""
        told = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        line = (json.dumps({"step": step, **told}) + "\n").encode()
        whole = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            if not no_space(error):
                raise
            with contextlib.suppress(OSError):
                self._file.truncate(whole)  # no half line, to which the next one would be added
            self._tell(step, error)

    def _tell(self, step: int, error: OSError) -> None:
        if self._told:
            return
        self._told = True
        line = (
            f"careful: step {step}: {self._path} could not be written ({error.strerror}); lines are left out until "
            "there is space again. The next checkpoint needs space too"
        )
        if self._say is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._say(line)

    def close(self) -> None:
        self._file.close()


class Board(Protocol):
    """Where numbers and pictures go besides metrics.jsonl."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers in ``values``; texts are left out."""

    def image(self, step: int, name: str, pixels: Any) -> None:
        """``pixels``: uint8 array [H, W, 3]."""

    def close(self) -> None:
        """Writes what is not written yet."""


def open_board(
    kind: str, folder: Path, *, step: int, name: str | None = None, settings: Mapping[str, Any] | None = None
) -> Board | None:
    """What ``report_to`` asks for: "tensorboard", "wandb", or None for "none".

    Args:
        folder: of the run.
        step: finished steps; a resumed run writes those after it anew.
        name: of the run.
        settings: its keys and values.

    Raises:
        ImportError: the package is not installed; the message names the extra that brings it.
    """
    if kind == "tensorboard":
        return TensorBoard(folder / "tensorboard", purge_step=step + 1)
    if kind == "wandb":
        return WeightsAndBiases(folder, name=name or folder.resolve().name, settings=settings or {})
    return None


class TensorBoard:
    """Scalars and sample grids for TensorBoard. ImportError naming the extra when TensorBoard is missing."""

    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        require("tensorboard", extra="train")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if _is_number(value):
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: Any) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The same for Weights & Biases, under a project of the name in WANDB_PROJECT or "apex_fast".

    A resumed run goes on under its own id, which is kept in ``wandb_run_id`` in the folder of the run; steps that it
    repeats are there twice. WANDB_MODE=offline writes everything into ``wandb/`` there and sends nothing.

    Raises:
        ImportError: wandb is not installed.
    """

    STEP = "training_step"

    def __init__(self, folder: Path, *, name: str, settings: Mapping[str, Any]) -> None:
        self._wandb = require("wandb", extra="wandb")
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "wandb_run_id"
        identity = kept.read_text(encoding="utf-8").strip() if kept.is_file() else secrets.token_hex(4)
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "apex_fast"),
            name=name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )
        # Its own counter only goes up, and a resumed run repeats steps.
        self._run.define_metric("*", step_metric=self.STEP)
        kept.write_text(identity + "\n", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in values.items() if _is_number(value)}
        self._run.log({**numbers, self.STEP: step})

    def image(self, step: int, name: str, pixels: Any) -> None:
        self._run.log({name: self._wandb.Image(pixels), self.STEP: step})

    def close(self) -> None:
        self._run.finish()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Console:
    """On a terminal a bar with the state of the run below it, drawn by rich; elsewhere a plain line every few seconds.
    Messages go above the bar.

    ``every`` is the least time between plain lines in seconds, ``unit`` what is counted, in the singular. The pace is
    measured from now on, or from the last :meth:`begin`.
    """

    def __init__(
        self,
        total: int,
        start: int,
        *,
        stream: TextIO | None = None,
        every: float = 10.0,
        label: str = "train",
        unit: str = "step",
    ) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.total, self.every, self.label, self.unit = total, every, label, unit
        self._begun, self._first = time.monotonic(), start
        self._said = -float("inf")
        self._live = self._bar = self._text = None
        # A dumb terminal (an editor's, a pipe that pretends) cannot redraw a line.
        if self.stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown"):
            self._draw(start)

    def _draw(self, start: int) -> None:
        require("rich", extra="train")
        from rich.console import Console as Screen
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.text import Text

        screen = Screen(file=self.stream, force_terminal=True)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=screen
        )
        self._task = self._bar.add_task(self.label, total=self.total, completed=start)
        self._text = Text("")
        # What libraries print meanwhile goes above the bar as well, if the bar is on the real terminal.
        real = self.stream is sys.stderr or self.stream is sys.stdout
        self._live = Live(
            Group(self._bar, self._text),
            console=screen,
            refresh_per_second=2,
            redirect_stdout=real,
            redirect_stderr=real,
        )
        self._live.start()
        # rich hides it until the end, and a process that is killed reaches none.
        screen.show_cursor(True)

    def begin(self, step: int) -> None:
        """Measures the pace from now on, ``step`` steps being done."""
        self._begun, self._first = time.monotonic(), step

    def seconds_left(self, step: int) -> float | None:
        """What the rest takes at the pace so far; None before there is one."""
        done = step - self._first
        return None if done <= 0 else (time.monotonic() - self._begun) / done * (self.total - step)

    def step(self, step: int, note: str | Sequence[str], *, pace: bool = True) -> None:
        """``step`` steps are done; ``note`` is the short state, or its parts. ``pace`` adds how many are done in a
        second."""
        parts = [note] if isinstance(note, str) else list(note)
        left = self.seconds_left(step)
        if pace and left is not None:
            rate = (step - self._first) / max(time.monotonic() - self._begun, 1e-9)
            parts.append(f"{rate:.1f} {self.unit}s/s")
        if left is not None and step < self.total:
            parts.append(f"{duration(left)} left")
        line = " | ".join(part for part in parts if part)
        if self._live is not None:
            self._bar.update(self._task, completed=step)
            self._text.plain = line
            if step == self.total:
                self._live.refresh()
            return
        now = time.monotonic()
        if now - self._said >= self.every or step == self.total:
            print(f"{self.label} {step}/{self.total} | {line}", file=self.stream, flush=True)
            self._said = now

    def say(self, message: str) -> None:
        """A line of its own."""
        if self._live is not None:
            self._live.console.print(message, markup=False, highlight=False, soft_wrap=True)
            return
        print(message, file=self.stream, flush=True)

    def say_in_a_handler(self, message: str) -> None:
        """The same from a signal handler, which may have cut into a print: past Python's buffers."""
        with contextlib.suppress(OSError, ValueError):
            os.write(self.stream.fileno(), f"\n{message}\n".encode())

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def as_numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """0-d tensors as numbers, with one wait for the device rather than one each."""
    import torch

    if not values:
        return {}
    numbers = torch.stack([v.detach().float().reshape(()) for v in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))
