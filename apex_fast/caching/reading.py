"""A cache as a run reads it: rows from mapped files when they are asked for, nothing held in memory.

What it gives is, bit for bit, what encoding in the run itself gives: embeddings are padded again to the length that all
prompts of the run have in common there, and latents come in fp32. (Padding is zeros here and whatever the text encoder
made of it there; a network that takes a mask sees neither, and for the others all tokens are kept.)
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apex_fast.backbones.base import Backbone
from apex_fast.caching import shards as files
from apex_fast.caching.identity import (
    base_facts,
    differences,
    draws_base_samples,
    parts_of,
    picture_facts,
    size_facts,
    text_encoder_parameters,
    text_facts,
)
from apex_fast.caching.shards import EXTRA, LATENTS, NEGATIVE, TEXT, CacheError, Record, cache_folder, overwriting
from apex_fast.command import command_name
from apex_fast.condition import Condition
from apex_fast.data.source import HUB, Source
from apex_fast.data.tar_shards import shown
from apex_fast.training.batches import Samples, TextImages
from apex_fast.training.config import TrainConfig
from apex_fast.training.encoding import (
    Encoded,
    PromptSamples,
    check_text_encoders,
    data_digest,
    extra_prompts,
    open_data,
    picture_size,
    size_text,
)
from apex_fast.training.guidance import RealGuidance, run_guidance
from apex_fast.training.processes import Processes
from apex_fast.training.settings import SettingsError

OPEN_SHARDS = 64
"""Files that are kept open; a process may have about a thousand."""
CHECKED_BYTES = 4 << 30
"""The largest cache that :func:`state_of` reads to compare checksums, which takes seconds."""


class _Shards:
    """The tensors of a cache by shard and name.

    records: of the shards, as they were when the run began. A file that is opened later, or again, has to be of its
    record: names are numbers of rows, which another encoding has too. The first time its SHA-256 is compared.
    """

    def __init__(self, folder: Path, records: Sequence[Record]) -> None:
        self.folder = folder
        self._records = {record.name: record for record in records}
        self._checked: set[str] = set()
        self._open: OrderedDict[str, Any] = OrderedDict()

    def _opened(self, shard: str) -> Any:
        record, file = self._records[shard], files.shard_file(self.folder, shard)
        opened = safe_open(file, "pt")
        problem = None
        if shard not in self._checked:
            problem = files.damage(self.folder, record, contents=True)
        now = Record.read(self.folder, shard)
        anew = problem is not None and now is not None and now.sha256 != record.sha256
        if anew or (opened.metadata() or {}).get("key") != record.key:
            raise CacheError(f"cache_dir: {file} was encoded anew while this run reads it; resume the run")
        if problem is not None:
            raise _damaged(self.folder, problem)
        self._checked.add(shard)
        return opened

    def get(self, shard: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Those of ``names`` that the shard has, on the CPU. CacheError for a file that cannot be read, is damaged, or
        was encoded anew since the run began."""
        try:
            opened = self._open.pop(shard, None)
            if opened is None:
                opened = self._opened(shard)
            self._open[shard] = opened
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
            there = set(opened.keys())
            return {name: opened.get_tensor(name) for name in names if name in there}
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"cache_dir: {files.shard_file(self.folder, shard)} cannot be read ({error}); `{command_name()} cache` "
                "with the same config finds what is damaged and encodes it anew"
            ) from error


def _damaged(folder: Path, problem: str) -> CacheError:
    return CacheError(
        f"cache_dir: {folder} is damaged: {problem}; `{command_name()} cache` with the same config encodes anew what "
        "is missing"
    )


class Embeddings:
    """A :class:`~apex_fast.training.batches.TextTable` over the shards of a cache.

    records: of its prompts, the negative ones included; captions first, since an extra prompt that is a caption too is
    encoded with the other captions. ``device``: where conditions are wanted. ``extra``: those of the extra prompts that
    the run has, whose lengths count for the padding; None is all. ``negative``: the negative prompt of the run.
    """

    def __init__(
        self,
        folder: Path,
        records: Sequence[Record],
        device: torch.device | str = "cpu",
        *,
        extra: Iterable[str] | None = None,
        negative: str | None = None,
    ) -> None:
        self.device, self._shards = torch.device(device), _Shards(folder, records)
        wanted = None if extra is None else set(extra)
        self._rows: dict[str, tuple[str, int]] = {}
        self._negative: Record | None = None
        self.bytes, self.tokens = 0, 0
        for record in records:
            if record.name.startswith(f"{NEGATIVE}/"):
                if record.rows[0]["prompt"] == negative:
                    self._negative = record
                continue
            self.bytes += record.bytes
            others = record.name.startswith(f"{EXTRA}/")
            for number, row in enumerate(record.rows):
                if others and (row["prompt"] in self._rows or (wanted is not None and row["prompt"] not in wanted)):
                    continue
                self._rows[row["prompt"]] = (record.name, number)
                self.tokens = max(self.tokens, row.get("tokens", record.tokens))

    def __len__(self) -> int:
        return len(self._rows)

    def holds(self, prompts: Iterable[str]) -> bool:
        """See :class:`~apex_fast.training.batches.TextTable`."""
        return all(prompt in self._rows for prompt in prompts)

    def __call__(self, prompts: list[str]) -> Condition:
        """See :class:`~apex_fast.training.batches.TextTable`. CacheError for a file that cannot be read."""
        return self._condition([self._rows[prompt] for prompt in prompts], self.tokens)

    def example(self, count: int) -> Condition:
        """See :class:`~apex_fast.training.batches.TextTable`."""
        return self._condition(list(self._rows.values())[:count], self.tokens)

    @property
    def negative_prompt(self) -> str | None:
        """What :meth:`negative` is the condition of; None where there is none."""
        return None if self._negative is None else self._negative.rows[0]["prompt"]

    def negative(self) -> Condition:
        """The condition of the negative prompt, batch 1."""
        assert self._negative is not None
        return self._condition([(self._negative.name, 0)], self._negative.tokens)

    def _condition(self, places: list[tuple[str, int]], tokens: int) -> Condition:
        rows = [self._shards.get(shard, [f"embeds.{row}", f"mask.{row}", f"pooled.{row}"]) for shard, row in places]
        parts = {name.partition(".")[0] for row in rows for name in row}
        columns: dict[str, Tensor] = {}
        for part in parts:
            tensors = [next(t for name, t in row.items() if name.startswith(f"{part}.")) for row in rows]
            if part == "pooled":
                columns[part] = torch.stack(tensors)
                continue
            column = tensors[0].new_zeros(len(tensors), tokens, *tensors[0].shape[1:])
            for number, tensor in enumerate(tensors):
                column[number, : len(tensor)] = tensor
            columns[part] = column
        return Condition(columns["embeds"], columns.get("mask"), columns.get("pooled")).to(self.device)


class CachedSamples:
    """:class:`~apex_fast.training.batches.Samples` over the shards of a cache, in the order of the data."""

    def __init__(self, folder: Path, records: Sequence[Record]) -> None:
        self._shards = _Shards(folder, records)
        self._rows = sorted(
            (row["index"], record.name, row["caption"], tuple(row["shape"]))
            for record in records
            for row in record.rows
        )
        self.vocabulary: list[str] | None = list(dict.fromkeys(row[2] for row in self._rows))
        members: dict[tuple[int, ...], list[int]] = {}
        for position, row in enumerate(self._rows):
            members.setdefault(row[3], []).append(position)
        self.buckets = [torch.tensor(members[shape]) for shape in sorted(members)]
        self.bytes = sum(record.bytes for record in records)

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, chosen: Tensor) -> Tensor:
        """See :class:`~apex_fast.training.batches.Samples`; fp32. CacheError for a file that cannot be read."""
        found = []
        for position in chosen.tolist():
            index, shard, _, _ = self._rows[position]
            found += self._shards.get(shard, [f"latents.{index}"]).values()
        return torch.stack(found).float()

    def prompts(self, chosen: Tensor, generator: torch.Generator) -> list[str]:
        """See :class:`~apex_fast.training.batches.Samples`."""
        return [self._rows[position][2] for position in chosen.tolist()]


class Cache:
    """The whole cache of a run.

    Attributes:
        folder, index: see :mod:`apex_fast.caching.shards`.
        records: of its shards.
        config: of the run that reads it.
        notes: what could not be compared.
    """

    def __init__(self, folder: Path, index: dict[str, Any], config: TrainConfig) -> None:
        self.folder, self.index, self.config = folder, index, config
        self.notes: list[str] = []
        self.records: list[Record] = []
        for name, entry in index["shards"].items():
            record = Record.read(folder, name)
            if record is None or record.key != entry["key"]:
                problem = f"{folder / name}.json is missing or of another shard"
            else:
                problem = files.damage(folder, record)
            if record is None or problem is not None:
                raise _damaged(folder, str(problem))
            self.records.append(record)

    @property
    def load_options(self) -> dict[str, bool]:
        """Of :func:`apex_fast.training.setup.load_backbone`: what a run from this cache does without."""
        return {"load_text_encoders": False, "load_vae": self.config.draws_pictures}

    @property
    def data_digest(self) -> dict[str, Any] | None:
        """Of the data that it was made of."""
        return self.index["facts"].get("data")

    def check(self, wanted: dict[str, Any]) -> None:
        """CacheError if what the cache was made of or by is not what the run has."""
        differ = differences(self.index["facts"], wanted)
        if differ:
            raise CacheError(
                f"cache_dir: {self.folder} was made for something else: {'; '.join(differ)}. To encode anew what "
                f"differs: {overwriting(self.config)}; to keep it, write another cache_dir"
            )

    def check_network(self, backbone: Backbone) -> None:
        """The same for what only the network says: sizes, and how samples of the base are guided."""
        latents = self.index["facts"].get("latents")
        if latents is None:
            return
        if not draws_base_samples(self.config):
            wanted = size_facts(self.config, backbone)
        else:
            wanted = {"size": list(picture_size(self.config, backbone))}
            guidance = run_guidance(self.config, backbone)
            wanted["guidance_scale"] = None if guidance is None else guidance.scale
            wanted["negative_prompt"] = None if guidance is None else guidance.negative_prompt
        self.check({"latents": wanted})

    def of(self, kind: str) -> list[Record]:
        """The records of one kind."""
        return [record for record in self.records if record.name.startswith(f"{kind}/")]

    def encoded(
        self, backbone: Backbone, device: torch.device, guidance: RealGuidance | None, say: Callable[[str], None]
    ) -> Encoded:
        """What :func:`apex_fast.training.encoding.encode_data` would have encoded. CacheError for a prompt that is not
        in the cache, and as :meth:`check_network`."""
        self.check_network(backbone)
        wanted = None if guidance is None else guidance.negative_prompt
        table = Embeddings(
            self.folder,
            [*self.of(TEXT), *self.of(EXTRA), *self.of(NEGATIVE)],
            device,
            extra=[*self.config.validation_prompts, ""],
            negative=wanted,
        )
        latents = self.of(LATENTS)
        data: Samples
        if latents and (self.config.prompts is None or draws_base_samples(self.config)):
            data = CachedSamples(self.folder, latents)
        else:
            captions = [row["prompt"] for record in self.of(TEXT) for row in record.rows]
            data = PromptSamples(captions, backbone.latent_shape(*picture_size(self.config, backbone)))
        missing = [p for p in extra_prompts(self.config, []) if not table.holds([p])]
        if guidance is not None and table.negative_prompt != wanted:
            missing.append(str(wanted))
        if missing:
            named = ", ".join(f'"{p}"' for p in missing[:3])
            raise CacheError(
                f"cache_dir: {self.folder} does not hold the prompts {named}; `{command_name()} cache` with the same "
                "config adds them, and leaves the rest as it is"
            )
        drawn = self.config.draws_pictures
        say(
            f"{len(data)} samples and {len(table)} prompts from {self.folder} ({size_text(self.index['bytes'])}); "
            + ("text encoders are not loaded, the VAE is, to draw validation pictures" if drawn else "")
            + ("" if drawn else "text encoders and VAE are not loaded")
        )
        for note in self.notes:
            say(f"careful: {note}")
        left_out = [
            f"{len(names)} left out, {reason}: " + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            for reason, names in self.index["left_out"].items()
        ]
        return Encoded(data, table, None if guidance is None else table.negative().to(device), left_out)


def open_run_data(
    config: TrainConfig, processes: Processes, say: Callable[[str], None], stream: Any = None
) -> tuple[TextImages | Source | None, Cache | None]:
    """The data of a run and its cache, either of which may be missing; samples of the base are drawn now if they are
    not there.

    Raises:
        as :func:`apex_fast.training.encoding.open_data` and :func:`open_cache`; and SettingsError where each of several
        processes would load a large text encoder.
    """
    # What one process sees of a folder, another may see later: the main one says for all.
    there, stale = processes.on_main(lambda: _found(config))
    if stale or (draws_base_samples(config) and not there):
        from apex_fast.caching.build import build

        # What is drawn now must not change what the run draws later.
        with torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []):
            build(config, processes, overwrite=stale, say=say, stream=stream)
        there = True
    if not there and config.cache_dir is None:
        source = open_data(config)
        if processes.world > 1 and not isinstance(source, TextImages):
            check_text_encoders(config, _text_parameters(config), processes.world)
        return source, None
    cache = open_cache(config)
    if cache is None:
        raise CacheError(
            f"cache_dir: process {processes.rank} does not see the cache in {cache_folder(config)}, which the main "
            "process sees; write a cache_dir that all of them see"
        )
    name = config.dataset_name if config.prompts is None else config.prompts
    if config.prompts is None and ("://" in name or name.lower().startswith(HUB)):
        cache.notes.append(f"{shown(name)} was not read again, so it is not known whether it is still what was encoded")
        return None, cache
    try:
        source = open_data(config)
    except FileNotFoundError:
        cache.notes.append(f"{name} is not there, so what was encoded of it is taken as it is")
        return None, cache
    cache.check({"data": data_digest(source)})
    return source, cache


def _found(config: TrainConfig) -> list[bool]:
    """Whether there is a cache, and whether a run from prompts that starts over is to encode anew what differs in it:
    only where the cache is beside ``output_dir``, since one with a name of its own may be of other runs too."""
    there = (cache_folder(config) / files.INDEX).is_file()
    own = config.prompts is not None and config.cache_dir is None and config.resume_from_checkpoint is None
    if not (there and own and config.overwrite_output_dir):
        return [there, False]
    latents: dict[str, Any] = {}
    if draws_base_samples(config):
        # The network's own values stand in for those that are not written, and are compared when it is there.
        written = {"guidance_scale": config.guidance_scale, "negative_prompt": config.negative_prompt}
        written["size"] = None if config.image_size is None else list(config.image_size)
        latents = {name: value for name, value in written.items() if value is not None}
    try:
        _compared(config).check({"latents": latents})
    except CacheError:
        return [there, True]
    return [there, False]


def _compared(config: TrainConfig) -> Cache:
    """The cache of a run, compared with the model's files and the data."""
    cache = open_cache(config)
    assert cache is not None
    with contextlib.suppress(FileNotFoundError):
        cache.check({"data": data_digest(open_data(config))})
    return cache


def _text_parameters(config: TrainConfig) -> int:
    try:
        return text_encoder_parameters(parts_of(config))
    except (SettingsError, FileNotFoundError):
        # A text encoder of the model's own, which is small; or a mistake that loading the model finds.
        return 0


def open_cache(config: TrainConfig) -> Cache | None:
    """The cache of a run, compared with the run as far as files tell; None where ``cache_dir`` is not written and there
    is none beside ``output_dir``.

    Raises:
        CacheError: it is unfinished, damaged, or of something else.
    """
    folder = cache_folder(config)
    index = files.read_index(folder)
    if index is None:
        if config.cache_dir is None:
            return None
        unfinished = any((folder / kind).is_dir() for kind in files.KINDS)
        raise CacheError(
            f"cache_dir: {'the encoding into ' if unfinished else 'there is no cache in '}{folder}"
            f"{' was not finished' if unfinished else ''}; {'go on with' if unfinished else 'make it with'} "
            f"`{command_name()} cache` and the same config"
        )
    cache = Cache(folder, index, config)
    parts = parts_of(config)
    if parts.folder is not None:
        wanted: dict[str, Any] = {"text": text_facts(config, parts)}
        if draws_base_samples(config):
            wanted["latents"] = base_facts(config, parts, None)
            # Only the network says how it is guided.
            for name in ("guidance_scale", "negative_prompt"):
                del wanted["latents"][name]
        elif config.prompts is None:
            wanted["latents"] = picture_facts(config, parts)
        cache.check(wanted)
        gone = [name for name, part in wanted["text"]["parts"].items() if part is None]
        if wanted.get("latents", {}).get("vae", ()) is None:
            gone.append("vae")
        if gone:
            cache.notes.append(f"{', '.join(gone)} not here, so what encoded the cache is not compared with it")
    else:
        cache.notes.append(f"{parts.name} is not on this machine, so what encoded the cache is not compared with it")
    if "latents" not in index["facts"] and (config.prompts is None or draws_base_samples(config)):
        raise CacheError(
            f"cache_dir: {folder} holds prompts alone, and the run trains on "
            f"{'pictures' if config.prompts is None else 'samples of the base'}; write another cache_dir, or "
            f"`{command_name()} cache` with the same config adds them"
        )
    return cache


def state_of(config: TrainConfig) -> tuple[str, str]:
    """("none", "whole", "unfinished", "stale" or "damaged", and a line that says it, with what to do)."""
    folder = cache_folder(config)
    if not (folder / files.INDEX).is_file():
        if any((folder / kind).is_dir() for kind in files.KINDS):
            return "unfinished", f"{folder} is not whole: `{command_name()} cache` goes on where it stopped"
        if config.cache_dir is not None:
            return "none", f"there is no cache in {folder}: `{command_name()} cache` makes it"
        return "none", "no cache: pictures and prompts are encoded in the run, before its first step"
    try:
        cache = _compared(config)
        line = f"{folder}: {cache.index['samples']} samples, {size_text(cache.index['bytes'])}; "
        if cache.index["bytes"] > CHECKED_BYTES:
            return "whole", line + "of its shards only the sizes were compared, their checksums are in the run"
        for record in cache.records:
            if (problem := files.damage(folder, record, contents=True)) is not None:
                raise _damaged(folder, problem)
        return "whole", line + "the checksums of its shards are right"
    except CacheError as error:
        text = str(error)
        return ("damaged" if "is damaged" in text or "cannot be read" in text else "stale"), text
    except SettingsError as error:
        return "stale", str(error)
