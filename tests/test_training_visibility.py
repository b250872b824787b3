"""A run asks the probe once before its first step, and refuses a shift that its network does not see."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("peft")

from tiny_runs import keys, losses, make_pipeline, make_start, pipeline_keys

from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer
from apex_fast.training.settings import SettingsError

UNSEEN = ("--shift.scale", "0.5", "--shift.bias", "0")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipeline"), "qwen_image")


def test_a_scale_that_a_norm_cancels_is_refused_before_anything_is_deleted(qwen: Path, tmp_path: Path) -> None:
    words = pipeline_keys(qwen, tmp_path / "run", "--rank", "4")
    Trainer(load_config(None, words)).run()
    kept = sorted(p.name for p in (tmp_path / "run").iterdir())
    words = pipeline_keys(qwen, tmp_path / "run", "--rank", "4", "--overwrite_output_dir", "true", *UNSEEN)
    with pytest.raises(SettingsError, match="invisible to this network.*shift.scale -1.*probe: false"):
        Trainer(load_config(None, words))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == kept


def test_the_line_is_said_once_and_a_control_can_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = make_start(tmp_path / "start")
    more = ("--checkpointing_steps", "2")
    Trainer(load_config(None, keys(start, tmp_path / "whole", *more))).run()
    assert capsys.readouterr().err.count("probe: ") == 1
    Trainer(load_config(None, keys(start, tmp_path / "silent", *more, "--probe", "false"))).run()
    assert "probe: " not in capsys.readouterr().err
    assert losses(tmp_path / "whole") == losses(tmp_path / "silent"), "looking changes no number"
    none = ("--shift.scale", "1", "--shift.bias", "0")
    with pytest.raises(SettingsError, match="invisible"):
        Trainer(load_config(None, keys(start, tmp_path / "none", *none)))
    assert Trainer(load_config(None, keys(start, tmp_path / "none", *none, "--probe", "false"))).run().finished


def test_a_trained_shift_that_starts_invisible_is_said_and_not_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = make_start(tmp_path / "start")
    none = ("--shift.scale", "1", "--shift.bias", "0", "--shift.trainable", "true")
    assert Trainer(load_config(None, keys(start, tmp_path / "run", *none))).run().finished
    assert "the shift is invisible as it starts" in capsys.readouterr().err


def test_the_paper_loss_is_probed_where_it_mixes_the_shifted_velocity_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = make_start(tmp_path / "start")
    none = ("--loss", "paper", "--shift.scale", "1", "--shift.bias", "0")
    with pytest.raises(SettingsError, match="invisible"):
        Trainer(load_config(None, keys(start, tmp_path / "run", *none)))
    unmixed = ("--objective.mix_weight", "0")
    Trainer(load_config(None, keys(start, tmp_path / "run", *none, *unmixed)))
    assert capsys.readouterr().err.count("probe: ") == 1
