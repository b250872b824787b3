"""Every alarm provoked in a run of a real, tiny network: what it sees, what it does, what it leaves behind."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("yaml")

from tiny_runs import keys, make_start, start_process

from apex_fast import ConditionShift
from apex_fast.condition import Condition
from apex_fast.finite import NonFiniteLossError
from apex_fast.reporting.run_files import read_run
from apex_fast.training import alarms as alarms_module
from apex_fast.training.alarms import (
    DOCS,
    EXIT_CODE,
    Alarms,
    AlarmSettings,
    BranchDifferenceSettings,
    GradientExplosionSettings,
    NonFiniteSettings,
    one_step_spread,
)
from apex_fast.training.checkpoint import checkpoints, load_state
from apex_fast.training.config import load_config
from apex_fast.training.ema import WeightAverage
from apex_fast.training.loop import Trainer
from apex_fast.training.optimizers import step_unless, waits_for_the_device
from apex_fast.training.settings import SettingsError
from apex_fast.velocities import Velocities

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("tiny") / "start")


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A median of three steps is enough, so that runs can be short."""
    monkeypatch.setattr(alarms_module, "LEAST_HISTORY", 3)


def trainer_of(start: Path, folder: Path, *more: str, **options: Any) -> Trainer:
    """A run of ten steps with the correction on from the first; its console is ``trainer.stream``."""
    base = ("--max_train_steps", "10", "--objective.warmup_steps", "0", "--objective.ramp_steps", "0")
    configuration = load_config(None, keys(start, folder, *base, "--real_branch", "frozen", *more))
    return Trainer(configuration, stream=io.StringIO(), **options)


def spoil(trainer: Trainer, *steps: int, factor: float = math.nan) -> list[int]:
    """Multiplies the data of some steps, counted from 0, with ``factor``. Returns the position of the data of each."""
    positions: list[int] = []
    real = trainer.batches.next

    def spoilt() -> Any:
        x, condition = real()
        positions.append(trainer.batches.position)
        return (x * factor if trainer.step in steps else x), condition

    trainer.batches.next = spoilt  # type: ignore[method-assign]
    return positions


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.parameters]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def written(folder: Path) -> list[tuple[int, dict[str, str]]]:
    """(step, alarm) of every alarm in metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["alarm"]) for line in lines if "alarm" in line]


def curve(folder: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


# ---- non_finite


def test_a_batch_that_is_no_number_is_skipped_and_the_run_goes_on(start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path)
    positions = spoil(trainer, 3)
    seen: list[list[torch.Tensor]] = []
    trainer.callbacks.append(lambda t: seen.append(weights(t)))
    result = trainer.run()
    assert result.finished and result.exit_code == 0 and result.step == 10
    assert same(seen[3], seen[4]), "the optimizer stepped on gradients that are no numbers"
    assert not same(seen[4], seen[5])
    assert len(positions) == 10 and positions == sorted(set(positions)), "the data did not move on"
    assert all(bool(p.isfinite().all()) for p in trainer.parameters)
    ((step, alarm),) = written(tmp_path)
    assert step == 5 and alarm["name"] == "non_finite"  # of step 4, looked at a step later
    assert "nan" in alarm["saw"] and alarm["did"].startswith("the step was skipped (1 in a row, an error at 10)")
    assert alarm["see"] == f"{DOCS}#non-finite"
    # Console and report name the step it was, not the one in which it was told.
    assert "ALARM non_finite at step 4" in trainer.stream.getvalue() and alarm["step"] == 4
    assert [told["step"] for told in read_run(tmp_path).alarms] == [4]
    assert curve(tmp_path, "skipped_steps")[10] == 1


def test_too_many_in_a_row_are_an_error_and_leave_no_checkpoint_of_them(start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, "--alarms.non_finite.patience", "3", "--checkpointing_steps", "2")
    spoil(trainer, *range(2, 10))
    with pytest.raises(NonFiniteLossError, match="of step"):
        trainer.run()
    assert trainer.step < 8
    # Of step 4 too, which is in the midst of it: no step has touched the weights since step 2.
    found = checkpoints(tmp_path)
    assert [p.name for p in found] == ["checkpoint-2", "checkpoint-4"]
    one, other = (load_state(folder, "ema")["average"] for folder in found)
    assert all(torch.equal(other[name], value) for name, value in one.items())


@pytest.mark.parametrize("until", [None, 4])
def test_two_in_a_row_at_the_step_of_a_checkpoint_do_not_end_the_run(
    start: Path, tmp_path: Path, until: int | None
) -> None:
    """until: as if a signal had come there."""
    trainer = trainer_of(start, tmp_path, "--checkpointing_steps", "4" if until is None else "null")
    spoil(trainer, 2, 3)
    trainer.run(until=until)
    wanted = [4, 8, 10] if until is None else [4]
    assert [p.name for p in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in wanted]


def test_nothing_is_saved_at_the_last_step_that_patience_allows() -> None:
    alarms = Alarms(AlarmSettings(non_finite=NonFiniteSettings(patience=3)))
    weight = torch.nn.Parameter(torch.ones(2))
    for step in range(1, 4):
        alarms.judge(torch.tensor(math.nan))
        alarms.after_step(step, {})
        if step < 3:
            alarms.settle([weight])
    with pytest.raises(NonFiniteLossError, match="of step 2"):
        alarms.settle([weight])


def test_a_single_one_at_the_step_of_a_checkpoint_is_no_reason_not_to_save(start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, "--checkpointing_steps", "4")
    spoil(trainer, 3)
    assert trainer.run().finished
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8", "checkpoint-10"]


def test_weights_that_are_no_numbers_are_never_saved(start: Path, tmp_path: Path) -> None:
    def poison(trainer: Trainer) -> None:
        if trainer.step == 3:
            with torch.no_grad():
                trainer.parameters[0].fill_(math.nan)

    trainer = trainer_of(start, tmp_path, "--checkpointing_steps", "2", callbacks=[poison])
    with pytest.raises(NonFiniteLossError, match="of step 3"):
        trainer.run()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_action_error_ends_the_run_at_once(start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, "--alarms.non_finite.action", "error")
    spoil(trainer, 3)
    with pytest.raises(NonFiniteLossError, match="of step 3 is nan"):
        trainer.run()
    assert trainer.step == 5


def test_without_alarms_a_non_finite_loss_is_an_error_as_ever(start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, "--alarms.enabled", "false")
    spoil(trainer, 3)
    with pytest.raises(NonFiniteLossError):
        trainer.run()
    assert written(tmp_path) == []


def test_overflow_under_loss_scaling_is_no_alarm() -> None:
    settings = AlarmSettings(non_finite=NonFiniteSettings(patience=3))
    alarms = Alarms(settings, loss_scaling=True)
    found = []
    for step in range(1, 5):
        skip = alarms.judge(torch.tensor(math.inf if step == 2 else 1.0))
        assert float(skip) == float(step == 2)
        found += alarms.after_step(step, {})
    assert found == [] and alarms.skipped == 1
    for step in range(5, 7):
        alarms.judge(torch.tensor(math.inf))
        alarms.after_step(step, {})
    with pytest.raises(NonFiniteLossError, match="gradient norm"):
        for step in range(7, 9):
            alarms.judge(torch.tensor(math.inf))
            alarms.after_step(step, {})


# ---- gradient_explosion


def test_an_exploding_gradient_is_skipped(start: Path, tmp_path: Path, short_memory: None) -> None:
    trainer = trainer_of(start, tmp_path)
    spoil(trainer, 5, factor=300.0)
    seen: list[list[torch.Tensor]] = []
    trainer.callbacks.append(lambda t: seen.append(weights(t)))
    assert trainer.run().finished
    assert same(seen[5], seen[6]) and not same(seen[6], seen[7])
    ((step, alarm),) = written(tmp_path)
    assert step == 7 and alarm["name"] == "gradient_explosion"
    norms = curve(tmp_path, "grad_norm")
    assert norms[6] > 10 * norms[5] and f"{norms[6]:.4g}" in alarm["saw"]
    assert alarm["did"] == "the step was skipped (1 in a row)"


def test_explosions_in_a_row_stop_the_run_with_a_checkpoint(start: Path, tmp_path: Path, short_memory: None) -> None:
    more = ("--alarms.gradient_explosion.patience", "2", "--checkpointing_steps", "null")
    trainer = trainer_of(start, tmp_path, *more)
    spoil(trainer, *range(5, 10), factor=300.0)
    result = trainer.run()
    assert not result.finished and result.exit_code == EXIT_CODE
    assert result.step == 8  # two skipped, and one that was under way when the second was looked at
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-8"]
    assert [a["did"] for _, a in written(tmp_path)][-1] == "the run stops with a checkpoint"
    said = trainer.stream.getvalue()
    assert f"read {DOCS}#gradient-explosion" in said and "--resume_from_checkpoint latest" in said
    assert not (tmp_path / "model").exists()


def test_under_fp16_explosions_are_counted_with_overflows_and_move_no_average(
    start: Path, tmp_path: Path, short_memory: None
) -> None:
    trainer = trainer_of(start, tmp_path, "--real_branch", "ema", "--max_train_steps", "9")
    # With the loss scaler of fp16, and fp32 inside: in fp16 this network overflows where it likes.
    trainer.scaler, trainer.alarms.loss_scaling = torch.amp.GradScaler("cpu", init_scale=8.0), True
    spoil(trainer, 3, factor=math.nan)
    judge = trainer.alarms.judge
    trainer.alarms.judge = lambda norm: judge(norm * 1e4 if trainer.step == 7 else norm)  # type: ignore[method-assign]
    seen: list[list[torch.Tensor]] = []
    trainer.callbacks.append(lambda t: seen.append([*weights(t), *averages(t)]))
    trainer.run()
    assert [same(a, b) for a, b in zip(seen, seen[1:], strict=False)] == [n in (3, 7) for n in range(9)]
    assert trainer.skipped_steps == curve(tmp_path, "skipped_steps")[9] == 2
    assert trainer.average.updates == 7
    assert [alarm["name"] for _, alarm in written(tmp_path)][-1] == "gradient_explosion"


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_moves_no_average(start: Path, tmp_path: Path, fused: bool) -> None:
    """fused: as on a GPU, where nobody but the device knows of the skip."""
    trainer = trainer_of(start, tmp_path, "--real_branch", "ema", "--max_train_steps", "6")
    if fused:
        trainer.optimizer = torch.optim.AdamW(trainer.parameters, lr=1e-3, fused=True)
    assert waits_for_the_device(trainer.optimizer) == (not fused)
    spoil(trainer, 3)
    seen: list[list[torch.Tensor]] = []
    trainer.callbacks.append(lambda t: seen.append(averages(t)))
    trainer.run()
    assert [same(a, b) for a, b in zip(seen, seen[1:], strict=False)] == [False] * 3 + [True] + [False] * 2
    assert trainer.average.updates == 5


def averages(trainer: Trainer) -> list[torch.Tensor]:
    """Of the weights, and those of the real branch."""
    found = [*trainer.average.average.values(), *trainer.velocities.state_dict().values()]
    return [value.clone() for value in found]


def test_after_norms_of_nothing_a_gradient_is_no_explosion() -> None:
    alarms = Alarms(AlarmSettings())
    assert [float(alarms.judge(torch.tensor(norm))) for norm in [0.0] * 21 + [1.0]] == [0.0] * 22
    assert alarms.after_step(22, {}) == alarms.after_step(23, {}) == []


def test_a_norm_that_stays_larger_becomes_the_normal_one() -> None:
    alarms = Alarms(AlarmSettings(gradient_explosion=GradientExplosionSettings(window=20, patience=100)))
    verdicts = [float(alarms.judge(torch.tensor(norm))) for norm in [1.0] * 30 + [50.0] * 20]
    assert verdicts[:30] == [0.0] * 30
    assert verdicts[30] == 1.0 and sum(verdicts) == 11  # until they are more than half of the window
    assert verdicts[-1] == 0.0


def test_explosions_can_back_off_or_only_be_told_of(start: Path, tmp_path: Path, short_memory: None) -> None:
    for action, did in (("tell", "nothing was done"), ("back_off", "the weight of the correction is multiplied")):
        trainer = trainer_of(start, tmp_path / action, "--alarms.gradient_explosion.action", action)
        spoil(trainer, 5, factor=300.0)
        seen: list[list[torch.Tensor]] = []
        trainer.callbacks.append(lambda t, seen=seen: seen.append(weights(t)))
        trainer.run()
        assert not same(seen[5], seen[6])
        assert any(
            a["name"] == "gradient_explosion" and a["did"].startswith(did) for _, a in written(tmp_path / action)
        )


# ---- branch_difference

CLOSE = ("--alarms.branch_difference.window", "3", "--alarms.recovery_steps", "4")


def test_branches_that_run_apart_back_the_correction_off_and_it_comes_back(start: Path, tmp_path: Path) -> None:
    def blow_up(trainer: Trainer) -> None:
        # The network away from the start, which the frozen real branch still is; and back.
        with torch.no_grad():
            if trainer.step == 2:
                trainer.backbone.transformer.proj_out.weight.mul_(20)
            if trainer.step == 6:
                trainer.backbone.transformer.proj_out.weight.div_(20)

    more = (*CLOSE, "--max_train_steps", "16", "--learning_rate", "1e-5", "--alarms.gradient_explosion.action", "off")
    trainer = trainer_of(start, tmp_path, *more, callbacks=[blow_up])
    assert trainer.run().finished
    (first, alarm), *_ = written(tmp_path)
    assert alarm["name"] == "branch_difference" and "above 1.5" in alarm["saw"]
    assert "multiplied with 0.5, which grows back to 1 (4 steps for each halving)" in alarm["did"]
    used = curve(tmp_path, "correction_weight")
    full = trainer.config.objective.correction_weight
    # Looked at after step `first`, so the step after it is the first with less.
    assert used[first] == full and used[first + 1] == pytest.approx(full / 2)
    assert used[first + 2] > used[first + 1] or len(written(tmp_path)) > 1
    assert used[16] > used[first + 1]
    assert curve(tmp_path, "correction_factor")[first] == pytest.approx(0.5)


def test_branches_that_agree_are_told_of_once(start: Path, tmp_path: Path) -> None:
    more = (*CLOSE, "--shift.scale", "1", "--shift.bias", "0", "--learning_rate", "1e-9", "--probe", "false")
    trainer = trainer_of(start, tmp_path, *more)
    trainer.backbone.transformer.eval()  # without dropout the branches are one function
    assert trainer.run().finished
    ((_, alarm),) = written(tmp_path)
    assert alarm["name"] == "branch_difference" and "below 0.05" in alarm["saw"]
    assert alarm["did"] == "nothing was done"


def test_in_the_warm_up_the_branches_may_differ_as_they_like() -> None:
    alarms = Alarms(AlarmSettings(branch_difference=BranchDifferenceSettings(window=2)))
    for step in range(1, 6):
        assert alarms.look(step, {"dv_relative": 9.0, "correction_weight": 0.0}) == []
    assert alarms.look(6, {"dv_relative": 9.0, "correction_weight": 0.5}) == []
    assert len(alarms.look(7, {"dv_relative": 9.0, "correction_weight": 0.5})) == 1


def test_backing_off_further_than_a_sixteenth_stops_the_run() -> None:
    settings = AlarmSettings(recovery_steps=10**9, branch_difference=BranchDifferenceSettings(window=1))
    alarms = Alarms(settings)
    factors = []
    for step in range(1, 6):
        alarms.look(step, {"dv_relative": 9.0, "correction_weight": 0.5})
        factors.append(alarms.correction_factor)
    assert factors == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], rel=1e-6)
    assert alarms.halt is not None and "of its weight already" in alarms.halt.saw


# ---- shift_drift


def test_a_shift_that_runs_away_stops_the_run(start: Path, tmp_path: Path) -> None:
    more = ("--shift.trainable", "true", "--shift_learning_rate", "0.8", "--alarms.branch_difference.action", "off")
    trainer = trainer_of(start, tmp_path, *more)
    result = trainer.run()
    assert result.exit_code == EXIT_CODE and not result.finished
    names = [alarm["name"] for _, alarm in written(tmp_path)]
    assert names[-1] == "shift_drift"
    assert [p.name for p in checkpoints(tmp_path)] == [f"checkpoint-{result.step}"]


@pytest.mark.parametrize("mode", ["scalar", "diagonal"])
def test_a_shift_on_its_way_to_the_identity_is_noticed(mode: str) -> None:
    shift = ConditionShift(mode, dim=None if mode == "scalar" else 5, trainable=True)
    alarms = Alarms(AlarmSettings(), shift=shift)
    start = math.hypot(2.0, 0.5)
    found = []
    for step, scale in enumerate((-1.0, -0.5, 0.0, 0.5, 0.5), 1):
        with torch.no_grad():
            shift.scale.fill_(scale)
            shift.bias.fill_(0.25)
        found += alarms.after_step(step, {})
    (alarm,) = found
    share = math.hypot(0.5, 0.25) / start
    assert alarm.step == 4 and f"{share:.2f} of its first distance from the identity, below 0.5" in alarm.saw
    assert alarm.stops


def test_a_shift_that_starts_at_the_identity_is_only_told_when_it_goes_far() -> None:
    shift = ConditionShift(scale=1.0, bias=0.0, trainable=True)
    alarms = Alarms(AlarmSettings(), shift=shift)
    found = {}
    for step, scale in enumerate((1.0, 1.0, 0.5, -1.0, -1.1, -1.1), 1):
        with torch.no_grad():
            shift.scale.fill_(scale)
        found[step] = alarms.after_step(step, {})
    assert [step for step, alarms in found.items() if alarms] == [6]
    assert "moved by 1.02 of the default shift's distance from the identity, more than 1" in found[6][0].saw


@pytest.mark.parametrize(("way", "told"), [(1.0, [3, 5, 8]), (-1.0, [3, 5, 7])])
def test_a_shift_that_goes_on_drifting_is_told_of_again_in_a_resumed_run(way: float, told: list[int]) -> None:
    """Away from its start, the alarm comes for each further ``most``; towards the identity, for each halving."""
    shift = ConditionShift(scale=-1.0, bias=0.0, trainable=True)
    if way > 0:
        scales = [-1.0, -2.0, -3.1, -3.2, -5.2, -5.3, -6.0, -7.5]
    else:
        scales = [-1.0, 0.0, 0.2, 0.4, 0.6, 0.6, 0.8, 0.8]
    alarms, found = Alarms(AlarmSettings(), shift=shift), []
    for step, scale in enumerate(scales, 1):
        with torch.no_grad():
            shift.scale.fill_(scale)
        alarms.after_step(step, {})
        step_of, numbers = alarms._pending.read()
        alarms._pending = None
        found += [alarm.step for alarm in alarms.look(step_of, numbers)]
        # Every step in a run of its own.
        state, again = alarms.state_dict(), Alarms(AlarmSettings(), shift=shift)
        again._start, again._unit = alarms._start, alarms._unit
        again.load_state_dict(json.loads(json.dumps(state)))
        alarms = again
    assert found == told


def test_a_shift_that_is_not_trained_is_not_watched() -> None:
    alarms = Alarms(AlarmSettings(), shift=ConditionShift(scale=1.0, bias=0.0))
    assert alarms.after_step(1, {}) == alarms.after_step(2, {}) == []


# ---- diversity


def test_samples_that_become_alike_back_the_correction_off(start: Path, tmp_path: Path) -> None:
    def collapse(trainer: Trainer) -> None:
        if trainer.step == 4:
            # x - v is the same for every noise.
            trainer.network = lambda x_t, t, condition: x_t

    more = ("--alarms.diversity.every", "1", "--alarms.diversity.patience", "2")
    trainer = trainer_of(start, tmp_path, *more, callbacks=[collapse])
    assert trainer.run().finished
    (step, alarm), *_ = written(tmp_path)
    assert step == 7 and alarm["name"] == "diversity" and "differ by 0 over 4 seeds" in alarm["saw"]
    assert curve(tmp_path, "correction_factor")[7] == pytest.approx(0.5)
    spread = curve(tmp_path, "diversity")
    assert spread[4] > 0 and spread[5] == 0


def test_the_spread_is_the_standard_deviation_over_seeds_and_disturbs_nothing() -> None:
    network = torch.nn.Dropout(0.5).train()
    condition = Condition(torch.zeros(2, 3, 4))
    modes = []

    def velocity(x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        modes.append(network.training)
        return 0.25 * network(x_t)

    state = torch.get_rng_state()
    spread = one_step_spread(network, velocity, condition, (1, 32, 32), 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training and modes == [False] * 8
    assert float(spread) == pytest.approx(0.75, rel=0.02)  # the noise has 1, and a quarter of it is taken away


def test_looking_at_the_diversity_does_not_change_a_run(start: Path, tmp_path: Path) -> None:
    ends = {}
    for action in ("off", "back_off"):
        more = ("--alarms.diversity.every", "2", "--alarms.diversity.action", action)
        trainer = trainer_of(start, tmp_path / action, *more)
        trainer.run()
        ends[action] = weights(trainer)
    assert same(ends["off"], ends["back_off"])


# ---- all of them


def test_a_quiet_run_has_no_alarms(start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path)
    assert trainer.run().exit_code == 0
    assert written(tmp_path) == [] and "ALARM" not in trainer.stream.getvalue()
    assert not curve(tmp_path, "skipped_steps") and not curve(tmp_path, "correction_factor")


def test_a_resumed_run_sees_the_same_alarms_at_the_same_steps(start: Path, tmp_path: Path, short_memory: None) -> None:
    """Cut right where an alarm is pending: its numbers are here and it is not looked at yet."""
    more = (*CLOSE, "--alarms.branch_difference.high", "0.2", "--alarms.diversity.every", "3")
    spoilt = {"factor": 300.0}

    def run(folder: Path, *cuts: int) -> Trainer:
        for number, until in enumerate((*cuts, None)):
            resume = ("--resume_from_checkpoint", "latest") if number else ()
            trainer = trainer_of(start, folder, *more, *resume)
            spoil(trainer, 5, **spoilt)
            trainer.run(until=until)
        return trainer

    whole = run(tmp_path / "whole")
    for cut in (5, 6, 7):
        parts = run(tmp_path / f"parts{cut}", cut)
        assert written(tmp_path / f"parts{cut}") == written(tmp_path / "whole")
        assert same(weights(parts), weights(whole))
        assert parts.alarms.state_dict() == whole.alarms.state_dict()
    names = {alarm["name"] for _, alarm in written(tmp_path / "whole")}
    assert names >= {"gradient_explosion", "branch_difference"}


class NoLook(TorchDispatchMode):
    """An error for what makes a GPU's host wait: reading a value, or a result whose shape depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_skipping_a_step_does_not_wait_for_the_device() -> None:
    alarms = Alarms(AlarmSettings())
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)  # the optimizer of a GPU
    parameter.grad = torch.full_like(parameter, math.nan)
    network = torch.nn.Linear(2, 2)
    average, velocities = WeightAverage(network, [0.5, 0.9]), Velocities.from_module(network, real="ema")
    with NoLook():
        skip = alarms.judge(torch.nn.utils.get_total_norm([parameter.grad]))
        assert step_unless(optimizer, skip) is None
        average.update(skip)
        velocities.update_ema(skip)
        alarms.after_step(1, {"loss_total": torch.tensor(1.0)})
    assert average.updates == 0
    assert torch.equal(parameter.detach(), torch.ones(3))
    with pytest.raises(AssertionError), NoLook():
        skip.item()


def test_the_median_is_that_of_the_last_steps() -> None:
    alarms = Alarms(AlarmSettings(gradient_explosion=GradientExplosionSettings(window=20)))
    generator = torch.Generator().manual_seed(0)
    norms: list[float] = []
    for step in range(1, 70):
        value = float(torch.rand((), generator=generator)) + 0.5
        value = math.nan if step % 9 == 0 else value
        alarms.judge(torch.tensor(value))
        known = sorted(n for n in norms[-20:] if math.isfinite(n))
        if known:
            wanted = known[(len(known) - 1) // 2]
            assert float(alarms._verdict["median"]) == pytest.approx(wanted)
        norms.append(value)


PROCESS = """
import io, json, math, sys, warnings
import torch
import torch.distributed as dist
from process_end import leave
from apex_fast.training.alarms import Alarms, AlarmSettings, BranchDifferenceSettings
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
alarms = Alarms(AlarmSettings(branch_difference=BranchDifferenceSettings(window=2)))
found = []
for step in range(1, 6):
    # The branches of one process differ twice as much as the other one's.
    found.append(float(alarms.judge(torch.tensor(float("nan") if step == 3 and rank == 1 else 1.0))))
    values = {"dv_relative": torch.tensor(1.0 + 2.0 * rank), "correction_weight": torch.tensor(0.5)}
    found += [alarm.line for alarm in alarms.after_step(step, values)]
found.append(alarms.correction_factor)
for words in json.loads(sys.argv[1]):
    trainer = Trainer(load_config(None, words), stream=io.StringIO())
    weights, real = [], trainer.batches.next
    def spoilt():
        x, condition = real()
        return (x * math.nan if rank == 1 and trainer.step == 2 else x), condition
    trainer.batches.next = spoilt
    whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
    trainer.callbacks.append(lambda t: weights.append([whole(p.detach()).clone() for p in t.parameters]))
    trainer.run()
    same = [all(torch.equal(a, b) for a, b in zip(x, y)) for x, y in zip(weights, weights[1:])]
    found.append([same, trainer.alarms.skipped, all(bool(p.isfinite().all()) for p in weights[-1])])
    found.append(float(sum(p.double().sum() for p in weights[-1])))
gathered = [None, None]
dist.all_gather_object(gathered, found)
if rank == 0:
    print(json.dumps(gathered))
leave()
"""


def test_processes_skip_and_back_off_together(start: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "worker.py").write_text(PROCESS)
    more = ("--real_branch", "frozen", "--train_batch_size", "2", "--checkpointing_steps", "null", "--probe", "false")
    runs = [keys(start, tmp_path / way, *more, "--distributed", way) for way in ("ddp", "fsdp2")]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "worker.py")]
    process = start_process([*command, json.dumps(runs)])
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    one, other = json.loads(output.strip().splitlines()[-1])
    assert one == other, "the processes have decided differently"
    *alone, factor, _, _, _, _ = one
    lines = [item for item in alone if isinstance(item, str)]
    assert [item for item in alone if not isinstance(item, str)] == [0.0, 0.0, 1.0, 0.0, 0.0] and factor < 0.6
    assert any("ALARM non_finite at step 3" in line for line in lines)
    assert any("was 2 of the real velocity" in line for line in lines)  # the mean of 1 and 3
    for way, (same, skipped, finite) in zip(("ddp", "fsdp2"), (one[-4], one[-2]), strict=True):
        # One process's data was spoilt at step 2: neither stepped, and both went on.
        assert same == [False, False, True, False] and skipped == 1 and finite, way
        ((_, alarm),) = written(tmp_path / way)
        assert alarm["name"] == "non_finite" and alarm["did"].startswith("the step was skipped")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--alarms.back_off", "1"), "alarms.back_off must lie between 0 and 1"),
        (("--alarms.gradient_explosion.factor", "1"), "factor must be above 1"),
        (("--alarms.gradient_explosion.window", "5"), "must be at least 20 steps"),
        (("--alarms.branch_difference.low", "2"), "low must be at least 0 and below high"),
        (("--alarms.diversity.share", "5"), "diversity.share must be at least 0 and below 1, got 5"),
        (("--alarms.shift_drift.most", "-1"), "shift_drift.most must be above 0 and finite, got -1"),
        (("--alarms.shift_drift.least", "1"), "shift_drift.least must be at least 0 and below 1, got 1"),
        (("--alarms.diversity.seeds", "1"), "seeds must be at least 2"),
        (("--alarms.non_finite.patience", "0"), "alarms.non_finite.patience must be at least 1"),
        (("--alarms.non_finite.action", "stop"), "must be one of: skip, error"),
        (("--alarms.diversty.every", "3"), "did you mean 'alarms.diversity.every'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_config(None, ["--output_dir", str(tmp_path), "--loss", "flow_matching", *words])


def test_every_alarm_has_its_section_in_the_guide() -> None:
    guide = ROOT / DOCS
    headings = [line.lstrip("#").strip() for line in guide.read_text().splitlines() if line.startswith("#")]
    for name in ("non_finite", "gradient_explosion", "branch_difference", "shift_drift", "diversity"):
        assert name.replace("_", " ") in [heading.lower() for heading in headings], name


def test_the_guide_has_the_thresholds_of_the_settings() -> None:
    text = " ".join((ROOT / DOCS).read_text().split())
    settings = AlarmSettings()
    spread, explosion, band = settings.diversity, settings.gradient_explosion, settings.branch_difference
    for said in (
        f"Every {spread.every} steps {spread.seeds} seeds of {spread.prompts} prompts",
        f"{explosion.factor:g} times the median of the last {explosion.window}",
        f"mean over {band.window} steps, leaves {band.low:g} to {band.high:g}",
        f"error after {settings.non_finite.patience} in a row",
        f"exit code {EXIT_CODE}",
    ):
        assert said in text, said
