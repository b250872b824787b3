"""What a probe found, as text and as plain values for JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from apex_fast.evaluation.report import text_table
from apex_fast.probing.probe import ProbeReport, ProbeRow
from apex_fast.probing.verdict import percent

NOT_APPLICABLE = "n/a"


def label(row: ProbeRow) -> str:
    """A row in a few words, aligned: site, scale, bias, and what else tells it from others."""
    text = f"{row.site:<9}  {row.scale:>5.4g}  {row.bias:>4.4g}"
    more = [part for part in (row.name, "" if row.mode == "scalar" else row.mode) if part]
    return f"{text}  ({', '.join(more)})" if more else text


def table(report: ProbeReport) -> str:
    """The report as the command prints it."""
    return "\n".join(
        [*_head(report), "", *_rows(report), "", *_legend(report), "", *_reasons(report), "", *_advice(report)]
    )


def _head(report: ProbeReport) -> list[str]:
    held = report.held_bytes / (1 << 20)
    lines = [
        f"{report.family}, {report.dtype}, {report.samples} prompt{'s' if report.samples > 1 else ''}: {report.passes} "
        f"passes in {report.seconds:.1f} s, {held:.3g} MiB held",
        "one rounding of the text moves the velocity by " + ", ".join(map(percent, report.rounding)),
    ]
    if report.other_prompt is not None:
        lines.append("another prompt moves it by " + ", ".join(map(percent, report.other_prompt)))
    if report.pooled:
        how = "shifted as well, raw, at either site" if report.pooled_shifted else "not shifted"
        lines.append(f"the pooled text embedding is {how}")
    return lines


def _rows(report: ProbeReport) -> list[str]:
    times = [f"t={t:g}" for t in report.times]
    header = ["site       scale  bias", *times, "cosine", "KL", "same", "keys", "values", "verdict"]
    rows = [
        [
            label(row),
            *(f"{value:.3g}" for value in row.change),
            _number(sum(row.cosine) / len(row.cosine)),
            _number(row.kl, 2),
            _number(row.common_share, 2),
            _number(row.keys, 2),
            _number(row.values, 2),
            row.verdict + (" *" if i == report.recommended else ""),
        ]
        for i, row in enumerate(report.rows)
    ]
    return text_table(header, rows).splitlines()


def _legend(report: ProbeReport) -> list[str]:
    return [
        "t=...: ||v_shift - v_real|| / ||v_real|| at the same x_t. cosine: of the two velocities, mean over times.",
        "KL: symmetric, in nats, of the attention weights for the real queries. same: the share of the change in the",
        "text's keys that is the same for every token. keys, values: relative change of the text's. All four are means",
        "over times and over the layers whose softmax has keys of the text; a single layer is in the JSON.",
    ]


def _reasons(report: ProbeReport) -> list[str]:
    return [f"{label(row)}  {row.verdict}: {row.reason}" for row in report.rows]


def _advice(report: ProbeReport) -> list[str]:
    if report.recommended is None:
        return [f"no recommendation: {report.why}"]
    row = report.rows[report.recommended]
    keys = f"shift.scale {row.scale:g}, shift.bias {row.bias:g}, shift.site {row.site}"
    return [
        f"recommended (*): {keys}" + ("" if row.mode == "scalar" else f", shift.mode {row.mode}") + f": {report.why}"
    ]


def _number(value: float | None, digits: int = 3) -> str:
    return NOT_APPLICABLE if value is None else f"{value:.{digits}g}"


def as_mapping(report: ProbeReport) -> dict[str, Any]:
    """The report as plain values: null where a measure has no meaning, "nan" and "inf" for what is not finite."""
    rows = [
        {
            "name": row.name,
            "mode": row.mode,
            "site": row.site,
            "scale": row.scale,
            "bias": row.bias,
            "verdict": row.verdict,
            "reason": row.reason,
            "velocity_change": row.change,
            "cosine": row.cosine,
            "norm": row.norm,
            "kl": row.kl,
            "common_share": row.common_share,
            "entropy_share": row.entropy_share,
            "keys": row.keys,
            "values": row.values,
            "layers": [dataclasses.asdict(layer) for layer in row.layers],
        }
        for row in report.rows
    ]
    best = None
    if report.recommended is not None:
        row = report.rows[report.recommended]
        best = {"row": report.recommended, "mode": row.mode, "site": row.site, "scale": row.scale, "bias": row.bias}
    return _plain(
        {
            "family": report.family,
            "dtype": report.dtype,
            "times": report.times,
            "samples": report.samples,
            "rounding": report.rounding,
            "other_prompt": report.other_prompt,
            "pooled_shifted": report.pooled_shifted if report.pooled else None,
            "thresholds": dataclasses.asdict(report.thresholds),
            "recommended": best,
            "why": report.why,
            "passes": report.passes,
            "held_bytes": report.held_bytes,
            "seconds": report.seconds,
            "rows": rows,
        }
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
