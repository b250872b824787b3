"""How the user has to type the command, so that what is printed can be pasted."""

from __future__ import annotations

import os
import shutil
import sys

NAME = "apex-fast"


def command_name() -> str:
    """``apex-fast``, or its path where the shell would not find the one that runs (``make`` runs .venv's)."""
    running = sys.argv[0]
    if os.path.basename(running) != NAME or not os.path.isfile(running):
        return NAME
    found = shutil.which(NAME)
    if found is not None and os.path.realpath(found) == os.path.realpath(running):
        return NAME
    relative = os.path.relpath(running)
    return running if relative.startswith("..") else relative
