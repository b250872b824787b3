"""The optimizer of a run: its kinds, the rates of its groups, and a step that can be left out without a look at the
device.

There are at most three groups of parameters: the network's, at ``learning_rate``; an adapter that the shifted branch
has for itself, at ``shifted_adapter_learning_rate``; and those of a trainable condition shift, at
``shift_learning_rate`` and without weight decay (a decay would pull A and b towards 0, which is another shift and not a
smaller one). Roles that share their weights have no rates of their own: one step of the optimizer follows the sum of
their gradients, so the ratio of two rates would be the ratio of the weights of their losses, which the objective has.
With weights of its own the shifted branch needs a rate instead, for AdamW divides the weight of a single loss out
again. Rates belong to the config and not to the optimizer's state, so that a resumed run follows a
changed ``learning_rate``; every step they are set anew from one factor (:mod:`apex_fast.training.schedule`).

A step that must not happen (an alarm saw a gradient that is not finite, or exploded) is decided by a number that lies
on the device. torch's fused AdamW reads such a flag in its own kernel and leaves weights, moments and step count as
they are, so nobody waits for it; that is what runs on a GPU. Where the kernel cannot (8-bit AdamW, parameters sharded
by FSDP2, the plain loop on a CPU, a loss scaler, which owns that flag), the flag is read on the host, which on a GPU
drains its queue once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apex_fast.extras import require
from apex_fast.parts import is_sharded
from apex_fast.training.settings import SettingsError

if TYPE_CHECKING:
    from apex_fast.training.config import TrainConfig

NETWORK, SHIFTED_ADAPTER, SHIFT = "network", "shifted_adapter", "shift"
"""Names of the groups of parameters, in the key ``group``."""


def make_optimizer(
    config: TrainConfig,
    network: Sequence[nn.Parameter],
    shift: Sequence[nn.Parameter] = (),
    shifted_adapter: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimizer that ``config.optimizer`` names, over what is trained of the network, of the shift and of an
    adapter that only the shifted branch uses.

    Its groups carry their name in ``group["group"]``; :func:`set_rates` sets their rates.

    Raises:
        ImportError: ``adamw_8bit`` without bitsandbytes; the message names the extra.
        SettingsError: ``shift_learning_rate`` for a shift that is not trained.
    """
    if config.shift_learning_rate is not None and not shift:
        raise SettingsError(
            "shift_learning_rate is the rate of a trainable shift, and this run trains none; write shift.trainable: "
            "true, or leave shift_learning_rate out"
        )
    groups: list[dict[str, Any]] = [{"params": list(network), "group": NETWORK, "lr": config.learning_rate}]
    if shifted_adapter:
        groups.append({"params": list(shifted_adapter), "group": SHIFTED_ADAPTER, "lr": _rate(config, SHIFTED_ADAPTER)})
    if shift:
        groups.append({"params": list(shift), "group": SHIFT, "lr": _rate(config, SHIFT), "weight_decay": 0.0})
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if config.optimizer == "adamw_8bit":
        # Small tensors (below 4096 values) keep their moments in fp32: bitsandbytes' own rule.
        return require("bitsandbytes.optim", extra="quantization").AdamW8bit(groups, **options)
    # Fused where a GPU holds all of it: fastest, and the one kernel that can be told on the device to leave a step out.
    # Not where FSDP2 holds a part of it: that kernel takes no plain flag beside sharded parameters.
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.is_cuda and p.is_floating_point() and not is_sharded(p) for p in parameters)
    return torch.optim.AdamW(groups, **options, **({"fused": True} if fused else {}))


def _rate(config: TrainConfig, group: str) -> float:
    if group == SHIFT and config.shift_learning_rate is not None:
        return config.shift_learning_rate
    if group == SHIFTED_ADAPTER and config.shifted_adapter_learning_rate is not None:
        return config.shifted_adapter_learning_rate
    return config.learning_rate


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, factor: float) -> None:
    """Sets every group's rate to ``factor`` times its own peak rate of the config."""
    for group in optimizer.param_groups:
        group["lr"] = _rate(config, group.get("group", NETWORK)) * factor


def waits_for_the_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether :func:`step_unless` has to read its flag on the host."""
    return not optimizer.defaults.get("fused")


def step_unless(
    optimizer: torch.optim.Optimizer, skip: Tensor | None, scaler: torch.amp.GradScaler | None = None
) -> bool | None:
    """A step of ``optimizer``, or none where ``skip`` is not zero: weights, moments and its count of steps then stay.

    Args:
        optimizer: one of :func:`make_optimizer`.
        skip: 0-d, floating point, on the device of the parameters; the same number in every process. None: step.
        scaler: of fp16 training, whose ``unscale_`` was called on the gradients; it is updated.

    Returns:
        Whether it stepped; None where only the device knows, by ``skip``.
    """
    if scaler is not None:
        # The scaler leaves steps with overflown gradients out by itself, and owns the flag that the kernel reads.
        wanted, before = skip is None or not skip.item(), scaler.get_scale()
        if wanted:
            scaler.step(optimizer)
        scaler.update()
        return wanted and scaler.get_scale() >= before
    if skip is None:
        optimizer.step()
        return True
    if waits_for_the_device(optimizer):
        wanted = not skip.item()
        if wanted:
            optimizer.step()
        return wanted
    optimizer.found_inf = skip.detach().float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
    return None
