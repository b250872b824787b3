"""Rows, gates, and what is made of them: a table, JSON, a comparison with an older run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
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
    """Ops: ``forward`` (no gradients) or ``forward_backward``. Steps: what is trained. Sampling: how it is guided."""
    dtype: str
    shape: list[int]
    size: str
    """``latent``: a real training size; ``beyond_cache``: no tensor fits the cache. Steps, sampling: text tokens."""

    minimum_bytes: int | None = None
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
    """Median of eager over this one's: above 1 is faster. Of a step: of the naive way."""
    ratio_to_compile: float | None = None
    ratio_to_checkpoint: float | None = None
    """To ``torch.utils.checkpoint`` around the same modules."""
    moved_bytes: int | None = None
    """What the operations of this provider read and write, counted one by one."""
    kept_bytes: int | None = None
    """What autograd keeps for the backward, inputs and parameters apart."""
    peak_bytes: int | None = None
    """Most bytes held during a step: weights, gradients, inputs and all that comes and goes. No optimizer."""
    peak_over_flow_matching: float | None = None
    """To the peak of a plain flow-matching step of the same batch, its gradient buffers allocated."""
    weight_bytes: int | None = None
    """Parameters and buffers of all networks that the step holds."""
    time_over_passes: float | None = None
    """Median over the sum of the step's passes, each timed alone."""
    passes_ms: float | None = None
    """That sum."""
    images_per_second: float | None = None
    sampler_share: float | None = None
    """Share of the time that is not the network's."""
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

    @property
    def is_ours(self) -> bool:
        """Whether this library did it, in one of the ways that it has."""
        return self.provider.startswith("apex_fast")

    @property
    def which(self) -> str:
        """The way, where it has several."""
        return self.provider.removeprefix("apex_fast").replace(" ", ", ", 1)


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
            row.ratio_to_checkpoint = medians["checkpoint"] / row.p50_ms if medians.get("checkpoint") else None


# ---- text


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.2f}"


_COLUMNS: dict[str, tuple[tuple[str, int, Callable[[Row], str]], ...]] = {
    "ops": (
        ("GB/s", 8, lambda row: _number(row.gbps, ".1f")),
        ("of copy", 8, lambda row: _number(row.fraction_of_copy)),
        (
            "extra MB / minimum",
            20,
            lambda row: f"{_megabytes(row.extra_bytes)} / {_megabytes(row.minimum_extra_bytes)}",
        ),
        ("x eager", 8, lambda row: _number(row.ratio_to_eager)),
        ("x compile", 9, lambda row: _number(row.ratio_to_compile)),
    ),
    "fusions": (
        ("moved MB", 10, lambda row: _megabytes(row.moved_bytes)),
        ("kept MB", 10, lambda row: _megabytes(row.kept_bytes)),
        ("x eager", 8, lambda row: _number(row.ratio_to_eager)),
        ("x checkpoint", 12, lambda row: _number(row.ratio_to_checkpoint)),
    ),
    "step": (
        ("over passes", 11, lambda row: _number(row.time_over_passes)),
        ("peak MB", 10, lambda row: _megabytes(row.peak_bytes)),
        ("over flow matching", 18, lambda row: _number(row.peak_over_flow_matching)),
        ("weights MB", 10, lambda row: _megabytes(row.weight_bytes)),
        ("x naive", 8, lambda row: _number(row.ratio_to_eager)),
    ),
    "sampler": (
        ("images/s", 10, lambda row: _number(row.images_per_second, ".1f")),
        ("sampler's share", 15, lambda row: _number(row.sampler_share, ".2%")),
        ("x eager", 8, lambda row: _number(row.ratio_to_eager)),
    ),
}
_PROVIDER_WIDTH, _TIME_WIDTH = 22, 32


def _kind(row: Row) -> str:
    return "fusions" if row.suite == "ops" and row.moved_bytes is not None else row.suite


def _row_line(row: Row) -> str:
    provider = "  " + row.provider.ljust(_PROVIDER_WIDTH)
    if row.error:
        return f"{provider} no time: {row.error}"
    time = f"{row.p50_ms:.3f} [{row.p20_ms:.3f}, {row.p80_ms:.3f}]".rjust(_TIME_WIDTH)
    return " ".join([provider, time, *(cell(row).rjust(width) for _, width, cell in _COLUMNS[_kind(row)])])


def _heading(row: Row) -> str:
    names = [name.rjust(width) for name, width, _ in _COLUMNS[_kind(row)]]
    return " ".join(["  " + "provider".ljust(_PROVIDER_WIDTH), "p50 [p20, p80] ms".rjust(_TIME_WIDTH), *names])


def table(rows: Iterable[Row]) -> str:
    """The rows, grouped by case."""
    lines = []
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            lines += ["", f"{row.title}, {row.size}", _heading(row)]
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
        if not row.is_ours:
            continue
        plain = "the naive way" if row.suite == "step" else "eager"
        others = (plain, row.ratio_to_eager), ("compile", row.ratio_to_compile), ("checkpoint", row.ratio_to_checkpoint)
        for other, ratio in others:
            if ratio is not None and ratio < 1:
                lines.append(f"slower than {other}: {row.title}{row.which}, {ratio:.2f}x")
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
    """Medians of apex_fast then and now, and peaks of steps. A change is called one where the spreads [p20, p80] do not
    touch."""
    lines = [f"Compared with {old_header.get('date')}, commit {old_header.get('commit')} (ratio: old over new)"]
    for name in ("device", "torch", "threads", "isa", "quick"):
        if old_header.get(name) != header.get(name):
            lines.append(f"  NOTE: {name} was {old_header.get(name)} and is {header.get(name)}")
    before = {row.key: row for row in old}
    matched = 0
    for row in new:
        was = before.get(row.key)
        if not row.is_ours or was is None or was.p50_ms is None or row.p50_ms is None:
            continue
        matched += 1
        verdict = "same"
        if row.p20_ms > was.p80_ms:
            verdict = "SLOWER"
        elif row.p80_ms < was.p20_ms:
            verdict = "faster"
        lines.append(
            f"  {verdict:7}{was.p50_ms / row.p50_ms:6.2f}  {was.p50_ms:.3f} -> {row.p50_ms:.3f} ms"
            f"  {row.title}{row.which}"
        )
        if was.peak_bytes and row.peak_bytes:
            lines[-1] += f", peak {_megabytes(was.peak_bytes)} -> {_megabytes(row.peak_bytes)} MB"
    if not matched:
        lines.append("  no case of that run is in this one")
    return "\n".join(lines)
