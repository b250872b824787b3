"""What a training step costs: passes through the network, copies of its weights, memory. Counted in some steps of the
run itself, so that every method is counted by the same rule, whatever it says of itself.

Passes are counted in the class of the backbone: every call of any copy of it adds the rows of its batch, and every
gradient that comes back through its result twice as many; divided by the rows of a step they are forwards F of the
batch, as in :mod:`apex_fast.passes`. Calls of the trained network in eval mode are looks at it, not training. Copies
are the weights of all networks that were called, over those of the trained one without its adapters. Blocks that
gradient checkpointing runs again are not seen.

Memory is that of tensors. On CUDA the allocator knows the peak. On a CPU it is what lives between two steps (weights,
their copies and averages, the optimizer's moments; not the pictures and what scores them) and the most that a step has
besides, which the profiler sees.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.evaluation.cost import profiled_peak
from apex_fast.training.config import TrainConfig
from apex_fast.training.loop import Trainer

STEPS = 12
"""Steps that are counted, at least."""


def steps_of(config: TrainConfig) -> int:
    """Steps that are counted of a run: what happens in every n-th of them is met as often as it should be."""
    every = math.lcm(config.objective.generator_every, config.objective.supervised_every)
    return every * math.ceil(STEPS / every)


class StepMeter:
    """Measures the steps of ``trainer`` from when :meth:`begin` is called to :meth:`end`."""

    def __init__(self, trainer: Trainer, foreign: Iterable[Tensor] = ()) -> None:
        """foreign: tensors that are not the training's."""
        self.trainer = trainer
        self._foreign = {_storage(tensor) for tensor in (*foreign, *_pictures(trainer))}
        self._rows = {"forward": 0, "backward": 0}
        self._networks: dict[int, nn.Module] = {}
        self._first: int | None = None
        self._resident = 0
        self._profile: Any = None

    @property
    def running(self) -> bool:
        """Between begin and end."""
        return self._first is not None

    @property
    def steps(self) -> int:
        """Finished since the beginning."""
        return 0 if self._first is None else self.trainer.step - self._first

    def begin(self) -> None:
        """From the next step on."""
        cls, meter = type(self.trainer.backbone), self
        self._first, self._forward = self.trainer.step, cls.forward

        def counted(backbone: Any, x_t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = meter._forward(backbone, x_t, *args, **kwargs)
            meter._count(backbone, len(x_t), result)
            return result

        cls.forward = counted
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)
            torch.cuda.reset_peak_memory_stats(self.trainer.device)
            return
        self._resident = self._living()
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()

    def end(self) -> dict[str, Any]:
        """``passes`` (F a step), ``copies`` and ``peak_bytes``, after one step at least."""
        steps, config = self.steps, self.trainer.config
        self._first = None
        type(self.trainer.backbone).forward = self._forward
        peak = self._peak()
        rows = steps * config.train_batch_size * config.gradient_accumulation_steps
        return {
            "passes": round((self._rows["forward"] + 2 * self._rows["backward"]) / rows, 3),
            "copies": round(self._copies(), 3),
            "peak_bytes": peak,
        }

    def _count(self, backbone: Any, rows: int, result: Tensor) -> None:
        if backbone is self.trainer.backbone and not backbone.transformer.training:
            return
        self._networks[id(backbone)] = backbone
        self._rows["forward"] += rows
        if result.requires_grad:

            def backward(_: Tensor) -> None:
                self._rows["backward"] += rows

            result.register_hook(backward)

    def _copies(self) -> float:
        weights: dict[int, int] = {}
        for network in self._networks.values():
            weights.update({_storage(p): p.numel() for p in network.transformer.parameters()})
        trained = self.trainer.backbone.transformer
        base = sum(p.numel() for name, p in trained.named_parameters() if ".lora_" not in name)
        return sum(weights.values()) / base

    def _living(self) -> int:
        """Bytes of the tensors that live now, each storage once."""
        storages: dict[int, int] = {}
        for value in gc.get_objects():
            # Asking some objects for their class runs code of theirs.
            if issubclass(type(value), Tensor):
                tensors = (value, value.grad) if value.is_leaf else (value,)
                storages.update({_storage(t): t.untyped_storage().nbytes() for t in tensors if t is not None})
        return sum(size for place, size in storages.items() if place not in self._foreign)

    def _peak(self) -> int:
        if self._profile is None:
            torch.cuda.synchronize(self.trainer.device)
            return torch.cuda.max_memory_allocated(self.trainer.device)
        self._profile.__exit__(None, None, None)
        peak = profiled_peak(self._profile)
        self._profile = None
        return self._resident + peak


def living_tensors() -> list[Tensor]:
    """All there are now."""
    return [value for value in gc.get_objects() if issubclass(type(value), Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _pictures(trainer: Trainer) -> list[Tensor]:
    """The tensors of the data, and of the conditions of all its prompts."""
    found: list[Tensor] = []
    for holder in (trainer.batches.data, trainer.batches.table):
        values = vars(holder).values() if hasattr(holder, "__dict__") else ()
        for value in values:
            parts = vars(value).values() if hasattr(value, "__dict__") else ()
            found += [part for part in (value, *parts) if isinstance(part, Tensor)]
    return found
