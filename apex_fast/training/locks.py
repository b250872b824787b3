"""One writer for a folder: a lock that the operating system takes back by itself when its process ends, however it
ends.

The lock is ``flock`` on ``FOLDER/.lock``. The file is removed when the lock is given back; one that a killed process
has left holds nothing and is taken over. Within one process the newest holder has the lock, so that a second trainer
can go on where a first one was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from apex_fast.training.settings import SettingsError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
PATIENCE = 5.0
"""Seconds that a process which was just killed may take to be gone."""
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_held: dict[Path, FolderLock] = {}
_told: set[Path] = set()


class FolderLock:
    """A folder that this process writes into; made by :func:`hold`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._process = os.getpid()

    @property
    def held(self) -> bool:
        """Whether others are kept out."""
        return self._descriptor is not None

    def release(self) -> None:
        """Lets others write; does nothing the second time. Folders that were made for the lock alone and are still
        empty are removed."""
        descriptor, self._descriptor = self._descriptor, None
        # A forked process has a copy of the descriptor, and the lock is its parent's.
        if descriptor is None or os.getpid() != self._process:
            return
        if _held.get(self.folder) is self:
            del _held[self.folder]
        with contextlib.suppress(OSError):
            if _is_at(descriptor, self.folder / LOCK):
                os.unlink(self.folder / LOCK)
            for made in self._made:
                made.rmdir()
        os.close(descriptor)


def hold(folder: str | Path, say: Callable[[str], None], *, otherwise: str = "write another output_dir") -> FolderLock:
    """Keeps other processes from holding ``folder`` until the lock is released or this process ends. The folder is
    made. Where the file system has no locks, ``say`` is told, once a process, and nobody is kept out.

    otherwise: what to do instead of stopping the other process, for the error.

    Raises:
        SettingsError: another process holds it.
    """
    lock = FolderLock(Path(folder).resolve())
    before = _held.get(lock.folder)
    if before is not None and before._process == lock._process:
        lock._descriptor, before._descriptor, lock._made = before._descriptor, None, before._made
        _held[lock.folder] = lock
        return lock
    try:
        for missing in [p for p in (lock.folder, *lock.folder.parents) if not p.exists()][::-1]:
            missing.mkdir(exist_ok=True)
            lock._made.insert(0, missing)
        lock._descriptor = _locked(lock.folder / LOCK)
    except BlockingIOError:
        raise SettingsError(
            f"another process{_holder(lock.folder / LOCK)} writes into {folder}; stop it or {otherwise}"
        ) from None
    except (OSError, AttributeError) as error:
        reason = "this system has no flock" if isinstance(error, AttributeError) else str(error)
        if lock.folder not in _told:
            _told.add(lock.folder)
            say(f"careful: {folder} cannot be locked ({reason}): see to it that no other process writes into it")
        return lock
    _held[lock.folder] = lock
    return lock


def _locked(path: Path) -> int:
    """A descriptor of ``path`` that has the lock. BlockingIOError if another process has it, OSError or AttributeError
    if there are no locks here."""
    flock, end = fcntl.flock, time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before may have removed the file between the two calls.
            if _is_at(descriptor, path):
                with contextlib.suppress(OSError):  # only for the words of an error
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _TAKEN:
                raise
            if time.monotonic() >= end:
                raise BlockingIOError from error
            time.sleep(0.1)
        except BaseException:
            os.close(descriptor)
            raise
        else:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return f" (process {text})" if text else ""
