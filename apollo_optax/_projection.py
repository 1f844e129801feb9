"""What the projection ``P`` is: a class per kind of projection.

Step 1 of the algorithm. ``P`` has the shape ``(r, m)`` for each matrix. A drawn
projection is a function of a key alone (see :mod:`apollo_optax._keys`), so it is never
stored. A stored one is computed from the gradient at refresh steps and kept in the
state between them.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from apollo_optax import _check, _keys, _sharding, _tree
from apollo_optax._matrix import Matrix

Shape = tuple[int, ...]
Draw = Callable[[jax.Array, Shape], jax.Array]


class Projection(abc.ABC):
    """A kind of projection; instances are hashable, as constants of compiled code."""

    is_stored: bool

    @abc.abstractmethod
    def at(
        self,
        matrix: Matrix,
        drawn: jax.Array | None,
        gradient: jax.Array,
        stored: jax.Array | None,
        is_refresh: jax.Array,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Step 1 of an update: the projections of a leaf, and those to store.

        Args:
          matrix: the leaf's axes, dtype and rank.
          drawn: what :meth:`Drawn.draw` made of the leaf's keys; None if `is_stored`.
          gradient: the leaf, in ``matrix.dtype``.
          stored: the projections in the state; None unless `is_stored`.
          is_refresh: whether this step is the first with a new projection; a scalar.

        Returns:
          ``(*batch, r, *contracted)``, and the same for the state or None.
        """

    def check(self, path: _tree.Path, matrix: Matrix) -> None:  # noqa: B027
        """Raises if the projection does not fit a leaf; most projections fit all."""


class Drawn(Projection):
    """A projection that is a function of a key; subclasses define :meth:`draw_one`."""

    is_stored = False

    @abc.abstractmethod
    def draw_one(self, key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        """The projection of one matrix, ``(r, *contracted)``."""

    def draw(self, matrix: Matrix, keys: jax.Array) -> jax.Array:
        """The projections of a leaf from one key per batch element.

        ``(batch size,)`` keys to ``(*batch, r, *contracted)``, sharded as the leaf is.
        With full rank nothing is projected: ``P`` is the identity. A random square
        ``P`` would save nothing, and scale the update by chance.
        """
        one_shape = matrix.projection_shape[len(matrix.batch_shape) :]

        def draw_one(key: jax.Array) -> jax.Array:
            if matrix.is_full_rank:
                return jnp.eye(matrix.rank, dtype=matrix.dtype).reshape(one_shape)
            return self.draw_one(key, one_shape, matrix.dtype)

        draw_all: Any = draw_one
        for _ in matrix.batch_shape:
            draw_all = _keys.vmap_with_keys(draw_all, keys)
        # XLA has each device draw only the shard that it multiplies with.
        draw_all = _sharding.with_auto_axes(draw_all, matrix.projection_sharding)
        return draw_all(keys.reshape(matrix.batch_shape))

    def at(
        self,
        matrix: Matrix,
        drawn: Any,
        gradient: jax.Array,
        stored: jax.Array | None,
        is_refresh: jax.Array,
    ) -> tuple[jax.Array, None]:
        return drawn, None


class Stored(Projection):
    """A projection made from the gradient; subclasses define :meth:`refresh_one`."""

    is_stored = True

    @abc.abstractmethod
    def refresh_one(self, gradient: jax.Array, previous: jax.Array) -> jax.Array:
        """The projection of one matrix from this step on.

        Args:
          gradient: ``(m, n)``, the contracted side first, on every device. It is not
            zero.
          previous: the projection so far, ``(r, m)``; zero if there is none yet.

        Returns:
          An array of the shape of `previous`.
        """

    def refresh(
        self,
        matrix: Matrix,
        gradient: jax.Array,
        previous: jax.Array,
        is_replaced: jax.Array,
    ) -> jax.Array:
        """:meth:`refresh_one` for some matrices of a leaf.

        Args:
          matrix: the leaf's axes, dtype and rank.
          gradient: the leaf.
          previous: the projections so far, ``(*batch, r, *contracted)``.
          is_replaced: which matrices get another projection, ``batch``.

        Returns:
          An array like `previous`.
        """
        axes = matrix.axes

        def refresh_one(one: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            # A single matrix is small, so its refresh is not worth distributing.
            tensor, before, replace = map(_sharding.replicate, one)

            def replaced() -> jax.Array:
                flat = tensor.reshape(axes.contracted_size, -1)
                rows = self.refresh_one(flat, before.reshape(matrix.rank, -1))
                return rows.astype(before.dtype).reshape(before.shape)

            return jax.lax.cond(replace, replaced, lambda: before)

        def over(batch_axis: int, function: Any) -> Any:
            sharding = matrix.sharding
            if sharding is not None and _sharding.mesh_axes(sharding, batch_axis):
                return jax.vmap(function)  # A loop over a sharded axis would gather it.
            # One matrix after the other, so that only one is replicated at a time.
            return functools.partial(jax.lax.map, function)

        def refresh_all(gradient: jax.Array, *others: jax.Array) -> jax.Array:
            refresh_batch: Any = refresh_one
            for axis in reversed(axes.batch):
                refresh_batch = over(axis, refresh_batch)
            return refresh_batch((jnp.transpose(gradient, axes.order), *others))

        sharding = _sharding.sharding_of(previous)
        return _sharding.with_auto_axes(refresh_all, sharding)(
            gradient, previous, is_replaced
        )

    def at(
        self,
        matrix: Matrix,
        drawn: jax.Array | None,
        gradient: jax.Array,
        stored: Any,
        is_refresh: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        # A gradient of zero, such as that of an expert that saw no token, has no
        # directions, and neither has one that is not finite. Its matrix keeps its
        # projection. If it has none yet, the first other gradient makes one, in
        # whichever step that is.
        is_missing = matrix.reduce(jnp.max, jnp.abs(stored)) == 0

        def refreshed(previous: jax.Array) -> jax.Array:
            largest = matrix.side_largest(gradient, ())
            is_due, is_there = (
                _sharding.reshard(x, matrix.norm_sharding)
                for x in (
                    is_missing | is_refresh,
                    (largest > 0) & (largest < jnp.inf),
                )
            )
            return self.refresh(matrix, gradient, previous, is_due & is_there)

        stored = jax.lax.cond(
            is_refresh | jnp.any(is_missing),
            refreshed,
            lambda previous: previous,
            stored,
        )
        return _sharding.reshard(stored, matrix.projection_sharding), stored


@dataclasses.dataclass(frozen=True)
class Normal(Drawn):
    """Entries i.i.d. normal with variance ``1 / r``, as in the paper."""

    def draw_one(self, key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) / jnp.sqrt(
            jnp.asarray(shape[0], dtype)
        )


@dataclasses.dataclass(frozen=True)
class Rademacher(Drawn):
    """Entries ``+-1 / sqrt(r)``, each from one random bit rather than one word."""

    def draw_one(self, key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        rows, columns = shape[0], math.prod(shape[1:])
        words = jax.random.bits(key, (rows, math.ceil(columns / 32)), jnp.uint32)
        # The shifts have the words' number of axes, since users may forbid JAX to add
        # axes by itself (jax_numpy_rank_promotion="raise").
        shifts = jnp.arange(32, dtype=jnp.uint32)[None, None, :]
        bits = (words[:, :, None] >> shifts) & 1
        signs = 1 - 2 * bits.reshape(rows, -1)[:, :columns].astype(dtype)
        return (signs / jnp.sqrt(jnp.asarray(rows, dtype))).reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class FromCallable(Drawn):
    """The caller's own function ``(key, (r, m)) -> P``."""

    function: Draw

    # Callables compare by identity, since their own == and hash may not work.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, FromCallable) and self.function is other.function

    def __hash__(self) -> int:
        return hash(id(self.function))

    def draw_one(self, key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        matrix = self.function(key, (shape[0], math.prod(shape[1:])))
        return jnp.asarray(matrix, dtype).reshape(shape)

    def check(self, path: _tree.Path, matrix: Matrix) -> None:
        expected = (matrix.rank, math.prod(matrix.contracted_shape))
        result = jax.eval_shape(
            lambda key: jnp.asarray(self.function(key, expected)), jax.random.key(0)
        )
        is_real = jnp.issubdtype(result.dtype, jnp.floating)
        if result.shape != expected or not is_real:
            raise ValueError(
                f"projection(key, {expected}) returned shape {result.shape} and dtype "
                f"{result.dtype} for '{_tree.show(path)}'; it must return a real "
                "floating-point array of the shape it is given"
            )


@dataclasses.dataclass(frozen=True)
class TopSingularVectors(Stored):
    """The gradient's top singular vectors on its contracted side, as rows.

    Moments outlive a refresh, and an SVD leaves signs open. A row takes the sign that
    makes its inner product with the row it replaces non-negative. At the first refresh,
    where a row replaces nothing, its largest entry is positive.
    """

    def refresh_one(self, gradient: jax.Array, previous: jax.Array) -> jax.Array:
        u, _, _ = jnp.linalg.svd(gradient, full_matrices=False)
        rows = u[:, : previous.shape[0]].T
        at_largest = jnp.argmax(jnp.abs(rows), -1, keepdims=True)
        largest = jnp.take_along_axis(rows, at_largest, -1)[..., 0]
        is_first = jnp.all(previous == 0, axis=-1)
        agreement = jnp.where(is_first, largest, jnp.sum(rows * previous, axis=-1))
        return jnp.where(agreement < 0, -1, 1)[..., None] * rows


NAMED: dict[str, Projection] = {
    "rademacher": Rademacher(),
    "random": Normal(),
    "svd": TopSingularVectors(),
}


def resolve(projection: Any) -> Projection:
    """The projection that the argument of :func:`scale_by_apollo` names or is."""
    if isinstance(projection, Projection):
        return projection
    if callable(projection):
        return FromCallable(cast(Draw, projection))
    _check.one_of("projection", projection, NAMED, " or a callable (key, (r, m)) -> P")
    return NAMED[projection]
