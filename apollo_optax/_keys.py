"""Random keys: the caller's, and those of leaves and batch elements made from it.

The key of batch element ``b`` of a leaf is
``fold_in(fold_in(fold_in(key, leaf id), refresh), b)``. It is a function of names and
numbers alone, so a draw is the same on any mesh, eager or jitted, before and after a
checkpoint, and whatever other leaves there are.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from apollo_optax import _check, _sharding, _tree

SEED_IMPL = "threefry2x32"  # A seed gives the same run under any default generator.


def key_impl(key: Any) -> Any:
    """The generator of `key`, as ``jax.random.wrap_key_data`` takes it."""
    impl = jax_key_impl(key)
    if impl is not None:
        return impl
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        # JAX truncates a larger seed to 32 bits or not, depending on its settings.
        if not 0 <= key < 2**32:
            raise ValueError(f"key must be a seed from 0 to 2**32 - 1, got {key!r}")
        return SEED_IMPL
    is_array = isinstance(key, (jax.Array, np.ndarray))
    if is_array and key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer):
        return SEED_IMPL
    raise TypeError(
        "key must be an int seed (or an integer scalar array), one JAX key from "
        "jax.random.key, or the raw data of one of JAX's default generator, got "
        f"{key!r}"
    )


def jax_key_impl(key: Any) -> Any:
    """The generator of one JAX key, typed or raw; None if `key` is anything else."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.key_impl(key) if key.shape == () else None
    if isinstance(key, (jax.Array, np.ndarray)) and key.dtype == jnp.uint32:
        impl = jax.random.key_impl(jax.random.key(0))
        return impl if key.shape == key_data_shape(impl) else None
    return None


def key_data_shape(impl: Any) -> tuple[int, ...]:
    return jax.eval_shape(
        lambda: jax.random.key_data(jax.random.key(0, impl=impl))
    ).shape


def key_data(key: Any) -> jax.Array:
    """The raw data of `key`, copied: a uint32 vector, ``(2,)`` for a seed."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    elif jnp.ndim(key) == 0:
        key = jax.random.key_data(jax.random.key(key, impl=SEED_IMPL))
    # A step that donates the state would otherwise delete the caller's key.
    return jnp.array(key, copy=True)


class StateKey:
    """The argument `key` of a transformation, and the state's key that it makes."""

    def __init__(self, key: Any) -> None:
        self._key, self._impl = key, key_impl(key)
        self._shape = key_data_shape(self._impl)

    def init(self, replicated: NamedSharding | None) -> dict[str, jax.Array]:
        """The state's field `key`."""
        data = key_data(self._key)
        return {"key": _sharding.device_put_if_concrete(data, replicated)}

    def check(self, stored: Any) -> None:
        """Raises if the state's key is one of another generator."""
        _check.key_shape(stored, self._shape)

    def source(
        self, stored: jax.Array, refresh: jax.Array, batch_index: jax.Array
    ) -> "KeySource":
        """What the keys of a step are made from, given the state's key."""
        key = jax.random.wrap_key_data(stored, impl=self._impl)
        return KeySource(key, refresh, batch_index)


def leaf_id(path: _tree.Path) -> np.uint32:
    """A 32-bit hash of a leaf's path, so that draws depend on names alone."""
    digest = hashlib.sha256(_tree.show(path).encode()).digest()
    return np.uint32(int.from_bytes(digest[:4], "big"))


class KeySource(NamedTuple):
    """What one step's keys are made from; arrays, so that no step is compiled anew."""

    key: jax.Array  # The state's key, typed.
    refresh: jax.Array  # The number of the draw, counted from 0.
    batch_index: jax.Array  # The first index on the leaves' leading axis; usually 0.

    def leaf_keys(
        self, leaf_id: jax.typing.ArrayLike, batch_shape: tuple[int, ...]
    ) -> jax.Array:
        """One key per batch element of a leaf, ``(batch size,)``."""
        data = jnp.stack(
            [jnp.asarray(leaf_id, jnp.uint32), jnp.asarray(self.refresh, jnp.uint32)]
        )

        def element_key(index: jax.Array) -> jax.Array:
            # A loop compiles one fold_in where three calls would compile three.
            folded = jnp.append(data, index.astype(jnp.uint32))
            return jax.lax.fori_loop(
                0, 3, lambda i, key: jax.random.fold_in(key, folded[i]), self.key
            )

        first = self.batch_index * math.prod(batch_shape[1:])
        indices = jnp.asarray(first) + jnp.arange(math.prod(batch_shape))
        return vmap_with_keys(element_key, self.key)(indices)


def vmap_with_keys(
    function: Callable[[jax.Array], jax.Array], keys: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """Maps a function that draws with keys of the generator of `keys` over an axis."""
    if str(jax.random.key_impl(keys)) == SEED_IMPL:
        return jax.vmap(function)
    # For other generators vmap would draw every element's bits from the first key.
    return functools.partial(jax.lax.map, function)
