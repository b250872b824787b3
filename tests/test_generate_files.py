"""``apex-fast generate MODEL --prompts FILE``: many pictures, resumable, in the folders that scorers read."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_cases import load_tiny
from export_cases import PROMPT, code_of, run_card, tiny_run
from torch import Tensor

from apex_fast import generate as module
from apex_fast.cli import main
from apex_fast.evaluation.layouts import FACTS, Layout, as_picture, grid, read_prompts
from apex_fast.export import export_run
from apex_fast.generate import generate_files
from apex_fast.lora import LoraSettings, add_lora
from apex_fast.training.models import is_hub_id

PROMPTS = ("a red circle on white", "a blue square, and nothing else", "ein grünes Quadrat")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of a family that masks its padding, so that prompts of several lengths share a batch."""
    return tiny_run(tmp_path_factory, "qwen_image")


def generate(model: Path | str, *more: str) -> int:
    return main(["generate", str(model), "--prompts", "prompts.txt", "--device", "cpu", *more])


def values(path: Path | str | io.BytesIO) -> Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB")).astype("int64"))


def facts(path: Path | str) -> dict[str, Any]:
    from PIL import Image

    with Image.open(path) as picture:
        return json.loads(picture.info[FACTS])


def contents(folder: Path | str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """The same files; a picture that was drawn in another batch may round to the neighbouring value."""
    assert found.keys() == expected.keys()
    for name, data in found.items():
        if data != expected[name]:
            assert name.endswith(".png"), name
            difference = (values(io.BytesIO(data)) - values(io.BytesIO(expected[name]))).abs()
            assert difference.max() <= 1, name


# ---- what is drawn


def test_plain(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(run, "--n", "2", "--seed", "5", "--out", "out") == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == "out" and "6 pictures in 1 step by the finished model of" in captured.err
    assert "generate 6/6" in captured.err and "pictures/s" in captured.err
    names = [f"{i:05}-{j:02}.png" for i in range(3) for j in range(2)]
    assert sorted(p.name for p in Path("out").iterdir()) == [*names, "metadata.jsonl"]
    lines = [json.loads(line) for line in Path("out/metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["file_name"] for line in lines] == names and [line["seed"] for line in lines] == list(range(5, 11))
    assert [line["text"] for line in lines[::2]] == list(PROMPTS)
    assert facts("out/00002-01.png")["prompt"] == PROMPTS[2] and facts("out/00002-01.png")["seed"] == 10
    assert values("out/00000-00.png").shape == (32, 32, 3)
    assert len({p.read_bytes() for p in Path("out").glob("*.png")}) == 6

    from apex_fast.data.folder import PictureFolder

    assert len(PictureFolder.open("out")) == 6, "the folder can be trained on"


def test_a_picture_is_the_one_that_the_card_draws(run: Path) -> None:
    """The seed means what it means in the stock pipeline."""
    assert generate(run, "--n", "1", "--out", "out") == 0
    folder = export_run(run)
    assert json.dumps(PROMPT) in code_of(folder / "README.md") and PROMPTS[0] == PROMPT
    run_card(folder / "README.md", folder=str(folder))
    assert (values("out/00000-00.png") - values("picture.png")).abs().max() <= 1


def test_neither_batches_nor_parts_change_a_picture(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate(run, "--n", "3", "--out", "single") == 0
    assert generate(run, "--n", "3", "--batch-size", "4", "--out", "batched") == 0
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 2)
    assert generate(run, "--n", "3", "--batch-size", "4", "--out", "parts") == 0
    singles = sorted(Path("single").glob("*.png"))
    assert len(singles) == 9
    for path in singles:
        for other in ("batched", "parts"):
            assert (values(path) - values(Path(other) / path.name)).abs().max() <= 1


def test_steps_guidance_and_size_are_taken(run: Path) -> None:
    settings = ("--n", "1", "--num_inference_steps", "2", "--guidance_scale", "3", "--negative-prompt", "blurred")
    assert generate(run, *settings, "--height", "32", "--width", "48", "--out", "out") == 0
    assert values("out/00000-00.png").shape == (32, 48, 3)
    said = facts("out/00000-00.png")
    assert (said["num_inference_steps"], said["guidance_scale"], said["negative_prompt"]) == (2, 3.0, "blurred")
    assert generate(run, "--n", "1", "--height", "32", "--width", "48", "--out", "plain") == 0
    assert facts("plain/00000-00.png")["guidance_scale"] is None
    assert (values("out/00000-00.png") - values("plain/00000-00.png")).abs().max() > 1


def test_a_model_with_its_own_text_encoder(tmp_path: Path) -> None:
    from tiny_runs import make_start

    assert generate(make_start(tmp_path / "start"), "--n", "2", "--batch-size", "3", "--out", "out") == 0
    assert len(list(Path("out").glob("*.png"))) == 6


# ---- going on


def test_a_stopped_run_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(run, "--n", "2", "--out", "whole") == 0
    put = Layout.put
    count = iter(range(100))

    def stopped(self: Layout, *arguments: Any) -> None:
        if next(count) == 3:
            raise KeyboardInterrupt
        put(self, *arguments)

    monkeypatch.setattr(Layout, "put", stopped)
    assert generate(run, "--n", "2", "--out", "out") == 130
    monkeypatch.setattr(Layout, "put", put)
    assert sorted(p.name for p in Path("out").iterdir()) == ["00000-00.png", "00000-01.png", "00001-00.png"]
    Path("out/.00001-01.png.partial").write_bytes(b"half")
    times = {p: p.stat().st_mtime_ns for p in Path("out").glob("0*.png")}
    capsys.readouterr()
    assert generate(run, "--n", "2", "--out", "out") == 0
    assert "3 of 6 pictures are there already" in (error := capsys.readouterr().err)
    assert "3 pictures in 1 step" in error and "(3 more were there)" in error
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert_same(contents("out"), contents("whole"))


@pytest.mark.parametrize("kept", [0, 40, 400, -1, None])
def test_a_damaged_picture_is_drawn_again(run: Path, kept: int | None) -> None:
    """Cut off at many lengths, or (None) whole with one bit flipped in the middle."""
    assert generate(run, "--n", "1", "--out", "out") == 0
    before = contents("out")
    path = Path("out/00001-00.png")
    data = bytearray(path.read_bytes())
    if kept is None:
        data[len(data) // 2] ^= 16
    path.write_bytes(data[:kept])
    assert generate(run, "--n", "1", "--out", "out") == 0
    assert_same(contents("out"), before)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seed", "1"), "made with seed 0, and now it is 1"),
        (("--num-inference-steps", "4"), "made with num_inference_steps 1, and now it is 4"),
        (("--guidance-scale", "2"), "made with guidance_scale None, and now it is 2.0"),
        (("--width", "48"), "made with width 32, and now it is 48"),
    ],
)
def test_other_settings_do_not_share_a_folder(
    run: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(run, "--n", "1", "--out", "out") == 0
    before = contents("out")
    assert generate(run, "--n", "1", "--out", "out", *more) == 2
    error = capsys.readouterr().err
    assert message in error and "or another folder with --out" in error
    assert contents("out") == before


def test_nor_do_other_weights_prompts_or_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(run, "--n", "1", "--out", "out") == 0
    assert generate(run / "checkpoint-2", "--n", "1", "--out", "out") == 2
    assert "made with weights" in capsys.readouterr().err
    Path("prompts.txt").write_text("something else\n")
    assert generate(run, "--n", "1", "--out", "out") == 2
    assert "made with prompt 'a red circle on white', and now it is 'something else'" in capsys.readouterr().err
    Path("mine").mkdir()
    as_picture(torch.zeros(3, 4, 4)).save("mine/00000-00.png")
    assert generate(run, "--n", "1", "--out", "mine") == 2
    assert "was not made by this command; name another folder" in capsys.readouterr().err


def test_every_weight_and_scale_counts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Merged LoRAs, whatever values they change, the alpha of one that is not merged, text encoders and VAE."""
    identity = module._identity
    network = load_tiny("sana", tmp_path_factory)
    before = identity(network)
    assert identity(network) == before

    def changes(tensor: Tensor) -> bool:
        with torch.no_grad():
            kept = tensor.clone()
            tensor.reshape(-1)[1024:] += 0.01
            changed = identity(network) != before
            tensor.copy_(kept)
        assert identity(network) == before
        return changed

    large = [p for p in network.transformer.parameters() if p.numel() > 2048]
    assert large and all(changes(parameter) for parameter in large[:3])
    for part in ("text_encoder", "vae"):
        assert changes(max(network.components[part].parameters(), key=torch.numel))
    own = {}
    for alpha in (1.0, 2.0):
        adapted = copy.deepcopy(network)
        add_lora(adapted, LoraSettings(rank=2, alpha=alpha), seed=0)
        own[alpha] = identity(adapted)
    assert len({before, *own.values()}) == 3


def test_two_merged_loras_do_not_share_a_folder(
    run: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_run(tmp_path_factory, "qwen_image", "lora", "--seed", "7")
    first, second = (export_run(model, merge=True) for model in (run, other))
    assert generate(first, "--n", "1", "--out", "out") == 0
    before = contents("out")
    assert generate(second, "--n", "1", "--out", "out") == 2
    assert "made with weights" in capsys.readouterr().err and contents("out") == before


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("qwen_image", "max_sequence_length", 20, "made with max_sequence_length 24, and now it is 20"),
        ("flux", "embedded_guidance", 2.0, "made with embedded_guidance 3.5, and now it is 2.0"),
    ],
)
def test_nor_do_other_settings_of_the_model(
    family: str,
    key: str,
    value: float,
    message: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = tiny_run(tmp_path_factory, family)
    model = shutil.copytree(original / "model", tmp_path / "changed")
    record = json.loads((model / "apex_fast.json").read_text())
    (model / "apex_fast.json").write_text(json.dumps({**record, key: value}))
    assert generate(original, "--n", "1", "--out", "out") == 0
    assert generate(model, "--n", "1", "--out", "out") == 2
    assert message in capsys.readouterr().err


def test_pictures_of_other_prompts_are_in_the_way(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list that became shorter, fewer pictures of each, and a list of pictures that are not there."""
    assert generate(run, "--n", "2", "--out", "out") == 0
    before = contents("out")
    Path("prompts.txt").write_text("\n".join(PROMPTS[:2]))
    assert generate(run, "--n", "2", "--out", "out") == 2
    assert "out/00002-00.png belongs to none of these 2 prompts with 2 pictures each" in capsys.readouterr().err
    Path("prompts.txt").write_text(PROMPTS[0])
    assert generate(run, "--n", "2", "--out", "one") == 0
    assert generate(run, "--n", "1", "--out", "one") == 2
    assert "one/00000-01.png belongs to none of these 1 prompt with 1 picture each" in capsys.readouterr().err
    assert contents("out") == before
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    Path("out/sub").mkdir()
    as_picture(torch.zeros(3, 4, 4)).save("out/sub/mine.jpg")
    assert generate(run, "--n", "2", "--out", "out") == 2
    assert "out/sub/mine.jpg belongs to none of these 3 prompts with 2 pictures each" in capsys.readouterr().err
    Path("out/sub/mine.jpg").unlink()
    Path("out/sub/notes.txt").write_text("no picture")
    assert generate(run, "--n", "2", "--out", "out") == 0
    Path("listed").mkdir()
    Path("listed/metadata.jsonl").write_text('{"file_name": "mine.png", "text": "mine"}\n')
    assert generate(run, "--n", "1", "--out", "listed") == 2
    assert "listed/metadata.jsonl belongs to none" in capsys.readouterr().err


# ---- the scorers' folders


def test_geneval(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read as GenEval's evaluate_images.py reads: folders of digits, metadata.jsonl as one JSON, samples by a pattern
    that is matched at the beginning of the name."""
    lines = [{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": p} for p in PROMPTS[:2]]
    Path("metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["generate", str(run), "--prompts", "metadata.jsonl", "--layout", "geneval", "--device", "cpu"]
    assert main([*words, "--out", "out"]) == 0

    def scored(folder: str) -> dict[str, list[str]]:
        found = {}
        for sub in sorted(p for p in Path(folder).iterdir() if p.is_dir() and p.name.isdigit()):
            prompt = json.loads((sub / "metadata.jsonl").read_text())["prompt"]
            found[prompt] = sorted(p.name for p in (sub / "samples").iterdir() if re.match(r"\d+\.png", p.name))
        return found

    four = [f"{number:05}.png" for number in range(4)]
    assert scored("out") == {prompt: four for prompt in PROMPTS[:2]}
    assert json.loads(Path("out/00001/metadata.jsonl").read_text()) == lines[1]
    whole = values("out/00001/grid.png")
    assert whole.shape == (64, 64, 3) and torch.equal(whole[:32, 32:], values("out/00001/samples/00001.png"))
    # what a kill may leave is no picture to the scorer, and is made good
    before = contents("out")
    Path("out/00001/samples/00003.png").unlink()
    Path("out/00001/samples/.00003.png.partial").write_bytes(b"half")
    assert scored("out") == {PROMPTS[0]: four, PROMPTS[1]: four[:3]}
    Path("out/00000/grid.png").unlink()
    Path("out/00000/metadata.jsonl").unlink()
    assert main([*words, "--out", "out"]) == 0
    assert_same(contents("out"), before)
    # a grid that is damaged, or of another number of pictures
    Path("out/00001/grid.png").write_bytes(before["00001/grid.png"][:200])
    assert main([*words, "--out", "out"]) == 0
    assert_same(contents("out"), before)
    Path("one.jsonl").write_text(json.dumps(lines[0]) + "\n")
    one = ["generate", str(run), "--prompts", "one.jsonl", "--layout", "geneval", "--device", "cpu", "--out", "grown"]
    for number, size in ((1, 32), (2, 64), (4, 64)):
        assert main([*one, "--n", str(number)]) == 0
        assert values("grown/00000/grid.png").shape[1] == size
    assert (values("grown/00000/grid.png") - values("out/00000/grid.png")).abs().max() <= 1
    # two damaged pictures: the grid waits for both
    for name in ("00000", "00003"):
        Path(f"out/00000/samples/{name}.png").write_bytes(b"half")
    Path("out/00000/grid.png").unlink()
    assert main([*words, "--out", "out"]) == 0
    assert_same(contents("out"), before)
    # a prompt that is not asked for any more, and a picture too many, would be scored
    capsys.readouterr()
    assert main([*one[:-1], "out"]) == 2
    assert "out/00001 belongs to none of these 1 prompt with 4 pictures each" in capsys.readouterr().err
    Path("out/00001/samples/00004.png").write_bytes(b"")
    assert main([*words, "--out", "out"]) == 2
    assert "out/00001/samples/00004.png belongs to none" in capsys.readouterr().err
    Path("out/00001/samples/00004.png").unlink()
    assert_same(contents("out"), before)
    # prompts without what it scores by
    capsys.readouterr()
    assert generate(run, "--layout", "geneval", "--out", "other") == 2
    assert "its scorer needs the tag" in capsys.readouterr().err and not Path("other").exists()


def test_dpg(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read as DPG-Bench's compute_dpg_bench.py reads: every file of the folder, its name up to the first dot, and
    squares of --resolution in two rows."""
    from PIL import Image

    folder = Path("prompts")
    folder.mkdir()
    for name, text in zip(("12", "COCOval2014000000000042", "partiprompts7"), PROMPTS, strict=True):
        (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    words = ["generate", str(run), "--prompts", "prompts", "--device", "cpu"]
    assert main([*words, "--layout", "dpg", "--out", "dpg"]) == 0
    assert main([*words, "--out", "plain"]) == 0
    assert {p.name.split(".")[0] for p in Path("dpg").iterdir()} == {p.stem for p in folder.iterdir()}
    edge = 32
    for index, path in enumerate(sorted(Path("dpg").iterdir())):
        with Image.open(path) as picture:
            assert picture.size == (2 * edge, 2 * edge)
            boxes = [(0, 0), (edge, 0), (0, edge), (edge, edge)]
            cut = [picture.crop((x, y, x + edge, y + edge)).tobytes() for x, y in boxes]
        for number, pixels in enumerate(cut):
            with Image.open(f"plain/{index:05}-{number:02}.png") as single:
                assert single.tobytes() == pixels
    before = contents("dpg")
    Path("dpg/12.png").unlink()
    capsys.readouterr()
    assert main([*words, "--layout", "dpg", "--out", "dpg"]) == 0
    assert "4 pictures in 1 step" in capsys.readouterr().err
    assert_same(contents("dpg"), before)
    Path("dpg/results.txt").write_text("0.8")
    assert main([*words, "--layout", "dpg", "--out", "dpg"]) == 2
    assert "dpg/results.txt belongs to none" in capsys.readouterr().err
    assert main([*words, "--layout", "dpg", "--n", "1", "--out", "one"]) == 0
    assert values("one/12.png").shape == (edge, edge, 3)
    for more, message in (
        (("--n", "3"), "a file holds 1 picture or 4, got 3"),
        (("--width", "48"), "its scorer cuts squares, and these pictures are 32 x 48 pixels"),
        (("--prompts", "prompts.txt"), "give --prompts the folder of prompts of DPG-Bench"),
    ):
        assert main([*words, "--layout", "dpg", "--out", "refused", *more]) == 2
        assert message in capsys.readouterr().err and not Path("refused").exists()


def test_a_grid_is_filled_row_by_row() -> None:
    pictures = [as_picture(torch.full((3, 2, 3), value)) for value in (-1.0, 0.0, 1.0)]
    whole = grid(pictures)
    assert whole.size == (6, 4) and [whole.getpixel(p)[0] for p in ((0, 0), (3, 1), (0, 2), (3, 2))] == [0, 128, 255, 0]
    assert grid(pictures[:1]).size == (3, 2)


# ---- a LoRA on a model


@pytest.mark.parametrize("family", ["qwen_image", "flux"])
def test_a_lora_on_its_base(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The folder of the run, of its model, of its export, and a renamed file of the export: the run's pictures."""
    run = tiny_run(tmp_path_factory, family)
    base, folder = run.parent / family, export_run(run)
    assert generate(run, "--n", "1", "--out", "run") == 0
    Path("renamed.safetensors").write_bytes((folder / "pytorch_lora_weights.safetensors").read_bytes())
    for number, lora in enumerate((run, run / "model", folder, "renamed.safetensors")):
        assert generate(base, "--lora", str(lora), "--n", "1", "--out", f"lora{number}") == 0
        assert contents(f"lora{number}") == contents("run")
    assert generate(base, "--n", "1", "--resolution", "32", "--out", "base") == 0
    assert values("base/00000-00.png").ne(values("run/00000-00.png")).any()
    # as one picture, too
    words = ["generate", str(base), "--prompt", PROMPTS[0], "--n", "1", "--device", "cpu", "--lora", str(folder)]
    assert main([*words, "--size", "32", "--out", "one.png"]) == 0
    assert (values("one.png") - values("run/00000-00.png")).abs().max() <= 1


def test_a_lora_that_belongs_on_another_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The header of an export names the LoRA that the run started from, and generate loads both."""
    first = tiny_run(tmp_path_factory, "sana")
    run = tiny_run(
        tmp_path_factory, "sana", "lora", "--start_lora", str(first / "model"), "--start_lora_mode", "frozen"
    )
    assert generate(run, "--n", "1", "--out", "run") == 0
    assert generate(run.parent / "sana", "--lora", str(export_run(run)), "--n", "1", "--out", "lora") == 0
    assert (values("run/00000-00.png") - values("lora/00000-00.png")).abs().max() <= 1


def test_precision_of_the_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = run.parent / "qwen_image"
    opened = module.open_generator(base, lora=run, weight_dtype="bf16")
    weights = dict(opened.network.transformer.named_parameters())
    assert {p.dtype for name, p in weights.items() if ".lora_" in name} == {torch.float32}
    assert {p.dtype for name, p in weights.items() if ".lora_" not in name} == {torch.bfloat16}
    assert opened.resolution == [32, 32]
    assert generate(base, "--lora", str(run), "--weight-dtype", "bf16", "--n", "1", "--out", "out") == 0
    assert generate(run, "--weight-dtype", "bf16", "--n", "1", "--out", "other") == 2
    assert "says itself how its weights are stored" in capsys.readouterr().err
    # a pipeline in a folder of its own, and what export merged, which knows its size too
    merged = export_run(run, merge=True)
    for model, resolution in ((base, None), (merged, [32, 32])):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), (None, torch.float32)):
            opened = module.open_generator(model, weight_dtype=name)
            assert {p.dtype for p in opened.network.transformer.parameters()} == {dtype}
            assert opened.resolution == resolution
    assert generate(merged, "--weight-dtype", "bf16", "--n", "1", "--out", "merged") == 0
    with pytest.raises(ValueError, match="is the base itself"):
        module.open_generator(base, base=str(base))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_an_export_is_a_model_too(
    mode: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """A transformer or a LoRA without its base: the header of the weights names it, unless it was moved."""
    run = tiny_run(tmp_path_factory, "qwen_image", mode)
    folder = export_run(run)
    assert generate(run, "--n", "1", "--out", "run") == 0
    assert generate(folder, "--n", "1", "--out", "export") == 0
    assert contents("export") == contents("run")
    assert module.exported_base(folder) == str(run.parent / "qwen_image")
    assert module.exported_base(run) is None and module.exported_base("no/such") is None
    moved = shutil.copytree(run.parent / "qwen_image", tmp_path / "moved")
    # Exported for a model that is gone since.
    gone = shutil.copytree(moved, tmp_path / "gone")
    other = export_run(run, base=str(gone), out="other")
    shutil.rmtree(gone)
    assert generate(other, "--n", "1", "--out", "x") == 1
    assert "that model is not there any more; say where it is with --base" in capsys.readouterr().err
    assert generate(other, "--base", str(moved), "--n", "1", "--out", "based") == 0
    assert contents("based") == contents("run")


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--prompts", "prompts.txt"], 2, "--prompts needs --out, the folder"),
        (["--prompts", "prompts.txt", "--out", "x", "--size", "9"], 2, "--size is for --prompt"),
        (["--prompt", "a cat", "--layout", "dpg"], 2, "--layout is for --prompts FILE"),
        (["--prompt", "a cat", "--batch-size", "2"], 2, "--batch-size is for --prompts FILE"),
        (["--prompts", "none.txt", "--out", "x"], 1, "prompts: none.txt is not there"),
        (["--prompts", "prompts.txt", "--out", "x", "--batch-size", "0"], 2, "batch_size must be at least 1, got 0"),
        (["--prompts", "prompts.txt", "--out", "x", "--lora", "none"], 1, "lora: none is no LoRA; expected a"),
        (["--prompts", "prompts.txt", "--out", "x", "--lora", "bad.safetensors"], 2, "cannot be read as safetensors"),
        (
            ["--prompts", "prompts.txt", "--out", "bad.safetensors"],
            2,
            "bad.safetensors is a file, and pictures of many",
        ),
        (["--prompts", "latin.txt", "--out", "x"], 2, "prompts: latin.txt is not UTF-8 (invalid"),
        (["--prompts", "latin", "--out", "x"], 2, "latin/1.txt is not UTF-8 (invalid"),
        (["--prompt", "a cat", "--out", "latin"], 2, "--out latin is a folder; for --prompt name the PNG"),
    ],
)
def test_mistakes(run: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.safetensors").write_bytes(b"no weights")
    Path("latin").mkdir()
    for name in ("latin.txt", "latin/1.txt"):
        Path(name).write_bytes("ein grünes Quadrat".encode("latin-1"))
    assert main(["generate", str(run.parent / "qwen_image"), "--device", "cpu", *words]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not Path("x").exists()


def test_a_name_that_is_neither_here_nor_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("404")

    monkeypatch.setattr(module, "load_pretrained", absent)
    assert generate("somebody/deme", "--n", "1", "--out", "x") == 1
    assert "somebody/deme: no such folder here, and as a hub id it cannot be loaded" in capsys.readouterr().err
    # No owner on the hub, but where runs are: nothing is asked.
    Path("mine/one").mkdir(parents=True)
    Path("mine/one/metrics.jsonl").write_text("")
    for name in ("runs/deme", "mine/deme"):
        assert generate(name, "--n", "1", "--out", "x") == 1
        assert f"{name}: no such folder; write the folder of a run" in capsys.readouterr().err
    assert not is_hub_id("runs/deme") and is_hub_id("somebody/deme")


def test_prompts_of_every_kind(tmp_path: Path) -> None:
    Path("a.jsonl").write_text('{"prompt": "one", "tag": "x"}\n\n{"text": "two"}\n')
    one, two = read_prompts("a.jsonl")
    assert (one.text, two.text) == ("one", "two") and one.line == '{"prompt": "one", "tag": "x"}'
    # Only a newline ends a line, and a byte order mark is none of the text.
    odd = "a\u2028b\x85c"
    Path("odd.jsonl").write_text(
        json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n" + '{"prompt": "x"}', "utf-8-sig"
    )
    assert [p.text for p in read_prompts("odd.jsonl")] == [odd, "x"]
    Path("mark.txt").write_text("one\ntwo\n", "utf-8-sig")
    assert [p.text for p in read_prompts("mark.txt")] == ["one", "two"]
    Path("marked").mkdir()
    Path("marked/a.txt").write_text("one", "utf-8-sig")
    assert read_prompts("marked")[0].text == "one"
    Path("folder").mkdir()
    Path("folder/b.txt").write_text("three\nand four\n")
    Path("folder/a.txt").write_text("five")
    assert [(p.name, p.text) for p in read_prompts("folder")] == [("a", "five"), ("b", "three and four")]
    Path("folder/c.txt").write_text(" \n")
    for name, text, message in (
        ("bad.jsonl", "{", r"bad.jsonl:1 is no JSON"),
        ("bad.jsonl", '\n{"prompts": "x"}', r'bad.jsonl:2 has no "prompt"'),
        ("bad.txt", "\n \n", "nothing in bad.txt"),
    ):
        Path(name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(name)
    with pytest.raises(ValueError, match=r"c.txt is empty"):
        read_prompts("folder")


def test_the_python_call(run: Path) -> None:
    drawn = generate_files(run, read_prompts("prompts.txt"), "out", images_per_prompt=1, device="cpu")
    assert (drawn.new, drawn.kept) == (3, 0)
    assert generate_files(run, read_prompts("prompts.txt"), "out", images_per_prompt=1, device="cpu").kept == 3
    with pytest.raises(ValueError, match="layout must be one of plain, geneval, dpg, got 'coco'"):
        generate_files(run, read_prompts("prompts.txt"), "out", layout="coco", device="cpu")


def test_a_text_with_other_ends_of_lines(run: Path) -> None:
    """metadata.jsonl has a line a picture for every reader, whatever it takes for the end of one."""
    Path("odd.jsonl").write_text(json.dumps({"prompt": "red\u2028blue\x85green"}) + "\n")
    assert main(["generate", str(run), "--prompts", "odd.jsonl", "--n", "1", "--device", "cpu", "--out", "odd"]) == 0
    (line,) = Path("odd/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["text"] == "red\u2028blue\x85green"


def test_as_a_module() -> None:
    found = subprocess.run([sys.executable, "-m", "apex_fast", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("apex_fast ")
