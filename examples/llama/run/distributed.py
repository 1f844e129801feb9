"""Several processes that train one model: how they meet, agree and end.

Each process runs the same program with the same options on its own devices. The first,
process 0, writes the run's files and prints messages. With a single process, all of
this does nothing.
"""

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from examples.llama.options import ProcessOptions
from examples.llama.run.errors import (
    OtherProcessError,
    RunInterrupted,
    UsageError,
    explained,
    first_line,
    is_first,
    print_error,
)

# Seconds without a sign of life after which JAX ends the other processes. JAX's own
# threads give these signs, even if Python is busy.
HEARTBEAT_SECONDS = 30
SHUTDOWN_SECONDS = 30  # Seconds that a finished process waits for the others.
MEETING_SECONDS = 300  # Seconds that a started process waits for the others.
SILENT_SECONDS = 10  # Seconds before a waiting process says that it waits.


def start(options: ProcessOptions) -> None:
    """Connects to the other processes, as the options or the cluster say.

    It must be called before JAX is used. If neither says anything, the process runs
    alone.

    Raises:
        UsageError: if the other processes cannot be reached.
    """
    if options.processes == 1:
        return
    by_options = options.coordinator is not None
    place = options.coordinator or "the place that the cluster names"
    waits = (
        f"this process waits for the others at {place}, "
        f"{MEETING_SECONDS} seconds at the most"
    )
    said = threading.Timer(
        SILENT_SECONDS, lambda: print(waits, file=sys.stderr, flush=True)
    )
    said.daemon = True
    said.start()
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process_id,
            # Slurm plans one device per process. The options may mean something else.
            cluster_detection_method="deactivate" if by_options else None,
            initialization_timeout=MEETING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if by_options or "coordinator_address" not in str(error):
            raise
        # JAX says this where it finds no cluster. The process then runs alone.
    except RuntimeError as error:
        raise UsageError(
            f"the other processes were not met at {place} ({first_line(error)}); see "
            "whether one ended with an error of its own, start all of them within "
            f"{MEETING_SECONDS} seconds, with a HOST:PORT that is process 0's and "
            "free, or give `processes` 1"
        ) from error
    finally:
        said.cancel()


def exchange(text: str) -> list[str]:
    """Returns the values of all processes, in the order of the processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.pad(data, (0, max(1, sizes.max()) - data.size))
    rows = multihost_utils.process_allgather(padded)
    return [
        row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
    ]


def check_same(ours: Mapping[str, Any], what: str) -> None:
    """Raises `UsageError` on every process if their values are not all the same."""
    first, *others = map(json.loads, exchange(json.dumps(ours)))
    for process, other in enumerate(others, start=1):
        differing = [
            name for name in first | other if first.get(name) != other.get(name)
        ]
        if differing:
            values = "; ".join(
                f"{name} is {first.get(name)} on process 0 and {other.get(name)} on "
                f"process {process}"
                for name in differing
            )
            raise UsageError(
                f"the processes have different {what}: {values}; "
                "give all of them the same"
            )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Fails on every process if one fails.

    It is for code that is not a computation of all processes.
    """
    error: BaseException | None = None
    said = ""
    try:
        yield
    except RunInterrupted as own:
        error, said = own, str(own)
    except Exception as own:
        error = own
        said = explained(own) or f"{type(own).__name__}: {first_line(own)}"
    failed = {process: other for process, other in enumerate(exchange(said)) if other}
    if error is not None:
        raise error
    for process, other in failed.items():
        raise OtherProcessError(f"process {process} failed: {other}")


def from_first(compute: Callable[[], Any]) -> Any:
    """Returns, on every process, the result of `compute` on the first, through JSON.

    Only the first process calls `compute`.
    """
    value = None
    with together():
        if is_first():
            value = compute()
    return json.loads(exchange(json.dumps(value))[0])


class Vote:
    """Lets all processes know at the same step that one of them has been asked to stop.

    A vote is counted on the devices and read at the next one, so that no device waits
    for a host.
    """

    def __init__(self) -> None:
        self._running: jax.Array | None = None
        if jax.process_count() > 1:
            mesh = jax.make_mesh(
                (jax.device_count(),), ("all",), (jax.sharding.AxisType.Auto,)
            )
            self._cut = jax.sharding.NamedSharding(mesh, jax.P("all"))
            self._highest = jax.jit(
                jnp.max, out_shardings=jax.sharding.NamedSharding(mesh, jax.P())
            )

    def highest(self, number: int) -> int:
        """Returns the highest number that any process gave in the previous call.

        With one process, that is `number`.
        """
        if jax.process_count() == 1:
            return number
        before, shape = self._running, (jax.device_count(),)
        votes = jax.make_array_from_callback(
            shape, self._cut, lambda _: np.full(1, number, np.int32)
        )
        self._running = self._highest(votes)
        return 0 if before is None else int(before)


@contextlib.contextmanager
def ends_at_once(*agreed: type[BaseException]) -> Iterator[None]:
    """Ends a process at once if it fails alone, without waiting for the others.

    The status is 2 for an error that the user can correct, and 1 otherwise. An ordinary
    exit would wait for the other processes, which wait for this one in the middle of a
    step. They end when this process gives no sign of life.

    Args:
        agreed: errors that all processes raise at the same step.
    """
    try:
        yield
    except agreed:
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        line = explained(error)
        if line is None and isinstance(error, jax.errors.JaxRuntimeError):
            print_error(
                f"process {jax.process_index()} of {jax.process_count()} cannot go on, "
                f"as when another has ended ({first_line(error)}); see what that one "
                "says, and start all again with `resume` auto"
            )
        elif line is None:
            traceback.print_exc()
        else:
            print_error(line)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if line is None else 2)
