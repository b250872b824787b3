"""What a run leaves on the disk: checkpoints, the best one by a metric, and the finished model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from apex_fast.finite import GRADIENT_NORM, NonFiniteLossError
from apex_fast.training import checkpoint as checkpoints
from apex_fast.training import state
from apex_fast.training.memory import during
from apex_fast.training.results import MODEL_FOLDER, save_trained
from apex_fast.training.settings import SettingsError

if TYPE_CHECKING:
    from apex_fast.training.loop import Trainer


def save(trainer: Trainer) -> Path:
    """Writes ``checkpoint-<step>/`` unless that was just done; all processes together. Raises NonFiniteLossError,
    before anything is written or pruned, rather than save a diverged run."""
    path = trainer.output_dir / f"checkpoint-{trainer.step}"
    if trainer.saved_step == trainer.step:
        return path
    trainer.objective.check_finite()
    if trainer.config.alarms.enabled:
        trainer.alarms.settle(trainer.parameters)
    # The watch reports a value once; whoever caught that error still has the weights that the step has spoilt.
    elif trainer.grad_norm is not None and not math.isfinite(norm := trainer.grad_norm.item()):
        raise NonFiniteLossError(GRADIENT_NORM, trainer.step - 1, norm)
    with during(f"writing {path.name}"):
        checkpoints.write_folder(path, lambda folder: state.write(trainer, folder), trainer.processes)
    if trainer.is_main:
        checkpoints.prune(trainer.output_dir, trainer.config.checkpoints_total_limit)
    trainer.saved_step = trainer.step
    return path


def keep_best(trainer: Trainer, scores: dict[str, float], say: Callable[[str], None]) -> None:
    """Saves and keeps this step if it is the best one so far by ``best_metric``.

    Raises:
        SettingsError: ``best_metric`` is none of ``scores``.
    """
    config = trainer.config
    if config.best_metric is None:
        return
    name = config.best_metric.removeprefix("validation/")
    if name not in scores:
        raise SettingsError(
            f"best_metric: {config.best_metric} is not measured; this run's validations have "
            + ", ".join(f"validation/{known}" for known in scores)
        )
    found = trainer.processes.on_main(lambda: checkpoints.read_best(trainer.output_dir))
    before = found["value"] if found and found["metric"] == config.best_metric else None
    value = scores[name]
    if before is not None and not (value < before if config.best_metric_mode == "min" else value > before):
        return
    path = save(trainer)
    if trainer.is_main:
        checkpoints.write_best(trainer.output_dir, path, config.best_metric, value)
        checkpoints.prune(trainer.output_dir, config.checkpoints_total_limit)
        say(f"step {trainer.step}: the best {config.best_metric} so far, {value:.3f}; {path.name} is kept")


def export(trainer: Trainer) -> Path:
    """Writes the averaged weights as ``model/``, in the layout that diffusers reads; what was there stays until they
    are on the disk. Further averages of a LoRA lie beside it, each a LoRA in ``model/ema-<rate>/``."""
    target, record = trainer.output_dir / MODEL_FOLDER, trainer.record

    def write(folder: Path) -> None:
        save_trained(trainer.backbone, folder, record, trainer.processes)
        if trainer.average is None or record.mode != "lora":
            return  # of a whole network the further averages stay in the checkpoint: apex-fast export --ema
        for decay in trainer.average.decays[1:]:
            with trainer.average.applied(decay):
                save_trained(trainer.backbone, folder / f"ema-{decay:g}", record, trainer.processes)

    with during("writing the finished model"), trainer.undisturbed():
        checkpoints.write_folder(target, write, trainer.processes)
    return target
