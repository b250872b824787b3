"""WebDataset shards: what they mean, what is left out and named, what is refused."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from data_cases import RED, encoded, greys, json_of, link, pairs, served, write_tar

pytest.importorskip("webdataset")

from apex_fast.data import tar_shards
from apex_fast.data.source import BrokenPictureError, TooManyBadError
from apex_fast.data.tar_shards import TarShards, expand, shown


def left_out(source: TarShards) -> str:
    return "\n".join(source.warnings())


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_shards.time, "sleep", lambda _: None)


# ---- names


def test_patterns_mean_what_a_shell_makes_of_them(tmp_path: Path) -> None:
    for name in ("a-00.tar", "a-01.tar", "b-00.tar", "odd{1}.tar"):
        write_tar(tmp_path / name, pairs(1))
    for pattern, expected in (
        ("a-{00..01}.tar", ["a-00.tar", "a-01.tar"]),
        ("{b,a}-00.tar", ["b-00.tar", "a-00.tar"]),
        ("*-0?.tar", ["a-00.tar", "a-01.tar", "b-00.tar"]),
        ("odd{1}.tar", ["odd{1}.tar"]),
    ):
        assert [Path(path).name for path in expand(str(tmp_path / pattern))] == expected, pattern
    with pytest.raises(FileNotFoundError, match=r"there is no .*a-02.tar"):
        expand(str(tmp_path / "a-{00..02}.tar"))
    with pytest.raises(ValueError, match="means more than 1,000,000 shards"):
        expand("http://localhost/{0..1000000}.tar")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe:cat a.tar", "pipe: sources are refused: they run a command"),
        ("PIPE:cat a.tar", "pipe: sources are refused"),
        ("{a.tar,pipe:cat b.tar}", "there is no|pipe: sources are refused"),
        ("s3://bucket/a.tar", "s3: sources are not read; write a path, or an http or https URL"),
        ("gs://bucket/a.tar", "gs: sources are not read"),
        ("ftp://host/a.tar", "ftp: sources are not read"),
        ("http://host/{a,b.tar", "http://host/.*[Uu]nbalanced"),
        ("http://host/a.zip", "http://host/a.zip is no shard; their names end in .tar, .tar.gz, .tgz"),
    ],
)
def test_other_sources_are_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        expand(name)


def test_a_command_hidden_in_a_pattern_is_not_run(tmp_path: Path) -> None:
    shard, ran = write_tar(tmp_path / "a.tar", pairs(1)), tmp_path / "ran"
    with pytest.raises(ValueError, match="pipe: sources are refused"):
        TarShards.open(f"{{{shard},pipe:touch {ran}}}")
    assert not ran.exists()


def test_messages_have_no_secrets_of_urls() -> None:
    assert shown("https://me:secret@host:8080/a.tar?token=abc#x") == "https://host:8080/a.tar"
    assert shown("data/a?b.tar") == "data/a?b.tar"


# ---- pairs


@pytest.mark.parametrize("form", ["plain", "gz", "url", "url gz"])
def test_pairs_in_the_order_of_shards_and_members(tmp_path: Path, form: str) -> None:
    suffix, mode = (".tar.gz", "w:gz") if "gz" in form else (".tar", "w")
    for shard in range(3):
        write_tar(tmp_path / f"{shard}{suffix}", pairs(4, 4 * shard), mode)
    with served(tmp_path) as (url, _):
        source = TarShards.open(f"{url if 'url' in form else tmp_path}/{{0..2}}{suffix}")
        assert source.captions == [f"number {i}" for i in range(12)] and len(source) == 12
        assert source.names[5].endswith(f"1{suffix}: 0005") and not source.warnings()
        assert greys(source) == [(i, f"number {i}", i) for i in range(12)]
        for start in (0, 1, 6, 11, 12):
            assert greys(source, start) == [(i, f"number {i}", i) for i in range(start, 12)]
    assert source.digest() is not None and source.digest()["count"] == 12


def test_samples_of_a_plain_shard_can_be_read_later(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs(3))
    samples = list(TarShards.open(str(tmp_path / "a.tar")).samples())
    assert [sample.open().getpixel((3, 3)) for sample in reversed(samples)] == [(2, 2, 2), (1, 1, 1), (0, 0, 0)]


def test_captions_of_text_and_json(tmp_path: Path) -> None:
    picture = encoded()
    members = {
        "a.jpg": encoded(RED, form="JPEG"),
        "a.txt": b"\xef\xbb\xbf two\n words ",
        "b.PNG": picture,
        "b.json": json_of(caption="from json", width=3),
        "sub/c.png": picture,
        "sub/c.json": json_of(text="in a folder"),
        "sub/c.cls": b"3",
        "README": b"no sample",
        ".hidden": b"no sample either",
    }
    path = str(write_tar(tmp_path / "a.tar", members))
    source = TarShards.open(path)
    assert source.captions == ["two words", "from json", "in a folder"] and not source.warnings()
    assert [name.rpartition(": ")[2] for name in source.names] == ["a", "b", "sub/c"]
    assert len(greys(source)) == 3


def test_the_columns_choose_among_several(tmp_path: Path) -> None:
    members = {
        "a.mask.png": encoded((9, 9, 9)),
        "a.png": encoded((7, 7, 7)),
        "a.jpg": encoded((5, 5, 5), form="JPEG"),
        "a.long.txt": b"a long one",
        "a.txt": b"a short one",
        "a.json": json_of(caption="json", alt="another"),
    }
    path = str(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(ValueError, match=r"image_column: .*a.tar: a has several pictures \(png, jpg\); write the end"):
        TarShards.open(path)
    for image, caption, expected in (
        ("png", "txt", ("a short one", 7)),
        (".PNG", "long.txt", ("a long one", 7)),
        ("mask.png", "alt", ("another", 9)),
    ):
        (found,) = greys(TarShards.open(path, image_column=image, caption_column=caption))
        assert found[1:] == expected


def test_shards_that_moved_are_the_same_data(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        for number in range(2):
            write_tar(tmp_path / folder / f"{number}.tar", pairs(2, 2 * number))
    here, there = (TarShards.open(f"{tmp_path / folder}/{{0,1}}.tar") for folder in ("here", "there"))
    assert here.names == there.names == ["0.tar: 0000", "0.tar: 0001", "1.tar: 0002", "1.tar: 0003"]
    assert here.digest() == there.digest()
    both = TarShards.open(f"{tmp_path}/{{here,there}}/0.tar")
    assert len(set(both.names)) == 4, "shards of one name are told apart by their folders"


# ---- what is left out


def test_what_cannot_be_used_is_counted_and_named_with_its_shard(tmp_path: Path) -> None:
    members = pairs(1) | {
        "empty.png": encoded(),
        "empty.txt": b"  ",
        "alone.png": encoded(),
        "words.txt": b"without a picture",
        "latin.png": encoded(),
        "latin.txt": "Bär".encode("latin-1"),
        "json.png": encoded(),
        "json.json": b"{",
        "key.png": encoded(),
        "key.json": json_of(title="x"),
        "long.png": encoded(),
        "long.txt": b"x" * (tar_shards.LONGEST_TEXT + 1),
    }
    path = "a.tar"
    source = TarShards.open(str(write_tar(tmp_path / path, members)))
    assert source.captions == ["number 0"] and source.bad == 7
    for line in (
        f"1 left out, empty caption: {path}: empty",
        f"1 left out, no caption with this name: {path}: alone",
        f"1 left out, no picture with this name: {path}: words (.txt)",
        f"1 left out, the .txt is not UTF-8: {path}: latin",
        f"1 left out, the .json is no JSON: {path}: json",
        f"1 left out, no caption or text or prompt in the .json: {path}: key",
        f"1 left out, a .txt of more than 1048576 bytes: {path}: long",
    ):
        assert line in left_out(source).splitlines()


@pytest.mark.parametrize("form", [".tar", ".tar.gz"])
def test_a_broken_picture_is_named_with_its_shard_and_the_rest_is_read(tmp_path: Path, form: str) -> None:
    members = pairs(3)
    members["0001.png"] = members["0001.png"][:40]
    source = TarShards.open(str(write_tar(tmp_path / f"a{form}", members, "w:gz" if "gz" in form else "w")))
    read = []
    for sample in source.samples():
        if sample.index == 1:
            with pytest.raises(BrokenPictureError, match=r"a\.tar.*: 0001: "):
                sample.open()
        else:
            read.append(sample.open().getpixel((3, 3))[0])
    assert read == [0, 2]


@pytest.mark.parametrize("form", ["plain", "gz", "url"])
@pytest.mark.parametrize("harm", ["in a picture", "at a header", "in a header", "garbage"])
def test_a_shard_that_is_cut_short_is_used_up_to_there(tmp_path: Path, harm: str, form: str) -> None:
    """Two shards of four pairs; the second one ends inside its third."""
    write_tar(tmp_path / "0.tar", pairs(4))
    data = write_tar(tmp_path / "1.tar", pairs(4, 4)).read_bytes()
    with tarfile.open(tmp_path / "1.tar") as tar:
        third = {member.name: member for member in tar}["0006.png"]
    cut = {
        "in a picture": data[: third.offset_data + 5],
        "at a header": data[: third.offset_data + 512],
        "in a header": data[: third.offset + 100],
        "garbage": data[: third.offset] + b"x" * (len(data) - third.offset),
    }[harm]
    (tmp_path / "1.tar").write_bytes(cut)
    if form == "gz":
        import gzip

        for number in (0, 1):
            plain = (tmp_path / f"{number}.tar").read_bytes()
            (tmp_path / f"{number}.tar.gz").write_bytes(gzip.compress(plain))
    with served(tmp_path) as (url, _):
        where = url if form == "url" else tmp_path
        source = TarShards.open(f"{where}/{{0..1}}.tar" + (".gz" if form == "gz" else ""))
        good = range(5 if harm in ("in a header", "garbage") else 6)
        assert source.captions == [f"number {i}" for i in good], "the pair before the cut may be incomplete"
        assert greys(source) == [(i, f"number {i}", i) for i in good]
    (line,) = source.warnings()
    assert line.startswith("1 left out, a shard that is damaged or cut short, used up to there: ")
    assert line.endswith(f"after {len(source) - 4} samples") and "1.tar" in line
    assert source.bad == 4 - (len(source) - 4), "it is taken to have held as many as the other"


def test_shards_that_cannot_be_read_count_as_much_as_the_others(tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", pairs(5, 5 * number))
    (tmp_path / "2.tar").write_bytes(b"this is no tar file" * 100)
    (tmp_path / "3.tar").write_bytes(b"")
    name = str(tmp_path / "{0..3}.tar")
    source = TarShards.open(name)
    assert len(source) == 10 and source.bad == 10
    (line,) = source.warnings()
    assert line.startswith(f"2 left out, a shard that cannot be read: {tmp_path}/2.tar (")
    with pytest.raises(
        TooManyBadError, match=r"10 of 20 in .* cannot be used, and max_bad_share \(0.4\) allows 8: 2 left"
    ):
        TarShards.open(name, max_bad_share=0.4)
    with pytest.raises(ValueError, match=r"nothing in .*2.tar can be used: 1 left out.*expected tar files in which"):
        TarShards.open(str(tmp_path / "2.tar"))
    empty = write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(ValueError, match=r"there is nothing in .*empty.tar; expected tar files in which"):
        TarShards.open(str(empty))


def test_members_that_leave_their_folder_and_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded())
    (tmp_path / "secret.txt").write_text("a secret")
    members: dict = {
        "../secret.png": encoded(),
        "../secret.txt": b"outside",
        "/etc/a.png": encoded(),
        "sub/../../b.png": encoded(),
        "C:\\c.png": encoded(),
        "..\\d.png": encoded(),
        "e.png": link(tarfile.SYMTYPE, str(tmp_path / "secret.png")),
        "e.txt": b"a symbolic link",
        "f.png": link(tarfile.LNKTYPE, "0000.png"),
        "f.txt": b"a hard link",
        "g.txt": link(tarfile.FIFOTYPE, ""),
        "h.png": encoded(),
        "h.txt": link(tarfile.SYMTYPE, str(tmp_path / "secret.txt")),
        "folder": link(tarfile.DIRTYPE, ""),
        **pairs(2),
    }
    path = "a.tar"
    source = TarShards.open(str(write_tar(tmp_path / path, members)))
    assert source.captions == ["number 0", "number 1"] and "secret" not in " ".join(source.captions)
    text = left_out(source)
    assert f"6 left out, a member whose name leads out of the archive: {path}: ../secret.png, " in text
    assert f"3 left out, a member that is a link: {path}: e.png, {path}: f.png, {path}: h.txt" in text
    assert f"1 left out, a member that is no plain file: {path}: g.txt" in text
    with pytest.raises(TooManyBadError, match="leads out of the archive"):
        TarShards.open(str(tmp_path / path), max_bad_share=0.05)


def test_a_second_member_of_one_name_is_named_and_the_first_is_used(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": encoded((1, 1, 1)), "a.txt": b"first"})
    with tarfile.open(path, "a") as tar:
        tar.addfile(info := tarfile.TarInfo("a.txt"))
        assert info.size == 0
    source = TarShards.open(str(path))
    assert source.captions == ["first"] and "a second member of one name" in left_out(source)


# ---- URLs


def test_a_connection_that_breaks_is_tried_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs(40))
    with served(tmp_path) as (url, server):
        server.cut["/a.tar"] = 2
        source = TarShards.open(f"{url}/a.tar?token=secret")
        assert len(source) == 40 and not source.warnings() and len(server.asked) == 3
        server.cut["/a.tar"] = 2
        assert greys(source) == [(i, f"number {i}", i) for i in range(40)]
        assert "secret" in server.asked[0] and "secret" not in " ".join([source.label, *source.names])


def test_a_connection_that_keeps_breaking_is_left_out_and_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", pairs(40))
    with served(tmp_path) as (url, server):
        server.cut["/b.tar"] = 99
        source = TarShards.open(f"{url}/{{a,b}}.tar")
        assert len(source) == 40 and source.bad == 40
        (line,) = source.warnings()
        assert "b.tar (the connection ended after" in line
        server.cut["/a.tar"] = 99
        broken = 0
        for sample in source.samples():
            try:
                sample.open()
            except BrokenPictureError as error:
                assert "not there when its shard was read again (the connection ended after" in str(error)
                broken += 1
        assert 0 < broken < 40


def test_a_url_without_a_shard_is_asked_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs(2))
    with served(tmp_path) as (url, server):
        source = TarShards.open(f"{url}/{{a,b}}.tar")
        assert server.asked == ["/a.tar", "/b.tar"]
    assert "a shard that cannot be read" in left_out(source) and "404" in left_out(source)


def test_pictures_that_went_away_are_broken_pictures(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(2))
    source = TarShards.open(str(path))
    path.unlink()
    for sample in source.samples():
        with pytest.raises(BrokenPictureError, match="No such file"):
            sample.open()


def test_no_program_is_started_and_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle
    import subprocess

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not for data")

    members = pairs(2) | {"0000.pyd": pickle.dumps([1]), "0000.pth": b"x", "0001.pkl": pickle.dumps([1])}
    write_tar(tmp_path / "a.tar", dict(sorted(members.items())))
    with served(tmp_path) as (url, _):
        monkeypatch.setattr(subprocess, "Popen", refuse)
        monkeypatch.setattr(pickle, "loads", refuse)
        for where in (str(tmp_path), url):
            assert len(greys(TarShards.open(f"{where}/a.tar"))) == 2
