"""The files of a cache: shards of tensors, a record beside each, and an index of them all.

==========================  ==========================================================================================
``index.json``              what encoded the cache and a hash of that, which shards belong to it; written last
``text/00000.safetensors``  embeddings of some captions: ``embeds.<row>`` [tokens, channels] without padding where the
                            network takes a mask, ``mask.<row>`` [tokens], ``pooled.<row>`` [channels]
``extra/``, ``negative/``   the same of a run's other prompts, and of the one that is guided away from
``latents/``                ``latents.<row>`` [C, h, w] of pictures, or of samples of the base
``<shard>.json``            the record: bytes and SHA-256 of the shard, its key, and what its rows are
==========================  ==========================================================================================

The *key* of a shard is a hash of everything that its contents depend on: what encodes it, and what of the data it is to
hold. A shard and then its record are written under other names, brought to the disk and renamed, so a process that is
killed at any moment leaves whole shards and nothing else that counts. A shard whose record has the wanted key and the
checksum of the file is done, whoever wrote it and when; so an interrupted encoding goes on, and after a change only
what depends on it is encoded anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from apex_fast.command import command_name
from apex_fast.training.settings import SettingsError

if TYPE_CHECKING:
    from apex_fast.training.config import TrainConfig

FORMAT = 1
INDEX = "index.json"
TEXT, EXTRA, NEGATIVE, LATENTS = "text", "extra", "negative", "latents"
KINDS = (TEXT, EXTRA, NEGATIVE, LATENTS)
SUFFIX = ".cache"
_PARTIAL = ".partial-"


class CacheError(SettingsError):
    """A cache that cannot be used: of other data or another model, unfinished, or damaged. The message says what to
    do."""


def cache_folder(config: TrainConfig) -> Path:
    """Where the cache of a run is: ``cache_dir``, or beside ``output_dir``."""
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    output = Path(config.output_dir)
    return output.with_name(output.name + SUFFIX)


def overwriting(config: TrainConfig) -> str:
    """The command that encodes anew what differs in the cache of a run."""
    if config.prompts is None:
        return f"{command_name()} cache CONFIG --overwrite"
    by_itself = "" if config.cache_dir is not None else ", or start over with --overwrite_output_dir"
    return (
        f"{command_name()} cache --model {config.pretrained_model_name_or_path} --prompts {config.prompts} --overwrite "
        f"(and the other keys of the run){by_itself}"
    )


def digest(value: Any) -> str:
    """SHA-256 of plain values of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A shard that is to be there.

    Attributes:
        kind: one of ``KINDS``.
        number: counted within its kind.
        rows: what it is made of, in plain values: prompts, or samples by index, name and caption.
        key: see the module.
    """

    kind: str
    number: int
    rows: list[Any]
    key: str

    @property
    def name(self) -> str:
        """Its file without the suffix, inside the cache."""
        return f"{self.kind}/{self.number:05d}"


@dataclass(frozen=True)
class Record:
    """What a shard that is there holds.

    Attributes:
        name: see :attr:`Shard.name`.
        key: of the shard as it was planned.
        bytes, sha256: of its file.
        rows: what became of each row: prompt and tokens, or sample and shape.
        left_out: reason -> names of samples.
        tokens: the most tokens of its prompts before padding was cut off, 0 where there are none.
        made_by: version of the library.
    """

    name: str
    key: str
    bytes: int
    sha256: str
    rows: list[dict[str, Any]]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    tokens: int = 0
    made_by: str = ""

    @staticmethod
    def read(folder: Path, name: str) -> Record | None:
        """The record of the shard ``name``; None where there is none, or none that can be understood."""
        try:
            values = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            return Record(name=name, **values)
        except (OSError, ValueError, TypeError):
            return None


def shard_file(folder: Path, name: str) -> Path:
    """The tensors of the shard ``name``."""
    return folder / f"{name}.safetensors"


def whole(folder: Path, shard: Shard) -> Record | None:
    """The record of ``shard`` if it is there as it was planned, its contents compared with its checksum; else None."""
    record = Record.read(folder, shard.name)
    if record is None or record.key != shard.key or damage(folder, record, contents=True) is not None:
        return None
    return record


def damage(folder: Path, record: Record, *, contents: bool = False) -> str | None:
    """What is wrong with the file of ``record``, or None.

    contents: read all of it and compare its SHA-256.
    """
    file = shard_file(folder, record.name)
    if not file.is_file():
        return f"{file} is missing"
    if (size := file.stat().st_size) != record.bytes:
        return f"{file} has {size} bytes instead of {record.bytes}"
    if contents and _sha256(file) != record.sha256:
        return f"{file} is not what was written (its SHA-256 differs)"
    return None


def write_shard(
    folder: Path,
    shard: Shard,
    tensors: Mapping[str, Tensor],
    rows: list[dict[str, Any]],
    *,
    left_out: dict[str, list[str]] | None = None,
    tokens: int = 0,
) -> Record:
    """Writes the tensors of ``shard`` and then its record, each in one step; OSError for a full disk."""
    from apex_fast.version import __version__

    file = shard_file(folder, shard.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}{_PARTIAL}{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(partial), {"key": shard.key})
        # safetensors makes files for their owner alone; processes of several users may share a cache.
        partial.chmod(0o666 & ~_mask())
        record = Record(
            shard.name, shard.key, partial.stat().st_size, _sha256(partial), rows, left_out or {}, tokens, __version__
        )
        _flush(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    write_json(folder / f"{shard.name}.json", {k: v for k, v in vars(record).items() if k != "name"})
    return record


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes ``values`` so that ``file`` is at every moment whole: as it was, or new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}{_PARTIAL}{os.getpid()}")
    try:
        partial.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        _flush(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    _flush(file.parent)


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of the cache in ``folder``; None where no encoding was finished. CacheError for one that cannot be
    understood."""
    file = folder / INDEX
    if not file.is_file():
        return None
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        found = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"cache_dir: {file} cannot be read ({error}); delete it and encode again") from error
    if found != FORMAT:
        raise CacheError(
            f"cache_dir: {file} has the format {found}, and this version reads {FORMAT}; encode into another folder"
        )
    return index


def tidy(folder: Path, keep: set[str]) -> None:
    """Removes shards that are not in ``keep`` and what killed processes left behind; no process may be writing."""
    for kind in KINDS:
        for file in sorted((folder / kind).glob("*")) + sorted((folder / kind).glob(".*")):
            if _PARTIAL in file.name or f"{kind}/{file.name.partition('.')[0]}" not in keep:
                file.unlink(missing_ok=True)
        if (folder / kind).is_dir() and not any((folder / kind).iterdir()):
            shutil.rmtree(folder / kind, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
