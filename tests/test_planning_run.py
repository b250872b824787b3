"""`apex-fast plan`: large models in seconds and without memory, true advice, clear errors."""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from apex_fast.backbones.loading import from_pretrained
from apex_fast.backbones.tiny import save_tiny_pipeline
from apex_fast.cli import main
from apex_fast.planning import PlanError, plan
from apex_fast.planning.blueprint import blueprint
from apex_fast.planning.published import PUBLISHED
from apex_fast.planning.report import gpu_bytes, table
from apex_fast.planning.step import REAL
from apex_fast.planning.ways import GIB
from apex_fast.training.config import TrainConfig
from apex_fast.training.settings import SettingsError

SANA = "Efficient-Large-Model/Sana_600M_512px_diffusers"
QWEN = "Qwen/Qwen-Image"


def config(model: str, **settings: object) -> TrainConfig:
    common = {"output_dir": "unused", "dataset_name": "unused", "train_batch_size": 1, "max_train_steps": 100}
    return TrainConfig(**{**common, "pretrained_model_name_or_path": model, **settings})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    entry, model = PUBLISHED[name], blueprint(name)
    count = sum(p.numel() for p in model.backbone().parameters())
    digits = len(str(entry.parameters).partition(".")[2]) or 0
    assert round(count / 1e9, digits) == pytest.approx(entry.parameters, abs=10**-digits * 0.51)
    backbone = model.backbone()
    assert model.latent_shape(backbone, None)[1] * entry.vae_scale_factor == entry.resolution
    if backbone.family != "qwen_image" and backbone.sample_shape[1] != model.latent_edge:
        pytest.fail(f"sample_size {backbone.sample_shape} is not that of {entry.resolution} pixels")


def test_twenty_billion_parameters_on_the_meta_device() -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    made = plan(config(QWEN, rank=64, weight_dtype="bf16", gradient_checkpointing=True))
    # About 8 s on one free core.
    assert time.monotonic() - start < 90
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    assert made.chosen.step.parameters == 20_430_401_088
    assert made.held["frozen weights"] == pytest.approx(2 * 20_430_401_088, rel=0.001)
    assert made.held.get(REAL, 0) == 0
    assert made.guidance is None
    needed = {(way.schedule, way.checkpointing): way.needed for way in made.ways}
    for checkpointing in (False, True):
        assert needed["joint", checkpointing] > needed["retain", checkpointing] >= needed["sequential", checkpointing]
    # 38 GiB of weights, then adapters, their optimizer and one block's activations.
    assert 45 * GIB < made.needed < 55 * GIB
    # One forward of 4096 + 512 tokens: 2 operations a weight that a token meets, and the attention.
    assert made.chosen.step.forward_flops == pytest.approx(80e12, rel=0.1)


def test_advice_is_true() -> None:
    start = config(SANA, train_batch_size=32, schedule="retain")
    gpu = 14 * GIB
    made = plan(start, gpu=gpu, compare=False)
    assert made.fits is False and made.needed > gpu
    assert made.advice is not None and made.advice.fits
    advised = dataclasses.replace(start, **made.advice.changes)
    again = plan(advised, gpu=gpu, compare=False)
    assert again.fits and again.advice is None
    assert again.needed == made.advice.needed <= gpu
    for name in made.advice.changes:
        fewer = {key: value for key, value in made.advice.changes.items() if key != name}
        if not name.startswith(("train_batch", "gradient_acc")):
            assert plan(dataclasses.replace(start, **fewer), gpu=gpu, compare=False).needed > gpu, name


def test_batch_is_split_into_passes_before_weights_lose_bits() -> None:
    start = config(
        SANA, rank=16, train_batch_size=128, gradient_checkpointing=True, weight_dtype="bf16", ema_decay=None
    )
    whole = plan(start, compare=False).chosen.needed
    made = plan(start, gpu=int(0.7 * whole), compare=False)
    assert made.advice is not None and made.advice.fits
    changes = made.advice.changes
    assert set(changes) == {"train_batch_size", "gradient_accumulation_steps"}
    assert changes["train_batch_size"] * changes["gradient_accumulation_steps"] == 128
    assert 1 < changes["train_batch_size"] < 128


def test_what_nothing_makes_fit_is_said() -> None:
    smallest = config(
        SANA, rank=8, weight_dtype="bf16", quantization="nf4", gradient_checkpointing=True, ema_decay=None
    )
    made = plan(smallest, gpu=GIB // 2 + 1, compare=False)
    assert made.advice is not None and not made.advice.fits
    assert "no settings make it fit" in table(made)


def test_hours_from_a_rate() -> None:
    run = config(SANA, gradient_accumulation_steps=2)
    by_flops = plan(run, tflops=100, compare=False)
    assert by_flops.hours == pytest.approx(by_flops.flops * 100 / 100e12 / 3600)
    by_forwards = plan(run, throughput=10.0, compare=False)
    assert by_forwards.hours == pytest.approx(by_forwards.forwards * 100 / 10 / 3600)
    # 12 passes (guided) in each of the two passes of the accumulation; all weights are trained.
    assert by_forwards.forwards == pytest.approx(24, rel=0.02)
    assert plan(run, compare=False).hours is None
    with pytest.raises(ValueError, match="not both"):
        plan(run, tflops=1, throughput=1)
    with pytest.raises(ValueError, match="tflops must be above 0"):
        plan(run, tflops=0)


def test_frozen_weights_make_backwards_cheaper() -> None:
    made = plan(config(SANA, rank=8, guidance_scale=1.0), compare=False)
    assert made.chosen.passes is not None and made.chosen.passes.total_in_forwards == 11
    # 2 + 3 forwards, and backwards of about one forward each instead of two
    assert 7 < made.forwards < 9


def test_several_gpus_hold_buckets() -> None:
    run = config(SANA, rank=8)
    one, two = plan(run, compare=False), plan(run, gpus=2, compare=False)
    assert two.chosen.needed - one.chosen.needed == two.buckets == one.held["gradients"] > 0 == one.buckets
    assert "2 GPUs" in table(two) and "runs as one process on one GPU so far" in table(two)
    assert "one process" not in table(one)


@pytest.mark.parametrize("family", ["sana", "qwen_image", "stable_diffusion_3"])
def test_a_local_pipeline_is_read_from_its_configurations(family: str, tmp_path: Path) -> None:
    folder = save_tiny_pipeline(family, tmp_path / "model")
    loaded, model = from_pretrained(folder), blueprint(str(folder))
    assert model.family == family
    assert model.vae_scale_factor == loaded.vae_scale_factor
    assert model.latent_shape(loaded, (64, 32)) == loaded.latent_shape(64, 32)
    assert model.vae_parameters == sum(p.numel() for p in loaded.components["vae"].parameters())
    assert model.text_encoder_parameters >= sum(
        p.numel() for name, c in loaded.components.items() if name.startswith("text_enc") for p in c.parameters()
    )
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert plan(config(str(folder), rank=2), compare=False).needed > 0


def test_a_size_that_the_patches_do_not_divide() -> None:
    with pytest.raises(PlanError, match="multiple of 32 pixels .* got 500 x 512"):
        plan(config(SANA, resolution=[500, 512]))


def test_unknown_models_are_refused_with_the_table() -> None:
    with pytest.raises(PlanError, match="someone/model is no folder here .* downloads nothing.*Qwen/Qwen-Image"):
        plan(config("someone/model"))


def test_sizes_of_gpus() -> None:
    assert gpu_bytes("24GB") == gpu_bytes("24 GiB") == gpu_bytes("24") == 24 * GIB
    for text in ("big", "-1GB", "24MB", "0"):
        with pytest.raises(SettingsError, match="such as 24GB"):
            gpu_bytes(text)


# ---- the command


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: unused\npretrained_model_name_or_path: digits_start\ntrain_batch_size: 8\n")
    return path


def test_command_prints_a_plan(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "plan.json"
    code = main(["plan", str(run_file), "--train-batch-size", "4", "--gpu", "24GB", "--tflops=1", "--json", str(out)])
    text = capsys.readouterr().out
    assert code == 0
    assert "digits_start" in text and "batch 4," in text and "fits into 24 GiB" in text and "Not counted" in text
    assert "encoding prompts" not in text  # digits are not encoded before the run
    assert text.count("<- this config") == 1
    values = json.loads(out.read_text())
    assert values["fits"] is True and len(values["ways"]) == 6 and values["hours"] > 0
    assert values["chosen"]["passes_in_forwards"] == 11


def test_command_says_what_does_not_fit(run_file: Path, capsys: pytest.CaptureFixture) -> None:
    least = (
        "--rank 8 --weight_dtype bf16 --quantization nf4 --gradient_checkpointing --ema_decay null --train_batch_size 1"
    )
    assert main(["plan", str(run_file), "--gpu", "0.5GB", *least.split()]) == 1
    assert "does not fit into 0.5 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu"], "--gpu needs a value"),
        (["--gpus", "many"], "--gpus must be a number, got 'many'"),
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["--pretrained_model_name_or_path", "someone/model"], "not in the table of known models"),
    ],
)
def test_command_refuses_what_it_cannot_plan(
    run_file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["plan", str(run_file), *arguments]) == 2
    assert message in capsys.readouterr().err
