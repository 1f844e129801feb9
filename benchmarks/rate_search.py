"""Optimizers at their best rates: a search per contender, then several seeds.

Run it with `python -m benchmarks.rate_search`, or with `--parts 1k 8k` for some of the
parts. A contender is an optimizer with options of its own, such as AdamW with clipping.
A search tries learning rates of the kernels in factors of 2 until the rates on both
sides of the best are known to be worse, then those of embeddings, head and norms in the
same way. The best pair runs with the other seeds. `rate_search_plan.py` has the
contenders of each part, and says which of them are searched and which are run at given
rates.

Contenders are run in parallel, with one process per core. Each finished run adds a line
to a file of results. The same command continues an interrupted search: it leaves out
the runs in that file, and continues a run from its folder. On another machine, the file
is enough to leave out the finished runs. Each part ends with a table of all contenders
that have runs, and with two figures next to its runs. A summary of all parts follows.
`--finished-only` prints the tables of a file of results without any training.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apollo_optax import StateBytes
from benchmarks import report
from benchmarks.perplexity_figure import plot_perplexities
from benchmarks.rate_search_plan import (
    ADAMW_VARIANTS,
    BASES,
    CONTENDERS,
    EMBEDDING_CONTENDERS,
    EMBEDDING_VARIANTS,
    MUON_VARIANTS,
    PARTS,
    SEARCH,
    THREE_RATES,
    Plan,
    plain_variants_of,
    variants_of,
)
from benchmarks.run_records import Records, RunRecord
from examples.llama.evaluate import perplexity
from examples.llama.optimizers.recipes import with_defaults
from examples.llama.options import RunOptions, check_seeds, parse
from examples.llama.pretrain import pretrain
from examples.llama.run import machine
from examples.llama.run.errors import UsageError, exit_on_usage_error, unknown_name
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.log import read_config, read_metrics
from examples.llama.run.recorder import DivergedError
from examples.llama.run.setup import model_config, state_bytes_of

MOST_RATES = 8  # The most rates that a search tries.


class Goal(NamedTuple):
    """A ratio of two perplexities, each of the best of its kind, and its limits."""

    # Each is the name of a contender, or a key of `GROUPS`.
    contenders: str
    over: str
    limits: dict[str, float]  # The highest ratio that meets the goal, by part.


STATELESS = "the best without state for matrices"
LITTLE_STATE = "apollo-zero, little state for embeddings and head"
# The contenders of a kind. `goals_table` finds those of STATELESS by their state.
GROUPS = {
    **{name: plain_variants_of(name) for name in ("adamw", "muon", "apollo-zero")},
    "racs": variants_of("racs"),
    LITTLE_STATE: tuple(
        variant for name in EMBEDDING_CONTENDERS for variant in plain_variants_of(name)
    ),
}
# The goals are to beat AdamW, to come near Muon with less state, and to be level with
# rules that have more state.
GOALS = (
    Goal(STATELESS, "adamw", {"1k": 0.97, "8k": 0.92, "6m": 0.95}),
    Goal(STATELESS, "muon", {"1k": 1.03, "8k": 1.03, "6m": 1.03}),
    Goal("racs", "adamw", {"1k": 1.02, "8k": 1.02}),
    Goal(LITTLE_STATE, "apollo-zero", {"1k": 1.01, "8k": 1.01}),
)
HEAD = (
    "contender",
    "lr",
    "lr emb",
    "seeds",
    "val ppl",
    "±",
    "over best adamw",
    "by seed",
    "over best muon",
    "update RMS / lr",
    "step time / adamw's",
    "kernels' state, MB",
    "all state, MB",
    "val ppl by lr",
    "val ppl by lr emb",
)
NOTE = """\
val ppl: best of a run's evaluations, mean over the seeds; ±: their standard deviation;
over best adamw: the ratio to the best of AdamW's variants in the table, other than
those with relative updates, minus 1, of means over the seeds that both have; by seed:
the same for each of these seeds; over best muon: the same with the variants of Muon;
update RMS / lr: RMS of the kernels' update in a step, over the learning rate, mean over
the evaluations in the second half of the runs with all seeds; step time: the shortest
of the runs' median step times, over that of the first variant of AdamW in the table.
Runs share a machine, and may be of several, so step times are rough. `make bench-step`
measures an optimizer's step alone.
State is in 1e6 bytes. If a best rate is the lowest or the highest in the last columns,
rates beyond it were not tried."""
SUMMARY_NOTE = """\
The perplexity of each optimizer over that of AdamW, minus 1, and in parentheses the
number of seeds. AdamW is without relative updates, which have rows of their own:"""
BY_STEP, BY_SECOND = "perplexity-by-step.png", "perplexity-by-second.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Each contender at the best of searched learning rates."""

    parts: tuple[str, ...] = tuple(PARTS)
    """Any of 1k and 8k (tiny, so many tokens per step), 6m, long (on the source of
    installed packages), and docs (8k on their documentation)."""
    contenders: tuple[str, ...] = ()
    """Contenders to search: optimizers of pretrain; apollo-zero-rank-32;
    apollo-zero-emb-adafactor, apollo-zero-emb-adafactor-momentum, apollo-zero-emb-racs,
    apollo-zero-emb-scale or apollo-zero-emb-flattening; adamw, muon, apollo-zero or
    apollo-zero-momentum followed by -clip, -b2-0.95, -b2-0.95-clip, -relative,
    -b2-0.95-relative or -b2-0.95-clip-relative; or apollo-zero-rank-32,
    apollo-zero-whitening, apollo-zero-momentum-int8, apollo-mini, racs, swan,
    apollo-zero-emb-adafactor or apollo-zero-emb-adafactor-momentum followed by
    -b2-0.95, -relative or -b2-0.95-relative. Only those with -relative have updates in
    proportion to the weights. adamw is added if no contender is AdamW. If this or
    --three-rates is given, the plans in rate_search_plan.py are not used."""
    three_rates: tuple[str, ...] = ()
    """Contenders that get three rates of the kernels and one seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first one chooses the rates. The best rates of a search run with all of them,
    and those of --three-rates with the first. Other seeds in --results are left out."""
    data: str | None = None
    """As in pretrain; by default that of each part."""
    out: Path = Path("runs/rate-search")
    """Folder for the runs and the figures."""
    results: Path | None = None
    """File of JSON lines with the finished runs. New ones are added. The default is
    results.jsonl in --out."""
    finished_only: bool = False
    """Train nothing, and print the tables of the runs in --results."""
    processes: int = machine.cores()
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
        for name in self.three_rates:
            if name in self.contenders:
                raise UsageError(
                    f"{name} is in --contenders and in --three-rates; leave one out"
                )
        check_seeds("--seeds", self.seeds)
        if self.processes < 1:
            raise UsageError(
                f"--processes {self.processes} is out of range; give 1 or more"
            )

    @property
    def given(self) -> dict[str, Plan]:
        """The plans of the contenders that were given, which may be none."""
        plans = dict.fromkeys(self.contenders, SEARCH)
        plans |= dict.fromkeys(self.three_rates, THREE_RATES)
        if plans and not any(name in ADAMW_VARIANTS for name in plans):
            plans = {"adamw": SEARCH} | plans
        return plans

    def plans(self, part: str) -> dict[str, Plan]:
        """Returns the contenders that are trained in a part, and the runs of each."""
        return self.given or PARTS[part].plans

    @property
    def tabulated(self) -> tuple[str, ...]:
        """The contenders that are in the tables if they have runs."""
        return tuple(self.given or CONTENDERS)


class Found(NamedTuple):
    """The runs of a contender in a part, by what the search looks at.

    Losses are in nats per token, infinite if a run diverged.
    """

    by_lr: dict[float, RunRecord]
    by_lr_embeddings: dict[float, RunRecord]  # At the best rate of the kernels.
    by_seed: dict[int, RunRecord]  # At the best pair.

    @property
    def lr(self) -> float:
        return best(losses(self.by_lr))

    @property
    def lr_embeddings(self) -> float:
        return best(losses(self.by_lr_embeddings))

    @property
    def perplexity(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.perplexities.values())

    @property
    def perplexities(self) -> dict[int, float]:
        """The perplexities by seed."""
        return {seed: perplexity(run.loss) for seed, run in self.by_seed.items()}

    @property
    def update_rms(self) -> float | None:
        """The RMS of the kernels' update over the learning rate, over the seeds."""
        sizes = [run.update_rms for run in self.by_seed.values()]
        measured = [size for size in sizes if size is not None]
        return statistics.mean(measured) if measured else None

    @property
    def step_seconds(self) -> float:
        """The shortest of the runs' median step times."""
        runs = (*self.by_lr.values(), *self.by_lr_embeddings.values())
        times = (run.step_seconds for run in (*runs, *self.by_seed.values()))
        return min((time for time in times if time is not None), default=math.nan)

    @property
    def curve(self) -> list[list[float]]:
        """Pairs of step and validation perplexity of the best run."""
        return min(self.by_seed.values(), key=lambda run: run.loss).curve


def losses(runs: Mapping[float, RunRecord]) -> dict[float, float]:
    return {rate: run.loss for rate, run in runs.items()}


def found_in(runs: Sequence[RunRecord], lr_embeddings: float, seed: int) -> Found:
    """Returns the runs that a search would have made, out of all runs of a contender.

    Args:
        runs: a contender's runs in one part, of which one or more have the two
            following values.
        lr_embeddings: the rate of embeddings at which the kernels' rate was searched.
        seed: the seed of the searches.
    """

    def by(key: Callable[[RunRecord], float], **fixed: float) -> dict[Any, RunRecord]:
        chosen = [
            run
            for run in runs
            if all(getattr(run, name) == value for name, value in fixed.items())
        ]
        return {key(run): run for run in sorted(chosen, key=key)}

    by_lr = by(lambda run: run.lr, lr_embeddings=lr_embeddings, seed=seed)
    lr = best(losses(by_lr))
    by_lr_embeddings = by(lambda run: run.lr_embeddings, lr=lr, seed=seed)
    lr_embeddings = best(losses(by_lr_embeddings))
    by_seed = by(lambda run: run.seed, lr=lr, lr_embeddings=lr_embeddings)
    return Found(by_lr, by_lr_embeddings, by_seed)


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
    defaults: tuple[float, float],
    seeds: tuple[int, ...],
    plan: Plan = SEARCH,
    start: tuple[float, float] | None = None,
) -> None:
    """Makes the runs of a plan, one after the other.

    Args:
        loss: runs a rate of the kernels, a rate of the embeddings and a seed, unless it
            was run before, and returns the loss.
        defaults: the default rates of both.
        seeds: the seeds, of which the first one chooses the rates.
        plan: which rates and seeds to run.
        start: the first rates of searches. The default is `defaults`.
    """
    default, default_embeddings = defaults
    start = defaults if start is None else start

    def best_of(
        ratios: tuple[float, ...] | None,
        loss_at: Callable[[float], float],
        default: float,
        start: float,
    ) -> float:
        if ratios is None:
            return best(searched(loss_at, start))
        rates = (float(f"{default * ratio:.6g}") for ratio in ratios)
        return best({rate: loss_at(rate) for rate in rates})

    lr = best_of(
        plan.lr,
        lambda rate: loss(rate, default_embeddings, seeds[0]),
        default,
        start[0],
    )
    lr_embeddings = best_of(
        plan.lr_embeddings,
        lambda rate: loss(lr, rate, seeds[0]),
        default_embeddings,
        start[1],
    )
    for seed in seeds[: plan.seeds]:
        loss(lr, lr_embeddings, seed)


def base_run(options: SearchOptions, part: str, contender: str) -> RunOptions:
    """Returns a part's run of a contender at its default rates."""
    data = {} if options.data is None else {"data": options.data}
    settings: dict[str, Any] = {"relative": False}
    settings |= PARTS[part].run | data | CONTENDERS[contender]
    run = RunOptions(out=options.out / part, resume="auto", **settings)
    return with_defaults(run, model_config(run))


def run_at(
    base: RunOptions, contender: str, lr: float, lr_embeddings: float, seed: int
) -> RunOptions:
    """Returns the run at a pair of rates and a seed, in a folder of its own."""
    name = f"{contender}-{lr:g}-{lr_embeddings:g}-seed{seed}"
    rates = {"lr": lr, "lr_embeddings": lr_embeddings}
    return dataclasses.replace(base, **rates, seed=seed, out=base.out / name)


def default_rates(base: RunOptions) -> tuple[float, float]:
    """Returns the default rates of the kernels and of the embeddings."""
    assert base.lr is not None
    assert base.lr_embeddings is not None
    return base.lr, base.lr_embeddings


def results_of(options: SearchOptions) -> Records:
    """Returns the runs that have ended."""
    return Records(options.results or options.out / "results.jsonl")


def found_so_far(
    records: Records, options: SearchOptions, part: str, contender: str
) -> Found | None:
    """Returns the finished runs of a contender.

    Without a run at the default rate of embeddings and with the first seed, it returns
    None.
    """
    base = base_run(options, part, contender)
    lr_embeddings, seed = base.lr_embeddings, options.seeds[0]
    assert lr_embeddings is not None
    runs = [
        run for run in records.of(part, contender, base) if run.seed in options.seeds
    ]
    if not any((run.lr_embeddings, run.seed) == (lr_embeddings, seed) for run in runs):
        return None
    return found_in(runs, lr_embeddings, seed)


def run_search(options: SearchOptions, part: str, contender: str, plan: Plan) -> None:
    """Makes the runs of a plan in this process, without those that have ended.

    A search starts at the best of the rates that have been run.
    """
    base = base_run(options, part, contender)
    records = results_of(options)
    found = found_so_far(records, options, part, contender)
    defaults = default_rates(base)
    start = (found.lr, found.lr_embeddings) if found else defaults

    with StopRequest() as stop:

        def loss(lr: float, lr_embeddings: float, seed: int) -> float:
            run = run_at(base, contender, lr, lr_embeddings, seed)
            record = records.find(part, contender, run)
            if record is None:
                record = trained(part, contender, run, stop)
                records.add(record)
            return record.loss

        search(loss, defaults, options.seeds, plan, start)


def trained(part: str, contender: str, run: RunOptions, stop: StopRequest) -> RunRecord:
    """Trains a model, or continues its run, and returns the result."""
    try:
        val_loss = pretrain(run, stop, measure_updates=True).val_loss
    except DivergedError:
        val_loss = None
    rows, config = read_metrics(run.out), read_config(run.out)
    return RunRecord.of(part, contender, run, val_loss, rows, config)


def use_one_core(cores: Any) -> None:
    """Restricts this process to one of the cores in a queue, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})


def run_searches(options: SearchOptions, part: str) -> None:
    """Searches the contenders of a part in processes of their own.

    If one of them fails or is interrupted, those that have not begun are left out.
    """
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    available = machine.core_numbers()
    for index in range(options.processes):
        cores.put(available[index % len(available)])
    with concurrent.futures.ProcessPoolExecutor(
        options.processes, context, use_one_core, (cores,)
    ) as pool:
        searches = [
            pool.submit(run_search, options, part, name, plan)
            for name, plan in options.plans(part).items()
        ]
        try:
            for each in concurrent.futures.as_completed(searches):
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def found_by_all(options: SearchOptions, part: str) -> dict[str, Found]:
    """Returns what is in the file of results of the contenders of a part.

    Contenders without a run at the default rate of embeddings and with the first seed
    are left out.
    """
    records, found = results_of(options), {}
    if options.finished_only and not records.path.exists():
        raise UsageError(
            f"--results {records.path} does not exist; give a file of results, or "
            "leave out --finished-only"
        )
    for name in options.tabulated:
        runs = found_so_far(records, options, part, name)
        if runs is not None:
            found[name] = runs
    if not any(name in found for name in ADAMW_VARIANTS):
        seed = options.seeds[0]
        raise UsageError(
            f"{records.path} has no run of AdamW in part {part} with seed {seed} and "
            "the default rate of embeddings, with which the others are compared; leave "
            "out --finished-only, or begin --seeds with a seed that it has"
        )
    return found


def first_adamw(found: Mapping[str, Found]) -> Found:
    """Returns the runs of the first of AdamW's variants that was run."""
    return next(found[name] for name in ADAMW_VARIANTS if name in found)


def state_of(options: SearchOptions, part: str, contender: str) -> StateBytes:
    """Returns the bytes of optimizer state."""
    run = base_run(options, part, contender)
    return state_bytes_of(run, model_config(run))


def common_seeds(one: Found, other: Found) -> set[int]:
    return one.by_seed.keys() & other.by_seed.keys()


def ratio(one: Found, other: Found) -> float:
    """Returns the ratio of two mean perplexities, over the seeds that both have."""
    seeds = common_seeds(one, other)
    return sum(one.perplexities[seed] for seed in seeds) / sum(
        other.perplexities[seed] for seed in seeds
    )


def best_contender(found: Mapping[str, Found], names: Sequence[str]) -> str | None:
    """Returns the one with the lowest perplexity relative to AdamW with its seeds.

    A single lucky seed would otherwise be ahead of another contender's mean.
    """
    there = [name for name in names if name in found]
    adamw = first_adamw(found)
    return min(there, key=lambda name: ratio(found[name], adamw), default=None)


def table(found: Mapping[str, Found], state: Mapping[str, StateBytes]) -> str:
    """Returns a row per contender.

    The perplexities are compared with the best of AdamW's variants and of Muon's, and
    the step times with those of the first variant of AdamW, which must be there.
    """
    best_adamw = best_contender(found, ADAMW_VARIANTS)
    best_muon = best_contender(found, MUON_VARIANTS)
    assert best_adamw is not None
    adamw, timed = found[best_adamw], first_adamw(found)

    def listed(runs: Mapping[float, RunRecord]) -> str:
        cells = (f"{rate:g}: {perplexity(run.loss):.2f}" for rate, run in runs.items())
        return ", ".join(cells)

    def over(other: Found, result: Found) -> str:
        return f"{ratio(result, other) - 1:+.1%}"

    def over_by_seed(result: Found) -> str:
        both = result.perplexities.keys() & adamw.perplexities.keys()
        return ", ".join(
            f"{result.perplexities[seed] / adamw.perplexities[seed] - 1:+.1%}"
            for seed in sorted(both)
        )

    def row(name: str) -> tuple[str, ...]:
        result = found[name]
        perplexities = list(result.perplexities.values())
        seeds, rms = len(perplexities), result.update_rms
        seconds = result.step_seconds / timed.step_seconds
        return (
            name,
            f"{result.lr:g}",
            f"{result.lr_embeddings:g}",
            str(seeds),
            f"{result.perplexity:.2f}",
            report.spread(perplexities),
            over(adamw, result),
            over_by_seed(result),
            "" if best_muon is None else over(found[best_muon], result),
            "" if rms is None else f"{rms:.3g}",
            f"{seconds:.2f}",
            f"{state[name].kernels / 1e6:.2f}",
            f"{sum(state[name]) / 1e6:.2f}",
            listed(result.by_lr),
            listed(result.by_lr_embeddings),
        )

    return report.markdown(HEAD, map(row, found), 1)


def goals_table(
    part: str, found: Mapping[str, Found], state: Mapping[str, StateBytes]
) -> str:
    """Returns a row per goal of the part, with what was measured if it was."""
    stateless = tuple(
        name
        for name in found
        if state[name].kernels == 0 and name not in EMBEDDING_VARIANTS
    )

    def best_of(group: str) -> str | None:
        names = stateless if group == STATELESS else GROUPS.get(group, (group,))
        return best_contender(found, names)

    def row(goal: Goal) -> tuple[str, ...]:
        limit = goal.limits[part]
        ours, other = best_of(goal.contenders), best_of(goal.over)
        what = f"{goal.contenders} over {goal.over}"
        if ours is None or other is None:
            return (what, f"{limit:g}", "", "", "", "not run")
        measured = ratio(found[ours], found[other])
        seeds = len(common_seeds(found[ours], found[other]))
        result = "met" if measured <= limit else "missed"
        if not math.isfinite(found[other].perplexity):
            result = f"{other} diverged"
        return (
            what,
            f"{limit:g}",
            f"{ours} over {other}",
            str(seeds),
            f"{measured:.3f}",
            result,
        )

    rows = [row(goal) for goal in GOALS if part in goal.limits]
    head = ("perplexity", "at most", "of", "seeds", "measured", "goal")
    return report.markdown(head, rows, 1) if rows else ""


def summary(found: Mapping[str, Mapping[str, Found]]) -> str:
    """Returns the perplexities of each optimizer over those of AdamW, by part.

    AdamW has no relative updates in this comparison. Relative updates are in rows of
    their own. Both sides have the best of their other settings, such as clipping, in
    each part.
    """

    def cell(part: str, names: Sequence[str]) -> str:
        there = found[part]
        ours = best_contender(there, names)
        adamw = best_contender(there, ADAMW_VARIANTS)
        assert adamw is not None
        if ours is None:
            return ""
        over = ratio(there[ours], there[adamw]) - 1
        return f"{over:+.1%} ({len(common_seeds(there[ours], there[adamw]))})"

    rows = []
    for name in BASES:
        plain = plain_variants_of(name)
        relative = tuple(each for each in variants_of(name) if each not in plain)
        for label, names in ((name, plain), (f"{name}, relative", relative)):
            cells = [cell(part, names) for part in found]
            if any(cells):
                rows.append((label, *cells))
    return report.markdown(("optimizer", *found), rows, 1)


def draw(found: Mapping[str, Found], folder: Path) -> None:
    """Draws the best run of each contender by step and by second of training."""
    folder.mkdir(parents=True, exist_ok=True)
    by_step = {name: result.curve for name, result in found.items()}
    plot_perplexities(by_step, "step", folder / BY_STEP)
    by_second = {
        name: [(step * result.step_seconds, ppl) for step, ppl in result.curve]
        for name, result in found.items()
    }
    label = "seconds of training, at the contender's step time"
    plot_perplexities(by_second, label, folder / BY_SECOND)


def made_with(found: Mapping[str, Found]) -> str:
    """Returns the machines, versions and dates of the runs in a table."""
    runs = (
        run
        for result in found.values()
        for kind in (result.by_lr, result.by_lr_embeddings, result.by_seed)
        for run in kind.values()
    )
    return "\n".join(sorted({run.made_with for run in runs}))


def report_on(options: SearchOptions, part: str, found: Mapping[str, Found]) -> str:
    """Returns the table of a part with its setting, and draws its figures."""
    state = {name: state_of(options, part, name) for name in found}
    run = base_run(options, part, "adamw")
    drawn = () if options.given else PARTS[part].drawn
    draw({name: found[name] for name in drawn if name in found} or found, run.out)
    setting = (
        f"{part}: {run.model}, {run.steps} steps of {run.batch * run.seq:,} tokens of "
        f"--data {run.data}\n{made_with(found)}"
    )
    curves = f"Curves: {run.out / BY_STEP}, {run.out / BY_SECOND}\n"
    goals = goals_table(part, found, state)
    sections = (setting, table(found, state), NOTE, goals, curves)
    return "\n\n".join(filter(None, sections))


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(SearchOptions, args, "python -m benchmarks.rate_search")
        found: dict[str, dict[str, Found]] = {}
        for part in options.parts:
            if not options.finished_only:
                run_searches(options, part)
            found[part] = found_by_all(options, part)
            print(report_on(options, part, found[part]), flush=True)
        if len(found) > 1:
            print(f"{SUMMARY_NOTE}\n\n{summary(found)}")

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
