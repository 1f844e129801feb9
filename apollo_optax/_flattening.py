"""APOLLO-Zero: a gradient with an evened-out spectrum, and no state for matrices.

A matrix's gradient has a few directions that are far larger than the others. AdamW and
Muon even them out, with moments as large as the matrix. Here, linear algebra on the
gradient of one step does that (see :mod:`apollo_optax._spectrum`). A momentum of the
gradients may take the gradient's place, and is then the only state of a matrix.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_optax import (
    _batching,
    _check,
    _keys,
    _leafwise,
    _momentum,
    _projection,
    _sharding,
    _spectrum,
    _state,
    _tree,
)
from apollo_optax._dimension_numbers import WeightDimensionNumbers
from apollo_optax._dtypes import saturating_cast
from apollo_optax._hyperparams import hyperparams, in_dtype
from apollo_optax._matrix import Matrix
from apollo_optax._state import Field, LeafState

METHODS = ("low_rank", "newton_schulz", "exact")

# The default rank of the random projection is a matrix's smaller side over this.
SIDE_PER_RANK = 8


MOMENTUM = Field(
    shape=lambda matrix: matrix.axes.sizes(_axes_batch_first(matrix)),
    sharding=lambda matrix: _sharding.sharding_of_axes(
        matrix.sharding, _axes_batch_first(matrix)
    ),
    is_moment=True,
    only_matrices=True,
)


def _axes_batch_first(matrix: Matrix) -> tuple[int, ...]:
    batch, ndim = matrix.axes.batch, len(matrix.axes.shape)
    return (*batch, *(axis for axis in range(ndim) if axis not in batch))


class ScaleByFlatteningState(NamedTuple):
    """State of :func:`scale_by_flattening`, the same for all its methods.

    `mu` and `nu` have an ``optax.MaskedNode`` in the place of a matrix, and `momentum`
    in the place of all other leaves. Arrays are in a Flax box if the parameter's box
    says how to shard the parameter.

    Attributes:
      count: steps taken; an int32 scalar.
      key: raw key data, uint32; of shape ``(2,)`` for an int seed.
      mu: first moments of the leaves under Adam, of the leaves' shapes.
      nu: second moments, of the same shapes.
      momentum: the momentum of each matrix, of the leaf's shape with its batch axes
        first; None without momentum.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    mu: Annotated[optax.Updates, _state.ADAM_MOMENT]
    nu: Annotated[optax.Updates, _state.ADAM_MOMENT]
    momentum: Annotated[optax.Updates | None, MOMENTUM] = None


_state.STATES[ScaleByFlatteningState] = "flattened"


@hyperparams
class _Hyperparams:
    """The hyperparameters of :func:`scale_by_flattening`, for jitted functions."""

    power: Any
    method: str
    momentum: Any
    b1: Any
    b2: Any
    eps: Any


def scale_by_flattening(
    power: jax.typing.ArrayLike = 0.5,
    *,
    method: Literal["low_rank", "newton_schulz", "exact"] = "low_rank",
    rank: int | None = None,
    momentum: jax.typing.ArrayLike | None = None,
    key: jax.typing.ArrayLike = 0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates by flattening the spectrum of each matrix's gradient.

    Let :math:`G_t` be the gradient of a matrix, with a row per input and a column per
    output. With the power :math:`p`:

    .. math::

      \begin{align*}
        X_t &= G_t \text{ with each row, then each column, divided by its root mean
          square} \\
        F_t &= (X_t X_t^\top)^{(p-1)/2}\, X_t
          = \textstyle\sum_i \sigma_i^p\, u_i v_i^\top
          \quad \text{for } X_t = \textstyle\sum_i \sigma_i\, u_i v_i^\top \\
        \text{update} &= F_t \text{ scaled to a root mean square of 1 over the rows and
          columns that are not zero}
      \end{align*}

    With ``method="low_rank"``, a random projection :math:`\Omega_t` of rank :math:`r`
    finds the largest singular values. Only those are flattened, to the level
    :math:`\tau` of the :math:`m - r` others, where :math:`m` is the size of the smaller
    side. The power is computed by the polynomial of ``"newton_schulz"``, with its
    errors. If the smaller side is not that of the rows, :math:`X_t` is transposed
    first:

    .. math::

      \begin{align*}
        Q_t &= \mathrm{orth}(X_t X_t^\top \mathrm{orth}(X_t \Omega_t)), \quad
        B_t = Q_t^\top X_t \\
        \tau_t^2 &= (\|X_t\|^2 - \|B_t\|^2) / (m - r) \\
        F_t &= X_t + Q_t \big((B_t B_t^\top / \tau_t^2)^{(p-1)/2} - I\big) B_t
      \end{align*}

    By default, a matrix has no state, and a gradient of zero gives an update of zero.
    Besides the moments of the leaves under Adam, the state is the count of steps and
    the key for :math:`\Omega_t`, which is drawn anew in every step. The update of a
    matrix has the same root mean square in every step. Adam's updates have about the
    same size in every step too, so learning rates are near Adam's.

    With a momentum :math:`\mu`, a matrix has a state of its own size, as in Muon. Then
    :math:`G_t + \mu M_t`, which is Nesterov's momentum, takes the place of
    :math:`G_t`:

    .. math::

      M_t = \mu M_{t-1} + G_t

    The best learning rate is lower with a momentum. On a small model it was half of the
    rate without.

    All other leaves (vectors, scalars, embeddings, the output head) get the update of
    :func:`optax.scale_by_adam`. This transformation is a drop-in replacement for
    ``scale_by_adam``: it applies no learning rate and does not negate the updates.

    Args:
      power: the power :math:`p` of the singular values, in [0, 1). A power of 1 would
        leave the spectrum as it is. A power of 0 makes all singular values equal, or,
        with ``"low_rank"``, makes the largest ones equal to the level of the others.
        Singular values of zero count among the others, and lower their level.
        On a small model, 0.5 was better than 0 with 1,024 tokens per step, and 0 with
        ``"newton_schulz"`` was better with 8,192.
      method: ``"low_rank"``, which takes about ``10 * m * n * rank`` operations;
        ``"newton_schulz"``, a polynomial of :math:`X_t X_t^\top` with errors of a few
        percent (see below); or ``"exact"``, an eigendecomposition of
        :math:`X_t X_t^\top`, which is slow on accelerators.
      rank: the rank of ``"low_rank"``; the other methods take none. The default is an
        eighth of the smaller side of each matrix, at least 1. If the rank is half of
        that side or more, ``"exact"`` is used instead, which costs less on CPUs.
      momentum: decay rate :math:`\mu` of the momentum, in [0, 1); None for no momentum
        and no state.
      key: an int seed below 2**32, which may be a traced scalar, or a JAX key, typed or
        raw.
      b1: decay rate of the first moment of the leaves under Adam, in [0, 1).
      b2: decay rate of the second moment of the leaves under Adam, in [0, 1).
      eps: added to the denominator of the leaves under Adam. Optax's Adam has 1e-8 by
        default.
      weight_dimension_numbers: which axes of a leaf form a matrix, as for
        :func:`scale_by_apollo`. Rows are the elements of `reduction_axis`, columns
        those of `output_axis`. A matrix with a side of 1 is a vector, and gets Adam.
        If this is a function, name the argument in the `static_args` of
        ``optax.inject_hyperparams``, which would otherwise call it with the count of
        steps.
      moment_dtype: dtype of the momentum and of both moments of the leaves under Adam.
        The default is float32, or float64 for float64 leaves.

    ``"newton_schulz"`` is a weighted sum of :math:`X_t` and the iterates of six of
    Muon's Newton-Schulz steps, with weights that are fitted to :math:`\sigma^p`. For
    singular values of at least a thousandth of the norm of the spectrum, the error is
    at most 6% at ``power=0.5`` and at most 17% at ``power=0``.

    On a mesh, ``"low_rank"`` sends ``n * rank`` numbers per matrix twice if the smaller
    side is sharded, and ``m * rank`` numbers twice if the larger side is, besides a few
    smaller arrays. It never sends the gradient. The other methods send one Gram matrix
    of the smaller side if the larger side is sharded. If the smaller side is sharded,
    they gather the gradient.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with
      :class:`ScaleByFlatteningState`. Updates keep the gradients' dtypes. The
      ``update`` function takes an extra argument, the integer `batch_index`, as that of
      :func:`scale_by_apollo` does.

    Raises:
      TypeError: for an argument of the wrong type, such as an array where the value
        must be static.
      ValueError: for an argument out of range, an unknown method, or a rank for a
        method that has none. From ``init`` and ``update``, for a leaf that is not real
        floating-point, dimension numbers that do not fit, updates of another structure
        than the parameters, a state of another transformation, or, inside
        ``shard_map``, a matrix that varies over a manual axis.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from apollo_optax import scale_by_flattening
      >>> tx = optax.chain(scale_by_flattening(), optax.scale_by_learning_rate(1e-3))
      >>> params = {"kernel": jnp.ones((8, 16)), "bias": jnp.zeros(16)}
      >>> state = tx.init(params)
      >>> jax.tree.map(jnp.shape, state[0].mu)
      {'bias': (16,), 'kernel': MaskedNode()}
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Ma et al., `SWAN: SGD with Normalization and Whitening Enables Stateless LLM
      Training <https://arxiv.org/abs/2412.13148>`_, 2024

      Jordan et al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024

      Halko et al., `Finding structure with randomness: Probabilistic algorithms for
      constructing approximate matrix decompositions
      <https://arxiv.org/abs/0909.4061>`_, 2009
    """
    _check.decay("power", power)
    _check.one_of("method", method, METHODS)
    if rank is not None:
        _check.positive_int("rank", rank)
        _check.rank_of_method(rank, method)
    if momentum is not None:
        _check.decay("momentum", momentum)
    state_key = _keys.StateKey(key)
    h = _Hyperparams(power, method, momentum, b1, b2, eps)

    def update_matrices(
        step: _leafwise.Step, leaves: Mapping[_tree.Path, _leafwise.MatrixLeaf]
    ) -> dict[_tree.Path, tuple[jax.Array, LeafState]]:
        # Omega is drawn anew in every step, so the count is the number of the draw.
        keys = state_key.source(step.state.key, step.state.count, step.batch_index)
        is_random = method == "low_rank"
        results = _batching.update_all(
            jax.tree_util.Partial(_update_matrix, h),
            jax.tree_util.Partial(_draw),
            keys,
            {path: _leaf(path, leaf, rank, is_random) for path, leaf in leaves.items()},
        )
        return {
            path: (_batch_axes_back(leaves[path].matrix, update), state)
            for path, (update, state) in results.items()
        }

    return _leafwise.leafwise(
        ScaleByFlatteningState,
        update_matrices,
        adam=h,
        weight_dimension_numbers=weight_dimension_numbers,
        moment_dtype=moment_dtype,
        with_optional=momentum is not None,
        state_key=state_key,
    )


def _leaf(
    path: _tree.Path, leaf: _leafwise.MatrixLeaf, rank: int | None, is_random: bool
) -> _batching.Leaf:
    """A leaf with the rank of its projection and the shapes of what is computed."""
    m = leaf.matrix.axes.contracted_size
    own_rank = max(1, m // SIDE_PER_RANK) if rank is None else min(rank, m)
    matrix = dataclasses.replace(leaf.matrix, rank=own_rank)
    draws = is_random and not _spectrum.is_exact_cheaper(matrix)
    return _batching.Leaf(
        matrix,
        leaf.gradient,
        leaf.state,
        _keys.leaf_id(path),
        matrix.moment_shape if draws else None,
        matrix.axes.shape,
    )


def _draw(matrix: Matrix, keys: jax.Array) -> jax.Array:
    """``Omega``, ``(*batch, r, *channel)``, from one key per batch element."""
    axes = matrix.axes
    transposed = dataclasses.replace(
        axes, contracted=axes.channel, channel=axes.contracted
    )
    other_side = dataclasses.replace(matrix, axes=transposed)
    return _projection.Normal().draw(other_side, keys)


def _update_matrix(
    h: _Hyperparams,
    matrix: Matrix,
    gradient: jax.Array,
    state: LeafState,
    omega: jax.Array | None,
) -> tuple[jax.Array, LeafState]:
    """The update of one leaf, a matrix or a batch of them, with batch axes in front."""
    rows, columns = matrix.axes.contracted, matrix.axes.channel
    if not matrix.axes.is_input_contracted:
        rows, columns = columns, rows
    # 1. M = momentum M + G, and G + momentum M in the place of G.
    G = gradient.astype(matrix.dtype)
    if h.momentum is not None:
        G, state = _with_momentum(matrix, h.momentum, G, state)
    # 2. X, rounded to bfloat16 where the gradient is, for products in it.
    X = _spectrum.normalize(G, rows, columns)
    if gradient.dtype == jnp.bfloat16:
        X = X.astype(jnp.bfloat16)
    # 3. F(X) = (X X^T)^((p - 1) / 2) X
    p = in_dtype(h.power, matrix.dtype)
    if h.method == "newton_schulz":
        F = _spectrum.newton_schulz(matrix, X, p)
    elif omega is None:  # The method is "exact", or its cost is below that of the rank.
        F = _spectrum.exact(matrix, X, p)
    else:
        F = _spectrum.low_rank(matrix, X, p, omega)
    # 4. U has a root mean square of 1 over the rows and columns that are not zero.
    U = _spectrum.rms_one(F, X, rows, columns)
    return _batch_axes_first(matrix, saturating_cast(U, gradient.dtype)), state


def _with_momentum(
    matrix: Matrix, decay: Any, G: jax.Array, state: LeafState
) -> tuple[jax.Array, LeafState]:
    """Nesterov's momentum, of the leaf's shape, and the new state."""
    stored = _batch_axes_back(matrix, state["momentum"]).astype(matrix.dtype)
    stored = _sharding.reshard(stored, matrix.sharding)
    update, M = _momentum.accumulate(decay, stored, G, nesterov=True)
    kept = _sharding.reshard(
        _batch_axes_first(matrix, M), _sharding.sharding_of(state["momentum"])
    )
    return update, _state.updated(state, momentum=kept)


def _batch_axes_first(matrix: Matrix, tensor: jax.Array) -> jax.Array:
    batch = matrix.axes.batch
    return jnp.moveaxis(tensor, batch, range(len(batch)))


def _batch_axes_back(matrix: Matrix, tensor: jax.Array) -> jax.Array:
    batch = matrix.axes.batch
    return jnp.moveaxis(tensor, range(len(batch)), batch)
