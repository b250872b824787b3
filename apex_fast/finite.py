"""Finding a loss that is no longer a number, without making the device wait."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class NonFiniteLossError(FloatingPointError):
    """A loss term became NaN or infinite.

    Attributes:
        term: which one: ``"fake"``, ``"correction"``, ``"supervised"`` or ``"mix"``.
        step: the step whose loss it was, not the one in which it was found.
    """

    def __init__(self, term: str, step: int, value: float) -> None:
        super().__init__(
            f"the {term} loss of step {step} is {value}; resume from the last checkpoint with a smaller learning "
            "rate, a lower correction_weight or gradient clipping, and look at the data of that step"
        )
        self.term = term
        self.step = step

    def __reduce__(self):
        # Exceptions pickle by their message, which is not what __init__ takes; workers send errors to each other.
        return (_rebuild, (type(self), self.term, self.step, self.args))


def _rebuild(kind: type[NonFiniteLossError], term: str, step: int, args: tuple) -> NonFiniteLossError:
    error = kind.__new__(kind, *args)
    error.args, error.term, error.step = args, term, step
    return error


@dataclass
class _Record:
    step: int
    names: tuple[str, ...]
    values: Tensor
    ready: torch.cuda.Event | None


class FiniteWatch:
    """Looks at the losses of a step while the device already works on the next one.

    Reading a loss on the host right away would drain the device's queue in every step. Its value is copied to pinned
    memory behind the work of its own step instead and read when the following step has been enqueued, so an error is at
    most one step late; :meth:`check` reads what is left, for the moment before a checkpoint is written.
    """

    def __init__(self) -> None:
        self._pending: _Record | None = None

    def record(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Notes the 0-d device tensors ``terms`` of ``step`` and examines those of the step before.

        Raises:
            NonFiniteLossError: a term of the step before was not finite.
        """
        values = torch.stack([value.detach().float() for value in terms.values()])
        ready = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(values.device))
            values = host
        previous, self._pending = self._pending, _Record(step, tuple(terms), values, ready)
        if previous is not None:
            self._examine(previous)

    def check(self) -> None:
        """Examines what has been recorded so far, waiting for it if need be.

        Raises:
            NonFiniteLossError: a term was not finite.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._examine(pending)

    def _examine(self, record: _Record) -> None:
        if record.ready is not None:
            record.ready.synchronize()
        for name, value in zip(record.names, record.values.tolist(), strict=True):
            if not math.isfinite(value):
                # What was recorded since comes from the same poisoned weights; the caller who recovers starts clean.
                self._pending = None
                raise NonFiniteLossError(name, record.step, value)
