"""Rows for the tests of `benchmarks.gpu.worker`.

A worker's process imports the module of its row. This one imports little, so that the
process starts quickly.
"""

import itertools
import os
import signal
import time
from collections.abc import Generator

from examples.llama.run.errors import UsageError


def counting(name: str) -> Generator[str]:
    for number in itertools.count():
        yield f"{name} {number}"


def variable(name: str) -> Generator[str | None]:
    yield os.environ.get(name)


def failing(kind: str) -> Generator[str | None]:
    if kind == "usage":
        raise UsageError("--batch 0 is out of range; give 1")
    if kind == "memory":
        raise MemoryError("allocating 1 TB")
    yield None
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        time.sleep(1000)
    yield "not reached"
