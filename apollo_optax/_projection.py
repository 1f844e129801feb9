"""What the projection P is: drawn from a key, taken from the gradient, or the caller's own.

Step 1 of the algorithm. ``P`` has shape ``(r, m)`` for each matrix, ``m`` the contracted size, and is a
pure function of the key, the leaf, the refresh and the batch element, so it is never stored and is
the same on any mesh. The exception is the SVD, which needs the gradient of the refresh step.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apollo_optax import _sharding, _tree
from apollo_optax._dimension_numbers import MatrixAxes

Shape = tuple[int, ...]
Draw = Callable[[jax.Array, Shape], jax.Array]
DRAWN = ("random", "rademacher")
NAMES = (*DRAWN, "svd")

_SEED_IMPL = "threefry2x32"  # A seed means the same run whatever JAX's default generator.


def key_impl(key: Any) -> Any:
    """The generator behind `key`, as ``jax.random.wrap_key_data`` takes it; checks the key."""
    impl = jax_key_impl(key)
    if impl is not None:
        return impl
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        if not 0 <= key < 2**32:  # JAX would cut it to 32 bits, or not, as its settings are.
            raise ValueError(f"key must be a seed from 0 to 2**32 - 1, got {key!r}")
        return _SEED_IMPL
    is_array = isinstance(key, (jax.Array, np.ndarray))
    if is_array and key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer):
        return _SEED_IMPL
    raise TypeError(
        "key must be an int seed (or an integer scalar array), one JAX key from jax.random.key, or the raw "
        f"data of one of JAX's default generator, got {key!r}"
    )


def jax_key_impl(key: Any) -> Any:
    """The generator of one JAX key, typed or raw; None if `key` is anything else."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.key_impl(key) if key.shape == () else None
    if isinstance(key, (jax.Array, np.ndarray)) and key.dtype == jnp.uint32:
        impl = jax.random.key_impl(jax.random.key(0))
        return impl if key.shape == key_data_shape(impl) else None
    return None


def key_data_shape(impl: Any) -> Shape:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl))).shape


def key_data(key: Any) -> jax.Array:
    """The raw data of `key`, copied: a uint32 vector, ``(2,)`` for a seed."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    elif jnp.ndim(key) == 0:
        key = jax.random.key_data(jax.random.key(key, impl=_SEED_IMPL))
    # A copy, since a step that is given its state donates it, and the key is the caller's.
    return jnp.array(key, copy=True)


def leaf_id(path: _tree.Path) -> np.uint32:
    """A 32-bit hash of a leaf's path: its draws depend on its name, not on its place among others."""
    return np.uint32(int.from_bytes(hashlib.sha256(_tree.show(path).encode()).digest()[:4], "big"))


def batch_keys(
    key: jax.Array, leaf: jax.typing.ArrayLike, refresh: jax.Array, size: int, first: jax.typing.ArrayLike = 0
) -> jax.Array:
    """One key for each batch element of a leaf, from `first` on, at a refresh (counted from 0)."""
    of_leaf = jnp.stack([jnp.asarray(leaf, jnp.uint32), jnp.asarray(refresh, jnp.uint32)])

    def of_element(index: jax.Array) -> jax.Array:
        # The loop compiles one fold_in, not three.
        data = jnp.append(of_leaf, index.astype(jnp.uint32))
        return jax.lax.fori_loop(0, 3, lambda i, key: jax.random.fold_in(key, data[i]), key)

    return mapped(of_element, key)(jnp.asarray(first) + jnp.arange(size))


def mapped(function: Callable[[jax.Array], jax.Array], keys: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Maps over an axis what draws with keys like these."""
    if str(jax.random.key_impl(keys)) == _SEED_IMPL:
        return jax.vmap(function)
    # Of other generators, vmap takes all bits from the first key.
    return functools.partial(jax.lax.map, function)


def _normal(key: jax.Array, shape: Shape, dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / jnp.sqrt(jnp.asarray(shape[0], dtype))


def _rademacher(key: jax.Array, shape: Shape, dtype: jnp.dtype) -> jax.Array:
    """Entries +-1/sqrt(r), each from one bit of the generator rather than a word."""
    rows, columns = shape[0], math.prod(shape[1:])
    words = jax.random.bits(key, (rows, math.ceil(columns / 32)), jnp.uint32)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    signs = 1 - 2 * bits.reshape(rows, -1)[:, :columns].astype(dtype)
    return (signs / jnp.sqrt(jnp.asarray(rows, dtype))).reshape(shape)


def draw(
    projection: str | Draw,
    keys: jax.Array,
    axes: MatrixAxes,
    rank: int,
    dtype: jnp.dtype,
    sharding: Any = None,
) -> jax.Array:
    """The projections of all matrices of a leaf.

    Args:
      projection: ``"random"``, ``"rademacher"`` or a callable ``(key, (r, m)) -> P``.
      keys: a key for each batch element.
      axes: the leaf's axes.
      rank: the rank asked for; clipped to the contracted size.
      dtype: float32 or float64.
      sharding: under explicit sharding, that of the result.

    Returns:
      An array of shape ``(*batch, r, *contracted)``.
    """
    one_shape = axes.projection_shape(rank)[len(axes.batch) :]

    def draw_one(key: jax.Array) -> jax.Array:
        if not isinstance(projection, str):
            matrix = projection(key, (axes.clip_rank(rank), axes.contracted_size))
            return jnp.asarray(matrix, dtype).reshape(one_shape)
        if projection == "rademacher":
            return _rademacher(key, one_shape, dtype)
        return _normal(key, one_shape, dtype)

    draw_all: Any = draw_one
    for _ in axes.batch:
        draw_all = mapped(draw_all, keys)
    # XLA has each device draw the part that it is to hold, whatever the draw is made of.
    return _sharding.automatic(draw_all, sharding)(keys.reshape(axes.batch_shape))


def check_callable(projection: Draw, path: _tree.Path, axes: MatrixAxes, rank: int) -> None:
    """Refuses a callable whose result is no real ``(r, m)`` array, before any step is taken."""
    expected = (axes.clip_rank(rank), axes.contracted_size)
    result = jax.eval_shape(lambda key: jnp.asarray(projection(key, expected)), jax.random.key(0))
    if result.shape != expected or not jnp.issubdtype(result.dtype, jnp.floating):
        raise ValueError(
            f"projection(key, {expected}) returned shape {result.shape} and dtype {result.dtype} for "
            f"'{_tree.show(path)}'; it must return a real floating-point array of the shape it is given"
        )


def from_svd(gradient: jax.Array, previous: jax.Array, axes: MatrixAxes, rank: int) -> jax.Array:
    """The top singular vectors of a gradient on its contracted side, as rows, signs settled.

    Moments outlive a refresh, and the SVD leaves signs open. A row takes the sign that makes its inner
    product with the row it replaces non-negative; where it replaces nothing, at the first refresh,
    its largest entry is positive.

    Args:
      gradient: a tensor of the leaf's shape.
      previous: the projections so far, ``(*batch, r, *contracted)``; zero before the first refresh.
      axes: the leaf's axes.
      rank: the rank asked for; clipped to the contracted size.

    Returns:
      An array like `previous`.
    """

    def of_one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        # One matrix is small; its SVD is not worth distributing.
        tensor, before = map(_sharding.everywhere, pair)
        u, _, _ = jnp.linalg.svd(tensor.reshape(axes.contracted_size, -1), full_matrices=False)
        rows = u[:, : axes.clip_rank(rank)].T
        before = before.reshape(rows.shape)
        largest = jnp.take_along_axis(rows, jnp.argmax(jnp.abs(rows), -1, keepdims=True), -1)[..., 0]
        is_first = jnp.all(before == 0, axis=-1)
        agreement = jnp.where(is_first, largest, jnp.sum(rows * before, axis=-1))
        signed = jnp.where(agreement < 0, -1, 1)[..., None] * rows
        return signed.astype(previous.dtype).reshape(pair[1].shape)

    def of_all(gradient: jax.Array, previous: jax.Array) -> jax.Array:
        ordered = jnp.transpose(gradient, (*axes.batch, *axes.contracted, *axes.channel))
        of_batch: Any = of_one
        for _ in axes.batch:  # One after the other, so that the whole of only one is there at a time.
            of_batch = functools.partial(jax.lax.map, of_batch)
        return of_batch((ordered, previous))

    return _sharding.automatic(of_all, _sharding.of(previous))(gradient, previous)
