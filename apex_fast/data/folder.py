"""A folder of pictures with captions, read from the disk as people keep them.

Captions are the lines of ``metadata.jsonl`` (``{"file_name": "a.png", "text": "a red cat"}``, as Hugging Face's
ImageFolder has them) or, without that file, a ``.txt`` beside each picture (``a.png``, ``a.txt``). What cannot be used,
a broken picture or an empty caption, is left out and named; only a folder in which nothing can be used is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apex_fast.extras import require

METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_NAMED = 3


@dataclass
class PictureFolder:
    """Pairs of a picture file and its caption, in the order of their names, and what was left out.

    Attributes:
        files, captions: of equal length.
        left_out: reason -> names.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def open(folder: str | Path) -> PictureFolder:
        """Lists the pairs of ``folder`` and its subfolders; pictures are not read yet.

        Raises:
            FileNotFoundError: no such folder, or no picture in it.
            ValueError: ``metadata.jsonl`` without captions in a key ``text`` or with two lines for one file, or nothing
                with a caption.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"dataset_name: {folder} is no folder; write the folder of your pictures, or digits"
            )
        found = PictureFolder(folder)
        pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not pictures:
            raise FileNotFoundError(
                f"dataset_name: {folder} has no pictures ({', '.join(SUFFIXES)}); expected pictures with a .txt "
                f"caption beside each, or with {METADATA}"
            )
        if (folder / METADATA).is_file():
            found._from_metadata(pictures)
        else:
            found._from_texts(pictures)
        found._check()
        return found

    def _from_metadata(self, pictures: list[Path]) -> None:
        path = self.folder / METADATA
        captions: dict[Path, str] = {}
        lines: dict[Path, int] = {}
        keys: set[str] = set()
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"dataset_name: {path} is not UTF-8 ({error}); save it as UTF-8") from error
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                values = None
            if not isinstance(values, dict) or not isinstance(values.get("file_name"), str):
                self.leave_out(f"no JSON with a file_name in {METADATA}", f"line {number}")
                continue
            keys |= values.keys()
            file = self.folder / values["file_name"]
            if file in captions:
                raise ValueError(
                    f"dataset_name: {path} has two lines for {self.name(file)}, in lines {lines[file]} and {number}; "
                    "keep the one that is meant"
                )
            captions[file], lines[file] = _caption(values.get("text")), number
        if captions and "text" not in keys:
            raise ValueError(
                f"dataset_name: {path} has no captions: expected the keys file_name and text, got "
                f"{', '.join(sorted(keys))}"
            )
        present = set(pictures)
        for file in sorted(captions):
            if file not in present and not file.is_file():
                self.leave_out(f"named in {METADATA} and not there", self.name(file))
            else:
                self._add(file, captions[file])
        for file in pictures:
            if file not in captions:
                self.leave_out(f"not named in {METADATA}", self.name(file))

    def _from_texts(self, pictures: list[Path]) -> None:
        for file in pictures:
            text = file.with_suffix(".txt")
            if not text.is_file():
                self.leave_out("no .txt caption beside it", self.name(file))
                continue
            try:
                caption = text.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError:
                # Replacement characters would be trained on.
                self.leave_out("the .txt caption beside it is not UTF-8", self.name(file))
                continue
            self._add(file, _caption(caption))

    def _add(self, file: Path, caption: str) -> None:
        if caption:
            self.files.append(file)
            self.captions.append(caption)
        else:
            self.leave_out("empty caption", self.name(file))

    def name(self, file: Path) -> str:
        """``file`` as it is called inside the folder."""
        return str(file.relative_to(self.folder)) if file.is_relative_to(self.folder) else str(file)

    def leave_out(self, reason: str, name: str) -> None:
        """Counts ``name`` as left out."""
        self.left_out.setdefault(reason, []).append(name)

    def drop(self, indices: list[int], reason: str) -> None:
        """Leaves out pairs that turned out to be unusable. ValueError if none is left."""
        for index in indices:
            self.leave_out(reason, self.name(self.files[index]))
        gone = set(indices)
        self.files = [f for i, f in enumerate(self.files) if i not in gone]
        self.captions = [c for i, c in enumerate(self.captions) if i not in gone]
        self._check()

    def _check(self) -> None:
        if not self.files:
            raise ValueError(
                f"dataset_name: nothing in {self.folder} can be used: "
                + "; ".join(self.warnings())
                + f"; expected pictures with a .txt caption in UTF-8 beside each, or {METADATA} with a line of "
                "file_name and text for each"
                if self.left_out
                else f"dataset_name: {self.folder / METADATA} names no picture"
            )

    def warnings(self) -> list[str]:
        """A line for each reason: how many were left out, and the first of them by name."""
        return [
            f"{len(names)} left out, {reason}: " + ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            for reason, names in self.left_out.items()
        ]

    def __len__(self) -> int:
        return len(self.files)


class BrokenPictureError(ValueError):
    """A file that is no picture, or a damaged one."""


def read_picture(file: Path, height: int, width: int) -> Tensor:
    """A picture as ``[3, height, width]`` fp32 in [-1, 1]: turned as its EXIF data says, transparency on white, resized
    to cover the size and cropped at the centre.

    Raises:
        BrokenPictureError: it cannot be read.
    """
    pil, operations = require("PIL.Image", extra="train"), require("PIL.ImageOps", extra="train")
    try:
        with pil.open(file) as opened:
            picture = _as_rgb(operations.exif_transpose(opened), pil)
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise BrokenPictureError(f"{file}: {error}") from error
    picture = operations.fit(picture, (width, height), pil.Resampling.LANCZOS)
    # A copy: the picture's own memory is read-only.
    values = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return values.permute(2, 0, 1).float().div(127.5).sub(1.0)


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


def _caption(text: Any) -> str:
    """One line without double blanks; "" for what is no text."""
    return " ".join(text.split()) if isinstance(text, str) else ""
