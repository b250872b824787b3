"""A folder of pictures with captions, read from the disk as people keep them.

Captions are the lines of ``metadata.jsonl`` (``{"file_name": "a.png", "text": "a red cat"}``, as Hugging Face's
ImageFolder has them) or, without that file, a ``.txt`` beside each picture (``a.png``, ``a.txt``). What cannot be used,
a broken picture or an empty caption, is left out and named; only a folder in which nothing can be used is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from apex_fast.data.pictures import SUFFIXES, open_picture, read_picture
from apex_fast.data.source import BrokenPictureError, Sample, Source, one_line

METADATA = "metadata.jsonl"

__all__ = ["METADATA", "SUFFIXES", "BrokenPictureError", "PictureFolder", "read_picture"]


@dataclass
class PictureFolder(Source):
    """Pairs of a picture file and its caption, in the order of their names.

    Attributes:
        files: of the same length as ``names`` and ``captions``.
    """

    folder: Path = Path()
    files: list[Path] = field(default_factory=list)

    @staticmethod
    def open(folder: str | Path, *, caption_column: str | None = None, max_bad_share: float = 1.0) -> PictureFolder:
        """Lists the pairs of ``folder`` and its subfolders; pictures are not read yet.

        caption_column: the key of captions in ``metadata.jsonl``; None is ``text``.

        Raises:
            FileNotFoundError: no such folder, or no picture in it.
            ValueError: ``metadata.jsonl`` without captions or with two lines for one file, nothing with a caption, or
                more that cannot be used than ``max_bad_share`` allows.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"dataset_name: {folder} is no folder; write the folder of your pictures, or digits (a data set on the "
                "Hugging Face hub is hub:OWNER/NAME)"
            )
        found = PictureFolder(str(folder), max_bad_share=max_bad_share, folder=folder)
        pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not pictures:
            if any(folder.glob("*.tar")):
                raise FileNotFoundError(
                    f"dataset_name: {folder} has no pictures, but .tar files; WebDataset shards are {folder}/*.tar"
                )
            raise FileNotFoundError(
                f"dataset_name: {folder} has no pictures ({', '.join(SUFFIXES)}); expected pictures with a .txt "
                f"caption beside each, or with {METADATA}"
            )
        if (folder / METADATA).is_file():
            found._from_metadata(pictures, caption_column or "text")
        elif caption_column is not None:
            raise ValueError(
                f"caption_column: {caption_column} is a key of {METADATA}, and {folder} has none; leave it out to read "
                "the .txt beside each picture"
            )
        else:
            found._from_texts(pictures)
        found.listed()
        return found

    def samples(self, start: int = 0) -> Iterator[Sample]:
        for index in range(start, len(self)):
            file = self.files[index]
            yield Sample(index, self.names[index], self.captions[index], lambda file=file: open_picture(file))

    def _from_metadata(self, pictures: list[Path], key: str) -> None:
        path = self.folder / METADATA
        captions: dict[Path, str] = {}
        lines: dict[Path, int] = {}
        keys: set[str] = set()
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"dataset_name: {path} is not UTF-8 ({error}); save it as UTF-8") from error
        # Not splitlines(), which also cuts at characters that JSON leaves inside of a text, such as U+2028.
        for number, line in enumerate(text.split("\n"), 1):
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
            # By name: a link inside of the folder was put there on purpose.
            if not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(self.folder)):
                self.leave_out(f"named in {METADATA} and outside of the folder", values["file_name"])
                continue
            if file in captions:
                raise ValueError(
                    f"dataset_name: {path} has two lines for {self.name(file)}, in lines {lines[file]} and {number}; "
                    "keep the one that is meant"
                )
            captions[file], lines[file] = one_line(values.get(key)), number
        if captions and key not in keys:
            raise ValueError(
                f"dataset_name: {path} has no captions: expected the keys file_name and {key}, got "
                f"{', '.join(sorted(keys))}; write caption_column if another key holds them"
            )
        present = set(pictures)
        for file in sorted(captions):
            if file not in present and not file.is_file():
                self.leave_out(f"named in {METADATA} and not there", self.name(file))
            else:
                self._add(file, captions[file])
        for file in pictures:
            if file not in captions:
                # A list of some of the pictures is a choice, not damage.
                self.leave_out(f"not named in {METADATA}", self.name(file), count=0)

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
            self._add(file, one_line(caption))

    def _add(self, file: Path, caption: str) -> None:
        if caption:
            self.files.append(file)
            self.names.append(self.name(file))
            self.captions.append(caption)
        else:
            self.leave_out("empty caption", self.name(file))

    def name(self, file: Path) -> str:
        """``file`` as it is called inside the folder."""
        return str(file.relative_to(self.folder)) if file.is_relative_to(self.folder) else str(file)

    def _expected(self) -> str:
        captions = f"{METADATA} with a line of file_name and text for each"
        return f"pictures with a .txt caption in UTF-8 beside each, or {captions}"
