"""Runs on whole diffusers pipelines, tiny and random: full tuning and LoRA from the command line to a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("peft")

from tiny_runs import losses, make_pipeline, pipeline_keys

from apex_fast.cli import main
from apex_fast.generate import generate
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer
from apex_fast.training.models import load_generator
from apex_fast.training.settings import SettingsError

LORA = ("--rank", "4", "--learning_rate", "1e-3")
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("sana"), "sana")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("qwen"), "qwen_image")


@pytest.fixture(scope="module")
def lora_run(sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA on SANA, made by the command itself."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    assert main(["train", *pipeline_keys(sana, folder, *LORA, "--lora_alpha", "8")]) == 0
    return folder


def trainer_of(model: Path, folder: Path, *more: str) -> Trainer:
    return Trainer(load_config(None, pipeline_keys(model, folder, *more)))


def velocity_of(transformer: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    config = transformer.config
    x = torch.randn(2, config.in_channels, 8, 8, generator=generator)
    text = torch.randn(2, 5, config.caption_channels, generator=generator)
    with torch.no_grad():
        out = transformer.eval()(
            x, encoder_hidden_states=text, timestep=torch.tensor([900.0, 300.0]), return_dict=False
        )
    return out[0]


# ---- from the command to a picture


@pytest.mark.parametrize(("family", "mode"), [("sana", "full"), ("sana", "lora"), ("qwen_image", "lora")])
def test_train_and_generate(
    sana: Path, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, mode: str
) -> None:
    model, run = {"sana": sana, "qwen_image": qwen}[family], tmp_path / "run"
    more = ("--validation_prompts", "a red circle", "--validation_steps", "2", "--checkpointing_steps", "2")
    assert main(["train", *pipeline_keys(model, run, *more, *(LORA if mode == "lora" else ()))]) == 0
    text = capsys.readouterr().err
    assert "encoded 8 pictures to" in text and "a step is" in text
    assert (run / "samples" / "step-000004.png").is_file()
    # only what was trained is saved, and a record of the rest
    written = {str(p.relative_to(run / "model")) for p in (run / "model").rglob("*") if p.is_file()}
    weights = {WEIGHTS} if mode == "lora" else {"transformer/config.json"}
    assert weights | {"apex_fast.json", "manifest.json"} <= written
    assert not any("vae" in name or "text_encoder" in name for name in written)
    record = json.loads((run / "model" / "apex_fast.json").read_text())
    assert (record["family"], record["mode"], record["base"]) == (family, mode, str(model.resolve()))
    # a picture, at the size of the run and at another
    out = tmp_path / "picture.png"
    words = ["generate", str(run), "--prompt", "a red circle", "--n", "1", "--out", str(out)]
    assert main(words) == 0
    from PIL import Image

    with Image.open(out) as picture:
        assert picture.size == (256, 256)
    assert main([*words, "--height", "48", "--width", "32", "--size", "96"]) == 0
    with Image.open(out) as picture:
        assert picture.size == (64, 96)
    assert main([*words, "--height", "33"]) == 2
    assert "multiples of" in capsys.readouterr().err
    # run, its checkpoint and the saved folder are one model
    pictures = [
        generate(run / part, ["a red circle"], images_per_prompt=2)[0] for part in ("", "checkpoint-4", "model")
    ]
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])
    assert pictures[0].shape == (2, 3, 32, 32) and pictures[0].isfinite().all()
    size = {"height": 32, "width": 32, "images_per_prompt": 2}
    earlier, start = (generate(p, ["a red circle"], **size)[0] for p in (run / "checkpoint-2", model))
    assert len({tuple(p.flatten().tolist()) for p in (earlier, start, pictures[0])}) == 3


def test_the_stock_pipeline_reads_a_lora(sana: Path, lora_run: Path) -> None:
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(sana)
    before = velocity_of(pipeline.transformer)
    pipeline.load_lora_weights(str(lora_run / "model"))
    ours, _ = load_generator(lora_run)
    after = velocity_of(pipeline.transformer)
    torch.testing.assert_close(after, velocity_of(ours.transformer), rtol=1e-5, atol=1e-6)
    assert (after - before).abs().max() > 1e-4
    assert ours.transformer.peft_config["default"].lora_alpha == 8


def test_diffusers_reads_a_fully_tuned_transformer(sana: Path, tmp_path: Path) -> None:
    from diffusers import SanaTransformer2DModel

    trainer = trainer_of(sana, tmp_path / "run", "--learning_rate", "1e-3")
    trainer.run()
    tuned = SanaTransformer2DModel.from_pretrained(tmp_path / "run" / "model" / "transformer")
    assert trainer.average is not None
    averages = {name.removeprefix("transformer."): value for name, value in trainer.average.average.items()}
    assert all(torch.equal(value, averages[name]) for name, value in tuned.named_parameters() if name in averages)
    # and it can be tuned on: the run is a model, which knows where its text encoder is
    again = trainer_of(tmp_path / "run", tmp_path / "again", "--dataset_name", str(sana.parent / "pictures"))
    assert torch.equal(velocity_of(again.backbone.transformer), velocity_of(tuned))
    assert again.run().finished


def test_the_base_stays_as_it_is_under_lora(sana: Path, tmp_path: Path) -> None:
    trainer = trainer_of(sana, tmp_path, *LORA)
    base = {n: p.detach().clone() for n, p in trainer.backbone.transformer.named_parameters() if ".lora_" not in n}
    names = [n for n, p in trainer.backbone.named_parameters() if p.requires_grad]
    assert names and all(".lora_" in name and ".default." in name for name in names)
    trainer.run()
    now = dict(trainer.backbone.transformer.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items())
    assert any(now[n.removeprefix("transformer.")].abs().max() > 0 for n in names if "lora_B" in n)
    # a checkpoint is as small as what it holds
    sizes = {p.name: sum(f.stat().st_size for f in p.rglob("*.safetensors")) for p in tmp_path.iterdir() if p.is_dir()}
    (transformer,) = (sana / "transformer").glob("*.safetensors")
    assert sizes["model"] < transformer.stat().st_size / 2


def test_parts_that_are_not_needed_are_dropped(sana: Path, tmp_path: Path) -> None:
    plain = trainer_of(sana, tmp_path / "plain")
    assert not {"text_encoder", "tokenizer", "vae"} & set(plain.backbone.components)
    drawn = trainer_of(sana, tmp_path / "drawn", "--validation_prompts", "a cat", "--validation_steps", "2")
    assert "vae" in drawn.backbone.components and "text_encoder" not in drawn.backbone.components
    assert drawn.draw(["a cat"] * 5, num_inference_steps=1).shape == (5, 3, 32, 32)
    with pytest.raises(KeyError, match="a dog"):
        drawn.draw(["a dog"], num_inference_steps=1)


def test_latents_and_embeddings_are_those_of_the_pictures_and_captions(sana: Path, tmp_path: Path) -> None:
    from apex_fast.backbones.base import Backbone
    from apex_fast.data.folder import PictureFolder, read_picture

    trainer = trainer_of(sana, tmp_path, "--resolution", "[32, 48]")
    backbone, folder = Backbone.from_pretrained(sana), PictureFolder.open(sana.parent / "pictures")
    for _ in range(5):
        chosen = trainer.batches.order.peek().tolist()
        latents, condition = trainer.batches.next()
        pictures = torch.stack([read_picture(folder.files[i], 32, 48) for i in chosen])
        torch.testing.assert_close(latents, backbone.encode_images(pictures), rtol=1e-4, atol=1e-5)
        expected = backbone.encode([folder.captions[i] for i in chosen])
        assert torch.equal(condition.prompt_embeds_mask, expected.prompt_embeds_mask)
        kept = expected.prompt_embeds_mask
        torch.testing.assert_close(condition.prompt_embeds[kept], expected.prompt_embeds[kept], rtol=1e-4, atol=1e-4)


# ---- guidance, roles, schedules


@pytest.mark.parametrize(
    ("family", "more", "scale", "guided_by_pipeline"),
    [
        ("sana", (), 4.5, False),
        ("sana", ("--guidance_scale", "1.0"), 1.0, False),
        ("sana", ("--guidance_scale", "2.0", "--negative_prompt", "dark"), 2.0, False),
        ("qwen_image", (), 1.0, False),
        ("qwen_image", ("--negative_prompt", " "), 4.0, True),
        ("qwen_image", ("--negative_prompt", " ", "--guidance_scale", "3.0"), 3.0, True),
    ],
)
def test_the_real_branch_is_guided_as_the_pipeline_guides(
    sana: Path, qwen: Path, tmp_path: Path, family: str, more: tuple[str, ...], scale: float, guided_by_pipeline: bool
) -> None:
    trainer = trainer_of({"sana": sana, "qwen_image": qwen}[family], tmp_path, *LORA, *more)
    assert trainer.objective.guidance_scale == scale
    assert (trainer.velocities.guide is not None) == guided_by_pipeline
    assert (trainer.negative is not None) == (scale != 1.0)
    trainer._one_step()


def test_the_negative_prompt_is_prepared_as_such(sana: Path, tmp_path: Path) -> None:
    """SANA puts its instruction before prompts and not before negative ones."""
    from apex_fast.backbones.base import Backbone

    trainer = trainer_of(sana, tmp_path, "--negative_prompt", "a dog")
    backbone = Backbone.from_pretrained(sana)
    negative, positive = backbone.encode(["a dog"], negative=True), backbone.encode(["a dog"])
    assert trainer.negative is not None
    assert torch.equal(trainer.negative.prompt_embeds, negative.prompt_embeds)
    assert not torch.equal(trainer.negative.prompt_embeds, positive.prompt_embeds)


def test_guidance_without_a_prompt_to_guide_away_from_is_refused(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="guidance_scale: 4.0 needs a prompt to guide away from.*negative_prompt"):
        trainer_of(qwen, tmp_path, "--guidance_scale", "4.0")


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_all_schedules_move_the_weights_alike(sana: Path, tmp_path: Path, mode: str) -> None:
    more = ("--objective.warmup_steps", "0", "--objective.ramp_steps", "0", "--max_train_steps", "2")
    for schedule in ("joint", "retain", "sequential"):
        run = ("--schedule", schedule, "--mixed_precision", "no", *more, *(LORA if mode == "lora" else ()))
        assert trainer_of(sana, tmp_path / schedule, *run).run().finished
    results = [torch.tensor(losses(tmp_path / s)) for s in ("joint", "retain", "sequential")]
    torch.testing.assert_close(results[0], results[1], rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(results[0], results[2], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_real_branches_part_as_soon_as_the_network_moves(sana: Path, tmp_path: Path, mode: str) -> None:
    found = {}
    for real in ("frozen", "ema", "live"):
        more = ("--real_branch", real, "--learning_rate", "3e-3", *(("--rank", "4") if mode == "lora" else ()))
        trainer = trainer_of(sana, tmp_path / real, *more)
        copied = sum(p.numel() for p in trainer.velocities._copy.parameters()) if trainer.velocities._copy else 0
        assert (copied > 0) == (mode == "full" and real != "live")
        trainer.run()
        found[real] = [correction for _, _, correction, _ in losses(tmp_path / real)]
    assert found["frozen"][0] == pytest.approx(found["ema"][0], rel=1e-5) == pytest.approx(found["live"][0], rel=1e-5)
    last = [values[-1] for values in found.values()]
    assert len(set(last)) == 3


@pytest.mark.parametrize("loss", ["paper", "flow_matching"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_other_losses(sana: Path, tmp_path: Path, mode: str, loss: str) -> None:
    """Neither asks a real branch: nothing is guided, and full tuning holds no copy of the start."""
    trainer = trainer_of(sana, tmp_path, "--loss", loss, *(LORA if mode == "lora" else ("--learning_rate", "1e-3")))
    assert trainer.negative is None and trainer.velocities._copy is None
    start = [p.detach().clone() for p in trainer.parameters]
    assert trainer.run().finished
    assert any(not torch.equal(a, b) for a, b in zip(start, trainer.parameters, strict=True))
    assert generate(tmp_path, ["a cat"], images_per_prompt=1)[0].isfinite().all()


def test_what_has_no_gradient_is_left_alone(qwen: Path, tmp_path: Path) -> None:
    """The text side of Qwen's last block: weight decay would shrink it, and nothing would bring it back."""
    trainer = trainer_of(qwen, tmp_path, "--adam_weight_decay", "0.5", "--learning_rate", "1e-2")
    transformer = trainer.backbone.transformer
    unused = trainer.backbone.parameters_without_gradient()
    before = {name: transformer.get_parameter(name).detach().clone() for name in unused}
    assert unused and trainer.run().finished
    assert all(torch.equal(transformer.get_parameter(name), value) for name, value in before.items())
    trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in transformer.named_parameters()} - unused


def test_frozen_without_data_is_warned_about(sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer_of(sana, tmp_path, "--objective.supervised_weight", "0", "--max_train_steps", "3").run()
    assert "careful: real_branch: frozen with objective.supervised_weight: 0" in capsys.readouterr().err


def test_the_guided_pass_is_said(sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer_of(sana, tmp_path / "guided", *LORA).run()
    guided = capsys.readouterr().err
    trainer_of(sana, tmp_path / "plain", *LORA, "--guidance_scale", "1").run()
    plain = capsys.readouterr().err
    assert 'guided by 4.5 away from "", which is one of the passes' in guided and "a step is 12 F" in guided
    assert "not guided" in plain and "a step is 11 F" in plain


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_lora_in_either_dtype_on_a_bf16_base(sana: Path, tmp_path: Path, dtype: str) -> None:
    trainer = trainer_of(sana, tmp_path, *LORA, "--weight_dtype", "bf16", "--lora_dtype", dtype)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert {p.dtype for p in trainer.parameters} == {wanted}
    assert trainer.run().finished
    images, _ = generate(tmp_path, ["a red circle"], images_per_prompt=1)
    assert images.isfinite().all()


def test_a_lora_on_the_digits(tmp_path: Path) -> None:
    """A model with a text encoder of its own takes a LoRA as well."""
    pytest.importorskip("sklearn")
    words = ["--pretrained_model_name_or_path", "digits_start", "--output_dir", str(tmp_path), "--max_train_steps", "3"]
    words += ["--objective.warmup_steps", "1", "--objective.ramp_steps", "1", "--train_batch_size", "8", *LORA]
    assert main(["train", *words, "--device", "cpu"]) == 0
    tuned, start = (generate(model, ["a three"], images_per_prompt=2)[0] for model in (tmp_path, "digits_start"))
    assert tuned.shape == (2, 1, 8, 8) and not torch.equal(tuned, start)


def test_an_int8_base(sana: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    more = ("--quantization", "int8", "--weight_dtype", "bf16", "--gradient_checkpointing", "true")
    trainer = trainer_of(sana, tmp_path, *LORA, *more)
    held = {type(p).__name__ for n, p in trainer.backbone.transformer.named_parameters() if ".base_layer.weight" in n}
    assert any("Int8" in name or "Affine" in name for name in held), held
    assert {p.dtype for p in trainer.parameters} == {torch.float32} and trainer.run(until=2).step == 2
    again = trainer_of(sana, tmp_path, *LORA, *more, "--resume_from_checkpoint", "latest")
    assert again.step == 2 and again.run().finished
    assert generate(tmp_path, ["a red circle"], images_per_prompt=1)[0].isfinite().all()


def test_looking_does_not_change_a_run(sana: Path, tmp_path: Path) -> None:
    more = (*LORA, "--lora_dropout", "0.3", "--real_branch", "ema")
    trainer_of(sana, tmp_path / "plain", *more).run()
    watching = ("--validation_prompts", "a cat", "--validation_steps", "1", "--checkpointing_steps", "1")
    trainer = trainer_of(sana, tmp_path / "watched", *more, *watching)
    trainer.run()
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched")
    assert trainer.backbone.transformer.training


@pytest.mark.parametrize("family", ["sana", "qwen_image"])
def test_sampling_is_guided_as_the_pipeline_counts(sana: Path, qwen: Path, family: str) -> None:
    model = {"sana": sana, "qwen_image": qwen}[family]

    def draw(**options: object) -> torch.Tensor:
        return generate(model, ["a cat"], images_per_prompt=1, height=32, width=32, **options)[0]

    plain = draw()
    assert torch.equal(plain, draw(guidance_scale=1.0))
    guided, other = draw(guidance_scale=3.0), draw(guidance_scale=3.0, negative_prompt="a dog")
    assert not torch.equal(plain, guided) and not torch.equal(guided, other)


def test_the_fingerprint_tells_models_apart(sana: Path, tmp_path: Path) -> None:
    from apex_fast.backbones.base import Backbone
    from apex_fast.lora import DTYPES
    from apex_fast.training.models import fingerprint

    backbone = Backbone.from_pretrained(sana)
    first = fingerprint(backbone)
    assert first == fingerprint(Backbone.from_pretrained(sana))
    assert first != fingerprint(Backbone.from_pretrained(sana, torch_dtype=DTYPES["bf16"]))
    assert first != fingerprint(Backbone.from_pretrained(make_pipeline(tmp_path, "sana", seed=1)))
    digits = Backbone.from_pretrained(Path(__file__).parent.parent / "apex_fast" / "assets" / "digits_start")
    before = fingerprint(digits)
    with torch.no_grad():
        list(digits.parameters())[-1].view(-1)[-1] += 1e-3
    assert fingerprint(digits) != before


@pytest.mark.parametrize(("mode", "networks"), [("full", 2), ("lora", 1)])
def test_compile_reaches_every_block_of_the_network_and_its_copy(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, networks: int
) -> None:
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: seen.append(self))
    more = ("--compile", "true", "--mixed_precision", "bf16", *(LORA if mode == "lora" else ()))
    trainer = trainer_of(sana, tmp_path, *more)
    blocks = list(trainer.backbone.transformer.transformer_blocks)
    assert seen[: len(blocks)] == blocks and len({id(block) for block in seen}) == networks * len(blocks)


# ---- starting from a LoRA


@pytest.mark.parametrize("how", ["merge", "frozen", "continue"])
def test_starting_from_a_lora(sana: Path, lora_run: Path, tmp_path: Path, how: str) -> None:
    start, _ = load_generator(lora_run)
    expected = velocity_of(start.transformer)
    trainer = trainer_of(sana, tmp_path, *LORA, "--start_lora", str(lora_run), "--start_lora_mode", how)
    torch.testing.assert_close(velocity_of(trainer.backbone.transformer), expected, rtol=1e-4, atol=1e-5)
    trainer.backbone.transformer.train()
    assert trainer.run().finished
    with trainer.undisturbed() as network:
        tuned = velocity_of(network.transformer)
    assert not torch.allclose(tuned, expected, rtol=1e-4, atol=1e-5)
    # what was saved brings the start along
    again, _ = load_generator(tmp_path)
    torch.testing.assert_close(velocity_of(again.transformer), tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora_alpha", "4", "lora_alpha: 4.0, but .* has 8.*leave lora_alpha out"),
        ("use_rslora", "true", "use_rslora: True, but .* has False"),
        ("use_dora", "true", "use_dora: True, but .* has False"),
        ("lora_dropout", "0.1", "lora_dropout: 0.1, but .* has 0.0"),
        ("lora_target_modules", "to_q", "lora_target_modules: ..to_q.., but .* adapts .* as well"),
        ("lora_dtype", "bf16", "lora_dtype: bf16: start_lora_mode: continue trains the LoRA in fp32"),
    ],
)
def test_settings_that_a_continued_lora_would_not_follow_are_refused(
    sana: Path, lora_run: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    more = (*LORA, "--start_lora", str(lora_run), "--start_lora_mode", "continue", f"--{key}", value)
    with pytest.raises(SettingsError, match=message):
        trainer_of(sana, tmp_path, *more)


def test_settings_that_a_continued_lora_has_are_taken(sana: Path, lora_run: Path, tmp_path: Path) -> None:
    more = (*LORA, "--start_lora", str(lora_run), "--start_lora_mode", "continue", "--lora_alpha", "8")
    trainer = trainer_of(sana, tmp_path / "defaults", *more)
    targets = json.dumps(list(trainer.backbone.lora_targets))
    trainer_of(sana, tmp_path / "targets", *more, "--lora_target_modules", targets)
    targets = json.dumps([*trainer.backbone.lora_targets, "proj_out"])
    with pytest.raises(SettingsError, match="lora_target_modules: .* does not adapt proj_out"):
        trainer_of(sana, tmp_path / "more", *more, "--lora_target_modules", targets)


@pytest.mark.parametrize(
    ("how", "more", "said", "unsaid"),
    [
        ("frozen", LORA, "use it together with", "do not add it again"),
        ("merge", LORA, "it belongs on the model with", "use it together with"),
        ("merge", (), "is part of its weights; do not add it again", "use it together with"),
        ("continue", LORA, "finished at step 4", "use it together with"),
    ],
)
def test_the_last_line_says_what_becomes_of_the_start(
    sana: Path,
    lora_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
    more: tuple[str, ...],
    said: str,
    unsaid: str,
) -> None:
    trainer_of(sana, tmp_path, *more, "--start_lora", str(lora_run), "--start_lora_mode", how).run()
    error = capsys.readouterr().err
    assert said in error and unsaid not in error


def test_a_merged_start_can_be_tuned_in_full(sana: Path, lora_run: Path, tmp_path: Path) -> None:
    trainer = trainer_of(sana, tmp_path, "--start_lora", str(lora_run))
    start, _ = load_generator(lora_run)
    torch.testing.assert_close(
        velocity_of(trainer.backbone.transformer), velocity_of(start.transformer), rtol=1e-4, atol=1e-5
    )
    trainer.backbone.transformer.train()
    assert trainer.run().finished


def test_a_start_that_does_not_fit_is_refused(sana: Path, qwen: Path, lora_run: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="start_lora_mode: continue trains that one; write rank: 4"):
        more = ("--rank", "8", "--start_lora", str(lora_run), "--start_lora_mode", "continue")
        trainer_of(sana, tmp_path, *more)
    with pytest.raises(SettingsError, match="start_lora: LoRA:"):
        trainer_of(qwen, tmp_path, *LORA, "--start_lora", str(lora_run))
    with pytest.raises(FileNotFoundError, match="start_lora: .*nowhere is no LoRA"):
        trainer_of(sana, tmp_path, *LORA, "--start_lora", str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match="holds a LoRA; write the model that it adapts.*start_lora: "):
        trainer_of(lora_run, tmp_path, *LORA, "--dataset_name", str(sana.parent / "pictures"))


def test_eval_of_a_model_without_a_benchmark_says_what_scores_it(
    lora_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(lora_run)]) == 2
    error = capsys.readouterr().err
    assert "shapes and scenes have, and it was trained on" in error and "name one of them with --benchmark" in error
    assert "--prompts FILE with --clip-model PATH" in error
