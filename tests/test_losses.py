"""What each loss uses of a config: the table is true, and a run tells of what its loss leaves unread."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from small_networks import VectorNetwork
from torch import Tensor

pytest.importorskip("yaml")

from apex_fast import ApexObjective, ConditionShift, Velocities
from apex_fast.peers import Copies, Dmd2, FakeScore, Peer, PeerSettings
from apex_fast.training.config import TrainConfig, load_config
from apex_fast.training.losses import LOSSES, METHODS, SHIFTED, USED_BY, unused_settings, uses
from apex_fast.training.sections import ObjectiveSettings
from apex_fast.training.settings import argument_docs, build, keys_of

LEAST = ["--output_dir", "runs/x", "--pretrained_model_name_or_path", "digits_start"]

OTHER: dict[str, Any] = {
    "kind": "discrete",
    "values": [0.3],
    "low": 0.3,
    "high": 0.9,
    "constant_share": 0.5,
    "schedule": "joint",
    "real_branch": "ema",
    "real_ema_decay": 0.5,
    "peer.fake_learning_rate": 1e-3,
    "peer.fake_rank": 3,
    "peer.shares": [0.0, 1.0, 1.0],
    "objective.warmup_steps": 3,
    "objective.ramp_steps": 2,
    "objective.consistency_weight": 1.0,
    "objective.mix_regulariser_weight": 1.0,
    "shift.train_scale": True,
    "shift.train_bias": True,
    "model.transformer": {"num_layers": 2},
    "model.text_encoder": {"num_layers": 2},
    "model.sample_size": 16,
    "model.vae": "nowhere",
    # Alarms that would go off at once.
    "alarms.branch_difference.low": 1e3,
    "alarms.branch_difference.high": 1e4,
    "alarms.branch_difference.action": "stop",
    "alarms.branch_difference.action_low": "stop",
    "alarms.branch_difference.window": 1,
    "alarms.shift_drift.most": 1e-9,
    "alarms.diversity.every": 1,
    "alarms.diversity.share": 0.99,
}
"""Values other than the defaults, by key or by the last part of it, where a rule does not find one."""

REFUSED = [
    f"objective.{name}"
    for name in (
        "clip_mode",
        "correction_weighting",
        "generator_every",
        "supervised_every",
        "consistency_weight",
        "mix_regulariser_weight",
    )
]
"""What the paper's loss refuses rather than leave unread."""


def other(key: str, kind: Any, default: Any) -> Any:
    """A value of a key that is not its default."""
    leaf = key.rpartition(".")[2]
    if key in OTHER or (leaf in OTHER and "_times." in key):
        return OTHER.get(key, OTHER.get(leaf))
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return 0.5 * default + 0.3
    return next(choice for choice in get_args(kind) if choice != default)


def altered(loss: str) -> dict[str, Any]:
    """Another value of every setting that ``loss`` does not use, by key."""
    config = load_config(None, LEAST)
    found = {}
    for key, (kind, _) in keys_of(TrainConfig).items():
        if uses(loss, key) or (loss == "paper" and key in REFUSED):
            continue
        default: Any = config
        for name in key.split("."):
            default = getattr(default, name)
        found[key] = other(key, kind, default)
        assert found[key] != default, key
    return found


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, leaf = key.split(".")
        target = tree
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
    return tree


# ---- what is told


@pytest.mark.parametrize("loss", LOSSES)
def test_a_config_of_defaults_leaves_nothing_unread(loss: str) -> None:
    config = dataclasses.replace(load_config(None, LEAST), loss=loss)
    assert unused_settings(config) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--loss", "dmd2", "--schedule", "joint", "--objective.correction_weight", "2.0"],
            ["schedule (joint)", "objective.correction_weight (2.0)"],
        ),
        (["--loss", "twinflow", "--objective.clip", "null"], ["objective.clip (null)"]),
        (["--loss", "twinflow", "--peer.query_times.low", "0.1", "--peer.fake_rank", "4"], ["peer.fake_rank (4)"]),
        (["--loss", "rcgm", "--peer.rectify_weight", "1", "--peer.order", "1"], ["peer.rectify_weight (1.0)"]),
        (["--loss", "dmd2", "--peer.fake_rank", "4", "--peer.fake_steps", "2"], ["peer.fake_rank (4)"]),
        (["--loss", "dmd2_lora", "--peer.fake_rank", "4", "--probe", "false"], ["probe (false)"]),
        (
            ["--peer.order", "1", "--flow_matching_times.low", "0.1"],
            ["flow_matching_times.low (0.1)", "peer.order (1)"],
        ),
        (["--loss", "paper", "--real_branch", "ema", "--objective.clip", "2"], ["real_branch (ema)"]),
        (["--loss", "flow_matching", "--shift.scale", "1"], ["shift.scale (1.0)"]),
        (["--objective.paper_times.low", "0.1", "--schedule", "joint"], []),
    ],
)
def test_what_differs_from_its_default_and_is_not_used_is_told(words: list[str], told: list[str]) -> None:
    assert unused_settings(load_config(None, [*LEAST, *words])) == told


def test_a_long_value_is_cut_short() -> None:
    config = load_config(None, LEAST)
    model = dataclasses.replace(config.model, transformer={f"key_{number}": number for number in range(30)})
    (line,) = unused_settings(dataclasses.replace(config, model=model))
    assert line.startswith("model.transformer ({'key_0': 0") and line.endswith(" ...)") and len(line) < 90


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "flow_matching"])
def test_a_smoke_run_is_told_of_nothing_that_was_not_written(tmp_path: Path, loss: str) -> None:
    from apex_fast.training.smoke import small_config

    words = ["--output_dir", "x", "--pretrained_model_name_or_path", "Qwen/Qwen-Image", "--dataset_name", "not/there"]
    config = load_config(None, [*words, "--loss", loss, "--peer.step_size", "0.02", "--rank", "4"])
    small, _ = small_config(config, "qwen_image", tmp_path)
    assert unused_settings(small) == unused_settings(config)


# ---- whether it is true


def test_the_table_names_settings_and_losses_that_there_are() -> None:
    keys = keys_of(TrainConfig)
    sections = {key.rpartition(".")[0] for key in keys} | {key.partition(".")[0] for key in keys}
    for name, losses in USED_BY.items():
        assert name in keys or name in sections, name
        assert losses and set(losses) < set(LOSSES), name


def test_the_help_of_a_peers_setting_names_the_losses_that_use_it() -> None:
    for name, text in argument_docs(PeerSettings).items():
        named = {loss for loss in METHODS if re.search(rf"\b{loss}\b", text)}
        assert named == set(USED_BY[f"peer.{name}"]), f"{name}: {text}"


@pytest.fixture(scope="module")
def tiny_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_runs import make_start

    return make_start(tmp_path_factory.mktemp("tiny") / "start")


def trained(start: Path, folder: Path, loss: str, more: dict[str, Any]) -> tuple[Any, list[dict[str, Any]], str]:
    """A run of four steps: the trainer, its metrics but for times and bytes, what it said."""
    from apex_fast.training.loop import Trainer

    values = {
        "output_dir": str(folder),
        "pretrained_model_name_or_path": str(start),
        "loss": loss,
        "max_train_steps": 4,
        "train_batch_size": 8,
        "logging_steps": 1,
        "device": "cpu",
        "report_to": "none",
        "checkpointing_steps": None,
    }
    stream = io.StringIO()
    trainer = Trainer(build(TrainConfig, {**values, **nested(more)}, source="test"), stream=stream)
    assert trainer.run().finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    odd = ("seconds/", "images_per_second", "peak_bytes")
    return trainer, [{k: v for k, v in line.items() if not k.startswith(odd)} for line in lines], stream.getvalue()


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_loss_does_not_use_changes_nothing(
    tiny_start: Path, tmp_path: Path, one_thread: None, loss: str
) -> None:
    plain, expected, said = trained(tiny_start, tmp_path / "plain", loss, {})
    assert "does not use" not in said and len(expected) == 4
    more = altered(loss)
    trainer, found, said = trained(tiny_start, tmp_path / "altered", loss, more)
    assert found == expected
    assert trainer.objective.__class__ is plain.objective.__class__
    weights = dict(plain.backbone.named_parameters())
    for name, value in trainer.backbone.named_parameters():
        assert torch.equal(value, weights[name]), name
    told = unused_settings(trainer.config)
    assert {line.split(" (")[0] for line in told} == set(more)
    assert f"loss: {loss} does not use: {', '.join(told)}\n" in said


class Read:
    """Notes the fields of a dataclass that are read while it is ``on``."""

    def __init__(self) -> None:
        self.on, self.names = False, set()

    def of(self, cls: type, *args: Any, **kwargs: Any) -> Any:
        """A ``cls`` whose fields are watched."""
        fields, watch = {field.name for field in dataclasses.fields(cls)}, self

        class Watched(cls):
            def __getattribute__(self, name: str) -> Any:
                if watch.on and name in fields:
                    watch.names.add(name)
                return super().__getattribute__(name)

        made = Watched(*args, **kwargs)
        self.on = True
        return made


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 2, generator=generator), torch.randn(8, 3, generator=generator)


@pytest.mark.parametrize("method", sorted(set(METHODS.values()), key=lambda method: method.name))
def test_a_peer_reads_the_settings_that_it_names(method: type[Peer]) -> None:
    read = Read()
    settings = read.of(PeerSettings, generator_steps=2)
    velocities = Velocities(VectorNetwork(), real=VectorNetwork())
    options: dict[str, Any] = {"copies": Copies(networks=2, trained=1, adapters=0)}
    if method is Dmd2:
        fake = VectorNetwork()
        parameters = dict(fake.named_parameters())
        optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
        options["fake"] = FakeScore(fake, parameters, optimizer, learning_rate=lambda step: 0.1)
    method(velocities, settings, **options).step(*batch(), step=0)
    assert read.names == set(method.reads)


@pytest.mark.parametrize("loss", SHIFTED)
def test_the_objective_reads_the_settings_that_its_loss_uses(loss: str) -> None:
    """Nothing is claimed to be used that is not; that the others change nothing is shown by the runs above."""
    read = Read()
    terms: dict[str, Any] = {"consistency_weight": 1.0, "mix_regulariser_weight": 1.0} if loss == "correction" else {}
    objective = read.of(ApexObjective, ConditionShift(), loss=loss, warmup_steps=0, ramp_steps=1, **terms)
    objective.backward(Velocities(VectorNetwork(), real=VectorNetwork()), *batch(), step=1)
    used = {field.name for field in dataclasses.fields(ObjectiveSettings) if uses(loss, f"objective.{field.name}")}
    assert used <= read.names
