"""Tokens a second of 7B on one GPU with its memory capped: python -m benchmarks.throughput_gpu.

What an optimizer's small state is worth: the larger batch that fits beside it. AdamW with bfloat16
moments, and APOLLO-Mini by the ordinary and by the layer-wise step, each train at the largest batch that
fits, on random tokens; then the layer-wise step in int8 at batch 1. Every run has a process of its own,
whose allocator gets no more than the cap; the largest batch is where a line through the memory of two
compiled batches meets it. About eight minutes on an H200; what has not begun by then is left out.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from benchmarks.memory import step_of
from benchmarks.report import made_with, markdown
from examples.llama import build
from examples.llama.config import PRESETS, param_count, preset
from examples.llama.flops import mfu
from examples.llama.mesh import make_mesh, over_data
from examples.llama.optimizers import make_optimizer
from examples.llama.options import RunOptions, parse
from examples.llama.plan import PlanOptions, bytes_in, runs
from examples.llama.target import memory_of
from examples.llama.usage import UsageError, exit_on_usage_error, notice

PLANNED_BATCHES = (64, 256)  # Large enough for activations, not gradients, to make the peak.
MARGIN = 0.97  # Of the cap, for what the compiler does not count.
STEP_DOWN = 0.9  # Of the batch, after one that did not fit.
TIMED_SECONDS = 5.0
BEGIN_BEFORE = 440.0  # Seconds from the start; a run takes up to a minute and a half.
LARGEST_WITHOUT_GPU = 10_000_000  # Parameters.

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains at the largest batch that fits, with the GPU's memory capped, and prints tokens a second."""

    model: str = "7b"
    """A preset of examples/llama/config.py; one small enough, as tiny, runs without a GPU."""
    caps: tuple[str, ...] = ("80GB", "64GB")
    """What of the GPU's memory a run gets: 80GB (1e9 bytes each) or 74.5GiB."""
    seq: int = 256
    """Tokens a sequence."""

    def __post_init__(self) -> None:
        preset(self.model)
        for cap in self.caps:
            bytes_in("--caps", cap)


class Device(NamedTuple):
    """Where it runs."""

    platform: str
    memory_bytes: int | None  # All there is; None where the device does not tell.
    made_with: str


class Case(NamedTuple):
    """A row of the table."""

    cap: str | None  # The largest batch in so much memory; None: the run's batch in all there is.
    name: str
    run: RunOptions


class Trained(NamedTuple):
    """What a run showed."""

    batch: int
    tokens_per_s: float
    utilisation: float | None  # Of the device's peak flops, 0 to 1; None where those are not known.
    peak_bytes: int | None  # By the allocator, initialisation included; None where it does not tell.


def cases(options: Options) -> list[Case]:
    """Returns what to run; what comes last may find no time left."""
    step = functools.partial(step_of, options.model, target="gpu", seq=options.seq)
    adamw = step("adamw", remat="full")
    mini = step("apollo-mini", remat="full", embeddings="apollo")
    layerwise = dataclasses.replace(mini, layerwise=True)
    int8 = step("apollo-mini", weights="int8", layerwise=True)
    found: list[tuple[str | None, str, PlanOptions]] = [
        *((cap, "adamw, bfloat16 moments", adamw) for cap in options.caps),
        *((cap, "apollo-mini, layer-wise", layerwise) for cap in options.caps),
        (None, "apollo-mini, layer-wise, int8 weights", int8),
        *((cap, "apollo-mini", mini) for cap in options.caps),
    ]
    return [Case(cap, name, *runs(plan, preset(options.model))) for cap, name, plan in found]


def in_process(variables: dict[str, str], function: Callable[..., Result], *args: Any) -> Result:
    """Calls a function in a process of its own, with more variables in its environment.

    An allocator's limits and the compiler's flags are read once a process, and only its end gives
    all memory back.
    """
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def device() -> Device:
    """Returns this process's device; the allocator must have been given half of its memory."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    heading = made_with(("jax", "jaxlib", "flax", "optax"))
    return Device(jax.default_backend(), limit and 2 * limit, heading)


def check_device(options: Options, there: Device) -> None:
    if there.platform != "gpu" and param_count(preset(options.model)) > LARGEST_WITHOUT_GPU:
        small = ", ".join(n for n, c in PRESETS.items() if param_count(c) <= LARGEST_WITHOUT_GPU)
        raise UsageError(
            f"--model {options.model} takes a GPU, and JAX finds none ({there.platform}); to try the "
            f"command without one, give --model {small} --caps 60MB"
        )
    for cap in options.caps:
        if there.memory_bytes is not None and bytes_in("--caps", cap) > there.memory_bytes:
            raise UsageError(
                f"--caps {cap} is more than the GPU has, {there.memory_bytes / 1e9:.1f} GB; lower it"
            )


def peak_bytes(run: RunOptions, platform: str) -> int:
    return memory_of(run, platform).peak_bytes


def line(run: RunOptions, platform: str) -> tuple[float, float]:
    """Returns the bytes at batch 0 and those a sequence, of a line through two compiled batches."""
    (low, base), (high, top) = (
        (batch, peak_bytes(dataclasses.replace(run, batch=batch), platform)) for batch in PLANNED_BATCHES
    )
    slope = (top - base) / (high - low)
    return base - slope * low, slope


def largest_batch(line: tuple[float, float], limit: float) -> int:
    """Returns how many sequences the line has at `limit` bytes; 0 or less where none fits."""
    base, slope = line
    return int((limit - base) // slope)


def train(run: RunOptions) -> Trained | None:
    """Trains on random tokens for some seconds; returns None where the memory does not suffice."""
    try:
        return _train(run)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _train(run: RunOptions) -> Trained:
    config = build.model_config(run)
    tx, _ = make_optimizer(run, config)
    mesh = make_mesh(run.mesh)
    state = build.initial_state(run, config, tx, mesh)
    step = build.training_step(run, config, tx, mesh)
    drawn = np.random.default_rng(0).integers(config.vocab_size, size=(run.batch, run.seq + 1))
    tokens = jax.device_put(drawn.astype(np.int32), over_data(mesh))
    done, start = 0, 0.0
    while done < 2 or time.perf_counter() - start < TIMED_SECONDS:
        state, metrics = step(state, tokens, np.int32(done))
        jax.block_until_ready((state, metrics))
        done += 1
        if done == 1:  # It was compiled, too.
            start = time.perf_counter()
    rate = (done - 1) * tokens.shape[0] * run.seq / (time.perf_counter() - start)
    assert run.compute_dtype is not None
    return Trained(
        run.batch,
        rate,
        mfu(rate, config, run.seq, [jax.devices()[0]], run.compute_dtype),
        (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    )


class Bench:
    """Runs cases, each in a process of its own, until the time is out."""

    def __init__(self, there: Device, started: float) -> None:
        self._there, self._started = there, started
        self._line = functools.cache(self._line)

    def measured(self, case: Case) -> Trained | str:
        """Returns what a case showed, or why it showed nothing."""
        variables, batch = {}, case.run.batch
        if case.cap is not None:
            limit = bytes_in("--caps", case.cap)
            batch = largest_batch(self._line(case.run), MARGIN * limit)
            if self._there.memory_bytes is not None:
                variables["XLA_CLIENT_MEM_FRACTION"] = f"{limit / self._there.memory_bytes:.4f}"
        while batch >= 1:
            if time.monotonic() - self._started > BEGIN_BEFORE:
                return "no time left"
            notice(f"training: {case.name}, {case.cap or 'all memory'}, batch {batch}")
            trained = in_process(variables, train, dataclasses.replace(case.run, batch=batch))
            if trained is not None:
                return trained
            batch = int(STEP_DOWN * batch)
        return "does not fit"

    def _line(self, run: RunOptions) -> tuple[float, float]:
        notice(f"compiling: {run.optimizer}{', layer-wise' * run.layerwise}")
        # Programs that are not run need not be tuned, nor have the memory.
        untuned = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
        variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": untuned}
        return in_process(variables, line, run, self._there.platform)


HEAD = ("memory", "optimizer", "batch", "tokens/s", "over adamw", "of the peak flops", "peak, GB")


def cells(case: Case, outcome: Trained | str, adamw: Trained | str | None) -> list[str]:
    name = [case.cap or "all", case.name]
    if isinstance(outcome, str):
        return [*name, outcome, *[""] * 4]
    over = outcome.tokens_per_s / adamw.tokens_per_s if isinstance(adamw, Trained) else None
    return [
        *name,
        f"{outcome.batch:,}",
        f"{outcome.tokens_per_s:,.0f}",
        "" if over is None else f"{over:.2f}",
        "" if outcome.utilisation is None else f"{outcome.utilisation:.1%}",
        "" if outcome.peak_bytes is None else f"{outcome.peak_bytes / 1e9:.2f}",
    ]


def report(options: Options) -> None:
    started = time.monotonic()
    there = in_process({"XLA_CLIENT_MEM_FRACTION": "0.5"}, device)
    check_device(options, there)
    bench = Bench(there, started)
    adamw: dict[str | None, Trained | str] = {}  # By the cap.
    rows = []
    for case in cases(options):
        outcome = bench.measured(case)
        if case.run.optimizer == "adamw":
            adamw[case.cap] = outcome
        rows.append(cells(case, outcome, adamw.get(case.cap)))
    print(there.made_with)
    print(
        f"{options.model}, bfloat16 weights unless said, sequences of {options.seq}, remat full (none for "
        "int8); GB of 1e9 bytes\n"
    )
    print(markdown(HEAD, rows, numbers_from=2))


def main(args: list[str] | None = None) -> None:
    exit_on_usage_error(lambda: report(parse(Options, args, "python -m benchmarks.throughput_gpu")))


if __name__ == "__main__":
    main()
