"""The models that ship inside the package: starts for training, and what was made from them.

Each is a folder of ``apex_fast/assets`` and goes by its name wherever a command or a config takes a model. It is a
whole model of its own, or the LoRA that a run left, whose record names its start, so both are read as any other folder
is. The name always means the model that ships, whatever lies in the current folder, since records of runs hold it: a
folder of that name is ``./NAME``.

    python -m apex_fast.shipped runs/shapes_start shapes_start     # how a finished run becomes one
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

ASSETS = Path(__file__).resolve().parent / "assets"


@dataclass(frozen=True)
class ShippedModel:
    """phrase: what it is, for messages. made_by: the config whose head has the commands that make it anew, in a
    checkout."""

    phrase: str
    made_by: str


SHIPPED_MODELS = {
    "digits_start": ShippedModel("the start that ships", "examples/digits_start.yaml"),
    "digits_qwen_start": ShippedModel("the small Qwen-Image that ships", "examples/digits_qwen_start.yaml"),
    "shapes_start": ShippedModel("the start on shapes that ships", "examples/shapes_start.yaml"),
    "shapes_one_step": ShippedModel("the one-step generator that ships", "examples/shapes_one_step.yaml"),
}
"""By name."""
TO_TRY = "demo"
"""What ``apex-fast generate`` takes for the one-step generator that the demo shows."""


def is_shipped(name: str | Path) -> bool:
    """Whether ``name`` is that of a model that ships. A path never is."""
    return isinstance(name, str) and name in SHIPPED_MODELS


def shipped_folder(name: str | Path) -> Path:
    """Its folder. FileNotFoundError where the installation lacks it."""
    folder = ASSETS / str(name)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{SHIPPED_MODELS[str(name)].phrase}, {name}, is not in this installation ({folder}); make one with "
            f"the commands at the head of {SHIPPED_MODELS[str(name)].made_by} in a checkout"
        )
    return folder


def typed(folder: str | Path) -> str:
    """A user's folder as a command line takes it: quoted, and as ``./NAME`` where NAME alone means what ships."""
    words = str(folder)
    return shlex.quote(f"./{words}" if words == TO_TRY or is_shipped(words) else words)


def local_folder(model: str | Path) -> Path | None:
    """The user's own folder that ``model`` names, if it is there; None for what ships and for hub ids."""
    folder = Path(model)
    return folder if not is_shipped(model) and folder.is_dir() else None


def shipped_names() -> str:
    """All names, for messages."""
    return ", ".join(SHIPPED_MODELS)


LARGEST = 8 * 10**6
"""Bytes of one model in the package."""


def ship(run: str | Path, folder: Path) -> int:
    """Writes the finished model of ``run`` as it ships: in bf16, which halves it and costs less than a step of training
    changes; it is computed with in fp32 all the same. Returns its bytes.

    A README.md beside it, which says what it is and how it was made, is written by hand.

    Args:
        run: a finished run, of a whole model of its own or of a LoRA on a model that ships.
        folder: must not be there yet.

    Raises:
        ValueError: a folder that is there, a run that has not finished, or a model that is larger than ``LARGEST`` or
            that its own files do not suffice for. Nothing is left then, nor after any other failure.
        FileNotFoundError, CheckpointError: as :func:`apex_fast.training.results.find_result`.
    """
    from apex_fast.training.checkpoint import MANIFEST
    from apex_fast.training.results import Record, find_result, has_own_text

    if folder.exists():
        raise ValueError(f"{folder} is there already; move it away first")
    found = find_result(run)
    if found.checkpoint is not None:
        raise ValueError(f"{run} has not finished: only {found.checkpoint} is there; let it end, then ship it")
    source = found.folder
    record = Record.read(source)
    if not has_own_text(source) and (record is None or record.mode != "lora" or record.base not in SHIPPED_MODELS):
        raise ValueError(
            f"{source}: a whole model with its own text encoder is expected, or a LoRA whose base is one of "
            f"{shipped_names()} by name, since nothing else is complete in the package"
        )
    if record is not None and record.start_lora is not None:
        raise ValueError(
            f"{source} was trained on top of the LoRA {record.start_lora}, which is not in the package; train one "
            "without start_lora"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        made = Path(place) / folder.name
        # The manifest has the sizes and sums of the files as the run left them.
        shutil.copytree(source, made, ignore=shutil.ignore_patterns(MANIFEST))
        for file in made.rglob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            tensors = load_file(file)
            save_file({k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}, file, metadata)
            file.chmod(0o644)  # safetensors writes for its user alone, and an installation serves others too
        size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
        if size > LARGEST:
            raise ValueError(f"{source} takes {size / 1e6:.1f} MB in bf16, and at most {LARGEST / 1e6:.0f} may ship")
        made.rename(folder)
    return size


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(ship.__doc__ or "").partition("\n\n")[0])
    parser.add_argument("run", help="a finished run")
    parser.add_argument("name", choices=list(SHIPPED_MODELS))
    options = parser.parse_args(arguments)
    try:
        size = ship(options.run, ASSETS / options.name)
    except (ValueError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{ASSETS / options.name}: {size / 1e6:.2f} MB; its README.md is yours to write")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
