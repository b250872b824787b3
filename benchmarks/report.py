"""Rows, gates, and what is made of them: a table, JSON, a comparison with an older run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One provider on one case. Times are of one call; None where none is reported, and ``error`` says why."""

    suite: str
    case: str
    provider: str
    mode: str
    """``forward`` (no gradients) or ``forward_backward``."""
    dtype: str
    shape: list[int]
    size: str
    """``latent``: a real training size; ``beyond_cache``: no tensor fits the cache."""

    minimum_bytes: int
    """What the op has to read and write, each input and output of each pass once."""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    gbps: float | None = None
    """``minimum_bytes`` over the median, for every provider: bytes that only a provider adds do not count."""
    copy_gbps: float | None = None
    """Copy bandwidth between the calls of this very case."""
    fraction_of_copy: float | None = None
    extra_bytes: int | None = None
    """Peak of tensor memory above the inputs, results included."""
    minimum_extra_bytes: int | None = None
    """The results alone: outputs, and the gradients asked for."""
    ratio_to_eager: float | None = None
    """Median of eager over this one's: above 1 is faster."""
    ratio_to_compile: float | None = None
    calls: int = 0
    page_faults: float | None = None
    """Per call. Other than about 0 means that the memory of results was not at hand."""
    error: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        return self.suite, self.case, self.mode, self.dtype, tuple(self.shape), self.provider

    @property
    def group(self) -> tuple[object, ...]:
        return self.key[:-1]

    @property
    def title(self) -> str:
        return f"{self.case} {self.mode} {self.dtype} {self.shape}"


@dataclass
class Gate:
    """A promise and whether it was kept; ``passed`` is None where this run could not judge it."""

    name: str
    limit: str
    measured: str
    passed: bool | None

    def __str__(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "not judged"}[self.passed]
        return f"{verdict:10} {self.name}: {self.limit}; {self.measured}"


@dataclass
class SuiteResult:
    rows: list[Row] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)


def add_ratios(rows: Iterable[Row]) -> None:
    """Fill ``ratio_to_eager`` and ``ratio_to_compile`` of the rows of one case."""
    rows = list(rows)
    medians = {row.provider: row.p50_ms for row in rows}
    for row in rows:
        if row.p50_ms:
            row.ratio_to_eager = medians["eager"] / row.p50_ms if medians.get("eager") else None
            row.ratio_to_compile = medians["compile"] / row.p50_ms if medians.get("compile") else None


# ---- text


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.2f}"


_COLUMNS = (
    ("provider", 10),
    ("p50 [p20, p80] ms", 28),
    ("GB/s", 8),
    ("of copy", 8),
    ("extra MB / minimum", 20),
    ("x eager", 8),
    ("x compile", 9),
)


def _line(cells: Iterable[str]) -> str:
    return "  " + " ".join(
        cell.ljust(width) if k == 0 else cell.rjust(width)
        for k, (cell, (_, width)) in enumerate(zip(cells, _COLUMNS, strict=True))
    )


def _row_line(row: Row) -> str:
    if row.error:
        return f"  {row.provider.ljust(_COLUMNS[0][1])} no time: {row.error}"
    cells = (
        row.provider,
        f"{row.p50_ms:.3f} [{row.p20_ms:.3f}, {row.p80_ms:.3f}]",
        _number(row.gbps, ".1f"),
        _number(row.fraction_of_copy),
        f"{_megabytes(row.extra_bytes)} / {_megabytes(row.minimum_extra_bytes)}",
        _number(row.ratio_to_eager),
        _number(row.ratio_to_compile),
    )
    return _line(cells)


def table(rows: Iterable[Row]) -> str:
    """The rows, grouped by case."""
    lines = []
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            lines += ["", f"{row.title}, {row.size}", _line(name for name, _ in _COLUMNS)]
        lines.append(_row_line(row))
    return "\n".join(lines)


def header_text(header: dict[str, Any]) -> str:
    lines = [f"{name:24} {'-' if value is None else value}" for name, value in header.items()]
    if header.get("busy"):
        lines.append("WARNING: the machine is busy with other work; times and ratios are not to be quoted")
    if header.get("quick"):
        lines.append("WARNING: a quick run on tiny shapes, to see that everything works; its times mean nothing")
    return "\n".join(lines)


def slow_cases(rows: Iterable[Row]) -> list[str]:
    """Where apex_fast is not the fastest, said plainly."""
    lines = []
    for row in rows:
        if row.provider != "apex_fast":
            continue
        for other, ratio in (("eager", row.ratio_to_eager), ("compile", row.ratio_to_compile)):
            if ratio is not None and ratio < 1:
                lines.append(f"slower than {other}: {row.title}, {ratio:.2f}x")
    return sorted(lines)


def failures(rows: Iterable[Row]) -> list[str]:
    return [f"{row.provider}, {row.title}: {row.error}" for row in rows if row.error]


# ---- JSON


def write_json(path: Path, header: dict[str, Any], rows: Iterable[Row], gates: Iterable[Gate]) -> None:
    document = {
        "header": header,
        "rows": [asdict(row) for row in rows],
        "gates": [asdict(gate) for gate in gates],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def read_json(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of an earlier run.

    Raises:
        ValueError: the file is no such report; the message says what is wrong with it.
    """
    try:
        document = json.loads(path.read_text())
        # Fields that a later version adds are not ours to read.
        known = Row.__dataclass_fields__
        rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in document["rows"]]
        return document["header"], rows
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no report of benchmarks/run.py ({error!r}); make one with --json FILE") from error


def comparison(old_header: dict[str, Any], old: Iterable[Row], header: dict[str, Any], new: Iterable[Row]) -> str:
    """Medians of apex_fast then and now. A change is called one where the spreads [p20, p80] do not touch."""
    lines = [f"Compared with {old_header.get('date')}, commit {old_header.get('commit')} (ratio: old over new)"]
    for name in ("device", "torch", "threads", "isa", "quick"):
        if old_header.get(name) != header.get(name):
            lines.append(f"  NOTE: {name} was {old_header.get(name)} and is {header.get(name)}")
    before = {row.key: row for row in old}
    matched = 0
    for row in new:
        was = before.get(row.key)
        if row.provider != "apex_fast" or was is None or was.p50_ms is None or row.p50_ms is None:
            continue
        matched += 1
        verdict = "same"
        if row.p20_ms > was.p80_ms:
            verdict = "SLOWER"
        elif row.p80_ms < was.p20_ms:
            verdict = "faster"
        lines.append(
            f"  {verdict:7}{was.p50_ms / row.p50_ms:6.2f}  {was.p50_ms:.3f} -> {row.p50_ms:.3f} ms  {row.title}"
        )
    if not matched:
        lines.append("  no case of that run is in this one")
    return "\n".join(lines)
