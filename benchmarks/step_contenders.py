"""The optimizers that benchmarks.optimizer_step times, and the bytes each must move."""

import dataclasses
import functools
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import apollo_optax
from examples.llama.config import preset
from examples.llama.model import Execution, init_params
from examples.llama.optimizers.kernels import galore_over_layers
from examples.llama.optimizers.parameters import KERNELS, path_name
from examples.llama.optimizers.wrappers import in_float32, moments_in

# The least number of measurements in a block, even of a slow step.
FEWEST_TIMES = 3
# Seconds of steps that are launched together and then waited for.
SECONDS_TOGETHER = 0.1
LEARNING_RATE = 1e-3
GALORE_GAP = 200  # The default of Optax and of the paper.


class Setting(NamedTuple):
    """The kernels to update. They are those of a model's layers, and no others."""

    model: str
    dtype: str  # The dtype of weights and gradients.
    # "unstacked" has a leaf per matrix, "stacked" a leaf for the matrices of all
    # layers.
    layout: str
    layers: int | None = None  # The number of layers; None for all.

    @property
    def stacked(self) -> bool:
        return self.layout == "stacked"

    def kernels(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes by path.

        A stacked leaf is (L, in, out). Otherwise there are L leaves of (in, out).
        """
        config, execution = preset(self.model), Execution(param_dtype=self.dtype)
        if self.layers is not None:
            config = dataclasses.replace(config, num_layers=self.layers)
        params = jax.eval_shape(lambda: init_params(config, execution, seed=0))
        stacks = {
            path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)
        }
        stacks = {
            name: leaf for name, leaf in stacks.items() if re.search(KERNELS, name)
        }
        if self.stacked:
            return stacks
        return {
            name.replace("layers", f"layer_{index}", 1): jax.ShapeDtypeStruct(
                leaf.shape[1:], leaf.dtype
            )
            for name, leaf in stacks.items()
            for index in range(leaf.shape[0])
        }

    def quarter_rank(self) -> int:
        return preset(self.model).hidden_size // 4


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, and how often its step must read gradients and weights.

    Every optimizer writes the weights, and reads and writes its state. Matrices are
    assumed to exceed any cache, so that a second pass over one is a second read.
    """

    name: str
    make: Callable[[], optax.GradientTransformation]
    gradient_reads: int = 1
    weight_reads: int = 1
    # The field of the state that an ordinary step does not write.
    read_only: str | None = None
    refresh_every: int | None = None  # Steps between two refreshes.

    def floor_bytes(self, kernels: dict[str, jax.ShapeDtypeStruct]) -> int:
        """Returns the bytes that an ordinary step must move.

        Gradients have the weights' dtype. With W bytes of weights and S of state, they
        are `(gradient_reads + weight_reads + 1) W + 2 S`. This is 3 W for SGD and
        3 W + 2 S for Adam. It is 4 W + 2 S for APOLLO, which must read and project the
        full gradient before it can scale the first number.
        """
        state = jax.eval_shape(self.make().init, kernels)
        unwritten = optax.tree.get(state, self.read_only) if self.read_only else ()
        passes = self.gradient_reads + self.weight_reads + 1
        return (
            passes * tree_bytes(kernels) + 2 * tree_bytes(state) - tree_bytes(unwritten)
        )


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def adamw(setting: Setting, moments: str) -> optax.GradientTransformation:
    # Optax's second moment always has the parameters' dtype.
    tx = optax.adamw(LEARNING_RATE)
    if moments == setting.dtype:
        return tx
    return in_float32(tx) if moments == "float32" else moments_in(moments, tx)


def galore(setting: Setting, rank: int) -> optax.GradientTransformation:
    if not setting.stacked:
        return optax.contrib.galore(LEARNING_RATE, rank, update_proj_gap=GALORE_GAP)
    return optax.chain(
        galore_over_layers(rank, 1.0), optax.scale_by_learning_rate(LEARNING_RATE)
    )


def muon(setting: Setting) -> optax.GradientTransformation:
    def stacked(params: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), params)

    numbers = stacked if setting.stacked else None
    return optax.contrib.muon(LEARNING_RATE, muon_weight_dimension_numbers=numbers)


def apollo(
    setting: Setting, of: Callable[..., Any], **options: Any
) -> optax.GradientTransformation:
    numbers = apollo_optax.ApolloDimensionNumbers(1, 2) if setting.stacked else None
    return of(LEARNING_RATE, weight_dimension_numbers=numbers, **options)


def methods(setting: Setting) -> dict[str, list[Method]]:
    """Returns the optimizers to time, by their names in --optimizers."""
    quarter = setting.quarter_rank()
    ranks = dict.fromkeys((quarter, 256))
    twice = functools.partial(Method, gradient_reads=2)
    of = functools.partial(functools.partial, apollo, setting)
    return {
        "sgd": [Method("sgd", lambda: optax.sgd(LEARNING_RATE))],
        "adamw": [
            Method(
                f"adamw, {moments} moments", functools.partial(adamw, setting, moments)
            )
            for moments in ("float32", "bfloat16")
        ],
        # Three passes compute means of the squared gradient, the size of the scaled
        # update, and the update, whose size is relative to that of the weights.
        "adafactor": [
            Method(
                "adafactor",
                lambda: optax.adafactor(LEARNING_RATE),
                gradient_reads=3,
                weight_reads=2,
            )
        ],
        "lion": [Method("lion", lambda: optax.lion(LEARNING_RATE))],
        "galore": [
            Method(
                f"galore, rank {quarter}",
                functools.partial(galore, setting, quarter),
                read_only="projector",
                refresh_every=GALORE_GAP,
            )
        ],
        "muon": [Method("muon", functools.partial(muon, setting))],
        "apollo": [
            *(
                twice(f"apollo, rank {rank}", of(apollo_optax.apollo, rank=rank))
                for rank in ranks
            ),
            *(
                twice(
                    f"apollo, rank {rank}, normal",
                    of(apollo_optax.apollo, rank=rank, projection="random"),
                )
                for rank in ranks
            ),
        ],
        "apollo-mini": [
            twice("apollo-mini", of(apollo_optax.apollo_mini)),
            twice(
                "apollo-mini, normal",
                of(apollo_optax.apollo_mini, projection="random"),
            ),
        ],
        # The largest entry, two sums of a round, a norm and the update read the
        # gradient.
        "racs": [Method("racs", of(apollo_optax.racs), gradient_reads=5)],
        # The norms of rows, the norms of columns, four products and the update read the
        # gradient.
        "apollo-zero": [
            Method("apollo-zero", of(apollo_optax.apollo_zero), gradient_reads=7),
            # The root mean square of the weights is known before they are updated.
            Method(
                "apollo-zero, relative",
                of(apollo_optax.apollo_zero, relative=True),
                gradient_reads=7,
                weight_reads=2,
            ),
            # The norms of rows and columns and two products read the gradient.
            Method(
                "apollo-zero, whitening",
                of(apollo_optax.apollo_zero, power=0.0, method="newton_schulz"),
                gradient_reads=4,
            ),
            # The largest entries of the momentum are known before it is rounded.
            Method(
                "apollo-zero, int8 momentum, relative",
                of(
                    apollo_optax.apollo_zero,
                    momentum=0.9,
                    int8_momentum=True,
                    relative=True,
                ),
                gradient_reads=8,
                weight_reads=2,
            ),
        ],
    }


@dataclasses.dataclass
class Measured:
    """The measurements of a contender; times are in seconds."""

    floor_bytes: int
    refresh_every: int | None = None
    # The times of ordinary steps, by round.
    blocks: list[list[float]] = dataclasses.field(default_factory=list)
    refreshes: list[float] = dataclasses.field(default_factory=list)
    compilations: list[float] = dataclasses.field(default_factory=list)
    temporaries_bytes: int | None = None
    state_bytes: int | None = None
    out_of_memory: bool = False
    copy: "Measured | None" = None  # The copy that took turns with it.

    def amortised(self, seconds: float) -> float:
        """Returns the mean time of a step, with the share of refreshes.

        Args:
            seconds: the time of an ordinary step.
        """
        if self.refresh_every is None:
            return seconds
        share = 1 / self.refresh_every
        return (1 - share) * seconds + share * statistics.median(self.refreshes)

    def by_round(self) -> list[float]:
        return [self.amortised(statistics.median(block)) for block in self.blocks]


class Contender(Protocol):
    """A step to time. It uses the device's memory only in `run_block`."""

    measured: Measured

    def compile(self) -> None:
        """Compiles the step, and adds the time to the measurements."""
        ...

    def run_block(self, seconds: float) -> None:
        """Steps for some seconds, and adds the times to the measurements.

        Raises:
            MemoryError: if the device has too little memory.
        """
        ...


def timed(
    step: Callable[[], None], wait: Callable[[], None], seconds: float
) -> list[float]:
    """Returns the times of steps, measured for about `seconds`.

    Args:
        step: begins a step, and may return before its end.
        wait: waits for the last step.
        seconds: the duration; there are at least `FEWEST_TIMES` measurements.

    Returns:
        Times per step. Each is the mean of a few steps that are waited for together. As
        in training, the device need not idle while the next step is launched.
    """

    def mean_of(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return (time.perf_counter() - start) / steps

    together = max(1, math.ceil(SECONDS_TOGETHER / mean_of(1)))
    times: list[float] = []
    while len(times) < FEWEST_TIMES or together * sum(times) < seconds:
        times.append(mean_of(together))
    return times


class Draw:
    """Draws arrays of the kernels' shapes by a program that is compiled once."""

    def __init__(self, kernels: dict[str, jax.ShapeDtypeStruct]) -> None:
        def draw(seed: jax.Array) -> dict[str, jax.Array]:
            # The generator of the hardware is fast, and its quality is enough here.
            keys = jax.random.split(
                jax.random.key(seed, impl="unsafe_rbg"), len(kernels)
            )
            return {
                name: jax.random.uniform(key, leaf.shape, leaf.dtype, -1e-2, 1e-2)
                for key, (name, leaf) in zip(keys, kernels.items(), strict=True)
            }

        self._draw = jax.jit(draw).lower(0).compile()

    def __call__(self, seed: int) -> dict[str, jax.Array]:
        return self._draw(jnp.int32(seed))


def jitted_step(tx: optax.GradientTransformation) -> Any:
    """Returns a step of parameters, state and gradients, which donates the first two.

    It returns the new parameters and the new state.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


class OnJax:
    """An Optax optimizer. One program updates and applies.

    It donates the parameters and the state.
    """

    def __init__(
        self, method: Method, kernels: dict[str, jax.ShapeDtypeStruct], draw: Draw
    ) -> None:
        self.measured = Measured(method.floor_bytes(kernels), method.refresh_every)
        self._kernels, self._draw, self._tx = kernels, draw, method.make()
        self._init = jax.jit(self._tx.init).lower(kernels).compile()
        self._state = jax.eval_shape(self._tx.init, kernels)

    @property
    def program(self) -> jax.stages.Compiled:
        """The compiled step; it exists after `compile`."""
        return self._step

    def compile(self) -> None:
        jax.clear_caches()  # At the first step of a run, the caches are empty.
        start = time.perf_counter()
        shapes = self._kernels, self._state, self._kernels
        self._step: Any = jitted_step(self._tx).lower(*shapes).compile()
        self.measured.compilations.append(time.perf_counter() - start)
        sizes = self._step.memory_analysis()
        self.measured.temporaries_bytes = sizes.temp_size_in_bytes
        self.measured.state_bytes = sizes.argument_size_in_bytes - 2 * tree_bytes(
            self._kernels
        )

    def run_block(self, seconds: float) -> None:
        try:
            self._run_block(seconds)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MemoryError(str(error)) from error

    def _run_block(self, seconds: float) -> None:
        params, grads = self._draw(0), self._draw(1)
        state = self._init(params)
        jax.block_until_ready((params, grads, state))

        def step() -> None:
            nonlocal params, state
            params, state = self._step(params, state, grads)

        def wait() -> None:
            jax.block_until_ready((params, state))

        start = time.perf_counter()
        step()  # The count is 0, so the first step refreshes.
        wait()
        self.measured.refreshes.append(time.perf_counter() - start)
        self.measured.blocks.append(timed(step, wait, seconds))


class Copy:
    """A copy from one array to another, which measures the bandwidth of the memory.

    Args:
        size: the bytes of each array, which should exceed any cache.
    """

    def __init__(self, size: int) -> None:
        self.measured = Measured(2 * size)
        self._source = jax.ShapeDtypeStruct((size // 4,), jnp.float32)

    def compile(self) -> None:
        # The target is donated so that no memory is allocated. The negation keeps XLA
        # from copying the bits in a single thread.
        copy = jax.jit(
            lambda target, source: -source, donate_argnums=0, keep_unused=True
        )
        self._copy = copy.lower(self._source, self._source).compile()

    def run_block(self, seconds: float) -> None:
        source, target = (
            jnp.ones(self._source.shape, self._source.dtype) for _ in range(2)
        )

        def step() -> None:
            nonlocal target
            target = self._copy(target, source)

        self.measured.blocks.append(
            timed(step, lambda: jax.block_until_ready(target), seconds)
        )
