"""Optimizers at their best rates: a search per optimizer, then several seeds.

Run it with `python -m benchmarks.rate_search --parts 1k 8k`. For each optimizer, the
learning rate of the kernels is searched in factors of 2 until the rates on both sides
of the best are known to be worse, then that of embeddings, head and norms in the same
way. The best pair runs with the other seeds. Optimizers are searched side by side, one
process per core. Runs that have ended are not run again, and one that was cut off goes
on, so the same command continues an interrupted search.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from apollo_optax import state_bytes
from benchmarks import report
from examples.llama.evaluate import perplexity
from examples.llama.mesh import make_mesh
from examples.llama.optimizers import RECIPES, make_optimizer, with_defaults
from examples.llama.options import RunOptions, parse
from examples.llama.pretrain import pretrain
from examples.llama.run.errors import UsageError, exit_on_usage_error, unknown_name
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.recorder import DivergedError
from examples.llama.run.setup import abstract_params, execution_of, model_config

MOST_RATES = 8  # The most rates that a search tries.
OPTIMIZERS = ("adamw", "muon", "apollo-mini", "apollo-zero", "racs", "sinkgd")

# The training of each part, as options of `pretrain`. The long one sees 20 tokens per
# parameter.
PARTS: dict[str, dict[str, Any]] = {
    "1k": {"model": "tiny", "batch": 8, "steps": 800},
    "8k": {"model": "tiny", "batch": 64, "steps": 300},
    "6m": {"model": "6m", "batch": 64, "steps": 300},
    "long": {"model": "tiny", "batch": 64, "steps": 3200},
}
HEAD = (
    *("optimizer", "lr", "lr emb", "val ppl", "±", "over adamw", "kernels' state, MB"),
    *("val ppl by lr", "val ppl by lr emb"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Each optimizer at the best of searched learning rates."""

    parts: tuple[str, ...] = ("1k", "8k")
    """Any of 1k and 8k (tiny, so many tokens per step), 6m and long."""
    optimizers: tuple[str, ...] = OPTIMIZERS
    """As in pretrain; adamw is always among them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first one searches; the best rates run with all."""
    data: str = "stdlib"
    """As in pretrain."""
    out: Path = Path("runs/rate-search")
    """Folder for the runs."""
    processes: int = report.cores()
    """Optimizers that are searched at the same time, on one core each."""

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in PARTS:
                raise unknown_name("--parts", name, PARTS)
        for name in self.optimizers:
            if name not in RECIPES:
                raise unknown_name("--optimizers", name, RECIPES)
        if not self.seeds:
            raise UsageError("--seeds is empty; give one or more")
        if self.processes < 1:
            raise UsageError(
                f"--processes {self.processes} is out of range; give 1 or more"
            )


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
    """Searches both rates, one after the other, then runs the seeds.

    Args:
        loss: of a rate of the kernels, one of the embeddings and a seed.
        start: the first rates of both.
        seeds: the first one is that of the searches.
    """
    lr, lr_embeddings = start
    by_lr = searched(lambda rate: loss(rate, lr_embeddings, seeds[0]), lr)
    lr = best(by_lr)
    by_lr_embeddings = searched(lambda rate: loss(lr, rate, seeds[0]), lr_embeddings)
    lr_embeddings = best(by_lr_embeddings)
    by_seed = {seed: loss(lr, lr_embeddings, seed) for seed in seeds}
    return Found(by_lr, by_lr_embeddings, by_seed)


def base_run(options: SearchOptions, part: str, optimizer: str) -> RunOptions:
    """Returns a part's run of an optimizer at its default rates."""
    run = RunOptions(
        out=options.out / part,
        data=options.data,
        optimizer=optimizer,
        resume="auto",
        **PARTS[part],
    )
    return with_defaults(run, model_config(run))


def found_by(options: SearchOptions, part: str, optimizer: str) -> Found:
    """Searches in this process; runs that have ended are read."""
    base = base_run(options, part, optimizer)
    assert base.lr is not None
    assert base.lr_embeddings is not None

    with StopRequest() as stop:

        def loss(lr: float, lr_embeddings: float, seed: int) -> float:
            name = f"{optimizer}-{lr:g}-{lr_embeddings:g}-seed{seed}"
            run = dataclasses.replace(
                base,
                lr=lr,
                lr_embeddings=lr_embeddings,
                seed=seed,
                out=base.out / name,
            )
            try:
                return pretrain(run, stop).val_loss
            except DivergedError:
                return math.inf

        return search(loss, (base.lr, base.lr_embeddings), options.seeds)


def use_one_core(cores: Any) -> None:
    """Restricts this process to one of the cores in a queue."""
    os.sched_setaffinity(0, {cores.get()})


def found_by_all(options: SearchOptions, part: str) -> dict[str, Found]:
    names = tuple(dict.fromkeys(("adamw", *options.optimizers)))
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    available = sorted(os.sched_getaffinity(0))
    for index in range(options.processes):
        cores.put(available[index % len(available)])
    with concurrent.futures.ProcessPoolExecutor(
        options.processes, context, use_one_core, (cores,)
    ) as pool:
        found = [pool.submit(found_by, options, part, name) for name in names]
        return {name: each.result() for name, each in zip(names, found, strict=True)}


def kernels_state(options: SearchOptions, part: str, optimizer: str) -> int:
    """Returns the bytes of optimizer state for the kernels."""
    run = base_run(options, part, optimizer)
    config = model_config(run)
    params = abstract_params(config, execution_of(run, config), make_mesh(run.mesh))
    return state_bytes(make_optimizer(run, config)[0], params).kernels


def table(found: dict[str, Found], state: dict[str, int]) -> str:
    """Returns a row per optimizer; `found` has adamw, to which the others compare."""

    def listed(by_rate: dict[float, float]) -> str:
        cells = (f"{rate:g}: {perplexity(loss):.2f}" for rate, loss in by_rate.items())
        return ", ".join(cells)

    def row(name: str) -> tuple[str, ...]:
        result = found[name]
        perplexities = list(map(perplexity, result.by_seed.values()))
        spread = statistics.stdev(perplexities) if len(perplexities) > 1 else 0.0
        over = result.perplexity / found["adamw"].perplexity - 1
        return (
            *(name, f"{result.lr:g}", f"{result.lr_embeddings:g}"),
            *(f"{result.perplexity:.2f}", f"{spread:.2f}", f"{over:+.1%}"),
            f"{state[name] / 1e6:.2f}",
            *(listed(result.by_lr), listed(result.by_lr_embeddings)),
        )

    return report.markdown(HEAD, map(row, found), 1)


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(SearchOptions, args, "python -m benchmarks.rate_search")
        for part in options.parts:
            found = found_by_all(options, part)
            state = {name: kernels_state(options, part, name) for name in found}
            run = base_run(options, part, "adamw")
            print(
                f"{part}: {run.model}, {run.steps} steps of {run.batch * run.seq:,} "
                f"tokens of --data {options.data}, {len(options.seeds)} seeds; "
                f"{report.made_with(('jax', 'flax', 'optax'))}\n\n"
                f"{table(found, state)}\n",
                flush=True,
            )

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
