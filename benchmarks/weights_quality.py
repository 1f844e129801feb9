"""The perplexity of training with bfloat16 and int8 weights.

Run it with `python -m benchmarks.weights_quality`.

Trains the tiny LLaMA with APOLLO-Mini on the source of Python's standard library, and
prints the validation perplexities. Each storage of the weights has a run per seed, and
the runs differ in nothing else. This takes half an hour on two cores. If it is
interrupted, the same command continues. Activations are in float32 by default
(`--compute-dtype`), so that only the weights differ.
"""

import dataclasses
from pathlib import Path

from benchmarks import quality
from examples.llama.options import parse
from examples.llama.run.errors import exit_on_usage_error

WAYS: quality.Ways = {
    "float32": {},
    "bfloat16, stochastic rounding": {"weights": "bfloat16"},
    "bfloat16, rounding to nearest": {"weights": "bfloat16", "rounding": "nearest"},
    "int8, stochastic rounding": {"weights": "int8", "layerwise": True},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsOptions(quality.QualityOptions):
    """The same run with weights kept in each way."""

    out: Path = Path("runs/weights-quality")


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(WeightsOptions, args, "python -m benchmarks.weights_quality")
        results = quality.perplexities(options, WAYS)
        reference = dict.fromkeys(WAYS, "float32")
        print(
            quality.table(
                options, "tiny, apollo-mini", "over float32", results, reference
            )
        )

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
