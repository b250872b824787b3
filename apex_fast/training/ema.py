"""Moving averages of a network's weights, at one rate or several: what is evaluated and exported.

What is averaged are the trained parameters, so under LoRA an average is an adapter of the size of the one that is
trained, and is written as one (:func:`apex_fast.lora.save_lora` within :meth:`WeightAverage.applied`). Memory: one fp32
copy of the trained parameters for each rate, on their device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.parts import is_sharded, placed


class WeightAverage:
    """Exponential moving averages of the trainable parameters of ``module``, in fp32 (fp64 for fp64 parameters).

    ``average <- decay_i * average + (1 - decay_i) * weight`` with ``decay_i = min(decay, (1 + i) / (10 + i))`` at
    update i, so that a short run is not dominated by its first weights.

    Attributes:
        decays: the rates, the first of which is evaluated and exported.
        averages: by rate, tensors by the name of their parameter; ``average`` is the first one's.
        notes: what :meth:`load_state_dict` did that somebody should know of.
    """

    def __init__(
        self, module: nn.Module, decay: float | Sequence[float], *, leave_out: Iterable[nn.Parameter] = ()
    ) -> None:
        """Raises ValueError unless every decay is in [0, 1) and there once, and a parameter is trainable.

        leave_out: parameters that are trained and are no part of the result.
        """
        self.decays = (decay,) if isinstance(decay, (int, float)) else tuple(decay)
        check_decays(self.decays)
        self.notes: list[str] = []
        left_out = {id(p) for p in leave_out}
        named = module.named_parameters()
        self.parameters = {name: p for name, p in named if p.requires_grad and id(p) not in left_out}
        if not self.parameters:
            raise ValueError("nothing to average: no parameter is trainable")
        self.averages = {
            decay: {
                name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                for name, p in self.parameters.items()
            }
            for decay in self.decays
        }
        # On the device, where it is decided whether a step counts.
        self._updates = torch.zeros((), device=_own(next(iter(self.average.values()))).device)

    @property
    def updates(self) -> int:
        """Updates so far; on a GPU the host waits for this."""
        return int(self._updates)

    @property
    def decay(self) -> float:
        """The first rate."""
        return self.decays[0]

    @property
    def average(self) -> dict[str, Tensor]:
        """The average of the first rate."""
        return self.averages[self.decay]

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """One step of every average, after the optimizer's.

        skip: 0-d, on the device: not zero where the optimizer left its step out. The averages and their count of
        updates then stay, and nobody waits to know.
        """
        took = self._updates.new_ones(()) if skip is None else (skip == 0).to(self._updates)
        self._updates += took
        for decay, average in self.averages.items():
            # 1 - decay_i, written so that fp32 does not lose the digits of a decay near 1.
            share = (9.0 / (10.0 + self._updates)).clamp_min(1.0 - decay) * took
            averages = [_own(a) for a in average.values()]
            weights = [_own(p.detach()).to(a.dtype) for p, a in zip(self.parameters.values(), averages, strict=True)]
            torch._foreach_lerp_(averages, weights, [share.to(a) for a in averages])

    @contextlib.contextmanager
    def applied(self, decay: float | None = None) -> Iterator[None]:
        """Within this context the network's weights are the average of ``decay`` (None: of the first rate); afterwards
        they are, bit for bit, what they were. KeyError for a rate that is not kept."""
        average = self.averages[self.decay if decay is None else decay]
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(average)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of updates; those of further rates under ``others``, by their rate as a text."""
        state = {"updates": self.updates, "decay": self.decay, "average": dict(self.average)}
        if len(self.decays) > 1:
            state["others"] = {f"{decay:g}": dict(self.averages[decay]) for decay in self.decays[1:]}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`: of every rate the average that was saved of it. A first rate that was not saved
        goes on from the first average that was, and ``notes`` says so; every further one must be there.

        Raises:
            ValueError: the parameters differ from those saved, or a further rate was not saved.
        """
        self.notes = []
        try:
            found = {self.decay: chosen_average(state, f"{self.decay:g}")}
        except ValueError:
            found = {self.decay: chosen_average(state, None)}
            if "decay" in state:
                self.notes.append(
                    f"the checkpoint has no average with ema_decay {self.decay:g}; that one goes on from the average "
                    f"with {state['decay']:g}"
                )
        found |= {decay: chosen_average(state, f"{decay:g}") for decay in self.decays[1:]}
        for average in found.values():
            if set(average) != set(self.parameters):
                odd = sorted(set(average) ^ set(self.parameters))[0]
                raise ValueError(f"the average was saved for other parameters (first difference: {odd})")
        self._updates.fill_(int(state["updates"]))
        with torch.no_grad():
            for decay, average in found.items():
                for name, value in average.items():
                    own = self.averages[decay][name]
                    own.copy_(placed(value, own))


def check_decays(decays: Sequence[float]) -> None:
    """ValueError unless there is at least one, each in [0, 1) and there once."""
    if not decays:
        raise ValueError("ema_decay is an empty list; write a number, several, or null for no average")
    for decay in decays:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {decay}")
    if len({f"{decay:g}" for decay in decays}) != len(decays):
        raise ValueError(f"ema_decay names a rate twice: {list(decays)}")


def chosen_average(state: Mapping[str, Any], rate: str | None) -> dict[str, Tensor]:
    """One average of :meth:`WeightAverage.state_dict`: that of ``rate`` such as "0.999", or the first one for None.

    ValueError naming the rates that there are.
    """
    others = state.get("others", {})
    first = state.get("decay")
    if rate is None or (first is not None and _same(rate, first)):
        return state["average"]
    for name, average in others.items():
        if _same(rate, name):
            return average
    there = ", ".join([*([] if first is None else [f"{first:g}"]), *others]) or "one, whose rate was not noted"
    raise ValueError(f"there is no average with ema_decay {rate}; averages there: {there}")


def _own(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _same(rate: str, other: float | str) -> bool:
    try:
        return f"{float(rate):g}" == f"{float(other):g}"
    except ValueError:
        return False
