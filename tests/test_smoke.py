"""``train CONFIG --smoke``: every example from keys to picture on the tiny pipeline of its family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("peft")
pytest.importorskip("diffusers")

from tiny_runs import make_pipeline, make_start

from apex_fast.cli import main
from apex_fast.starting import EXAMPLES
from apex_fast.training.checkpoint import checkpoints, load_state
from apex_fast.training.config import load_config
from apex_fast.training.smoke import CAPTIONS, family_of_config, render_pictures, small_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(ROOT / "examples" / f"{name}.yaml"), "--smoke", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    family, mode, _ = EXAMPLES[name]
    said = "LoRA of rank 4" if mode == "lora" else "all parameters"
    assert "passed in" in captured.out and f"{family}, {said}, 3 steps with a resume after 2" in captured.out
    assert "this shows the wiring and says nothing of quality" in captured.out
    assert "data/train is not there yet" in captured.out
    assert "going on from step 2" in captured.err and "finished at step 3" in captured.err
    assert not list(tmp_path.iterdir()), "the files of a smoke run are temporary unless it is told where to"


def test_what_is_left_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render_pictures(tmp_path / "mine")
    (tmp_path / "mine" / "broken.png").write_bytes(b"")
    config = str(ROOT / "examples" / "qwen_image_lora.yaml")
    words = ["--output_dir", str(tmp_path / "out"), "--dataset_name", str(tmp_path / "mine"), "--device", "cpu"]
    assert main(["train", "--smoke", config, *words, "--quantization", "int8", "--resolution", "[512, 768]"]) == 0
    out = capsys.readouterr().out
    assert "8 pictures with captions" in out and "1 left out, not named in metadata.jsonl: broken.png" in out
    assert "quantization: int8 is not tried" in out and "48 x 32 pixels" in out
    assert [p.name for p in checkpoints(tmp_path / "out" / "run")] == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "out" / "run" / "generated" / "a-red-circle-on-white-1-step-seed-0.png").is_file()
    assert (tmp_path / "out" / "run" / "model" / "pytorch_lora_weights.safetensors").is_file()


def test_shards_are_looked_at_and_what_is_behind_a_url_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("webdataset")
    from data_cases import encoded, write_tar

    members = {"a.jpg": encoded(), "a.title.txt": b"a title", "b.jpg": encoded(), "b.title.txt": b""}
    shard = write_tar(tmp_path / "a-0.tar", members)
    config = str(ROOT / "examples" / "qwen_image_lora.yaml")
    buckets = ["--aspect_buckets", "true", "--aspect_bucket_step", "64"]
    words = ["--dataset_name", str(tmp_path / "a-{0..0}.tar"), "--caption_column", "title.txt", "--device", "cpu"]
    assert main(["train", "--smoke", config, *words, *buckets]) == 0
    out = capsys.readouterr().out
    assert "1 pictures with captions in" in out and f"1 left out, empty caption: {shard.name}: b" in out
    url = "https://user:secret@host.invalid/a.tar"
    assert main(["train", "--smoke", config, "--dataset_name", url, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "https://host.invalid/a.tar is not fetched here; the run will" in out and "secret" not in out


def test_a_shift_behind_the_text_projection(tmp_path: Path) -> None:
    config = str(ROOT / "examples" / "sana_0.6b_lora.yaml")
    words = ["--shift.site", "projected", "--shift.mode", "diagonal", "--shift.trainable", "true", "--device", "cpu"]
    assert main(["train", "--smoke", config, *words, "--output_dir", str(tmp_path / "out")]) == 0
    saved = load_state(checkpoints(tmp_path / "out" / "run")[-1], "objective")
    assert saved["shift"]["scale"].shape == (32,) and saved["shift"]["scale"].std() > 0


def test_mistakes_of_the_config_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "examples" / "sana_0.6b_lora.yaml")
    assert main(["train", config, "--smoke", "--lora_target_modules", "to_nothing"]) == 2
    assert "no layer of SanaTransformer2DModel ends with any of ['to_nothing']" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"")
    assert main(["train", config, "--smoke", "--dataset_name", str(tmp_path / "data")]) == 2
    assert "nothing in" in capsys.readouterr().err
    assert main(["train", config, "--smoke", "--start_lora", str(tmp_path / "nowhere")]) == 1
    assert f"start_lora: {tmp_path / 'nowhere'} is no LoRA" in capsys.readouterr().err
    assert main(["train", config, "--smoke", "--learning_rat", "1"]) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "family", "found"),
    [
        ("Qwen/Qwen-Image", None, "qwen_image"),
        ("somebody/my-finetune", "flux", "flux"),
        ("a folder", None, "sana"),
        ("/not/here/yet", "z_image", "z_image"),
    ],
)
def test_the_family_is_known_without_a_download(tmp_path: Path, model: str, family: str | None, found: str) -> None:
    if model == "a folder":
        model = str(make_pipeline(tmp_path, "sana"))
    words = ["--output_dir", "x", "--dataset_name", "y", "--pretrained_model_name_or_path", model]
    assert family_of_config(load_config(None, words + (["--family", family] if family else []))) == found


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("somebody/my-finetune", (), "does not know the family of somebody/my-finetune; write it, e.g. family: sana"),
        ("Qwen/Qwen-Image", ("--family", "sana"), "family: sana, but Qwen/Qwen-Image is a qwen_image model"),
        ("digits_start", (), "this config's model is small already; write --max_train_steps 3"),
        ("a start", (), "this config's model is small already"),
        ("Qwen/Qwen-Image", ("--dataset_name", "digits"), "digits is for networks without a VAE"),
    ],
)
def test_what_cannot_be_tried_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, more: tuple[str, ...], message: str
) -> None:
    if model == "a start":
        model = str(make_start(tmp_path / "start"))
    given = {"--output_dir": str(tmp_path / "x"), "--dataset_name": "y", "--pretrained_model_name_or_path": model}
    given.update(zip(more[::2], more[1::2], strict=True))
    assert main(["train", "--smoke", *(word for pair in given.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err


def test_a_size_that_the_real_model_cannot_make_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SANA's VAE makes steps of 32 pixels, FLUX's patches of 16; the tiny pipelines would take more sizes."""
    config = str(ROOT / "examples" / "sana_0.6b_lora.yaml")
    assert main(["train", config, "--smoke", "--resolution", "528"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "resolution must be a multiple of 32 pixels" in line and "got 528 x 528" in line
    flux = load_config(ROOT / "examples" / "flux_lora.yaml", ["--resolution", "528"])
    assert small_config(flux, "flux", tmp_path)
    here = make_pipeline(tmp_path, "sana")
    unknown = load_config(config, ["--pretrained_model_name_or_path", "somebody/else", "--resolution", "33"])
    assert small_config(unknown, "sana", tmp_path), "nothing is known of that model, so nothing is refused"
    words = ["--pretrained_model_name_or_path", str(here), "--resolution", "33", "--smoke"]
    assert main(["train", config, *words]) == 2
    assert "resolution must be a multiple of" in capsys.readouterr().err


def test_only_sizes_and_places_differ(tmp_path: Path) -> None:
    """What --smoke tries is the config's own settings: of all keys it changes those that make the run small."""
    import dataclasses

    config = load_config(ROOT / "examples" / "sana_0.6b_lora.yaml", ["--lora_alpha", "128", "--schedule", "joint"])
    small, _ = small_config(config, "sana", tmp_path)
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(small, f.name)}
    assert changed == {
        *("pretrained_model_name_or_path", "dataset_name", "resolution", "output_dir", "max_train_steps", "rank"),
        *("train_batch_size", "gradient_accumulation_steps", "lora_alpha", "lr_warmup_steps", "objective"),
        *("validation_steps", "validation_images_per_prompt", "checkpointing_steps", "logging_steps"),
        *("probe", "report_to", "validation_base_inference_steps"),
    }
    assert small.lora_alpha / small.rank == config.lora_alpha / config.rank


def test_rendered_pictures_have_their_captions(tmp_path: Path) -> None:
    from apex_fast.data.folder import PictureFolder, read_picture

    render_pictures(tmp_path)
    found = PictureFolder.open(tmp_path)
    assert found.captions == list(CAPTIONS) and not found.warnings()
    red = read_picture(found.files[0], 32, 32)
    assert red[0, 16, 14] > 0.9 and red[1, 16, 14] < -0.9 and (red[:, 0, 0] > 0.9).all()
    assert json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[0])["text"] == CAPTIONS[0]
