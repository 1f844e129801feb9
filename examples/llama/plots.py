"""Loss curves of one or more runs."""

from pathlib import Path

from matplotlib.figure import Figure

from examples.llama.run_log import CURVES, read_metrics


def plot_curves(runs: dict[str, Path], folder: Path) -> None:
    """Draws training (thin) and validation loss (dots) by step of the runs in labelled folders."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (label, run) in enumerate(runs.items()):
        rows = read_metrics(run)
        color = f"C{number}"
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color, lw=0.6, alpha=0.4)
        evaluated = [row for row in rows if "val_loss" in row]
        steps = [row["step"] for row in evaluated]
        axes.plot(steps, [row["val_loss"] for row in evaluated], f"{color}o-", ms=4, label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="training: thin; validation: dots")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / CURVES, dpi=120)
