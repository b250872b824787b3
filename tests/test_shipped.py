"""The models that ship, by name, and how a run becomes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")

from tiny_runs import make_pipeline

from apex_fast import shipped
from apex_fast.cli import main
from apex_fast.generate import open_generator
from apex_fast.planning.blueprint import PlanError, blueprint
from apex_fast.shipped import (
    LARGEST,
    SHIPPED_MODELS,
    ShippedModel,
    is_shipped,
    local_folder,
    ship,
    shipped_folder,
    typed,
)
from apex_fast.training.config import TrainConfig
from apex_fast.training.loop import Trainer
from apex_fast.training.models import load_generator, pretrained_folder, start_lora_file
from apex_fast.training.results import Record


@pytest.mark.parametrize("name", ["digits_start", "demo"])
def test_a_folder_of_the_same_name_is_typed_so_that_it_is_meant(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    assert typed(Path(name)) == f"./{name}" and typed(folder) == str(folder) and typed("a b") == "'a b'"
    assert local_folder(f"./{name}") == Path(name)
    assert (local_folder(name) is None) == is_shipped(name)


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


def test_a_base_for_a_whole_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="digits_start is a whole model of its own, with no base .elsewhere.; leave"):
        open_generator("digits_start", base="elsewhere")
    assert main(["probe", "digits_start", "--base", "elsewhere"]) != 0
    assert capsys.readouterr().err.endswith("with no base (elsewhere); leave --base out\n")


def test_the_name_means_the_same_wherever_a_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a LoRA holds it, and another model under the adapter would draw noise."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_start").mkdir()
    assert pretrained_folder("digits_start") == shipped_folder("digits_start")
    assert not is_shipped(tmp_path / "digits_start") and not is_shipped("./digits_start")
    with pytest.raises(FileNotFoundError, match=r"\./digits_start holds no model .*or one that ships: digits_start"):
        pretrained_folder("./digits_start")
    for read in (load_generator, blueprint):
        assert read("digits_start")
        with pytest.raises((FileNotFoundError, PlanError)):
            read("./digits_start")


def trainer_of(output_dir: Path, **more: Any) -> Trainer:
    words = {"pretrained_model_name_or_path": "digits_start", "dataset_name": "digits", "device": "cpu"}
    return Trainer(TrainConfig(output_dir=str(output_dir), train_batch_size=4, **words, **more))


def test_a_lora_on_one_keeps_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere" / "digits_start").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    trainer_of(tmp_path / "run", rank=4, max_train_steps=2).run()
    assert Record.read(tmp_path / "run" / "model").base == "digits_start"
    network, _ = load_generator(tmp_path / "run")
    size = ship(tmp_path / "run", tmp_path / "shipped" / "one_step")
    assert size < 200_000 and sorted(path.name for path in (tmp_path / "shipped").iterdir()) == ["one_step"]
    assert not (tmp_path / "shipped" / "one_step" / "manifest.json").exists(), "it has the sums of other files"
    half, _ = load_generator(tmp_path / "shipped" / "one_step")
    for (name, ours), theirs in zip(half.named_parameters(), network.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float() if "lora" in name else theirs), name
    # What ships is a model and a LoRA wherever one is asked for.
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "shipped")
    monkeypatch.setitem(SHIPPED_MODELS, "one_step", ShippedModel("the one-step LoRA", "-"))
    assert start_lora_file("one_step").parent == tmp_path / "shipped" / "one_step"
    with pytest.raises(ValueError, match=r"one_step holds a LoRA; .*start_lora: one_step"):
        pretrained_folder("one_step")


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


def test_an_unfinished_run_does_not_ship(tmp_path: Path) -> None:
    """Its checkpoint has the weights as they are trained, and what draws are their averages."""
    trainer_of(tmp_path / "run", max_train_steps=9).run(until=2)
    with pytest.raises(ValueError, match="has not finished: only .*checkpoint-2 is there"):
        ship(tmp_path / "run", tmp_path / "no")


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
    Record("sana", "lora", base="digits_start", start_lora="/somewhere").write(lora)
    with pytest.raises(ValueError, match="on top of the LoRA /somewhere, which is not in the package"):
        ship(lora, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert shipped.main([str(tmp_path / "nowhere"), "digits_start"]) == 2
