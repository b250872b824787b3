"""Encoding into a cache, by one process or many, and going on where it was stopped.

Nothing is decided on the way: from the model's files and the listed data follows which shards there are to be and what
each is to hold (:class:`Plan`), the same in every process, and shard k of each kind belongs to process k modulo their
number. Each looks which of its shards are there already, whole, and writes the others; the main process then reads all
records and writes the index. So it does not matter how many processes there are, whether there were as many the last
time, or when one of them was killed.

Text encoders and VAE are loaded without the transformer, and the transformer, where it has to draw samples, without
them. A few prompts and pictures are encoded first, to say how long it will take and how much space it needs.
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from apex_fast.backbones.base import Backbone
from apex_fast.caching import shards as files
from apex_fast.caching.identity import (
    Parts,
    base_facts,
    differences,
    draws_base_samples,
    parts_of,
    picture_facts,
    size_facts,
    text_facts,
)
from apex_fast.caching.reading import Embeddings
from apex_fast.caching.shards import EXTRA, LATENTS, NEGATIVE, TEXT, CacheError, Record, Shard, cache_folder, digest
from apex_fast.command import command_name
from apex_fast.condition import Condition
from apex_fast.data.source import BROKEN, BrokenPictureError, Sample, Source
from apex_fast.training.batches import TextImages
from apex_fast.training.config import TrainConfig
from apex_fast.training.encoding import (
    PROMPTS_AT_ONCE,
    encode_sample,
    encode_text,
    move_parts,
    open_data,
    picture_size,
    size_rule,
    size_text,
)
from apex_fast.training.guidance import RealGuidance, real_guidance, run_guidance
from apex_fast.training.memory import during, release
from apex_fast.training.models import load_pretrained, pretrained_source
from apex_fast.training.processes import Processes
from apex_fast.training.progress import Console
from apex_fast.training.settings import SettingsError
from apex_fast.training.setup import load_backbone

PROMPTS_IN_A_SHARD = 8 * PROMPTS_AT_ONCE
PICTURES_IN_A_SHARD = 128
SAMPLES_IN_A_SHARD = 8
"""Of the base, each of which takes many passes through the network: what a kill may cost."""
PATIENCE = datetime.timedelta(days=7)
"""How long a process waits for the slowest one."""
RESERVE = 1.05
"""Free space that is asked for, as a multiple of what is expected to be written."""


@dataclass
class Plan:
    """What a cache is to hold.

    Attributes:
        folder: where.
        facts: what its contents depend on, as the index has it.
        shards: all of them, in the order of their kinds.
        seed: of the VAE's sampling and of the noise of samples.
        size: (height, width) in pixels of a picture; of the largest where there are several.
        latent_bytes: what the latents of one such picture take in fp32.
        guidance: of the real branch and of samples of the base.
    """

    folder: Path
    facts: dict[str, Any]
    shards: list[Shard]
    seed: int
    size: tuple[int, int]
    latent_bytes: float
    guidance: RealGuidance | None


def build(
    config: TrainConfig,
    processes: Processes | None = None,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    stream: Any = None,
) -> Path:
    """Encodes what a run of ``config`` needs, as far as it is not there yet; returns the folder.

    Args:
        processes: this process among those that encode together; None is one.
        overwrite: encode anew what a whole cache of other data or another model holds differently.
        say: gets lines for the user; on the main process alone.
        stream: of the progress.

    Raises:
        SettingsError: nothing to encode, data that cannot be used, or too little space on the disk.
        CacheError: the folder holds the whole cache of something else.
    """
    processes = _patient(processes or Processes(device=torch.device("cpu")))
    source = open_data(config)
    if isinstance(source, TextImages):
        raise SettingsError(
            f"cache: dataset_name: {config.dataset_name} ships as what the network takes; there is nothing to cache"
        )
    parts = parts_of(config, download=True)
    plan = make_plan(config, parts, source, processes, overwrite=overwrite)
    mine = [shard for shard in plan.shards if shard.number % processes.world == processes.rank]
    missing = [shard for shard in mine if files.whole(plan.folder, shard) is None]
    left = sum(processes.gather(len(missing)))
    if there := len(plan.shards) - left:
        say(f"{there} of {len(plan.shards)} shards are there already, whole")
    if left:
        # From now on it is unfinished; what of it is still right is recognised shard by shard.
        if processes.is_main:
            (plan.folder / files.INDEX).unlink(missing_ok=True)
        _Work(config, parts, plan, source, processes, missing, say, stream).run()
        release()
    processes.barrier()
    processes.on_main(lambda: _finish(plan, source, say))
    return plan.folder


def _patient(processes: Processes) -> Processes:
    """The same processes, which wait for each other as long as encoding takes; one that is gone still ends them all."""
    if processes.world == 1:
        return processes
    return dataclasses.replace(processes, _control=torch.distributed.new_group(backend="gloo", timeout=PATIENCE))


def make_plan(
    config: TrainConfig, parts: Parts, source: Source, processes: Processes, *, overwrite: bool = False
) -> Plan:
    """Which shards there are to be. Errors as :func:`build`."""
    network = _load(config, parts)
    # Samples of the base are guided whatever the loss is.
    guidance = (run_guidance if draws_base_samples(config) else real_guidance)(config, network)
    size = picture_size(config, network)
    facts: dict[str, Any] = {"text": text_facts(config, parts), "data": source.digest()}
    unknown = [name for name, part in facts["text"]["parts"].items() if part is None]
    if draws_base_samples(config):
        facts["latents"] = {**base_facts(config, parts, guidance), "size": list(size)}
    elif config.prompts is None:
        facts["latents"] = {**picture_facts(config, parts), **size_facts(config, network)}
        unknown += ["vae"] if facts["latents"]["vae"] is None else []
    if unknown:
        raise SettingsError(f"cache: {parts.name} has no {', '.join(unknown)}; write the folder of the whole pipeline")
    folder = cache_folder(config)
    seed = config.seed
    index = files.read_index(folder)
    if index is not None:
        differ = differences(index["facts"], facts)
        if differ and not overwrite:
            raise CacheError(
                f"cache_dir: {folder} is a whole cache of something else: {'; '.join(differ)}. Write another "
                "cache_dir, or --overwrite to encode anew what differs"
            )
        seed = int(index["seed"])
    captions = list(dict.fromkeys(source.captions))
    shards = text_shards(config, facts["text"], captions, guidance, folder)
    if "latents" in facts:
        shards += _latent_shards(config, facts["latents"], source, seed)
    return Plan(folder, facts, shards, seed, size, 4.0 * math.prod(network.latent_shape(*size)), guidance)


def text_shards(
    config: TrainConfig, facts: dict[str, Any], captions: list[str], guidance: RealGuidance | None, folder: Path
) -> list[Shard]:
    """Embeddings: the captions; every other prompt of the run, the empty one too; the negative prompt.

    folder: what is there of other and negative prompts by the same text encoders stays, since another run may need it;
    what is missing goes into a shard of its own.
    """
    found = [
        Shard(TEXT, number, part := captions[first : first + PROMPTS_IN_A_SHARD], _text_key(TEXT, facts, part))
        for number, first in enumerate(range(0, len(captions), PROMPTS_IN_A_SHARD))
    ]
    extra = list(dict.fromkeys([*config.validation_prompts, ""]))
    for kind, prompts, known in (
        (EXTRA, extra, captions),
        (NEGATIVE, [] if guidance is None else [guidance.negative_prompt], []),
    ):
        kept = _kept(folder, kind, facts)
        known = {*known, *(prompt for shard in kept for prompt in shard.rows)}
        missing = [prompt for prompt in prompts if prompt not in known]
        if missing:
            numbers = {shard.number for shard in kept}
            free = next(number for number in itertools.count() if number not in numbers)
            kept.append(Shard(kind, free, missing, _text_key(kind, facts, missing)))
        found += kept
    return found


def _text_key(kind: str, facts: dict[str, Any], prompts: list[str]) -> str:
    return digest([files.FORMAT, kind, facts, prompts])


def _kept(folder: Path, kind: str, facts: dict[str, Any]) -> list[Shard]:
    """The shards of ``kind`` that are there and of these facts, whichever run asked for them."""
    found = []
    for file in sorted((folder / kind).glob("*.json")):
        record = Record.read(folder, f"{kind}/{file.stem}") if file.stem.isdecimal() else None
        prompts = [] if record is None else [row.get("prompt") for row in record.rows]
        if record is not None and prompts and record.key == _text_key(kind, facts, prompts):
            found.append(Shard(kind, int(file.stem), prompts, record.key))
    return found


def _latent_shards(config: TrainConfig, facts: dict[str, Any], source: Source, seed: int) -> list[Shard]:
    if draws_base_samples(config):
        each, at_once = config.prompts_only.samples_per_prompt, SAMPLES_IN_A_SHARD
        rows = [
            [len(source.captions) * turn + i, f"{name}, sample {turn + 1}", caption]
            for turn in range(each)
            for i, (name, caption) in enumerate(zip(source.names, source.captions, strict=True))
        ]
    else:
        at_once = PICTURES_IN_A_SHARD
        rows = [[i, *row] for i, row in enumerate(zip(source.names, source.captions, strict=True))]
    # The name of a sample of the base is a line's number, and a comment more changes no sample.
    named = slice(0, None) if config.prompts is None else slice(0, None, 2)
    return [
        Shard(
            LATENTS,
            number,
            part := rows[first : first + at_once],
            digest([files.FORMAT, LATENTS, facts, seed, [row[named] for row in part]]),
        )
        for number, first in enumerate(range(0, len(rows), at_once))
    ]


def _load(config: TrainConfig, parts: Parts, *, text: bool = False, vae: bool = False) -> Backbone:
    """The pipeline with the parts asked for, and its transformer on the meta device."""
    options = {name: value for name, value in parts.options.items() if value is not None}
    if config.max_sequence_length is not None:
        options["max_sequence_length"] = config.max_sequence_length
    if config.shift_padding:
        options["shift_padding"] = True
    return load_pretrained(
        pretrained_source(parts.name),
        weight_dtype=config.weight_dtype,
        revision=parts.revision,
        variant=parts.variant,
        embedded_guidance=config.embedded_guidance_scale,
        load_text_encoders=text,
        load_vae=vae,
        load_transformer=False,
        **options,
    )


class _Work:
    """The encoding of the shards that one process has to write."""

    def __init__(
        self,
        config: TrainConfig,
        parts: Parts,
        plan: Plan,
        source: Source,
        processes: Processes,
        missing: list[Shard],
        say: Callable[[str], None],
        stream: Any,
    ) -> None:
        self.config, self.parts, self.plan, self.source = config, parts, plan, source
        self.processes, self.device, self.say = processes, processes.device, say
        self.missing = missing
        self.text = [shard for shard in missing if shard.kind != LATENTS]
        self.latents = [shard for shard in missing if shard.kind == LATENTS]
        self.draws = draws_base_samples(config)
        self.stream = stream
        self.reader: tuple[int, Iterator[Sample]] | None = None

    def run(self) -> None:
        rows = sum(len(shard.rows) for shard in self.missing)
        pictures = bool(self.latents) and not self.draws
        seconds, size = 0.0, 0.0
        network = None
        if self.text or pictures:
            with during("loading text encoders and VAE"):
                network = _load(self.config, self.parts, text=bool(self.text), vae=pictures)
            if self.text:
                move_parts(network, network.text_parts, self.device)
                one, each = self._measure_text(network)
                prompts = sum(len(shard.rows) for shard in self.text)
                seconds, size = seconds + one * prompts, size + each * prompts
            if pictures:
                move_parts(network, ("vae",), self.device)
                one, each = self._measure_picture(network)
                count = sum(len(shard.rows) for shard in self.latents)
                seconds, size = seconds + one * count, size + each * count
        if self.draws:
            size += sum(len(shard.rows) for shard in self.latents) * self.plan.latent_bytes
        self._announce(seconds, size)
        console = Console(rows, 0, stream=self.stream, label="cache", unit="row")
        done = 0
        try:
            for shard in self.text:
                with during("encoding prompts"):
                    self._encode_prompts(network, shard)
                done += len(shard.rows)
                console.step(done, "prompts")
            if network is not None:
                network.free_text_encoders()
                release()
            if self.draws:
                network = None
                release()
                # The prompts that a process draws for were encoded by others.
                self.processes.barrier()
                if self.latents:
                    self._draw(console, done)
            else:
                for shard in self.latents:
                    with during("encoding pictures"):
                        self._encode_pictures(network, shard)
                    done += len(shard.rows)
                    console.step(done, "pictures")
        except (OSError, SafetensorError) as error:
            if not _full(error):
                raise
            raise SettingsError(
                f"cache_dir: {self.plan.folder} is full ({error}); what is whole is kept, so make space there and "
                "start again, or write another cache_dir"
            ) from error
        except ValueError as error:
            if isinstance(error, SettingsError):
                raise
            # What a source says of data that it cannot give.
            raise SettingsError(str(error)) from error
        finally:
            console.close()

    # ---- what it will take

    def _measure_text(self, network: Backbone) -> tuple[float, float]:
        """Seconds and bytes of one prompt, from a group of them."""
        prompts = self.text[0].rows[:PROMPTS_AT_ONCE]
        # A GPU takes its time for the first call, and for no later one.
        encode_text(network, prompts[:1])
        begun = time.monotonic()
        condition = encode_text(network, prompts)
        seconds = (time.monotonic() - begun) / len(prompts)
        tensors = text_tensors(condition, trimmed=network.has_mask)
        return seconds, sum(t.numel() * t.element_size() for t in tensors.values()) / len(prompts)

    def _measure_picture(self, network: Backbone) -> tuple[float, float]:
        first = self.latents[0].rows[0][0]
        size = size_rule(self.config, network)
        for sample in self._read(first, first + 3):
            try:
                encode_sample(network, sample, size, self.plan.seed, self.device)
                begun = time.monotonic()
                latents = encode_sample(network, sample, size, self.plan.seed, self.device)
            except BrokenPictureError:
                continue
            return time.monotonic() - begun, latents.numel() * latents.element_size()
        return 0.0, self.plan.latent_bytes

    def _announce(self, seconds: float, size: float) -> None:
        """Says what is to come and refuses to begin what the disk cannot hold."""
        folder = self.plan.folder
        folder.mkdir(parents=True, exist_ok=True)
        found = self.processes.gather([seconds, size, len(self.missing)])
        size, seconds = sum(part[1] for part in found), max(part[0] for part in found)
        count = sum(part[2] for part in found)
        free = shutil.disk_usage(folder).free
        drawn = "; samples of the base come on top, and their time is said before they are drawn" if self.draws else ""
        self.say(
            f"encoding {count} shards into {folder}: about {size_text(size)} ({size_text(free)} are free there) and "
            f"{_minutes(seconds)}"
            + (f", by {self.processes.world} processes" if self.processes.world > 1 else "")
            + drawn
        )
        if size * RESERVE > free:
            raise SettingsError(
                f"cache_dir: {folder} has {size_text(free)} free, and the cache needs about {size_text(size)}; make "
                "space there, or write another cache_dir"
            )

    # ---- text

    def _encode_prompts(self, network: Backbone, shard: Shard) -> None:
        if shard.kind == EXTRA:
            parts = [encode_text(network, [prompt]) for prompt in shard.rows]
        else:
            # In the groups in which a run that encodes for itself encodes them: other groups give other roundings.
            parts = [
                encode_text(network, shard.rows[i : i + PROMPTS_AT_ONCE], negative=shard.kind == NEGATIVE)
                for i in range(0, len(shard.rows), PROMPTS_AT_ONCE)
            ]
        condition = Condition.cat(parts)
        tensors = text_tensors(condition, trimmed=network.has_mask)
        rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in shard.rows]
        if shard.kind == EXTRA:
            # A run that needs only some of them pads to the longest of those.
            for row, part in zip(rows, parts, strict=True):
                row["tokens"] = part.prompt_embeds.shape[1]
        files.write_shard(self.plan.folder, shard, tensors, rows, tokens=condition.prompt_embeds.shape[1])

    # ---- pictures

    def _encode_pictures(self, network: Backbone, shard: Shard) -> None:
        size = size_rule(self.config, network)
        first, last = shard.rows[0][0], shard.rows[-1][0]
        tensors: dict[str, Tensor] = {}
        rows, left_out = [], []
        for sample in self._read(first, last + 1):
            try:
                latents = encode_sample(network, sample, size, self.plan.seed, self.device)
            except BrokenPictureError:
                self.source.leave_out(BROKEN, sample.name)
                left_out.append(sample.name)
                continue
            tensors[f"latents.{sample.index}"] = latents
            rows.append(_row(sample.index, sample.name, sample.caption, latents))
        files.write_shard(self.plan.folder, shard, tensors, rows, left_out={BROKEN: left_out} if left_out else None)

    def _read(self, first: int, end: int) -> Iterator[Sample]:
        """Samples of the source from index ``first`` up to ``end``. One reading serves all shards, since what lies
        between them costs nothing unless it is opened, and a reading from the start may."""
        if self.reader is None or self.reader[0] > first:
            self.reader = (first, self.source.samples(first))
        samples = self.reader[1]
        for sample in samples:
            self.reader = (sample.index + 1, samples)
            if sample.index >= first:
                yield sample
            if sample.index >= end - 1:
                break

    # ---- samples of the base

    def _draw(self, console: Console, done: int) -> None:
        from apex_fast.training.base_samples import BaseSampler

        negative = None if self.plan.guidance is None else self.plan.guidance.negative_prompt
        table = Embeddings(self.plan.folder, self._records(), negative=negative)
        with during("loading the model"):
            network = load_backbone(self.config, [], load_text_encoders=False, load_vae=False)
        away = None if self.plan.guidance is None else table.negative()
        config = dataclasses.replace(self.config, seed=self.plan.seed)
        sampler = BaseSampler(config, network, self.plan.guidance, away, self.plan.size, self.device)
        count = sum(len(shard.rows) for shard in self.latents)
        caption = self.latents[0].rows[0][2]
        one = torch.tensor([1.0, 0.0], dtype=torch.float64)
        with during("drawing samples of the base"):
            sampler(table([caption]), 0, times=one)
            begun = time.monotonic()
            sampler(table([caption]), 0, times=one)
            steps = self.config.prompts_only.num_inference_steps
            seconds = (time.monotonic() - begun) * steps * count
            self.say(f"drawing {count} samples of the base in {steps} steps each: about {_minutes(seconds)}")
            console.begin(done)
            for shard in self.latents:
                tensors, rows = {}, []
                for index, name, prompt in shard.rows:
                    latents = sampler(table([prompt]), index)
                    if not latents.isfinite().all():
                        raise SettingsError(
                            f"prompts_only: the base's sample for {prompt!r} is not finite; write mixed_precision: "
                            "bf16 or no"
                        )
                    tensors[f"latents.{index}"] = latents
                    rows.append(_row(index, name, prompt, latents))
                    done += 1
                    console.step(done, f"samples of the base: {prompt[:40]}")
                files.write_shard(self.plan.folder, shard, tensors, rows)

    def _records(self) -> list[Record]:
        found = []
        for shard in self.plan.shards:
            if shard.kind != LATENTS:
                record = Record.read(self.plan.folder, shard.name)
                if record is None or record.key != shard.key:
                    raise CacheError(
                        f"cache_dir: {self.plan.folder / shard.name} is not there; do all processes see one folder?"
                    )
                found.append(record)
        return found


def _full(error: BaseException) -> bool:
    """Whether there is no space left. safetensors writes by itself and tells the reason in words."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"os error {number}" in str(error) for number in numbers)


def _row(index: int, name: str, caption: str, latents: Tensor) -> dict[str, Any]:
    return {"index": index, "name": name, "caption": caption, "shape": list(latents.shape)}


def text_tensors(condition: Condition, *, trimmed: bool) -> dict[str, Tensor]:
    """A condition as the tensors of a shard. trimmed: leave padding out, which the network never sees."""
    tensors: dict[str, Tensor] = {}
    mask = condition.prompt_embeds_mask
    for row, embeds in enumerate(condition.prompt_embeds):
        kept = len(embeds)
        if mask is not None:
            if trimmed:
                kept = int(mask[row].nonzero().max()) + 1 if bool(mask[row].any()) else 0
            tensors[f"mask.{row}"] = mask[row, :kept].clone()
        tensors[f"embeds.{row}"] = embeds[:kept].clone()
        if condition.pooled_prompt_embeds is not None:
            tensors[f"pooled.{row}"] = condition.pooled_prompt_embeds[row].clone()
    return tensors


def _finish(plan: Plan, source: Source, say: Callable[[str], None]) -> None:
    """Looks whether all is there, removes what is not needed any more, and writes the index."""
    from apex_fast.version import __version__

    records = []
    for shard in plan.shards:
        record = Record.read(plan.folder, shard.name)
        if record is None or record.key != shard.key or files.damage(plan.folder, record) is not None:
            raise CacheError(
                f"cache_dir: {plan.folder / shard.name} is not there or not whole; start again: {command_name()} cache "
                "goes on where it stopped"
            )
        records.append(record)
    left_out: dict[str, list[str]] = {}
    for record in records:
        for reason, names in record.left_out.items():
            left_out.setdefault(reason, []).extend(names)
    # One process knows only the broken pictures of its own shards.
    for reason, names in left_out.items():
        for name in names:
            if name not in source.left_out.get(reason, []):
                try:
                    source.leave_out(reason, name)
                except ValueError as error:
                    raise SettingsError(str(error)) from error
    samples = sum(len(record.rows) for record in records if record.name.startswith(LATENTS))
    if any(shard.kind == LATENTS for shard in plan.shards):
        try:
            source.check_left(samples)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    files.tidy(plan.folder, {shard.name for shard in plan.shards})
    size = sum(record.bytes for record in records)
    index = {
        "format": files.FORMAT,
        "made_by": __version__,
        "facts": plan.facts,
        "hash": digest(plan.facts),
        "seed": plan.seed,
        "samples": samples,
        "bytes": size,
        "left_out": dict(source.left_out),
        "shards": {
            record.name: {"key": record.key, "bytes": record.bytes, "sha256": record.sha256} for record in records
        },
    }
    files.write_json(plan.folder / files.INDEX, index)
    what = f"{samples} samples and " if samples else ""
    prompts = sum(len(shard.rows) for shard in plan.shards if shard.kind != LATENTS)
    say(f"{plan.folder} is whole: {what}{prompts} prompts, {size_text(size)}")
    for line in source.warnings():
        say(f"careful: {line}")


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
