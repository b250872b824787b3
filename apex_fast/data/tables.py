"""Tables with a column of pictures and one of captions, read by the ``datasets`` library: parquet files, what
``Dataset.save_to_disk`` wrote, a folder as the Hugging Face hub has them, and data sets on the hub itself.

``datasets`` converts everything but its own saved folders once, into Arrow files in its cache (``HF_DATASETS_CACHE``),
which take as much room as the data; after that rows are mapped from there. Pictures stay encoded until they are read.

Code that comes with a data set is never run: a folder with a loading script is refused before it is opened
(``datasets`` itself refuses those on the hub), and so is every builder but those that read plain tables and pictures. A
cell that names a file instead of holding a picture is read only inside the folder of the table (or the cache, for what
was fetched).
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_fast.data.pictures import SUFFIXES, open_picture
from apex_fast.data.source import HUB, BrokenPictureError, Sample, Source, one_line
from apex_fast.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_NAMES = ("image", "img", "picture", "jpg", "png", "webp", "file_name", "image_path")
CAPTION_NAMES = ("text", "caption", "prompt", "txt")
BUILDERS = ("parquet", "arrow", "json", "csv", "imagefolder")
"""The builders of ``datasets`` whose data is read: none of them runs code or reads pickles."""

_SAVED = ("state.json", "dataset_dict.json")


@dataclass
class Table(Source):
    """Pairs that are rows of a table.

    Attributes:
        rows: ``rows[index]`` is a dict from column to value.
        image_column: values are the bytes of a picture file, a dict of ``bytes`` and ``path``, or a path.
        numbers: the row of each pair.
        folders: where files may lie that rows name; relative paths are meant inside the first.
    """

    rows: Any = None
    image_column: str = ""
    numbers: list[int] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)

    @staticmethod
    def of(
        rows: Any,
        label: str,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        max_bad_share: float = 1.0,
        folders: list[Path] | None = None,
        row_names: list[tuple[str, int]] | None = None,
        damaged: list[str] | None = None,
    ) -> Table:
        """The pairs of ``rows``, which has ``column_names``, a length, ``rows[i]`` and ``rows[column]``.

        row_names: (file, number of its rows) in order, to name rows by. damaged: files that could not be read.

        Raises:
            ValueError: no such columns, nothing that can be used, or too little of it.
        """
        columns = list(rows.column_names)
        image = _column(columns, image_column, "image_column", IMAGE_NAMES, label)
        caption = _column(columns, caption_column, "caption_column", CAPTION_NAMES, label)
        found = Table(label, max_bad_share=max_bad_share, rows=rows, image_column=image, folders=folders or [])
        files = row_names or [("", len(rows))]
        for file in damaged or []:
            # What it held is not known: as many rows as the others have.
            count = max(1, round(sum(n for _, n in files) / len(files)))
            found.leave_out("a file that cannot be read", file, count=count)
        names = (f"{file} row {row}".strip() for file, count in files for row in range(count))
        for number, (name, text) in enumerate(zip(names, rows[caption], strict=True)):
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"caption_column: {caption} of {label} holds {type(text).__name__} ({name}); expected texts"
                )
            if line := one_line(text):
                found.names.append(name)
                found.captions.append(line)
                found.numbers.append(number)
            else:
                found.leave_out("empty caption", name)
        found.listed()
        return found

    def samples(self, start: int = 0) -> Iterator[Sample]:
        for index in range(start, len(self)):
            yield Sample(index, self.names[index], self.captions[index], lambda index=index: self._picture(index))

    def _picture(self, index: int) -> Image:
        name = self.names[index]
        value = self.rows[self.numbers[index]][self.image_column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return open_picture(value, name)
        if not value or not isinstance(value, str):
            raise BrokenPictureError(f"{name}: no picture, but {type(value).__name__}")
        if not self.folders:
            raise BrokenPictureError(f"{name}: names the file {value}, and there is no folder that it could lie in")
        path = self.folders[0] / value
        if not any(path.resolve().is_relative_to(folder.resolve()) for folder in self.folders):
            raise BrokenPictureError(f"{name}: names the file {value}, outside of {self.folders[0]}")
        return open_picture(path, f"{name} ({value})")

    def _expected(self) -> str:
        return "rows with a picture and a caption (image_column and caption_column name the columns)"


def _column(columns: list[str], asked: str | None, key: str, usual: tuple[str, ...], label: str) -> str:
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"{key}: {label} has no column {asked}; it has {', '.join(columns)}")
        return asked
    found = [name for name in columns if name.lower() in usual]
    if len(found) != 1:
        what = f"several that could be meant ({', '.join(found)})" if found else "none with a usual name"
        raise ValueError(f"{key}: write which column is meant; {label} has {what}; all columns: {', '.join(columns)}")
    return found[0]


# ---- opening


def is_table(name: str) -> bool:
    """Whether ``name`` means a table, as far as its name and the files at that path tell."""
    if name.lower().startswith(HUB) or name.lower().endswith(".parquet"):
        return True
    folder = Path(name)
    if not folder.is_dir():
        return False
    if any((folder / file).is_file() for file in _SAVED):
        return True
    # A folder of pictures may hold tables as well; the pictures are what was meant then.
    return not _holds(folder, SUFFIXES) and _holds(folder, (".parquet", ".arrow"))


def _holds(folder: Path, suffixes: tuple[str, ...]) -> bool:
    return any(path.suffix.lower() in suffixes for path in folder.rglob("*"))


def open_table(
    name: str,
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    max_bad_share: float = 1.0,
) -> Table:
    """The table that ``name`` means; see the module.

    split: null is ``train``, or the only one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is refused, no such split or column, nothing that can be used, or too little of it.
        ImportError: ``datasets`` is missing.
    """
    row_names: list[tuple[str, int]] | None = None
    damaged: list[str] = []
    if name.lower().endswith(".parquet"):
        if split is not None:
            raise ValueError(f"dataset_split: {name} names its files; leave dataset_split out, or write their folder")
        files = [Path(name)] if Path(name).is_file() else [Path(path) for path in sorted(glob.glob(name))]
        if not files:
            raise FileNotFoundError(f"dataset_name: there is no {name}")
        datasets = require("datasets", extra="data")
        row_names, damaged, files = _rows_of(files)
        with _reading(name, datasets):
            rows = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        folders = [files[0].parent]
    elif any((Path(name) / file).is_file() for file in _SAVED):
        datasets = require("datasets", extra="data")
        with _reading(name, datasets):
            found = datasets.load_from_disk(name)
        rows, folders = _split(found, split, name), [Path(name)]
    else:
        hub = name.lower().startswith(HUB)
        if not hub and (script := Path(name) / f"{Path(name).resolve().name}.py").is_file():
            raise ValueError(
                f"dataset_name: {name} holds the script {script.name}; code that comes with a data set is never run. "
                "Write its .parquet files, or convert it"
            )
        datasets = require("datasets", extra="data")
        path, _, revision = name[len(HUB) :].partition("@") if hub else (name, "", "")
        options = {"revision": revision} if revision else {}
        with _reading(name, datasets):
            builder = type(datasets.load_dataset_builder(path, **options)).__module__.rpartition(".")[2]
        if builder not in BUILDERS:
            raise ValueError(
                f"dataset_name: {name} is of the kind {builder}, and {', '.join(BUILDERS)} are read; write the files "
                "themselves (shards by their paths or URLs)"
            )
        with _reading(name, datasets):
            found = datasets.load_dataset(path, **options)
        rows = _split(found, split, name)
        # What was fetched lies in two caches, some of it by a link from one to the other.
        hub_cache = require("huggingface_hub", extra="data").constants.HF_HUB_CACHE
        folders = [*([] if hub else [Path(name)]), Path(datasets.config.HF_DATASETS_CACHE), Path(hub_cache)]
    # A saved data set may ask for its rows as tensors.
    rows = rows.with_format(None)
    pictures = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    for column in pictures:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    if image_column is None and len(pictures) == 1:
        image_column = pictures[0]
    return Table.of(
        rows,
        name,
        image_column=image_column,
        caption_column=caption_column,
        max_bad_share=max_bad_share,
        folders=folders,
        row_names=row_names,
        damaged=damaged,
    )


@contextmanager
def _reading(name: str, datasets: Any) -> Iterator[None]:
    """What ``datasets`` and its parts raise, as a ValueError that begins with the key."""
    arrow = require("pyarrow", extra="data")
    try:
        yield
    except (datasets.exceptions.DatasetsError, arrow.ArrowException, OSError, RuntimeError, ValueError) as error:
        # The outermost says only that it could not be generated.
        reason = error.__cause__ or error
        raise ValueError(f"dataset_name: {name} cannot be read: {type(reason).__name__}: {reason}") from error


def _rows_of(files: list[Path]) -> tuple[list[tuple[str, int]], list[str], list[Path]]:
    """(name, number of rows) of each file that can be read, the names of the others, and the files that can be read."""
    parquet, arrow = require("pyarrow.parquet", extra="data"), require("pyarrow", extra="data")
    rows: list[tuple[str, int]] = []
    damaged: list[str] = []
    good: list[Path] = []
    for file in files:
        try:
            rows.append((file.name, parquet.read_metadata(file).num_rows))
            good.append(file)
        except (arrow.ArrowException, OSError) as error:
            damaged.append(f"{file} ({error})")
    if not good:
        raise ValueError(f"dataset_name: none of the files can be read: {'; '.join(damaged)}")
    return rows, damaged, good


def _split(found: Any, split: str | None, name: str) -> Any:
    """One split of what ``datasets`` returned: a mapping of splits, or one of them."""
    if not isinstance(found, dict):
        if split is not None and str(found.split) != split:
            raise ValueError(f"dataset_split: {name} holds the split {found.split} alone; leave dataset_split out")
        return found
    names = list(found)
    wanted = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if wanted not in names:
        raise ValueError(
            f"dataset_split: {name} has {', '.join(names)}; write one of them" + (f", got {split}" if split else "")
        )
    return found[wanted]
