"""One step of the optimizer of a run: its passes over data, the norm of the gradients, and the step or its absence."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from apex_fast.condition import Condition
from apex_fast.draws import Draws
from apex_fast.objective import ApexObjective
from apex_fast.peers import Peer
from apex_fast.training import distributed
from apex_fast.training.alarms import one_step_spread
from apex_fast.training.flow_matching import FlowMatching
from apex_fast.training.optimizers import set_rates, step_unless
from apex_fast.training.schedule import learning_rate_factor
from apex_fast.training.timing import BACKWARD, DATA, FORWARD, OPTIMIZER, SYNCHRONISATION

if TYPE_CHECKING:
    from apex_fast.training.config import TrainConfig
    from apex_fast.training.loop import Trainer


def rate_factor(config: TrainConfig, step: int) -> float:
    """What every learning rate of the run is multiplied with at ``step``, from 0."""
    return learning_rate_factor(
        step, kind=config.lr_scheduler, warmup_steps=config.lr_warmup_steps, total_steps=config.max_train_steps
    )


def one_step(trainer: Trainer) -> dict[str, Tensor]:
    """One step of ``trainer``, which does not count it yet; its metrics as 0-d tensors on the device."""
    config = trainer.config
    values = _passes(trainer)
    limit = float("inf") if config.max_grad_norm is None else config.max_grad_norm
    with trainer.timer.role(SYNCHRONISATION):
        if trainer.processes.world > 1:
            distributed.average_gradients(trainer.unwrapped)
        if trainer.scaler is not None:
            trainer.scaler.unscale_(trainer.optimizer)
        trainer.grad_norm = distributed.clip_grad_norm_(trainer.parameters, limit)
    values["grad_norm"] = trainer.grad_norm
    set_rates(trainer.optimizer, config, rate_factor(config, trainer.step))
    skip = trainer.alarms.judge(trainer.grad_norm)
    with trainer.timer.role(OPTIMIZER):
        # Under fp16 a step is left out as well where the scaled loss has overflown, and the scale is halved; the host
        # knows of all of them then, and counts them here rather than in the alarms.
        stepped = step_unless(trainer.optimizer, skip, trainer.scaler)
        trainer.skipped_steps += trainer.scaler is not None and not stepped
        if stepped is not False:
            trainer.objective.watch_gradient_norm(trainer.grad_norm, step=trainer.step)
            # Where only the device knows whether the weights moved, it decides on their averages too.
            left_out = skip if stepped is None else None
            if trainer.average is not None:
                trainer.average.update(left_out)
            trainer.velocities.update_ema(left_out)
        else:
            trainer.grad_norm = None
        trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.scaler is not None:
        values["skipped_steps"] = values["grad_norm"].new_tensor(float(trainer.skipped_steps))
    if (spread := trainer.diversity()) is not None:
        values["diversity"] = spread
    return values


def _passes(trainer: Trainer) -> dict[str, Tensor]:
    """Forwards and backwards of all passes of a step; the means of their metrics."""
    passes = trainer.config.gradient_accumulation_steps
    sums: dict[str, Tensor] = {}

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with trainer.timer.role(BACKWARD):
            share = loss / passes
            (share if trainer.scaler is None else trainer.scaler.scale(share)).backward(*args, **kwargs)

    for number in range(passes):
        with trainer.timer.role(DATA):
            x, condition = trainer.batches.next()
            if trainer.own_samples is not None:
                x = trainer.own_samples(x, condition)
            options = {"step": trainer.step, "backward": backward, **_drawn(trainer, x)}
        # Gradients cross the processes in the last backward of the last pass, and nowhere before.
        over = number == passes - 1
        quiet = contextlib.nullcontext() if over or trainer.no_sync is None else trainer.no_sync()
        with trainer.timer.role(FORWARD), quiet:
            metrics = _ask(trainer, x, condition, options, last=over)
        for name, value in metrics.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    return {name: value / passes for name, value in sums.items()} if passes > 1 else sums


def _ask(
    trainer: Trainer, x: Tensor, condition: Condition, options: dict[str, Any], *, last: bool
) -> dict[str, Tensor]:
    """Has the objective do its forwards and backwards; its metrics."""
    objective = trainer.objective
    if isinstance(objective, Peer):
        return objective.step(x, condition, trainer.negative, **options)
    if isinstance(objective, FlowMatching):
        return objective.backward(trainer.velocities.generator, x, condition, **options).metrics
    return objective.backward(
        trainer.velocities,
        x,
        condition,
        negative_condition=trainer.negative,
        schedule=trainer.schedule,
        no_sync=trainer.no_sync if last else None,
        **options,
    ).metrics


def _drawn(trainer: Trainer, x: Tensor) -> dict[str, Any]:
    """Where the random numbers of a pass come from: every process draws those of the whole batch and keeps its own
    rows, so that a run is the same over any number of processes."""
    processes = trainer.processes
    if processes.world == 1:
        return {"generator": trainer.generator}
    draws = trainer.objective.draw(x.new_empty(processes.world * len(x), *x.shape[1:]), trainer.generator)
    rows = processes.rows(len(x))
    parts = {field.name: getattr(draws, field.name) for field in dataclasses.fields(draws)}
    return {"draws": Draws(**{name: part if part is None else part[rows] for name, part in parts.items()})}


class DiversityLook:
    """How far one-step samples of a run lie apart, at the steps that ask for it; None at all others, and where the loss
    has no alarm for it. It keeps the condition of its prompts."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        settings, alarms = trainer.config.alarms.diversity, trainer.config.alarms
        self._settings = settings
        self._wanted = alarms.enabled and settings.action != "off" and isinstance(trainer.objective, ApexObjective)
        self._condition: Condition | None = None

    def __call__(self) -> Tensor | None:
        trainer, settings = self._trainer, self._settings
        if not self._wanted or trainer.step % settings.every:
            return None
        if self._condition is None:
            self._condition = self._first_prompts()
        return one_step_spread(
            trainer.backbone, trainer.network, self._condition.to(trainer.device), trainer.sample_shape, settings.seeds
        )

    def _first_prompts(self) -> Condition:
        trainer, count = self._trainer, self._settings.prompts
        prompts, table = trainer.config.validation_prompts[:count], trainer.batches.table
        if table is None:
            return trainer.encode(prompts or list(trainer.batches.data.vocabulary or [""])[:count])
        held = bool(prompts) and table.holds(prompts)
        return table(prompts) if held else table.example(count)
