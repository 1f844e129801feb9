"""Draws the memory of a LLaMA-7B step by optimizer, the figure of the README.

Run it with `python -m benchmarks.memory_figure`. The numbers are those that
`python -m examples.llama.plan --json` prints for a TPU v5e, or for a v5p if a program
does not fit a v5e. A file beside the figure keeps them, so that drawing again compiles
nothing. Delete the file to compile anew. GaLore is left out, since the TPU compiler
does not finish its singular value decompositions in minutes.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.llama.options import parse
from examples.llama.run.errors import UsageError, exit_on_usage_error

CARD_GB = 16.0  # The memory of the card in the title, in GB of 1e9 bytes.
# The options that all rows share.
RUN = {
    "--target": "v5e:1x1",
    "--model": "7b",
    "--batch": "1",
    "--seq": "256",
    "--weights": "bfloat16",
    "--moment-dtype": "bfloat16",
    "--remat": "none",
}
MINI = ("--optimizer", "apollo-mini", "--layerwise")
ROWS: dict[str, tuple[str, ...]] = {
    "AdamW": ("--optimizer", "adamw"),
    "Muon": ("--optimizer", "muon"),
    "APOLLO, rank 256": ("--optimizer", "apollo", "--rank", "256"),
    "APOLLO-Mini": ("--optimizer", "apollo-mini"),
    "+ layer by layer": MINI,
    "+ int8 weights": (*MINI, "--weights", "int8"),
    "or weights in host memory": (
        *MINI,
        "--offload",
        "weights",
        "--embeddings",
        "apollo",
    ),
}
# The parts of a bar, by the names of `plan --json`, and their colors on light and dark.
PARTS = {
    "weights_bytes": ("weights", "#4c78a8", "#6b9bd1"),
    "optimizer_bytes": ("optimizer state", "#e45756", "#f0787a"),
    "gradients_bytes": ("gradients and the rest", "#f2a65a", "#f2b97c"),
    "activations_bytes": ("activations", "#72b7b2", "#8fd0cb"),
}
INK = {"light": "#1f2328", "dark": "#e6edf3"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """The memory of LLaMA-7B's training step by parts, as a figure."""

    folder: Path = Path("docs/figures")
    """Folder for memory-light.svg, memory-dark.svg and memory.jsonl."""


def planned(name: str, file: Path) -> dict[str, Any]:
    """Returns a row's numbers from the file; a missing row is compiled and added."""
    rows = [json.loads(line) for line in file.open()] if file.exists() else []
    for row in rows:
        if row["row"] == name:
            return row
    shared = itertools.chain.from_iterable(RUN.items())
    plan = [sys.executable, "-m", "examples.llama.plan", "--json"]
    command = [*plan, *shared, *ROWS[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"the plan of {name} failed: {done.stderr.strip()}")
    row = {"row": name} | json.loads(done.stdout)
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
    return row


def draw_bars(axes: Axes, rows: list[dict[str, Any]], mode: str) -> None:
    ink = INK[mode]
    left = [0.0] * len(rows)
    names = [row["row"] for row in rows]
    for part, (label, *colors) in PARTS.items():
        widths = [(row[part] or 0) / 1e9 for row in rows]
        color = colors[list(INK).index(mode)]
        axes.barh(names, widths, left=left, height=0.65, label=label, color=color)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for name, end in zip(names, left, strict=True):
        # A label just below the card's memory would have the line through it.
        at = CARD_GB if 0 < CARD_GB - end < 1.5 else end
        axes.annotate(f" {end:.1f} GB", (at, name), va="center", color=ink)
    axes.axvline(CARD_GB, color=ink, ls="--", lw=1)
    axes.annotate(
        f" a {CARD_GB:.0f} GB card", (CARD_GB, len(rows) - 0.55), color=ink, va="center"
    )
    axes.set_ylim(len(rows) - 0.2, -0.6)
    axes.set_xlim(right=1.12 * max(left))
    axes.set_xlabel("GB on the device", color=ink)
    axes.tick_params(colors=ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)


def draw(rows: list[dict[str, Any]], mode: str, file: Path) -> None:
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, rows, mode)
    figure.legend(
        loc="outside lower center",
        ncols=len(PARTS),
        frameon=False,
        labelcolor=INK[mode],
    )
    # Without a date, the same numbers give the same file.
    figure.savefig(file, transparent=True, metadata={"Date": None})


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(FigureOptions, args, "python -m benchmarks.memory_figure")
        options.folder.mkdir(parents=True, exist_ok=True)
        numbers = options.folder / "memory.jsonl"
        rows = [planned(name, numbers) for name in ROWS]
        for mode in INK:
            draw(rows, mode, options.folder / f"memory-{mode}.svg")
        print(f"memory-light.svg and memory-dark.svg are in {options.folder}")

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
