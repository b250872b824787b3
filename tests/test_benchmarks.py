"""benchmarks/: that its numbers mean what they say.

Shapes are tiny and torch.compile is left out: no time is checked.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import apex_fast.ops  # noqa: E402
from benchmarks import allocator, machine, report, run, timing  # noqa: E402
from benchmarks.suites import ops as suite  # noqa: E402
from benchmarks.suites import ops_cases, plain_torch  # noqa: E402

CASES = {case.name: case for case in ops_cases.CASES}
GUIDED = "shifted_velocity_loss[v_uncond]"
HEADER = {"quick": False, "threads": 2}


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run of the ops in fp32: its JSON and what it printed."""
    path = tmp_path_factory.mktemp("benchmark") / "deeper" / "quick.json"
    done = _run(
        "--suite", "ops", "--device", "cpu", "--dtype", "fp32", "--quick",
        "--providers", "eager,apex_fast", "--threads", "1", "--gate", "--json", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return path, done.stdout


# ---- the run


def test_quick_run_writes_the_layout(quick):
    document = json.loads(quick[0].read_text())
    assert {
        "device", "driver", "torch", "commit", "threads", "date", "copy_gbps", "matmul_tflops", "isa", "load_average",
    } <= set(document["header"])  # fmt: skip
    assert document["header"]["threads"] == 1
    assert document["header"]["copy_gbps"] > 0 and document["header"]["matmul_tflops"] > 0
    assert document["header"]["isa"] in ("default", "avx2", "avx512")
    for row in _of_ops(document):
        assert {
            "suite", "case", "provider", "mode", "dtype", "shape", "p20_ms", "p50_ms", "p80_ms", "gbps",
            "fraction_of_copy", "extra_bytes", "minimum_extra_bytes", "ratio_to_eager", "ratio_to_compile",
        } <= set(row)  # fmt: skip
        assert row["error"] is None
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["gbps"] == pytest.approx(row["minimum_bytes"] / row["p50_ms"] / 1e6)
        assert row["fraction_of_copy"] == pytest.approx(row["gbps"] / row["copy_gbps"])
        assert row["ratio_to_compile"] is None


def _of_ops(document: dict) -> list[dict]:
    """Rows of single ops; those of fusions are looked at in test_benchmarks_fusions.py."""
    return [row for row in document["rows"] if row["case"] in CASES]


def test_quick_run_has_every_op_in_both_modes_and_sizes(quick):
    rows = _of_ops(json.loads(quick[0].read_text()))
    found = {(row["case"], row["mode"], row["size"], row["provider"]) for row in rows}
    assert found == {
        (case, mode, size, provider)
        for case in CASES
        for mode in CASES[case].modes
        for size in ("latent", "beyond_cache")
        for provider in ("eager", "apex_fast")
    }
    assert {case.op for case in CASES.values()} == {
        "condition_shift", "interpolate", "renoise", "shifted_velocity_loss", "mixed_velocity_loss", "sampler_step",
        "shifted_velocity_loss_with_gradients", "condition_shift_rms_norm", "projected_condition_shift",
        "modulated_layer_norm",
    }  # fmt: skip
    assert CASES["shifted_velocity_loss_with_gradients"].modes == ("forward",)
    assert all(case.modes == ops_cases.MODES for case in CASES.values() if "with_gradients" not in case.name)


def test_quick_run_ratios_are_those_of_its_medians(quick):
    rows = _of_ops(json.loads(quick[0].read_text()))
    for eager, fused in zip(rows[::2], rows[1::2], strict=True):
        assert (eager["provider"], fused["provider"]) == ("eager", "apex_fast")
        assert eager["ratio_to_eager"] == 1
        assert fused["ratio_to_eager"] == pytest.approx(eager["p50_ms"] / fused["p50_ms"])


def test_the_loss_ops_add_nothing_but_their_results(quick):
    rows = [row for row in json.loads(quick[0].read_text())["rows"] if row["case"] in suite.PASSES]
    assert rows
    for row in rows:
        if row["provider"] == "apex_fast":
            assert row["extra_bytes"] == row["minimum_extra_bytes"]
        else:
            assert row["extra_bytes"] > row["minimum_extra_bytes"]


def test_quick_run_prints_gates_and_slow_cases(quick):
    assert "not judged" in quick[1] and "at least 0.7 of a copy" in quick[1]
    assert "Where apex_fast is not the fastest" in quick[1]
    assert "tiny shapes" in quick[1]


def test_compare_with_an_earlier_run(quick, tmp_path):
    done = _run(
        "--quick", "--only", "renoise", "--dtype", "fp32", "--providers", "apex_fast", "--compare", str(quick[0])
    )
    assert done.returncode == 0, done.stderr
    assert "Compared with" in done.stdout and "renoise forward_backward fp32" in done.stdout
    broken = tmp_path / "broken.json"
    broken.write_text('{"rows": 3}')
    done = _run("--quick", "--only", "renoise", "--compare", str(broken))
    assert done.returncode != 0 and "is no report of benchmarks/run.py" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--providers", "eager,triton"], "no provider 'triton'"),
        (["--only", "renois3"], "no case contains 'renois3'"),
        (["--threads", "0"], "expected at least 1"),
        (["--suite", "step", "--only", "renoise"], "there are sana small, qwen_image small"),
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--device", "cuda"])
    assert "finds no CUDA device here" in capsys.readouterr().err


def test_plots_are_written_beside_the_json(quick):
    assert quick[0].with_name("quick-ops.png").stat().st_size > 10_000
    assert "quick-ops.png" in quick[1]


# ---- bytes


@pytest.mark.parametrize(
    "name, sentence, forward, backward",
    [
        ("condition_shift[scalar]", "Moves 2N bytes forward", 2, 2),
        ("condition_shift[diagonal,mask]", "Moves 2N bytes forward", 2, 3),
        ("interpolate", "Moves 3N bytes", 3, 2),
        ("renoise", "Moves 5N bytes forward, 3N backward", 5, 3),
        ("shifted_velocity_loss", "Moves 3N bytes forward and 5N backward", 3, 5),
        ("shifted_velocity_loss[without stats]", "Moves 3N bytes forward and 5N backward", 3, 5),
        ("shifted_velocity_loss[v_uncond]", "(4N and 6N with ``v_uncond``)", 4, 6),
        ("mixed_velocity_loss", "Moves 3N bytes forward and 4N backward", 3, 4),
        ("mixed_velocity_loss[v_fake]", "(4N and 5N with ``v_fake``)", 4, 5),
        ("sampler_step", "Moves 3N bytes", 3, 2),
        ("sampler_step[guided,noised]", "and N for each of ``noise`` and ``v_uncond``", 5, 3),
        ("shifted_velocity_loss_with_gradients", "Moves 5N bytes (6N with ``v_uncond``)", 5, None),
        ("shifted_velocity_loss_with_gradients[v_uncond]", "Moves 5N bytes (6N with ``v_uncond``)", 6, None),
        ("condition_shift_rms_norm", "Moves 3N bytes forward for both outputs", 3, 3),
        ("projected_condition_shift", "Moves 3N bytes forward for both outputs", 3, 3),
        ("modulated_layer_norm", "Moves 2N bytes forward and 3N backward", 2, 3),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_are_those_of_the_docstrings(name, sentence, forward, backward, dtype):
    """Backward reads the gradient of each result, what it needs of the operands, and writes the gradients asked for."""
    case = CASES[name]
    assert sentence in " ".join(getattr(apex_fast.ops, case.op).__doc__.split())
    shape = [2, 4, 32, 32] if case.shape == "latent" else [2, 128, 2304]
    operands = ops_cases.make_operands(case, shape, ops_cases.DTYPES[dtype])
    velocity = math.prod(shape) * ops_cases.DTYPES[dtype].itemsize
    results = ops_cases.run(case.plain, case, operands, None)
    once = ops_cases.minimum_bytes(case, operands, results, None) / velocity
    assert once == pytest.approx(forward, abs=0.05)
    if backward is None:
        return
    upstream = ops_cases.make_upstream(results, shape)
    results = ops_cases.run(case.plain, case, operands, upstream)
    both = ops_cases.minimum_bytes(case, operands, results, upstream) / velocity
    assert both - once == pytest.approx(backward, abs=0.05)


def test_large_shapes_have_the_bytes_asked_for():
    for case in CASES.values():
        for dtype in ops_cases.DTYPES.values():
            shape = ops_cases.shape_of(case, 48 << 20, dtype, tiny=False)
            assert 0.99 * (48 << 20) < math.prod(shape) * dtype.itemsize <= 48 << 20
    assert ops_cases.shape_of(CASES["renoise"], None, torch.float32, tiny=False) == [8, 16, 128, 128]


# ---- agreement


def _results(case, dtype, upstream_wanted=True, tiny=True):
    shape = ops_cases.shape_of(case, None, dtype, tiny=tiny)
    operands = ops_cases.make_operands(case, shape, dtype)
    plain = ops_cases.run(case.plain, case, operands, None)
    upstream = ops_cases.make_upstream(plain, shape) if upstream_wanted else None
    return operands, upstream, ops_cases.run(case.plain, case, operands, upstream)


@pytest.mark.parametrize("dtype", ops_cases.DTYPES.values())
@pytest.mark.parametrize("name", CASES)
def test_formulas_agree_with_the_fp64_twins(name, dtype):
    operands, upstream, plain = _results(CASES[name], dtype, bool(CASES[name].gradients))
    assert ops_cases.disagreements(CASES[name], operands, upstream, {"eager": plain}) == {}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_result_is_found(name):
    case = CASES[name]
    operands, upstream, plain = _results(case, torch.float32, bool(case.gradients))
    for k in range(len(plain)):
        for damage in (
            lambda r: r * 1.001,
            lambda r: r * float("nan"),
            lambda r: r.double(),
            lambda r: r.flatten()[:0],
        ):
            wrong = [damage(r) if j == k else r for j, r in enumerate(plain)]
            found = ops_cases.disagreements(case, operands, upstream, {"eager": plain, "apex_fast": tuple(wrong)})
            assert set(found) == {"apex_fast"}


def test_a_gradient_counts_where_it_is_asked_for():
    """The cases are such that the clip acts on some elements, and that the losses without stats are the losses."""
    case = CASES["shifted_velocity_loss"]
    operands = ops_cases.make_operands(case, [2, 4, 16, 16], torch.float32)
    _, _, stats = case.plain(**operands, **case.settings)
    share = stats[:, apex_fast.ops.STATS.index("clipped_share")]
    assert ((share > 0.05) & (share < 0.5)).all()
    with_stats = plain_torch.shifted_velocity_loss(**operands)[:2]
    assert all(map(torch.equal, with_stats, plain_torch.shifted_velocity_losses(**operands)))


def _measure(case, providers=suite.PROVIDERS):
    settings = suite.Settings(dtypes=("fp32",), providers=providers, quick=True)
    shape = ops_cases.shape_of(case, None, torch.float32, tiny=True)
    operands = ops_cases.make_operands(case, shape, torch.float32)
    probe = machine.CopyProbe(1 << 16)
    rows, _ = suite._measure(case, "forward_backward", "fp32", "latent", operands, shape, settings, probe)
    return {row.provider: row for row in rows}


def test_a_wrong_provider_gets_no_time():
    case = dataclasses.replace(CASES["interpolate"], formula=lambda x, z, t: x + z)
    rows = _measure(case, ("eager", "apex_fast"))
    assert rows["eager"].p50_ms is None and rows["eager"].error.startswith("wrong: ")
    assert rows["apex_fast"].p50_ms is not None and rows["apex_fast"].ratio_to_eager is None
    assert "eager, interpolate" in report.failures(rows.values())[0]


def test_a_provider_that_cannot_run_is_a_row_that_says_so(monkeypatch):
    def no_compiler(function, **options):
        def compiled(**arguments):
            raise RuntimeError("no working C++ compiler\nfound")

        return compiled

    monkeypatch.setattr(torch, "compile", no_compiler)
    rows = _measure(CASES["interpolate"])
    assert rows["compile"].error == "failed: RuntimeError: no working C++ compiler"
    assert rows["apex_fast"].ratio_to_compile is None and rows["apex_fast"].ratio_to_eager > 0


def test_compile_is_given_the_eager_formula(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append((function, options)) or function)
    case = CASES["mixed_velocity_loss"]
    rows = _measure(case)
    assert seen == [(case.plain, {"fullgraph": True, "dynamic": False})]
    fused = rows["apex_fast"]
    assert fused.ratio_to_compile == pytest.approx(rows["compile"].p50_ms / fused.p50_ms)


# ---- gates


def _row(**changes) -> report.Row:
    """A row that keeps every promise: 8N, 0.9 of a copy, 5x."""
    shape = [8, 16, 128, 128]
    row = report.Row(
        "ops", "shifted_velocity_loss", "apex_fast", "forward_backward", "fp32", shape, "latent",
        minimum_bytes=8 * math.prod(shape) * 4, p20_ms=0.9, p50_ms=1.0, p80_ms=1.1,
        gbps=9.0, copy_gbps=10.0, fraction_of_copy=0.9, ratio_to_eager=5.0,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


@pytest.mark.parametrize(
    "changes, header, expected",
    [
        ({}, {}, [True]),
        ({"ratio_to_eager": 3.99}, {}, [False]),
        ({"ratio_to_eager": 3.5, "dtype": "bf16"}, {}, [True]),
        ({"ratio_to_eager": 2.9, "dtype": "bf16"}, {}, [False]),
        ({"ratio_to_eager": 1.0, "dtype": "fp16"}, {}, []),
        ({"ratio_to_eager": None}, {}, [None]),
        ({"ratio_to_eager": 1.0}, {"threads": 1}, [None]),
        ({"ratio_to_eager": 1.0}, {"quick": True}, [None]),
        ({"size": "beyond_cache"}, {}, [True, True]),
        ({"size": "beyond_cache", "fraction_of_copy": 0.69}, {}, [True, False]),
        ({"size": "beyond_cache", "fraction_of_copy": 0.69}, {"threads": 1}, [True, False]),
        ({"size": "beyond_cache", "fraction_of_copy": 0.1}, {"quick": True}, [None, None]),
        ({"size": "beyond_cache", "minimum_bytes": 9 * 2097152 * 4}, {}, [False, True]),
        ({"size": "beyond_cache", "extra_bytes": 3 << 23, "minimum_extra_bytes": 2 << 23}, {}, [False, True]),
        ({"size": "beyond_cache", "extra_bytes": 2 << 23, "minimum_extra_bytes": 2 << 23}, {}, [True, True]),
        ({"size": "beyond_cache", "minimum_bytes": 10 * 2097152 * 4, "case": GUIDED}, {}, [True, True]),
        ({"error": "wrong: result 0 is off by 1"}, {}, [False]),
        ({"provider": "eager", "fraction_of_copy": 0.1}, {}, []),
        ({"mode": "forward", "ratio_to_eager": 0.5}, {}, []),
        ({"case": "renoise", "ratio_to_eager": 0.5}, {}, []),
    ],
)  # fmt: skip
def test_gates(changes, header, expected):
    gates = suite.judge([_row(**changes)], {**HEADER, **header})
    assert [gate.passed for gate in gates] == expected


def test_gates_of_a_busy_machine_say_so():
    assert "busy" not in str(suite.judge([_row()], {**HEADER, "busy": False})[0])
    assert "the machine was busy" in str(suite.judge([_row()], {**HEADER, "busy": True})[0])


@pytest.mark.parametrize(
    "passed, error, options, code",
    [
        (False, None, ["--gate"], 1),
        (False, None, [], 0),
        (None, None, ["--gate"], 0),
        (True, None, ["--gate"], 0),
        (True, "wrong: result 0 is off by 1", [], 1),
    ],
)
def test_exit_code(passed, error, options, code, monkeypatch, capsys):
    result = report.SuiteResult([_row(error=error)], [report.Gate("speed", "at least 4x", "2x", passed)])
    monkeypatch.setattr(run, "_copy_gbps", lambda options: 1.0)
    monkeypatch.setattr(run.ops, "run_suite", lambda *arguments: result)
    monkeypatch.setattr(run, "keep_freed_memory", lambda: "untouched")
    assert run.main(["--quick", *options]) == code
    assert {True: "pass", False: "FAIL", None: "not judged"}[passed] in capsys.readouterr().out


# ---- the report


def test_slow_cases_are_named():
    rows = [_row(ratio_to_compile=0.8), _row(case="renoise", ratio_to_eager=0.9), _row(case="interpolate")]
    assert report.slow_cases(rows) == [
        "slower than compile: shifted_velocity_loss forward_backward fp32 [8, 16, 128, 128], 0.80x",
        "slower than eager: renoise forward_backward fp32 [8, 16, 128, 128], 0.90x",
    ]


def test_comparison_calls_a_change_what_is_outside_the_spread():
    old = [_row(), _row(case="renoise"), _row(case="interpolate"), _row(case="gone")]
    new = [
        _row(p20_ms=1.95, p50_ms=2.0, p80_ms=2.1),
        _row(case="renoise", p20_ms=0.4, p50_ms=0.5, p80_ms=0.6),
        _row(case="interpolate", p20_ms=1.0, p50_ms=1.2, p80_ms=1.3),
        _row(case="new"),
    ]
    text = report.comparison({"threads": 1}, old, {"threads": 2}, new)
    assert [line.split()[:2] for line in text.splitlines() if "->" in line] == [
        ["SLOWER", "0.50"], ["faster", "2.00"], ["same", "0.83"],
    ]  # fmt: skip
    assert "NOTE: threads was 1 and is 2" in text
    assert "no case of that run" in report.comparison({}, old, {}, [_row(case="new")])


def test_a_report_reads_back_and_later_fields_are_left_alone(tmp_path):
    path = tmp_path / "report.json"
    report.write_json(path, {"torch": "2"}, [_row()], [report.Gate("g", "l", "m", None)])
    document = json.loads(path.read_text())
    document["rows"][0]["a_field_to_come"] = 1.1
    path.write_text(json.dumps(document))
    assert report.read_json(path) == ({"torch": "2"}, [_row()])


def test_busy_and_quick_are_said():
    assert "WARNING" not in report.header_text({"busy": False, "quick": False})
    assert "busy with other work" in report.header_text({"busy": True})
    assert "tiny shapes" in report.header_text({"quick": True})


# ---- measuring


def test_peak_memory_counts_temporaries_and_results():
    x = torch.zeros(250_000)
    # a few bytes more for each number that Python hands over
    assert timing.peak_extra_bytes(lambda: x + 1) == pytest.approx(1_000_000, abs=100)
    assert timing.peak_extra_bytes(lambda: (x + 1) * 2) == pytest.approx(2_000_000, abs=100)
    assert timing.peak_extra_bytes(lambda: x.neg_()) == 0


def test_interleave_runs_all_calls_in_turn():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = timing.interleave(calls, rounds=3, block_ms=1e-9)
    assert {name: len(t.samples) for name, t in timings.items()} == dict.fromkeys("abc", 3)
    turns = "".join(order)[-18:]  # behind the warm-up; each block is an untimed call and a timed one
    assert turns == "aabbcc" + "bbccaa" + "ccaabb"
    order.clear()
    timing.interleave(calls, rounds=2, block_ms=0.0, warm_up=1)
    assert "".join(order) == "abc" + "abc" + "bca"  # long calls: one to warm up, and every other one is timed


def test_quantiles_are_the_usual_ones():
    samples = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0]
    t = timing.Timing(samples)
    assert (t.p20, t.p50, t.p80) == pytest.approx(tuple(numpy.quantile(samples, (0.2, 0.5, 0.8))))


def test_copy_probe_counts_both_directions():
    probe = machine.CopyProbe(4096)
    probe.source += 1
    probe()
    assert probe.moved_bytes == 8192 and torch.equal(probe.source, probe.destination)


def test_freed_memory_is_kept():
    """Without the setting, each call of a large op pays a page fault for every 4 KB of its result."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from benchmarks.allocator import keep_freed_memory, touch
x = torch.zeros(10 << 20)
said = ""
if sys.argv[1] == "kept":
    said = keep_freed_memory()
    touch(160 << 20)
faults = []
for _ in range(32):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = (x + 1) * 2
    del y
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[16], said)
"""
    printed = {}
    for setting in ("kept", "default"):
        done = subprocess.run([sys.executable, "-c", code, setting], capture_output=True, text=True, check=True)
        printed[setting] = done.stdout
    if "default:" in printed["kept"]:
        pytest.skip(printed["kept"])
    # Median of the calls. Two results of 40 MB are 20480 pages of 4 KB; up to 32 MB glibc learns to keep by itself.
    assert int(printed["kept"].split()[0]) < 100 < 10_000 < int(printed["default"].split()[0])


def test_commit_is_unknown_outside_of_git(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert machine.commit() == "unknown"


def test_allocator_says_so_where_it_cannot_be_set(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory().startswith("default")
