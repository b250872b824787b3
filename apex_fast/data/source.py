"""Where pairs of a picture and a caption come from, whatever they are stored in.

A :class:`Source` lists its pairs first (names and captions, which are small and stay in memory) and reads pictures
afterwards, one after the other, in the same order. The index of a pair is its place in that list and never changes:
what turns out to be broken later is counted and named, and the others keep their indices.

What cannot be used is left out, with a reason and a name for each, and counted. One bad pair never stops a run; more
than one do once they are more than ``max_bad_share`` of all: see :meth:`Source.check_share`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from apex_fast.training.config import TrainConfig

BROKEN = "not a picture that can be read"
"""The reason for leaving out a pair whose picture raised :class:`BrokenPictureError`."""
HUB = "hub:"
"""What the names of data sets on the Hugging Face hub begin with, so that a mistyped path is never looked up there."""

_NAMED = 3


class BrokenPictureError(ValueError):
    """A file that is no picture, or a damaged one."""


class TooManyBadError(ValueError):
    """More pairs of a source cannot be used than ``max_bad_share`` allows."""


@dataclass(frozen=True)
class Sample:
    """A pair of a source, with its picture not read yet.

    Attributes:
        index: its place in the source's ``names`` and ``captions``.
        size: (width, height) in pixels as it is meant to be seen, where the source knows it without reading; else None.
        open: reads the picture, upright and in RGB (transparency on white). BrokenPictureError, with the name, if that
            cannot be done.
    """

    index: int
    name: str
    caption: str
    open: Callable[[], Image]
    size: tuple[int, int] | None = None


@dataclass
class Source(ABC):
    """Pairs of a picture and a caption in a fixed order.

    Attributes:
        label: what the source is called in messages.
        names, captions: of equal length, by index.
        left_out: reason -> names.
        bad: how many of those count as bad (a shard that ends early may count for several).
        max_bad_share: the share of bad pairs up to which a run goes on.
    """

    label: str
    names: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    bad: int = 0
    max_bad_share: float = 1.0
    _bad_when_listed: int | None = None

    def __len__(self) -> int:
        """How many pairs were listed; some of their pictures may turn out to be broken."""
        return len(self.captions)

    @abstractmethod
    def samples(self, start: int = 0) -> Iterator[Sample]:
        """The pairs from index ``start`` on, in order. Some sources hold a picture's bytes until the sample is dropped,
        so read each before the next is asked for."""

    def leave_out(self, reason: str, name: str, *, count: int = 1) -> None:
        """Counts ``name`` as left out.

        count: for how many bad pairs it counts towards ``max_bad_share``; 0 for what may be left out on purpose.

        Raises:
            TooManyBadError: after the listing, if that is one too many.
        """
        self.left_out.setdefault(reason, []).append(name)
        self.bad += count
        if self._bad_when_listed is not None:
            self.check_share()

    def listed(self) -> None:
        """Ends the listing: from now on every further bad pair is held against ``max_bad_share`` at once.

        Raises:
            ValueError: no pair can be used.
            TooManyBadError: too few can.
        """
        self._bad_when_listed = self.bad
        if not self.captions:
            raise ValueError(self._nothing())
        self.check_share()

    def check_share(self) -> None:
        """TooManyBadError if the bad are more than ``max_bad_share`` of all pairs, good and bad, and more than one.

        One is always forgiven, unless ``max_bad_share`` is 0: otherwise a single broken picture would stop a run on a
        small set.
        """
        total = len(self.captions) + (self.bad if self._bad_when_listed is None else self._bad_when_listed)
        # 0.29 * 100 is a little less than 29.
        allowed = max(int(self.max_bad_share * total + 1e-9), 1 if self.max_bad_share > 0 else 0)
        if self.bad > allowed:
            raise TooManyBadError(
                f"dataset_name: {self.bad} of {total} in {self.label} cannot be used, and max_bad_share "
                f"({self.max_bad_share:g}) allows {allowed}: {'; '.join(self.warnings())}. Mend or remove them, or "
                "write a larger max_bad_share"
            )

    def check_left(self, count: int) -> None:
        """ValueError if ``count``, the pairs whose pictures could be read, is none."""
        if count < 1:
            raise ValueError(self._nothing())

    def _nothing(self) -> str:
        if not self.left_out:
            return f"dataset_name: there is nothing in {self.label}; expected {self._expected()}"
        return (
            f"dataset_name: nothing in {self.label} can be used: {'; '.join(self.warnings())}; expected "
            f"{self._expected()}"
        )

    def _expected(self) -> str:
        return "pictures with captions"

    def warnings(self) -> list[str]:
        """A line for each reason: how many were left out, and the first of them by name."""
        return [
            f"{len(names)} left out, {reason}: " + ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            for reason, names in self.left_out.items()
        ]

    def digest(self) -> dict[str, Any] | None:
        """What tells later whether the source still lists the same pictures and captions.

        ``names`` are those inside the source: it may be moved.
        """
        digests = {
            key: hashlib.sha256(json.dumps(texts).encode()).hexdigest()
            for key, texts in (("names", self.names), ("captions", self.captions))
        }
        return {"count": len(self.names), **digests}


def one_line(text: Any) -> str:
    """A caption on one line without double blanks; "" for what is no text."""
    return " ".join(text.split()) if isinstance(text, str) else ""


def open_source(config: TrainConfig) -> Source:
    """The source that ``dataset_name`` means; nothing but its listing is read.

    Raises:
        FileNotFoundError: there is nothing at that path.
        ValueError: something that is refused, or of which too little can be used; the message begins with the key.
        ImportError: the package that reads it is missing; the message has the command that installs it.
    """
    from apex_fast.data.folder import PictureFolder
    from apex_fast.data.tables import is_table, open_table
    from apex_fast.data.tar_shards import TarShards, is_tar_name, refuse_scheme

    name, share = config.dataset_name, config.max_bad_share
    columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    if not name.lower().startswith(HUB):
        refuse_scheme(name)
    if is_table(name):
        return open_table(name, split=config.dataset_split, **columns, max_bad_share=share)
    if config.dataset_split is not None:
        raise ValueError(f"dataset_split: {name} has no splits; leave it out")
    if is_tar_name(name):
        return TarShards.open(name, **columns, max_bad_share=share)
    if config.image_column is not None:
        raise ValueError(f"image_column: {name} is a folder of pictures, which has no columns; leave it out")
    return PictureFolder.open(name, caption_column=config.caption_column, max_bad_share=share)
