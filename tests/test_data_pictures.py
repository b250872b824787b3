"""Pictures from bytes, and the buckets that they are brought to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_cases import Image, encoded

from apex_fast.data.pictures import Buckets, open_picture, picture_tensor
from apex_fast.data.source import BrokenPictureError
from apex_fast.training.buckets import buckets_for
from apex_fast.training.settings import SettingsError


def test_bytes_and_files_give_the_same_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees anticlockwise
    data = encoded((10, 200, 30), (40, 20), "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(data)
    one, other = open_picture(data), open_picture(tmp_path / "a.jpg")
    assert one.size == other.size == (20, 40) and one.mode == "RGB" and one.tobytes() == other.tobytes()


def test_transparency_is_on_white() -> None:
    assert open_picture(encoded((255, 0, 0, 0), mode="RGBA")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("data", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", encoded()[:30]])
def test_what_is_no_picture_is_named_and_starts_no_program(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(BrokenPictureError, match="^shard: 7: "):
        open_picture(data, "shard: 7")


# ---- buckets


@pytest.mark.parametrize(
    ("resolution", "step", "ratio"),
    [((1024, 1024), 64, 2.0), ((512, 512), 32, 3.0), ((832, 1216), 64, 2.0), ((64, 64), 16, 2.0), ((32, 32), 8, 4.0)],
)
def test_buckets_are_sizes_that_the_model_takes(resolution: tuple[int, int], step: int, ratio: float) -> None:
    buckets = Buckets(resolution, step, ratio)
    area = resolution[0] * resolution[1]
    assert resolution in buckets.sizes and len(set(buckets.sizes)) == len(buckets.sizes) > 2
    for height, width in buckets.sizes:
        assert height % step == width % step == 0
        assert height * width <= area and max(height, width) <= ratio * min(height, width)
        assert (width, height) in buckets.sizes
        larger = {(height + step, width), (height, width + step)}
        assert not larger & set(buckets.sizes)
        assert all(h * w > area or max(h, w) > ratio * min(h, w) for h, w in larger), "no pixels are wasted"


def test_a_picture_goes_to_the_nearest_ratio() -> None:
    buckets = Buckets((1024, 1024), 64, 2.0)
    assert buckets.of(500, 500) == (1024, 1024)
    assert buckets.of(1920, 1080) == (768, 1344)
    assert buckets.of(1080, 1920) == (1344, 768)
    assert buckets.of(9000, 100) == (704, 1408), "wider than any bucket: the widest, cropped"
    for width, height in ((3, 2), (4, 3), (10, 9), (1, 2)):
        one, other = buckets.of(width, height), buckets.of(height, width)
        assert one == other[::-1], "upright and lying pictures are treated alike"


def test_a_picture_covers_its_bucket_and_is_cropped_at_its_centre() -> None:
    picture = Image.new("RGB", (300, 100), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 50, 100))
    picture.paste((255, 0, 0), (250, 0, 300, 100))
    buckets = Buckets((64, 64), 16, 2.0)
    height, width = buckets.of(*picture.size)
    assert (height, width) == (48, 80)
    pixels = picture_tensor(picture, height, width)
    assert pixels.shape == (3, 48, 80)
    blue = torch.tensor([-1.0, -1.0, 1.0])[:, None, None]
    assert (pixels[:, :, 2:-2] - blue).abs().max() < 0.05, "the red ends are cut off"


def test_one_size_is_one_bucket() -> None:
    assert Buckets.single(32, 48).sizes == ((32, 48),) and Buckets.single(32, 48).of(9, 1000) == (32, 48)
    assert Buckets((64, 64), 16, 1.0).sizes == ((64, 64),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((100, 64), 16), "resolution 100 x 64 must be a multiple of the buckets' step .16 pixels."),
        (((64, 64), 0), "must be a multiple"),
        (((64, 64), 16, 0.5), "max_aspect_ratio must be at least 1, got 0.5"),
    ],
)
def test_wrong_buckets_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buckets(*arguments)


def test_the_keys_of_a_run() -> None:
    def config(**more: object) -> SimpleNamespace:
        return SimpleNamespace(**{"aspect_buckets": True, "aspect_bucket_step": None, "max_aspect_ratio": 2.0, **more})

    assert buckets_for(config(aspect_buckets=False), (32, 48), 16) == Buckets.single(32, 48)
    assert buckets_for(config(), (1024, 1024), 16).step == 64
    assert buckets_for(config(), (1328, 1328), 16).step == 16, "1328 is 83 times 16"
    assert buckets_for(config(), (32, 32), 16).step == 16
    assert buckets_for(config(aspect_bucket_step=128), (1024, 1024), 16).step == 128
    with pytest.raises(SettingsError, match="aspect_bucket_step: 24 is no multiple of this model's 16 pixels"):
        buckets_for(config(aspect_bucket_step=24), (96, 96), 16)
    with pytest.raises(SettingsError, match="resolution 80 x 80 must be a multiple of the buckets' step .64 pixels"):
        buckets_for(config(aspect_bucket_step=64), (80, 80), 16)
