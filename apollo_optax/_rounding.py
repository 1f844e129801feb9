"""The grid of int8 codes, and rounding to it and to bfloat16, to nearest or stochastically."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from apollo_optax import _sharding
from apollo_optax._blocks import place_axes

_LOWEST, _HIGHEST = -128, 127
# Steps that a new grid lays over its group's range. Of the 255 between 256 codes, one lets the zero
# point be a whole number with both ends still inside; the hundredth covers divisions a few ulp off, as
# accelerators have them.
_STEPS = 253.99


class Grid(NamedTuple):
    """What the codes of each group stand for; of size 1 along the axes of places.

    In float32 or float64, the dtype in which values are computed.
    """

    scale: jax.Array
    zero_point: jax.Array

    @classmethod
    def load(
        cls, scale: jax.Array, zero_point: jax.Array, axis: int, dtype: Any
    ) -> "Grid":
        """The grid of a :class:`QuantizedArray`, with values in `dtype`."""
        places = place_axes(axis)
        return cls(
            *(jnp.expand_dims(x, places).astype(dtype) for x in (scale, zero_point))
        )

    def stored(self, axis: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The scale, in `dtype`, and the zero point of a :class:`QuantizedArray`."""
        scale, zero_point = (jnp.squeeze(x, place_axes(axis)) for x in self)
        return scale.astype(dtype), zero_point.astype(jnp.int8)

    def values(self, codes: jax.Array) -> jax.Array:
        return (codes.astype(self.scale.dtype) - self.zero_point) * self.scale

    def codes(self, values: jax.Array, bits: jax.Array | None) -> jax.Array:
        """The int8 codes of `values`: to nearest, or by 16 random bits each."""
        steps = jnp.round(values / self.scale)
        if bits is not None:
            # By what nearest rounding leaves, which is exact: a difference of codes times a scale has at most
            # 9 + 8 bits. So a weight on the grid stays there, where a quotient a little too small would fall.
            left = (values - steps * self.scale) / self.scale
            steps += jnp.floor(left + (bits.astype(left.dtype) + 0.5) / 2**16)
        return jnp.clip(steps + self.zero_point, _LOWEST, _HIGHEST).astype(jnp.int8)

    def covers(self, low: jax.Array, high: jax.Array) -> jax.Array:
        lowest, highest = _LOWEST - self.zero_point, _HIGHEST - self.zero_point
        return (lowest * self.scale <= low) & (high <= highest * self.scale)


def value_range(values: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The least and the largest of each group and 0."""
    places = place_axes(axis)
    low, high = (
        jnp.min(values, places, keepdims=True),
        jnp.max(values, places, keepdims=True),
    )
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def needed_scale(low: jax.Array, high: jax.Array) -> jax.Array:
    """At least the smallest that devices don't flush to 0, for groups of zeros and of numbers as small."""
    # Halved, since the difference of two float32 numbers need not be one.
    needed = (high / 2 - low / 2) / (_STEPS / 2)
    return jnp.maximum(needed, jnp.finfo(jnp.bfloat16).tiny)


def new_grid(low: jax.Array, high: jax.Array) -> Grid:
    needed = needed_scale(low, high)
    # Up to bfloat16 by bits: a cast there and back is a pair of casts that XLA may drop.
    pattern = jax.lax.bitcast_convert_type(needed.astype(jnp.float32), jnp.uint32)
    up = jax.lax.bitcast_convert_type(
        (pattern + 0xFFFF) >> 16 << 16, jnp.float32
    ).astype(needed.dtype)
    scale = jnp.where(needed <= jnp.finfo(jnp.bfloat16).max, up, jnp.nan)
    below = jnp.ceil(-low / scale)  # Steps below 0.
    below += below * scale < -low  # Where the quotient came out a little small.
    return Grid(scale, below + _LOWEST)


def round_to_bfloat16(values: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds float32 `values` by 16 random bits each; what is not finite is cast."""
    # A bfloat16 is the upper half of a float32, and the random half carries into it as often as it should.
    pattern = jax.lax.bitcast_convert_type(values, jnp.uint32) + bits.astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(
        (pattern >> 16).astype(jnp.uint16), jnp.bfloat16
    )
    return jnp.where(jnp.isfinite(values), rounded, values.astype(jnp.bfloat16))


def random_bits(
    key: jax.Array, shape: tuple[int, ...], first: Any, sharding: Any
) -> jax.Array:
    """16 bits for each element of a leaf, each index of the leading axis with a key of its own.

    Args:
      key: a typed key.
      shape: of the leaf.
      first: what the leading axis is counted from.
      sharding: under explicit sharding, that of the leaf.

    Returns:
      A uint16 array of this shape.
    """
    if not shape:
        return jax.random.bits(key, (), jnp.uint16)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        key, first + jnp.arange(shape[0])
    )
    keys = _sharding.place(keys, _sharding.pick(sharding, [0]))
    one_sharding = _sharding.pick(sharding, range(1, len(shape)))

    def draw_one(key: jax.Array) -> jax.Array:
        return jax.random.bits(key, shape[1:], jnp.uint16, out_sharding=one_sharding)

    return jax.vmap(draw_one)(keys)
