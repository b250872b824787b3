"""Pictures as they are meant to be seen, as tensors, and the sizes they are brought to."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from apex_fast.data.source import BrokenPictureError
from apex_fast.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Ends of the names of picture files."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Pillow's formats that are read. No others: some of its readers start a program (Ghostscript, for EPS)."""


def open_picture(file: Path | bytes, name: str | None = None) -> Image:
    """The picture of a path or of a file's bytes: turned as its EXIF data says, in RGB, transparency on white.

    name: what errors call it; None is the path.

    Raises:
        BrokenPictureError: it cannot be read.
    """
    pil, operations = require("PIL.Image", extra="train"), require("PIL.ImageOps", extra="train")
    try:
        with pil.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as opened:
            return _as_rgb(operations.exif_transpose(opened), pil)
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise BrokenPictureError(f"{name or file}: {error}") from error


def picture_tensor(picture: Image, height: int, width: int) -> Tensor:
    """An RGB picture as ``[3, height, width]`` fp32 in [-1, 1]: resized to cover the size and cropped at the centre."""
    pil, operations = require("PIL.Image", extra="train"), require("PIL.ImageOps", extra="train")
    picture = operations.fit(picture, (width, height), pil.Resampling.LANCZOS)
    # A copy: the picture's own memory is read-only.
    values = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return values.permute(2, 0, 1).float().div(127.5).sub(1.0)


def read_picture(file: Path, height: int, width: int) -> Tensor:
    """:func:`open_picture` and :func:`picture_tensor` in one. BrokenPictureError if the file cannot be read."""
    return picture_tensor(open_picture(file), height, width)


def _as_rgb(picture: Any, pil: Any) -> Any:
    if picture.mode.startswith("I;16"):
        # convert() would clip 16 bits to 8 instead of scaling them.
        values = np.asarray(picture).astype(np.uint16) >> 8
        return pil.fromarray(values.astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = pil.new("RGBA", picture.size, (255, 255, 255, 255))
        return pil.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures are brought to: about as many pixels as ``resolution``, in several aspect ratios.

    Each size has edges that are multiples of ``step``, at most as many pixels as ``resolution``, and a ratio of the
    longer edge to the shorter of at most ``max_ratio``; every one is there upright and lying, and none fits into
    another. With ``max_ratio`` 1 and a square resolution there is one size: no buckets.

    Attributes:
        resolution: (height, width) in pixels; one of the sizes itself.
        step: what edges are multiples of; the network's own multiple, or a multiple of that.
        sizes: (height, width) of every bucket, from the tallest to the widest.
    """

    resolution: tuple[int, int]
    step: int
    max_ratio: float = 2.0
    sizes: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def single(height: int, width: int) -> Buckets:
        """One size for all pictures."""
        return Buckets((height, width), 1, 1.0, ((height, width),))

    def __post_init__(self) -> None:
        if self.sizes:
            return
        height, width = self.resolution
        if self.step < 1 or height % self.step or width % self.step or min(height, width) < 1:
            raise ValueError(
                f"aspect_buckets: resolution {height} x {width} must be a multiple of the buckets' step ({self.step} "
                "pixels)"
            )
        if not self.max_ratio >= 1:
            raise ValueError(f"max_aspect_ratio must be at least 1, got {self.max_ratio}")
        found = (
            {(height, width), (width, height)} if max(height, width) <= self.max_ratio * min(height, width) else set()
        )
        for edge in range(self.step, int(math.sqrt(height * width * self.max_ratio)) + 1, self.step):
            other = height * width // edge // self.step * self.step
            if other and max(edge, other) <= self.max_ratio * min(edge, other):
                found |= {(edge, other), (other, edge)}
        found = {one for one in found if not any(one != o and one[0] <= o[0] and one[1] <= o[1] for o in found)}
        found.add(self.resolution)
        object.__setattr__(self, "sizes", tuple(sorted(found, key=lambda size: (size[1] / size[0], size))))

    def of(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the bucket for a picture: of the nearest ratio, in which the least is cropped away."""
        wanted = math.log(width / height)
        return min(self.sizes, key=lambda size: abs(math.log(size[1] / size[0]) - wanted))
