"""SIGTERM and Ctrl-C as a request: the run saves and ends, instead of dying."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from examples.llama.run.errors import RunInterrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Takes SIGTERM and SIGINT inside its `with`.

    Inside `deferred`, the first signal is recorded in `signal`, so that the run can end
    in an orderly way. Elsewhere it raises `RunInterrupted` at once. A second Ctrl-C
    raises `KeyboardInterrupt`. Schedulers may send a signal twice within a moment, so
    the second one counts only if it comes at least a second later.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._deferred = False
        self._when = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only, and other threads may not set
        # handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._handle) for number in SIGNALS
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is None:
            self.signal, self._when = signal.Signals(number), time.monotonic()
            if not self._deferred:
                raise RunInterrupted(
                    f"stopped by {self.signal.name} outside of training; `resume` auto "
                    "goes on with what is on disk",
                    status=128 + number,
                )
        elif number == signal.SIGINT and time.monotonic() > self._when + 1:
            raise KeyboardInterrupt
