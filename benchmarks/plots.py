"""Time and memory against size, with the line below which nothing can go: one PNG for each suite of a report.

=========  ======================================  ====================================  ===============================
suite      against                                 floor of the time                     floor of the memory
=========  ======================================  ====================================  ===============================
ops        bytes of one tensor                     minimum bytes at the copy bandwidth   the results alone
step       latent pixels of a sample               passes of the network, timed alone    plain flow matching
sampler    steps                                   the network's calls alone             (images per second instead)
=========  ======================================  ====================================  ===============================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apex_fast.extras import require

from .report import Row

Points = list[tuple[float, float]]

_COLOURS = ("#1b4f8a", "#b0421c", "#3c7d3f", "#7a4b94", "#8a6d1b", "#3b8686")


@dataclass
class Panel:
    """One plot: lines by name, and the dashed floor below them."""

    title: str
    across: str
    up: str
    lines: dict[str, Points] = field(default_factory=dict)
    floor: tuple[str, Points] = ("", [])


def draw(path: Path, rows: Iterable[Row]) -> list[Path]:
    """Writes ``<stem>-<suite>.png`` beside ``path`` for each suite in ``rows`` that has something to show.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    rows = [row for row in rows if row.p50_ms is not None]
    written = []
    for suite, panels_of in _PANELS.items():
        panels = panels_of([row for row in rows if row.suite == suite])
        if panels:
            written.append(path.with_name(f"{path.stem}-{suite}.png"))
            _save(written[-1], panels)
    return written


def _grouped(rows: Iterable[Row], key: Callable[[Row], object]) -> list[list[Row]]:
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _lines(rows: Iterable[Row], across: Callable[[Row], float], up: Callable[[Row], float | None]) -> dict[str, Points]:
    lines: dict[str, Points] = {}
    for row in rows:
        value = up(row)
        if value is not None:
            lines.setdefault(row.provider, []).append((across(row), value))
    return {name: sorted(points) for name, points in lines.items()}


def _floor(rows: Iterable[Row], across: Callable[[Row], float], up: Callable[[Row], float | None]) -> Points:
    """The least of each size."""
    least: dict[float, float] = {}
    for row in rows:
        value = up(row)
        if value is not None:
            least[across(row)] = min(value, least.get(across(row), math.inf))
    return sorted(least.items())


# ---- what each suite shows

_ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _ops(rows: list[Row]) -> list[Panel]:
    panels = []
    # Both passes where there are two; fusions have one size and are in the table.
    shown = [row for row in rows if row.minimum_bytes and row.copy_gbps]
    backward = {row.case for row in shown if row.mode == "forward_backward"}
    shown = [row for row in shown if row.case not in backward or row.mode == "forward_backward"]
    for group in _grouped(shown, lambda row: (row.dtype, row.case)):

        def size(row: Row) -> float:
            return math.prod(row.shape) * _ITEM_BYTES[row.dtype] / 1e6

        title = f"{group[0].case}\n{group[0].mode}, {group[0].dtype}"
        floor = _floor(group, size, lambda row: row.minimum_bytes / row.copy_gbps / 1e6)
        panels.append(
            Panel(
                title,
                "MB of a tensor",
                "ms",
                _lines(group, size, lambda row: row.p50_ms),
                ("minimum bytes, as fast as a copy", floor),
            )
        )
        memory = _lines(group, size, lambda row: None if row.extra_bytes is None else row.extra_bytes / 1e6)
        least = _floor(
            group, size, lambda row: None if row.minimum_extra_bytes is None else row.minimum_extra_bytes / 1e6
        )
        panels.append(Panel(title, "MB of a tensor", "peak of extra MB", memory, ("the results alone", least)))
    return panels


def _step(rows: list[Row]) -> list[Panel]:
    panels = []
    for group in _grouped(rows, lambda row: (row.case, row.mode, row.dtype)):

        def size(row: Row) -> float:
            return float(math.prod(row.shape[2:]))

        ways = [row for row in group if row.provider != "flow_matching"]
        plain = [row for row in group if row.provider == "flow_matching"]
        title = f"{group[0].case}\n{group[0].mode}, {group[0].dtype}"
        passes = _floor([row for row in ways if row.is_ours], size, lambda row: row.passes_ms)
        times = _lines(ways, size, lambda row: row.p50_ms)
        panels.append(Panel(title, "latent pixels", "ms", times, ("the fewest passes alone", passes)))
        peaks = _lines(ways, size, lambda row: row.peak_bytes / 1e6)
        floor = _floor(plain, size, lambda row: row.peak_bytes / 1e6)
        panels.append(Panel(title, "latent pixels", "peak MB", peaks, ("plain flow matching", floor)))
    return panels


def _sampler(rows: list[Row]) -> list[Panel]:
    panels = []

    def steps(row: Row) -> float:
        return float(row.case.rpartition(", ")[2].split()[0])

    for group in _grouped(rows, lambda row: (row.case.rpartition(", ")[0], row.mode, row.dtype)):
        title = f"{group[0].case.rpartition(', ')[0]}\n{group[0].mode}, {group[0].dtype}"
        network = _floor(
            [row for row in group if row.is_ours], steps, lambda row: row.p50_ms * (1 - (row.sampler_share or 0.0))
        )
        times = _lines(group, steps, lambda row: row.p50_ms)
        panels.append(Panel(title, "steps", "ms", times, ("the network alone", network)))
        rates = _lines(group, steps, lambda row: row.images_per_second)
        panels.append(Panel(title, "steps", "images per second", rates))
    return panels


_PANELS: dict[str, Callable[[list[Row]], list[Panel]]] = {"ops": _ops, "step": _step, "sampler": _sampler}


# ---- drawing


def _save(path: Path, panels: Sequence[Panel]) -> None:
    require("matplotlib", extra="train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    across = min(4, len(panels))
    down = math.ceil(len(panels) / across)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: _COLOURS[k % len(_COLOURS)] for k, name in enumerate(names)}
    figure = Figure(figsize=(4 * across, 2.9 * down), dpi=90)
    FigureCanvasAgg(figure)
    for panel, axes in zip(panels, figure.subplots(down, across, squeeze=False).flat, strict=False):
        for name, points in panel.lines.items():
            axes.plot(*zip(*points, strict=True), "o-", color=colours[name], label=name, linewidth=1.4, markersize=3)
        label, floor = panel.floor
        if floor:
            axes.plot(*zip(*floor, strict=True), "--", color="#555555", label=label, linewidth=1.2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        sizes = sorted({x for points in (*panel.lines.values(), floor) for x, _ in points})
        axes.set_xticks(sizes, [f"{size:,g}" for size in sizes])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(panel.title, fontsize=8)
        axes.set_xlabel(panel.across, fontsize=8)
        axes.set_ylabel(panel.up, fontsize=8)
        axes.tick_params(labelsize=7, which="both")
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(frameon=False, fontsize=6)
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
