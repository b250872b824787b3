"""Checkpoints: safetensors and JSON (nothing is ever unpickled), complete or absent, found again by their step.

A checkpoint is a folder ``checkpoint-<step>/``. It is written under another name, flushed to the disk and then renamed,
so that a process killed at any moment leaves either the whole folder or none; ``manifest.json`` lists every file with
its size and SHA-256, so that a folder damaged later (a partial copy, a flipped bit) is recognised too: by its sizes
wherever checkpoints are listed, by its contents where a run goes on from one. Replacing a folder takes two renames; the
old one, set aside by the first, is put back at the next start if a kill kept the second from happening.
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
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_PARTIAL = ".partial-"
_REPLACED = f"{_PARTIAL}replaced-"
_LEFTOVER = re.compile(r"^\.(.+)\.partial-(?:\d+|replaced-\d+|removed)$")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete or does not fit; the message says what to do."""


# ---- state trees: nested dicts, lists, numbers and tensors as one JSON and one safetensors file


def save_state(folder: Path, name: str, state: Any) -> None:
    """Writes the tree ``state`` to ``<name>.json`` and, if it holds tensors, ``<name>.safetensors``.

    Trees are made of dicts with text or whole-number keys, lists, tuples, tensors, texts, numbers, truth values and
    None; TypeError for anything else (which would need pickle)."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()

    def pack(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensor = value.detach().to("cpu").contiguous()
            # safetensors refuses two names for one memory; the second gets its own.
            if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
                tensor = tensor.clone()
            storages.add(tensor.untyped_storage().data_ptr())
            tensors[path] = tensor
            return {"tensor": path}
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
    (folder / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
    if tensors:
        save_file(tensors, str(folder / f"{name}.safetensors"))


def load_state(folder: Path, name: str) -> Any:
    """The tree that :func:`save_state` wrote, tensors on the CPU. CheckpointError if a file is missing."""
    file = folder / f"{name}.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {name}.json: it was written by another version or for another kind of run"
        )
    weights = folder / f"{name}.safetensors"
    tensors = read_tensors(weights) if weights.is_file() else {}

    def unpack(node: dict[str, Any]) -> Any:
        (kind, value), *_ = node.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "items":
            return {k: unpack(v) for k, v in value}
        if kind == "list":
            return [unpack(v) for v in value]
        return tuple(unpack(v) for v in value) if kind == "tuple" else value

    return unpack(_read_json(file))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. CheckpointError if it is damaged."""
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


def random_states(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """Every random state that a run depends on: torch's, the GPUs', Python's, numpy's and the named ``generators``."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "generators": {name: generator.get_state() for name, generator in generators.items()},
    }


def restore_random_states(states: Mapping[str, Any], generators: Mapping[str, torch.Generator]) -> None:
    """Puts back what :func:`random_states` took. CheckpointError if the named generators differ."""
    if set(states["generators"]) != set(generators):
        raise CheckpointError(
            f"random states of {sorted(states['generators'])} were saved, {sorted(generators)} are needed"
        )
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
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


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write(folder)`` on a new folder and makes it appear as ``target`` in one step, with its manifest, once it
    is on the disk.

    An existing ``target`` is replaced: for a moment there is none, and a process killed right then leaves the old one
    to :func:`restore_replaced`. If ``write`` raises, nothing changes; CheckpointError if that was for want of space."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}{_PARTIAL}{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    old = target.parent / f".{target.name}{_REPLACED}{os.getpid()}"
    mask = os.umask(0)
    os.umask(mask)
    try:
        write(partial)
        entries = {str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": _digest(p)}
                   for p in _files(partial)}  # fmt: skip
        (partial / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
        for path in _files(partial):
            # safetensors makes files for their owner alone; a run is shared like any other folder.
            path.chmod(0o666 & ~mask)
            _flush(path)
        for path in [partial, *(p for p in partial.rglob("*") if p.is_dir())]:
            _flush(path)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(partial, target)
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if old.exists() and not target.exists():
            os.rename(old, target)
        written = sum(p.stat().st_size for p in _files(partial)) if partial.is_dir() else 0
        shutil.rmtree(partial, ignore_errors=True)
        if _no_space(error):
            raise CheckpointError(_told_no_space(target, written, error)) from error
        raise


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _no_space(error: BaseException) -> bool:
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
            "step 0"
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


def prune(output_dir: str | Path, keep: int | None) -> None:
    """Removes the oldest complete checkpoints beyond the ``keep`` newest (None keeps all), and what killed processes
    left half-written."""
    folder = Path(output_dir)
    clear_leftovers(folder)
    if keep is not None:
        for path in checkpoints(folder)[: -keep or None]:
            # Renamed first: a kill during the removal leaves a partial folder, not a damaged checkpoint.
            doomed = folder / f".{path.name}{_PARTIAL}removed"
            os.rename(path, doomed)
            shutil.rmtree(doomed)
