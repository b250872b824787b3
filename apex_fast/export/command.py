"""``apex-fast export``: a run as files of stock diffusers or ComfyUI, with a model card."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from apex_fast.export.card import write_card
from apex_fast.export.source import Source, open_source
from apex_fast.export.stock import export_stock
from apex_fast.training.checkpoint import MANIFEST, write_folder
from apex_fast.training.models import is_hub_id, quiet_libraries
from apex_fast.training.settings import SettingsError

Format = Literal["diffusers", "comfyui"]
FORMATS = ("diffusers", "comfyui")


def main(arguments: Sequence[str]) -> int:
    """``apex-fast export``: writes the files and names their folder; 0, or what argparse exits with for wrong usage.

    Errors as :func:`export_run`.
    """
    options = _parser().parse_args([_hyphens(word) for word in arguments])
    folder, source = _export(options.run, options.format, options.merge, options.out, options.base)
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
    parser.add_argument("--out", type=Path, help="folder to write (default RUN/export/<format>)")
    parser.add_argument(
        "--base", help="hub id or folder of the model that the run started from, if it was moved or is to be named so"
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
) -> Path:
    """Writes a run as files that other programs load, with a model card; returns their folder.

    Args:
        run: folder of a run that has finished or not, of a checkpoint, or of its model.
        format: ``"diffusers"``: see :mod:`apex_fast.export.stock`. ``"comfyui"``: see :mod:`apex_fast.export.comfyui`.
        merge: one whole model instead of what was trained alone.
        out: folder to write; an earlier export there is replaced, anything else is refused. None is
            ``RUN/export/<format>``, with ``-merged`` behind it.
        base: the model that the run started from: where it is now, and what the card calls it. None is as recorded.

    Raises:
        SettingsError: a model that cannot be written this way, or a folder that holds something else.
        FileNotFoundError, CheckpointError: as :func:`apex_fast.export.source.open_source`.
    """
    return _export(run, format, merge, None if out is None else Path(out), base)[0]


def _export(run: str | Path, format: str, merge: bool, out: Path | None, base: str | None) -> tuple[Path, Source]:
    if format not in FORMATS:
        raise SettingsError(f"export: format must be diffusers or comfyui, got {format!r}")
    quiet_libraries()
    source = open_source(run, base=base)
    if out is None:
        out = (source.run or source.found.folder) / "export" / (format + ("-merged" if merge else ""))
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _is_export(out))):
        raise SettingsError(f"export: {out} is there already and is no earlier export; name another folder with --out")

    def write(folder: Path) -> None:
        if format == "comfyui":
            from apex_fast.export.comfyui import export_comfyui

            export_comfyui(source, folder, merge)
        else:
            export_stock(source, folder, merge)
            write_card(source, folder, merge)

    write_folder(out, write)
    return out, source


def _is_export(folder: Path) -> bool:
    """Whether an earlier export wrote ``folder``: its manifest names every file, and a run's manifests lie deeper."""
    return (folder / MANIFEST).is_file() and not any((folder / name).exists() for name in ("config.yaml", "model"))
