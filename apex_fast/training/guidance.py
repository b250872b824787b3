"""How the real branch is guided: as the run says, else as the model's own pipeline guides for its users."""

from __future__ import annotations

from dataclasses import dataclass

from apex_fast.backbones.base import Backbone, TeacherGuidance
from apex_fast.training.config import TrainConfig
from apex_fast.training.losses import PEERS
from apex_fast.training.settings import SettingsError
from apex_fast.velocities import Guide


@dataclass(frozen=True)
class RealGuidance:
    """Guidance that costs a second, negative pass of the real branch.

    Attributes:
        scale: in the convention of the family's pipeline; what its user would write.
        negative_prompt: what is guided away from.
        line: the scale of the common line ``v_negative + line (v - v_negative)``; None where the family combines the
            two in another way, which is then ``guide``.
    """

    scale: float
    negative_prompt: str
    line: float | None
    guide: Guide | None

    @property
    def objective_scale(self) -> float:
        """For ``ApexObjective.guidance_scale``."""
        return self.scale if self.line is None else self.line


def combine(backbone: Backbone, scale: float) -> tuple[float, Guide | None]:
    """(guidance_scale, guide) for :func:`apex_fast.sample` and the objective from a scale in the family's convention;
    (1, None) is no guidance."""
    line = backbone.linear_guidance_scale(scale)
    if line is not None:
        return line, None
    return (1.0, None) if scale == 1.0 else (scale, backbone.guide)


def real_guidance(config: TrainConfig, backbone: Backbone) -> RealGuidance | None:
    """The guidance of the real branch, or None.

    A model with a text encoder of its own has no pipeline whose users guide it, so it is guided only if asked.

    Raises:
        SettingsError: guidance without a prompt to guide away from.
    """
    return run_guidance(config, backbone) if _has_real_branch(config) else None


def run_guidance(config: TrainConfig, backbone: Backbone) -> RealGuidance | None:
    """The same for whatever samples the model as its pipeline would, also in a run without a real branch.

    Raises:
        SettingsError: guidance without a prompt to guide away from.
    """
    teacher = _teacher(backbone)
    negative = teacher.negative_prompt if config.negative_prompt is None else config.negative_prompt
    if config.guidance_scale is None and negative is None:
        return None
    scale = teacher.scale if config.guidance_scale is None else config.guidance_scale
    factor, guide = combine(backbone, scale)
    if factor == 1.0 and guide is None:
        return None
    if negative is None:
        raise SettingsError(
            f"guidance_scale: {scale} needs a prompt to guide away from, and the {backbone.family} pipeline has "
            "none of "
            'its own; write negative_prompt: " ", or leave guidance_scale out'
        )
    return RealGuidance(scale, negative, None if guide is not None else factor, guide)


def unused_guidance(config: TrainConfig, backbone: Backbone, guidance: RealGuidance | None) -> list[str]:
    """A warning if the run names a negative prompt and nothing is guided away from it."""
    if guidance is not None or config.negative_prompt is None:
        return []
    unused = f'negative_prompt: "{config.negative_prompt}" is not used: '
    if not _has_real_branch(config):
        return [f"{unused}without a correction (loss: correction, correction_weight above 0) there is no real branch"]
    if config.guidance_scale is not None:
        return [
            f"{unused}guidance_scale: {config.guidance_scale:g} means no guidance as the {backbone.family} pipeline "
            "counts it, so the real branch is unguided; write another scale, or leave negative_prompt out"
        ]
    model = f"by default the {backbone.family} pipeline (scale {_teacher(backbone).scale:g}) is"
    if backbone.text is not None:
        model = "a model with a text encoder of its own is"
    return [
        f"{unused}guidance_scale is null, and {model} not guided, so the real branch is unguided; write guidance_scale "
        "as well, e.g. guidance_scale: 4.0"
    ]


def _has_real_branch(config: TrainConfig) -> bool:
    if config.loss in PEERS:
        return True
    objective = config.objective
    return config.loss == "correction" and (objective.correction_weight != 0 or objective.consistency_weight != 0)


def _teacher(backbone: Backbone) -> TeacherGuidance:
    return TeacherGuidance(negative_prompt="") if backbone.text is not None else backbone.teacher_guidance
