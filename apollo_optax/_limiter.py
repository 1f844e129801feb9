"""The norm-growth limiter of Fira (arXiv 2410.01623, section 3.3), which APOLLO adopts.

An update's norm may grow by at most a factor `norm_growth_limit` from one step to the next. It takes
the place of gradient clipping without a norm over all parameters, so each matrix stands alone.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _check, _tree
from apollo_optax._dimension_numbers import MatrixAxes, WeightDimensionNumbers, resolve
from apollo_optax._matrix import Matrix


def limit_norm(
    norm: jax.Array, remembered: jax.Array, norm_growth_limit: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    r"""The limiter as a function of norms alone.

    With :math:`q` the remembered norm and :math:`g` the limit, the factor is

    .. math:: 1 / (\max(|U| / (q + 10^{-8}),\, g) / g).

    A norm of zero is not remembered: before the first non-zero one nothing is limited, and a zero
    update (an expert that saw no token) leaves :math:`q` as it is. Nor is a norm that is not finite.

    Args:
      norm: :math:`|U|`, of any shape.
      remembered: :math:`q`, of the same shape; 0 where no norm has been seen.
      norm_growth_limit: :math:`g \ge 1`.

    Returns:
      The factor to multiply the update with, and the norm to remember.
    """
    # Divided before the maximum rather than after it, so that a limit of infinity is none.
    excess = jnp.maximum(norm / (remembered + 1e-8) / norm_growth_limit, 1.0)
    factor = jnp.where(remembered > 0, 1 / excess, 1.0).astype(norm.dtype)
    limited = norm * factor
    is_remembered = (limited > 0) & (limited < jnp.inf)
    return factor, jnp.where(is_remembered, limited, remembered).astype(norm.dtype)


class LimitNormGrowthState(NamedTuple):
    """State of :func:`limit_norm_growth`."""

    norm: optax.Updates  # Per leaf: its batch shape, () for a leaf that is no matrix; float32.


def limit_norm_growth(
    norm_growth_limit: jax.typing.ArrayLike = 1.01,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Limits the growth of each update's norm from step to step.

    Each leaf is limited by itself (see :func:`limit_norm`), and each matrix of a layer-stacked leaf
    by itself if `weight_dimension_numbers` says which axes are batch axes. :func:`scale_by_apollo`
    has this limiter built in; this is the same one for other pipelines, put after the transformation
    whose output it limits.

    Args:
      norm_growth_limit: largest ratio of two successive norms, at least 1; infinity limits nothing.
      weight_dimension_numbers: as in :func:`scale_by_apollo`; only the batch axes matter here. A leaf
        that is no matrix is limited by the norm of the whole leaf.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with :class:`LimitNormGrowthState`. Updates keep
      their dtypes; norms are float32, or float64 for float64 leaves.

    Raises:
      ValueError: if `norm_growth_limit` is a number below 1; from ``init`` and ``update``, if a leaf is
        not real floating-point, if dimension numbers do not fit, if the updates have another
        structure than the parameters had, or, inside ``shard_map``, if a leaf varies over a manual
        axis, since its norm would be local.

    Examples:
      >>> import optax
      >>> tx = optax.chain(optax.scale_by_adam(), limit_norm_growth(1.01), optax.scale(-1e-3))

    References:
      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?
      <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    _check.norm_growth_limit(norm_growth_limit)

    def leaf_axes(tree: Any) -> dict[_tree.Path, MatrixAxes]:
        axes = resolve(weight_dimension_numbers, tree)
        for path, leaf in _tree.leaves_by_path(tree).items():
            if axes[path] is None:
                # A leaf that is no matrix has one norm, over all its axes.
                shape = jnp.shape(leaf)
                axes[path] = MatrixAxes(shape, (), tuple(range(len(shape))), ())
        return cast(dict[_tree.Path, MatrixAxes], axes)

    def init_fn(params: optax.Params) -> LimitNormGrowthState:
        axes = leaf_axes(params)
        norms = {}
        for path, leaf in _tree.leaves_by_path(params).items():
            dtype = _check.accumulator_dtype(path, leaf)
            matrix = Matrix.of_parameter(leaf, axes[path], dtype)
            norms[path] = jnp.zeros(
                matrix.batch_shape, dtype, device=matrix.norm_sharding
            )
        return LimitNormGrowthState(_tree.rebuild(_tree.unbox(params), norms))

    def update_fn(
        updates: optax.Updates,
        state: LimitNormGrowthState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LimitNormGrowthState]:
        del params, extra_args
        axes, leaves = leaf_axes(updates), _tree.leaves_by_path(updates)
        remembered = _check.same_paths(leaves, state.norm)
        limited, norms = {}, {}
        for path, leaf in leaves.items():
            dtype, update = _check.accumulator_dtype(path, leaf), jnp.asarray(leaf)
            _check.not_varying(path, leaf)
            matrix = Matrix.of_gradient(update, axes[path], dtype)
            _check.state_shape(path, "norm", remembered[path], matrix.batch_shape)
            factor, norms[path] = limit_norm(
                matrix.tensor_norms(update.astype(dtype)),
                remembered[path],
                norm_growth_limit,
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
