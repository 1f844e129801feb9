"""Optimizers at their best rates: a search per contender, then several seeds.

Run it with `python -m benchmarks.rate_search`, or with `--parts 1k 8k` for some of the
parts. A contender is an optimizer with options of its own, such as AdamW with clipping.
For each contender, the learning rate of the kernels is searched in factors of 2 until
the rates on both sides of the best are known to be worse, then that of embeddings, head
and norms in the same way. The best pair runs with the other seeds. The contenders of
`--three-rates` get three rates of the kernels and the first seed only.

Contenders are searched in parallel, with one process per core. Finished runs are not
repeated and an interrupted run continues, so the same command continues an interrupted
search. Each part ends with a table and two figures next to its runs.
"""

import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apollo_optax import StateBytes, state_bytes
from benchmarks import report
from examples.llama.evaluate import perplexity
from examples.llama.mesh import make_mesh
from examples.llama.optimizers import RECIPES, make_optimizer, with_defaults
from examples.llama.options import RunOptions, parse
from examples.llama.pretrain import pretrain
from examples.llama.run.errors import UsageError, exit_on_usage_error, unknown_name
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.log import Row, read_metrics
from examples.llama.run.plots import plot_perplexities
from examples.llama.run.recorder import DivergedError
from examples.llama.run.setup import abstract_params, execution_of, model_config

# The options of each contender. Folders of runs begin with its name, so a name must
# keep its options.
CONTENDERS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in RECIPES},
    # AdamW's own b2 is 0.999, and it does not clip.
    "adamw-clip": {"optimizer": "adamw", "clip_norm": 1.0},
    "adamw-b2-0.95": {"optimizer": "adamw", "b2": 0.95},
    "adamw-b2-0.95-clip": {"optimizer": "adamw", "b2": 0.95, "clip_norm": 1.0},
    # APOLLO-Zero has Adam for the embedding and the head. These have less state there.
    "apollo-zero-emb-flattening": {
        "optimizer": "apollo-zero",
        "embeddings": "flattening",
        "head": "flattening",
    },
    "apollo-zero-emb-scale": {
        "optimizer": "apollo-zero",
        "embeddings": "scale",
        "head": "scale",
    },
}
ADAMW_VARIANTS = tuple(
    name for name, options in CONTENDERS.items() if options["optimizer"] == "adamw"
)
# `--contenders` replaces these where the parts on tiny show that others are better.
FINALISTS = ("adamw", "muon", "apollo-mini", "apollo-zero", "racs", "sinkgd")
SEARCHED = (
    *ADAMW_VARIANTS,
    *FINALISTS[1:],
    *("apollo-zero-emb-flattening", "apollo-zero-emb-scale"),
)
THREE_RATES = tuple(name for name in CONTENDERS if name not in SEARCHED)

MOST_RATES = 8  # The most rates that a search tries.


class Part(NamedTuple):
    """A setting that contenders are compared in."""

    run: dict[str, Any]  # The options of `pretrain` that all its runs share.
    contenders: tuple[str, ...]
    three_rates: tuple[str, ...] = ()


ON_8K: dict[str, Any] = {"model": "tiny", "batch": 64, "steps": 300}
PARTS: dict[str, Part] = {
    "1k": Part({"model": "tiny", "batch": 8, "steps": 800}, SEARCHED, THREE_RATES),
    "8k": Part(ON_8K, SEARCHED, THREE_RATES),
    "6m": Part({"model": "6m", "batch": 64, "steps": 300}, FINALISTS),
    # These are 20 tokens per parameter.
    "long": Part({"model": "tiny", "batch": 64, "steps": 3200}, FINALISTS),
    "docs": Part(
        ON_8K | {"data": "package-docs"}, ("adamw", "muon", "apollo-zero", "racs")
    ),
}
HEAD = (
    *("contender", "lr", "lr emb", "seeds", "val ppl", "±", "over best adamw"),
    *("update RMS / lr", "step time / adamw's"),
    *("kernels' state, MB", "all state, MB"),
    *("val ppl by lr", "val ppl by lr emb"),
)
NOTE = """\
val ppl: best of a run's evaluations, mean over the seeds; ±: their standard deviation;
over best adamw: over the lowest val ppl of AdamW's variants in the table; update RMS /
lr: RMS of the kernels' update in a step, over the learning rate, mean over the
evaluations in the second half of the runs with all seeds; step time: the shortest of
the runs' median step times. Runs share the machine, so step times are rough. `make
bench-step` measures an optimizer's step alone. State is in 1e6 bytes."""
BY_STEP, BY_SECOND = "perplexity-by-step.png", "perplexity-by-second.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Each contender at the best of searched learning rates."""

    parts: tuple[str, ...] = tuple(PARTS)
    """Any of 1k and 8k (tiny, so many tokens per step), 6m, long, and docs (8k on the
    documentation of installed packages)."""
    contenders: tuple[str, ...] = ()
    """Contenders to search, in place of those of each part: optimizers of pretrain,
    adamw-clip, adamw-b2-0.95, adamw-b2-0.95-clip, apollo-zero-emb-flattening or
    apollo-zero-emb-scale. adamw is always among them."""
    three_rates: tuple[str, ...] = ()
    """Contenders that get three rates of the kernels and one seed, in place of those of
    each part."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first one searches; the best rates run with all."""
    data: str | None = None
    """As in pretrain; by default that of each part."""
    out: Path = Path("runs/rate-search")
    """Folder for the runs."""
    processes: int = report.cores()
    """Contenders that are searched at the same time, on one core each."""

    def __post_init__(self) -> None:
        for flag, names, known in (
            ("--parts", self.parts, PARTS),
            ("--contenders", self.contenders, CONTENDERS),
            ("--three-rates", self.three_rates, CONTENDERS),
        ):
            for name in names:
                if name not in known:
                    raise unknown_name(flag, name, known)
        if not self.seeds:
            raise UsageError("--seeds is empty; give one or more")
        if self.processes < 1:
            raise UsageError(
                f"--processes {self.processes} is out of range; give 1 or more"
            )

    def searches(self, part: str) -> dict[str, bool]:
        """Returns the contenders, and for each whether all its rates are searched."""
        searched, three_rates = self.contenders, self.three_rates
        if not searched and not three_rates:
            searched, three_rates = PARTS[part].contenders, PARTS[part].three_rates
        searches = dict.fromkeys(("adamw", *searched), True)
        return searches | {name: False for name in three_rates if name not in searches}


class Found(NamedTuple):
    """What a search found; losses are in nats per token, infinite if a run diverged."""

    by_lr: dict[float, float]
    by_lr_embeddings: dict[float, float]  # At the best rate of the kernels.
    by_seed: dict[int, float]  # At the best pair.

    @property
    def lr(self) -> float:
        return best(self.by_lr)

    @property
    def lr_embeddings(self) -> float:
        return best(self.by_lr_embeddings)

    @property
    def perplexity(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(map(perplexity, self.by_seed.values()))


class Record(NamedTuple):
    """The numbers in the files of a contender's runs, besides their losses."""

    # The RMS of the kernels' update over the learning rate. Runs of earlier versions
    # have not measured it.
    update_rms: float | None
    step_seconds: float
    curve: list[tuple[int, float]]  # Steps and validation perplexities of the best run.


def best(by_rate: dict[float, float]) -> float:
    """Returns the rate with the lowest loss."""
    return min(by_rate, key=by_rate.__getitem__)


def searched(
    loss_at: Callable[[float], float], start: float, most: int = MOST_RATES
) -> dict[float, float]:
    """Returns losses by rate, with worse ones on both sides of the best.

    Args:
        loss_at: the loss at a rate.
        start: the first rate; the others are `start` times powers of 2.
        most: how many rates to try. If they are not enough, the best rate is the lowest
            or the highest of those returned.
    """
    losses: dict[int, float] = {}  # The keys are powers of 2.

    def rate(power: int) -> float:
        return float(f"{start * 2.0**power:.6g}")

    power = 0
    while len(losses) < most:
        losses[power] = loss_at(rate(power))
        # If all rates diverge, the lowest is the nearest to one that does not.
        lowest = min(losses, key=lambda power: (losses[power], power))
        unknown = [near for near in (lowest - 1, lowest + 1) if near not in losses]
        if not unknown:
            break
        power = unknown[0]
    return {rate(power): losses[power] for power in sorted(losses)}


def search(
    loss: Callable[[float, float, int], float],
    start: tuple[float, float],
    seeds: tuple[int, ...],
) -> Found:
    """Searches the two rates one after the other, then runs the seeds.

    Args:
        loss: returns the loss for a rate of the kernels, a rate of the embeddings and a
            seed.
        start: the first rates of both.
        seeds: the seeds, of which the searches use the first.
    """
    lr, lr_embeddings = start
    by_lr = searched(lambda rate: loss(rate, lr_embeddings, seeds[0]), lr)
    lr = best(by_lr)
    by_lr_embeddings = searched(lambda rate: loss(lr, rate, seeds[0]), lr_embeddings)
    lr_embeddings = best(by_lr_embeddings)
    by_seed = {seed: loss(lr, lr_embeddings, seed) for seed in seeds}
    return Found(by_lr, by_lr_embeddings, by_seed)


def three_rates(
    loss: Callable[[float, float, int], float], start: tuple[float, float], seed: int
) -> Found:
    """Tries the first rate of the kernels, half of it and twice of it.

    Args:
        loss: returns the loss for a rate of the kernels, a rate of the embeddings and a
            seed.
        start: the first rates of both.
        seed: the seed of all runs.
    """
    lr, lr_embeddings = start
    rates = (float(f"{lr * factor:.6g}") for factor in (0.5, 1.0, 2.0))
    by_lr = {rate: loss(rate, lr_embeddings, seed) for rate in rates}
    lowest = by_lr[best(by_lr)]
    return Found(by_lr, {lr_embeddings: lowest}, {seed: lowest})


def base_run(options: SearchOptions, part: str, contender: str) -> RunOptions:
    """Returns a part's run of a contender at its default rates."""
    data = {} if options.data is None else {"data": options.data}
    settings: dict[str, Any] = PARTS[part].run | data | CONTENDERS[contender]
    run = RunOptions(out=options.out / part, resume="auto", **settings)
    return with_defaults(run, model_config(run))


def run_at(
    base: RunOptions, contender: str, lr: float, lr_embeddings: float, seed: int
) -> RunOptions:
    """Returns the run at a pair of rates and a seed, in a folder of its own."""
    name = f"{contender}-{lr:g}-{lr_embeddings:g}-seed{seed}"
    rates = {"lr": lr, "lr_embeddings": lr_embeddings}
    return dataclasses.replace(base, **rates, seed=seed, out=base.out / name)


def found_by(
    options: SearchOptions, part: str, contender: str, *, all_rates: bool = True
) -> Found:
    """Searches in this process; runs that have ended are read."""
    base = base_run(options, part, contender)
    assert base.lr is not None
    assert base.lr_embeddings is not None
    start = base.lr, base.lr_embeddings

    with StopRequest() as stop:

        @functools.cache
        def loss(lr: float, lr_embeddings: float, seed: int) -> float:
            run = run_at(base, contender, lr, lr_embeddings, seed)
            try:
                return pretrain(run, stop, measure_updates=True).val_loss
            except DivergedError:
                return math.inf

        if all_rates:
            return search(loss, start, options.seeds)
        return three_rates(loss, start, options.seeds[0])


def use_one_core(cores: Any) -> None:
    """Restricts this process to one of the cores in a queue."""
    os.sched_setaffinity(0, {cores.get()})


def found_by_all(options: SearchOptions, part: str) -> dict[str, Found]:
    """Searches the contenders of a part in processes of their own.

    If one of them fails or is interrupted, those that have not begun are left out.
    """
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    available = sorted(os.sched_getaffinity(0))
    for index in range(options.processes):
        cores.put(available[index % len(available)])
    with concurrent.futures.ProcessPoolExecutor(
        options.processes, context, use_one_core, (cores,)
    ) as pool:
        found = {
            name: pool.submit(found_by, options, part, name, all_rates=all_rates)
            for name, all_rates in options.searches(part).items()
        }
        try:
            for each in concurrent.futures.as_completed(found.values()):
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return {name: each.result() for name, each in found.items()}


def record_of(
    options: SearchOptions, part: str, contender: str, found: Found
) -> Record:
    """Reads the files of the runs of a search."""
    base = base_run(options, part, contender)
    assert base.lr_embeddings is not None

    def rows_at(lr: float, lr_embeddings: float, seed: int) -> list[Row]:
        return read_metrics(run_at(base, contender, lr, lr_embeddings, seed).out)

    seed = options.seeds[0]
    lr, lr_embeddings = found.lr, found.lr_embeddings
    tried = [
        *(rows_at(rate, base.lr_embeddings, seed) for rate in found.by_lr),
        *(rows_at(lr, rate, seed) for rate in found.by_lr_embeddings),
    ]
    seeds = {seed: rows_at(lr, lr_embeddings, seed) for seed in found.by_seed}
    sizes = [
        row["update_rms_over_lr"]
        for rows in seeds.values()
        for row in rows
        if row["step"] > base.steps / 2 and "update_rms_over_lr" in row
    ]
    return Record(
        update_rms=statistics.mean(sizes) if sizes else None,
        step_seconds=min(map(step_seconds, filter(None, [*tried, *seeds.values()]))),
        curve=[
            (row["step"], row["val_ppl"])
            for row in seeds[min(seeds, key=found.by_seed.__getitem__)]
            if "val_ppl" in row
        ],
    )


def step_seconds(rows: list[Row]) -> float:
    """Returns the median over a run's steps, which leaves out compilation."""
    tokens = rows[-1]["tokens"] / rows[-1]["step"]
    return tokens / statistics.median(row["tokens_per_s"] for row in rows)


def state_of(options: SearchOptions, part: str, contender: str) -> StateBytes:
    """Returns the bytes of optimizer state."""
    run = base_run(options, part, contender)
    config = model_config(run)
    params = abstract_params(config, execution_of(run, config), make_mesh(run.mesh))
    return state_bytes(make_optimizer(run, config)[0], params)


def table(
    found: Mapping[str, Found],
    records: Mapping[str, Record],
    state: Mapping[str, StateBytes],
) -> str:
    """Returns a row per contender.

    The perplexities are compared with the best of AdamW's variants, and the step times
    with that of adamw, so both must be there.
    """
    best_adamw = min(found[name].perplexity for name in ADAMW_VARIANTS if name in found)

    def listed(by_rate: dict[float, float]) -> str:
        cells = (f"{rate:g}: {perplexity(loss):.2f}" for rate, loss in by_rate.items())
        return ", ".join(cells)

    def row(name: str) -> tuple[str, ...]:
        result, record = found[name], records[name]
        perplexities = list(map(perplexity, result.by_seed.values()))
        seeds = len(perplexities)
        spread = f"{statistics.stdev(perplexities):.2f}" if seeds > 1 else ""
        over = result.perplexity / best_adamw - 1
        rms = "" if record.update_rms is None else f"{record.update_rms:.3g}"
        seconds = record.step_seconds / records["adamw"].step_seconds
        return (
            *(name, f"{result.lr:g}", f"{result.lr_embeddings:g}", str(seeds)),
            *(f"{result.perplexity:.2f}", spread, f"{over:+.1%}", rms),
            *(f"{seconds:.2f}", f"{state[name].kernels / 1e6:.2f}"),
            f"{sum(state[name]) / 1e6:.2f}",
            *(listed(result.by_lr), listed(result.by_lr_embeddings)),
        )

    return report.markdown(HEAD, map(row, found), 1)


def draw(records: Mapping[str, Record], folder: Path) -> None:
    """Draws the best run of each contender by step and by second of training."""
    by_step = {name: record.curve for name, record in records.items()}
    plot_perplexities(by_step, "step", folder / BY_STEP)
    by_second = {
        name: [(step * record.step_seconds, loss) for step, loss in record.curve]
        for name, record in records.items()
    }
    label = "seconds of training, at the contender's step time"
    plot_perplexities(by_second, label, folder / BY_SECOND)


def report_on(options: SearchOptions, part: str, found: Mapping[str, Found]) -> str:
    """Returns the table of a part with its setting, and draws its figures."""
    records = {name: record_of(options, part, name, found[name]) for name in found}
    state = {name: state_of(options, part, name) for name in found}
    run = base_run(options, part, "adamw")
    draw(records, run.out)
    return (
        f"{part}: {run.model}, {run.steps} steps of {run.batch * run.seq:,} tokens of "
        f"--data {run.data}; {report.made_with(('jax', 'flax', 'optax'))}\n\n"
        f"{table(found, records, state)}\n\n{NOTE}\n"
        f"Curves: {run.out / BY_STEP}, {run.out / BY_SECOND}\n"
    )


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(SearchOptions, args, "python -m benchmarks.rate_search")
        for part in options.parts:
            print(report_on(options, part, found_by_all(options, part)), flush=True)

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
