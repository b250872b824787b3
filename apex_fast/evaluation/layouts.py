"""Prompts from files, and pictures in the folders that the scorers of GenEval and DPG-Bench read.

=========  =====================================================  ============================================
layout     prompts                                                pictures of the prompt number 7
=========  =====================================================  ============================================
plain      a text file (one a line), JSON lines, or a folder of    ``00007-00.png``, ``00007-01.png``, ...; at the
           text files                                             end ``metadata.jsonl``, so that the folder can
                                                                  be trained on (``dataset_name``)
geneval    ``evaluation_metadata.jsonl`` of GenEval               ``00007/metadata.jsonl`` (its line),
                                                                  ``00007/samples/00000.png``, ...,
                                                                  ``00007/grid.png``
dpg        the folder ``prompts`` of DPG-Bench                    ``<name of the text file>.png``: one picture, or
                                                                  four in two rows without a border, which
                                                                  ``--pic-num 4 --resolution EDGE`` cuts again
=========  =====================================================  ============================================

Every picture says in a text chunk of its own, ``apex_fast``, how it was made; a folder is gone on with only where that
agrees, so that no folder holds pictures of two models or two settings, nor pictures of prompts that are not asked for
any more. A picture is written under a name with a dot in front and renamed when it is whole. (The scorers take every
file for a picture whose name they like: GenEval's looks at the beginning of the name alone, DPG-Bench's at nothing.)
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from apex_fast.extras import require

LayoutName = Literal["plain", "geneval", "dpg"]
LAYOUTS = ("plain", "geneval", "dpg")
METADATA = "metadata.jsonl"
FACTS = "apex_fast"
"""Key of the text chunk."""
_DAMAGED = (OSError, SyntaxError, ValueError, struct.error)
"""What PIL raises for a PNG that is cut off or is none."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
"""The last chunk of every PNG."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        text: the prompt.
        name: of the text file that held it alone, without the suffix; None otherwise.
        line: the line of JSON that it stood in, as it was; None otherwise.
    """

    text: str
    name: str | None = None
    line: str | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts in ``path``: a text file with one a line, JSON lines with ``prompt`` (or ``text``), or a folder whose
    ``*.txt`` hold one each.

    Files are UTF-8, with or without a byte order mark. Only a newline ends a line: JSON texts may hold any other
    separator.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: no prompt in it, a line that is none, or bytes that are not UTF-8.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.glob("*.txt") if not file.name.startswith("."))
        prompts = [Prompt(" ".join(_text(file).split()), name=file.stem) for file in files]
        if empty := [p.name for p in prompts if not p.text]:
            raise ValueError(f"prompts: {path / str(empty[0])}.txt is empty")
    elif not path.is_file():
        raise FileNotFoundError(f"prompts: {path} is not there; expected a file, or a folder of text files")
    else:
        lines = [line.strip() for line in _text(path).split("\n")]
        read = _from_json if path.suffix in (".jsonl", ".json") else lambda line, _: Prompt(line)
        prompts = [read(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line]
    if not prompts:
        raise ValueError(f"prompts: nothing in {path}; expected a prompt a line, or a folder of text files")
    return prompts


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts: {file} is not UTF-8 ({error.reason} at byte {error.start}); save it in that encoding"
        ) from error


def _from_json(line: str, where: str) -> Prompt:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts: {where} is no JSON ({error}); expected one object a line") from error
    text = (values.get("prompt") or values.get("text")) if isinstance(values, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'prompts: {where} has no "prompt" (or "text") that is a text')
    return Prompt(text, line=line)


class Layout:
    """Where the pictures of ``prompts`` lie in ``folder``, which of them are there, and the writing of more.

    Args:
        name: see the table above.
        folder: made when the first picture is written.
        prompts: in the order of the file; their numbers name files.
        count: pictures of each prompt.
        facts: how all pictures of this folder are made, in plain values of JSON.

    Raises:
        ValueError: prompts that this layout has no names for, another number of pictures than it can hold, or a file
            in place of the folder.
    """

    def __init__(
        self, name: str, folder: str | Path, prompts: Sequence[Prompt], count: int, facts: Mapping[str, Any]
    ) -> None:
        if name not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {name!r}")
        self.name, self.folder, self.prompts, self.count = name, Path(folder), list(prompts), count
        self.facts = dict(facts)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"{self.folder} is a file, and pictures of many prompts need a folder; name one with --out"
            )
        self._waiting: dict[int, dict[int, Any]] = {}
        if name == "geneval":
            for prompt in prompts:
                if prompt.line is None or "tag" not in json.loads(prompt.line):
                    raise ValueError(
                        "layout geneval: its scorer needs the tag and the objects of every prompt; give --prompts the "
                        "evaluation_metadata.jsonl of GenEval"
                    )
        if name == "dpg":
            if count not in (1, 4):
                raise ValueError(f"layout dpg: a file holds 1 picture or 4, got {count}")
            for prompt in prompts:
                if prompt.name is None or "." in prompt.name:
                    raise ValueError(
                        "layout dpg: a picture is named as the text file of its prompt, up to the first dot; give "
                        f"--prompts the folder of prompts of DPG-Bench{_but(prompt.name)}"
                    )

    def missing(self) -> list[tuple[int, int]]:
        """(number of the prompt, number of its picture) of all that has to be drawn, in order.

        Raises:
            ValueError: a picture in the way that was made otherwise, or a file that a reader of the folder would take
                for one of these pictures, such as one of a longer list of prompts.
        """
        absent, complete = [], []
        for index in range(len(self.prompts)):
            if self.name == "dpg":
                if not self._whole(self._grid(index), self._facts(index, 0)):
                    absent += [(index, number) for number in range(self.count)]
                continue
            new = [n for n in range(self.count) if not self._whole(self._sample(index, n), self._facts(index, n))]
            absent += [(index, number) for number in new]
            if not new:
                complete.append(index)
        if (stray := self._stray()) is not None:
            asked = f"{len(self.prompts)} prompt{'s' if len(self.prompts) > 1 else ''} with {self.count} picture"
            raise ValueError(
                f"{stray} belongs to none of these {asked}{'s' if self.count > 1 else ''} each, and whoever reads the "
                "folder would count it; take it out, or name another folder with --out"
            )
        for index in complete:
            self._complete(index)
        return absent

    def put(self, index: int, number: int, picture: Any) -> None:
        """Writes one picture (PIL), and what belongs to its prompt once all of them are there."""
        if self.name == "dpg":
            waiting = self._waiting.setdefault(index, {})
            waiting[number] = picture
            if len(waiting) == self.count:
                pictures = self._waiting.pop(index)
                whole = grid([pictures[n] for n in range(self.count)])
                self._save(whole, self._grid(index), self._facts(index, 0))
            return
        self._save(picture, self._sample(index, number), self._facts(index, number))
        # A damaged one may still wait for its turn.
        if all(self._is(self._sample(index, n), self._facts(index, n)) for n in range(self.count)):
            self._complete(index)

    def finish(self) -> None:
        """Writes what stands once for the whole folder."""
        if self.name != "plain":
            return
        lines = [
            {"file_name": self._sample(index, number).name, "text": prompt.text, "seed": self.seed(index, number)}
            for index, prompt in enumerate(self.prompts)
            for number in range(self.count)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        # Inside a text they are no ends of lines, but some readers take them for such.
        for mark in "\x85\u2028\u2029":
            text = text.replace(mark, f"\\u{ord(mark):04x}")
        _replace(self.folder / METADATA, lambda partial: partial.write_text(text, encoding="utf-8"))

    def seed(self, index: int, number: int) -> int:
        """Seed of one picture: that of the folder, plus how many pictures come before it."""
        return int(self.facts["seed"]) + index * self.count + number

    # ---- files

    def _sample(self, index: int, number: int) -> Path:
        if self.name == "geneval":
            return self.folder / f"{index:05}" / "samples" / f"{number:05}.png"
        return self.folder / f"{index:05}-{number:02}.png"

    def _grid(self, index: int) -> Path:
        if self.name == "dpg":
            return self.folder / f"{self.prompts[index].name}.png"
        return self.folder / f"{index:05}" / "grid.png"

    def _complete(self, index: int) -> None:
        if self.name != "geneval":
            return
        line, file = str(self.prompts[index].line), self._grid(index).with_name(METADATA)
        if not file.is_file() or file.read_text(encoding="utf-8") != line + "\n":
            _replace(file, lambda partial: partial.write_text(line + "\n", encoding="utf-8"))
        if not self._is(self._grid(index), self._facts(index, None)):
            pil = require("PIL.Image", extra="train")
            pictures = []
            for number in range(self.count):
                with pil.open(self._sample(index, number)) as picture:
                    pictures.append(picture.convert("RGB"))
            self._save(grid(pictures), self._grid(index), self._facts(index, None))

    def _facts(self, index: int, number: int | None) -> dict[str, Any]:
        """How a picture is made; number None: the grid of all pictures of a prompt."""
        own = {"prompt": self.prompts[index].text, "seed": self.seed(index, number or 0)}
        if self.name == "dpg" or number is None:
            own["pictures"] = self.count
        return {**self.facts, **own}

    def _save(self, picture: Any, path: Path, facts: Mapping[str, Any]) -> None:
        info = require("PIL.PngImagePlugin", extra="train").PngInfo()
        info.add_text(FACTS, json.dumps(facts, sort_keys=True))
        _replace(path, lambda partial: picture.save(partial, format="PNG", pnginfo=info))

    def _stray(self) -> Path | None:
        """A file that the readers of this layout would take for a picture, or for a prompt, of these; or None. What
        has a dot in front is no picture to any of them."""
        if not self.folder.is_dir():
            return None
        numbers = range(len(self.prompts))
        if self.name == "dpg":
            own = {self._grid(index) for index in numbers}
            seen = list(self.folder.iterdir())
        elif self.name == "geneval":
            own = {self._sample(index, number) for index in numbers for number in range(self.count)}
            own |= {self._grid(index).parent for index in numbers}
            folders = [path for path in self.folder.iterdir() if path.is_dir() and path.name.isdigit()]
            seen = [*folders, *(path for folder in folders for path in (folder / "samples").glob("*"))]
        else:
            own = {self._sample(index, number) for index in numbers for number in range(self.count)}
            seen = [path for path in self.folder.rglob("*") if path.suffix.lower() in _PICTURES]
            if not self._lists_only({path.name for path in own}):
                seen.append(self.folder / METADATA)
        return next((path for path in sorted(seen) if path not in own and not path.name.startswith(".")), None)

    def _lists_only(self, names: set[str]) -> bool:
        """Whether metadata.jsonl, where there is one, is of pictures called ``names``."""
        file = self.folder / METADATA
        if not file.is_file():
            return True
        try:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
            return {line["file_name"] for line in lines} <= names
        except (ValueError, TypeError, KeyError):
            return False

    @staticmethod
    def _said(path: Path) -> dict[str, Any] | None:
        """What the picture in ``path`` says of itself, empty where it says nothing; None for no or a damaged one."""
        if not path.is_file():
            return None
        pil = require("PIL.Image", extra="train")
        try:
            with pil.open(path) as picture:
                said = picture.info.get(FACTS)
                picture.verify()
        except _DAMAGED:
            return None
        if path.read_bytes()[-len(_END) :] != _END:
            # PIL checks the sums of all chunks but the last.
            return None
        try:
            found = json.loads(said or "{}")
        except json.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}

    def _is(self, path: Path, wanted: Mapping[str, Any]) -> bool:
        """Whether ``path`` is there, undamaged, and says that it was made so."""
        found = self._said(path)
        return found is not None and all(found.get(key) == value for key, value in wanted.items())

    def _whole(self, path: Path, wanted: Mapping[str, Any]) -> bool:
        """Whether ``path`` is there and undamaged. ValueError if it is a picture of something else."""
        found = self._said(path)
        if found is None:
            return False
        if not found:
            raise ValueError(f"{path} is there and was not made by this command; name another folder with --out")
        differs = [key for key in wanted if found.get(key) != wanted[key]]
        if differs:
            first = differs[0]
            raise ValueError(
                f"{path} was made with {first} {found.get(first)!r}, and now it is {wanted[first]!r}; write the same "
                "settings to go on, or another folder with --out"
            )
        return True


def _but(name: str | None) -> str:
    return "" if name is None else f", not {name}.txt"


def grid(pictures: Sequence[Any]) -> Any:
    """Pictures (PIL, of one size) row by row on a square of tiles, without borders: four make two rows of two."""
    pil = require("PIL.Image", extra="train")
    across = int(np.ceil(np.sqrt(len(pictures))))
    down = -(-len(pictures) // across)
    width, height = pictures[0].size
    whole = pil.new("RGB", (across * width, down * height))
    for place, picture in enumerate(pictures):
        whole.paste(picture, (place % across * width, place // across * height))
    return whole


def as_picture(image: Tensor) -> Any:
    """An image ``[3, H, W]`` in [-1, 1] as PIL at its own size; ``[1, H, W]`` is drawn as ink on paper, 256 wide."""
    pil = require("PIL.Image", extra="train")
    if image.shape[0] == 1:
        from apex_fast.evaluation.report import pixels

        return pil.fromarray(pixels(image, 256))
    values = image.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return pil.fromarray(values.permute(1, 2, 0).contiguous().numpy())


def _replace(path: Path, write: Any) -> None:
    """Writes ``path`` under another name and renames it when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)
