"""The training loop: a config in, checkpoints, metrics and a finished model out."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from apex_fast.caching.reading import open_run_data
from apex_fast.command import command_name
from apex_fast.condition import Condition
from apex_fast.data.tar_shards import shown
from apex_fast.draws import Draws
from apex_fast.finite import GRADIENT_NORM, NonFiniteLossError
from apex_fast.objective import ApexObjective
from apex_fast.peers import Peer
from apex_fast.training import checkpoint as checkpoints
from apex_fast.training import distributed, environment, processes, state, validation
from apex_fast.training.alarms import EXIT_CODE, Alarms, one_step_spread
from apex_fast.training.base_samples import describe, own_samples
from apex_fast.training.batches import Batches, check_same_data
from apex_fast.training.config import PEERS, TrainConfig
from apex_fast.training.ema import WeightAverage
from apex_fast.training.encoding import data_digest, encode_data, picture_size
from apex_fast.training.flow_matching import FlowMatching
from apex_fast.training.guidance import real_guidance, unused_guidance
from apex_fast.training.interrupt import StopRequest
from apex_fast.training.locks import FolderLock, hold
from apex_fast.training.memory import during, release
from apex_fast.training.models import fingerprint
from apex_fast.training.optimizers import make_optimizer, set_rates, step_unless
from apex_fast.training.peers import make_peer
from apex_fast.training.phases import PHASES, Course, status
from apex_fast.training.processes import NoMetrics, Silence, lost_processes
from apex_fast.training.progress import Board, Console, MetricsFile, as_numbers, open_board
from apex_fast.training.results import MODEL_FOLDER, Record, save_trained
from apex_fast.training.schedule import learning_rate_factor
from apex_fast.training.settings import SettingsError, as_mapping, write_yaml
from apex_fast.training.setup import (
    check_spreading,
    compile_blocks,
    cost_of_a_step,
    load_backbone,
    make_objective,
    make_trainable,
    make_velocities,
    record_of,
    start_lora_hint,
)
from apex_fast.training.timing import BACKWARD, DATA, FORWARD, OPTIMIZER, SYNCHRONISATION, StepTimer, peak_bytes
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
        self._lock: FolderLock | None = None
        # Whether "latest" found a run that ended before its first checkpoint.
        self._begins_again = False
        try:
            self._build()
        except BaseException:
            self._release_folder()
            raise

    # ---- set-up

    def _build(self) -> None:
        """All of the set-up but the launch."""
        config, resume = self.config, None
        if (found := self.processes.on_main(self._prepare_folder)) is not None:
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
            self._encode,
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
                self.objective, self._notes = make_peer(config, self.backbone, self.velocities, self.guidance), []
        else:
            self.objective, self._notes = make_objective(config, self.backbone, self.guidance, example)
        if isinstance(self.objective, ApexObjective):
            self.objective.shift.to(self.device)
        if config.mixed_precision == "fp16" and self.backbone.family == "sana":
            self._notes.append(SANA_IN_FP16)
        self._notes += [*self.processes.notes, *unused_guidance(config, self.backbone, self.guidance)]
        self._notes += [*encoded.warnings, *self.batches.warnings()]
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
        self._unwrapped = [p for p in self.parameters if id(p) not in network and not distributed.is_sharded(p)]
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
        self._diversity_condition: Condition | None = None
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
        self._grad_norm: Tensor | None = None
        self._changed: list[str] = []
        if resume is not None:
            with during("restoring the checkpoint"):
                self._changed = state.restore(self, resume)
            self._notes += [] if self.average is None else self.average.notes
            self._notes += state.changed_data(self, resume)
        else:
            if config.probe and asks_the_shifted_branch(config):
                with during("probing the shift"):
                    check_visibility(self)
            # Now that nothing of the config was refused.
            self.processes.on_main(lambda: None if self._begins_again else state.claim_folder(config))
        if self.processes.sharded:
            with during("the first pass of the sharded model"):
                self._prime()
        # From here on every process draws its own dropout masks; the first one those of a run in one process.
        if resume is None:
            state.own_random_states(self)

    def _hold_folder(self) -> None:
        """Keeps other processes out of the folder until the run ends, this trainer is gone or another one of this
        process takes the folder; in the main process."""
        if self._lock is None or not self._lock.held:
            self._lock = hold(self.output_dir, self._say)
            weakref.finalize(self, self._lock.release)

    def _release_folder(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _prepare_folder(self) -> str | None:
        """Puts the folder of the run in order and returns the checkpoint to resume from; in the main process."""
        config, resume = self.config, None
        # Before anything in it is moved or removed.
        self._hold_folder()
        checkpoints.restore_replaced(self.output_dir)
        if config.resume_from_checkpoint is not None:
            self._begins_again = config.resume_from_checkpoint == "latest" and checkpoints.never_saved(self.output_dir)
        if self._begins_again:
            self._say(
                f"careful: the run in {self.output_dir} ended before its first checkpoint: it begins at step 0 again"
            )
        elif config.resume_from_checkpoint is not None:
            resume = checkpoints.resolve_checkpoint(config.resume_from_checkpoint, self.output_dir, self._say)
        else:
            state.claim_folder(config, delete=False)
        checkpoints.clear_leftovers(self.output_dir)
        return None if resume is None else str(resume)

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
        condition = self._encode([""]) if table is None else table.example(1)
        distributed.prime(self.velocities, torch.zeros_like(one).to(self.device), condition)

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
        self.processes.on_main(self._hold_folder)
        if self.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_yaml(
                self.output_dir / "config.yaml",
                as_mapping(config),
                leave_out=state.NOT_OF_THE_RUN[:2],
            )
        console = Console(last, self.step, label=self.label, stream=self.stream)
        metrics: MetricsFile | NoMetrics = NoMetrics()
        board = None
        if self.is_main:
            metrics = MetricsFile(self.output_dir / "metrics.jsonl", keep_until=self.step, say=console.say)
            settings = as_mapping(config)
            if isinstance(config.dataset_name, str):
                # Users and queries of a URL stay here.
                settings["dataset_name"] = shown(config.dataset_name)
            board = open_board(config.report_to, self.output_dir, step=self.step, settings=settings)
        self.announce(console)
        if self.is_main:
            environment.note(self)
        with contextlib.ExitStack() as stack:
            stack.callback(self._release_folder)
            stack.enter_context(lost_processes())
            stack.callback(metrics.close)
            stack.callback(console.close)
            if board is not None:
                stack.callback(board.close)
            stop = stack.enter_context(
                StopRequest(
                    lambda name: console.say_in_a_handler(
                        f"{name}: finishing this step and saving a checkpoint"
                        + ("; once more quits at once, without saving" if name == "SIGINT" else "")
                    )
                )
            )
            self._call_back()
            if self.step == 0 and config.draws_pictures and config.validation_base_inference_steps is not None:
                self._draw_start(console)
            phase, latest = None, {}
            milestones = [m for m in self.course.milestones() if m.step > self.step]
            self._validated = time.monotonic()
            self.timer.read()
            console.begin(self.step)
            # What a signal asks of one process, all do after the same step.
            while self.step < last and not stop.agreed and self.alarms.halt is None:
                if (now := self.phase(self.step)) != phase:
                    phase = now
                    console.say(f"step {self.step}: {PHASES[phase]}")
                with during(f"step {self.step}"), self.timer.step():
                    values = self._one_step()
                self.step += 1
                self._heed_alarms(values, console, metrics)
                with self.timer.role(SYNCHRONISATION):
                    stop.agree(self.processes.largest)
                if self.step % config.logging_steps == 0 or self.step == last:
                    numbers = as_numbers(self.processes.mean(values))
                    seconds, peak = self.timer.read(), peak_bytes(self.device)
                    record = {
                        **numbers,
                        "learning_rate": self._rate(self.step - 1),
                        "epoch": round(self.batches.epoch, 4),
                        "phase": phase,
                        **{name: value for name, value in self.alarms.figures.items() if name not in numbers},
                        **{f"seconds/{role}": value for role, value in seconds.items()},
                        "images_per_second": self._images_of_a_step() / max(seconds["step"], 1e-9),
                        "peak_bytes": peak,
                    }
                    latest = {"numbers": {**self.alarms.figures, **numbers}, "seconds": seconds, "peak": peak}
                    metrics.write(self.step, record)
                    if board is not None:
                        board.scalars(self.step, record)
                state_of_step = status(self.course, self.step, **{"numbers": {}, **latest}, visibility=self.visibility)
                console.step(self.step, state_of_step, pace=not latest)
                if milestones and milestones[0].step <= self.step:
                    console.say(milestones.pop(0).reached(latest.get("numbers", {})))
                self._call_back()
                # Saved first: what fails in a validation must not cost the steps before it.
                over = self.step >= last or stop.agreed
                if over or self._due(config.checkpointing_steps):
                    with self.timer.aside():
                        self.save()
                if self._validation_due():
                    with self.timer.aside():
                        self._validate(metrics, console, board)
                    self._validated = time.monotonic()
                    # A signal that came in the meantime is not worth another step.
                    stop.agree(self.processes.largest)
            finished = self.step >= config.max_train_steps
            path = self.save()
            for line in checkpoints.set_aside(self.output_dir):
                console.say(line)
            if finished:
                self.export()
                console.say(f"finished at step {self.step}; the model is in {self.output_dir / MODEL_FOLDER}")
                if (hint := start_lora_hint(config)) is not None:
                    console.say(hint)
            elif stop.agreed:
                console.say(
                    f"stopped at step {self.step} of {config.max_train_steps}; saved {path}\n"
                    f"to go on: {command_name()} train {self.output_dir / 'config.yaml'} "
                    "--resume_from_checkpoint latest"
                )
            elif self.alarms.halt is not None:
                console.say(
                    f"an alarm stopped the run at step {self.step} of {config.max_train_steps}; saved {path}\n"
                    f"read {self.alarms.halt.see}; to go on: {command_name()} train {self.output_dir / 'config.yaml'} "
                    "--resume_from_checkpoint latest"
                )
        code = EXIT_CODE if self.alarms.halt is not None and not stop.agreed else stop.exit_code
        return RunResult(self.step, finished, 0 if finished else code, time.monotonic() - begun)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _validation_due(self) -> bool:
        config = self.config
        if self._due(config.validation_steps):
            return True
        if config.validation_minutes is None:
            return False
        if self.step == config.max_train_steps:
            return True
        # Asked where the host waits for the device anyway, and by one clock for all processes.
        if self.step % config.logging_steps != 0:
            return False
        late = time.monotonic() - self._validated >= 60 * config.validation_minutes
        return self.processes.from_main(late)

    def _draw_start(self, console: Console) -> None:
        try:
            # A sharded network runs in all processes or in none.
            if self.is_main or self.processes.sharded:
                steps = self.config.validation_base_inference_steps
                console.say(f"drawing the validation prompts with the model as it is, in {steps} steps, once")
                validation.draw_start(self)
        except torch.OutOfMemoryError:
            release()
            console.say(
                f"the start's own pictures: skipped, they do not fit into the memory of {self.device}; the run goes "
                "on. Write validation_base_inference_steps: null, or a smaller resolution"
            )
        except ValueError as error:
            console.say(f"careful: the start's own pictures are left out: {error}")

    def _images_of_a_step(self) -> int:
        """Samples that one step of the optimizer sees, in all processes together."""
        return self.config.train_batch_size * self.config.gradient_accumulation_steps * self.processes.world

    def _validate(self, metrics: MetricsFile, console: Console, board: Board | None) -> None:
        scores: dict[str, float] | None = {}
        try:
            # A sharded network runs in all processes or in none.
            if self.is_main or self.processes.sharded:
                scores = validation.validate(self, board)
        except torch.OutOfMemoryError:
            scores = None
        scores = self.processes.from_main(scores)
        if scores is None:
            # Outside of the handler, whose error holds the tensors that did not fit.
            release()
            console.say(
                f"step {self.step}, validation: skipped, it does not fit into the memory of {self.device} (pictures "
                "are drawn one at a time already); the run goes on. Write validation_steps: null, a smaller resolution"
                + (", or validation_metrics: false" if self.config.validation_metrics else "")
            )
        elif scores:
            self._keep_best(scores, console)
            found = {f"validation/{k}": v for k, v in scores.items()}
            metrics.write(self.step, found)
            if board is not None:
                board.scalars(self.step, found)
            console.say(f"step {self.step}, validation: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))

    def _keep_best(self, scores: dict[str, float], console: Console) -> None:
        """Saves and keeps this step if it is the best one so far by ``best_metric``."""
        config = self.config
        if config.best_metric is None:
            return
        name = config.best_metric.removeprefix("validation/")
        if name not in scores:
            raise SettingsError(
                f"best_metric: {config.best_metric} is not measured; this run's validations have "
                + ", ".join(f"validation/{known}" for known in scores)
            )
        found = self.processes.on_main(lambda: checkpoints.read_best(self.output_dir))
        before = found["value"] if found and found["metric"] == config.best_metric else None
        value = scores[name]
        if before is not None and not (value < before if config.best_metric_mode == "min" else value > before):
            return
        path = self.save()
        if self.is_main:
            checkpoints.write_best(self.output_dir, path, config.best_metric, value)
            checkpoints.prune(self.output_dir, config.checkpoints_total_limit)
            console.say(f"step {self.step}: the best {config.best_metric} so far, {value:.3f}; {path.name} is kept")

    def announce(self, console: Console) -> None:
        """Says what the run does and what to expect of it."""
        trained = sum(p.numel() for p in self.parameters)
        console.say(
            f"{self.config.loss}: {trained / 1e6:.2f} M trained parameters{self._way()}, "
            f"{len(self.batches.data)} samples, {self.config.max_train_steps - self.step} steps of "
            f"{self._images_of_a_step()} on {self._place()}"
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
        if self.config.prompts is not None:
            console.say(describe(self.config))
        for note in self._notes:
            console.say(f"careful: {note}")
        if isinstance(self.objective, Peer):
            console.say(
                f"a step is {self.objective.passes}, F being one forward of the batch; held: {self.objective.copies}"
            )
        if isinstance(self.objective, ApexObjective):
            console.say(
                "one-step samples get worse before they get better: the generator lets go of its blurred average "
                "first. That is expected."
            )
        for milestone in self.course.milestones():
            if milestone.step > self.step:
                console.say(milestone.announce())

    def _place(self) -> str:
        if self.processes.world == 1:
            return str(self.device)
        shared = "a part of the network" if self.processes.sharded else "a whole network"
        return f"{self.processes.world} processes ({self.device.type}), {shared} in each"

    def _way(self) -> str:
        config = self.config
        if config.mode == "full":
            return ""
        size = sum(p.numel() for p in self.backbone.transformer.parameters()) / 1e6
        shown = f"{size:,.0f}" if size >= 10 else f"{size:.2f}"
        return f" (a LoRA of rank {config.rank}; with it the {self.backbone.family} transformer has {shown} M)"

    def phase(self, step: int) -> str:
        """The part of the run that ``step`` belongs to, a key of PHASES."""
        return self.course.phase(step)

    def phases(self) -> list[tuple[int, str]]:
        """(first step, name) of every phase of the run, in order."""
        return self.course.phases()

    def _rate(self, step: int) -> float:
        return self.config.learning_rate * self._rate_factor(step)

    def _rate_factor(self, step: int) -> float:
        config = self.config
        return learning_rate_factor(
            step, kind=config.lr_scheduler, warmup_steps=config.lr_warmup_steps, total_steps=config.max_train_steps
        )

    def _one_step(self) -> dict[str, Tensor]:
        config = self.config
        passes = config.gradient_accumulation_steps
        sums: dict[str, Tensor] = {}

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            with self.timer.role(BACKWARD):
                share = loss / passes
                (share if self.scaler is None else self.scaler.scale(share)).backward(*args, **kwargs)

        for number in range(passes):
            with self.timer.role(DATA):
                x, condition = self.batches.next()
                if self.own_samples is not None:
                    x = self.own_samples(x, condition)
                drawn = self._drawn(x)
            # Gradients cross the processes in the last backward of the last pass, and nowhere before.
            over = number == passes - 1
            quiet = contextlib.nullcontext() if over or self.no_sync is None else self.no_sync()
            with self.timer.role(FORWARD), quiet:
                if isinstance(self.objective, Peer):
                    metrics = self.objective.step(
                        x, condition, self.negative, step=self.step, backward=backward, **drawn
                    )
                elif isinstance(self.objective, FlowMatching):
                    metrics = self.objective.backward(
                        self.velocities.generator,
                        x,
                        condition,
                        step=self.step,
                        backward=backward,
                        **drawn,
                    ).metrics
                else:
                    metrics = self.objective.backward(
                        self.velocities,
                        x,
                        condition,
                        step=self.step,
                        negative_condition=self.negative,
                        schedule=self.schedule,
                        backward=backward,
                        no_sync=self.no_sync if over else None,
                        **drawn,
                    ).metrics
            for name, value in metrics.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        values = {name: value / passes for name, value in sums.items()} if passes > 1 else sums
        limit = float("inf") if config.max_grad_norm is None else config.max_grad_norm
        with self.timer.role(SYNCHRONISATION):
            if self.processes.world > 1:
                distributed.average_gradients(self._unwrapped)
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            self._grad_norm = distributed.clip_grad_norm_(self.parameters, limit)
        values["grad_norm"] = self._grad_norm
        set_rates(self.optimizer, config, self._rate_factor(self.step))
        skip = self.alarms.judge(self._grad_norm)
        with self.timer.role(OPTIMIZER):
            stepped = self._step_optimizer(skip)
            if stepped is not False:
                self.objective.watch_gradient_norm(self._grad_norm, step=self.step)
                # Where only the device knows whether the weights moved, it decides on their averages too.
                left_out = skip if stepped is None else None
                if self.average is not None:
                    self.average.update(left_out)
                self.velocities.update_ema(left_out)
            else:
                self._grad_norm = None
            self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            values["skipped_steps"] = values["grad_norm"].new_tensor(float(self.skipped_steps))
        if (spread := self._diversity()) is not None:
            values["diversity"] = spread
        return values

    def _diversity(self) -> Tensor | None:
        """How far one-step samples lie apart, at the steps that ask for it; None otherwise."""
        settings = self.config.alarms.diversity
        if not self.config.alarms.enabled or settings.action == "off" or self.step % settings.every:
            return None
        if not isinstance(self.objective, ApexObjective):
            return None
        if self._diversity_condition is None:
            prompts, table = self.config.validation_prompts[: settings.prompts], self.batches.table
            if table is None:
                prompts = prompts or list(self.batches.data.vocabulary or [""])[: settings.prompts]
                self._diversity_condition = self._encode(prompts)
            else:
                held = bool(prompts) and table.holds(prompts)
                self._diversity_condition = table(prompts) if held else table.example(settings.prompts)
        return one_step_spread(
            self.backbone, self.network, self._diversity_condition.to(self.device), self.sample_shape, settings.seeds
        )

    def _heed_alarms(self, values: dict[str, Tensor], console: Console, metrics: MetricsFile | None) -> None:
        """Tells of the alarms of the step before, and does what they ask for."""
        for alarm in self.alarms.after_step(self.step, values):
            console.say(alarm.line)
            if metrics is not None:
                metrics.write(self.step, alarm.record)
        if isinstance(self.objective, ApexObjective):
            self.objective.correction_factor = self.alarms.correction_factor

    def _step_optimizer(self, skip: Tensor | None) -> bool | None:
        """A step unless ``skip``. Whether there was one; None where only the device knows. Under fp16 a step is left
        out as well where the scaled loss has overflown, and the scale is halved; the host knows of all of them then,
        and counts them here rather than in the alarms."""
        stepped = step_unless(self.optimizer, skip, self.scaler)
        self.skipped_steps += self.scaler is not None and not stepped
        return stepped

    def _drawn(self, x: Tensor) -> dict[str, Any]:
        """Where the random numbers of a pass come from: every process draws those of the whole batch and keeps its own
        rows, so that a run is the same over any number of processes."""
        if self.processes.world == 1:
            return {"generator": self.generator}
        draws = self.objective.draw(x.new_empty(self.processes.world * len(x), *x.shape[1:]), self.generator)
        rows = self.processes.rows(len(x))
        parts = {field.name: getattr(draws, field.name) for field in dataclasses.fields(draws)}
        return {"draws": Draws(**{name: part if part is None else part[rows] for name, part in parts.items()})}

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
        """Writes ``checkpoint-<step>/`` unless that was just done; all processes together. Raises NonFiniteLossError,
        before anything is written or pruned, rather than save a diverged run."""
        path = self.output_dir / f"checkpoint-{self.step}"
        if self.saved_step == self.step:
            return path
        self.objective.check_finite()
        if self.config.alarms.enabled:
            self.alarms.settle(self.parameters)
        # The watch reports a value once; whoever caught that error still has the weights that the step has spoilt.
        elif self._grad_norm is not None and not math.isfinite(norm := self._grad_norm.item()):
            raise NonFiniteLossError(GRADIENT_NORM, self.step - 1, norm)
        with during(f"writing {path.name}"):
            checkpoints.write_folder(path, lambda folder: state.write(self, folder), self.processes)
        if self.is_main:
            checkpoints.prune(self.output_dir, self.config.checkpoints_total_limit)
        self.saved_step = self.step
        return path

    def export(self) -> Path:
        """Writes the averaged weights as ``model/``, in the layout that diffusers reads; what was there stays until
        they are on the disk. Further averages of a LoRA lie beside it, each a LoRA in ``model/ema-<rate>/``."""
        target, record = self.output_dir / MODEL_FOLDER, self.record

        def write(folder: Path) -> None:
            save_trained(self.backbone, folder, record, self.processes)
            if self.average is None or record.mode != "lora":
                return  # of a whole network the further averages stay in the checkpoint: apex-fast export --ema
            for decay in self.average.decays[1:]:
                with self.average.applied(decay):
                    save_trained(self.backbone, folder / f"ema-{decay:g}", record, self.processes)

        with during("writing the finished model"), self.undisturbed():
            checkpoints.write_folder(target, write, self.processes)
        return target
