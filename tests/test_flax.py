"""Flax models on a mesh: NNX and Linen, their boxes and their metadata."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax
from apollo_optax import ApolloDimensionNumbers
from tests.helpers import (
    assert_close,
    every_axis_type,
    every_projection,
    make_mesh,
    normal,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Flax before 0.12.7 calls it nnx.pure.
as_pure = getattr(nnx, "as_pure", None) or nnx.pure
SHAPES = {"kernel": (8, 16), "bias": (16,), "merged": (2, 4, 16)}
VALUES = {
    name: np.asarray(normal(i, shape)) for i, (name, shape) in enumerate(SHAPES.items())
}
SPECS = {
    "kernel": ("data", "model"),
    "bias": ("model",),
    "merged": ("data", None, "model"),
}
NUMBERS = {
    "dense": {"kernel": ApolloDimensionNumbers(), "bias": None},
    # The contracted axes become one, so the moments of `merged` have two axes.
    "merged": ApolloDimensionNumbers((0, 1), 2),
}
MOMENT_SHAPES = {"dense": {"kernel": (4, 16), "bias": (16,)}, "merged": (4, 16)}
make_optimizer: Any = functools.partial(
    apollo_optax.apollo, 0.1, rank=4, weight_dimension_numbers=NUMBERS
)


def constant(name):
    return lambda key, shape, dtype=jnp.float32: jnp.asarray(VALUES[name], dtype)


def objective(params):
    """A sum over parameters, which needs no sharding rule between them."""
    return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(params))


@functools.cache
def run_without_flax(projection) -> Any:
    """Parameters and moments after two steps on one device."""
    params = {
        "dense": {name: jnp.asarray(VALUES[name]) for name in ("kernel", "bias")},
        "merged": jnp.asarray(VALUES["merged"]),
    }
    tx = make_optimizer(projection=projection)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state[0]._asdict()


class Model(nnx.Module):
    """A layer and a parameter, both with metadata that names the axes of the mesh."""

    def __init__(self, partitioned=True):
        def init(name):
            if not partitioned:
                return constant(name)
            return nnx.with_partitioning(constant(name), SPECS[name])

        inits = {"kernel_init": init("kernel"), "bias_init": init("bias")}
        self.dense = nnx.Linear(8, 16, **inits, rngs=nnx.Rngs(0))
        metadata = {"out_sharding": SPECS["merged"]} if partitioned else {}
        self.merged = nnx.Param(jnp.asarray(VALUES["merged"]), **metadata)


def assert_moments_are_sharded(mu, nu):
    for moments in (mu, nu):
        assert jax.tree.map(jnp.shape, moments) == MOMENT_SHAPES
        # Both mesh axes shard the channels, also the axis that shards the parameter's
        # contracted side.
        shards = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), moments)
        assert shards == {"dense": {"kernel": (4, 2), "bias": (4,)}, "merged": (4, 2)}


def nnx_step(model, optimizer):
    grads = nnx.grad(lambda model: objective(nnx.state(model, nnx.Param)))(model)
    optimizer.update(model, grads)


@every_projection
@every_axis_type
def test_nnx_optimizer_on_a_mesh(axis_type, projection):
    def is_variable(x):
        return isinstance(x, nnx.Variable)

    with jax.set_mesh(make_mesh(axis_type)):
        model = nnx.jit(Model)()
        tx = make_optimizer(projection=projection)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        step = nnx.jit(nnx_step)
        state: Any = None
        for number in range(3):
            # Moments are in the parameters' boxes, with the names of their own axes.
            for leaf in jax.tree.leaves(optimizer.opt_state, is_leaf=is_variable):
                names = leaf.get_metadata().get("out_sharding", ())
                assert len(names) == (leaf.ndim if names else 0)
                assert isinstance(leaf, nnx.OptVariable if names else nnx.OptArray)
            state = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"][0]
            assert_moments_are_sharded(state["mu"], state["nu"])
            if number < 2:
                step(model, optimizer)
    params, expected = run_without_flax(projection)
    trained = nnx.to_pure_dict(nnx.state(model))
    assert_close(jax.device_get(trained), jax.device_get(params))
    for field in ("mu", "nu", "norm"):
        assert_close(jax.device_get(state[field]), jax.device_get(expected[field]))


class LinenModel(nn.Module):
    """The same model in Linen."""

    @nn.compact
    def __call__(self, x):
        def init(name):
            return nn.with_partitioning(constant(name), SPECS[name])

        self.param("merged", init("merged"), SHAPES["merged"])
        inits = {"kernel_init": init("kernel"), "bias_init": init("bias")}
        return nn.Dense(16, name="dense", **inits)(x)


@every_projection
@every_axis_type
def test_linen_train_state_on_a_mesh(axis_type, projection):
    def is_boxed(x):
        return isinstance(x, nn.Partitioned)

    mesh = make_mesh(axis_type)
    boxed: Any = LinenModel().init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        nn.get_partition_spec(boxed),
        is_leaf=lambda x: isinstance(x, P),
    )
    boxed = jax.device_put(boxed, shardings)
    assert isinstance(boxed["dense"]["kernel"], nn.Partitioned)
    with jax.set_mesh(mesh):
        state: Any = TrainState.create(
            apply_fn=LinenModel().apply,
            params=boxed,
            tx=make_optimizer(projection=projection),
        )

        @jax.jit
        def step(state):
            return state.apply_gradients(grads=jax.grad(objective)(state.params))

        inner: Any = None
        for number in range(3):
            inner = nn.meta.unbox(state.opt_state[0])
            for leaf in jax.tree.leaves(state.opt_state[0], is_leaf=is_boxed):
                if isinstance(leaf, nn.Partitioned):
                    assert len(leaf.names) == leaf.value.ndim
            assert_moments_are_sharded(inner.mu, inner.nu)
            if number < 2:
                state = step(state)
    assert isinstance(state.params["dense"]["kernel"], nn.Partitioned)
    params, expected = run_without_flax(projection)
    trained = nn.meta.unbox(state.params)
    assert_close(jax.device_get(trained), jax.device_get(params))
    for field in ("mu", "nu", "norm"):
        assert_close(
            jax.device_get(getattr(inner, field)), jax.device_get(expected[field])
        )


MATRIX = ApolloDimensionNumbers()


@pytest.mark.parametrize(
    ("numbers", "moment_shapes"),
    [
        (NUMBERS, MOMENT_SHAPES),
        (
            {"dense": {"kernel": MATRIX, "bias": None}, "merged": None},
            MOMENT_SHAPES | {"merged": SHAPES["merged"]},
        ),
        (
            {"dense": None, "merged": ApolloDimensionNumbers(1, (0, 2))},
            {
                "dense": {"kernel": SHAPES["kernel"], "bias": SHAPES["bias"]},
                "merged": (4, 2, 16),
            },
        ),
        (lambda _: NUMBERS, MOMENT_SHAPES),
    ],
    ids=["plain dict", "None leaves", "prefix", "callable"],
)
@pytest.mark.parametrize("pure", [True, False], ids=["arrays", "variables"])
def test_dimension_numbers_of_an_nnx_state(pure, numbers, moment_shapes):
    params = nnx.state(Model(partitioned=False), nnx.Param)
    params = as_pure(params) if pure else params
    tx: Any = apollo_optax.scale_by_apollo(4, weight_dimension_numbers=numbers)
    state = tx.init(params)
    assert nnx.to_pure_dict(jax.tree.map(jnp.shape, state.mu)) == moment_shapes
    updates, state = tx.update(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert nnx.to_pure_dict(jax.tree.map(jnp.shape, state.nu)) == moment_shapes


def test_one_dimension_numbers_for_all_of_an_nnx_state():
    class Matrices(nnx.Module):
        def __init__(self):
            self.wide = nnx.Param(normal(0, (4, 6)))
            self.tall = nnx.Param(normal(1, (6, 4)))

    params = nnx.state(Matrices())
    tx: Any = apollo_optax.scale_by_apollo(2, weight_dimension_numbers=MATRIX)
    shapes = nnx.to_pure_dict(jax.tree.map(jnp.shape, tx.init(params).mu))
    assert shapes == {"wide": (2, 6), "tall": (2, 6)}
