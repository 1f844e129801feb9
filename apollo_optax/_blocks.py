"""How an axis of a quantized array is stored: as groups of neighbours.

Blocks: an axis of n is stored as one of groups and one of the places in a group or, if it is not the last
of the array, two of places: (places / 8, 8). The last group is filled up with zeros. Every group's range
includes 0 and every grid holds it exactly, so they stay 0 and change nothing for the weights beside them.

This shape is for the sake of TPUs, whose compiler tiles arrays by their last two axes.
- With groups as an axis of the codes, too, a layer of a stack is updated in place. With codes of the
  matrix's shape, XLA lays out a scale for each weight, in float32.
- With 8 places next to the last axis, codes are tiled (8, 128), as they are in host memory. A longer axis
  is tiled (32, 128) on the device alone, and to fetch a layer XLA copies the whole stack.
"""

import math

import jax
import jax.numpy as jnp

BLOCK = 8


def split_shape(
    shape: tuple[int, ...], axis: int
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    place = len(shape) + axis
    return shape[:place], shape[place], shape[place + 1 :]


def block_shape(n: int, axis: int, group_size: int) -> tuple[int, ...]:
    """What an axis of n becomes: ``(groups, *places)``."""
    if axis == -1:
        places = (max(1, min(n, group_size)),)
    else:
        places = (max(1, min(math.ceil(n / BLOCK), group_size // BLOCK)), BLOCK)
    return (math.ceil(n / math.prod(places)), *places)


def place_axes(axis: int) -> tuple[int, ...]:
    """The axes of places of an array in blocks, counted from the end as `axis` is."""
    return (axis,) if axis == -1 else (axis - 1, axis)


def to_blocks(array: jax.Array, axis: int, group_size: int) -> jax.Array:
    before, n, after = split_shape(array.shape, axis)
    blocks = block_shape(n, axis, group_size)
    missing = math.prod(blocks) - n
    if missing:  # Else a reshape will do, which moves nothing.
        array = jnp.pad(
            array, [*[(0, 0)] * len(before), (0, missing), *[(0, 0)] * len(after)]
        )
    return array.reshape(*before, *blocks, *after)


def from_blocks(
    array: jax.Array, shape: tuple[int, ...], axis: int, group_size: int
) -> jax.Array:
    """The inverse of :func:`to_blocks`, for an array that had this shape."""
    before, n, after = split_shape(shape, axis)
    filled = math.prod(block_shape(n, axis, group_size))
    return jax.lax.slice_in_dim(array.reshape(*before, filled, *after), 0, n, axis=axis)
