"""What a run says: at its start, while it goes on, at its end."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import Tensor

from apex_fast.command import command_name
from apex_fast.data.tar_shards import shown
from apex_fast.objective import ApexObjective
from apex_fast.peers import Peer
from apex_fast.training.base_samples import describe
from apex_fast.training.losses import unused_settings
from apex_fast.training.phases import PHASES, status
from apex_fast.training.processes import NoMetrics
from apex_fast.training.progress import Board, Console, MetricsFile, as_numbers, open_board
from apex_fast.training.results import MODEL_FOLDER
from apex_fast.training.settings import as_mapping
from apex_fast.training.setup import cost_of_a_step, start_lora_hint
from apex_fast.training.step import rate_factor
from apex_fast.training.timing import peak_bytes

if TYPE_CHECKING:
    from apex_fast.training.loop import Trainer


class Reports:
    """Console, metrics.jsonl and the board that ``report_to`` names, for one call of :meth:`Trainer.run`. Numbers leave
    the main process alone; every process takes part in making them.

    last: the step that the call ends with.
    """

    def __init__(self, trainer: Trainer, last: int) -> None:
        config, self._trainer, self._last = trainer.config, trainer, last
        self.console = Console(last, trainer.step, label=trainer.label, stream=trainer.stream)
        self.metrics: MetricsFile | NoMetrics = NoMetrics()
        self.board: Board | None = None
        if trainer.is_main:
            path = trainer.output_dir / "metrics.jsonl"
            self.metrics = MetricsFile(path, keep_until=trainer.step, say=self.say)
            settings = as_mapping(config)
            if isinstance(config.dataset_name, str):
                # Users and queries of a URL stay here.
                settings["dataset_name"] = shown(config.dataset_name)
            self.board = open_board(config.report_to, trainer.output_dir, step=trainer.step, settings=settings)
        self._phase: str | None = None
        self._latest: dict[str, Any] = {}
        self._milestones = [m for m in trainer.course.milestones() if m.step > trainer.step]

    def say(self, message: str) -> None:
        """A line on the console."""
        self.console.say(message)

    def close(self) -> None:
        """Closes all of them, whatever one of them raises."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.metrics.close)
            stack.callback(self.console.close)
            if self.board is not None:
                stack.callback(self.board.close)

    def before_step(self) -> None:
        """Tells of a phase that begins with the next step."""
        trainer = self._trainer
        if (now := trainer.phase(trainer.step)) != self._phase:
            self._phase = now
            self.say(f"step {trainer.step}: {PHASES[now]}")

    def after_step(self, values: dict[str, Tensor]) -> None:
        """The state of the run after a step with the metrics ``values``; its numbers every ``logging_steps``."""
        trainer = self._trainer
        if trainer.step % trainer.config.logging_steps == 0 or trainer.step == self._last:
            self._write(as_numbers(trainer.processes.mean(values)))
        latest = {"numbers": {}, **self._latest}
        parts = status(trainer.course, trainer.step, **latest, visibility=trainer.visibility)
        self.console.step(trainer.step, parts, pace=not self._latest)
        if self._milestones and self._milestones[0].step <= trainer.step:
            self.say(self._milestones.pop(0).reached(latest["numbers"]))

    def _write(self, numbers: dict[str, float]) -> None:
        trainer, config = self._trainer, self._trainer.config
        seconds, peak, figures = trainer.timer.read(), peak_bytes(trainer.device), trainer.alarms.figures
        record = {
            **numbers,
            "learning_rate": config.learning_rate * rate_factor(config, trainer.step - 1),
            "epoch": round(trainer.batches.epoch, 4),
            "phase": self._phase,
            **{name: value for name, value in figures.items() if name not in numbers},
            **{f"seconds/{role}": value for role, value in seconds.items()},
            "images_per_second": _images_of_a_step(trainer) / max(seconds["step"], 1e-9),
            "peak_bytes": peak,
        }
        self._latest = {"numbers": {**figures, **numbers}, "seconds": seconds, "peak": peak}
        self.metrics.write(trainer.step, record)
        if self.board is not None:
            self.board.scalars(trainer.step, record)

    def scores(self, scores: dict[str, float]) -> None:
        """What a validation has measured."""
        step, found = self._trainer.step, {f"validation/{k}": v for k, v in scores.items()}
        self.metrics.write(step, found)
        if self.board is not None:
            self.board.scalars(step, found)
        self.say(f"step {step}, validation: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))

    # ---- start and end

    def announce(self) -> None:
        """Says what the run does and what to expect of it."""
        trainer, config, say = self._trainer, self._trainer.config, self.say
        trained = sum(p.numel() for p in trainer.parameters)
        say(
            f"{config.loss}: {trained / 1e6:.2f} M trained parameters{_way(trainer)}, {len(trainer.batches.data)} "
            f"samples, {config.max_train_steps - trainer.step} steps of {_images_of_a_step(trainer)} on "
            f"{_place(trainer)}"
        )
        if trainer.step:
            changed = f"; changed since: {', '.join(trainer.changed)}" if trainer.changed else ""
            say(f"going on from step {trainer.step}{changed}")
            if trainer.backbone.text is None:
                say("the model was recognised by its configuration and a sample of its weights, not by all of them")
        if cost := cost_of_a_step(config, trainer.guidance):
            say(cost)
        if unused := unused_settings(config):
            say(f"loss: {config.loss} does not use: {', '.join(unused)}")
        if config.prompts is not None:
            say(describe(config))
        for note in trainer.notes:
            say(f"careful: {note}")
        if isinstance(trainer.objective, Peer):
            objective = trainer.objective
            say(f"a step is {objective.passes}, F being one forward of the batch; held: {objective.copies}")
        if isinstance(trainer.objective, ApexObjective):
            say(
                "one-step samples get worse before they get better: the generator lets go of its blurred average "
                "first. That is expected."
            )
        for milestone in self._milestones:
            say(milestone.announce())

    def end(self, checkpoint: Any, *, finished: bool, stopped: bool) -> None:
        """Says how the run has ended, and how to go on.

        checkpoint: the folder of the last one. stopped: a signal has asked for it.
        """
        trainer, config, halt = self._trainer, self._trainer.config, self._trainer.alarms.halt
        again = f"to go on: {command_name()} train {trainer.output_dir / 'config.yaml'} --resume_from_checkpoint latest"
        if finished:
            self.say(f"finished at step {trainer.step}; the model is in {trainer.output_dir / MODEL_FOLDER}")
            if (hint := start_lora_hint(config)) is not None:
                self.say(hint)
        elif stopped:
            self.say(f"stopped at step {trainer.step} of {config.max_train_steps}; saved {checkpoint}\n{again}")
        elif halt is not None:
            self.say(
                f"an alarm stopped the run at step {trainer.step} of {config.max_train_steps}; saved {checkpoint}\n"
                f"read {halt.see}; {again}"
            )


def _images_of_a_step(trainer: Trainer) -> int:
    """Samples that one step of the optimizer sees, in all processes together."""
    config = trainer.config
    return config.train_batch_size * config.gradient_accumulation_steps * trainer.processes.world


def _place(trainer: Trainer) -> str:
    processes = trainer.processes
    if processes.world == 1:
        return str(trainer.device)
    shared = "a part of the network" if processes.sharded else "a whole network"
    return f"{processes.world} processes ({trainer.device.type}), {shared} in each"


def _way(trainer: Trainer) -> str:
    config, backbone = trainer.config, trainer.backbone
    if config.mode == "full":
        return ""
    size = sum(p.numel() for p in backbone.transformer.parameters()) / 1e6
    shown = f"{size:,.0f}" if size >= 10 else f"{size:.2f}"
    return f" (a LoRA of rank {config.rank}; with it the {backbone.family} transformer has {shown} M)"
