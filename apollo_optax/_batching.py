"""How many matrices are updated at once: memory and compile time, never a result.

:func:`update_all` could be a loop that draws and updates one leaf after the other, and
a test replaces it by one. What it adds:

* Leaves whose draws have one shape share a compiled loop that draws. It draws for as
  many leaves as fit in the memory of the largest gradient. Threefry is quick to run and
  slow to compile.
* A stack is updated row by row if its update needs more memory than a row of its
  gradient.
* Leaves of one shape share their compiled kernels. They wait for each other if their
  updates together compute more than fits (:func:`opaque_index`).

All of it is for leaves on one device. On a mesh, leaves of equal shape may be sharded
along different axes (attention's projections before and after the heads), so one shared
draw would force some gradients to be resharded; and a loop over a sharded axis would
gather it.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from apollo_optax import _keys, _tree
from apollo_optax._matrix import Matrix

State = Any  # A tree of arrays with the batch axes in front.
UpdateOne = Callable[[Matrix, jax.Array, State, Any], tuple[jax.Array, State]]
DrawOne = Callable[[Matrix, jax.Array], jax.Array]


class Leaf(NamedTuple):
    """A matrix or a batch of them, with everything that its update reads."""

    matrix: Matrix
    gradient: jax.Array
    state: State
    leaf_id: np.uint32  # The number of the leaf that its keys are made with.
    # What is drawn for it, in the dtype of the matrix; None if nothing is.
    drawn_shape: tuple[int, ...] | None
    # The largest array that its update computes, in the dtype of the matrix.
    computed_shape: tuple[int, ...]

    @property
    def drawn_nbytes(self) -> int:
        return math.prod(self.drawn_shape or (0,)) * self.matrix.dtype.itemsize

    @property
    def computed_nbytes(self) -> int:
        return math.prod(self.computed_shape) * self.matrix.dtype.itemsize

    @property
    def is_by_rows(self) -> bool:
        """Whether to update a stack row by row, with one row's computation in memory.

        False if all rows together need less memory than one row of the gradient, as at
        rank 1, or if the leaf may be on a mesh: looping over a sharded axis would
        gather it.
        """
        if not self.matrix.is_on_one_device or not self.matrix.batch_shape:
            return False
        rows = self.matrix.batch_shape[0]
        computed = self.drawn_nbytes + self.computed_nbytes
        return rows > 1 and computed > self.gradient.nbytes // rows


def update_all(
    update_one: UpdateOne,
    draw_one: DrawOne,
    keys: _keys.KeySource,
    leaves: Mapping[_tree.Path, Leaf],
) -> dict[_tree.Path, tuple[jax.Array, State]]:
    """Updates every leaf by itself, in an order and in groups that save memory.

    Args:
      update_one: the update of one leaf, from its matrix, gradient, state and draw to
        an array with the remaining batch axes in front and the new state. A pytree,
        such as ``jax.tree_util.Partial``, since it is an argument of jitted functions.
      draw_one: the draw of one leaf, from its matrix and a key per batch element to an
        array that depends on their shapes alone. A pytree too.
      keys: what the keys are made from.
      leaves: by path.

    Returns:
      By path what ``update_one(matrix, gradient, state, draw_one(matrix, keys))``
      returns. The draw is None for a leaf without a `drawn_shape`.
    """
    results = {}
    for group in _group_by_shape(leaves):
        if len(group) == 1:
            for path, leaf in group.items():
                results[path] = _update_leaf(
                    update_one,
                    draw_one if leaf.drawn_shape is not None else None,
                    keys,
                    leaf.gradient,
                    leaf.state,
                    leaf.leaf_id,
                    leaf.matrix,
                    leaf.is_by_rows,
                )
        else:
            results |= _update_group(update_one, draw_one, keys, group)
    return results


# One leaf.


# Jitted by itself, so that leaves of one shape share a trace, and an eager step
# computes what a jitted one does.
@functools.partial(jax.jit, static_argnames=("matrix", "by_rows"))
def _update_leaf(
    update_one: UpdateOne,
    draw_one: DrawOne | None,
    keys: _keys.KeySource,
    gradient: jax.Array,
    state: State,
    leaf_id: jax.typing.ArrayLike,
    matrix: Matrix,
    by_rows: bool,
) -> tuple[jax.Array, State]:
    """Draws and updates one leaf."""
    leaf_keys = keys.leaf_keys(leaf_id, matrix.batch_shape)

    def update(
        matrix: Matrix, gradient: jax.Array, state: State, keys: jax.Array
    ) -> tuple[jax.Array, State]:
        drawn = None if draw_one is None else draw_one(matrix, keys)
        return update_one(matrix, gradient, state, drawn)

    if by_rows:
        return _map_rows(update, matrix, gradient, state, leaf_keys)
    return update(matrix, gradient, state, leaf_keys)


def _map_rows(
    update: Callable[..., tuple[jax.Array, State]],
    matrix: Matrix,
    gradient: jax.Array,
    state: State,
    keys: jax.Array,
) -> tuple[jax.Array, State]:
    """Maps an update over a leaf's first batch axis, its state changed in place."""
    row_matrix = matrix.without_batch_axis()
    row_size = math.prod(row_matrix.batch_shape)

    def body(state: State, row: jax.Array) -> tuple[State, jax.Array]:
        result, new = update(
            row_matrix,
            index_axis(gradient, row, matrix.axes.batch[0]),
            jax.tree.map(lambda field: index_axis(field, row), state),
            jax.lax.dynamic_slice_in_dim(keys, row * row_size, row_size),
        )

        def write(field: jax.Array, value: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(
                field, value, row, 0, allow_negative_indices=False
            )

        return jax.tree.map(write, state, new), result

    state, results = jax.lax.scan(body, state, jnp.arange(matrix.batch_shape[0]))
    return results, state


# Leaves that share the loop that draws.


def _group_by_shape(
    leaves: Mapping[_tree.Path, Leaf],
) -> list[dict[_tree.Path, Leaf]]:
    """The leaves in groups whose draws one compiled loop can make."""
    groups: dict[Any, dict[_tree.Path, Leaf]] = {}
    for path, leaf in leaves.items():
        matrix = leaf.matrix
        group: Any = path  # A group of its own, unless it shares a draw.
        draws = leaf.drawn_shape is not None
        if draws and matrix.is_on_one_device and not leaf.is_by_rows:
            # Leaves may be on different devices in an eager step.
            is_traced = isinstance(leaf.gradient, Tracer)
            device = None if is_traced else leaf.gradient.sharding
            group = (matrix.batch_shape, leaf.drawn_shape, matrix.dtype, device)
        groups.setdefault(group, {})[path] = leaf
    return list(groups.values())


def _update_group(
    update_one: UpdateOne,
    draw_one: DrawOne,
    keys: _keys.KeySource,
    group: Mapping[_tree.Path, Leaf],
) -> dict[_tree.Path, tuple[jax.Array, State]]:
    """Updates leaves in turn, drawing for as many at once as memory allows."""
    leaves = list(group.values())
    like, drawn_shape = leaves[0].matrix, leaves[0].drawn_shape
    assert drawn_shape is not None  # A group of several leaves is one that draws.
    at_once = draws_at_once(leaves)
    room = max(leaf.gradient.nbytes for leaf in leaves)
    in_turn = sum(leaf.drawn_nbytes + leaf.computed_nbytes for leaf in leaves) > room
    # A GPU takes as long to launch a small draw as to make it. A large draw takes
    # several times the memory of its result on the way.
    is_small = 8 * at_once * leaves[0].drawn_nbytes <= room

    group_keys = _group_keys(
        keys, np.array([leaf.leaf_id for leaf in leaves]), like.batch_shape
    )
    drawn = jnp.zeros((at_once, *drawn_shape), like.dtype)
    results, first, after = {}, 0, keys.refresh.astype(jnp.float32)
    for index, (path, leaf) in enumerate(group.items()):
        if index % at_once == 0:
            # Every draw is of `at_once`, so that all of them share one compiled loop.
            first = min(index, len(leaves) - at_once)
            start = opaque_index(first, after)
            drawn = _draw_into(draw_one, drawn, group_keys, start, like, is_small)
        own = index_axis(drawn, opaque_index(index - first, after))
        results[path] = _update_drawn(
            update_one, leaf.gradient, leaf.state, own, leaf.matrix
        )
        if in_turn:
            after = results[path][0]
    return results


@functools.partial(jax.jit, static_argnames="matrix")
def _update_drawn(
    update_one: UpdateOne,
    gradient: jax.Array,
    state: State,
    drawn: jax.Array,
    matrix: Matrix,
) -> tuple[jax.Array, State]:
    return update_one(matrix, gradient, state, drawn)


@functools.partial(jax.jit, static_argnames="batch_shape")
def _group_keys(
    keys: _keys.KeySource, leaf_ids: jax.Array, batch_shape: tuple[int, ...]
) -> jax.Array:
    """The keys of leaves of one batch shape, ``(leaves, batch size)``."""
    leaf_keys = functools.partial(keys.leaf_keys, batch_shape=batch_shape)
    return _keys.vmap_with_keys(leaf_keys, keys.key)(leaf_ids)


@functools.partial(jax.jit, static_argnames=("matrix", "is_small"))
def _draw_into(
    draw_one: DrawOne,
    drawn: jax.Array,
    keys: jax.Array,
    first: jax.Array,
    matrix: Matrix,
    is_small: bool,
) -> jax.Array:
    """Draws for consecutive leaves from the `first` on, in the memory of `drawn`."""

    def draw(keys: jax.Array) -> jax.Array:
        return draw_one(matrix, keys)

    if is_small:
        own_keys = jax.lax.dynamic_slice_in_dim(keys, first, drawn.shape[0])
        return _keys.vmap_with_keys(draw, keys)(own_keys)

    def body(i: jax.Array, drawn: jax.Array) -> jax.Array:
        one = draw(index_axis(keys, first + i))
        return jax.lax.dynamic_update_index_in_dim(
            drawn, one, i, 0, allow_negative_indices=False
        )

    return jax.lax.fori_loop(0, drawn.shape[0], body, drawn)


def draws_at_once(leaves: Sequence[Leaf]) -> int:
    """How many draws fit in the memory of the largest gradient, beside one update."""
    computed = max(leaf.computed_nbytes for leaf in leaves)
    room = max(leaf.gradient.nbytes for leaf in leaves) - computed
    draws = math.ceil(len(leaves) / max(1, room // leaves[0].drawn_nbytes))
    return math.ceil(len(leaves) / draws)  # About as many each time.


# Indices.


def index_axis(
    array: jax.Array, index: jax.typing.ArrayLike, axis: int = 0
) -> jax.Array:
    """One element of an axis, without the axis."""
    return jax.lax.dynamic_index_in_dim(
        array, index, axis, keepdims=False, allow_negative_indices=False
    )


def opaque_index(index: int, after: jax.Array) -> jax.Array:
    """`index` as a value that XLA:CPU cannot fold and cannot compute before `after`.

    A constant index would give every leaf kernels of its own. Without the dependency
    XLA:CPU, which schedules independent work breadth-first, would project all leaves,
    and keep what it computed, before it updated the first. On GPUs and TPUs the index
    is a constant.
    """
    return _opaque_index(np.array([index, 0], np.int32), after)


@jax.jit
def _opaque_index(number: jax.Array, after: jax.Array) -> jax.Array:
    def opaque(number: jax.Array, after: jax.Array) -> jax.Array:
        # A constant that is not a scalar stays outside of the kernels that use it. No
        # number is below minus infinity, but XLA does not know.
        is_never = jnp.ravel(after)[0] < -jnp.inf
        return jnp.sum(jnp.where(is_never, 0, number), dtype=number.dtype)

    return jax.lax.platform_dependent(
        number, after, cpu=opaque, default=lambda number, after: number[0]
    )
