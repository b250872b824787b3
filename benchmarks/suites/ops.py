"""Suite ``ops``: every op forward and forward + backward, beside plain torch and ``torch.compile`` of the same; and the
fusions (:mod:`benchmarks.suites.fusions`), beside the modules that they stand in for.

All providers deliver the same results from the same operands: where an op returns statistics, so do the others. They
are checked against the op's fp64 twin before anything is timed, and a provider that is wrong gets no time.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..allocator import release, touch
from ..machine import CopyProbe
from ..report import Gate, Row, SuiteResult, add_ratios
from ..timing import Timing, interleave, peak_extra_bytes
from . import fusions
from .ops_cases import (
    CASES,
    DTYPES,
    Case,
    Results,
    disagreements,
    make_operands,
    make_upstream,
    minimum_bytes,
    run,
    shape_of,
)

PROVIDERS = ("eager", "compile", "apex_fast")


@dataclass(frozen=True)
class Settings:
    """What to run. ``only``: cases whose name contains this."""

    dtypes: tuple[str, ...]
    providers: tuple[str, ...] = PROVIDERS
    only: str = ""
    quick: bool = False
    beyond_cache_bytes: int = 48 << 20
    device: str = "cpu"

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 11

    @property
    def block_ms(self) -> float:
        return 0.2 if self.quick else 25.0


def run_suite(settings: Settings, header: dict[str, Any], probe: CopyProbe) -> SuiteResult:
    """All cases; fills ``header["copy_gbps"]``."""
    if "compile" in settings.providers:
        # In this process: a pool of compilers beside the measurement would be a busy machine.
        import torch._inductor.config

        torch._inductor.config.compile_threads = 1
    rows: list[Row] = []
    copies: list[float] = []
    for dtype in settings.dtypes:
        for size in ("latent", "beyond_cache"):
            for case in CASES:
                if settings.only not in case.name:
                    continue
                tensor_bytes = settings.beyond_cache_bytes if size == "beyond_cache" else None
                shape = shape_of(case, tensor_bytes, DTYPES[dtype], settings.quick)
                operands = make_operands(case, shape, DTYPES[dtype], device=settings.device)
                for mode in case.modes:
                    print(f"{case.name} {mode} {dtype} {shape}", file=sys.stderr, flush=True)
                    measured, copy = _measure(case, mode, dtype, size, operands, shape, settings, probe)
                    rows += measured
                    copies += copy
        rows += fusions.run_suite(settings, dtype)
    header["copy_gbps"] = statistics.median(copies) if copies else None
    return SuiteResult(rows, judge(rows, header))


# ---- one case


def _call(provider: str, case: Case, operands: dict[str, Tensor], upstream: list[Tensor | None] | None):
    function = {"eager": case.plain, "compile": case.plain, "apex_fast": case.fused}[provider]
    if provider == "compile":
        # Static shapes are the fastest; a fresh start, so that no limit on recompilations is met.
        torch._dynamo.reset()
        function = torch.compile(case.plain, fullgraph=True, dynamic=False)
    return partial(run, function, case, operands, upstream)


def _measure(
    case: Case,
    mode: str,
    dtype: str,
    size: str,
    operands: dict[str, Tensor],
    shape: list[int],
    settings: Settings,
    probe: CopyProbe,
) -> tuple[list[Row], list[float]]:
    plain = run(case.plain, case, operands, None)
    upstream = make_upstream(plain, shape) if mode == "forward_backward" else None
    del plain
    calls: dict[str, Callable[[], Results]] = {}
    results: dict[str, Results] = {}
    wrong: dict[str, str] = {}
    for provider in settings.providers:
        calls[provider] = _call(provider, case, operands, upstream)
        try:
            results[provider] = calls[provider]()
        except (
            Exception
        ) as error:  # one provider that cannot run (torch.compile without a compiler) is a row that says so
            wrong[provider] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    moved = held = 0
    if results:
        some = next(iter(results.values()))
        moved = minimum_bytes(case, operands, some, upstream)
        held = sum(r.nbytes for r in some)
        wrong |= {p: f"wrong: {why}" for p, why in disagreements(case, operands, upstream, results).items()}
        del some
    results.clear()

    timed = {provider: call for provider, call in calls.items() if provider not in wrong}
    extra = {provider: peak_extra_bytes(call, settings.device) for provider, call in timed.items()}
    release()
    touch(max(extra.values(), default=0) * 5 // 4)
    timings = interleave(
        {**timed, "copy": probe}, rounds=settings.rounds, block_ms=settings.block_ms, device=settings.device
    )
    copy_gbps = probe.moved_bytes / timings["copy"].p50 / 1e6
    rows = []
    for provider in settings.providers:
        row = Row("ops", case.name, provider, mode, dtype, shape, size, moved, error=wrong.get(provider))
        if not row.error:
            _fill(row, timings[provider], copy_gbps)
            row.extra_bytes, row.minimum_extra_bytes = extra[provider], held
        rows.append(row)
    add_ratios(rows)
    return rows, [copy_gbps]


def _fill(row: Row, timing: Timing, copy_gbps: float) -> None:
    row.p20_ms, row.p50_ms, row.p80_ms = timing.p20, timing.p50, timing.p80
    row.gbps = row.minimum_bytes / timing.p50 / 1e6
    row.copy_gbps = copy_gbps
    row.fraction_of_copy = row.gbps / copy_gbps
    row.calls = len(timing.samples)
    row.page_faults = timing.faults_per_call


# ---- gates

#: Bytes per byte of one velocity, and the share of the copy bandwidth beyond the cache.
PASSES = {"shifted_velocity_loss": 8, "shifted_velocity_loss[v_uncond]": 10}
COPY_SHARE = 0.7
#: Speed-up over eager at the training size, with this many threads.
SPEED_UP = {"fp32": 4.0, "bf16": 3.0}
SPEED_UP_THREADS = 2
#: What the losses, the statistics and their gradients may add to the bytes: a few numbers per sample.
_SMALL = 1e-3


def judge(rows: Iterable[Row], header: dict[str, Any]) -> list[Gate]:
    """The promises about ``shifted_velocity_loss``, forward + backward."""
    gates = []
    for row in rows:
        if row.provider != "apex_fast" or row.mode != "forward_backward" or row.case not in PASSES:
            continue
        if row.error:
            gates.append(Gate(row.title, "results agree with the fp64 twin", row.error, False))
        elif row.size == "beyond_cache":
            gates += [_bytes_gate(row, header), _bandwidth_gate(row, header)]
        elif row.dtype in SPEED_UP:
            gates.append(_speed_gate(row, header))
    if header.get("busy"):
        for gate in gates:
            gate.measured += "; the machine was busy, run it again"
    return gates


def _bytes_gate(row: Row, header: dict[str, Any]) -> Gate:
    """What the op reads and returns is counted from its arguments; that it writes nothing else is measured."""
    velocity = torch.Size(row.shape).numel() * DTYPES[row.dtype].itemsize
    count = row.minimum_bytes / velocity
    wanted = f"at most {PASSES[row.case]}N counted, no memory beyond the results"
    gate = Gate(f"bytes of {row.title}", wanted, f"{count:.3f}N", None)
    if row.extra_bytes is not None and row.minimum_extra_bytes is not None:
        held, results = row.extra_bytes / velocity, row.minimum_extra_bytes / velocity
        gate.measured += f", {held:.3f}N held where the results are {results:.3f}N"
    if not header["quick"]:
        lean = row.extra_bytes is None or row.extra_bytes <= (row.minimum_extra_bytes or 0) + _SMALL * velocity
        gate.passed = count <= PASSES[row.case] * (1 + _SMALL) and lean
    return gate


def _bandwidth_gate(row: Row, header: dict[str, Any]) -> Gate:
    measured = f"{row.fraction_of_copy:.2f} ({row.gbps:.1f} of {row.copy_gbps:.1f} GB/s)"
    gate = Gate(f"bandwidth of {row.title}", f"at least {COPY_SHARE} of a copy", measured, None)
    if header["quick"]:
        gate.measured += "; tiny shapes"
    else:
        gate.passed = row.fraction_of_copy >= COPY_SHARE
    return gate


def _speed_gate(row: Row, header: dict[str, Any]) -> Gate:
    limit = SPEED_UP[row.dtype]
    text = f"at least {limit:g}x eager with {SPEED_UP_THREADS} threads"
    gate = Gate(f"speed of {row.title}", text, "eager was not timed", None)
    if row.ratio_to_eager is None:
        return gate
    gate.measured = f"{row.ratio_to_eager:.2f}x with {header['threads']}"
    if header["quick"]:
        gate.measured += "; tiny shapes"
    elif header["threads"] == SPEED_UP_THREADS:
        gate.passed = row.ratio_to_eager >= limit
    return gate
