"""The training loop: a config in, checkpoints, metrics and a finished model out."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from apex_fast.sampler import sample
from apex_fast.shift import ConditionShift
from apex_fast.training import checkpoint as checkpoints
from apex_fast.training.batches import Batches, load_data
from apex_fast.training.config import TrainConfig
from apex_fast.training.ema import WeightAverage
from apex_fast.training.flow_matching import FlowMatching
from apex_fast.training.interrupt import StopRequest
from apex_fast.training.models import MODEL_FOLDER, Autocast, backbone_for, device_of, fingerprint
from apex_fast.training.progress import Console, MetricsFile, TensorBoard, as_numbers
from apex_fast.training.schedule import learning_rate_factor
from apex_fast.training.settings import SettingsError, as_mapping, differences, write_yaml
from apex_fast.velocities import Velocities

VALIDATION_SEED = 20260
"""Seed of validation noise: the same noise at every validation of every run, so that pictures can be compared."""


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
            resume = checkpoints.resolve_checkpoint(config.resume_from_checkpoint, self.output_dir)
        else:
            claim_folder(config)
        checkpoints.clear_leftovers(self.output_dir)
        # All of them, although only torch's is used here: a text encoder or a later data set may draw from the others.
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        np.random.seed(config.seed % (1 << 32))
        data = load_data(config.dataset_name)
        self.backbone = backbone_for(config, data.vocabulary or []).to(self.device)
        # Before the weights of a checkpoint go in: the frozen real branch is the model that the run started from.
        self.start_fingerprint = fingerprint(self.backbone)
        self._notes: list[str] = []
        self.objective = self._make_objective()
        self.velocities = self._make_velocities()
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
        self.batches = Batches(
            data,
            self._encode,
            batch_size=config.train_batch_size,
            seed=config.seed,
            device=self.device,
            cached=not config.train_text_encoder,
            empty_share=config.proportion_empty_prompts,
        )
        self.negative = None
        if isinstance(self.objective, ApexObjective) and self.objective.guidance_scale != 1.0:
            self.negative = self._encode([config.negative_prompt])
        self.schedule = config.schedule_in_use
        # Where a launcher for several processes puts its context: all but the last backward of a step run in it.
        self.no_sync: Callable[[], contextlib.AbstractContextManager] | None = None
        self._saved_step: int | None = None
        self._grad_norm: Tensor | None = None
        self._changed: list[str] = []
        if resume is not None:
            self._restore(resume)

    # ---- set-up

    def _encode(self, prompts: list[str]) -> Condition:
        return self.backbone.encode(prompts, requires_grad=self.config.train_text_encoder).to(self.device)

    def _make_objective(self) -> ApexObjective | FlowMatching:
        config = self.config
        if config.loss == "flow_matching":
            return FlowMatching(config.flow_matching_times)
        shift = vars(config.shift).copy()
        if config.shift.mode == "diagonal":
            shift["dim"] = self.backbone.encode([""]).prompt_embeds.shape[-1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            objective = ApexObjective(
                ConditionShift(**shift).to(self.device),
                loss=config.loss,
                total_steps=config.max_train_steps,
                **vars(config.objective),
            )
        self._notes = [str(w.message) for w in caught]
        return objective

    def _make_velocities(self) -> Velocities:
        module: nn.Module = self.backbone
        if self.config.mixed_precision == "bf16":
            module = Autocast(self.backbone, self.device.type, torch.bfloat16)
        real = "live" if self.config.loss == "flow_matching" else self.config.real_branch
        return Velocities.from_module(module, real=real, ema_decay=self.config.real_ema_decay)

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
            leave_out=_NOT_OF_THE_RUN[:2],
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
                if config.validation_steps is not None and self.step % config.validation_steps == 0:
                    scores = self.validate(board)
                    if scores:
                        metrics.write(self.step, {f"validation/{k}": v for k, v in scores.items()})
                        console.say(
                            f"step {self.step}, validation: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items())
                        )
                if config.checkpointing_steps is not None and self.step % config.checkpointing_steps == 0:
                    self.save()
            finished = self.step >= config.max_train_steps
            path = self.save()
            if finished:
                self.export()
                console.say(f"finished at step {self.step}; the model is in {self.output_dir / MODEL_FOLDER}")
            elif stop.received is not None:
                console.say(
                    f"stopped at step {self.step} of {config.max_train_steps}; saved {path}\n"
                    f"to go on: {command_name()} train {self.output_dir / 'config.yaml'} "
                    "--resume_from_checkpoint latest"
                )
        return RunResult(self.step, finished, 0 if finished else stop.exit_code, time.monotonic() - begun)

    def announce(self, console: Console) -> None:
        """Says what the run does and what to expect of it."""
        trained = sum(p.numel() for p in self.parameters)
        console.say(
            f"{self.config.loss}: {trained / 1e6:.2f} M trained parameters, {len(self.batches.data)} samples, "
            f"{self.config.max_train_steps - self.step} steps of "
            f"{self.config.train_batch_size * self.config.gradient_accumulation_steps} on {self.device}"
        )
        if self.step:
            console.say(
                f"going on from step {self.step}"
                + (f"; changed since: {', '.join(self._changed)}" if self._changed else "")
            )
        for note in self._notes:
            console.say(f"careful: {note}")
        if self.config.loss != "flow_matching":
            console.say(
                "one-step samples get worse before they get better: the generator lets go of its blurred average "
                "first. That is expected."
            )

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

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[nn.Module]:
        """The network in eval mode with its averaged weights; weights, mode and random states are as before
        afterwards."""
        modes = [(m, m.training) for m in self.backbone.modules()]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            self.backbone.eval()
            try:
                with self.average.applied() if self.average is not None else contextlib.nullcontext():
                    yield self.backbone
            finally:
                for module, mode in modes:
                    module.training = mode

    def draw(self, prompts: list[str], *, num_inference_steps: int, seed: int = VALIDATION_SEED) -> Tensor:
        """Images ``[len(prompts), C, H, W]`` on the CPU from the averaged weights; noise depends on ``seed`` and the
        count alone."""
        noise = torch.randn(len(prompts), *self.backbone.sample_shape, generator=torch.Generator().manual_seed(seed))
        with self.undisturbed() as network:
            condition = self.backbone.encode(prompts).to(self.device)
            return (
                sample(network, noise.to(self.device), condition, num_inference_steps=num_inference_steps).float().cpu()
            )

    def validate(self, board: TensorBoard | None = None) -> dict[str, float]:
        """Draws the validation prompts to ``samples/`` and scores the network if the config says so."""
        config = self.config
        from apex_fast.evaluation.report import Row, sample_picture

        if config.validation_prompts:
            prompts = [p for p in config.validation_prompts for _ in range(config.validation_images_per_prompt)]
            images = self.draw(prompts, num_inference_steps=config.validation_num_inference_steps)
            count = config.validation_images_per_prompt
            rows = [
                Row(f'"{prompt}"', "", images[i * count : (i + 1) * count])
                for i, prompt in enumerate(config.validation_prompts)
            ]
            steps = config.validation_num_inference_steps
            title = f"Step {self.step}, {steps} sampling step{'s' if steps > 1 else ''}"
            picture = sample_picture(rows, [""], per_column=count, title=title, tile=80, across=min(count, 8))
            folder = self.output_dir / "samples"
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"step-{self.step:06d}.png")
            if board is not None:
                board.image(self.step, "samples", np.asarray(picture))
        return self.score(config.validation_num_inference_steps) if config.validation_metrics else {}

    def score(self, num_inference_steps: int, **options: Any) -> dict[str, float]:
        """Frechet distance, accuracy and diversity of the averaged weights (see
        :func:`apex_fast.evaluation.digits.evaluate_digits`)."""
        from apex_fast.evaluation.digits import evaluate_digits

        with self.undisturbed() as network:
            return evaluate_digits(network, num_inference_steps=num_inference_steps, **options)

    # ---- saving

    def save(self) -> Path:
        """Writes ``checkpoint-<step>/`` unless this process just did. Raises NonFiniteLossError, before anything is
        written or pruned, rather than save a diverged run."""
        path = self.output_dir / f"checkpoint-{self.step}"
        if self._saved_step == self.step:
            return path
        self.objective.check_finite()
        # The watch reports a value once; whoever caught that error still has the weights that the step has spoilt.
        if self._grad_norm is not None and not math.isfinite(norm := self._grad_norm.item()):
            raise NonFiniteLossError(GRADIENT_NORM, self.step - 1, norm)
        checkpoints.write_folder(path, self._write)
        checkpoints.prune(self.output_dir, self.config.checkpoints_total_limit)
        self._saved_step = self.step
        return path

    def _write(self, folder: Path) -> None:
        from apex_fast.version import __version__

        self.backbone.save_pretrained(folder / MODEL_FOLDER)
        checkpoints.save_state(folder, "ema", None if self.average is None else self.average.state_dict())
        checkpoints.save_state(folder, "optimizer", self.optimizer.state_dict())
        checkpoints.save_state(folder, "objective", self._objective_state())
        # A frozen branch is the start: it is read again from where it came, and its fingerprint says whether it still
        # is that model.
        checkpoints.save_state(folder, "real_branch", self.velocities.state_dict() if self.velocities.has_ema else None)
        checkpoints.save_state(folder, "random", checkpoints.random_states(self._generators()))
        run = {
            "step": self.step,
            "samples_seen": self.batches.position,
            "start": {"path": self.config.pretrained_model_name_or_path, "fingerprint": self.start_fingerprint},
            "config": as_mapping(self.config),
            "versions": {"apex_fast": __version__, "torch": torch.__version__},
        }
        checkpoints.save_json(folder, "trainer", run)

    def _generators(self) -> dict[str, torch.Generator]:
        return {"objective": self.generator, "prompts": self.batches.generator}

    def _objective_state(self) -> dict[str, Any]:
        """The shift; all else in the objective is settings or ends with the step."""
        return {"shift": dict(self.objective.shift.state_dict()) if isinstance(self.objective, ApexObjective) else None}

    def _restore(self, folder: Path) -> None:
        run = checkpoints.load_json(folder, "trainer")
        later = [p.name for p in checkpoints.checkpoints(self.output_dir) if checkpoints.step_of(p) > int(run["step"])]
        if later:
            # Two histories in one folder: "latest" and checkpoints_total_limit would mix them up.
            raise checkpoints.CheckpointError(
                f"{self.output_dir} has newer checkpoints than {folder.name} ({', '.join(later)}); write another "
                "output_dir and the path of the checkpoint, or delete the newer ones"
            )
        if run["config"]["loss"] != self.config.loss:
            raise checkpoints.CheckpointError(
                f"{folder} is of a run with loss: {run['config']['loss']}, this one has loss: {self.config.loss}"
            )
        frozen = self.config.loss != "flow_matching" and self.config.real_branch == "frozen"
        if frozen and run["start"]["fingerprint"] != self.start_fingerprint:
            raise checkpoints.CheckpointError(
                f"{folder} was tuned from another model than {self.config.pretrained_model_name_or_path} holds now "
                f"(it was {run['start']['path']}); the frozen real branch must be the model that the run started from"
            )
        checkpoints.load_weights(self.backbone, folder / MODEL_FOLDER)
        average = checkpoints.load_state(folder, "ema")
        if self.average is not None:
            if average is None:
                raise checkpoints.CheckpointError(
                    f"{folder} holds no averaged weights; write ema_decay: null, or start over"
                )
            self.average.load_state_dict(average)
        try:
            self.optimizer.load_state_dict(checkpoints.load_state(folder, "optimizer"))
            objective = checkpoints.load_state(folder, "objective")
            if isinstance(self.objective, ApexObjective):
                self.objective.shift.load_state_dict(objective["shift"])
            real = checkpoints.load_state(folder, "real_branch")
            if self.velocities.has_ema:
                self.velocities.load_state_dict(real or {})
        except (ValueError, RuntimeError, KeyError) as error:
            raise checkpoints.CheckpointError(f"{folder} does not fit this config: {error}") from error
        checkpoints.restore_random_states(checkpoints.load_state(folder, "random"), self._generators())
        self.step, self.batches.position = int(run["step"]), int(run["samples_seen"])
        if folder.parent.resolve() == self.output_dir.resolve():
            self._saved_step = self.step
        self._changed = differences(run["config"], as_mapping(self.config), leave_out=_NOT_OF_THE_RUN)
        if self.step > self.config.max_train_steps:
            raise SettingsError(
                f"max_train_steps is {self.config.max_train_steps}, but {folder} is at step {self.step} already"
            )

    def export(self) -> Path:
        """Writes the averaged weights as ``model/`` in the diffusers layout; what was there stays until they are on the
        disk."""
        target = self.output_dir / MODEL_FOLDER
        with self.undisturbed():
            checkpoints.write_folder(target, lambda folder: self.backbone.save_pretrained(folder))
        return target


def claim_folder(config: TrainConfig) -> None:
    """Makes sure that a new run does not mix its files with an older one's: with ``overwrite_output_dir`` the older
    run is deleted, otherwise SettingsError says what there is."""
    folder = Path(config.output_dir)
    checkpoints.restore_replaced(folder)
    old = [p for p in (folder / "metrics.jsonl", folder / MODEL_FOLDER) if p.exists()]
    old += checkpoints.checkpoints(folder)
    if not old:
        return
    if not config.overwrite_output_dir:
        raise SettingsError(
            f"output_dir: {folder} already holds a run ({old[-1].name}). Go on with it by --resume_from_checkpoint "
            "latest, start over with --overwrite_output_dir, or write another output_dir"
        )
    for path in [*old, folder / "samples", folder / "tensorboard"]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


_NOT_OF_THE_RUN = ("resume_from_checkpoint", "overwrite_output_dir", "output_dir")

PHASE_NAMES = {"warm-up": "warm-up", "ramp": "ramp", "full": "correction on", "flow": "flow matching"}

PHASES = {
    "warm-up": "warm-up. The shifted branch learns what the generator makes; the generator is not corrected yet.",
    "ramp": "ramp. The correction is turned up; one-step samples get worse before they get better.",
    "full": "correction on, at full weight.",
    "flow": "flow matching on data.",
}
