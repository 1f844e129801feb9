"""A leaf as a batch of matrices: its axes, sharding, dtype, rank and algebra.

Tensors are never reshaped into matrices: a reshape that merges a sharded axis with
another would make XLA gather the tensor. :class:`Matrix` contracts, reduces and
broadcasts over the axes where they are, and places its own results.

Shapes below: ``batch``, ``contracted`` and ``channel`` stand for the sizes of those
axes, in this order of axes. ``m`` and ``n`` are the products of the latter two, and
``r`` is the rank. Factors and norms that several channels share have size 1 on the
channel axes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from apollo_optax import _sharding
from apollo_optax._dimension_numbers import MatrixAxes
from apollo_optax._dtypes import nan_to_infinity, saturating_cast

# The default precision is bfloat16 products on TPUs and TF32 on GPUs.
HIGHEST = jax.lax.Precision.HIGHEST

ScaleType = Callable[[int], tuple[int, ...]]

SCALE_TYPES: dict[str, ScaleType] = {
    "channel": lambda channel_axes: (),
    "tensor": lambda channel_axes: tuple(range(channel_axes)),
}
"""Maps a matrix's number of channel axes to those that share a scaling factor.

A scaling factor is a ratio of norms over the rank axis and the shared channel axes. The
limiter takes the gradient's norms over the contracted side and the same channel axes,
so both sides of ``|U|^2 = sum_j s_j^2 |G_j|^2`` follow from one entry.
"""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """All that an update needs to know about a leaf; hashable, so static under ``jit``.

    Attributes:
      axes: which axes of the leaf are batch, contracted and channel.
      sharding: the leaf's sharding; None if it is not known. Under ``jit`` it is the
        sharding in the type, which is known under explicit sharding only.
      dtype: the dtype in which moments, norms and factors are computed.
      rank: the rank of the projection, clipped to ``m``; 0 if nothing is projected.
      is_on_one_device: whether the leaf is known to be on a single device.
    """

    axes: MatrixAxes
    sharding: NamedSharding | None
    dtype: np.dtype
    rank: int = 0
    is_on_one_device: bool = False

    @classmethod
    def of_parameter(
        cls, leaf: Any, axes: MatrixAxes, dtype: Any, rank: int = 0
    ) -> "Matrix":
        """For a parameter, concrete or abstract, to make or place its state."""
        sharding = _sharding.sharding_of(leaf)
        return cls(axes, sharding, jnp.dtype(dtype), min(rank, axes.contracted_size))

    @classmethod
    def of_gradient(
        cls, leaf: jax.Array, axes: MatrixAxes, dtype: Any, rank: int = 0
    ) -> "Matrix":
        """For a gradient, concrete or traced, to compute with it under ``jit``."""
        return cls(
            axes,
            _sharding.explicit_sharding_of(leaf),
            jnp.dtype(dtype),
            min(rank, axes.contracted_size),
            _sharding.is_on_one_device(leaf),
        )

    # Shapes.

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.axes.sizes(self.axes.batch)

    @property
    def contracted_shape(self) -> tuple[int, ...]:
        return self.axes.sizes(self.axes.contracted)

    @property
    def is_full_rank(self) -> bool:
        return self.rank == self.axes.contracted_size

    @property
    def moment_shape(self) -> tuple[int, ...]:
        """``(*batch, r, *channel)``, the shape of a projected gradient."""
        return (*self.batch_shape, self.rank, *self.axes.sizes(self.axes.channel))

    @property
    def projection_shape(self) -> tuple[int, ...]:
        """``(*batch, r, *contracted)``."""
        return (*self.batch_shape, self.rank, *self.contracted_shape)

    def without_batch_axis(self) -> "Matrix":
        """The matrix of one element of the first batch axis; on one device only."""
        return dataclasses.replace(self, axes=self.axes.without_batch_axis())

    # Shardings, where they are known.

    @property
    def norm_sharding(self) -> NamedSharding | None:
        """The sharding of ``(*batch,)``, that of the leaf's batch axes."""
        return _sharding.sharding_of_axes(self.sharding, self.axes.batch)

    @property
    def projection_sharding(self) -> NamedSharding | None:
        """The sharding of ``(*batch, r, *contracted)``, that of the leaf's axes."""
        axes = (*self.axes.batch, None, *self.axes.contracted)
        return _sharding.sharding_of_axes(self.sharding, axes)

    @property
    def moment_sharding(self) -> NamedSharding | None:
        """The sharding of ``(*batch, r, *channel)``, over the leaf's devices.

        Mesh axes that shard the batch or the channel side stay there. A moment does not
        have the contracted side, so mesh axes that shard it move to the channel side,
        and the sum of partial projections can be a reduce-scatter. If the channel size
        is not divisible, they move to the rank axis. If the rank is not divisible
        either, the moment is replicated over them.
        """
        if self.sharding is None:
            return None
        leaf_axes = (*self.axes.batch, None, *self.axes.channel)
        names = [
            () if axis is None else _sharding.mesh_axes(self.sharding, axis)
            for axis in leaf_axes
        ]
        rank_axis = len(self.axes.batch)
        candidates = [*range(rank_axis + 1, len(names)), rank_axis]
        sizes = dict(self.sharding.mesh.shape)
        moved = [
            name
            for axis in self.axes.contracted
            for name in _sharding.mesh_axes(self.sharding, axis)
            if sizes[name] > 1
        ]
        for name in moved:
            for axis in candidates:
                devices = math.prod(sizes[n] for n in (*names[axis], name))
                if self.moment_shape[axis] % devices == 0:
                    names[axis] = (*names[axis], name)
                    break
        return _sharding.named_sharding(self.sharding, names)

    # Algebra.

    def project(
        self, projection: jax.Array, tensor: jax.Array, moment: jax.Array
    ) -> jax.Array:
        """``R = P G``: ``(*batch, r, *contracted)``, leaf to ``(*batch, r, *channel)``.

        The result has the dtype of `projection` and is placed where `moment` is, whose
        sharding follows the parameter's. The gradient's own sharding may differ.

        The product is that of :func:`product`, so a bfloat16 tensor is multiplied
        without a float32 copy. At rank 1 CPUs and GPUs compute a weighted sum in the
        pass that takes the norms. TPUs do not: the fused pass would keep XLA from
        streaming weights from host memory layer by layer (:func:`layerwise_step`).
        """
        rank_axis, ndim = len(self.axes.batch), len(self.axes.shape)
        dtype = projection.dtype
        out_sharding = _sharding.sharding_of(moment) or self.moment_sharding

        # Moments that are sharded along the rank axis would make XLA shard P that way
        # too, and gather the gradient to match.
        def placed(projection: jax.Array) -> jax.Array:
            return _sharding.keep_axis_unsharded(projection, rank_axis, tensor)

        def multiplied(projection: jax.Array, tensor: jax.Array) -> jax.Array:
            new_axis = ndim  # Names the rank axis, which the tensor does not have.
            return product(
                projection,
                (*self.axes.batch, new_axis, *self.axes.contracted),
                tensor,
                tuple(range(ndim)),
                (*self.axes.batch, new_axis, *self.axes.channel),
                dtype=tensor.dtype,
                sum_dtype=dtype,
                out_sharding=out_sharding,
                place=placed,
            )

        def summed(projection: jax.Array, tensor: jax.Array) -> jax.Array:
            row = self.spread(jnp.squeeze(projection, rank_axis), self.axes.contracted)
            sums = self._sum(row * tensor.astype(dtype), self.axes.contracted)
            return _sharding.reshard(jnp.expand_dims(sums, rank_axis), out_sharding)

        if projection.shape[rank_axis] > 1:
            return multiplied(projection, tensor)
        return jax.lax.platform_dependent(
            projection, tensor, tpu=multiplied, default=summed
        )

    def norms(self, moment: jax.Array, scale_type: ScaleType) -> jax.Array:
        """Norms of a projected gradient per scaling factor, over its rank axis.

        ``(*batch, r, *channel)`` to ``(*batch, *channel)``, size 1 on shared channel
        axes.
        """
        rank_axis = len(self.axes.batch)
        shared = self._shared_axes(scale_type, rank_axis + 1)
        squares = jnp.sum(jnp.square(moment), axis=(rank_axis, *shared), keepdims=True)
        return jnp.squeeze(jnp.sqrt(squares), rank_axis)

    def norms_of_two(
        self, first: jax.Array, second: jax.Array, scale_type: ScaleType
    ) -> tuple[jax.Array, jax.Array]:
        """The `norms` of two arrays of one shape.

        One reduction makes both on a GPU. XLA for GPUs fuses it with the update of the
        moments that are summed here. With two reductions in that kernel, XLA would not
        let it write the moments in place, and would copy them afterwards.
        """
        rank_axis = len(self.axes.batch)
        shared = self._shared_axes(scale_type, rank_axis + 1)

        def separate(
            first: jax.Array, second: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            return self.norms(first, scale_type), self.norms(second, scale_type)

        def together(
            first: jax.Array, second: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            zero = jnp.zeros((), first.dtype)
            sums = jax.lax.reduce(
                (jnp.square(first), jnp.square(second)),
                (zero, zero),
                lambda x, y: (x[0] + y[0], x[1] + y[1]),
                (rank_axis,),
            )
            return jnp.sqrt(sums[0]), jnp.sqrt(sums[1])

        if shared:  # Channels that share a factor are summed over too.
            return separate(first, second)
        return jax.lax.platform_dependent(
            first, second, cuda=together, default=separate
        )

    def gradient_norms(self, tensor: jax.Array, scale_type: ScaleType) -> jax.Array:
        """Norms of the leaf per scaling factor, over its contracted side.

        Leaf to ``(*batch, *channel)``, size 1 on shared channel axes.
        """
        squares, first = jnp.square(tensor), len(self.axes.batch)
        shared = self._shared_axes(scale_type, first)
        if not shared:
            return jnp.sqrt(self._sum(squares, self.axes.contracted))
        if self.is_on_one_device:
            # Summing per channel first lets XLA for GPUs take the projection's sum in
            # the same pass. A mesh that shards the contracted side would send a number
            # per channel for it, not one per matrix.
            norms = jnp.sqrt(self._sum(squares, self.axes.contracted))
            return jnp.sqrt(jnp.sum(jnp.square(norms), axis=shared, keepdims=True))
        reduced = tuple(self.axes.channel[axis - first] for axis in shared)
        sums = self._sum(squares, (*self.axes.contracted, *reduced))
        return jnp.expand_dims(jnp.sqrt(sums), shared)

    def tensor_norms(self, tensor: jax.Array) -> jax.Array:
        """Norm per matrix of a leaf, to ``(*batch,)``."""
        axes = (*self.axes.contracted, *self.axes.channel)
        return jnp.sqrt(jnp.sum(jnp.square(tensor), axis=axes))

    def matrix_norms(self, factors: jax.Array) -> jax.Array:
        """Norms of values per channel: ``(*batch, *channel)`` to ``(*batch,)``."""
        return jnp.sqrt(self.reduce(jnp.sum, jnp.square(factors)))

    def place_factors(self, factors: jax.Array) -> jax.Array:
        """Shards factors ``(*batch, *channel)``, or of size 1 there, as the leaf is."""
        shape = factors.shape[len(self.axes.batch) :]
        channel = (
            axis if size == self.axes.shape[axis] else None
            for size, axis in zip(shape, self.axes.channel, strict=True)
        )
        sharding = _sharding.sharding_of_axes(
            self.sharding, (*self.axes.batch, *channel)
        )
        return _sharding.reshard(factors, sharding)

    def per_channel(self, values: jax.Array) -> jax.Array:
        """Values per matrix as factors: ``(*batch,)`` to ``(*batch, 1, ...)``."""
        return self.per_side(values, self.axes.channel)

    @functools.partial(jax.jit, static_argnames="self")
    def scale(self, tensor: jax.Array, factors: jax.Array) -> jax.Array:
        """``U = G diag(s)``: the leaf, in its own dtype, times factors per channel.

        Jitted by itself, so that an eager step makes no float32 copy of the gradient.
        """
        wide = tensor.astype(self.dtype) * self.spread(factors, self.axes.channel)
        return saturating_cast(wide, tensor.dtype)

    # The methods below are for values along one side of the matrix. The argument `side`
    # is ``axes.contracted`` or ``axes.channel``, or ``()`` for one value per matrix.

    def side_shape(self, side: tuple[int, ...]) -> tuple[int, ...]:
        """``(*batch, *side)``."""
        return self.axes.sizes((*self.axes.batch, *side))

    def side_sharding(self, side: tuple[int, ...]) -> NamedSharding | None:
        """The sharding of ``(*batch, *side)``, that of the same axes of the leaf."""
        return _sharding.sharding_of_axes(self.sharding, (*self.axes.batch, *side))

    def place(self, values: jax.Array, side: tuple[int, ...]) -> jax.Array:
        """Shards values ``(*batch, *side)`` as the leaf is."""
        return _sharding.reshard(values, self.side_sharding(side))

    def side_sums(self, tensor: jax.Array, side: tuple[int, ...]) -> jax.Array:
        """Sums of a leaf over the axes of the other side, to ``(*batch, *side)``."""
        return self._sum(tensor, self._other_axes(side))

    def side_largest(self, tensor: jax.Array, side: tuple[int, ...]) -> jax.Array:
        """The largest magnitudes along the other side, to ``(*batch, *side)``.

        They are infinite where one is NaN.
        """
        magnitudes = nan_to_infinity(jnp.abs(tensor))
        return self._reduced(jnp.max, magnitudes, self._other_axes(side))

    def reduce(
        self, reduction: Callable[..., jax.Array], values: jax.Array
    ) -> jax.Array:
        """A reduction per matrix: ``(*batch, *side)`` to ``(*batch,)``."""
        return reduction(values, axis=tuple(range(len(self.axes.batch), values.ndim)))

    def per_side(self, values: jax.Array, side: tuple[int, ...]) -> jax.Array:
        """``(*batch,)`` to ``(*batch, 1, ...)``, for use with ``(*batch, *side)``."""
        values = _sharding.reshard(values, self.norm_sharding)
        first = len(self.axes.batch)
        return jnp.expand_dims(values, tuple(range(first, first + len(side))))

    def spread(self, values: jax.Array, side: tuple[int, ...]) -> jax.Array:
        """``(*batch, *side)`` in the leaf's order of axes, size 1 on the other side."""
        order = (*self.axes.batch, *side)
        other = tuple(axis for axis in range(len(self.axes.shape)) if axis not in order)
        return jnp.expand_dims(jnp.transpose(values, _argsort(order)), other)

    def _shared_axes(self, scale_type: ScaleType, first: int) -> tuple[int, ...]:
        """The shared channel axes of an array whose channel axes begin at `first`."""
        shared = scale_type(len(self.axes.channel))
        return tuple(first + axis for axis in shared)

    def _other_axes(self, side: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of the other side, or of both if `side` is empty."""
        kept = {*self.axes.batch, *side}
        return tuple(axis for axis in self.axes.order if axis not in kept)

    def _sum(self, tensor: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
        """The sum of a leaf over some axes, with the others in the matrix's order."""
        return self._reduced(jnp.sum, tensor, reduced)

    def _reduced(
        self,
        reduction: Callable[..., jax.Array],
        tensor: jax.Array,
        reduced: tuple[int, ...],
    ) -> jax.Array:
        """A reduction of a leaf over some axes; the others in the matrix's order."""
        kept = [axis for axis in self.axes.order if axis not in reduced]
        left = sorted(kept)  # The order in which the reduction leaves the axes.
        order = [left.index(axis) for axis in kept]
        return jnp.transpose(reduction(tensor, axis=reduced), order)


def product(
    a: jax.Array,
    a_axes: tuple[int, ...],
    b: jax.Array,
    b_axes: tuple[int, ...],
    out_axes: tuple[int, ...],
    *,
    dtype: Any,
    sum_dtype: Any,
    out_sharding: NamedSharding | None,
    place: Callable[[jax.Array], jax.Array] = lambda a: a,
    precision: jax.lax.Precision = HIGHEST,
) -> jax.Array:
    """The product of two tensors, summed over the axes that the result does not have.

    With a `dtype` of bfloat16 both are rounded to it. Products are exact then, and sums
    are in `sum_dtype`. CPUs multiply in `sum_dtype`, because they are no faster in
    bfloat16. With any other `dtype` all devices do.

    `place` constrains the sharding of the first tensor after it is rounded. XLA would
    not keep the sharding of the tensor before.
    """

    def multiply(a: jax.Array, b: jax.Array, *, dtype: Any) -> jax.Array:
        return jnp.einsum(
            place(a.astype(dtype)),
            a_axes,
            b.astype(dtype),
            b_axes,
            out_axes,
            precision=precision,
            preferred_element_type=sum_dtype,
            out_sharding=out_sharding,
        )

    wide = functools.partial(multiply, dtype=sum_dtype)
    if dtype != jnp.bfloat16:
        return wide(a, b)
    narrow = functools.partial(multiply, dtype=dtype)
    return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)


def _argsort(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))
