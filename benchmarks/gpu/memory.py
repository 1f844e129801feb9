"""`memory`: the allocator's peak of layer-wise 7B steps, and the planned peak."""

import dataclasses
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.gpu.bench import Bench, Job, keep_hlo
from benchmarks.gpu.worker import Failed
from benchmarks.memory import step_of
from benchmarks.optimizer_step import GOALS_HEAD, verdict
from examples.llama.config import preset
from examples.llama.memory.search import runs
from examples.llama.memory.target import Memory, compiled_step, memory_of_step
from examples.llama.mesh import make_mesh, over_data
from examples.llama.model import Batch
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.options import RunOptions
from examples.llama.run import setup

TIMED_SECONDS = 2.0
FEWEST_STEPS = 3
HEAD = (
    "weights",
    "embeddings",
    "batch",
    "planned, GB",
    "allocator's peak, GB",
    "of it before the first step",
    "host, GB",
    "s a step",
    "tokens/s",
)


class Trained(NamedTuple):
    """The time and the memory of some steps."""

    seconds: float  # The median time of a step.
    peak_bytes: int | None  # The allocator's peak; None if unknown.
    initial_peak_bytes: int | None  # The same before the first step.


def peak_bytes_in_use() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def trained(run: RunOptions, hlo: Path | None) -> Generator[Memory | Trained]:
    """Yields the planned memory, then the measurements; see `worker.Row`."""
    config = setup.model_config(run)
    setup.check_offload(run)
    tx, _ = make_optimizer(run, config)
    mesh = make_mesh(run.mesh)
    compiled = compiled_step(run, config, mesh)
    keep_hlo(hlo, compiled)
    yield memory_of_step(compiled, run, config, mesh, jax.default_backend())
    yield timed_steps(run, compiled, setup.initial_state(run, config, tx, mesh), mesh)


def timed_steps(
    run: RunOptions, step: Any, state: Any, mesh: jax.sharding.Mesh
) -> Trained:
    """Returns the measurements of training on random tokens for some seconds."""
    vocab_size = setup.model_config(run).vocab_size
    drawn = np.random.default_rng(0).integers(vocab_size, size=(run.batch, run.seq + 1))
    tokens = jax.device_put(drawn.astype(np.int32), over_data(mesh))
    number = jax.device_put(np.int32(1), setup.on_every_device(mesh))
    jax.block_until_ready(state)
    before, times = peak_bytes_in_use(), []
    while len(times) <= FEWEST_STEPS or sum(times) < TIMED_SECONDS:
        start = time.perf_counter()
        state, metrics = step(state, Batch(tokens), number)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    # The first step is left out, because its caches and pools are empty.
    return Trained(float(np.median(times[1:])), peak_bytes_in_use(), before)


def planned_runs(model: str, seq: int) -> list[RunOptions]:
    """Returns the runs, the most important first."""
    int8 = {"weights": "int8"}
    on_host = {"offload": "weights", "embeddings": "apollo"}
    resident = {"embeddings": "apollo"}
    wanted = [
        (1, int8),
        (1, on_host),
        (8, on_host),
        (1, {}),
        (1, resident),
        (1, {**int8, **resident}),
        (8, resident),
        (32, on_host),
        (32, resident),
        (128, on_host),
        (128, resident),
    ]
    found = []
    for batch, options in wanted:
        remat = "none" if batch == 1 else "full"
        given = {
            "target": "gpu",
            "seq": seq,
            "layerwise": True,
            "batch": batch,
            "remat": remat,
        }
        (run,) = runs(step_of(model, "apollo-mini", **given, **options), preset(model))
        found.append(run)
    return found


def name_of(run: RunOptions) -> str:
    weights = f"{run.weights} in host memory" if run.offload else run.weights
    return f"{weights}, embeddings under {run.embeddings}, batch {run.batch}"


def gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f}"


def run(bench: Bench) -> None:
    model, seq = ("tiny", 32) if bench.rehearse else ("7b", 256)
    title = (
        f"{model}, sequences of {seq}, layer-wise apollo-mini, moments in bfloat16; "
        "remat none at batch 1, full above; GB of 1e9 bytes"
    )
    table = bench.report.table(title, HEAD, numbers_from=2)
    found: dict[str, Trained] = {}

    def put(job: Job, memory: Memory | Failed, result: Trained | Failed) -> None:
        run: RunOptions = job.args[0]
        weights, embeddings, _ = job.name.split(", ")
        cells = [weights, embeddings.removeprefix("embeddings under "), f"{run.batch}"]
        values: dict[str, Any] = {}
        host = ""
        if isinstance(memory, Memory):
            cells.append(gigabytes(memory.peak_bytes))
            host = gigabytes(memory.host_bytes)
            values |= dataclasses.asdict(memory)
        if isinstance(result, Failed):
            table.put(job.name, [*cells, result.reason], values)
            return
        found[job.name] = result
        rate = run.batch * run.seq / result.seconds
        cells += [
            gigabytes(result.peak_bytes),
            gigabytes(result.initial_peak_bytes),
            host,
        ]
        cells += [f"{result.seconds:.3f}", f"{rate:,.0f}"]
        table.put(job.name, cells, values | result._asdict())

    planned = planned_runs(model, seq)[: 2 if bench.rehearse else None]
    jobs = [
        Job(name_of(run), trained, (run, bench.hlo(name_of(run)))) for run in planned
    ]
    bench.measure(jobs, put)
    if bench.on_gpu and not bench.rehearse:
        put_goals(bench, planned, found)


def put_goals(
    bench: Bench, planned: list[RunOptions], found: dict[str, Trained]
) -> None:
    table = bench.report.table("Goals", GOALS_HEAD, numbers_from=5)
    for run, low, high in (
        (planned[0], 0.0, 9.5),
        (planned[1], 0.0, 1.6),
        (planned[3], 14.5, 15.5),
    ):
        name = name_of(run)
        goal = f"{low:g} to {high:g} GB" if low else f"<= {high:g} GB"
        result = found.get(name)
        if result is None or result.peak_bytes is None:
            cells = ["not in this run", ""]
        else:
            measured = result.peak_bytes / 1e9
            cells = [f"{measured:.2f} GB", verdict(measured <= high)]
        table.put(name, ["GPU, 7b", f"{name}, allocator's peak", goal, *cells])
