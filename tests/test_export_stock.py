"""``apex-fast export --format diffusers``: what the stock pipelines make of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_cases import LENGTHS, assert_close
from export_cases import LORA, PROMPT, code_of, own_latents, pixels_of, run_card, tiny_run
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import make_pipeline, pipeline_keys
from torch import Tensor

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.tiny import TINY_FAMILIES, tiny_pipeline
from apex_fast.export import export_run
from apex_fast.export.command import main
from apex_fast.export.schedulers import SCHEDULER, STOCK, modes, scheduler
from apex_fast.export.source import open_source
from apex_fast.lora import WEIGHTS, LoraSettings, add_lora, save_lora
from apex_fast.training.models import load_generator
from apex_fast.training.provenance import front_matter

SIZE = (32, 32)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Backbone]:
    """The folder of an exported LoRA of each family, and the run's own generator."""
    run = tiny_run(tmp_path_factory, request.param)
    return export_run(run), load_generator(run)[0]


def layout(backbone: Backbone, noise: Tensor) -> Tensor:
    """Noise that was drawn in the shape of the pipeline's own latents, in the library's."""
    if not hasattr(backbone.pipeline(), "_pack_latents"):
        return noise
    from apex_fast.backbones.latents import unpack

    height, width = backbone.latent_shape(*SIZE)[1:]
    return unpack(noise.reshape(noise.shape[0], height * width // 4, -1), height, width)


# ---- the code of the card, against the library's own sampler


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_card_draws_what_the_library_draws(exported: tuple[Path, Backbone], steps: int) -> None:
    folder, backbone = exported
    latents, image = run_card(folder / "README.md", folder=str(folder), steps=steps)
    expected, picture = own_latents(backbone, PROMPT, SIZE, num_inference_steps=steps)
    assert_close(latents, expected, 5e-5)
    assert (pixels_of(image) - (picture[0] + 1).mul(127.5).clamp(0, 255)).abs().max() < 1.01
    assert Path("picture.png").is_file()


@pytest.mark.parametrize("steps", [2, 4])
def test_new_noise_in_every_step(exported: tuple[Path, Backbone], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, backbone = exported
    latents, _ = run_card(
        folder / "README.md",
        before_call=lambda _: torch.manual_seed(7),
        folder=str(folder),
        steps=steps,
        renoise=True,
    )
    seeded = STOCK[backbone.family].seeds_scheduler
    if not seeded:
        torch.manual_seed(7)
        monkeypatch.setattr(
            "apex_fast.sampler.normal", lambda shape, *_: layout(backbone, torch.randn(pipeline_shape(backbone, shape)))
        )
    expected, _ = own_latents(
        backbone, PROMPT, SIZE, num_inference_steps=steps, stochasticity=1.0, same_generator=seeded
    )
    assert_close(latents, expected, 5e-5)
    euler, _ = own_latents(backbone, PROMPT, SIZE, num_inference_steps=steps)
    assert (latents - euler).abs().max() > 0.1


def pipeline_shape(backbone: Backbone, shape: torch.Size) -> tuple[int, ...]:
    batch, channels, height, width = shape
    packed = hasattr(backbone.pipeline(), "_pack_latents")
    return (batch, height * width // 4, 4 * channels) if packed else tuple(shape)


def test_without_sigmas(exported: tuple[Path, Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    """One step needs no sigmas=. At two steps some pipelines take the same times without, and the others end early."""
    folder, backbone = exported
    pipeline = backbone.pipeline()
    pipeline.scheduler = scheduler()
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"max_sequence_length": backbone.max_sequence_length, "output_type": "latent"}
    settings.update(STOCK[backbone.family].unguided)

    def sigmas(steps: int) -> list[float]:
        pipeline(PROMPT, height=SIZE[0], width=SIZE[1], num_inference_steps=steps, **settings)
        return pipeline.scheduler.sigmas.tolist()

    assert sigmas(1) == [1.0, 0.0]
    if STOCK[backbone.family].uniform:
        assert sigmas(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    else:
        assert sigmas(4) == pytest.approx([1.0, 0.667, 0.334, 0.001, 0.0], abs=1e-3)


def test_the_schedulers_that_the_models_come_with_do_something_else() -> None:
    """Why a scheduler is exported at all: what the published ones of two families make of one step."""
    qwen, sana = tiny_pipeline("qwen_image").scheduler, tiny_pipeline("sana").scheduler
    with np.errstate(all="ignore"):
        qwen.set_timesteps(sigmas=[1.0], mu=0.6)
    assert qwen.sigmas.isnan().any()
    sana.set_timesteps(1)
    assert 0 < 1 - sana.sigmas[0] < 1e-3


def test_the_exported_configuration(exported: tuple[Path, Backbone]) -> None:
    """Every key that moves a sigma is in the file, off."""
    folder, backbone = exported
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert {key: config[key] for key in SCHEDULER} == SCHEDULER
    assert all(mode.reproduced for mode in modes(backbone.family)), "the tests above hold the table to this"


# ---- weights


def test_every_weight_is_loaded(exported: tuple[Path, Backbone], caplog: pytest.LogCaptureFixture) -> None:
    """No key is missing, none is left over, and alpha is the run's."""
    from diffusers.utils import logging
    from peft import get_peft_model_state_dict

    folder, backbone = exported
    saved = load_file(folder / WEIGHTS)
    pipeline = type(backbone.pipeline()).from_pretrained(backbone_folder(folder))
    logging.enable_propagation()
    try:
        with caplog.at_level("WARNING", logger="diffusers"):
            pipeline.load_lora_weights(folder)
    finally:
        logging.disable_propagation()
    # That a file has nothing for text encoders is said of every LoRA of a transformer alone.
    said = [r.message for r in caplog.records if "key" in r.message and "prefix='text_encoder" not in r.message]
    assert not said, "diffusers warns of keys that do not fit"
    (name,) = pipeline.transformer.peft_config
    loaded = get_peft_model_state_dict(pipeline.transformer, adapter_name=name)
    assert {f"transformer.{key}" for key in loaded} == set(saved)
    assert all(torch.equal(value, saved[f"transformer.{key}"]) for key, value in loaded.items())
    assert pipeline.transformer.peft_config[name].lora_alpha == 8
    scales = {m.scaling[name] for m in pipeline.transformer.modules() if hasattr(m, "scaling")}
    assert scales == {2.0}
    assert any(value.abs().max() > 1e-3 for key, value in saved.items() if "lora_B" in key)


def backbone_folder(folder: Path) -> str:
    """Folder of the base that an export names."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return file.metadata()["base_model"]


def test_the_header(exported: tuple[Path, Backbone]) -> None:
    folder, backbone = exported
    with safe_open(folder / WEIGHTS, "pt") as file:
        facts = file.metadata()
    assert facts["family"] == backbone.family and Path(facts["base_model"]).is_dir()
    assert facts["num_inference_steps"] == "1" and facts["training_steps"] == "4" and facts["site"] == "raw"
    assert json.loads(facts["shift"])["scale"] == -1.0 and facts["library"].startswith("apex_fast ")
    assert facts["license"] == "unknown: see the base model" and facts["resolution"] == "32x32"
    assert json.loads(facts["lora_adapter_metadata"])["transformer.lora_alpha"] == 8


@pytest.mark.parametrize("family", ["sana", "qwen_image", "flux"])
@pytest.mark.parametrize(("mode", "merge"), [("lora", True), ("full", False), ("full", True)])
def test_whole_transformers_and_pipelines(
    family: str, mode: str, merge: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tiny_run(tmp_path_factory, family, mode)
    folder = export_run(run, merge=merge)
    assert folder == run / "export" / ("diffusers-merged" if merge else "diffusers")
    latents, _ = run_card(folder / "README.md", folder=str(folder), steps=2)
    backbone = load_generator(run)[0]
    expected, _ = own_latents(backbone, PROMPT, SIZE, num_inference_steps=2)
    assert_close(latents, expected, 2e-4 if mode == "lora" else 5e-5)
    assert (folder / "transformer" / "config.json").is_file() and not list(folder.glob("*lora*"))
    if merge:
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(folder)
        assert type(pipeline) is type(backbone.pipeline())
        assert {key: pipeline.scheduler.config[key] for key in SCHEDULER} == SCHEDULER
        assert Backbone.from_pretrained(folder).family == family


def test_a_base_in_weight_files_of_a_variant(tmp_path: Path) -> None:
    """Their names and dtypes go with the variant, so a merged pipeline is written anew, and loads without it."""
    from apex_fast.backbones.tiny import tiny_pipeline
    from apex_fast.training.config import load_config
    from apex_fast.training.loop import Trainer

    make_pipeline(tmp_path / "plain", "sana")
    model = tmp_path / "plain" / "half"
    tiny_pipeline("sana").save_pretrained(model, safe_serialization=True, variant="fp16")
    words = (*LORA, "--variant", "fp16", "--max_sequence_length", str(LENGTHS["sana"]))
    Trainer(load_config(None, pipeline_keys(model, tmp_path / "run", *words))).run()
    expected, _ = own_latents(load_generator(tmp_path / "run")[0], PROMPT, SIZE)
    for merge in (False, True):
        folder = export_run(tmp_path / "run", merge=merge)
        assert not list(folder.rglob("*fp16*"))
        latents, _ = run_card(folder / "README.md", folder=str(folder), prompt=PROMPT)
        assert_close(latents, expected, 2e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merge_is_rounded_once(dora: bool) -> None:
    """Into a base in bf16 an adapter is added in fp32 and the sum rounded, as a merge in fp32 that is rounded after."""
    from apex_fast.backbones.sana import SanaBackbone
    from apex_fast.export.stock import merge_adapters

    def adapted(dtype: torch.dtype) -> Backbone:
        backbone = SanaBackbone(tiny_pipeline("sana").transformer.bfloat16().to(dtype))
        add_lora(backbone, LoraSettings(rank=4, use_dora=dora), seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in backbone.transformer.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.normal_(std=0.1, generator=generator)
                if "magnitude" in name:
                    parameter.copy_(parameter.bfloat16())
        return backbone

    half, full = adapted(torch.bfloat16), adapted(torch.float32)
    before = {name: value.clone() for name, value in half.transformer.state_dict().items()}
    for backbone in (half, full):
        merge_adapters(backbone, ["default"])
    exact, found = full.transformer.state_dict(), half.transformer.state_dict()
    assert exact.keys() == found.keys() and not any("lora" in key for key in found)
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    assert all(torch.equal(exact[key].bfloat16(), found[key]) for key in exact)
    assert sum(f"{key.removesuffix('.weight')}.base_layer.weight" in before for key in exact) > 10


def test_an_unfinished_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of a checkpoint the averaged weights are exported, as generate uses them, and its own step is named."""
    run = tiny_run(tmp_path_factory, "sana")
    checkpoint = run / "checkpoint-2"
    folder = export_run(checkpoint, out="there")
    latents, _ = run_card(folder / "README.md", folder=str(folder), steps=1)
    backbone = load_generator(checkpoint)[0]
    assert_close(latents, own_latents(backbone, PROMPT, SIZE)[0], 5e-5)
    assert "| training steps | 2 |" in (folder / "README.md").read_text()
    raw, averaged = load_file(checkpoint / "model" / WEIGHTS), load_file(folder / WEIGHTS)
    assert raw.keys() == averaged.keys() and not all(torch.equal(raw[k], averaged[k]) for k in raw)


@pytest.mark.parametrize("how", ["merge", "frozen"])
def test_a_run_that_started_from_a_lora(how: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = tiny_run(tmp_path_factory, "sana")
    words = ("--start_lora", str(first / "model"), "--start_lora_mode", how)
    run = tiny_run(tmp_path_factory, "sana", "lora", *words)
    backbone = load_generator(run)[0]
    expected, _ = own_latents(backbone, PROMPT, SIZE)
    for merge in (False, True):
        folder = export_run(run, merge=merge)
        assert (folder / "start_lora.safetensors").is_file() is not merge
        latents, _ = run_card(folder / "README.md", folder=str(folder))
        assert_close(latents, expected, 2e-4)


def test_a_style_lora_on_top(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A second LoRA of somebody else's loads beside the exported one and both are seen."""
    run = tiny_run(tmp_path_factory, "qwen_image")
    folder = export_run(run)
    base = load_generator(run)[0]
    style = Backbone.from_pretrained(backbone_folder(folder))
    add_lora(style, LoraSettings(rank=2, target_modules=("to_q", "to_v")), seed=5)
    with torch.no_grad():
        for name, parameter in style.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(6))
    save_lora(style, "style")

    def both(names: dict[str, Any]) -> None:
        pipeline = names["pipeline"]
        pipeline.load_lora_weights("style", adapter_name="style")
        (one_step,) = set(pipeline.transformer.peft_config) - {"style"}
        pipeline.set_adapters([one_step, "style"], [1.0, 0.7])

    stacked, image = run_card(folder / "README.md", before_call=both, folder=str(folder))
    alone, _ = run_card(folder / "README.md", folder=str(folder))
    assert image.size == (32, 32) and stacked.isfinite().all()
    assert (stacked - alone).abs().max() > 1e-2
    assert_close(alone, own_latents(base, PROMPT, SIZE)[0], 5e-5)


# ---- what cannot be exported, and where to


def test_refusals(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from tiny_runs import make_start

    from apex_fast.training.settings import SettingsError

    start = make_start(tmp_path / "start")
    with pytest.raises(SettingsError, match="text encoder is its own, so no stock pipeline can run it"):
        export_run(start)
    run = tiny_run(tmp_path_factory, "sana")
    with pytest.raises(SettingsError, match="is a whole pipeline and nothing that apex-fast train left"):
        export_run(run.parent / "sana")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for out in ("mine", "mine/thesis.txt"):
        with pytest.raises(SettingsError, match="is there already and is no earlier export"):
            export_run(run, out=out)
    with pytest.raises(SettingsError, match="is there already and is no earlier export"):
        export_run(run, out=run)
    with pytest.raises(SettingsError, match="format must be diffusers or comfyui, got 'gguf'"):
        export_run(run, format="gguf")
    with pytest.raises(FileNotFoundError, match="holds neither a finished model"):
        export_run(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    # an earlier export is replaced
    out = export_run(run, out="out")
    (out / "README.md").write_text("old")
    assert (export_run(run, out="out") / "README.md").read_text() != "old"


def test_a_run_on_a_run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A LoRA on a tuned model: stock diffusers has no base to put it on, so it needs --merge."""
    from apex_fast.training.settings import SettingsError

    first = tiny_run(tmp_path_factory, "sana", "full")
    run = tiny_run(tmp_path_factory, "sana", "lora", "--pretrained_model_name_or_path", str(first))
    with pytest.raises(SettingsError, match="was tuned itself, and no stock pipeline.*--merge for one pipeline"):
        export_run(run)
    folder = export_run(run, merge=True)
    latents, _ = run_card(folder / "README.md", folder=str(folder))
    assert_close(latents, own_latents(load_generator(run)[0], PROMPT, SIZE)[0], 2e-4)


# ---- the card


def test_what_the_card_says(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path_factory, "sana")
    base = run.parent / "sana"
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: some-terms\n---\n# A model\n")
    try:
        assert main([str(run), "--base", "somebody/a-model", "--out", "card"]) == 0
    finally:
        (base / "README.md").unlink()
    assert capsys.readouterr().out.strip() == "card"
    text = Path("card/README.md").read_text()
    front = front_matter(text)
    assert front["base_model"] == "somebody/a-model" and front["base_model_relation"] == "adapter"
    assert (front["license"], front["license_name"]) == ("other", "some-terms")
    assert front["library_name"] == "diffusers" and {"apex_fast", "lora", "sana"} <= set(front["tags"])
    assert "![Samples of the validation prompts](samples.png)" in text and Path("card/samples.png").is_file()
    for line in (
        "| trained | a LoRA of rank 4, alpha 8 |",
        "| condition shift | c_fake = -1 c + 0.5, scalar |",
        "| site of the shift | raw |",
        "| resolution | 32 x 32 (height x width) |",
        "| training step | L_fake | L_correction | L_sup | v_shift - v_real, relative |",
        "| 1 step | yes | by the scheduler's configuration alone |",
    ):
        assert line in text
    assert str(base) not in text and 'base = "somebody/a-model"' in code_of(Path("card/README.md"))
    # a base that is a folder is named as it is, with a word about it
    assert main([str(run), "--out", "card"]) == 0
    captured = capsys.readouterr()
    assert "--base owner/name" in captured.err and f'base = "{base}"' in Path("card/README.md").read_text()


def test_records_of_earlier_versions(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Shift and steps come from the config of the run then, and the licence stays unknown."""
    run = tiny_run(tmp_path_factory, "z_image")
    record = json.loads((run / "model" / "apex_fast.json").read_text())
    added = ("shift", "train_steps", "num_inference_steps", "library_version", "licence")
    assert record["shift"]["bias"] == 0.5 and record["train_steps"] == 4 and record["library_version"]
    old = tmp_path / "old"
    shutil.copytree(run, old)
    earlier = {key: value for key, value in record.items() if key not in added}
    (old / "model" / "apex_fast.json").write_text(json.dumps(earlier))
    source = open_source(old)
    assert source.shift["bias"] == 0.5 and source.train_steps == 4 and source.steps == 1
    assert source.metadata["library"].startswith("apex_fast before 0.1.0")
