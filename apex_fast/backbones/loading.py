"""Models by path or hub id: which family they are of, and what of them is loaded.

``model_index.json`` names the pipeline class, ``config.json`` the class of a lone transformer; either decides the
family. Only diffusers' and transformers' own classes are made, only safetensors are read, and no code that comes with
a model is run.
"""

from __future__ import annotations

import importlib
import inspect
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apex_fast.backbones.own_text import OwnText
from apex_fast.extras import require
from apex_fast.parts import class_name

if TYPE_CHECKING:
    from apex_fast.backbones.base import Backbone

INDEX = "model_index.json"
TEXT_PACKAGE = "text_encoder_package"
"""Key in the index of a model with a text encoder of its own: the package that carries it."""


@dataclass(frozen=True)
class Family:
    """Names of a family: its module in this package is ``apex_fast.backbones.<family>``."""

    backbone: str
    pipeline: str
    transformer: str


# By name, so that choosing a family imports that family alone.
FAMILIES = {
    "sana": Family("SanaBackbone", "SanaPipeline", "SanaTransformer2DModel"),
    "qwen_image": Family("QwenImageBackbone", "QwenImagePipeline", "QwenImageTransformer2DModel"),
    "flux": Family("FluxBackbone", "FluxPipeline", "FluxTransformer2DModel"),
    "z_image": Family("ZImageBackbone", "ZImagePipeline", "ZImageTransformer2DModel"),
    "stable_diffusion_3": Family("StableDiffusion3Backbone", "StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    "lumina2": Family("Lumina2Backbone", "Lumina2Pipeline", "Lumina2Transformer2DModel"),
}

_NOT_A_FLOW = (
    "it predicts noise on a variance-preserving schedule, not the velocity of a straight path, so there is no velocity "
    "to correct"
)
REFUSED = {
    "PixArt": _NOT_A_FLOW,
    "StableDiffusionPipeline": _NOT_A_FLOW,
    "StableDiffusionXL": _NOT_A_FLOW,
    "UNet2DCondition": _NOT_A_FLOW,
    "HunyuanDiT": _NOT_A_FLOW,
    "Kolors": _NOT_A_FLOW,
    "SanaSprint": "it is a consistency model on another (trigonometric) path already distilled to few steps",
    "SanaVideo": "it makes videos, and this library conditions images on text only so far",
    "QwenImageEdit": "it is conditioned on images too, and this library conditions on text only so far",
    "QwenImageLayered": "it makes stacks of layers, and this library makes single images only so far",
    "FluxKontext": "it is conditioned on images too, and this library conditions on text only so far",
    "FluxFill": "it is conditioned on images too, and this library conditions on text only so far",
    "FluxControl": "it is conditioned on images too, and this library conditions on text only so far",
    "Flux2": "its family is not implemented yet (FLUX.1 is)",
}
"""Beginnings of pipeline and transformer classes that are known and left out, with the reason."""


def backbone_class(family: str) -> type[Backbone]:
    """The class of a family. ValueError lists the families."""
    if family not in FAMILIES:
        raise ValueError(f"no such family: {family!r}; expected one of {', '.join(FAMILIES)}")
    return getattr(importlib.import_module(f"apex_fast.backbones.{family}"), FAMILIES[family].backbone)


def family_of(class_name: str, where: str) -> type[Backbone]:
    """The backbone class for a pipeline, transformer or backbone class name; ``where`` begins the error.

    Raises:
        ValueError: it belongs to none; the message has the reason, where there is one, and lists what is supported.
    """
    for name, family in FAMILIES.items():
        if class_name in (family.backbone, family.pipeline, family.transformer):
            return backbone_class(name)
    reason = next((why for start, why in REFUSED.items() if class_name.startswith(start)), None)
    supported = ", ".join(f"{family.pipeline} ({name})" for name, family in FAMILIES.items())
    raise ValueError(
        f"{where} is a {class_name}, which is not supported"
        + (f": {reason}" if reason else "")
        + f". Supported: {supported}"
    )


def quantization(shorthand: str, torch_dtype: torch.dtype) -> Any:
    """diffusers' quantisation object for "int8" (torchao, weights only; CPU and GPU) or "nf4" (bitsandbytes; GPU).

    Raises:
        ValueError: another word.
        ImportError: the package that does it is missing; the message names it.
    """
    diffusers = require("diffusers", extra="train")
    if shorthand == "int8":
        require("torchao", extra="quantization")
        from torchao.quantization import Int8WeightOnlyConfig

        return diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    if shorthand == "nf4":
        require("bitsandbytes", extra="quantization")
        if not torch.cuda.is_available():
            raise ValueError(
                'quantization_config="nf4" runs on a GPU only, and this torch sees none; "int8" runs on a CPU too'
            )
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch_dtype
        )
    raise ValueError(
        'quantization_config must be "int8", "nf4" or a quantisation object of diffusers '
        f"(TorchAoConfig, BitsAndBytesConfig, ...), got {shorthand!r}"
    )


def from_pretrained(
    path_or_id: str | Path,
    *,
    torch_dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    quantization_config: Any = None,
    load_text_encoders: bool = True,
    load_vae: bool = True,
    load_transformer: bool = True,
    **options: Any,
) -> Backbone:
    """A pretrained model as a :class:`~apex_fast.backbones.base.Backbone`.

    Args:
        path_or_id: a local folder (a diffusers pipeline, a lone transformer, or a model that this library made), else
            the id of a model on the hub, which diffusers downloads or finds in its cache.
        torch_dtype: of the transformer, the text encoders and the VAE, whatever they were stored in.
        revision: branch, tag or commit on the hub.
        variant: of the weight files, such as "fp16".
        quantization_config: for the transformer: a quantisation object of diffusers, "int8" or "nf4"
            (:func:`quantization`).
        load_text_encoders, load_vae: whether to load them; without, embeddings or latents have to come from elsewhere.
        load_transformer: without, it is on the meta device: it tells sizes, and takes no memory and no download.
        options: ``max_sequence_length``, ``embedded_guidance`` and ``shift_padding`` of the backbone.

    Raises:
        FileNotFoundError: a local folder that holds no model, or no safetensors.
        ValueError: a model that is not supported (the message lists what is), or files that do not fit.
    """
    diffusers = require("diffusers", extra="train")
    folder = Path(path_or_id)
    local = folder.is_dir()
    if not local and (folder.is_absolute() or str(path_or_id).startswith(".") or str(path_or_id).count("/") != 1):
        raise FileNotFoundError(
            f"Backbone.from_pretrained: {path_or_id} is neither a folder nor a hub id (owner/name); expected {_LAYOUT}"
        )
    if isinstance(quantization_config, str):
        quantization_config = quantization(quantization_config, torch_dtype)
    where = f"Backbone.from_pretrained: {path_or_id}"
    common = {"dtype": torch_dtype, "use_safetensors": True, "variant": variant}
    if local:
        common["local_files_only"] = True
    else:
        common["revision"] = revision
    quantized = {} if quantization_config is None else {"quantization_config": quantization_config}

    index = read_json(path_or_id, INDEX, local, revision)
    if index is None:
        config = read_json(path_or_id, "config.json", local, revision)
        if config is None:
            raise FileNotFoundError(f"{where} holds neither {INDEX} nor config.json; expected {_LAYOUT}")
        backbone = family_of(_class_name(config, where), where)
        transformer = getattr(diffusers, backbone.transformer_class).from_pretrained(path_or_id, **common, **quantized)
        return backbone(transformer, **options)

    name = _class_name(index, where)
    backbone = family_of(name, where)
    if local:
        _check_parts(folder, index, load_text_encoders=load_text_encoders, load_vae=load_vae, family=backbone)
    if load_transformer:
        transformer = getattr(diffusers, backbone.transformer_class).from_pretrained(
            path_or_id, subfolder="transformer", **common, **quantized
        )
    else:
        transformer = _without_weights(
            path_or_id, "transformer", backbone.transformer_class, {} if local else {"revision": revision}
        )
    if name == backbone.__name__:
        if not local:
            raise ValueError(f"{where} has a text encoder of its own and is read from a folder only; download it first")
        length = int(index.get("max_sequence_length", 16))
        if (package := index.get(TEXT_PACKAGE)) is not None:
            text = OwnText.from_package(str(package), torch_dtype=torch_dtype, max_sequence_length=length)
        else:
            text = OwnText.from_pretrained(
                folder, index["text_encoder"][1], torch_dtype=torch_dtype, max_sequence_length=length
            )
        components = {"vae": own_vae(folder / "vae", backbone, torch_dtype)} if "vae" in index else {}
        return backbone(transformer, text=text, sample_size=index.get("sample_size"), components=components, **options)
    left_out: dict[str, Any] = {}
    if not load_text_encoders:
        left_out.update(dict.fromkeys(backbone.text_parts))
    if not load_vae:
        left_out["vae"] = None
    pipeline = getattr(diffusers, backbone.pipeline_class).from_pretrained(
        path_or_id, transformer=None, **left_out, **common
    )
    components = {k: v for k, v in pipeline.components.items() if v is not None and k != "transformer"}
    if not load_vae:
        components["vae"] = _without_weights(
            path_or_id, "vae", index["vae"][1], {} if local else {"revision": revision}
        )
    for part in components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    made = backbone(transformer, components=components, **options)
    if not load_vae:
        made.free_vae("load_vae=False")
    return made


def own_vae(folder: Path, backbone: type[Backbone], dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The frozen VAE in ``folder`` for a model with a text encoder of its own, of the class that the pipeline of the
    family decodes with.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a VAE of another class.
    """
    diffusers = require("diffusers", extra="train")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no VAE in {folder} (config.json is missing); make one with `python -m apex_fast.training.autoencoder`"
        )
    wanted = inspect.signature(getattr(diffusers, backbone.pipeline_class)).parameters["vae"].annotation
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name", "")
    names = [getattr(part, "__name__", part) for part in typing.get_args(wanted) or (wanted,)]
    if found not in names:
        raise ValueError(
            f"{folder} holds a {found or 'model without a class'}, and {backbone.pipeline_class} decodes with "
            f"{' or '.join(map(str, names))}"
        )
    vae = getattr(diffusers, found).from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )
    return vae.requires_grad_(False).eval()


def _without_weights(path_or_id: str | Path, part: str, class_name: str, source: dict[str, Any]) -> torch.nn.Module:
    """The structure of a part: a VAE's tells how many pixels a latent pixel stands for."""
    cls = getattr(require("diffusers", extra="train"), class_name)
    with torch.device("meta"):
        return cls.from_config(cls.load_config(path_or_id, subfolder=part, **source))


_LAYOUT = (
    "a folder as save_pretrained of a diffusers pipeline or transformer writes it, with model_index.json or "
    "config.json and .safetensors files"
)


def read_json(path_or_id: str | Path, name: str, local: bool, revision: str | None) -> dict[str, Any] | None:
    """The settings in the file ``name`` of a model; None if it has no such file.

    local: it is a folder, not a hub id.

    Raises:
        FileNotFoundError: the hub cannot be asked, or does not give it.
        ValueError: it is no JSON.
    """
    if local:
        path = Path(path_or_id) / name
        if not path.is_file():
            return None
    else:
        hub = require("huggingface_hub", extra="train")
        try:
            path = Path(hub.hf_hub_download(str(path_or_id), name, revision=revision))
        except hub.errors.LocalEntryNotFoundError as error:
            # A subclass of EntryNotFoundError, but it says that nothing could be asked, not that the file is missing.
            raise FileNotFoundError(
                f"Backbone.from_pretrained: {path_or_id} is no folder here, and the hub cannot be reached for it "
                f"({type(error).__name__}); download the model, or write the path of its folder"
            ) from error
        except hub.errors.EntryNotFoundError:
            return None
        except (hub.errors.HfHubHTTPError, OSError) as error:
            raise FileNotFoundError(
                f"Backbone.from_pretrained: {path_or_id} is no folder here, and the hub does not give it "
                f"({type(error).__name__}: {error}); write the path of a folder, or log in where the model asks for it"
            ) from error
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"Backbone.from_pretrained: {path} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"Backbone.from_pretrained: {path} holds no settings; expected {_LAYOUT}")
    return values


def _class_name(values: dict[str, Any], where: str) -> str:
    name = values.get("_class_name")
    if isinstance(name, list):
        raise ValueError(
            f"{where} wants code that comes with the model to be run ({name}), which is never done; use a model of "
            "diffusers' own classes"
        )
    if not isinstance(name, str):
        raise ValueError(f"{where} names no class (_class_name); expected {_LAYOUT}")
    return name


def _check_parts(
    folder: Path, index: dict[str, Any], *, load_text_encoders: bool, load_vae: bool, family: type[Backbone]
) -> None:
    """FileNotFoundError for a part that is named but not there, before anything large is read."""
    for part, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or None in entry:
            continue
        library, kind = entry
        if library not in ("diffusers", "transformers"):
            raise ValueError(
                f"Backbone.from_pretrained: {folder / INDEX} wants {part} from {library!r}; only classes of diffusers "
                "and transformers are loaded, never code that comes with a model"
            )
        if (part in family.text_parts and not load_text_encoders) or (part == "vae" and not load_vae):
            continue
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"Backbone.from_pretrained: {folder / part} is missing; expected {_LAYOUT}")
        weighted = part in ("transformer", "vae") or part.startswith("text_encoder")
        if weighted and not list((folder / part).glob("*.safetensors")):
            raise FileNotFoundError(
                f"Backbone.from_pretrained: no .safetensors file in {folder / part}; other weight formats are not read "
                "because loading them can run code"
            )


def save_own(backbone: Backbone, folder: Path, *, transformer: bool = True) -> None:
    """Writes a model with a text encoder of its own: ``model_index.json``, ``transformer/`` (unless told otherwise,
    where it is there already), ``text_encoder/`` and ``tokenizer/`` (of an encoder that a package carries, the name
    of that), in the layout of a diffusers pipeline.

    Raises:
        ValueError: a backbone without a text encoder of its own; its pipeline is what can be saved.
    """
    text = backbone.text
    if text is None:
        raise ValueError(
            f"{type(backbone).__name__}.save_pretrained is for models with a text encoder of their own; save this one "
            "with backbone.pipeline().save_pretrained(folder), or its transformer alone with "
            "backbone.transformer.save_pretrained(folder)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if transformer:
        backbone.transformer.save_pretrained(folder / "transformer", safe_serialization=True)
    text.save_pretrained(folder)
    index = {
        "_class_name": type(backbone).__name__,
        "transformer": ["diffusers", class_name(backbone.transformer)],
    }
    if text.package is None:
        index["text_encoder"] = ["transformers", type(text.text_encoder).__name__]
        index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    else:
        index[TEXT_PACKAGE] = text.package
    index["max_sequence_length"] = text.max_sequence_length
    if backbone.sample_size is not None:
        index["sample_size"] = backbone.sample_size
    if (vae := backbone.components.get("vae")) is not None:
        vae.save_pretrained(folder / "vae", safe_serialization=True)
        index["vae"] = ["diffusers", type(vae).__name__]
    # Last, so that a folder with an index is a complete one.
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
