"""A file of prompts, for runs that train on samples of the model itself: a prompt a line, in UTF-8.

Blank lines, and lines that begin with ``#``, are passed over; blanks around and double blanks inside a prompt are
dropped. A prompt that stands there twice is a mistake, not a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_fast.data.source import Sample, Source, one_line

COMMENT = "#"
_NAMED = 3


@dataclass
class PromptFile(Source):
    """Prompts in the order of their file: ``captions`` are the prompts, ``names`` their lines."""

    @staticmethod
    def open(path: str | Path) -> PromptFile:
        """Reads the prompts of ``path``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not UTF-8, no prompt in it, or one twice.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"prompts: {path} is no file; write a text file with a prompt a line")
        if path.suffix.lower() in (".json", ".jsonl", ".csv", ".parquet"):
            raise ValueError(
                f"prompts: {path} is a {path.suffix} file, and its lines would be taken for prompts as they are; write "
                "a text file with a prompt a line"
            )
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts: {path} is not UTF-8 ({error}); save it as UTF-8") from error
        found = PromptFile(str(path))
        lines: dict[str, int] = {}
        twice: list[str] = []
        for number, line in enumerate(text.split("\n"), 1):
            prompt = one_line(line)
            if not prompt or prompt.startswith(COMMENT):
                continue
            if prompt in lines:
                twice.append(f"lines {lines[prompt]} and {number} ({_short(prompt)})")
                continue
            lines[prompt] = number
            found.names.append(f"line {number}")
            found.captions.append(prompt)
        if twice:
            more = f" and {len(twice) - _NAMED} more" if len(twice) > _NAMED else ""
            raise ValueError(
                f"prompts: {path} has prompts twice: {', '.join(twice[:_NAMED])}{more}; keep one of each (for more "
                "samples of a prompt there is prompts_only.samples_per_prompt)"
            )
        if not found.captions:
            raise ValueError(
                f"prompts: there is no prompt in {path}: expected one a line (blank lines and lines that begin with "
                f"{COMMENT} are passed over)"
            )
        return found

    def digest(self) -> dict[str, Any] | None:
        """Of the prompts alone: a comment more in the file changes no sample."""
        return {"count": len(self.captions), "captions": (super().digest() or {})["captions"]}

    def samples(self, start: int = 0) -> Iterator[Sample]:
        raise TypeError("prompts have no pictures; their samples are drawn by the model")


def _short(prompt: str) -> str:
    return f'"{prompt}"' if len(prompt) <= 40 else f'"{prompt[:37]}..."'
