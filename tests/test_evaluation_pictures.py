"""Scores of pictures by local networks: tiny CLIP and DINOv2 models, a TorchScript file in place of Inception, folders
of every layout, and a tiny pipeline that draws."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")

from PIL import Image
from tiny_runs import make_pipeline

from apex_fast.cli import main
from apex_fast.evaluation.layouts import FACTS, Prompt, grid
from apex_fast.evaluation.metrics import frechet_distance, precision_recall
from apex_fast.evaluation.pictures import (
    ClipScore,
    Picture,
    clip_score,
    features_of,
    inception_features,
    read_folder,
    vision_features,
)

TEXTS = ["a red square", "a green square", "a blue square", "a grey square", "a yellow square", "a white square"]
COLOURS = [(220, 30, 30), (30, 180, 40), (30, 40, 220), (128, 128, 128), (230, 220, 30), (250, 250, 250)]


def picture(index: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    image = Image.new("RGB", size, COLOURS[index])
    image.paste((0, 0, 0), (2 + index, 3, 12 + index, 14))
    return image


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIPModel with random weights, its tokenizer and its image processor."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<start>", "<end>"]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<start>", eos_token="<end>", pad_token="<end>"
    )
    fast.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**shape, "vocab_size": 120, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        transformers.CLIPModel(config).save_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder


class _Network(nn.Module):
    """What is asked of the FID network: uint8 pictures of any size to features, on demand without its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(48, 7)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.dtype == torch.uint8
        small = nn.functional.adaptive_avg_pool2d(images.float() / 128 - 1, [4, 4]).flatten(1)
        return small if return_features else self.layers(small)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "network.pt"
    torch.jit.script(_Network()).save(str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures with their texts, as generate writes the layout plain."""
    place = tmp_path / "pictures"
    place.mkdir()
    lines = []
    for index, text in enumerate(TEXTS):
        picture(index).save(place / f"{index:05}-00.png")
        lines.append({"file_name": f"{index:05}-00.png", "text": text, "seed": index})
    (place / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


# ---- networks


def test_the_clip_score_is_the_cosine(clip: Path) -> None:
    import transformers

    score = ClipScore(clip)
    found = score([picture(i) for i in range(6)], TEXTS)
    model = transformers.CLIPModel.from_pretrained(clip)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(clip)
    expected = []
    with torch.no_grad():
        for index, text in enumerate(TEXTS):
            own = model.visual_projection(
                model.vision_model(**processor(images=picture(index), return_tensors="pt")).pooler_output
            )
            words = model.text_projection(model.text_model(**tokenizer(text, return_tensors="pt")).pooler_output)
            expected.append(100 * nn.functional.cosine_similarity(own, words).item())
    assert found.tolist() == pytest.approx([max(value, 0) for value in expected], abs=1e-3)
    assert found.std() > 0.01 and found.max() > 0 and score.cut == 0
    assert score([picture(0)], ["a red " * 20]).shape == (1,) and score.cut == 1


def test_the_score_of_another_text_is_another(clip: Path) -> None:
    score = ClipScore(clip)
    assert abs(score([picture(0)], [TEXTS[0]]) - score([picture(0)], [TEXTS[4]])).item() > 1e-3


def test_features_of_a_clip_model_are_its_embeddings(clip: Path) -> None:
    import transformers

    found = vision_features(clip)([picture(0), picture(1)])
    model = transformers.CLIPModel.from_pretrained(clip)
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(clip)(
        images=[picture(0), picture(1)], return_tensors="pt"
    )
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(**pixels).pooler_output)
    torch.testing.assert_close(found, expected)


def test_features_of_other_vision_models(tmp_path: Path) -> None:
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8, mlp_ratio=2
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    found = vision_features(tmp_path)([picture(0), picture(1), picture(2)])
    assert found.shape == (3, 16) and (found[0] - found[1]).abs().max() > 1e-3


def test_a_model_with_weights_missing_is_refused(clip: Path, tmp_path: Path) -> None:
    """transformers would give them random values."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(clip, tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "visual_projection.weight"}, file, metadata={"format": "pt"})
    for load in (ClipScore, vision_features):
        with pytest.raises(ValueError, match="lacks weights that CLIPModel has.*visual_projection.weight"):
            load(tmp_path / "clip")


def test_features_of_the_torchscript_file(inception: Path) -> None:
    pictures = [picture(0), picture(1, (64, 64))]
    found = inception_features(inception)(pictures)
    assert found.shape == (2, 48)
    import numpy as np

    pixels = torch.from_numpy(np.array(pictures[1])).permute(2, 0, 1)[None]
    torch.testing.assert_close(found[1:], _Network()(pixels, return_features=True))


def test_files_that_are_no_such_network(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--fid-weights: .*none.pt is not there; expected inception-2015"):
        inception_features(tmp_path / "none.pt")
    (tmp_path / "weights.pt").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="cannot be read as TorchScript; expected inception-2015-12-05.pt"):
        inception_features(tmp_path / "weights.pt")
    torch.jit.script(nn.Linear(3, 4)).save(str(tmp_path / "linear.pt"))
    with pytest.raises(ValueError, match="cannot be called with uint8 pictures"):
        inception_features(tmp_path / "linear.pt")([picture(0)])
    with pytest.raises(FileNotFoundError, match="--clip-model: .*nowhere holds no config.json"):
        ClipScore(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ValueError, match="a model of the type 'dinov2', expected 'clip'"):
        ClipScore(tmp_path)


# ---- folders


def test_a_plain_folder(folder: Path) -> None:
    found = read_folder(folder)
    assert [p.prompt for p in found] == TEXTS and found[3].read().getpixel((0, 0)) == COLOURS[3]
    (folder / "00002-00.png").unlink()
    with pytest.raises(FileNotFoundError, match="lists 00002-00.png, and it is not there"):
        read_folder(folder)


def test_a_geneval_folder(tmp_path: Path) -> None:
    for index in range(2):
        own = tmp_path / f"{index:05}"
        (own / "samples").mkdir(parents=True)
        (own / "metadata.jsonl").write_text(json.dumps({"tag": "colors", "prompt": TEXTS[index]}) + "\n")
        for number in range(2):
            picture(index).save(own / "samples" / f"{number:05}.png")
        grid([picture(index)] * 4).save(own / "grid.png")
    found = read_folder(tmp_path)
    assert [p.prompt for p in found] == [TEXTS[0]] * 2 + [TEXTS[1]] * 2, "the grids are no samples"


def test_a_dpg_folder_is_cut(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(FACTS, json.dumps({"prompt": TEXTS[1], "pictures": 4}))
    tiles = [picture(i) for i in range(4)]
    grid(tiles).save(tmp_path / "own.png", pnginfo=info)
    grid(tiles).save(tmp_path / "zzz.png")
    found = read_folder(tmp_path, [Prompt("another", name="zzz")])
    assert [p.prompt for p in found] == [TEXTS[1]] * 4 + ["another"]
    for index in range(4):
        assert found[index].read().tobytes() == tiles[index].tobytes()
    found = read_folder(tmp_path, [Prompt("another", name="zzz")], images_per_file=4)
    assert len(found) == 8 and found[7].read().tobytes() == tiles[3].tobytes()
    uneven = Picture(tmp_path / "odd.png", None, (0, 4))
    Image.new("RGB", (31, 32)).save(uneven.path)
    with pytest.raises(ValueError, match="31 x 32 pixels is no grid of 4 equal pictures"):
        uneven.read()


def test_folders_that_cannot_be_read(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder of pictures"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no pictures in"):
        read_folder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png is no picture, or was cut off"):
        read_folder(tmp_path)[0].read()
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="needs the prompt of every picture, and nothing says that of .*a.png"):
        clip_score(ClipScore(clip), read_folder(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(ValueError, match='line 1: expected "file_name" and "text"'):
        read_folder(tmp_path)


# ---- the command


def test_a_folder_is_scored(
    folder: Path, clip: Path, inception: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    for index in range(6):
        picture(5 - index, (32, 48)).save(real / f"{index}.jpg")
    words = ["--clip-model", str(clip), "--fid-real", str(real), "--out", str(tmp_path / "eval.json")]
    assert main(["eval", "--pictures", str(folder), *words, "--fid-weights", str(inception)]) == 0
    text = capsys.readouterr().out
    assert "6 pictures in" in text and "CLIP score" in text and "FID" in text
    result = json.loads((tmp_path / "eval.json").read_text())
    scores = result["rows"][0]["by_seed"][0]
    network = inception_features(inception)
    features = [features_of(network, read_folder(place)) for place in (folder, real)]
    assert scores["fid"] == pytest.approx(frechet_distance(*features)) and scores["fid"] > 0
    assert [scores["precision"], scores["recall"]] == list(precision_recall(features[1], features[0]))
    assert scores["clip_score"] == pytest.approx(clip_score(ClipScore(clip), read_folder(folder), batch_size=4))
    assert result["scores"] == {} and result["real_pictures"] == 6
    assert "by" in (tmp_path / "eval.md").read_text() and not (tmp_path / "eval.png").exists()

    assert main(["eval", "--pictures", str(folder), *words, "--fid-model", str(clip)]) == 0
    text = capsys.readouterr().out
    assert "Frechet distance" in text and "FID" not in text
    assert "not of Inception, so no FID" in (tmp_path / "eval.md").read_text()


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipelines"), "sana")


def test_a_pipeline_draws_and_is_scored(
    sana: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from apex_fast import generate

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS[:4]) + "\n")
    out = tmp_path / "eval.json"
    words = ["--prompts", str(prompts), "--clip-model", str(clip), "--resolution", "32", "--out", str(out)]
    real = ["--fid-real", str(sana.parent / "pictures"), "--fid-model", str(clip)]
    opened = []
    true = generate.open_generator
    monkeypatch.setattr(
        "apex_fast.evaluation.command.open_generator", lambda *a, **o: opened.append(a) or true(*a, **o)
    )
    assert main(["eval", str(sana), *words, *real, "--nfe", "1,2", "--seeds", "2"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"run, 2 steps +\d+\.\d+ ±\d", text), text
    result = json.loads(out.read_text())
    assert len(opened) == 1, "the model is loaded once"
    for row in result["rows"]:
        assert len({scores["clip_score"] for scores in row["by_seed"]}) == 2, "each seed draws pictures of its own"
        assert row["cost"]["seconds_per_picture"] > 0 and row["cost"]["peak_bytes"] > 0
    folders = sorted(path.name for path in (tmp_path / "eval_pictures").iterdir())
    assert folders[0] == "run-1-steps-guidance-1-seed-0" and len(folders) == 4
    again = read_folder(tmp_path / "eval_pictures" / folders[0])
    expected = clip_score(ClipScore(clip), again)
    assert result["rows"][0]["by_seed"][0]["clip_score"] == pytest.approx(expected)
    assert out.with_suffix(".png").is_file()

    # What was drawn is not drawn again, and its time is not that of drawing.
    assert main(["eval", str(sana), *words, *real, "--nfe", "1,2", "--seeds", "2"]) == 0
    later = json.loads(out.read_text())
    assert later["rows"][0]["by_seed"] == result["rows"][0]["by_seed"] and later["rows"][0]["cost"] == {}


def test_texts_that_are_too_long_or_not_there(folder: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"file_name": f"{i:05}-00.png", "text": "a red " * (20 if i < 2 else 1)} for i in range(6)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["eval", "--pictures", str(folder), "--clip-model", str(clip), "--out", str(folder / "eval.json")]
    assert main(words) == 0
    assert "careful: 2 of 6 texts are longer than the CLIP model reads" in capsys.readouterr().err
    (folder / "metadata.jsonl").unlink()
    assert main(words) == 2
    assert "a CLIP score needs the prompt of every picture" in capsys.readouterr().err
