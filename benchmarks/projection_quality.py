"""Whether random signs train as well as normal entries.

Run it with `python -m benchmarks.projection_quality`.

Trains the tiny LLaMA with APOLLO and APOLLO-Mini on the source of Python's standard
library, and prints the validation perplexities. Each projection has a run per seed, and
the runs differ in nothing else. This takes half an hour on two cores. If it is
interrupted, the same command continues.
"""

import dataclasses
from pathlib import Path

from benchmarks import quality
from examples.llama.options import parse
from examples.llama.run.errors import exit_on_usage_error

OPTIMIZERS = ("apollo", "apollo-mini")
PROJECTIONS = ("random", "rademacher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionOptions(quality.QualityOptions):
    """The same run with each projection."""

    out: Path = Path("runs/projection-quality")


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(
            ProjectionOptions, args, "python -m benchmarks.projection_quality"
        )
        ways: quality.Ways = {
            f"{optimizer}, {projection}": {
                "optimizer": optimizer,
                "projection": projection,
            }
            for optimizer in OPTIMIZERS
            for projection in PROJECTIONS
        }
        results = quality.perplexities(options, ways)
        reference = {name: f"{way['optimizer']}, random" for name, way in ways.items()}
        print(quality.table(options, "tiny", "over random", results, reference))

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
