"""The norm-growth limiter: on norms, as a transformation, and inside APOLLO."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_optax import (
    ApolloDimensionNumbers,
    LimitNormGrowthState,
    limit_norm_growth,
    scale_by_apollo,
)
from apollo_optax._limiter import limit_norm

LIMIT = 1.01


def test_limit_norm_limits_growth_only():
    norm, remembered = jnp.array([2.0, 1.005, 0.5]), jnp.ones(3)
    factor, new = limit_norm(norm, remembered, LIMIT)
    np.testing.assert_allclose(norm * factor, [LIMIT, 1.005, 0.5], rtol=1e-6)
    np.testing.assert_allclose(new, norm * factor)


def test_zero_norm_is_not_remembered():
    # Nothing is limited before the first non-zero norm. A later zero changes nothing.
    factor, remembered = limit_norm(jnp.array(0.0), jnp.array(0.0), LIMIT)
    assert (factor, remembered) == (1, 0)
    factor, remembered = limit_norm(jnp.array(3.0), remembered, LIMIT)
    assert (factor, remembered) == (1, 3)
    factor, remembered = limit_norm(jnp.array(0.0), remembered, LIMIT)
    assert remembered == 3


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_norm_that_is_not_finite_is_not_remembered(bad):
    for before in (0.0, 2.0):
        _, remembered = limit_norm(jnp.array(bad), jnp.array(before), LIMIT)
        assert remembered == before


def test_infinite_limit_limits_nothing():
    # A schedule can't return None, so infinity is its way to switch the limiter off.
    sizes = jnp.array([1, 50, 2, 9])[:, None, None]
    grads = jax.random.normal(jax.random.key(0), (4, 6, 8)) * sizes
    free = scale_by_apollo(2, norm_growth_limit=None)
    infinite = scale_by_apollo(2, norm_growth_limit=jnp.inf)
    states = [tx.init(grads[0]) for tx in (free, infinite)]
    for gradient in grads:
        expected, states[0] = free.update(gradient, states[0])
        actual, states[1] = infinite.update(gradient, states[1])
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_transformation_limits_each_leaf_by_itself():
    tx = limit_norm_growth(LIMIT)
    first = {
        "kernel": jnp.full((2, 2), 0.5),
        "bias": jnp.full(4, 2.0),
        "scalar": jnp.array(3.0),
    }
    state = tx.init(first)
    zeros = jax.tree.map(lambda _: jnp.array(0.0), first)
    chex.assert_trees_all_equal(state, LimitNormGrowthState(zeros))
    updates, state = tx.update(first, state)
    chex.assert_trees_all_equal(updates, first)
    chex.assert_trees_all_close(state.norm, {"kernel": 1.0, "bias": 4.0, "scalar": 3.0})
    larger = {
        "kernel": first["kernel"] * 10,
        "bias": first["bias"],
        "scalar": first["scalar"] / 2,
    }
    updates, state = jax.jit(tx.update)(larger, state)
    chex.assert_trees_all_close(
        state.norm, {"kernel": LIMIT, "bias": 4.0, "scalar": 1.5}
    )
    chex.assert_trees_all_close(updates["kernel"], first["kernel"] * LIMIT)


def test_batch_elements_are_limited_separately():
    # The batch axis is the last one, as in MaxText's scanned layers.
    numbers = ApolloDimensionNumbers(0, 1)
    tx = limit_norm_growth(LIMIT, weight_dimension_numbers=numbers)
    gradient = jnp.ones((2, 2, 3))
    _, state = tx.update(gradient, tx.init(gradient))
    updates, state = tx.update(gradient * jnp.array([1.0, 5.0, 0.1]), state)
    np.testing.assert_allclose(state.norm, [2.0, 2 * LIMIT, 0.2], rtol=1e-6)
    np.testing.assert_allclose(updates[0, 0], [1.0, LIMIT, 0.1], rtol=1e-6)


def test_matches_the_limiter_inside_scale_by_apollo():
    sizes = jnp.array([1, 9, 2, 0.1, 30])[:, None, None]
    grads = sizes * jax.random.normal(jax.random.key(0), (5, 8, 16))
    whole = scale_by_apollo(4, norm_growth_limit=LIMIT)
    unlimited = scale_by_apollo(4, norm_growth_limit=None)
    alone = limit_norm_growth(LIMIT)
    states = [tx.init(grads[0]) for tx in (whole, unlimited, alone)]
    for t, gradient in enumerate(grads, start=1):
        expected, states[0] = whole.update(gradient, states[0])
        direction, states[1] = unlimited.update(gradient, states[1])
        # scale_by_apollo corrects the bias after its limiter, so the limiter outside
        # gets updates without the correction.
        correction = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        limited, states[2] = alone.update(direction / correction, states[2])
        np.testing.assert_allclose(limited * correction, expected, rtol=1e-5)
        np.testing.assert_allclose(states[2].norm, states[0].norm, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_updates_keep_their_dtype_and_norms_are_float32(dtype):
    tx = limit_norm_growth(LIMIT)
    gradient = jnp.ones((4, 4), dtype)
    state = tx.init(gradient)
    updates, new = tx.update(gradient, state, params=None, value=1.0)
    assert updates.dtype == dtype
    assert state.norm.dtype == new.norm.dtype == jnp.float32
