"""Rows as Markdown tables, and these in a document between their marks.

    <!-- table: SUITE -->
    ... replaced ...
    <!-- end -->

A cell is the mean over seeds with its 95 % interval by Student's t, where there is more than one seed. The rows of the
start and of real pictures come first, then the trials by their distance in one step, controls marked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_fast.extras import require
from benchmarks.search.rows import Results
from benchmarks.search.trials import DATA, START, Suite

END = "<!-- end -->"


@dataclass(frozen=True)
class Entry:
    """A trial with its rows that are current, in the order of their seeds. ``waiting``: seeds that have none."""

    name: str
    why: str
    control: bool
    rows: Sequence[Mapping[str, Any]]
    waiting: Sequence[int]

    @property
    def finished(self) -> list[Mapping[str, Any]]:
        """Those that did not fail."""
        return [row for row in self.rows if "failed" not in row]

    def score(self, label: str, name: str) -> list[float]:
        """One of the scores at ``label``, for each seed."""
        return [row["scores"][label][name] for row in self.finished if label in row["scores"]]


def entries(suite: Suite, results: Results) -> list[Entry]:
    """The start, if it is asked for, and the trials of a suite, in the order of its file."""
    jobs: dict[str, list[Any]] = {}
    for job in suite.jobs():
        jobs.setdefault(job.trial.name, []).append(job)
    found = []
    for name in ([START] if START in jobs else []) + [trial.name for trial in suite.trials]:
        trial, current = jobs[name][0].trial, [(job.seed, results.current(job)) for job in jobs[name]]
        rows = [row for _, row in current if row is not None]
        found.append(Entry(name, trial.why, trial.control, rows, [seed for seed, row in current if row is None]))
    return found


def interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean (Student's t); None for fewer than two values."""
    if len(values) < 2:
        return None
    stats = require("scipy.stats", extra="data")
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def tables(suite: Suite, results: Results) -> str:
    """What stands between the marks of a suite: scores, then what was changed and predicted."""
    found = entries(suite, results)
    trials = [entry for entry in found if entry.name != START]
    many = [count for count in suite.nfe if count > 1]
    header = ["trial", "seeds", "distance", "accuracy", "diversity", "precision / recall"]
    header += [f"distance in {count}: Euler / re-noise" for count in many]
    header += ["steps x batch", "passes", "copies", "MB", "minutes"]
    lines = [_line(header), _line(["---", "---", *["---:"] * (len(header) - 2)])]
    for entry in found:
        if entry.name == START and entry.finished:
            lines += [_start_line(entry, label, len(many)) for label in _labels(entry)]
    for entry in sorted((entry for entry in trials if entry.finished), key=_distance):
        lines.append(_trial_line(entry, many))
    for entry in trials:
        for row in entry.rows:
            if "failed" in row:
                reason = str(row["failed"]).splitlines()[0].split(";")[0].replace("|", "/")
                cells = [_title(entry), str(row["seed"]), f"failed: {reason}"]
                lines.append(_line([*cells, *[""] * (len(header) - len(cells))]))
    waiting = [f"{entry.name} ({', '.join(map(str, entry.waiting))})" for entry in found if entry.waiting]
    text = "\n".join(lines)
    if waiting:
        text += f"\n\nNot run yet (seeds): {', '.join(waiting)}."
    predictions = [_line(["trial", "changes", "prediction"]), _line(["---"] * 3)]
    for entry in trials:
        if entry.rows:
            changes = ", ".join(f"`{key}: {_plain(value)}`" for key, value in entry.rows[-1]["set"].items())
            predictions.append(_line([_title(entry), changes or "none", entry.why.replace("|", "/")]))
    return text + "\n\n" + "\n".join(predictions)


def _labels(entry: Entry) -> list[str]:
    return list(dict.fromkeys(label for row in entry.finished for label in row["scores"]))


def _distance(entry: Entry) -> float:
    return statistics.mean(entry.score("1", "frechet") or [math.inf])


def _title(entry: Entry) -> str:
    return f"*control:* {entry.name}" if entry.control else entry.name


def _start_line(entry: Entry, label: str, many: int) -> str:
    name = "real pictures" if label == DATA else f"start, NFE {label}"
    return _line([name, _seeds(entry), *_quality(entry, label), *[""] * (many + 5)])


def _trial_line(entry: Entry, many: Sequence[int]) -> str:
    cells = [_title(entry), _seeds(entry), *_quality(entry, "1")]
    for count in many:
        ways = [_shown(entry.score(f"{count}{way}", "frechet"), 2) for way in ("", " renoise")]
        cells.append(" / ".join(ways))
    row = entry.finished[0]
    cells.append(f"{row['steps']} x {row['batch']}")
    cells += [_cost(entry, "passes", "{:.3g}".format), _cost(entry, "copies", "{:.2f}".format)]
    cells += [_cost(entry, "peak_bytes", lambda value: f"{value / 1e6:.0f}")]
    cells += [_cost(entry, "seconds", lambda value: f"{value / 60:.1f}")]
    return _line(cells)


def _seeds(entry: Entry) -> str:
    return ", ".join(str(row["seed"]) for row in entry.finished)


def _quality(entry: Entry, label: str) -> list[str]:
    shown = [_shown(entry.score(label, name), digits) for name, digits in (("frechet", 2), ("accuracy", 3))]
    shown.append(_shown(entry.score(label, "diversity"), 2))
    both = [_shown(entry.score(label, name), 2, alone=True) for name in ("precision", "recall")]
    return [*shown, " / ".join(both)]


def _cost(entry: Entry, name: str, show: Callable[[float], str]) -> str:
    values = [row[name] for row in entry.finished if row.get(name) is not None]
    return show(statistics.mean(values)) if values else ""


def _shown(values: Sequence[float], digits: int, *, alone: bool = False) -> str:
    if not values:
        return ""
    half = None if alone else interval(values)
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if half is None else f"{mean} ± {half:.{digits}f}"


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# ---- documents


def with_tables(text: str, made: Mapping[str, str]) -> str:
    """``text`` with the tables ``made``, by suite, between their marks; where a suite has no marks they are added at
    the end.

    Raises:
        ValueError: a mark that nothing ends.
    """
    for suite, table in made.items():
        begin = f"<!-- table: {suite} -->"
        if begin not in text:
            text = f"{text.rstrip()}\n\n## {suite}\n\n{begin}\n{END}\n"
        head, _, rest = text.partition(begin)
        if END not in rest:
            raise ValueError(f"{begin} has no {END} after it; write one")
        _, _, tail = rest.partition(END)
        text = f"{head}{begin}\n\n{table}\n\n{END}{tail}"
    return text


def update(path: Path, made: Mapping[str, str], *, check: bool) -> bool:
    """Writes the tables into the document at ``path``, or with ``check`` only looks. Whether it was as they are."""
    before = path.read_text(encoding="utf-8") if path.is_file() else "# The recipe\n"
    after = with_tables(before, made)
    if not check and (after != before or not path.is_file()):
        path.write_text(after, encoding="utf-8")
    return after == before
