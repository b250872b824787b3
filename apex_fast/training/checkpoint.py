"""Checkpoints: safetensors and JSON (nothing is ever unpickled), complete or absent, found again by their step.

A checkpoint is a folder ``checkpoint-<step>/``. It is written under another name, flushed to the disk and then renamed,
so that a process killed at any moment leaves either the whole folder or none; ``manifest.json`` lists every file with
its size and SHA-256, so that a folder damaged later (a partial copy, a flipped bit) is recognised too: by its sizes
wherever checkpoints are listed, by its contents where a run goes on from one. Replacing a folder takes two renames; the
old one, set aside by the first, is put back at the next start if a kill kept the second from happening.

Several processes write one folder together, which they must see under the same path. Where the network is sharded
(FSDP2) each writes its share: tensors are gathered one at a time and kept, whole, by the process that has least to
write so far, and ``<name>.json`` says which file holds which. So no process holds more than a part of the model, and
what is read back needs no more than the number of processes that reads it: each takes its rows of every tensor. Only
when all have written is the folder renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from apex_fast.training.processes import Processes

MANIFEST = "manifest.json"
BEST = "best.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_DAMAGED = re.compile(r"^damaged-checkpoint-\d+$")
_PARTIAL = ".partial-"
_REPLACED = f"{_PARTIAL}replaced-"
_LEFTOVER = re.compile(r"^\.(.+)\.partial-(?:\d+|replaced-\d+|removed)$")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete or does not fit; the message says what to do."""


# ---- state trees: nested dicts, lists, numbers and tensors as one JSON and one safetensors file


class Share:
    """The tensors that this process writes of those that all processes hold together.

    ``writers`` processes write, of which this is number ``rank``. Every process adds the same tensors in the same
    order; of sharded ones the parts are gathered here.
    """

    def __init__(self, processes: Processes | None) -> None:
        shared = processes is not None and processes.sharded
        self.rank, self.writers = (processes.rank, processes.world) if shared else (0, 1)  # type: ignore[union-attr]
        self.tensors: dict[str, Tensor] = {}
        self._bytes = [0] * self.writers
        self._storages: set[int] = set()

    def add(self, name: str, value: Tensor) -> int:
        """Takes ``value`` to be written under ``name``, if this process is to write it; the number of the one that
        is."""
        from apex_fast.parts import whole

        tensor = whole(value)
        writer = self._bytes.index(min(self._bytes))
        self._bytes[writer] += tensor.numel() * tensor.element_size()
        if writer == self.rank:
            tensor = tensor.to("cpu").contiguous()
            # safetensors refuses two names for one memory; the second gets its own.
            if tensor.numel() and tensor.untyped_storage().data_ptr() in self._storages:
                tensor = tensor.clone()
            self._storages.add(tensor.untyped_storage().data_ptr())
            self.tensors[name] = tensor
        return writer

    @property
    def bytes(self) -> int:
        """Of all that was added, in every process."""
        return sum(self._bytes)

    def file(self, name: str, writer: int) -> str:
        """The name of the file that ``writer`` writes."""
        number = f"-{writer + 1:05d}-of-{self.writers:05d}" if self.writers > 1 else ""
        return f"{name}{number}.safetensors"

    def write(self, folder: Path, name: str, metadata: dict[str, str] | None = None) -> None:
        """Writes this process's file, if it has anything to write."""
        if self.tensors:
            save_file(self.tensors, str(folder / self.file(name, self.rank)), metadata=metadata)


def save_state(folder: Path, name: str, state: Any, processes: Processes | None = None) -> None:
    """Writes the tree ``state`` to ``<name>.json`` and, if it holds tensors, ``<name>.safetensors``, or one such file
    for each process where the network is sharded over ``processes``.

    Trees are made of dicts with text or whole-number keys, lists, tuples, tensors, texts, numbers, truth values and
    None; TypeError for anything else (which would need pickle)."""
    share = Share(processes)

    def pack(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            writer = share.add(path, value)
            return {"tensor": path} if share.writers == 1 else {"tensor": path, "file": share.file(name, writer)}
        if isinstance(value, Mapping):
            if any(not isinstance(k, (str, int)) or isinstance(k, bool) for k in value):
                raise TypeError(f"{name}: {path or 'the state'} has keys that are neither text nor whole numbers")
            return {"items": [[k, pack(v, f"{path}.{k}" if path else str(k))] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [pack(v, f"{path}.{i}" if path else str(i)) for i, v in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise TypeError(
            f"{name}: {path or 'the state'} is a {type(value).__name__}, which JSON and safetensors cannot hold"
        )

    tree = pack(state, "")

    def write() -> None:
        if share.rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
        share.write(folder, name)

    if processes is None:
        write()
    else:
        processes.later(write)


def load_state(folder: Path, name: str) -> Any:
    """The tree that :func:`save_state` wrote, tensors on the CPU. CheckpointError if a file is missing."""
    file = folder / f"{name}.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {name}.json: it was written by another version or for another kind of run"
        )
    files: dict[str, dict[str, Tensor]] = {}

    def unpack(node: dict[str, Any]) -> Any:
        (kind, value), *_ = node.items()
        if kind == "tensor":
            source = node.get("file", f"{name}.safetensors")
            if source not in files:
                if Path(source).name != source:
                    raise CheckpointError(f"{file} names {source}, which is not a file beside it; it was changed")
                files[source] = read_tensors(folder / source)
            if value not in files[source]:
                raise CheckpointError(f"{folder / source} has no {value}, which {file.name} looks for there")
            return files[source][value]
        if kind == "items":
            return {k: unpack(v) for k, v in value}
        if kind == "list":
            return [unpack(v) for v in value]
        return tuple(unpack(v) for v in value) if kind == "tuple" else value

    return unpack(_read_json(file))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; their memory is the file's, read when it is looked at.
    CheckpointError if it is damaged or missing."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; copy the checkpoint again or take an earlier one")
    try:
        return load_file(str(file))
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error}); it was cut off or changed, so copy it again or take an "
            "earlier checkpoint"
        ) from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{file} is no JSON ({error}); it was cut off or changed, so copy it again or take an earlier checkpoint"
        ) from error


def save_json(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    """Writes plain values to ``<name>.json``."""
    (folder / f"{name}.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def load_json(folder: Path, name: str) -> dict[str, Any]:
    """What :func:`save_json` wrote. CheckpointError if the file is missing."""
    file = folder / f"{name}.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {name}.json; is it the checkpoint of a training run?")
    return _read_json(file)


# ---- random states


def random_states(generators: Mapping[str, torch.Generator], device: torch.device | None = None) -> dict[str, Any]:
    """Every random state that this process depends on: torch's, that of ``device`` if it is a GPU, Python's, numpy's
    and the named ``generators``."""
    on_gpu = device is not None and device.type == "cuda"
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if on_gpu else [],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "generators": {name: generator.get_state() for name, generator in generators.items()},
    }


def restore_random_states(
    states: Mapping[str, Any], generators: Mapping[str, torch.Generator], device: torch.device | None = None
) -> None:
    """Puts back what :func:`random_states` took. CheckpointError if the named generators differ."""
    if set(states["generators"]) != set(generators):
        raise CheckpointError(
            f"random states of {sorted(states['generators'])} were saved, {sorted(generators)} are needed"
        )
    torch.set_rng_state(states["torch"])
    if states["cuda"] and device is not None and device.type == "cuda":
        # Earlier versions kept the states of all GPUs that they saw.
        index = torch.cuda.current_device() if device.index is None else device.index
        own = states["cuda"][index if index < len(states["cuda"]) else 0]
        torch.cuda.set_rng_state(own, device)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    for name, generator in generators.items():
        generator.set_state(states["generators"][name])


# ---- folders


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def write_folder(target: Path, write: Callable[[Path], None], processes: Processes | None = None) -> None:
    """Calls ``write(folder)`` on a new folder and makes it appear as ``target`` in one step, with its manifest, once it
    is on the disk. Several ``processes`` call it together, and ``write`` runs in each of them.

    An existing ``target`` is replaced: for a moment there is none, and a process killed right then leaves the old one
    to :func:`restore_replaced`. If ``write`` raises in any process, nothing changes; CheckpointError if that was for
    want of space."""
    from apex_fast.training.processes import Processes

    team = Processes() if processes is None else processes
    partial = Path(team.on_main(lambda: _begin(target)))
    old = target.parent / f".{target.name}{_REPLACED}{os.getpid()}"
    mask = os.umask(0)
    os.umask(mask)

    def guarded(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            if not no_space(error):
                raise
            # The folder goes once all processes have ended (below): another one may still be writing into it.
            written = sum(p.stat().st_size for p in _files(partial)) if partial.is_dir() else 0
            raise CheckpointError(_told_no_space(target, written, error)) from error

    def settle() -> dict[str, Any]:
        """Flushes and hashes this process's share of the files, whoever has written them."""
        entries = {}
        for path in _files(partial)[team.rank :: team.world]:
            # safetensors makes files for their owner alone; a run is shared like any other folder.
            path.chmod(0o666 & ~mask)
            _flush(path)
            entries[str(path.relative_to(partial))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        return entries

    def publish() -> None:
        manifest = partial / MANIFEST
        files = {name: entry for part in parts for name, entry in part.items()}
        manifest.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1), encoding="utf-8")
        manifest.chmod(0o666 & ~mask)
        for path in [manifest, partial, *(p for p in partial.rglob("*") if p.is_dir())]:
            _flush(path)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(partial, target)
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def written() -> None:
        write(partial)
        team.raise_late()

    try:
        team.together(lambda: guarded(written))
        parts = team.together(lambda: guarded(settle))
        team.on_main(lambda: guarded(publish))
    except BaseException:
        if team.is_main:
            if old.exists() and not target.exists():
                os.rename(old, target)
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _begin(target: Path) -> str:
    """A new folder beside ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}{_PARTIAL}{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return str(partial)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def no_space(error: BaseException) -> bool:
    """Whether a file could not be written for want of space: of the disk, a quota or a limit on files."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors writes by itself and tells the reason in words.
    return isinstance(error, SafetensorError) and any(
        f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    )


def _told_no_space(target: Path, written: int, error: BaseException) -> str:
    whole = checkpoints(target.parent)
    needed = max([written, *(sum(p.stat().st_size for p in _files(folder)) for folder in whole)])
    free = shutil.disk_usage(target.parent).free
    kept = f"whole are {', '.join(p.name for p in whole)}" if whole else "there is no checkpoint yet"
    return (
        f"{target} could not be written, there is no space for it ({error}): it needs at least {needed / 1e6:,.1f} MB "
        f"and {target.parent} has {free / 1e6:,.1f} MB left. Nothing half-written was kept; {kept}. Make space and go "
        "on with --resume_from_checkpoint latest"
    )


def replaced(target: Path) -> Path | None:
    """The old ``target`` that a killed :func:`write_folder` has set aside while there is no new one, or None."""
    if target.exists() or not target.parent.is_dir():
        return None
    return next((p for p in target.parent.iterdir() if p.name.startswith(f".{target.name}{_REPLACED}")), None)


def restore_replaced(output_dir: str | Path) -> None:
    """Puts back every folder of a run that a killed :func:`write_folder` has set aside without a new one in its place.
    For the process that writes into the run; who only reads takes :func:`replaced`."""
    for path in _leftovers(output_dir):
        target = path.parent / _LEFTOVER.sub(r"\1", path.name)
        if (old := replaced(target)) is not None:
            os.rename(old, target)


def clear_leftovers(output_dir: str | Path) -> None:
    """Removes what killed processes left half-written or half-removed; call :func:`restore_replaced` before."""
    for path in _leftovers(output_dir):
        shutil.rmtree(path, ignore_errors=True)


def _leftovers(output_dir: str | Path) -> list[Path]:
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _LEFTOVER.match(p.name) and p.is_dir())


def damage(folder: Path, *, contents: bool = False) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file of its manifest is there in full.

    contents: read every file and compare its SHA-256, which takes as long as reading the checkpoint.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}"
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return f"its {MANIFEST} is unreadable"
    for name, entry in entries.items():
        path = folder / name
        size, digest = (entry["bytes"], entry["sha256"]) if isinstance(entry, dict) else (entry, None)
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if contents and digest is not None and _digest(path) != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    return [p for p in _named(output_dir) if damage(p) is None]


def _named(output_dir: str | Path) -> list[Path]:
    """Every folder called ``checkpoint-<step>``, whole or not, oldest step first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and _NAME.match(p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.match(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is not named checkpoint-<step>")
    return int(match.group(1))


def resolve_checkpoint(
    resume_from_checkpoint: str, output_dir: str | Path, say: Callable[[str], None] | None = None
) -> Path:
    """The folder to resume from: a path, a name inside ``output_dir``, or "latest" (the newest whole one).

    Contents are checked. With "latest" a damaged checkpoint is renamed to ``damaged-checkpoint-<step>``, which ``say``
    is told, and the one before it is taken.

    Raises CheckpointError if there is none, or if the one named is damaged."""
    if resume_from_checkpoint == "latest":
        for folder in reversed(_named(output_dir)):
            if (problem := damage(folder, contents=True)) is None:
                return folder
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
            if say is not None:
                say(f"careful: {folder} is damaged: {problem}. It is {aside.name} now, and the one before it is taken")
        raise CheckpointError(
            f"resume_from_checkpoint=latest: {output_dir} has no complete checkpoint; leave the key out to start at "
            "step 0, with --overwrite_output_dir if the folder holds an older run"
        )
    for folder in (Path(resume_from_checkpoint), Path(output_dir) / resume_from_checkpoint):
        if folder.is_dir():
            if (problem := damage(folder, contents=True)) is not None:
                others = ", ".join(p.name for p in checkpoints(output_dir)) or "none"
                raise CheckpointError(
                    f"{folder} is not a complete checkpoint: {problem}. Complete ones in {output_dir}: {others}"
                )
            return folder
    names = ", ".join(p.name for p in checkpoints(output_dir)) or "none"
    raise CheckpointError(
        f"resume_from_checkpoint={resume_from_checkpoint}: no such folder. Complete checkpoints in {output_dir}: "
        f"{names}"
    )


def never_saved(output_dir: str | Path) -> bool:
    """Whether there is a run that ended before its first checkpoint, so that nothing is lost by beginning it again."""
    folder = Path(output_dir)
    saved = (folder / "model").exists() or _named(folder) or damaged(folder)
    return (folder / "metrics.jsonl").is_file() and not saved


def damaged(output_dir: str | Path) -> list[Path]:
    """The checkpoints that :func:`resolve_checkpoint` has set aside."""
    folder = Path(output_dir)
    return sorted(p for p in folder.iterdir() if _DAMAGED.match(p.name) and p.is_dir()) if folder.is_dir() else []


def set_aside(output_dir: str | Path) -> list[str]:
    """What the end of a run has to say of damaged checkpoints, which no limit removes; at most one line."""
    if not (found := damaged(output_dir)):
        return []
    taken = sum(p.stat().st_size for folder in found for p in _files(folder))
    names = ", ".join(p.name for p in found)
    return [
        f"careful: {output_dir} still has {names} ({taken / 1e6:,.1f} MB), which nothing reads; delete what you "
        "do not want to look into"
    ]


def prune(output_dir: str | Path, keep: int | None) -> None:
    """Removes the oldest complete checkpoints beyond the ``keep`` newest (None keeps all) and the best one, and what
    killed processes left half-written."""
    folder = Path(output_dir)
    clear_leftovers(folder)
    if keep is not None:
        best = (read_best(folder) or {}).get("checkpoint")
        for path in checkpoints(folder)[: -keep or None]:
            if path.name == best:
                continue
            # Renamed first: a kill during the removal leaves a partial folder, not a damaged checkpoint.
            doomed = folder / f".{path.name}{_PARTIAL}removed"
            os.rename(path, doomed)
            shutil.rmtree(doomed)


# ---- the best one


def write_best(output_dir: str | Path, checkpoint: Path, metric: str, value: float) -> None:
    """Notes in ``best.json`` that ``checkpoint`` has the best ``value`` of ``metric`` so far."""
    folder = Path(output_dir)
    entry = {"checkpoint": checkpoint.name, "metric": metric, "value": value}
    temporary = folder / f"{BEST}.new"
    temporary.write_text(json.dumps(entry) + "\n", encoding="utf-8")
    os.replace(temporary, folder / BEST)


def read_best(output_dir: str | Path) -> dict[str, Any] | None:
    """What :func:`write_best` noted, while that checkpoint is there; else None."""
    try:
        found = json.loads((Path(output_dir) / BEST).read_text(encoding="utf-8"))
        return found if (Path(output_dir) / found["checkpoint"]).is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
