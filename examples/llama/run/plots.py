"""Loss curves of a run, and of several side by side."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.llama.run.log import CURVES, read_metrics


def plot_curves(runs: Mapping[str, Path], folder: Path) -> None:
    """Draws training and validation loss by step of the runs in labelled folders."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    draw_curves(figure.subplots(), runs)
    # An incomplete figure must not have the name that marks a run as finished.
    new = folder / f"{CURVES}.new"
    figure.savefig(new, dpi=120, format="png")
    new.replace(folder / CURVES)


def plot_comparison(
    runs: Mapping[str, Path],
    sweeps: Mapping[str, Sequence[tuple[float, float]]],
    folder: Path,
) -> None:
    """Draws the runs' curves, and each optimizer's results by learning rate.

    Args:
        runs: folders by label.
        sweeps: pairs of learning rate and validation perplexity, by label.
        folder: where the figure goes.
    """
    if all(len(points) < 2 for points in sweeps.values()):
        plot_curves(runs, folder)
        return
    figure = Figure(figsize=(14, 5), layout="constrained")
    curves, sweep = figure.subplots(1, 2)
    draw_curves(curves, runs)
    for name, points in sweeps.items():
        sweep.semilogx(*zip(*sorted(points), strict=True), "o-", ms=4, label=name)
    sweep.set(
        xlabel="learning rate of the kernels", ylabel="best validation perplexity"
    )
    sweep.legend()
    sweep.grid(which="both", alpha=0.3)
    figure.savefig(folder / CURVES, dpi=120)


def draw_curves(axes: Axes, runs: Mapping[str, Path]) -> None:
    for number, (label, run) in enumerate(runs.items()):
        rows = read_metrics(run)
        color = f"C{number}"
        # A skipped step has no loss: a gap in the line.
        losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
        axes.plot([row["step"] for row in rows], losses, color, lw=0.6, alpha=0.4)
        evaluated = [row for row in rows if "val_loss" in row]
        steps = [row["step"] for row in evaluated]
        axes.plot(
            steps,
            [row["val_loss"] for row in evaluated],
            f"{color}o-",
            ms=4,
            label=label,
        )
    axes.set(
        xlabel="step",
        ylabel="loss (nats per token)",
        title="training: thin; validation: dots",
    )
    axes.legend()
    axes.grid(alpha=0.3)
