"""What a run tells: a progress bar or plain lines, ``metrics.jsonl``, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from apex_fast.extras import require


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, each with ``step``. Lines of steps after ``keep_until`` (a resumed run
    repeats them) are dropped on opening."""

    def __init__(self, path: Path, *, keep_until: int) -> None:
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
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars and sample grids for TensorBoard. ImportError naming the extra when TensorBoard is missing."""

    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        require("tensorboard", extra="train")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: Any) -> None:
        """``pixels``: uint8 array [H, W, 3]."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Console:
    """A tqdm bar on a terminal, a plain line every few seconds elsewhere; messages go above the bar.

    ``every`` is the least time between plain lines in seconds, ``unit`` what is counted, in the singular."""

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
        self._bar = None
        self._begun, self._first = time.monotonic(), start
        self._said = -float("inf")
        if self.stream.isatty():
            tqdm = require("tqdm", extra="train")
            self._bar = tqdm.tqdm(
                total=total, initial=start, file=self.stream, desc=label, dynamic_ncols=True, unit=unit
            )

    def step(self, step: int, note: str) -> None:
        """``step`` steps are done; ``note`` is the short state (phase, losses)."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said >= self.every or step == self.total:
            rate = (step - self._first) / max(now - self._begun, 1e-9)
            left = (self.total - step) / rate if rate else 0.0
            print(
                f"{self.label} {step}/{self.total}  {note}  {rate:.1f} {self.unit}s/s, {left:.0f} s left",
                file=self.stream,
                flush=True,
            )
            self._said = now

    def say(self, message: str) -> None:
        if self._bar is not None:
            self._bar.write(message, file=self.stream)
            return
        print(message, file=self.stream, flush=True)

    def say_in_a_handler(self, message: str) -> None:
        """The same from a signal handler, which may have cut into a print: past Python's buffers."""
        with contextlib.suppress(OSError, ValueError):
            os.write(self.stream.fileno(), f"\n{message}\n".encode())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def as_numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """0-d tensors as numbers, with one wait for the device rather than one each."""
    import torch

    if not values:
        return {}
    numbers = torch.stack([v.detach().float().reshape(()) for v in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))
