"""Ctrl-C and SIGTERM as a request to stop after the step in hand."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While this context is open, the first SIGINT or SIGTERM sets ``received`` and calls ``on_request(name)``; a
    second Ctrl-C ends the process at once.

    A second SIGTERM does not: a scheduler sends it to all processes of a job, and a launcher among them passes it on to
    the others, which is the same request then.

    Outside the main thread (where Python allows no handlers) it does nothing.
    """

    def __init__(self, on_request: Callable[[str], None]) -> None:
        self.received: signal.Signals | None = None
        self.agreed = False
        self._on_request = on_request
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGTERM:
                return
            # The default action ends the process without unwinding: nothing can hold the second Ctrl-C up.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number)
        self._on_request(self.received.name)

    def agree(self, largest: Callable[[int], int]) -> None:
        """Sets ``agreed`` if a process of the run was asked to stop, and ``received`` with it.

        largest: the largest of the numbers of all processes, which call it together; in one process the number itself.
        """
        number = largest(0 if self.received is None else int(self.received))
        if number:
            self.received, self.agreed = signal.Signals(number), True

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells report it; 0 if none came."""
        return 0 if self.received is None else 128 + int(self.received)
