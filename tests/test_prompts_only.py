"""Training from prompts alone: the front door, samples of the base and of the student, what comes out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("peft")

from tiny_runs import losses

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.loading import backbone_class
from apex_fast.backbones.stock_times import pipeline_times
from apex_fast.backbones.tiny import TINY_FAMILIES, save_tiny_pipeline, tiny_pipeline
from apex_fast.caching import build as building
from apex_fast.caching import cache_folder
from apex_fast.caching.shards import CacheError
from apex_fast.cli import main
from apex_fast.data.prompts import PromptFile
from apex_fast.training import prompts_only
from apex_fast.training.base_samples import BaseSampler, OwnSamples
from apex_fast.training.config import TrainConfig
from apex_fast.training.encoding import sample_generator
from apex_fast.training.guidance import real_guidance
from apex_fast.training.loop import Trainer
from apex_fast.training.models import load_generator
from apex_fast.training.settings import SettingsError

TEXTS = ["a red circle on white", "a blue square on black", "a green triangle on grey"]
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipelines, and a file of prompts."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("sana", "qwen_image", "flux"):
        save_tiny_pipeline(family, folder / family)
    (folder / "prompts.txt").write_text("# shapes\n" + "\n\n".join(TEXTS) + "\n")
    return folder


def words(place: Path, family: str, run: Path, *more: str) -> list[str]:
    """The front door, made small."""
    base = {
        "--model": str(place / family),
        "--prompts": str(place / "prompts.txt"),
        "--output_dir": str(run),
        "--rank": "4",
        "--resolution": "32",
        "--max_train_steps": "2",
        "--train_batch_size": "2",
        "--gradient_accumulation_steps": "1",
        "--learning_rate": "1e-3",
        "--logging_steps": "1",
        "--validation_steps": "null",
        "--report_to": "none",
        "--probe": "false",
        "--device": "cpu",
        "--objective.warmup_steps": "1",
        "--objective.ramp_steps": "1",
        "--prompts_only.num_inference_steps": "3",
        "--weight_dtype": "fp32",
        "--mixed_precision": "no",
        "--gradient_checkpointing": "false",
    }
    base.update(zip(more[::2], more[1::2], strict=True))
    return [word for pair in base.items() for word in pair]


def config_of(place: Path, family: str, run: Path, *more: str) -> TrainConfig:
    return prompts_only.config_from(words(place, family, run, *more))


# ---- the file


def test_what_a_file_of_prompts_is(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf# a comment\n\n  a  red   cat \r\na dog #1\n\n# another\n")
    found = PromptFile.open(file)
    assert found.captions == ["a red cat", "a dog #1"] and found.names == ["line 3", "line 4"]
    digest = found.digest()
    file.write_text("a red cat\na dog #1\n")
    assert PromptFile.open(file).digest() == digest, "comments are no part of the data"
    for content, message in (
        (b"a\nb\na\n", r'prompts twice: lines 1 and 3 \("a"\); keep one'),
        (b"a\na\n" * 3, "and 2 more"),
        (b"a \xff cat\n", "is not UTF-8"),
        (b"\n# only this\n", "there is no prompt in"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            PromptFile.open(file)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="write a text file"):
        PromptFile.open(tmp_path / "prompts.jsonl")
    with pytest.raises(FileNotFoundError, match="is no file"):
        PromptFile.open(tmp_path)


# ---- the front door


def test_from_a_model_and_prompts_to_a_lora_that_the_stock_pipeline_loads(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    run = tmp_path / "run"
    assert main(["train", *words(place, "sana", run)]) == 0
    text = capsys.readouterr().err
    assert "drawing 3 samples of the base in 3 steps each" in text
    assert "text encoders and VAE are not loaded" in text and "L_sup learns from samples of the base" in text
    assert "not exported for comfyui" in text and "ComfyUI itself loads" in text
    export = run / "export" / "diffusers"
    assert {WEIGHTS, "README.md", "scheduler"} <= {f.name for f in export.iterdir()}
    assert not (run / "export" / "comfyui").exists()
    pipeline = SanaPipeline.from_pretrained(place / "sana")
    pipeline.set_progress_bar_config(disable=True)
    call = {
        "prompt": TEXTS[0],
        "height": 32,
        "width": 32,
        "num_inference_steps": 1,
        "sigmas": [1.0],
        "guidance_scale": 1.0,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(export, subfolder="scheduler")
    before = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    pipeline.load_lora_weights(export, weight_name=WEIGHTS)
    after = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    assert not torch.equal(before, after)
    network, _ = load_generator(run)
    noise = torch.randn(1, *network.sample_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = network(noise, torch.ones(1), network.encode([TEXTS[0]]))
    torch.testing.assert_close(after, noise - velocity, rtol=1e-4, atol=1e-4)
    # and the run can be gone on with, from its own config
    assert (
        main(["train", str(run / "config.yaml"), "--resume_from_checkpoint", "latest", "--max_train_steps", "3"]) == 0
    )
    assert [line[0] for line in losses(run)] == [1, 2, 3]


def test_a_workflow_where_comfyui_knows_the_family(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *words(place, "qwen_image", run, "--max_train_steps", "1")]) == 0
    export = run / "export"
    assert json.loads((export / "comfyui" / "workflow.json").read_text())
    assert list((export / "comfyui" / "models" / "loras").glob("*.safetensors"))
    assert (export / "diffusers" / "scheduler" / "scheduler_config.json").is_file()


def test_settings_are_the_recipe_s(place: Path) -> None:
    config = prompts_only.config_from(
        ["--model", str(place / "qwen_image"), f"--prompts={place / 'prompts.txt'}", "--seed", "5"]
    )
    assert (config.rank, config.weight_dtype, config.mixed_precision, config.max_train_steps) == (
        64,
        "bf16",
        "bf16",
        2000,
    )
    assert (config.guidance_scale, config.negative_prompt, config.seed) == (4.0, " ", 5)
    assert config.output_dir == "runs/qwen_image_prompts" and config.prompts_only.samples == "base"
    assert config.prompts_only.num_inference_steps == 50 and config.validation_prompts == TEXTS[:2]
    assert cache_folder(config) == Path("runs/qwen_image_prompts.cache")


def test_mistakes_are_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompts", str(place / "prompts.txt")]
    run = ["--output_dir", str(tmp_path)]
    for arguments, message in (
        (prompts, "needs the model to tune: --model"),
        (["--model", str(place / "sana"), "--prompts", "nowhere.txt"], "nowhere.txt is no file"),
        (["--model", "nowhere/at/all", *prompts], "nowhere/at/all"),
        (["--model", "digits_start", *prompts], "samples are drawn from a pretrained pipeline"),
        (words(place, "sana", tmp_path, "--dataset_name", "pictures"), "or on pictures; leave one of them out"),
        (words(place, "sana", tmp_path, "--rnak", "3"), "rank"),
        ([*run, "--pretrained_model_name_or_path", str(place / "sana"), "--prompts_only.samples", "student"], "too"),
    ):
        assert main(["train", *arguments]) != 0
        assert message in capsys.readouterr().err, arguments


def test_smoke(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(place / "sana"), "--prompts", str(place / "prompts.txt"), "--device", "cpu"]
    assert main(["train", *arguments, "--resolution", "32", "--smoke"]) == 0
    text = capsys.readouterr()
    assert "prompts: 3 in" in text.out and "smoke: passed" in text.out
    assert "samples of the base in 2 steps each" in text.err


# ---- samples of the base


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_samples_of_the_base_are_those_of_its_own_pipeline(family: str, tmp_path: Path) -> None:
    """Times, guidance and sign, against the stock pipeline; SANA's solver is another, so there the times alone."""
    from apex_fast.backbones.latents import pack

    stock = tiny_pipeline(family)
    save_tiny_pipeline(family, tmp_path / family)
    more = ("--prompts_only.num_inference_steps", "4", "--shift.site", "raw")
    (tmp_path / "prompts.txt").write_text(TEXTS[0] + "\n")
    config = config_of(tmp_path, family, tmp_path / "run", *more)
    backbone = Backbone.from_pretrained(tmp_path / family)
    guidance = real_guidance(config, backbone)
    condition = backbone.encode(TEXTS[:1])
    negative = None if guidance is None else backbone.encode([guidance.negative_prompt], negative=True)
    assert (guidance is None) == (family == "flux")
    sampler = BaseSampler(config, backbone, guidance, negative, (32, 32), torch.device("cpu"))
    drawn = sampler(condition, 7)
    noise = torch.randn(1, *sampler.shape, generator=sample_generator(config.seed, 7))
    packed = family in ("qwen_image", "flux")
    call = {"prompt": TEXTS[0], "height": 32, "width": 32, "num_inference_steps": 4, "output_type": "latent"}
    call["latents"] = pack(noise) if packed else noise
    own = {
        "sana": {"use_resolution_binning": False},
        "qwen_image": {"true_cfg_scale": 4.0, "negative_prompt": " "},
        "flux": {},
    }
    result = stock(**call, **own.get(family, {})).images
    times = pipeline_times(backbone, 4, 32, 32)
    torch.testing.assert_close(times, stock.scheduler.sigmas.double(), rtol=0, atol=5e-4)
    assert times[0] == 1 and len(times) == 5
    if family != "sana":
        torch.testing.assert_close((pack(drawn[None]) if packed else drawn[None]), result, rtol=2e-3, atol=2e-3)
    # the same sample again, whatever was drawn between; another one for another index
    assert not torch.equal(sampler(condition, 8), drawn)
    assert torch.equal(sampler(condition, 7), drawn)


def test_a_model_without_its_scheduler_is_refused() -> None:
    network = backbone_class("sana")(tiny_pipeline("sana").transformer)
    with pytest.raises(ValueError, match="no scheduler came with the model"):
        pipeline_times(network, 4, 32, 32)


def test_samples_are_drawn_once_and_kept(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "SAMPLES_IN_A_SHARD", 2)
    config = config_of(place, "sana", tmp_path / "run", "--prompts_only.samples_per_prompt", "2")
    calls: list[int] = []
    draw = BaseSampler.__call__

    def counted(self: BaseSampler, condition: object, index: int, *, times: object = None) -> torch.Tensor:
        if times is None:
            if len(calls) == 3:
                calls.append(-1)
                raise KeyboardInterrupt
            calls.append(index)
        return draw(self, condition, index, times=times)

    monkeypatch.setattr(BaseSampler, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        building.build(config, say=lambda line: None)
    # The third sample was in a shard that was not whole: it alone is drawn again.
    trainer = Trainer(config)
    assert calls == [0, 1, 2, -1, 2, 3, 4, 5]
    data = trainer.batches.data
    assert len(data) == 6 and data.prompts(torch.arange(6), torch.Generator()) == TEXTS * 2
    images = data.images(torch.arange(6))
    assert images.shape == (6, 4, 8, 8) and len({tuple(i.flatten().tolist()) for i in images}) == 6
    trainer.run()
    Trainer(dataclasses.replace(config, output_dir=str(tmp_path / "again"), cache_dir=str(cache_folder(config))))
    assert len(calls) == 8, "a second run draws nothing"
    for more, named in (
        (("--prompts_only.num_inference_steps", "4"), r"prompts_only.num_inference_steps \(3 in the cache, 4 in"),
        (("--prompts_only.samples_per_prompt", "1"), "prompts_only.samples_per_prompt"),
        (("--guidance_scale", "2.0"), r"guidance_scale \(4.5 in the cache, 2.0 in the run\)"),
        (("--resolution", "64"), "the size of the pictures"),
    ):
        words_of = ("--prompts_only.samples_per_prompt", "2", "--cache_dir", str(cache_folder(config)), *more)
        with pytest.raises(CacheError, match=named):
            Trainer(config_of(place, "sana", tmp_path / "other", *words_of))


def test_changed_prompts_name_the_command_and_a_run_that_starts_over_encodes_them(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    more = ("--prompts", str(file))
    run = tmp_path / "run"
    Trainer(config_of(place, "sana", run, *more))
    file.write_text("\n".join([*TEXTS, "a yellow star on blue"]) + "\n")
    command = rf"cache --model {place / 'sana'} --prompts {file} --overwrite .*start over with --overwrite_output_dir"
    with pytest.raises(CacheError, match=command):
        Trainer(config_of(place, "sana", run, *more))
    over = (*more, "--overwrite_output_dir", "true")
    # A cache with a name of its own may be of other runs too.
    with pytest.raises(CacheError, match=r"--overwrite \(and the other keys of the run\); to keep it"):
        Trainer(config_of(place, "sana", tmp_path / "other", *over, "--cache_dir", str(tmp_path / "run.cache")))
    assert len(Trainer(config_of(place, "sana", run, *over)).batches.data) == 4
    # So does one whose samples are guided otherwise; what is right is not drawn again.
    other = config_of(place, "sana", run, *over, "--guidance_scale", "2.0")
    Trainer(other)
    before = {f: f.stat().st_mtime_ns for f in cache_folder(other).rglob("*.safetensors")}
    Trainer(other)
    assert {f: f.stat().st_mtime_ns for f in cache_folder(other).rglob("*.safetensors")} == before
    assert json.loads((cache_folder(other) / "index.json").read_text())["facts"]["latents"]["guidance_scale"] == 2.0


def test_samples_of_the_base_are_guided_whatever_the_loss_is(place: Path, tmp_path: Path) -> None:
    config = config_of(place, "sana", tmp_path / "run", "--loss", "flow_matching")
    trainer = Trainer(config)
    index = json.loads((cache_folder(config) / "index.json").read_text())
    assert trainer.guidance is None and index["facts"]["latents"]["guidance_scale"] == 4.5
    # and a run on the student's samples takes the prompts of that cache, not its samples
    student = ("--prompts_only.samples", "student", "--cache_dir", str(cache_folder(config)))
    other = Trainer(config_of(place, "sana", tmp_path / "other", *student))
    assert not other.batches.data.images(torch.arange(3)).any() and trainer.batches.data.images(torch.arange(3)).any()
    assert other.batches.table.holds(TEXTS)


def test_a_sample_that_is_not_finite_is_no_data(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(place, "sana", tmp_path / "run")
    monkeypatch.setattr(BaseSampler, "__call__", lambda *args, **options: torch.full((4, 8, 8), torch.nan))
    with pytest.raises(SettingsError, match="the base's sample for 'a red circle on white' is not finite"):
        building.build(config, say=lambda line: None)


def test_samples_do_not_change_what_a_run_draws_later(place: Path, tmp_path: Path) -> None:
    """Dropout takes torch's global generator, which drawing in the same process must leave alone."""
    more = ("--lora_dropout", "0.5")
    config = config_of(place, "sana", tmp_path / "run", *more)
    Trainer(config).run()
    Trainer(dataclasses.replace(config, output_dir=str(tmp_path / "two"), cache_dir=str(cache_folder(config)))).run()
    assert losses(tmp_path / "run") == losses(tmp_path / "two")


# ---- the student's own samples


def test_the_student_s_own_samples(place: Path, tmp_path: Path) -> None:
    student = ("--prompts_only.samples", "student")
    config = config_of(place, "flux", tmp_path / "run", *student)
    assert config.objective.supervised_weight == 0
    trainer = Trainer(config)
    assert trainer.own_samples is None, "nothing looks at x where every sample starts from noise"
    assert not cache_folder(config).exists() and trainer.objective.supervised_weight == 0
    assert any("supervised_weight: 0" in note for note in trainer.notes)
    trainer.run()
    # With few-step times x is where the generator starts from: its own sample of the moment.
    more = (
        *student,
        "--objective.generator_times.kind",
        "uniform",
        "--objective.generator_times.constant_share",
        "0.5",
    )
    few = Trainer(config_of(place, "flux", tmp_path / "few", *more))
    assert few.own_samples is not None and "own_samples" in few.generators
    state = few.generators["own_samples"].get_state()
    x, condition = few.batches.next()
    assert not x.any()
    made = few.own_samples(x, condition)
    again = torch.Generator().manual_seed(0)
    again.set_state(state)
    noise = torch.randn(x.shape, generator=again)
    with torch.no_grad():
        velocity = few.backbone(noise, torch.ones(2), condition)
    torch.testing.assert_close(made, noise - velocity)
    few.run()
    assert few.generators["own_samples"].get_state().tolist() != state.tolist()


def test_own_samples_are_the_same_over_two_processes(place: Path) -> None:
    network = Backbone.from_pretrained(place / "sana")
    condition = network.encode(TEXTS[:2] * 2)
    x = torch.zeros(4, *network.sample_shape)
    whole = OwnSamples(network, torch.Generator().manual_seed(1))(x, condition)
    for rank in (0, 1):
        rows = slice(2 * rank, 2 * rank + 2)
        part = OwnSamples(network, torch.Generator().manual_seed(1), (rank, 2))(x[rows], condition.index(rows))
        torch.testing.assert_close(part, whole[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--objective.supervised_weight", "1.0"), "needs objective.supervised_weight: 0"),
        (("--objective.mix_regulariser_weight", "1.0"), "needs objective.mix_regulariser_weight: 0"),
        (("--real_branch", "ema"), "nothing would hold the real branch to the data"),
        (("--loss", "paper"), "student is for loss: correction"),
    ],
)
def test_what_the_student_cannot_learn_from_itself(
    place: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        config_of(place, "sana", tmp_path, "--prompts_only.samples", "student", *more)
