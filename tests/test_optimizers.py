"""Optimizers: the groups and their rates, a step that is left out, 8-bit moments, a shift that is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("yaml")
pytest.importorskip("peft")

from tiny_runs import keys, losses, make_start

from apex_fast.cli import main
from apex_fast.training.config import TrainConfig, load_config
from apex_fast.training.loop import Trainer
from apex_fast.training.optimizers import make_optimizer, set_rates, step_unless, waits_for_the_device
from apex_fast.training.settings import SettingsError

TRAINED_SHIFT = ("--shift.trainable", "true")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("tiny") / "start")


def config(**more: object) -> TrainConfig:
    return TrainConfig(output_dir="x", pretrained_model_name_or_path="digits_start", **more)  # type: ignore[arg-type]


def stepped(optimizer: torch.optim.Optimizer, layer: nn.Module, skip: Tensor | None) -> None:
    torch.manual_seed(0)
    layer(torch.randn(4, 3)).square().mean().backward()
    step_unless(optimizer, skip)
    optimizer.zero_grad()


# ---- groups and rates


def test_a_shift_has_a_rate_of_its_own_and_no_weight_decay() -> None:
    layer, shift = nn.Linear(3, 2), nn.Linear(1, 1)
    settings = config(learning_rate=1e-3, shift_learning_rate=1e-2, adam_weight_decay=0.1)
    optimizer = make_optimizer(settings, list(layer.parameters()), list(shift.parameters()))
    set_rates(optimizer, settings, 0.5)
    found = [(g["group"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert found == [("network", 0.5e-3, 0.1, 2), ("shift", 0.5e-2, 0.0, 2)]


def test_without_a_rate_of_its_own_the_shift_follows_the_network() -> None:
    settings = config(learning_rate=1e-3)
    optimizer = make_optimizer(settings, [nn.Parameter(torch.ones(2))], [nn.Parameter(torch.ones(1))])
    set_rates(optimizer, settings, 1.0)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-3]


def test_a_rate_for_a_shift_that_is_not_trained_is_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="this run trains none; write shift.trainable: true"):
        Trainer(load_config(None, keys(start, tmp_path, "--shift_learning_rate", "1e-2")))
    with pytest.raises(SettingsError, match="shift_learning_rate must be above 0"):
        load_config(None, keys(start, tmp_path, "--shift_learning_rate", "0"))


def test_the_first_step_of_adamw_moves_each_group_by_its_rate(start: Path, tmp_path: Path) -> None:
    """AdamW's first step is the rate times the sign of the gradient, whatever the gradient is."""
    more = (*TRAINED_SHIFT, "--shift_learning_rate", "1e-2", "--learning_rate", "1e-4", "--max_train_steps", "1")
    trainer = Trainer(load_config(None, keys(start, tmp_path, *more)))
    before = {name: p.detach().clone() for name, p in trainer.backbone.named_parameters()}
    trainer.run()
    shift = trainer.objective.shift
    assert float((shift.scale - -1.0).abs()) == pytest.approx(1e-2, rel=1e-3)
    assert float((shift.bias - 0.5).abs()) == pytest.approx(1e-2, rel=1e-3)
    moved = max(float((p - before[name]).abs().max()) for name, p in trainer.backbone.named_parameters())
    assert moved == pytest.approx(1e-4, rel=1e-2)


def test_warm_up_and_schedule_scale_both_rates(start: Path, tmp_path: Path) -> None:
    seen = []
    more = (*TRAINED_SHIFT, "--shift_learning_rate", "1e-2", "--learning_rate", "1e-3", "--lr_warmup_steps", "3")
    configuration = load_config(None, keys(start, tmp_path, *more))
    Trainer(configuration, callbacks=[lambda t: seen.append([g["lr"] for g in t.optimizer.param_groups])]).run()
    factors = [0.25, 0.5, 0.75, 1.0]
    assert seen[1:] == [[pytest.approx(1e-3 * f), pytest.approx(1e-2 * f)] for f in factors]


def test_a_trained_shift_is_saved_restored_and_resumed_exactly(start: Path, tmp_path: Path) -> None:
    more = (*TRAINED_SHIFT, "--shift.mode", "diagonal", "--shift_learning_rate", "1e-2", "--max_train_steps", "6")
    whole = Trainer(load_config(None, keys(start, tmp_path / "whole", *more)))
    whole.run()
    Trainer(load_config(None, keys(start, tmp_path / "parts", *more))).run(until=3)
    resumed = Trainer(load_config(None, keys(start, tmp_path / "parts", *more, "--resume_from_checkpoint", "latest")))
    resumed.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(resumed.objective.shift.scale, whole.objective.shift.scale)
    assert not torch.equal(whole.objective.shift.scale, torch.full_like(whole.objective.shift.scale, -1.0))
    # A changed rate is followed: it is the config's, not the checkpoint's.
    record = json.loads((tmp_path / "parts/metrics.jsonl").read_text().splitlines()[-1])
    assert record["learning_rate"] == pytest.approx(3e-4)


# ---- a step that is left out


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_weights_moments_and_count(fused: bool) -> None:
    """fused is what runs on a GPU: the flag is read by the kernel. The CPU has that kernel too."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1, fused=fused)
    assert waits_for_the_device(optimizer) == (not fused)
    stepped(optimizer, layer, None)
    before = [p.detach().clone() for p in layer.parameters()]
    state = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    stepped(optimizer, layer, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    for old, new in zip(state, optimizer.state.values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    stepped(optimizer, layer, torch.tensor(0.0))
    assert all(not torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert all(float(s["step"]) == 2 for s in optimizer.state.values())


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_are_no_numbers_do_not_reach_the_weights(fused: bool) -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    before = [p.detach().clone() for p in layer.parameters()]
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    step_unless(optimizer, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    optimizer.zero_grad()
    stepped(optimizer, layer, torch.tensor(0.0))
    assert all(bool(p.isfinite().all()) for p in layer.parameters())


def test_under_a_loss_scaler_a_skip_leaves_the_scaler_ready_for_the_next_step() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = layer.weight.detach().clone()
    for skip, moves in ((1.0, False), (0.0, True), (None, True)):
        scaler.scale(layer(torch.ones(1, 3)).square().mean()).backward()
        scaler.unscale_(optimizer)
        step_unless(optimizer, None if skip is None else torch.tensor(skip), scaler)
        optimizer.zero_grad()
        assert torch.equal(layer.weight, before) != moves
        before = layer.weight.detach().clone()


# ---- 8 bits


def test_8_bit_adamw_without_bitsandbytes_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'apex_fast\[quantization\]'"):
        make_optimizer(config(optimizer="adamw_8bit"), [nn.Parameter(torch.ones(2))])


def test_8_bit_adamw_trains_and_resumes_exactly(start: Path, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'apex_fast[quantization]'")
    more = ("--optimizer", "adamw_8bit", "--max_train_steps", "6", *TRAINED_SHIFT, "--alarms.enabled", "true")
    whole = Trainer(load_config(None, keys(start, tmp_path / "whole", *more)))
    assert isinstance(whole.optimizer, bitsandbytes.optim.AdamW8bit)
    whole.run()
    moments = {v.dtype for s in whole.optimizer.state.values() for k, v in s.items() if k == "state1"}
    assert moments <= {torch.uint8, torch.float32}
    Trainer(load_config(None, keys(start, tmp_path / "parts", *more))).run(until=3)
    assert main(["train", *keys(start, tmp_path / "parts", *more, "--resume_from_checkpoint", "latest")]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_8_bit_moments_take_a_quarter_of_the_memory() -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'apex_fast[quantization]'")
    sizes = {}
    for kind in ("adamw", "adamw_8bit"):
        layer = nn.Linear(256, 256, bias=False)
        optimizer = make_optimizer(config(optimizer=kind), list(layer.parameters()))
        layer(torch.ones(1, 256)).sum().backward()
        optimizer.step()
        (state,) = optimizer.state.values()
        sizes[kind] = sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
    assert sizes["adamw_8bit"] < 0.27 * sizes["adamw"]
