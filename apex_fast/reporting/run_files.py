"""What a run has left in its folder so far, whether it has finished, still goes on or was killed at any moment."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apex_fast.training import environment
from apex_fast.training.checkpoint import checkpoints, read_best, step_of
from apex_fast.training.phases import PHASE_NAMES
from apex_fast.training.results import MODEL_FOLDER, holds_model
from apex_fast.training.settings import SettingsError, read_yaml
from apex_fast.training.validation import SAMPLES

VALIDATION = "validation/"


@dataclass(frozen=True)
class RunFiles:
    """A run as it lies on the disk.

    Attributes:
        folder: of the run.
        config: its keys, as it wrote them; empty where there are none yet.
        records: lines of metrics.jsonl that hold the numbers of a step, in their order.
        validations: lines that hold scores, without ``validation/`` in their keys.
        alarms: {"step", "name", "saw", "did", "see"} of every alarm.
        parts: of environment.json.
        grids: (step, picture) of the validations.
        saved: (step, bytes) of the complete checkpoints.
        best: {"checkpoint", "metric", "value"} of the best one by the run's metric, or None.
        scores: of ``apex-fast eval``, or None.
        finished: whether the model of the last step was written.
        updated: when the metrics were last written, in seconds since 1970; None without metrics.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    grids: list[tuple[int, Path]] = field(default_factory=list)
    saved: list[tuple[int, int]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    scores: dict[str, Any] | None = None
    finished: bool = False
    updated: float | None = None

    @property
    def step(self) -> int:
        """The last step that is known of."""
        steps = [int(r["step"]) for r in (*self.records, *self.validations)]
        return max([*steps, *(step for step, _ in self.saved)], default=0)

    @property
    def total(self) -> int | None:
        """Steps of the whole run."""
        total = self.config.get("max_train_steps")
        return total if isinstance(total, int) else None

    def phases(self) -> list[tuple[int, str]]:
        """(step after which it began, name) of every phase that the metrics tell of."""
        found: list[tuple[int, str]] = []
        before = 0
        for record in self.records:
            name = PHASE_NAMES.get(str(record.get("phase")))
            if name is not None and (not found or found[-1][1] != name):
                found.append((before, name))
            before = int(record["step"])
        return found

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, values that are no finite number left out."""
        return [
            (int(r["step"]), float(r[key]))
            for r in self.records
            if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])
        ]


def read_run(folder: str | Path) -> RunFiles:
    """Reads a run.

    Raises:
        FileNotFoundError: there is no run; the message says what was looked for.
    """
    folder = Path(folder)
    metrics, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not folder.is_dir() or not (metrics.is_file() or config.is_file()):
        raise FileNotFoundError(
            f"{folder} is no run: it has neither metrics.jsonl nor config.yaml; write the output_dir of a run"
        )
    lines = _lines(metrics)
    grids = [(int(path.stem.removeprefix("step-")), path) for path in (folder / SAMPLES).glob("step-*.png")
             if path.stem.removeprefix("step-").isdigit()]  # fmt: skip
    found = checkpoints(folder)
    config_values = _config(config)
    total = config_values.get("max_train_steps")
    last = max([int(line["step"]) for line in lines] + [step_of(path) for path in found], default=0)
    return RunFiles(
        folder=folder,
        config=config_values,
        records=[line for line in lines if "phase" in line],
        validations=[
            {"step": line["step"], **{k.removeprefix(VALIDATION): v for k, v in line.items() if VALIDATION in k}}
            for line in lines
            if any(key.startswith(VALIDATION) for key in line)
        ],
        alarms=_alarms(lines),
        parts=environment.read(folder / environment.FILE),
        grids=sorted(grids),
        saved=[(step_of(path), _bytes(path)) for path in found],
        best=read_best(folder),
        scores=_scores(folder / "eval.json"),
        # A model of an earlier, shorter run stays until the longer one ends.
        finished=holds_model(folder / MODEL_FOLDER) and (total is None or last >= total),
        updated=metrics.stat().st_mtime if metrics.is_file() else None,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines with a step; the last one may have been cut off by a kill, or be in the middle of being written."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def _alarms(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        told = line.get("alarm", line.get("alarms"))
        for alarm in told if isinstance(told, list) else [told]:
            if isinstance(alarm, dict):
                found.append({"step": line["step"], **alarm})
    return found


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except (SettingsError, OSError, UnicodeDecodeError):
        return {}


def _scores(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("scores"), dict) else None


def _bytes(folder: Path) -> int:
    """Size of the files in a folder, one that is being removed included."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total
