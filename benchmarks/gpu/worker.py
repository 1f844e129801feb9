"""Rows measured in separate processes, which prepare side by side and measure alone."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

from examples.llama.run.errors import UsageError

Row = Callable[..., Generator[Any, Any, None]]
"""A measurement as a generator. It prepares until its first `yield`, which may already
have a result. Then it measures and yields the measurement."""

ENDS_WITHIN_SECONDS = 10.0  # A process that takes longer to end is killed.
# Only one worker at a time inherits a changed environment.
_environment = threading.Lock()


class Failed(NamedTuple):
    """A row without a result."""

    reason: str  # The text in the table.


class Worker:
    """A row in its own process: `with Worker(row, ...) as worker: worker.ask(...)`.

    An allocator's limits and the compiler's flags are read once per process, and only
    the end of a process gives all of its memory back.

    Args:
        row: a function that can be pickled.
        args: its arguments, which can be pickled too.
        variables: more variables for the environment of the process.
    """

    def __init__(self, row: Row, *args: Any, variables: Mapping[str, str] = {}) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, row, args), daemon=True
        )
        # JAX would preallocate three quarters of a GPU, and rows prepare side by side.
        with inherited({"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **variables}):
            self._process.start()
        # The pipe breaks with the end of the process only if this copy is closed.
        theirs.close()
        self._failed: Failed | None = None
        self._is_asked = True  # Whether its answer is awaited.

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        # A worker that was not asked waits for a question. It ends by itself when the
        # connection closes.
        if not self._is_asked:
            self._process.join(ENDS_WITHIN_SECONDS)
        self._process.kill()
        self._process.join()

    def prepared(self, deadline: float) -> Any:
        """Returns the first value that the row yields, or `Failed`.

        `deadline` is on the clock of `time.monotonic`.
        """
        return self._receive(deadline)

    def ask(self, deadline: float) -> Any:
        """Lets the row continue, and returns its next result, or `Failed`."""
        if self._failed is None:
            self._is_asked = True
            # `_receive` notices that the process has ended.
            with contextlib.suppress(BrokenPipeError):
                self._connection.send(None)
        return self._receive(deadline)

    def _receive(self, deadline: float) -> Any:
        if self._failed is None:
            try:
                if self._connection.poll(max(0.0, deadline - time.monotonic())):
                    answer = self._connection.recv()
                    self._is_asked = False
                else:
                    answer = Failed("ran out of time")
            except (EOFError, ConnectionResetError):
                self._process.join()
                answer = Failed(ended_with(self._process.exitcode))
            if not isinstance(answer, Failed):
                return answer
            self._failed = answer
        return self._failed


def ended_with(status: int | None) -> str:
    if status is not None and status < 0:
        return f"ended with {signal.Signals(-status).name}"
    return f"ended with status {status}"


@contextlib.contextmanager
def inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of this process's environment for the processes that it starts."""
    with _environment:
        before = dict(os.environ)
        os.environ.update(variables)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _serve(connection: Any, row: Row, args: tuple[Any, ...]) -> None:
    steps = row(*args)
    with contextlib.suppress(EOFError, StopIteration):
        # These exceptions mean that the caller has gone or the row has ended.
        while True:
            try:
                answer = next(steps)
            except StopIteration:
                raise
            except UsageError as error:  # This machine lacks something.
                answer = Failed(str(error).partition(";")[0])
            except Exception as error:
                traceback.print_exc()  # The table has room for one line only.
                answer = Failed(reason_of(error))
            connection.send(answer)
            connection.recv()


def reason_of(error: Exception) -> str:
    """Returns the text of the table for a row that raised `error`."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory"
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line[:120]}".replace("|", "/")
