"""`train`: model-flops utilisation, then the quality of optimizers at 60M parameters.

All optimizers train on the same batches, and each for as many tokens as the time
allows. OUT/train.json keeps the runs with their curves. Another call with the same OUT
adds seeds and learning rates to them.
"""

import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.gpu.bench import Bench, Job, keep_hlo, rows_per_wave
from benchmarks.gpu.memory import Trained, trained
from benchmarks.gpu.report import Table
from benchmarks.gpu.worker import Failed, Worker
from benchmarks.memory import step_of
from examples.llama.config import LlamaConfig, preset
from examples.llama.evaluate import make_evaluator, perplexity
from examples.llama.flops import flops_per_token, peak_flops
from examples.llama.memory.search import runs
from examples.llama.memory.target import Memory, compiled_step
from examples.llama.mesh import make_mesh, over_data
from examples.llama.model import Batch, pieces_of
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.options import RunOptions
from examples.llama.run import setup
from examples.llama.run.errors import UsageError, notice
from examples.llama.text import corpus
from examples.llama.text.windows import Windows, token_count, validation_batches

UTILISATION_SECONDS = 75.0  # The most seconds for the first table.
OPTIMIZERS = (
    "adamw",
    "apollo-mini",
    "muon",
    "apollo-zero",
    "apollo-zero-whitening",
    "racs",
    "apollo",
    "adafactor",
)
# The planned seconds for compiling a wave of runs.
PREPARE_SECONDS = 25.0
RUN_SECONDS = 4.0  # Planned seconds of a run beside its steps.
SHARE_OF_TIME = 0.9  # The planned share; some optimizers are slower than AdamW.
EVALUATIONS = 10
EVALUATION_WINDOWS = 1024
CURVE_POINTS = 100
UTILISATION_TITLE = (
    "Model-flops utilisation; 60m with float32 weights and bfloat16 products, the "
    "others all in bfloat16, remat dots"
)
UTILISATION_HEAD = (
    "model",
    "optimizer",
    "batch",
    "seq",
    "tokens/s",
    "of the peak flops",
    "s a step",
)
QUALITY_HEAD = (
    "optimizer",
    "lr",
    "lr emb",
    "seed",
    "steps",
    "tokens",
    "val ppl",
    "train loss",
    "tokens/s",
)


REHEARSED = ("adamw", "apollo-mini")


class Sizes(NamedTuple):
    """The runs of the part."""

    # The quality run with any one optimizer; the others differ in it only.
    quality: RunOptions
    utilisation: tuple[RunOptions, ...]
    data_tokens: int | None  # None for all tokens.


def bfloat16_run(model: str, optimizer: str, **options: Any) -> RunOptions:
    (run,) = runs(step_of(model, optimizer, target="gpu", **options), preset(model))
    return run


def sizes(rehearse: bool, batch: int | None = None) -> Sizes:
    """Returns the runs; `batch` is the sequences per step of the quality runs."""
    # Float32 weights and bfloat16 products suit AdamW best.
    mixed = {
        "weights": "float32",
        "compute_dtype": "bfloat16",
        "moment_dtype": "float32",
    }
    if rehearse:
        quality = bfloat16_run("tiny", "adamw", batch=batch or 4, seq=32, **mixed)
        return Sizes(quality, (quality,), 100_000)
    quality = bfloat16_run("60m", "adamw", batch=batch or 512, seq=256, **mixed)
    large = functools.partial(bfloat16_run, seq=1024, remat="dots")
    utilisation = (
        quality,
        large("350m", "apollo-mini", batch=64),
        large("1b", "apollo-mini", batch=32),
        large("350m", "adamw", batch=64),
        large("1b", "adamw", batch=32),
    )
    return Sizes(quality, utilisation, None)


class Text(NamedTuple):
    """A corpus on disk."""

    train_tokens: int
    key: str


def load(data: str, config: LlamaConfig, max_tokens: int | None) -> corpus.Corpus:
    return corpus.load_corpus(data, vocab_size=config.vocab_size, max_tokens=max_tokens)


def tokenised(
    data: str, config: LlamaConfig, max_tokens: int | None
) -> Generator[Text]:
    """Yields the corpus when its tokens are on disk."""
    text = load(data, config, max_tokens)
    yield Text(token_count(text.train), text.key)


class Curve(NamedTuple):
    """The losses and the speed of a run."""

    train: list[tuple[int, float]]  # Steps, and the mean loss since the last entry.
    validation: list[tuple[int, float]]  # Steps and their losses.
    tokens_per_s: float

    @property
    def perplexity(self) -> float:
        """The perplexity of the last evaluation."""
        return perplexity(self.validation[-1][1])


def quality_run(
    run: RunOptions, data: str, max_tokens: int | None, hlo: Path | None
) -> Generator[Curve | None]:
    """Yields None when compiled, then the curves of a run; see `worker.Row`."""
    config, mesh = setup.model_config(run), make_mesh(run.mesh)
    compiled = compiled_step(run, config, mesh)
    keep_hlo(hlo, compiled)
    text = load(data, config, max_tokens)
    windows = Windows(text.train, run.seq)
    held_out = validation_batches(
        text.validation,
        seq=run.seq,
        count=EVALUATION_WINDOWS,
        batch=min(128, run.batch),
    )
    # All optimizers see the windows in the same order.
    order = np.random.default_rng(run.seed).permutation(len(windows))
    # All batches are read beforehand, so that the disk is not timed.
    batches = [
        np.stack([windows[int(index)] for index in chosen])
        for chosen in np.resize(order, (run.steps, run.batch))
    ]
    tx, _ = make_optimizer(run, config)
    step: Any = compiled
    state = setup.initial_state(run, config, tx, mesh)
    evaluate = make_evaluator(
        pieces_of(config, setup.execution_of(run, config, mesh)), Batch(held_out)
    )
    losses, validation, seconds = [], [(0, evaluate(state.params))], 0.0
    yield None

    evaluated = sorted(
        {round(run.steps * (k + 1) / EVALUATIONS) for k in range(EVALUATIONS)} - {0}
    )
    start = time.perf_counter()
    for number, tokens in enumerate(batches, start=1):
        placed = jax.device_put(
            (Batch(tokens), np.int32(number)),
            (over_data(mesh), setup.on_every_device(mesh)),
        )
        state, metrics = step(state, *placed)
        losses.append(metrics.loss)
        if number in evaluated:
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start
            validation.append((number, evaluate(state.params)))
            start = time.perf_counter()
    yield Curve(
        thinned(np.array(jax.device_get(losses))),
        validation,
        run.steps * run.batch * run.seq / seconds,
    )


def thinned(losses: np.ndarray) -> list[tuple[int, float]]:
    """Returns means of consecutive losses, each with the number of its last step."""
    parts = np.array_split(losses, min(CURVE_POINTS, len(losses)))
    ends = itertools.accumulate(len(part) for part in parts)
    return [(end, float(part.mean())) for end, part in zip(ends, parts, strict=True)]


@dataclasses.dataclass(frozen=True)
class QualityOptions:
    """Which runs the `train` part adds to those in OUT."""

    data: str = "python"
    seeds: tuple[int, ...] = (0,)
    lr_factors: tuple[float, ...] = (1.0,)
    optimizers: tuple[str, ...] = OPTIMIZERS
    lr_embeddings: tuple[float | None, ...] = (None,)  # None for the default.
    batch: int | None = None  # None for 131,072 tokens.
    steps: int | None = None  # None for those of the runs in OUT, if any.


def utilisation(
    bench: Bench, planned: tuple[RunOptions, ...], table: Table
) -> dict[str, float]:
    """Fills a table; returns tokens per second by model and optimizer."""
    rates: dict[str, float] = {}

    def put(job: Job, known: Memory | Failed, found: Trained | Failed) -> None:
        del known
        run: RunOptions = job.args[0]
        cells = [str(run.model), run.optimizer, f"{run.batch}", f"{run.seq}"]
        if isinstance(found, Failed):
            table.put(job.name, [*cells, found.reason])
            return
        rate = run.batch * run.seq / found.seconds
        rates[job.name] = rate
        peak = peak_flops(bench.device.kind, "bfloat16")
        flops = rate * flops_per_token(setup.model_config(run), run.seq)
        share = f"{flops / peak:.1%}" if peak else ""
        table.put(
            job.name,
            [*cells, f"{rate:,.0f}", share, f"{found.seconds:.4f}"],
            found._asdict(),
        )

    jobs = []
    for run in planned:
        name = f"{run.model}, {run.optimizer}"
        jobs.append(Job(name, trained, (run, bench.hlo(name))))
    bench.measure(jobs, put)
    return rates


def json_of(bench: Bench) -> Path:
    return bench.report.folder / f"{bench.report.part}.json"


def kept_runs(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the runs in the OUT/train.json of an earlier call, by name."""
    if not path.exists():
        return {}
    tables = json.loads(path.read_text())["tables"]
    rows = [row for table in tables for row in table["rows"]]
    return {
        row["name"]: row
        for row in rows
        if row["values"] and "validation" in row["values"]
    }


def steps_that_fit(
    bench: Bench, run: RunOptions, text: Text, rate: float, count: int
) -> int:
    """Returns the steps that each of `count` runs gets, at most one epoch."""
    waves = -(-count // rows_per_wave())
    seconds = (
        SHARE_OF_TIME * (bench.left() - waves * PREPARE_SECONDS) / count - RUN_SECONDS
    )
    tokens = min(seconds * rate, text.train_tokens)
    return int(tokens // (run.batch * run.seq))


def quality_jobs(
    bench: Bench, sizes: Sizes, options: QualityOptions, steps: int
) -> list[Job]:
    jobs, base = [], sizes.quality
    grid = itertools.product(
        options.seeds, options.lr_embeddings, options.lr_factors, options.optimizers
    )
    fields = ("batch", "seq", "weights", "compute_dtype", "moment_dtype")
    for seed, lr_embeddings, factor, optimizer in grid:
        given = {name: getattr(base, name) for name in fields}
        run = bfloat16_run(str(base.model), optimizer, steps=steps, seed=seed, **given)
        assert run.lr is not None
        run = dataclasses.replace(
            run,
            lr=float(f"{factor * run.lr:.6g}"),
            lr_embeddings=lr_embeddings or run.lr_embeddings,
        )
        name = (
            f"{optimizer}, lr {run.lr:g}, lr emb {run.lr_embeddings:g}, "
            f"seed {seed}, {steps} steps of {run.batch} sequences"
        )
        jobs.append(
            Job(
                name,
                quality_run,
                (run, options.data, sizes.data_tokens, bench.hlo(name)),
            )
        )
    return jobs


def quality(
    bench: Bench,
    sizes: Sizes,
    options: QualityOptions,
    text: Text,
    rate: float | None,
    kept: dict[str, dict[str, Any]],
    table: Table,
) -> None:
    """Adds the runs of this call to the table; draws the curves of all runs."""
    base = sizes.quality
    rates = len(options.lr_factors) * len(options.lr_embeddings)
    count = len(options.seeds) * rates * len(options.optimizers)
    steps = options.steps or next(
        (
            row["values"]["steps"]
            for row in kept.values()
            if row["values"]["batch"] == base.batch
        ),
        None,
    )
    if steps is None and rate is not None:
        steps = steps_that_fit(bench, base, text, rate, count)
    if bench.rehearse:
        steps = 4
    if steps is None:
        bench.report.note(
            "Quality: the rate of AdamW, which decides the number of steps, is not "
            "known; give --steps."
        )
        return
    trained_on = {"text": text.key, "device": bench.device.kind}
    check_kept(kept, trained_on, json_of(bench))
    table.title = (
        f"Quality: {base.model}, sequences of {base.seq} tokens of `--data "
        f"{options.data}` ({text.train_tokens:,} training tokens, key {text.key}), "
        f"{base.weights} weights, {base.compute_dtype} products; rates warmed up over "
        "a tenth, then a cosine to a tenth"
    )
    if steps < 1:
        bench.report.note("Quality: no time left.")
        return

    def put(job: Job, known: Any, found: Curve | Failed) -> None:
        del known
        put_quality(table, job, found, trained_on)

    bench.measure(
        [j for j in quality_jobs(bench, sizes, options, steps) if j.name not in kept],
        put,
    )
    draw(bench.report.folder / "train.png", kept_runs(json_of(bench)))


def quality_table(bench: Bench, kept: dict[str, dict[str, Any]]) -> Table:
    """Returns the table of qualities with the runs of earlier calls."""
    title = "Quality: runs of earlier calls" if kept else "Quality"
    table = bench.report.table(title, QUALITY_HEAD, numbers_from=1)
    for name, row in kept.items():
        table.put(name, list(row["cells"].values()), row["values"])
    return table


def check_kept(
    kept: dict[str, dict[str, Any]], trained_on: dict[str, str], path: Path
) -> None:
    """Raises `UsageError` if runs of earlier calls had another text or machine."""
    for name, row in kept.items():
        theirs = {key: row["values"].get(key) for key in trained_on}
        if theirs != trained_on:
            raise UsageError(
                f"{path} has the run {name!r} of {theirs}, and this call has "
                f"{trained_on}, so they can't be in one table; give another `out`"
            )


def put_quality(
    table: Table, job: Job, found: Curve | Failed, trained_on: dict[str, str]
) -> None:
    run: RunOptions = job.args[0]
    rates = [f"{run.lr:g}", f"{run.lr_embeddings:g}"]
    cells = [run.optimizer, *rates, f"{run.seed}", f"{run.steps:,}"]
    cells.append(f"{run.steps * run.batch * run.seq:,}")
    if isinstance(found, Failed):
        table.put(job.name, [*cells, found.reason])
        return
    last = statistics.mean(loss for _, loss in found.train[-5:])
    cells += [f"{found.perplexity:.2f}", f"{last:.3f}", f"{found.tokens_per_s:,.0f}"]
    names = ("optimizer", "lr", "lr_embeddings", "seed", "steps", "batch", "seq")
    values = {name: getattr(run, name) for name in names} | found._asdict()
    table.put(job.name, cells, values | trained_on)


def draw(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Draws validation perplexity by tokens, with a line per run."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, row in found.items():
        values = row["values"]
        tokens = values["batch"] * values["seq"]
        steps, losses = zip(*values["validation"], strict=True)
        axes.plot(
            [tokens * step for step in steps],
            list(map(perplexity, losses)),
            label=name,
            marker=".",
        )
    axes.set(xlabel="tokens", ylabel="validation perplexity", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    if found:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def run(bench: Bench, options: QualityOptions) -> None:
    path = json_of(bench)
    kept = kept_runs(path)
    check_kept(kept, {"device": bench.device.kind}, path)
    utilised = bench.report.table(UTILISATION_TITLE, UTILISATION_HEAD, numbers_from=2)
    # Each row of this call replaces the file, so the runs of earlier calls come first.
    table = quality_table(bench, kept)
    planned = sizes(bench.rehearse, options.batch)
    base = planned.quality
    config = setup.model_config(base)
    # The CPU tokenizes the text while the GPU is measured.
    on_cpu = {"JAX_PLATFORMS": "cpu"}
    with Worker(
        tokenised, options.data, config, planned.data_tokens, variables=on_cpu
    ) as worker:
        share = min(UTILISATION_SECONDS, bench.left() / 4)
        first = dataclasses.replace(bench, deadline=time.monotonic() + share)
        rates = utilisation(first, planned.utilisation, utilised)
        notice(f"{bench.report.part}: waiting for the text")
        text = worker.prepared(bench.deadline)
    rate = rates.get(f"{base.model}, {base.optimizer}")
    if isinstance(text, Failed):
        bench.report.note(f"Quality: {text.reason}.")
        return
    quality(bench, planned, options, text, rate, kept, table)
