"""Compares optimizers on the same batches.

Run it with `python -m examples.llama.compare --out runs/compare`.

Runs every optimizer at every pair of learning rates given, each into a folder of its
own, then the best pair of each optimizer again with the other seeds, and ends with a
table and a figure with the curves. With `--resume auto`, finished runs are not
repeated, and an interrupted run continues.
"""

import collections
import dataclasses
import itertools
import json
import statistics
from typing import NamedTuple

from rich import box, filesize
from rich.console import Console
from rich.table import Table

from apollo_optax import StateBytes
from examples.llama.config import LlamaConfig
from examples.llama.evaluate import perplexity
from examples.llama.optimizers.recipes import RECIPES, options_of_each
from examples.llama.options import (
    RunOptions,
    TrainingOptions,
    check_positive,
    check_seed,
    parse,
)
from examples.llama.pretrain import pretrain
from examples.llama.run.errors import (
    RESUME,
    RunInterrupted,
    UsageError,
    check_names,
    exit_on_usage_error,
    notice,
)
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.log import check_free
from examples.llama.run.plots import plot_comparison
from examples.llama.run.recorder import DivergedError
from examples.llama.run.result import RunResult
from examples.llama.run.setup import model_config, state_bytes_of
from examples.llama.text.cache import write_whole

RESULTS = "results.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(TrainingOptions):
    """Several runs that differ only in optimizer, learning rates and seed."""

    optimizers: tuple[str, ...] = ("adamw", "apollo-mini", "apollo-zero")
    """Any of adamw, apollo, apollo-mini, apollo-svd, apollo-zero,
    apollo-zero-whitening, apollo-zero-momentum, apollo-zero-momentum-int8, racs,
    sinkgd, scale-hidden, swan, galore, muon, adafactor, lion and sgd."""
    lr: tuple[float, ...] = ()
    """Peak learning rates of the layers' kernels to try. The default is each
    optimizer's default rate."""
    lr_factors: tuple[float, ...] = ()
    """Multiples of each optimizer's default learning rate of the kernels to try,
    instead of --lr."""
    lr_embeddings: tuple[float, ...] = ()
    """Peak learning rates of embeddings, head and norms to try. The default is each
    optimizer's default rate."""
    more_seeds: tuple[int, ...] = ()
    """More seeds besides --seed. Each optimizer's best pair of rates is run again with
    each of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr and self.lr_factors:
            raise UsageError(
                "--lr and --lr-factors both say which learning rates to try; give one"
            )
        for flag, values in (
            ("--lr", self.lr),
            ("--lr-factors", self.lr_factors),
            ("--lr-embeddings", self.lr_embeddings),
        ):
            for value in values:
                check_positive(flag, value)
        for seed in self.more_seeds:
            check_seed("--more-seeds", seed)
            if (self.seed, *self.more_seeds).count(seed) > 1:
                raise UsageError(
                    f"--more-seeds {seed} is given twice; give each seed once"
                )
        check_names("--optimizers", self.optimizers, RECIPES)


class Setting(NamedTuple):
    """A row of the table: runs that differ in nothing but their seed."""

    options: RunOptions  # The options with the first seed.
    # The results by seed, without the runs that diverged.
    results: tuple[RunResult, ...]


def grid(options: CompareOptions, config: LlamaConfig) -> list[RunOptions]:
    """Returns the runs with the first seed: each optimizer with each pair of rates.

    Defaults are filled in.
    """
    fields = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(TrainingOptions)
    }
    common = RunOptions(**fields)
    runs = []
    for default in options_of_each(options.optimizers, common, config):
        assert default.lr is not None
        lrs = (
            options.lr
            or [default.lr * factor for factor in options.lr_factors]
            or [default.lr]
        )
        for lr, lr_embeddings in itertools.product(
            lrs, options.lr_embeddings or [default.lr_embeddings]
        ):
            run = dataclasses.replace(
                default, lr=float(f"{lr:.6g}"), lr_embeddings=lr_embeddings
            )
            runs.append(in_own_folder(run, options))
    folders = [run.out for run in runs]
    for run in runs:
        if folders.count(run.out) > 1:
            raise UsageError(
                f"{run.optimizer} with the learning rates {run.lr:g} and "
                f"{run.lr_embeddings:g} is given twice; give each once"
            )
    return runs


def in_own_folder(run: RunOptions, options: CompareOptions) -> RunOptions:
    name = f"{run.optimizer}-{run.lr:g}-{run.lr_embeddings:g}-seed{run.seed}"
    return dataclasses.replace(run, out=options.out / name)


def label(run: RunOptions) -> str:
    return f"{run.optimizer} lr={run.lr:g},{run.lr_embeddings:g} seed={run.seed}"


def finish(run: RunOptions, stop: StopRequest) -> tuple[RunResult, ...]:
    """Finishes `run`. A run that diverges is reported and has no result."""
    try:
        result = (pretrain(run, stop),)
    except DivergedError as error:
        notice(f"{label(run)}: {error}")
        result = ()
    if stop.signal:
        raise RunInterrupted(
            f"stopped by {stop.signal.name} after {label(run)}; --resume auto goes on "
            "with the next run"
        )
    return result


def best_of_each(settings: list[Setting]) -> list[RunOptions]:
    """Returns each optimizer's finished run with the lowest validation loss."""
    best: dict[str, RunResult] = {}
    for result in (result for setting in settings for result in setting.results):
        name = result.options.optimizer
        if name not in best or result.val_loss < best[name].val_loss:
            best[name] = result
    return [result.options for result in best.values()]


def with_more_seeds(
    setting: Setting, options: CompareOptions, stop: StopRequest
) -> Setting:
    results = setting.results
    for seed in options.more_seeds:
        results += finish(
            in_own_folder(dataclasses.replace(setting.options, seed=seed), options),
            stop,
        )
    return setting._replace(results=results)


def table(
    settings: list[Setting], best: list[RunOptions], sizes: dict[str, StateBytes]
) -> Table:
    """Returns a row per setting. The row of a diverged run has only its options."""
    caption = (
        "val ppl: best of a run's evaluations, mean over seeds; ±: their standard "
        "deviation; *: the optimizer's best with the first seed; kernels, emb+head, "
        "rest: optimizer state"
    )
    view = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=caption)
    view.add_column("optimizer", no_wrap=True)
    for column in (
        "lr",
        "lr emb",
        "val ppl",
        "±",
        "seeds",
        "kernels",
        "emb+head",
        "rest",
        "tokens/s",
    ):
        view.add_column(column, justify="right", no_wrap=True)
    for setting in settings:
        run, results = setting
        row = [run.optimizer, f"{run.lr:g}", f"{run.lr_embeddings:g}"]
        if results:
            perplexities = [perplexity(result.val_loss) for result in results]
            spread = (
                f"{statistics.stdev(perplexities):.2f}" if len(perplexities) > 1 else ""
            )
            row.append(
                f"{statistics.mean(perplexities):.2f}{'*' if run in best else ' '}"
            )
            row.extend((spread, str(len(results))))
            row.extend(filesize.decimal(size) for size in sizes[run.optimizer])
            row.append(
                f"{statistics.median(result.tokens_per_s for result in results):,.0f}"
            )
        else:
            row.append("diverged ")
        view.add_row(*row)
    return view


def write_results(settings: list[Setting], options: CompareOptions) -> None:
    rows = [
        {
            name: getattr(result.options, name)
            for name in ("optimizer", "lr", "lr_embeddings", "seed")
        }
        | {"val_ppl": perplexity(result.val_loss), "tokens_per_s": result.tokens_per_s}
        for setting in settings
        for result in setting.results
    ]
    write_whole(options.out / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))


def draw(
    settings: list[Setting], best: list[RunOptions], options: CompareOptions
) -> None:
    sweeps: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for setting in settings:
        if setting.results:
            run = setting.options
            assert run.lr is not None
            name = f"{run.optimizer} (lr emb {run.lr_embeddings:g})"
            # The sweep shows the first seed. Only the best setting has more seeds, and
            # a mean would not belong on the line of the others.
            sweeps[name].append((run.lr, perplexity(setting.results[0].val_loss)))
    plot_comparison({label(run): run.out for run in best}, sweeps, options.out)


def compare(
    options: CompareOptions, stop: StopRequest, console: Console
) -> list[Setting]:
    """Trains all runs one after another. A run that diverges does not stop the others.

    Raises:
        UsageError: for invalid input, before anything is written.
        RunInterrupted: after SIGTERM or Ctrl-C. The current run has a checkpoint.
    """
    config = model_config(options)
    runs = grid(options, config)
    resume = options.resume == "auto"
    if not resume:
        check_free(options.out)
    for run in runs:
        check_free(run.out, resume=resume)
    sizes = {run.optimizer: state_bytes_of(run, config) for run in runs}

    settings = [Setting(run, finish(run, stop)) for run in runs]
    chosen = best_of_each(settings)
    settings = [
        with_more_seeds(setting, options, stop)
        if setting.options in chosen
        else setting
        for setting in settings
    ]
    write_results(settings, options)
    draw(settings, chosen, options)
    console.print(table(settings, chosen, sizes))
    console.print(f"curves and metrics in {options.out}")
    return settings


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(CompareOptions, args, "python -m examples.llama.compare")
        with StopRequest() as stop:
            compare(options, stop, Console())

    exit_on_usage_error(command, after_interrupt=RESUME)


if __name__ == "__main__":
    main()
