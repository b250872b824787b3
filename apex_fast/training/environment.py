"""``environment.json``: with what each part of a run was done, for whoever reads the run later."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apex_fast.version import __version__

if TYPE_CHECKING:
    from apex_fast.training.loop import Trainer

FILE = "environment.json"
PACKAGES = ("diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def collect(device: torch.device) -> dict[str, Any]:
    """Versions, the device, and how many processes and threads there are."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {"python": platform.python_version(), "apex_fast": __version__, "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "device": str(device),
        "device_name": name,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
    }


def note(trainer: Trainer) -> None:
    """Adds this part of the run to ``environment.json``; a part that begins at step 0 begins the file. A resumed run
    takes from it what was measured before the first step."""
    path = trainer.output_dir / FILE
    parts = read(path) if trainer.step else []
    if trainer.visibility is None:
        trainer.visibility = next((part["visibility"] for part in reversed(parts) if part.get("visibility")), None)
    parts.append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "from_step": trainer.step,
            "visibility": trainer.visibility,
            **collect(trainer.device),
        }
    )
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> list[dict[str, Any]]:
    """The parts in ``path``; none if it is not there or was cut off."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []


def _processor() -> str:
    """The CPU as Linux names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
