"""Folders of pictures: captions from either source, pictures as they are meant to be seen, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apex_fast.data.folder import BrokenPictureError, PictureFolder, read_picture
from apex_fast.data.source import BROKEN, Source, TooManyBadError, open_source

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


# ---- what the run does with broken ones


def folder_of(folder: Path, count: int, empty: int = 0) -> Path:
    """A folder of ``count`` good pairs and ``empty`` with an empty caption."""
    for number in range(count + empty):
        picture(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"caption {number}" if number < count else " ")
    return folder


def test_indices_stay_when_a_picture_turns_out_to_be_broken(tmp_path: Path) -> None:
    found = PictureFolder.open(folder_of(tmp_path, 4))
    (tmp_path / "001.png").write_bytes(b"")
    good = []
    for sample in found.samples():
        try:
            sample.open()
            good.append((sample.index, sample.name, sample.caption))
        except BrokenPictureError:
            found.leave_out(BROKEN, sample.name)
    assert good == [(i, f"00{i}.png", f"caption {i}") for i in (0, 2, 3)]
    assert len(found) == 4 and found.warnings() == ["1 left out, not a picture that can be read: 001.png"]
    assert [sample.index for sample in found.samples(2)] == [2, 3]
    found.check_left(3)
    with pytest.raises(ValueError, match="nothing in .* can be used: 1 left out, not a picture that can be read"):
        found.check_left(0)


@pytest.mark.parametrize(
    ("good", "empty", "share", "allowed"),
    [
        (9, 1, 0.05, True),  # a single one never stops a run
        (8, 2, 0.05, False),
        (8, 2, 0.2, True),
        (9, 1, 0.0, False),  # unless none is allowed
        (38, 2, 0.05, True),
        (37, 3, 0.05, False),
        (1, 9, 1.0, True),
    ],
)
def test_more_than_a_share_of_bad_pairs_stops_the_run(
    tmp_path: Path, good: int, empty: int, share: float, allowed: bool
) -> None:
    folder = folder_of(tmp_path / "data", good, empty)
    if allowed:
        assert len(PictureFolder.open(folder, max_bad_share=share)) == good
        return
    with pytest.raises(
        TooManyBadError,
        match=rf"dataset_name: {empty} of {good + empty} in {folder} cannot be used, and max_bad_share \({share:g}\) "
        rf"allows {int(share * (good + empty)) or int(share > 0)}: {empty} left out, empty caption: .*Mend or remove",
    ):
        PictureFolder.open(folder, max_bad_share=share)


def test_pictures_that_break_later_count_with_the_listing(tmp_path: Path) -> None:
    found = PictureFolder.open(folder_of(tmp_path, 36, 4), max_bad_share=0.125)
    found.leave_out(BROKEN, "000.png")
    with pytest.raises(TooManyBadError, match=r"6 of 40 .* allows 5: 4 left out, empty caption: .*; 2 left out, not a"):
        found.leave_out(BROKEN, "001.png")


def test_a_choice_of_pictures_is_not_damage(tmp_path: Path) -> None:
    folder_of(tmp_path, 20)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "the one"}')
    found = PictureFolder.open(tmp_path, max_bad_share=0.05)
    assert found.bad == 0 and "19 left out, not named in metadata.jsonl" in found.warnings()[0]


def test_the_key_of_the_captions_can_be_named(tmp_path: Path) -> None:
    folder_of(tmp_path, 1)
    with pytest.raises(ValueError, match="caption_column: title is a key of metadata.jsonl, and .* has none; leave it"):
        PictureFolder.open(tmp_path, caption_column="title")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "a", "title": "b"}')
    assert PictureFolder.open(tmp_path, caption_column="title").captions == ["b"]
    with pytest.raises(
        ValueError, match="expected the keys file_name and name, got .*; write caption_column if another"
    ):
        PictureFolder.open(tmp_path, caption_column="name")


# ---- which source a name means


def opened(name: object, **more: object) -> Source:
    keys = {"image_column": None, "caption_column": None, "dataset_split": None, "max_bad_share": 0.05}
    return open_source(SimpleNamespace(dataset_name=str(name), **{**keys, **more}))


def test_the_name_of_the_data_set_tells_its_kind(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    from data_cases import pairs, write_tar

    folder = folder_of(tmp_path / "folder", 1)
    shard = write_tar(tmp_path / "shards" / "a.tar", pairs(2))
    assert [type(opened(name)).__name__ for name in (folder, shard)] == ["PictureFolder", "TarShards"]
    for name, more, message in (
        (tmp_path / "gone", {}, "is no folder; write the folder of your pictures, or digits .*hub:OWNER/NAME"),
        (shard.parent, {}, "has no pictures, but .tar files; WebDataset shards are .*/[*].tar"),
        (folder, {"image_column": "x"}, "image_column: .* is a folder of pictures, which has no columns"),
        (folder, {"dataset_split": "train"}, "dataset_split: .* has no splits"),
        (shard, {"dataset_split": "train"}, "dataset_split: .* has no splits"),
        ("pipe:cat x", {}, "pipe: sources are refused"),
        ("hf://datasets/owner/name", {}, "hf: sources are not read; .*hub:OWNER/NAME"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            opened(name, **more)


def test_lines_of_json_end_at_newlines_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    captions = ["one\u2028line", "another\x85one", "plain"]
    lines = []
    for number, caption in enumerate(captions):
        Image.new("RGB", (4, 4)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    found = PictureFolder.open(folder)
    assert found.captions == ["one line", "another one", "plain"] and not found.left_out


def test_a_picture_outside_of_the_folder_is_left_out_and_a_link_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in ("a.png", "../secret.png")]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = PictureFolder.open(folder)
    assert found.names == ["a.png"]
    assert any("outside of the folder" in line and "../secret.png" in line for line in found.warnings())
