"""Trials files: what is tried, why, and with which seeds.

    suite: digits_sana                  # name of the results
    benchmark: digits                   # what scores them; resolution: 32 where it has several
    base: examples/digits_demo.yaml     # or the keys of a config, here
    nfe: [1, 2, 4]                      # sampling steps that are scored; more than one by Euler and by re-noise
    samples: 600                        # pictures of a score; curve_samples: those of the ten scores on the way
    start: {nfe: [1, 50], guidance_scale: [1, 3]}    # the model before tuning, scored beside the trials; optional
    seeds: [0, 1, 2]                    # of every trial that names none
    trials:
      - name: weight_4
        why: "twice the correction: faster at first, noisier at the end"
        set: {objective.correction_weight: 4.0}
      - name: unshifted
        control: true
        why: "..."
        set: {shift.scale: 1.0, shift.bias: 0.0, probe: false}

A trial may also have ``plot: true``; where some have, the plots show those alone.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from apex_fast.data.shipped import SHIPPED
from apex_fast.training.config import TrainConfig
from apex_fast.training.foreign_keys import FOREIGN_KEYS
from apex_fast.training.settings import SettingsError, as_mapping, build, check, keys_of, merge, read_yaml

ROOT = Path(__file__).resolve().parents[2]
TRIALS = ROOT / "benchmarks" / "trials"

START = "start"
"""Name of the rows of the model before tuning."""

DATA = "data"
"""Key of the scores of real pictures, in those rows."""

TRIAL, ROW = "trial.json", "row.json"
"""What a process is told, and what it leaves, in the folder of its run."""

OF_THE_QUEUE = (
    "output_dir",
    "seed",
    "device",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "report_to",
    "validation_steps",
    "validation_minutes",
    "validation_prompts",
    "validation_metrics",
    "best_metric",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
)
"""Keys that the queue sets itself, whatever the base says."""

NOT_OF_THE_RESULT = (
    *(key for key in OF_THE_QUEUE if key != "seed"),
    "validation_images_per_prompt",
    "validation_num_inference_steps",
    "validation_base_inference_steps",
    "best_metric_mode",
    "distributed_timeout",
    "cache_dir",
)
"""Keys that change no number of a row: two runs that differ in them alone are the same trial."""

OF_THE_MODEL = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "weight_dtype",
    "quantization",
    "max_sequence_length",
    "embedded_guidance_scale",
)
"""Keys that the scores of the start depend on."""

_NAME = re.compile(r"[A-Za-z0-9_.]+(-[A-Za-z0-9_.]+)*")


@dataclass(frozen=True)
class Start:
    """How the model is scored before it is tuned. With guidance, too, where ``guidance_scale`` has more than 1."""

    nfe: tuple[int, ...] = (1, 2, 4, 8, 50)
    guidance_scale: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Trial:
    """What is changed of the base, and the written prediction. ``set`` has dotted keys."""

    name: str
    why: str
    set: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    control: bool = False
    plot: bool = False


@dataclass(frozen=True)
class Suite:
    """A trials file. ``base``: the keys of the config that all trials start from."""

    name: str
    benchmark: str
    base: Mapping[str, Any]
    trials: tuple[Trial, ...]
    resolution: int | None = None
    nfe: tuple[int, ...] = (1, 2, 4)
    samples: int = 600
    curve_samples: int = 240
    start: Start | None = None
    seeds: tuple[int, ...] = (0, 1, 2)

    def jobs(self) -> list[Job]:
        """Everything that is to be run: the start, then seed by seed, so that each trial has one result early."""
        found = []
        if self.start is not None:
            found += [Job(self, Trial(START, "the model before tuning", seeds=self.seeds), seed) for seed in self.seeds]
        longest = max(len(trial.seeds) for trial in self.trials)
        for turn in range(longest):
            found += [Job(self, trial, trial.seeds[turn]) for trial in self.trials if turn < len(trial.seeds)]
        return found


@dataclass(frozen=True)
class Job:
    """One trial with one seed: one process, one folder, one row."""

    suite: Suite
    trial: Trial
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.trial.name}-seed-{self.seed}"

    @property
    def trains(self) -> bool:
        """False for the start, which is only scored."""
        return self.trial.name != START

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its whole config as nested plain values. SettingsError for keys that cannot be used."""
        source = f"suite {self.suite.name}, trial {self.trial.name}"
        values = merge(self.suite.base, check(TrainConfig, nested(self.trial.set), source=source, foreign=FOREIGN_KEYS))
        values = {key: value for key, value in values.items() if key not in OF_THE_QUEUE}
        values |= {"output_dir": self.name, "seed": self.seed, "report_to": "none"}
        return as_mapping(build(TrainConfig, values, source=source, foreign=FOREIGN_KEYS))

    @property
    def changes(self) -> dict[str, Any]:
        """What of the settings differs from the base, by dotted key."""
        base = flat(self.base_settings)
        return {
            key: value
            for key, value in flat(self.settings).items()
            if value != base.get(key) and key not in NOT_OF_THE_RESULT
        }

    @property
    def base_settings(self) -> dict[str, Any]:
        """The base as nested plain values, with this job's seed."""
        return Job(self.suite, Trial("base", ""), self.seed).settings

    @property
    def evaluation(self) -> dict[str, Any]:
        """How it is scored."""
        suite = self.suite
        asked: dict[str, Any] = {
            "benchmark": suite.benchmark,
            "resolution": suite.resolution,
            "nfe": list(suite.nfe),
            "samples": suite.samples,
        }
        if not self.trains:
            assert suite.start is not None
            asked |= {"nfe": list(suite.start.nfe), "guidance_scale": list(suite.start.guidance_scale)}
        return asked

    def same_result(self, before: Mapping[str, Any]) -> bool:
        """Whether a run with the flat settings ``before`` makes the row of this job. A key that one of the two does not
        know was at its default then: a new key of the library changes nothing by itself."""
        after, defaults, missing = flat(self.settings), _defaults(), object()
        keys = [key for key in {*before, *after} if key.split(".")[0] not in NOT_OF_THE_RESULT]
        if not self.trains:
            keys = [key for key in keys if key in OF_THE_MODEL]
        return all(
            before.get(key, defaults.get(key, missing)) == after.get(key, defaults.get(key, missing)) for key in keys
        )


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``; sections may be written as they are."""
    result: dict[str, Any] = {}
    for name, value in dotted.items():
        path = str(name).split(".")
        below: Any = value
        for key in reversed(path):
            below = {key: below}
        result = merge(result, below)
    return result


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key. What is a section is what the config says is one; a free mapping is one value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in _KEYS:
            found.update(flat(value, f"{name}."))
        else:
            found[name] = value
    return found


_KEYS = keys_of(TrainConfig)


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    # A new network, since other losses ask for a pretrained one; every other key is at its default.
    new = {"output_dir": "x", "loss": "flow_matching", "model": {"transformer": {"x": 1}}}
    values = flat(as_mapping(build(TrainConfig, new, source="defaults")))
    known = {key: values[key] for key in values if key not in ("loss", "model.transformer")}
    return {**known, "loss": "correction", "model.transformer": {}}


def digest(values: Any) -> str:
    """Short and the same for equal plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


# ---- reading


def load_suite(path: str | Path) -> Suite:
    """The suite in a trials file. Configs of trials are not built yet (:attr:`Job.settings` does).

    Raises:
        SettingsError: an unknown key, a trial without a prediction, a name that is there twice, a value of the wrong
            kind; the message says what to write.
    """
    path = Path(path)
    values = read_yaml(path)
    keys = [
        "suite",
        "benchmark",
        "resolution",
        "base",
        "nfe",
        "samples",
        "curve_samples",
        "start",
        "seeds",
        "trials",
    ]
    _known(values, keys, f"{path}")
    for key in ("suite", "benchmark", "base", "trials"):
        if values.get(key) in (None, [], {}):
            raise SettingsError(f"{path}: {key} is missing")
    _name(values["suite"], f"{path}: suite")
    if values["benchmark"] not in SHIPPED:
        raise SettingsError(f"{path}: benchmark must be one of {', '.join(SHIPPED)}, got {values['benchmark']!r}")
    offered = SHIPPED[values["benchmark"]].resolutions
    if values.get("resolution") not in (None, *offered):
        raise SettingsError(
            f"{path}: resolution must be {' or '.join(map(str, offered))} for {values['benchmark']}, got "
            f"{values['resolution']!r}"
        )
    base = _base(values["base"], path)
    seeds = _numbers(values.get("seeds", [0, 1, 2]), f"{path}: seeds", least=0)
    trials = values["trials"]
    if not isinstance(trials, list):
        raise SettingsError(f"{path}: trials must be a list of trials, each with name, why and set")
    found: dict[str, Trial] = {}
    for place, entry in enumerate(trials, 1):
        trial = _trial(entry, seeds, f"{path}: trial {place}")
        if trial.name in found:
            raise SettingsError(f"{path}: two trials have the name {trial.name!r}; rename one")
        found[trial.name] = trial
    return Suite(
        name=values["suite"],
        benchmark=values["benchmark"],
        resolution=values.get("resolution"),
        base=base,
        nfe=_numbers(values.get("nfe", [1, 2, 4]), f"{path}: nfe"),
        samples=_number(values.get("samples", 600), f"{path}: samples", 2),
        curve_samples=_number(values.get("curve_samples", 240), f"{path}: curve_samples", 2),
        start=_start(values.get("start"), path),
        seeds=seeds,
        trials=tuple(found.values()),
    )


def load_suites(paths: Iterable[str | Path]) -> list[Suite]:
    """The suites of several files, whose names differ."""
    suites: dict[str, Suite] = {}
    for path in paths:
        suite = load_suite(path)
        if suite.name in suites:
            raise SettingsError(f"{path}: another file has the suite {suite.name!r} already; rename one")
        suites[suite.name] = suite
    return list(suites.values())


def _trial(entry: Any, seeds: tuple[int, ...], where: str) -> Trial:
    if not isinstance(entry, Mapping):
        raise SettingsError(f"{where} must have the keys name, why and set, got {entry!r}")
    _name(entry.get("name"), f"{where}: name")
    where = f"{where} ({entry['name']})"
    if entry["name"] == START:
        raise SettingsError(f"{where}: {START!r} is the name of the untuned model's rows; write another")
    _known(entry, ["name", "why", "set", "seeds", "control", "plot"], where)
    why = entry.get("why")
    if not isinstance(why, str) or not why.strip():
        raise SettingsError(f"{where}: why is missing: write down what the trial is expected to show before it is run")
    changes = entry.get("set") or {}
    if not isinstance(changes, Mapping):
        raise SettingsError(f"{where}: set must hold `dotted.key: value`, got {changes!r}")
    own = sorted({str(key).split(".")[0] for key in changes} & set(OF_THE_QUEUE))
    if own:
        raise SettingsError(f"{where}: set: {own[0]} is set by the queue" + ("; write seeds" if "seed" in own else ""))
    for key in ("control", "plot"):
        if not isinstance(entry.get(key, False), bool):
            raise SettingsError(f"{where}: {key} must be true or false, got {entry[key]!r}")
    own_seeds = _numbers(entry["seeds"], f"{where}: seeds", least=0) if "seeds" in entry else seeds
    return Trial(
        name=entry["name"],
        why=" ".join(why.split()),
        set=dict(changes),
        seeds=own_seeds,
        control=entry.get("control", False),
        plot=entry.get("plot", False),
    )


def _base(value: Any, path: Path) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return check(TrainConfig, value, source=f"{path}: base", foreign=FOREIGN_KEYS)
    if not isinstance(value, str):
        raise SettingsError(f"{path}: base must be a config file or the keys of one, got {value!r}")
    file = ROOT / value
    return check(TrainConfig, read_yaml(file), source=str(file), foreign=FOREIGN_KEYS)


def _start(value: Any, path: Path) -> Start | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise SettingsError(f"{path}: start must hold nfe and guidance_scale, got {value!r}")
    _known(value, ["nfe", "guidance_scale"], f"{path}: start")
    scales = value.get("guidance_scale", [1.0])
    if not isinstance(scales, list) or not scales or not all(_is_number(s) and s >= 0 for s in scales):
        raise SettingsError(f"{path}: start.guidance_scale must be a list of numbers from 0, got {scales!r}")
    counts = _numbers(value.get("nfe", [1, 2, 4, 8, 50]), f"{path}: start.nfe")
    return Start(counts, tuple(float(scale) for scale in scales))


def _known(values: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(keys)}"
            raise SettingsError(f"{where}: unknown key {key!r}: {hint}")


def _name(value: Any, where: str) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise SettingsError(f"{where} must be a name of letters, digits, '_', '.' and '-', got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any, where: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SettingsError(f"{where} must be a whole number from {least}, got {value!r}")
    return value


def _numbers(value: Any, where: str, *, least: int = 1) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise SettingsError(f"{where} must be a list of whole numbers, got {value!r}")
    numbers = tuple(_number(item, where, least) for item in value)
    if len(set(numbers)) < len(numbers):
        raise SettingsError(f"{where} has a number twice: {value}")
    return numbers
