"""Real runs from every kind of source, with the same pictures in all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import Image, served, write_tar
from tiny_runs import losses, make_pipeline, pipeline_keys

from apex_fast.cli import main
from apex_fast.data.folder import PictureFolder
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("sana"), "sana")


def members(pictures: Path) -> dict[str, bytes]:
    """The pictures of a folder as members of a shard, in the folder's order."""
    folder = PictureFolder.open(pictures)
    found: dict[str, bytes] = {}
    for file, caption in zip(folder.files, folder.captions, strict=True):
        found[file.name] = file.read_bytes()
        found[f"{file.stem}.txt"] = caption.encode()
    return found


def trained(sana: Path, run: Path, *more: str) -> list:
    assert main(["train", *pipeline_keys(sana, run, *more)]) == 0
    assert (run / "model" / "apex_fast.json").is_file()
    return losses(run)


@pytest.fixture(scope="module")
def from_folder(sana: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    return trained(sana, tmp_path_factory.mktemp("folder") / "run")


def test_shards_train_as_their_folder_does(sana: Path, from_folder: list, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    every = members(sana.parent / "pictures")
    first = dict(list(every.items())[:6])
    write_tar(tmp_path / "a-00.tar", first)
    write_tar(tmp_path / "a-01.tar", {name: data for name, data in every.items() if name not in first})
    assert trained(sana, tmp_path / "run", "dataset_name", str(tmp_path / "a-{00..01}.tar")) == from_folder
    with served(tmp_path) as (url, server):
        assert trained(sana, tmp_path / "url", "dataset_name", f"{url}/a-{{00..01}}.tar") == from_folder
        assert server.asked == ["/a-00.tar", "/a-01.tar"] * 2, "once for the listing, once for the pictures"


def test_tables_train_as_their_folder_does(
    sana: Path, from_folder: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets: Any = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = PictureFolder.open(sana.parent / "pictures")
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in folder.files],
        "text": folder.captions,
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        assert trained(sana, tmp_path / f"run-{name}", "dataset_name", str(tmp_path / name)) == from_folder


def test_a_run_says_what_it_leaves_out_and_stops_when_it_is_too_much(
    sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("webdataset")
    found = members(sana.parent / "pictures")
    pictures = [name for name in found if name.endswith(".png")]
    found[pictures[2]] = found[pictures[2]][:50]
    path = str(write_tar(tmp_path / "a.tar", found))
    trained(sana, tmp_path / "run", "dataset_name", path)
    name = Path(pictures[2]).stem
    assert f"careful: 1 left out, not a picture that can be read: a.tar: {name}" in capsys.readouterr().err
    found[pictures[5]] = b""
    write_tar(tmp_path / "a.tar", found)
    assert main(["train", *pipeline_keys(sana, tmp_path / "other", "dataset_name", path)]) == 2
    error = capsys.readouterr().err
    assert "dataset_name: 2 of 8 in" in error and "max_bad_share (0.05) allows 1" in error and pictures[5][:-4] in error


def test_a_source_that_runs_a_command_is_refused(
    sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = pipeline_keys(sana, tmp_path / "run", "dataset_name", f"pipe:touch {tmp_path / 'ran'}")
    assert main(["train", *words]) == 2
    assert "pipe: sources are refused: they run a command" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


# ---- buckets


@pytest.fixture
def ratios(sana: Path, tmp_path: Path) -> Path:
    """The pictures of the pipeline, three of them lying and two upright."""
    folder = tmp_path / "ratios"
    shutil.copytree(sana.parent / "pictures", folder)
    for number, file in enumerate(sorted(folder.glob("*.png"))):
        size = (96, 48) if number < 3 else (40, 80) if number < 5 else (64, 64)
        Image.open(file).convert("RGB").resize(size).save(file)
    return folder


BUCKETS = ("resolution", "64", "aspect_buckets", "true", "aspect_bucket_step", "16")


def test_buckets_train_in_batches_of_one_size(sana: Path, ratios: Path, tmp_path: Path) -> None:
    keys = (*BUCKETS, "dataset_name", str(ratios), "train_batch_size", "1", "max_train_steps", "16")
    seen: list[tuple[int, ...]] = []
    config = load_config(None, pipeline_keys(sana, tmp_path / "run", *keys))
    trainer = Trainer(config)
    scale = trainer.backbone.vae_scale_factor
    take = trainer.batches.next

    def recorded() -> Any:
        images, condition = take()
        seen.append(tuple(images.shape[2:]))
        return images, condition

    trainer.batches.next = recorded  # type: ignore[method-assign]
    trainer.run()
    sizes = [(height * scale, width * scale) for height, width in seen]
    for epoch in (sizes[:8], sizes[8:]):
        assert sorted(epoch) == [(48, 80)] * 3 + [(64, 64)] * 3 + [(80, 48)] * 2
    assert sizes[:8] != sizes[8:]


def test_two_processes_see_what_one_does(sana: Path, ratios: Path, tmp_path: Path) -> None:
    """Buckets, captions that are dropped, and the draws of a real run: a batch of two, and two batches of one."""
    keys = (*BUCKETS, "dataset_name", str(ratios), "proportion_empty_prompts", "0.3", "max_train_steps", "5")
    words = pipeline_keys(sana, tmp_path / "two", *keys, "train_batch_size", "1")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "apex_fast.cli"]
        + ["train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = trained(sana, tmp_path / "one", *keys, "train_batch_size", "2")
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "two")), torch.tensor(alone), rtol=1e-3, atol=1e-5)


def test_a_run_with_buckets_goes_on_exactly(sana: Path, ratios: Path, tmp_path: Path) -> None:
    keys = (*BUCKETS, "dataset_name", str(ratios), "train_batch_size", "2", "max_train_steps", "9")
    expected = trained(sana, tmp_path / "whole", *keys)
    run = tmp_path / "stopped"
    trainer = Trainer(load_config(None, pipeline_keys(sana, run, *keys)))
    assert len(trainer.batches.data.buckets) == 3
    trainer.run(until=5)
    assert trained(sana, run, *keys, "resume_from_checkpoint", "latest") == expected
