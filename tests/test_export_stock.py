"""``apex-fast export --format diffusers``: what the stock pipelines make of a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_cases import LENGTHS, assert_close
from export_cases import LORA, PROMPT, code_of, decoded, own_latents, pixels_of, run_card, tiny_run
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import make_pipeline, pipeline_keys
from torch import Tensor

import apex_fast as af
from apex_fast.backbones.base import Backbone
from apex_fast.backbones.tiny import TINY_FAMILIES, tiny_pipeline
from apex_fast.export import export_run
from apex_fast.export.command import main
from apex_fast.export.schedulers import SCHEDULER, STOCK, scheduler
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
    mode = "1 step" if steps == 1 else "2 or 4 steps, Euler"
    assert said_of(folder, mode) == "yes"


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
    assert said_of(folder, "2 or 4 steps, new noise in each") == "yes"
    euler, _ = own_latents(backbone, PROMPT, SIZE, num_inference_steps=steps)
    assert (latents - euler).abs().max() > 0.1


def said_of(folder: Path, mode: str) -> str:
    """What the table of the card in ``folder`` says of ``mode``: whether it is reproduced."""
    (row,) = re.findall(rf"^\| {mode} \| (.*?) \|", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return row


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_in_bf16(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against the same weights in fp32 the stock pipeline is at most twice as far off as the library's own sampler, at
    times that are rounded as the pipeline rounds them; where that moves a time, the card says so."""
    run = tiny_run(tmp_path_factory, family, "lora", "--weight_dtype", "bf16")
    folder = export_run(run)
    half, exact = load_generator(run)[0], load_generator(run)[0].float()
    for part in exact.components.values():
        if isinstance(part, torch.nn.Module):
            part.float()
    if exact.embedded_guidance is not None:
        # 3500 is 3504 in bf16, in the network itself.
        exact.embedded_guidance = (torch.tensor(exact.embedded_guidance).bfloat16() * 1000).item() / 1000
    told = STOCK[family].bf16_time

    def drawn(backbone: Backbone, steps: int, second: float = 0.75) -> Tensor:
        noise = torch.randn(1, *backbone.latent_shape(*SIZE), generator=torch.Generator().manual_seed(0))

        def velocity(x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
            return backbone(x_t, torch.where(t == 0.75, second, t), condition)

        with torch.no_grad(), decoded() as found:
            backbone.decode(af.sample(velocity, noise, backbone.encode([PROMPT]), num_inference_steps=steps))
        return found[0].float()

    def off(found: Tensor, expected: Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    for steps in (1, 2, 4):
        latents, _ = run_card(folder / "README.md", folder=str(folder), steps=steps)
        truth = drawn(exact, steps, told)
        assert off(latents.float(), truth) <= 2 * off(drawn(half, steps, told), truth) < 0.03
    moved = off(latents.float(), drawn(exact, 4)) > 3 * off(latents.float(), truth)
    assert moved == (told != 0.75)
    reason = f"2 steps yes; at 4 the network is told the time {told} in place of 0.75, since this pipeline rounds times"
    for mode in ("2 or 4 steps, Euler", "2 or 4 steps, new noise in each"):
        assert said_of(folder, mode) == (f"{reason} to bf16" if moved else "yes")


def test_the_call_turns_guidance_off(exported: tuple[Path, Backbone], caplog: pytest.LogCaptureFixture) -> None:
    """With the arguments of the table, and without a warning: Qwen-Image's pipeline has a guidance scale above 1 unless
    it is told, and warns that there is no negative prompt for it."""
    from diffusers.utils import logging

    folder, backbone = exported
    call = code_of(folder / "README.md").partition("image = pipeline(")[2]
    for name, value in STOCK[backbone.family].unguided.items():
        assert f"    {name}={value!r},\n" in call
    logging.enable_propagation()
    try:
        with caplog.at_level("WARNING", logger="diffusers"):
            run_card(folder / "README.md", before_call=lambda _: caplog.clear(), folder=str(folder))
    finally:
        logging.disable_propagation()
    assert [record.message for record in caplog.records if "guidance" in record.message] == []


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
    folder, _ = exported
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert {key: config[key] for key in SCHEDULER} == SCHEDULER


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
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    if mode == "full":
        trained = load_file(run / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
        assert weights.keys() == trained.keys() and all(torch.equal(weights[key], trained[key]) for key in trained)
    with safe_open(folder / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["format"] == "pt" and facts.items() >= open_source(run).metadata.items()
    assert facts["site"] == "raw" and facts["training_steps"] == "4" and facts["license"]
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


@pytest.mark.parametrize("family", ["qwen_image", "flux"])
def test_a_style_lora_on_top(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A second LoRA of somebody else's loads beside the exported one and both are seen."""
    run = tiny_run(tmp_path_factory, family)
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

    def style_alone(names: dict[str, Any]) -> None:
        both(names)
        names["pipeline"].set_adapters(["style"], [0.7])

    stacked, image = run_card(folder / "README.md", before_call=both, folder=str(folder))
    alone, _ = run_card(folder / "README.md", folder=str(folder))
    styled, _ = run_card(folder / "README.md", before_call=style_alone, folder=str(folder))
    assert image.size == (32, 32) and stacked.isfinite().all()
    assert (stacked - alone).abs().max() > 1e-2 and (stacked - styled).abs().max() > 1e-2
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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied_run(run: Path, place: Path) -> Path:
    """A copy of a run to change, without its exports."""
    return Path(shutil.copytree(run, place, ignore=shutil.ignore_patterns("export")))


def test_nothing_that_an_export_reads_is_written_over(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither the run's model or a checkpoint, which have manifests of their own, nor what lies around them."""
    from apex_fast.training.settings import SettingsError

    run = copied_run(tiny_run(tmp_path_factory, "sana"), tmp_path / "runs" / "run")
    before = contents(tmp_path / "runs")
    refused = {
        run / "model": "is no earlier export",
        run / "checkpoint-4": "is no earlier export",
        tmp_path / "runs": "is no earlier export",
        run / "model" / "export": "is inside of .*model, which is complete",
        run / "checkpoint-2" / "there" / "export": "is inside of .*checkpoint-2, which is complete",
    }
    for out, message in refused.items():
        with pytest.raises(SettingsError, match=message):
            export_run(run, out=out)
    assert contents(tmp_path / "runs") == before
    # Exports that hold what is exported now: a model copied over one, a run inside, the base of the run.
    over = export_run(run, out=tmp_path / "over")
    shutil.copytree(run / "model", over, dirs_exist_ok=True)
    around = export_run(run, out=tmp_path / "around")
    shutil.copytree(run, around / "run")
    base = export_run(run, out=tmp_path / "base", merge=True)
    for place, source, more, message in (
        (over, over, {}, "is no earlier export"),
        (around, around / "run", {}, "holds .*around/run/model, which this export reads"),
        (base, run, {"base": str(base), "merge": True}, "holds .*base, which this export reads"),
    ):
        before = contents(place)
        with pytest.raises(SettingsError, match=message):
            export_run(source, out=place, **more)
        assert contents(place) == before
    # Of a model without its run the default is beside it.
    shutil.copytree(run / "model", tmp_path / "alone" / "mine")
    before = contents(tmp_path / "alone" / "mine")
    assert export_run(tmp_path / "alone" / "mine") == tmp_path / "alone" / "mine-export" / "diffusers"
    assert contents(tmp_path / "alone" / "mine") == before


def test_files_that_somebody_added_to_an_export_stay(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As the picture that the card's own code saves; what an export wrote and would not write again goes."""
    from apex_fast.training.settings import SettingsError

    run = tiny_run(tmp_path_factory, "sana")
    out = export_run(run, out="out", merge=True)
    (out / "picture.png").write_bytes(b"mine")
    (out / "notes" / "deep").mkdir(parents=True)
    script = out / "notes" / "deep" / "draw.sh"
    script.write_text("echo")
    script.chmod(0o755)
    (out / "transformer" / "mine.txt").write_text("mine")
    for _ in range(2):
        assert export_run(run, out="out") == out
        assert (out / "picture.png").read_bytes() == b"mine" and (out / "transformer" / "mine.txt").is_file()
        assert script.read_text() == "echo" and script.stat().st_mode & 0o777 == 0o755
        assert not (out / "model_index.json").exists() and not (out / "vae").exists()
    # what an export would write over
    (out / "model_index.json").write_text("mine")
    with pytest.raises(SettingsError, match=r"model_index.json was not written by the export before"):
        export_run(run, out="out", merge=True)
    (out / "model_index.json").unlink()
    (out / "link").symlink_to(tmp_path)
    with pytest.raises(SettingsError, match="link is a link"):
        export_run(run, out="out")
    assert (out / "picture.png").read_bytes() == b"mine" and (out / WEIGHTS).is_file()


def test_an_export_that_was_killed_in_the_middle(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Between taking the old folder away and putting the new one there: the old one has what somebody added."""
    run = tiny_run(tmp_path_factory, "sana")
    out = export_run(run, out="out")
    (out / "picture.png").write_bytes(b"mine")
    out.rename(out.with_name(f".{out.name}.partial-replaced-1"))
    assert (export_run(run, out="out") / "picture.png").read_bytes() == b"mine"


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
    captured = capsys.readouterr()
    assert captured.out.strip() == "card" and captured.err.splitlines() == [f"exported: the finished model of {run}"]
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


def test_the_card_of_an_earlier_checkpoint(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no picture and no number of a later step, and the command says which weights it took, and why."""
    run = copied_run(tiny_run(tmp_path_factory, "sana"), tmp_path / "run")
    shutil.rmtree(run / "model")
    weights = run / "checkpoint-4" / "model" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    samples = run / "samples"
    assert (samples / "step-000004.png").is_file()
    assert main([str(run), "--out", "none"]) == 0
    error = capsys.readouterr().err
    assert f"exported: the averaged weights of {run / 'checkpoint-2'}" in error
    assert f"careful: {run / 'checkpoint-4'} was passed over" in error and "bytes instead of" in error
    text = Path("none/README.md").read_text()
    assert "| training steps | 2 |" in text and "samples.png" not in text and not Path("none/samples.png").exists()
    (rows,) = re.findall(r"\| training step \|.*?\n((?:\|.*\n)+)", text)
    assert [row.split("|")[1].strip() for row in rows.splitlines()[1:]] == ["1", "2"]
    (samples / "step-000002.png").write_bytes(b"at step 2")
    (samples / "step-000010.png").write_bytes(b"at step 10")
    assert main([str(run), "--out", "two"]) == 0
    assert Path("two/samples.png").read_bytes() == b"at step 2"
    # a checkpoint that was named is no surprise
    capsys.readouterr()
    assert main([str(run / "checkpoint-2"), "--out", "named"]) == 0
    assert "passed over" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("--shift.train_scale", "true"), r"c_fake = -1 c \+ 0.5, scalar, scale learned from there, to scale (\S+) \|"),
        (
            ("--shift.mode", "diagonal", "--shift.trainable", "true"),
            r"diagonal, scale and bias learned from there, to scale (\S+) \(mean; \S+ to \S+\), bias \S+ \(mean; ",
        ),
    ],
)
def test_a_shift_that_was_learned(
    words: tuple[str, ...], shown: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Card and header have what it came to, as far as a checkpoint of these weights still has it."""
    from apex_fast.training.checkpoint import load_state

    run = copied_run(tiny_run(tmp_path_factory, "sana", "lora", *words), tmp_path / "run")
    scales = {step: load_state(run / f"checkpoint-{step}", "objective")["shift"]["scale"] for step in (2, 4)}
    assert (scales[2] != scales[4]).all() and (scales[2] != -1).all()
    for step, model in ((4, run), (2, run / "checkpoint-2")):
        folder = export_run(model, out=f"step{step}")
        (said,) = re.findall(shown, (folder / "README.md").read_text())
        assert float(said) == pytest.approx(scales[step].mean().item(), abs=1e-4)
        with safe_open(folder / WEIGHTS, "pt") as file:
            learned = json.loads(file.metadata()["shift_learned"])
        assert ("bias" in learned) == (len(words) == 4)
        values = scales[step]
        expected = (
            values.item() if values.dim() == 0 else [values.min().item(), values.mean().item(), values.max().item()]
        )
        assert learned["scale"] == pytest.approx(expected)
    shutil.rmtree(run / "checkpoint-4")
    text = (export_run(run, out="gone") / "README.md").read_text()
    assert "learned from there (what they came to was in checkpoints that are gone)" in text


# ---- the base


def test_a_base_that_was_moved(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A LoRA needs no base to be written. A merge reads it from --base, which the card names too."""
    original = tiny_run(tmp_path_factory, "sana")
    record = json.loads((original / "model" / "apex_fast.json").read_text())
    base = shutil.copytree(record["base"], tmp_path / "base")
    run = copied_run(original, tmp_path / "run")
    for file in run.rglob("apex_fast.json"):
        file.write_text(json.dumps({**record, "base": str(base), "licence": "apache-2.0"}))
    moved = base.rename(tmp_path / "moved")
    folder = export_run(run, out="out")
    assert front_matter((folder / "README.md").read_text())["license"] == "apache-2.0"
    with pytest.raises(FileNotFoundError, match="is not there any more; say where it is with --base"):
        export_run(run, merge=True, out="merged")
    merged = export_run(run, merge=True, out="merged", base=str(moved))
    expected, _ = own_latents(load_generator(run, base=str(moved))[0], PROMPT, SIZE)
    assert_close(run_card(merged / "README.md", folder=str(merged))[0], expected, 2e-4)


def test_another_base_than_the_recorded_one(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder is read, though the old one is there as well; one of another family is refused, before anything is."""
    from apex_fast.training.settings import SettingsError

    run = tiny_run(tmp_path_factory, "sana")
    other = make_pipeline(tmp_path / "other", "sana", seed=3)
    folder = export_run(run, merge=True, out="merged", base=str(other))
    expected, _ = own_latents(load_generator(run, base=str(other))[0], PROMPT, SIZE)
    assert_close(run_card(folder / "README.md", folder=str(folder))[0], expected, 2e-4)
    ours, _ = own_latents(load_generator(run)[0], PROMPT, SIZE)
    assert (expected - ours).abs().max() > 0.1
    flux = make_pipeline(tmp_path / "flux", "flux")
    tuned = tiny_run(tmp_path_factory, "qwen_image", "full")
    for base, family in ((flux, "flux"), (flux / "transformer", "flux"), (tuned, "qwen_image")):
        for merge in (False, True):
            with pytest.raises(SettingsError, match=f"--base: .* is of the family {family}, and .* model of sana"):
                export_run(run, out="wrong", base=str(base), merge=merge)
    assert not Path("wrong").exists()


def test_a_revision_belongs_to_its_repository(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = copied_run(tiny_run(tmp_path_factory, "sana"), tmp_path / "run")
    record = json.loads((run / "model" / "apex_fast.json").read_text())
    changed = {**record, "base": "somebody/a-model", "revision": "abc"}
    (run / "model" / "apex_fast.json").write_text(json.dumps(changed))
    for base, named in ((None, True), ("somebody/another", False)):
        text = (export_run(run, out="out", base=base) / "README.md").read_text()
        assert ('revision="abc"' in text) is named and ("revision `abc`" in text) is named


def test_whose_licence_it_is(tmp_path: Path) -> None:
    """That of the card in the model's folder, or of the run whose model/ it is; not of whatever lies around it."""
    from apex_fast.training.provenance import licence_of

    card = "---\nlicense: mit\n---\n"
    for place in ("models", "run"):
        (tmp_path / place / "model").mkdir(parents=True)
        (tmp_path / place / "README.md").write_text(card)
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "models" / "sana").mkdir()
    assert licence_of(tmp_path / "models" / "sana") is None and licence_of(tmp_path / "models" / "model") is None
    assert licence_of(tmp_path / "run" / "model") == "mit" and licence_of(tmp_path / "run") == "mit"
    # folders that are gone, and names that the hub cannot have
    for gone in ("/no/such/folder", "./gone", "a folder/that is gone", "runs/gone", "gone"):
        assert licence_of(gone) is None
