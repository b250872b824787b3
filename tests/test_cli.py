"""The command line: train, generate, eval, env, and errors that fit in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from tiny_runs import keys, make_start

from apex_fast.cli import main


@pytest.fixture(scope="module")
def tiny_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("tiny") / "start")


@pytest.fixture(scope="module")
def run(tiny_start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run made by the command itself."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *keys(tiny_start, folder, "--checkpointing_steps", "2")]) == 0
    return folder


def picture_of(path: Path):
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
        return picture


def test_train_takes_a_file_and_overrides(tiny_start: Path, tmp_path: Path) -> None:
    import yaml

    values = {
        "pretrained_model_name_or_path": str(tiny_start),
        "output_dir": str(tmp_path / "a"),
        "max_train_steps": 50,
        "train_batch_size": 4,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    shorter = ["--max-train-steps", "2", "--objective.warmup_steps=0", "--objective.ramp-steps=0"]
    assert main(["train", str(tmp_path / "c.yaml"), *shorter]) == 0
    assert (tmp_path / "a" / "checkpoint-2").is_dir()
    assert main(["train", "--config", str(tmp_path / "c.yaml"), *shorter, "--output_dir", str(tmp_path / "b")]) == 0


@pytest.mark.parametrize("name", ["digits_start", "digits_demo", "digits_full"])
def test_the_examples_run(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    example = Path(__file__).parent.parent / "examples" / f"{name}.yaml"
    shorter = ["--output_dir", str(tmp_path), "--max_train_steps", "2", "--train_batch_size", "4", "--device", "cpu"]
    shorter += ["--validation_prompts", "the digit 7", "--validation_steps", "2"]
    assert main(["train", str(example), *shorter]) == 0
    assert "finished at step 2" in capsys.readouterr().err
    assert (tmp_path / "samples" / "step-000002.png").is_file()
    assert main(["generate", str(tmp_path), "--prompt", "the digit 7"]) == 0


def test_generate_works_on_everything_that_training_leaves(
    run: Path, tiny_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "model")
    pictures = {}
    for name, model in {
        "run": run,
        "checkpoint": run / "checkpoint-4",
        "earlier": run / "checkpoint-2",
        "unfinished": unfinished,
        "folder": run / "model",
        "start": tiny_start,
    }.items():
        out = tmp_path / f"{name}.png"
        assert main(["generate", str(model), "--prompt", "a handwritten three", "--out", str(out), "--n", "1"]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        picture = picture_of(out)
        assert picture.size == (256, 256) and picture.mode == "RGB"
        pictures[name] = picture.tobytes()
    # run, its last checkpoint's averages and the exported folder are one model; an earlier step and the start are
    # others
    assert pictures["run"] == pictures["checkpoint"] == pictures["unfinished"] == pictures["folder"]
    assert len({pictures["run"], pictures["earlier"], pictures["start"]}) == 3


def test_generate_names_its_file_and_depends_on_seed_steps_and_prompt(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*more: str) -> Path:
        assert main(["generate", str(run), *more]) == 0
        return Path(capsys.readouterr().out.strip())

    first = generate("--prompt", "a handwritten three", "--seed", "1")
    assert first == run / "generated" / "a-handwritten-three-1-step-seed-1.png"
    assert picture_of(first).width > 300, "four pictures in a grid"
    before = first.read_bytes()
    assert generate("--prompt", "a handwritten three", "--seed", "1").read_bytes() == before
    others = [
        generate("--prompt", "a handwritten three", "--seed", "2"),
        generate("--prompt", "a handwritten three", "--seed", "1", "--num_inference_steps", "4"),
        generate("--prompt", "the digit 7", "--seed", "1"),
        generate(
            "--prompt", "a handwritten three", "--seed", "1", "--guidance-scale", "3", "--num-inference-steps", "2"
        ),
    ]
    assert len({before, *(p.read_bytes() for p in others)}) == 5
    rows = generate("--prompt", "a handwritten three", "the digit 7", "--n", "3")
    assert picture_of(rows).height > picture_of(first).height // 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no such folder; write the folder of a run"),
        ("empty", "holds neither a finished model .* nor a complete checkpoint"),
        ("damaged", "not a complete checkpoint: .*transformer.*bytes instead of"),
    ],
)
def test_generate_says_what_is_wrong_with_a_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, message: str
) -> None:
    import re

    folder = tmp_path / "folder"
    if what == "empty":
        folder.mkdir()
    elif what == "damaged":
        folder = tmp_path / "checkpoint-4"
        shutil.copytree(run / "checkpoint-4", folder)
        (weights,) = (folder / "model" / "transformer").glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["generate", str(folder), "--prompt", "x"]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error and len(error.splitlines()) == 1


def test_eval_prints_a_table_and_writes_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--nfe", "1,2", "--samples", "40"]) == 0
    text = capsys.readouterr().out
    assert "Frechet distance" in text and "2 steps" in text and "real data" in text
    result = json.loads((run / "eval.json").read_text())
    assert set(result["scores"]) == {"1", "2"} and text.strip().endswith(str(run / "eval.json"))
    assert {"frechet", "accuracy", "diversity"} <= set(result["scores"]["1"])
    assert result["floor"]["frechet"] < result["scores"]["1"]["frechet"], (
        "a network with random weights beats real data"
    )
    assert main(["eval", str(run), "--nfe", "1", "--samples", "7"]) == 2
    assert "multiple of 10" in capsys.readouterr().err


def test_env_prints_versions(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["env"]) == 0
    assert torch.__version__.split("+")[0] in capsys.readouterr().out


def test_env_prints_json_or_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from apex_fast import info

    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ops"] == info.collect()["ops"]
    assert main(["env", "--build"]) == 0
    assert capsys.readouterr().out == info.build_line() + "\n"
    with pytest.raises(SystemExit) as stop:
        main(["env", "--json", "--build"])
    assert stop.value.code == 2


def test_a_device_that_is_not_there_is_one_line(
    tiny_start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def error_of(device: str) -> str:
        assert main(["generate", str(tiny_start), "--prompt", "x", "--device", device]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device cuda: this torch" in error_of("cuda") and "device must be auto" in error_of("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "device cuda:3: this machine has 1 GPU" in error_of("cuda:3")
    assert not (tiny_start / "generated").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train"], 2, "train needs a config"),
        (["train", "none.yaml"], 2, "none.yaml: no such config file"),
        (["train", "--network_dim", "4"], 2, "write 'rank'"),
        (["train", "--output_dir", "x", "--learning_rat", "4"], 2, "did you mean 'learning_rate'"),
        (["train", "--output_dir", "x", "--pretrained_model_name_or_path", "/no/such"], 1, "/no/such holds no model"),
        (["train", "--output_dir", "x", "--smoke"], 2, "set pretrained_model_name_or_path"),
        (["init", "sdxl", "--mode", "lora"], 2, "no such family: sdxl; expected one of sana, qwen_image"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "a refused run must leave nothing behind"


def test_a_damaged_file_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The last resort, for files whose reader says nothing better."""
    from safetensors import SafetensorError

    from apex_fast.training import config

    for error, kind in (
        (SafetensorError("header too large"), "safetensors"),
        (json.JSONDecodeError("x", "{", 1), "JSON"),
    ):

        def broken(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(config, "load_config", broken)
        assert main(["train", "x.yaml"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"no whole {kind} file: " in line and "copy or download it again" in line


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["train", "--output_dir", "x", "--seed", "1"]) == 1
    assert "pip install 'apex_fast[train]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--help"],
        ["--help"],
        ["generate", "--help"],
        ["eval", "--help"],
        ["init", "--help"],
        ["demo", "--help"],
        ["env", "--help"],
        [],
    ],
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(command)
    except SystemExit as stop:
        code = int(stop.code or 0)
    text = capsys.readouterr().out
    assert code == 0 and "usage: apex-fast" in text
    if command[:1] == ["train"]:
        assert (
            "--gradient_accumulation_steps" in text and "--objective.correction_weight" in text and "kohya" not in text
        )
