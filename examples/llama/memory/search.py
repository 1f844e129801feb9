"""The memory of a step by optimizer and batch, and the largest batch that fits."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich import filesize

from examples.llama.config import LlamaConfig
from examples.llama.memory.options import PlanOptions, bytes_in, smallest_batch
from examples.llama.memory.target import Memory
from examples.llama.optimizers.recipes import options_of_each, with_defaults
from examples.llama.options import RunOptions
from examples.llama.run.errors import UsageError
from examples.llama.run.setup import model_config

MOST_SEQUENCES = 2**20  # The most sequences that `fit` tries.


class Row(NamedTuple):
    """The memory of one optimizer's step."""

    options: RunOptions
    memory: Memory
    activations_bytes: int | None  # The part of the peak that grows with the batch.
    # The limit of `fit`, else of the device. It is None if the latter is unknown.
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
    """Returns the options to plan, one per optimizer, with defaults filled in."""
    fields = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options.run_type)
        if field.init
    }
    run = options.run_type(**fields)
    if not options.compare:
        return [with_defaults(run, config)]
    return options_of_each(options.compare, run, config)


def plan(options: PlanOptions, memory_of: MemoryOf) -> Iterator[Row]:
    """Yields a row for each optimizer.

    Raises:
        UsageError: for options that are invalid on the target, and if `fit` is too
            small for a single optimizer. With several optimizers, the row of one that
            does not fit says so.
    """
    config = model_config(options)
    for run in runs(options, config):
        measured = remembered(run, memory_of)
        batch, limit = run.batch, None
        if options.fit is not None:
            limit = bytes_in("`fit`", options.fit)
            batch = fitting_batch(
                options, limit, functools.partial(measured, exact=False)
            )
            if not batch and len(options.compare) < 2:
                need = gigabytes(measured(run.batch).peak_bytes)
                raise UsageError(
                    f"`fit` {options.fit} is too small: {run.optimizer} does not fit "
                    f"at batch {run.batch}, which needs {need}; raise it, or see "
                    "`layerwise`, `weights` and `offload`"
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
    """Returns a function from the batch to a run's memory that compiles each once."""
    known: dict[int, Memory] = {}

    def measured(batch: int, exact: bool = True) -> Memory:
        # A refused program that was measured without `exact` may lack exact numbers.
        if batch not in known or (
            exact and known[batch].refused and known[batch].compiled_for is None
        ):
            known[batch] = memory_of(dataclasses.replace(run, batch=batch), exact=exact)
        return known[batch]

    return measured


def fitting_batch(
    options: PlanOptions, limit: int, measured: Callable[[int], Memory]
) -> int:
    """Returns the largest batch for which a device needs at most `limit` bytes, or 0.

    Extrapolates from the last two batches that were compiled, to at most eight times
    the batch, and then narrows the interval. Assumes that memory grows with the batch.
    """
    unit = smallest_batch(options)

    def fits(batch: int) -> bool:
        memory = measured(batch)
        if memory.capacity_bytes is not None and limit > memory.capacity_bytes:
            raise UsageError(
                f"`fit` {options.fit} is more than a device of `target` "
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

    It is the difference to the memory of half the batch (of twice the batch for the
    smallest one), scaled to the batch. Gradients may reuse the memory of activations
    that are no longer needed. That memory is not counted, and with a small batch it may
    be all of it.
    """
    if memory.temporaries_bytes is None:
        return None
    size = max(unit, batch // 2 // unit * unit) if batch > unit else 2 * batch
    other = measured(size)
    if other.compiled_for != memory.compiled_for:
        # One program was refused, and its numbers are those of another kind of device.
        return None
    growth = max(0, (memory.peak_bytes - other.peak_bytes) * batch // (batch - size))
    return min(
        growth, memory.peak_bytes - memory.weights_bytes - memory.optimizer_bytes
    )


def gigabytes(size: int) -> str:
    return filesize.decimal(size, precision=2)
