"""A cache of embeddings and latents: equal to encoding in the run, whole after any kill, refused where it is stale."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("peft")

from cache_cases import build, config_of, digests, keys, small_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import losses, make_pipeline

from apex_fast.caching import build as building
from apex_fast.caching import cache_folder, reading, shards, state_of
from apex_fast.caching.identity import part_facts, parts_of, text_encoder_parameters
from apex_fast.caching.reading import open_run_data
from apex_fast.caching.shards import CacheError
from apex_fast.cli import main
from apex_fast.training.config import TrainConfig, load_config
from apex_fast.training.loop import Trainer
from apex_fast.training.processes import Processes
from apex_fast.training.settings import SettingsError

DRAWN = ("--validation_prompts", "a red cat", "--validation_steps", "2", "--validation_images_per_prompt", "1")


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("sana"), "sana")


# ---- the same as encoding in the run


@pytest.mark.parametrize("family", ["sana", "qwen_image", "flux"])
def test_a_run_from_the_cache_has_the_same_losses(family: str, sana: Path, tmp_path: Path) -> None:
    model = sana if family == "sana" else make_pipeline(tmp_path, family)
    more = ("--proportion_empty_prompts", "0.3", "--validation_prompts", "a dog on a hill", "--validation_steps", "2")
    Trainer(config_of(model, tmp_path / "plain", *more)).run()
    cached = config_of(model, tmp_path / "cached", *more)
    build(cached)
    trainer = Trainer(cached)
    assert not {"text_encoder", "tokenizer", "text_encoder_2"} & set(trainer.backbone.components)
    trainer.run()
    assert len(losses(tmp_path / "plain")) == 2
    assert losses(tmp_path / "plain") == losses(tmp_path / "cached")
    # what is drawn along the way is equal too: the VAE is there for that
    pictures = [next((tmp_path / run / "samples").glob("step-*.png")).read_bytes() for run in ("plain", "cached")]
    assert pictures[0] == pictures[1]


def test_pictures_of_several_sizes(sana: Path, tmp_path: Path) -> None:
    from PIL import Image

    shutil.copytree(sana.parent / "pictures", tmp_path / "pictures")
    for name in ("1.png", "4.png", "6.png"):
        Image.open(tmp_path / "pictures" / name).rotate(90, expand=True).save(tmp_path / "pictures" / name)
    more = ("--dataset_name", str(tmp_path / "pictures"), "--aspect_buckets", "true", "--resolution", "64")
    plain = Trainer(config_of(sana, tmp_path / "plain", *more))
    assert len(plain.batches.data.buckets) > 1
    plain.run()
    cached = config_of(sana, tmp_path / "cached", *more)
    build(cached)
    Trainer(cached).run()
    assert losses(tmp_path / "plain") == losses(tmp_path / "cached")
    other = (
        "--dataset_name",
        str(tmp_path / "pictures"),
        "--resolution",
        "64",
        "--cache_dir",
        str(cache_folder(cached)),
    )
    with pytest.raises(CacheError, match="the sizes of the buckets"):
        Trainer(config_of(sana, tmp_path / "other", *other))


def test_neither_text_encoders_nor_vae_have_to_be_there(
    sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "sana"
    shutil.copytree(sana, model)
    shutil.copytree(sana.parent / "pictures", tmp_path / "pictures")
    assert main(["cache", *keys(model, tmp_path / "run")]) == 0
    shutil.rmtree(model / "text_encoder")
    shutil.rmtree(model / "tokenizer")
    for file in (model / "vae").glob("*.safetensors"):
        file.unlink()
    shutil.rmtree(tmp_path / "pictures")
    capsys.readouterr()
    assert main(["train", *keys(model, tmp_path / "run")]) == 0
    text = capsys.readouterr().err
    assert "8 samples and 9 prompts from" in text and "text encoders and VAE are not loaded" in text
    assert "text_encoder not here, so what encoded the cache is not compared with it" in text
    assert "pictures is not there, so what was encoded of it is taken as it is" in text
    # without the cache the same run cannot begin
    with pytest.raises(FileNotFoundError):
        Trainer(config_of(model, tmp_path / "other"))


def test_what_a_shard_holds(sana: Path, tmp_path: Path) -> None:
    from apex_fast.backbones.base import Backbone

    config = config_of(sana, tmp_path / "run", *DRAWN, "--negative_prompt", "dark")
    folder = build(config)
    assert folder == tmp_path / "run.cache" == cache_folder(config)
    backbone = Backbone.from_pretrained(sana)
    with safe_open(folder / "text" / "00000.safetensors", "pt") as opened:
        record = json.loads((folder / "text" / "00000.json").read_text())
        expected = backbone.encode([row["prompt"] for row in record["rows"]])
        for row in range(len(record["rows"])):
            kept = int(expected.prompt_embeds_mask[row].sum())
            embeds = opened.get_tensor(f"embeds.{row}")
            assert embeds.shape[0] == kept < record["tokens"] == 300, "padding is not stored"
            assert torch.equal(embeds, expected.prompt_embeds[row, :kept])
    extra = json.loads((folder / "extra" / "00000.json").read_text())["rows"]
    assert [row["prompt"] for row in extra] == ["a red cat", ""]
    with safe_open(folder / "negative" / "00000.safetensors", "pt") as opened:
        negative = backbone.encode(["dark"], negative=True)
        kept = int(negative.prompt_embeds_mask.sum())
        assert torch.equal(opened.get_tensor("embeds.0"), negative.prompt_embeds[0, :kept])
    index = json.loads((folder / "index.json").read_text())
    assert index["samples"] == 8 and index["hash"] == shards.digest(index["facts"])
    parts = index["facts"]["text"]["parts"]
    assert parts["text_encoder"]["class"] == "Gemma2Model" and len(parts["text_encoder"]["weights"]) == 64
    assert index["facts"]["latents"]["size"] == [32, 32] and index["facts"]["text"]["dtype"] == "fp32"
    assert not any(f.suffix in (".pt", ".pkl", ".bin") for f in folder.rglob("*"))


# ---- broken pictures


def test_a_broken_picture_is_left_out_and_named(
    sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch)
    shutil.copytree(sana.parent / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture")
    data = ("--dataset_name", str(tmp_path / "pictures"))
    Trainer(config_of(sana, tmp_path / "plain", *data)).run()
    words = keys(sana, tmp_path / "cached", *data)
    assert main(["cache", *words]) == 0
    assert "1 left out, not a picture that can be read: 3.png" in capsys.readouterr().err
    assert main(["train", *words]) == 0
    assert "1 left out, not a picture that can be read: 3.png" in capsys.readouterr().err
    assert losses(tmp_path / "plain") == losses(tmp_path / "cached")
    (tmp_path / "pictures" / "4.png").write_bytes(b"no picture either")
    shutil.rmtree(tmp_path / "cached.cache")
    assert main(["cache", *words, "--max_bad_share", "0.1"]) != 0
    assert "2 of 8" in capsys.readouterr().err
    assert state_of(load_config(None, words))[0] == "unfinished"


# ---- stale, foreign, damaged


def changed_weights(file: Path) -> None:
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def cached(sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    shutil.copytree(sana, folder / "sana")
    shutil.copytree(sana.parent / "pictures", folder / "pictures")
    build(config_of(folder / "sana", folder / "run"))
    return folder


def test_a_cache_of_something_else_is_refused_and_what_differs_is_named(cached: Path, tmp_path: Path) -> None:
    model, run = cached / "sana", cached / "run"
    assert state_of(config_of(model, run))[0] == "whole"
    for more, named in (
        (("--resolution", "64"), r"the size of the pictures \(resolution\) \(32x32 in the cache, 64x64 in the run\)"),
        (("--weight_dtype", "bf16"), r'the precision of the text encoders \(weight_dtype\) \("fp32" in the cache'),
        (("--max_sequence_length", "200"), r"max_sequence_length \(300 in the cache, 200 in the run\)"),
        (("--negative_prompt", "ugly"), 'does not hold the prompts "ugly"'),
        (("--validation_prompts", "a horse", "--validation_steps", "2"), 'does not hold the prompts "a horse"'),
    ):
        with pytest.raises(CacheError, match=named):
            Trainer(config_of(model, run, *more))
    # another model, other weights, other data: on copies
    folder = tmp_path / "copy"
    shutil.copytree(cached, folder)
    model, run = folder / "sana", folder / "run"
    Trainer(config_of(model, run))
    for part, named in (("text_encoder", "the weights of the text encoder"), ("vae", "the weights of the vae")):
        (file,) = (model / part).glob("*.safetensors")
        kept = file.read_bytes()
        changed_weights(file)
        with pytest.raises(CacheError, match=f"was made for something else: {named}. To encode anew"):
            Trainer(config_of(model, run))
        file.write_bytes(kept)
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    (model / "text_encoder" / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0, "hidden_act": "relu"}))
    with pytest.raises(CacheError, match="the configuration of the text encoder"):
        Trainer(config_of(model, run))
    (model / "text_encoder" / "config.json").write_text(json.dumps(config))
    metadata = folder / "pictures" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a red circle on white", "a red disc on white"))
    with pytest.raises(CacheError, match="the captions of the data"):
        Trainer(config_of(model, run))
    state, line = state_of(config_of(model, run))
    assert state == "stale" and "the captions of the data" in line
    # the command does not throw away hours of work without being told to, and then encodes what differs alone
    before = digests(folder / "run.cache")
    with pytest.raises(CacheError, match="--overwrite"):
        build(config_of(model, run))
    assert digests(folder / "run.cache") == before
    build(config_of(model, run), overwrite=True)
    after = digests(folder / "run.cache")
    assert {name for name in before if after[name] != before[name]} == {
        "text/00000.safetensors",
        "latents/00000.safetensors",
    }
    Trainer(config_of(model, run))


def test_a_prompt_more_is_added_and_the_rest_stays(cached: Path, tmp_path: Path) -> None:
    shutil.copytree(cached, tmp_path / "copy")
    model, run = tmp_path / "copy" / "sana", tmp_path / "copy" / "run"
    folder = tmp_path / "copy" / "run.cache"

    def written() -> dict[str, int]:
        return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*.safetensors")}

    def asking(prompt: str, negative: str) -> TrainConfig:
        drawn = ("--validation_prompts", prompt, "--validation_steps", "2", "--validation_images_per_prompt", "1")
        return config_of(model, run, *drawn, "--negative_prompt", negative)

    first, second = asking("a red fox", "dark"), asking("a blue fox", "dull")
    for number, config in enumerate((first, second), start=1):
        before = written()
        build(config)
        now = written()
        assert {name: now[name] for name in before} == before, "nothing that was there is written again, or removed"
        added = {f"extra/{number:05d}.safetensors", f"negative/{number:05d}.safetensors"}
        assert set(now) - set(before) == added
    for config, prompt, other in ((first, "a red fox", "a blue fox"), (second, "a blue fox", "a red fox")):
        table = Trainer(config).batches.table
        assert table.holds([prompt, ""]) and not table.holds([other])
        assert table.negative_prompt == config.negative_prompt
    before = written()
    build(first)
    assert written() == before


def test_prompts_of_another_run_do_not_change_the_padding(tmp_path: Path) -> None:
    """Qwen-Image pads to the longest prompt of the run, not to the longest that the cache has."""
    model = make_pipeline(tmp_path, "qwen_image")
    drawn = ("--validation_steps", "2", "--validation_images_per_prompt", "1")
    short = config_of(model, tmp_path / "run", *drawn, "--validation_prompts", "a cat")
    build(short)
    before = Trainer(short).batches.table.tokens
    long = config_of(model, tmp_path / "run", *drawn, "--validation_prompts", "a cat on a hill " * 8)
    build(long)
    assert Trainer(long).batches.table.tokens > before == Trainer(short).batches.table.tokens


def test_damage_is_found(cached: Path, tmp_path: Path) -> None:
    shutil.copytree(cached, tmp_path / "copy")
    model, run = tmp_path / "copy" / "sana", tmp_path / "copy" / "run"
    folder, config = tmp_path / "copy" / "run.cache", config_of(model, run)
    whole = digests(folder)
    file = folder / "latents" / "00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    state, line = state_of(config)
    assert state == "damaged" and "its SHA-256 differs" in line
    with pytest.raises(CacheError, match="is damaged: .*latents/00000.safetensors is not what was written"):
        Trainer(config).batches.data.images(torch.arange(2))
    build(config)
    assert state_of(config) == ("whole", f"{folder}: 8 samples, 0.0 MiB; the checksums of its shards are right")
    assert digests(folder) == whole, "a flipped bit is found by the checksum, and the shard encoded anew"
    file.write_bytes(content[:-100])
    with pytest.raises(CacheError, match="is damaged: .*00000.safetensors has .* bytes instead of"):
        Trainer(config)
    assert state_of(config)[0] == "damaged"
    (folder / "index.json").write_text("{")
    with pytest.raises(CacheError, match="cannot be read"):
        Trainer(config)


def test_of_a_large_cache_the_state_says_that_sizes_alone_were_compared(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHECKED_BYTES", 100)
    monkeypatch.setattr(shards, "_sha256", lambda file: pytest.fail("a large file is read"))
    state, line = state_of(config_of(cached / "sana", cached / "run"))
    assert state == "whole" and "only the sizes were compared" in line


def test_a_cache_that_is_encoded_anew_under_a_run_is_noticed(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of rows are numbers: another encoding has the same ones."""
    shutil.copytree(cached, tmp_path / "copy")
    small_shards(monkeypatch)
    monkeypatch.setattr(reading, "OPEN_SHARDS", 1)
    config = config_of(tmp_path / "copy" / "sana", tmp_path / "copy" / "run")
    folder = build(config, overwrite=True)
    records = reading.Cache(folder, shards.read_index(folder), config).of("text")
    table, later = reading.Embeddings(folder, records), reading.Embeddings(folder, records)
    prompts = [row["prompt"] for record in records for row in record.rows]
    before = table(prompts[:1]).prompt_embeds
    table(prompts[-1:])  # which closes the first shard
    assert torch.equal(table(prompts[:1]).prompt_embeds, before)
    table(prompts[-1:])
    (file,) = (tmp_path / "copy" / "sana" / "text_encoder").glob("*.safetensors")
    changed_weights(file)
    build(config, overwrite=True)
    for reader in (table, later):
        with pytest.raises(CacheError, match="00000.safetensors was encoded anew while this run reads it; resume"):
            reader(prompts[:1])


def test_a_named_cache_that_is_not_there_is_an_error(sana: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="there is no cache in .*nowhere; make it with"):
        Trainer(config_of(sana, tmp_path / "run", "--cache_dir", str(tmp_path / "nowhere")))


def test_nothing_to_encode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--output_dir", str(tmp_path / "run"), "--pretrained_model_name_or_path", "digits_start"]
    assert main(["cache", *words]) == 2
    assert "digits ships as what the network takes" in capsys.readouterr().err


# ---- space, many processes


def test_space_is_looked_at_before_and_a_full_disk_is_told(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(sana, tmp_path / "run")
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patched.setattr(building.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(SettingsError, match="has 0.0 MiB free, and the cache needs about"):
            build(config)
    assert not list((tmp_path / "run.cache").rglob("*.safetensors"))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", full)
        with pytest.raises(SettingsError, match="is full .*what is whole is kept"):
            build(config)
    build(config)


def test_a_full_disk_is_known_by_what_safetensors_says() -> None:
    from safetensors import SafetensorError

    assert building._full(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert not building._full(SafetensorError("I/O error: Permission denied (os error 13)"))
    assert not building._full(OSError(errno.EACCES, "Permission denied"))


class Alone(Processes):
    """The first of several processes, of which the others say the same."""

    def gather(self, value: object) -> list[object]:
        return [value] * self.world


def test_a_large_text_encoder_on_every_gpu_asks_for_the_cache(sana: Path, tmp_path: Path) -> None:
    config = config_of(sana, tmp_path / "run")
    count = text_encoder_parameters(parts_of(config))
    from transformers import AutoModel

    assert count == sum(p.numel() for p in AutoModel.from_pretrained(sana / "text_encoder").parameters())
    two = Alone(rank=0, world=2)
    open_run_data(config, two, print)
    small = dataclasses.replace(config, max_uncached_text_parameters=count - 1)
    with pytest.raises(SettingsError, match="each of 2 processes .* cache CONFIG"):
        open_run_data(small, two, print)
    assert open_run_data(small, Processes(), print)[1] is None, "one process may"
    open_run_data(dataclasses.replace(small, max_uncached_text_parameters=None), two, print)
    build(small)
    assert open_run_data(small, two, print)[1] is not None


def test_a_large_text_encoder_that_was_not_on_the_disk_is_counted_when_it_is_loaded(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apex_fast.backbones.base import Backbone
    from apex_fast.training.encoding import encode_data, open_data

    config = config_of(sana, tmp_path / "run")
    small = dataclasses.replace(config, max_uncached_text_parameters=text_encoder_parameters(parts_of(config)) - 1)
    elsewhere = dataclasses.replace(parts_of(config), folder=None)
    monkeypatch.setattr(reading, "parts_of", lambda config: elsewhere)
    source, cache = open_run_data(small, Alone(rank=0, world=2), print)
    assert cache is None, "nobody knows yet how large it is"
    backbone = Backbone.from_pretrained(sana)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(SettingsError, match="each of 2 processes .* cache CONFIG"):
        encode_data(small, backbone, source, torch.device("cpu"), None, print)
    assert backbone.components["text_encoder"] is not None
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert encode_data(small, backbone, open_data(small), torch.device("cpu"), None, print).table is not None


def test_a_cache_that_is_not_compared_with_the_model_says_so(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(cached / "sana", cached / "run")
    assert reading.open_cache(config).notes == []
    elsewhere = dataclasses.replace(parts_of(config), folder=None)
    monkeypatch.setattr(reading, "parts_of", lambda config: elsewhere)
    (note,) = reading.open_cache(config).notes
    assert "sana is not on this machine, so what encoded the cache is not compared with it" in note


def test_the_main_process_says_whether_there_is_a_cache(cached: Path, tmp_path: Path) -> None:
    class Second(Processes):
        """The second of two; ``told`` is what the main one finds."""

        told: object = None

        def gather(self, value: object) -> list[object]:
            return [[self.told, None], value]

    second = Second(rank=1, world=2)
    # The main process sees none, and all encode for themselves.
    second.told = [False, False]
    source, cache = open_run_data(config_of(cached / "sana", cached / "run"), second, print)
    assert source is not None and cache is None
    # It sees one that is not to be seen here.
    second.told = [True, False]
    with pytest.raises(CacheError, match="process 1 does not see the cache in .*; write a cache_dir that all of them"):
        open_run_data(config_of(cached / "sana", tmp_path / "run"), second, print)


def test_parts_are_known_by_their_files(sana: Path, tmp_path: Path) -> None:
    """A variant beside the weights is not a part of them, and names of libraries' versions say nothing."""
    shutil.copytree(sana, tmp_path / "sana")
    parts = parts_of(config_of(tmp_path / "sana", tmp_path / "run"))
    before = part_facts(parts, "text_encoder")
    (file,) = (tmp_path / "sana" / "text_encoder").glob("*.safetensors")
    save_file(load_file(file), file.with_name("model.fp16.safetensors"))
    config = tmp_path / "sana" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_version": "0.0"}))
    assert part_facts(parts, "text_encoder") == before
    assert part_facts(parts, "tokenizer") is not None and part_facts(parts, "image_encoder") is None
    assert part_facts(dataclasses.replace(parts, variant="fp16"), "text_encoder") == before
    changed_weights(file.with_name("model.fp16.safetensors"))
    assert part_facts(dataclasses.replace(parts, variant="fp16"), "text_encoder") != before
    assert part_facts(parts, "text_encoder") == before
