"""The time of `import apollo_optax` relative to `import optax`.

Run it with `python -m benchmarks.import_time`.

Each import runs in a new interpreter, and the two take turns. The times are medians of
the wall time of the import statement.
"""

import os
import statistics
import subprocess
import sys
from typing import NamedTuple

from benchmarks.report import markdown

ROUNDS = 15


class ImportTimes(NamedTuple):
    """Medians of times in seconds."""

    ours: float
    optax: float
    ratio: float  # The ratio of the two times within a round.


def seconds(module: str) -> float:
    code = (
        f"import time; t = time.perf_counter(); import {module}; "
        "print(time.perf_counter() - t)"
    )
    # pip has compiled optax to bytecode. A checkout is compiled by its first import, if
    # bytecode may be written.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONDONTWRITEBYTECODE"
    }
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return float(result.stdout)


def measure(rounds: int = ROUNDS) -> ImportTimes:
    # This import reads the files into the system's cache and compiles missing bytecode.
    seconds("apollo_optax")
    pairs = []
    for number in range(rounds):
        # The order alternates, so that a drift of the machine favours neither.
        order = ("apollo_optax", "optax")[:: 1 if number % 2 == 0 else -1]
        times = {module: seconds(module) for module in order}
        pairs.append((times["apollo_optax"], times["optax"]))
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return ImportTimes(ours, theirs, statistics.median(a / b for a, b in pairs))


def main() -> None:
    times = measure()
    print(f"python {sys.version.split()[0]}, {ROUNDS} rounds, medians")
    head = ["import apollo_optax, s", "import optax, s", "ratio"]
    print(markdown(head, [[f"{value:.2f}" for value in times]], numbers_from=0))


if __name__ == "__main__":
    main()
