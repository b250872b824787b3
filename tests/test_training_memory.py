"""Memory that runs out, and what keeps it from doing so: order of saving, encoding, moving and drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("peft")

from tiny_runs import losses, make_pipeline, pipeline_keys

from apex_fast.backbones.base import Backbone
from apex_fast.cli import main
from apex_fast.generate import generate
from apex_fast.training import loop, memory, saving, validation
from apex_fast.training.checkpoint import checkpoints
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer
from apex_fast.training.memory import OutOfMemory, during, explain

LORA = ("--rank", "4", "--learning_rate", "1e-3")
WATCHING = ("--validation_prompts", "a cat", "--validation_steps", "2")


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("sana"), "sana")


def trainer_of(model: Path, folder: Path, *more: str) -> Trainer:
    return Trainer(load_config(None, pipeline_keys(model, folder, *more)))


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13.50 GiB.")


# ---- validation


@pytest.mark.parametrize(("every", "validated", "kept"), [("2", "2", 2), ("null", "4", 4), ("2", "4", 4)])
def test_an_error_in_a_validation_does_not_cost_the_run(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: str, validated: str, kept: int
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("no space left for the picture")

    monkeypatch.setattr(validation, "validate", broken)
    more = ("--validation_prompts", "a cat", "--validation_steps", validated, "--checkpointing_steps", every)
    trainer = trainer_of(sana, tmp_path, *LORA, *more)
    with pytest.raises(OSError, match="no space left"):
        trainer.run()
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{kept}"


def test_a_validation_that_does_not_fit_is_skipped(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_of(sana, tmp_path / "plain", *LORA).run()
    trainer = trainer_of(sana, tmp_path / "watched", *LORA, *WATCHING)
    monkeypatch.setattr(Backbone, "decode", out_of_memory)
    capsys.readouterr()
    assert trainer.run().finished
    error = capsys.readouterr().err
    assert "step 2, validation: skipped, it does not fit into the memory of cpu" in error
    assert "validation_steps: null" in error and "Traceback" not in error
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched"), "a skipped validation changed the run"
    assert trainer.backbone.transformer.training


def test_pictures_are_drawn_and_decoded_one_at_a_time(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decode = Backbone.decode
    monkeypatch.setattr(Backbone, "decode", lambda self, latents: sizes.append(len(latents)) or decode(self, latents))
    trainer = trainer_of(sana, tmp_path, *LORA, *WATCHING, "--validation_images_per_prompt", "3")
    images = trainer.draw(["a cat"] * 3, num_inference_steps=1)
    assert sizes == [1, 1, 1] and images.shape == (3, 3, 32, 32)


def test_what_was_freed_is_given_back_to_the_device(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apex_fast.training import encoding

    freed: list[str] = []
    for name in ("free_text_encoders", "free_vae"):
        monkeypatch.setattr(Backbone, name, lambda self, name=name: freed.append(name))
    monkeypatch.setattr(encoding, "release", lambda: freed.append("release"))
    trainer_of(sana, tmp_path)
    assert freed == ["free_text_encoders", "release", "free_vae", "release"]


def test_release_collects_before_it_empties_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(memory.gc, "collect", lambda: called.append("collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty"))
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda there=there: there)
        memory.release()
    assert called == ["collect", "empty"]


# ---- training


@pytest.mark.parametrize(
    ("owner", "name", "phase"),
    [
        (loop, "load_backbone", "loading the model"),
        (loop, "encode_data", "encoding pictures and prompts"),
        (Trainer, "_one_step", "step 0"),
        (saving, "save_trained", "writing the finished model"),
    ],
)
def test_running_out_of_memory_is_one_line_with_a_command(
    sana: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
    phase: str,
) -> None:
    import yaml

    words = pipeline_keys(sana, tmp_path / "run", *LORA)
    values = {key.removeprefix("--"): yaml.safe_load(value) for key, value in zip(words[::2], words[1::2], strict=True)}
    nested = {key: value for key, value in values.items() if "." not in key}
    (tmp_path / "my run.yaml").write_text(yaml.safe_dump(nested))
    monkeypatch.setattr(owner, name, out_of_memory)
    assert main(["train", str(tmp_path / "my run.yaml"), "--train_batch_size", "2"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"apex-fast: out of memory during: {phase}")
    assert f"plan '{tmp_path}/my run.yaml' --train_batch_size 2 --gpu" in last


def test_the_innermost_phase_is_named_and_other_errors_pass() -> None:
    with pytest.raises(OutOfMemory) as caught, during("step 3"), during("decoding pictures"):
        out_of_memory()
    assert caught.value.phase == "decoding pictures" and "13.50 GiB" in str(caught.value)
    with pytest.raises(ValueError, match="other"), during("step 3"):
        raise ValueError("other")


def test_the_memory_of_the_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 24 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (0, 23 << 30)[device])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    told = explain(OutOfMemory("step 7", ""), "apex-fast plan run.yaml", "")
    assert "during: step 7; this process held at most 23.0 GiB of the 24.0 GiB of cuda:1" in told
    assert "`apex-fast plan run.yaml --gpu 24GB`" in told


# ---- generating


def test_text_encoders_are_gone_before_the_transformer_moves(sana: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[set[str]] = []
    sizes: list[int] = []
    to, decode = Backbone.to, Backbone.decode

    def watched(self: Backbone, *args: Any, **kwargs: Any) -> Backbone:
        if args == (torch.device("cpu"),):
            moved.append(set(self.components))
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Backbone, "to", watched)
    monkeypatch.setattr(Backbone, "decode", lambda self, latents: sizes.append(len(latents)) or decode(self, latents))
    prompts = ["a red circle", "a blue square"]
    size = {"height": 32, "width": 32, "device": "cpu", "guidance_scale": 2.0}
    images, _ = generate(sana, prompts, images_per_prompt=2, **size)
    assert len(moved) == 1 and "vae" in moved[0] and not {"text_encoder", "tokenizer"} & moved[0]
    assert sizes == [1] * 4 and images.shape == (4, 3, 32, 32)


def test_generate_says_where_it_runs_and_when_memory_runs_out(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(sana), "--prompt", "x", "--n", "1", "--resolution", "32", "--out", str(tmp_path / "x.png")]
    assert main(words) == 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f", on {device}" in capsys.readouterr().err
    monkeypatch.setattr(Backbone, "decode", out_of_memory)
    assert main([*words, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "out of memory during: decoding pictures" in error and "--resolution" in error
    assert len(error.splitlines()) == 1
