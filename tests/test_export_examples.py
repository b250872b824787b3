"""Every example config from training to a picture of the stock pipeline: ``train --smoke``, ``export``, the card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from backbone_cases import assert_close
from export_cases import code_of, own_latents, run_card

from apex_fast.cli import main
from apex_fast.export.command import main as export
from apex_fast.starting import EXAMPLES
from apex_fast.training.models import load_generator
from apex_fast.training.results import Record
from apex_fast.training.smoke import CAPTIONS

ROOT = Path(__file__).parent.parent
SIZE = (32, 32)


def test_these_are_all_configs_for_stock_pipelines() -> None:
    """The digits and the shapes have a text encoder of their own, and no stock pipeline."""
    configs = {path.stem for path in (ROOT / "examples").glob("*.yaml")}
    assert configs - set(EXAMPLES) == {name for name in configs if name.startswith(("digits", "shapes"))}


@pytest.mark.parametrize("name", EXAMPLES)
def test_from_training_to_the_stock_pipeline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "examples" / f"{name}.yaml")
    assert main(["train", config, "--smoke", "--device", "cpu", "--output_dir", "smoke"]) == 0
    run = Path("smoke/run")
    capsys.readouterr()
    family, mode, _ = EXAMPLES[name]
    backbone = load_generator(run)[0]
    record = Record.read(run / "model")
    assert record is not None and (record.family, record.mode) == (family, mode)
    # What was trained alone, a LoRA or a transformer, and a fully tuned model as a whole pipeline too.
    for merge in (False, True) if mode == "full" else (False,):
        assert export([str(run), *(["--merge"] if merge else [])]) == 0
        folder = Path(capsys.readouterr().out.strip())
        assert folder == run / "export" / ("diffusers-merged" if merge else "diffusers")
        assert (folder / "model_index.json").is_file() == merge
        assert (folder / "transformer" / "config.json").is_file() == (mode == "full")
        card = folder / "README.md"
        alone = [backbone.transformer_class] if mode == "full" and not merge else []
        loaded = [*alone, backbone.pipeline_class, "FlowMatchEulerDiscreteScheduler"]
        assert re.findall(r"(\w+)\.from_pretrained\(", code_of(card)) == loaded
        latents, image = run_card(card, folder=str(folder), prompt=CAPTIONS[0], steps=1)
        assert image.size == SIZE and latents.isfinite().all()
        expected, _ = own_latents(backbone, CAPTIONS[0], SIZE)
        if record.weight_dtype == "fp32":
            assert_close(latents, expected, 2e-4)
        else:
            # The card computes in the dtype of the base, with the adapter in it too; the run has its adapter in fp32.
            difference = (latents.float() - expected.float()).norm() / expected.float().norm()
            assert difference < 0.03, difference
