"""In which order matrices are updated, and how many at once: what an update costs, not what it computes.

Projections and projected gradients are there for a few matrices at a time, together no larger than the
largest gradient; what leaves of one shape compute is compiled once; and no tensor is taken apart along an
axis that a mesh may have cut.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

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
    if not axes.batch or axes.batch_shape[0] == 1 or not _sharding.is_on_one_device(gradient):
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
        old = jax.tree.map(lambda field: at(field, row), state)
        row_gradient = at(gradient, row, axes.batch[0])
        result, new = update(row_gradient, old, row, axes.of_row())

        def write(field: jax.Array, value: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(field, value, row, 0, allow_negative_indices=False)

        return jax.tree.map(write, state, new), result

    state, results = jax.lax.scan(body, state, jnp.arange(axes.batch_shape[0]))
    return results, state


def is_in_turn(gradients: Sequence[jax.Array], sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether what is computed of leaves, of these `sizes`, is too much to be in memory at the same time."""
    return sum(map(sum, sizes)) > max(gradient.nbytes for gradient in gradients)


def draws_at_once(gradients: Sequence[jax.Array], sizes: Sequence[tuple[int, int]]) -> int:
    """How many projections to draw: what fits in the largest gradient beside one that is projected."""
    of_projection, of_projected = map(max, zip(*sizes, strict=True))
    room = max(gradient.nbytes for gradient in gradients) - of_projected
    draws = math.ceil(len(gradients) / max(1, room // of_projection))  # About as many each time.
    return math.ceil(len(gradients) / draws)


def is_small(drawn: jax.Array, gradients: Sequence[jax.Array]) -> bool:
    """Whether projections are drawn in one operation, not leaf after leaf.

    A GPU takes as long to launch a small draw as to make it. What a draw computes on the way takes
    several times the memory of its result.
    """
    return 8 * drawn.nbytes <= max(gradient.nbytes for gradient in gradients)


def at(array: jax.Array, index: jax.typing.ArrayLike, axis: int = 0) -> jax.Array:
    """An element of an axis."""
    return jax.lax.dynamic_index_in_dim(array, index, axis, keepdims=False, allow_negative_indices=False)


def place(index: int, after: jax.Array) -> jax.Array:
    """`index`, which XLA for CPU neither knows, nor has before `after`, which is not negative.

    It compiles anew what differs in a constant, as in the place of a leaf among its like; and of leaves
    that do not wait for each other it projects all, and holds what comes of it, before it updates the first.
    """
    return _place(np.array([index, 0], np.int32), after)


@jax.jit
def _place(number: jax.Array, after: jax.Array) -> jax.Array:
    def unknown(number: jax.Array, after: jax.Array) -> jax.Array:
        # A constant that is no scalar stays outside of the code that uses it.
        return jnp.sum(jnp.where(jnp.ravel(after)[0] < 0, 0, number), dtype=number.dtype)

    return jax.lax.platform_dependent(number, after, cpu=unknown, default=lambda number, after: number[0])
