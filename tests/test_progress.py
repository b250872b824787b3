"""What a run tells while it goes on: the clock of its roles, the line, milestones, the bar, boards, validations."""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("yaml")

from tiny_runs import keys, make_start

from apex_fast.objective import ApexObjective
from apex_fast.shift import ConditionShift
from apex_fast.training import environment, phases, timing, validation
from apex_fast.training.config import load_config
from apex_fast.training.flow_matching import FlowMatching
from apex_fast.training.loop import Trainer
from apex_fast.training.phases import Course, Milestone, duration, pace, size, status
from apex_fast.training.progress import Console, MetricsFile, open_board
from apex_fast.training.settings import SettingsError
from apex_fast.training.timing import BACKWARD, DATA, FORWARD, EventClock, StepTimer


@pytest.fixture(scope="module")
def tiny_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("tiny") / "start")


def trainer_of(start: Path, folder: Path, *more: str, **options: Any) -> Trainer:
    return Trainer(load_config(None, keys(start, folder, *more)), **options)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- time


class FakeTime:
    """A host clock that a test sets, and a device whose events are passed only when the test says so."""

    def __init__(self) -> None:
        self.now, self.done, self.waits, self.alive = 0.0, float("inf"), 0, 0

    def event(self) -> FakeEvent:
        self.alive += 1
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, time: FakeTime) -> None:
        self.time, self.at = time, float("nan")

    def record(self) -> None:
        self.at = self.time.now

    def query(self) -> bool:
        return self.at <= self.time.done

    def synchronize(self) -> None:
        if not self.query():
            self.time.waits += 1
            self.time.done = self.at

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.query() and other.query(), "an event was read before the device had passed it"
        return 1000.0 * (other.at - self.at)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    time = FakeTime()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: time.now)
    return time


def one_step(timer: StepTimer, fake: FakeTime) -> None:
    with timer.step():
        with timer.role(DATA):
            fake.now += 1
        with timer.role(FORWARD):
            fake.now += 2
            with timer.role(BACKWARD):
                fake.now += 3
            fake.now += 4
        fake.now += 5


@pytest.mark.parametrize("device", ["cpu", "events"])
def test_a_role_inside_another_interrupts_it(fake: FakeTime, device: str) -> None:
    clock = EventClock(fake.event) if device == "events" else None
    timer = StepTimer(torch.device("cpu"), clock)
    for _ in range(2):
        one_step(timer, fake)
        fake.now += 10  # between the steps: of the step, of no role
    with timer.aside():
        fake.now += 100
    assert timer.read() == {FORWARD: 6, BACKWARD: 3, DATA: 1, "step": 25}
    assert timer.read() == {}
    one_step(timer, fake)
    assert timer.read() == {FORWARD: 6, BACKWARD: 3, DATA: 1, "step": 15}


def test_events_are_waited_for_only_when_they_are_read(fake: FakeTime) -> None:
    timer = StepTimer(torch.device("cpu"), EventClock(fake.event))
    fake.done = -1.0
    for _ in range(3):
        one_step(timer, fake)
    assert fake.waits == 0, "a step has waited for the device"
    assert timer.read()[BACKWARD] == 3 and fake.waits > 0
    used = fake.alive
    fake.done = float("inf")
    for _ in range(50):
        one_step(timer, fake)
    assert fake.alive <= used + 8, "events that the device has passed are used again"
    assert timer.read()[FORWARD] == 6


@pytest.mark.cuda
def test_events_of_a_gpu_agree_with_the_clock() -> None:
    import time

    timer = StepTimer(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    begun = time.perf_counter()
    with timer.step():
        with timer.role(FORWARD):
            for _ in range(50):
                x = torch.nn.functional.normalize(x @ x)
        with timer.role(DATA):
            pass
    found = timer.read()
    spent = time.perf_counter() - begun
    assert 0.5 * spent < found[FORWARD] <= spent and found[DATA] < 0.1 * spent


def test_a_run_writes_where_its_time_goes(tiny_start: Path, tmp_path: Path) -> None:
    trainer_of(tiny_start, tmp_path, "--gradient_accumulation_steps", "2").run()
    for record in records(tmp_path):
        roles = {role: record[f"seconds/{role}"] for role in timing.ROLES}
        assert all(value > 0 for value in roles.values())
        assert sum(roles.values()) <= record["seconds/step"] * 1.001
        assert record["images_per_second"] == pytest.approx(16 / record["seconds/step"])
        assert 50e6 < record["peak_bytes"] < 1e12


# ---- the line


def objective(**options: Any) -> ApexObjective:
    return ApexObjective(ConditionShift(), **{"warmup_steps": 500, "ramp_steps": 100, "total_steps": 4000, **options})


def test_the_line_says_the_phase_and_what_is_normal() -> None:
    course = Course(objective(), 4000)
    numbers = {"dv_relative": 0.42, "clipped_share": 0.03, "loss_total": 1.0}
    seconds = {"forward": 0.9, "backward": 0.75, "data": 0.1, "optimizer": 0.001, "step": 1.8}
    line = status(course, 180, numbers, visibility=0.31, seconds=seconds, peak=21_400_000_000)
    assert " | ".join(line) == (
        "warm-up 180/500 | one-step samples get worse until about step 600, expected | dv 0.42 (healthy 0.1-1.0) | "
        "clipped 3 % | visibility 31 % | 1.8 s/step: forward 0.9, backward 0.75, data 0.1 | peak 21.4 GB"
    )
    assert status(course, 1, {}, visibility=0.0041)[2] == "visibility 0.41 %"
    assert status(course, 1, {}, visibility=1.26)[2] == "visibility 126 %"
    assert status(course, 500, numbers)[0] == "warm-up 500/500"
    assert status(course, 501, numbers)[:2] == [
        "ramp 1/100",
        "one-step samples get worse until about step 600, expected",
    ]
    assert status(course, 601, {"dv_relative": 3.2}) == ["correction on", "dv 3.20 (outside 0.1-1.0)"]
    backed_off = {"correction_factor": 0.25, "skipped_steps": 3.0, "loss_total": 1.0}
    assert status(course, 601, backed_off)[2:] == ["correction backed off to 25 %", "3 steps skipped"]
    assert status(course, 601, {"correction_factor": 1.0, "skipped_steps": 0.0}) == ["correction on"]


def test_a_run_without_a_correction_promises_nothing() -> None:
    course = Course(FlowMatching(), 100)
    assert course.milestones() == [] and status(course, 7, {"loss_total": 0.25}) == ["flow matching", "loss 0.25"]
    paper = Course(objective(loss="paper", warmup_steps=None, ramp_steps=None), 100)
    assert paper.milestones() == [] and len(paper.where(3)) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (11_400, "3 h 10 min"), (7_199, "2 h"), (200_000, "2 d 7 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_quantities() -> None:
    assert size(21_400_000_000) == "21.4 GB" and size(5_000_000) == "5 MB"
    assert pace({"step": 0.19, "forward": 0.08, "data": 0.0001}) == "190 ms/step: forward 80"


# ---- milestones


def test_milestones_come_from_the_recipe() -> None:
    found = Course(objective(), 4000).milestones()
    assert [m.step for m in found] == [500, 600, 1200, 2400]
    assert "by step 500 expect dv between 0.1 and 1" in found[0].announce()
    # One number is looked at, so nothing is said of where it is going.
    assert [m.expect for m in found if "falling" in m.expect] == []
    guide = (Path(__file__).parent.parent / phases.GUIDE).read_text(encoding="utf-8")
    assert found[1].announce() in " ".join(guide.split())
    at_once = Course(objective(warmup_steps=0, ramp_steps=0, total_steps=100), 100)
    assert [m.step for m in at_once.milestones()] == [20, 60]
    # A run that is all warm-up: nothing is promised that it cannot reach.
    with pytest.warns(UserWarning, match="never starts"):
        short = objective(warmup_steps=10, ramp_steps=10, total_steps=4)
    assert [m.step for m in Course(short, 4).milestones()] == [2]


def test_a_milestone_is_measured_where_it_can_be() -> None:
    measured = Milestone(500, "dv between 0.1 and 1", "branch-difference", phases.DV)
    assert measured.reached({"dv_relative": 0.5}).endswith("0.5, as expected")
    missed = measured.reached({"dv_relative": 0.004})
    assert "it is 0.004: stop and read docs/training.md#branch-difference" in missed
    looked_at = Milestone(900, "sharper samples", "one-step-samples-stay-blurred")
    assert "if not, stop and read docs/training.md#one-step-samples-stay-blurred" in looked_at.reached({})


def test_every_section_that_a_milestone_names_is_in_the_guide() -> None:
    guide = (Path(__file__).parent.parent / phases.GUIDE).read_text(encoding="utf-8")
    for milestone in Course(objective(), 4000).milestones():
        title = milestone.read.replace("-", " ")
        assert any(line.startswith("#") and line.strip("# ").lower() == title for line in guide.splitlines()), title


def test_a_run_says_its_milestones_before_and_at_them(tiny_start: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    more = ("--max_train_steps", "12", "--objective.warmup_steps", "2", "--objective.ramp_steps", "2")
    trainer = trainer_of(tiny_start, tmp_path, *more, stream=stream)
    trainer.run(until=5)
    text = stream.getvalue()
    said = [line for line in text.splitlines() if line.startswith("by step")]
    assert [line.split()[2] for line in said] == ["2", "4", "8"]
    assert text.index("by step 8") < text.index("step 0: warm-up") < text.index("milestone, step 2")
    assert [line.split(",")[1].split(":")[0] for line in text.splitlines() if line.startswith("milestone")] == [
        " step 2",
        " step 4",
    ]
    resumed = io.StringIO()
    config = load_config(tmp_path / "config.yaml", ["--resume_from_checkpoint", "latest"])
    Trainer(config, stream=resumed).run(until=6)
    assert "by step 2" not in resumed.getvalue() and "milestone" not in resumed.getvalue()
    assert "by step 8" in resumed.getvalue()


def test_a_number_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", keep_until=0)
    file.write(1, {"a": float("nan"), "b": float("inf"), "c": 1.0, "phase": "ramp"})
    file.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": 1.0, "phase": "ramp"}


def test_a_full_disk_costs_lines_of_the_metrics_and_not_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", keep_until=0, say=said.append)
    file.write(1, {"a": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
    try:
        file.write(2, {"a": 1.0})  # fits in part
        file.write(3, {"a": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.write(4, {"a": 1.0})
    file.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 4]
    assert len(said) == 1 and said[0].startswith("careful: step 2: ") and "could not be written" in said[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_closing_the_metrics_on_a_full_disk_raises_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", keep_until=0)
    os.dup2(os.open("/dev/full", os.O_WRONLY), file._file.fileno())
    file.write(1, {"a": 1.0})
    file.close()
    assert "No space left on device" in capsys.readouterr().err
    with pytest.raises(ValueError, match="closed"):
        file.write(2, {"a": 1.0})


# ---- the bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_the_state_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    console = Console(5, 0, stream=stream)
    for step in range(1, 6):
        console.step(step, ["warm-up 1/2", "dv 0.42"])
        console.say(f"message {step} [not markup]")
    console.close()
    text = stream.getvalue()
    assert "5/5" in text and "warm-up 1/2 | dv 0.42" in text and "\x1b[" in text
    assert text.index("message 5 [not markup]") < text.rindex("5/5"), "messages go above the bar"


@pytest.mark.parametrize("kind", ["file", "dumb terminal"])
def test_elsewhere_plain_lines(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb" if kind == "dumb terminal" else "xterm")
    # rich is not even imported.
    monkeypatch.setitem(sys.modules, "rich", None)
    stream = Terminal() if kind == "dumb terminal" else io.StringIO()
    console = Console(40, 0, stream=stream, every=3600)
    for step in range(1, 41):
        console.step(step, f"state {step}")
    console.say("a message")
    console.close()
    first, last, message = stream.getvalue().splitlines()
    assert first.startswith("train 1/40 | state 1 | ") and first.endswith(" s left") or "left" in first
    assert last.startswith("train 40/40 | state 40 | ") and "left" not in last
    assert message == "a message" and "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_without_rich_a_terminal_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"rich.*apex_fast\[train\]"):
        Console(5, 0, stream=Terminal())


def test_the_pace_is_that_of_the_steps(fake: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    from apex_fast.training import progress

    monkeypatch.setattr(progress.time, "monotonic", lambda: fake.now)
    stream = io.StringIO()
    console = Console(100, 10, stream=stream)
    fake.now = 1000.0  # set-up
    console.begin(10)
    assert console.seconds_left(10) is None
    fake.now += 20
    assert console.seconds_left(20) == pytest.approx(160)
    console.step(20, "x")
    assert stream.getvalue() == "train 20/100 | x | 0.5 steps/s | 3 min left\n"


# ---- boards


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, *names: str, **options: str) -> None:
        self.metric = (names, options)

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], FakeRun]]:
    """Stands in for wandb; the calls are those that wandb 0.31 was tried with in offline mode."""
    begun: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**options: Any) -> FakeRun:
        begun.append((options, FakeRun()))
        return begun[-1][1]

    module = types.ModuleType("wandb")
    module.init, module.Image = init, lambda pixels: ("image", np.asarray(pixels).shape)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return begun


def test_weights_and_biases_by_a_switch(
    tiny_start: Path, tmp_path: Path, fake_wandb: list[tuple[dict[str, Any], FakeRun]]
) -> None:
    options = ("--report_to", "wandb", "--validation_prompts", "a three", "--validation_steps", "2")
    trainer_of(tiny_start, tmp_path, *options).run(until=2)
    config = load_config(tmp_path / "config.yaml", ["--resume_from_checkpoint", "latest"])
    Trainer(config).run()
    (first, begun), (second, resumed) = fake_wandb
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert first["config"]["train_batch_size"] == 8 and first["dir"] == str(tmp_path)
    assert begun.finished and resumed.finished
    assert begun.metric == (("*",), {"step_metric": "training_step"})
    steps = [entry["training_step"] for run in (begun, resumed) for entry in run.logged if "loss_fake" in entry]
    assert steps == [1, 2, 3, 4]
    assert [entry["samples"][0] for entry in resumed.logged if "samples" in entry] == ["image"]
    assert all(isinstance(v, (int, float)) for entry in begun.logged for k, v in entry.items() if k != "samples")


def test_the_real_weights_and_biases_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    board = open_board("wandb", tmp_path, step=0, settings={"a": 1})
    assert board is not None
    board.scalars(1, {"loss": 1.0, "phase": "warm-up"})
    board.image(1, "samples", np.zeros((4, 4, 3), dtype=np.uint8))
    board.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_without_wandb_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"wandb.*apex_fast\[wandb\]"):
        open_board("wandb", tmp_path, step=0)


def test_tensorboard_is_the_default(tiny_start: Path, tmp_path: Path) -> None:
    assert load_config(None, ["--output_dir", "x", "--pretrained_model_name_or_path", "y"]).report_to == "tensorboard"
    assert open_board("none", tmp_path, step=0) is None


# ---- validations


def test_a_validation_draws_every_number_of_steps_beside_the_start(
    tiny_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[str], list[str], list[torch.Tensor]]] = []
    real = validation._grid

    def grid(prompts: list[str], columns: list[tuple[str, torch.Tensor]], title: str) -> Any:
        drawn.append((prompts, [heading for heading, _ in columns], [images for _, images in columns]))
        return real(prompts, columns, title)

    monkeypatch.setattr(validation, "_grid", grid)
    more = ("--validation_prompts", "a three", "--validation_steps", "2", "--validation_base_inference_steps", "6")
    trainer = trainer_of(tiny_start, tmp_path, *more, "--validation_images_per_prompt", "3")
    before = trainer.draw(["a three"] * 3, num_inference_steps=6)
    expected = validation.draw_prompts(trainer, 6)
    assert not torch.equal(before, expected), "every picture has noise of its own seed"
    trainer.run(until=2)
    config = load_config(tmp_path / "config.yaml", ["--resume_from_checkpoint", "latest"])
    Trainer(config).run()
    assert [headings for _, headings, _ in drawn] == [["1 step", "2 steps", "4 steps", "the start, 6 steps"]] * 2
    (_, _, first), (_, _, second) = drawn
    assert torch.equal(first[3], second[3]), "the start is drawn once"
    torch.testing.assert_close(first[3], expected.clamp(-1, 1), atol=1 / 127, rtol=0)
    assert not torch.equal(first[0], second[0])
    # Other prompts: the start's pictures are not those of this run any more, and nothing else stands in for them.
    other = load_config(
        tmp_path / "config.yaml",
        ["--resume_from_checkpoint", "latest", "--validation_prompts", "a four", "--max_train_steps", "6"],
    )
    Trainer(other).run()
    assert drawn[-1][1] == ["1 step", "2 steps", "4 steps"]


def test_validations_by_the_clock(tiny_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apex_fast.training import loop

    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])

    def tick(trainer: Trainer) -> None:
        now[0] += 60.0

    more = ("--max_train_steps", "8", "--validation_prompts", "a 7", "--validation_minutes", "3")
    trainer_of(tiny_start, tmp_path, *more, callbacks=[tick]).run()
    # At three minutes, at six, and at the end.
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-000003.png", "step-000006.png", "step-000008.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--validation_minutes", "5"], "validation_minutes is set but there is nothing to validate"),
        (["--validation_minutes", "0"], "validation_minutes must be above 0"),
        (["--validation_num_inference_steps", "[]"], "validation_num_inference_steps is empty"),
        (["--validation_num_inference_steps", "[1, 0]"], "validation_num_inference_steps must be at least 1, got 0"),
        (["--validation_num_inference_steps", "2", "2"], "has a number twice"),
        (["--validation_base_inference_steps", "0"], "validation_base_inference_steps must be at least 1"),
    ],
)
def test_settings_of_a_validation(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("[", r"\[")):
        load_config(None, ["--output_dir", "x", "--pretrained_model_name_or_path", "y", *words])


def test_one_number_of_steps_is_a_list_of_one() -> None:
    config = load_config(
        None, ["--output_dir", "x", "--pretrained_model_name_or_path", "y", "--validation_num_inference_steps", "2"]
    )
    assert config.inference_steps == [2] and config.validation_num_inference_steps == 2


# ---- the environment


def test_every_part_of_a_run_notes_its_environment(tiny_start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_start, tmp_path)
    trainer.visibility = 0.31
    trainer.run(until=2)
    resumed = Trainer(load_config(tmp_path / "config.yaml", ["--resume_from_checkpoint", "latest"]))
    resumed.run()
    parts = environment.read(tmp_path / environment.FILE)
    assert [part["from_step"] for part in parts] == [0, 2]
    assert resumed.visibility == 0.31, "what was measured before the first step is known to a resumed run"
    assert parts[0]["versions"]["torch"] == torch.__version__ and parts[0]["device"] == "cpu"
    (tmp_path / environment.FILE).write_text('[{"started')
    assert environment.read(tmp_path / environment.FILE) == []
