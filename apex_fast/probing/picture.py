"""A heat map of a probe: every shift against every layer, and against every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from apex_fast.evaluation.report import PAGE
from apex_fast.extras import require
from apex_fast.probing.probe import ProbeReport, ProbeRow
from apex_fast.probing.report import label

_INK = {"invisible": "#6e707a", "visible": "#1b4f8a", "destructive": "#b0421c"}
_LEGEND = (
    "shifts: site, scale, bias; grey letters invisible, blue visible, red destructive, * recommended. "
    "Grey fields: the measure has no meaning there."
)
_FLOOR = 1e-8
"""Below this everything is drawn alike: no softmax tells it from rounding."""


def heat_map(report: ProbeReport, path: str | Path, title: str = "") -> Path:
    """Writes a PNG: symmetric KL and relative change of the keys (shifts x layers), change of the velocity (shifts x
    times), all in decades. Grey is where a measure has no meaning. Folders are made. Returns the path.
    """
    require("matplotlib", extra="train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = [layer.layer for layer in report.rows[0].layers]
    width = min(max(0.22 * len(layers), 2.4), 12.0)
    widths = [width, width, max(0.62 * len(report.times), 1.5)]
    height = 0.27 * len(report.rows) + 2.8
    figure = Figure(figsize=(sum(widths) + 4.4, height), dpi=110, facecolor=tuple(c / 255 for c in PAGE))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, width_ratios=widths)
    columns = [_short(layer) for layer in layers]
    drawn = (
        ("symmetric KL of attention, nats", _by_layer(report, "kl"), columns, LogNorm(1e-6, 10)),
        ("relative change of keys", _by_layer(report, "keys"), columns, LogNorm(1e-4, 10)),
        ("change of velocity", np.array([row.change for row in report.rows]), _times(report), LogNorm(1e-4, 10)),
    )
    for axis, (heading, values, names, norm) in zip(panels, drawn, strict=True):
        shown = np.ma.masked_invalid(np.where(values < _FLOOR, _FLOOR, values))
        colours = require("matplotlib", extra="train").colormaps["magma_r"].with_extremes(bad="#c9c7bf")
        image = axis.imshow(shown, aspect="auto", norm=norm, cmap=colours, interpolation="nearest")
        axis.set_title(heading, fontsize=9)
        step = max(1, len(names) // 32)
        axis.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=6.5)
        axis.set_yticks([])
        figure.colorbar(image, ax=axis, fraction=0.06, pad=0.02, aspect=50).ax.tick_params(labelsize=6.5)
    first = panels[0]
    first.set_yticks(range(len(report.rows)), [_row_label(report, i) for i in range(len(report.rows))], fontsize=7.5)
    for text, row in zip(first.get_yticklabels(), report.rows, strict=True):
        text.set_family("monospace")
        text.set_color(_INK[row.verdict])
    for i, row in enumerate(report.rows):
        for j, value in enumerate(row.change):
            dark = np.isfinite(value) and value > 0.05
            panels[2].text(
                j, i, f"{value:.2g}", ha="center", va="center", fontsize=5.5, color="#fcfbf7" if dark else "#161e3e"
            )
    figure.suptitle(title or f"shift probe: {report.family}", fontsize=11)
    figure.text(0.01, 0.005, _LEGEND, fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path)
    return path


def _by_layer(report: ProbeReport, name: str) -> np.ndarray:
    values = [[getattr(layer, name) for layer in row.layers] for row in report.rows]
    return np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)


def _times(report: ProbeReport) -> list[str]:
    return [f"t = {t:g}" for t in report.times]


def _row_label(report: ProbeReport, position: int) -> str:
    row: ProbeRow = report.rows[position]
    return label(row) + (" *" if position == report.recommended else "  ")


def _short(layer: str) -> str:
    """ "single_transformer_blocks.3.attn" as "single 3", "transformer_blocks.0.attn2" as "0 attn2"."""
    words = layer.replace("transformer_blocks", "").replace("layers.", ".").replace("attention", "attn").split(".")
    words = [word.strip("_") for word in words if word.strip("_")]
    return " ".join(word for word in words if word != "attn")
