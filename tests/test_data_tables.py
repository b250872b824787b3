"""Tables: columns, rows that are left out, files that rows name; and real parquet and saved data sets where the
``datasets`` library is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_cases import RED, encoded, greys

from apex_fast.data.source import BrokenPictureError, TooManyBadError
from apex_fast.data.tables import Table, _split, is_table, open_table


class Rows:
    """The few methods of a ``datasets.Dataset`` that a table is made of."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        return self.columns[key] if isinstance(key, str) else {name: rows[key] for name, rows in self.columns.items()}


def grey(i: int) -> bytes:
    return encoded((i, i, i))


def test_rows_become_pairs_whatever_holds_the_picture(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "3.png").write_bytes(grey(3))
    values = [grey(0), {"bytes": grey(1), "path": "gone.png"}, {"bytes": None, "path": "sub/3.png"}, "sub/3.png"]
    rows = Rows(id=[1, 2, 3, 4], image=values, text=["a", " b\n c ", "d", "e"])
    source = Table.of(rows, "rows", folders=[tmp_path])
    assert greys(source) == [(0, "a", 0), (1, "b c", 1), (2, "d", 3), (3, "e", 3)]
    assert greys(source, 2) == [(2, "d", 3), (3, "e", 3)]
    assert source.names == [f"row {i}" for i in range(4)] and not source.warnings()


def test_rows_without_a_caption_are_counted_and_the_others_keep_their_pictures() -> None:
    rows = Rows(jpg=[grey(i) for i in range(5)], caption=["a", "", None, "d", " "])
    source = Table.of(rows, "rows", row_names=[("x.parquet", 3), ("y.parquet", 2)])
    assert greys(source) == [(0, "a", 0), (1, "d", 3)]
    assert source.names == ["x.parquet row 0", "y.parquet row 0"]
    assert source.warnings() == ["3 left out, empty caption: x.parquet row 1, x.parquet row 2, y.parquet row 1"]
    with pytest.raises(TooManyBadError, match=r"3 of 5 in rows cannot be used, and max_bad_share \(0.5\) allows 2"):
        Table.of(rows, "rows", max_bad_share=0.5)
    with pytest.raises(
        ValueError, match="nothing in rows can be used: 1 left out, empty caption: row 0; expected rows"
    ):
        Table.of(Rows(image=[grey(0)], text=[""]), "rows")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "row 0: no picture, but NoneType"),
        (7, "row 0: no picture, but int"),
        ({"bytes": None, "path": None}, "row 0: no picture"),
        (b"no picture", "row 0: cannot identify image file"),
        ("gone.png", r"row 0 \(gone.png\): .*No such file"),
        ("../secret.png", "row 0: names the file ../secret.png, outside of"),
        ("/etc/passwd", "row 0: names the file /etc/passwd, outside of"),
        ("link.png", "row 0: names the file link.png, outside of"),
    ],
)
def test_a_cell_without_a_readable_picture_is_a_broken_picture(tmp_path: Path, value: Any, message: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(RED))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    source = Table.of(Rows(image=[value], text=["a"]), "rows", folders=[folder])
    with pytest.raises(BrokenPictureError, match=message):
        next(source.samples()).open()


def test_a_file_named_where_there_is_no_folder_is_refused() -> None:
    source = Table.of(Rows(image=["a.png"], text=["a"]), "rows")
    with pytest.raises(BrokenPictureError, match="there is no folder that it could lie in"):
        next(source.samples()).open()


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        (
            ("image", "title"),
            {},
            "caption_column: write which column is meant; rows has none with a usual name; all col",
        ),
        (("image", "text", "caption"), {}, r"caption_column: .* several that could be meant \(text, caption\)"),
        (
            ("image", "jpg", "text"),
            {},
            r"image_column: .* several that could be meant \(image, jpg\); all columns: image",
        ),
        (
            ("image", "text"),
            {"image_column": "picture"},
            "image_column: rows has no column picture; it has image, text",
        ),
        (
            ("image", "text"),
            {"caption_column": "image"},
            "caption_column: image of rows holds bytes .row 0.; expected te",
        ),
    ],
)
def test_columns_that_are_not_clear_are_asked_for(columns: tuple, asked: dict, message: str) -> None:
    values = {name: [grey(1) if name in ("image", "jpg") else "a"] for name in columns}
    with pytest.raises(ValueError, match=message):
        Table.of(Rows(**values), "rows", **asked)


def test_damaged_files_count_as_much_as_the_others() -> None:
    rows = Rows(image=[grey(i) for i in range(6)], text=list("abcdef"))
    files = {"row_names": [("x", 2), ("y", 4)], "damaged": ["z (cut short)"]}
    source = Table.of(rows, "rows", **files)
    assert source.bad == 3 and source.warnings() == ["1 left out, a file that cannot be read: z (cut short)"]
    with pytest.raises(TooManyBadError, match="3 of 9 in rows"):
        Table.of(rows, "rows", **files, max_bad_share=0.2)


def test_the_split_is_train_or_the_only_one_or_asked_for() -> None:
    both, one = {"train": 1, "test": 2}, {"validation": 3}
    assert _split(both, None, "x") == 1 and _split(both, "test", "x") == 2 and _split(one, None, "x") == 3
    with pytest.raises(ValueError, match="dataset_split: x has train, test; write one of them, got dev"):
        _split(both, "dev", "x")
    with pytest.raises(ValueError, match="dataset_split: x has a, b; write one of them$"):
        _split({"a": 1, "b": 2}, None, "x")


def test_what_is_taken_for_a_table(tmp_path: Path) -> None:
    for name in ("saved/state.json", "splits/dataset_dict.json", "hub/data/train-0.parquet", "both/a.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "both" / "a.png").write_bytes(encoded())
    assert [is_table(str(tmp_path / name)) for name in ("saved", "splits", "hub", "both", ".")] == [True] * 3 + [
        False
    ] * 2
    assert is_table("hub:owner/name") and is_table("data/*.parquet") and not is_table("owner/name")


def test_a_folder_with_a_script_is_refused_before_anything_of_it_is_opened(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"open({str(ran)!r}, 'w')")
    (folder / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="holds the script data.py; code that comes with a data set is never run"):
        open_table(str(folder))
    assert not ran.exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*/\*.parquet"):
        open_table(str(tmp_path / "*.parquet"))
    with pytest.raises(ValueError, match=r"dataset_split: .*a.parquet names its files; leave dataset_split out"):
        open_table(str(tmp_path / "a.parquet"), split="train")


def test_without_datasets_the_command_that_installs_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from apex_fast.data.tables import open_table\n"
        f"try: open_table({str(tmp_path / 'a.parquet')!r})\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "datasets is needed here and is not installed: pip install 'apex_fast[data]'" in done.stdout


# ---- the real library


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


def table_of(datasets: Any, count: int, start: int = 0) -> Any:
    """A data set with an image column, as the hub has them."""
    images = [{"bytes": grey(i), "path": f"{i}.png"} for i in range(start, start + count)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    captions = [f"number {i}" for i in range(start, start + count)]
    return datasets.Dataset.from_dict({"image": images, "text": captions}, features=features)


@pytest.mark.parametrize("name", ["a.parquet", "*.parquet", "."])
def test_parquet_by_path_pattern_and_folder(datasets: Any, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    table_of(datasets, 3).to_parquet(folder / "a.parquet")
    if name == "*.parquet":
        table_of(datasets, 2, 3).to_parquet(folder / "b.parquet")
    source = open_table(str(folder / name))
    count = 5 if name == "*.parquet" else 3
    assert greys(source) == [(i, f"number {i}", i) for i in range(count)]
    if name == "*.parquet":
        assert source.names[4] == "b.parquet row 1"


def test_parquet_with_plain_bytes_and_with_paths(datasets: Any, tmp_path: Path) -> None:
    rows = {"jpg": [grey(1), grey(2)], "caption": ["a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "bytes.parquet")
    assert greys(open_table(str(tmp_path / "bytes.parquet"))) == [(0, "a", 1), (1, "b", 2)]
    (tmp_path / "7.png").write_bytes(grey(7))
    datasets.Dataset.from_dict({"file_name": ["7.png"], "text": ["c"]}).to_parquet(tmp_path / "paths.parquet")
    assert greys(open_table(str(tmp_path / "paths.parquet"))) == [(0, "c", 7)]


def test_a_truncated_parquet_file_is_left_out_and_named(datasets: Any, tmp_path: Path) -> None:
    for number in range(2):
        table_of(datasets, 4, 4 * number).to_parquet(tmp_path / f"{number}.parquet")
    path = tmp_path / "1.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    source = open_table(str(tmp_path / "*.parquet"))
    assert len(greys(source)) == 4 and source.bad == 4 and f"{path} (" in source.warnings()[0]
    with pytest.raises(ValueError, match="none of the files can be read"):
        open_table(str(path))


def test_a_saved_data_set_and_its_splits(datasets: Any, tmp_path: Path) -> None:
    table_of(datasets, 3).save_to_disk(tmp_path / "one")
    assert greys(open_table(str(tmp_path / "one"))) == [(i, f"number {i}", i) for i in range(3)]
    splits = datasets.DatasetDict({"train": table_of(datasets, 2), "test": table_of(datasets, 4)})
    splits.save_to_disk(tmp_path / "two")
    assert len(open_table(str(tmp_path / "two"))) == 2
    assert len(open_table(str(tmp_path / "two"), split="test")) == 4
    with pytest.raises(ValueError, match="has train, test; write one of them, got dev"):
        open_table(str(tmp_path / "two"), split="dev")


def test_a_kind_that_may_hold_pickles_is_refused(datasets: Any, tmp_path: Path) -> None:
    from data_cases import pairs, write_tar

    write_tar(tmp_path / "data" / "train-0.tar", pairs(2))
    with pytest.raises(
        ValueError, match="is of the kind webdataset, and parquet, arrow, json, csv, imagefolder are read"
    ):
        open_table(str(tmp_path / "data"))


def test_nothing_is_unpickled(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    import dill

    folder = tmp_path / "data"
    folder.mkdir()
    table_of(datasets, 2).to_parquet(folder / "a.parquet")
    table_of(datasets, 2).with_format("numpy").save_to_disk(tmp_path / "saved")
    (folder / "state.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not for data")

    for module in (pickle, dill):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, refuse)
    for name in (folder / "a.parquet", folder, tmp_path / "saved"):
        assert greys(open_table(str(name))) == [(0, "number 0", 0), (1, "number 1", 1)]


def test_damage_inside_of_a_file_is_named(datasets: Any, tmp_path: Path) -> None:
    table_of(datasets, 200).to_parquet(tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:2000] = bytes(1996)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"dataset_name: .*a.parquet cannot be read: "):
        open_table(str(tmp_path / "a.parquet"))
    table_of(datasets, 200).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"dataset_name: .*saved cannot be read: "):
        open_table(str(tmp_path / "saved"))


def test_a_data_set_of_the_hub(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched here: a folder stands for what ``datasets`` would fetch."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        table_of(datasets, count).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    asked = []

    def instead(function: Any) -> Any:
        def call(path: str, **options: Any) -> Any:
            asked.append((path, options))
            return function(str(folder))

        return call

    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, instead(getattr(datasets, name)))
    assert len(greys(open_table("hub:owner/name"))) == 3
    assert len(open_table("hub:owner/name@v1", split="test")) == 2
    assert asked == [("owner/name", {})] * 2 + [("owner/name", {"revision": "v1"})] * 2


def test_a_data_set_of_the_hub_that_needs_code_or_cannot_be_reached(
    datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (RuntimeError("Dataset scripts are no longer supported"), ConnectionError("Couldn't reach it")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset_builder", fail)
        with pytest.raises(ValueError, match=f"dataset_name: hub:owner/name cannot be read: {type(error).__name__}: "):
            open_table("hub:owner/name")
