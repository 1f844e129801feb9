"""Quantized arrays in pytrees, boxes and checkpoints."""

from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint
import pytest
from flax import linen as nn
from flax import nnx

from apollo_optax._quantization import (
    QuantizedArray,
    apply_updates_stochastic,
    dequantize,
    quantize,
)
from tests.quantized_values import keys, layers, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_other_dtypes_are_updated_as_by_optax():
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
    draws = jax.jit(jax.vmap(lambda key: apply_updates_stochastic(one, up, key)))(
        keys(1000)
    )
    assert abs(np.asarray(draws, np.float64).mean() - 1 - 2**-8) < 5 * 2**-8 / np.sqrt(
        1000
    )
    array = quantize(normal(0, (4, 64)))
    assert isinstance(
        apply_updates_stochastic(array, normal(1, (4, 64)), jax.random.key(0)),
        QuantizedArray,
    )
    assert dequantize(array).shape == (4, 64)
    assert dequantize({"a": 1, "b": None, "c": [array]})["a"] == 1


def test_boxes_are_kept():
    array, update = normal(0, (4, 64)), 0.003 * normal(1, (4, 64))
    plain = {"w": array.astype(jnp.bfloat16), "q": quantize(array)}
    expected = apply_updates_stochastic(
        plain, {"w": update, "q": update}, jax.random.key(0)
    )
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
            chex.assert_trees_all_equal(
                jax.tree.leaves(moved), jax.tree.leaves(expected)
            )


def test_quantized_array_is_a_pytree():
    array = normal(0, (4, 40, 8))
    stack = quantize(array, group_size=16)
    names = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path({"w": stack})
    ]
    assert names == ["['w'].qvalue", "['w'].scale", "['w'].zero_point"]
    chex.assert_trees_all_equal(jax.jit(lambda x: x)(stack), stack)
    chex.assert_trees_all_equal(
        jax.tree.unflatten(jax.tree.structure(stack), jax.tree.leaves(stack)), stack
    )
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


def test_checkpoints_restore_quantized_arrays(tmp_path):
    params, updates = layers()
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params
        )
        restored: Any = checkpointer.restore(tmp_path / "params", abstract)
    chex.assert_trees_all_equal_structs(restored, params)
    chex.assert_trees_all_equal(restored, params)
    leaves, structure = jax.tree.flatten(params)
    held: Any = flax.serialization.from_bytes(
        leaves, flax.serialization.to_bytes(leaves)
    )
    arrays = jax.tree.unflatten(structure, held)  # flax.serialization returns NumPy.
    assert isinstance(arrays["int8"].scale, np.ndarray)
    chex.assert_trees_all_equal(
        apply_updates_stochastic(arrays, updates, jax.random.key(0)),
        apply_updates_stochastic(params, updates, jax.random.key(0)),
    )
