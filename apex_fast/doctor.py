"""``apex-fast doctor``: what would stop a run or spoil it, found before it begins, one line for each check.

Every check stands for itself: one that fails leaves the others to be made, unless it takes what they rest on away.
Nothing is written, nothing is downloaded. The probe loads the model and needs the time for that; where the model is not
on this machine yet, or would not fit into it, it is left out and the line says so.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from apex_fast import _library, info
from apex_fast.command import command_name
from apex_fast.shipped import is_shipped
from apex_fast.training.config import TrainConfig, load_config
from apex_fast.training.phases import size
from apex_fast.training.settings import SettingsError
from apex_fast.version import __version__

USAGE = """usage: apex-fast doctor CONFIG.yaml [--key value ...] [--gpu 24GB] [--no-probe] [--json]
       apex-fast doctor --model PATH_OR_ID --prompts prompts.txt [...]

Checks a run before it begins: versions, ops, device, model, data, cache, memory, the probe's verdict, disk. One line
for each check, with the mend. Nothing is written or downloaded.

  --gpu 24GB    plan for a GPU of that size, where the run will not be on this machine
  --no-probe    leave out the probe, which loads the model
  --json        print JSON

Every key of the config can be set on the command line, as in `apex-fast train`. Exit code: 0, or 1 if a check failed.
"""

State = Literal["ok", "careful", "fail", "skipped"]
PICTURES = 16
"""Pictures that are read to see whether the data can be."""
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)\s*([^;]*)(?:;.*extra\s*==\s*['\"](\w+)['\"])?")


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and what to do about it."""

    name: str
    state: State
    said: str
    mend: str = ""

    @property
    def line(self) -> str:
        """For the terminal."""
        mark = {"ok": "ok", "careful": "careful", "fail": "FAIL", "skipped": "-"}[self.state]
        return f"{mark:<8} {self.name:<9} {self.said}" + (f"; {self.mend}" if self.mend else "")


def main(arguments: Sequence[str]) -> int:
    """``apex-fast doctor``: prints the checks; 0, or 1 if one failed.

    Raises:
        SettingsError: wrong usage.
    """
    words = list(arguments)
    if not words or "--help" in words or "-h" in words:
        print(USAGE)
        return 0
    as_json, without_probe = "--json" in words, "--no-probe" in words or "--no_probe" in words
    words = [word for word in words if word not in ("--json", "--no-probe", "--no_probe")]
    gpu, words = _gpu(words)
    path = words.pop(0) if not words[0].startswith("--") else None
    checks: list[Check] = []
    for check in examine(path, words, gpu=gpu, probe=not without_probe):
        checks.append(check)
        if not as_json:
            print(check.line, flush=True)
    failed = [check.name for check in checks if check.state == "fail"]
    if as_json:
        found = {"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}
        print(json.dumps(found, indent=2))
    elif failed:
        print(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    return 1 if failed else 0


def _gpu(words: list[str]) -> tuple[int | None, list[str]]:
    from apex_fast.planning.report import gpu_bytes

    rest: list[str] = []
    found = None
    position = 0
    while position < len(words):
        name, equals, value = words[position].partition("=")
        position += 1
        if name != "--gpu":
            rest.append(words[position - 1])
            continue
        if not equals:
            if position == len(words):
                raise SettingsError("--gpu needs a value; see apex-fast doctor --help")
            value = words[position]
            position += 1
        found = gpu_bytes(value)
    if not rest:
        raise SettingsError("doctor needs a config: apex-fast doctor CONFIG.yaml")
    return found, rest


def examine(
    path: str | Path | None, overrides: Sequence[str] = (), *, gpu: int | None = None, probe: bool = True
) -> Iterator[Check]:
    """The checks of a run, each as soon as it is made.

    Args:
        path, overrides: as :func:`apex_fast.training.config.load_config` takes them.
        gpu: bytes of the GPU to plan for; None is the one of this machine.
        probe: whether to load the model and ask it for the shift.
    """
    try:
        config = _config(path, overrides)
    except (SettingsError, FileNotFoundError) as error:
        yield Check("config", "fail", str(error))
        return
    yield Check("config", "ok", f"{path or 'command line'}: {_what(config)}")
    found = _Findings(config, gpu, probe)
    for name, check in _CHECKS.items():
        try:
            yield from check(found)
        except (SettingsError, OSError, ImportError, RuntimeError, ValueError) as error:
            # The run itself would end with this message, which says what to do. Other checks may still find something.
            yield Check(name, "fail", str(error) or type(error).__name__)


def _config(path: str | Path | None, overrides: Sequence[str]) -> TrainConfig:
    """As ``apex-fast train`` reads it: ``--model`` and ``--prompts`` without a file are a run from prompts alone."""
    from apex_fast.training import prompts_only

    if path is None and prompts_only.is_front_door(overrides):
        return prompts_only.config_from(overrides)
    return load_config(path, prompts_only.with_model(overrides))


def _what(config: TrainConfig) -> str:
    what = "all parameters" if config.rank is None else f"a LoRA of rank {config.rank}"
    model = config.pretrained_model_name_or_path or f"a new {config.model.family} network"
    return f"{config.loss}, {what} of {model}, {config.max_train_steps} steps"


class _Findings:
    """The config, and what one check found for the next."""

    def __init__(self, config: TrainConfig, gpu: int | None, probe: bool) -> None:
        self.config, self.gpu, self.probe = config, gpu, probe
        self.device: torch.device | None = None
        self.plan: Any = None
        self.model_is_here = False
        self.fits = True


# ---- what is installed


def _versions(found: _Findings) -> Iterator[Check]:
    wrong, seen = [], [f"apex_fast {__version__}", f"torch {torch.__version__}"]
    for name, wanted, extra in _requirements():
        if extra not in (None, "train") or name == "torch":
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if not _satisfies(version, wanted):
            wrong.append(f"{name} {version}, wanted {wanted}")
        if name in ("diffusers", "transformers", "peft", "accelerate"):
            seen.append(f"{name} {version}")
    if wrong:
        yield Check("versions", "fail", ", ".join(wrong), "pip install -U 'apex_fast[train]'")
    else:
        yield Check("versions", "ok", ", ".join(seen))
    config = found.config
    needed = {
        "tensorboard": (config.report_to == "tensorboard", "train", "report_to: tensorboard"),
        "wandb": (config.report_to == "wandb", "wandb", "report_to: wandb"),
        "torchao": (config.quantization == "int8", "quantization", "quantization: int8"),
        "bitsandbytes": (config.quantization == "nf4", "quantization", "quantization: nf4"),
    }
    if getattr(config, "optimizer", "adamw") != "adamw":
        needed["bitsandbytes"] = (True, "quantization", f"optimizer: {config.optimizer}")
    for module, (asked, extra, key) in needed.items():
        if asked and importlib.util.find_spec(module) is None:
            yield Check("versions", "fail", f"{key} needs {module}", f"pip install 'apex_fast[{extra}]'")


def _requirements() -> Iterator[tuple[str, str, str | None]]:
    """(package, versions, extra) as the installed metadata has them."""
    try:
        requirements = importlib.metadata.requires("apex_fast") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for text in requirements:
        match = _REQUIREMENT.match(text)
        if match is not None:
            yield match[1], match[2].strip(), match[3]


def _satisfies(version: str, wanted: str) -> bool:
    if not wanted or importlib.util.find_spec("packaging") is None:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted, prereleases=True).contains(version)


def _ops(found: _Findings) -> Iterator[Check]:
    _library.load()
    names = info.op_names()
    gpu = torch.cuda.is_available() and found.config.device != "cpu"
    key = "CUDA" if gpu else "CPU"
    kernels = {name: info.kernel_of(name, key) for name in names}
    compiled = sum(kernel == info.COMPILED for kernel in kernels.values())
    refused = [name for name, kernel in kernels.items() if kernel in (info.REFUSED, info.MISSING)]
    said = f"{compiled} of {len(names)} have compiled kernels for {key}"
    if refused:
        mend = "build with CUDA (docs/install.md)" if gpu else "build again: pip install ."
        yield Check("ops", "fail", f"{said}; none runs for {', '.join(refused)}", mend)
    elif compiled == 0:
        mend = "build with CUDA: docs/install.md" if gpu else "APEX_FAST_KERNELS=reference asks for this; unset it"
        yield Check("ops", "careful", f"{said}, so all run as plain torch", mend)
    else:
        rest = len(names) - compiled
        yield Check("ops", "ok", said + (f", {rest} run as plain torch" if rest else ""))


def _device(found: _Findings) -> Iterator[Check]:
    from apex_fast.training.models import device_of

    config = found.config
    found.device = device_of(config.device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
    seen = ", ".join(f"cuda:{i} {g.name} with {g.total_memory / (1 << 30):.1f} GiB" for i, g in enumerate(gpus))
    if found.device.type == "cpu":
        if config.device == "cpu" or _is_small(config):
            yield Check("device", "ok", f"the CPU, {torch.get_num_threads()} threads" + (f"; {seen}" if seen else ""))
        else:
            mend = "CUDA_VISIBLE_DEVICES and the installed torch decide; device: cpu says that the CPU is meant"
            yield Check("device", "careful", "no GPU is visible, so the run would be on the CPU", mend)
        return
    yield Check("device", "ok", f"the run is on {found.device}; visible: {seen}")
    if "bf16" in (config.mixed_precision, config.weight_dtype) and not torch.cuda.is_bf16_supported(False):
        yield Check("device", "careful", f"{found.device} computes bf16 by emulation", "write mixed_precision: no")
    free, total = torch.cuda.mem_get_info(found.device)
    if free < 0.9 * total:
        said = f"{size(total - free)} of {found.device} are taken already, by this or other programs"
        yield Check("device", "careful", said, "`nvidia-smi` names them")


def _is_small(config: TrainConfig) -> bool:
    name = config.pretrained_model_name_or_path
    return name is None or is_shipped(name)


# ---- what is read


def _model(found: _Findings) -> Iterator[Check]:
    from apex_fast.planning.blueprint import PlanError, blueprint_of
    from apex_fast.training.models import is_hub_id, pretrained_folder, start_lora_file

    config = found.config
    name = config.pretrained_model_name_or_path
    if config.start_lora is not None:
        start_lora_file(config.start_lora)
    if name is None:
        yield Check("model", "ok", f"a new {config.model.family} network from the config")
        return
    if is_hub_id(name):
        found.model_is_here = _on_disk(name, config.revision)
        if not found.model_is_here:
            said = f"{name} is not on this machine; the run downloads it"
            yield Check("model", "careful", said, f"fetch it before: hf download {name}")
            return
        yield Check("model", "ok", f"{name}, downloaded already")
        return
    folder = pretrained_folder(name)
    found.model_is_here = True
    if missing := list(_missing_weights(folder)):
        said = f"{folder} lacks {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if missing[3:] else "")
        found.model_is_here = False
        yield Check("model", "fail", said, "copy or download it again")
        return
    if damaged := list(_damaged_files(folder)):
        found.model_is_here = False
        yield Check("model", "fail", "; ".join(damaged[:3]), "copy or download it again")
        return
    try:
        family = blueprint_of(config).family
    except PlanError as error:
        yield Check("model", "careful", f"{name}: {error}")
        return
    yield Check("model", "ok", f"{family}, in {folder}")


def _on_disk(name: str, revision: str | None) -> bool:
    """Whether a model of the hub is in the local cache, as far as its index tells; the network is not asked."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(name, "model_index.json", revision=revision)
    return isinstance(index, str) and not list(_missing_weights(Path(index).parent))


def _damaged_files(folder: Path) -> Iterator[str]:
    """What is no JSON, and weight files that were cut off, by their headers; tensors are not read."""
    for file in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            yield f"{file} is no JSON ({error})"
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            try:
                entries = json.loads(opened.read(length)) if 0 < length <= file.stat().st_size else None
            except ValueError:
                entries = None
        if not isinstance(entries, dict):
            yield f"{file} has no header of safetensors"
            continue
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        if (whole := 8 + length + max(ends, default=0)) != (is_there := file.stat().st_size):
            yield f"{file} has {is_there} bytes instead of {whole}"


def _missing_weights(folder: Path) -> Iterator[str]:
    """Weight files that an index in ``folder`` names and that are not there; an index of a part, or the part itself."""
    index = folder / "model_index.json"
    if index.is_file():
        for part, entry in json.loads(index.read_text(encoding="utf-8")).items():
            if isinstance(entry, list) and None not in entry and not (folder / part).is_dir():
                yield part
    for listing in folder.glob("*/*.safetensors.index.json"):
        for file in set(json.loads(listing.read_text(encoding="utf-8")).get("weight_map", {}).values()):
            if not (listing.parent / file).is_file():
                yield f"{listing.parent.name}/{file}"


def _data(found: _Findings) -> Iterator[Check]:
    from apex_fast.data.source import BrokenPictureError, Source
    from apex_fast.data.tar_shards import shown
    from apex_fast.training.encoding import open_data

    config = found.config
    try:
        source = open_data(config)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    broken, read = [], 0
    if config.prompts is not None:
        yield Check("data", "ok", f"{len(source)} prompts from {config.prompts}; the model draws their samples itself")
        return
    if isinstance(source, Source):
        for sample in itertools.islice(source.samples(), PICTURES):
            read += 1
            try:
                sample.open()
            except BrokenPictureError:
                broken.append(sample.name)
    name = shown(str(getattr(source, "label", None) or config.dataset_name))
    said = f"{len(source)} samples from {name}" + (f", {read} pictures read" if read else "")
    if read and len(broken) == read:
        yield Check("data", "fail", f"{said}: none of them is a picture ({broken[0]}, ...)", "look at the files")
        return
    notes = [f"not readable: {', '.join(broken)}"] if broken else []
    notes += source.warnings() if isinstance(source, Source) else []
    batch = config.train_batch_size * config.gradient_accumulation_steps
    if len(source) < batch:
        notes.append(f"a step takes {batch} samples, so every one is seen more than once in it")
    yield Check("data", "careful" if notes else "ok", "; ".join([said, *notes]))


def _cache(found: _Findings) -> Iterator[Check]:
    from apex_fast import caching

    state, line = caching.state_of(found.config)
    states: dict[str, State] = {"none": "skipped", "whole": "ok", "unfinished": "careful"}
    yield Check("cache", states.get(state, "fail"), line)


# ---- what is needed


def _memory(found: _Findings) -> Iterator[Check]:
    from apex_fast.planning.blueprint import PlanError
    from apex_fast.planning.planner import plan
    from apex_fast.planning.ways import CONTEXT, GIB

    config = found.config
    on_gpu = found.gpu is not None or (found.device is not None and found.device.type == "cuda")
    available = found.gpu
    where = "the GPU that --gpu names"
    if available is None and found.device is not None:
        available, where = _memory_of(found.device)
    try:
        found.plan = plan(config, gpu=available if on_gpu else None, compare=False)
    except (PlanError, ValueError) as error:
        yield Check("memory", "skipped", f"not planned: {error}")
        return
    made = found.plan
    needed = made.needed if on_gpu else made.needed - CONTEXT
    said = f"needs {needed / GIB:.2f} GiB"
    if available is None:
        yield Check("memory", "skipped", f"{said}; nothing to compare it with", "write --gpu 24GB")
        return
    said += f" by the plan, and {where} has {available / GIB:.2f} GiB"
    found.fits = needed <= available
    command = f"`{command_name()} plan` with --gpu says what makes it fit"
    if made.advice is not None and made.advice.fits:
        changes = {k: v if isinstance(v, str) else json.dumps(v) for k, v in made.advice.changes.items()}
        command = "it fits with " + " ".join(f"--{key} {value}" for key, value in changes.items())
    yield Check("memory", "ok", said) if found.fits else Check("memory", "fail", said, command)
    memory = _main_memory()
    if on_gpu and found.gpu is None and memory is not None and made.host > memory:
        said = f"loading needs {made.host / GIB:.1f} GiB of main memory, and {memory / GIB:.1f} GiB are there"
        found.fits = False
        yield Check("memory", "fail", said, "take a machine with more, or weight_dtype: bf16")


def _memory_of(device: torch.device) -> tuple[int | None, str]:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, str(device)
    return _main_memory(), "main memory"


def _main_memory() -> int | None:
    """Bytes that programs can still take, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _probe(found: _Findings) -> Iterator[Check]:
    from apex_fast.training.visibility import asks_the_shifted_branch

    config = found.config
    asked = asks_the_shifted_branch(config)
    reasons = {
        "this loss has no shifted branch that has to see anything": not asked,
        "--no-probe": not found.probe,
        "probe: false; the run trains this shift as it is": not config.probe,
        "the model is not here": not found.model_is_here,
        "the run is for another machine (--gpu)": found.gpu is not None,
        "the model does not fit into this machine": not found.fits,
    }
    if reason := next((words for words, holds in reasons.items() if holds), None):
        yield Check("probe", "skipped", f"left out: {reason}")
        return
    from apex_fast.probing.command import probe_config

    assert found.device is not None
    try:
        line = probe_config(config, found.device)
    except torch.OutOfMemoryError:
        yield Check("probe", "careful", f"the probe does not fit into the memory of {found.device}")
        return
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        yield Check("probe", "careful", f"the probe could not say: {error}")
        return
    said = line.line.removeprefix("probe: ")
    if line.verdict == "visible":
        yield Check("probe", "ok", said)
    elif line.verdict == "destructive":
        yield Check("probe", "careful", said, f"`{command_name()} probe` has a grid of milder shifts")
    else:
        mend = f"`{command_name()} probe` shows what this network sees; probe: false trains it anyway, as a control"
        yield Check("probe", "fail", said, mend)


def _disk(found: _Findings) -> Iterator[Check]:
    from apex_fast.training.state import claim_folder

    config = found.config
    folder = Path(config.output_dir)
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())
    if not os.access(there, os.W_OK):
        yield Check("disk", "fail", f"{there} cannot be written to", "write another output_dir")
        return
    if config.resume_from_checkpoint is None:
        claim_folder(config, delete=False)
    free = shutil.disk_usage(there).free
    if found.plan is None:
        yield Check("disk", "skipped", f"{size(free)} are free; the size of a checkpoint is not known without a plan")
        return
    one, many = checkpoint_bytes(found.plan), _checkpoints_at_once(config)
    needed = one * many + found.plan.held.get("trained weights", 0)
    said = f"{many} checkpoints of {size(one)} and the model are {size(needed)}, {size(free)} are free in {there}"
    if needed > free:
        yield Check("disk", "fail", said, "write another output_dir, or a smaller checkpoints_total_limit")
    else:
        yield Check("disk", "ok", said)


def checkpoint_bytes(made: Any) -> int:
    """Bytes of one checkpoint of a run that was planned: what is trained, its averages, the optimizer's state, and a
    real branch that is an average."""
    from apex_fast.planning.step import AVERAGE, OPTIMIZER, REAL, TRAINED

    held = made.held
    parts = [held.get(name, 0) for name in (TRAINED, AVERAGE, OPTIMIZER)]
    if made.config.real_branch_in_use == "ema":
        parts.append(held.get(REAL, 0))
    return sum(parts)


def _checkpoints_at_once(config: TrainConfig) -> int:
    """Checkpoints that lie on the disk at the fullest moment: the newest is written before the oldest goes, and the
    best one stays whatever its age."""
    every = config.checkpointing_steps
    written = 1 if every is None else -(-config.max_train_steps // every)
    limit = config.checkpoints_total_limit
    return written if limit is None else min(written, limit + 1 + (config.best_metric is not None))


_CHECKS: dict[str, Callable[[_Findings], Iterator[Check]]] = {
    "versions": _versions,
    "ops": _ops,
    "device": _device,
    "model": _model,
    "data": _data,
    "cache": _cache,
    "memory": _memory,
    "probe": _probe,
    "disk": _disk,
}
