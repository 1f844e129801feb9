"""The norm-growth limiter of Fira (arXiv 2410.01623, section 3.3), which APOLLO adopts.

From one step to the next, the norm of an update may grow by a factor of at most
`norm_growth_limit`. The limiter takes the place of gradient clipping. It needs no norm
over all parameters, so each matrix is limited by itself.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _check, _sharding, _tree
from apollo_optax._dimension_numbers import MatrixAxes, WeightDimensionNumbers, resolve
from apollo_optax._matrix import Matrix

# Fira's limiter (arXiv 2410.01623) adds this to the remembered norm it divides by.
TINY_NORM = 1e-8


def limit_norm(
    norm: jax.Array,
    remembered: jax.Array,
    norm_growth_limit: jax.typing.ArrayLike,
    *,
    is_transient: jax.Array | bool = False,
) -> tuple[jax.Array, jax.Array]:
    r"""The limiter as a function of norms alone.

    With :math:`q` the remembered norm and :math:`g` the limit, the factor is

    .. math:: 1 / (\max(|U| / (q + 10^{-8}),\, g) / g).

    Only norms that are finite and not zero are remembered. Nothing is limited before
    the first of them. A zero update, such as that of an expert that saw no token,
    leaves :math:`q` as it is. So does an update that is small only for a short time
    (`is_transient`), since its norm says nothing about later norms.

    Args:
      norm: :math:`|U|`, of any shape.
      remembered: :math:`q`, of the same shape; 0 before the first norm is remembered.
      norm_growth_limit: :math:`g \ge 1`.
      is_transient: of the same shape; whether :math:`|U|` is so small for a reason that
        will pass, such as Adam's :math:`\varepsilon`. Then the norm is not remembered.

    Returns:
      The factor to multiply the update by, and the norm to remember.
    """
    # The ratio is divided by the limit before the maximum. After it, an infinite limit
    # would give infinity / infinity instead of no limit.
    excess = jnp.maximum(norm / (remembered + TINY_NORM) / norm_growth_limit, 1.0)
    factor = jnp.where(remembered > 0, 1 / excess, 1.0).astype(norm.dtype)
    limited = norm * factor
    is_remembered = (limited > 0) & (limited < jnp.inf) & jnp.logical_not(is_transient)
    return factor, jnp.where(is_remembered, limited, remembered).astype(norm.dtype)


class LimitNormGrowthState(NamedTuple):
    """State of :func:`limit_norm_growth`.

    Attributes:
      norm: the remembered norms, 0 where there is none yet, in a tree of the
        parameters' structure. A matrix has one norm per element of its batch axes, and
        any other leaf has a scalar. The dtype is float32, or float64 for float64
        leaves.
    """

    norm: optax.Updates


def limit_norm_growth(
    norm_growth_limit: jax.typing.ArrayLike = 1.01,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Limits the growth of each update's norm from step to step.

    If the norm of an update is more than `norm_growth_limit` times the norm of the one
    before, the update is scaled down to that ratio. Each leaf is limited by itself. So
    is each matrix of a layer-stacked leaf if `weight_dimension_numbers` says which axes
    are batch axes.

    :func:`scale_by_apollo` has this limiter built in. This transformation is the same
    limiter for other pipelines. Put it after the transformation whose output it limits.

    This transformation sees norms only. An update that is tiny because Adam's `eps`
    exceeds the gradient is remembered like any other, and holds back the following
    updates for hundreds of steps. :func:`scale_by_apollo` recognises such norms and
    does not remember them. Here, start without a warm-up from zero, or with gradients
    well above `eps`.

    Args:
      norm_growth_limit: largest ratio of two successive norms, at least 1; infinity
        limits nothing.
      weight_dimension_numbers: as in :func:`scale_by_apollo`. Only the batch axes
        matter here. A leaf that is not a matrix is limited by the norm of the whole
        leaf.
        If this is a function, name the argument in the `static_args` of
        ``optax.inject_hyperparams``, which would otherwise call it with the count of
        steps.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with :class:`LimitNormGrowthState`.
      Updates keep their dtypes. Norms are float32, or float64 for float64 leaves.

    Raises:
      TypeError: if `norm_growth_limit` is not a number.
      ValueError: if `norm_growth_limit` is a number below 1. From ``init`` and
        ``update``, if a leaf is not real floating-point, if dimension numbers do not
        fit, if the updates have another structure than the parameters had, or, inside
        ``shard_map``, if a leaf varies over a manual axis, since its norm would be
        local to a device.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = limit_norm_growth(1.01)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([3.0, 4.0]), state)
      >>> updates, state = tx.update(jnp.array([30.0, 40.0]), state)
      >>> print(f"{jnp.linalg.norm(updates):.2f}")
      5.05

      After Adam:

      >>> tx = optax.chain(
      ...     optax.scale_by_adam(), limit_norm_growth(1.01), optax.scale(-1e-3)
      ... )

    References:
      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    _check.norm_growth_limit(norm_growth_limit)

    def leaf_axes(tree: Any) -> dict[_tree.Path, MatrixAxes]:
        axes = resolve(weight_dimension_numbers, tree, with_vectors=True)
        for path, leaf in _tree.leaves_by_path(tree).items():
            if axes[path] is None:
                # A leaf that is not a matrix has one norm, over all its axes.
                shape = jnp.shape(leaf)
                axes[path] = MatrixAxes(shape, (), tuple(range(len(shape))), ())
        return cast(dict[_tree.Path, MatrixAxes], axes)

    def init_fn(params: optax.Params) -> LimitNormGrowthState:
        axes = leaf_axes(params)
        norms = {}
        for path, leaf in _tree.leaves_by_path(params).items():
            dtype = _check.accumulator_dtype(path, leaf)
            matrix = Matrix.of_parameter(leaf, axes[path], dtype)
            place = matrix.norm_sharding or _sharding.committed_device(leaf)
            norms[path] = jnp.zeros(matrix.batch_shape, dtype, device=place)
        return LimitNormGrowthState(_tree.rebuild(_tree.unbox(params), norms))

    def update_fn(
        updates: optax.Updates,
        state: LimitNormGrowthState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LimitNormGrowthState]:
        del params, extra_args
        axes, leaves = leaf_axes(updates), _tree.leaves_by_path(updates)
        _check.state_class(state, LimitNormGrowthState)
        remembered = _tree.leaves_by_path(state.norm)
        _check.same_paths(leaves, remembered)
        limited, norms = {}, {}
        for path, leaf in leaves.items():
            dtype, update = _check.accumulator_dtype(path, leaf), jnp.asarray(leaf)
            _check.not_varying(path, leaf)
            matrix = Matrix.of_gradient(update, axes[path], dtype)
            _check.state_shape(path, "norm", remembered[path], matrix.batch_shape)
            # A gradient may be sharded unlike the parameter, and so unlike the state.
            norm, stored = matrix.tensor_norms(update.astype(dtype)), remembered[path]
            factor, norm = limit_norm(
                norm,
                _sharding.reshard(stored, _sharding.explicit_sharding_of(norm)),
                norm_growth_limit,
            )
            norms[path] = _sharding.reshard(
                norm.astype(stored.dtype), _sharding.explicit_sharding_of(stored)
            )
            limited[path] = matrix.scale(update, matrix.per_channel(factor))
        return (
            jax.tree.unflatten(jax.tree.structure(updates), list(limited.values())),
            LimitNormGrowthState(_tree.rebuild(state.norm, norms)),
        )

    # Optax types any state as a tree of arrays.
    init: Any = init_fn
    update: Any = update_fn
    return optax.GradientTransformationExtraArgs(init, update)
