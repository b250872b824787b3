"""``apex-fast export``: a run as files of stock diffusers or ComfyUI, with a model card."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from apex_fast.export.card import write_card
from apex_fast.export.source import Source, open_source
from apex_fast.export.stock import export_stock
from apex_fast.training.checkpoint import MANIFEST, damage, replaced, step_of, write_folder
from apex_fast.training.models import is_hub_id, quiet_libraries
from apex_fast.training.results import RECORD
from apex_fast.training.settings import SettingsError
from apex_fast.version import __version__

Format = Literal["diffusers", "comfyui"]
FORMATS = ("diffusers", "comfyui")


def main(arguments: Sequence[str]) -> int:
    """``apex-fast export``: writes the files and names their folder; 0, or what argparse exits with for wrong usage.

    Errors as :func:`export_run`.
    """
    options = _parser().parse_args([_hyphens(word) for word in arguments])

    def say(line: str) -> None:
        print(f"careful: {line}", file=sys.stderr)

    folder, source = _export(options.run, options.format, options.merge, options.out, options.base, options.ema, say)
    print(f"exported: {source.found.phrase}", file=sys.stderr)
    if not is_hub_id(source.base):
        print(
            f"the card names the base model by its place here, {source.base}; before you publish it, export once more "
            "with --base owner/name",
            file=sys.stderr,
        )
    print(folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apex-fast export",
        description="Writes a run as files that stock diffusers or ComfyUI loads, with a model card.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, a checkpoint or its model")
    parser.add_argument("--format", choices=FORMATS, default="diffusers", help="who reads it (default diffusers)")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="one whole model instead of what was trained alone: a LoRA goes into the weights",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder to write (default RUN/export/<format>); an earlier export there is replaced, other files stay",
    )
    parser.add_argument(
        "--base", help="hub id or folder of the model that the run started from, if it was moved or is to be named so"
    )
    parser.add_argument(
        "--ema",
        metavar="RATE",
        help="another average of the weights than the first of ema_decay, such as 0.999, from the newest checkpoint",
    )
    return parser


def _hyphens(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def export_run(
    run: str | Path,
    *,
    format: Format = "diffusers",
    merge: bool = False,
    out: str | Path | None = None,
    base: str | None = None,
    ema: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Writes a run as files that other programs load, with a model card; returns their folder.

    Args:
        run: folder of a run that has finished or not, of a checkpoint, or of its model.
        format: ``"diffusers"``: see :mod:`apex_fast.export.stock`. ``"comfyui"``: see :mod:`apex_fast.export.comfyui`.
        merge: one whole model instead of what was trained alone.
        out: folder to write; the files of an earlier export there are replaced, files that somebody added to it stay,
            and a folder of anything else is refused. None is ``RUN/export/<format>``, with ``-merged`` behind it; of
            a checkpoint or a model without its run, ``<folder>-export/<format>`` beside it.
        base: the model that the run started from: where it is now, and what the card calls it. None is as recorded.
        ema: another average of the weights than the first of ``ema_decay``, by its rate, such as "0.999"; it is read
            from the newest checkpoint, and the default ``out`` is named after it.
        say: is told what a user should know: that newer checkpoints are damaged, or that ComfyUI does not know the
            sizes of this model. None makes warnings of it.

    Raises:
        SettingsError: a model that cannot be written this way, or a folder that holds something else or that this
            export reads from.
        FileNotFoundError, CheckpointError: as :func:`apex_fast.export.source.open_source`.
    """
    lines: list[str] = []
    folder, _ = _export(run, format, merge, None if out is None else Path(out), base, ema, say or lines.append)
    for line in lines:
        # From here, so that what is shown with it is the caller's line.
        warnings.warn(line, stacklevel=2)
    return folder


def _export(
    run: str | Path,
    format: str,
    merge: bool,
    out: Path | None,
    base: str | None,
    ema: str | None,
    say: Callable[[str], None],
) -> tuple[Path, Source]:
    if format not in FORMATS:
        raise SettingsError(f"export: format must be diffusers or comfyui, got {format!r}")
    quiet_libraries()
    source = open_source(run, base=base, ema=ema)
    for line in _passed_over(source, Path(run)):
        say(line)
    if out is None:
        name = format + ("-merged" if merge else "") + ("" if ema is None else f"-ema-{ema}")
        if source.run is not None:
            out = source.run / "export" / name
        else:
            # Not inside: a checkpoint or a model is complete as it is.
            alone = (source.found.checkpoint or source.found.folder).resolve()
            out = alone.with_name(f"{alone.name}-export") / name
    if (old := replaced(out)) is not None:
        # Set aside by an export that was killed before the new folder was in its place.
        os.rename(old, out)
    _check_place(out, source)
    added = _added(out)

    def write(folder: Path) -> None:
        if format == "comfyui":
            from apex_fast.export.comfyui import export_comfyui

            export_comfyui(source, folder, merge, say)
        else:
            export_stock(source, folder, merge)
            write_card(source, folder, merge)
        facts = {
            "library": f"apex_fast {__version__}",
            "format": format,
            "merge": merge,
            "training_steps": source.train_steps,
            "files": sorted(path.relative_to(folder).as_posix() for path in _files(folder)),
        }
        for name in added:
            if (folder / name).exists():
                raise SettingsError(
                    f"export: {out / name} was not written by the export before, and this one would replace it; move "
                    "it away or name another folder with --out"
                )
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(out / name, folder / name)
        (folder / MARKER).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    modes = {name: (out / name).stat().st_mode for name in added}
    write_folder(out, write)
    for name, mode in modes.items():
        (out / name).chmod(mode)
    return out, source


# ---- the folder


MARKER = "export.json"
"""What makes a folder an export: which files in it are the export's own, so that a later one leaves the others."""


def _check_place(out: Path, source: Source) -> None:
    """SettingsError where writing ``out`` would take something else away."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and own_files(out) is None)):
        raise SettingsError(f"export: {out} is there already and is no earlier export; name another folder with --out")
    place = out.resolve()
    read = [source.found.folder, source.found.checkpoint, source.run, Path(source.place), source.start_lora]
    for path in (path.resolve() for path in read if path is not None and path.exists()):
        if place == path or place in path.parents:
            raise SettingsError(f"export: {out} holds {path}, which this export reads; name another folder with --out")
    whole = next((p for p in place.parents if (p / RECORD).is_file() or _is_checkpoint(p)), None)
    if whole is not None:
        raise SettingsError(
            f"export: {out} is inside of {whole}, which is complete as it is; name another folder with --out"
        )


def _is_checkpoint(folder: Path) -> bool:
    return folder.name.startswith("checkpoint-") and (folder / MANIFEST).is_file()


def own_files(folder: Path) -> set[str] | None:
    """The files of an earlier export in ``folder``; None where there is none, or where a model was put over it."""
    if not (folder / MARKER).is_file() or (folder / RECORD).exists():
        return None
    try:
        facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return {*facts["files"], MARKER, MANIFEST} if facts["library"].startswith("apex_fast ") else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _added(folder: Path) -> list[str]:
    """Files in an earlier export that it did not write. SettingsError for a link, which cannot be kept as it is."""
    own = own_files(folder) if folder.is_dir() else None
    if own is None:
        return []
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    if links:
        raise SettingsError(
            f"export: {links[0]} is a link, and an export would put a file in its place; move it away or name another "
            "folder with --out"
        )
    return [name for path in _files(folder) if (name := path.relative_to(folder).as_posix()) not in own]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _passed_over(source: Source, run: Path) -> list[str]:
    """Of a run that is exported from a checkpoint: which newer ones could not be taken."""
    taken = source.found.checkpoint
    if taken is None or run.resolve() == taken.resolve():
        return []
    others = [p for p in taken.parent.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    newer = sorted((p for p in others if step_of(p) > step_of(taken)), key=step_of)
    return [f"{p} was passed over, it is no complete checkpoint: {damage(p)}" for p in newer]
