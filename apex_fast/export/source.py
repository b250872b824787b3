"""What a run is, seen from an export: the trained weights, the model that they belong to, and what is known of both.

A :class:`Source` is cheap to make: it reads JSON. The network itself is loaded when it is first asked for, on the CPU
and never quantised, so that writing a LoRA of a model of twenty billion parameters takes no more than the LoRA.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.loading import backbone_class, family_of, read_json
from apex_fast.extras import require
from apex_fast.lora import GENERATOR, START, WEIGHTS
from apex_fast.shipped import is_shipped
from apex_fast.training.checkpoint import checkpoints, load_state, step_of
from apex_fast.training.losses import UNSHIFTED
from apex_fast.training.models import is_hub_id, load_found, pretrained_folder, start_lora_file
from apex_fast.training.provenance import licence_of
from apex_fast.training.results import INDEX, Found, Record, find_result, has_own_text
from apex_fast.training.settings import SettingsError, read_yaml
from apex_fast.version import __version__

UNKNOWN_LICENCE = "unknown: see the base model"
PROMPT = "a photo of a red cat on a wooden chair"
"""Example prompt of a run that has no validation prompts."""


@dataclass(frozen=True)
class Source:
    """A run, a checkpoint or a saved model, to be exported.

    Attributes:
        found: where the trained weights lie, and the phrase that says which they are.
        record: what was written beside them.
        run: folder of the run, with its config and samples; None where there is none around the weights.
        config: keys of the run's config.yaml; empty without a run.
        base: what the card calls the base model: a hub id, or a folder.
        place: where the base model is read from: a folder that was named for it, else where the run found it.
        name: what the result is called.
        steps: sampling steps that it was made for.
        resolution: [height, width] in pixels that it was trained at.
        prompt: an example.
    """

    found: Found
    record: Record
    run: Path | None
    config: dict[str, Any]
    base: str
    place: str
    name: str
    steps: int
    resolution: list[int]
    prompt: str

    @property
    def family(self) -> str:
        """Name of the family, a key of ``apex_fast.backbones.loading.FAMILIES``."""
        return self.record.family

    @property
    def mode(self) -> Literal["full", "lora"]:
        """What was trained."""
        return self.record.mode

    @property
    def backbone_class(self) -> type[Backbone]:
        """Class of the family."""
        return backbone_class(self.family)

    @functools.cached_property
    def backbone(self) -> Backbone:
        """The network with what was trained in it, on the CPU in eval mode; a LoRA is the peft adapter "default"
        (and one that the run started from and left as it is the adapter "start").

        Errors as :func:`apex_fast.training.models.load_generator`.
        """
        record = dataclasses.replace(self.record, quantization=None)
        return load_found(self.found, base=self.place, record=record)[0]

    @functools.cached_property
    def lora_state(self) -> dict[str, Tensor] | None:
        """Weights of the LoRA under the names of ``pytorch_lora_weights.safetensors``
        (``transformer.<layer>.lora_A.weight``), on the CPU; None under full tuning."""
        if self.mode == "full":
            return None
        if self.found.checkpoint is None:
            return load_file(self.found.folder / WEIGHTS)
        # A checkpoint holds the weights that are trained; their average, which is what is exported, is beside them.
        state = require("peft", extra="train").get_peft_model_state_dict(
            self.backbone.transformer, adapter_name=GENERATOR
        )
        return {f"transformer.{name}": value.detach().cpu().contiguous() for name, value in state.items()}

    @property
    def lora_rank(self) -> int:
        """r of the LoRA; 0 under full tuning."""
        return 0 if self.record.lora is None else int(self.record.lora["rank"])

    @property
    def lora_alpha(self) -> float:
        """alpha of the LoRA; 0 under full tuning."""
        return 0.0 if self.record.lora is None else float(self.record.lora["alpha"])

    @property
    def start_lora(self) -> Path | None:
        """The LoRA that this one was trained on top of and is to be used with; None where there is none.

        FileNotFoundError if it is gone.
        """
        record = self.record
        if record.start_lora is None or record.mode == "full" or record.start_lora_mode == "continue":
            return None
        return start_lora_file(record.start_lora)

    @functools.cached_property
    def licence(self) -> str:
        """Licence of the base model as its card names it."""
        found = licence_of(self.place, self.record.revision) or self.record.licence
        return found or UNKNOWN_LICENCE

    @functools.cached_property
    def metadata(self) -> dict[str, str]:
        """Facts for the header of a safetensors file, every value a text."""
        record, shift = self.record, self.shift
        facts = {
            "base_model": self.base,
            "base_model_revision": record.revision,
            "base_model_variant": record.variant,
            "embedded_guidance": None if record.embedded_guidance is None else str(record.embedded_guidance),
            "family": self.family,
            "license": self.licence,
            "library": f"apex_fast {record.library_version or 'before 0.1.0'}, exported by {__version__}",
            "max_sequence_length": None if record.max_sequence_length is None else str(record.max_sequence_length),
            "num_inference_steps": str(self.steps),
            "resolution": f"{self.resolution[0]}x{self.resolution[1]}",
            "shift": None if shift is None else json.dumps(shift, sort_keys=True),
            "shift_learned": None if not self.learned_shift else json.dumps(self.learned_shift, sort_keys=True),
            "site": None if shift is None else str(shift.get("site", "raw")),
            "training_steps": None if self.train_steps is None else str(self.train_steps),
            "weight_dtype": record.weight_dtype,
        }
        return {name: value for name, value in facts.items() if value is not None}

    @property
    def shift(self) -> dict[str, Any] | None:
        """Settings of the condition shift of the training; None for other losses, and where nobody wrote them down."""
        if self.record.shift is not None:
            return self.record.shift
        return None if self.config.get("loss") in UNSHIFTED else self.config.get("shift")

    @property
    def learned_parts(self) -> tuple[str, ...]:
        """Which of "scale" and "bias" of the condition shift the training learned."""
        shift = self.shift or {}
        own = {name: shift.get(f"train_{name}") for name in ("scale", "bias")}
        return tuple(name for name, value in own.items() if (shift.get("trainable") if value is None else value))

    @functools.cached_property
    def learned_shift(self) -> dict[str, float | list[float]]:
        """What the learned parts of the shift came to: a number, or [smallest, mean, largest] over the channels of a
        diagonal; with ``pooled_`` in front what pooled embeddings have of their own. Empty where nothing was learned,
        and where no checkpoint of these weights is left that has it."""
        checkpoint = self.found.checkpoint
        if checkpoint is None and self.run is not None:
            checkpoint = next((p for p in checkpoints(self.run) if step_of(p) == self.train_steps), None)
        if not self.learned_parts or checkpoint is None:
            return {}
        state = load_state(checkpoint, "objective")["shift"] or {}
        return {
            name: value.item() if value.dim() == 0 else [value.min().item(), value.mean().item(), value.max().item()]
            for name, value in state.items()
            if name.removeprefix("pooled_") in self.learned_parts
        }

    @property
    def train_steps(self) -> int | None:
        """Optimizer steps behind the weights; None where nobody wrote them down."""
        if self.found.checkpoint is not None:
            return step_of(self.found.checkpoint)
        return self.record.train_steps or self.config.get("max_train_steps")

    @property
    def merged(self) -> tuple[str, ...]:
        """Adapters of :attr:`backbone` that a merge adds to the weights."""
        adapters = getattr(self.backbone.transformer, "peft_config", {})
        return tuple(name for name in (START, GENERATOR) if name in adapters)

    # ---- what the run left beside its weights

    @property
    def pictures(self) -> list[Path]:
        """Grids of validation prompts up to the step of these weights, oldest first."""
        if self.run is None:
            return []
        found = {step: path for path in (self.run / "samples").glob("step-*.png")
                 if (step := path.stem.removeprefix("step-")).isdigit()}  # fmt: skip
        return [found[step] for step in sorted(found, key=int) if self._reached(int(step))]

    def _reached(self, step: Any) -> bool:
        """Whether the weights are of ``step`` or of a later one."""
        return self.train_steps is None or not isinstance(step, int) or step <= self.train_steps

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl up to the step of these weights; a line that a killed run left half written is left
        out."""
        file = None if self.run is None else self.run / "metrics.jsonl"
        if file is None or not file.is_file():
            return []
        lines = []
        for line in file.read_text(encoding="utf-8").split("\n"):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [line for line in lines if self._reached(line.get("step"))]


def open_source(run: str | Path, *, base: str | None = None, ema: str | None = None) -> Source:
    """What there is to export in ``run``.

    Args:
        run: see :func:`apex_fast.training.results.find_result`.
        base: the model that the run started from, a hub id or a folder: how the card names it. A folder is also where
            it is read from; a hub id only where the run's own is gone. None is as the run recorded it.
        ema: another average than the one that was exported, by its rate.

    Raises:
        FileNotFoundError: nothing of the kind is there.
        CheckpointError: a damaged checkpoint or record.
        SettingsError: a model with a text encoder of its own, for which there is no stock pipeline, or a ``base`` of
            another family.
    """
    found = find_result(run, ema=ema)
    record = Record.read(found.folder)
    own = "its text encoder is its own, so no stock pipeline can run it; use apex-fast generate"
    if record is None:
        if has_own_text(found.folder):
            raise SettingsError(f"export: {found.phrase} is loaded by Backbone.from_pretrained as it lies there: {own}")
        raise SettingsError(
            f"export: {found.folder} is a whole pipeline and nothing that apex-fast train left, so it needs no export"
        )
    base = record.base if base is None else base
    if is_shipped(base) or (Path(base).is_dir() and has_own_text(Path(base))):
        raise SettingsError(f"export: {found.phrase} is a LoRA on {base}: {own}")
    place = record.base if Path(record.base).is_dir() else base
    if base != record.base:
        family = _family_of(base)
        if family not in (None, record.family):
            raise SettingsError(
                f"--base: {base} is of the family {family}, and {found.phrase} belongs to a model of {record.family}; "
                "name the model that the run started from"
            )
        # A commit of one repository is none of another.
        record = dataclasses.replace(record, revision=None)
        if not is_hub_id(base):
            place = base = str(pretrained_folder(base).resolve())
    folder = _run_folder(found)
    config = {} if folder is None else read_yaml(folder / "config.yaml")
    prompts = config.get("validation_prompts") or [PROMPT]
    return Source(
        found=found,
        record=record,
        run=folder,
        config=config,
        base=base,
        place=place,
        name=(folder or found.folder).resolve().name,
        steps=record.num_inference_steps,
        resolution=list(record.resolution or (1024, 1024)),
        prompt=str(prompts[0]),
    )


def _family_of(base: str) -> str | None:
    """The family of a model here, or on the hub as far as the cache knows it; None where nothing tells it."""
    if is_hub_id(base):
        file = require("huggingface_hub", extra="train").try_to_load_from_cache(base, INDEX)
        if not isinstance(file, str):
            return None
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    else:
        folder = pretrained_folder(base)
        values = read_json(folder, INDEX, True, None)
        if values is None:
            if (record := Record.read(folder)) is not None:
                return record.family
            values = read_json(folder, "config.json", True, None) or {}
    try:
        return family_of(str(values.get("_class_name")), base).family
    except ValueError as error:
        raise SettingsError(f"--base: {error}") from error


def _run_folder(found: Found) -> Path | None:
    start = found.folder if found.checkpoint is None else found.checkpoint
    return next((p for p in (start, start.parent) if (p / "config.yaml").is_file()), None)
