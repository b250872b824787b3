"""Scores over several seeds as rows of a table: means with intervals, as text, as Markdown, as JSON, as a plot.

An interval is that of the mean over the seeds, at 95 % by Student's t, written as mean ± half of it; of one seed there
is none. Two rows are compared seed by seed, since equal seeds mean equal prompts and equal noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apex_fast.evaluation.report import PAGE, markdown_table
from apex_fast.extras import require

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half of its interval; None where there is one seed."""

    mean: float
    half: float | None

    def text(self, digits: int = 3) -> str:
        """Such as ``0.987 ±0.004``."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.half is None else f"{mean} ±{self.half:.{digits}f}"

    def as_json(self) -> dict[str, float | None]:
        return {"mean": self.mean, "half_interval": self.half}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half of the interval of independent ``values``, one for each seed."""
    if not values:
        raise ValueError("estimate: expected at least one value, got none")
    if len(values) == 1:
        return Estimate(float(values[0]), None)
    quantile = require("scipy.stats", extra="data").t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), float(quantile * error))


@dataclass(frozen=True)
class Column:
    """A number of a row: its key, how it is called, decimals, and what it is divided by."""

    key: str
    heading: str
    digits: int = 3
    unit: float = 1.0


COSTS = (
    Column("seconds_per_picture", "ms/picture", 1, 1e-3),
    Column("network_seconds", "ms network", 1, 1e-3),
    Column("images_per_second", "images/s", 0),
    Column("peak_bytes", "peak MB", 1, 1e6),
)


@dataclass(frozen=True)
class Row:
    """What one model scored in one way of sampling.

    Attributes:
        model: which, in a word or two.
        steps, guidance: how it was sampled; None for real data.
        by_seed: the scores of each seed, by key; ``accuracy_by_category`` holds a dict of them.
        cost: what one picture costs, measured once.
    """

    model: str
    steps: int | None
    guidance: float | None
    by_seed: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Such as "run, 4 steps, guidance 3"."""
        if self.steps is None:
            return self.model
        guided = "" if self.guidance in (None, 1.0) else f", guidance {self.guidance:g}"
        return f"{self.model}, {self.steps} step{'s' if self.steps > 1 else ''}{guided}"

    def get(self, key: str) -> Estimate | None:
        """The estimate of a score, or None where the row has none."""
        if key in self.cost:
            return Estimate(float(self.cost[key]), None)
        found = [scores[key] for scores in self.by_seed if key in scores]
        return estimate(found) if found else None

    def category(self, name: str) -> Estimate | None:
        """The same of the accuracy in one category."""
        found = [s["accuracy_by_category"][name] for s in self.by_seed if name in s.get("accuracy_by_category", {})]
        return estimate(found) if found else None

    def cells(self, columns: Sequence[Column]) -> list[str]:
        """The row of the table: its name and a text for each column."""
        texts = []
        for column in columns:
            found = self.get(column.key)
            if found is not None and column.unit != 1.0:
                found = Estimate(found.mean / column.unit, None if found.half is None else found.half / column.unit)
            texts.append("" if found is None else found.text(column.digits))
        return [self.label, *texts]

    def as_json(self) -> dict[str, Any]:
        keys = dict.fromkeys(k for scores in self.by_seed for k, v in scores.items() if isinstance(v, int | float))
        names = dict.fromkeys(n for scores in self.by_seed for n in scores.get("accuracy_by_category", {}))
        return {
            "model": self.model,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "scores": {key: self.get(key).as_json() for key in keys},  # type: ignore[union-attr]
            "accuracy_by_category": {name: self.category(name).as_json() for name in names},  # type: ignore[union-attr]
            "cost": self.cost,
            "by_seed": self.by_seed,
        }

    def means(self) -> dict[str, float]:
        """The means of all plain scores, and the costs."""
        keys = dict.fromkeys(k for scores in self.by_seed for k, v in scores.items() if isinstance(v, int | float))
        return {**{key: self.get(key).mean for key in keys}, **self.cost}  # type: ignore[union-attr]


class Printer:
    """Prints a table line by line while its rows come, so its widths are decided before."""

    def __init__(self, columns: Sequence[Column], labels: Sequence[str], seeds: int) -> None:
        self.columns = columns
        self.first = max(len(label) for label in labels)
        room = 15 if seeds > 1 else 7
        costs = {column.key for column in COSTS}
        self.widths = [max(len(c.heading), 7 if c.key in costs else room) for c in columns]

    def header(self) -> None:
        self._line(["", *(column.heading for column in self.columns)])
        self._line(["-" * self.first, *("-" * width for width in self.widths)])

    def row(self, row: Row) -> None:
        self._line(row.cells(self.columns))

    def _line(self, cells: Sequence[str]) -> None:
        first, *others = cells
        texts = [first.ljust(self.first), *(c.rjust(w) for c, w in zip(others, self.widths, strict=True))]
        print("  ".join(texts).rstrip(), flush=True)


def category_table(rows: Sequence[Row], categories: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the accuracies by category."""
    lines = []
    for row in rows:
        found = [row.category(name) for name in categories]
        if any(f is not None for f in found):
            lines.append([row.label, *("" if f is None else f.text() for f in found)])
    return ["", *categories], lines


# ---- against another model


@dataclass(frozen=True)
class Comparison:
    """One row against another: of each score what :data:`COMPARED` says, seed by seed, and ratios of times."""

    row: Row
    other: Row
    values: dict[str, Estimate]

    def as_json(self) -> dict[str, Any]:
        return {
            "row": self.row.label,
            "against": self.other.label,
            **{key: value.as_json() for key, value in self.values.items()},
        }


COMPARED = (
    ("accuracy_difference", "accuracy, difference", "accuracy", "difference"),
    ("frechet_ratio", "Frechet, ratio", "frechet", "ratio"),
    ("fid_ratio", "FID, ratio", "fid", "ratio"),
    ("clip_score_difference", "CLIP score, difference", "clip_score", "difference"),
    ("diversity_ratio", "diversity, ratio", "diversity", "ratio"),
    ("network_speedup", "times as fast, network", "network_seconds", "speedup"),
    ("end_to_end_speedup", "times as fast, end to end", "seconds_per_picture", "speedup"),
)
"""Key of the comparison, its heading, the key of the score, and how the two are compared: this less the other, this
over the other, or the other's time over this one's."""


def compare(row: Row, other: Row) -> Comparison:
    """``row`` against ``other``, which have the same seeds."""
    values = {}
    for name, _, key, how in COMPARED:
        if how == "speedup":
            if row.cost.get(key) and key in other.cost:
                values[name] = Estimate(other.cost[key] / row.cost[key], None)
            continue
        pairs = [(a[key], b[key]) for a, b in zip(row.by_seed, other.by_seed, strict=True) if key in a and key in b]
        if how == "difference":
            found = [a - b for a, b in pairs]
        else:
            found = [a / b for a, b in pairs if b]
        if found and len(found) == len(pairs):
            values[name] = estimate(found)
    return Comparison(row, other, values)


def comparison_table(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    shown = [entry for entry in COMPARED if any(entry[0] in c.values for c in comparisons)]
    lines = []
    for comparison in comparisons:
        cells = []
        for name, _, _, how in shown:
            value = comparison.values.get(name)
            if value is None:
                cells.append("")
                continue
            text = value.text(1 if how == "speedup" else 3)
            cells.append(f"+{text}" if how == "difference" and value.mean > 0 else text)
        lines.append([f"{comparison.row.label} / {comparison.other.label}", *cells])
    return ["", *(heading for _, heading, _, _ in shown)], lines


# ---- for files


def markdown(
    title: str,
    lead: str,
    rows: Sequence[Row],
    columns: Sequence[Column],
    categories: Sequence[str],
    comparisons: Sequence[Comparison],
    notes: Sequence[str],
    picture: str | None,
) -> str:
    """A block for a model card: what was run with which versions, the tables, and what their columns mean."""
    shown = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    parts = [f"## {title}", lead, markdown_table(["", *(c.heading for c in shown)], [row.cells(shown) for row in rows])]
    header, lines = category_table(rows, categories)
    if lines:
        parts += ["Accuracy by category:", markdown_table(header, lines)]
    if comparisons:
        parts += ["Compared, seed by seed:", markdown_table(*comparison_table(comparisons))]
    if picture is not None:
        parts.append(f"![Quality against the number of sampling steps]({picture})")
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)]) + "\n"


_COLOURS = ("#b0421c", "#1b4f8a", "#3c7d3f", "#7a4b94", "#8a6d1b", "#3b8686")


def plot(path: Path, rows: Sequence[Row], scores: Sequence[tuple[str, str, bool]], floor: Row | None = None) -> Path:
    """Draws each of ``scores`` (key, heading, whether on a logarithmic axis) against the number of steps, a line for
    each model and guidance, with intervals; ``floor`` is a line across. Returns ``path``.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    require("matplotlib", extra="train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    lines: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        if row.steps is not None:
            lines.setdefault((row.model, row.guidance), []).append(row)
    models = list(dict.fromkeys(model for model, _ in lines))
    figure = Figure(figsize=(5.2 * len(scores), 4.2), dpi=120, facecolor=tuple(c / 255 for c in PAGE))
    FigureCanvasAgg(figure)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axes, (key, heading, logarithmic) in zip(
        figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True
    ):
        for index, ((model, guidance), own) in enumerate(lines.items()):
            own = sorted((row for row in own if row.get(key) is not None), key=lambda row: row.steps or 0)
            found: list[Any] = [row.get(key) for row in own]
            guided = "" if guidance in (None, 1.0) else f", guidance {guidance:g}"
            axes.errorbar(
                [row.steps for row in own],
                [value.mean for value in found],
                yerr=[value.half or 0.0 for value in found],
                color=_COLOURS[index % len(_COLOURS)],
                linestyle="-" if model == models[0] else "--",
                marker="o",
                markersize=4,
                capsize=3,
                linewidth=1.6,
                label=f"{model}{guided}",
            )
        if floor is not None and (value := floor.get(key)) is not None:
            axes.axhline(value.mean, color="#6e707a", linewidth=1, linestyle=":", label=floor.model)
        axes.set_xscale("log")
        if logarithmic:
            axes.set_yscale("log")
            # 1, 2 and 5 of every decade: scores seldom span enough of them for the powers of ten alone to say much.
            axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(plain)
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(FixedLocator(sorted({row.steps for row in rows if row.steps is not None})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(plain)
        axes.set_xlabel("sampling steps")
        axes.set_ylabel(heading)
        axes.set_facecolor("#fcfbf7")
        axes.grid(True, alpha=0.25)
        for spine in ("top", "right"):
            axes.spines[spine].set_visible(False)
    # The same lines are in every panel.
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    return path
