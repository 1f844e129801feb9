"""The machine, the versions and the Markdown of the benchmarks' tables."""

import contextlib
import datetime
import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import jax


def spread(results: Sequence[float]) -> str:
    """Returns the standard deviation for a table; "" if there is none.

    There is none of one result, nor of results of which one diverged.
    """
    if len(results) < 2 or not all(map(math.isfinite, results)):
        return ""
    return f"{statistics.stdev(results):.2f}"


def core_numbers() -> list[int]:
    """Returns the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores() -> int:
    """Returns the number of cores that this process may use, as XLA counts them."""
    return len(core_numbers())


def machine() -> str:
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
    return f"{name}, {cores()} cores"


def made_with(packages: Iterable[str]) -> str:
    """Returns the line above a table: machine, versions and date."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return f"{machine()}; {versions}; {datetime.date.today().isoformat()}"


def markdown(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int
) -> str:
    """Returns a table whose columns from `numbers_from` on are aligned to the right."""
    rule = ["---"] * numbers_from + ["---:"] * (len(head) - numbers_from)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))
