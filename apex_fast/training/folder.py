"""The folder of a run: who may write into it, and whether a run begins or goes on in it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

from apex_fast.training import checkpoint as checkpoints
from apex_fast.training import state
from apex_fast.training.config import TrainConfig
from apex_fast.training.locks import FolderLock, hold


class RunFolder:
    """``output_dir`` as the main process of a run has it.

    Attributes:
        begins_again: whether "latest" found a run that ended before its first checkpoint.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        self.config, self.path, self._say = config, Path(config.output_dir), say
        self._lock: FolderLock | None = None
        self.begins_again = False

    @property
    def held(self) -> bool:
        """Whether this run keeps others out."""
        return self._lock is not None and self._lock.held

    def hold(self) -> None:
        """Keeps other processes out of the folder until the run ends, its trainer is gone or another one of this
        process takes the folder."""
        if not self.held:
            self._lock = hold(self.path, self._say)
            weakref.finalize(self, self._lock.release)

    def release(self) -> None:
        """Lets others in; nothing where the folder is not held."""
        if self._lock is not None:
            self._lock.release()

    def prepare(self) -> str | None:
        """Puts the folder in order and returns the checkpoint to resume from."""
        wanted, resume = self.config.resume_from_checkpoint, None
        # Before anything in it is moved or removed.
        self.hold()
        checkpoints.restore_replaced(self.path)
        if wanted is not None:
            self.begins_again = wanted == "latest" and checkpoints.never_saved(self.path)
        if self.begins_again:
            self._say(f"careful: the run in {self.path} ended before its first checkpoint: it begins at step 0 again")
        elif wanted is not None:
            resume = checkpoints.resolve_checkpoint(wanted, self.path, self._say)
        else:
            state.claim_folder(self.config, delete=False)
        checkpoints.clear_leftovers(self.path)
        return None if resume is None else str(resume)

    def claim(self) -> None:
        """Takes the folder for a new run, once nothing of its config was refused."""
        if not self.begins_again:
            state.claim_folder(self.config)
