"""The models that ship inside the package: starts for training, and what was made from them.

Each is a folder of ``apex_fast/assets`` and goes by its name wherever a command or a config takes a model. A start is a
whole model of its own; a one-step generator is the LoRA that a run left, whose record names its start, so both are read
as any other folder is. A folder of the same name where the command runs comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"


@dataclass(frozen=True)
class ShippedModel:
    """phrase: what it is, for messages. made_by: the command that makes it anew, in a checkout."""

    phrase: str
    made_by: str


SHIPPED_MODELS = {
    "digits_start": ShippedModel("the start that ships", "apex-fast train examples/digits_start.yaml"),
}
"""By name."""


def is_shipped(name: str | Path) -> bool:
    """Whether ``name`` means a model that ships: it is one's name, and nothing of that name is here."""
    return str(name) in SHIPPED_MODELS and not Path(name).exists()


def shipped_folder(name: str | Path) -> Path:
    """Its folder. FileNotFoundError where the installation lacks it."""
    folder = ASSETS / str(name)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{SHIPPED_MODELS[str(name)].phrase}, {name}, is not in this installation ({folder}); make one with "
            f"`{SHIPPED_MODELS[str(name)].made_by}` in a checkout"
        )
    return folder


def shipped_names() -> str:
    """All names, for messages."""
    return ", ".join(SHIPPED_MODELS)
