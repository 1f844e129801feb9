"""A plan as JSON, as a table and as a figure."""

import dataclasses
from importlib import metadata
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from examples.llama.config import LlamaConfig, adapter_count, param_count
from examples.llama.memory.options import PlanOptions
from examples.llama.memory.search import Row, gigabytes
from examples.llama.memory.target import LOCAL
from examples.llama.options import TuningOptions

SCALES = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1}
SHARES = {
    "weights_bytes": "weights",
    "optimizer_bytes": "optimizer state",
    "gradients_bytes": "gradients, other",
    "activations_bytes": "activations",
}
CAPTION = (
    "{unit} on a device; peak = arguments + temporaries + outputs - outputs that reuse "
    "an argument's memory; activations: the part that grows with the batch, from a "
    "second compilation; gradients, other: the rest"
)
WIDENED = (
    "the CPU's compiler turns bfloat16 into float32, so temporaries are not those of a "
    "GPU or TPU; to see those, compile for one, such as v5e:1x1"
)


def is_widened(row: Row, target: str) -> bool:
    """Whether the target's compiler computes in a wider dtype than requested."""
    run = row.options
    return target == "cpu" and "bfloat16" in (run.weights, run.compute_dtype)


def as_json(row: Row, options: PlanOptions, config: LlamaConfig) -> dict[str, Any]:
    run, memory = row.options, row.memory
    names = (
        "optimizer",
        "model",
        "batch",
        "seq",
        "accumulate",
        "mesh",
        "weights",
        "compute_dtype",
        "rounding",
        "moment_dtype",
        "embeddings",
        "head",
        "rank",
        "layerwise",
        "offload",
        "remat",
    )
    return {
        "target": options.target,
        "command": "finetune" if isinstance(run, TuningOptions) else "pretrain",
        **{name: getattr(run, name) for name in names},
        "model": str(run.model or run.init_from),
        "parameters": param_count(config),
        "lora": config.lora_rank or None,
        "adapter_parameters": adapter_count(config),
        "fits": row.fits,
        "limit_bytes": row.limit_bytes,
        **dataclasses.asdict(memory),
        "gradients_bytes": row.gradients_bytes,
        "activations_bytes": row.activations_bytes,
        "notes": notes(row, options),
        "versions": versions(options.target),
    }


def versions(target: str) -> dict[str, str]:
    names = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        *(() if target in LOCAL else ("libtpu",)),
    )
    return {name: metadata.version(name) for name in names}


def notes(row: Row, options: PlanOptions) -> list[str]:
    """Returns the caveats that a reader of the row has to know."""
    memory = row.memory
    found = [WIDENED] if is_widened(row, options.target) else []
    if memory.refused:
        source = (
            f"measured on {memory.compiled_for}"
            if memory.compiled_for
            else "from its compiler's message"
        )
        found.append(
            f"{options.target} refuses {row.options.optimizer}: the numbers are "
            f"{source}"
        )
    return found


def cells(row: Row, options: PlanOptions, scale: float, with_host: bool) -> list[str]:
    """Returns a row of the table."""
    memory = row.memory

    def scaled(size: int | None) -> str:
        return "" if size is None else f"{size / scale:,.2f}"

    mark = "*" if is_widened(row, options.target) else ""
    fits = {True: "fits", False: "does not fit", None: ""}[row.fits]
    sizes = [
        memory.weights_bytes,
        memory.optimizer_bytes,
        row.gradients_bytes,
        row.activations_bytes,
    ]
    return [
        row.options.optimizer,
        f"{row.options.batch:,}",
        *map(scaled, sizes),
        scaled(memory.peak_bytes) + mark,
        *((scaled(memory.host_bytes),) if with_host else ()),
        fits,
    ]


def heading(rows: list[Row], options: PlanOptions, config: LlamaConfig) -> str:
    run, memory = rows[0].options, rows[0].memory
    kind = "" if memory.device_kind == options.target else f" ({memory.device_kind})"
    there = memory.capacity_bytes
    gives = f", which gives a program {gigabytes(there)}" if there else ""
    limit = f"; the largest batch in {options.fit}" if options.fit else ""
    rows_of = (
        "fine-tuning in packed rows of"
        if isinstance(run, TuningOptions)
        else "sequences of"
    )
    adapters = f" and adapters of rank {config.lora_rank}" if config.lora_rank else ""
    return (
        f"{run.model or run.init_from}: {param_count(config):,} parameters in "
        f"{run.weights}{adapters}, {rows_of} {run.seq}, on "
        f"{options.target}{kind}{gives}{limit}"
    )


def table(rows: list[Row], options: PlanOptions, config: LlamaConfig) -> Table:
    """Returns a row for each optimizer, with the notes in the caption."""
    with_host = any(row.memory.host_bytes for row in rows)
    largest = max(row.memory.peak_bytes for row in rows)
    unit, scale = next((name, size) for name, size in SCALES.items() if largest >= size)
    remarks = dict.fromkeys(note for row in rows for note in notes(row, options))
    marked = (f"*: {note}" if note == WIDENED else note for note in remarks)
    caption = "; ".join((CAPTION.format(unit=unit), *marked))
    view = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        title=heading(rows, options, config),
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    view.add_column("optimizer", no_wrap=True)
    # The headings fit 80 characters.
    shares = ("weights", "optimizer\nstate", "grads,\nother", "activa-\ntions")
    for column in ("batch", *shares, "peak", *(("host",) if with_host else ())):
        view.add_column(column, justify="right", no_wrap=True)
    view.add_column("", no_wrap=True)
    for row in rows:
        view.add_row(*cells(row, options, scale, with_host))
    return view


def draw(rows: list[Row], options: PlanOptions, config: LlamaConfig) -> None:
    """Draws a stacked bar per row, and a line at the limit, into the file of `plot`."""
    assert options.plot is not None
    figure = Figure(figsize=(9, 2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row.options.optimizer}, batch {row.options.batch:,}" for row in rows]
    left = [0.0] * len(rows)
    for name, label in SHARES.items():
        widths = [share(row, name) / 1e9 for row in rows]
        axes.barh(labels, widths, left=left, height=0.6, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, end, place in zip(rows, left, labels, strict=True):
        host = (
            f" + {gigabytes(row.memory.host_bytes)} on the host"
            if row.memory.host_bytes
            else ""
        )
        mark = "*" if is_widened(row, options.target) else ""
        axes.annotate(
            f" {gigabytes(row.memory.peak_bytes)}{mark}{host}",
            (end, place),
            va="center",
        )
    if limit := rows[0].limit_bytes:
        axes.axvline(limit / 1e9, color="black", ls="--", lw=1)
    axes.set_xlim(right=1.45 * max(left))  # Room for the numbers.
    axes.invert_yaxis()
    axes.set(xlabel="memory of a device (GB of 1e9 bytes)")
    axes.set_title(heading(rows, options, config), fontsize="small", wrap=True)
    if any(is_widened(row, options.target) for row in rows):
        figure.supxlabel(f"*: {WIDENED}", fontsize="x-small")
    figure.legend(loc="outside lower center", ncols=len(SHARES), fontsize="small")
    figure.savefig(options.plot, dpi=120)


def share(row: Row, name: str) -> int:
    """Returns the bytes of a part of the bar.

    A row that has only a peak has a single part, which is unknown.
    """
    if name == "activations_bytes":
        return row.activations_bytes or 0
    if name == "gradients_bytes":
        memory = row.memory
        unknown = memory.peak_bytes - memory.weights_bytes - memory.optimizer_bytes
        return max(0, unknown) if row.gradients_bytes is None else row.gradients_bytes
    return getattr(row.memory, name)
