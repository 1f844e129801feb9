"""Variants of AdamW, APOLLO-Mini and APOLLO-Zero on the tiny LLaMA.

They differ in Mini's limiter and its projection, in the power and the momentum of
APOLLO-Zero, in how its updates follow the weights over many steps, in the dtype of the
moments, and in the rules for the embedding and the head beside APOLLO-Zero. The command
`python -m benchmarks.variants` trains one after the other. Finished runs are not
repeated and an interrupted run continues, so the same command continues an interrupted
series.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import report
from benchmarks.rate_search_plan import BATCH_OF_8K
from benchmarks.run_records import runs_made_with
from examples.llama.config import PRESETS, LlamaConfig
from examples.llama.evaluate import perplexity
from examples.llama.optimizers import kernels, parameters
from examples.llama.optimizers.embeddings import EMBEDDING_RULES
from examples.llama.optimizers.pipeline import in_proportion_to_weights
from examples.llama.optimizers.recipes import RECIPES, Recipe, with_defaults
from examples.llama.options import RunOptions, check_seeds, parse
from examples.llama.pretrain import pretrain
from examples.llama.run.errors import exit_on_usage_error, unknown_name
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.recorder import DivergedError
from examples.llama.run.result import read_result
from examples.llama.run.setup import model_config, state_bytes_of

Momentum = Callable[[RunOptions], optax.GradientTransformation]


def trace(decay: float, *, nesterov: bool = False) -> Momentum:
    """Returns the momentum of `optax.trace` for the layers' kernels."""
    return lambda options: of_kernels(optax.trace(decay, nesterov))


def average(decay: float) -> Momentum:
    """Returns the moving average of `optax.ema` for the layers' kernels."""
    return lambda options: of_kernels(optax.ema(decay))


def of_kernels(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.masked(tx, parameters.are_kernels)


class LowRankTraceState(NamedTuple):
    """State of `low_rank_trace`; the trace is `basis @ coefficients`."""

    basis: Any  # (L, m, r) per leaf, with orthonormal columns.
    coefficients: Any  # (L, r, n) per leaf.


def low_rank_trace(decay: float, rank: int) -> optax.GradientTransformation:
    """Returns `optax.trace` with Nesterov's look-ahead, and a state of a low rank.

    Each step keeps the part of the trace that lies in a subspace of `rank` dimensions.
    One step of power iteration from the last subspace gives the next one, so it follows
    the largest singular values, as in PowerSGD (https://arxiv.org/abs/1905.13727).
    """

    def init(params: optax.Params) -> Any:
        def coefficients(leaf: jax.Array) -> jax.Array:
            shape = leaf.shape[0], rank, leaf.shape[2]
            # The first subspace is random, because that of zeros would stay zero.
            return jax.random.normal(jax.random.key(0), shape)

        basis = jax.tree.map(lambda p: jnp.zeros((*p.shape[:2], rank)), params)
        return LowRankTraceState(basis, jax.tree.map(coefficients, params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        del params
        # Before the first step, the basis is zero and so is the trace.
        new = jax.tree.map(lambda g, q, b: g + decay * (q @ b), updates, *state)
        basis = jax.tree.map(
            lambda t, b: jnp.linalg.qr(t @ b.mT).Q, new, state.coefficients
        )
        coefficients = jax.tree.map(lambda t, q: q.mT @ t, new, basis)
        updates = jax.tree.map(lambda g, t: g + decay * t, updates, new)
        return updates, LowRankTraceState(basis, coefficients)

    return optax.GradientTransformation(init, update)


def low_rank(decay: float, rank: int) -> Momentum:
    return lambda options: of_kernels(low_rank_trace(decay, rank))


def flattening_of(momentum: Momentum) -> Recipe:
    """Returns APOLLO-Zero on a momentum of the gradients, as in Muon."""

    def scaler(
        options: RunOptions, config: LlamaConfig
    ) -> optax.GradientTransformation:
        flatten = kernels.apollo_zero(options, config)
        return optax.chain(momentum(options), flatten)

    return RECIPES["apollo-zero"]._replace(scaler=scaler)


def momentum_of(momentum: Momentum) -> Recipe:
    """Returns a momentum of APOLLO-Zero's updates."""

    def scaler(
        options: RunOptions, config: LlamaConfig
    ) -> optax.GradientTransformation:
        flatten = kernels.apollo_zero(options, config)
        return optax.chain(flatten, momentum(options))

    return RECIPES["apollo-zero"]._replace(scaler=scaler)


def relative_to_all() -> Recipe:
    """Returns APOLLO-Zero with updates in proportion to the RMS of all kernels."""

    def scaled(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        leaves = jax.tree.leaves(params)
        square = sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)
        rms = jnp.sqrt(square / sum(leaf.size for leaf in leaves))
        # The bounds and the reference are those of `scale_by_param_matrix_rms`.
        factor = jnp.clip(rms, 1e-3, 0.1) / 0.02
        return jax.tree.map(lambda u: u * factor, updates)

    def scaler(
        options: RunOptions, config: LlamaConfig
    ) -> optax.GradientTransformation:
        flatten = kernels.apollo_zero(options, config)
        return optax.chain(flatten, of_kernels(optax.stateless(scaled)))

    return RECIPES["apollo-zero"]._replace(scaler=scaler)


def relative(max_rms: float) -> Recipe:
    """Returns APOLLO-Zero with updates in proportion to the weights of each matrix.

    A matrix whose RMS is above `max_rms` gets the updates of one with that RMS.
    """

    def scaler(
        options: RunOptions, config: LlamaConfig
    ) -> optax.GradientTransformation:
        flatten = kernels.apollo_zero(options, config)
        return optax.chain(flatten, in_proportion_to_weights(max_rms))

    return RECIPES["apollo-zero"]._replace(scaler=scaler)


def exact_power(power: float) -> Recipe:
    """Returns APOLLO-Zero with all singular values raised to a power."""
    scaler = functools.partial(kernels.apollo_zero, power=power, method="exact")
    return RECIPES["apollo-zero-whitening"]._replace(scaler=scaler)


def mini(norm_growth_limit: float | None) -> Recipe:
    scaler = functools.partial(
        kernels.apollo, scale_type="tensor", norm_growth_limit=norm_growth_limit
    )
    return RECIPES["apollo-mini"]._replace(scaler=scaler)


# The optimizers that the trainer does not have, by the names of their runs.
VARIANTS: dict[str, Recipe] = {
    "mini-no-limit": mini(None),
    "mini-limit-1.1": mini(1.1),
    "zero-exact-0.5": exact_power(0.5),
    "zero-exact-0.25": exact_power(0.25),
    "zero-exact-0": exact_power(0),
    # The largest singular values come down to the level of the others.
    "zero-power-0": RECIPES["apollo-zero"]._replace(
        scaler=functools.partial(kernels.apollo_zero, power=0)
    ),
    "zero-of-trace-0.95": flattening_of(trace(0.95)),
    "zero-of-nesterov-0.95": flattening_of(trace(0.95, nesterov=True)),
    "zero-of-rank-16-nesterov-0.9": flattening_of(low_rank(0.9, 16)),
    "zero-of-rank-32-nesterov-0.9": flattening_of(low_rank(0.9, 32)),
    "zero-relative-to-all": relative_to_all(),
    "zero-relative-max-0.04": relative(0.04),
    "average-0.9-of-zero": momentum_of(average(0.9)),
}


# A tied embedding is one parameter with one rule.
TIED = "tiny-tied"
MODELS = {TIED: dataclasses.replace(PRESETS["tiny"], tied_head=True)}

# Training steps of the parts with 1,024 tokens per step.
STEPS = 800

# The paper's normal entries, as for the other runs of Mini in docs/results.md.
NORMAL_ENTRIES = {"projection": "random"}


class Way(NamedTuple):
    """A row of a table: an optimizer at a learning rate of the kernels."""

    label: str
    optimizer: str
    lr: float
    options: dict[str, Any]  # Further options of `pretrain`.


def ways(label: str, optimizer: str, *rates: float, **options: Any) -> tuple[Way, ...]:
    return tuple(Way(label, optimizer, rate, options) for rate in rates)


def on_embedding_and_head(rule: str, lr: float, **options: Any) -> tuple[Way, ...]:
    """Returns a rule on the embedding, on the head, and on both."""
    rules = {
        "embedding": {"embeddings": rule, "head": "adam"},
        "head": {"embeddings": "adam", "head": rule},
        "both": {"embeddings": rule, "head": rule},
    }
    return tuple(
        Way(f"{rule}, {where}", "apollo-zero", lr, chosen | options)
        for where, chosen in rules.items()
    )


def tied(rule: str, lr: float) -> Way:
    return Way(f"{rule}, tied", "apollo-zero", lr, {"embeddings": rule, "model": TIED})


def dtypes_of_moments(optimizer: str, lr: float) -> tuple[Way, ...]:
    """Returns an optimizer with moments of both dtypes, at two decays of the second."""
    return tuple(
        way
        for dtype in ("float32", "bfloat16")
        for b2 in (0.999, 0.95)
        for way in ways(f"{dtype}, b2 {b2}", optimizer, lr, moment_dtype=dtype, b2=b2)
    )


ACCUMULATED: dict[str, Any] = {"steps": STEPS // 2, "batch": 16, "accumulate": 2}

# These runs have four times as many steps. They would pass more than once over the
# standard library, so they read the source of installed packages too.
MANY_STEPS: dict[str, Any] = {"steps": 4 * STEPS, "data": "python", "b2": 0.95}
MANY_STEPS_RELATIVE = {"relative": True} | MANY_STEPS
MANY_STEPS_DECAYED = {"weight_decay": 1.0} | MANY_STEPS_RELATIVE

# The parts of 8,192 tokens per step train as the part `8k` of `rate_search`.
ON_8K: dict[str, Any] = {"steps": 300} | BATCH_OF_8K
# These are the best settings of APOLLO-Zero in that part.
BEST_ON_8K: dict[str, Any] = {"relative": True, "b2": 0.95, "lr_embeddings": 0.06}
BEST_ON_8K |= ON_8K

# The factors of rank r are about sqrt(r) times those of rank 1, hence the scales.
PARTS: dict[str, tuple[Way, ...]] = {
    "limiter": (
        *ways("rank 1, limit 1.01", "apollo-mini", 7e-3, **NORMAL_ENTRIES),
        *ways("rank 1, limit 1.1", "mini-limit-1.1", 7e-3, **NORMAL_ENTRIES),
        *ways("rank 1, no limit", "mini-no-limit", 3.5e-3, 7e-3, **NORMAL_ENTRIES),
        *ways(
            "rank 8, limit 1.01",
            "apollo-mini",
            7e-3,
            rank=8,
            scale=16.0,
            **NORMAL_ENTRIES,
        ),
        *ways(
            "rank 32, limit 1.01",
            "apollo-mini",
            7e-3,
            rank=32,
            scale=4.0,
            **NORMAL_ENTRIES,
        ),
    ),
    "power": (
        *ways("rank 16, power 0.5", "apollo-zero", 1e-3),
        *ways("rank 32, power 0.5", "apollo-zero", 1e-3, rank=32),
        *ways("exact, power 0.5", "zero-exact-0.5", 1e-3),
        *ways("exact, power 0.25", "zero-exact-0.25", 5e-4, 1e-3),
        *ways("exact, power 0", "zero-exact-0", 5e-4, 1e-3),
    ),
    "momentum": (
        *ways("none", "apollo-zero", 1e-3, 2e-3, 4e-3),
        *ways("before, Nesterov, 0.9", "apollo-zero-momentum", 2.5e-4, 5e-4, 1e-3),
        *ways("before, Nesterov, 0.95", "zero-of-nesterov-0.95", 2.5e-4, 5e-4, 1e-3),
        *ways("before, Nesterov, 0.9, int8", "apollo-zero-momentum-int8", 5e-4),
        *ways("before, Nesterov, rank 16", "zero-of-rank-16-nesterov-0.9", 5e-4, 1e-3),
        *ways("before, Nesterov, rank 32", "zero-of-rank-32-nesterov-0.9", 1e-3),
        *ways("before, 0.95", "zero-of-trace-0.95", 5e-4),
        *ways("after, average, 0.9", "average-0.9-of-zero", 4e-3, 8e-3),
        # Half as many steps of twice the tokens average the gradients without a state.
        *ways("none, two micro-batches", "apollo-zero", 1e-3, 2e-3, **ACCUMULATED),
    ),
    "relative": (
        *ways("no factor", "apollo-zero", 1e-3),
        *ways("one factor for all", "zero-relative-to-all", 1e-3),
        *ways("a factor per matrix", "apollo-zero", 1e-3, relative=True),
    ),
    "many-steps": (
        *ways("AdamW", "adamw", 1e-3, 2e-3, **MANY_STEPS),
        *ways("AdamW, weight decay 0.1", "adamw", 2e-3, weight_decay=0.1, **MANY_STEPS),
        *ways("no factor", "apollo-zero", 5e-4, 1e-3, **MANY_STEPS),
        *ways("relative", "apollo-zero", 2.5e-4, 5e-4, 1e-3, **MANY_STEPS_RELATIVE),
        *ways("relative up to 0.04", "zero-relative-max-0.04", 1e-3, **MANY_STEPS),
        *ways("relative, weight decay 1", "apollo-zero", 1e-3, **MANY_STEPS_DECAYED),
    ),
    "momentum-8k": (
        *ways("none", "apollo-zero", 2e-3, **ON_8K),
        *ways("Nesterov, 0.9", "apollo-zero-momentum", 5e-4, 1e-3, 2e-3, **ON_8K),
        *ways("the same in int8", "apollo-zero-momentum-int8", 1e-3, **ON_8K),
    ),
    "power-8k": (
        *ways("exact, power 0", "zero-exact-0", 2e-3, **BEST_ON_8K),
        *ways("exact, power 0.25", "zero-exact-0.25", 2e-3, **BEST_ON_8K),
        *ways("exact, power 0.5", "zero-exact-0.5", 2e-3, **BEST_ON_8K),
        *ways("rank 16, power 0.5", "apollo-zero", 2e-3, **BEST_ON_8K),
        *ways("rank 16, power 0", "zero-power-0", 2e-3, **BEST_ON_8K),
        *ways("rank 32, power 0", "zero-power-0", 2e-3, rank=32, **BEST_ON_8K),
    ),
    "projections-8k": (
        *ways("normal entries", "apollo-mini", 7e-3, projection="random", **ON_8K),
        *ways("random signs", "apollo-mini", 7e-3, projection="rademacher", **ON_8K),
    ),
    "moments": (
        *dtypes_of_moments("adamw", 2e-3),
        *dtypes_of_moments("apollo-mini", 3.5e-3),
    ),
    "embeddings": (
        *ways("adam, both", "apollo-zero", 1e-3),
        *ways("adam, tied", "apollo-zero", 1e-3, model=TIED),
        *(
            way
            for rule in EMBEDDING_RULES
            for way in (*on_embedding_and_head(rule, 1e-3), tied(rule, 1e-3))
        ),
    ),
    "embeddings-8k": (
        *ways("adam, both", "apollo-zero", 2e-3, **ON_8K),
        *on_embedding_and_head("adafactor", 2e-3, **ON_8K),
        *on_embedding_and_head("adafactor-momentum", 2e-3, **ON_8K),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantOptions:
    """Variants of AdamW, APOLLO-Mini and APOLLO-Zero on the tiny model."""

    parts: tuple[str, ...] = tuple(PARTS)
    """Any of limiter, power, momentum, relative, many-steps, momentum-8k, power-8k,
    projections-8k, moments, embeddings and embeddings-8k."""
    steps: int | None = None
    """Training steps. The default is 800 of 1,024 tokens, 3,200 of these in many-steps,
    and 300 of 8,192 tokens in the parts whose names end with 8k."""
    seeds: tuple[int, ...] = (0,)
    """A run each."""
    out: Path = Path("runs/variants")
    """Folder for the runs."""
    finished_only: bool = False
    """Train nothing, and print the rows whose runs have ended."""

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in PARTS:
                raise unknown_name("--parts", name, PARTS)
        check_seeds("--seeds", self.seeds)


def run_of(options: VariantOptions, way: Way, seed: int) -> RunOptions:
    further = "".join(f"-{name}-{value}" for name, value in way.options.items())
    settings: dict[str, Any] = {"steps": STEPS, "relative": False} | way.options
    if options.steps is not None:
        settings["steps"] = options.steps
    run = RunOptions(
        out=options.out / f"{way.optimizer}{further}-{way.lr:g}-seed{seed}",
        optimizer=way.optimizer,
        lr=way.lr,
        seed=seed,
        resume="auto",
        **settings,
    )
    return with_defaults(run, model_config(run))


def perplexities(
    options: VariantOptions, way: Way, stop: StopRequest
) -> tuple[float, ...] | None:
    """Returns the perplexity by seed, infinite for a run that diverged.

    Returns None with `finished_only`, if a run has not ended.
    """
    found = []
    for seed in options.seeds:
        run = run_of(options, way, seed)
        # A table of finished runs later knows by this file that the run has ended.
        diverged = run.out.with_name(f"{run.out.name}-{run.steps}-steps.diverged")
        if diverged.exists():
            found.append(math.inf)
            continue
        try:
            result = read_result(run) if options.finished_only else pretrain(run, stop)
        except DivergedError:
            diverged.touch()
            found.append(math.inf)
            continue
        if result is None:
            return None
        found.append(perplexity(result.val_loss))
    return tuple(found)


def all_state(run: RunOptions) -> int:
    return sum(state_bytes_of(run, model_config(run)))


def other_state(run: RunOptions) -> int:
    """Returns the bytes of optimizer state for embedding, head and norms.

    The scales of an int8 momentum do not have the parameter's shape, so this is all the
    state of SGD, which has none for the kernels.
    """
    names = ("model", "embeddings", "head", "moment_dtype")
    same: dict[str, Any] = {name: getattr(run, name) for name in names}
    sgd = RunOptions(out=run.out, optimizer="sgd", steps=run.steps, **same)
    return all_state(with_defaults(sgd, model_config(sgd)))


HEAD = (
    "variant",
    "optimizer",
    "lr",
    "lr emb",
    "val ppl",
    "±",
    "kernels' state, MB",
    "other state, MB",
)


def row(options: VariantOptions, way: Way, results: tuple[float, ...]) -> list[str]:
    run = run_of(options, way, options.seeds[0])
    other = other_state(run)
    return [
        way.label,
        way.optimizer,
        f"{way.lr:g}",
        f"{run.lr_embeddings:g}",
        f"{statistics.mean(results):.2f}",
        report.spread(results),
        f"{(all_state(run) - other) / 1e6:.3f}",
        f"{other / 1e6:.3f}",
    ]


def table(options: VariantOptions, part: str, stop: StopRequest) -> str:
    rows, folders = [], []
    for way in PARTS[part]:
        results = perplexities(options, way, stop)
        if results is not None:
            rows.append(row(options, way, results))
            folders += [run_of(options, way, seed).out for seed in options.seeds]
    seeds = ", ".join(map(str, options.seeds))
    run = run_of(options, PARTS[part][0], options.seeds[0])
    return (
        f"{part}: tiny, {run.steps} steps of {run.batch * run.seq:,} tokens of --data "
        f"{run.data}, seed {seeds}\n{runs_made_with(folders)}\n\n"
        f"{report.markdown(HEAD, rows, 2)}\n"
    )


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(VariantOptions, args, "python -m benchmarks.variants")
        RECIPES.update(VARIANTS)
        PRESETS.update(MODELS)
        with StopRequest() as stop:
            for part in options.parts:
                print(table(options, part, stop), flush=True)

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
