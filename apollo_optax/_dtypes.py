"""Which floating-point dtype to compute in, and values that need care in it."""

from typing import Any

import jax
import jax.numpy as jnp


def wide_dtype(dtype: Any) -> Any:
    """The dtype to compute in: float64 for float64, float32 for everything else."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def saturating_cast(array: jax.Array, dtype: Any) -> jax.Array:
    """Casts to `dtype`; finite values saturate instead of overflowing to infinity.

    float16 ends at 65504, for example. NaN and infinity are kept.
    """
    if jnp.finfo(dtype).max < jnp.finfo(array.dtype).max:
        clipped = jnp.clip(array, jnp.finfo(dtype).min, jnp.finfo(dtype).max)
        array = jnp.where(jnp.isinf(array), array, clipped)
    return array.astype(dtype)


def one_if_zero(x: jax.Array) -> jax.Array:
    """`x` as a divisor, with 1 in place of 0."""
    return jnp.where(x == 0, jnp.ones_like(x), x)


def nan_to_infinity(array: jax.Array) -> jax.Array:
    """Replaces NaN by infinity, for a maximum that has to show it.

    XLA for CPUs leaves NaN out of a maximum over an array of 4,096 or more float32
    numbers.
    """
    return jnp.where(jnp.isnan(array), jnp.inf, array)
