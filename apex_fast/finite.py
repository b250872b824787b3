"""Finding a loss or a gradient that is no longer a number, without making the device wait."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

GRADIENT_NORM = "gradient norm"
"""The term of a :class:`NonFiniteLossError` that is no loss."""


class NonFiniteLossError(FloatingPointError):
    """A loss term, or the norm of the gradients, became NaN or infinite.

    Attributes:
        term: which one: ``"fake"``, ``"correction"``, ``"supervised"``, ``"mix"`` or ``"gradient norm"``.
        step: the step whose value it was, not the one in which it was found.
    """

    def __init__(self, term: str, step: int, value: float) -> None:
        if term == GRADIENT_NORM:
            # Clipping is no mend here: it scales by this very norm and hands NaN to the optimizer.
            message = (
                f"the gradient norm of step {step} is {value}, so that step has spoilt the weights; resume from the "
                "last checkpoint with a smaller learning rate or a lower correction_weight, and look at the data of "
                "that step"
            )
        else:
            message = (
                f"the {term} loss of step {step} is {value}; resume from the last checkpoint with a smaller learning "
                "rate, a lower correction_weight or gradient clipping, and look at the data of that step"
            )
        super().__init__(message)
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
        self._pending: list[_Record] = []
        # False: somebody else looks, and knows what to do about it.
        self.enabled = True

    def record(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Notes the 0-d device tensors ``terms`` of ``step`` and examines what was noted before.

        Raises:
            NonFiniteLossError: a term noted before was not finite.
        """
        if not self.enabled or torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return  # a graph holds no look at the host; whoever replays it sees the losses that it returns
        previous, self._pending = self._pending, [_record(step, terms)]
        self._examine(previous)

    def add(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Notes further ``terms`` of the step that :meth:`record` was called for, and examines nothing: that would wait
        for the losses of this very step.
        """
        if not self.enabled or torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        self._pending.append(_record(step, terms))

    def check(self) -> None:
        """Examines what has been noted so far, waiting for it if need be.

        Raises:
            NonFiniteLossError: a term was not finite.
        """
        pending, self._pending = self._pending, []
        self._examine(pending)

    def _examine(self, records: list[_Record]) -> None:
        for record in records:
            if record.ready is not None:
                record.ready.synchronize()
            for name, value in zip(record.names, record.values.tolist(), strict=True):
                if not math.isfinite(value):
                    # What was noted since comes from the same poisoned weights; the caller who recovers starts clean.
                    self._pending = []
                    raise NonFiniteLossError(name, record.step, value)


def _record(step: int, terms: Mapping[str, Tensor]) -> _Record:
    """The values of ``terms`` on their way to the host, and the event that says when they are there."""
    values = torch.stack([value.detach().float() for value in terms.values()])
    ready = None
    if values.is_cuda:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(values.device))
        values = host
    return _Record(step, tuple(terms), values, ready)
