"""The loop: order of the data, averages, schedules, what a run writes, and how it ends when it is told to stop."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("yaml")

from tiny_runs import TEXT_ENCODER, TRANSFORMER, keys, losses, make_start, start_process

from apex_fast.data.shipped import load_shipped
from apex_fast.evaluation.digits import shipped_classifier
from apex_fast.training.batches import Batches, EpochOrder, TextImages
from apex_fast.training.checkpoint import checkpoints
from apex_fast.training.config import load_config
from apex_fast.training.ema import WeightAverage
from apex_fast.training.loop import Trainer
from apex_fast.training.models import device_of
from apex_fast.training.progress import Console, MetricsFile
from apex_fast.training.schedule import learning_rate_factor
from apex_fast.training.settings import SettingsError


@pytest.fixture(scope="module")
def tiny_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("tiny") / "start")


def trainer_of(start: Path, folder: Path, *more: str, **options: object) -> Trainer:
    return Trainer(load_config(None, keys(start, folder, *more)), **options)


# ---- data


def test_an_epoch_holds_every_sample_once_and_epochs_differ() -> None:
    order = EpochOrder(11, seed=3)
    epochs = [order.take(11 * i, 11).tolist() for i in range(4)]
    assert all(sorted(e) == list(range(11)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert EpochOrder(11, seed=4).take(0, 11).tolist() != epochs[0]


def test_batches_straddle_epochs_and_can_be_entered_anywhere() -> None:
    stream = EpochOrder(11, seed=3).take(0, 44).tolist()
    for position, count in ((0, 4), (8, 7), (10, 1), (11, 25), (43, 1), (20, 0)):
        assert EpochOrder(11, seed=3).take(position, count).tolist() == stream[position : position + count]


def test_a_batch_pairs_images_with_their_own_prompts(tiny_start: Path) -> None:
    from apex_fast.backbones.sana import SanaBackbone
    from apex_fast.data.digits import Digits, label_of

    backbone = SanaBackbone.from_pretrained(tiny_start)
    seen: list[list[str]] = []

    def encode(prompts: list[str]):
        seen.append(prompts)
        return backbone.encode(prompts)

    data = load_shipped("digits")
    options = {"batch_size": 16, "seed": 5, "device": torch.device("cpu")}
    plain = Batches(data, encode, cached=False, **options)
    cached = Batches(data, backbone.encode, cached=True, **options)
    digits = Digits.load("train")
    for _ in range(3):
        chosen = plain.order.peek()
        (images, condition), (same_images, same_condition) = plain.next(), cached.next()
        assert torch.equal(images, digits.images[chosen]) and torch.equal(images, same_images)
        assert [label_of(p) for p in seen[-1]] == digits.labels[chosen].tolist()
        assert torch.equal(condition.prompt_embeds_mask, same_condition.prompt_embeds_mask)
        kept = condition.prompt_embeds_mask
        torch.testing.assert_close(
            condition.prompt_embeds[kept], same_condition.prompt_embeds[kept], rtol=1e-5, atol=1e-6
        )
    assert len({p for prompts in seen for p in prompts}) > 10


def test_a_share_of_prompts_is_emptied() -> None:
    drawn: list[str] = []

    def encode(prompts: list[str]) -> None:
        drawn.extend(prompts)

    data = TextImages(torch.zeros(100, 1, 2, 2), lambda chosen, generator: ["full"] * len(chosen))
    batches = Batches(data, encode, batch_size=500, seed=0, device=torch.device("cpu"), cached=False, empty_share=0.25)
    for _ in range(4):
        batches.next()
    assert 0.2 < drawn.count("") / len(drawn) < 0.3


# ---- averages and schedules


def test_the_average_follows_its_formula_and_is_put_back_exactly() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average = WeightAverage(module, decay=0.4)
    expected = module.weight.detach().double().clone()
    for i in range(1, 6):
        with torch.no_grad():
            module.weight.normal_()
        decay = min(0.4, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * module.weight.detach().double()
        average.update()
    torch.testing.assert_close(average.average["weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert list(average.average) == ["weight"]
    before = module.weight.detach().clone()
    with average.applied():
        assert torch.equal(module.weight, average.average["weight"]) and not torch.equal(module.weight, before)
    assert torch.equal(module.weight, before)
    with pytest.raises(ValueError, match="saved for other parameters"):
        average.load_state_dict({"updates": 1, "average": {"other": before}})


def test_learning_rates() -> None:
    def factor(step: int, kind: str) -> float:
        return learning_rate_factor(step, kind=kind, warmup_steps=4, total_steps=24)

    assert [factor(s, "cosine") for s in range(4)] == [0.2, 0.4, 0.6, 0.8]
    assert factor(4, "cosine") == factor(4, "linear") == factor(23, "constant") == 1.0
    assert factor(14, "cosine") == pytest.approx(0.5) and factor(14, "linear") == pytest.approx(0.5)
    assert factor(24, "cosine") == pytest.approx(0.0) and factor(30, "linear") == 0.0
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        factor(10, "polynomial")


# ---- runs


def test_accumulated_passes_give_the_gradient_of_their_mean(tiny_start: Path, tmp_path: Path) -> None:
    """Two passes of a batch must move the weights as one pass with the two gradients averaged."""
    gradients: list[torch.Tensor] = []

    def grab(trainer: Trainer) -> None:
        def record(*_: object) -> None:
            gradients.append(torch.cat([p.grad.flatten().clone() for p in trainer.parameters]))

        trainer.optimizer.step = record  # type: ignore[method-assign]

    options = (
        "--max_grad_norm",
        "null",
        "--objective.warmup_steps",
        "0",
        "--objective.ramp_steps",
        "0",
        "--max_train_steps",
        "1",
    )
    for name, accumulate in (("two", "2"), ("one", "1")):
        trainer = trainer_of(
            tiny_start, tmp_path / name, *options, "--gradient_accumulation_steps", accumulate, "--seed", "1"
        )
        grab(trainer)
        trainer._one_step()
        if accumulate == "1":
            trainer.optimizer.zero_grad()
            trainer._one_step()
    both, first, second = gradients
    torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-6)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("loss", ["correction", "paper", "flow_matching"])
def test_a_run_trains_and_writes_what_it_promises(tiny_start: Path, tmp_path: Path, loss: str) -> None:
    options = ("--max_train_steps", "6", "--learning_rate", "1e-3", "--gradient_checkpointing", "true")
    trainer = trainer_of(
        tiny_start, tmp_path, *options, "--loss", loss, "--validation_prompts", "a 7", "--validation_steps", "3"
    )
    before = {n: p.detach().clone() for n, p in trainer.backbone.transformer.named_parameters()}
    text_before = {n: p.detach().clone() for n, p in trainer.backbone.text.text_encoder.named_parameters()}
    assert trainer.backbone.transformer.is_gradient_checkpointing
    result = trainer.run()
    assert (result.step, result.finished, result.exit_code) == (6, True, 0)
    moved = [n for n, p in trainer.backbone.transformer.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.8 * len(before)
    assert all(torch.equal(p, text_before[n]) for n, p in trainer.backbone.text.text_encoder.named_parameters())
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert all(isinstance(v, (float, int, str)) for r in records for v in r.values())
    assert records[-1]["learning_rate"] == 1e-3 and records[-1]["epoch"] == pytest.approx(6 * 8 / 1197, abs=1e-4)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-000003.png", "step-000006.png"]
    assert load_config(tmp_path / "config.yaml") == trainer.config
    # what is exported is the average, not the last weights
    from apex_fast.backbones.sana import SanaBackbone

    exported = dict(SanaBackbone.from_pretrained(tmp_path / "model").named_parameters())
    assert trainer.average is not None
    assert all(torch.equal(exported[n], a) for n, a in trainer.average.average.items())


def test_flow_matching_makes_a_start_from_nothing_and_learns(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    section = {"transformer": {**TRANSFORMER, "dropout": 0.0}, "text_encoder": TEXT_ENCODER, "vocab_size": 300}
    config = {
        **{"output_dir": str(tmp_path / "run"), "loss": "flow_matching", "model": section, "train_text_encoder": True},
        **{"max_train_steps": 60, "train_batch_size": 32, "learning_rate": 3e-3, "logging_steps": 1, "device": "cpu"},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    trainer = Trainer(load_config(tmp_path / "c.yaml"))
    text = [p.detach().clone() for p in trainer.backbone.text.text_encoder.parameters()]
    trainer.run()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(r["loss_supervised"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last < 0.8 * first
    assert any(
        not torch.equal(a, b) for a, b in zip(text, trainer.backbone.text.text_encoder.parameters(), strict=True)
    )
    # and the start can be tuned
    tuned = trainer_of(tmp_path / "run", tmp_path / "tuned", "--max_train_steps", "3")
    assert tuned.run().finished


def test_looking_at_a_run_does_not_change_it(tiny_start: Path, tmp_path: Path) -> None:
    # The first look of a process makes the classifier, which draws random weights before it loads its own.
    shipped_classifier.cache_clear()

    def look(trainer: Trainer) -> None:
        trainer.draw(["a three"] * 3, num_inference_steps=2)
        trainer.score(1, samples=20, diversity_seeds=2)

    trainer_of(tiny_start, tmp_path / "plain").run()
    trainer = trainer_of(tiny_start, tmp_path / "watched", callbacks=[look])
    trainer.run()
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched")
    assert trainer.backbone.transformer.training and not trainer.backbone.text.text_encoder.training


def test_bf16_keeps_fp32_weights(tiny_start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_start, tmp_path / "half", "--mixed_precision", "bf16")
    seen: set[torch.dtype] = set()
    trainer.backbone.transformer.register_forward_hook(lambda m, a, out: seen.add(out[0].dtype))
    trainer.run()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trainer.backbone.parameters()} == {torch.float32}
    trainer_of(tiny_start, tmp_path / "full").run()
    half, full = losses(tmp_path / "half"), losses(tmp_path / "full")
    assert half != full
    assert [h[1] for h in half] == pytest.approx([f[1] for f in full], rel=0.05)


@pytest.mark.parametrize(("precision", "fused"), [("no", True), ("bf16", False)])
def test_on_a_cpu_bf16_leaves_the_fused_attention_whose_backward_is_slow(
    tiny_start: Path, tmp_path: Path, precision: str, fused: bool
) -> None:
    """Also in passes that are made again in the backward, which would otherwise keep other tensors than the first."""
    whole = trainer_of(tiny_start, tmp_path / "kept", "--mixed_precision", precision, "--max_train_steps", "2")
    kept: list[bool] = []
    whole.backbone.transformer.transformer_blocks[0].register_forward_pre_hook(lambda m, a: kept.append(True))
    whole.run()
    trainer = trainer_of(
        tiny_start,
        tmp_path,
        "--mixed_precision",
        precision,
        "--gradient_checkpointing",
        "true",
        "--max_train_steps",
        "2",
    )
    seen: list[bool] = []
    blocks = trainer.backbone.transformer.transformer_blocks
    # Before the block: a pass that is made again ends as soon as it has what it is made for.
    blocks[0].register_forward_pre_hook(lambda m, a: seen.append(torch.backends.cuda.flash_sdp_enabled()))
    trainer.run()
    assert len(seen) > len(kept) > 0 and set(seen) == {fused}
    assert torch.backends.cuda.flash_sdp_enabled()


def test_guidance_uses_the_negative_prompt(tiny_start: Path, tmp_path: Path) -> None:
    trainer_of(tiny_start, tmp_path / "plain", "--max_train_steps", "3").run()
    for name, prompt in (("empty", ""), ("seven", "a 7")):
        trainer_of(
            tiny_start,
            tmp_path / name,
            "--max_train_steps",
            "3",
            "--guidance_scale",
            "3.0",
            "--negative_prompt",
            prompt,
        ).run()
    results = [losses(tmp_path / name)[0] for name in ("plain", "empty", "seven")]
    assert len({correction for _, _, correction, _ in results}) == 3
    assert len({fake for _, fake, _, _ in results}) == 1


def test_the_console_says_the_phase_and_that_it_gets_worse_first(
    tiny_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(
        tiny_start, tmp_path, "--max_train_steps", "8", "--objective.warmup_steps", "3", "--objective.ramp_steps", "2"
    )
    assert trainer.phases() == [(0, "warm-up"), (3, "ramp"), (5, "correction on")]
    trainer.run()
    text = capsys.readouterr().err
    assert "worse before they get better" in text
    places = [
        text.index(part)
        for part in ("step 0: warm-up", "step 3: ramp", "step 5: correction on", "train 8/8", "finished at step 8")
    ]
    assert places == sorted(places)
    assert "\r" not in text, "not a terminal: plain lines"


def test_a_run_that_is_all_warm_up_is_warned_about(
    tiny_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_of(tiny_start, tmp_path, "--objective.warmup_steps", "10").run()
    assert "careful: the correction never starts: warmup_steps=10 of total_steps=4" in capsys.readouterr().err


def test_tensorboard_has_scalars_and_grids(tiny_start: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("--report_to", "tensorboard", "--validation_prompts", "a three", "--validation_steps", "2")
    trainer_of(tiny_start, tmp_path, *options).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss_fake")] == [1, 2, 3, 4]
    assert [e.step for e in events.Images("samples")] == [2, 4]


def test_without_tensorboard_the_error_names_the_extra(
    tiny_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    trainer = trainer_of(tiny_start, tmp_path, "--report_to", "tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard.*apex_fast\[train\]"):
        trainer.run()


def test_metrics_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a"')
    file = MetricsFile(path, keep_until=2)
    file.write(3, {"a": 30})
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "a": 1},
        {"step": 2, "a": 2},
        {"step": 3, "a": 30},
    ]


def test_a_terminal_gets_a_bar() -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(5, 0, stream=stream)
    for step in range(1, 6):
        console.step(step, "[warm-up] fake 1.0")
    console.say("a message")
    console.close()
    text = stream.getvalue()
    assert "5/5" in text and "[warm-up] fake 1.0" in text and "a message" in text


@pytest.mark.parametrize(("name", "message"), [("gpu", "device must be auto"), ("cuda", "sees no GPU")])
def test_devices(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto").type == "cpu"
    with pytest.raises(SettingsError, match=message):
        device_of(name)


# ---- stopping


def wait_for(path: Path, lines: int, process: object) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        if path.is_file() and len(path.read_text().splitlines()) >= lines:
            return
        assert process.poll() is None, process.communicate()[1]  # type: ignore[attr-defined]
        time.sleep(0.02)
    raise AssertionError(f"{path} did not grow to {lines} lines in time")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    tiny_start: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    options = keys(tiny_start, tmp_path / "run", "--max_train_steps", "100000", "--checkpointing_steps", "null")
    process = start_process(["-m", "apex_fast.cli", "train", *options])
    wait_for(tmp_path / "run" / "metrics.jsonl", 3, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert number.name in error and "finishing this step" in error
    assert f"apex-fast train {tmp_path}/run/config.yaml --resume_from_checkpoint latest" in error
    (saved,) = checkpoints(tmp_path / "run")
    step = losses(tmp_path / "run")[-1][0]
    assert saved.name == f"checkpoint-{step}" and not (tmp_path / "run" / "model").exists()
    # the printed command works
    more = ["--resume_from_checkpoint", "latest", "--max_train_steps", str(step + 1)]
    trainer = Trainer(load_config(tmp_path / "run" / "config.yaml", more))
    assert trainer.step == step and trainer.run().finished


SLOW_STEPS = """
import sys, time
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer
real = Trainer._one_step
def slow(self):
    print("in a step", flush=True)
    time.sleep(60)
    return real(self)
Trainer._one_step = slow
Trainer(load_config(None, sys.argv[1:])).run()
"""


def test_a_second_ctrl_c_quits_at_once(tiny_start: Path, tmp_path: Path) -> None:
    process = start_process(["-c", SLOW_STEPS, *keys(tiny_start, tmp_path / "run")])
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().strip() == "in a step", process.communicate()[1]
    process.send_signal(signal.SIGINT)
    while "once more quits at once" not in (line := process.stderr.readline()):
        assert line, "the first Ctrl-C was not answered"
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and time.monotonic() - begun < 10
    assert not checkpoints(tmp_path / "run")
