"""``apex-fast doctor``: every check finds what it is for, says the mend, and leaves the others to be made."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("peft")
pytest.importorskip("diffusers")

from backbone_cases import LENGTHS
from tiny_runs import make_pipeline, pipeline_keys

from apex_fast import doctor
from apex_fast.cli import main
from apex_fast.doctor import Check, checkpoint_bytes, examine
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer
from apex_fast.training.settings import SettingsError

NAMES = ["config", "versions", "ops", "device", "model", "data", "cache", "memory", "probe", "disk"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("model"), "sana")


def words(model: Path, folder: Path, *more: str) -> list[str]:
    return pipeline_keys(model, folder / "run", "--max_sequence_length", str(LENGTHS["sana"]), *more)


def checks(model: Path, folder: Path, *more: str, **options: Any) -> dict[str, Check]:
    """The worst line of every check."""
    found: dict[str, Check] = {}
    for check in examine(None, words(model, folder, *more), **options):
        order = ("skipped", "ok", "careful", "fail")
        if check.name not in found or order.index(check.state) > order.index(found[check.name].state):
            found[check.name] = check
    return found


def test_a_run_that_can_begin(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words(model, tmp_path, "--rank", "4", "--shift.scale", "0.9", "--shift.bias", "0.05")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == NAMES and not any(line.startswith("FAIL") for line in lines)
    by_name = {line.split()[1]: line for line in lines}
    assert "8 samples from" in by_name["data"] and "8 pictures read" in by_name["data"]
    assert "visible: scalar shift, scale 0.9" in by_name["probe"] and by_name["probe"].startswith("ok")
    assert "GiB by the plan, and main memory has" in by_name["memory"]
    assert not (tmp_path / "run").exists(), "a check writes nothing"


def test_json_and_the_exit_code(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = ("--dataset_name", str(tmp_path / "no"))
    assert main(["doctor", *words(model, tmp_path, *nowhere), "--json", "--no-probe"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and [check["name"] for check in found["checks"]] == NAMES
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert states["data"] == "fail" and states["probe"] == "skipped" and states["disk"] == "ok"


def test_a_config_that_is_wrong_is_the_first_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("learning_rat: 1\n")
    assert main(["doctor", str(tmp_path / "run.yaml")]) == 1
    (line, last) = capsys.readouterr().out.splitlines()
    assert line.startswith("FAIL     config") and "did you mean 'learning_rate'" in line
    assert last == "1 of 1 checks failed: config"


@pytest.mark.parametrize("arguments", [["--json"], ["--gpu"], ["--gpu", "24GB"], ["--gpu", "much", "run.yaml"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert "apex-fast doctor" in error or "--gpu must be" in error


# ---- what is installed


def test_versions_outside_of_their_range(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda n: "0.1" if n == "peft" else real(n))
    found = checks(model, tmp_path, probe=False)
    assert found["versions"].state == "fail" and "peft 0.1, wanted" in found["versions"].said
    assert "pip install" in found["versions"].mend and found["data"].state == "ok"


def test_packages_that_a_key_needs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda n, *a: None if n == "wandb" else real(n, *a))
    found = checks(model, tmp_path, "--report_to", "wandb", probe=False)
    assert found["versions"].line.endswith("report_to: wandb needs wandb; pip install 'apex_fast[wandb]'")


def test_ops_without_compiled_kernels(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.info, "kernel_of", lambda op, key: doctor.info.TWIN)
    assert checks(model, tmp_path, probe=False)["ops"].state == "careful"
    monkeypatch.setattr(doctor.info, "kernel_of", lambda op, key: doctor.info.MISSING)
    assert checks(model, tmp_path, probe=False)["ops"].state == "fail"


def test_a_device_that_is_not_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = checks(model, tmp_path, "--device", "cuda", probe=False)
    assert found["device"].state == "fail" and "sees no GPU" in found["device"].said
    found = checks(model, tmp_path, "--device", "auto", probe=False)
    assert found["device"].state == "careful" and "no GPU is visible" in found["device"].said


# ---- what is read


def test_models_that_are_not_whole(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    shutil.rmtree(broken / "vae")
    found = checks(model, tmp_path, "--pretrained_model_name_or_path", str(broken))
    assert found["model"].state == "fail" and "lacks vae" in found["model"].said
    assert found["probe"].said == "left out: the model is not here"
    index = broken / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    (broken / "vae").mkdir()
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    found = checks(model, tmp_path, "--pretrained_model_name_or_path", str(broken), probe=False)
    assert "lacks transformer/part-1.safetensors" in found["model"].said
    shutil.rmtree(broken)
    shutil.copytree(model, broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (broken / "transformer" / "config.json").write_text("{")
    found = checks(model, tmp_path, "--pretrained_model_name_or_path", str(broken), probe=False)
    assert found["model"].state == "fail" and "config.json is no JSON" in found["model"].said
    assert f"bytes instead of {weights.stat().st_size + 8}" in found["model"].said
    (broken / "model_index.json").write_text("{")
    found = checks(model, tmp_path, "--pretrained_model_name_or_path", str(broken), probe=False)
    assert found["model"].state == "fail" and found["data"].state == "ok"
    found = checks(model, tmp_path, "--pretrained_model_name_or_path", str(tmp_path / "nowhere"), probe=False)
    assert found["model"].state == "fail" and "nowhere holds no model" in found["model"].said


def test_a_model_of_the_hub_is_not_fetched(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = checks(model, tmp_path, "--pretrained_model_name_or_path", "somebody/some-model", "--family", "sana")
    assert found["model"].state == "careful" and "hf download somebody/some-model" in found["model"].mend
    assert found["probe"].state == "skipped"


def test_data_that_cannot_be_read(model: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(model.parent / "pictures", pictures)
    (pictures / "3.png").write_bytes(b"no picture")
    found = checks(model, tmp_path, "--dataset_name", str(pictures), probe=False)
    assert found["data"].state == "careful" and "not readable: 3.png" in found["data"].said
    for path in pictures.glob("*.png"):
        path.write_bytes(b"no picture")
    found = checks(model, tmp_path, "--dataset_name", str(pictures), probe=False)
    assert found["data"].state == "fail" and "none of them is a picture" in found["data"].said
    found = checks(model, tmp_path, "--train_batch_size", "16", probe=False)
    assert "a step takes 16 samples" in found["data"].said


def test_a_run_from_prompts_alone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red cat\na blue dog\n")
    front_door = ["--model", str(model), "--prompts", "prompts.txt"]
    found = {check.name: check for check in examine(None, front_door, probe=False)}
    assert found["config"].state == "ok" and "a LoRA of rank 64" in found["config"].said
    assert found["data"].said == "2 prompts from prompts.txt; the model draws their samples itself"
    Path("prompts.txt").write_text("")
    (only,) = examine(None, front_door, probe=False)
    assert only.state == "fail" and "there is no prompt in prompts.txt" in only.said


# ---- what is needed


@pytest.mark.parametrize("advised", [True, False])
def test_memory_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advised: bool) -> None:
    from apex_fast.planning import planner
    from apex_fast.planning.advice import Advice

    # Looking for what makes it fit takes most of a minute, and has tests of its own.
    advice = Advice({"rank": 8, "validation_steps": None}, needed=1 << 30, fits=True, fullest="a step")
    monkeypatch.setattr(planner, "advise", lambda *_: advice if advised else None)
    example = str(Path(__file__).parent.parent / "examples" / "sana_0.6b_lora.yaml")
    small, large = (
        {c.name: c for c in examine(example, ["--output_dir", str(tmp_path)], gpu=size << 30)} for size in (4, 80)
    )
    assert small["memory"].state == "fail" and "the GPU that --gpu names has 4.00 GiB" in small["memory"].said
    mend = "it fits with --rank 8 --validation_steps null" if advised else "`apex-fast plan` with --gpu says what"
    assert small["memory"].mend.startswith(mend)
    assert large["memory"].state == "ok" and large["memory"].said.startswith("needs 5.6")
    assert large["disk"].state == "ok" and "3 checkpoints of" in large["disk"].said
    assert large["probe"].said == "left out: the model is not here"


def test_a_shift_that_the_network_does_not_see(model: Path, tmp_path: Path) -> None:
    control = ("--shift.scale", "1", "--shift.bias", "0")
    found = checks(model, tmp_path, *control)
    assert found["probe"].state == "fail" and "invisible" in found["probe"].said
    assert "probe: false trains it anyway" in found["probe"].mend
    assert checks(model, tmp_path, *control, "--probe", "false")["probe"].state == "skipped"


def test_a_disk_that_is_too_small(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    found = checks(model, tmp_path, probe=False)
    assert found["disk"].state == "fail" and "0 MB are free" in found["disk"].said
    assert "smaller checkpoints_total_limit" in found["disk"].mend


def test_a_folder_that_holds_a_run_already(model: Path, tmp_path: Path) -> None:
    Trainer(load_config(None, words(model, tmp_path))).run()
    found = checks(model, tmp_path, probe=False)
    assert found["disk"].state == "fail" and "already holds a run" in found["disk"].said
    assert checks(model, tmp_path, "--resume_from_checkpoint", "latest", probe=False)["disk"].state == "ok"


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_size_of_a_checkpoint_is_estimated(model: Path, tmp_path: Path, mode: str) -> None:
    """Within a tenth of the tensors that a run writes."""
    from safetensors import safe_open

    from apex_fast.planning.planner import plan

    more = ("--rank", "4") if mode == "lora" else ()
    config = load_config(None, words(model, tmp_path, *more, "--real_branch", "ema", "--checkpointing_steps", "null"))
    estimate = checkpoint_bytes(plan(config, compare=False))
    Trainer(config).run()
    (folder,) = (tmp_path / "run").glob("checkpoint-*")
    written = 0
    # States of random generators have a size of their own, a few KB.
    for path in (p for p in folder.rglob("*.safetensors") if not p.name.startswith("random")):
        with safe_open(path, "pt") as file:
            written += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert estimate == pytest.approx(written, rel=0.1)


def test_errors_of_the_user_are_lines_and_others_are_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: object) -> Any:
        raise SettingsError("write something else")
        yield

    monkeypatch.setitem(doctor._CHECKS, "ops", wrong)
    assert checks(model, tmp_path, probe=False)["ops"].said == "write something else"

    def bug(_: object) -> Any:
        raise AttributeError("a mistake of ours")
        yield

    monkeypatch.setitem(doctor._CHECKS, "ops", bug)
    with pytest.raises(AttributeError):
        checks(model, tmp_path, probe=False)


def test_looking_at_the_disk_moves_nothing(model: Path, tmp_path: Path) -> None:
    """What a killed save has set aside is put back by the run, not by who only looks."""
    from apex_fast.training.state import claim_folder

    run = tmp_path / "run"
    aside = run / ".checkpoint-5.partial-replaced-1"
    aside.mkdir(parents=True)
    (aside / "trainer.json").write_text("{}")
    claim_folder(load_config(None, words(model, tmp_path, "--output_dir", str(run))), delete=False)
    assert [p.name for p in run.iterdir()] == [aside.name]
