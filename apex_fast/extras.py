"""Optional packages: imported where they are used, with an error that names the extra that brings them."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: name to import, submodules included, for example ``"matplotlib.pyplot"``.
        extra: the extra of this package that brings it: ``"train"``, ``"data"``, ``"scenes"``, ``"quantization"``,
            ``"wandb"`` or ``"dev"``.

    Returns:
        The imported module.

    Raises:
        ImportError: the package is not installed; the message has the command that installs it. A package that is
            installed and fails to import raises its own error, unchanged, since no extra would mend that.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A missing dependency of an installed package carries that dependency's name, not ours.
        wanted = module.split(".")
        if error.name not in {".".join(wanted[: i + 1]) for i in range(len(wanted))}:
            raise
        raise ImportError(
            f"{module} is needed here and is not installed: pip install 'apex_fast[{extra}]'", name=error.name
        ) from error
