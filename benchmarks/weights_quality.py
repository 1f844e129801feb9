"""What weights of few bits cost in perplexity: `python -m benchmarks.weights_quality`.

Trains the tiny LLaMA with APOLLO-Mini on the source of Python's standard library, once a seed for each way
to keep the weights, all else equal, and prints the validation perplexities. Takes half an hour on two cores;
cut off, the same command goes on. In float32 all are computed with the same numbers, so that only the
weights differ: `--compute-dtype float32`.
"""

import dataclasses
import datetime
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from examples.llama.evaluate import perplexity
from examples.llama.interrupt import StopRequest
from examples.llama.options import RunOptions, parse
from examples.llama.pretrain import pretrain
from examples.llama.usage import exit_on_usage_error

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, stochastic rounding": {"weights": "bfloat16"},
    "bfloat16, rounding to nearest": {"weights": "bfloat16", "rounding": "nearest"},
    "int8, stochastic rounding": {"weights": "int8", "layerwise": True},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """The same run with weights kept in each way."""

    out: Path = Path("runs/weights-quality")
    """Folder for the runs; those that have ended are not run again."""
    steps: int = 800
    """Training steps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run each."""
    compute_dtype: str = "float32"
    """float32 or bfloat16, of activations and products."""


def perplexities(options: QualityOptions, way: str, stop: StopRequest) -> list[float]:
    results = []
    for seed in options.seeds:
        run = RunOptions(
            out=options.out / f"{way.replace(', ', '-').replace(' ', '-')}-seed{seed}",
            steps=options.steps,
            seed=seed,
            compute_dtype=options.compute_dtype,
            resume="auto",
            **WAYS[way],
        )
        results.append(perplexity(pretrain(run, stop).val_loss))
    return results


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(QualityOptions, args, "python -m benchmarks.weights_quality")
        with StopRequest() as stop:
            rows = {way: perplexities(options, way, stop) for way in WAYS}
        reference = statistics.mean(rows["float32"])
        print("\n| weights | val ppl | ± | over float32 |\n|---|---|---|---|")
        for name, values in rows.items():
            mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"| {name} | {mean:.2f} | {spread:.2f} | {mean / reference - 1:+.1%} |")
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax"))
        print(
            f"\n(tiny, apollo-mini, {options.steps} steps, {len(options.seeds)} seeds, products in "
            f"{options.compute_dtype}; {jax.devices()[0].device_kind}, {versions}, {datetime.date.today()})"
        )

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
