"""Whether the network of a run sees its condition shift, asked once before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from apex_fast.probing.probe import check_shift
from apex_fast.training.models import Autocast

if TYPE_CHECKING:
    from apex_fast.training.loop import Trainer

PROMPTS = 4


def check_visibility(trainer: Trainer) -> None:
    """Prints the probe's line on the shift of a run.

    Raises:
        SettingsError: the network does not see the shift.
    """
    table = trainer.batches.table
    if table is None:
        condition = trainer.backbone.encode(["", *trainer.config.validation_prompts][:PROMPTS]).to(trainer.device)
    else:
        condition = table.condition.index(slice(0, PROMPTS)).to(trainer.device)
    network = trainer.velocities.generator
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
    trainer._say(line.line)
    line.refuse_invisible("probe: false trains it anyway, as a control")
