"""Tells a run's memory before it runs.

Run it with `python -m examples.llama.plan --model 7b --target v5e:1x1`.

Compiles the very step that `pretrain` runs, for this machine or for TPUs that are not
there, and reads the memory off the compiled program; nothing is trained. All numbers
are for one device, in bytes or in GB of 1e9 bytes, and of the training step alone.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich import box, filesize
from rich.console import Console
from rich.table import Table

from examples.llama.build import model_config
from examples.llama.config import LlamaConfig, param_count
from examples.llama.mesh import batch_shards, device_count
from examples.llama.optimizers import RECIPES, unused, with_defaults
from examples.llama.options import RunOptions, parse
from examples.llama.target import LOCAL, Compiler, CompilerError, Memory, check_target
from examples.llama.usage import UsageError, exit_on_usage_error, unknown_name

UNITS = {
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
SCALES = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1}
MOST_SEQUENCES = 2**20  # The most sequences that --fit tries.
SHARES = {
    "weights_bytes": "weights",
    "optimizer_bytes": "optimizer state",
    "gradients_bytes": "gradients, other",
    "activations_bytes": "activations",
}
CAPTION = (
    "{unit} on a device; peak: arguments + temporaries + output - what of these is in "
    "the same place; activations: what grows with the batch, by a second compilation; "
    "gradients, other: the rest"
)
WIDENED = (
    "the CPU's compiler turns bfloat16 into float32, so temporaries are not those of a "
    "GPU or TPU; give --target v5e:1x1 for such"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(RunOptions):
    """The memory that pretrain would need with these options, from compiling its step.

    Nothing is run.
    """

    out: Path = Path(os.devnull)
    """Not used: a command line of pretrain can be given as it is."""
    target: str = "cpu"
    """What to compile for: cpu, gpu (this machine's) or TPUs that need not be there:
    v5e:1x1, v5e:4x4, v6e:2x2, v5p:2x2x1, v4:2x2x1."""
    fit: str | None = None
    """A size as 16GB (16e9 bytes) or 15.75GiB: find the largest batch that fits, in
    place of --batch."""
    compare: tuple[str, ...] = ()
    """Several optimizers in place of --optimizer, as adamw,apollo,apollo-mini."""
    json: bool = False
    """Print a JSON object for each optimizer, in place of the table."""
    plot: Path | None = None
    """Draw the memory as bars into this .png."""

    def __post_init__(self) -> None:
        names = tuple(
            name for words in self.compare for name in words.split(",") if name
        )
        if self.compare and not names:
            raise UsageError(
                "--compare names no optimizer; give some as adamw,apollo, "
                "or leave it out"
            )
        for name in names:
            if name not in RECIPES:
                raise unknown_name("--compare", name, RECIPES)
            if names.count(name) > 1:
                raise UsageError(
                    f"--compare {name} is given twice; give each optimizer once"
                )
        object.__setattr__(self, "compare", names)
        if self.fit is not None:
            bytes_in("--fit", self.fit)
            object.__setattr__(self, "batch", smallest_batch(self))
        if self.plot and not (self.plot.suffix == ".png" and self.plot.parent.is_dir()):
            raise UsageError(
                f"--plot {self.plot} is no .png in a folder that is there; give another"
            )
        super().__post_init__()


def bytes_in(flag: str, text: str) -> int:
    """Returns the bytes in `16GB` or `15.75GiB`; other forms raise `UsageError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b)", text.strip().lower())
    if not match or not float(match[1]):
        raise UsageError(
            f"{flag} {text!r} is no size; give one as 16GB (1e9 bytes each) or "
            "15.75GiB (2**30)"
        )
    return int(float(match[1]) * UNITS[match[2]])


def smallest_batch(options: RunOptions) -> int:
    """Returns of what the batch must be a multiple."""
    return batch_shards(options.mesh) * max(1, options.accumulate)


class Row(NamedTuple):
    """The memory of one optimizer's step."""

    options: RunOptions
    memory: Memory
    activations_bytes: int | None  # The part of the peak that grows with the batch.
    # The limit of --fit, else of the device. It is None if the latter is unknown.
    limit_bytes: int | None

    @property
    def fits(self) -> bool | None:
        if self.memory.refused or self.limit_bytes is None:
            return False if self.memory.refused else None
        return self.memory.peak_bytes <= self.limit_bytes

    @property
    def gradients_bytes(self) -> int | None:
        """The rest of the peak: gradients, temporaries, tokens, padding of arrays."""
        if self.activations_bytes is None:
            return None
        known = (
            self.memory.weights_bytes
            + self.memory.optimizer_bytes
            + self.activations_bytes
        )
        return self.memory.peak_bytes - known


# Returns the memory of `RunOptions`, as `target.memory_of` does without its target.
MemoryOf = Callable[..., Memory]


def runs(options: PlanOptions, config: LlamaConfig) -> list[RunOptions]:
    """Returns what to plan, an optimizer each, defaults filled in."""
    fields = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(RunOptions)
    }
    run = RunOptions(**fields)
    if not options.compare:
        return [with_defaults(run, config)]
    planned = []
    for name in options.compare:
        run = dataclasses.replace(run, optimizer=name)
        # What is meant for some of the optimizers is kept from the others.
        names = [flag[2:] for flag in unused(run, config)]
        ignored = {
            field.name: field.default
            for field in dataclasses.fields(run)
            if field.name in names
        }
        planned.append(with_defaults(dataclasses.replace(run, **ignored), config))
    return planned


def plan(options: PlanOptions, memory_of: MemoryOf) -> Iterator[Row]:
    """Yields a row for each optimizer.

    Raises:
        UsageError: for options that make no run on the target, and where --fit is too
            small for one optimizer; of several, those that do not fit have a row that
            says so.
    """
    config = model_config(options)
    for run in runs(options, config):
        measured = remembered(run, memory_of)
        batch, limit = run.batch, None
        if options.fit is not None:
            limit = bytes_in("--fit", options.fit)
            batch = fitting_batch(
                options, limit, functools.partial(measured, exact=False)
            )
            if not batch and len(options.compare) < 2:
                need = gigabytes(measured(run.batch).peak_bytes)
                raise UsageError(
                    f"--fit {options.fit} is too small: {run.optimizer} does not fit "
                    f"at batch {run.batch}, which needs {need}; raise it, or see "
                    "--layerwise, --weights and --offload"
                )
        batch = batch or run.batch
        memory = measured(batch)
        yield Row(
            dataclasses.replace(run, batch=batch),
            memory,
            activations(measured, memory, batch, smallest_batch(run)),
            memory.capacity_bytes if limit is None else limit,
        )


def remembered(run: RunOptions, memory_of: MemoryOf) -> MemoryOf:
    """Returns the memory of a run as a function of the batch, each compiled once."""
    known: dict[int, Memory] = {}

    def measured(batch: int, exact: bool = True) -> Memory:
        # Only a program that is refused has more to be known.
        if batch not in known or (
            exact and known[batch].refused and known[batch].compiled_for is None
        ):
            known[batch] = memory_of(dataclasses.replace(run, batch=batch), exact=exact)
        return known[batch]

    return measured


def fitting_batch(
    options: PlanOptions, limit: int, measured: Callable[[int], Memory]
) -> int:
    """Returns the largest batch of which a device needs at most `limit` bytes, or 0.

    Follows the line through the last two batches that were compiled, at most to eight
    times the batch, then closes in. Memory is taken to grow with the batch.
    """
    unit = smallest_batch(options)

    def fits(batch: int) -> bool:
        memory = measured(batch)
        if memory.capacity_bytes is not None and limit > memory.capacity_bytes:
            raise UsageError(
                f"--fit {options.fit} is more than a device of --target "
                f"{options.target} gives a program, "
                f"{gigabytes(memory.capacity_bytes)}; lower it, or give a larger "
                "target"
            )
        return not memory.refused and memory.peak_bytes <= limit

    if not fits(unit):
        return 0
    # The batches `low` and `before` fit. The batch `high` does not.
    low, before, high = unit, None, None
    # Every fourth turn halves the interval, in case growth is uneven.
    turns = itertools.cycle((True, True, True, False))
    while True:
        most = min(8 * low, MOST_SEQUENCES if high is None else high - unit)
        if most // unit * unit <= low:
            return low
        guess = most if high is None else (low + high) // 2
        if (high is None or next(turns)) and (other := high or before):
            growth = (measured(other).peak_bytes - measured(low).peak_bytes) / (
                other - low
            )
            guess = (
                low + (limit - measured(low).peak_bytes) / growth
                if growth > 0
                else most
            )
        guess = low + max(1, int(min(guess, most) - low) // unit) * unit
        if fits(guess):
            low, before = guess, low
        else:
            high = guess


def activations(
    measured: Callable[[int], Memory], memory: Memory, batch: int, unit: int
) -> int | None:
    """Returns the part of a step's memory that grows with the batch.

    It is what half the batch (of the smallest, twice the batch) takes less (more), in
    proportion. What the activations share with gradients, by being gone before those
    are there, is not in it: with a small batch that may be all of it.
    """
    if memory.temporaries_bytes is None:
        return None
    size = max(unit, batch // 2 // unit * unit) if batch > unit else 2 * batch
    other = measured(size)
    if other.compiled_for != memory.compiled_for:
        return None  # Refused, and known of another kind of device.
    growth = max(0, (memory.peak_bytes - other.peak_bytes) * batch // (batch - size))
    return min(
        growth, memory.peak_bytes - memory.weights_bytes - memory.optimizer_bytes
    )


def gigabytes(size: int) -> str:
    return filesize.decimal(size, precision=2)


def is_widened(row: Row, target: str) -> bool:
    """Whether the target's compiler uses another precision than was asked for."""
    run = row.options
    return target == "cpu" and "bfloat16" in (run.weights, run.compute_dtype)


def as_json(row: Row, options: PlanOptions, config: LlamaConfig) -> dict[str, Any]:
    run, memory = row.options, row.memory
    names = (
        *(
            "optimizer",
            "model",
            "batch",
            "seq",
            "accumulate",
            "mesh",
            "weights",
            "compute_dtype",
            "rounding",
        ),
        *("moment_dtype", "embeddings", "rank", "layerwise", "offload", "remat"),
    )
    return {
        "target": options.target,
        **{name: getattr(run, name) for name in names},
        "model": str(run.model or run.init_from),
        "parameters": param_count(config),
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
    """Returns what one must know not to take the row for more than it is."""
    memory = row.memory
    found = [WIDENED] if is_widened(row, options.target) else []
    if memory.refused:
        source = (
            f"measured on {memory.compiled_for}"
            if memory.compiled_for
            else "of its compiler's message"
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
    return (
        f"{run.model or run.init_from}: {param_count(config):,} parameters in "
        f"{run.weights}, sequences of {run.seq}, on "
        f"{options.target}{kind}{gives}{limit}"
    )


def table(rows: list[Row], options: PlanOptions, config: LlamaConfig) -> Table:
    """Returns a row for each optimizer, the notes in the caption."""
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
    """Draws a stacked bar per row, and a line at the limit, into the file of --plot."""
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

    A row that has a peak alone has one unknown part.
    """
    if name == "activations_bytes":
        return row.activations_bytes or 0
    if name == "gradients_bytes":
        memory = row.memory
        unknown = memory.peak_bytes - memory.weights_bytes - memory.optimizer_bytes
        return max(0, unknown) if row.gradients_bytes is None else row.gradients_bytes
    return getattr(row.memory, name)


def with_progress(memory_of: MemoryOf, console: Console) -> MemoryOf:
    """Returns `memory_of`, saying on a terminal what is being compiled."""

    def measured(run: RunOptions, **more: Any) -> Memory:
        with console.status(f"compiling {run.optimizer}, batch {run.batch:,}"):
            return memory_of(run, **more)

    return measured


def report(options: PlanOptions, console: Console) -> None:
    """Plans and prints, and draws where --plot says so."""
    check_target(options.target)
    config = model_config(options)
    rows = []
    with Compiler(options.target, device_count(options.mesh)) as compiler:
        for row in plan(options, with_progress(compiler, Console(stderr=True))):
            rows.append(row)
            if options.json:
                print(json.dumps(as_json(row, options, config)), flush=True)
    if not options.json:
        console.print(table(rows, options, config))
    if options.plot:
        draw(rows, options, config)


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(PlanOptions, args, "python -m examples.llama.plan")
        try:
            report(options, Console())
        except CompilerError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
