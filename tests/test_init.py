"""``apex-fast init``: configs that load, say where their values come from, and never replace a file."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("yaml")

from apex_fast.backbones.loading import FAMILIES, backbone_class
from apex_fast.cli import main
from apex_fast.starting import DEFAULT_MODELS, EXAMPLES, starting_config
from apex_fast.training.config import load_config

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_init_writes(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    family, mode, model = EXAMPLES[name]
    monkeypatch.chdir(tmp_path)
    path = f"examples/{name}.yaml"
    assert main(["init", family, "--mode", mode, "--model", model, "-o", path]) == 0
    assert Path(path).read_text() == (ROOT / path).read_text(), (
        f"{path} is not what init writes; write it anew with starting_config"
    )


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_a_config_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, mode: str
) -> None:
    path = tmp_path / "my run.yaml"
    assert main(["init", family, "--mode", mode, "-o", str(path)]) == 0
    said = capsys.readouterr().out
    place = f"'{path}'"
    for command in (f"plan {place}", f"train {place} --smoke", f"train {place}\n"):
        assert f"apex-fast {command}" in said
    config = load_config(path)
    assert (config.family, config.mode, config.output_dir) == (family, mode, "runs/my run")
    assert config.pretrained_model_name_or_path == DEFAULT_MODELS[family]
    # what the paper gives: rank, batch, weights and shift in its good range
    assert config.train_batch_size * config.gradient_accumulation_steps == 64
    assert -1.0 <= config.shift.scale <= -0.5 and 0.1 <= config.shift.bias <= 1.0
    assert config.max_train_steps == (2000 if mode == "lora" else 10000)
    assert config.rank == (64 if mode == "lora" else None)
    assert config.mixed_precision == "bf16"
    text = path.read_text()
    assert "open" in text and "paper" in text
    assert all(len(line) <= 120 for line in text.splitlines() if str(path) not in line)
    # every key that the text sets is one that does something in this mode
    assert ("rank:" in text) == ("lora_alpha:" in text) == ("quantization:" in text) == (mode == "lora")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_guidance_in_the_comment_is_the_familys(family: str) -> None:
    teacher = backbone_class(family).teacher_guidance
    text = starting_config(family, "lora")
    line = next(line for line in text.splitlines() if line.startswith("guidance_scale:"))
    if family == "qwen_image":
        assert line == "guidance_scale: 4.0" and 'negative_prompt: " "' in text
    elif teacher.embedded is not None:
        assert "not guided" in line and f"embedded_guidance_scale: {teacher.embedded}" in text
    else:
        assert f'null: {teacher.scale:g} away from "{teacher.negative_prompt}"' in line


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    assert main(["init", "sana", "--mode", "lora", "--output", str(path)]) == 2
    error = capsys.readouterr().err
    assert "exists already" in error and len(error.splitlines()) == 1 and path.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sdxl", "--mode", "lora"], "no such family: sdxl; expected one of sana, qwen_image, flux"),
        (
            ["sana", "--mode", "lora", "--model", "Qwen/Qwen-Image"],
            "Qwen/Qwen-Image is of the family qwen_image, not sana",
        ),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", *words]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    text = starting_config("sana", "lora", model="/models/my sana", path=tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text(text)
    config = load_config(tmp_path / "x.yaml")
    assert config.pretrained_model_name_or_path == "/models/my sana" and config.resolution is None


def test_a_model_made_for_use_without_guidance_is_not_guided() -> None:
    text = starting_config("z_image", "lora", model="Tongyi-MAI/Z-Image-Turbo")
    assert yaml_value(text, "guidance_scale") == 0.0, "in Z-Image's convention 0 is none"
    assert yaml_value(starting_config("z_image", "lora"), "guidance_scale") is None


def yaml_value(text: str, key: str) -> object:
    from apex_fast.training.settings import parse_yaml

    return parse_yaml(text, source="test")[key]
