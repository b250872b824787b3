"""WebDataset shards: tar files in which a picture and its caption share a name (``0001.jpg``, ``0001.txt``).

Shards are named by a path, a pattern (``data-{000..031}.tar``, ``data/*.tar``) or an http(s) URL. They are read twice:
first everything but the pictures, for the listing, then the pictures. From a plain ``.tar`` on this machine a picture
is read at its place; a compressed one or one behind a URL is streamed again from the start, so what is behind a URL
travels twice, and for each process.

Nothing is ever extracted and no member's name becomes a path. Members whose names would lead out of a folder, links and
devices are left out all the same: a shard that has them is not what it seems. Sources that would run a command
(``pipe:``, and the programs that the webdataset library starts for URLs) are refused; URLs are opened in this process.
"""

from __future__ import annotations

import glob
import http.client
import itertools
import json
import re
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from apex_fast.data.pictures import SUFFIXES, open_picture
from apex_fast.data.source import BrokenPictureError, Sample, Source, one_line
from apex_fast.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

ENDS = (".tar", ".tar.gz", ".tgz")
CAPTION_ENDS = ("txt", "caption")
CAPTION_KEYS = ("caption", "text", "prompt")
MOST_SHARDS = 1_000_000
LONGEST_TEXT = 1 << 20
TRIES = 3
TIMEOUT_SECONDS = 60.0
_PICTURE_ENDS = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")


class ShardEndsEarlyError(tarfile.ReadError):
    """What follows in a tar file is no member and no end: it is damaged or was cut short."""


class _Header(tarfile.TarInfo):
    """tarfile takes whatever is no header for the end of an archive; only a block of zeros is one."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise ShardEndsEarlyError(str(error)) from error


@dataclass(frozen=True)
class _Place:
    """Where a picture is: in which group of which shard, and (offset None in a stream) at which byte."""

    shard: int
    group: int
    offset: int | None = None
    size: int = 0


@dataclass
class _Listing:
    """What one shard holds."""

    names: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    places: list[_Place] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    ends_early: bool = False


@dataclass
class TarShards(Source):
    """Pairs of WebDataset shards, in the order of the shards and of their members.

    Attributes:
        shards: paths and URLs.
        image_column, caption_column: ends of members' names, or a key of the ``.json``; None finds them.
    """

    shards: list[str] = field(default_factory=list)
    image_column: str | None = None
    caption_column: str | None = None
    _places: list[_Place] = field(default_factory=list)
    _called: list[str] = field(default_factory=list)

    @staticmethod
    def open(
        name: str,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        max_bad_share: float = 1.0,
    ) -> TarShards:
        """Lists the pairs of all shards that ``name`` means; pictures are not read yet.

        image_column, caption_column: such as ``jpg`` and ``txt``; a caption that is no member of its own is a key of
        the sample's ``.json``.

        Raises:
            FileNotFoundError: a shard on this machine is not there.
            ValueError: a kind of source that is refused, nothing that can be used, or too little of it.
        """
        found = TarShards(shown(name), max_bad_share=max_bad_share, shards=expand(name))
        # Without the folder, which may be another one the next time, as long as that tells them apart.
        short_names = [shown(shard).rpartition("/")[2] for shard in found.shards]
        clear = len(set(short_names)) == len(short_names)
        found._called = short_names if clear else [shown(shard) for shard in found.shards]
        found.image_column = None if image_column is None else image_column.lower().removeprefix(".")
        found.caption_column = None if caption_column is None else caption_column.removeprefix(".")
        whole: list[int] = []
        short: list[int] = []
        for number, shard in enumerate(found.shards):
            try:
                listing = found._list(number)
            except (OSError, tarfile.TarError, http.client.HTTPException, EOFError) as error:
                found.leave_out("a shard that cannot be read", f"{shown(shard)} ({error})", count=0)
                short.append(0)
                continue
            for reason, what in listing.left_out:
                found.leave_out(reason, what)
            found.names += listing.names
            found.captions += listing.captions
            found._places += listing.places
            if listing.ends_early:
                reason = "a shard that is damaged or cut short, used up to there"
                found.leave_out(reason, f"{shown(shard)} after {len(listing.names)} samples", count=0)
            (short if listing.ends_early else whole).append(len(listing.names))
        # What is lost with such a shard is not known: it is taken to have held as much as the whole ones do.
        mean = round(sum(whole) / len(whole)) if whole else 0
        found.bad += sum(max(1, mean - count) for count in short)
        found.listed()
        return found

    def samples(self, start: int = 0) -> Iterator[Sample]:
        for number, indices in itertools.groupby(range(start, len(self)), lambda index: self._places[index].shard):
            if _enterable(self.shards[number]):
                for index in indices:
                    yield self._sample(index, lambda place=self._places[index]: self._at(place))
            else:
                yield from self._streamed(number, list(indices))

    def _expected(self) -> str:
        return (
            "tar files in which a picture and its caption share a name: 0001.jpg and 0001.txt, or a 0001.json with "
            f"a caption in one of {', '.join(CAPTION_KEYS)} (image_column and caption_column name others)"
        )

    def _sample(self, index: int, read: Callable[[], bytes]) -> Sample:
        name = self.names[index]

        def picture() -> Image:
            try:
                data = read()
            except OSError as error:
                raise BrokenPictureError(f"{name}: {error}") from error
            return open_picture(data, name)

        return Sample(index, name, self.captions[index], picture)

    def _at(self, place: _Place) -> bytes:
        assert place.offset is not None
        with open(self.shards[place.shard], "rb") as file:
            file.seek(place.offset)
            return file.read(place.size)

    # ---- reading shards

    def _list(self, number: int) -> _Listing:
        """Goes through one shard once. OSError and what tarfile and http.client raise if nothing of it can be read."""
        for attempt in range(TRIES):
            try:
                return self._listed(number)
            except (OSError, http.client.HTTPException) as error:
                if not _worth_another_try(self.shards[number], error) or attempt + 1 == TRIES:
                    raise
                time.sleep(1 + attempt)
        raise AssertionError

    def _listed(self, number: int) -> _Listing:
        listing, shard = _Listing(), self.shards[number]
        texts = {*CAPTION_ENDS, "json", (self.caption_column or "txt").lower()}
        with self._opened(shard) as tar:

            def payload(info: tarfile.TarInfo, end: str) -> Any:
                if end in texts and end != self.image_column:
                    return _content(tar, info) if info.size <= LONGEST_TEXT else None
                return info.offset_data, info.size

            def refuse(reason: str, member: str) -> None:
                listing.left_out.append((reason, f"{self._called[number]}: {member}"))

            try:
                for group, sample in enumerate(_groups(tar, shard, payload, refuse)):
                    self._add(listing, number, group, sample)
            except (tarfile.TarError, EOFError):
                listing.ends_early = True
        return listing

    def _add(self, listing: _Listing, number: int, group: int, sample: dict[str, Any]) -> None:
        """Puts one group of members down as a pair, or as left out."""
        name = f"{self._called[number]}: {sample['__key__']}"
        ends = [end for end in sample if not end.startswith("__")]
        pictures = [end for end in ends if end == self.image_column or (not self.image_column and end in _PICTURE_ENDS)]
        if len(pictures) > 1:
            raise ValueError(
                f"image_column: {name} has several pictures ({', '.join(pictures)}); write the end of the names of "
                f"those that are meant, e.g. image_column: {pictures[0]}"
            )
        if not pictures:
            listing.left_out.append(("no picture with this name", f"{name} (.{', .'.join(ends)})"))
            return
        caption, reason = self._caption(sample)
        if reason is not None:
            listing.left_out.append((reason, name))
            return
        offset, size = sample[pictures[0]]
        listing.names.append(name)
        listing.captions.append(caption)
        listing.places.append(
            _Place(number, group, offset, size) if _enterable(self.shards[number]) else _Place(number, group)
        )

    def _caption(self, sample: dict[str, Any]) -> tuple[str, str | None]:
        """The caption of a group of members, or why there is none."""
        ends = CAPTION_ENDS if self.caption_column is None else (self.caption_column.lower(),)
        keys = CAPTION_KEYS if self.caption_column is None else (self.caption_column,)
        end = next((end for end in ends if end in sample), "json")
        if end not in sample:
            return "", "no caption with this name"
        if sample[end] is None:
            return "", f"a .{end} of more than {LONGEST_TEXT} bytes"
        try:
            text: Any = sample[end].decode("utf-8-sig")
            if end == "json":
                values = json.loads(text)
                found = [values[key] for key in keys if key in values] if isinstance(values, dict) else []
                if not found:
                    return "", f"no {' or '.join(keys)} in the .json"
                text = found[0]
        except UnicodeDecodeError:
            return "", f"the .{end} is not UTF-8"
        except (json.JSONDecodeError, RecursionError):
            return "", "the .json is no JSON"
        return (line, None) if (line := one_line(text)) else ("", "empty caption")

    def _streamed(self, number: int, indices: list[int]) -> Iterator[Sample]:
        """The pairs ``indices`` of a shard that cannot be entered in the middle."""
        wanted = {self._places[index].group: index for index in indices}
        shard, attempt, reason = self.shards[number], 0, "it is not in its shard any more"
        while wanted and attempt < TRIES:
            try:
                with self._opened(shard) as tar:

                    def payload(info: tarfile.TarInfo, end: str, tar: tarfile.TarFile = tar) -> Any:
                        picture = end == self.image_column if self.image_column else end in _PICTURE_ENDS
                        return _content(tar, info) if picture else None

                    for group, sample in enumerate(_groups(tar, shard, payload, lambda *_: None)):
                        if group in wanted:
                            index = wanted.pop(group)
                            (data,) = [value for end, value in sample.items() if isinstance(value, bytes)]
                            yield self._sample(index, lambda data=data: data)
                        if not wanted:
                            return
                break
            except (OSError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
                reason = str(error)
                if not _worth_another_try(shard, error):
                    break
                attempt += 1
                time.sleep(attempt)

        def gone() -> bytes:
            raise OSError(f"listed before, and not there when its shard was read again ({reason})")

        for index in wanted.values():
            yield self._sample(index, gone)

    @contextmanager
    def _opened(self, shard: str) -> Iterator[tarfile.TarFile]:
        if _enterable(shard):
            with tarfile.open(shard, "r:", tarinfo=_Header) as tar:
                yield tar
            return
        stream: AbstractContextManager[Any] = _fetched(shard) if _is_url(shard) else open(shard, "rb")
        with stream as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:
            yield tar


def _groups(
    tar: tarfile.TarFile,
    shard: str,
    payload: Callable[[tarfile.TarInfo, str], Any],
    refuse: Callable[[str, str], None],
) -> Iterator[dict[str, Any]]:
    """The members of a shard that share a name, together: end of the name -> ``payload`` of it, beside ``__key__``.

    Raises what tarfile raises where the shard ends early, without the group before that: it may be incomplete.
    """
    webdataset = require("webdataset.tariterators", extra="data")
    errors: list[Exception] = []

    def members() -> Iterator[dict[str, Any]]:
        seen: tuple[str, set[str]] = ("", set())
        while not errors:
            try:
                info = tar.next()
            except (tarfile.TarError, EOFError) as error:
                errors.append(error)
                return
            if info is None:
                return
            # tarfile would keep all of them.
            tar.members = []
            if info.isdir():
                continue
            if reason := _refused(info):
                refuse(reason, info.name)
                continue
            key, end = webdataset.base_plus_ext(info.name)
            if key is None:
                continue
            end = end.lower()
            if key != seen[0]:
                seen = key, set()
            if end in seen[1]:
                refuse("a second member of one name", info.name)
                continue
            seen[1].add(end)
            try:
                content = payload(info, end)
            except (tarfile.TarError, EOFError) as error:
                errors.append(error)
                content = None
            yield {"fname": info.name, "data": content, "__url__": shard}

    waiting = None
    for group in webdataset.group_by_keys(members()):
        if waiting is not None:
            yield waiting
        waiting = group
    if errors:
        raise errors[0]
    if waiting is not None:
        yield waiting


def _refused(info: tarfile.TarInfo) -> str | None:
    """Why a member is not read, or None."""
    parts = re.split(r"[/\\]", info.name)
    if info.name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:[/\\]", info.name):
        return "a member whose name leads out of the archive"
    if info.issym() or info.islnk():
        return "a member that is a link"
    if not info.isreg() or info.issparse():
        return "a member that is no plain file"
    return None


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None
    return file.read()


# ---- names of shards


def is_tar_name(name: str) -> bool:
    """Whether ``name`` (a path, a pattern or a URL) means tar files by its end."""
    return (urlsplit(name).path if _is_url(name) else name).lower().endswith(ENDS)


def _is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _enterable(shard: str) -> bool:
    """Whether a picture can be read at its place in the shard."""
    return not _is_url(shard) and shard.lower().endswith(".tar")


def shown(name: str) -> str:
    """``name`` as messages have it: a URL without user, password and query, which may be secrets."""
    if not _is_url(name):
        return name
    parts = urlsplit(name)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def expand(name: str) -> list[str]:
    """All shards that ``name`` means: ``{000..031}`` and ``{a,b}`` as a shell has them, then ``*`` and ``?`` for files.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a source that runs a command or is of another kind than paths, http and https; a broken pattern.
    """
    braces = require("braceexpand", extra="data")
    refuse_scheme(name)
    if Path(name).is_file():
        name = name.replace("{", "\\{").replace("}", "\\}")
    try:
        names = list(itertools.islice(braces.braceexpand(name), MOST_SHARDS + 1))
    except braces.UnbalancedBracesError as error:
        raise ValueError(f"dataset_name: {shown(name)}: {error}") from error
    if len(names) > MOST_SHARDS:
        raise ValueError(f"dataset_name: {shown(name)} means more than {MOST_SHARDS:,} shards")
    found: list[str] = []
    for one in names:
        refuse_scheme(one)
        if _is_url(one):
            found.append(one)
        elif Path(one).is_file():
            found.append(one)
        elif matches := sorted(path for path in glob.glob(one) if Path(path).is_file()):
            found += matches
        else:
            raise FileNotFoundError(f"dataset_name: there is no {one}")
    if wrong := [one for one in found if not is_tar_name(one)]:
        raise ValueError(f"dataset_name: {shown(wrong[0])} is no shard; their names end in {', '.join(ENDS)}")
    return found


def refuse_scheme(name: str) -> None:
    """ValueError for what is neither a path nor http(s), with the reason."""
    match = _SCHEME.match(name)
    if match is None or _is_url(name):
        return
    if match[1].lower() != "pipe" and Path(name).exists():
        return
    if match[1].lower() == "pipe":
        raise ValueError(
            "dataset_name: pipe: sources are refused: they run a command, and a config is no place for one. Write the "
            "paths of the shards, or http or https URLs"
        )
    raise ValueError(
        f"dataset_name: {match[1]}: sources are not read; write a path, or an http or https URL (or hub:OWNER/NAME for "
        "a data set on the Hugging Face hub)"
    )


# ---- URLs


class _Body:
    """The body of a response; ConnectionError if it ends before the length that was promised."""

    def __init__(self, response: Any) -> None:
        self._response, self._read = response, 0
        length = response.headers.get("Content-Length")
        self._length = int(length) if length is not None and length.isdigit() else None

    def read(self, size: int = -1) -> bytes:
        data = self._response.read(size)
        self._read += len(data)
        if not data and self._length is not None and self._read < self._length:
            raise ConnectionError(f"the connection ended after {self._read} of {self._length} bytes")
        return data


@contextmanager
def _fetched(url: str) -> Iterator[IO[bytes]]:
    request = urllib.request.Request(url, headers={"User-Agent": "apex_fast"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if not _is_url(response.geturl()):
            raise OSError("it was redirected to something that is neither http nor https")
        yield _Body(response)  # type: ignore[misc]


def _worth_another_try(shard: str, error: BaseException) -> bool:
    """Whether a failure may be the network's, so that it may go away."""
    if not _is_url(shard) or isinstance(error, tarfile.TarError):
        return False
    return not (isinstance(error, urllib.error.HTTPError) and error.code < 500)
