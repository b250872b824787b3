"""Folders of pictures: captions from either source, pictures as they are meant to be seen, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from apex_fast.data.folder import BrokenPictureError, PictureFolder, read_picture

Image = pytest.importorskip("PIL.Image")


def picture(path: Path, color: object = (255, 0, 0), size: tuple[int, int] = (20, 10), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def test_captions_from_text_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "sub/c.webp"):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"  a picture\n of {name} \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no picture")
    found = PictureFolder.open(tmp_path)
    assert [p.name for p in found.files] == ["a.jpg", "b.png", "c.webp"]
    assert found.captions == ["a picture of a.jpg", "a picture of b.png", "a picture of sub/c.webp"]
    assert not found.warnings()


def test_captions_from_metadata_win_over_text_files(tmp_path: Path) -> None:
    lines = [{"file_name": "sub/b.png", "text": "ein Bär", "other": 1}, {"file_name": "a.png", "text": "a cat"}]
    for line in lines:
        picture(tmp_path / line["file_name"])
    (tmp_path / "a.txt").write_text("not this one")
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + text + "\n\n", encoding="utf-8")
    found = PictureFolder.open(tmp_path)
    assert dict(zip((p.name for p in found.files), found.captions, strict=True)) == {
        "a.png": "a cat",
        "b.png": "ein Bär",
    }


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path) -> None:
    for name in ("good.png", "empty.png", "none.png", "extra.png"):
        picture(tmp_path / name)
    lines = [
        '{"file_name": "good.png", "text": "good"}',
        '{"file_name": "empty.png", "text": "  "}',
        '{"file_name": "none.png", "text": null}',
        '{"file_name": "gone.png", "text": "gone"}',
        "{not json",
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = PictureFolder.open(tmp_path)
    assert found.captions == ["good"]
    warnings = "\n".join(found.warnings())
    assert "2 left out, empty caption: empty.png, none.png" in warnings
    assert "1 left out, named in metadata.jsonl and not there: gone.png" in warnings
    assert "1 left out, not named in metadata.jsonl: extra.png" in warnings
    assert "1 left out, no JSON with a file_name in metadata.jsonl: line 5" in warnings


def test_many_names_are_cut_and_the_count_is_not(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / f"{number}.png")
    (tmp_path / "5.txt").write_text("the one with a caption")
    assert PictureFolder.open(tmp_path).warnings() == [
        "5 left out, no .txt caption beside it: 0.png, 1.png, 2.png, ..."
    ]


def test_a_caption_that_is_not_utf_8_is_left_out_and_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a bear", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("ein Bär".encode("latin-1"))
    found = PictureFolder.open(tmp_path)
    assert found.captions == ["a bear"]
    assert found.warnings() == ["1 left out, the .txt caption beside it is not UTF-8: b.png"]
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "b.png", "text": "ein Bär"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"dataset_name: .*metadata.jsonl is not UTF-8 .*; save it as UTF-8"):
        PictureFolder.open(tmp_path)


def test_two_captions_for_one_picture_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "sub" / "a.png")
    lines = [{"file_name": "sub/a.png", "text": "one"}, {"file_name": "./sub/a.png", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="metadata.jsonl has two lines for sub/a.png, in lines 1 and 2"):
        PictureFolder.open(tmp_path)


def test_without_captions_both_ways_to_write_them_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"expected pictures with a .txt caption .*, or metadata.jsonl with a line"):
        PictureFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (None, FileNotFoundError, "is no folder; write the folder of your pictures, or digits"),
        ({}, FileNotFoundError, "has no pictures"),
        ({"a.png": None}, ValueError, "nothing in .* can be used: 1 left out, no .txt caption beside it: a.png"),
        ({"a.png": None, "a.txt": " "}, ValueError, "nothing in .* can be used: 1 left out, empty caption"),
        ({"a.png": None, "metadata.jsonl": ""}, ValueError, "not named in metadata.jsonl: a.png"),
        (
            {"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "caption": "x"}'},
            ValueError,
            "has no captions: expected the keys file_name and text, got caption, file_name",
        ),
    ],
)
def test_nothing_to_use_is_an_error(tmp_path: Path, files: dict | None, error: type, message: str) -> None:
    folder = tmp_path / "data"
    for name, text in (files or {}).items():
        folder.mkdir(exist_ok=True)
        picture(folder / name) if text is None else (folder / name).write_text(text)
    if files == {}:
        folder.mkdir()
    with pytest.raises(error, match=message):
        PictureFolder.open(folder)


# ---- pictures


def test_a_picture_is_cropped_at_its_centre_and_scaled(tmp_path: Path) -> None:
    """Left third red, middle blue, right green: a square of it is the middle."""
    values = np.zeros((30, 90, 3), dtype=np.uint8)
    values[:, :30, 0] = values[:, 30:60, 2] = values[:, 60:, 1] = 255
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = read_picture(tmp_path / "a.png", 16, 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    middle = pixels[:, 2:-2, 2:-2]
    torch.testing.assert_close(
        middle, torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand_as(middle), rtol=0, atol=0.01
    )
    wide = read_picture(tmp_path / "a.png", 10, 30)
    assert wide.shape == (3, 10, 30)
    assert wide[0, 5, 2] > 0.99 and wide[1, 5, -3] > 0.99


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    values = np.zeros((20, 40, 3), dtype=np.uint8)
    values[:, :20] = 255
    image = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    pixels = read_picture(tmp_path / "a.png", 40, 20)
    assert (pixels[:, :15] > 0.9).all() and (pixels[:, 25:] < -0.9).all()


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (1.0, 1.0, 1.0)),
        ("RGBA", (255, 0, 0, 255), (1.0, -1.0, -1.0)),
        ("LA", (0, 0), (1.0, 1.0, 1.0)),
        ("L", 0, (-1.0, -1.0, -1.0)),
        ("1", 1, (1.0, 1.0, 1.0)),
        ("P", 0, (-1.0, -1.0, -1.0)),
        ("I;16", 65535, (1.0, 1.0, 1.0)),
        ("I;16", 128 * 256, (128 / 127.5 - 1,) * 3),
        ("CMYK", (0, 0, 0, 0), (1.0, 1.0, 1.0)),
    ],
)
def test_every_mode_becomes_rgb_on_white(
    tmp_path: Path, mode: str, color: object, expected: tuple[float, float, float]
) -> None:
    suffix = ".tif" if mode == "CMYK" else ".png"
    pixels = read_picture(picture(tmp_path / f"a{suffix}", color, (8, 8), mode), 8, 8)
    torch.testing.assert_close(pixels[:, 4, 4], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("harm", ["cut", "text", "empty"])
def test_a_broken_picture_is_named(tmp_path: Path, harm: str) -> None:
    path = picture(tmp_path / "a.png", size=(200, 200))
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes({"cut": path.read_bytes()[:5000], "text": b"hello", "empty": b""}[harm])
    with pytest.raises(BrokenPictureError, match=r"a\.png"):
        read_picture(path, 8, 8)


def test_dropping_keeps_pairs_together_and_ends_with_an_error(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")
    found = PictureFolder.open(tmp_path)
    found.drop([1], "broken")
    assert [p.stem for p in found.files] == ["0", "2"] and found.captions == ["caption 0", "caption 2"]
    assert found.warnings() == ["1 left out, broken: 1.png"] and len(found) == 2
    with pytest.raises(ValueError, match="nothing in .* can be used: 3 left out, broken"):
        found.drop([0, 1], "broken")
