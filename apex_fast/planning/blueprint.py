"""A model as planning knows it: its configuration, its sizes, and its transformer on the meta device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apex_fast.backbones.loading import FAMILIES, TEXT_PACKAGE, backbone_class, family_of
from apex_fast.backbones.own_text import package_folder
from apex_fast.condition import Condition
from apex_fast.extras import require
from apex_fast.planning.published import PUBLISHED, Published

if TYPE_CHECKING:
    from apex_fast.backbones.base import Backbone
    from apex_fast.training.config import TrainConfig
    from apex_fast.training.results import Record

_DEPTHS = {
    "sana": ("num_layers",),
    "qwen_image": ("num_layers",),
    "flux": ("num_layers", "num_single_layers"),
    "z_image": ("n_layers",),
    "lumina2": ("num_layers",),
    "stable_diffusion_3": ("num_layers",),
}
"""Arguments of each transformer that count its repeated blocks."""


class PlanError(ValueError):
    """A model or a setting that cannot be planned; the message says what to write instead."""


@dataclass(frozen=True)
class Blueprint:
    """A model that is described and not loaded.

    Attributes:
        name: as the user wrote it.
        family: key of ``FAMILIES``.
        transformer: every argument of the transformer's class.
        vae_scale_factor: image pixels per latent pixel; 1 for a model in pixel space.
        latent_edge: latent pixels of the edge that the model is made for.
        tokens: text tokens of a condition; None is what the family encodes.
        text_encoder_parameters, vae_parameters: of the parts beside the transformer; 0 if unknown or none.
        vae: configuration of the VAE, its class under ``_class_name``; None if unknown or none.
        source: where this was read.
        unverified: what of it may differ from the published model.
        own_text: whether it has a text encoder of its own, as the digits have, and no pipeline.
        options: arguments of the backbone.
    """

    name: str
    family: str
    transformer: Mapping[str, Any]
    vae_scale_factor: int
    latent_edge: int
    tokens: int | None = None
    text_encoder_parameters: int = 0
    vae_parameters: int = 0
    vae: Mapping[str, Any] | None = None
    source: str = ""
    unverified: tuple[str, ...] = ()
    own_text: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    # ---- depth

    def depth(self) -> tuple[int, ...]:
        """Repeated blocks of each kind."""
        values = self.transformer
        if self.family == "stable_diffusion_3":
            dual = len(tuple(values["dual_attention_layers"]))
            return dual, values["num_layers"] - dual
        return tuple(int(values[name]) for name in _DEPTHS[self.family])

    def at_depth(self, depth: tuple[int, ...]) -> Blueprint:
        """The same model with other numbers of blocks."""
        if self.family == "stable_diffusion_3":
            change: dict[str, Any] = {"num_layers": sum(depth), "dual_attention_layers": tuple(range(depth[0]))}
        else:
            change = dict(zip(_DEPTHS[self.family], depth, strict=True))
        return dataclasses.replace(self, transformer={**self.transformer, **change})

    # ---- on the meta device

    def backbone(self, device: torch.device | str = "meta") -> Backbone:
        """The model with unmodified classes and, on the meta device, no memory."""
        diffusers = require("diffusers", extra="train")
        cls = backbone_class(self.family)
        with torch.device(device):
            transformer = getattr(diffusers, cls.transformer_class)(**self.transformer)
        return cls(transformer, **{"max_sequence_length": self.tokens, **self.options})

    def latent_shape(self, backbone: Backbone, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(C, h, w) of a sample of ``size`` (height and width in pixels); None is the model's own size.

        Raises:
            PlanError: a size that the model's patches do not divide.
        """
        height, width = self.pixels(size)
        multiple = self.vae_scale_factor * backbone.patch
        if height % multiple or width % multiple or height < 1 or width < 1:
            raise PlanError(
                f"resolution must be a multiple of {multiple} pixels for {self.name}, got {height} x {width}"
            )
        return backbone.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def pixels(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """(height, width) of an image; None is the model's own size."""
        edge = self.latent_edge * self.vae_scale_factor
        return (edge, edge) if size is None else size

    def condition(self, backbone: Backbone, batch: int, dtype: torch.dtype) -> Condition:
        """A condition of the most tokens that a prompt can have; all prompts but the first are one token shorter, so
        that a network that saves the mask where it can does not save it in larger batches.
        """
        length = backbone.token_count
        embeds = torch.zeros(batch, length, backbone.text_width, dtype=dtype)
        mask: Tensor = torch.ones(batch, length, dtype=torch.bool)
        if batch > 1:
            mask[1:, -1] = False
        width = backbone.transformer.config.get("pooled_projection_dim")
        pooled = None if width is None else torch.zeros(batch, width, dtype=dtype)
        return Condition(embeds, mask, pooled)


def blueprint_of(config: TrainConfig) -> Blueprint:
    """The model of a run; errors as :func:`blueprint`."""
    if config.pretrained_model_name_or_path is None:
        new = config.model
        made = Blueprint(
            "a new model",
            new.family,
            _all_arguments(new.family, new.transformer),
            1,
            1,
            tokens=new.max_sequence_length,
            source="the section model of the config",
            own_text=True,
            text_encoder_parameters=_packaged_parameters(new.text_encoder.get("package")),
            options={} if new.sample_size is None else {"sample_size": new.sample_size},
        )
        return dataclasses.replace(made, latent_edge=made.backbone().sample_shape[-1])
    model = blueprint(config.pretrained_model_name_or_path)
    options: dict[str, Any] = {**model.options, "shift_padding": config.shift_padding}
    if config.embedded_guidance_scale is not None:
        options["embedded_guidance"] = config.embedded_guidance_scale
    tokens = model.tokens if config.max_sequence_length is None else config.max_sequence_length
    return dataclasses.replace(model, options=options, tokens=tokens)


def blueprint(name_or_path: str) -> Blueprint:
    """The model that ``pretrained_model_name_or_path`` means.

    Raises:
        PlanError: neither a folder that holds a model nor an id of the table; the message lists the ids.
        ValueError: a model that is not supported.
    """
    from apex_fast.shipped import is_shipped

    if not is_shipped(name_or_path) and not Path(name_or_path).is_dir():
        if name_or_path in PUBLISHED:
            return _from_table(name_or_path, PUBLISHED[name_or_path])
        raise PlanError(
            f"{name_or_path} is no folder here and not in the table of known models, so its configuration is unknown. "
            "Planning downloads nothing: write the folder of a downloaded model (its transformer/config.json is "
            "enough), or one of " + ", ".join(PUBLISHED)
        )
    from apex_fast.training.models import pretrained_folder
    from apex_fast.training.results import INDEX, Record

    try:
        folder = pretrained_folder(name_or_path)
    except FileNotFoundError as error:
        raise PlanError(str(error)) from error
    if not (folder / INDEX).is_file() and (record := Record.read(folder)) is not None:
        return _from_run(name_or_path, folder, record)
    return _from_folder(name_or_path, folder)


def _from_run(name: str, folder: Path, record: Record) -> Blueprint:
    """A finished run of full tuning: its own transformer, and everything beside it from the model that it started
    from."""
    try:
        base = blueprint(record.base)
    except PlanError as error:
        raise PlanError(f"{folder} was trained on {record.base}, and that cannot be planned: {error}") from error
    place = folder / "transformer" / "config.json"
    config = _read(place)
    if config is None:
        raise PlanError(f"{place} is missing; planning needs the configuration of the transformer")
    options: dict[str, Any] = {**base.options, "shift_padding": record.shift_padding}
    if record.embedded_guidance is not None:
        options["embedded_guidance"] = record.embedded_guidance
    return dataclasses.replace(
        base,
        name=name,
        transformer=_all_arguments(base.family, {k: v for k, v in config.items() if not k.startswith("_")}),
        tokens=base.tokens if record.max_sequence_length is None else record.max_sequence_length,
        source=f"{place}, and the rest from {base.source}",
        options=options,
    )


def _from_table(name: str, entry: Published) -> Blueprint:
    return Blueprint(
        name,
        entry.family,
        _all_arguments(entry.family, entry.transformer),
        entry.vae_scale_factor,
        entry.resolution // entry.vae_scale_factor,
        text_encoder_parameters=entry.text_encoder_parameters,
        vae_parameters=entry.vae_parameters,
        vae=entry.vae,
        source="the table of known models",
        unverified=entry.unverified,
    )


def _from_folder(name: str, folder: Path) -> Blueprint:
    index = _read(folder / "model_index.json")
    parts = folder if index is None else folder / "transformer"
    config = _read(parts / "config.json")
    if config is None:
        raise PlanError(f"{parts / 'config.json'} is missing; planning needs the configuration of the transformer")
    cls = family_of(str(config.get("_class_name")), str(parts / "config.json"))
    family = cls.family
    arguments = _all_arguments(family, {k: v for k, v in config.items() if not k.startswith("_")})
    own = index is not None and index.get("_class_name") in [f.backbone for f in FAMILIES.values()]
    scale, vae_parameters = _vae(folder, family)
    unverified: tuple[str, ...] = ()
    if index is None:
        # A lone transformer: what its family's VAE does.
        scale, unverified = (32 if family == "sana" else 8), ("the scale of the VAE, which is not in this folder",)
    made = Blueprint(
        name,
        family,
        arguments,
        scale,
        1,
        tokens=int(index.get("max_sequence_length", 16)) if own and index is not None else None,
        text_encoder_parameters=sum(_stored_parameters(p) for p in sorted(folder.glob("text_encoder*")))
        + _packaged_parameters((index or {}).get(TEXT_PACKAGE)),
        vae_parameters=vae_parameters,
        vae=_read(folder / "vae" / "config.json"),
        source=str(parts / "config.json"),
        unverified=unverified,
        own_text=own,
        options={"sample_size": index["sample_size"]} if own and index is not None and "sample_size" in index else {},
    )
    return dataclasses.replace(made, latent_edge=made.backbone().sample_shape[-1])


def _all_arguments(family: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of the transformer's class, as its config has them."""
    diffusers = require("diffusers", extra="train")
    cls = getattr(diffusers, FAMILIES[family].transformer)
    with torch.device("meta"):
        config = cls.from_config(dict(given)).config
    return {k: v for k, v in config.items() if not k.startswith("_")}


def vae_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """The VAE of a configuration, without memory."""
    diffusers = require("diffusers", extra="train")
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(dict(config)).requires_grad_(False).eval()


def _vae(folder: Path, family: str) -> tuple[int, int]:
    """(scale factor, parameters) of a pipeline's VAE; (1, 0) if it has none."""
    config = _read(folder / "vae" / "config.json")
    if config is None:
        return 1, 0
    vae = vae_on_meta(config)
    if family == "sana":
        levels = len(config["encoder_block_out_channels"]) - 1
    elif family == "qwen_image":
        levels = len(vae.temperal_downsample)
    else:
        levels = len(config["block_out_channels"]) - 1
    return 2**levels, sum(p.numel() for p in vae.parameters())


def _packaged_parameters(package: str | None) -> int:
    """Those of a text encoder that a package carries. PlanError for one that is not installed or known."""
    if package is None:
        return 0
    try:
        return _stored_parameters(package_folder(package))
    except (ImportError, ValueError) as error:
        raise PlanError(str(error)) from error


def _stored_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of a folder, from their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                total += _product(entry["shape"])
    return total


def _product(shape: list[int]) -> int:
    count = 1
    for edge in shape:
        count *= edge
    return count


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise PlanError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise PlanError(f"{path} holds no settings")
    return values
