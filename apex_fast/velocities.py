"""The three roles of the one network: generator, shifted branch and real branch, as plain callables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from .condition import Condition

Velocity = Callable[[Tensor, Tensor, "Tensor | Condition"], Tensor]
"""``velocity(x_t, t, condition) -> Tensor``: x_t ``[B, ...]`` in the dtype of the data it belongs to, t ``[B]`` fp32
(fp64 for fp64 data), 1 = noise; the result has the shape of x_t. What a network needs beyond that (casting, time units,
sign) is the callable's work."""

Guide = Callable[[Tensor, Tensor, float], Tensor]
"""``guide(v_condition, v_negative, scale) -> Tensor``, all ``[B, ...]``: how a model family combines the two velocities
of classifier-free guidance where that is not ``v_negative + scale (v_condition - v_negative)``."""


class Velocities:
    """Which callable plays which role.

    The objective asks for nothing else, so an EMA, a switched-off adapter or a second adapter is just another callable.

    Args:
        generator: F(x_s, s, c), trained; it also answers the flow-matching term on data.
        shifted: F(x_fake_t, t, c_fake), trained by L_fake; None means the generator's.
        real: the velocity of the data, called without gradient; None means the generator's ("live").
        guide: how the real branch is guided under the objective's ``guidance_scale``; None is the common line
            ``v_negative + scale (v - v_negative)``, which the loss op computes on its way.

    The roles are plain attributes. Wrapping a network after the roles were made (DDP, compile) means assigning the
    wrapped one: ``velocities.generator = wrapped``.

    Raises:
        TypeError: a role is not callable.
    """

    def __init__(
        self,
        generator: Velocity,
        shifted: Velocity | None = None,
        real: Velocity | None = None,
        guide: Guide | None = None,
    ) -> None:
        for name, role in (("generator", generator), ("shifted", shifted), ("real", real)):
            if not callable(role) and not (role is None and name != "generator"):
                raise TypeError(
                    f"Velocities: {name} must be a callable velocity(x_t, t, condition), got {type(role).__name__}"
                )
        self.generator = generator
        self.shifted = shifted
        self.real = real
        self.guide = guide
        # Set by from_module for the branches it copies.
        self._source: nn.Module | None = None
        self._copy: nn.Module | None = None
        self._own: tuple[str, ...] = ()
        self._ema_decay: float | None = None
        self._averages: dict[str, Tensor] = {}

    @classmethod
    def of(cls, velocities: Velocities | Velocity) -> Velocities:
        """``velocities`` itself, or a plain callable in all three roles."""
        return velocities if isinstance(velocities, Velocities) else cls(velocities)

    @classmethod
    def from_module(
        cls, model: nn.Module, real: Literal["frozen", "ema", "live"] = "frozen", ema_decay: float = 0.98
    ) -> Velocities:
        """The common roles of one module: it generates, and it answers under the shifted condition.

        Args:
            model: a module whose ``forward(x_t, t, condition)`` is the velocity. A DistributedDataParallel wrapper is
                looked through for the copy.
            real: where the velocity of the data comes from. ``"frozen"``: a copy of the module as it is now, in eval
                mode; it does not drift with the generator, which makes a run steady. ``"ema"``: a copy that follows the
                module by exponential moving average; call :meth:`update_ema` after every optimizer step. ``"live"``:
                the module itself; no memory, noisier. Under LoRA no copy is needed: the base with its adapter off is a
                callable to pass as ``Velocities(model, real=...)``.
            ema_decay: share of the old average that an update keeps, for ``"ema"``.

        ``"frozen"`` and ``"ema"`` hold one more copy of the buffers and of the parameters that require gradients; the
        others (a frozen text encoder, a LoRA base) are shared. For half-precision parameters ``"ema"`` also holds an
        fp32 average, since an update of 2 % would be lost in the rounding.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: unknown ``real`` or a decay outside [0, 1].
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"Velocities.from_module: expected an nn.Module, got {type(model).__name__}")
        if real not in ("frozen", "ema", "live"):
            raise ValueError(f'Velocities.from_module: real must be "frozen", "ema" or "live", got {real!r}')
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"Velocities.from_module: ema_decay must lie in [0, 1], got {ema_decay}")
        roles = cls(model)
        if real == "live":
            return roles
        source = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        # What never changes need not be held twice: such parameters enter the copy as the very same objects.
        shared = {id(p): p for p in source.parameters() if not p.requires_grad}
        twin = copy.deepcopy(source, shared).requires_grad_(False).eval()
        roles.real = roles._copy = twin
        roles._own = tuple(name for name, p in source.named_parameters() if p.requires_grad)
        if real == "ema":
            roles._source = source
            roles._ema_decay = float(ema_decay)
            half = (torch.float16, torch.bfloat16)
            parameters = dict(twin.named_parameters())
            roles._averages = {n: parameters[n].float() for n in roles._own if parameters[n].dtype in half}
        return roles

    @property
    def shares_network(self) -> bool:
        """Whether generator and shifted branch are the same callable, so that one stacked call can serve both."""
        return self.shifted is None or self.shifted is self.generator or self.shifted == self.generator

    @property
    def has_ema(self) -> bool:
        """Whether the real branch is an exponential moving average."""
        return self._ema_decay is not None

    def shifted_parameters(self) -> list[nn.Parameter]:
        """Trained parameters that the shifted branch alone uses, and that are no part of the result."""
        return []

    @property
    def changes(self) -> bool:
        """Whether :meth:`state_dict` holds what training changes, so that a checkpoint has to keep it."""
        return self.has_ema

    @torch.no_grad()
    def update_ema(self, skip: Tensor | None = None) -> None:
        """Moves the average towards the module: ``average = decay * average + (1 - decay) * parameter``.

        Buffers are copied. Call it after every optimizer step; it does nothing where the real branch is no average, so
        a loop may always call it.

        skip: 0-d, on the device of the parameters: where it is not zero, the average stays.
        """
        if self._ema_decay is None or self._copy is None or self._source is None:
            return
        # By name, not by stored pairs: sharding or casting a module replaces its parameters.
        mine, theirs = dict(self._copy.named_parameters()), dict(self._source.named_parameters())
        for name in self._own:
            average = self._averages.get(name, mine[name])
            average.lerp_(theirs[name].detach().to(average.dtype), self._ema_share(average, skip))
            if name in self._averages:
                mine[name].copy_(average)
        for own, source in zip(self._copy.buffers(), self._source.buffers(), strict=True):
            own.copy_(source)

    def _ema_share(self, average: Tensor, skip: Tensor | None) -> float | Tensor:
        """Of the parameters in an update of ``average``; without ``skip`` a plain number, which the host knows."""
        share = 1 - self._ema_decay
        return share if skip is None else share * (skip == 0).to(average)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs of a real branch that was copied here: its own parameters and buffers.

        Shared parameters are left out: they are the module's. Empty for a live or a caller-made branch.
        """
        return {name: value.detach().clone() for name, value in self._own_state().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            ValueError: names that do not belong to this real branch, or missing ones.
        """
        own = self._own_state()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ValueError(
                f"Velocities.load_state_dict: this state is of another real branch (missing {missing[:3]}, "
                f"unknown {unknown[:3]}); make the roles the way the saved run made them"
            )
        for name, value in own.items():
            value.copy_(state[name])
        if self._copy is not None:
            parameters = dict(self._copy.named_parameters())
            for name, average in self._averages.items():
                parameters[name].copy_(average)

    def _own_state(self) -> dict[str, Tensor]:
        if self._copy is None:
            return {}
        parameters = dict(self._copy.named_parameters())
        return {
            **{name: self._averages.get(name, parameters[name]) for name in self._own},
            **dict(self._copy.named_buffers()),
        }
