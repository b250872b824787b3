"""The models that ship, by name, and how a run becomes one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")

from tiny_runs import make_pipeline

from apex_fast import shipped
from apex_fast.shipped import LARGEST, SHIPPED_MODELS, is_shipped, ship, shipped_folder
from apex_fast.training.models import load_generator, pretrained_folder
from apex_fast.training.results import Record


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_what_ships_is_there_small_and_draws(name: str) -> None:
    folder = shipped_folder(name)
    assert pretrained_folder(name) == folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}, "no pickle"
    assert sum(path.stat().st_size for path in files) <= LARGEST
    assert f"# {name}\n" in (folder / "README.md").read_text(encoding="utf-8")
    network, phrase = load_generator(name)
    assert phrase == SHIPPED_MODELS[name].phrase
    assert next(network.parameters()).dtype == torch.float32, "stored in half is computed with in fp32"
    x = torch.randn(1, *network.sample_shape)
    with torch.no_grad():
        assert network(x, torch.ones(1), network.encode(["a circle"])).isfinite().all()


def test_a_folder_of_the_same_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_shipped("digits_start")
    (tmp_path / "digits_start").mkdir()
    assert not is_shipped("digits_start")
    with pytest.raises(FileNotFoundError, match=r"digits_start holds no model .*or one that ships: digits_start"):
        pretrained_folder("digits_start")


def test_one_that_the_installation_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="the start that ships, digits_start, is not in this installation"):
        load_generator("digits_start")


def test_a_run_becomes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ship("digits_start", tmp_path / "half")
    assert 0.4 < size / sum(f.stat().st_size for f in shipped_folder("digits_start").rglob("*") if f.is_file()) < 0.6
    made, _ = load_generator(tmp_path / "half")
    whole, _ = load_generator("digits_start")
    for (name, ours), theirs in zip(made.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float()), name
    with pytest.raises(ValueError, match="is there already; move it away"):
        ship("digits_start", tmp_path / "half")
    monkeypatch.setattr(shipped, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"takes 1\.6 MB in bf16, and at most 0 may ship"):
        ship("digits_start", tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_what_would_not_be_complete_does_not_ship(tmp_path: Path) -> None:
    pipeline = make_pipeline(tmp_path, "sana")
    with pytest.raises(ValueError, match="a whole model with its own text encoder is expected, or a LoRA"):
        ship(pipeline, tmp_path / "no")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"")
    Record("sana", "lora", base=str(pipeline)).write(lora)
    with pytest.raises(ValueError, match="whose base is one of digits_start"):
        ship(lora, tmp_path / "no")
    assert not (tmp_path / "no").exists()
