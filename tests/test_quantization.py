"""Weights of few bits: what is kept of them, and what stochastic rounding does to updates."""

import dataclasses
import functools
import math
import re
from typing import Any

import chex
import flax.serialization
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import _projection, _quantization, _rounding
from apollo_optax._quantization import QuantizedArray, apply_updates_stochastic, dequantize, quantize

hypothesis.settings.register_profile("apollo", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.load_profile("apollo")

pytestmark = pytest.mark.usefixtures("quick_compilation")

KINDS = [AxisType.Auto, AxisType.Explicit]
# As users compile, whatever the fixture above says.
optimized: Any = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False},
)


def normal(seed, shape, dtype: Any = np.float32):
    """In NumPy, as most arrays here: what JAX computes for a test it compiles first."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def codes_of(quantized, *, filled=False):
    """The code of each weight, or of all that are stored, out of the blocks."""
    first, extra = quantized.ndim + quantized.axis, quantized.qvalue.ndim - quantized.ndim
    shape = list(quantized.qvalue.shape)
    shape[first : first + extra + 1] = [math.prod(shape[first : first + extra + 1])]
    codes = np.asarray(quantized.qvalue, np.int32).reshape(shape)
    return codes if filled else np.take(codes, range(quantized.shape[quantized.axis]), quantized.axis)


def by_weight(part, quantized):
    """What each weight's group has, float64."""
    n = quantized.shape[quantized.axis]
    part = np.asarray(part).astype(np.float64)
    return np.take(np.repeat(part, quantized.group_size, quantized.axis), range(n), quantized.axis)


def steps_of(quantized):
    """The step at each weight."""
    return by_weight(quantized.scale, quantized)


def values_of(quantized):
    """What dequantize should say before it casts, computed by NumPy in float64."""
    return (codes_of(quantized) - by_weight(quantized.zero_point, quantized)) * steps_of(quantized)


def assert_bernoulli(draws, exact, step):
    """Whether draws, along the first axis, are `exact` rounded stochastically to a grid of `step`."""
    draws, step = np.asarray(draws, np.float64), np.broadcast_to(step, exact.shape)
    count, tiny = len(draws), 1e-6 * step
    assert np.all(np.abs(draws - exact) < step + tiny)
    lower = draws.min(0)
    assert np.all((np.abs(draws - lower) < tiny) | (np.abs(draws - lower - step) < tiny))
    # Where all draws are the same, the weight is on the grid or all but on it.
    part = np.clip((exact - lower) / step, 0, 1)
    variance = part * (1 - part)
    error = np.abs(draws.mean(0) - exact) / step
    assert np.all(error <= 5 * np.sqrt(variance / count) + 2**-16)
    # The fourth central moment of a Bernoulli variable is v(1 - 3v).
    spread = np.sqrt(np.maximum(variance * (1 - 4 * variance), 1 / count) / count)
    assert np.all(np.abs(draws.var(0) / step**2 - variance) <= 5 * spread + 2**-15)


# The format.


@pytest.mark.parametrize(
    ("shape", "axis", "codes", "scales", "seed"),
    [
        ((11008, 8), None, (86, 16, 8, 8), (86, 8), None),
        ((8, 11008), -1, (8, 86, 128), (8, 86), 0),
        ((5461, 8), None, (43, 16, 8, 8), (43, 8), 0),
        ((8, 5461), 1, (8, 43, 128), (8, 43), None),
        ((3, 300, 8), None, (3, 3, 16, 8, 8), (3, 3, 8), 0),
        ((3, 8, 300), 2, (3, 8, 3, 128), (3, 8, 3), None),
        ((300, 3, 8), 0, (3, 16, 8, 3, 8), (3, 3, 8), None),
        ((100, 8), None, (1, 13, 8, 8), (1, 8), None),
        ((8, 100), -1, (8, 1, 100), (8, 1), None),
        ((130,), 0, (2, 128), (2,), 0),
        ((0, 8), None, (0, 1, 8, 8), (0, 8), 0),
        ((128, 0), None, (1, 16, 8, 0), (1, 0), None),
    ],
)
def test_shapes(shape, axis, codes, scales, seed):
    key = None if seed is None else jax.random.key(seed)
    array = normal(0, shape)
    quantized = quantize(array, axis=axis, key=key)
    assert (quantized.shape, quantized.ndim, quantized.size) == (shape, len(shape), array.size)
    assert quantized.qvalue.shape == codes
    assert quantized.scale.shape == quantized.zero_point.shape == scales
    assert (quantized.qvalue.dtype, quantized.scale.dtype) == (jnp.int8, jnp.bfloat16)
    assert quantized.zero_point.dtype == jnp.int8
    expected_axis = -2 if axis is None else axis if axis < 0 else axis - len(shape)
    assert (quantized.axis, quantized.group_size) == (expected_axis, 128)
    assert quantized.nbytes == np.prod(codes) + 3 * np.prod(scales)
    values = np.asarray(dequantize(quantized))
    np.testing.assert_array_equal(values, values_of(quantized).astype(np.float32))
    assert np.all(np.abs(values - array) <= (0.500001 if key is None else 1) * steps_of(quantized))


@pytest.mark.parametrize(
    "shape", [(4096, 11008), (11008, 4096), (2048, 5461), (5461, 2048), (32, 5461, 2048)]
)
def test_memory(shape):
    abstract: Any = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    assert abstract.shape == shape
    assert abstract.nbytes <= 1.04 * abstract.size
    back: Any = jax.eval_shape(dequantize, {"kernel": abstract})["kernel"]
    assert (back.shape, back.dtype) == (shape, jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_come_back(dtype):
    quantized = quantize(normal(0, (300, 8), dtype))
    assert quantized.dtype == dtype
    values = dequantize(quantized)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, values_of(quantized).astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("seed", [None, 0])
def test_the_largest_numbers_stay_finite(dtype, seed):
    """Though the code of one may stand for a number that its dtype has not."""
    largest = float(jnp.finfo(dtype).max)
    array = jnp.asarray(np.random.default_rng(0).uniform(-largest, largest, (256, 64)), dtype)
    array = array.at[:128, 0].set(jnp.finfo(dtype).max).at[128:, 1].set(jnp.finfo(dtype).min)
    quantized = quantize(array, key=None if seed is None else jax.random.key(seed))
    values = np.asarray(dequantize(quantized), np.float64)
    assert np.any(np.abs(values_of(quantized)) > largest)
    rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(values)  # Of the cast.
    assert np.all(np.abs(values - np.asarray(array, np.float64)) <= steps_of(quantized) + rounding)


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        array = normal(0, (130, 8), np.float64)
        quantized = quantize(array)
        values = np.asarray(dequantize(quantized))
        assert values.dtype == np.float64
        np.testing.assert_array_equal(values, values_of(quantized))
        assert np.all(np.abs(values - array) <= 0.5000001 * steps_of(quantized))
        # Below what float32 resolves beside the largest weight.
        update = np.zeros_like(array)
        update[0, 0] = 1e-12 * steps_of(quantized)[0, 0]
        moved = apply_updates_stochastic(quantized, update, jax.random.key(0))
        chex.assert_trees_all_equal(moved, quantized)
        array[0, 0] = 1e300
        assert np.isnan(dequantize(quantize(array))[0, 0])


@hypothesis.given(
    st.sampled_from([(5, 3), (130, 2)]),
    st.integers(0, 2**31 - 1),
    st.sampled_from([1e-38, 3e-37, 3e-36, 1e-30, 1.0, 7e4, 1e37]),
    st.sampled_from(["normal", "positive", "negative", "outlier", "shifted", "sparse", "zero"]),
    st.booleans(),
)
def test_error_bounds(shape, seed, magnitude, kind, is_stochastic):
    rng = np.random.default_rng(seed)
    array = rng.normal(size=shape)
    array = {
        "normal": array,
        "positive": np.abs(array),
        "negative": -np.abs(array),
        "outlier": np.where(np.arange(shape[1]) == 0, -30, array),
        "shifted": array + 5,
        "sparse": np.where(rng.random(shape) < 0.5, 0, array),
        "zero": 0 * array,
    }[kind]
    array = np.float32(magnitude * array)
    array[np.abs(array) < np.finfo(np.float32).tiny] = 0  # Devices flush them.
    quantized = quantize(array, key=jax.random.key(seed) if is_stochastic else None)
    values, steps = values_of(quantized), steps_of(quantized)
    assert np.all(np.abs(values - array) <= (1 if is_stochastic else 0.5) * steps * (1 + 1e-5))
    np.testing.assert_array_equal(values[array == 0], 0)
    # Steps are no larger than bfloat16 and a step for the zero point make them.
    span = np.maximum(array.max(0), 0) - np.minimum(array.min(0), 0)
    least = float(jnp.finfo(jnp.bfloat16).tiny)
    assert np.all(steps.min(0) <= np.maximum(np.float64(span) / 253.9 * (1 + 2**-7), least))
    if shape[0] <= 128:
        # And the codes reach both ends of the range, or all but.
        used = np.ptp(np.concatenate([codes_of(quantized), quantized.zero_point]), axis=0)
        assert np.all((used >= 250) | (steps.min(0) == least))


def test_zeros_and_numbers_as_small():
    tiny = np.finfo(np.float32).tiny
    zeros = np.zeros((300, 8), np.float32)
    array = zeros.copy()
    array[0, :4] = [0.0, tiny, -3 * tiny, 300 * tiny]
    for key in (None, jax.random.key(0)):
        quantized = quantize(array, key=key)
        assert np.all(np.asarray(quantized.scale) >= tiny)
        values = np.asarray(dequantize(quantized))
        np.testing.assert_array_equal(values[1:], 0)
        np.testing.assert_array_equal(values[0, :3], array[0, :3])
        np.testing.assert_allclose(values[0, 3], 300 * tiny, rtol=1e-2)
    # And weights that start at zero can leave it.
    update = normal(0, (300, 8))
    moved = apply_updates_stochastic(quantize(zeros), update, jax.random.key(0))
    np.testing.assert_allclose(dequantize(moved), update, atol=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_with_what_is_not_finite_is_nan(bad):
    array, update = normal(0, (300, 8)), np.zeros((300, 8), np.float32)
    healthy = quantize(array)
    expected = np.zeros((300, 8), bool)
    expected[:128, 1] = True
    array[3, 1] = bad
    quantized = quantize(array)
    np.testing.assert_array_equal(np.isnan(dequantize(quantized)), expected)
    # It does not recover by itself, nor spread.
    moved = apply_updates_stochastic(quantized, update, jax.random.key(0))
    np.testing.assert_array_equal(np.isnan(dequantize(moved)), expected)
    update[3, 1] = bad
    moved = apply_updates_stochastic(healthy, update, jax.random.key(0))
    np.testing.assert_array_equal(np.isnan(dequantize(moved)), expected)


# Stochastic rounding.


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("axis", [-2, -1])
def test_int8_is_unbiased(axis):
    array = normal(1, (40, 6))
    nearest = quantize(array, axis=axis, group_size=16)
    draws = jax.jit(jax.vmap(lambda key: dequantize(quantize(array, axis=axis, group_size=16, key=key))))(
        keys(4000)
    )
    assert_bernoulli(draws, array.astype(np.float64), steps_of(nearest))


def test_int8_updates_are_unbiased():
    quantized = quantize(normal(1, (40, 6)), group_size=16)
    update = 0.3 * steps_of(quantized) * normal(2, (40, 6))
    update = np.where(np.abs(values_of(quantized)) < 0.5, update, 0).astype(np.float32)  # Kept grids.

    @jax.jit
    @jax.vmap
    def draw(key):
        moved = apply_updates_stochastic(quantized, update, key)
        return dequantize(moved), moved.scale

    draws, scales = draw(keys(4000))
    np.testing.assert_array_equal(scales[0], quantized.scale)
    assert_bernoulli(draws, values_of(quantized) + update.astype(np.float64), steps_of(quantized))


def test_bfloat16_updates_are_unbiased():
    params, update = normal(3, (16, 8), jnp.bfloat16), 0.003 * normal(4, (16, 8))
    draws = jax.jit(jax.vmap(lambda key: apply_updates_stochastic(params, update, key)))(keys(4000))
    exact = (params.astype(np.float32) + update).astype(np.float64)
    step = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    assert_bernoulli(draws, exact, step)


def test_bfloat16_of_both_signs_and_all_sizes():
    exact = np.concatenate([normal(0, 500) * 10.0**e for e in (-35, -3, 0, 3, 35)]).astype(np.float32)
    zeros = np.zeros(exact.shape, jnp.bfloat16)
    values = np.asarray(apply_updates_stochastic(zeros, exact, jax.random.key(0)), np.float32)
    assert np.all(np.abs(values - exact) < 2.0**-7 * np.abs(exact))
    assert np.array_equal(np.sign(values), np.sign(exact))
    # What bfloat16 can hold is held, whatever the draw.
    held = exact.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(
        np.asarray(apply_updates_stochastic(zeros, held, jax.random.key(0)), np.float32), held
    )


def test_bfloat16_that_is_not_finite_passes():
    params = np.array([np.inf, -np.inf, np.nan, 1, 1, 1], jnp.bfloat16)
    nan = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]  # A carry would make it -0.
    update = np.array([1, 1, 1, np.inf, -np.inf, nan], np.float32)
    moved = apply_updates_stochastic(params, update, jax.random.key(0))
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(moved, np.float32), [np.inf, -np.inf, np.nan, np.inf, -np.inf, np.nan]
    )


def test_what_is_on_the_grid_stays():
    """All codes, at zero points and scales of all sizes, with the draws that push hardest."""
    rng, count = np.random.default_rng(0), 2000
    scale = rng.integers(128, 256, count) * 2.0 ** rng.integers(-133, 112, count)
    zero_point = rng.integers(-128, 128, count)
    grid = _rounding.Grid(*(jnp.asarray(x, jnp.float32) for x in (scale, zero_point)))
    codes = np.tile(np.arange(-128, 128, dtype=np.int8)[:, None], (1, count))
    again = optimized(lambda grid, codes, bits: grid.codes(grid.values(codes), bits))
    for bits in (0, 1, 2**15, 2**16 - 1):
        np.testing.assert_array_equal(again(grid, codes, np.full(codes.shape, bits, np.uint16)), codes)


def test_an_update_of_zero_changes_nothing():
    rng = np.random.default_rng(0)
    codes = rng.permuted(np.tile(np.arange(-128, 128, dtype=np.int8)[:, None], (1, 2000)), axis=0)
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
        moved = apply(quantized, np.zeros(codes.shape, np.float32), jax.random.key(seed))
        chex.assert_trees_all_equal(moved, quantized)


def test_a_grid_stays_while_it_serves():
    quantized = quantize(normal(0, (300, 8)))
    moving = np.random.default_rng(0).random((300, 8)) < 0.1
    # Toward zero, so that nothing leaves the range.
    update = np.where(moving, -0.4 * np.asarray(dequantize(quantized)), 0).astype(np.float32)
    moved = apply_updates_stochastic(quantized, update, jax.random.key(0))
    chex.assert_trees_all_equal((moved.scale, moved.zero_point), (quantized.scale, quantized.zero_point))
    before, after = codes_of(quantized), codes_of(moved)
    np.testing.assert_array_equal(after[~moving], before[~moving])
    assert np.any(after[moving] != before[moving])


@pytest.mark.parametrize("factor", [0.55, 0.4, 0.01, 1.5, 1e4])
def test_a_grid_follows_its_weights(factor):
    quantized = jax.device_get(quantize(normal(0, (300, 8))))  # The last group has 44 rows.
    values = np.asarray(dequantize(quantized))
    update = (factor - 1) * values
    update[128:256] = 0
    moved = jax.device_get(apply_updates_stochastic(quantized, update, jax.random.key(0)))
    before, after = (x.scale.astype(np.float32) for x in (quantized, moved))
    if factor == 0.55:
        np.testing.assert_array_equal(after, before)
    else:
        np.testing.assert_allclose(after[::2], factor * before[::2], rtol=0.02)
    assert np.all(np.abs(np.asarray(dequantize(moved)) - (values + update)) <= 1.00001 * steps_of(moved))
    # The group between them is none of their business.
    for part in ("qvalue", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(moved, part)[1], getattr(quantized, part)[1])
    # What fills up the last group stays zero.
    filling = codes_of(moved, filled=True)[300:]
    np.testing.assert_array_equal(filling, np.broadcast_to(moved.zero_point[-1], filling.shape))


def test_a_scale_in_float32_stays_there():
    quantized, update = quantize(normal(0, (300, 8))), 0.02 * normal(1, (300, 8))
    wide = dataclasses.replace(quantized, scale=quantized.scale.astype(jnp.float32))
    moved, expected = (apply_updates_stochastic(x, update, jax.random.key(0)) for x in (wide, quantized))
    is_kept = np.asarray(moved.scale) == np.asarray(wide.scale)
    assert is_kept.any()
    assert not is_kept.all()
    assert moved.scale.dtype == jnp.float32
    np.testing.assert_array_equal(moved.scale, np.asarray(expected.scale).astype(np.float32))
    chex.assert_trees_all_equal((moved.qvalue, moved.zero_point), (expected.qvalue, expected.zero_point))
    np.testing.assert_array_equal(dequantize(moved), dequantize(expected))


def test_small_updates_are_not_lost():
    """A thousand updates of a hundredth of a step are ten steps, where nearest rounding stands still."""
    array = normal(0, (128, 16))
    array[:2] = [[5.0], [-5.0]]  # The two that set the grid.
    int8, bfloat16 = quantize(array), jnp.ones((128, 16), jnp.bfloat16)
    update = (0.01 * steps_of(int8)).astype(np.float32)
    update[:2] = 0
    updates = {"int8": update, "bfloat16": np.full((128, 16), 0.01 * 2**-7, np.float32)}

    def stochastic(step, params):
        return apply_updates_stochastic(params, updates, jax.random.fold_in(jax.random.key(0), step))

    def nearest(step, params):
        return {
            "int8": quantize(dequantize(params["int8"]) + updates["int8"]),
            "bfloat16": optax.apply_updates(params["bfloat16"], updates["bfloat16"]),
        }

    @jax.jit
    def run(params):
        return [jax.lax.fori_loop(0, 1000, step, params) for step in (stochastic, nearest)]

    moved, stuck = run({"int8": int8, "bfloat16": bfloat16})
    error = 5 * np.sqrt(10 / (126 * 16))
    by = (values_of(moved["int8"]) - values_of(int8)) / steps_of(int8)
    assert abs(by[2:].mean() - 10) < error
    by = (np.asarray(moved["bfloat16"], np.float64) - 1) / 2**-7
    assert abs(by.mean() - 10) < error
    chex.assert_trees_all_equal(stuck["bfloat16"], bfloat16)
    by = (values_of(stuck["int8"]) - values_of(int8)) / steps_of(int8)
    assert abs(by.mean()) < 0.1


# What a draw is a function of.


def layers():
    array = normal(0, (4, 40, 8))
    params = {
        "int8": quantize(array, group_size=16),
        "bfloat16": jnp.asarray(array.astype(jnp.bfloat16)),
        "gain": jnp.asarray(normal(2, (4,), jnp.bfloat16)),
    }
    return params, {name: 0.003 * normal(3 + i, x.shape) for i, (name, x) in enumerate(params.items())}


def test_layer_by_layer_is_all_at_once():
    params, updates = layers()
    for key in (jax.random.key(0), jax.random.key(0, impl="rbg")):
        whole = apply_updates_stochastic(params, updates, key)
        for before, after in zip(dequantize(params).values(), dequantize(whole).values(), strict=True):
            assert not np.array_equal(before, after)
        for layer, index in ((0, None), (2, 2)):
            part, expected = jax.tree.map(
                lambda x: np.asarray(x)[layer : layer + 1],  # noqa: B023
                ((params, updates), whole),
            )
            chex.assert_trees_all_equal(apply_updates_stochastic(*part, key, batch_index=index), expected)

    def one(params, layer):
        at = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=layer, slice_size=1)
        new = apply_updates_stochastic(
            jax.tree.map(at, params), jax.tree.map(at, updates), key, batch_index=layer
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=layer, axis=0)
        return jax.tree.map(put, params, new), None

    scanned, _ = jax.jit(lambda params: jax.lax.scan(one, params, np.arange(4)))(params)
    chex.assert_trees_all_equal(scanned, whole)


def test_neither_the_compiler_nor_donation_changes_anything():
    params, updates = ({name: tree[name] for name in ("int8", "gain")} for tree in layers())
    expected = apply_updates_stochastic(params, updates, jax.random.key(0))
    step = optimized(apply_updates_stochastic, donate_argnums=0)
    chex.assert_trees_all_equal(step(params, updates, jax.random.key(0)), expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_draws_depend_on_key_leaf_and_layer():
    one = {name: np.ones((4, 64), jnp.bfloat16) for name in ("a", "b")}
    half = {name: np.full((4, 64), 2.0**-8, np.float32) for name in one}
    moved = apply_updates_stochastic(one, half, jax.random.key(0))
    chex.assert_trees_all_equal(apply_updates_stochastic(one, half, jax.random.key(0)), moved)
    other = apply_updates_stochastic(one, half, jax.random.key(1))
    later = apply_updates_stochastic(one, half, jax.random.key(0), batch_index=4)
    rows = [
        tuple(row)
        for tree in (moved, other, later)
        for x in tree.values()
        for row in np.asarray(x, np.float32)
    ]
    assert len(set(rows)) == 24
    # Its neighbours in the tree do not matter, nor what the tree is made of.
    alone = apply_updates_stochastic({"b": one["b"]}, {"b": half["b"]}, jax.random.key(0))
    chex.assert_trees_all_equal(alone["b"], moved["b"])
    np.testing.assert_array_equal(
        apply_updates_stochastic([one["a"]], [half["a"]], jax.random.key(0))[0],
        apply_updates_stochastic({"0": one["a"]}, {"0": half["a"]}, jax.random.key(0))["0"],
    )
    # A QuantizedArray is a leaf by its own name, not by those of its parts.
    quantized, update = quantize(normal(0, (4, 64))), 0.003 * normal(1, (4, 64))
    np.testing.assert_array_equal(
        apply_updates_stochastic({"b": quantized}, {"b": update}, jax.random.key(0))["b"].qvalue,
        _quantization._update_int8(
            quantized, update, jax.random.key(0), _projection.leaf_id(("b",)), 0
        ).qvalue,
    )


def test_raw_keys_are_keys():
    params, updates = layers()
    typed = apply_updates_stochastic(params, updates, jax.random.key(3))
    for raw in (jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3))):
        chex.assert_trees_all_equal(apply_updates_stochastic(params, updates, raw), typed)
        chex.assert_trees_all_equal(
            quantize(updates["int8"], key=raw), quantize(updates["int8"], key=jax.random.key(3))
        )
    with jax.default_prng_impl("rbg"):
        chex.assert_trees_all_equal(
            apply_updates_stochastic(params, updates, jax.random.PRNGKey(3)),
            apply_updates_stochastic(params, updates, jax.random.key(3, impl="rbg")),
        )


# Trees.


def test_other_leaves_are_as_optax_has_them():
    params = {
        "float32": normal(0, (4, 6)),
        "float16": normal(1, (4, 6), jnp.float16),
        "numpy": np.ones((4, 6), np.float32),
        "int": np.arange(3, dtype=np.int32),
        "scalar": jnp.float32(1),
        "python": 1.0,
        "nothing": None,
        "masked": optax.MaskedNode(),
    }
    updates = jax.tree.map(lambda x: np.full(np.shape(x), 0.3, np.float32), params)
    moved = apply_updates_stochastic(params, updates, jax.random.key(0))
    expected = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal_structs(moved, expected)
    chex.assert_trees_all_equal_dtypes(moved, expected)
    chex.assert_trees_all_equal(moved, expected)


def test_scalars_and_bare_leaves():
    one, up = jnp.bfloat16(1), jnp.float32(2**-8)
    draws = jax.jit(jax.vmap(lambda key: apply_updates_stochastic(one, up, key)))(keys(1000))
    assert abs(np.asarray(draws, np.float64).mean() - 1 - 2**-8) < 5 * 2**-8 / np.sqrt(1000)
    array = quantize(normal(0, (4, 64)))
    assert isinstance(apply_updates_stochastic(array, normal(1, (4, 64)), jax.random.key(0)), QuantizedArray)
    assert dequantize(array).shape == (4, 64)
    assert dequantize({"a": 1, "b": None, "c": [array]})["a"] == 1


def test_boxes_are_looked_through():
    array, update = normal(0, (4, 64)), 0.003 * normal(1, (4, 64))
    plain = {"w": array.astype(jnp.bfloat16), "q": quantize(array)}
    expected = apply_updates_stochastic(plain, {"w": update, "q": update}, jax.random.key(0))
    linen = jax.tree.map(
        lambda x: nn.Partitioned(x, names=(None, None)),
        plain,
        is_leaf=lambda x: isinstance(x, QuantizedArray),
    )
    variables = nnx.State({"w": nnx.Param(plain["w"]), "q": nnx.Param(plain["q"])})
    for boxed in (linen, variables):
        boxed_updates = jax.tree.map(lambda _: update, dequantize(boxed))
        for updates in (boxed_updates, {"w": update, "q": update}):
            moved = apply_updates_stochastic(boxed, updates, jax.random.key(0))
            chex.assert_trees_all_equal_structs(moved, boxed)
            chex.assert_trees_all_equal(jax.tree.leaves(moved), jax.tree.leaves(expected))


def test_it_is_a_pytree():
    array = normal(0, (4, 40, 8))
    stack = quantize(array, group_size=16)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"w": stack})]
    assert names == ["['w'].qvalue", "['w'].scale", "['w'].zero_point"]
    chex.assert_trees_all_equal(jax.jit(lambda x: x)(stack), stack)
    chex.assert_trees_all_equal(jax.tree.unflatten(jax.tree.structure(stack), jax.tree.leaves(stack)), stack)
    values = dequantize(stack)
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, dequantize(layer)), 0, stack)
    np.testing.assert_array_equal(scanned, values)
    np.testing.assert_array_equal(jax.vmap(dequantize)(stack), values)
    np.testing.assert_array_equal(jax.jit(dequantize)({"w": stack})["w"], values)
    for layer in range(3):
        one = jax.tree.map(lambda x: np.asarray(x)[layer], stack)  # noqa: B023
        assert one.shape == (40, 8)
        np.testing.assert_array_equal(dequantize(one), values[layer])
        chex.assert_trees_all_equal(one, quantize(array[layer], group_size=16))


def test_checkpoints(tmp_path):
    params, updates = layers()
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params)
        restored: Any = checkpointer.restore(tmp_path / "params", abstract)
    chex.assert_trees_all_equal_structs(restored, params)
    chex.assert_trees_all_equal(restored, params)
    leaves, structure = jax.tree.flatten(params)
    held: Any = flax.serialization.from_bytes(leaves, flax.serialization.to_bytes(leaves))
    arrays = jax.tree.unflatten(structure, held)  # Of NumPy.
    assert isinstance(arrays["int8"].scale, np.ndarray)
    chex.assert_trees_all_equal(
        apply_updates_stochastic(arrays, updates, jax.random.key(0)),
        apply_updates_stochastic(params, updates, jax.random.key(0)),
    )


# Meshes.


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "spec", "axis"),
    [
        ((128, 64), P(None, "model"), -2),
        ((256, 64), P("data"), -2),  # A group each.
        ((256, 64), P("model"), -1),  # Half a group each.
        ((11008, 8), P("data", "model"), -2),
        ((11008, 8), P("model", "data"), -2),  # Neither fits.
        ((11008, 8), P("model"), -1),
        ((11008, 256), P("model", "data"), -1),
        ((2, 256, 64), P("data", "model"), -1),
        ((2, 128, 64), P("data", None, "model"), -2),
    ],
)
def test_the_default_axis_is_one_whose_groups_are_whole(kind, shape, spec, axis):
    placed = jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh_of(kind), spec))
    assert _quantization._default_axis(placed, 128) == axis
    if kind == AxisType.Explicit:
        seen = []
        jax.eval_shape(lambda x: seen.append(_quantization._default_axis(x, 128)), placed)
        assert seen == [axis]


@pytest.mark.parametrize(
    ("kind", "shape", "spec", "codes_spec", "transform"),
    [
        (AxisType.Auto, (4, 64, 8), P("data", "model"), P("data", "model"), jax.jit),
        (
            AxisType.Explicit,
            (4, 64, 8),
            P(None, "model", "data"),
            P(None, "model", None, None, "data"),
            jax.jit,
        ),
        (AxisType.Explicit, (40, 40), P("model"), P("model"), lambda apply: apply),
    ],
    ids=["automatic", "explicit", "explicit, eager"],
)
def test_a_mesh_changes_nothing(kind, shape, spec, codes_spec, transform):
    mesh = mesh_of(kind)
    sharding, codes_sharding = NamedSharding(mesh, spec), NamedSharding(mesh, codes_spec)

    def assert_in_place(quantized):
        assert quantized.qvalue.sharding.is_equivalent_to(codes_sharding, quantized.qvalue.ndim)
        for leaf in (quantized.scale, quantized.zero_point):
            assert leaf.sharding.is_equivalent_to(sharding, len(shape))

    array, update = normal(0, shape), 0.01 * normal(1, shape)
    placed, bfloat16, placed_update = jax.device_put((array, array.astype(jnp.bfloat16), update), sharding)
    quantized = quantize(placed, group_size=16, key=jax.random.key(0))
    assert quantized.axis == (-1 if spec == P("model") else -2)
    expected = quantize(array, axis=quantized.axis, group_size=16, key=jax.random.key(0))
    chex.assert_trees_all_equal(jax.device_get(quantized), jax.device_get(expected))
    assert_in_place(quantized)
    assert dequantize(quantized).sharding.is_equivalent_to(sharding, len(shape))
    params = {"int8": quantized, "bfloat16": bfloat16}
    updates = {"int8": placed_update, "bfloat16": placed_update}
    with jax.set_mesh(mesh):
        moved = transform(apply_updates_stochastic)(params, updates, jax.random.key(1))
    assert_in_place(moved["int8"])
    assert moved["bfloat16"].sharding.is_equivalent_to(sharding, len(shape))
    alone = jax.device_get((params, updates))
    expected = apply_updates_stochastic(*alone, jax.random.key(1))
    chex.assert_trees_all_equal(jax.device_get(moved), jax.device_get(expected))


# Errors.


@pytest.mark.parametrize(
    ("array", "settings", "error", "match"),
    [
        (np.arange(6).reshape(2, 3), {}, ValueError, "dtype int32; leave"),
        (np.ones((2, 3), np.complex64), {}, ValueError, "dtype complex64; leave"),
        (np.ones(3), {}, ValueError, r"shape (3,): vectors"),
        (np.ones(()), {"axis": 0}, ValueError, "one of the 0 axes of shape (), got 0"),
        (np.ones((2, 3)), {"axis": 2}, ValueError, "one of the 2 axes of shape (2, 3), got 2"),
        (np.ones((2, 3)), {"axis": -3}, ValueError, "got -3"),
        (np.ones((2, 3)), {"axis": 0.5}, TypeError, "axis must be an int or None, got 0.5"),
        (np.ones((2, 3)), {"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
        (
            np.ones((2, 3)),
            {"group_size": 100, "axis": -1},
            ValueError,
            "group_size must be a multiple of 8, such as 64 or 128, got 100",
        ),
        (
            np.ones((2, 3)),
            {"group_size": 1.5},
            TypeError,
            "group_size must be an int of at least 1, got 1.5",
        ),
        (np.ones((2, 3)), {"key": 0}, TypeError, "key must be one JAX key"),
        (np.ones((2, 3)), {"key": keys(2)}, TypeError, "key must be one JAX key"),
    ],
)
def test_quantize_refuses(array, settings, error, match):
    with pytest.raises(error, match=re.escape(match)):
        quantize(array, **settings)


def test_quantize_refuses_what_is_quantized():
    with pytest.raises(TypeError, match="QuantizedArray already"):
        quantize(quantize(jnp.ones((2, 3))))


def test_slices_across_groups_are_refused():
    quantized = quantize(normal(0, (300, 6)))
    for piece in (0, slice(1), slice(1, 3)):
        sliced = jax.tree.map(lambda x: np.asarray(x)[piece], quantized)  # noqa: B023
        with pytest.raises(ValueError, match="slice and stack along other axes only"):
            dequantize(sliced)
        with pytest.raises(ValueError, match="slice and stack along other axes only"):
            apply_updates_stochastic(sliced, np.ones((300, 6)), jax.random.key(0))


UPDATE = {"a": {"q": np.ones((4, 6))}, "b": np.ones(3)}


@pytest.mark.parametrize(
    ("updates", "match"),
    [
        ({"a": UPDATE["a"]}, "lack leaves that the parameters have: 'b'; pass an array for every"),
        (UPDATE | {"c": np.ones(3)}, "have leaves that the parameters lack: 'c'"),
        (UPDATE | {"b": None}, "lack leaves that the parameters have: 'b'"),
        (UPDATE | {"b": np.ones(())}, "'b' has shape (), but the parameter has shape (3,)"),
        (
            UPDATE | {"a": {"q": np.ones((6, 4))}},
            "'a/q' has shape (6, 4), but the parameter has shape (4, 6)",
        ),
        (UPDATE | {"a": {"q": quantize(np.ones((4, 6)))}}, "with respect to dequantize(params)"),
    ],
)
def test_updates_that_do_not_fit(updates, match):
    params = {"a": {"q": quantize(np.ones((4, 6)))}, "b": np.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match=re.escape(match)):
        apply_updates_stochastic(params, updates, jax.random.key(0))


@pytest.mark.parametrize(
    "key",
    [
        0,
        None,
        "seed",
        jnp.uint32(0),
        jnp.zeros(2),
        jnp.zeros(3, jnp.uint32),
        jax.random.split(jax.random.key(0)),
    ],
)
def test_what_is_no_key(key):
    with pytest.raises(TypeError, match="key must be one JAX key, from jax.random.key"):
        apply_updates_stochastic(np.ones(3), np.ones(3), key)


@pytest.mark.parametrize("index", [1.0, True, jnp.arange(2)])
def test_what_is_no_batch_index(index):
    with pytest.raises(TypeError, match="batch_index must be an integer"):
        apply_updates_stochastic(np.ones(3), np.ones(3), jax.random.key(0), batch_index=index)
