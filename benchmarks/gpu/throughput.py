"""`throughput`: the speed of training with the larger batch that a small state allows.

AdamW with bfloat16 moments, and APOLLO-Mini by the ordinary and by the layer-wise step,
train 7B on random tokens. Each has the largest batch that fits a part of the GPU's
memory. That batch is computed from a line through the memory of two compiled batches.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.bench import NO_TIME, Bench, Job
from benchmarks.gpu.memory import Trained, trained
from benchmarks.gpu.worker import Failed, Worker
from benchmarks.memory import step_of
from examples.llama.config import preset
from examples.llama.flops import flops_per_token, peak_flops
from examples.llama.memory.options import PlanOptions, bytes_in
from examples.llama.memory.search import runs
from examples.llama.memory.target import memory_of
from examples.llama.options import RunOptions
from examples.llama.run.errors import notice
from examples.llama.run.setup import model_config

# These batches are so large that activations, not gradients, decide the peak.
PLANNED_BATCHES = (64, 256)
MARGIN = 0.97  # The share of the memory to fill; the compiler does not count all.
STEP_DOWN = 0.9  # The factor for a batch that did not fit.
HEAD = (
    "memory",
    "optimizer",
    "batch",
    "tokens/s",
    "over adamw",
    "of the peak flops",
    "allocator's peak, GB",
)


class Case(NamedTuple):
    """A row of the table."""

    # The memory for the run. With None it has all memory and its own batch.
    limit_bytes: int | None
    name: str
    run: RunOptions

    @property
    def memory(self) -> str:
        return "all" if self.limit_bytes is None else f"{self.limit_bytes / 1e9:g} GB"


def cases(model: str, seq: int, limits: list[int]) -> list[Case]:
    """Returns the cases, the most important first, as time may run out."""
    step = functools.partial(step_of, model, target="gpu", seq=seq)
    adamw = step("adamw", remat="full")
    mini = step("apollo-mini", remat="full", embeddings="apollo")
    layerwise = dataclasses.replace(mini, layerwise=True)
    int8 = step("apollo-mini", weights="int8", layerwise=True)
    found: list[tuple[int | None, str, PlanOptions]] = [
        *((limit, "adamw, bfloat16 moments", adamw) for limit in limits),
        *(
            (limit, "apollo-mini, embeddings too, layer-wise", layerwise)
            for limit in limits
        ),
        (None, "apollo-mini, layer-wise, int8 weights", int8),
        *((limit, "apollo-mini, embeddings too", mini) for limit in limits),
    ]
    return [
        Case(limit, name, *runs(plan, preset(model))) for limit, name, plan in found
    ]


def line(run: RunOptions, platform: str) -> Generator[tuple[float, float]]:
    """Yields the bytes at batch 0 and the bytes per sequence, from two batches."""
    (low, base), (high, top) = (
        (batch, memory_of(dataclasses.replace(run, batch=batch), platform).peak_bytes)
        for batch in PLANNED_BATCHES
    )
    slope = (top - base) / (high - low)
    yield base - slope * low, slope


def largest_batch(line: tuple[float, float], limit: float) -> int:
    """Returns the largest batch within `limit` bytes; 0 or less if none fits."""
    base, slope = line
    return int((limit - base) // slope)


class Step(NamedTuple):
    """The settings of a step that its line depends on."""

    optimizer: str
    layerwise: bool


def step_of_run(run: RunOptions) -> Step:
    return Step(run.optimizer, run.layerwise)


def planned_lines(
    bench: Bench, cases: list[Case]
) -> dict[Step, tuple[float, float] | Failed]:
    """Returns the line of each step that has a limit of memory."""
    runs = {
        step_of_run(case.run): case.run
        for case in cases
        if case.limit_bytes is not None
    }
    notice(f"throughput: planning {len(runs)} steps")
    # These programs are not run, so their kernels need no tuning.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    variables = {"XLA_FLAGS": flags} if bench.on_gpu else bench.quick()
    with contextlib.ExitStack() as stack:
        # All of them compile at the same time.
        workers = {
            step: stack.enter_context(
                Worker(line, run, bench.device.platform, variables=variables)
            )
            for step, run in runs.items()
        }
        return {
            step: worker.prepared(bench.deadline) for step, worker in workers.items()
        }


def measured(
    bench: Bench, case: Case, line: tuple[float, float] | Failed | None
) -> tuple[int, Trained | Failed]:
    """Returns the batch and its result, after smaller batches if one does not fit."""
    variables, batch = {}, case.run.batch
    if case.limit_bytes is not None:
        if isinstance(line, Failed):
            return 0, line
        assert line is not None
        batch = largest_batch(line, MARGIN * case.limit_bytes)
        if bench.device.memory_bytes is not None:
            share = case.limit_bytes / bench.device.memory_bytes
            variables = {
                "XLA_CLIENT_MEM_FRACTION": f"{share:.4f}",
                "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
            }
    while batch >= 1:
        if bench.left() <= 0:
            return batch, NO_TIME
        run = dataclasses.replace(case.run, batch=batch)
        hlo: Path | None = bench.hlo(f"{case.name}, {case.memory}")
        job = Job(
            f"{case.name}, {case.memory}, batch {batch}", trained, (run, hlo), variables
        )
        found = bench.measure_alone(job)
        if found != Failed("out of memory"):
            return batch, found
        batch = int(STEP_DOWN * batch)
    return batch, Failed("does not fit")


def run(bench: Bench) -> None:
    model, seq, limits = (
        ("tiny", 16, [60_000_000]) if bench.rehearse else ("7b", 256, [])
    )
    if not limits:
        there = bench.device.memory_bytes or math.inf
        wanted_limits = (bytes_in("", "80GB"), bytes_in("", "64GB"))
        limits = sorted({int(min(x, there)) for x in wanted_limits}, reverse=True)
    title = (
        f"{model}, bfloat16 weights unless said, sequences of {seq}, remat full (none "
        "for int8); GB of 1e9 bytes"
    )
    table = bench.report.table(title, HEAD, numbers_from=2)
    adamw: dict[int | None, float] = {}  # Tokens per second by the limit of memory.
    wanted = [
        case
        for case in cases(model, seq, limits)[: 2 if bench.rehearse else None]
        if bench.wants(f"{case.name}, {case.memory}")
    ]
    lines = planned_lines(bench, wanted)
    for case in wanted:
        planned = lines.get(step_of_run(case.run))
        batch, found = measured(bench, case, planned)
        name = f"{case.name}, {case.memory}"
        if isinstance(found, Failed):
            table.put(name, [case.memory, case.name, found.reason])
            continue
        rate = batch * seq / found.seconds
        if case.run.optimizer == "adamw":
            adamw[case.limit_bytes] = rate
        peak = peak_flops(bench.device.kind, "bfloat16")
        flops = rate * flops_per_token(model_config(case.run), seq)
        cells = [
            case.memory,
            case.name,
            f"{batch:,}",
            f"{rate:,.0f}",
            f"{rate / adamw[case.limit_bytes]:.2f}"
            if case.limit_bytes in adamw
            else "",
            f"{flops / peak:.1%}" if peak else "",
            f"{found.peak_bytes / 1e9:.2f}" if found.peak_bytes else "",
        ]
        table.put(name, cells, {"batch": batch, "line": planned, **found._asdict()})
