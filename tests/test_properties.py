"""Properties of the update that hold for any gradient, shape and scale type."""

import functools
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apollo_optax import scale_by_apollo
from apollo_optax._limiter import limit_norm

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Few shapes, because each one is compiled anew.
SHAPES = st.sampled_from([(4, 4), (4, 9), (9, 4), (2, 5), (5, 2)])
SEEDS = st.integers(0, 2**31 - 1)
# XLA flushes subnormal numbers to zero, and no norm is subnormal in practice.
NORMS = st.floats(0, 2.0**100, width=32, allow_subnormal=False)
SCALE_TYPES = st.sampled_from(["channel", "tensor"])


def gradients(shape, seed, steps=4):
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(steps, *shape))
    return jnp.asarray(directions * rng.lognormal(size=(steps, 1, 1)), jnp.float32)


@functools.cache
def compiled(**settings):
    tx = scale_by_apollo(**settings)

    def step(state, gradient):
        update, state = tx.update(gradient, state)
        return state, (update, state.norm)

    return jax.jit(lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads)[1])


def trajectory(grads, rank=2, **settings):
    """The stacked updates of a sequence of gradients, and the limiter's norms."""
    return compiled(rank=rank, **settings)(grads)


def identity(key, shape):
    return jnp.eye(*shape)


# Settings under which the update is that of Adam, channel by channel.
UNPROJECTED: Any = {"eps": 0.0, "norm_growth_limit": None, "projection": identity}


def channel_axis(shape):
    """The axis of the larger side, and the output axis of a square matrix."""
    return 1 if shape[0] <= shape[1] else 0


@pytest.mark.parametrize("on_device", [True, False], ids=["JAX arrays", "NumPy arrays"])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_update_takes_arrays_of_jax_and_numpy(jit, on_device):
    tx = scale_by_apollo(2)
    grads = {"kernel": gradients((4, 9), 0)[0], "bias": jnp.ones(3)}
    state = tx.init(grads)
    expected, expected_state = tx.update(grads, state)
    update = jax.jit(tx.update) if jit else tx.update
    arguments = (grads, state) if on_device else jax.device_get((grads, state))
    updates, new = update(*arguments)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    chex.assert_trees_all_close(new, expected_state, rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


@hypothesis.given(SHAPES, SEEDS, SCALE_TYPES, st.sampled_from([1e-3, 7.0, 1e4]))
def test_scale_invariance(shape, seed, scale_type, c):
    grads = gradients(shape, seed)
    expected, _ = trajectory(grads, scale_type=scale_type, eps=0.0)
    scaled, _ = trajectory(c * grads, scale_type=scale_type, eps=0.0)
    np.testing.assert_allclose(scaled, expected, rtol=2e-3, atol=1e-4)


@hypothesis.given(SHAPES, SEEDS, SCALE_TYPES)
def test_sign_symmetry(shape, seed, scale_type):
    grads = gradients(shape, seed)
    expected, _ = trajectory(grads, scale_type=scale_type)
    negated, _ = trajectory(-grads, scale_type=scale_type)
    np.testing.assert_array_equal(negated, -expected)


@hypothesis.given(SHAPES, SEEDS, SCALE_TYPES, st.randoms(use_true_random=False))
def test_permuting_channels_commutes(shape, seed, scale_type, random):
    grads = gradients(shape, seed)
    axis = channel_axis(shape)
    order = list(range(shape[axis]))
    random.shuffle(order)

    def permute(stacked):
        return jnp.take(stacked, jnp.array(order), axis + 1)

    permuted, _ = trajectory(permute(grads), scale_type=scale_type)
    updates, _ = trajectory(grads, scale_type=scale_type)
    expected = permute(updates)
    np.testing.assert_allclose(permuted, expected, rtol=1e-4, atol=1e-5)


@hypothesis.given(SHAPES, SEEDS, SCALE_TYPES)
def test_update_rescales_the_gradient(shape, seed, scale_type):
    grads = gradients(shape, seed)
    updates, _ = trajectory(grads, scale_type=scale_type)
    ratios = np.asarray(updates / grads)
    assert np.all(ratios > 0)
    spread_over = (1, 2) if scale_type == "tensor" else (2 - channel_axis(shape),)
    center = ratios.mean(axis=spread_over, keepdims=True)
    np.testing.assert_allclose(ratios / center, 1, rtol=1e-5)


@hypothesis.given(SHAPES, SEEDS, SCALE_TYPES, st.sampled_from([1.0, 1.01, 2.0]))
def test_limiter_bounds_the_growth_of_the_norm(shape, seed, scale_type, limit):
    grads = gradients(shape, seed)
    results = trajectory(grads, scale_type=scale_type, norm_growth_limit=limit)
    updates, norms = (np.asarray(x, np.float64) for x in results)
    assert np.all(norms[1:] <= limit * (norms[:-1] + 1e-8) * (1 + 1e-6))
    # The state holds the norm of the update before the bias correction.
    steps = np.arange(1, len(norms) + 1)
    correction = np.sqrt(1 - 0.999**steps) / (1 - 0.9**steps)
    actual = np.linalg.norm(updates, axis=(1, 2)) / correction
    np.testing.assert_allclose(actual, norms, rtol=1e-4)


@hypothesis.given(NORMS, NORMS, st.floats(1, 100, width=32))
def test_limit_norm_bounds_any_norm(norm, previous, limit):
    factor, new = limit_norm(jnp.float32(norm), jnp.float32(previous), limit)
    assert 0 <= factor <= 1 + 1e-6
    if previous > 0:
        assert norm * float(factor) <= limit * (previous + 1e-8) * (1 + 1e-5)
    assert (new == 0) == (norm * float(factor) == 0 and previous == 0)


@hypothesis.given(SHAPES, SEEDS)
def test_identity_projection_gives_channel_wise_adam(shape, seed):
    """With P = I, eps = 0 and no limiter, a channel has the norm of Adam's update."""
    grads = gradients(shape, seed)
    updates, _ = trajectory(grads, rank=min(shape), **UNPROJECTED)
    adam = optax.scale_by_adam(eps=0.0)

    def step(state, gradient):
        update, state = adam.update(gradient, state)
        return state, update

    _, adams = jax.lax.scan(step, adam.init(grads[0]), grads)
    contracted = 2 - channel_axis(shape)

    def norms(stacked):
        return jnp.linalg.norm(stacked, axis=contracted, keepdims=True)

    expected = grads * norms(adams) / (norms(grads) + 1e-8)
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-6)


def test_identity_projection_gives_channel_wise_adam_in_float64():
    with jax.enable_x64(True):
        grads = gradients((4, 9), 3).astype(jnp.float64)
        updates, _ = trajectory(grads, rank=4, **UNPROJECTED)
        mu = nu = 0.0
        for t, gradient in enumerate(np.asarray(grads), start=1):
            mu, nu = 0.9 * mu + 0.1 * gradient, 0.999 * nu + 0.001 * gradient**2
            adam = mu / (1 - 0.9**t) / np.sqrt(nu / (1 - 0.999**t))
            factors = np.linalg.norm(adam, axis=0) / np.linalg.norm(gradient, axis=0)
            expected = gradient * factors
            np.testing.assert_allclose(updates[t - 1], expected, rtol=1e-6)


@pytest.mark.parametrize(("rank", "tolerance"), [(32, 0.1), (128, 0.05)])
def test_factors_shrink_with_the_square_root_of_the_rank(rank, tolerance):
    """At rank r they are about sqrt(r / m) of the full-rank ones, for m contracted."""
    m, n = 256, 512
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(size=(10, m, n)), jnp.float32)
    full, _ = trajectory(grads, rank=m, norm_growth_limit=None, projection=identity)
    low, _ = trajectory(grads, rank=rank, norm_growth_limit=None)
    ratios = low[-1] / full[-1]
    expected = np.sqrt(rank / m)
    assert abs(float(jnp.mean(ratios)) / expected - 1) < tolerance
    assert float(jnp.std(ratios)) < 0.3 * expected
