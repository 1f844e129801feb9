"""The optimizer inside JAX's transformations and Optax's combinators."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import apollo_optax
from apollo_optax import ApolloDimensionNumbers
from tests.helpers import (
    OPTIMIZERS,
    assert_close,
    every_optimizer,
    run,
    small_apollo,
    small_gradient,
    small_gradients,
    small_params,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# JAX's transformations.


@every_optimizer
def test_jit_equals_eager(name):
    tx = OPTIMIZERS[name](0.1, weight_decay=0.1)
    jitted, eager = (
        run(tx, small_gradients(3), small_params(), jit=jit) for jit in (True, False)
    )
    assert_close(jitted, eager)


@every_optimizer
def test_scan_equals_a_loop(name):
    tx = OPTIMIZERS[name](0.1)
    params = small_params()

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    grads = small_gradients(4)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, stack(grads)))
    (_, state), updates = scan((params, tx.init(params)))
    expected_updates, expected_states = run(tx, grads, params)
    assert_close(updates, stack(expected_updates))
    assert_close(state, expected_states[-1])


def test_vmap_over_seeds():
    params = small_params()

    def two_steps(seed):
        tx = small_apollo(0.1, update_proj_gap=1, key=seed)
        updates, states = run(tx, small_gradients(2), params)
        return stack(updates), states[-1]

    updates, state = jax.vmap(two_steps)(jnp.arange(3))
    for seed in range(3):
        lane = jax.tree.map(lambda x: x[seed], (updates, state))  # noqa: B023
        assert_close(lane, two_steps(seed))
        key = jax.random.key_data(jax.random.key(seed))
        chex.assert_trees_all_equal(lane[1][0].key, key)
    # Only the moments of matrices depend on a projection, and so on the seed.
    kernels, biases = state[0].mu["dense"]["kernel"], state[0].mu["dense"]["bias"]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
    chex.assert_trees_all_equal(biases[0], biases[1])


def test_vmap_over_an_ensemble():
    tx = small_apollo(0.1)
    scales = jnp.array([1.0, 2.0, -1.0])
    params, grads = (
        jax.tree.map(lambda x: jax.vmap(jnp.multiply, (0, None))(scales, x), tree)
        for tree in (small_params(), small_gradient(0))
    )
    updates, state = jax.vmap(tx.update)(grads, jax.vmap(tx.init)(params), params)
    for member in range(3):

        def of_member(tree):
            return jax.tree.map(lambda x: x[member], tree)  # noqa: B023

        own_params, own_grads = of_member((params, grads))
        expected = tx.update(own_grads, tx.init(own_params), own_params)
        assert_close(of_member((updates, state)), expected)


@pytest.mark.parametrize(
    "make_key",
    [lambda: 1, lambda: jax.random.PRNGKey(1), lambda: jax.random.key(1)],
    ids=["seed", "raw key", "typed key"],
)
def test_init_makes_a_new_state_after_donation(make_key):
    tx = small_apollo(0.1, key=make_key())
    params = small_params()
    expected, _ = run(tx, small_gradients(2), params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    # A sweep runs the same optimizer again.
    for _ in range(2):
        donated, state = jax.tree.map(jnp.copy, params), tx.init(params)
        moments = state[0].mu["dense"]["kernel"]
        for number in range(2):
            donated, state, updates = step(donated, state, small_gradient(number))
            assert_close(updates, expected[number])
        assert moments.is_deleted(), "nothing was donated"


@pytest.mark.parametrize(
    "make_key", [jax.random.PRNGKey, jax.random.key], ids=["raw key", "typed key"]
)
def test_donation_keeps_a_key_that_two_optimizers_share(make_key):
    key = make_key(1)
    tx: Any = optax.partition(
        {"kernel": small_apollo(0.1, key=key), "rest": small_apollo(0.01, key=key)},
        {"dense": {"kernel": "kernel", "bias": "rest"}, "scale": "rest"},
    )
    params = small_params()
    update = jax.jit(tx.update, donate_argnums=1)
    updates, _ = update(small_gradient(0), tx.init(params), params)
    assert_close(updates, run(tx, small_gradients(1), params)[0][0])
    # The caller can still use the key.
    chex.assert_trees_all_equal(jax.random.bits(key), jax.random.bits(make_key(1)))


# Optax's combinators.


def test_chain():
    clip: Any = optax.clip_by_global_norm(1.0)
    alone = small_apollo(0.1)
    chained: Any = optax.chain(clip, alone)
    params = small_params()
    state, state_alone = chained.init(params), alone.init(params)
    for step in range(2):
        clipped, _ = clip.update(small_gradient(step), clip.init(params))
        assert not np.allclose(clipped["scale"], small_gradient(step)["scale"])
        updates, state = chained.update(small_gradient(step), state, params)
        expected, state_alone = alone.update(clipped, state_alone, params)
        chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_equal(optax.tree.get(state, "nu"), state_alone[0].nu)


def test_partition():
    labels = {"dense": {"kernel": "apollo", "bias": "sgd"}, "scale": "sgd"}
    transforms = {"apollo": small_apollo(0.1), "sgd": optax.sgd(0.5)}
    tx: Any = optax.partition(transforms, labels)
    updates, states = run(tx, small_gradients(3), small_params())
    expected, _ = run(small_apollo(0.1), small_gradients(3), small_params())
    for step in range(3):
        kernel, bias = (updates[step]["dense"][name] for name in ("kernel", "bias"))
        chex.assert_trees_all_equal(kernel, expected[step]["dense"]["kernel"])
        chex.assert_trees_all_close(bias, -0.5 * small_gradient(step)["dense"]["bias"])
    moments = jax.tree.leaves(states[-1].inner_states["apollo"].inner_state[0].mu)
    assert [x.shape for x in moments] == [(2, 6)]


def matrices_have_two_axes(tree):
    return jax.tree.map(
        lambda x: ApolloDimensionNumbers() if x.ndim == 2 else None, tree
    )


@pytest.mark.parametrize(
    "numbers",
    [
        None,
        {"dense": {"kernel": ApolloDimensionNumbers(), "bias": None}, "scale": None},
        matrices_have_two_axes,
    ],
    ids=["default", "dict", "callable"],
)
def test_masked(numbers):
    mask = {"dense": {"kernel": True, "bias": False}, "scale": True}
    tx: Any = optax.masked(small_apollo(0.1, weight_dimension_numbers=numbers), mask)
    updates, states = run(tx, small_gradients(3), small_params())
    wanted, _ = run(small_apollo(0.1), small_gradients(3), small_params())
    for step in range(3):
        # The masked leaf passes through.
        wanted[step]["dense"]["bias"] = small_gradient(step)["dense"]["bias"]
    chex.assert_trees_all_equal(updates, wanted)
    masked = states[-1].inner_state[0].mu["dense"]["bias"]
    assert isinstance(masked, optax.MaskedNode)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in OPTIMIZERS), ("apollo", "bfloat16")],
)
def test_multi_steps(name, dtype):
    tx = OPTIMIZERS[name](0.1)
    accumulating: Any = optax.MultiSteps(tx, every_k_schedule=2)
    params = small_params(0, dtype)
    grads = [small_gradient(step, dtype) for step in range(2)]
    state = accumulating.init(params)
    update = jax.jit(accumulating.update)
    updates, state = update(grads[0], state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(state.inner_opt_state[0].count) == 0
    updates, state = update(grads[1], state, params)
    assert int(state.inner_opt_state[0].count) == 1
    mean = jax.tree.map(lambda a, b: (a + (b - a) / 2).astype(dtype), *grads)
    expected, _ = tx.update(mean, tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)
    rtol = 1e-5 if dtype == "float32" else 3e-2
    chex.assert_trees_all_close(updates, expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@every_optimizer
def test_apply_if_finite_leaves_the_state_untouched(name, bad):
    tx: Any = optax.apply_if_finite(OPTIMIZERS[name](0.1), max_consecutive_errors=3)
    params = small_params()
    update = jax.jit(tx.update)
    _, state = update(small_gradient(0), tx.init(params), params)
    broken = small_gradient(1)
    broken["dense"]["kernel"] = broken["dense"]["kernel"].at[1, 2].set(bad)
    updates, after = update(broken, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert int(after.total_notfinite) == 1
    # The next step gives what it would have given without the bad step.
    expected, _ = update(small_gradient(1), state, params)
    actual, _ = update(small_gradient(1), after, params)
    chex.assert_trees_all_equal(actual, expected)
    assert np.abs(expected["dense"]["kernel"]).max() > 0


def test_learning_rate_schedule():
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    scheduled, _ = run(small_apollo(schedule), small_gradients(3), small_params())
    constant, _ = run(small_apollo(1.0), small_gradients(3), small_params())
    for step, rate in enumerate([0.5, 0.4, 0.3]):
        expected = jax.tree.map(lambda x: rate * x, constant[step])  # noqa: B023
        assert_close(scheduled[step], expected)


INJECTED: dict[str, Any] = {
    "apollo": functools.partial(apollo_optax.apollo, rank=2),
    "apollo_mini": functools.partial(apollo_optax.apollo_mini, scale=1.0),
}


def inject(name, **settings) -> Any:
    factory = INJECTED[name].func
    make = optax.inject_hyperparams(
        factory,
        static_args=apollo_optax.static_args(factory),
        hyperparam_dtype=jnp.float32,
    )
    return make(**INJECTED[name].keywords | settings)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparameters_change_between_steps(name, jit):
    # Without the limiter, only the hyperparameters change the matrix's update.
    tx = inject(name, learning_rate=0.1, norm_growth_limit=None)
    traces = []

    def update(grads, state):
        traces.append(None)
        return tx.update(grads, state, params)

    params = small_params()
    step = jax.jit(update) if jit else update
    _, state = step(small_gradient(0), tx.init(params))
    expected, _ = step(small_gradient(1), state)
    state.hyperparams["learning_rate"] = jnp.float32(0.3)
    state.hyperparams["scale"] = jnp.float32(4.0)
    updates, state = step(small_gradient(1), state)
    assert len(traces) == (1 if jit else 3)
    # A matrix's update is proportional to the square root of the scale.
    assert_close(updates["dense"]["kernel"], 6 * expected["dense"]["kernel"])
    assert_close(updates["dense"]["bias"], 3 * expected["dense"]["bias"])
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.3)


def test_injected_schedules():
    tx = inject(
        "apollo",
        learning_rate=optax.linear_schedule(1.0, 0.0, 2),
        b1=lambda count: 0.5 + 0.1 * count,
    )
    updates, states = run(tx, small_gradients(3), small_params())
    assert float(states[-1].hyperparams["b1"]) == pytest.approx(0.7)
    zeros = jax.tree.map(jnp.zeros_like, small_params())
    chex.assert_trees_all_equal(updates[2], zeros)
    mu = 0.0
    for b1, gradient in zip([0.5, 0.6, 0.7], small_gradients(3), strict=True):
        mu = b1 * mu + (1 - b1) * gradient["scale"]
    assert_close(states[-1].inner_state[0].mu["scale"], mu)
