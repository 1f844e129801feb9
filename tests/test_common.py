"""The checks of every optimizer in ``optax.contrib`` (its ``_common_test.py``)."""

import functools
import logging
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import apollo_optax
from apollo_optax import ApolloDimensionNumbers
from tests.helpers import normal, put_on_one_device, run

OPTIMIZERS: dict[str, Any] = {
    "apollo": functools.partial(apollo_optax.apollo, rank=2),
    "apollo_mini": apollo_optax.apollo_mini,
    "normal": functools.partial(apollo_optax.apollo, rank=2, projection="random"),
    "racs": apollo_optax.racs,
    "svd": functools.partial(apollo_optax.apollo, rank=2, projection="svd"),
    "apollo_zero": apollo_optax.apollo_zero,
    "zero_momentum": functools.partial(apollo_optax.apollo_zero, momentum=0.9),
    "int8_momentum": functools.partial(
        apollo_optax.apollo_zero, momentum=0.9, int8_momentum=True
    ),
}
DTYPES = ["float16", "bfloat16", "float32", "float64"]

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_tree(seed, dtype: Any = jnp.float32) -> Any:
    """Two matrices whose projections may be drawn together, a vector and a scalar."""
    shapes = {"matrix": (4, 6), "vector": (5,), "scalar": (), "same shape": (4, 6)}
    tree = {}
    for i, (name, shape) in enumerate(shapes.items()):
        tree[name] = normal(seed + i, shape, dtype)
    return put_on_one_device(tree)


@every_optimizer
def test_unexpected_extra_arguments_change_nothing(name):
    tx = OPTIMIZERS[name](0.1)
    params, grads = make_tree(0), make_tree(10)
    state = tx.init(params)
    expected = tx.update(grads, state, params)
    actual = tx.update(grads, state, params, value=1.0, unexpected=object())
    chex.assert_trees_all_equal(actual, expected)
    # Wrappers such as optax.chain pass extra arguments on to this type only.
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert isinstance(optax.chain(tx), optax.GradientTransformationExtraArgs)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@every_optimizer
def test_second_call_does_not_compile(name, jit, caplog):
    # No other optimizer or test has this eps, so its eager step was not compiled yet.
    tx = OPTIMIZERS[name](0.1, eps=1e-7 * (1 + list(OPTIMIZERS).index(name)))
    traces = []

    def step(params, state):
        traces.append(None)
        grads = jax.tree.map(lambda x: 2 * x, params)
        updates, state = tx.update(grads, state, params, unexpected=1)
        return optax.apply_updates(params, updates), state

    def compilations():
        return [r for r in caplog.records if "compilation" in r.getMessage()]

    step = jax.jit(step) if jit else step
    params = make_tree(0)
    state = tx.init(params)
    caplog.set_level(logging.DEBUG, logger="jax")
    with jax.log_compiles():
        params, state = step(params, state)
        assert compilations(), "JAX no longer logs its compilations as expected here"
        params, state = jax.block_until_ready((params, state))
        caplog.clear()
        step(params, state)
    assert not compilations()
    assert len(traces) == (1 if jit else 2)


TARGETS = {
    "parabola": [1.0, -1.0, 1.0],
    "rosenbrock": [1.0, 1.0],
    "matrix_parabola": [[3.0, -2.0], [1.0, 4.0]],
    "mixed": {"vector": [1.0, -1.0, 2.0], "matrix": [[1.0, 0.0], [-1.0, 1.0]]},
    "wide": [
        [1.0, -2.0, 0.5, 3.0, -1.0],
        [2.0, 1.0, -1.5, 0.0, 1.0],
        [-1.0, 3.0, 2.0, 0.5, -0.5],
    ],
    "tall": [[1.0, -2.0], [0.5, 3.0], [-1.0, 2.0], [1.5, -0.5]],
}


@every_optimizer
def test_converges_in_scan(name):
    # The optimizer treats each leaf by itself, so one run minimises all objectives.
    final = jax.tree.map(jnp.array, TARGETS, is_leaf=lambda x: isinstance(x, list))
    initial = jax.tree.map(jnp.zeros_like, final)
    initial["parabola"] = jnp.array([-1.0, 10.0, 1.0])

    def objective(params):
        x, y = params["rosenbrock"]
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, final)
        squares["rosenbrock"] = 0.0
        return optax.tree.sum(squares) + (1 - x) ** 2 + 100 * (y - x**2) ** 2

    # Updates of a constant size would circle around a minimum for ever.
    rate = optax.linear_schedule(0.02, 0.0, 1000, transition_begin=3000)
    tx = OPTIMIZERS[name](rate)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train():
        (params, _), _ = jax.lax.scan(step, (initial, tx.init(initial)), length=4000)
        return params

    chex.assert_trees_all_close(train(), final, rtol=1e-3, atol=1e-3)


@every_optimizer
def test_inject_hyperparams_gives_equal_updates_and_states(name):
    factory, settings = OPTIMIZERS[name], {}
    if isinstance(factory, functools.partial):
        factory, settings = factory.func, factory.keywords
    settings = settings | {"learning_rate": 0.1, "weight_decay": 0.01}
    # Like Optax's test, this one has a list of leaves, one of which has three axes. The
    # last two of those are a matrix here.
    stacked = ApolloDimensionNumbers(1, 2)
    settings["weight_dimension_numbers"] = [ApolloDimensionNumbers(), stacked, None]
    params = [normal(0, (2, 3)), normal(1, (2, 5, 2)), normal(2, (3,))]
    grads = [normal(3, (2, 3)), normal(4, (2, 5, 2)), normal(5, (3,))]

    tx = factory(**settings)
    injected: Any = optax.inject_hyperparams(
        factory,
        static_args=apollo_optax.static_args(factory),
        hyperparam_dtype=jnp.float32,
    )(**settings)
    state, state_injected = tx.init(params), injected.init(params)
    numbers = {"learning_rate", "weight_decay", "b1", "b2", "eps"}
    own = {
        "racs": {"b", "norm_growth_limit"},
        "apollo_zero": {"power"},
        "zero_momentum": {"power", "momentum"},
        "int8_momentum": {"power", "momentum"},
    }.get(name, {"scale", "norm_growth_limit"})
    assert state_injected.hyperparams.keys() == numbers | own
    update_injected = jax.jit(injected.update)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        updates_injected, state_injected = update_injected(
            grads, state_injected, params
        )
        # With b2 = 0.999 in float32, the relative error of 1 - b2 is 1.3e-5.
        chex.assert_trees_all_close(
            (updates_injected, state_injected.inner_state),
            (updates, state),
            rtol=3e-5,
            atol=1e-7,
        )


def test_static_args_are_the_parameters_that_are_no_numbers():
    of_apollo, of_mini, of_zero, of_racs = map(
        apollo_optax.static_args,
        (
            apollo_optax.apollo,
            apollo_optax.apollo_mini,
            apollo_optax.apollo_zero,
            apollo_optax.racs,
        ),
    )
    assert of_apollo - of_mini == {"rank", "scale_type"}
    assert of_zero - of_apollo == {"int8_momentum", "method", "relative"}
    assert of_racs == {
        "iterations",
        "mask",
        "moment_dtype",
        "weight_dimension_numbers",
    }
    assert apollo_optax.static_args(apollo_optax.int8_trace) == {
        "nesterov",
        "weight_dimension_numbers",
    }


@every_optimizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_keep_the_dtype(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, grads = make_tree(0, dtype), make_tree(10, dtype)
        tx = OPTIMIZERS[name](0.1, weight_decay=0.1)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_tree_all_finite(updates)
            params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("name", ["apollo", "svd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_is_float32_unless_parameters_are_float64(name, dtype):
    expected = jnp.float64 if dtype == "float64" else jnp.float32
    with jax.enable_x64(dtype == "float64"):
        params = make_tree(0, dtype)
        tx = OPTIMIZERS[name](0.1)
        states = [tx.init(params)]
        states.append(tx.update(make_tree(10, dtype), states[0], params)[1])
        for state in states:
            dtypes = [x.dtype for x in jax.tree.leaves(state)]
            floats = [x for x in dtypes if jnp.issubdtype(x, jnp.floating)]
            assert len(floats) == (4 if name == "svd" else 3) * len(params)
            assert set(floats) == {jnp.dtype(expected)}


@pytest.mark.parametrize("moment_dtype", ["bfloat16", "float32", jnp.bfloat16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_moment_dtype_is_that_of_both_moments_of_all_leaves(dtype, moment_dtype):
    def dtypes(*trees):
        return {leaf.dtype for leaf in jax.tree.leaves(trees)}

    params, grads = make_tree(0, dtype), make_tree(10, dtype)
    tx: Any = apollo_optax.scale_by_apollo(2, moment_dtype=moment_dtype)
    state = tx.init(params)
    updates, new_state = tx.update(grads, state, params)
    for moments in (state.mu, state.nu, new_state.mu, new_state.nu):
        assert dtypes(moments) == {jnp.dtype(moment_dtype)}
    assert dtypes(state.norm, new_state.norm) == {jnp.dtype("float32")}

    # The update rounds only the moments that it stores. So the first step, which starts
    # from zeros, equals the first step with float32 moments.
    wide: Any = apollo_optax.scale_by_apollo(2, moment_dtype=jnp.float32)
    wide_updates, wide_state = wide.update(grads, wide.init(params), params)
    rtol = 1e-2 if dtype == "bfloat16" else 1e-6
    chex.assert_trees_all_close(updates, wide_updates, rtol=rtol)
    wide_moments = (wide_state.mu, wide_state.nu)
    rounded = jax.tree.map(lambda x: x.astype(moment_dtype), wide_moments)
    chex.assert_trees_all_close((new_state.mu, new_state.nu), rounded, rtol=1e-6)


def seven_like(x):
    return jnp.full_like(x, 7)


def set_param_leaves_to_seven(tx, state) -> Any:
    """Writes sevens wherever ``map_params`` sees a leaf that belongs to a parameter."""
    return optax.tree.map_params(tx, seven_like, state)


def assert_sevens(state, before):
    """Asserts that exactly the leaves that belong to a parameter are sevens."""
    of_no_parameter = {"count", "key"} & set(state._fields)
    for field in set(state._fields) - of_no_parameter:
        tree = getattr(state, field)
        expected = jax.tree.map(seven_like, getattr(before, field))
        chex.assert_trees_all_equal(tree, expected)
        assert tree is None or jax.tree.leaves(tree)
    for field in of_no_parameter:
        chex.assert_trees_all_equal(getattr(state, field), getattr(before, field))


@every_optimizer
def test_map_params(name):
    tx = OPTIMIZERS[name](0.1)
    state = tx.init(make_tree(0))
    mapped = set_param_leaves_to_seven(tx, state)
    chex.assert_trees_all_equal_structs(mapped, state)
    assert_sevens(mapped[0], state[0])


def test_map_params_with_a_second_tree():
    tx: Any = apollo_optax.apollo(0.1, rank=2)
    params = make_tree(0)
    names = {name: name for name in params}
    mapped: Any = optax.tree.map_params(
        tx,
        lambda _, name: name,
        tx.init(params),
        names,
        transform_non_params=lambda _: None,
    )
    assert mapped[0].mu == mapped[0].nu == mapped[0].norm == names
    assert mapped[0].count is mapped[0].key is None


@pytest.mark.parametrize("name", ["apollo", "svd"])
def test_map_params_under_masked(name):
    mask = {"matrix": True, "same shape": True, "vector": False, "scalar": True}
    tx: Any = optax.masked(OPTIMIZERS[name](0.1), mask)
    state = tx.init(make_tree(0))
    mapped = set_param_leaves_to_seven(tx, state)
    chex.assert_trees_all_equal_structs(mapped, state)
    assert isinstance(mapped.inner_state[0].mu["vector"], optax.MaskedNode)
    assert_sevens(mapped.inner_state[0], state.inner_state[0])


@pytest.mark.parametrize("name", ["apollo", "svd"])
def test_map_params_under_partition(name):
    transforms: Any = {"apollo": OPTIMIZERS[name](0.1), "adam": optax.adam(0.1)}
    labels = {"matrix": "apollo", "same shape": "apollo"}
    labels |= {"vector": "adam", "scalar": "adam"}
    tx: Any = optax.partition(transforms, labels)
    state = tx.init(make_tree(0))
    mapped = set_param_leaves_to_seven(tx, state)
    chex.assert_trees_all_equal_structs(mapped, state)
    after, before = (s.inner_states["apollo"].inner_state[0] for s in (mapped, state))
    assert isinstance(after.mu["vector"], optax.MaskedNode)
    assert_sevens(after, before)


@every_optimizer
def test_map_params_under_inject_hyperparams(name):
    factory, settings = OPTIMIZERS[name], {}
    if isinstance(factory, functools.partial):
        factory, settings = factory.func, factory.keywords
    tx: Any = optax.inject_hyperparams(
        factory,
        static_args=apollo_optax.static_args(factory),
        hyperparam_dtype=jnp.float32,
    )(learning_rate=0.1, **settings)
    state = tx.init(make_tree(0))
    mapped = set_param_leaves_to_seven(tx, state)
    chex.assert_trees_all_equal_structs(mapped, state)
    chex.assert_trees_all_equal(mapped.hyperparams, state.hyperparams)
    assert_sevens(mapped.inner_state[0], state.inner_state[0])


def test_map_params_under_multi_steps():
    tx: Any = optax.MultiSteps(apollo_optax.apollo(0.1, rank=2), 2)
    state = tx.init(make_tree(0))
    mapped = set_param_leaves_to_seven(tx, state)
    assert_sevens(mapped.inner_opt_state[0], state.inner_opt_state[0])
    assert int(mapped.mini_step) == 0


@every_optimizer
def test_constant_schedule_is_the_constant(name):
    params, grads = make_tree(0), make_tree(10)
    runs = []
    for rate in (1e-3, optax.constant_schedule(1e-3)):
        updates, _ = run(OPTIMIZERS[name](rate), [grads] * 3, params)
        trained = params
        for update in updates:
            trained = optax.apply_updates(trained, update)
        runs.append(trained)
    chex.assert_trees_all_close(*runs, rtol=1e-6)
