"""The state of a run in its folder: what a checkpoint holds, going on from one, and the folder itself."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from apex_fast.data.tar_shards import shown
from apex_fast.objective import ApexObjective
from apex_fast.parts import placed, placed_optimizer_state
from apex_fast.peers import Peer
from apex_fast.training import checkpoint as checkpoints
from apex_fast.training.checkpoint import CheckpointError
from apex_fast.training.config import TrainConfig
from apex_fast.training.models import file_fingerprint, start_lora_file
from apex_fast.training.results import MODEL_FOLDER, load_trained, save_trained
from apex_fast.training.settings import SettingsError, as_mapping, differences

if TYPE_CHECKING:
    from apex_fast.training.loop import Trainer

NOT_OF_THE_RUN = ("resume_from_checkpoint", "overwrite_output_dir", "output_dir")
"""Keys that may differ between the parts of one run."""

_SCALE = ", and the weights of the LoRA mean something else under it"
_LAYERS = ", which makes another network"
_STORED = ", so the base is not stored as it was"
FIXED = {
    "loss": "",
    "rank": _LAYERS,
    "lora_alpha": _SCALE,
    "use_rslora": _SCALE,
    "use_dora": _LAYERS,
    "lora_dropout": ", so the rest of the run would be another training than its beginning",
    "lora_target_modules": _LAYERS,
    "shifted_adapter": ", so the shifted branch is another adapter",
    "weight_dtype": _STORED,
    "quantization": _STORED,
}
"""Keys that a run keeps to its end, and why."""


def write(trainer: Trainer, folder: Path) -> None:
    """Everything that a resumed run needs to go on with the same numbers, into the new ``folder``: what is sharded by
    all processes, what is each one's own by each, and all else by the main one."""
    from apex_fast.version import __version__

    objective, velocities, processes = trainer.objective, trainer.velocities, trainer.processes
    if not processes.is_main:
        own = checkpoints.random_states({}, trainer.device)
        processes.later(lambda: checkpoints.save_state(folder, _random_name(processes.rank), own))
    if not (processes.is_main or processes.sharded):
        return

    def save(name: str, state: Any) -> None:
        checkpoints.save_state(folder, name, state, processes)

    save_trained(trainer.backbone, folder / MODEL_FOLDER, trainer.record, processes)
    save("ema", None if trainer.average is None else trainer.average.state_dict())
    save("optimizer", trainer.optimizer.state_dict())
    # The shift; all else in the objective is settings or ends with the step.
    shift = dict(objective.shift.state_dict()) if isinstance(objective, ApexObjective) else None
    save("objective", {"shift": shift})
    if isinstance(objective, Peer):
        save("peer", objective.state_dict())
    # A frozen branch is the start: it is read again from where it came, and its fingerprint says whether it still is
    # that model. An adapter of the shifted branch's own is part of this state, and not of the model.
    save("real_branch", velocities.state_dict() if velocities.changes else None)
    if not processes.is_main:
        return
    checkpoints.save_state(folder, _random_name(0), checkpoints.random_states(trainer.generators, trainer.device))
    run = {
        "step": trainer.step,
        "samples_seen": trainer.batches.position,
        "batches": trainer.batches.state_dict(),
        "alarms": trainer.alarms.state_dict(),
        "start": _start(trainer),
        "processes": {"count": processes.world, "way": processes.way},
        "scaler": None if trainer.scaler is None else trainer.scaler.state_dict(),
        "skipped_steps": trainer.skipped_steps,
        "config": as_mapping(trainer.config),
        "data": trainer.data_digest,
        "versions": {"apex_fast": __version__, "torch": torch.__version__},
    }
    checkpoints.save_json(folder, "trainer", run)


def _random_name(rank: int) -> str:
    """The file of a process's own random states; that of the first also has those that all processes share."""
    return "random" if rank == 0 else f"random-{rank:05d}"


def own_random_states(trainer: Trainer) -> None:
    """Gives every process but the first, whose states are those of a run in one process, random states of its own:
    dropout masks must differ between processes, and what is shared has generators of its own."""
    rank = trainer.processes.rank
    if rank == 0:
        return
    seed = (trainer.config.seed * 1_000_003 + trainer.step * 8_191 + rank) % (1 << 63)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def _start(trainer: Trainer) -> dict[str, Any]:
    """What the run was tuned from, and how to tell whether that is still the same."""
    config = trainer.config
    start: dict[str, Any] = {"path": config.pretrained_model_name_or_path, "fingerprint": trainer.start_fingerprint}
    if config.start_lora is not None and config.start_lora_mode != "continue":
        start["lora"] = file_fingerprint(start_lora_file(config.start_lora))
    return start


def restore(trainer: Trainer, folder: Path) -> list[str]:
    """Puts the trainer where it was when ``folder``, which :func:`check_history` accepted, was written; returns the
    settings that differ since.

    Raises:
        CheckpointError: the checkpoint is of another network.
    """
    config = trainer.config
    run = checkpoints.load_json(folder, "trainer")
    load_trained(trainer.backbone, folder / MODEL_FOLDER, config.mode)
    average = checkpoints.load_state(folder, "ema")
    if trainer.average is not None and average is None:
        raise CheckpointError(f"{folder} holds no averaged weights; write ema_decay: null, or start over")
    try:
        if trainer.average is not None:
            trainer.average.load_state_dict(placed(average, trainer.average.state_dict()))
        optimizer = checkpoints.load_state(folder, "optimizer")
        trainer.optimizer.load_state_dict(placed_optimizer_state(optimizer, trainer.optimizer))
        objective = checkpoints.load_state(folder, "objective")
        if isinstance(trainer.objective, ApexObjective):
            trainer.objective.shift.load_state_dict(objective["shift"])
        if isinstance(trainer.objective, Peer):
            trainer.objective.load_state_dict(checkpoints.load_state(folder, "peer"))
        real = checkpoints.load_state(folder, "real_branch")
        if trainer.velocities.changes:
            trainer.velocities.load_state_dict(placed(real or {}, trainer.velocities.state_dict()))
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder} does not fit this config: {error}") from error
    trainer.step = int(run["step"])
    shared = checkpoints.load_state(folder, _random_name(0))
    checkpoints.restore_random_states(shared, trainer.generators, trainer.device)
    mine = _random_name(trainer.processes.rank)
    if not (folder / f"{mine}.json").is_file():
        # The run had fewer processes.
        own_random_states(trainer)
    elif trainer.processes.rank > 0:
        checkpoints.restore_random_states(checkpoints.load_state(folder, mine), {}, trainer.device)
    if trainer.scaler is not None and run.get("scaler") is not None:
        trainer.scaler.load_state_dict(run["scaler"])
    trainer.skipped_steps = int(run.get("skipped_steps", 0))
    if "batches" in run:
        trainer.batches.load_state_dict(run["batches"])
    else:
        # A checkpoint of an earlier version, which knew no buckets.
        trainer.batches.order.seek(int(run["samples_seen"]))
    if "alarms" in run:
        trainer.alarms.load_state_dict(run["alarms"])
        if isinstance(trainer.objective, ApexObjective):
            trainer.objective.correction_factor = trainer.alarms.correction_factor
    if folder.parent.resolve() == trainer.output_dir.resolve():
        trainer.saved_step = trainer.step
    return differences(run["config"], as_mapping(config), leave_out=NOT_OF_THE_RUN)


def check_history(trainer: Trainer, folder: Path) -> None:
    """Whether ``trainer`` can go on from ``folder``, as far as that can be told before data is encoded.

    Raises:
        CheckpointError: the checkpoint is of another run or start, or not the newest of its folder.
        SettingsError: the run is over.
    """
    config, run = trainer.config, checkpoints.load_json(folder, "trainer")
    before, now = run["config"], as_mapping(config)
    later = [p.name for p in checkpoints.checkpoints(trainer.output_dir) if checkpoints.step_of(p) > int(run["step"])]
    if later:
        # Two histories in one folder: "latest" and checkpoints_total_limit would mix them up.
        raise CheckpointError(
            f"{trainer.output_dir} has newer checkpoints than {folder.name} ({', '.join(later)}); write another "
            "output_dir and the path of the checkpoint, or delete the newer ones"
        )
    if int(run["step"]) > config.max_train_steps:
        raise SettingsError(
            f"max_train_steps is {config.max_train_steps}, but {folder} is at step {run['step']} already"
        )
    for key, why in FIXED.items():
        # A checkpoint of an earlier version need not know every key.
        if key in before and _meant(key, before) != _meant(key, now):
            raise CheckpointError(
                f"{folder} is of a run with {key}: {_shown(before[key])}, this one has {key}: {_shown(now[key])}{why}; "
                f"write {key}: {_shown(before[key])}, or start a new run in another output_dir"
            )
    # A LoRA is nothing without its base, and a frozen real branch is not saved: both are the start, read again.
    if config.mode == "full" and config.real_branch_in_use != "frozen":
        return
    start = _start(trainer)
    if run["start"]["fingerprint"] != start["fingerprint"]:
        needs = "a LoRA needs the base" if config.mode == "lora" else "the frozen real branch must be the model"
        raise CheckpointError(
            f"{folder} was tuned from another model than {start['path']} holds now (it was {run['start']['path']}); "
            f"{needs} that the run started from"
        )
    if run["start"].get("lora") != start.get("lora"):
        raise CheckpointError(
            f"{folder} was tuned from another start_lora (or start_lora_mode) than start_lora: {config.start_lora}, "
            f"start_lora_mode: {config.start_lora_mode}"
        )


def changed_data(trainer: Trainer, folder: Path) -> list[str]:
    """What differs between the pictures and captions that ``folder`` was trained on and those that are there now."""
    before, now = checkpoints.load_json(folder, "trainer").get("data"), trainer.data_digest
    if before is None or now is None or before == now:
        return []
    found = []
    if before["count"] != now["count"]:
        found.append(f"{before['count']} pictures then, {now['count']} now")
    elif before["names"] != now["names"]:
        found.append(f"as many pictures ({now['count']}) under other names")
    if before["names"] == now["names"] and before["captions"] != now["captions"]:
        found.append("the same pictures with other captions")
    return [
        f"dataset_name: {shown(trainer.config.dataset_name)} is not what {folder.name} was trained on: "
        f"{'; '.join(found)}. The run goes on with what is there now, so it is not the one that it would have been"
    ]


def _meant(key: str, values: dict[str, Any]) -> Any:
    """The value of a key with what null stands for put in its place, where it is known without the model."""
    if key == "lora_alpha" and values.get("start_lora_mode") != "continue" and values[key] is None:
        return values["rank"]
    return values[key]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def claim_folder(config: TrainConfig, *, delete: bool = True) -> None:
    """Makes sure that a new run does not mix its files with an older one's: with ``overwrite_output_dir`` the older
    run is deleted, with what was exported and drawn of it, otherwise SettingsError says what there is.

    delete: False only checks and writes nothing, for a run that may still be refused for another reason.
    """
    folder = Path(config.output_dir)
    if delete:
        checkpoints.restore_replaced(folder)
    model = folder / MODEL_FOLDER
    old = [p for p in (folder / "metrics.jsonl", model) if p.exists() or checkpoints.replaced(p) is not None]
    old += checkpoints.checkpoints(folder)
    if not old:
        return
    if not config.overwrite_output_dir:
        raise SettingsError(
            f"output_dir: {folder} already holds a run ({old[-1].name}). Go on with it by --resume_from_checkpoint "
            "latest, start over with --overwrite_output_dir, or write another output_dir"
        )
    if not delete:
        return
    runs_own = [folder / name for name in (checkpoints.BEST, "samples", "tensorboard", "wandb_run_id")]
    for path in [*old, *runs_own, *checkpoints.damaged(folder), *_written_of(folder)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for place in (folder / "export", folder / "generated"):
        _remove_empty(place)


_PICTURE = re.compile(r"^[a-z0-9-]+-\d+-steps?-seed-\d+\.png$")
"""Names of :func:`apex_fast.generate.picture_path`."""


def _written_of(folder: Path) -> list[Path]:
    """Files that other commands of this library have made of a run and left in its folder: exports, pictures and the
    page. What else lies there is somebody's own."""
    from apex_fast.export.command import own_files

    found = []
    for out in sorted((folder / "export").glob("*")):
        own = own_files(out) or set() if out.is_dir() and not out.is_symlink() else set()
        inside = out.resolve()
        found += [out / name for name in sorted(own) if inside in (out / name).resolve().parents]
    found += [path for path in sorted((folder / "generated").glob("*.png")) if _PICTURE.match(path.name)]
    page = folder / "report.html"
    if page.is_file() and ": apex_fast run</title>" in page.read_text(encoding="utf-8", errors="replace"):
        found.append(page)
    return [path for path in found if path.is_file()]


def _remove_empty(folder: Path) -> None:
    """Removes ``folder`` and the folders inside that hold no file."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for inside in folder.iterdir():
        _remove_empty(inside)
    with contextlib.suppress(OSError):
        folder.rmdir()
