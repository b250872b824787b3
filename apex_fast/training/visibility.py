"""Whether the network of a run sees its condition shift, asked once before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from apex_fast.probing.probe import check_shift
from apex_fast.training.models import Autocast

if TYPE_CHECKING:
    from apex_fast.training.config import TrainConfig
    from apex_fast.training.loop import Trainer

PROMPTS = 4


def asks_the_shifted_branch(config: TrainConfig) -> bool:
    """Whether what the generator learns depends on the shift."""
    objective = config.objective
    if config.loss == "correction":
        return objective.correction_weight > 0
    return config.loss == "paper" and objective.paper_mix_weight > 0 and objective.mix_weight > 0


def check_visibility(trainer: Trainer) -> None:
    """Prints the probe's line on the shift of a run, and keeps what it measured as ``trainer.visibility``.

    Raises:
        SettingsError: the network does not see the shift, and the shift is not trained.
    """
    table = trainer.batches.table
    if table is None:
        condition = trainer.backbone.encode(["", *trainer.config.validation_prompts][:PROMPTS]).to(trainer.device)
    else:
        condition = table.example(PROMPTS)
    network = trainer.network
    try:
        line = check_shift(
            trainer.backbone,
            trainer.objective.shift,
            condition,
            shape=trainer.sample_shape,
            call=network if isinstance(network, Autocast) else None,
        )
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        # A measurement that failed says nothing against the shift.
        trainer._say(f"careful: the probe could not say whether the network sees the shift: {error}")
        return
    trainer.visibility = line.row.mean_change
    trainer._say(line.line)
    if line.verdict == "invisible" and any(p.requires_grad for p in trainer.objective.shift.parameters()):
        trainer._say(
            "careful: the shift is invisible as it starts; whether its training makes it visible was not measured"
        )
        return
    line.refuse_invisible("probe: false trains it anyway, as a control")
