"""`check`: whether this device computes the numbers that the tests expect of CPUs."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import apollo_optax
from apollo_optax import apply_updates_stochastic
from benchmarks.golden import CASES, TOLERANCES, worst_error
from benchmarks.gpu.bench import Bench, Job
from benchmarks.gpu.report import Table
from benchmarks.gpu.worker import Failed
from benchmarks.memory import step_of
from examples.llama.config import preset
from examples.llama.memory.search import runs
from examples.llama.mesh import make_mesh, over_data
from examples.llama.model import Batch, cudnn_has_flash_attention
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.options import RunOptions
from examples.llama.run import setup

UNTUNED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
STEPS = 5  # The steps of each comparison of two ways to train.
HEAD = ("check", "measured", "limit", "")


class Outcome(NamedTuple):
    """A number that must not exceed its limit."""

    what: str
    measured: float
    limit: float


def checked(
    check: Callable[..., list[Outcome] | Failed], *args: Any
) -> Generator[list[Outcome] | Failed | None]:
    """Makes a check a row that does all when it prepares, so that checks overlap."""
    found = check(*args)
    yield None
    yield found


def golden(dtype: str, cases: Sequence[str]) -> list[Outcome]:
    with jax.enable_x64(dtype == "float64"):
        errors = [worst_error(case, dtype) for case in cases]
    what = f"golden trajectories, {dtype}, largest error of {len(errors)}"
    return [Outcome(what, max(errors), TOLERANCES[dtype])]


def jitted_against_eager() -> list[Outcome]:
    shapes = {"kernel": (64, 96), "tall": (96, 64), "stack": (3, 32, 48), "bias": (96,)}
    numbers = {"stack": apollo_optax.ApolloDimensionNumbers(1, 2)}
    rules = apollo_optax.dimension_numbers_by_path(list(numbers.items()))
    apollo = functools.partial(
        apollo_optax.scale_by_apollo, weight_dimension_numbers=rules
    )
    found = []
    for name, tx in (
        ("apollo", apollo(rank=8, update_proj_gap=2)),
        ("apollo-mini", apollo(rank=1, scale_type="tensor", scale=128.0)),
    ):
        state = eager = tx.init(
            {key: jnp.zeros(shape) for key, shape in shapes.items()}
        )
        update, errors = jax.jit(tx.update), []
        for step in range(STEPS):
            keys = jax.random.split(jax.random.key(step), len(shapes))
            drawn = zip(keys, shapes.items(), strict=True)
            grads = {n: jax.random.normal(key, shape) for key, (n, shape) in drawn}
            updates, state = update(grads, state)
            others, eager = tx.update(grads, eager)
            errors.append(largest_difference(updates, others))
        found.append(
            Outcome(f"{name}, jitted against eager, {STEPS} steps", max(errors), 1e-5)
        )
    return found


def largest_difference(tree: Any, other: Any) -> float:
    """Returns the largest difference of two trees, relative to their largest entry."""

    def difference(x: Any, y: Any) -> float:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30))

    return max(map(difference, jax.tree.leaves(tree), jax.tree.leaves(other)))


def stochastic_rounding() -> list[Outcome]:
    count, step = 2**20, 2.0**-11  # Above 1, a bfloat16 step is 2^-7.
    params = {"kernel": jnp.ones((count,), jnp.bfloat16)}
    updates = {"kernel": jnp.full((count,), step)}
    apply = jax.jit(
        lambda: apply_updates_stochastic(params, updates, jax.random.key(0))
    )
    here = np.asarray(apply()["kernel"], np.float64)
    with jax.default_device(jax.devices("cpu")[0]):
        ours, theirs = (jax.tree.map(np.asarray, tree) for tree in (params, updates))
        there = apply_updates_stochastic(ours, theirs, jax.random.key(0))["kernel"]
    unit = 2.0**-7
    share = step / unit
    standard_error = unit * np.sqrt(share * (1 - share) / count)
    bias = abs(float(here.mean()) - 1 - step) / standard_error
    differing = int((here != np.asarray(there, np.float64)).sum())
    return [
        Outcome(
            f"stochastic rounding of {count:,} numbers, other than on the CPU",
            differing,
            0,
        ),
        Outcome("their mean's distance from the unrounded, standard errors", bias, 5),
    ]


def small_run(**options: Any) -> RunOptions:
    """Returns a run of the tiny model in float32, with its defaults filled in."""
    fields = {
        "weights": "float32",
        "moment_dtype": "float32",
        "batch": 4,
        "seq": 64,
    } | options
    (run,) = runs(step_of("tiny", "apollo-mini", **fields), preset("tiny"))
    return run


def trained(run: RunOptions, steps: int = STEPS) -> tuple[list[float], Any]:
    """Returns the losses of some steps on random tokens, and the final parameters."""
    config, mesh = setup.model_config(run), make_mesh(run.mesh)
    tx, _ = make_optimizer(run, config)
    state = setup.initial_state(run, config, tx, mesh)
    train_step = setup.training_step(run, config, tx, mesh)
    losses, rng = [], np.random.default_rng(0)
    for step in range(1, steps + 1):
        tokens = rng.integers(
            config.vocab_size, size=(run.batch, run.seq + 1), dtype=np.int32
        )
        state, metrics = train_step(
            state, Batch(jax.device_put(tokens, over_data(mesh))), np.int32(step)
        )
        losses.append(float(metrics.loss))
    return losses, jax.device_get(state.params)


def compared(what: str, ours: RunOptions, theirs: RunOptions) -> list[Outcome]:
    (losses, params), (others, other_params) = trained(ours), trained(theirs)
    by_loss = max(abs(a - b) / b for a, b in zip(losses, others, strict=True))
    return [
        Outcome(f"{what}, losses of {STEPS} steps", by_loss, 1e-5),
        Outcome(
            f"{what}, parameters after them",
            largest_difference(params, other_params),
            1e-4,
        ),
    ]


def layerwise_against_ordinary() -> list[Outcome]:
    # A GPU would multiply float32 in TF32.
    jax.config.update("jax_default_matmul_precision", "highest")
    layerwise = small_run(layerwise=True)
    return compared("layer-wise against ordinary step", layerwise, small_run())


def in_host_memory(offload: str) -> list[Outcome] | Failed:
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    if jax.default_backend() == "cpu" or "pinned_host" not in kinds:
        return Failed("needs a device with a memory of its own")
    jax.config.update("jax_default_matmul_precision", "highest")
    run = small_run(layerwise=True)
    return compared(
        f"{offload} in host memory", dataclasses.replace(run, offload=offload), run
    )


def flash_attention(head_size: int) -> list[Outcome] | Failed:
    if not cudnn_has_flash_attention():
        return Failed("needs cuDNN's flash attention")
    # The keys are for queries, keys, values and the gradient of the result.
    keys = jax.random.split(jax.random.key(0), 4)
    given = [
        jax.random.normal(key, (4, 256, 8, head_size), jnp.bfloat16) for key in keys
    ]

    def computed(dtype: Any, implementation: Any) -> Iterator[np.ndarray]:
        *inputs, cotangent = (x.astype(dtype) for x in given)
        attention = functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation=implementation
        )
        out, backward = jax.vjp(attention, *inputs)
        return (np.asarray(x, np.float64) for x in (out, *backward(cotangent)))

    with jax.default_matmul_precision("highest"):
        exact = list(computed(jnp.float32, "xla"))

    def errors(implementation: Any) -> list[float]:
        pairs = zip(computed(jnp.bfloat16, implementation), exact, strict=True)
        return [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs]

    ratios = [
        ours / theirs
        for ours, theirs in zip(errors("cudnn"), errors("xla"), strict=True)
    ]
    what = (
        f"cuDNN's attention, heads of {head_size}: its error and its gradients' over "
        "XLA's"
    )
    return [Outcome(what, max(ratios), 2.0)]


def jobs(on_gpu: bool) -> list[Job]:
    checks: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        *(
            (f"golden trajectories, {dtype}, {name}", golden, (dtype, cases))
            for dtype in TOLERANCES
            for name, cases in (
                ("first half", list(CASES)[::2]),
                ("second half", list(CASES)[1::2]),
            )
        ),
        ("jitted against eager", jitted_against_eager, ()),
        ("stochastic rounding", stochastic_rounding, ()),
        ("layer-wise against ordinary step", layerwise_against_ordinary, ()),
        *(
            (f"cuDNN's attention, heads of {size}", flash_attention, (size,))
            for size in (64, 128)
        ),
        *(
            (f"{what} in host memory", in_host_memory, (what,))
            for what in ("weights", "activations")
        ),
    ]
    # Speed does not matter to the checks, and trying kernels would take most of the
    # time.
    variables = (
        {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {UNTUNED}"} if on_gpu else {}
    )
    return [
        Job(name, checked, (check, *args), variables) for name, check, args in checks
    ]


def put_outcome(table: Table, name: str, outcome: Outcome) -> None:
    what, measured, limit = outcome
    verdict = "passed" if measured <= limit else "FAILED"
    cells = [what, f"{measured:.3g}", f"<= {limit:g}", verdict]
    table.put(name, cells, {"measured": measured, "limit": limit})


def run(bench: Bench) -> bool:
    """Makes the checks; returns whether some ended and none of those has failed."""
    table = bench.report.table("Checks on this device", HEAD, numbers_from=1)
    rows = itertools.count()
    outcomes: list[Outcome] = []

    def put(job: Job, known: Any, found: list[Outcome] | Failed) -> None:
        del known
        if isinstance(found, Failed):
            table.put(str(next(rows)), [job.name, found.reason])
            return
        outcomes.extend(found)
        for outcome in found:
            put_outcome(table, str(next(rows)), outcome)

    bench.measure(jobs(bench.on_gpu), put)
    return bool(outcomes) and all(x.measured <= x.limit for x in outcomes)
