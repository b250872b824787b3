"""How a run reads its launch, in one process: what contradicts its config is refused with both names."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'apex_fast[train]'")

from tiny_runs import keys, losses, make_pipeline, make_start, pipeline_keys

from apex_fast import cli
from apex_fast.training import processes
from apex_fast.training.checkpoint import CheckpointError
from apex_fast.training.config import load_config
from apex_fast.training.interrupt import StopRequest
from apex_fast.training.loop import Trainer
from apex_fast.training.processes import Processes, ProcessLostError
from apex_fast.training.settings import SettingsError

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {
    "mixed_precision": "no",
    "accumulation": 1,
    "distributed": "auto",
    "timeout": 60.0,
    "checkpointing": False,
}


@pytest.mark.parametrize(
    ("environment", "config", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "mixed_precision: no, and accelerate's config has .*: bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"mixed_precision": "bf16"}, "mixed_precision: bf16, .* fp16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"accumulation": 2}, "gradient_accumulation_steps: 2, .* 4"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "fsdp_version: 1; .* write fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"distributed": "ddp"}, "distributed: ddp, .* FSDP"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            {},
            "fsdp_offload_params: true",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            "fsdp_activation_checkpointing: true, .* gradient_checkpointing: false",
        ),
    ],
)
def test_a_launch_and_a_config_that_contradict_each_other(environment, config, message, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        processes.start("cpu", **{**CONFIG, **config})


@pytest.mark.parametrize(
    ("environment", "config"),
    [
        ({}, {}),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"mixed_precision": "bf16"}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, {"accumulation": 8}),
        ({}, {"distributed": "fsdp2"}),
    ],
)
def test_one_process_is_one_whatever_could_be(environment, config, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = processes.start("cpu", **{**CONFIG, **config})
    assert (made.rank, made.world, made.way, made.is_main, made.sharded) == (0, 1, "one", True, False)
    assert made.device == torch.device("cpu") and type(made.accelerator).__name__ == "Accelerator"
    assert bool(made.notes) == ("distributed" in config)
    values = {"a": torch.tensor(3.0)}
    assert made.mean(values) == values and made.gather({"b": 1}) == [{"b": 1}] and made.largest(7) == 7
    with pytest.raises(CheckpointError):
        made.on_main(lambda: (_ for _ in ()).throw(CheckpointError("as it is")))


def test_every_process_reads_all_weights(monkeypatch) -> None:
    """transformers leaves them out in all processes but the first where accelerate's default says so."""
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    processes.start("cpu", **CONFIG)
    from transformers.integrations.fsdp import is_fsdp_enabled

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not is_fsdp_enabled()
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert is_fsdp_enabled(), "what this test is about"


def test_a_gpu_of_its_own_choice_is_refused_where_processes_are_launched(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(processes, "device_of", lambda name: torch.device(name))
    with pytest.raises(SettingsError, match="device: cuda:1: .* write device: auto"):
        processes.start("cuda:1", **CONFIG)


def test_words_of_torch_about_a_lost_process_become_an_error_of_the_user() -> None:
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"
    with pytest.raises(ProcessLostError, match="--resume_from_checkpoint latest") as caught, processes.lost_processes():
        raise RuntimeError(lost)
    assert "Connection closed by peer" in str(caught.value)
    with pytest.raises(RuntimeError, match="shapes") as other, processes.lost_processes():
        raise RuntimeError("shapes differ")
    assert type(other.value) is RuntimeError


def test_an_error_told_by_another_process_is_not_told_again(monkeypatch, capsys) -> None:
    def fail(_: object) -> int:
        error = CheckpointError("told by the first process")
        error.told_elsewhere = elsewhere
        raise error

    monkeypatch.setattr(cli, "_train", fail)
    for elsewhere in (True, False):
        assert cli.main(["train", "x.yaml"]) == 1
        assert ("told by the first" in capsys.readouterr().err) is not elsewhere


def test_a_request_is_agreed_on_and_a_second_sigterm_is_the_same_one() -> None:
    said: list[str] = []
    with StopRequest(said.append) as stop:
        stop.agree(lambda number: number)
        assert not stop.agreed and stop.exit_code == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        stop.agree(lambda number: number)
    assert stop.agreed and stop.exit_code == 143 and said == ["SIGTERM"]
    # and where another process was asked
    asked = StopRequest(said.append)
    asked.agree(lambda number: max(number, int(signal.SIGINT)))
    assert asked.agreed and asked.exit_code == 130 and said == ["SIGTERM"]


# ---- fp16


@pytest.fixture(scope="module")
def tiny_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("tiny") / "start")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft", reason="peft is not installed: pip install 'apex_fast[train]'")
    return make_pipeline(tmp_path_factory.mktemp("pipeline"), "qwen_image")


def words(model: Path, folder: Path, *more: str) -> list[str]:
    return pipeline_keys(model, folder, "--rank", "2", "--probe", "false", "--learning_rate", "1e-2", *more)


def half(model: Path, folder: Path, scale: float, *more: str) -> Trainer:
    trainer = Trainer(load_config(None, words(model, folder, "--mixed_precision", "fp16", *more)))
    if "--resume_from_checkpoint" not in more:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def test_fp16_leaves_out_steps_that_overflow_and_remembers_the_scale(pipeline: Path, tmp_path: Path) -> None:
    trainer = half(pipeline, tmp_path, 2.0**60)
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.run(until=2)
    assert trainer.skipped_steps == 2 and trainer.scaler.get_scale() == 2.0**58
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert trainer.average is not None and trainer.average.updates == 0
    again = half(pipeline, tmp_path, 0.0, "--resume_from_checkpoint", "latest")
    assert again.step == 2 and again.skipped_steps == 2 and again.scaler.get_scale() == 2.0**58


def test_fp16_gradients_are_those_of_the_loss_whatever_the_scale(pipeline: Path, tmp_path: Path) -> None:
    norms = {}
    for name, scale in (("small", 2.0**8), ("large", 2.0**14)):
        trainer = half(pipeline, tmp_path / name, scale, "--max_grad_norm", "0.1")
        before = [p.detach().clone() for p in trainer.parameters]
        trainer.run()
        assert trainer.skipped_steps == 0
        assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
        norms[name] = [line[3] for line in losses(tmp_path / name)]
    Trainer(load_config(None, words(pipeline, tmp_path / "full", "--max_grad_norm", "0.1"))).run()
    norms["full"] = [line[3] for line in losses(tmp_path / "full")]
    for name in ("small", "large"):
        assert norms[name] == pytest.approx(norms["full"], rel=0.03)


def test_fp16_of_a_network_that_divides_by_next_to_nothing_is_warned_about(tiny_start: Path, tmp_path: Path) -> None:
    config = load_config(None, keys(tiny_start, tmp_path, "--mixed_precision", "fp16", "--probe", "false"))
    assert any("linear attention" in note and "bf16" in note for note in Trainer(config).notes)


# ---- what one process stands for


def test_sharing_out_is_off_in_one_process() -> None:
    alone = Processes()
    assert alone.rows(3) == slice(0, 3) and alone.from_main(5) == 5 and alone.together(lambda: 1) == [1]
    assert Processes(rank=2, world=4).rows(3) == slice(6, 9)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, False),
        ({"TORCHELASTIC_RUN_ID": "7"}, True),
        ({"TORCHELASTIC_RUN_ID": "7", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110"}, False),
    ],
)
def test_a_launcher_with_a_short_grace_period_is_said(environment, said, monkeypatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = processes.start("cpu", **CONFIG)
    assert any("kills its processes after 30 s" in note for note in made.notes) == said
