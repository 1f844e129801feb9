"""Reading and writing one layer of a stack, on the device or in host memory."""

from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from apollo_optax._layerwise_state import Leaves


def in_host_memory(array: jax.Array) -> bool:
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def move(tree: Any, space: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space), tree)


def _slice(array: jax.Array, index: jax.typing.ArrayLike) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, index, 1)


def fetch_row(stack: Any, index: jax.typing.ArrayLike) -> Any:
    """Row `index`, ``(1, ...)``, of what is in host memory; None in place of what is on the device."""

    def fetch(array: jax.Array) -> jax.Array | None:
        return (
            move(_slice(array, index), jax.memory.Space.Device)
            if in_host_memory(array)
            else None
        )

    return jax.tree.map(fetch, stack)


def fetch_row_after(new: Leaves, stack: Leaves, index: jax.Array) -> Leaves:
    """:func:`fetch_row`, each leaf as soon as its `new` row is there and can give up its memory."""
    when = {
        path: jax.lax.optimization_barrier((index, leaf))[0]
        for path, leaf in new.items()
    }
    return {path: fetch_row(leaf, when[path]) for path, leaf in stack.items()}


def delay_until_fetched(stack: Leaves, fetched: Leaves) -> Leaves:
    """`stack`, of which no leaf in host memory is written before its row is `fetched`.

    Without this order XLA for GPUs copies the whole stack, so that it can do both at once.
    """

    def after(array: jax.Array, row: jax.Array | None) -> jax.Array:
        return array if row is None else jax.lax.optimization_barrier((array, row))[0]

    return {
        path: jax.tree.map(after, leaf, fetched[path]) for path, leaf in stack.items()
    }


def read_row(stack: Any, fetched: Any, index: jax.typing.ArrayLike) -> Any:
    """Row `index` of the stack, ``(1, ...)``, where what :func:`fetch_row` brought is taken as it is."""
    return jax.tree.map(
        lambda array, row: _slice(array, index) if row is None else row, stack, fetched
    )


def keep_row_major(rows: Any) -> Any:
    """Keeps XLA from giving a row the layout that the next product wants, and with it the whole stack."""

    def constrained(row: jax.Array) -> jax.Array:
        return with_layout_constraint(row, Layout(tuple(range(row.ndim))))

    return jax.tree.map(constrained, rows)


def write_row(stack: Any, rows: Any, index: jax.typing.ArrayLike) -> Any:
    """The stack with row `index` replaced, in the memory where it is."""

    def write(array: jax.Array, row: jax.Array) -> jax.Array:
        row = move(row, jax.memory.Space.Host) if in_host_memory(array) else row
        return jax.lax.dynamic_update_slice_in_dim(array, row, index, 0)

    return jax.tree.map(write, stack, rows)
