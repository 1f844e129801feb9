"""In which order matrices are updated, and how many at once: what an update costs, not what it computes.

Projections and projected gradients are there for a few matrices at a time, together no larger than the
largest gradient; what leaves of one shape compute is compiled once; and no tensor is taken apart along an
axis that a mesh may have cut.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from apollo_optax import _sharding
from apollo_optax._dimension_numbers import MatrixAxes

State = TypeVar("State")


def computed_bytes(axes: MatrixAxes, rank: int, dtype: Any) -> tuple[int, int]:
    """The bytes of a leaf's projections, and of its projected gradients."""
    shapes = axes.projection_shape(rank), axes.moment_shape(rank)
    return math.prod(shapes[0]) * jnp.dtype(dtype).itemsize, math.prod(shapes[1]) * jnp.dtype(dtype).itemsize


def is_by_rows(axes: MatrixAxes, rank: int, gradient: jax.Array, dtype: Any) -> bool:
    """Whether to take a stack row by row, with what is computed of one row in memory at a time.

    Not where that of all rows is smaller than one row of the gradient, as at rank 1. Nor where there may be
    a mesh, which may have cut the stack between its rows: a loop over them would gather it.
    """
    if not axes.batch or not _sharding.is_on_one_device(gradient):
        return False
    return sum(computed_bytes(axes, rank, dtype)) > gradient.nbytes // axes.batch_shape[0]


def by_rows(
    update: Callable[[jax.Array, State, jax.Array, MatrixAxes], tuple[jax.Array, State]],
    gradient: jax.Array,
    state: State,
    axes: MatrixAxes,
) -> tuple[jax.Array, State]:
    """Maps an update over the first batch axis of a leaf, its state changed in place.

    Args:
      update: of a row, of its gradient and state without that axis, its index and its axes, to an array
        with the remaining batch axes in front and the new state.
      gradient: of the leaf's shape.
      state: a tree of arrays with the batch axes in front.
      axes: the leaf's axes.

    Returns:
      What `update` returns, for all rows.
    """

    def body(state: State, row: jax.Array) -> tuple[State, jax.Array]:
        old = jax.tree.map(lambda field: jax.lax.dynamic_index_in_dim(field, row, keepdims=False), state)
        row_gradient = jax.lax.dynamic_index_in_dim(gradient, row, axes.batch[0], keepdims=False)
        result, new = update(row_gradient, old, row, axes.of_row())

        def write(field: jax.Array, value: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(field, value, row, 0)

        return jax.tree.map(write, state, new), result

    state, results = jax.lax.scan(body, state, jnp.arange(axes.batch_shape[0]))
    return results, state


# XLA for CPU compiles anew what differs in a constant, as in the place of a leaf among its like; and of
# leaves that do not wait for each other it projects all, and holds what comes of it, before it updates the
# first. So places are counted at run time, each from what became of the leaf before. Elsewhere that would
# cost more than it saves.


@jax.jit
def first_place(not_negative: jax.Array) -> jax.Array:
    """0, which XLA for CPU can't tell."""
    return jax.lax.platform_dependent(
        not_negative, cpu=lambda number: jnp.minimum(number, 0), default=jnp.zeros_like
    )


@jax.jit
def next_place(place: jax.Array, norm: jax.Array) -> jax.Array:
    """``place + 1``, on CPUs not before a leaf's `norm` is there, which is not negative."""

    def after(place: jax.Array, norm: jax.Array) -> jax.Array:
        return jax.lax.cond(jnp.ravel(norm)[0] < 0, lambda place: place, lambda place: place + 1, place)

    return jax.lax.platform_dependent(place, norm, cpu=after, default=lambda place, norm: place + 1)
