"""A peer's method (:mod:`apex_fast.peers`) for a run: which networks play its roles, and what else it trains.

=============  =======================================  ==========================================================
``loss``       all parameters are tuned                 a LoRA is tuned
=============  =======================================  ==========================================================
``dmd2``       student, frozen copy (teacher), trained  one base with the student's adapter, off for the teacher;
               copy (fake score): 3 networks            a trained copy of the base (fake score): 2 networks
``dmd2_lora``  student, frozen copy (teacher), and an   one base with two adapters, the student's and the fake
               adapter on that copy (fake score): 2     score's, both off for the teacher: 1
``rcgm``,      student, and the copy that targets come  one base; the average is an adapter, the frozen start the
``twinflow``   from (none with ``real_branch: live``)   base with its adapter off
=============  =======================================  ==========================================================

``real_branch`` and ``real_ema_decay`` say where the targets of rcgm and twinflow come from (``auto``: ema); the teacher
of dmd2 is always the frozen start.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.offload import Offload
from apex_fast.peers import Copies, Dmd2, FakeScore, Peer, PeerSettings, Rcgm
from apex_fast.training.config import TrainConfig
from apex_fast.training.guidance import RealGuidance
from apex_fast.training.losses import METHODS
from apex_fast.training.models import Autocast
from apex_fast.training.optimizers import make_optimizer
from apex_fast.training.schedule import learning_rate_factor
from apex_fast.training.settings import SettingsError
from apex_fast.velocities import Velocities, Velocity

FAKE = "fake"
"""Name of the fake score's adapter beside the student's."""
DEFAULT_RANK = 64
"""Of that adapter, where all parameters of the student are tuned."""


def make_peer(config: TrainConfig, backbone: Backbone, velocities: Velocities, guidance: RealGuidance | None) -> Peer:
    """The method that ``config.loss`` names.

    Args:
        velocities: the roles of ``backbone``, as :func:`apex_fast.training.setup.make_velocities` made them; with
            ``dmd2_lora`` and full tuning the copy of the real branch gets an adapter.
        guidance: of the teacher.

    Raises:
        SettingsError: a guidance that the method cannot do.
    """
    settings = PeerSettings(**vars(config.peer))
    options: dict[str, Any] = {
        "guidance_scale": 1.0 if guidance is None else guidance.objective_scale,
        "checkpointing": config.gradient_checkpointing is not False,
    }
    method = METHODS[config.loss]
    if issubclass(method, Dmd2):
        make = _fake_network if config.loss == "dmd2" else _fake_adapter
        velocity, parameters, copies = make(config, backbone, velocities, settings)
        peak = config.learning_rate if settings.fake_learning_rate is None else settings.fake_learning_rate
        fake = FakeScore(
            velocity,
            parameters,
            make_optimizer(config, list(parameters.values())),
            learning_rate=partial(_rate, config, peak),
            max_grad_norm=config.max_grad_norm,
        )
        return method(velocities, settings, fake, copies=copies, **options)
    real = config.real_branch_in_use
    if config.mode == "full":
        copies = Copies(networks=1 + (real != "live"), trained=1, adapters=0)
    else:
        copies = Copies(networks=1, trained=0, adapters=1 + (real == "ema"))
    assert issubclass(method, Rcgm)
    try:
        return method(velocities, settings, copies=copies, distils=real == "frozen", **options)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _rate(config: TrainConfig, peak: float, step: int) -> float:
    """The rate of a step on the run's own schedule."""
    return peak * learning_rate_factor(
        step, kind=config.lr_scheduler, warmup_steps=config.lr_warmup_steps, total_steps=config.max_train_steps
    )


Fake = tuple[Velocity, dict[str, nn.Parameter], Copies]
"""How the fake score is asked, what is trained of it, and what the whole method holds then."""


def _fake_network(config: TrainConfig, backbone: Backbone, velocities: Velocities, settings: PeerSettings) -> Fake:
    """A copy of the start, trained in all of its parameters."""
    own = copy.deepcopy(backbone)
    transformer: Any = own.transformer
    if config.mode == "lora":
        # Adapters of the student, which the fake score has nothing of.
        transformer.unload_lora()
        transformer.to(torch.float32)
    unused = set(own.parameters_without_gradient())
    parameters = {name: p for name, p in transformer.named_parameters() if name not in unused}
    transformer.train()
    if config.activation_offload:
        own.offload = Offload(transformer, activations=True)
    whole = 3 if config.mode == "full" else 2
    copies = Copies(networks=whole, trained=whole - 1, adapters=int(config.mode == "lora"))
    return _called(own, velocities), parameters, copies


def _fake_adapter(config: TrainConfig, backbone: Backbone, velocities: Velocities, settings: PeerSettings) -> Fake:
    """An adapter: on the teacher's copy, or beside the student's."""
    from apex_fast.lora import GENERATOR, START, AdapterRole, AdapterSwitch, LoraSettings, add_another, add_lora

    if config.mode == "full":
        teacher: Any = velocities.real
        frozen: Backbone = teacher.module if isinstance(teacher, Autocast) else teacher
        add_lora(frozen, LoraSettings(rank=settings.fake_rank or DEFAULT_RANK), seed=config.seed + 1)
        switch = AdapterSwitch(frozen.transformer)
        frozen.recompute_states.append(switch.recompute_state)
        parameters = {name: p for name, p in frozen.transformer.named_parameters() if p.requires_grad}
        if config.activation_offload:
            frozen.offload = Offload(frozen.transformer, activations=True)
        velocities.real = AdapterRole(teacher, switch, ())
        # peft has renamed the copy's parameters; it stays what it is, so there is no state of it to keep.
        velocities._copy, velocities._own = None, ()
        return AdapterRole(teacher, switch, (GENERATOR,)), parameters, Copies(networks=2, trained=1, adapters=1)
    roles: Any = velocities
    before = roles.switch.active
    parameters = add_another(backbone, FAKE, rank=settings.fake_rank, seed=config.seed + 1)
    roles.switch.activate(before)
    start = tuple(name for name in before if name == START)
    velocity = AdapterRole(velocities.generator, roles.switch, (*start, FAKE))
    return velocity, parameters, Copies(networks=1, trained=0, adapters=2)


def _called(network: Backbone, velocities: Velocities) -> Velocity:
    """``network`` under the same autocast as the generator."""
    generator: Any = velocities.generator
    if isinstance(generator, Autocast):
        return Autocast(network, generator._device_type, generator._dtype)
    return network
