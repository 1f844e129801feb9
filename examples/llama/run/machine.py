"""The machine that a run was made on, in words."""

import contextlib
import os
import platform
from pathlib import Path

import jax


def core_numbers() -> list[int]:
    """Returns the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores() -> int:
    """Returns the number of cores that this process may use, as XLA counts them."""
    return len(core_numbers())


def machine() -> str:
    """Returns the kind of accelerator, or the processor and its number of cores."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    name = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = (
            next(line for line in lines if line.startswith("model name"))
            .partition(":")[2]
            .strip()
        )
    return f"{name}, {cores()} {'core' if cores() == 1 else 'cores'}"
