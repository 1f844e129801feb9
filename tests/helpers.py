"""What several test modules share: arrays, meshes, optimizers and a loop of updates."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax

# Optimizers for small parameters. They refresh their projections in the third step.
small_apollo: Any = functools.partial(apollo_optax.apollo, rank=2, update_proj_gap=2)
OPTIMIZERS: dict[str, Any] = {
    "apollo": small_apollo,
    "apollo_mini": functools.partial(apollo_optax.apollo_mini, update_proj_gap=2),
    "svd": functools.partial(small_apollo, projection="svd"),
    "apollo_zero": apollo_optax.apollo_zero,
    "racs": apollo_optax.racs,
}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_projection = pytest.mark.parametrize("projection", ["random", "svd"])
AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]
every_axis_type = pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=str)


def combinations_of(names: str, *axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by all combinations of the values, and marks most as slow.

    The default tests run one in ``k`` combinations, where ``k`` is the size of the
    smallest axis. With two axes they have every value, and with three every pair.

    Args:
      names: The names of the parameters, separated by commas.
      *axes: The values of each axis. A value is one parameter, or a tuple of several.
    """
    lists = [list(axis) for axis in axes]
    smallest = min(map(len, lists))
    params = []
    for indexed in itertools.product(*map(enumerate, lists)):
        values = [v if isinstance(v, tuple) else (v,) for _, v in indexed]
        is_default = sum(index for index, _ in indexed) % smallest == 0
        marks = () if is_default else pytest.mark.slow
        params.append(pytest.param(*itertools.chain(*values), marks=marks))
    return pytest.mark.parametrize(names, params)


def normal(seed: int, shape: int | tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """Standard normal numbers, drawn by NumPy so that XLA has no draw to compile."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def rms(array: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(array, np.float64)))))


def small_params(seed: int = 0, dtype: Any = jnp.float32) -> Any:
    """A matrix, a vector and a scalar."""
    kernel, bias = normal(seed, (4, 6), dtype), normal(seed + 1, (6,), dtype)
    return {
        "dense": {"kernel": kernel, "bias": bias},
        "scale": normal(seed + 2, (), dtype),
    }


def small_gradient(step: int, dtype: Any = jnp.float32) -> Any:
    return small_params(100 + 10 * step, dtype)


def small_gradients(*steps: int) -> list[Any]:
    """The gradients of the steps in ``range(*steps)``."""
    return [small_gradient(step) for step in range(*steps)]


def make_mesh(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    """A mesh of eight devices: two along ``data``, four along ``model``."""
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)


def put(mesh: jax.sharding.Mesh, array: Any, spec: P) -> Any:
    return jax.device_put(array, NamedSharding(mesh, spec))


def put_on_one_device(tree: Any) -> Any:
    """Puts arrays on a mesh of one device, so that their types name their device."""
    mesh = jax.make_mesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
    )
    return put(mesh, tree, P())


def run(
    tx: optax.GradientTransformation,
    gradients: Sequence[Any],
    params: Any = None,
    *,
    state: Any = None,
    jit: bool = False,
) -> tuple[list[Any], list[Any]]:
    """Updates once per gradient and returns the updates and the state of each step.

    Args:
      tx: The optimizer.
      gradients: The gradient of each step.
      params: The parameters to train. Without them, ``tx`` sees gradients alone.
      state: The state to start from instead of a new one.
      jit: Whether to compile the update as a whole.
    """
    if state is None:
        state = tx.init(gradients[0] if params is None else params)
    update: Any = jax.jit(tx.update) if jit else tx.update
    all_updates, states = [], []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        if params is not None:
            params = optax.apply_updates(params, updates)
        all_updates.append(updates)
        states.append(state)
    return all_updates, states


def assert_close(actual: Any, expected: Any) -> None:
    """Allows for the order of a few float32 operations, which the compiler chooses."""
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
