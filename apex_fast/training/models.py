"""Backbones by name or folder, for training and for generating from what training left behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.backbones.sana import SanaBackbone
from apex_fast.extras import require
from apex_fast.training.checkpoint import CheckpointError, checkpoints, damage, load_state, replaced
from apex_fast.training.config import DIGITS_START, TrainConfig
from apex_fast.training.settings import SettingsError

MODEL_FOLDER = "model"
"""Folder of the finished model inside a run, and of the weights inside a checkpoint."""

_INDEX = "model_index.json"


def pretrained_folder(name_or_path: str) -> Path:
    """The folder of a pretrained model; ``digits_start`` is the one that ships. FileNotFoundError says what was looked
    for."""
    if name_or_path == DIGITS_START:
        folder = Path(__file__).resolve().parent.parent / "assets" / DIGITS_START
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the start {DIGITS_START} is not in this installation ({folder}); make one with `apex-fast train "
                "examples/digits_start.yaml`"
            )
        return folder
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / _INDEX).is_file() and (folder / MODEL_FOLDER / _INDEX).is_file():
        return folder / MODEL_FOLDER
    if not (folder / _INDEX).is_file():
        if (old := replaced(folder / MODEL_FOLDER)) is not None:
            return old
        raise FileNotFoundError(
            f"pretrained_model_name_or_path: {name_or_path} holds no model ({_INDEX} is missing); write a folder "
            "made by "
            f"save_pretrained or by a finished run, or {DIGITS_START}"
        )
    return folder


def _no_bars() -> None:
    # transformers draws a progress bar for every file it reads or writes, across the bar of the run.
    require("transformers", extra="train").utils.logging.disable_progress_bar()


def _load(folder: Path) -> SanaBackbone:
    _no_bars()
    return SanaBackbone.from_pretrained(folder)


def backbone_for(config: TrainConfig, prompts: list[str]) -> SanaBackbone:
    """The network of a run, in training mode, with gradients where the run trains: the pretrained one, or a new one
    from ``config.model``."""
    if config.pretrained_model_name_or_path is not None:
        backbone = _load(pretrained_folder(config.pretrained_model_name_or_path))
    else:
        _no_bars()
        model = config.model
        backbone = SanaBackbone.from_config(
            model.transformer,
            model.text_encoder,
            prompts,
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_sequence_length,
            seed=config.seed,
        )
    backbone.transformer.requires_grad_(True).train()
    backbone.text_encoder.requires_grad_(config.train_text_encoder).train(config.train_text_encoder)
    if config.gradient_checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
    return backbone


def load_generator(run: str | Path) -> tuple[SanaBackbone, str]:
    """The network to generate with, in eval mode, and a phrase that says which it is.

    run: a run that has finished (its ``model/``, which a resumed run replaces when it ends), one that has not (its
    newest checkpoint; also if it was killed at the moment between taking the old ``model/`` away and putting the new
    one there), a checkpoint folder (its averaged weights), a saved model folder, or ``digits_start``.

    Raises:
        FileNotFoundError: nothing of the kind is there; the message says what was looked for.
        CheckpointError: a damaged checkpoint.
    """
    folder = Path(run)
    if str(run) == DIGITS_START and not folder.exists():
        return _load(pretrained_folder(DIGITS_START)).eval(), "the start that ships"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{run}: no such folder; write the folder of a run (such as runs/demo), of a checkpoint or of a saved model"
        )
    if (folder / _INDEX).is_file():
        return _load(folder).eval(), f"the model in {folder}"
    if folder.name.startswith("checkpoint-"):
        return _from_checkpoint(folder)
    if (folder / MODEL_FOLDER / _INDEX).is_file():
        return _load(folder / MODEL_FOLDER).eval(), f"the finished model of {folder}"
    found = checkpoints(folder)
    if found:
        return _from_checkpoint(found[-1])
    if (old := replaced(folder / MODEL_FOLDER)) is not None:
        return _load(old).eval(), f"the finished model of {folder}"
    raise FileNotFoundError(
        f"{run} holds neither a finished model ({MODEL_FOLDER}/{_INDEX}) nor a complete checkpoint; has `apex-fast "
        "train` or `apex-fast demo` run there?"
    )


def _from_checkpoint(folder: Path) -> tuple[SanaBackbone, str]:
    if (problem := damage(folder)) is not None:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {problem}")
    backbone = _load(folder / MODEL_FOLDER).eval()
    average = load_state(folder, "ema")
    if average is None:
        return backbone, f"the weights of {folder}"
    parameters = dict(backbone.named_parameters())
    with torch.no_grad():
        for name, value in average["average"].items():
            parameters[name].copy_(value)
    return backbone, f"the averaged weights of {folder}"


def device_of(name: str) -> torch.device:
    """The torch device that ``device`` in a config or on a command line means. SettingsError for a GPU that is not
    there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device {name}: this torch ({torch.__version__}) sees no GPU; choose device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device {name}: this machine has {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return device


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers with their names, to tell later whether a folder still holds the same
    model."""
    digest = hashlib.sha256()
    state: Mapping[str, Tensor] = module.state_dict()
    for name in sorted(state):
        digest.update(name.encode())
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


class Autocast(nn.Module):
    """A velocity module that runs under autocast: weights stay as they are, the network computes in ``dtype``."""

    def __init__(self, module: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self._device_type, self._dtype = module, device_type, dtype

    def forward(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        # Without the cache: its casts belong to one autograd graph, and the roles of a step have several.
        with torch.autocast(self._device_type, self._dtype, cache_enabled=False):
            return self.module(x_t, t, condition)
