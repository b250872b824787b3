"""Pictures and pages from results: labelled sample grids, the strip over training, loss curves, the table, the HTML
report.

Everything here takes images as ``[N, C, H, W]`` tensors in [-1, 1] (-1 is paper, 1 is ink, for one channel) and plain
numbers.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from apex_fast.extras import require

PAPER, INK = np.array([252, 251, 247], dtype=np.float32), np.array([22, 30, 62], dtype=np.float32)
PAGE, TEXT, FAINT, ACCENT = (238, 236, 229), (28, 32, 48), (110, 112, 122), (176, 66, 28)


def pixels(image: Tensor, size: int) -> np.ndarray:
    """One image ``[C, H, W]`` in [-1, 1] as uint8 ``[size, size, 3]``: smooth enlargement, one channel drawn as ink on
    paper, three as RGB.

    Raises ValueError for another number of channels."""
    pil = require("PIL.Image", extra="train")
    values = image.detach().float().cpu().clamp(-1, 1).add(1).div(2)
    if values.shape[0] not in (1, 3):
        raise ValueError(f"pixels: an image has 1 or 3 channels, got shape {list(values.shape)}")
    planes = []
    for plane in values.numpy():
        if values.shape[0] == 1 and size > 2 * plane.shape[0]:
            plane = np.pad(plane, 1)  # a rim of paper: strokes reach the edge of the scans and would look cut off
        drawn = pil.fromarray(plane)
        planes.append(np.clip(np.asarray(drawn.resize((size, size), pil.Resampling.BICUBIC)), 0.0, 1.0))
    if len(planes) == 1:
        ink = planes[0][..., None]
        return np.rint(PAPER * (1 - ink) + INK * ink).astype(np.uint8)
    return np.rint(np.stack(planes, axis=-1) * 255).astype(np.uint8)


HEAD_LINE = 18
"""Pixels from one line to the next in the head of a column."""


def _font(size: int) -> Any:
    return require("PIL.ImageFont", extra="train").load_default(size)


@dataclass(frozen=True)
class Row:
    """One row of a sample picture: a name, a line of facts below it, images ``[columns * per_column, C, H, W]`` grouped
    by column."""

    name: str
    facts: str
    images: Tensor
    emphasis: bool = False


def sample_picture(
    rows: Sequence[Row],
    columns: Sequence[str],
    *,
    per_column: int,
    title: str,
    subtitle: str = "",
    tile: int = 56,
    across: int | None = None,
) -> Any:
    """A labelled grid as a PIL image: one row per model, one column per prompt, ``per_column`` seeds as a small block
    in each cell.

    ``columns``: heads, which may have several lines. ``across``: tiles side by side in a block (default: as square as
    possible). Raises ValueError if a row holds another number of images.
    """
    pil, draw_module = require("PIL.Image", extra="train"), require("PIL.ImageDraw", extra="train")
    across = across or math.ceil(math.sqrt(per_column))
    down = math.ceil(per_column / across)
    inner, gap, row_gap, margin = 3, 12, 18, 28
    block_width, block_height = across * tile + (across - 1) * inner, down * tile + (down - 1) * inner
    name_font, fact_font, head_font, title_font = _font(21), _font(15), _font(15), _font(27)
    ruler = draw_module.Draw(pil.new("RGB", (8, 8)))
    label_width = (
        int(
            max(
                [ruler.textlength(r.name, font=name_font) for r in rows]
                + [ruler.textlength(r.facts, font=fact_font) for r in rows]
            )
        )
        + 26
    )
    heads = [column.split("\n") for column in columns]
    top = margin + (44 if title else 0) + (26 if subtitle else 0) + 30 + HEAD_LINE * (max(map(len, heads)) - 1)
    width = margin + label_width + len(columns) * (block_width + gap) - gap + margin
    width = max(
        width,
        margin * 2 + int(ruler.textlength(title, font=title_font)),
        margin * 2 + int(ruler.textlength(subtitle, font=fact_font)),
    )
    height = top + len(rows) * (block_height + row_gap) - row_gap + margin
    picture = pil.new("RGB", (width, height), PAGE)
    draw = draw_module.Draw(picture)
    y = margin
    if title:
        draw.text((margin, y), title, font=title_font, fill=TEXT)
        y += 44
    if subtitle:
        draw.text((margin, y - 4), subtitle, font=fact_font, fill=FAINT)
    for j, lines in enumerate(heads):
        x = margin + label_width + j * (block_width + gap)
        for k, line in enumerate(reversed(lines)):
            place = (x + block_width / 2, top - 8 - k * HEAD_LINE)
            draw.text(place, line, font=head_font, fill=FAINT, anchor="ms")
    for i, row in enumerate(rows):
        if len(row.images) != per_column * len(columns):
            raise ValueError(
                f"sample_picture: row {row.name!r} has {len(row.images)} images, expected {per_column} x {len(columns)}"
            )
        y = top + i * (block_height + row_gap)
        if row.emphasis:
            draw.rounded_rectangle(
                (margin - 14, y - 8, width - margin + 14, y + block_height + 8),
                radius=10,
                fill=(255, 255, 255),
                outline=ACCENT,
                width=2,
            )
        middle = y + block_height / 2
        draw.text(
            (margin, middle - (11 if row.facts else 0)),
            row.name,
            font=name_font,
            fill=ACCENT if row.emphasis else TEXT,
            anchor="lm",
        )
        if row.facts:
            draw.text((margin, middle + 14), row.facts, font=fact_font, fill=FAINT, anchor="lm")
        for j in range(len(columns)):
            for k in range(per_column):
                x = margin + label_width + j * (block_width + gap) + (k % across) * (tile + inner)
                tile_y = y + (k // across) * (tile + inner)
                picture.paste(pil.fromarray(pixels(row.images[j * per_column + k], tile)), (x, tile_y))
    return picture


def grid_picture(images: Tensor, *, tile: int = 64, across: int | None = None) -> Any:
    """Images ``[N, C, H, W]`` without labels as one PIL image."""
    pil = require("PIL.Image", extra="train")
    count = len(images)
    across = across or math.ceil(math.sqrt(count))
    gap = max(2, tile // 16)
    picture = pil.new("RGB", (across * (tile + gap) + gap, math.ceil(count / across) * (tile + gap) + gap), PAGE)
    for k, image in enumerate(images):
        picture.paste(
            pil.fromarray(pixels(image, tile)), (gap + (k % across) * (tile + gap), gap + (k // across) * (tile + gap))
        )
    return picture


def loss_curves(
    path: Path,
    records: Sequence[Mapping[str, Any]],
    curves: Mapping[str, str],
    *,
    phases: Sequence[tuple[int, str]] = (),
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Draws the ``curves`` (key in the records -> label) against ``step`` and, below, the one-step distance of
    ``evaluations``.

    ``phases``: (first step, name) pairs, drawn as bands. Non-positive values are left out of the logarithmic axis."""
    require("matplotlib", extra="train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9, 6.4 if evaluations else 3.8), dpi=120, facecolor=tuple(c / 255 for c in PAGE))
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if evaluations else 1, 1, sharex=True, squeeze=False)[:, 0]
    last = max((int(r["step"]) for r in records), default=1)
    colours = ["#1b4f8a", "#b0421c", "#3c7d3f", "#7a4b94"]
    for (key, label), colour in zip(curves.items(), colours, strict=False):
        points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float)) and r[key] > 0]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        axes[0].plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
        axes[0].plot(steps, _smooth(values), color=colour, linewidth=1.8, label=label)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("loss (log)")
    if axes[0].get_lines():
        axes[0].legend(frameon=False, loc="upper right", fontsize=9, ncols=3)
    if evaluations:
        axes[1].plot(
            [e["step"] for e in evaluations],
            [e["frechet"] for e in evaluations],
            "o-",
            color="#1b4f8a",
            linewidth=1.8,
            markersize=4,
        )
        axes[1].set_yscale("log")
        axes[1].set_ylabel("Frechet distance,\n1 step (log)")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in axes:
        # 1, 2 and 5 of every decade: a loss seldom spans enough of them for the powers of ten alone to say much.
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_facecolor("#fcfbf7")
        axis.grid(True, alpha=0.25)
        for spine in ("top", "right"):
            axis.spines[spine].set_visible(False)
        for i, (first, name) in enumerate(phases):
            end = phases[i + 1][0] if i + 1 < len(phases) else last
            axis.axvspan(first, end, color="#161e3e", alpha=(0.09, 0.045, 0.0)[min(i, 2)], linewidth=0)
            if axis is axes[0] and end > first:
                axis.text(
                    (first + end) / 2,
                    1.02,
                    name,
                    transform=axis.get_xaxis_transform(),
                    ha="center",
                    fontsize=9,
                    color="#6e707a",
                )
    axes[-1].set_xlabel("step")
    axes[-1].set_xlim(0, last)
    figure.tight_layout()
    figure.savefig(path)


def _smooth(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    width = max(1, len(array) // 40)
    padded = np.concatenate([np.full(width, array[0]), array, np.full(width, array[-1])])
    return np.convolve(padded, np.ones(2 * width + 1) / (2 * width + 1), mode="valid")


# ---- tables


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text: the first column to the left, the others to the right."""
    widths = [max(len(str(line[i])) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(r) for r in rows)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(["---"] + ["---:"] * (len(header) - 1)) + " |"]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])


# ---- page


def report_page(
    path: Path,
    *,
    title: str,
    lead: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    targets: Sequence[tuple[str, bool]],
    pictures: Sequence[tuple[Path, str, str]],
    notes: Sequence[str],
    commands: Sequence[str],
    facts: Mapping[str, str],
) -> None:
    """Writes one HTML file that needs no other: pictures (path, heading, caption) are inside it.

    ``targets``: (what was to be reached, whether it was)."""

    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(str(v))}</{tag}>" for v in values)

    table = (
        f"<table><thead><tr>{cells(header, 'th')}</tr></thead><tbody>"
        + "".join(f"<tr>{cells(r, 'td')}</tr>" for r in rows)
        + "</tbody></table>"
    )
    checks = "".join(
        f"<li class={'yes' if reached else 'no'}><b>{'reached' if reached else 'not reached'}</b> "
        f"{html.escape(what)}</li>"
        for what, reached in targets
    )
    figures = "".join(
        f'<figure><h2>{html.escape(heading)}</h2><img alt="{html.escape(heading)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for picture, heading, caption in pictures
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
body {{ background: #eeece5; color: #1c2030; font: 16px/1.5 system-ui, sans-serif }}
body {{ margin: 0 auto; max-width: 1100px; padding: 2rem 1rem 4rem }}
h1 {{ font-size: 2rem; margin: 0 0 .5rem }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem }}
table {{ border-collapse: collapse; background: #fcfbf7; width: 100% }}
th, td {{ padding: .4rem .8rem; border-bottom: 1px solid #d9d6cb }}
th, td {{ text-align: right; font-variant-numeric: tabular-nums }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100%; border-radius: 8px }} figure {{ margin: 0 }} figcaption {{ color: #6e707a; font-size: .92rem }}
ul.targets {{ list-style: none; padding: 0 }} li.yes b {{ color: #2c6e36 }} li.no b {{ color: #b0421c }}
pre {{ background: #161e3e; color: #f3f1ea; padding: 1rem; border-radius: 8px; overflow-x: auto }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; color: #6e707a; font-size: .92rem }}
dd {{ margin: 0 }}
</style></head><body>
<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>
{table}
<ul class="targets">{checks}</ul>
{figures}
<h2>How to read this</h2><ul>{"".join(f"<li>{html.escape(n)}</li>" for n in notes)}</ul>
<h2>Next</h2><pre>{html.escape(chr(10).join(commands))}</pre>
<h2>This run</h2><dl>{"".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())}</dl>
</body></html>
"""
    path.write_text(page, encoding="utf-8")
