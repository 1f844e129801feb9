"""The result of a run, read from its files at any time after its end."""

import statistics
from typing import NamedTuple

from examples.llama.options import RunOptions, differing_fields
from examples.llama.run.errors import UsageError
from examples.llama.run.log import CURVES, read_config, read_metrics


class RunResult(NamedTuple):
    """The part of a run's result that a comparison shows.

    The defaults of `options` are filled in.
    """

    options: RunOptions
    val_loss: float  # The best of its evaluations, in nats per token.
    # The median over the steps, which leaves out compilation and evaluations.
    tokens_per_s: float


def read_result(options: RunOptions) -> RunResult | None:
    """Returns the result of the run in `options.out`, or None if it is unfinished.

    Raises:
        UsageError: if the run there has other options.
    """
    # The metrics are complete before the last checkpoint is, and the curves after it.
    if not (options.out / CURVES).exists():
        return None
    config = read_config(options.out)
    if differing := differing_fields(config | options.as_run(), config):
        raise UsageError(
            f"{options.out} holds another run ({'; '.join(differing)}); give the same "
            "options, or another `out`"
        )
    rows = read_metrics(options.out)
    if not rows or rows[-1]["step"] < options.steps or "val_loss" not in rows[-1]:
        return None
    val_loss = min(row["val_loss"] for row in rows if "val_loss" in row)
    return RunResult(
        options, val_loss, statistics.median(row["tokens_per_s"] for row in rows)
    )
