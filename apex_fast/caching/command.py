"""``apex-fast cache``: encodes what a run needs into files, before it and with as many processes as there are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from apex_fast.caching.build import build
from apex_fast.command import command_name
from apex_fast.training import processes
from apex_fast.training.config import TrainConfig, load_config
from apex_fast.training.prompts_only import config_from, is_front_door, with_model
from apex_fast.training.settings import SettingsError

USAGE = """usage: apex-fast cache CONFIG.yaml [--key value ...] [--overwrite]
       apex-fast cache --model PATH_OR_ID --prompts prompts.txt [--key value ...]
       torchrun --nproc-per-node 8 -m apex_fast.cli cache CONFIG.yaml      (the shards spread over 8 processes)

Encodes the prompts and pictures of a run once, into cache_dir (default: OUTPUT_DIR.cache, beside output_dir). A run
with the same config then loads neither text encoders nor VAE (the VAE only where validations draw pictures). For a run
from prompts it also draws the samples of the base. It can be stopped at any moment and goes on where it was.

Keys are those of the run: `apex-fast train --help`.
  --overwrite   encode anew what a whole cache of other data or of another model holds differently
"""


def main(arguments: Sequence[str], *, offline: Callable[[str], None] = lambda model: None) -> int:
    """``apex-fast cache``; returns 0. Errors as :func:`apex_fast.caching.build.build`.

    offline: called with the name of the model, to keep libraries from asking a hub where all is here.
    """
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    overwrite = "--overwrite" in arguments
    words = [word for word in arguments if word != "--overwrite"]
    path = None
    if words and not words[0].startswith("--"):
        path, words = words[0], words[1:]
    elif words[:1] == ["--config"]:
        path, words = (words[1] if len(words) > 1 else None), words[2:]
    if path is None and not words:
        raise SettingsError(f"cache needs the config of the run: {command_name()} cache CONFIG.yaml [--key value ...]")
    config = config_from(words) if path is None and is_front_door(words) else load_config(path, with_model(words))
    offline(config.pretrained_model_name_or_path or "")
    return cache(config, overwrite=overwrite)


def cache(config: TrainConfig, *, overwrite: bool = False) -> int:
    """Encodes for ``config`` in the processes that this one was launched with; returns 0."""
    own = processes.start(
        config.device,
        mixed_precision=config.mixed_precision,
        accumulation=config.gradient_accumulation_steps,
        distributed=config.distributed,
        timeout=config.distributed_timeout,
        checkpointing=config.gradient_checkpointing is not False,
    )
    stream = None if own.is_main else processes.Silence()
    folder = build(config, own, overwrite=overwrite, say=_say if own.is_main else _silent, stream=stream)
    if own.is_main:
        print(folder)
    own.leave(0)
    return 0


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _silent(message: str) -> None:
    pass
