"""``apex-fast probe``: what it takes, prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'apex_fast[data]'")

from tiny_runs import keys, make_pipeline, make_start, pipeline_keys  # noqa: E402

from apex_fast.data.shapes import CATEGORIES, parse  # noqa: E402
from apex_fast.data.shipped import few_prompts  # noqa: E402
from apex_fast.probing import command  # noqa: E402
from apex_fast.training.config import load_config  # noqa: E402
from apex_fast.training.loop import Trainer  # noqa: E402
from apex_fast.training.settings import SettingsError  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("--scales", "-1", "1", "--biases", "0", "0.5", "--times", "0.9", "0.5", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    return make_start(folder / "start")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Path:
    return make_pipeline(folder, "qwen_image")


def probed(*arguments: object, out: Path) -> dict:
    assert command.main([*map(str, arguments), *SMALL, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_the_model_that_ships_gets_table_json_and_picture(tmp_path, capsys):
    picture = tmp_path / "new" / "probe.png"
    found = probed("digits_start", "--png", picture, out=tmp_path / "probe.json")
    printed = capsys.readouterr().out
    assert "passes of batch 8, without gradient" in printed
    assert "recommended (*): shift.scale -1, shift.bias 0.5, shift.site raw: the default, and visible" in printed
    assert [row["verdict"] for row in found["rows"]] == ["visible", "visible", "invisible", "visible"] * 2
    assert found["recommended"]["site"] == "raw" and len(found["prompts"]) == 8
    image = pytest.importorskip("PIL.Image").open(picture)
    assert image.width > 500 and len(set(image.convert("L").resize((64, 64)).tobytes())) > 20


def test_a_small_model_is_asked_in_the_words_of_its_data(tmp_path):
    prompts = probed("shapes_start", out=tmp_path / "probe.json")["prompts"]
    # ValueError for words of other data.
    assert len(prompts) == 8 and {parse(prompt).category for prompt in prompts} == set(CATEGORIES)
    assert probed("digits_start", out=tmp_path / "probe.json")["prompts"] == few_prompts("digits")


def test_a_pipeline_with_prompts_of_ones_own(pipeline, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n\n two birds \n")
    found = probed(pipeline, "--prompts", prompts, "--resolution", 32, out=tmp_path / "probe.json")
    assert found["prompts"] == ["a red cat", "two birds"]
    assert (found["family"], found["dtype"]) == ("qwen_image", "float32")
    assert "of batch 1" in capsys.readouterr().out
    found = probed(pipeline, "--resolution=32", "--dtype", "bf16", "--batch_size", 2, out=tmp_path / "probe.json")
    assert found["dtype"] == "bfloat16" and len(found["prompts"]) == 2


def test_a_config_brings_its_shift_size_and_prompts(pipeline, tmp_path):
    config = load_config(None, pipeline_keys(pipeline, tmp_path / "run"))
    lines = [
        f"pretrained_model_name_or_path: {pipeline}",
        f"dataset_name: {config.dataset_name}",
        f"output_dir: {tmp_path / 'run'}",
        "resolution: 32",
        "mixed_precision: bf16",
        "validation_prompts: [a red cat, two birds, a map]",
        "shift: {scale: -0.7, bias: 0.25, site: projected, mode: diagonal}",
    ]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines))
    found = probed(path, out=tmp_path / "probe.json")
    own = found["rows"][-1]
    assert (own["name"], own["site"], own["scale"], own["bias"]) == ("config", "projected", -0.7, 0.25)
    assert own["mode"] == "diagonal" and own["verdict"] == "visible"
    assert found["prompts"] == ["a red cat", "two birds", "a map"] and found["dtype"] == "bfloat16"


def test_a_run_brings_the_shift_that_it_trained(start, tmp_path):
    run = tmp_path / "run"
    shift = ("--shift.trainable", "true", "--shift.mode", "diagonal", "--learning_rate", "0.05")
    trainer = Trainer(load_config(None, keys(start, run, *shift)))
    trainer.run()
    trained = trainer.objective.shift
    assert trained.scale.detach().std() > 0
    for model in (run, next(run.glob("checkpoint-*"))):
        own = probed(model, out=tmp_path / "probe.json")["rows"][-1]
        assert (own["name"], own["mode"]) == ("run", "diagonal")
        assert own["scale"] == pytest.approx(trained.scale.mean().item(), rel=1e-5)
        assert own["bias"] == pytest.approx(trained.bias.mean().item(), rel=1e-5)


def test_a_lora_run_is_probed_with_its_adapter(pipeline, tmp_path):
    run = tmp_path / "run"
    Trainer(load_config(None, pipeline_keys(pipeline, run, "--rank", "2", "--learning_rate", "0.1"))).run()
    found = probed(run, out=tmp_path / "run.json")
    plain = probed(pipeline, "--resolution", 32, out=tmp_path / "plain.json")
    assert found["rows"][-1]["name"] == "run" and found["rows"][-1]["scale"] == -1
    assert found["rows"][0]["velocity_change"] != plain["rows"][0]["velocity_change"]


def test_what_does_not_fit_is_refused(start, pipeline, tmp_path):
    empty = tmp_path / "none.txt"
    empty.write_text("\n")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("ein Käse\n".encode("latin-1"))
    new = Path(__file__).resolve().parents[1] / "examples" / "digits_start.yaml"
    for arguments, message in (
        (["digits_start", "--dtype", "bf16"], "--dtype is for a pretrained model"),
        (["digits_start", "--prompts", empty], "no line with a prompt"),
        (["digits_start", "--prompts", tmp_path / "no.txt"], "no.txt cannot be read"),
        (["digits_start", "--prompts", latin], "latin.txt is not UTF-8"),
        (["digits_start", "--json", tmp_path], "--json: .* is a folder"),
        (["digits_start", "--resolution", 16], "8, 8.* pixels only"),
        (["digits_start", "--resolution", 8, 8, 8], "an edge, or height and width"),
        ([pipeline, "--resolution", 33], "--resolution: .*multiples of"),
        (["digits_start", "--times", 2], "times must be in"),
        (["digits_start", "--scales", "--biases"], "the grid is empty"),
        ([pipeline / "transformer"], "has no .*text_encoder.*the whole pipeline"),
        ([new], "makes a new network"),
    ):
        with pytest.raises(SettingsError, match=message):
            command.main([*map(str, arguments), "--device", "cpu"])
    with pytest.raises(FileNotFoundError):
        command.main([str(tmp_path / "nothing" / "there" / "at all")])
    with pytest.raises(SystemExit):
        command.main(["digits_start", "--site", "end"])


def test_a_pipeline_is_asked_briefly_unless_all_is_wanted(pipeline, capsys):
    small = ("--scales", "-1e-1", "--biases", "0.5", "--sites", "raw", "--resolution", "32", "--device", "cpu")
    assert command.main([str(pipeline), *small]) == 0
    printed = capsys.readouterr().out
    assert "shifts 1, times 2, prompts 2: 18 passes" in printed and "-0.1" in printed
    assert command.main([str(pipeline), *small, "--full"]) == 0
    assert "shifts 1, times 4, prompts 4: 68 passes" in capsys.readouterr().out


@pytest.mark.cuda
def test_on_a_gpu(pipeline, tmp_path):
    found = probed(pipeline, "--resolution", 32, "--device", "cuda", out=tmp_path / "probe.json")
    assert found["dtype"] == "bfloat16" and torch.cuda.is_available()
    control = [row for row in found["rows"] if (row["scale"], row["bias"]) == (1, 0)]
    assert all(change == 0 for row in control for change in row["velocity_change"])
