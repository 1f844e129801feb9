"""The figure of validation perplexities by step or by time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

LINE_STYLES = ("o-", "s--", "^:")


def plot_perplexities(
    curves: Mapping[str, Sequence[Sequence[float]]], xlabel: str, path: Path
) -> None:
    """Draws validation perplexities against steps or time.

    Args:
        curves: points by label; the legend has the lowest last perplexity first.
        xlabel: the label of the first number of a point.
        path: the file to write.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    drawn = {label: points for label, points in curves.items() if points}
    for number, label in enumerate(sorted(drawn, key=lambda each: drawn[each][-1][1])):
        # There are ten colours.
        style = f"C{number % 10}{LINE_STYLES[number // 10 % len(LINE_STYLES)]}"
        axes.semilogy(*zip(*drawn[label], strict=True), style, label=label)
    # The default labels are powers of 10.
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set(xlabel=xlabel, ylabel="validation perplexity")
    figure.legend(loc="outside right upper")
    axes.grid(which="both", alpha=0.3)
    figure.savefig(path, dpi=120)
