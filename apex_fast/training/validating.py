"""When a run validates, and what it does with what it finds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from apex_fast.training import validation
from apex_fast.training.memory import release
from apex_fast.training.saving import keep_best

if TYPE_CHECKING:
    from apex_fast.training.loop import Trainer
    from apex_fast.training.telling import Reports


class Validations:
    """The validations of one run. What does not fit into memory is told and left out: it must not cost the run."""

    def __init__(self, trainer: Trainer, reports: Reports) -> None:
        self._trainer, self._reports = trainer, reports
        self._last = time.monotonic()

    def draw_start(self) -> None:
        """Before the first step: the validation prompts as the model draws them in many steps."""
        trainer, say = self._trainer, self._reports.say
        steps = trainer.config.validation_base_inference_steps
        if trainer.step > 0 or not trainer.config.draws_pictures or steps is None:
            return
        try:
            # A sharded network runs in all processes or in none.
            if trainer.is_main or trainer.processes.sharded:
                say(f"drawing the validation prompts with the model as it is, in {steps} steps, once")
                validation.draw_start(trainer)
        except torch.OutOfMemoryError:
            release()
            say(
                f"the start's own pictures: skipped, they do not fit into the memory of {trainer.device}; the run goes "
                "on. Write validation_base_inference_steps: null, or a smaller resolution"
            )
        except ValueError as error:
            say(f"careful: the start's own pictures are left out: {error}")

    def begin(self) -> None:
        """Counts ``validation_minutes`` from now on."""
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether there is one after this step; the same answer in all processes."""
        trainer, config = self._trainer, self._trainer.config
        if config.validation_steps is not None and trainer.step % config.validation_steps == 0:
            return True
        if config.validation_minutes is None:
            return False
        if trainer.step == config.max_train_steps:
            return True
        # Asked where the host waits for the device anyway, and by one clock for all processes.
        if trainer.step % config.logging_steps != 0:
            return False
        late = time.monotonic() - self._last >= 60 * config.validation_minutes
        return trainer.processes.from_main(late)

    def run(self) -> None:
        """Draws and scores, keeps the step if it is the best one, and tells of it."""
        trainer, reports = self._trainer, self._reports
        scores: dict[str, float] | None = {}
        try:
            # A sharded network runs in all processes or in none.
            if trainer.is_main or trainer.processes.sharded:
                scores = validation.validate(trainer, reports.board)
        except torch.OutOfMemoryError:
            scores = None
        scores = trainer.processes.from_main(scores)
        if scores is None:
            # Outside of the handler, whose error holds the tensors that did not fit.
            release()
            reports.say(
                f"step {trainer.step}, validation: skipped, it does not fit into the memory of {trainer.device} "
                "(pictures are drawn one at a time already); the run goes on. Write validation_steps: null, a smaller "
                "resolution" + (", or validation_metrics: false" if trainer.config.validation_metrics else "")
            )
        elif scores:
            keep_best(trainer, scores, reports.say)
            reports.scores(scores)
