"""APOLLO: SGD-like memory, AdamW-level performance.

Implementation of "APOLLO: SGD-like Memory, AdamW-level Performance"
(https://arxiv.org/abs/2412.05270) by Zhu et al. Each matrix's gradient is projected to
a low rank at random, and Adam's moments are stored for the projection only. They
determine the factors that scale the channels of the gradient itself.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from apollo_optax import (
    _adam,
    _batching,
    _check,
    _keys,
    _leafwise,
    _projection,
    _sharding,
    _state,
    _tree,
)
from apollo_optax._dimension_numbers import WeightDimensionNumbers
from apollo_optax._hyperparams import hyperparams
from apollo_optax._limiter import limit_norm
from apollo_optax._matrix import SCALE_TYPES, Matrix, ScaleType
from apollo_optax._state import LeafState, ScaleByApolloState

# Step 4 adds it to |R|, as the authors' release does, so that a channel without a
# gradient has a finite factor.
TINY_NORM = 1e-8

# If `eps` or the 1e-8 reduces the norm of an update to less than this share of what it
# would be without them, the limiter does not remember it. At 1% growth per step, an
# update would need ten steps to make up for 0.9, and hundreds of steps for the norm of
# a vanishing gradient.
LEAST_SHARE = 0.9


@hyperparams
class _Hyperparams:
    """The hyperparameters of :func:`scale_by_apollo`, for jitted functions."""

    scale_type: ScaleType
    scale: Any
    b1: Any
    b2: Any
    eps: Any
    norm_growth_limit: Any
    scale_front: bool
    projection: _projection.Projection


class _Shared(NamedTuple):
    """What all leaves share at one step; arrays, so that no step is compiled anew."""

    is_refresh: jax.Array  # Whether this step is the first to use a projection.
    correction: jax.Array  # Adam's bias correction: sqrt(1 - b2^t) / (1 - b1^t).


def scale_by_apollo(
    rank: int = 256,
    *,
    scale_type: Literal["channel", "tensor"] = "channel",
    scale: jax.typing.ArrayLike = 1.0,
    update_proj_gap: int = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    norm_growth_limit: jax.typing.ArrayLike | None = 1.01,
    scale_front: bool = False,
    projection: Literal["rademacher", "random", "svd"]
    | _projection.Draw = "rademacher",
    key: jax.typing.ArrayLike = 0,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates according to the APOLLO algorithm.

    Let :math:`G_t \in \mathbb{R}^{m \times n}` be the gradient of a matrix. Its smaller
    side, of size :math:`m`, is contracted, that is, projected away. The elements of the
    other side, of size :math:`n`, are its channels. The projection
    :math:`P_t \in \mathbb{R}^{r \times m}` of rank :math:`r` has random entries of mean
    0 and variance :math:`1/r`, and is drawn anew every `update_proj_gap` steps. With
    :math:`a = \sqrt{\text{scale}}`:

    .. math::

      \begin{align*}
        R_t &= P_t G_t \\
        M_t &= \beta_1 M_{t-1} + (1-\beta_1) R_t, \quad
        V_t = \beta_2 V_{t-1} + (1-\beta_2) R_t^2 \\
        N_t &= M_t / (\sqrt{V_t} + \varepsilon) \\
        s_j &= \|N_{t,:,j}\| / (\|R_{t,:,j}\| + 10^{-8})
          \quad \text{(channel)} \\
        s &= \|N_t\| / (\|R_t\| + 10^{-8}) \quad \text{(tensor)} \\
        U_t &= a\, \mathrm{limit}(G_t\, \mathrm{diag}(s)) \\
        \text{update} &= \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\, U_t
      \end{align*}

    where :math:`\mathrm{limit}` is the norm-growth limiter, :func:`limit_norm_growth`.
    All other leaves (vectors, scalars, embeddings, the output head) get the update of
    :func:`optax.scale_by_adam`. This transformation is a drop-in replacement for
    ``scale_by_adam``: it applies no learning rate and does not negate the updates.

    Args:
      rank: rank of the projection, clipped to the contracted size of each matrix. The
        moments of a matrix are ``2 * n * rank`` numbers. With ``rank >= m`` nothing is
        projected: ``P`` is the identity, unless `projection` is ``"svd"``.
      scale_type: ``"channel"`` for a scaling factor per channel, or ``"tensor"`` for
        one per matrix.
      scale: the update is multiplied by its square root. The scaling factors are about
        ``sqrt(rank / m)`` of the full-rank ones, so a lower rank needs a larger scale:
        128 for rank 1.
      update_proj_gap: steps between draws of the projection.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the denominator, for matrices and for the leaves under Adam.
        Optax's Adam has 1e-8 by default.
      norm_growth_limit: largest ratio of the norms of a matrix's successive updates, at
        least 1; None switches the limiter off. With gradients near 0, `eps` or the 1e-8
        can make an update much smaller. The limiter does not remember the norm of such
        an update. It does remember the first norms after steps without a gradient,
        which are small because the first moment has decayed, so updates then grow back
        by the limit alone, which takes dozens of steps.
      scale_front: whether to multiply by ``sqrt(scale)`` before the limiter instead of
        after it.
      projection: ``"rademacher"`` for entries of random sign; ``"random"`` for the
        paper's normal entries, which take longer to draw; ``"svd"`` for the gradient's
        top singular vectors; or a pure function ``(key, (r, m)) -> P``, which is
        vmapped over batch elements. Singular vectors are stored in the state, and a
        gradient that is zero or not finite does not replace them. All other projections
        are functions of `key` and are not stored. Random signs can cancel if all rows
        of a gradient are equal, such as those that a constant input gives. At rank 1
        this happens with a probability of about ``0.8 / sqrt(m)``, and the update is
        then zero until the next draw.
      key: an int seed below 2**32, which may be a traced scalar, or a JAX key, typed or
        raw.
      weight_dimension_numbers: which axes of a leaf form a matrix. A pytree (or prefix)
        of :class:`ApolloDimensionNumbers`, with None for leaves under Adam, matched by
        path; or a callable that returns one for the parameters (for the updates at
        update time), such as :func:`dimension_numbers_by_path` makes. Axes named by
        neither field are batch axes. By default, the matrices are the 2-D leaves except
        ``bias``, ``scale`` and those under a known name of an embedding or output head,
        and ``init`` warns of kernels with more axes. A matrix with a side of 1 is a
        vector, and gets Adam.
      moment_dtype: dtype of both moments of all leaves. The default is float32, or
        float64 for float64 leaves, whatever the dtype of the gradients. In bfloat16,
        rounding would lose the small term ``(1 - b2) * R**2`` that each step adds to
        the second moment.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with :class:`ScaleByApolloState`.
      Updates keep the gradients' dtypes. The ``update`` function takes an extra
      argument, the integer `batch_index`. It says that all leaves are slices of
      layer-stacked leaves, starting at that index of the leading axis. The slices then
      get the same projections as in an update of the whole stack.

    Raises:
      TypeError: for an argument of the wrong type, such as an array where the value
        must be static.
      ValueError: for an argument out of range. From ``init`` and ``update``, for a leaf
        that is not real floating-point, dimension numbers that do not fit, a projection
        callable that returns the wrong shape, updates of another structure than the
        parameters, a state made for another rank, or, inside ``shard_map``, a matrix
        that varies over a manual axis.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from apollo_optax import scale_by_apollo
      >>> tx = optax.chain(scale_by_apollo(rank=4), optax.scale_by_learning_rate(0.01))
      >>> params = {"kernel": jnp.ones((8, 16)), "bias": jnp.zeros(16)}
      >>> state = tx.init(params)
      >>> jax.tree.map(jnp.shape, state[0].mu)
      {'bias': (16,), 'kernel': (4, 16)}
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2025

      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    _check.positive_int("rank", rank)
    _check.one_of("scale_type", scale_type, SCALE_TYPES)
    _check.non_negative("scale", scale)
    _check.positive_int("update_proj_gap", update_proj_gap)
    if norm_growth_limit is not None:
        _check.norm_growth_limit(norm_growth_limit)
    _check.boolean("scale_front", scale_front)
    kind = _projection.resolve(projection)
    state_key = _keys.StateKey(key)
    # A longer gap is never reached, and has to fit an int32 beside the count.
    gap = min(int(update_proj_gap), jnp.iinfo(jnp.int32).max)
    h = _Hyperparams(
        SCALE_TYPES[scale_type],
        scale,
        b1,
        b2,
        eps,
        norm_growth_limit,
        scale_front,
        kind,
    )

    def check_matrices(matrices: Mapping[_tree.Path, Matrix]) -> None:
        for path, matrix in matrices.items():
            kind.check(path, matrix)
        _check.warn_of_large_scale(rank, scale, matrices)

    def update_matrices(
        step: _leafwise.Step, leaves: Mapping[_tree.Path, _leafwise.MatrixLeaf]
    ) -> dict[_tree.Path, tuple[jax.Array, LeafState]]:
        count = step.state.count
        shared = _Shared(
            is_refresh=count % gap == 0,
            correction=_adam.bias_correction(h, step.number),
        )
        keys = state_key.source(step.state.key, count // gap, step.batch_index)
        results = _batching.update_all(
            jax.tree_util.Partial(_update_matrix, h, shared),
            jax.tree_util.Partial(_draw, h),
            keys,
            {
                path: _batching.Leaf(
                    *leaf,
                    _keys.leaf_id(path),
                    None if kind.is_stored else leaf.matrix.projection_shape,
                    leaf.matrix.moment_shape,
                )
                for path, leaf in leaves.items()
            },
        )
        updates = {}
        for path, (factors, state) in results.items():
            # The product stays outside of loops over rows, so that XLA fuses it with
            # apply_updates and never materialises the update.
            update = leaves[path].matrix.scale(leaves[path].gradient, factors)
            updates[path] = (update, state)
        return updates

    return _leafwise.leafwise(
        ScaleByApolloState,
        update_matrices,
        adam=h,
        rank=rank,
        weight_dimension_numbers=weight_dimension_numbers,
        moment_dtype=moment_dtype,
        with_optional=kind.is_stored,
        state_key=state_key,
        check_matrices=check_matrices,
    )


def _draw(h: _Hyperparams, matrix: Matrix, keys: jax.Array) -> jax.Array:
    """The random numbers of step 1 for one leaf."""
    return cast(_projection.Drawn, h.projection).draw(matrix, keys)


def _update_matrix(
    h: _Hyperparams,
    shared: _Shared,
    matrix: Matrix,
    gradient: jax.Array,
    state: LeafState,
    drawn: jax.Array | None,
) -> tuple[jax.Array, LeafState]:
    """Steps 1 to 8 of the algorithm for one leaf, a matrix or a batch of them.

    Steps 5 to 8 multiply the gradient by factors per channel, so they are taken on the
    factors, and the caller multiplies once: ``U = G diag(s)``.

    Returns:
      The factors ``s``, ``(*batch, *channel)`` with size 1 on channel axes that share
      one, and the leaf's new state.
    """
    m, per = matrix, h.scale_type
    G = gradient.astype(m.dtype)
    a = jnp.sqrt(jnp.asarray(h.scale, m.dtype))
    stored, q = state.get("projection"), state["norm"]

    # 1. P has entries of variance 1 / r, or is what the caller or the SVD makes.
    P, stored = h.projection.at(m, drawn, G, stored, shared.is_refresh)
    # 2. R = P G
    R = m.project(P, gradient, state["mu"])
    # 3. mu = b1 mu + (1 - b1) R, nu = b2 nu + (1 - b2) R^2, N = mu / (sqrt(nu) + eps)
    mu, nu = _adam.update_moments(h, R, state)
    N = mu / (jnp.sqrt(nu) + h.eps)
    # 4. s_j = |N_j| / (|R_j| + 1e-8), over a channel or over the matrix; 0 if R cancels
    # The limiter asks for the norms without eps. They are summed in the same pass.
    N_norms, undamped_norms = m.norms_of_two(N, _over_root(mu, nu), per)
    R_norms = m.norms(R, per)
    s = m.place_factors(N_norms / (R_norms + TINY_NORM))
    G_norms = m.gradient_norms(G, per)
    # Random signs may cancel on equal rows, and |R| is then a rounding error.
    error = jnp.finfo(m.dtype).eps * m.axes.contracted_size**0.5
    is_cancelled = m.place_factors(R_norms) <= error * G_norms
    s = jnp.where(is_cancelled, jnp.zeros_like(s), s)
    # 5. U = G diag(s), and U = a U here with scale_front
    if h.scale_front:
        s = a * s
    # 6. U = U / (max(|U| / (q + 1e-8), g) / g), q = |U|, by |U|^2 = sum_j s_j^2 |G_j|^2
    if h.norm_growth_limit is not None:
        norm = m.matrix_norms(s * G_norms)
        is_damped = _is_damped(m, N_norms, R_norms, undamped_norms)
        norm, is_damped = (
            _sharding.reshard(x, _sharding.sharding_of(q)) for x in (norm, is_damped)
        )
        limit, q = limit_norm(norm, q, h.norm_growth_limit, is_transient=is_damped)
        s = m.per_channel(limit) * s
    # 7. U = a U here without scale_front
    if not h.scale_front:
        s = a * s
    # 8. update = sqrt(1 - b2^t) / (1 - b1^t) U
    s = shared.correction.astype(m.dtype) * s
    return s, _state.updated(state, mu=mu, nu=nu, norm=q, projection=stored)


def _is_damped(
    m: Matrix, N_norms: jax.Array, R_norms: jax.Array, undamped_norms: jax.Array
) -> jax.Array:
    """Whether `eps` and ``TINY_NORM`` make a matrix's update much smaller.

    The projected update ``R diag(s)`` decides it, which unlike ``G`` is sharded as the
    moments are. Its channels have the norms ``|N_j| |R_j| / (|R_j| + 1e-8)``. Without
    the constants, these would be the norms of ``mu / sqrt(nu)``. Norms over a projected
    gradient of zero are left out on both sides.
    """
    # XLA for CPUs would round step 4 differently in the ordinary and in the layer-wise
    # step if the quotient of step 4 were a factor here.
    damped = m.matrix_norms(N_norms * R_norms / (R_norms + TINY_NORM))
    undamped = jnp.where(R_norms > 0, undamped_norms, jnp.zeros_like(undamped_norms))
    return damped < LEAST_SHARE * m.matrix_norms(undamped)


def _over_root(mu: jax.Array, nu: jax.Array) -> jax.Array:
    """``mu / sqrt(nu)``, and 0 where ``nu`` is 0.

    That is so where there has been no gradient, and where the squares of a gradient
    underflow. A single infinity there would look as if `eps` had damped all channels.
    """
    # Nothing stands between the root and the division, because XLA for CPUs would then
    # round the quotient differently in the ordinary and in the layer-wise step.
    return mu / jnp.sqrt(jnp.where(nu == 0, jnp.full_like(nu, jnp.inf), nu))
