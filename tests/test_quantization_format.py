"""The format of quantized arrays and the error of quantizing."""

from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_optax._quantization import apply_updates_stochastic, dequantize, quantize
from tests.quantized_values import codes_of, normal, steps_of, values_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
    assert (quantized.shape, quantized.ndim, quantized.size) == (
        shape,
        len(shape),
        array.size,
    )
    assert quantized.qvalue.shape == codes
    assert quantized.scale.shape == quantized.zero_point.shape == scales
    assert (quantized.qvalue.dtype, quantized.scale.dtype) == (jnp.int8, jnp.bfloat16)
    assert quantized.zero_point.dtype == jnp.int8
    expected_axis = -2 if axis is None else axis if axis < 0 else axis - len(shape)
    assert (quantized.axis, quantized.group_size) == (expected_axis, 128)
    assert quantized.nbytes == np.prod(codes) + 3 * np.prod(scales)
    values = np.asarray(dequantize(quantized))
    np.testing.assert_array_equal(values, values_of(quantized).astype(np.float32))
    assert np.all(
        np.abs(values - array) <= (0.500001 if key is None else 1) * steps_of(quantized)
    )


@pytest.mark.parametrize(
    "shape",
    [(4096, 11008), (11008, 4096), (2048, 5461), (5461, 2048), (32, 5461, 2048)],
)
def test_bytes_per_weight(shape):
    abstract: Any = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    assert abstract.shape == shape
    assert abstract.nbytes <= 1.04 * abstract.size
    back: Any = jax.eval_shape(dequantize, {"kernel": abstract})["kernel"]
    assert (back.shape, back.dtype) == (shape, jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dequantize_restores_the_dtype(dtype):
    quantized = quantize(normal(0, (300, 8), dtype))
    assert quantized.dtype == dtype
    values = dequantize(quantized)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, values_of(quantized).astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("seed", [None, 0])
def test_the_largest_numbers_stay_finite(dtype, seed):
    """The value of a code may exceed the largest finite number of the dtype."""
    largest = float(jnp.finfo(dtype).max)
    array = jnp.asarray(
        np.random.default_rng(0).uniform(-largest, largest, (256, 64)), dtype
    )
    array = (
        array.at[:128, 0]
        .set(jnp.finfo(dtype).max)
        .at[128:, 1]
        .set(jnp.finfo(dtype).min)
    )
    quantized = quantize(array, key=None if seed is None else jax.random.key(seed))
    values = np.asarray(dequantize(quantized), np.float64)
    assert np.any(np.abs(values_of(quantized)) > largest)
    # The cast rounds once more.
    rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(values)
    assert np.all(
        np.abs(values - np.asarray(array, np.float64)) <= steps_of(quantized) + rounding
    )


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        array = normal(0, (130, 8), np.float64)
        quantized = quantize(array)
        values = np.asarray(dequantize(quantized))
        assert values.dtype == np.float64
        np.testing.assert_array_equal(values, values_of(quantized))
        assert np.all(np.abs(values - array) <= 0.5000001 * steps_of(quantized))
        # float32 could not resolve this update beside the largest weight.
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
    st.sampled_from(
        ["normal", "positive", "negative", "outlier", "shifted", "sparse", "zero"]
    ),
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
    assert np.all(
        np.abs(values - array) <= (1 if is_stochastic else 0.5) * steps * (1 + 1e-5)
    )
    np.testing.assert_array_equal(values[array == 0], 0)
    # Steps are larger than 1/254 of the range only by rounding up to bfloat16.
    span = np.maximum(array.max(0), 0) - np.minimum(array.min(0), 0)
    least = float(jnp.finfo(jnp.bfloat16).tiny)
    assert np.all(
        steps.min(0) <= np.maximum(np.float64(span) / 253.9 * (1 + 2**-7), least)
    )
    if shape[0] <= 128:
        # The codes reach both ends of the range, or nearly so.
        used = np.ptp(
            np.concatenate([codes_of(quantized), quantized.zero_point]), axis=0
        )
        assert np.all((used >= 250) | (steps.min(0) == least))


def test_zeros_and_the_smallest_numbers():
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
    # Weights that start at zero can leave it.
    update = normal(0, (300, 8))
    moved = apply_updates_stochastic(quantize(zeros), update, jax.random.key(0))
    np.testing.assert_allclose(dequantize(moved), update, atol=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(300, 8), (300, 64)])
def test_a_group_with_a_nonfinite_value_is_nan(shape, bad):
    """XLA for CPUs leaves NaN out of maxima over larger arrays."""
    array, update = normal(0, shape), np.zeros(shape, np.float32)
    healthy = quantize(array)
    expected = np.zeros(shape, bool)
    expected[:128, 1] = True
    array[3, 1] = bad
    quantized = quantize(array)
    np.testing.assert_array_equal(np.isnan(dequantize(quantized)), expected)
    # NaN stays in its group, and does not spread to others.
    moved = apply_updates_stochastic(quantized, update, jax.random.key(0))
    np.testing.assert_array_equal(np.isnan(dequantize(moved)), expected)
    update[3, 1] = bad
    moved = apply_updates_stochastic(healthy, update, jax.random.key(0))
    np.testing.assert_array_equal(np.isnan(dequantize(moved)), expected)
