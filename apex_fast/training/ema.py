"""The moving average of a network's weights: what is evaluated and exported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of the trainable parameters of ``module``, kept in fp32 (fp64 for fp64 parameters).

    ``average <- decay_i * average + (1 - decay_i) * weight`` with ``decay_i = min(decay, (1 + i) / (10 + i))`` at
    update i, so that a short run is not dominated by its first weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Raises ValueError unless 0 <= decay < 1 and at least one parameter is trainable."""
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("nothing to average: no parameter is trainable")
        self.average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average, after the optimizer's."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = list(self.average.values())
        weights = [p.detach().to(a.dtype) for p, a in zip(self.parameters.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the network's weights are the average; afterwards they are, bit for bit, what they
        were."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict:
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the parameters differ from those saved."""
        if set(state["average"]) != set(self.average):
            odd = sorted(set(state["average"]) ^ set(self.average))[0]
            raise ValueError(f"the average was saved for other parameters (first difference: {odd})")
        self.updates = int(state["updates"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
