"""The suites step and sampler: what they count, on tiny diffusers transformers. No time is checked."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'apex_fast[train]'")

from apex_fast import Velocities  # noqa: E402
from benchmarks import plots, report  # noqa: E402
from benchmarks.suites import networks, sampler, step  # noqa: E402

SETTINGS = step.Settings(dtype="fp32", quick=True)
WAYS = ["flow_matching", "naive", "three_networks", "apex_fast joint", "apex_fast retain", "apex_fast sequential"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run of both suites on the tiny SANA: its JSON and what it printed."""
    found = {}
    for suite in ("step", "sampler"):
        path = tmp_path_factory.mktemp("benchmark") / f"{suite}.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--suite", suite, "--quick"]
        command += ["--only", "sana", "--threads", "1", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr + done.stdout
        found[suite] = path, done.stdout
    return found


def test_step_rows_have_their_fields(quick):
    path, printed = quick["step"]
    document = json.loads(path.read_text())
    assert document["header"]["copy_gbps"] > 0
    rows = document["rows"]
    (network,) = (n for n in networks.networks("cpu", quick=True) if n.family == "sana")
    assert [row["provider"] for row in rows] == WAYS * (len(network.modes) * len(network.edges))
    for row in rows:
        assert row["error"] is None and row["dtype"] == "fp32"
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["time_over_passes"] == pytest.approx(row["p50_ms"] / row["passes_ms"])
        assert row["peak_bytes"] > row["weight_bytes"] > 0
    assert "over flow matching" in printed and path.with_name("step-step.png").stat().st_size > 10_000


def test_peaks_are_ordered_as_the_graphs_that_live(quick):
    rows = json.loads(quick["step"][0].read_text())["rows"]
    for start in range(0, len(rows), len(WAYS)):
        group = {row["provider"]: row for row in rows[start : start + len(WAYS)]}
        over = {name: row["peak_over_flow_matching"] for name, row in group.items()}
        assert over["flow_matching"] == 1
        assert over["apex_fast sequential"] < over["apex_fast retain"] < over["apex_fast joint"]
        assert over["apex_fast retain"] < over["naive"]
        weights = {name: row["weight_bytes"] for name, row in group.items()}
        plain = weights["flow_matching"]
        assert weights["three_networks"] == pytest.approx(3 * plain, rel=0.01)
        copies = 2 if group["naive"]["mode"] == "full, frozen copy" else 1
        assert weights["apex_fast sequential"] == pytest.approx(copies * plain, rel=0.01)
        if copies == 1:
            assert over["apex_fast sequential"] < 1.1


def test_sampler_rows_have_their_fields(quick):
    path, printed = quick["sampler"]
    rows = json.loads(path.read_text())["rows"]
    assert [row["provider"] for row in rows] == ["eager", "apex_fast"] * (len(sampler.STEPS) * len(sampler.MODES))
    assert {row["case"] for row in rows} == {f"sana tiny, {n} step{'s' * (n > 1)}" for n in (1, 2, 4, 50)}
    assert {row["mode"] for row in rows} == {"guided", "unguided"}
    for row in rows:
        assert row["error"] is None
        assert row["images_per_second"] == pytest.approx(row["shape"][0] / row["p50_ms"] * 1e3)
        assert row["sampler_share"] > 0  # two times of a tiny network on a machine with other work: no bound above
    assert "sampler's share" in printed and path.with_name("sampler-sampler.png").stat().st_size > 10_000


# ---- the ways


def _prepared(mode: str, family: str = "sana"):
    (network,) = (n for n in networks.networks("cpu", quick=True) if n.family == family)
    backbone = network.build(torch.float32, "cpu")
    velocities = step._roles(backbone, network, mode)
    x, condition = network.batch_of(backbone, network.edges[-1], "cpu")
    objective = step.ApexObjective(step.ConditionShift(scale=-1.0, bias=0.5), warmup_steps=0, ramp_steps=0)
    batch = step._Batch(x, condition, objective.draw(x, torch.Generator().manual_seed(1)), objective)
    return backbone, velocities, batch, step._other_networks(backbone, mode)


@pytest.mark.parametrize("mode", ["full", "full, frozen copy", "lora"])
@pytest.mark.parametrize("family", ["sana", "qwen_image"])
def test_the_naive_way_has_the_gradients_of_the_schedules(family, mode):
    backbone, velocities, batch, others = _prepared(mode, family)
    with torch.no_grad():  # an adapter starts without effect: the real branch would be the generator
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    ways = step.make_ways(batch, backbone, velocities, others)
    assert list(ways) == WAYS
    assert step._disagreements(ways, backbone, "fp32") == {}

    changed = copy.copy(batch.objective)
    changed.clip = 1e-3
    other = step._Batch(batch.x, batch.condition, batch.draws, changed)
    wrong = step.make_ways(other, backbone, velocities, others)["apex_fast retain"]
    found = step._disagreements({"naive": ways["naive"], "apex_fast retain": wrong}, backbone, "fp32")
    assert found["apex_fast retain"].startswith("wrong: its gradient is")


def test_three_networks_train_two_and_read_the_third():
    backbone, _, batch, (teacher, fitted) = _prepared("full")
    step.three_networks(batch, backbone, teacher, fitted)
    assert any(p.grad is not None and p.grad.any() for p in fitted.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not set(map(id, fitted.parameters())) & set(map(id, backbone.parameters()))
    # The student and the network of its samples start equal to the teacher, so nothing is to be corrected yet.
    assert not any(p.grad is not None and p.grad.any() for p in backbone.parameters())
    with torch.no_grad():
        for parameter in fitted.parameters():
            parameter.mul_(1.1)
    step.three_networks(batch, backbone, teacher, fitted)
    assert any(p.grad is not None and p.grad.any() for p in backbone.parameters())


def test_passes_alone_are_added_up():
    medians = {"pass: forward": 1.0, "pass: real": 10.0, "pass: forward and backward": 100.0}
    assert step.passes_alone(step.Passes(0, 1, 1), medians) == 100
    assert step.passes_alone(step.step_passes("retain"), medians) == 310
    assert step.passes_alone(step.step_passes("sequential"), medians) == 311
    assert step.passes_alone(step.Passes(2, 2, 2), medians) == 211


def test_bytes_held_count_shared_weights_once():
    model = torch.nn.Linear(10, 10)
    twin = copy.deepcopy(model)
    twin.weight = model.weight
    assert step.weight_bytes([model]) == 440 and step.weight_bytes([model, twin]) == 480
    twin.bias.requires_grad_(False)
    assert step.held_bytes([model, twin], [torch.zeros(5)]) == 480 + 440 + 20


@pytest.mark.parametrize("family", ["sana", "qwen_image"])
@pytest.mark.parametrize("guided", [False, True])
def test_both_samplers_draw_the_same(family, guided):
    (network,) = (n for n in networks.networks("cpu", quick=True) if n.family == family)
    backbone = network.build(torch.float32, "cpu").requires_grad_(False).eval()
    noise, condition = network.batch_of(backbone, network.edges[0], "cpu")
    negative = sampler.Condition(torch.zeros_like(condition.prompt_embeds), condition.prompt_embeds_mask)
    linear = backbone.linear_guidance_scale(sampler.SCALE)
    guide, scale = (backbone.guide, sampler.SCALE) if linear is None else (None, linear)
    assert (guide is None) == (family == "sana")
    run = sampler.Run(noise, condition, negative if guided else None, scale, guide, 3)
    calls = []

    def counted(x_t, t, c):
        calls.append(x_t.shape[0])
        return backbone(x_t, t, c)

    torch.testing.assert_close(sampler.ours(counted, run), sampler.eager(counted, run), rtol=1e-4, atol=1e-4)
    assert calls == [noise.shape[0] * (1 + guided)] * 6


def test_a_wrong_sampler_gets_no_time(monkeypatch):
    network = networks.networks("cpu", quick=True)[0]
    backbone = network.build(torch.float32, "cpu").requires_grad_(False).eval()
    noise, condition = network.batch_of(backbone, network.edges[0], "cpu")
    monkeypatch.setitem(sampler.PROVIDERS, "apex_fast", lambda velocity, run: 1.1 * sampler.eager(velocity, run))
    run = sampler.Run(noise, condition, None, 1.0, None, 1)
    rows = sampler.measure("sana, 1 step", "unguided", backbone, run, network, sampler.Settings("fp32", quick=True))
    assert rows[0].error is None and rows[1].error.startswith("wrong: off by") and rows[1].p50_ms is None


# ---- networks


def test_networks_of_a_gpu_are_the_published_ones():
    """Compiled, not run: their transformers are made on the meta device, which has no memory."""
    sana, qwen = networks.networks("cuda", quick=False)
    sizes = []
    for network in (sana, qwen):
        backbone = network.build(torch.bfloat16, "meta")
        assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
        sizes.append(sum(p.numel() for p in backbone.parameters()))
        assert backbone.token_count == network.tokens
    assert sizes[0] == pytest.approx(0.6e9, rel=0.05) and sizes[1] == pytest.approx(20e9, rel=0.05)
    assert qwen.modes == ("lora",) and qwen.checkpointing


def test_a_network_is_the_same_at_every_build():
    network = networks.networks("cpu", quick=True)[0]
    one, other = (network.build(torch.float32, "cpu") for _ in range(2))
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert all(p.detach().any() for p in one.parameters())
    assert isinstance(step._roles(one, network, "full").real, type(None))
    assert isinstance(step._roles(one, network, "full, frozen copy"), Velocities)


# ---- the report


def _row(**changes) -> report.Row:
    row = report.Row("step", "sana small", "apex_fast sequential", "full", "fp32", [2, 4, 8, 8], "32 text tokens")
    row.p20_ms, row.p50_ms, row.p80_ms, row.ratio_to_eager = 0.9, 1.0, 1.1, 0.8
    row.peak_bytes, row.passes_ms = 1_000_000, 0.9
    for name, value in changes.items():
        setattr(row, name, value)
    return row


def test_ways_of_a_step_are_told_apart():
    assert report.slow_cases([_row(), _row(provider="naive", ratio_to_eager=0.5)]) == [
        "slower than the naive way: sana small full fp32 [2, 4, 8, 8], sequential, 0.80x"
    ]
    text = report.comparison({}, [_row(), _row(provider="apex_fast joint")], {}, [_row(peak_bytes=2_000_000)])
    assert "[2, 4, 8, 8], sequential, peak 1.00 -> 2.00 MB" in text and "joint" not in text


def test_plots_have_their_floors():
    rows = [_row(), _row(provider="flow_matching", peak_bytes=500_000), _row(shape=[2, 4, 16, 16], passes_ms=3.0)]
    times, peaks = plots._step(rows)
    assert times.floor == ("the fewest passes alone", [(64.0, 0.9), (256.0, 3.0)])
    assert peaks.floor == ("plain flow matching", [(64.0, 0.5)])
    assert times.lines == {"apex_fast sequential": [(64.0, 1.0), (256.0, 1.0)]}
    assert plots.draw(Path("unused.json"), []) == []
