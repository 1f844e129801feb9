"""Rounding to int8 codes on a grid and to bfloat16, to nearest or stochastically.

A grid is a scale and a zero point per group of weights. The code q represents the value
``(q - zero_point) * scale``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from apollo_optax import _sharding
from apollo_optax._blocks import position_axes
from apollo_optax._dtypes import nan_to_infinity

_LOWEST, _HIGHEST = -128, 127
# Steps of a new grid over the range of its group. 256 codes have 255 steps between
# them. One step less lets the zero point be a whole number with both ends of the range
# still inside. The hundredth covers divisions on accelerators, which may be a few ulp
# off.
_STEPS = 253.99


class Grid(NamedTuple):
    """A scale and a zero point per group, of size 1 along the axes of positions.

    Both are in float32 or float64, the dtype in which values are computed.
    """

    scale: jax.Array
    zero_point: jax.Array

    @classmethod
    def load(
        cls, scale: jax.Array, zero_point: jax.Array, axis: int, dtype: Any
    ) -> "Grid":
        """The grid that :meth:`stored` stored, with `dtype` for values."""
        axes = position_axes(axis)
        parts = (scale, zero_point)
        return cls(*(jnp.expand_dims(part, axes).astype(dtype) for part in parts))

    def stored(self, axis: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The scale in `dtype` and the zero point in int8, without position axes."""
        scale, zero_point = (jnp.squeeze(x, position_axes(axis)) for x in self)
        return scale.astype(dtype), zero_point.astype(jnp.int8)

    def values(self, codes: jax.Array) -> jax.Array:
        return (codes.astype(self.scale.dtype) - self.zero_point) * self.scale

    def codes(self, values: jax.Array, bits: jax.Array | None) -> jax.Array:
        """Rounds `values` to int8 codes, to nearest or by 16 random bits per value."""
        steps = jnp.round(values / self.scale)
        if bits is not None:
            # Use the remainder of rounding to nearest. It is exact: the product of a
            # difference of codes (9 bits) and a scale (8 bits) fits a float32. A weight
            # on the grid therefore stays there. The quotient alone could fall just
            # below it and be rounded down.
            left = (values - steps * self.scale) / self.scale
            steps += jnp.floor(left + (bits.astype(left.dtype) + 0.5) / 2**16)
        codes = jnp.clip(steps + self.zero_point, _LOWEST, _HIGHEST)
        return codes.astype(jnp.int8)

    def covers(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """Whether the codes of each group reach from `low` to `high`."""
        lowest, highest = _LOWEST - self.zero_point, _HIGHEST - self.zero_point
        return (lowest * self.scale <= low) & (high <= highest * self.scale)


def value_range(values: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest value of each group, with 0 as one of the values.

    The largest is infinite where a value is NaN.
    """
    axes = position_axes(axis)
    low = jnp.min(values, axes, keepdims=True)
    high = jnp.max(nan_to_infinity(values), axes, keepdims=True)
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def needed_scale(low: jax.Array, high: jax.Array) -> jax.Array:
    """The scale that a range needs, at least the smallest that is not flushed to 0.

    The lower bound serves groups of zeros and of values that are as small.
    """
    # Halve both ends first: the difference of two float32 numbers may overflow.
    needed = (high / 2 - low / 2) / (_STEPS / 2)
    return jnp.maximum(needed, jnp.finfo(jnp.bfloat16).tiny)


def new_grid(low: jax.Array, high: jax.Array) -> Grid:
    """The finest grid for a range whose scale is a bfloat16; NaN if there is none."""
    needed = needed_scale(low, high)
    # Round up to bfloat16 by bits: XLA may remove a cast to bfloat16 and back.
    pattern = jax.lax.bitcast_convert_type(needed.astype(jnp.float32), jnp.uint32)
    pattern = (pattern + 0xFFFF) >> 16 << 16
    up = jax.lax.bitcast_convert_type(pattern, jnp.float32).astype(needed.dtype)
    scale = jnp.where(needed <= jnp.finfo(jnp.bfloat16).max, up, jnp.nan)
    below = jnp.ceil(-low / scale)  # Steps below 0.
    below += below * scale < -low  # Add one where the quotient was rounded down.
    return Grid(scale, below + _LOWEST)


def round_to_bfloat16(values: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds float32 `values` by 16 random bits each; infinities and NaN are cast."""
    # A bfloat16 is the upper half of a float32. Random bits added to the lower half
    # carry into the upper half with the probability that makes the rounding unbiased.
    pattern = jax.lax.bitcast_convert_type(values, jnp.uint32) + bits.astype(jnp.uint32)
    upper = (pattern >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(values), rounded, values.astype(jnp.bfloat16))


def random_bits(
    key: jax.Array, shape: tuple[int, ...], first: Any, sharding: Any
) -> jax.Array:
    """Draws 16 bits per element, with one key per index of the leading axis.

    Args:
      key: a typed key.
      shape: the leaf's shape.
      first: the number of the leading axis's first index, for a slice of a stack.
      sharding: the leaf's sharding under explicit sharding, otherwise None.

    Returns:
      A uint16 array of this shape.
    """
    if not shape:
        return jax.random.bits(key, (), jnp.uint16)
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = fold_in(key, first + jnp.arange(shape[0]))
    keys = _sharding.reshard(keys, _sharding.sharding_of_axes(sharding, [0]))
    one_sharding = _sharding.sharding_of_axes(sharding, range(1, len(shape)))

    def draw_one(key: jax.Array) -> jax.Array:
        return jax.random.bits(key, shape[1:], jnp.uint16, out_sharding=one_sharding)

    return jax.vmap(draw_one)(keys)
