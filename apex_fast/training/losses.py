"""What the loss of a run can be, and which of the run's settings each one uses.

One file may serve runs of several losses, so a setting that the chosen one does not use is no mistake. But whoever
wrote it expects something of it; so a run tells at its start of those that differ from their defaults
(:func:`unused_settings`).

:data:`USED_BY` says of a key or a section which losses use it; what is not in it, every loss does. It is made from what
stands beside the losses: ``reads`` of the peers' methods and the fields that :mod:`apex_fast.paper` names. It knows
losses and nothing else: the times of a term whose weight is 0 count as used. Not in it either:

* what is refused in another loss, such as ``shifted_adapter``;
* ``guidance_scale`` and ``negative_prompt``, by which samples of the base are drawn whatever the loss is; where nothing
  is guided, :func:`apex_fast.training.guidance.unused_guidance` says so;
* ``shift_padding``, which is noted with the finished model.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import TYPE_CHECKING, Any, Literal, get_args

from apex_fast import paper
from apex_fast.peers import Dmd2, Peer, Rcgm, TwinFlow
from apex_fast.training.sections import ObjectiveSettings, PeerSettings
from apex_fast.training.settings import as_mapping, keys_of

if TYPE_CHECKING:
    from apex_fast.training.config import TrainConfig

Loss = Literal["correction", "paper", "flow_matching", "dmd2", "dmd2_lora", "twinflow", "rcgm"]

LOSSES: tuple[str, ...] = get_args(Loss)

METHODS: dict[str, type[Peer]] = {"dmd2": Dmd2, "dmd2_lora": Dmd2, "twinflow": TwinFlow, "rcgm": Rcgm}
"""Losses that are other groups' methods (:mod:`apex_fast.peers`)."""

PEERS = tuple(METHODS)

UNSHIFTED = ("flow_matching", *PEERS)
"""Losses without a condition shift."""

SHIFTED = tuple(loss for loss in LOSSES if loss not in UNSHIFTED)
"""Losses of :class:`apex_fast.ApexObjective`."""


def _used_by() -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {
        # The others tune a model that is there.
        "model": ("flow_matching",),
        "flow_matching_times": ("flow_matching",),
        "schedule": SHIFTED,
        "probe": SHIFTED,
        "shift": SHIFTED,
        # The paper's loss has no real branch, and the teacher of dmd2 is always the frozen start.
        "real_branch": ("correction", *PEERS),
        "real_ema_decay": ("correction", "twinflow", "rcgm"),
        # It looks at the correction while that has weight.
        "alarms.branch_difference": ("correction",),
        "alarms.shift_drift": SHIFTED,
        "alarms.diversity": SHIFTED,
    }
    for field in dataclasses.fields(ObjectiveSettings):
        if field.name in paper.OWN_FIELDS:
            table[f"objective.{field.name}"] = ("paper",)
        else:
            table[f"objective.{field.name}"] = SHIFTED if field.name in paper.SHARED_FIELDS else ("correction",)
    # Read where the fake score is made, which is not the method's work.
    built = {"fake_learning_rate": ("dmd2", "dmd2_lora"), "fake_rank": ("dmd2_lora",)}
    for field in dataclasses.fields(PeerSettings):
        readers = tuple(loss for loss, method in METHODS.items() if field.name in method.reads)
        table[f"peer.{field.name}"] = built.get(field.name, readers)
    return table


USED_BY = _used_by()
"""The losses that use a key or a section of the config, by its name."""


def uses(loss: str, key: str) -> bool:
    """Whether ``loss`` uses the setting ``key``, such as "schedule" or "objective.fake_times.low"."""
    parts = key.split(".")
    return all(loss in USED_BY.get(".".join(parts[:count]), LOSSES) for count in range(1, len(parts) + 1))


def unused_settings(config: TrainConfig) -> list[str]:
    """ "key (value)" of every setting that the config's loss does not use and that differs from its default, in the
    order of the config."""
    # Plain values: a section that was read from a file may have a list where its default is a tuple.
    values = as_mapping(config)
    defaults = {field.name: as_mapping(_default(field)) for field in dataclasses.fields(config)}
    found = []
    for key in keys_of(type(config)):
        if uses(config.loss, key):
            continue
        value, default = (functools.reduce(operator.getitem, key.split("."), tree) for tree in (values, defaults))
        if value != default:
            found.append(f"{key} ({_shown(value)})")
    return found


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    """As a config has it, cut short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
