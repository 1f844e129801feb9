"""Compares optimizers on the same batches: `python -m examples.llama.compare --out runs/compare`.

Runs every optimizer at every learning rate given, each into a folder of its own, and ends with a
table and one figure with all the curves.
"""

import dataclasses
import itertools
from pathlib import Path

from rich import box, filesize
from rich.console import Console
from rich.table import Table

from examples.llama.evaluate import perplexity
from examples.llama.optimizers import with_defaults
from examples.llama.options import RunOptions, TrainingOptions, parse
from examples.llama.plots import plot_curves
from examples.llama.pretrain import DivergedError, RunResult, pretrain
from examples.llama.run_log import check_free
from examples.llama.usage import UsageError, exit_on_usage_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(TrainingOptions):
    """Several runs that differ only in optimizer and learning rates."""

    optimizers: tuple[str, ...] = ("adamw", "apollo-mini")
    """Any of adamw, apollo, apollo-mini and apollo-svd."""
    lr: tuple[float, ...] = ()
    """Peak learning rates of the layers' kernels to try; by default each optimizer's own."""
    lr_embeddings: tuple[float, ...] = ()
    """Peak learning rates of embeddings, head and norms; by default each optimizer's own."""


def label(run: RunOptions) -> str:
    return f"{run.optimizer} lr={run.lr:g},{run.lr_embeddings:g}"


def runs_of(options: CompareOptions) -> list[RunOptions]:
    """Returns the runs: each optimizer with each pair of learning rates, defaults filled in."""
    common = {field.name: getattr(options, field.name) for field in dataclasses.fields(TrainingOptions)}
    choices = itertools.product(options.optimizers, options.lr or (None,), options.lr_embeddings or (None,))
    runs = [
        with_defaults(RunOptions(**common, optimizer=name, lr=lr, lr_embeddings=lr_embeddings))
        for name, lr, lr_embeddings in choices
    ]
    folders = [options.out / f"{run.optimizer}-{run.lr:g}-{run.lr_embeddings:g}" for run in runs]
    if len(set(folders)) < len(runs):
        raise UsageError("an optimizer or learning rate is given twice; give each once")
    return [dataclasses.replace(run, out=folder) for run, folder in zip(runs, folders, strict=True)]


def table(results: list[RunResult | RunOptions]) -> Table:
    """Returns a row for each run; a run that diverged is there with its options alone."""
    caption = "kernels, emb+head, rest: optimizer state"
    view = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=caption)
    view.add_column("optimizer", no_wrap=True)
    for column in ("lr", "lr emb", "val ppl", "kernels", "emb+head", "rest", "time", "tokens/s"):
        view.add_column(column, justify="right", no_wrap=True)
    for result in results:
        run = result.options if isinstance(result, RunResult) else result
        cells = [run.optimizer, f"{run.lr:g}", f"{run.lr_embeddings:g}"]
        if isinstance(result, RunResult):
            cells.append(f"{perplexity(result.val_loss):.2f}")
            cells.extend(filesize.decimal(size) for size in result.state)
            cells.extend((f"{result.seconds:.0f} s", f"{result.tokens_per_s:,.0f}"))
        else:
            cells.append("diverged")
        view.add_row(*cells)
    return view


def compare(options: CompareOptions, console: Console) -> list[RunResult | RunOptions]:
    """Trains all runs one after the other; a run that diverges is reported and the rest go on."""
    check_free(options.out)
    runs = runs_of(options)
    for run in runs:
        check_free(run.out)
    results: list[RunResult | RunOptions] = []
    for run in runs:
        try:
            results.append(pretrain(run))
        except DivergedError as error:
            console.print(f"{label(run)}: {error}")
            results.append(run)
    curves: dict[str, Path] = {label(run): run.out for run in runs}
    plot_curves(curves, options.out)
    console.print(table(results))
    console.print(f"curves and metrics in {options.out}")
    return results


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(CompareOptions, args, "python -m examples.llama.compare")
        compare(options, Console())

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
