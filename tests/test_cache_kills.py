"""A cache whose encoding is killed goes on where it was, and many processes write one together."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("peft")

from cache_cases import build, config_of, digests, keys, small_shards
from tiny_runs import make_pipeline, start_process

from apex_fast.caching import build as building
from apex_fast.caching import open_cache, shards, state_of
from apex_fast.caching.shards import CacheError


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("sana"), "sana")


def test_kill_9_in_the_middle_and_go_on(sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)
    whole = digests(build(config_of(sana, tmp_path / "whole")))
    assert len(whole) == 8 + 4 + 2
    run = tmp_path / "run"
    slow = (
        "import sys, time\n"
        "from apex_fast.caching import build as b, shards\n"
        "b.PICTURES_IN_A_SHARD, b.PROMPTS_IN_A_SHARD = 1, 2\n"
        "write = shards.write_shard\n"
        "def slowly(*args, **options):\n"
        "    time.sleep(0.25)\n"
        "    return write(*args, **options)\n"
        "shards.write_shard = slowly\n"
        "from apex_fast.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    process = start_process(["-c", slow, "cache", *keys(sana, run)])
    folder, deadline = tmp_path / "run.cache", time.monotonic() + 60
    while len(list(folder.glob("latents/*.json"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "index.json").exists() and state_of(config_of(sana, run))[0] == "unfinished"
    # What a kill in the middle of a file leaves:
    (folder / "latents" / ".00007.safetensors.partial-1").write_bytes(b"half")
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*.safetensors") if f.with_suffix(".json").is_file()}
    assert 3 + 6 <= len(before) < len(whole)
    with pytest.raises(CacheError, match="was not finished; go on with"):
        open_cache(dataclasses.replace(config_of(sana, run), cache_dir=str(folder)))
    said: list[str] = []
    building.build(config_of(sana, run), say=said.append)
    assert any(f"{len(before)} of 14 shards are there already" in line for line in said)
    assert all(f.stat().st_mtime_ns == written for f, written in before.items()), "whole shards are not written again"
    assert digests(folder) == whole
    assert not list(folder.rglob("*.partial*")) and state_of(config_of(sana, run))[0] == "whole"


def test_a_stop_at_every_rename(sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of five shards has eleven renames; some are the moment of a kill, two of them beside the index."""
    monkeypatch.setattr(building, "PICTURES_IN_A_SHARD", 4)
    whole = digests(build(config_of(sana, tmp_path / "whole")))
    rename, count = os.replace, 0
    config = config_of(sana, tmp_path / "run")
    for moment in (0, 1, 4, 9, 10):
        count = 0

        def killed(*args: object, moment: int = moment) -> None:
            nonlocal count
            if count == moment:
                raise KeyboardInterrupt
            count += 1
            rename(*args)

        shutil.rmtree(tmp_path / "run.cache", ignore_errors=True)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(shards.os, "replace", killed)
            build(config)
        assert state_of(config)[0] in ("none", "unfinished")
        assert digests(build(config)) == whole
    assert count == 10


def test_two_processes_write_one_cache(sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)
    whole = digests(build(config_of(sana, tmp_path / "whole")))
    program = tmp_path / "cache.py"
    program.write_text(
        "import os, sys\n"
        "from apex_fast.caching import build as b, shards\n"
        "b.PICTURES_IN_A_SHARD, b.PROMPTS_IN_A_SHARD = 1, 2\n"
        "write = shards.write_shard\n"
        "def noted(folder, shard, *args, **options):\n"
        "    (folder / f'{os.environ[\"RANK\"]}.txt').open('a').write(shard.name + '\\n')\n"
        "    return write(folder, shard, *args, **options)\n"
        "shards.write_shard = noted\n"
        "from apex_fast.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    process = start_process([*launch, "cache", *keys(sana, tmp_path / "run")])
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    folder = tmp_path / "run.cache"
    assert "by 2 processes" in error
    written = [(folder / f"{rank}.txt").read_text().split() for rank in (0, 1)]
    assert sorted(written[0] + written[1]) == sorted(name.removesuffix(".safetensors") for name in whole)
    assert all(int(name.split("/")[1]) % 2 == rank for rank in (0, 1) for name in written[rank])
    assert digests(folder) == whole
