"""The machine, the versions and the Markdown of the benchmarks' tables."""

import contextlib
import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import jax


def cores() -> int:
    """Returns the number of cores that this process may use, as XLA counts them."""
    return (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )


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
