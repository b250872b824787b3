"""What encoded a cache, told from files: nothing has to be loaded to know whether a cache is still the right one.

A part of a pipeline is known by its class, its configuration, and the shapes, dtypes and first values of all its
tensors; a tokenizer by its files. A part that is not there cannot be compared, and need not be: a run that trains from
a cache does not load it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.loading import family_of
from apex_fast.extras import require
from apex_fast.training.buckets import buckets_for
from apex_fast.training.config import TrainConfig
from apex_fast.training.encoding import picture_size
from apex_fast.training.guidance import RealGuidance
from apex_fast.training.models import file_fingerprint, pretrained_source, start_lora_file
from apex_fast.training.results import INDEX, TRANSFORMER, Record
from apex_fast.training.settings import SettingsError

SAMPLED_BYTES = 4096
"""Of each tensor, from its beginning."""
_HEADER = struct.Struct("<Q")
_MOST_HEADER = 100 << 20


@dataclass(frozen=True)
class Parts:
    """Where the text encoders and the VAE of a run come from.

    Attributes:
        name: folder or hub id of the pipeline.
        folder: where its files are on this machine; None for a hub id that is not there yet.
        transformer: folder of the network that the run starts from, which may be a finished run's; None as ``folder``.
        revision, variant: of it, on the hub and of its files.
        options: of the backbone, as a finished run of full tuning noted them.
    """

    name: str
    folder: Path | None
    transformer: Path | None
    revision: str | None
    variant: str | None
    options: dict[str, Any]

    @property
    def index(self) -> dict[str, Any]:
        """``model_index.json``."""
        assert self.folder is not None
        return json.loads((self.folder / INDEX).read_text(encoding="utf-8"))


def parts_of(config: TrainConfig, *, download: bool = False) -> Parts:
    """The pipeline whose text encoders and VAE serve a run.

    download: fetch them if it is on the hub, the transformer only where it draws samples.

    Raises:
        SettingsError: a model without a stock pipeline, which has nothing to encode beforehand.
        FileNotFoundError: it is not there.
    """
    if config.pretrained_model_name_or_path is None:
        raise SettingsError("cache: a new model has a text encoder of its own, which answers along the way; no cache")
    name, revision, variant = config.pretrained_model_name_or_path, config.revision, config.variant
    options: dict[str, Any] = {}
    tuned: Path | None = None
    source = pretrained_source(name)
    while isinstance(source, Path) and not (source / INDEX).is_file() and (record := Record.read(source)) is not None:
        tuned = tuned or source / TRANSFORMER
        name, revision, variant = record.base, record.revision, record.variant
        options = {"max_sequence_length": record.max_sequence_length, "shift_padding": record.shift_padding, **options}
        source = pretrained_source(name)
    if isinstance(source, str):
        folder = _on_disk(source, revision, variant, download, draws=draws_base_samples(config) and tuned is None)
    else:
        folder = source
    if folder is None:
        return Parts(name, None, tuned, revision, variant, options)
    parts = Parts(name, folder, tuned or folder / TRANSFORMER, revision, variant, options)
    if not (parts.folder / INDEX).is_file():
        raise SettingsError(
            f"cache: {name} is a transformer alone, so there is nothing to encode prompts and pictures with; write the "
            "folder or hub id of the whole pipeline"
        )
    try:
        cls = family(parts)
    except ValueError as error:
        raise SettingsError(f"pretrained_model_name_or_path: {error}") from error
    if parts.index.get("_class_name") == cls.__name__:
        raise SettingsError(f"cache: {name} has a text encoder of its own, which answers along the way; no cache")
    return parts


def draws_base_samples(config: TrainConfig) -> bool:
    """Whether the data of a run are samples that its model draws beforehand."""
    return config.prompts is not None and config.prompts_only.samples == "base"


def _on_disk(name: str, revision: str | None, variant: str | None, download: bool, draws: bool) -> Path | None:
    if download:
        pipeline = require("diffusers", extra="train").DiffusionPipeline
        left_out = {} if draws else {"transformer": None}
        return Path(pipeline.download(name, revision=revision, variant=variant, use_safetensors=True, **left_out))
    found = require("huggingface_hub", extra="train").try_to_load_from_cache(name, INDEX, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


# ---- facts


def family(parts: Parts) -> type[Backbone]:
    """The class of the family."""
    return family_of(str(parts.index.get("_class_name")), parts.name)


def text_facts(config: TrainConfig, parts: Parts) -> dict[str, Any]:
    """What embeddings depend on; None in place of parts that are not on this machine."""
    cls = family(parts)
    length = config.max_sequence_length or parts.options.get("max_sequence_length") or cls.default_sequence_length
    return {
        "family": cls.family,
        "dtype": config.weight_dtype,
        "max_sequence_length": length,
        "shift_padding": config.shift_padding or bool(parts.options.get("shift_padding")),
        "parts": {name: part_facts(parts, name) for name in cls.text_parts},
    }


def picture_facts(config: TrainConfig, parts: Parts) -> dict[str, Any]:
    """What latents of pictures depend on, but for their size, which the network says as well."""
    return {"what": "pictures", "dtype": config.weight_dtype, "vae": part_facts(parts, "vae")}


def size_facts(config: TrainConfig, network: Backbone) -> dict[str, Any]:
    """The sizes that pictures are brought to. SettingsError for one that the model cannot make."""
    size = picture_size(config, network)
    buckets = buckets_for(config, size, network.size_multiple).sizes
    return {"size": list(size), "buckets": [list(bucket) for bucket in buckets]}


def base_facts(config: TrainConfig, parts: Parts, guidance: RealGuidance | None) -> dict[str, Any]:
    """What samples of the base depend on, but for their size."""
    lora = None
    if config.start_lora is not None and config.start_lora_mode != "continue":
        lora = file_fingerprint(start_lora_file(config.start_lora))
    return {
        "what": "samples of the base",
        "transformer": _folder_facts(parts.transformer, parts.variant),
        "scheduler": part_facts(parts, "scheduler"),
        "mixed_precision": config.mixed_precision,
        "start_lora": lora,
        "dtype": config.weight_dtype,
        "quantization": config.quantization,
        "embedded_guidance_scale": config.embedded_guidance_scale,
        "guidance_scale": None if guidance is None else guidance.scale,
        "negative_prompt": None if guidance is None else guidance.negative_prompt,
        "num_inference_steps": config.prompts_only.num_inference_steps,
        "samples_per_prompt": config.prompts_only.samples_per_prompt,
    }


def part_facts(parts: Parts, name: str) -> dict[str, Any] | None:
    """Class, configuration and weights of one part of a pipeline, or None if it is not on this machine."""
    if parts.folder is None or not (parts.folder / name).is_dir():
        return None
    found = _folder_facts(parts.folder / name, parts.variant)
    return {"class": (parts.index.get(name) or [None, None])[1], **(found or {})}


def _folder_facts(folder: Path | None, variant: str | None) -> dict[str, Any] | None:
    if folder is None or not folder.is_dir():
        return None
    weights = _weight_files(folder, variant)
    small = [f for f in sorted(folder.iterdir()) if f.is_file() and f.suffix in (".json", ".txt", ".model", ".jinja")]
    if not weights:
        hashed = hashlib.sha256()
        for file in small:
            hashed.update(f"{file.name}\0{file_fingerprint(file)}\0".encode())
        return {"files": hashed.hexdigest()}
    facts = {}
    config = folder / "config.json"
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        # What the libraries note about themselves and the place that a file was read from says nothing of the model.
        kept = {k: v for k, v in values.items() if not k.startswith("_") and k not in ("transformers_version",)}
        facts["config"] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    hashed = hashlib.sha256()
    for file in weights:
        for line in _sampled(file):
            hashed.update(line)
    return {**facts, "weights": hashed.hexdigest()}


def text_encoder_parameters(parts: Parts) -> int:
    """Parameters of all text encoders together, from the headers of their files; 0 where they are not here."""
    if parts.folder is None:
        return 0
    count = 0
    for name in family(parts).text_parts:
        for file in _weight_files(parts.folder / name, parts.variant):
            for entry in _header(file)[0].values():
                size = 1
                for edge in entry["shape"]:
                    size *= edge
                count += size
    return count


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors of a part: of the variant, where it has that."""
    if not folder.is_dir():
        return []
    files = sorted(folder.glob("*.safetensors"))
    own = [f for f in files if variant is not None and f".{variant}." in f".{f.name.replace('-', '.')}"]
    if own:
        return own
    # A name of two dots is of a variant: model.fp16.safetensors beside model.safetensors.
    return [f for f in files if f.name.count(".") == 1] or files


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The tensors that a safetensors file lists, and where its data begin. SettingsError for a damaged file."""
    with file.open("rb") as opened:
        first = opened.read(_HEADER.size)
        length = _HEADER.unpack(first)[0] if len(first) == _HEADER.size else _MOST_HEADER + 1
        try:
            if length > _MOST_HEADER:
                raise ValueError("its header is too long")
            values = json.loads(opened.read(length))
        except ValueError as error:
            raise SettingsError(f"{file} cannot be read as safetensors ({error}); copy or download it again") from error
    values.pop("__metadata__", None)
    return values, _HEADER.size + length


def _sampled(file: Path) -> list[bytes]:
    """Name, dtype, shape and first bytes of every tensor of ``file``, by name."""
    tensors, begin = _header(file)
    found = []
    with file.open("rb") as opened:
        for name in sorted(tensors):
            entry = tensors[name]
            start, end = entry["data_offsets"]
            opened.seek(begin + start)
            head = opened.read(min(end - start, SAMPLED_BYTES))
            found.append(json.dumps([name, entry["dtype"], entry["shape"]]).encode() + head)
    return found


# ---- differences

_NAMES = {
    "text.family": "the family of the model",
    "text.dtype": "the precision of the text encoders (weight_dtype)",
    "text.max_sequence_length": "max_sequence_length",
    "text.shift_padding": "shift_padding",
    "latents.dtype": "the precision (weight_dtype)",
    "latents.size": "the size of the pictures (resolution)",
    "latents.buckets": "the sizes of the buckets (aspect_buckets and the keys beside it)",
    "latents.what": "what the latents are of",
    "latents.mixed_precision": "mixed_precision",
    "latents.start_lora": "start_lora",
    "latents.guidance_scale": "guidance_scale",
    "latents.negative_prompt": "negative_prompt",
    "latents.num_inference_steps": "prompts_only.num_inference_steps",
    "latents.samples_per_prompt": "prompts_only.samples_per_prompt",
    "latents.quantization": "quantization",
    "latents.embedded_guidance_scale": "embedded_guidance_scale",
    "data.count": "the number of samples in the data",
    "data.names": "the names of the data's pictures",
    "data.captions": "the captions of the data",
}
_KINDS = {"class": "class", "config": "configuration", "weights": "weights", "files": "files"}


def differences(made: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between two trees of facts, in words; what either side does not know is not compared."""
    found = []
    differ = _walk(made, wanted, "")
    other_size = any(path == "latents.size" for path, _, _ in differ)
    for path, before, now in differ:
        if path == "latents.buckets" and other_size:
            continue
        name = _NAMES.get(path)
        if name is None:
            *rest, last = path.split(".")
            part = rest[-1] if rest else ""
            name = f"the {_KINDS.get(last, last)} of the {part.replace('_', ' ')}".strip()
        shown = path != "latents.buckets" and not (isinstance(before, str) and len(before) == 64)
        found.append(f"{name} ({_plain(before)} in the cache, {_plain(now)} in the run)" if shown else name)
    return found


def _plain(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else json.dumps(value)


def _walk(made: Any, wanted: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(made, dict) and isinstance(wanted, dict):
        found = []
        for key in dict.fromkeys([*made, *wanted]):
            # A part that is not on this machine is None, and a fact that is not known yet is not there at all.
            if key in made and key in wanted:
                found += _walk(made[key], wanted[key], f"{path}.{key}" if path else key)
        return found
    if isinstance(made, dict) or isinstance(wanted, dict):
        return []
    return [] if made == wanted else [(path, made, wanted)]
