"""Run by torchrun from test_training_processes.py: training runs one after the other in the same processes.

Usage: training_worker.py CASES.json; a list of {"keys": words of a command line, "copy": [from, to] or null}, the copy
being made before. An error of a case is written to the file "error" of its entry, followed by the rank, instead of
ending the processes. "full_disk" is the rank that finds no space when it saves at step 4.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from process_end import leave

from apex_fast.training import checkpoint
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer


def full_disk() -> Callable:
    """Lets saving fail at step 4; returns what to put back."""
    real = checkpoint.save_file

    def failing(tensors: dict, path: str, **options: object) -> None:
        if "checkpoint-4" in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **options)

    checkpoint.save_file = failing
    return real


def main(cases: list[dict]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    for case in cases:
        if case.get("copy") and dist.get_rank() == 0:
            shutil.copytree(*case["copy"])
        dist.barrier()
        # What a launcher would have set.
        os.environ.update(case.get("environment", {}))
        restore = full_disk() if case.get("full_disk") == dist.get_rank() else None
        try:
            Trainer(load_config(None, case["keys"]), stream=io.StringIO()).run(until=case.get("until"))
        except Exception as error:
            if "error" not in case:
                raise
            told = "" if getattr(error, "told_elsewhere", False) else "told here: "
            text = f"{told}{type(error).__name__}: {error}"
            Path(f"{case['error']}-{dist.get_rank()}").write_text(text, encoding="utf-8")
        finally:
            if restore is not None:
                checkpoint.save_file = restore
        dist.barrier()
    leave()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
