"""Stochastic rounding is unbiased, and grids are kept while they serve."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from apollo_optax import _rounding
from apollo_optax._quantization import (
    QuantizedArray,
    apply_updates_stochastic,
    dequantize,
    quantize,
)
from tests.quantized_values import (
    codes_of,
    keys,
    normal,
    optimized,
    steps_of,
    values_of,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def assert_bernoulli(draws, exact, step):
    """Asserts that `draws` are `exact`, rounded stochastically to a grid of `step`.

    Draws are along the first axis. Their mean and variance must be those of a Bernoulli
    variable.
    """
    draws, step = np.asarray(draws, np.float64), np.broadcast_to(step, exact.shape)
    count, tiny = len(draws), 1e-6 * step
    assert np.all(np.abs(draws - exact) < step + tiny)
    lower = draws.min(0)
    assert np.all(
        (np.abs(draws - lower) < tiny) | (np.abs(draws - lower - step) < tiny)
    )
    # If all draws are equal, the weight is on the grid or very close to it.
    part = np.clip((exact - lower) / step, 0, 1)
    variance = part * (1 - part)
    error = np.abs(draws.mean(0) - exact) / step
    assert np.all(error <= 5 * np.sqrt(variance / count) + 2**-16)
    # The fourth central moment of a Bernoulli variable is v(1 - 3v).
    spread = np.sqrt(np.maximum(variance * (1 - 4 * variance), 1 / count) / count)
    assert np.all(np.abs(draws.var(0) / step**2 - variance) <= 5 * spread + 2**-15)


@pytest.mark.parametrize("axis", [-2, -1])
def test_int8_is_unbiased(axis):
    array = normal(1, (40, 6))
    nearest = quantize(array, axis=axis, group_size=16)
    draws = jax.jit(
        jax.vmap(
            lambda key: dequantize(quantize(array, axis=axis, group_size=16, key=key))
        )
    )(keys(4000))
    assert_bernoulli(draws, array.astype(np.float64), steps_of(nearest))


def test_int8_updates_are_unbiased():
    quantized = quantize(normal(1, (40, 6)), group_size=16)
    update = 0.3 * steps_of(quantized) * normal(2, (40, 6))
    # Only small weights move, so that every group keeps its grid.
    update = np.where(np.abs(values_of(quantized)) < 0.5, update, 0).astype(np.float32)

    @jax.jit
    @jax.vmap
    def draw(key):
        moved = apply_updates_stochastic(quantized, update, key)
        return dequantize(moved), moved.scale

    draws, scales = draw(keys(4000))
    np.testing.assert_array_equal(scales[0], quantized.scale)
    assert_bernoulli(
        draws, values_of(quantized) + update.astype(np.float64), steps_of(quantized)
    )


def test_bfloat16_updates_are_unbiased():
    params, update = normal(3, (16, 8), jnp.bfloat16), 0.003 * normal(4, (16, 8))
    draws = jax.jit(
        jax.vmap(lambda key: apply_updates_stochastic(params, update, key))
    )(keys(4000))
    exact = (params.astype(np.float32) + update).astype(np.float64)
    step = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    assert_bernoulli(draws, exact, step)


def test_bfloat16_of_both_signs_and_all_sizes():
    exact = np.concatenate(
        [normal(0, 500) * 10.0**e for e in (-35, -3, 0, 3, 35)]
    ).astype(np.float32)
    zeros = np.zeros(exact.shape, jnp.bfloat16)
    values = np.asarray(
        apply_updates_stochastic(zeros, exact, jax.random.key(0)), np.float32
    )
    assert np.all(np.abs(values - exact) < 2.0**-7 * np.abs(exact))
    assert np.array_equal(np.sign(values), np.sign(exact))
    # Values that bfloat16 can represent stay, whatever the draw.
    held = exact.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(
        np.asarray(
            apply_updates_stochastic(zeros, held, jax.random.key(0)), np.float32
        ),
        held,
    )


def test_nonfinite_sums_in_bfloat16_stay_nonfinite():
    params = np.array([np.inf, -np.inf, np.nan, 1, 1, 1], jnp.bfloat16)
    # A carry would turn this NaN into -0.
    nan = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]
    update = np.array([1, 1, 1, np.inf, -np.inf, nan], np.float32)
    moved = apply_updates_stochastic(params, update, jax.random.key(0))
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(moved, np.float32),
        [np.inf, -np.inf, np.nan, np.inf, -np.inf, np.nan],
    )


def test_values_on_the_grid_stay():
    """All codes stay, for zero points and scales of all sizes and extreme draws."""
    rng, count = np.random.default_rng(0), 2000
    scale = rng.integers(128, 256, count) * 2.0 ** rng.integers(-133, 112, count)
    zero_point = rng.integers(-128, 128, count)
    grid = _rounding.Grid(*(jnp.asarray(x, jnp.float32) for x in (scale, zero_point)))
    codes = np.tile(np.arange(-128, 128, dtype=np.int8)[:, None], (1, count))
    again = optimized(lambda grid, codes, bits: grid.codes(grid.values(codes), bits))
    for bits in (0, 1, 2**15, 2**16 - 1):
        np.testing.assert_array_equal(
            again(grid, codes, np.full(codes.shape, bits, np.uint16)), codes
        )


def test_zero_update_changes_nothing():
    rng = np.random.default_rng(0)
    codes = rng.permuted(
        np.tile(np.arange(-128, 128, dtype=np.int8)[:, None], (1, 2000)), axis=0
    )
    scale = rng.integers(128, 256, (1, 2000)) * 2.0 ** rng.integers(-133, 112, 2000)
    quantized = QuantizedArray(
        qvalue=jnp.asarray(codes.reshape(1, 32, 8, 2000)),
        scale=jnp.asarray(scale.astype(jnp.bfloat16)),
        zero_point=jnp.asarray(rng.integers(-128, 128, (1, 2000)), jnp.int8),
        axis=-2,
        axis_size=256,
        group_size=256,
        dtype=jnp.dtype(jnp.float32),
    )
    apply = optimized(apply_updates_stochastic)
    for seed in range(3):
        moved = apply(
            quantized, np.zeros(codes.shape, np.float32), jax.random.key(seed)
        )
        chex.assert_trees_all_equal(moved, quantized)


def test_grid_is_kept_while_weights_fit_it():
    quantized = quantize(normal(0, (300, 8)))
    moving = np.random.default_rng(0).random((300, 8)) < 0.1
    # Move weights toward zero, so that none leaves the range.
    update = np.where(moving, -0.4 * np.asarray(dequantize(quantized)), 0).astype(
        np.float32
    )
    moved = apply_updates_stochastic(quantized, update, jax.random.key(0))
    chex.assert_trees_all_equal(
        (moved.scale, moved.zero_point), (quantized.scale, quantized.zero_point)
    )
    before, after = codes_of(quantized), codes_of(moved)
    np.testing.assert_array_equal(after[~moving], before[~moving])
    assert np.any(after[moving] != before[moving])


@pytest.mark.parametrize("factor", [0.55, 0.4, 0.01, 1.5, 1e4])
def test_grid_follows_its_weights(factor):
    # The last of the three groups has 44 rows.
    quantized = jax.device_get(quantize(normal(0, (300, 8))))
    values = np.asarray(dequantize(quantized))
    update = (factor - 1) * values
    update[128:256] = 0
    moved = jax.device_get(
        apply_updates_stochastic(quantized, update, jax.random.key(0))
    )
    before, after = (x.scale.astype(np.float32) for x in (quantized, moved))
    if factor == 0.55:
        np.testing.assert_array_equal(after, before)
    else:
        np.testing.assert_allclose(after[::2], factor * before[::2], rtol=0.02)
    assert np.all(
        np.abs(np.asarray(dequantize(moved)) - (values + update))
        <= 1.00001 * steps_of(moved)
    )
    # The group between them, whose weights do not move, stays the same.
    for part in ("qvalue", "scale", "zero_point"):
        np.testing.assert_array_equal(
            getattr(moved, part)[1], getattr(quantized, part)[1]
        )
    # The padding of the last group stays zero.
    padding = codes_of(moved, padded=True)[300:]
    np.testing.assert_array_equal(
        padding, np.broadcast_to(moved.zero_point[-1], padding.shape)
    )


def test_float32_scale_keeps_its_dtype():
    quantized, update = quantize(normal(0, (300, 8))), 0.02 * normal(1, (300, 8))
    wide = dataclasses.replace(quantized, scale=quantized.scale.astype(jnp.float32))
    moved, expected = (
        apply_updates_stochastic(x, update, jax.random.key(0))
        for x in (wide, quantized)
    )
    is_kept = np.asarray(moved.scale) == np.asarray(wide.scale)
    assert is_kept.any()
    assert not is_kept.all()
    assert moved.scale.dtype == jnp.float32
    np.testing.assert_array_equal(
        moved.scale, np.asarray(expected.scale).astype(np.float32)
    )
    chex.assert_trees_all_equal(
        (moved.qvalue, moved.zero_point), (expected.qvalue, expected.zero_point)
    )
    np.testing.assert_array_equal(dequantize(moved), dequantize(expected))


def test_small_updates_are_not_lost():
    """A thousand updates of 1/100 step move weights by ten steps.

    Rounding to nearest does not move them at all.
    """
    array = normal(0, (128, 16))
    array[:2] = [[5.0], [-5.0]]  # These two rows set the grid.
    int8, bfloat16 = quantize(array), jnp.ones((128, 16), jnp.bfloat16)
    update = (0.01 * steps_of(int8)).astype(np.float32)
    update[:2] = 0
    updates = {"int8": update, "bfloat16": np.full((128, 16), 0.01 * 2**-7, np.float32)}

    def stochastic(step, params):
        return apply_updates_stochastic(
            params, updates, jax.random.fold_in(jax.random.key(0), step)
        )

    def nearest(step, params):
        return {
            "int8": quantize(dequantize(params["int8"]) + updates["int8"]),
            "bfloat16": optax.apply_updates(params["bfloat16"], updates["bfloat16"]),
        }

    @jax.jit
    def run(params):
        return [
            jax.lax.fori_loop(0, 1000, step, params) for step in (stochastic, nearest)
        ]

    moved, stuck = run({"int8": int8, "bfloat16": bfloat16})
    error = 5 * np.sqrt(10 / (126 * 16))
    by = (values_of(moved["int8"]) - values_of(int8)) / steps_of(int8)
    assert abs(by[2:].mean() - 10) < error
    by = (np.asarray(moved["bfloat16"], np.float64) - 1) / 2**-7
    assert abs(by.mean() - 10) < error
    chex.assert_trees_all_equal(stuck["bfloat16"], bfloat16)
    by = (values_of(stuck["int8"]) - values_of(int8)) / steps_of(int8)
    assert abs(by.mean()) < 0.1
