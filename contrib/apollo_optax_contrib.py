"""APOLLO: SGD-like Memory, AdamW-level Performance.

Implementation of "APOLLO: SGD-like Memory, AdamW-level Performance"
(https://arxiv.org/abs/2412.05270) by Zhu et al., in one file and for 2-D kernels, as a
proposal for ``optax.contrib``. See docs/upstream.md.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

# Added to the norm of a projected channel, which is zero if the channel's gradient is.
_TINY_NORM = 1e-8
# A norm that eps or the 1e-8 shrink below this share of itself is not remembered. The
# limiter would hold the matrix down for hundreds of steps.
_LEAST_SHARE = 0.9

Mask = Any | Callable[[optax.Params], Any]


class ScaleByApolloState(NamedTuple):
    """State for the APOLLO algorithm.

    Attributes:
      count: number of update steps taken; an int32 scalar.
      key: raw key data of the random projections.
      mu: first moments, ``(r, n)`` for a matrix whose larger side is ``n``, and of the
        parameter's shape for any other leaf.
      nu: second moments, of the same shapes.
      norm: the norm of each matrix's update that the limiter remembers; a scalar per
        leaf.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    norm: optax.Updates


class _Leaf(NamedTuple):
    """The update of a leaf and its new state."""

    update: jax.Array
    mu: jax.Array
    nu: jax.Array
    norm: jax.Array


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
    seed: int = 0,
    matrices: Mask | None = None,
) -> optax.GradientTransformation:
    r"""Rescale updates according to the APOLLO algorithm.

    A matrix's gradient :math:`G` is projected to :math:`R = P G`, with a random
    :math:`P` that maps the smaller side to `rank` rows. Adam's moments are kept for
    :math:`R` only. The ratio of the norms of Adam's update of :math:`R` and of
    :math:`R` itself scales the channels of :math:`G`. Other leaves get the update of
    :func:`optax.scale_by_adam`.

    Args:
      rank: rank of the projection. At the size of the smaller side or above, nothing is
        projected.
      scale_type: ``"channel"`` for a scaling factor per channel, or ``"tensor"`` for
        one per matrix.
      scale: the update is multiplied by its square root; 128 at rank 1.
      update_proj_gap: steps between draws of the projection.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator.
      norm_growth_limit: largest ratio of the norms of a matrix's successive updates;
        None switches the limiter off.
      seed: seed of the random projections.
      matrices: which leaves are matrices: a tree of booleans, or a callable that
        returns one for the parameters. By default, all 2-D leaves.

    Returns:
      The corresponding ``optax.GradientTransformation``.

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2025
    """
    if scale_type not in ("channel", "tensor"):
        raise ValueError(f"scale_type must be 'channel' or 'tensor', got {scale_type}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    axis = 0 if scale_type == "channel" else None

    def init_fn(params: optax.Params) -> ScaleByApolloState:
        def zeros(leaf: jax.Array, is_matrix: bool) -> jax.Array:
            if is_matrix and leaf.ndim != 2:
                raise ValueError(
                    f"matrices has a leaf of shape {leaf.shape}, and only 2-D leaves "
                    "can be matrices; leave it out"
                )
            shape = _moment_shape(leaf.shape, rank) if is_matrix else leaf.shape
            return jnp.zeros(shape, _dtype(leaf))

        moments = jax.tree.map(zeros, params, _is_matrix(params, matrices))
        return ScaleByApolloState(
            count=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
            mu=moments,
            nu=jax.tree.map(jnp.zeros_like, moments),
            norm=jax.tree.map(lambda leaf: jnp.zeros((), _dtype(leaf)), params),
        )

    def project(path: Any, X: jax.Array, state: ScaleByApolloState) -> jax.Array:
        if rank >= X.shape[0]:
            return X
        key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
        # The key follows from the leaf's name and the number of the draw, so that the
        # projection need not be stored, and does not depend on the other leaves.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest = hashlib.sha256(name.encode()).digest()[:4]
        for data in (int.from_bytes(digest, "big"), state.count // update_proj_gap, 0):
            key = jax.random.fold_in(key, jnp.asarray(data, jnp.uint32))
        P = jax.random.normal(key, (rank, X.shape[0]), X.dtype) / jnp.sqrt(rank)
        return jnp.matmul(P, X, precision=jax.lax.Precision.HIGHEST)

    def update_matrix(
        path: Any, G: jax.Array, old: _Leaf, state: ScaleByApolloState
    ) -> _Leaf:
        # Channels lie along the larger side, and the smaller side is projected away.
        transposed = G.shape[0] > G.shape[1]
        X = (G.T if transposed else G).astype(old.mu.dtype)
        R = project(path, X, state)
        mu = optax.tree.update_moment(R, old.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(R, old.nu, b2, 2)
        N = mu / (jnp.sqrt(nu) + eps)
        factors = _norm(N, axis) / (_norm(R, axis) + _TINY_NORM)
        U, norm = X * factors, old.norm
        if norm_growth_limit is not None:
            is_damped = _is_damped(N, mu, nu, R, axis)
            U, norm = _limit(U, norm, norm_growth_limit, is_damped)
        t = state.count + 1
        correction = jnp.sqrt(_one_minus_power(b2, t)) / _one_minus_power(b1, t)
        U = (correction * jnp.sqrt(scale) * U).astype(G.dtype)
        return _Leaf(U.T if transposed else U, mu, nu, norm)

    def update_other(G: jax.Array, old: _Leaf, t: jax.Array) -> _Leaf:
        X = G.astype(old.mu.dtype)
        mu = optax.tree.update_moment(X, old.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(X, old.nu, b2, 2)
        mu_hat = optax.tree.bias_correction(mu, b1, t)
        nu_hat = optax.tree.bias_correction(nu, b2, t)
        update = mu_hat / (jnp.sqrt(nu_hat) + eps)
        return _Leaf(update.astype(G.dtype), mu, nu, old.norm)

    def update_fn(
        updates: optax.Updates,
        state: ScaleByApolloState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleByApolloState]:
        del params

        def update_leaf(
            path: Any, G: jax.Array, is_matrix: bool, *old: jax.Array
        ) -> _Leaf:
            leaf = _Leaf(G, *old)
            if is_matrix:
                return update_matrix(path, G, leaf, state)
            return update_other(G, leaf, state.count + 1)

        mask = _is_matrix(updates, matrices)
        leaves = jax.tree_util.tree_map_with_path(
            update_leaf, updates, mask, state.mu, state.nu, state.norm
        )

        def field(name: str) -> Any:
            return jax.tree.map(
                lambda leaf: getattr(leaf, name),
                leaves,
                is_leaf=lambda leaf: isinstance(leaf, _Leaf),
            )

        new_state = ScaleByApolloState(
            count=cast(jax.Array, optax.safe_increment(state.count)),
            key=state.key,
            mu=field("mu"),
            nu=field("nu"),
            norm=field("norm"),
        )
        return field("update"), new_state

    return optax.GradientTransformation(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 256,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    scale_type: Literal["channel", "tensor"] = "channel",
    scale: jax.typing.ArrayLike = 1.0,
    update_proj_gap: int = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    norm_growth_limit: jax.typing.ArrayLike | None = 1.01,
    seed: int = 0,
    matrices: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO, with a learning rate and decoupled weight decay.

    APOLLO-Mini is ``apollo(learning_rate, rank=1, scale_type="tensor", scale=128.0)``.

    Args:
      learning_rate: a fixed value or a schedule; near 0.01 for pre-training.
      rank: rank of the projection, a quarter of the model's width in the paper.
      weight_decay: strength of the weight decay.
      mask: which leaves get weight decay.
      scale_type: ``"channel"`` for a scaling factor per channel, or ``"tensor"`` for
        one per matrix.
      scale: the update is multiplied by its square root.
      update_proj_gap: steps between draws of the projection.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator.
      norm_growth_limit: largest ratio of the norms of a matrix's successive updates.
      seed: seed of the random projections.
      matrices: which leaves are matrices; all 2-D leaves by default.

    Returns:
      The corresponding ``optax.GradientTransformationExtraArgs``.
    """
    return optax.chain(
        scale_by_apollo(
            rank,
            scale_type=scale_type,
            scale=scale,
            update_proj_gap=update_proj_gap,
            b1=b1,
            b2=b2,
            eps=eps,
            norm_growth_limit=norm_growth_limit,
            seed=seed,
            matrices=matrices,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _is_matrix(tree: Any, matrices: Mask | None) -> Any:
    """A tree of booleans: whether each leaf has two sides that can be projected."""
    if matrices is None:
        return jax.tree.map(lambda leaf: leaf.ndim == 2 and min(leaf.shape) > 1, tree)
    mask = matrices(tree) if callable(matrices) else matrices
    # The mask may be a prefix of the tree. `masked` and `partition` hand over a tree
    # without some of its leaves, which the inner map leaves out.
    return jax.tree.map(
        lambda chosen, part: jax.tree.map(lambda _: chosen, part), mask, tree
    )


def _moment_shape(shape: tuple[int, ...], rank: int) -> tuple[int, int]:
    return min(rank, *shape), max(shape)


def _dtype(leaf: jax.Array) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"APOLLO takes real floating-point leaves, got dtype {leaf.dtype}; exclude "
            "other leaves with optax.masked"
        )
    # Moments are in float32, because bfloat16 would round (1 - b2) R^2 away where it is
    # added to the second moment.
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _one_minus_power(decay: jax.typing.ArrayLike, t: jax.Array) -> jax.Array:
    # 1 - decay**t as a difference loses four digits of float32 in the first steps.
    return -jnp.expm1(t * jnp.log1p(decay - 1.0))


def _norm(x: jax.Array, axis: int | None = None) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axis))


def _is_damped(
    N: jax.Array, mu: jax.Array, nu: jax.Array, R: jax.Array, axis: int | None
) -> jax.Array:
    """Whether eps and the 1e-8 make the update's norm much smaller."""
    R_norm = _norm(R, axis)
    # nu is zero where there has been no gradient, or where its squares underflow.
    undamped = _norm(mu / jnp.sqrt(jnp.where(nu == 0, jnp.inf, nu)), axis)
    damped = _norm(N, axis) * R_norm / (R_norm + _TINY_NORM)
    return _norm(damped) < _LEAST_SHARE * _norm(jnp.where(R_norm > 0, undamped, 0.0))


def _limit(
    U: jax.Array, last: jax.Array, limit: jax.typing.ArrayLike, is_damped: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Limits the growth of a norm; returns the update and the norm to remember."""
    norm = _norm(U)
    excess = jnp.maximum(norm / (last + _TINY_NORM) / limit, 1.0)
    factor = jnp.where(last > 0, 1 / excess, 1.0).astype(norm.dtype)
    limited = norm * factor
    is_remembered = (limited > 0) & (limited < jnp.inf) & ~is_damped
    return factor * U, jnp.where(is_remembered, limited, last)
