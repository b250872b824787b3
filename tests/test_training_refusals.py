"""Runs on whole pipelines that are refused, left or moved: what is said, and what stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("peft")

from tiny_runs import keys, losses, make_pipeline, make_start, pipeline_keys

from apex_fast.cli import main
from apex_fast.training.checkpoint import CheckpointError, checkpoints
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer
from apex_fast.training.settings import SettingsError

LORA = ("--rank", "4", "--learning_rate", "1e-3")


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("sana"), "sana")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("qwen"), "qwen_image")


def trainer_of(model: Path, folder: Path, *more: str) -> Trainer:
    return Trainer(load_config(None, pipeline_keys(model, folder, *more)))


# ---- hub or folder


def test_only_a_hub_id_goes_to_the_hub(sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from apex_fast.training import loop

    asked: list[str | None] = []

    def trainer(config: object) -> None:
        asked.append(os.environ.get("HF_HUB_OFFLINE"))
        raise FileNotFoundError("not this time")

    monkeypatch.setattr(loop, "Trainer", trainer)
    pictures = ["--dataset_name", str(sana.parent / "pictures"), "--output_dir", str(tmp_path)]
    run = tmp_path / "run"
    run.mkdir()
    (run / "apex_fast.json").write_text(
        json.dumps({"family": "sana", "mode": "full", "base": "somebody/a-model", "weight_dtype": "fp32"})
    )
    for model in ("somebody/a-model", str(sana), "digits_start", str(run)):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        assert main(["train", "--pretrained_model_name_or_path", model, *pictures]) == 1
    assert asked == [None, "1", "1", None]


def test_a_hub_that_cannot_be_reached_is_one_line(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    words = pipeline_keys(Path("somebody/a-model"), tmp_path / "run")
    words[words.index("--dataset_name") + 1] = str(sana.parent / "pictures")
    assert main(["train", *words]) == 1
    error = capsys.readouterr().err
    assert "somebody/a-model is no folder here, and the hub cannot be reached" in error and len(error.splitlines()) == 1


# ---- refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--resolution", "33"), "resolution: SanaBackbone: images must be multiples of"),
        (("--family", "flux"), "family: flux, but .* is a sana model; write family: sana"),
        (("--dataset_name", "digits", "--resolution", "null"), "dataset_name: digits gives samples of the shape .1, 8"),
        (
            ("--rank", "4", "--lora_target_modules", "nothing"),
            "^lora_target_modules: .*no layer of SanaTransformer2DModel ends with",
        ),
        (
            ("--embedded_guidance_scale", "3.5"),
            "pretrained_model_name_or_path: SanaBackbone: embedded_guidance= is for",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    sana: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        trainer_of(sana, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists(), "a refused run must leave nothing behind"


def test_a_lone_transformer_cannot_encode_prompts(sana: Path, tmp_path: Path) -> None:
    shutil.copytree(sana / "transformer", tmp_path / "alone")
    pictures = str(sana.parent / "pictures")
    with pytest.raises(SettingsError, match="alone has no tokenizer, text_encoder, vae, so prompts and pictures"):
        trainer_of(tmp_path / "alone", tmp_path / "run", "--dataset_name", pictures)


def test_unsupported_models_are_listed(sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pixart"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    words = pipeline_keys(folder, tmp_path / "run", "--dataset_name", str(sana.parent / "pictures"))
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert "PixArtSigmaPipeline, which is not supported: it predicts noise" in error and "QwenImagePipeline" in error
    assert len(error.splitlines()) == 1


def test_more_data_than_memory_is_refused_before_it_is_encoded(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apex_fast.training import encoding

    monkeypatch.setattr(encoding, "SHARE_OF_MEMORY", 1e-7)
    monkeypatch.setattr(encoding, "_encode_pictures", lambda *_: pytest.fail("encoded before it was refused"))
    message = "8 pictures make 0.0 MiB of latents and 8 prompts about 0.3 MiB of embeddings, and at most half of this"
    with pytest.raises(SettingsError, match=message):
        trainer_of(sana, tmp_path / "run")


def test_cheap_mistakes_are_found_before_the_encoding(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apex_fast.training import loop

    trainer_of(sana, tmp_path / "run", *LORA).run(until=2)
    monkeypatch.setattr(loop, "encode_data", lambda *_: pytest.fail("encoded before it was refused"))
    resume = ("--resume_from_checkpoint", "latest")
    with pytest.raises(SettingsError, match="no layer of"):
        trainer_of(sana, tmp_path / "other", *LORA, "--lora_target_modules", "nothing")
    with pytest.raises(FileNotFoundError, match="start_lora: "):
        trainer_of(sana, tmp_path / "other", *LORA, "--start_lora", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="is of a run with rank: 4"):
        trainer_of(sana, tmp_path / "run", "--rank", "8", *resume)
    with pytest.raises(SettingsError, match="max_train_steps is 1, but .* is at step 2 already"):
        trainer_of(sana, tmp_path / "run", *LORA, *resume, "--max_train_steps", "1")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--guidance_scale", "1"), "guidance_scale: 1 means no guidance as the sana pipeline counts it"),
        (("--objective.correction_weight", "0"), "there is no real branch"),
        (("--loss", "flow_matching"), "there is no real branch"),
    ],
)
def test_a_negative_prompt_that_is_not_used_is_said(
    sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    trainer_of(sana, tmp_path / "used", *LORA, "--negative_prompt", "dark", "--max_train_steps", "1").run()
    assert "is not used" not in capsys.readouterr().err
    trainer_of(sana, tmp_path / "not", *LORA, "--negative_prompt", "dark", "--max_train_steps", "1", *more).run()
    error = capsys.readouterr().err
    assert 'careful: negative_prompt: "dark" is not used: ' in error and message in error


def test_flux_is_not_guided_by_a_negative_prompt_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flux = make_pipeline(tmp_path, "flux")
    trainer = trainer_of(flux, tmp_path / "run", *LORA, "--negative_prompt", "dark", "--max_train_steps", "1")
    assert trainer.guidance is None
    trainer.run()
    error = capsys.readouterr().err
    assert "careful: negative_prompt" in error and "so the real branch is unguided; write guidance_scale" in error
    both = ("--negative_prompt", "dark", "--guidance_scale", "4.0")
    assert trainer_of(flux, tmp_path / "both", *LORA, *both).guidance is not None


def test_a_small_model_is_not_guided_by_a_negative_prompt_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--negative_prompt", "a nine", "--max_train_steps", "1")
    Trainer(load_config(None, keys(make_start(tmp_path / "start"), tmp_path / "run", *more))).run()
    assert "a model with a text encoder of its own is not guided" in capsys.readouterr().err


def test_damaged_files_are_one_line(sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"\x90" * 100)
    words = pipeline_keys(sana, tmp_path / "run", *LORA, "--start_lora", str(lora))
    assert f"start_lora: {lora} cannot be read as safetensors" in refused("train", *words)
    model = tmp_path / "sana"
    shutil.copytree(sana, model)
    (weights,) = (model / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:200])
    pictures = ("--dataset_name", str(sana.parent / "pictures"))
    assert "pretrained_model_name_or_path: " in refused("train", *pipeline_keys(model, tmp_path / "run", *pictures))
    (model / "model_index.json").write_text("{")
    words = pipeline_keys(model, tmp_path / "run", *pictures)
    assert "model_index.json" in refused("train", *words)
    assert f"{model / 'model_index.json'} is no JSON" in refused("train", *words, "--smoke")


def test_broken_pictures_are_left_out_and_named(sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    shutil.copytree(sana.parent / "pictures", data)
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:60])
    trainer = trainer_of(sana, tmp_path / "run", "--dataset_name", str(data), "--max_train_steps", "3")
    assert len(trainer.batches.data) == 7
    trainer.run()
    assert "careful: 1 left out, not a picture that can be read: 3.png" in capsys.readouterr().err
    for path in data.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        SettingsError, match=r"2 of 8 in .* max_bad_share \(0.05\) allows 1: 2 left out, not a picture that"
    ):
        trainer_of(sana, tmp_path / "other", "--dataset_name", str(data))
    every = ("--dataset_name", str(data), "--max_bad_share", "1")
    with pytest.raises(SettingsError, match="nothing in .* can be used: 8 left out, not a picture that can be read"):
        trainer_of(sana, tmp_path / "other", *every)


def test_a_refused_run_does_not_delete_the_one_that_it_would_overwrite(sana: Path, tmp_path: Path) -> None:
    trainer_of(sana, tmp_path, "--max_train_steps", "3").run()
    overwrite = ("--overwrite_output_dir", "true", "--max_train_steps", "3")
    with pytest.raises(SettingsError, match="multiples of"):
        trainer_of(sana, tmp_path, *overwrite, "--resolution", "33")
    assert (tmp_path / "model" / "apex_fast.json").is_file() and checkpoints(tmp_path)
    trainer_of(sana, tmp_path, *overwrite)
    assert not (tmp_path / "model").exists() and not checkpoints(tmp_path)


# ---- going on


def test_a_lora_does_not_go_on_from_another_base(sana: Path, tmp_path: Path) -> None:
    model = tmp_path / "sana"
    shutil.copytree(sana, model)
    pictures = ("--dataset_name", str(sana.parent / "pictures"))
    Trainer(load_config(None, pipeline_keys(model, tmp_path / "run", *LORA, *pictures))).run(until=2)
    shutil.rmtree(model)
    make_pipeline(tmp_path, "sana", seed=1)
    resume = ("--resume_from_checkpoint", "latest")
    with pytest.raises(CheckpointError, match="was tuned from another model.*a LoRA needs the base"):
        trainer_of(model, tmp_path / "run", *LORA, *pictures, *resume)
    with pytest.raises(CheckpointError, match="is of a run with rank: 4, this one has rank: null"):
        trainer_of(model, tmp_path / "run", *pictures, *resume)


def test_a_moved_base_is_named(sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "sana"
    shutil.copytree(sana, model)
    pictures = ("--dataset_name", str(sana.parent / "pictures"))
    run = tmp_path / "run"
    assert main(["train", *pipeline_keys(model, run, *LORA, *pictures, "--max_train_steps", "3")]) == 0
    model.rename(tmp_path / "moved")
    capsys.readouterr()
    words = ["generate", str(run), "--prompt", "x", "--n", "1", "--out", str(tmp_path / "x.png")]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert f"was trained on {model}" in error and "--base" in error and len(error.splitlines()) == 1
    assert main([*words, "--base", str(tmp_path / "moved")]) == 0
    assert [p.name for p in checkpoints(run)] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("key", "value", "was"),
    [
        ("lora_alpha", "8", "null"),
        ("lora_dropout", "0.1", "0.0"),
        ("use_rslora", "true", "false"),
        ("use_dora", "true", "false"),
        ("lora_target_modules", "to_q", "null"),
        ("weight_dtype", "bf16", "fp32"),
    ],
)
def test_what_a_lora_is_cannot_change_on_the_way(sana: Path, tmp_path: Path, key: str, value: str, was: str) -> None:
    trainer_of(sana, tmp_path, *LORA).run(until=1)
    with pytest.raises(CheckpointError, match=f"is of a run with {key}: {was}, this one has {key}: .*write {key}: "):
        trainer_of(sana, tmp_path, *LORA, f"--{key}", value, "--resume_from_checkpoint", "latest")


def test_the_default_alpha_may_be_written_out(sana: Path, tmp_path: Path) -> None:
    trainer_of(sana, tmp_path, *LORA).run(until=1)
    assert trainer_of(sana, tmp_path, *LORA, "--lora_alpha", "4", "--resume_from_checkpoint", "latest").step == 1


def test_pictures_that_changed_on_the_way_are_named(
    sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(sana.parent / "pictures", data)
    more = (*LORA, "--dataset_name", str(data))
    resume = ("--resume_from_checkpoint", "latest")

    def said(until: int, *words: str) -> str:
        capsys.readouterr()
        trainer_of(sana, tmp_path / "run", *more, *words).run(until=until)
        return capsys.readouterr().err

    said(1)
    data.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", data)
    assert "is not what" not in said(1, *resume)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join([*lines[:-1], lines[-1].replace("circle", "ring")]))
    message = f"careful: dataset_name: {data} is not what checkpoint-1 was trained on: "
    assert f"{message}the same pictures with other captions" in said(1, *resume)
    (data / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    assert f"{message}8 pictures then, 7 now" in said(2, *resume)
    assert "is not what" not in said(3, *resume), "the newer checkpoint knows the newer folder"


def test_full_tuning_goes_on_with_the_same_numbers(qwen: Path, tmp_path: Path) -> None:
    trainer_of(qwen, tmp_path / "whole").run()
    trainer_of(qwen, tmp_path / "halves").run(until=2)
    trainer = trainer_of(qwen, tmp_path / "halves", "--resume_from_checkpoint", "latest")
    assert trainer.step == 2 and trainer.run().finished
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    files = [tmp_path / name / "checkpoint-4" / "model" / "transformer" for name in ("whole", "halves")]
    first, second = (next(folder.glob("*.safetensors")).read_bytes() for folder in files)
    assert first == second
