"""What a run leaves of its model: only what was trained, and beside it a record of everything else that belongs to it.

``apex_fast.json`` names the model that the run started from. A LoRA is ``pytorch_lora_weights.safetensors``, as the
stock pipeline's ``load_lora_weights`` reads it; a fully tuned network is ``transformer/``, as diffusers'
``from_pretrained`` reads it. A model with a text encoder of its own is saved whole and needs no record.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from apex_fast.data.shipped import SHIPPED
from apex_fast.extras import require
from apex_fast.parts import class_name, is_sharded, placed
from apex_fast.shipped import SHIPPED_MODELS, is_shipped, shipped_folder, shipped_names
from apex_fast.training.checkpoint import CheckpointError, Share, checkpoints, damage, read_tensors, replaced
from apex_fast.training.settings import read_yaml

if TYPE_CHECKING:
    from apex_fast.backbones.base import Backbone
    from apex_fast.training.processes import Processes

MODEL_FOLDER = "model"
"""Folder of the finished model inside a run, and of the weights inside a checkpoint."""

RECORD = "apex_fast.json"
INDEX = "model_index.json"
TRANSFORMER = "transformer"


@dataclass(frozen=True)
class Record:
    """What belongs to the trained weights beside it.

    Attributes:
        family, mode: of the model, and what of it was trained.
        base: folder or hub id of the model that the run started from; ``revision`` and ``variant`` go with it.
        weight_dtype, quantization: how the base was stored in training.
        lora: rank, alpha and kind of the LoRA; None under full tuning.
        start_lora, start_lora_mode: the LoRA that the run started from, which is still needed unless it was continued.
        max_sequence_length, embedded_guidance, shift_padding: of the backbone.
        resolution: [height, width] in pixels.
        shift: settings of the condition shift; None for other losses.
        train_steps, num_inference_steps: of the whole run, and with how many sampling steps it was validated.
        library_version: of this library, when the record was written.
        licence: of ``base``, as its model card names it; None where no card was found.
    """

    family: str
    mode: Literal["full", "lora"]
    base: str
    revision: str | None = None
    variant: str | None = None
    weight_dtype: Literal["fp32", "bf16"] = "fp32"
    quantization: str | None = None
    lora: dict[str, Any] | None = None
    start_lora: str | None = None
    start_lora_mode: Literal["merge", "frozen", "continue"] = "merge"
    max_sequence_length: int | None = None
    embedded_guidance: float | None = None
    shift_padding: bool = False
    resolution: list[int] | None = None
    shift: dict[str, Any] | None = None
    train_steps: int | None = None
    num_inference_steps: int = 1
    library_version: str | None = None
    licence: str | None = None

    def write(self, folder: Path) -> None:
        """Writes ``apex_fast.json`` into ``folder``."""
        (folder / RECORD).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Record | None:
        """The record in ``folder``, or None. CheckpointError for one that cannot be understood."""
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, TypeError) as error:
            raise CheckpointError(f"{path} was written by another version or is damaged: {error}") from error


# ---- writing and reading what was trained


def save_trained(backbone: Backbone, folder: Path, record: Record, processes: Processes | None = None) -> None:
    """Writes what ``record.mode`` trains of ``backbone`` into ``folder``, bit for bit, and the record where the weights
    are not a whole model.

    processes: those that call it together. The main one writes; of a network that is sharded over them each writes a
    share, in the layout in which diffusers reads weights from several files.
    """
    from apex_fast.training.processes import Processes

    team = Processes() if processes is None else processes
    if not team.is_main and not team.sharded:
        return
    team.later(lambda: folder.mkdir(parents=True, exist_ok=True))
    if record.mode == "lora":
        from apex_fast.lora import save_lora

        team.later(lambda: str(save_lora(backbone, folder, write=team.is_main)))
    elif team.sharded:
        _save_shards(backbone.transformer, folder / TRANSFORMER, team)
    elif backbone.text is None:
        backbone.transformer.save_pretrained(folder / TRANSFORMER, safe_serialization=True)
    if not team.is_main:
        return
    if record.mode == "full" and backbone.text is not None:
        team.later(lambda: backbone.save_pretrained(folder, transformer=not team.sharded))
    else:
        team.later(lambda: record.write(folder))


def _save_shards(transformer: nn.Module, folder: Path, processes: Processes) -> None:
    """Writes a sharded network as diffusers writes one of several files: each process the tensors that fall to it, the
    main one configuration and index."""
    processes.later(lambda: folder.mkdir(parents=True, exist_ok=True))
    share = Share(processes)
    weight_map = {name: share.file(WEIGHTS_NAME, share.add(name, v)) for name, v in transformer.state_dict().items()}
    processes.later(lambda: share.write(folder, WEIGHTS_NAME, metadata={"format": "pt"}))
    if processes.is_main:
        processes.later(lambda: _describe_shards(transformer, folder, weight_map, share.bytes))


def _describe_shards(transformer: nn.Module, folder: Path, weight_map: dict[str, str], size: int) -> None:
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{WEIGHTS_NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config: Any = transformer
    config.save_config(folder)
    # Sharding has put a class of its own in front of the network's, and diffusers writes down the name of that.
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "_class_name": class_name(transformer)}, indent=2) + "\n", encoding="utf-8")


def load_trained(backbone: Backbone, folder: Path, mode: Literal["full", "lora"]) -> None:
    """Copies what :func:`save_trained` wrote into ``backbone``, which has the same parts already.

    Raises:
        CheckpointError: a file is missing, or its names or shapes differ.
    """
    if mode == "lora":
        _load_adapter(backbone.transformer, folder)
        return
    load_weights(backbone.transformer, folder / TRANSFORMER)
    if backbone.text is not None and backbone.text.package is None:
        load_weights(backbone.text.text_encoder, folder / "text_encoder")


WEIGHTS_NAME = "diffusion_pytorch_model"


def _load_adapter(transformer: nn.Module, folder: Path) -> None:
    from apex_fast.lora import GENERATOR, WEIGHTS

    peft = require("peft", extra="train")
    file = folder / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}; was the run one of full tuning?")
    state = {name.removeprefix("transformer."): value for name, value in read_tensors(file).items()}
    own = peft.get_peft_model_state_dict(transformer, adapter_name=GENERATOR)
    _compare(file, {name: own[name].shape for name in own}, {name: state[name].shape for name in state})
    if any(is_sharded(value) for value in own.values()):
        # peft would copy whole tensors into parts.
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(placed(state[name], value))
        return
    peft.set_peft_model_state_dict(transformer, state, adapter_name=GENERATOR)


def load_weights(target: nn.Module, folder: Path) -> None:
    """Copies the weights in the safetensors files of ``folder`` into ``target``, names matched exactly.

    Raises:
        CheckpointError: there is no such file, or names or shapes differ.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors file")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state.update(read_tensors(file))
    own = target.state_dict(keep_vars=True)
    # One memory under two names (tied embeddings) is written once. A sharded tensor has no address of its own.
    places = {name: id(value) if is_sharded(value) else value.data_ptr() for name, value in own.items()}
    saved = {places[name] for name in state if name in own}
    needed = {name: v.shape for name, v in own.items() if name in state or places[name] not in saved}
    _compare(folder, needed, {name: value.shape for name, value in state.items()})
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(placed(value, own[name]))


def _compare(place: Path, own: dict[str, torch.Size], found: dict[str, torch.Size]) -> None:
    missing, unknown = [n for n in own if n not in found], [n for n in found if n not in own]
    wrong = [n for n in found if n in own and own[n] != found[n]]
    if missing or unknown or wrong:
        raise CheckpointError(
            f"{place} is of another network: missing {missing[:3]}, unknown {unknown[:3]}, of another shape {wrong[:3]}"
        )


# ---- finding


@dataclass(frozen=True)
class Found:
    """Where the model of a run lies: ``folder`` with a whole model or with trained weights and their record, what it
    is in words, the checkpoint whose averaged weights are wanted, if any, and at which rate ("" is the first one)."""

    folder: Path
    phrase: str
    checkpoint: Path | None = None
    ema: str = ""


def holds_model(folder: Path) -> bool:
    """Whether ``folder`` itself is a model: whole, or trained weights with their record."""
    return any((folder / name).is_file() for name in (INDEX, RECORD))


def has_own_text(folder: Path) -> bool:
    """Whether the model there, or in its ``model/``, is one of this library's own, with a text encoder beside its
    transformer."""
    index = next((p for p in (folder / INDEX, folder / MODEL_FOLDER / INDEX) if p.is_file()), None)
    if index is None:
        return False
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    return isinstance(name, str) and name.endswith("Backbone")


def find_result(run: str | Path, *, ema: str | None = None) -> Found:
    """What there is to generate with.

    ema: a rate of ``ema_decay`` other than the one that ``model/`` holds; the newest checkpoint has all of them.

    run: a run that has finished (its ``model/``, which a resumed run replaces when it ends), one that has not (its
    newest checkpoint; also if it was killed at the moment between taking the old ``model/`` away and putting the new
    one there), a checkpoint folder, a saved model folder, or the name of a model that ships.

    Raises:
        FileNotFoundError: nothing of the kind is there; the message says what was looked for.
        CheckpointError: a damaged checkpoint.
    """
    if is_shipped(run):
        return Found(shipped_folder(run), SHIPPED_MODELS[str(run)].phrase)
    folder = Path(run)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{run}: no such folder; write the folder of a run (such as runs/demo), of a checkpoint or of a saved "
            f"model, or the name of one that ships: {shipped_names()}"
        )
    if ema is not None:
        if folder.name == MODEL_FOLDER:
            folder = folder.parent
        whole = [folder] if folder.name.startswith("checkpoint-") else checkpoints(folder)
        if not whole:
            raise FileNotFoundError(
                f"{run} has no checkpoint, and the averages beside the first one are only there; leave --ema out"
            )
        found = _checkpoint(whole[-1])
        return dataclasses.replace(found, phrase=f"the weights of {whole[-1]} averaged at {ema}", ema=ema)
    if holds_model(folder):
        return Found(folder, f"the model in {folder}")
    if folder.name.startswith("checkpoint-"):
        return _checkpoint(folder)
    if holds_model(folder / MODEL_FOLDER):
        return Found(folder / MODEL_FOLDER, f"the finished model of {folder}")
    found = checkpoints(folder)
    if found:
        return _checkpoint(found[-1])
    if (old := replaced(folder / MODEL_FOLDER)) is not None:
        return Found(old, f"the finished model of {folder}")
    raise FileNotFoundError(
        f"{run} holds neither a finished model ({MODEL_FOLDER}/{INDEX} or {MODEL_FOLDER}/{RECORD}) nor a complete "
        "checkpoint; has `apex-fast train` or `apex-fast demo` run there?"
    )


def _checkpoint(folder: Path) -> Found:
    if (problem := damage(folder)) is not None:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {problem}")
    return Found(folder / MODEL_FOLDER, f"the averaged weights of {folder}", folder)


def data_set_of(model: str) -> str | None:
    """``dataset_name`` of the run that ``model`` is or lies in; of a start that ships, what its name begins with."""
    folder = Path(model)
    if is_shipped(model) or not folder.exists():
        return next((name for name in SHIPPED if model.startswith(f"{name}_")), None)
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "config.yaml").is_file():
            # What it says does not have to be all that this version understands.
            name = read_yaml(place / "config.yaml").get("dataset_name")
            return name if isinstance(name, str) else None
    return None
