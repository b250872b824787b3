"""benchmarks/suites/fusions.py: what is counted, and that a wrong way is found."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")

from apex_fast import ops  # noqa: E402
from benchmarks import report, timing  # noqa: E402
from benchmarks.suites import fusions  # noqa: E402
from benchmarks.suites import ops as suite  # noqa: E402

SETTINGS = suite.Settings(dtypes=("fp32",), quick=True)


@pytest.fixture(scope="module")
def rows():
    found: dict[str, dict[str, report.Row]] = {}
    for row in fusions.run_suite(SETTINGS, "fp32"):
        found.setdefault(row.case, {})[row.provider] = row
    return found


def test_every_case_has_its_ways(rows):
    assert rows.keys() == fusions.CASES.keys()
    for case, ways in rows.items():
        others = ["recompute", "apex_fast one pass"] if case.startswith("one_pass") else ["checkpoint", "apex_fast"]
        assert list(ways) == ["eager", *others]
        for row in ways.values():
            assert row.error is None and row.p50_ms > 0 and row.moved_bytes > 0
            assert row.ratio_to_eager == pytest.approx(ways["eager"].p50_ms / row.p50_ms)
        if "checkpoint" in ways:
            ratio = ways["checkpoint"].p50_ms / ways["apex_fast"].p50_ms
            assert ways["apex_fast"].ratio_to_checkpoint == pytest.approx(ratio)


def test_fusions_move_and_keep_less_than_the_modules(rows):
    for case, ways in rows.items():
        if case.startswith("one_pass"):
            assert all(row.kept_bytes is None for row in ways.values())
            continue
        assert ways["apex_fast"].moved_bytes < ways["eager"].moved_bytes
        # An adapter leaves next to nothing to keep: the row statistics of the head are more than that.
        assert ways["apex_fast"].kept_bytes <= ways["eager"].kept_bytes or "lora" in case
        # A norm keeps nothing beside its inputs, and so does a checkpoint.
        assert ways["checkpoint"].kept_bytes == 0
        assert (ways["apex_fast"].kept_bytes == 0) == case.startswith("txt_norm")


@pytest.mark.parametrize(
    "case, recomputed, one_pass",
    [
        # N in fp32 for every tensor: 8 and 5 are those of the docstrings; the rest is the gradient's way into a network
        ("one_pass[handed over]", 8, 5),
        ("one_pass[scaled]", 8, 5 + 2 * 2),
        ("one_pass[sequential]", 3 + 4 + 4 + 2, 5 + 2 * 2),
    ],
)
def test_one_pass_moves_what_the_schedules_say(rows, case, recomputed, one_pass):
    n = 4 * math.prod(rows[case]["recompute"].shape)
    assert rows[case]["recompute"].moved_bytes / n == pytest.approx(recomputed, abs=0.3)
    assert rows[case]["apex_fast one pass"].moved_bytes / n == pytest.approx(one_pass, abs=0.3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", fusions.CASES)
def test_ways_agree_in_half_precision(case, dtype):
    wrong = {row.provider: row.error for row in fusions.measure(case, fusions.CASES[case], SETTINGS, dtype)}
    assert set(wrong.values()) == {None}, wrong


def test_a_wrong_way_gets_no_time():
    def make(maker: fusions.Maker, tiny: bool) -> fusions.Ways:
        x = maker(2, 3, gradient=True)
        ways = {"eager": lambda: [x * 2], "checkpoint": lambda: [x * 2.01], "apex_fast": lambda: [x + x]}
        return fusions.Ways((2, 3), ways, [x], [x])

    rows = {row.provider: row for row in fusions.measure("doubled", make, SETTINGS, "fp32")}
    assert rows["checkpoint"].p50_ms is None and rows["checkpoint"].error.startswith("wrong: result 0 is off by")
    assert rows["apex_fast"].p50_ms > 0 and rows["apex_fast"].ratio_to_checkpoint is None


# ---- counting


def test_moved_bytes_are_those_of_operands_and_results():
    x, y = torch.zeros(1000), torch.zeros(1000)
    assert timing.moved_bytes(lambda: x + y) == 12_000
    assert timing.moved_bytes(lambda: x.add_(y)) == 12_000
    assert timing.moved_bytes(lambda: x.view(10, 100).t()) == 0
    assert timing.moved_bytes(lambda: x.view(10, 100).t().contiguous()) == 8_000
    assert timing.moved_bytes(lambda: torch.empty(1000)) == 0
    assert timing.moved_bytes(lambda: x.view(10, 100)[:, :1].expand(10, 100) * 1) <= 4_000 + 4_000


def test_moved_bytes_of_a_velocity_head_count_what_lies_between_its_operations():
    hidden = torch.randn(2, 64, 256, requires_grad=True)
    scale, shift = torch.zeros(2, 2, 256).unbind(0)
    weight = torch.randn(4, 256, requires_grad=True)
    n = hidden.nbytes
    forward = timing.moved_bytes(lambda: ops.velocity_head(hidden, scale, shift, weight, None, 1e-6))
    # hidden; the modulated state written and read; little else
    assert forward / n == pytest.approx(3, abs=0.15)

    def backward(of_hidden: bool, of_weight: bool) -> float:
        hidden.requires_grad_(of_hidden), weight.requires_grad_(of_weight)
        velocity = ops.velocity_head(hidden, scale, shift, weight, None, 1e-6)
        wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
        return timing.moved_bytes(lambda: torch.autograd.grad(velocity, wanted, torch.ones_like(velocity))) / n

    # hidden read; the gradient of the modulated state written and read; the gradient of hidden written
    assert backward(True, False) == pytest.approx(4, abs=0.3)
    # hidden read; the modulated state written anew and read
    assert backward(False, True) == pytest.approx(3, abs=0.3)
    assert backward(True, True) == pytest.approx(4 + 3, abs=0.3)


def test_kept_bytes_leave_out_what_is_there_anyway():
    x, w = torch.randn(100, 100, requires_grad=True), torch.randn(100, 100, requires_grad=True)
    assert timing.kept_bytes(lambda: (x @ w).sin().sum(), [x, w]) == 40_000
    assert timing.kept_bytes(lambda: (x @ w).sin().sum(), [x]) == 80_000
    assert timing.kept_bytes(lambda: x + w, [x]) == 0
