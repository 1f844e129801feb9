"""Updates in proportion to the weights of each matrix, as in LARS and Adafactor.

A rule such as APOLLO-Zero gives all matrices updates with the same root mean square.
Weights differ in size from matrix to matrix, and grow during training. An update in
proportion to the weights changes every matrix by the same share.

This is a positive feedback: updates make weights grow, and larger weights make updates
larger. Without a bound, weights would grow exponentially at a rate that is too high.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _check, _tree
from apollo_optax._dimension_numbers import (
    Unguessed,
    WeightDimensionNumbers,
    check_batch_index,
    resolve,
    warn_if_unguessable,
)
from apollo_optax._matrix import Matrix

# The standard deviation of the initial weights of LLaMA, GPT-2 and BERT.
USUAL_RMS = 0.02

NOT_SCALED = Unguessed(
    "the updates of {} are not scaled by their weights",
    "is not scaled by its weights, because only matrices are",
    "leaves a kernel's update as it is",
)


def scale_by_param_matrix_rms(
    reference_rms: jax.typing.ArrayLike = USUAL_RMS,
    *,
    min_rms: jax.typing.ArrayLike = 1e-3,
    max_rms: jax.typing.ArrayLike = 0.1,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the update of each matrix by the root mean square of its weights.

    With the update :math:`U` and the weights :math:`W` of a matrix of sizes :math:`m`
    and :math:`n`:

    .. math::

      \text{update} = \frac{\min(\max(|W| / \sqrt{mn},\ \texttt{min\_rms}),\
        \texttt{max\_rms})}{\texttt{reference\_rms}}\ U

    A matrix whose weights have a root mean square of `reference_rms` keeps its update.
    Larger weights get larger updates, and small ones smaller updates. So if the initial
    weights have a standard deviation of 0.02, learning rates stay near those without
    this transformation. Flax's default initializers give narrow layers larger weights:
    there, pass their root mean square as `reference_rms`, and a larger `max_rms`.

    Weights grow during training, and their updates with them, up to `max_rms`. So the
    best learning rate may depend on the length of a run.

    All other leaves keep their updates. Without `weight_dimension_numbers`, so do
    kernels of three axes or more, such as those of stacked layers, and ``init`` warns
    of them.

    This is :func:`optax.scale_by_param_block_rms` for matrices: a layer-stacked leaf
    has a factor per layer, and embeddings, the output head and vectors have none. There
    is no state. On a mesh, one number per matrix is summed over the devices.

    Put it after a transformation whose updates have about the same size in every step,
    such as :func:`scale_by_flattening` or ``optax.scale_by_adam``, and before weight
    decay and the learning rate.

    Args:
      reference_rms: the root mean square of weights whose update is not changed,
        greater than 0. The default is the standard deviation of the initial weights of
        LLaMA, GPT-2 and BERT. With 1, the learning rate is relative to the weights, as
        in :func:`optax.adafactor`.
      min_rms: smaller root mean squares count as this, so that a matrix of zeros is
        trained too; at least 0.
      max_rms: larger root mean squares count as this, so that weights can't grow
        exponentially; greater than 0 and at least `min_rms`. Infinity is no bound.
      weight_dimension_numbers: which axes of a leaf form a matrix, as for
        :func:`scale_by_apollo`.
        If this is a function, name the argument in the `static_args` of
        ``optax.inject_hyperparams``, which would otherwise call it with the count of
        steps.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is empty. Updates keep
      their dtypes. Its ``update`` function needs the parameters. It takes the extra
      argument `batch_index` of :func:`scale_by_apollo`, which is only checked here.

    Raises:
      TypeError: if an argument is not a number, or dimension numbers are malformed.
      ValueError: if an argument is out of range. From ``init`` and ``update``, for a
        leaf that is not real floating-point, or dimension numbers that do not fit. From
        ``update``, without parameters, for parameters of another structure or other
        shapes than the updates, for a `batch_index` with a matrix that axis 0 is a part
        of, or, inside ``shard_map``, for a matrix that varies over a manual axis.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from apollo_optax import scale_by_flattening, scale_by_param_matrix_rms
      >>> tx = optax.chain(
      ...     scale_by_flattening(),
      ...     scale_by_param_matrix_rms(),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )

      By itself:

      >>> tx = scale_by_param_matrix_rms()
      >>> params = {"kernel": jnp.full((8, 16), 0.04), "bias": jnp.zeros(16)}
      >>> updates = {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}
      >>> updates, state = tx.update(updates, tx.init(params), params)
      >>> print(f"{updates['kernel'][0, 0]:.2f}, {updates['bias'][0]:.2f}")
      2.00, 1.00

    References:
      You et al., `Large Batch Training of Convolutional Networks
      <https://arxiv.org/abs/1708.03888>`_, 2017

      Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
      <https://arxiv.org/abs/1804.04235>`_, 2018
    """
    _check.positive("reference_rms", reference_rms)
    _check.rms_bounds(min_rms, max_rms)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        if weight_dimension_numbers is None:
            warn_if_unguessable(params, NOT_SCALED)
        resolve(weight_dimension_numbers, params)
        for path, leaf in _tree.leaves_by_path(params).items():
            _check.accumulator_dtype(path, leaf)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        batch_index: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        # A slice with a side of 1 is a vector, but all layers together are a matrix.
        # Other transformations have a state that shows this.
        axes = resolve(weight_dimension_numbers, updates, with_vectors=True)
        check_batch_index(batch_index, axes)
        if params is None:
            raise ValueError(
                "updates are scaled by the parameters, which are missing; call "
                "update(updates, state, params)"
            )
        leaves, weights = _leaves(updates), _leaves(params)
        _check.params_of_updates(leaves, weights)
        scaled = {}
        for path, leaf in leaves.items():
            scaled[path] = leaf
            dtype = _check.accumulator_dtype(path, leaf)
            matrix_axes = axes[path]
            if matrix_axes is not None and matrix_axes.contracted_size > 1:
                _check.not_varying(path, leaf)
                _check.not_varying(path, weights[path], _check.OUTSIDE_SHARD_MAP)
                matrix = Matrix.of_gradient(leaf, matrix_axes, dtype)
                rms = matrix.tensor_norms(weights[path].astype(dtype)) / math.sqrt(
                    matrix_axes.matrix_size
                )
                factor = jnp.clip(rms, min_rms, max_rms) / reference_rms
                scaled[path] = matrix.scale(
                    leaf, matrix.per_channel(factor.astype(dtype))
                )
        return (
            jax.tree.unflatten(jax.tree.structure(updates), list(scaled.values())),
            state,
        )

    # Optax types any state as a tree of arrays.
    init: Any = init_fn
    update: Any = update_fn
    return optax.GradientTransformationExtraArgs(init, update)


def _leaves(tree: Any) -> dict[_tree.Path, jax.Array]:
    return {path: jnp.asarray(x) for path, x in _tree.leaves_by_path(tree).items()}
