"""Trains the tiny LLaMA in several ways, all else equal, a run a seed, and compares perplexities."""

import dataclasses
import datetime
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from examples.llama.evaluate import perplexity
from examples.llama.interrupt import StopRequest
from examples.llama.options import RunOptions
from examples.llama.pretrain import pretrain

Ways = dict[str, dict[str, Any]]  # What sets each way apart, by its name.


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """The same run in each way."""

    out: Path
    """Folder for the runs; those that have ended are not run again."""
    steps: int = 800
    """Training steps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run each."""
    compute_dtype: str = "float32"
    """float32 or bfloat16, of activations and products."""


def perplexities(options: QualityOptions, ways: Ways) -> dict[str, list[float]]:
    """Returns the perplexity of each way's runs; a run that was cut off goes on."""

    def run(way: str, seed: int, stop: StopRequest) -> float:
        name = f"{way.replace(', ', '-').replace(' ', '-')}-seed{seed}"
        run_options = RunOptions(
            out=options.out / name,
            steps=options.steps,
            seed=seed,
            compute_dtype=options.compute_dtype,
            resume="auto",
            **ways[way],
        )
        return perplexity(pretrain(run_options, stop).val_loss)

    with StopRequest() as stop:
        return {way: [run(way, seed, stop) for seed in options.seeds] for way in ways}


def row(name: str, values: list[float], reference: list[float]) -> str:
    """Returns a line of a table: mean, standard deviation, and how far the mean is from the reference's."""
    mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return f"| {name} | {mean:.2f} | {spread:.2f} | {mean / statistics.mean(reference) - 1:+.1%} |"


def made_with(options: QualityOptions, what: str) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax"))
    return (
        f"({what}, {options.steps} steps, {len(options.seeds)} seeds, products in {options.compute_dtype}; "
        f"{jax.devices()[0].device_kind}, {versions}, {datetime.date.today()})"
    )
