"""The layer-wise step with stochastic rounding of int8 and bfloat16 weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from apollo_optax import (
    dequantize,
)
from tests.layerwise_models import (
    KEY,
    apollo,
    batches,
    in_int8,
    of_dtype,
    ordinary_step,
    toy,
    train,
    trainer,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def constant_updates(size=1e-3):
    """Updates that do not depend on gradients, and so not on their rounding errors."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda x: jnp.full(x.shape, -size), updates
        )
    )


@pytest.mark.parametrize(
    "few_bits", [in_int8, lambda model: of_dtype(model, jnp.bfloat16)]
)
def test_layers_are_rounded_as_in_the_whole_stack(few_bits):
    model, tx = few_bits(toy()), constant_updates()
    keys = jax.random.split(KEY, 3)
    run = trainer(model.step(tx), model, tx)
    (params, _), _ = run(model.params, batches(3), keys)
    chex.assert_trees_all_equal(
        params, train(ordinary_step(model, tx), model, tx, 3, keys)[0][0]
    )
    chex.assert_trees_all_equal_structs(params, model.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, model.params)
    (others, _), _ = run(
        model.params, batches(3), jax.random.split(jax.random.key(8), 3)
    )
    assert any(
        np.any(np.asarray(a != b))
        for a, b in zip(*map(jax.tree.leaves, (params, others)), strict=True)
    )
    # Every layer draws its own bits, so equal weights are not rounded the same way.
    same = jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape), model.params)
    (rounded, _), _ = run(same, batches(3), keys)
    codes = jax.tree.leaves(rounded["layers"]["block"])[0]
    assert np.any(np.asarray(codes[0] != codes[1]))


def test_int8_weights_train():
    """They follow the ordinary step on dequantized weights.

    Only weights whose rounding depends on the last digit of a gradient may differ.
    """
    steps, tx = 30, apollo(0.02, projection="rademacher")
    model, keys = in_int8(toy()), jax.random.split(KEY, steps)
    (params, state), metrics = train(model.step(tx), model, tx, steps, keys)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, model.params)
    chex.assert_trees_all_equal_structs(state, tx.init(dequantize(model.params)))
    assert float(metrics.loss[-5:].mean()) < float(metrics.loss[:5].mean()) - 0.2
    # The forward pass alone also dequantizes one layer at a time.
    loss = model.apply()(model.params, batches()[0])
    np.testing.assert_allclose(loss, metrics.loss[0], rtol=1e-6)

    (once, _, _) = jax.jit(model.step(tx))(
        model.params, tx.init(dequantize(model.params)), batches()[0], key=keys[0]
    )
    (expected, _), _ = train(ordinary_step(model, tx), model, tx, 1, keys[:1])
    codes, expected_codes, before = (
        np.asarray(tree["layers"]["block"]["kernel"].qvalue, np.int32)
        for tree in (once, expected, model.params)
    )
    assert np.abs(codes - expected_codes).max() <= 1
    assert np.mean(codes != expected_codes) < 0.02
    assert np.mean(codes != before) > 0.5
