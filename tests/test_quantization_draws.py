"""Random draws are a function of the key, the leaf's path and the index in the leaf."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_optax import _keys, _quantization
from apollo_optax._quantization import apply_updates_stochastic, dequantize, quantize
from tests.quantized_values import layers, normal, optimized

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_updates_by_layer_equal_the_update_of_the_stack():
    params, updates = layers()
    for key in (jax.random.key(0), jax.random.key(0, impl="rbg")):
        whole = apply_updates_stochastic(params, updates, key)
        for before, after in zip(
            dequantize(params).values(), dequantize(whole).values(), strict=True
        ):
            assert not np.array_equal(before, after)
        for layer, index in ((0, None), (2, 2)):
            part, expected = jax.tree.map(
                lambda x: np.asarray(x)[layer : layer + 1],  # noqa: B023
                ((params, updates), whole),
            )
            chex.assert_trees_all_equal(
                apply_updates_stochastic(*part, key, batch_index=index), expected
            )

    def one(params, layer):
        at = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=layer, slice_size=1
        )
        new = apply_updates_stochastic(
            jax.tree.map(at, params), jax.tree.map(at, updates), key, batch_index=layer
        )
        put = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=layer, axis=0
        )
        return jax.tree.map(put, params, new), None

    scanned, _ = jax.jit(lambda params: jax.lax.scan(one, params, np.arange(4)))(params)
    chex.assert_trees_all_equal(scanned, whole)


def test_compiler_options_and_donation_change_nothing():
    params, updates = (
        {name: tree[name] for name in ("int8", "gain")} for tree in layers()
    )
    expected = apply_updates_stochastic(params, updates, jax.random.key(0))
    step = optimized(apply_updates_stochastic, donate_argnums=0)
    chex.assert_trees_all_equal(step(params, updates, jax.random.key(0)), expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_draws_depend_on_key_leaf_and_layer():
    one = {name: np.ones((4, 64), jnp.bfloat16) for name in ("a", "b")}
    half = {name: np.full((4, 64), 2.0**-8, np.float32) for name in one}
    moved = apply_updates_stochastic(one, half, jax.random.key(0))
    chex.assert_trees_all_equal(
        apply_updates_stochastic(one, half, jax.random.key(0)), moved
    )
    other = apply_updates_stochastic(one, half, jax.random.key(1))
    later = apply_updates_stochastic(one, half, jax.random.key(0), batch_index=4)
    rows = [
        tuple(row)
        for tree in (moved, other, later)
        for x in tree.values()
        for row in np.asarray(x, np.float32)
    ]
    assert len(set(rows)) == 24
    # Neither a leaf's neighbours in the tree nor the tree's node types matter.
    alone = apply_updates_stochastic(
        {"b": one["b"]}, {"b": half["b"]}, jax.random.key(0)
    )
    chex.assert_trees_all_equal(alone["b"], moved["b"])
    np.testing.assert_array_equal(
        apply_updates_stochastic([one["a"]], [half["a"]], jax.random.key(0))[0],
        apply_updates_stochastic({"0": one["a"]}, {"0": half["a"]}, jax.random.key(0))[
            "0"
        ],
    )
    # A QuantizedArray draws by its own path, not by the paths of its three arrays.
    quantized, update = quantize(normal(0, (4, 64))), 0.003 * normal(1, (4, 64))
    np.testing.assert_array_equal(
        apply_updates_stochastic({"b": quantized}, {"b": update}, jax.random.key(0))[
            "b"
        ].qvalue,
        _quantization._update_int8(
            quantized, update, jax.random.key(0), _keys.leaf_id(("b",)), 0
        ).qvalue,
    )


def test_raw_keys_equal_typed_keys():
    params, updates = layers()
    typed = apply_updates_stochastic(params, updates, jax.random.key(3))
    for raw in (jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3))):
        chex.assert_trees_all_equal(
            apply_updates_stochastic(params, updates, raw), typed
        )
        chex.assert_trees_all_equal(
            quantize(updates["int8"], key=raw),
            quantize(updates["int8"], key=jax.random.key(3)),
        )
    with jax.default_prng_impl("rbg"):
        chex.assert_trees_all_equal(
            apply_updates_stochastic(params, updates, jax.random.PRNGKey(3)),
            apply_updates_stochastic(params, updates, jax.random.key(3, impl="rbg")),
        )
