"""Pictures, shards and a server of files for the tests of data sources."""

from __future__ import annotations

import functools
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from apex_fast.data.source import Source

Image = pytest.importorskip("PIL.Image")

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(
    color: Any = RED, size: tuple[int, int] = (20, 10), form: str = "PNG", mode: str = "RGB", **more: Any
) -> bytes:
    """The bytes of a picture file of one colour."""
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, form, **more)
    return file.getvalue()


def pairs(count: int, start: int = 0) -> dict[str, bytes]:
    """Members of a shard: ``count`` pictures, each of its own grey, and their captions."""
    members: dict[str, bytes] = {}
    for i in range(start, start + count):
        members[f"{i:04}.png"] = encoded((i, i, i))
        members[f"{i:04}.txt"] = f"number {i}".encode()
    return members


def write_tar(path: Path, members: dict[str, Any], mode: str = "w") -> Path:
    """A tar file. A member is its bytes, or a TarInfo that goes in as it is (its name is the key)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def json_of(**values: Any) -> bytes:
    return json.dumps(values).encode()


def greys(source: Source, start: int = 0) -> list[tuple[int, str, int]]:
    """(index, caption, red value of the middle) of every sample that is read."""
    found = []
    for sample in source.samples(start):
        picture = sample.open()
        found.append((sample.index, sample.caption, picture.getpixel((picture.width // 2, picture.height // 2))[0]))
    return found


class _Files(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; ``cut`` promises more than it sends for these names, as many times as it says."""

    cut: dict[str, int] = {}
    asked: list[str] = []

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        name = self.path.split("?")[0]
        self.asked.append(self.path)
        if self.cut.get(name, 0) > 0:
            self.cut[name] -= 1
            data = Path(self.translate_path(name)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return
        super().do_GET()


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, type[_Files]]]:
    """A server of the files of ``folder`` on this machine: its URL, and its handler, to set ``cut`` and read
    ``asked``."""
    handler = type("Files", (_Files,), {"cut": {}, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", handler
        finally:
            server.shutdown()
            thread.join()
