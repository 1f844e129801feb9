"""The machine, the versions and the Markdown of the benchmarks' tables."""

import datetime
import math
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata

from examples.llama.run.machine import machine


def spread(results: Sequence[float]) -> str:
    """Returns the standard deviation for a table; "" if there is none.

    There is none of one result, nor of results of which one diverged.
    """
    if len(results) < 2 or not all(map(math.isfinite, results)):
        return ""
    return f"{statistics.stdev(results):.2f}"


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
