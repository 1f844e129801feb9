"""Trains the tiny LLaMA in several ways and compares the perplexities.

Each way has one run per seed. The runs differ in nothing else.
"""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.run_records import runs_made_with
from examples.llama.evaluate import perplexity
from examples.llama.options import RunOptions, check_seeds
from examples.llama.pretrain import pretrain
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.recorder import DivergedError

Ways = dict[
    str, dict[str, Any]
]  # The options that differ between the ways, by name of the way.


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """The options of runs that differ only in one way each."""

    out: Path
    """Folder for the runs; finished runs are not repeated."""
    steps: int = 800
    """Training steps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds; each way has a run per seed."""
    compute_dtype: str = "float32"
    """The dtype of activations and products: float32 or bfloat16."""

    def __post_init__(self) -> None:
        check_seeds("--seeds", self.seeds)


def folder_of(options: QualityOptions, way: str, seed: int) -> Path:
    return options.out / f"{way.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def perplexities(options: QualityOptions, ways: Ways) -> dict[str, list[float]]:
    """Returns the perplexities of each way, infinite for a run that diverged.

    An interrupted run continues.
    """

    def run(way: str, seed: int, stop: StopRequest) -> float:
        run_options = RunOptions(
            out=folder_of(options, way, seed),
            steps=options.steps,
            seed=seed,
            compute_dtype=options.compute_dtype,
            resume="auto",
            **ways[way],
        )
        try:
            return perplexity(pretrain(run_options, stop).val_loss)
        except DivergedError:
            return math.inf

    with StopRequest() as stop:
        return {way: [run(way, seed, stop) for seed in options.seeds] for way in ways}


def table(
    options: QualityOptions,
    what: str,
    over: str,
    results: dict[str, list[float]],
    reference: dict[str, str],
) -> str:
    """Returns a table of means, standard deviations, and differences to a baseline.

    Args:
        options: the options of the runs.
        what: a description of the runs, for the line above the table.
        over: the head of the last column.
        results: the perplexities, from `perplexities`.
        reference: the name of each way's baseline.
    """

    def row(way: str) -> tuple[str, ...]:
        mean, other = (statistics.mean(results[name]) for name in (way, reference[way]))
        spread = report.spread(results[way])
        return way, f"{mean:.2f}", spread, f"{mean / other - 1:+.1%}"

    folders = [
        folder_of(options, way, seed) for way in results for seed in options.seeds
    ]
    return (
        f"{what}, {options.steps} steps, {len(options.seeds)} seeds, products in "
        f"{options.compute_dtype}\n"
        f"{runs_made_with(folders)}\n\n"
        f"{report.markdown(('way', 'val ppl', '±', over), map(row, results), 1)}"
    )
