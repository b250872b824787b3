"""What is seen during training is what users get: pictures of a validation against stock pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("yaml")
pytest.importorskip("peft")
pytest.importorskip("diffusers")

from backbone_cases import LENGTHS
from export_cases import LORA, PROMPT, pixels_of, run_card
from tiny_runs import make_pipeline, pipeline_keys

from apex_fast.backbones.tiny import TINY_FAMILIES
from apex_fast.export import export_run
from apex_fast.training import validation
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer

Columns = list[tuple[str, Tensor]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Columns]:
    """The (heading, images) of every validation that draws."""
    found: list[Columns] = []
    real = validation._grid

    def grid(prompts: list[str], columns: Columns, title: str) -> Any:
        found.append(columns)
        return real(prompts, columns, title)

    monkeypatch.setattr(validation, "_grid", grid)
    return found


def a_run(folder: Path, family: str, *more: str) -> Path:
    model = make_pipeline(folder, family)
    words = pipeline_keys(
        model,
        folder / "run",
        *("--max_sequence_length", str(LENGTHS[family]), "--validation_prompts", PROMPT, "--validation_steps", "4"),
        *("--validation_images_per_prompt", "2", "--max_train_steps", "4", *more),
    )
    Trainer(load_config(None, words)).run()
    return folder / "run"


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_validation_shows_what_the_stock_pipeline_draws(
    family: str, tmp_path: Path, drawn: list[Columns], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exported = export_run(a_run(tmp_path, family, *LORA))
    (columns,) = drawn
    assert [heading for heading, _ in columns] == ["1 step", "2 steps", "4 steps"]
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert card.count("manual_seed(0)") == 1
    for number in range(2):
        seeded = exported / f"card-{number}.md"
        seeded.write_text(card.replace("manual_seed(0)", f"manual_seed({validation.VALIDATION_SEED + number})"))
        for steps, (_, images) in zip((1, 2, 4), columns, strict=True):
            _, picture = run_card(seeded, folder=str(exported), steps=steps, prompt=PROMPT)
            shown = images[number].add(1).mul(127.5).clamp(0, 255)
            assert (pixels_of(picture) - shown).abs().max() < 1.01, (number, steps)
    assert (columns[0][1][0] - columns[0][1][1]).abs().max() > 0.05, "two seeds, two pictures"


@pytest.mark.parametrize("family", ["qwen_image", "flux", "z_image", "lumina2", "stable_diffusion_3"])
def test_the_start_is_drawn_as_its_own_pipeline_draws(family: str, tmp_path: Path, drawn: list[Columns]) -> None:
    """With the scheduler that the model came with and the guidance of its pipeline; SANA's multistep solver is not
    reproduced (apex_fast.backbones.stock_times)."""
    from apex_fast.backbones.base import Backbone
    from apex_fast.training.models import load_pretrained

    more = ("--validation_base_inference_steps", "5", "--guidance_scale", "3.0", "--negative_prompt", "a blue square")
    run = a_run(tmp_path, family, *LORA, *more)
    (columns,) = drawn
    heading, images = columns[-1]
    assert heading == "the start, 5 steps"
    backbone: Backbone = load_pretrained(tmp_path / family, max_sequence_length=LENGTHS[family])
    pipeline = backbone.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    scale = "true_cfg_scale" if family in ("qwen_image", "flux") else "guidance_scale"
    arguments: dict[str, Any] = {scale: 3.0, "negative_prompt": "a blue square"}
    if family == "flux":
        arguments["guidance_scale"] = load_config(run / "config.yaml").embedded_guidance_scale or 3.5
    if family != "lumina2":
        arguments["max_sequence_length"] = LENGTHS[family]
    for number in range(2):
        picture = pipeline(
            PROMPT,
            height=32,
            width=32,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(validation.VALIDATION_SEED + number),
            **arguments,
        ).images[0]
        shown = images[number].add(1).mul(127.5).clamp(0, 255)
        assert (pixels_of(picture) - shown).abs().max() < 2.01, number


def test_the_start_of_a_model_without_a_scheduler_takes_even_times(tmp_path: Path) -> None:
    from tiny_runs import keys, make_start

    more = ("--validation_prompts", "a 7", "--validation_steps", "2", "--validation_base_inference_steps", "3")
    trainer = Trainer(load_config(None, keys(make_start(tmp_path / "start"), tmp_path / "run", *more)))
    expected = validation.draw_prompts(trainer, 3).clamp(-1, 1)
    (tmp_path / "run").mkdir(exist_ok=True)
    validation.draw_start(trainer)
    found = validation.read_start(trainer)
    assert found is not None
    torch.testing.assert_close(found, expected, atol=1 / 127, rtol=0)


def test_a_damaged_or_foreign_start_is_not_shown(tmp_path: Path) -> None:
    from tiny_runs import keys, make_start

    start = make_start(tmp_path / "start")
    more = ("--validation_prompts", "a 7", "--validation_steps", "2", "--validation_base_inference_steps", "3")
    trainer = Trainer(load_config(None, keys(start, tmp_path / "run", *more)))
    assert validation.read_start(trainer) is None
    (tmp_path / "run").mkdir(exist_ok=True)
    validation.draw_start(trainer)
    file = tmp_path / "run" / validation.SAMPLES / validation.START
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert validation.read_start(trainer) is None
    file.write_bytes(whole)
    assert validation.read_start(trainer) is not None
    other = Trainer(load_config(None, keys(start, tmp_path / "run", *more, "--validation_prompts", "a 9")))
    assert validation.read_start(other) is None
