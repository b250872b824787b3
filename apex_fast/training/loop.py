"""The training loop: a config in, checkpoints, metrics and a finished model out.

:class:`Trainer` holds what a run is made of and tells its story. The parts of it are elsewhere:
:mod:`~apex_fast.training.setup` makes them, :mod:`~apex_fast.training.folder` has the folder,
:mod:`~apex_fast.training.step` does one step, :mod:`~apex_fast.training.telling` says what happens,
:mod:`~apex_fast.training.validating` looks at the network on the way, :mod:`~apex_fast.training.saving` writes it down.
"""

from __future__ import annotations

import contextlib
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

from apex_fast.caching.reading import open_run_data
from apex_fast.condition import Condition
from apex_fast.lora import DTYPES
from apex_fast.objective import ApexObjective
from apex_fast.peers import Peer
from apex_fast.training import checkpoint as checkpoints
from apex_fast.training import distributed, environment, processes, saving, state, validation
from apex_fast.training.alarms import EXIT_CODE, Alarms
from apex_fast.training.base_samples import own_samples
from apex_fast.training.batches import Batches, check_same_data
from apex_fast.training.config import TrainConfig
from apex_fast.training.ema import WeightAverage
from apex_fast.training.encoding import data_digest, encode_data, picture_size
from apex_fast.training.flow_matching import FlowMatching
from apex_fast.training.folder import RunFolder
from apex_fast.training.guidance import real_guidance, unused_guidance
from apex_fast.training.interrupt import StopRequest
from apex_fast.training.losses import PEERS
from apex_fast.training.memory import during
from apex_fast.training.models import attention_kernels, fingerprint
from apex_fast.training.optimizers import make_optimizer
from apex_fast.training.peers import make_peer
from apex_fast.training.phases import Course
from apex_fast.training.processes import Silence, lost_processes
from apex_fast.training.results import Record
from apex_fast.training.settings import as_mapping, write_yaml
from apex_fast.training.setup import (
    AUTOCAST,
    check_spreading,
    compile_blocks,
    load_backbone,
    make_objective,
    make_trainable,
    make_velocities,
    record_of,
)
from apex_fast.training.step import DiversityLook, one_step
from apex_fast.training.telling import Reports
from apex_fast.training.timing import SYNCHRONISATION, StepTimer
from apex_fast.training.validating import Validations
from apex_fast.training.visibility import asks_the_shifted_branch, check_visibility


@dataclass(frozen=True)
class RunResult:
    """What a call of :meth:`Trainer.run` did. exit_code: 0, or 128 + signal if one stopped it."""

    step: int
    finished: bool
    exit_code: int
    seconds: float


SANA_IN_FP16 = (
    "mixed_precision: fp16: SANA's linear attention divides by a sum that fp16 rounds to 0 where the sum is nearly so; "
    "the steps in which that happens are left out and counted. mixed_precision: bf16 has no such trouble"
)


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
            SettingsError: the output folder holds another run, another process writes into it, or a key does not fit
                the machine.
            CheckpointError: nothing to resume from, or it does not fit.
        """
        self.config, self.callbacks, self.label = config, list(callbacks), label
        self.output_dir = Path(config.output_dir)
        self.processes = processes.start(
            config.device,
            mixed_precision=config.mixed_precision,
            accumulation=config.gradient_accumulation_steps,
            distributed=config.distributed,
            timeout=config.distributed_timeout,
            checkpointing=config.gradient_checkpointing is not False,
        )
        self.is_main, self.accelerator = self.processes.is_main, self.processes.accelerator
        self.stream = stream if self.is_main else Silence()
        self.device = self.processes.device
        if self.processes.world > 1:
            check_spreading(config, self.processes)
        self.step = 0
        self.folder = RunFolder(config, self._say)
        try:
            self._build()
        except BaseException:
            self.folder.release()
            raise

    # ---- set-up

    def _build(self) -> None:
        """All of the set-up but the launch."""
        config, resume = self.config, None
        if (found := self.processes.on_main(self.folder.prepare)) is not None:
            resume = Path(found)
        # All of them, although only torch's is used here: a text encoder or a later data set may draw from the others.
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        np.random.seed(config.seed % (1 << 32))
        source, cache = open_run_data(config, self.processes, self._say, self.stream)
        # Before unreadable pictures are left out: that is found in every part of a run again.
        self.data_digest = cache.data_digest if cache is not None else data_digest(source)
        prompts = getattr(source, "vocabulary", None) or getattr(source, "captions", [])
        with during("loading the model"):
            self.backbone = load_backbone(config, prompts, **({} if cache is None else cache.load_options))
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
            encoded = encode_data(config, self.backbone, source, self.device, self.guidance, self._say, cache=cache)
        self.negative = encoded.negative
        if not self.processes.sharded:
            with during(f"moving the model to {self.device}"):
                self.backbone.to(self.device)
        self.batches = Batches(
            encoded.data,
            self.encode,
            batch_size=config.train_batch_size,
            seed=config.seed,
            device=self.device,
            cached=not config.train_text_encoder,
            empty_share=config.proportion_empty_prompts,
            table=encoded.table,
            process=(self.processes.rank, self.processes.world),
        )
        check_same_data(self.processes.gather([self.data_digest, self.batches.order.sizes, encoded.warnings]))
        example = None if self.batches.table is None else self.batches.table.example(1)
        with during("copying the model for the real branch"):
            self.velocities = make_velocities(config, self.backbone, self.device, self.guidance)
        self.objective: ApexObjective | FlowMatching | Peer
        if config.loss in PEERS:
            with during("copying the model for the fake score"):
                self.objective, self.notes = make_peer(config, self.backbone, self.velocities, self.guidance), []
        else:
            self.objective, self.notes = make_objective(config, self.backbone, self.guidance, example)
        if isinstance(self.objective, ApexObjective):
            self.objective.shift.to(self.device)
        if config.mixed_precision == "fp16" and self.backbone.family == "sana":
            self.notes.append(SANA_IN_FP16)
        self.notes += [*self.processes.notes, *unused_guidance(config, self.backbone, self.guidance)]
        self.notes += [*encoded.warnings, *self.batches.warnings()]
        self.course = Course(self.objective, config.max_train_steps)
        self.timer = StepTimer(self.device)
        # Relative change of the velocity by the shift, where the run was probed.
        self.visibility: float | None = None
        if config.compile:
            compile_blocks(self.backbone, self.velocities)
        # What runs the network outside of training steps, without a wrapper that counts forwards.
        self.network = self.velocities.generator
        # The context that a step's backwards run in, all but the last one.
        self.no_sync: Callable[[], AbstractContextManager] | None = None
        if self.processes.world > 1:
            with during(f"spreading the model over {self.processes.world} processes"):
                self.no_sync = self._spread()
        with during("copying the trained weights for their average"):
            of_the_shifted = self.velocities.shifted_parameters()
            decays = config.ema_decays
            self.average = WeightAverage(self.backbone, decays, leave_out=of_the_shifted) if decays else None
        self.parameters = [p for p in self.backbone.parameters() if p.requires_grad]
        if isinstance(self.objective, ApexObjective):
            self.parameters += [p for p in self.objective.shift.parameters() if p.requires_grad]
        # Trained, but exchanged by no wrapper: a shift, and what a sharded network leaves whole.
        network = set() if self.processes.sharded else {id(p) for p in self.backbone.parameters()}
        self.unwrapped = [p for p in self.parameters if id(p) not in network and not distributed.is_sharded(p)]
        shift = self.objective.shift if isinstance(self.objective, ApexObjective) else None
        of_the_shift = [] if shift is None else [p for p in shift.parameters() if p.requires_grad]
        apart = {id(p) for p in (*of_the_shift, *of_the_shifted)}
        rest = [p for p in self.parameters if id(p) not in apart]
        self.optimizer = make_optimizer(config, rest, of_the_shift, of_the_shifted)
        # Before a checkpoint is restored: how far the shift has drifted is counted from where it starts.
        self.alarms = Alarms(
            config.alarms, shift=shift, device=self.device, loss_scaling=config.mixed_precision == "fp16"
        )
        if config.alarms.enabled:
            self.objective.leave_finite_checks()
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        # By name, as checkpoints keep them; torch's, numpy's and Python's own come on top.
        self.generators = {"objective": self.generator, "prompts": self.batches.generator}
        # What takes the place of x in a run on the network's own samples.
        self.own_samples = own_samples(self)
        self.schedule = config.schedule_in_use
        # fp16 alone: its gradients vanish unless the loss is scaled.
        self.scaler = torch.amp.GradScaler(self.device.type) if config.mixed_precision == "fp16" else None
        self.skipped_steps = 0
        # The step that is in a checkpoint of output_dir already.
        self.saved_step: int | None = None
        # Of the last step that was done, before clipping.
        self.grad_norm: Tensor | None = None
        self.diversity = DiversityLook(self)
        # Settings that differ from those of the checkpoint.
        self.changed: list[str] = []
        if resume is not None:
            with during("restoring the checkpoint"):
                self.changed = state.restore(self, resume)
            self.notes += [] if self.average is None else self.average.notes
            self.notes += state.changed_data(self, resume)
        else:
            if config.probe and asks_the_shifted_branch(config):
                with during("probing the shift"):
                    check_visibility(self)
            # Now that nothing of the config was refused.
            self.processes.on_main(self.folder.claim)
        if self.processes.sharded:
            with during("the first pass of the sharded model"):
                self._prime()
        # From here on every process draws its own dropout masks; the first one those of a run in one process.
        if resume is None:
            state.own_random_states(self)

    def _spread(self) -> Callable[[], AbstractContextManager]:
        """Wraps the network for several processes; see :mod:`apex_fast.training.distributed`."""
        if self.processes.sharded:
            # Block by block from the CPU to the device, where the whole need not fit.
            no_sync = distributed.shard(
                self.velocities, self.backbone, mesh=self.processes.mesh(), **self.processes.shard_options
            )
            self.backbone.to(self.device)
            return no_sync
        # The processes have read the same model; quantised weights cannot be broadcast to make sure of it.
        checked = {} if self.config.quantization is None else {"init_sync": False}
        return distributed.replicate(self.velocities, self.backbone, broadcast_buffers=False, **checked)

    def _prime(self) -> None:
        table, one = self.batches.table, self.batches.data.images(self.batches.order.peek()[:1])
        condition = self.encode([""]) if table is None else table.example(1)
        distributed.prime(self.velocities, torch.zeros_like(one).to(self.device), condition)

    def encode(self, prompts: list[str]) -> Condition:
        """The condition of ``prompts`` on the device, by the model's own text encoder; it hangs on a graph where that
        is trained."""
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
        self.processes.on_main(self.folder.hold)
        if self.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_yaml(
                self.output_dir / "config.yaml",
                as_mapping(config),
                leave_out=state.NOT_OF_THE_RUN[:2],
            )
        reports = Reports(self, last)
        validations = Validations(self, reports)
        reports.announce()
        if self.is_main:
            environment.note(self)
        with contextlib.ExitStack() as stack:
            stack.callback(self.folder.release)
            stack.enter_context(lost_processes())
            stack.callback(reports.close)
            stop = stack.enter_context(
                StopRequest(
                    lambda name: reports.console.say_in_a_handler(
                        f"{name}: finishing this step and saving a checkpoint"
                        + ("; once more quits at once, without saving" if name == "SIGINT" else "")
                    )
                )
            )
            self._call_back()
            validations.draw_start()
            validations.begin()
            self.timer.read()
            reports.console.begin(self.step)
            # What a signal asks of one process, all do after the same step.
            while self.step < last and not stop.agreed and self.alarms.halt is None:
                reports.before_step()
                with during(f"step {self.step}"), self.timer.step():
                    values = self._one_step()
                self.step += 1
                self._heed_alarms(values, reports)
                with self.timer.role(SYNCHRONISATION):
                    stop.agree(self.processes.largest)
                reports.after_step(values)
                self._call_back()
                # Saved first: what fails in a validation must not cost the steps before it.
                every = config.checkpointing_steps
                due = every is not None and self.step % every == 0
                if due or self.step >= last or stop.agreed:
                    with self.timer.aside():
                        self.save()
                if validations.due():
                    with self.timer.aside():
                        validations.run()
                    validations.begin()
                    # A signal that came in the meantime is not worth another step.
                    stop.agree(self.processes.largest)
            finished = self.step >= config.max_train_steps
            path = self.save()
            for line in checkpoints.set_aside(self.output_dir):
                reports.say(line)
            if finished:
                self.export()
            reports.end(path, finished=finished, stopped=stop.agreed)
        code = EXIT_CODE if self.alarms.halt is not None and not stop.agreed else stop.exit_code
        return RunResult(self.step, finished, 0 if finished else code, time.monotonic() - begun)

    def _one_step(self) -> dict[str, Tensor]:
        dtype = AUTOCAST.get(self.config.mixed_precision, DTYPES[self.config.weight_dtype])
        with attention_kernels(self.device.type, dtype):
            return one_step(self)

    def _heed_alarms(self, values: dict[str, Tensor], reports: Reports) -> None:
        """Tells of the alarms of the step before, and does what they ask for."""
        for alarm in self.alarms.after_step(self.step, values):
            reports.say(alarm.line)
            reports.metrics.write(self.step, alarm.record)
        if isinstance(self.objective, ApexObjective):
            self.objective.correction_factor = self.alarms.correction_factor

    def _call_back(self) -> None:
        for callback in self.callbacks:
            callback(self)

    def phase(self, step: int) -> str:
        """The part of the run that ``step`` belongs to, a key of PHASES."""
        return self.course.phase(step)

    def phases(self) -> list[tuple[int, str]]:
        """(first step, name) of every phase of the run, in order."""
        return self.course.phases()

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
        """Writes the checkpoint of this step; see :func:`apex_fast.training.saving.save`."""
        return saving.save(self)

    def export(self) -> Path:
        """Writes the finished model; see :func:`apex_fast.training.saving.export`."""
        return saving.export(self)
