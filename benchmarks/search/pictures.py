"""Rows as plots: quality on the way of a run, and quality against the batch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from apex_fast.extras import require
from benchmarks.search.rows import Results
from benchmarks.search.tables import Entry, entries
from benchmarks.search.trials import START, Suite

SIZE_KEYS = {"train_batch_size", "max_train_steps", "learning_rate", "ema_decay"}
"""What trials of the batch may change of the base."""

Line = list[tuple[float, float]]


def draw(suite: Suite, results: Results, folder: Path) -> list[Path]:
    """Writes ``recipe_<suite>_steps.png`` and, where trials have several batches, ``recipe_<suite>_batch.png``."""
    found = entries(suite, results)
    start = next((entry for entry in found if entry.name == START), None)
    level = statistics.mean(start.score("50", "frechet")) if start and start.score("50", "frechet") else None
    trials = [entry for entry in found if entry.name != START and entry.finished]
    chosen = {trial.name for trial in suite.trials if trial.plot}
    shown = [entry for entry in trials if entry.name in chosen or not chosen]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if shown:
        written.append(folder / f"recipe_{suite.name}_steps.png")
        _save(
            written[-1],
            suite,
            [
                ("training steps", {e.name: curve(e, "step") for e in shown}),
                ("minutes of training", {e.name: curve(e, "seconds", 1 / 60) for e in shown}),
            ],
            # A distance of fewer pictures is larger, so the start's, of more of them, is no level for these.
            None,
            {e.name for e in shown if e.control},
            pictures=suite.curve_samples,
        )
    by_steps = batches(trials)
    if any(len(line) > 1 for line in by_steps.values()):
        written.append(folder / f"recipe_{suite.name}_batch.png")
        by_pictures: dict[str, Line] = {}
        for name, line in by_steps.items():
            steps = int(name.split()[0].replace(",", ""))
            by_pictures[name] = [(batch * steps, distance) for batch, distance in line]
        _save(
            written[-1],
            suite,
            [("batch", by_steps), ("pictures seen in training", by_pictures)],
            level,
            set(),
            pictures=suite.samples,
        )
    return written


def curve(entry: Entry, across: str, scale: float = 1.0) -> Line:
    """(step or seconds, mean distance in one step) over the seeds."""
    points: dict[int, list[tuple[float, float]]] = {}
    for row in entry.finished:
        for point in row["curve"]:
            points.setdefault(point["step"], []).append((point[across] * scale, point["frechet"]))
    return [
        (statistics.mean(x for x, _ in points[step]), statistics.mean(y for _, y in points[step]))
        for step in sorted(points)
    ]


def batches(trials: Sequence[Entry]) -> dict[str, Line]:
    """(batch, mean final distance) of the trials that change nothing but sizes, by their number of steps."""
    lines: dict[str, Line] = {}
    for entry in trials:
        row = entry.finished[0]
        distances = entry.score("1", "frechet")
        if set(row["set"]) <= SIZE_KEYS and distances:
            lines.setdefault(f"{row['steps']:,} steps", []).append((row["batch"], statistics.mean(distances)))
    return {name: sorted(line) for name, line in lines.items()}


def _save(
    path: Path,
    suite: Suite,
    panels: Sequence[tuple[str, dict[str, Line]]],
    level: float | None,
    controls: set[str],
    *,
    pictures: int,
) -> None:
    require("matplotlib", extra="train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(6.2 * len(panels), 4.4), dpi=90)
    FigureCanvasAgg(figure)
    for axes, (across, lines) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        for name, points in lines.items():
            style = "o--" if name in controls else "o-"
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1.4, markersize=3)
        if level is not None:
            axes.axhline(level, color="#555555", linestyle=":", linewidth=1.2, label="the start in 50 steps")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if "steps" not in across and "minutes" not in across:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel(across, fontsize=9)
        axes.set_ylabel(f"Frechet distance in one step, {pictures} pictures", fontsize=9)
        axes.set_title(suite.name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    # Without matplotlib's version the file depends on what it shows alone.
    figure.savefig(path, metadata={"Software": None})
