"""What the demo shows of the probe: a shift that a network does not see is refused before any training.

The network is a small Qwen-Image that ships. Its text passes an RMS norm before anything else, which undoes a positive
scale; the library's default shift it sees. Both are judged as :class:`apex_fast.training.loop.Trainer` judges the shift
of a run before its first step.
"""

from __future__ import annotations

from dataclasses import dataclass

from apex_fast.data.shipped import DIGITS, few_prompts
from apex_fast.probing.probe import check_shift
from apex_fast.shift import ConditionShift
from apex_fast.training.models import load_generator
from apex_fast.training.results import data_set_of
from apex_fast.training.settings import SettingsError

MODEL = "digits_qwen_start"


@dataclass(frozen=True)
class Asked:
    """The answer of the probe to one shift. refusal: what a run with it would end with; None if it would train."""

    scale: float
    bias: float
    line: str
    refusal: str | None

    @property
    def told(self) -> str:
        """For the console and the page."""
        shift = f"scale {self.scale:g}, bias {self.bias:g}"
        return (
            f"{shift}: would be trained with; {self.line}"
            if self.refusal is None
            else f"{shift}: refused; {self.refusal}"
        )


def ask(scale: float, bias: float, model: str = MODEL) -> Asked:
    """Asks the probe whether ``model``, by name or folder, sees c_fake = ``scale`` c + ``bias``.

    FileNotFoundError where the installation lacks the model.
    """
    network, _ = load_generator(model)
    found = check_shift(
        network, ConditionShift(scale=scale, bias=bias), network.encode(few_prompts(data_set_of(model) or DIGITS))
    )
    try:
        found.refuse_invisible()
    except SettingsError as error:
        return Asked(scale, bias, found.line, str(error))
    return Asked(scale, bias, found.line, None)


def both() -> tuple[Asked, Asked]:
    """A shift that this network does not see, and the library's default."""
    return ask(0.5, 0.0), ask(-1.0, 0.5)
