"""Batching changes no number: a plain loop over single matrices gives the same bits.

XLA's optimizations are off here. With them, a matrix that is compiled in a loop and one
that is compiled alone are fused differently, which shows in their last bits.
"""

import chex
import jax
import jax.numpy as jnp
import pytest

from apollo_optax import ApolloDimensionNumbers, _batching, scale_by_apollo
from tests.helpers import normal

EAGER = (4, "random")


def plain_loop(update_one, draw_one, keys, leaves):
    """Replaces :func:`_batching.update_all` and updates one matrix at a time."""
    draw = jax.jit(lambda matrix, keys: draw_one(matrix, keys), static_argnums=0)
    update = jax.jit(lambda matrix, *args: update_one(matrix, *args), static_argnums=0)

    def update_matrix(matrix, gradient, state, keys, draws):
        if not matrix.batch_shape:
            drawn = draw(matrix, keys) if draws else None
            return update(matrix, gradient, state, drawn)
        rows = []
        for i in range(matrix.batch_shape[0]):
            one = jax.tree.map(lambda field, i=i: field[i], state)
            row = matrix.without_batch_axis()
            key = keys[i : i + 1]
            rows.append(update_matrix(row, gradient[i], one, key, draws))
        return jax.tree.map(lambda *fields: jnp.stack(fields), *rows)

    return {
        path: update_matrix(
            leaf.matrix,
            leaf.gradient,
            leaf.state,
            keys.leaf_keys(leaf.leaf_id, leaf.matrix.batch_shape),
            leaf.drawn_shape is not None,
        )
        for path, leaf in leaves.items()
    }


# An eager update compiles each operation on its own, which takes long. One case of it
# is enough by default, because it calls the same functions as a compiled update.
@pytest.mark.parametrize(
    ("rank", "projection", "jit"),
    [
        pytest.param(*case, jit, marks=[] if jit or case == EAGER else pytest.mark.slow)
        for case in [
            (4, "random"),
            (4, "rademacher"),
            (4, "svd"),
            (4, jax.random.uniform),
            (1, "random"),
        ]
        for jit in (True, False)
    ],
)
def test_a_plain_loop_gives_the_same_bits(
    rank, projection, jit, monkeypatch, quick_compilation
):
    shapes = {"a": (8, 24), "b": (24, 8), "c": (8, 24), "d": (2, 8, 24)}
    numbers = ApolloDimensionNumbers(-2, -1)
    tx = scale_by_apollo(
        rank,
        projection=projection,
        update_proj_gap=2,
        scale_type="tensor" if rank == 1 else "channel",
        weight_dimension_numbers=numbers,
    )
    steps = [{k: normal(i, shape) for k, shape in shapes.items()} for i in range(3)]

    def run():
        jax.clear_caches()
        update, state, results = jax.jit(tx.update) if jit else tx.update, None, []
        state = tx.init(steps[0])
        for gradients in steps:
            updates, state = update(gradients, state)
            results.append(jax.device_get((updates, state)))
        return results

    batched = run()
    calls = []

    def counted_loop(*args):
        calls.append(args)
        return plain_loop(*args)

    monkeypatch.setattr(_batching, "update_all", counted_loop)
    chex.assert_trees_all_equal(run(), batched)
    assert calls
