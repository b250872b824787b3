"""A run as files of stock diffusers: a LoRA, a transformer, or with ``merge`` a whole pipeline.

==========  ============================================================================================
LoRA        ``pytorch_lora_weights.safetensors``, for ``pipeline.load_lora_weights``; its header has rank and alpha as
            diffusers reads them (``lora_adapter_metadata``), and the facts of :attr:`Source.metadata`
full        ``transformer/``, for ``from_pretrained``; the header of each weight file has the same facts
merged      ``model_index.json``, ``transformer/`` with the LoRA in its weights and the facts in its headers, and
            every other part of the base, copied as it is, for ``DiffusionPipeline.from_pretrained``
always      ``scheduler/scheduler_config.json`` (:mod:`apex_fast.export.schedulers`)
==========  ============================================================================================

A LoRA that the run started from and left as it is lies beside as ``start_lora.safetensors``: the two belong together.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from apex_fast.backbones.base import Backbone
from apex_fast.export.schedulers import scheduler
from apex_fast.export.source import Source
from apex_fast.extras import require
from apex_fast.lora import WEIGHTS, AdapterSwitch
from apex_fast.training.models import is_hub_id, pretrained_folder
from apex_fast.training.results import INDEX, TRANSFORMER, Record
from apex_fast.training.settings import SettingsError

SCHEDULER_FOLDER = "scheduler"
START_LORA = "start_lora.safetensors"
COPIED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""Files of a base that a merged pipeline may need; other weight formats are left behind."""
_OTHER_WEIGHTS = re.compile(r".*\.bin\.index.*|[^.]+\.[^.]+.*\.safetensors.*|.*\.safetensors\.index\.(?!json$).*")
"""Of those, what belongs to another format or variant: model.fp16.safetensors, model.safetensors.index.fp16.json."""


def export_stock(source: Source, folder: Path, merge: bool) -> list[Path]:
    """Writes ``source`` into ``folder``, which is there and empty; returns the files.

    Raises:
        SettingsError: what cannot be written this way; the message says what can.
        FileNotFoundError: the base of the run, or the LoRA that it started from, is gone.
    """
    if merge:
        _write_pipeline(source, folder)
    elif source.mode == "lora":
        _check_base(source)
        _write_lora(source, folder)
    else:
        _check_base(source)
        _write_transformer(source, folder)
    scheduler().save_pretrained(folder / SCHEDULER_FOLDER)
    return sorted(p for p in folder.rglob("*") if p.is_file())


# ---- a LoRA, a transformer


def _write_lora(source: Source, folder: Path) -> None:
    with safe_open(source.found.folder / WEIGHTS, "pt") as file:
        header = dict(file.metadata() or {})
    assert source.lora_state is not None
    facts = {**header, **source.metadata, "format": "pt"}
    if (start := source.start_lora) is not None:
        shutil.copyfile(start, folder / START_LORA)
        facts["start_lora"] = START_LORA
    save_file(source.lora_state, folder / WEIGHTS, metadata=facts)


def _write_transformer(source: Source, folder: Path) -> None:
    if source.found.checkpoint is None:
        shutil.copytree(source.found.folder / TRANSFORMER, folder / TRANSFORMER)
    else:
        # The average, which is what is exported, is not what lies in the checkpoint's own model folder.
        source.backbone.transformer.save_pretrained(folder / TRANSFORMER, safe_serialization=True)
    add_facts(folder / TRANSFORMER, source.metadata)


def add_facts(folder: Path, facts: Mapping[str, str]) -> None:
    """Writes ``facts`` into the header of every safetensors file of ``folder``, beside what it says already.

    The tensors are copied as bytes: diffusers writes such files with a header of its own, and a transformer may be
    larger than the memory.
    """
    for file in sorted(folder.glob("*.safetensors")):
        partial = file.with_name(f".{file.name}.partial")
        # A file begins with the length of its header (8 bytes, little endian) and the header, in JSON. Where a tensor
        # lies is counted from the header's end.
        with file.open("rb") as old, partial.open("wb") as new:
            header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
            header["__metadata__"] = {**header.get("__metadata__", {}), **facts, "format": "pt"}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            new.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(old, new, 1 << 24)
        os.replace(partial, file)


def _check_base(source: Source) -> None:
    """SettingsError where the base is no pipeline that a user of the result could load, but a run of its own."""
    if is_hub_id(source.base):
        return
    try:
        base = pretrained_folder(source.base)
    except FileNotFoundError:
        # The result does not need it here. Its user does, and reads its name in the card.
        return
    if not (base / INDEX).is_file():
        what = "was tuned itself" if Record.read(base) is not None else "is a transformer alone"
        raise SettingsError(
            f"export: {source.base}, which this run started from, {what}, and no stock pipeline can be loaded from it; "
            + (
                "write --merge for one pipeline with everything in it"
                if Record.read(base) is not None
                else "write --base with the folder or hub id of the whole pipeline"
            )
        )


# ---- a whole pipeline


def merge_adapters(backbone: Backbone, names: Iterable[str]) -> None:
    """Adds the adapters ``names`` to the weights of the transformer and takes all adapters off it, for good.

    The sum is taken in fp32, one layer at a time, and rounded once to the dtype of the weights.
    """
    names = list(names)
    for layer in AdapterSwitch(backbone.transformer).layers:
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        own = [name for name in names if name in layer.lora_A]
        adapters = [part for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector) if part is not None]
        base.float()
        for part in adapters:
            part.float()
        # Checked, so that a diverged adapter is not hidden in weights that look whole.
        layer.merge(safe_merge=True, adapter_names=own)
        base.to(dtype)
    backbone.transformer.unload_lora()


def _write_pipeline(source: Source, folder: Path) -> None:
    backbone = source.backbone
    if source.mode == "lora":
        try:
            merge_adapters(backbone, source.merged)
        except ValueError as error:
            raise SettingsError(f"export: the LoRA of {source.found.phrase} cannot be merged: {error}") from error
    root, record = base_pipeline(source)
    if record.variant is None:
        index = _copy_parts(root, record, folder, backbone)
        backbone.transformer.save_pretrained(folder / TRANSFORMER, safe_serialization=True)
    else:
        # Other names and dtypes go with the weight files of a variant: what was loaded is written.
        pipeline = backbone.pipeline()
        pipeline.scheduler = scheduler()
        pipeline.save_pretrained(folder, safe_serialization=True)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    add_facts(folder / TRANSFORMER, source.metadata)
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    index.pop("_name_or_path", None)
    # Last, so that a folder with an index is a complete one.
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def base_pipeline(source: Source) -> tuple[str, Record]:
    """The pipeline at the root of a run, through all runs that it started from: folder or hub id, and the record of the
    run that started from it.

    FileNotFoundError if one of them is gone.
    """
    base, record = source.place, source.record
    while not is_hub_id(base):
        folder = pretrained_folder(base)
        if (folder / INDEX).is_file():
            return str(folder), record
        earlier = Record.read(folder)
        if earlier is None:
            raise SettingsError(
                f"export --merge: {base} is a transformer alone, and a pipeline has text encoders and a VAE; write "
                "--base with the folder or hub id of the whole pipeline"
            )
        base, record = earlier.base, earlier
    return base, record


def _copy_parts(root: str, record: Record, folder: Path, backbone: Backbone) -> dict[str, Any]:
    """Copies every part of the pipeline ``root`` but transformer and scheduler, as it is; returns its index."""
    place = Path(root)
    if not place.is_dir():
        hub = require("huggingface_hub", extra="train")
        parts = [*backbone.components, "tokenizer"]
        wanted = [f"{part}/{pattern}" for part in parts for pattern in COPIED]
        # Weights of a variant have a word between name and suffix, as in model.fp16.safetensors.
        others = ["*.*.safetensors", "*.safetensors.index.*.json", "*.bin.index*.json"]
        place = Path(
            hub.snapshot_download(
                root, revision=record.revision, allow_patterns=[INDEX, *wanted], ignore_patterns=others
            )
        )
    index = json.loads((place / INDEX).read_text(encoding="utf-8"))
    for name, entry in index.items():
        if name in (TRANSFORMER, SCHEDULER_FOLDER) or not isinstance(entry, list) or None in entry:
            continue
        files = sorted({file for pattern in COPIED for file in (place / name).glob(pattern)})
        files = [file for file in files if not _OTHER_WEIGHTS.fullmatch(file.name)]
        (folder / name).mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, folder / name / file.name)
    return index
