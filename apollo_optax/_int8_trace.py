"""A momentum that takes a byte per number.

A momentum is as large as the parameters. Here it is stored in int8, with a scale that
two short vectors give: the largest magnitude of each row and of each column. The scale
of an entry is the smaller of the two, so an entry loses precision only if both its row
and its column have a large one.
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _check, _leafwise, _momentum, _sharding, _state, _tree
from apollo_optax._dimension_numbers import Unguessed, WeightDimensionNumbers
from apollo_optax._dtypes import one_if_zero, saturating_cast
from apollo_optax._hyperparams import hyperparams
from apollo_optax._matrix import Matrix
from apollo_optax._state import Field, LeafState

LARGEST_CODE = 127

CODES = Field(
    shape=lambda matrix: matrix.axes.shape,
    sharding=lambda matrix: matrix.sharding,
    dtype=jnp.int8,
    only_matrices=True,
)

WITHOUT_MOMENTUM = Unguessed(
    "there is no momentum for {}",
    "has no momentum, because only matrices have one",
    "leaves a kernel out",
)


class Int8TraceState(NamedTuple):
    """State of :func:`int8_trace`.

    All fields are trees in the structure of the parameters, with an
    ``optax.MaskedNode`` in the place of a leaf that is not a matrix. Arrays are in a
    Flax box if the parameter's box says how to shard the parameter.

    In the shapes below, ``batch`` stands for the sizes of a matrix's batch axes,
    ``contracted`` for those of its smaller side, which has the rows, and ``channel``
    for those of the other side, which has the columns.

    Attributes:
      codes: the momentum as int8, of the parameter's shape.
      row: the largest magnitude of each row, ``(*batch, *contracted)``.
      column: the largest magnitude of each column, ``(*batch, *channel)``.
    """

    codes: Annotated[optax.Updates, CODES]
    row: Annotated[optax.Updates, _state.ROW]
    column: Annotated[optax.Updates, _state.COLUMN]


_state.STATES[Int8TraceState] = "momentum in int8"


@hyperparams
class _Hyperparams:
    """The hyperparameters of :func:`int8_trace`, for jitted functions."""

    decay: Any
    nesterov: bool


def int8_trace(
    decay: jax.typing.ArrayLike,
    nesterov: bool = False,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Computes a momentum of the updates of matrices and stores it in int8.

    It is :func:`optax.trace` for matrices, rounded to a byte per number. With the
    update :math:`G_t` of a matrix and the decay :math:`\mu`:

    .. math::

      \begin{align*}
        M_t &= \mu \hat M_{t-1} + G_t \\
        \text{update} &= M_t, \text{ or } G_t + \mu M_t \text{ with Nesterov's
          look-ahead}
      \end{align*}

    Here, :math:`\hat M_{t-1}` is the momentum that was stored:

    .. math::

      \begin{align*}
        \delta_{ij} &= \min\big(\max_k |M_{ik}|,\, \max_k |M_{kj}|\big) / 127 \\
        \hat M_{ij} &= \delta_{ij}\, \mathrm{round}(M_{ij} / \delta_{ij})
      \end{align*}

    The error of rounding is at most half of :math:`\delta_{ij}` in each step. Errors
    can add up to :math:`\delta_{ij} / (2 (1 - \mu))`: a code :math:`c` with
    :math:`|c| (1 - \mu) < 1/2` that gets no gradient stays as it is. At a decay of
    0.9 these are codes up to 4 of 127, at 0.99 up to 49, so a decay well above 0.9 is
    not advised. An entry that is not finite stays so in all following steps.
    ``optax.apply_if_finite`` keeps it out.

    Besides the codes, the state of a matrix of shape :math:`m \times n` is
    :math:`m + n` numbers, in float32 or, for float64 leaves, in float64. All other
    leaves pass through unchanged and have no state.

    ``optax.ema(decay)``, the moving average, is :math:`1 - \mu` times this momentum but
    for its correction of the first steps. On a mesh, devices exchange the maxima of
    rows or columns that are sharded, and nothing else.

    Args:
      decay: decay rate :math:`\mu`, in [0, 1).
      nesterov: whether the update is Nesterov's momentum.
      weight_dimension_numbers: which axes of a leaf form a matrix, as in
        :func:`scale_by_apollo`. By default, embeddings and output heads are not
        matrices, nor are kernels of three axes or more, of which ``init`` warns.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with :class:`Int8TraceState`. Updates
      keep their dtypes. Its ``update`` function takes the extra argument `batch_index`
      of :func:`scale_by_apollo`, which is only checked here.

    Raises:
      TypeError: if `decay` is not a number, `nesterov` is not a bool, or dimension
        numbers are malformed.
      ValueError: if `decay` is out of range. From ``init`` and ``update``, for a leaf
        that is not real floating-point, dimension numbers that do not fit, updates of
        another structure than the parameters, a state of another transformation, or,
        inside ``shard_map``, a matrix that varies over a manual axis.

    Examples:
      APOLLO-Zero with a momentum in int8, as :func:`apollo_zero` makes it with
      ``int8_momentum=True``:

      >>> import jax, jax.numpy as jnp, optax
      >>> from apollo_optax import int8_trace, scale_by_flattening
      >>> tx = optax.chain(
      ...     int8_trace(0.9, nesterov=True),
      ...     scale_by_flattening(),
      ...     optax.scale_by_learning_rate(5e-4),
      ... )
      >>> params = {"kernel": jnp.ones((8, 16)), "bias": jnp.zeros(16)}
      >>> state = tx.init(params)
      >>> state[0].codes["kernel"].dtype, state[0].row["kernel"].shape
      (dtype('int8'), (8,))
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)

    References:
      Anil et al., `Memory-Efficient Adaptive Optimization
      <https://arxiv.org/abs/1901.11150>`_, 2019, which bounds second moments by rows
      and columns in the same way

      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022
    """
    _check.decay("decay", decay)
    _check.boolean("nesterov", nesterov)
    h = _Hyperparams(decay, bool(nesterov))

    def update_matrices(
        step: _leafwise.Step, leaves: Mapping[_tree.Path, _leafwise.MatrixLeaf]
    ) -> dict[_tree.Path, tuple[jax.Array, LeafState]]:
        del step
        return {path: _update_matrix(h, *leaf) for path, leaf in leaves.items()}

    return _leafwise.leafwise(
        Int8TraceState,
        update_matrices,
        adam=None,
        weight_dimension_numbers=weight_dimension_numbers,
        unguessed=WITHOUT_MOMENTUM,
    )


# Jitted by itself, so that leaves of one shape share a trace, and an eager step
# computes what a jitted one does.
@functools.partial(jax.jit, static_argnames="matrix")
def _update_matrix(
    h: _Hyperparams, matrix: Matrix, gradient: jax.Array, state: LeafState
) -> tuple[jax.Array, LeafState]:
    """The update of one leaf, a matrix or a batch of them, and its new state."""
    G = gradient.astype(matrix.dtype)
    update, M = _momentum.accumulate(
        h.decay, _decoded(matrix, state), G, nesterov=h.nesterov
    )
    return saturating_cast(update, gradient.dtype), _encoded(matrix, M, state)


def _code_sizes(matrix: Matrix, row: jax.Array, column: jax.Array) -> jax.Array:
    """The value of a code of 1 in each entry, in the leaf's order of axes."""
    rows, columns = matrix.axes.contracted, matrix.axes.channel
    largest = jnp.minimum(matrix.spread(row, rows), matrix.spread(column, columns))
    return largest / LARGEST_CODE


def _decoded(matrix: Matrix, state: Mapping[str, jax.Array]) -> jax.Array:
    row = matrix.place(state["row"].astype(matrix.dtype), matrix.axes.contracted)
    column = matrix.place(state["column"].astype(matrix.dtype), matrix.axes.channel)
    codes = _sharding.reshard(state["codes"], matrix.sharding)
    return codes.astype(matrix.dtype) * _code_sizes(matrix, row, column)


def _encoded(matrix: Matrix, M: jax.Array, state: LeafState) -> LeafState:
    """The codes, rows and columns of a momentum, in the dtypes and places of `state`.

    The codes are for the rows and columns that are stored, which may be narrower.
    """
    row = saturating_cast(
        matrix.side_largest(M, matrix.axes.contracted), state["row"].dtype
    )
    column = saturating_cast(
        matrix.side_largest(M, matrix.axes.channel), state["column"].dtype
    )
    sizes = _code_sizes(matrix, row.astype(M.dtype), column.astype(M.dtype))
    codes = jnp.round(M / one_if_zero(sizes))
    codes = jnp.clip(codes, -LARGEST_CODE, LARGEST_CODE).astype(jnp.int8)
    new = {"codes": codes, "row": row, "column": column}
    return {
        name: _sharding.reshard(value, _sharding.sharding_of(state[name]))
        for name, value in new.items()
    }
