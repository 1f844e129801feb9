"""RACS: row and column scaled SGD.

Implementation of algorithm 1 of "Towards Efficient Optimizer Design for LLM via
Structured Fisher Approximation with a Low-Rank Extension"
(https://arxiv.org/abs/2502.07752) by Gong et al. Each entry of a matrix's gradient is
divided by a factor of its row and one of its column.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _check, _leafwise, _sharding, _state, _tree
from apollo_optax._dimension_numbers import WeightDimensionNumbers
from apollo_optax._dtypes import one_if_zero, saturating_cast
from apollo_optax._hyperparams import hyperparams
from apollo_optax._limiter import limit_norm
from apollo_optax._matrix import Matrix
from apollo_optax._state import LeafState

# The least q_i, as a share of the largest, and the least s_j. A row whose gradient has
# less than 1e-4 of the RMS that the strongest row has is scaled as if it had 1e-4.
# Without a floor, what is left of a dead row by rounding would be scaled up to the size
# of all others.
LEAST_FACTOR = 1e-8

# The limiter does not remember a norm that is below this share of the one it remembers.
# Norms hardly change from step to step while the factors fit the gradient. A norm drops
# if a gradient is much smaller than those in the averages, or much larger than those
# that follow it. From there, 1% growth per step would take hundreds of steps.
TRANSIENT_DROP = 0.5

NORM = dataclasses.replace(_state.NORM, only_matrices=True)


class ScaleByRacsState(NamedTuple):
    """State of :func:`scale_by_racs`.

    All fields but `count` are trees in the structure of the parameters. A field that a
    leaf does not have is an ``optax.MaskedNode`` there. An array is in a Flax box if
    the parameter's box says how to shard the parameter; norms never are.

    In the shapes below, ``batch`` stands for the sizes of a matrix's batch axes,
    ``contracted`` for those of its smaller side, which has the rows, and ``channel``
    for those of the other side, which has the columns.

    Attributes:
      count: steps taken; an int32 scalar.
      mu: first moments of leaves that are not matrices, of the leaf's shape.
      nu: second moments of the same leaves.
      row: the averaged factors ``q`` of a matrix's rows, ``(*batch, *contracted)``. The
        mean of a matrix's factors is 1. All are 0 before its first gradient.
      column: the square roots of the averaged factors ``s`` of its columns,
        ``(*batch, *channel)``, in the gradient's units.
      norm: the norms that the limiter remembers, ``batch``, 0 where there is none yet.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Annotated[optax.Updates, _state.ADAM_MOMENT]
    nu: Annotated[optax.Updates, _state.ADAM_MOMENT]
    row: Annotated[optax.Updates, _state.ROW]
    column: Annotated[optax.Updates, _state.COLUMN]
    norm: Annotated[optax.Updates, NORM]


_state.STATES[ScaleByRacsState] = "RACS"


@hyperparams
class _Hyperparams:
    """The hyperparameters of :func:`scale_by_racs`, for jitted functions."""

    b: Any
    iterations: int
    norm_growth_limit: Any
    b1: Any
    b2: Any
    eps: Any


def scale_by_racs(
    b: jax.typing.ArrayLike = 0.9,
    *,
    iterations: int = 1,
    norm_growth_limit: jax.typing.ArrayLike | None = 1.01,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates according to the RACS algorithm.

    Let :math:`G_t \in \mathbb{R}^{m \times n}` be the gradient of a matrix and
    :math:`H_t = G_t \odot G_t`. A factor for each row, :math:`q \in \mathbb{R}^m`, and
    one for each column, :math:`s \in \mathbb{R}^n`, are computed such that
    :math:`q s^\top` approximates :math:`H_t`. Start from :math:`q = q_{t-1}`, or from 1
    in the first step, and repeat `iterations` times:

    .. math::

      \begin{align*}
        s &\leftarrow H_t^\top q / \|q\|^2, \qquad q \leftarrow H_t s / \|s\|^2 \\
        (q, s) &\leftarrow (q / \bar q,\, \bar q s)
          \quad \text{with } \bar q = \textstyle\sum_i q_i / m
      \end{align*}

    Then take moving averages of both:

    .. math::

      \begin{align*}
        q_t &= b\, q_{t-1} + (1-b)\, q, \qquad s_t = b\, s_{t-1} + (1-b)\, s \\
        U_t &= \mathrm{diag}(q_t)^{-1/2}\, G_t\, \mathrm{diag}(s_t)^{-1/2} \\
        \text{update} &= \mathrm{limit}(U_t / \max(1, \mathrm{RMS}(U_t)))
      \end{align*}

    where :math:`\mathrm{limit}` is the norm-growth limiter, :func:`limit_norm_growth`.
    The state of a matrix is ``m + n + 1`` numbers. All other leaves (vectors, scalars,
    embeddings, the output head) get the update of :func:`optax.scale_by_adam`. This
    transformation is a drop-in replacement for ``scale_by_adam``: it applies no
    learning rate and does not negate the updates.

    The paper takes five rounds from :math:`q = 1` in each step. Here, each step starts
    from the factors of the previous step, so one round is enough. A step with one round
    reads the gradient five times, and a step with five rounds reads it thirteen times.

    The paper leaves some details open. This implementation decides them as follows:

    * The averages start from the first factors of a matrix, not from zero. A gradient
      that is zero or not finite changes no factor.
    * The mean of `q` is 1. The paper's updates do not depend on it, but without it the
      numbers may grow or vanish.
    * The RMS of an update is at most 1. Otherwise, an outlier in the first gradient
      would dominate all factors and make the first update large. The limiter can't
      prevent that, because it has no earlier norm to compare with.
    * A factor counts as at least 1e-8 of the largest factor of its side. The update of
      a row of zeros is a row of zeros.
    * The limiter does not remember a norm below half of the one it remembers. A single
      gradient that is far from the averages causes such norms, which would otherwise
      hold back the next updates for hundreds of steps.

    The gradient is divided by its largest entry before it is squared, and the square
    root of `s` is stored. So float32 is enough for gradients of any scale.

    Args:
      b: decay rate of the averages of `q` and `s`, in [0, 1).
      iterations: rounds per step, at least 1. Each round reads the gradient twice. With
        ``optax.inject_hyperparams``, it has to be one of the `static_args`.
      norm_growth_limit: largest ratio of the norms of a matrix's successive updates, at
        least 1; None switches the limiter off.
      b1: decay rate of the first moment of leaves under Adam, in [0, 1).
      b2: decay rate of the second moment of leaves under Adam, in [0, 1).
      eps: added to the denominator of leaves under Adam. Optax's Adam has 1e-8 by
        default.
      weight_dimension_numbers: which axes of a leaf form a matrix, as in
        :func:`scale_by_apollo`. Each element of the batch axes is a matrix of its own.
      moment_dtype: dtype of both moments of leaves under Adam. The default is float32,
        or float64 for float64 leaves. Factors and norms always have the default dtype.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with :class:`ScaleByRacsState`.
      Updates keep the gradients' dtypes. The ``update`` function accepts the extra
      argument `batch_index` of :func:`scale_by_apollo`, which is only checked here.

    Raises:
      TypeError: for an argument of the wrong type, such as an array for `iterations`,
        which must be static.
      ValueError: for an argument out of range. From ``init`` and ``update``, for a leaf
        that is not real floating-point, dimension numbers that do not fit, updates of
        another structure than the parameters, a state made for other dimension numbers,
        or, inside ``shard_map``, a matrix that varies over a manual axis.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from apollo_optax import scale_by_racs
      >>> tx = optax.chain(scale_by_racs(), optax.scale_by_learning_rate(1e-3))
      >>> params = {"kernel": jnp.ones((8, 16)), "bias": jnp.zeros(16)}
      >>> state = tx.init(params)
      >>> state[0].row["kernel"].shape, state[0].column["kernel"].shape
      ((8,), (16,))
      >>> jax.tree.map(jnp.shape, state[0].mu)
      {'bias': (16,), 'kernel': MaskedNode()}
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Gong et al., `Towards Efficient Optimizer Design for LLM via Structured Fisher
      Approximation with a Low-Rank Extension <https://arxiv.org/abs/2502.07752>`_, 2025

      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    _check.decay("b", b)
    _check.positive_int("iterations", iterations)
    if norm_growth_limit is not None:
        _check.norm_growth_limit(norm_growth_limit)
    h = _Hyperparams(b, int(iterations), norm_growth_limit, b1, b2, eps)

    def update_matrices(
        step: _leafwise.Step, leaves: Mapping[_tree.Path, _leafwise.MatrixLeaf]
    ) -> dict[_tree.Path, tuple[jax.Array, LeafState]]:
        del step
        return {path: _update_matrix(h, *leaf) for path, leaf in leaves.items()}

    return _leafwise.leafwise(
        ScaleByRacsState,
        update_matrices,
        adam=h,
        weight_dimension_numbers=weight_dimension_numbers,
        moment_dtype=moment_dtype,
    )


# Jitted by itself, so that leaves of one shape share a trace, and an eager step
# computes what a jitted one does.
@functools.partial(jax.jit, static_argnames="matrix")
def _update_matrix(
    h: _Hyperparams, matrix: Matrix, gradient: jax.Array, state: LeafState
) -> tuple[jax.Array, LeafState]:
    """The update of one leaf, a matrix or a batch of them, and its new state.

    Rows lie along the contracted side, columns along the channel side. Products of a
    matrix and a vector are sums over the axes of the leaf, which XLA for TPUs computes
    in the pass that squares the gradient. XLA for CPUs keeps one array of the leaf's
    shape in memory.
    """
    m, rows, columns = matrix, matrix.axes.contracted, matrix.axes.channel
    G = gradient.astype(m.dtype)
    old = m.place(state["row"], rows), m.place(state["column"], columns)
    remembered = state["norm"]

    # 1. X = G / max|G|, H = X^2, so that the squares of any gradient are in range
    unit = m.side_largest(G, ())
    has_factors = (unit > 0) & (unit < jnp.inf)
    unit = one_if_zero(unit)
    X = G / m.spread(unit, ())
    # 2. q s^T is near H, by rounds from q_{t-1}
    q, s = _factors(m, jnp.square(X), _start(m, old[0]), h.iterations)
    # 3. q_t = b q_{t-1} + (1 - b) q, the same for s, which is kept as its root
    new = q, m.per_side(unit, columns) * jnp.sqrt(s)
    q, root_s = _averages(m, h.b, old, new, has_factors)
    # 4. U = diag(q)^(-1/2) G diag(s)^(-1/2), with a factor per matrix put off to step 7
    q_shares, q_largest = _shares(m, q, rows, LEAST_FACTOR)
    root_s_shares, root_s_largest = _shares(m, root_s, columns, math.sqrt(LEAST_FACTOR))
    U = X / m.spread(jnp.sqrt(q_shares), rows) / m.spread(root_s_shares, columns)
    factor = unit / root_s_largest / jnp.sqrt(q_largest)
    # 5. U = U / max(1, RMS(U))
    norm = factor * m.tensor_norms(U)
    clip = 1 / jnp.maximum(1, norm / math.sqrt(m.axes.matrix_size))
    factor, norm = clip * factor, clip * norm
    # 6. U = U / (max(|U| / (norm + 1e-8), g) / g), norm = |U|
    if h.norm_growth_limit is not None:
        norm = _sharding.reshard(norm, _sharding.sharding_of(remembered))
        is_transient = norm < TRANSIENT_DROP * remembered
        limit, remembered = limit_norm(
            norm, remembered, h.norm_growth_limit, is_transient=is_transient
        )
        factor = _sharding.reshard(limit, m.norm_sharding) * factor
    # 7. the factor per matrix
    U = U * m.spread(factor, ())
    q = _sharding.reshard(q, _sharding.sharding_of(state["row"]))
    root_s = _sharding.reshard(root_s, _sharding.sharding_of(state["column"]))
    new_state = _state.updated(state, row=q, column=root_s, norm=remembered)
    return saturating_cast(U, gradient.dtype), new_state


def _start(m: Matrix, q: jax.Array) -> jax.Array:
    """The ``q`` of the first round: the remembered one, or 1 if there is none.

    A row without a gradient until now counts as the least share of the largest. With a
    weight of 0, a matrix of which only such rows have a gradient would get no factors.
    """
    shares, _ = _shares(m, q, m.axes.contracted, LEAST_FACTOR)
    is_first = m.reduce(jnp.max, q) == 0
    return jnp.where(m.per_side(is_first, m.axes.contracted), 1, shares)


def _factors(
    m: Matrix, H: jax.Array, q: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """The factors ``q`` and ``s`` of rows and columns after some rounds from `q`.

    The mean of ``q`` is 1. Both are 0 for a matrix of zeros.
    """
    rows, columns = m.axes.contracted, m.axes.channel

    def weighted_sums(
        side: tuple[int, ...], weights: jax.Array, other: tuple[int, ...]
    ) -> jax.Array:
        squares = one_if_zero(m.reduce(jnp.sum, jnp.square(weights)))
        sums = m.side_sums(H * m.spread(weights, other), side)
        return sums / m.per_side(squares, side)

    def next_factors(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        # s = H^T q / |q|^2, q = H s / |s|^2
        s = weighted_sums(columns, q, rows)
        q = weighted_sums(rows, s, columns)
        # q = q / mean(q), s = mean(q) s
        mean = m.reduce(jnp.mean, q)
        return q / m.per_side(one_if_zero(mean), rows), s * m.per_side(mean, columns)

    for _ in range(iterations - 1):
        q, _ = next_factors(q)
    return next_factors(q)


def _averages(
    m: Matrix,
    b: Any,
    old: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array],
    has_factors: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The moving averages of ``q`` and of ``s``, the latter as its square root.

    Args:
      m: the leaf.
      b: decay rate.
      old: the averages so far, ``q`` and the root of ``s``.
      new: the factors of this step, in the same form.
      has_factors: ``(*batch,)``, whether the gradient has factors. If not, the old
        averages stay.
    """
    rows, columns = m.axes.contracted, m.axes.channel
    is_first = m.reduce(jnp.max, old[0]) == 0
    kept = jnp.where(is_first, 0, b).astype(m.dtype)
    added = jnp.where(is_first, 1, 1 - b).astype(m.dtype)
    q = m.per_side(kept, rows) * old[0] + m.per_side(added, rows) * new[0]
    root_s = _root_of_average(
        (m.per_side(kept, columns), old[1]), (m.per_side(added, columns), new[1])
    )
    return (
        jnp.where(m.per_side(has_factors, rows), q, old[0]),
        jnp.where(m.per_side(has_factors, columns), root_s, old[1]),
    )


def _root_of_average(
    old: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """``sqrt(a x^2 + b y^2)`` for the pairs ``(a, x)`` and ``(b, y)``.

    The squares are relative to the larger one, since ``x^2`` may be out of range.
    """
    (a, x), (b, y) = old, new
    unit = one_if_zero(jnp.maximum(x, y))
    return unit * jnp.sqrt(a * jnp.square(x / unit) + b * jnp.square(y / unit))


def _shares(
    m: Matrix, values: jax.Array, side: tuple[int, ...], least: float
) -> tuple[jax.Array, jax.Array]:
    """Values of a side as shares of the largest, from `least` to 1, and the largest."""
    largest = one_if_zero(m.reduce(jnp.max, values))
    return jnp.maximum(values / m.per_side(largest, side), least), largest
