"""The training loop: a config in, checkpoints, metrics and a finished model out."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from apex_fast.command import command_name
from apex_fast.condition import Condition
from apex_fast.finite import GRADIENT_NORM, NonFiniteLossError
from apex_fast.objective import ApexObjective
from apex_fast.training import checkpoint as checkpoints
from apex_fast.training import state, validation
from apex_fast.training.batches import Batches
from apex_fast.training.config import TrainConfig
from apex_fast.training.ema import WeightAverage
from apex_fast.training.encoding import data_digest, encode_data, open_data, picture_size
from apex_fast.training.flow_matching import FlowMatching
from apex_fast.training.guidance import real_guidance, unused_guidance
from apex_fast.training.interrupt import StopRequest
from apex_fast.training.memory import during, release
from apex_fast.training.models import device_of, fingerprint
from apex_fast.training.progress import Console, MetricsFile, TensorBoard, as_numbers
from apex_fast.training.results import MODEL_FOLDER, Record, save_trained
from apex_fast.training.schedule import learning_rate_factor
from apex_fast.training.settings import as_mapping, write_yaml
from apex_fast.training.setup import (
    compile_blocks,
    cost_of_a_step,
    load_backbone,
    make_objective,
    make_trainable,
    make_velocities,
    record_of,
    start_lora_hint,
)
from apex_fast.training.visibility import check_visibility


@dataclass(frozen=True)
class RunResult:
    """What a call of :meth:`Trainer.run` did. exit_code: 0, or 128 + signal if one stopped it."""

    step: int
    finished: bool
    exit_code: int
    seconds: float


class Trainer:
    """One run. ``step`` counts finished optimizer steps.

    callbacks: called as ``callback(trainer)`` before the first step and after every step; they may read anything, and
    draw random numbers inside :meth:`undisturbed` only.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        callbacks: Sequence[Callable[[Trainer], None]] = (),
        label: str = "train",
        stream: TextIO | None = None,
    ) -> None:
        """Builds everything and, with ``resume_from_checkpoint``, restores it.

        Raises:
            SettingsError: the output folder holds another run, or a key does not fit the machine.
            CheckpointError: nothing to resume from, or it does not fit.
        """
        self.config, self.callbacks, self.label, self.stream = config, list(callbacks), label, stream
        self.output_dir = Path(config.output_dir)
        self.device = device_of(config.device)
        self.step = 0
        resume = None
        if config.resume_from_checkpoint is not None:
            checkpoints.restore_replaced(self.output_dir)
            resume = checkpoints.resolve_checkpoint(config.resume_from_checkpoint, self.output_dir, self._say)
        else:
            state.claim_folder(config, delete=False)
        checkpoints.clear_leftovers(self.output_dir)
        # All of them, although only torch's is used here: a text encoder or a later data set may draw from the others.
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        np.random.seed(config.seed % (1 << 32))
        source = open_data(config)
        # Before unreadable pictures are left out: that is found in every part of a run again.
        self.data_digest = data_digest(source)
        prompts = getattr(source, "vocabulary", None) or getattr(source, "captions", [])
        with during("loading the model"):
            self.backbone = load_backbone(config, prompts)
        # Before the weights of a checkpoint go in: the frozen real branch is the model that the run started from.
        self.start_fingerprint = fingerprint(self.backbone)
        self.guidance = real_guidance(config, self.backbone)
        self.picture_size = picture_size(config, self.backbone)
        self.sample_shape = self.backbone.sample_shape
        if config.image_size is not None:
            self.sample_shape = self.backbone.latent_shape(*config.image_size)
        # Mistakes that cost nothing to find come before the encoding, which may take hours. The transformer stays on
        # the CPU until that is done.
        make_trainable(config, self.backbone)
        if resume is not None:
            state.check_history(self, resume)
        with during("encoding pictures and prompts"):
            encoded = encode_data(config, self.backbone, source, self.device, self.guidance, self._say)
        self.negative = encoded.negative
        with during(f"moving the model to {self.device}"):
            self.backbone.to(self.device)
        self.batches = Batches(
            encoded.data,
            self._encode,
            batch_size=config.train_batch_size,
            seed=config.seed,
            device=self.device,
            cached=not config.train_text_encoder,
            empty_share=config.proportion_empty_prompts,
            table=encoded.table,
        )
        example = None if self.batches.table is None else self.batches.table.condition
        self.objective, self._notes = make_objective(config, self.backbone, self.guidance, example)
        if isinstance(self.objective, ApexObjective):
            self.objective.shift.to(self.device)
        self._notes += [*unused_guidance(config, self.backbone, self.guidance), *encoded.warnings]
        with during("copying the model for the real branch"):
            self.velocities = make_velocities(config, self.backbone, self.device, self.guidance)
        if config.compile:
            compile_blocks(self.backbone, self.velocities)
        with during("copying the trained weights for their average"):
            self.average = None if config.ema_decay is None else WeightAverage(self.backbone, config.ema_decay)
        self.parameters = [p for p in self.backbone.parameters() if p.requires_grad]
        if isinstance(self.objective, ApexObjective):
            self.parameters += [p for p in self.objective.shift.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
        )
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        # By name, as checkpoints keep them; torch's, numpy's and Python's own come on top.
        self.generators = {"objective": self.generator, "prompts": self.batches.generator}
        self.schedule = config.schedule_in_use
        # Where a launcher for several processes puts its context: all but the last backward of a step run in it.
        self.no_sync: Callable[[], contextlib.AbstractContextManager] | None = None
        # The step that is in a checkpoint of output_dir already.
        self.saved_step: int | None = None
        self._grad_norm: Tensor | None = None
        self._changed: list[str] = []
        if resume is not None:
            with during("restoring the checkpoint"):
                self._changed = state.restore(self, resume)
            self._notes += state.changed_data(self, resume)
        else:
            if config.probe and config.loss == "correction" and config.objective.correction_weight > 0:
                with during("probing the shift"):
                    check_visibility(self)
            # Now that nothing of the config was refused.
            state.claim_folder(config)

    # ---- set-up

    def _encode(self, prompts: list[str]) -> Condition:
        return self.backbone.encode(prompts, requires_grad=self.config.train_text_encoder).to(self.device)

    def _say(self, message: str) -> None:
        print(message, file=self.stream if self.stream is not None else sys.stderr, flush=True)

    # ---- the loop

    def run(self, *, until: int | None = None) -> RunResult:
        """Trains to ``max_train_steps`` and exports the model; on Ctrl-C or SIGTERM finishes the step, saves and
        returns.

        until: an earlier step to stop at, as if interrupted there; schedules stay those of the whole run."""
        config, begun = self.config, time.monotonic()
        last = config.max_train_steps if until is None else min(until, config.max_train_steps)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_yaml(
            self.output_dir / "config.yaml",
            as_mapping(config),
            leave_out=state.NOT_OF_THE_RUN[:2],
        )
        console = Console(last, self.step, label=self.label, stream=self.stream)
        metrics = MetricsFile(self.output_dir / "metrics.jsonl", keep_until=self.step)
        board = (
            TensorBoard(self.output_dir / "tensorboard", purge_step=self.step + 1)
            if config.report_to == "tensorboard"
            else None
        )
        self.announce(console)
        with contextlib.ExitStack() as stack:
            stack.callback(metrics.close)
            stack.callback(console.close)
            if board is not None:
                stack.callback(board.close)
            stop = stack.enter_context(
                StopRequest(
                    lambda name: console.say_in_a_handler(
                        f"{name}: finishing this step and saving a checkpoint; once more quits at once, without saving"
                    )
                )
            )
            self._call_back()
            phase, note = None, ""
            while self.step < last and stop.received is None:
                if (now := self.phase(self.step)) != phase:
                    phase = now
                    console.say(f"step {self.step}: {PHASES[phase]}")
                with during(f"step {self.step}"):
                    values = self._one_step()
                self.step += 1
                if self.step % config.logging_steps == 0 or self.step == last:
                    numbers = as_numbers(values)
                    record = {
                        **numbers,
                        "learning_rate": self._rate(self.step - 1),
                        "epoch": round(self.batches.epoch, 4),
                        "phase": phase,
                    }
                    metrics.write(self.step, record)
                    if board is not None:
                        board.scalars(self.step, record)
                    note = f"[{PHASE_NAMES[phase]}] " + "  ".join(
                        f"{k} {numbers[f'loss_{k}']:.4g}"
                        for k in ("fake", "correction", "supervised")
                        if f"loss_{k}" in numbers
                    )
                console.step(self.step, note)
                self._call_back()
                # Saved first: what fails in a validation must not cost the steps before it.
                over = self.step >= last or stop.received is not None
                if over or self._due(config.checkpointing_steps):
                    self.save()
                if self._due(config.validation_steps):
                    self._validate(metrics, console, board)
            finished = self.step >= config.max_train_steps
            path = self.save()
            if finished:
                self.export()
                console.say(f"finished at step {self.step}; the model is in {self.output_dir / MODEL_FOLDER}")
                if (hint := start_lora_hint(config)) is not None:
                    console.say(hint)
            elif stop.received is not None:
                console.say(
                    f"stopped at step {self.step} of {config.max_train_steps}; saved {path}\n"
                    f"to go on: {command_name()} train {self.output_dir / 'config.yaml'} "
                    "--resume_from_checkpoint latest"
                )
        return RunResult(self.step, finished, 0 if finished else stop.exit_code, time.monotonic() - begun)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _validate(self, metrics: MetricsFile, console: Console, board: TensorBoard | None) -> None:
        try:
            scores = validation.validate(self, board)
        except torch.OutOfMemoryError:
            scores = None
        if scores is None:
            # Outside of the handler, whose error holds the tensors that did not fit.
            release()
            console.say(
                f"step {self.step}, validation: skipped, it does not fit into the memory of {self.device} (pictures "
                "are drawn one at a time already); the run goes on. Write validation_steps: null, a smaller resolution"
                + (", or validation_metrics: false" if self.config.validation_metrics else "")
            )
        elif scores:
            metrics.write(self.step, {f"validation/{k}": v for k, v in scores.items()})
            console.say(f"step {self.step}, validation: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))

    def announce(self, console: Console) -> None:
        """Says what the run does and what to expect of it."""
        trained = sum(p.numel() for p in self.parameters)
        console.say(
            f"{self.config.loss}: {trained / 1e6:.2f} M trained parameters{self._way()}, "
            f"{len(self.batches.data)} samples, {self.config.max_train_steps - self.step} steps of "
            f"{self.config.train_batch_size * self.config.gradient_accumulation_steps} on {self.device}"
        )
        if self.step:
            console.say(
                f"going on from step {self.step}"
                + (f"; changed since: {', '.join(self._changed)}" if self._changed else "")
            )
            if self.backbone.text is None:
                console.say(
                    "the model was recognised by its configuration and a sample of its weights, not by all of them"
                )
        if cost := cost_of_a_step(self.config, self.guidance):
            console.say(cost)
        for note in self._notes:
            console.say(f"careful: {note}")
        if self.config.loss != "flow_matching":
            console.say(
                "one-step samples get worse before they get better: the generator lets go of its blurred average "
                "first. That is expected."
            )

    def _way(self) -> str:
        config = self.config
        if config.mode == "full":
            return ""
        size = sum(p.numel() for p in self.backbone.transformer.parameters()) / 1e6
        shown = f"{size:,.0f}" if size >= 10 else f"{size:.2f}"
        return f" (a LoRA of rank {config.rank}; with it the {self.backbone.family} transformer has {shown} M)"

    def phase(self, step: int) -> str:
        """The part of the run that ``step`` belongs to, a key of PHASES."""
        if not isinstance(self.objective, ApexObjective):
            return "flow"
        return self.objective.phase(step)

    def phases(self) -> list[tuple[int, str]]:
        """(first step, name) of every phase of the run, in order."""
        found: list[tuple[int, str]] = []
        for step in range(self.config.max_train_steps):
            name = PHASE_NAMES[self.phase(step)]
            if not found or found[-1][1] != name:
                found.append((step, name))
        return found

    def _rate(self, step: int) -> float:
        config = self.config
        return config.learning_rate * learning_rate_factor(
            step, kind=config.lr_scheduler, warmup_steps=config.lr_warmup_steps, total_steps=config.max_train_steps
        )

    def _one_step(self) -> dict[str, Tensor]:
        config = self.config
        passes = config.gradient_accumulation_steps
        sums: dict[str, Tensor] = {}

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            (loss / passes).backward(*args, **kwargs)

        for _ in range(passes):
            x, condition = self.batches.next()
            if isinstance(self.objective, FlowMatching):
                losses = self.objective.backward(
                    self.velocities.generator, x, condition, step=self.step, generator=self.generator, backward=backward
                )
            else:
                losses = self.objective.backward(
                    self.velocities,
                    x,
                    condition,
                    step=self.step,
                    generator=self.generator,
                    negative_condition=self.negative,
                    schedule=self.schedule,
                    backward=backward,
                    no_sync=self.no_sync,
                )
            for name, value in losses.metrics.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        values = {name: value / passes for name, value in sums.items()} if passes > 1 else sums
        limit = float("inf") if config.max_grad_norm is None else config.max_grad_norm
        self._grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit).detach()
        self.objective.watch_gradient_norm(self._grad_norm, step=self.step)
        values["grad_norm"] = self._grad_norm
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.velocities.update_ema()
        return values

    def _call_back(self) -> None:
        for callback in self.callbacks:
            callback(self)

    # ---- looking at the run without changing it

    def undisturbed(self) -> AbstractContextManager[nn.Module]:
        """The network in eval mode with its averaged weights; weights, mode and random states are as before
        afterwards."""
        return validation.undisturbed(self)

    def draw(self, prompts: list[str], *, num_inference_steps: int, seed: int = validation.VALIDATION_SEED) -> Tensor:
        """Images of ``prompts``; see :func:`apex_fast.training.validation.draw`."""
        return validation.draw(self, prompts, num_inference_steps=num_inference_steps, seed=seed)

    def score(self, num_inference_steps: int, **options: Any) -> dict[str, float]:
        """Scores on the digits; see :func:`apex_fast.training.validation.score`."""
        return validation.score(self, num_inference_steps, **options)

    # ---- saving

    @property
    def record(self) -> Record:
        """What is written beside the trained weights."""
        return record_of(self.config, self.backbone, self.picture_size)

    def save(self) -> Path:
        """Writes ``checkpoint-<step>/`` unless this process just did. Raises NonFiniteLossError, before anything is
        written or pruned, rather than save a diverged run."""
        path = self.output_dir / f"checkpoint-{self.step}"
        if self.saved_step == self.step:
            return path
        self.objective.check_finite()
        # The watch reports a value once; whoever caught that error still has the weights that the step has spoilt.
        if self._grad_norm is not None and not math.isfinite(norm := self._grad_norm.item()):
            raise NonFiniteLossError(GRADIENT_NORM, self.step - 1, norm)
        with during(f"writing {path.name}"):
            checkpoints.write_folder(path, lambda folder: state.write(self, folder))
        checkpoints.prune(self.output_dir, self.config.checkpoints_total_limit)
        self.saved_step = self.step
        return path

    def export(self) -> Path:
        """Writes the averaged weights as ``model/``, in the layout that diffusers reads; what was there stays until
        they are on the disk."""
        target, record = self.output_dir / MODEL_FOLDER, self.record
        with during("writing the finished model"), self.undisturbed():
            checkpoints.write_folder(target, lambda folder: save_trained(self.backbone, folder, record))
        return target


PHASE_NAMES = {"warm-up": "warm-up", "ramp": "ramp", "full": "correction on", "flow": "flow matching"}

PHASES = {
    "warm-up": "warm-up. The shifted branch learns what the generator makes; the generator is not corrected yet.",
    "ramp": "ramp. The correction is turned up; one-step samples get worse before they get better.",
    "full": "correction on, at full weight.",
    "flow": "flow matching on data.",
}
