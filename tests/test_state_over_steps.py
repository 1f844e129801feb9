"""The state in checkpoints, and its types and shardings from step to step."""

from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import PartitionSpec as P

import apollo_optax
from tests.helpers import (
    OPTIMIZERS,
    every_axis_type,
    every_optimizer,
    every_projection,
    make_mesh,
    normal,
    put,
    run,
    small_apollo,
    small_gradient,
    small_gradients,
    small_params,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Checkpoints.


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["default", "bfloat16"])
@every_projection
def test_flax_serialization_continues_bit_for_bit(projection, dtype):
    tx = small_apollo(0.1, projection=projection, moment_dtype=dtype)
    _, (*_, state) = run(tx, small_gradients(3), small_params())
    saved = flax.serialization.to_bytes(state)
    restored: Any = flax.serialization.from_bytes(tx.init(small_params()), saved)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_dtypes(restored, state)
    # Flax restores NumPy arrays, which an eager and a jitted step have to accept.
    assert isinstance(restored[0].mu["scale"], np.ndarray)
    for jit in (False, True):
        continued, expected = (
            run(tx, small_gradients(3, 5), small_params(7), state=start, jit=jit)
            for start in (restored, state)
        )
        chex.assert_trees_all_equal(continued, expected)


@every_projection
def test_orbax_continues_bit_for_bit(projection, tmp_path):
    tx = small_apollo(0.1, projection=projection)
    params = small_params()
    _, (*_, state) = run(tx, small_gradients(3), params)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(tx.init, params)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: x.update(sharding=device), abstract)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal(restored, state)
    continued, expected = (
        run(tx, small_gradients(3, 5), small_params(7), state=start)
        for start in (restored, state)
    )
    chex.assert_trees_all_equal(continued, expected)


# From step to step, only the values in the state change.


def types_of(state):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@every_optimizer
def test_types_of_the_state_never_change(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx = OPTIMIZERS[name](0.1, weight_decay=0.01)
        params = small_params(0, dtype)
        eager = jitted = tx.init(params)
        expected = types_of(eager)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(eager))
        traces = []

        @jax.jit
        def update(grads, state):
            traces.append(None)
            # lax.cond raises an error if its branches differ in any type.
            return jax.lax.cond(
                state[0].count < 0,
                lambda: (grads, state),
                lambda: tx.update(grads, state, params),
            )

        for step in range(3):
            _, eager = tx.update(small_gradient(step, dtype), eager, params)
            _, jitted = update(small_gradient(step, dtype), jitted)
            assert types_of(eager) == expected
            assert types_of(jitted) == expected
        assert len(traces) == 1


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@every_projection
@every_axis_type
def test_shardings_of_the_state_never_change(axis_type, projection, jit):
    mesh = make_mesh(axis_type)
    leaves = {
        "kernel": put(mesh, normal(0, (8, 16)), P("data", "model")),
        "bias": put(mesh, normal(1, (16,)), P("model")),
    }
    tx: Any = apollo_optax.apollo(0.1, rank=4, projection=projection)
    traces = []

    def update(grads, state):
        traces.append(None)
        return tx.update(grads, state, leaves)

    step = jax.jit(update) if jit else update
    with jax.set_mesh(mesh):
        initial = state = tx.init(leaves)
        assert len(initial[0].mu["kernel"].sharding.device_set) == 8
        for _ in range(3):
            updates, state = step(leaves, state)
            after, before = (state, updates), (initial, leaves)
            pairs = zip(*map(jax.tree.leaves, (after, before)), strict=True)
            for new, old in pairs:
                shardings = (new.sharding, old.sharding)
                assert new.sharding.is_equivalent_to(old.sharding, old.ndim), shardings
    assert len(traces) == (1 if jit else 3)
