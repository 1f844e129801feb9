"""Reads and writes one layer of a stack, which may be in device or in host memory.

A stack is a tree of arrays ``(L, ...)``, and a row of it is the tree of arrays
``(1, ...)`` for one layer. Rows of arrays in host memory are fetched to the device.
:func:`fetch_row` is apart from :func:`read_row`, so that a loop can fetch a row before
it needs it.

The order of these operations decides whether XLA updates a stack in place or copies it.
"""

from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from apollo_optax._layerwise_state import Leaves


def to_host(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def to_device(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def _is_in_host_memory(array: jax.Array) -> bool:
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def _slice(array: jax.Array, index: jax.typing.ArrayLike) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, index, 1)


def fetch_row(stack: Any, index: jax.typing.ArrayLike) -> Any:
    """Copies row `index` of the arrays in host memory; None for those on the device."""

    def fetch(array: jax.Array) -> jax.Array | None:
        return to_device(_slice(array, index)) if _is_in_host_memory(array) else None

    return jax.tree.map(fetch, stack)


def fetch_row_after(new: Leaves, stack: Leaves, index: jax.Array) -> Leaves:
    """Fetches row `index` of each leaf, but only after its row in `new` is computed.

    The row that was fetched before has no reader left by then, so that this row can
    reuse its memory.
    """
    when = {
        path: jax.lax.optimization_barrier((index, leaf))[0]
        for path, leaf in new.items()
    }
    return {path: fetch_row(leaf, when[path]) for path, leaf in stack.items()}


def delay_until_fetched(stack: Leaves, fetched: Leaves) -> Leaves:
    """Returns `stack`, whose arrays in host memory now depend on their `fetched` rows.

    A write to the result then comes after the fetch. Without this order XLA:GPU copies
    the whole stack, so that it can do both at once.
    """

    def delay(array: jax.Array, row: jax.Array | None) -> jax.Array:
        if row is None:
            return array
        return jax.lax.optimization_barrier((array, row))[0]

    return {
        path: jax.tree.map(delay, leaf, fetched[path]) for path, leaf in stack.items()
    }


def read_row(stack: Any, fetched: Any, index: jax.typing.ArrayLike) -> Any:
    """Row `index` of the stack; where :func:`fetch_row` fetched a row, that row."""

    def read(array: jax.Array, row: jax.Array | None) -> jax.Array:
        return _slice(array, index) if row is None else row

    return jax.tree.map(read, stack, fetched)


def keep_row_major(rows: Any) -> Any:
    """Constrains rows to row-major layout.

    Otherwise XLA may give a row the layout that the next matrix product prefers, and
    then give that layout to the whole stack.
    """

    def constrain(row: jax.Array) -> jax.Array:
        return with_layout_constraint(row, Layout(tuple(range(row.ndim))))

    return jax.tree.map(constrain, rows)


def write_row(stack: Any, rows: Any, index: jax.typing.ArrayLike) -> Any:
    """Replaces row `index` of the stack; every array stays in its kind of memory."""

    def write(array: jax.Array, row: jax.Array) -> jax.Array:
        row = to_host(row) if _is_in_host_memory(array) else row
        return jax.lax.dynamic_update_slice_in_dim(array, row, index, 0)

    return jax.tree.map(write, stack, rows)
