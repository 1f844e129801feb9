"""Arguments that quantization rejects."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_optax._quantization import apply_updates_stochastic, dequantize, quantize
from tests.quantized_values import keys, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    ("array", "settings", "error", "match"),
    [
        (np.arange(6).reshape(2, 3), {}, ValueError, "dtype int32; leave"),
        (np.ones((2, 3), np.complex64), {}, ValueError, "dtype complex64; leave"),
        (np.ones(3), {}, ValueError, r"shape (3,): vectors"),
        (np.ones(()), {"axis": 0}, ValueError, "one of the 0 axes of shape (), got 0"),
        (
            np.ones((2, 3)),
            {"axis": 2},
            ValueError,
            "one of the 2 axes of shape (2, 3), got 2",
        ),
        (np.ones((2, 3)), {"axis": -3}, ValueError, "got -3"),
        (
            np.ones((2, 3)),
            {"axis": 0.5},
            TypeError,
            "axis must be an int or None, got 0.5",
        ),
        (
            np.ones((2, 3)),
            {"group_size": 0},
            ValueError,
            "group_size must be at least 1, got 0",
        ),
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
def test_quantize_rejects_bad_arguments(array, settings, error, match):
    with pytest.raises(error, match=re.escape(match)):
        quantize(array, **settings)


def test_quantize_rejects_a_quantized_array():
    with pytest.raises(TypeError, match="QuantizedArray already"):
        quantize(quantize(jnp.ones((2, 3))))


def test_rejects_slices_across_groups():
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
        (
            {"a": UPDATE["a"]},
            "lack leaves that the parameters have: 'b'; pass an array for every",
        ),
        (UPDATE | {"c": np.ones(3)}, "have leaves that the parameters lack: 'c'"),
        (UPDATE | {"b": None}, "lack leaves that the parameters have: 'b'"),
        (
            UPDATE | {"b": np.ones(())},
            "'b' has shape (), but the parameter has shape (3,)",
        ),
        (
            UPDATE | {"a": {"q": np.ones((6, 4))}},
            "'a/q' has shape (6, 4), but the parameter has shape (4, 6)",
        ),
        (
            UPDATE | {"a": {"q": quantize(np.ones((4, 6)))}},
            "with respect to dequantize(params)",
        ),
    ],
)
def test_rejects_updates_that_do_not_fit(updates, match):
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
def test_rejects_non_key(key):
    with pytest.raises(TypeError, match="key must be one JAX key, from jax.random.key"):
        apply_updates_stochastic(np.ones(3), np.ones(3), key)


@pytest.mark.parametrize("index", [1.0, True, jnp.arange(2)])
def test_rejects_non_integer_batch_index(index):
    with pytest.raises(TypeError, match="batch_index must be an integer"):
        apply_updates_stochastic(
            np.ones(3), np.ones(3), jax.random.key(0), batch_index=index
        )
