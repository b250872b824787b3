"""Where a model comes from, as far as its own files say: the licence in the front matter of its README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apex_fast.extras import require
from apex_fast.training.models import is_hub_id
from apex_fast.training.results import MODEL_FOLDER

README = "README.md"


def licence_of(model: Path | str, revision: str | None = None) -> str | None:
    """The licence that the model card of ``model`` names, such as "apache-2.0" or "other (its name)"; None where no
    card says it.

    model: a folder, there or gone, or a hub id whose card is looked for in the cache alone: nothing is downloaded.
    """
    card = _card(model, revision)
    if card is None:
        return None
    values = front_matter(card.read_text(encoding="utf-8", errors="replace"))
    licence, name = values.get("license"), values.get("license_name")
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    if not licence:
        return None
    return f"{licence} ({name})" if name else str(licence)


def front_matter(text: str) -> dict[str, Any]:
    """The settings between the two lines of --- that a model card begins with; empty where there are none."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return {}
    yaml = require("yaml", extra="train")
    try:
        values = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError:
        # The card of another model is nothing that a run may fail on; it then names no licence.
        return {}
    return values if isinstance(values, dict) else {}


def _card(model: Path | str, revision: str | None) -> Path | None:
    folder = Path(model)
    if folder.is_dir():
        # The card of a run lies beside the folder of its model; what lies beside any other folder is of something else.
        own = folder.name == MODEL_FOLDER and (folder.parent / "config.yaml").is_file()
        places = (folder / README, *([folder.parent / README] if own else []))
        return next((file for file in places if file.is_file()), None)
    if isinstance(model, Path) or not is_hub_id(model):
        return None
    hub = require("huggingface_hub", extra="train")
    try:
        found = hub.try_to_load_from_cache(model, README, revision=revision)
    except hub.errors.HFValidationError:
        # A folder that is gone may look like owner/name and hold letters that no name on the hub has.
        return None
    return Path(found) if isinstance(found, str) else None
