"""The block layout in which the codes of a quantized array are stored.

One axis of n weights becomes two axes, ``(groups, positions)``, or, if it is not the
last axis of the array, three: ``(groups, positions / 8, 8)``. The last group is padded
with zeros. Every group's range includes 0 and every grid represents 0 exactly, so the
padding stays 0 and does not affect the weights of its group.

The layout is made for the TPU compiler, which tiles arrays by their last two axes:

* With an axis of groups in the codes, a layer of a stack is updated in place. If codes
  had the matrix's shape, XLA would expand the scales to one float32 per weight.
* With 8 positions next to the last axis, codes are tiled (8, 128), as they are in host
  memory. A longer axis would be tiled (32, 128), but only on the device, and XLA would
  copy the whole stack in order to fetch one layer.

Axes are negative numbers, counted from the end, so that they also hold for a layer that
is sliced from a stack.
"""

import math

import jax
import jax.numpy as jnp

BLOCK = 8  # Positions in the axis before the last.


def split_shape(
    shape: tuple[int, ...], axis: int
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """The sizes before `axis`, its own size, and the sizes after it."""
    index = len(shape) + axis
    return shape[:index], shape[index], shape[index + 1 :]


def block_shape(n: int, axis: int, group_size: int) -> tuple[int, ...]:
    """The axes that replace an axis of size n: ``(groups, *positions)``."""
    if axis == -1:
        positions = (max(1, min(n, group_size)),)
    else:
        rows = min(math.ceil(n / BLOCK), group_size // BLOCK)
        positions = (max(1, rows), BLOCK)
    return (math.ceil(n / math.prod(positions)), *positions)


def position_axes(axis: int) -> tuple[int, ...]:
    """The axes of an array in blocks that index positions within a group."""
    return (axis,) if axis == -1 else (axis - 1, axis)


def to_blocks(array: jax.Array, axis: int, group_size: int) -> jax.Array:
    """Splits `axis` into groups and positions, padding the last group with zeros."""
    before, n, after = split_shape(array.shape, axis)
    blocks = block_shape(n, axis, group_size)
    missing = math.prod(blocks) - n
    if missing:  # Otherwise the reshape alone moves no data.
        padding = [*[(0, 0)] * len(before), (0, missing), *[(0, 0)] * len(after)]
        array = jnp.pad(array, padding)
    return array.reshape(*before, *blocks, *after)


def from_blocks(
    array: jax.Array, shape: tuple[int, ...], axis: int, group_size: int
) -> jax.Array:
    """Inverts :func:`to_blocks` for an array that had this shape."""
    before, n, after = split_shape(shape, axis)
    padded = math.prod(block_shape(n, axis, group_size))
    array = array.reshape(*before, padded, *after)
    return jax.lax.slice_in_dim(array, 0, n, axis=axis)
