"""Backbones by name, folder or hub id, for training and for generating from what training left behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from apex_fast.backbones.base import Backbone
from apex_fast.extras import require
from apex_fast.lora import DTYPES
from apex_fast.shipped import is_shipped, shipped_folder, shipped_names
from apex_fast.training.checkpoint import CheckpointError, load_state, replaced
from apex_fast.training.ema import chosen_average
from apex_fast.training.results import INDEX, MODEL_FOLDER, TRANSFORMER, Found, Record, find_result, load_weights
from apex_fast.training.settings import SettingsError


def pretrained_source(name_or_path: str) -> Path | str:
    """The folder of a pretrained model, or a hub id as it is. FileNotFoundError says what was looked for."""
    return name_or_path if is_hub_id(name_or_path) else pretrained_folder(name_or_path)


RUNS = "runs"
"""Folder that the configs put runs into."""


def is_hub_id(name_or_path: str) -> bool:
    """Whether this is owner/name of a model on the hub: no folder here, nor the mistyped name of one beside others that
    runs have left."""
    owner, slash, name = name_or_path.partition("/")
    if not owner or not name or "/" in name or owner in (".", "..", "~", RUNS):
        return False
    if any(Path(owner).glob("*/metrics.jsonl")):
        return False
    return not Path(name_or_path).is_dir() and replaced(Path(name_or_path) / MODEL_FOLDER) is None


def pretrained_folder(name_or_path: str) -> Path:
    """The folder of a pretrained model here; the name of one that ships means that, a run its ``model/``.

    FileNotFoundError says what was looked for; SettingsError for a LoRA.
    """
    folder = shipped_folder(name_or_path) if is_shipped(name_or_path) else Path(name_or_path)
    for place in (folder, folder / MODEL_FOLDER):
        if any((place / name).is_file() for name in (INDEX, "config.json") if place.is_dir()):
            return place
        if (record := Record.read(place)) is not None:
            if record.mode == "lora":
                raise SettingsError(
                    f"pretrained_model_name_or_path: {name_or_path} holds a LoRA; write the model that it adapts "
                    f"(pretrained_model_name_or_path: {record.base}) and start_lora: {name_or_path}"
                )
            return place
    if (old := replaced(folder / MODEL_FOLDER)) is not None:
        return old
    raise FileNotFoundError(
        f"pretrained_model_name_or_path: {name_or_path} holds no model ({INDEX} is missing); write a folder made by "
        f"save_pretrained or by a finished run, a hub id (owner/name), or one that ships: {shipped_names()}"
    )


def quiet_libraries() -> None:
    """Turns off the progress bars that transformers and diffusers draw for every file, across the bar of the run."""
    require("transformers", extra="train").utils.logging.disable_progress_bar()
    require("diffusers", extra="train").utils.logging.disable_progress_bar()


def load_pretrained(
    source: Path | str,
    *,
    weight_dtype: str = "fp32",
    quantization: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    **options: Any,
) -> Backbone:
    """The model in ``source``, a folder or a hub id; options as :func:`apex_fast.backbones.loading.from_pretrained`.

    A finished run of full tuning is the model that it started from with the tuned transformer in it.

    Raises:
        SettingsError: a model that is not supported, or options that do not fit it.
        FileNotFoundError: as ``from_pretrained``.
    """
    quiet_libraries()
    if isinstance(source, Path) and not (source / INDEX).is_file() and (record := Record.read(source)) is not None:
        given = {name: value for name, value in options.items() if value is not None}
        backbone = load_pretrained(
            pretrained_source(record.base),
            weight_dtype=weight_dtype,
            quantization=quantization,
            revision=record.revision,
            variant=record.variant,
            **{**_options(record), **given},
        )
        load_weights(backbone.transformer, source / TRANSFORMER)
        return backbone
    try:
        return Backbone.from_pretrained(
            source,
            torch_dtype=DTYPES[weight_dtype],
            quantization_config=quantization,
            revision=revision,
            variant=variant,
            **options,
        )
    except ValueError as error:
        raise SettingsError(f"pretrained_model_name_or_path: {error}") from error
    except SafetensorError as error:
        raise SettingsError(
            f"pretrained_model_name_or_path: a weight file of {source} cannot be read as safetensors ({error}); it was "
            "cut off or is another kind of file, so copy or download it again"
        ) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        # How diffusers and transformers say that the hub does not have a file, or cannot be asked.
        raise FileNotFoundError(f"pretrained_model_name_or_path: {source} cannot be loaded: {error}") from error


def _options(record: Record) -> dict[str, Any]:
    return {
        "max_sequence_length": record.max_sequence_length,
        "embedded_guidance": record.embedded_guidance,
        "shift_padding": record.shift_padding,
    }


def start_lora_file(path: str, setting: str = "start_lora") -> Path:
    """The file of a LoRA: itself, in its folder, in the ``model/`` of a run, or by the name of one that ships.
    FileNotFoundError, which names the ``setting``."""
    from apex_fast.lora import WEIGHTS

    folder = shipped_folder(path) if is_shipped(path) else Path(path)
    places = (folder, folder / WEIGHTS, folder / MODEL_FOLDER / WEIGHTS)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{setting}: {path} is no LoRA; expected a .safetensors file or a folder with {WEIGHTS}"
        )
    return found


# ---- what a run left


def load_generator(run: str | Path, *, base: str | None = None) -> tuple[Backbone, str]:
    """The network to generate with, in eval mode, and a phrase that says which it is.

    Args:
        run: see :func:`apex_fast.training.results.find_result`.
        base: where the model that the run started from is now, if it was moved.

    Raises:
        FileNotFoundError: nothing of the kind is there, or the model that the run started from is gone.
        SettingsError: a ``base`` for a whole model, which has none.
        CheckpointError: a damaged checkpoint.
    """
    return load_found(find_result(run), base=base)


def load_found(found: Found, *, base: str | None = None, record: Record | None = None) -> tuple[Backbone, str]:
    """:func:`load_generator` for what :func:`apex_fast.training.results.find_result` found.

    record: in place of the one beside the weights, such as one with another precision of the base.
    """
    if record is None and not (found.folder / INDEX).is_file():
        record = Record.read(found.folder)
    if record is None:
        if base is not None:
            raise SettingsError(
                f"base: {found.folder} is a whole model of its own, with no base ({base}); leave --base out"
            )
        backbone = load_pretrained(found.folder)
    else:
        backbone = _load_recorded(found.folder, record, base)
    backbone.eval()
    if found.checkpoint is None:
        return backbone, found.phrase
    state = load_state(found.checkpoint, "ema")
    if state is None:
        if found.ema:
            raise CheckpointError(f"{found.checkpoint} has no averages: the run had ema_decay: null")
        return backbone, f"the weights of {found.checkpoint}"
    try:
        average = chosen_average(state, found.ema or None)
    except ValueError as error:
        raise CheckpointError(f"{found.checkpoint}: {error}") from error
    parameters = dict(backbone.named_parameters())
    unknown = sorted(average.keys() - parameters.keys())
    if unknown:
        raise CheckpointError(f"{found.checkpoint} has averages of other parameters than its model: {unknown[:3]}")
    with torch.no_grad():
        for name, value in average.items():
            parameters[name].copy_(value)
    return backbone, found.phrase


def _load_recorded(folder: Path, record: Record, base: str | None) -> Backbone:
    try:
        source = pretrained_source(base or record.base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} holds what was trained on {record.base}, and that model is not there any more; say where it is "
            "with --base"
        ) from error
    backbone = load_pretrained(
        source,
        weight_dtype=record.weight_dtype,
        quantization=record.quantization,
        revision=record.revision,
        variant=record.variant,
        **_options(record),
    )
    if record.mode == "full":
        load_weights(backbone.transformer, folder / TRANSFORMER)
        return backbone
    from apex_fast.lora import load_lora, load_start_lora

    if record.start_lora is not None and record.start_lora_mode != "continue":
        load_start_lora(backbone, start_lora_file(record.start_lora), record.start_lora_mode)
    load_lora(backbone, folder)
    return backbone


# ---- devices, identity, precision


def device_of(name: str) -> torch.device:
    """The torch device that ``device`` in a config or on a command line means. SettingsError for a GPU that is not
    there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device {name}: this torch ({torch.__version__}) sees no GPU; choose device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device {name}: this machine has {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return device


SAMPLED_VALUES = 1 << 10


def fingerprint(backbone: Backbone) -> str:
    """SHA-256 that tells later whether a folder still holds the same model.

    Of a model with a text encoder of its own: all parameters and buffers with their names. Of a pipeline, whose
    transformer may have twenty billion parameters: the configuration, every name, shape and dtype, and the first values
    of every tensor, so another model or a LoRA merged into it is noticed, and a change of single weights may not be.
    """
    if backbone.text is not None:
        return _digest(backbone.state_dict())
    transformer = backbone.transformer
    plain = {name: p for name, p in transformer.named_parameters() if type(p) is nn.Parameter and not p.is_meta}
    facts = {name: [str(p.dtype), list(p.shape)] for name, p in sorted(transformer.named_parameters())}
    config = {key: value for key, value in sorted(transformer.config.items()) if not key.startswith("_")}
    heads = {name: plain[name].detach().reshape(-1)[:SAMPLED_VALUES] for name in sorted(plain)}
    return _digest(heads, json.dumps([config, facts], sort_keys=True, default=str))


def _digest(state: Mapping[str, Tensor], prefix: str = "") -> str:
    digest = hashlib.sha256(prefix.encode())
    # Under the names that checkpoints of earlier versions were made with.
    state = {name.removeprefix("text."): value for name, value in state.items()}
    for name in sorted(state):
        digest.update(name.encode())
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Autocast(nn.Module):
    """A velocity module that runs under autocast: weights stay as they are, the network computes in ``dtype``."""

    def __init__(self, module: nn.Module | Callable[..., Tensor], device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self._device_type, self._dtype = module, device_type, dtype

    def forward(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        # Without the cache: its casts belong to one autograd graph, and the roles of a step have several.
        with torch.autocast(self._device_type, self._dtype, cache_enabled=False):
            return self.module(x_t, t, condition)


def attention_kernels(device_type: str, dtype: torch.dtype) -> AbstractContextManager:
    """A context for whole steps (recomputed passes ask for the same kernel as the first ones), in which
    ``scaled_dot_product_attention`` takes plain products where its fused kernel is slow: in bf16 on a CPU, where
    its backward takes several times as long as in fp32 (torch 2.13) and used up what the other products gained. The
    plain way holds the attention matrix, in fp32, which the small networks that a CPU trains can afford;
    ``apex-fast plan`` counts the fused kernel.

    dtype: that the network computes in.
    """
    return sdpa_kernel(SDPBackend.MATH) if device_type == "cpu" and dtype == torch.bfloat16 else nullcontext()
