"""``apex-fast probe``: loads a model, measures a grid of shifts, prints the table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

from apex_fast.backbones.base import Backbone
from apex_fast.command import NAME
from apex_fast.condition import Condition
from apex_fast.data.shipped import DIGITS, SHIPPED, few_prompts
from apex_fast.probing.probe import BIASES, CHECK_TIMES, SCALES, TIMES, CheckLine, ProbeReport, check_shift, probe
from apex_fast.probing.report import as_mapping, table
from apex_fast.shift import SITES, ConditionShift
from apex_fast.shipped import is_shipped
from apex_fast.training.checkpoint import checkpoints, load_json, load_state
from apex_fast.training.config import ShiftSettings, TrainConfig, load_config
from apex_fast.training.encoding import encode_text, move_parts, picture_size
from apex_fast.training.losses import UNSHIFTED
from apex_fast.training.memory import during, release
from apex_fast.training.models import (
    Autocast,
    device_of,
    is_hub_id,
    load_found,
    load_pretrained,
    pretrained_source,
)
from apex_fast.training.results import INDEX, Record, data_set_of, find_result
from apex_fast.training.settings import SettingsError
from apex_fast.training.setup import AUTOCAST, load_backbone, make_trainable

PROMPTS = (
    "a photo of a red cat on a wooden chair",
    "two small birds above the sea in the morning",
    "an old map with blue and green lines",
    "a portrait of a woman with glasses, oil on canvas",
)
"""What a model is asked where nothing else is given; one with a text encoder of its own gets prompts of the digits."""

PROBED_PROMPTS = 4
"""Prompts that :func:`probe_config` asks with."""
QUICK_PROMPTS = 2
"""Prompts of its own that a pipeline is asked with, unless ``--full``: as many as another prompt needs."""

_DESCRIPTION = """Whether a model sees a condition shift c_fake = scale * c + bias, measured before any training: for a
grid of shifts the change in attention, keys, values and velocity, a verdict (invisible, visible, destructive) with its
reason, and a recommended setting. docs/probe.md explains the numbers."""


def main(arguments: Sequence[str]) -> int:
    """``apex-fast probe MODEL``: prints the table, writes JSON and PNG where asked; 0.

    Raises:
        SettingsError: options that do not fit each other or the model.
        FileNotFoundError, CheckpointError: no such model, or a damaged one.
    """
    options = _parser().parse_args([_hyphens(word) for word in arguments])
    for name in ("json", "png"):
        # Before the passes rather than after them.
        if (file := getattr(options, name)) is not None and file.is_dir():
            raise SettingsError(f"--{name}: {file} is a folder; name a file in it")
    device = device_of(options.device)
    with during("loading the model"):
        subject = _load(options, device)
    prompts = _prompts(options, subject)
    condition = _encode(subject.backbone, prompts, device)
    small = subject.backbone.text is not None
    batch = options.batch_size or (len(prompts) if small else 1)
    times = options.times or (TIMES if small or options.full else CHECK_TIMES)
    print(f"probing {subject.phrase} on {device}")
    try:
        with during("probing"):
            report = probe(
                subject.backbone,
                condition,
                scales=options.scales,
                biases=options.biases,
                sites=options.sites,
                modes=options.modes,
                shifts=subject.shifts,
                times=times,
                shift_pooled=not options.no_pooled,
                shape=subject.shape,
                batch_size=batch,
                queries=options.queries,
                seed=options.seed,
                call=subject.call,
                say=lambda line: print(line, flush=True),
            )
    except ValueError as error:
        raise SettingsError(str(error)) from error
    for note in subject.notes:
        print(f"note: {note}")
    print(table(report))
    _write(options, subject, prompts, report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{NAME} probe", description=_DESCRIPTION)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a diffusers pipeline, hub id, a name such as digits_start, folder of a run or a checkpoint, or "
        "the config of a run (.yaml), whose own shift is then measured as well",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line (default: a few of its own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a heat map")
    parser.add_argument("--scales", type=float, nargs="*", default=SCALES, metavar="A", help=_default(SCALES))
    parser.add_argument("--biases", type=float, nargs="*", default=BIASES, metavar="B", help=_default(BIASES))
    parser.add_argument("--sites", nargs="+", choices=SITES, default=SITES, help=_default(SITES))
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=("scalar", "diagonal"),
        default=("scalar",),
        help="default scalar; a diagonal shift begins as the scalar one",
    )
    parser.add_argument(
        "--times",
        type=float,
        nargs="+",
        metavar="T",
        help=f"{_default(TIMES)}; of a pipeline without --full {_default(CHECK_TIMES).removeprefix('default ')}",
    )
    parser.add_argument(
        "--full", action="store_true", help="ask a pipeline at all times and with four prompts instead of two"
    )
    parser.add_argument("--no-pooled", action="store_true", help="leave pooled text embeddings as they are")
    parser.add_argument(
        "--resolution", type=int, nargs="+", metavar="PIXELS", help="edge, or height and width (default: the model's)"
    )
    parser.add_argument(
        "--batch-size", type=int, help="prompts in a pass (default 1; all for a model with a text encoder of its own)"
    )
    parser.add_argument("--queries", type=int, default=64, help="of a head and sample that are compared (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--base", help="where the model that a run started from is now, if it was moved")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="of a pretrained model (default: bf16 on a GPU, fp32 on a CPU)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (default: cuda if there is one, else cpu), cpu, cuda or cuda:N"
    )
    return parser


def _default(values: Sequence[Any]) -> str:
    return "default " + " ".join(f"{value:g}" if isinstance(value, float) else value for value in values)


def _hyphens(word: str) -> str:
    """``--batch_size`` as ``--batch-size``, and -1e-3, which argparse takes for an option, as -0.001."""
    if re.fullmatch(r"-[0-9.]+[eE][-+]?[0-9]+", word):
        return format(Decimal(word), "f")
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


# ---- what is probed


@dataclass
class _Subject:
    """A model and what belongs to it.

    Attributes:
        phrase: which it is, in words.
        call: what is called in place of the backbone; None for the backbone.
        shifts: of the run, by name.
        prompts: of the run's validation.
        data_set: that it was trained on, if known.
        shape: of the latents; None is the model's own.
        notes: to be printed.
    """

    backbone: Backbone
    phrase: str
    call: Callable[..., Any] | None = None
    shifts: dict[str, ConditionShift] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    data_set: str | None = None
    shape: tuple[int, int, int] | None = None
    notes: list[str] = field(default_factory=list)


def _load(options: argparse.Namespace, device: torch.device) -> _Subject:
    model = options.model
    if Path(model).suffix in (".yaml", ".yml"):
        subject = _from_config(options, device)
    elif not is_shipped(model) and (is_hub_id(model) or _is_plain(Path(model))):
        if not is_hub_id(model):
            _stay_offline()
        dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
        backbone = load_pretrained(pretrained_source(model), weight_dtype=dtype)
        subject = _Subject(backbone, f"{model} in {dtype}")
    else:
        _refuse_dtype(options)
        subject = _from_run(options)
    subject.backbone.eval()
    # Nothing is decoded.
    subject.backbone.free_vae("the probe")
    if options.resolution is not None:
        if len(options.resolution) > 2:
            raise SettingsError(f"--resolution takes an edge, or height and width, got {options.resolution}")
        try:
            subject.shape = subject.backbone.latent_shape(options.resolution[0], options.resolution[-1])
        except ValueError as error:
            raise SettingsError(f"--resolution: {error}") from error
        if subject.backbone.text is not None and subject.shape != subject.backbone.sample_shape:
            raise SettingsError(
                f"--resolution: this model makes samples of {list(subject.backbone.sample_shape[1:])} pixels only"
            )
    return subject


def _refuse_dtype(options: argparse.Namespace) -> None:
    if options.dtype is not None:
        raise SettingsError(
            f"--dtype is for a pretrained model; {options.model} says itself how its weights are stored"
        )


def _is_plain(folder: Path) -> bool:
    """Whether ``folder`` is a model that no run of this library left: a pipeline, or a transformer alone."""
    if (folder / "config.json").is_file():
        return True
    if not (folder / INDEX).is_file():
        return False
    # A model with a text encoder of its own is small and stored as it is to be used.
    return not str(json.loads((folder / INDEX).read_text(encoding="utf-8")).get("_class_name", "")).endswith("Backbone")


def _from_config(options: argparse.Namespace, device: torch.device) -> _Subject:
    """What a run of this config would start from, and its shift."""
    _refuse_dtype(options)
    return _subject_of(load_config(options.model), options.model, device)


def _subject_of(config: TrainConfig, name: str, device: torch.device) -> _Subject:
    if config.pretrained_model_name_or_path is None:
        raise SettingsError(
            f"{name} makes a new network, whose random weights would tell nothing; probe what its run leaves"
        )
    if not is_hub_id(config.pretrained_model_name_or_path):
        _stay_offline()
    backbone = load_backbone(config, [])
    if config.start_lora is not None:
        make_trainable(config, backbone)
    subject = _Subject(backbone, f"{config.pretrained_model_name_or_path}, from which {name} starts")
    if config.mixed_precision != "no":
        subject.call = Autocast(backbone, device.type, AUTOCAST[config.mixed_precision])
        subject.phrase += ", under autocast bf16"
    if backbone.text is None:
        subject.shape = backbone.latent_shape(*picture_size(config, backbone))
    subject.prompts = list(config.validation_prompts)
    subject.data_set = config.dataset_name
    if subject.data_set not in SHIPPED:  # data of one's own, on a model that knows the words of its own
        subject.data_set = data_set_of(config.pretrained_model_name_or_path)
    if config.loss not in UNSHIFTED:
        subject.shifts["config"] = _shift_of(config.shift, backbone)
    return subject


def probe_config(config: TrainConfig, device: torch.device) -> CheckLine:
    """What the network that a run would start from makes of the run's own shift, in nine passes, as the run itself asks
    before its first step.

    Raises:
        SettingsError: a config without a model, or one that does not fit it.
        FileNotFoundError: no such model.
        ValueError: the probe could not say.
    """
    subject = _subject_of(config, "the config", device)
    subject.backbone.eval()
    subject.backbone.free_vae("the probe")
    prompts = subject.prompts if len(subject.prompts) > 1 else _own_prompts(subject)
    condition = _encode(subject.backbone, prompts[:PROBED_PROMPTS], device)
    (shift,) = subject.shifts.values()
    return check_shift(subject.backbone, shift.to(device), condition, shape=subject.shape, call=subject.call)


def _from_run(options: argparse.Namespace) -> _Subject:
    """What a run has come to, and its shift as trained."""
    found = find_result(options.model)
    record = Record.read(found.folder)
    if record is None or not is_hub_id(options.base or record.base):
        _stay_offline()
    backbone, phrase = load_found(found, base=options.base)
    subject = _Subject(backbone, phrase, data_set=data_set_of(options.model))
    if record is not None and record.resolution is not None:
        subject.shape = backbone.latent_shape(*record.resolution)
    if is_shipped(options.model):
        return subject
    run = Path(options.model)
    if found.checkpoint is not None:
        saved: list[Path] = [found.checkpoint]
    else:
        saved = checkpoints(run if run.name != found.folder.name else run.parent)
    if saved:
        _add_trained_shift(subject, saved[-1])
    elif (run / "config.yaml").is_file():
        config = load_config(run / "config.yaml")
        _add_settings(subject, config)
    return subject


def _add_trained_shift(subject: _Subject, checkpoint: Path) -> None:
    keys, state = load_json(checkpoint, "trainer")["config"], load_state(checkpoint, "objective")["shift"]
    subject.prompts = list(keys.get("validation_prompts") or [])
    if state is None:
        return
    own = {entry.name for entry in dataclasses.fields(ShiftSettings)}
    settings = ShiftSettings(**{key: value for key, value in (keys.get("shift") or {}).items() if key in own})
    widths = {name: len(state[key]) for name, key in (("dim", "scale"), ("pooled_dim", "pooled_scale"))
              if key in state and state[key].dim()}  # fmt: skip
    shift = ConditionShift(**vars(settings), **widths)
    shift.load_state_dict(state)
    subject.shifts["run"] = shift.requires_grad_(False)


def _add_settings(subject: _Subject, config: TrainConfig) -> None:
    subject.prompts = list(config.validation_prompts)
    if config.loss in UNSHIFTED:
        return
    subject.shifts["run"] = _shift_of(config.shift, subject.backbone)
    if any(p.requires_grad for p in subject.shifts["run"].parameters()):
        subject.notes.append(
            "the run trained its shift and left no checkpoint: the row has the shift that it began with"
        )


def _shift_of(settings: ShiftSettings, backbone: Backbone) -> ConditionShift:
    widths: dict[str, int] = {}
    if settings.mode == "diagonal":
        widths["dim"] = backbone.site_width(settings.site)
        pooled = getattr(backbone.transformer.config, "pooled_projection_dim", None)
        if pooled is not None and settings.shift_pooled:
            widths["pooled_dim"] = pooled
    return ConditionShift(**vars(settings), **widths)


def _stay_offline() -> None:
    """For models in local folders: some tokenizers would ask a hub about themselves first, and wait for its answer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


# ---- prompts


def _prompts(options: argparse.Namespace, subject: _Subject) -> list[str]:
    if options.prompts is not None:
        try:
            lines = options.prompts.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise SettingsError(f"--prompts: {options.prompts} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise SettingsError(f"--prompts: {options.prompts} is not UTF-8 ({error}); save it as UTF-8") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise SettingsError(f"--prompts: {options.prompts} has no line with a prompt")
        return found
    if len(subject.prompts) > 1:
        return subject.prompts
    return _own_prompts(subject, options.full)


def _own_prompts(subject: _Subject, full: bool = True) -> list[str]:
    if subject.backbone.text is not None:
        # A small model knows the words of its own data and no others.
        return few_prompts(subject.data_set if subject.data_set in SHIPPED else DIGITS)
    return list(PROMPTS if full else PROMPTS[:QUICK_PROMPTS])


def _encode(backbone: Backbone, prompts: list[str], device: torch.device) -> Condition:
    """The condition of ``prompts``; the transformer is on ``device`` afterwards, and text encoders never with it."""
    if backbone.text is not None:
        backbone.to(device)
        return backbone.encode(prompts)
    if missing := [part for part in backbone.text_parts if backbone.components.get(part) is None]:
        raise SettingsError(
            f"the model has no {', '.join(missing)}, so prompts cannot be encoded; name the folder or hub id of the "
            "whole pipeline"
        )
    with during("encoding prompts"):
        move_parts(backbone, backbone.text_parts, device)
        condition = encode_text(backbone, prompts)
    backbone.free_text_encoders()
    release()
    with during(f"moving the transformer to {device}"):
        backbone.to(device)
    return condition.to(device)


def _write(options: argparse.Namespace, subject: _Subject, prompts: list[str], report: ProbeReport) -> None:
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        values = {"model": subject.phrase, "prompts": prompts, **as_mapping(report)}
        options.json.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(options.json)
    if options.png is not None:
        from apex_fast.probing.picture import heat_map

        print(heat_map(report, options.png, f"shift probe: {subject.phrase}"))
