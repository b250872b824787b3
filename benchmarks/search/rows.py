"""The results of a suite: a file of JSON lines that is only ever added to.

A line is one of three. A row is a finished or failed trial with one seed; of several for the same trial and seed the
last one counts. A base has the settings that rows differ from, which would be the same thousands of characters in each
of them: ``{"base": DIGEST, "settings": {...}}``. A mark says that a row counts no more, because the settings of its
trial have changed: ``{"outdated": DIGEST, "trial": ..., "seed": ...}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.search.trials import OF_THE_QUEUE, Job, digest, flat


class Results:
    """What a file of results holds now.

    Attributes:
        rows: by (trial, seed); those that count.
        outdated: how many rows there were that count no more.
        damaged: lines that cannot be read: a write that was cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        self.bases: dict[str, dict[str, Any]] = {}
        self.outdated = self.damaged = 0
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for line in text.splitlines():
            try:
                values = json.loads(line)
                self._take(values)
            except (ValueError, KeyError, TypeError):
                self.damaged += bool(line.strip())

    def _take(self, values: dict[str, Any]) -> None:
        if "settings" in values and "base" in values:
            self.bases[values["base"]] = values["settings"]
            return
        key = values["trial"], values["seed"]
        if "outdated" in values:
            if key in self.rows and digest(self.rows[key]) == values["outdated"]:
                del self.rows[key]
                self.outdated += 1
            return
        self.rows[key] = values

    def current(self, job: Job) -> dict[str, Any] | None:
        """The row of ``job``, made with the settings that it has now; else None."""
        row = self.rows.get((job.trial.name, job.seed))
        if row is None or row["evaluation"] != job.evaluation or row["base"] not in self.bases:
            return None
        before = {**self.bases[row["base"]], **row["set"], "seed": row["seed"]}
        return row if job.same_result(before) else None

    def add(self, job: Job, row: Mapping[str, Any]) -> None:
        """Adds the row of ``job``, and the base that its settings differ from where the file has not."""
        base = {key: value for key, value in flat(job.base_settings).items() if key not in OF_THE_QUEUE}
        lines = []
        if digest(base) not in self.bases:
            lines.append({"base": digest(base), "settings": base})
        lines.append({**row, "base": digest(base)})
        append(self.path, lines)
        for line in lines:
            self._take(line)

    def mark(self, job: Job) -> None:
        """Marks the row of ``job``, if there is one, as one that counts no more."""
        row = self.rows.get((job.trial.name, job.seed))
        if row is None:
            return
        line = {"outdated": digest(row), "trial": job.trial.name, "seed": job.seed}
        append(self.path, [line])
        self._take(line)


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Adds lines in one write that is on the disk afterwards. A line that an earlier write left unfinished is ended
    first, so that it spoils no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                text = "\n" + text
        rest = text.encode()
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects that can be read; none if it is not there."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut short by a kill
        if isinstance(values, dict):
            found.append(values)
    return found
