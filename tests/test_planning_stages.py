"""What a run needs besides its step, and advice that makes every stage fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import apex_fast.planning
from apex_fast.backbones.loading import from_pretrained
from apex_fast.backbones.tiny import save_tiny_pipeline
from apex_fast.cli import main
from apex_fast.planning import PlanError, plan
from apex_fast.planning.advice import _CHANGES
from apex_fast.planning.blueprint import blueprint, vae_on_meta
from apex_fast.planning.memory import ACTIVATIONS, LiveBytes
from apex_fast.planning.planner import Plan
from apex_fast.planning.published import PUBLISHED
from apex_fast.planning.report import table
from apex_fast.planning.stages import PICTURES, PROMPTS, STEP, VALIDATION, vae_activations
from apex_fast.planning.step import AVERAGE, FROZEN, GRADIENTS, OPTIMIZER, TRAINED
from apex_fast.planning.ways import CONTEXT, GIB, MARGIN
from apex_fast.training.batches import TABLE_ON_DEVICE
from apex_fast.training.config import TrainConfig
from apex_fast.training.results import Record
from apex_fast.training.settings import SettingsError

SANA = "Efficient-Large-Model/Sana_600M_512px_diffusers"
LARGER = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
LORA = {"rank": 8, "weight_dtype": "bf16", "gradient_checkpointing": True}
PICTURES_WANTED = {"validation_prompts": ["a cat"], "validation_steps": 10}


def config(model: str, **settings: object) -> TrainConfig:
    common = {"output_dir": "unused", "dataset_name": "unused", "train_batch_size": 1, "max_train_steps": 100}
    return TrainConfig(**{**common, "pretrained_model_name_or_path": model, **settings})


def needed(made: Plan) -> dict[str, int]:
    return {stage.name: stage.needed for stage in made.stages}


def test_every_public_name_is_there() -> None:
    assert all(getattr(apex_fast.planning, name) is not None for name in apex_fast.planning.__all__)


# ---- the VAE


@pytest.mark.parametrize("family", ["sana", "qwen_image", "flux"])
def test_activations_of_the_vae_are_those_of_the_same_calls_on_the_cpu(family: str, tmp_path: Path) -> None:
    folder = save_tiny_pipeline(family, tmp_path / "model")
    backbone, model = from_pretrained(folder), blueprint(str(folder))
    planned = vae_activations(model, (64, 32), "fp32")
    vae = backbone.components["vae"]
    found = []
    for shape, call in (
        ((3, 64, 32), backbone.encode_images),
        (model.latent_shape(backbone, (64, 32)), backbone.decode),
    ):
        with LiveBytes() as counted:
            counted.hold([*vae.parameters(), *vae.buffers()], "weights")
            call(torch.zeros(1, *shape))
        found.append(counted.peak_by_category[ACTIVATIONS])
    # Some kernels of the CPU make copies in another memory format or write out attention; it is small here.
    assert planned == pytest.approx(tuple(found), rel=0.1)
    larger = vae_activations(model, (128, 64), "fp32")
    assert all(3.5 < more / less < 4.5 for more, less in zip(larger, planned, strict=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_structures_of_published_vaes_have_their_sizes(name: str) -> None:
    entry = PUBLISHED[name]
    assert sum(p.numel() for p in vae_on_meta(entry.vae).parameters()) == entry.vae_parameters


# ---- stages


def test_encoding_is_planned_part_by_part() -> None:
    made = plan(config(SANA, **LORA), compare=False)
    model, stages = made.model, {stage.name: stage for stage in made.stages}
    assert list(stages) == [PROMPTS, PICTURES, STEP]
    assert stages[PROMPTS].needed == 2 * model.text_encoder_parameters + TABLE_ON_DEVICE + CONTEXT
    assert stages[PROMPTS].activations is None
    encoding, _ = vae_activations(model, None, "bf16")
    held = 2 * model.vae_parameters + TABLE_ON_DEVICE + CONTEXT
    assert stages[PICTURES].activations == encoding > 100 << 20
    assert stages[PICTURES].needed == pytest.approx(held + (1 + MARGIN) * encoding, abs=2)
    assert stages[STEP].needed == made.chosen.needed
    assert made.needed == max(stage.needed for stage in made.stages) == stages[PROMPTS].needed
    wide = plan(config(SANA, **{**LORA, "weight_dtype": "fp32"}), compare=False)
    assert needed(wide)[PROMPTS] - needed(made)[PROMPTS] == 2 * model.text_encoder_parameters


def test_a_run_whose_encoding_does_not_fit_does_not_fit() -> None:
    run = config(SANA, **{**LORA, "weight_dtype": "fp32"})
    gpu = 8 * GIB
    made = plan(run, gpu=gpu, compare=False)
    assert made.chosen.needed < gpu < made.needed
    assert made.fits is False and made.advice is not None
    assert made.advice.fits and made.advice.changes == {"weight_dtype": "bf16"}
    assert made.advice.needed == plan(dataclasses.replace(run, weight_dtype="bf16"), compare=False).needed <= gpu
    text = table(made)
    assert "does not fit into 8 GiB" in text and "(by stage: encoding prompts" in text and "one of them" not in text


def test_the_exit_code_follows_the_encoding(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: unused\npretrained_model_name_or_path: {SANA}\ndataset_name: unused\ntrain_batch_size: 1\n"
        "rank: 8\nweight_dtype: bf16\ngradient_checkpointing: true\n"
    )
    assert main(["plan", str(path), "--gpu", "8GB"]) == 0
    capsys.readouterr()
    assert main(["plan", str(path), "--gpu", "5GB"]) == 1
    assert "does not fit into 5 GiB" in capsys.readouterr().out


def test_nf4_has_the_transformer_on_the_gpu_while_data_is_encoded() -> None:
    eight, four = (plan(config(SANA, **LORA, quantization=kind), compare=False) for kind in ("int8", "nf4"))
    plain = plan(config(SANA, **LORA), compare=False)
    for name in (PROMPTS, PICTURES):
        assert needed(eight)[name] == needed(plain)[name]
        assert needed(four)[name] - needed(plain)[name] == four.held[FROZEN] > 200 << 20
    assert "bitsandbytes puts the transformer on the GPU" in table(four)
    assert "bitsandbytes" not in table(eight)


def test_main_memory_holds_all_parts_while_they_are_loaded() -> None:
    def host(**settings: object) -> tuple[int, Plan]:
        made = plan(config(SANA, **settings), compare=False)
        assert "loading: " in table(made)
        return made.host, made

    beside = blueprint(SANA).text_encoder_parameters + blueprint(SANA).vae_parameters
    full, made = host()
    assert full == pytest.approx(4 * (beside + made.chosen.step.parameters), rel=1e-4)
    assert host(**LORA)[0] == pytest.approx(2 * (beside + made.chosen.step.parameters), rel=1e-4)
    # What is quantised on the GPU never lies in main memory whole.
    assert host(**LORA, quantization="nf4")[0] == 2 * beside
    assert 2 * beside < host(**LORA, quantization="int8")[0] < host(**LORA)[0]


# ---- validation


def test_validation_holds_the_vae_and_decodes_a_picture() -> None:
    plain, drawn = (plan(config(SANA, **LORA, **more), compare=False) for more in ({}, PICTURES_WANTED))
    assert VALIDATION not in needed(plain)
    stage = drawn.stages[-1]
    _, decoding = vae_activations(drawn.model, None, "bf16")
    vae = 2 * drawn.model.vae_parameters
    assert stage.name == VALIDATION and stage.activations == decoding
    held = sum(drawn.held[name] for name in (FROZEN, TRAINED, OPTIMIZER, AVERAGE))
    # The average takes the place of the trained weights, which wait beside it; there are no gradients.
    held += drawn.held[TRAINED] + vae + TABLE_ON_DEVICE + CONTEXT
    assert drawn.held[GRADIENTS] > 0
    assert stage.needed == pytest.approx(held + (1 + MARGIN) * decoding, abs=4)
    assert needed(drawn)[STEP] - needed(plain)[STEP] == vae


def test_validation_is_dropped_where_that_makes_it_fit() -> None:
    run = config(LARGER, **LORA, **PICTURES_WANTED, ema_decay=None)
    made = plan(run, compare=False)
    without = plan(dataclasses.replace(run, validation_steps=None), compare=False)
    assert made.fullest.name == VALIDATION and without.needed < made.needed
    advised = plan(run, gpu=(made.needed + without.needed) // 2, compare=False)
    assert advised.fits is False and advised.advice is not None and advised.advice.fits
    assert advised.advice.changes == {"validation_steps": None}
    assert "--validation_steps null" in table(advised)


def test_a_vae_without_a_configuration_is_said_to_be_not_counted(tmp_path: Path) -> None:
    folder = save_tiny_pipeline("qwen_image", tmp_path / "model")
    run = config(str(folder), rank=2, **PICTURES_WANTED)
    assert "VAE, activations not counted" not in table(plan(run, compare=False))
    (folder / "vae" / "config.json").unlink()
    lines = table(plan(config(str(folder), rank=2, resolution=2, **PICTURES_WANTED), compare=False)).splitlines()
    for start in ("encoding pictures", "validation: decoding one picture"):
        assert any(start in line and "activations not counted" in line for line in lines)


# ---- advice


def test_the_order_of_advice() -> None:
    names = [change.__name__.strip("_") for change in _CHANGES]
    wanted = ["checkpoint", "sequential", "no_average", "smaller_batch", "smaller_rank", "fewer_bits", "least_rank"]
    places = [names.index(name) for name in [*wanted, "lora", "smaller_pictures"]]
    assert places == sorted(places)


def test_the_average_and_a_rank_of_32_go_before_the_bits_of_the_base() -> None:
    run = config(LARGER, **{**LORA, "rank": 256})
    least = plan(dataclasses.replace(run, ema_decay=None, rank=32), compare=False)
    made = plan(run, gpu=least.needed, compare=False)
    assert made.fits is False and made.advice is not None and made.advice.fits
    assert set(made.advice.changes) <= {"ema_decay", "rank"}
    assert made.advice.changes["rank"] in (64, 32)


def test_full_tuning_stays_full_where_it_fits_without_its_average() -> None:
    run = config(SANA, gradient_checkpointing=True, schedule="sequential", mixed_precision="bf16")
    whole, least = plan(run, compare=False), plan(dataclasses.replace(run, ema_decay=None), compare=False)
    assert whole.needed > least.needed
    made = plan(run, gpu=(whole.needed + least.needed) // 2, compare=False)
    assert made.advice is not None and made.advice.changes == {"ema_decay": None}


def test_what_keeps_a_run_from_fitting_is_said() -> None:
    run = config(LARGER, **{**LORA, "rank": 256})
    prompts = needed(plan(run, compare=False))[PROMPTS]
    made = plan(run, gpu=prompts - GIB // 8, compare=False)
    assert made.advice is not None and made.advice.changes and not made.advice.fits
    assert made.advice.needed >= prompts
    assert "GiB (encoding prompts). Take a smaller model" in table(made)


# ---- finished runs


def test_a_finished_run_of_full_tuning_is_a_model(tmp_path: Path) -> None:
    base = save_tiny_pipeline("sana", tmp_path / "base")
    run = tmp_path / "run"
    from_pretrained(base).transformer.save_pretrained(run / "model" / "transformer")
    Record("sana", "full", str(base), max_sequence_length=11).write(run / "model")
    tuned, start = blueprint(str(run)), blueprint(str(base))
    assert tuned == dataclasses.replace(
        start, name=str(run), tokens=11, source=tuned.source, options={"shift_padding": False}
    )
    assert str(run / "model") in tuned.source and str(base) in tuned.source
    assert plan(config(str(run), rank=2), compare=False).needed > 0
    assert plan(config(str(run / "model"), rank=2), compare=False).model.tokens == 11
    assert plan(config(str(run), rank=2, max_sequence_length=7), compare=False).model.tokens == 7


def test_a_run_that_cannot_be_a_start_is_refused(tmp_path: Path) -> None:
    for name, mode in (("lora", "lora"), ("full", "full")):
        (tmp_path / name / "model").mkdir(parents=True)
        Record("sana", mode, "someone/model").write(tmp_path / name / "model")
    with pytest.raises(SettingsError, match="holds a LoRA"):
        blueprint(str(tmp_path / "lora"))
    with pytest.raises(PlanError, match="was trained on someone/model, and that cannot be planned"):
        blueprint(str(tmp_path / "full"))


# ---- guidance of distilled models


def test_distilled_models_are_known_to_go_without_guidance() -> None:
    assert [name for name, entry in PUBLISHED.items() if not entry.guided] == [
        "black-forest-labs/FLUX.1-dev",
        "Tongyi-MAI/Z-Image-Turbo",
    ]
    turbo = plan(config("Tongyi-MAI/Z-Image-Turbo", **LORA), compare=False)
    assert turbo.guidance == 5 and "guidance_scale: 0 leaves that out" in table(turbo)
    unguided = plan(config("Tongyi-MAI/Z-Image-Turbo", **LORA, guidance_scale=0.0), compare=False)
    assert unguided.guidance is None and unguided.flops < turbo.flops and not unguided.notes
    assert not plan(config("Tongyi-MAI/Z-Image", **LORA), compare=False).notes
