"""Complete optimizers, with decoupled weight decay and a learning rate."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from apollo_optax import _check, _projection
from apollo_optax._dimension_numbers import (
    WeightDimensionNumbers,
    default_dimension_numbers,
)
from apollo_optax._flattening import scale_by_flattening
from apollo_optax._int8_trace import int8_trace
from apollo_optax._racs import scale_by_racs
from apollo_optax._relative import scale_by_param_matrix_rms
from apollo_optax._transform import scale_by_apollo


def _decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Any
) -> optax.GradientTransformation:
    _check.decay_mask(mask)
    return optax.add_decayed_weights(weight_decay, mask)


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 256,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
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
    r"""APOLLO: AdamW-level training at a fraction of AdamW's memory.

    The state of a matrix of sizes :math:`m \le n` is :math:`2nr + 1` numbers, against
    :math:`2mn` for AdamW. With ``projection="svd"``, there are :math:`mr` more. See
    :func:`scale_by_apollo` for the algorithm.

    Args:
      learning_rate: a fixed value or a schedule. Start near 0.01 for pre-training, not
        at AdamW's rate. For fine-tuning, sweep from AdamW's rate up.
      rank: rank of the projection. The paper uses a quarter of the model's width. It is
        clipped to the smaller side of each matrix, and a rank of that size saves no
        memory.
      weight_decay: strength of the decoupled weight decay, which is multiplied by the
        learning rate; a fixed value or a schedule.
      mask: which leaves get weight decay: a tree of booleans, a prefix of such a tree
        other than a single boolean, or a callable that returns one for the parameters.
      scale_type: ``"channel"`` for a scaling factor per channel, or ``"tensor"`` for
        one per matrix.
      scale: the update is multiplied by its square root. Use 1 for a rank of a quarter
        of the width.
      update_proj_gap: steps between draws of the projection.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator, for matrices and for the leaves under Adam.
      norm_growth_limit: largest ratio of the norms of a matrix's successive updates, at
        least 1; None switches the limiter off.
      scale_front: whether to multiply by ``sqrt(scale)`` before the limiter instead of
        after it.
      projection: ``"rademacher"``, ``"random"``, ``"svd"`` or a function
        ``(key, (r, m)) -> P``.
      key: an int seed or a JAX key, for the random projections.
      weight_dimension_numbers: which axes of a leaf form a matrix, for leaves other
        than 2-D kernels.
      moment_dtype: dtype of both moments of all leaves. The default is float32, or
        float64 for float64 leaves.

    The arguments that :func:`scale_by_apollo` shares are described in full there.

    Returns:
      The corresponding ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError: for a single boolean as `mask`, and as for :func:`scale_by_apollo`.
      ValueError: as for :func:`scale_by_apollo`.

    Examples:
      >>> import apollo_optax, jax, jax.numpy as jnp, optax
      >>> def loss(params):
      ...     return jnp.sum(params["kernel"] ** 2)
      >>> params = {"kernel": jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}
      >>> print(loss(params))
      91.0
      >>> tx = apollo_optax.apollo(learning_rate=0.1, rank=2)
      >>> state = tx.init(params)
      >>> for _ in range(20):
      ...     grads = jax.grad(loss)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 60)
      True

      With ``inject_hyperparams``:

      >>> tx = optax.inject_hyperparams(
      ...     apollo_optax.apollo,
      ...     static_args=apollo_optax.static_args(apollo_optax.apollo),
      ...     hyperparam_dtype=jnp.float32,
      ... )(learning_rate=optax.cosine_decay_schedule(0.01, 1000))

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2025

    .. seealso:: :func:`apollo_mini`, :func:`optax.adamw`, :func:`optax.contrib.galore`
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
            scale_front=scale_front,
            projection=projection,
            key=key,
            weight_dimension_numbers=weight_dimension_numbers,
            moment_dtype=moment_dtype,
        ),
        _decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: jax.typing.ArrayLike = 128.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
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
    r"""APOLLO-Mini: APOLLO of rank 1, at about the memory of SGD.

    This is :func:`apollo` with one scaling factor per matrix. The state of a
    matrix of sizes :math:`m \le n` is :math:`2n + 1` numbers.

    Args:
      learning_rate: a fixed value or a schedule. Start near 0.01 for pre-training.
      scale: the update is multiplied by its square root, to make up for the small
        scaling factors of rank 1.
      weight_decay: strength of the decoupled weight decay, which is multiplied by the
        learning rate; a fixed value or a schedule.
      mask: which leaves get weight decay: a tree of booleans, a prefix of such a tree
        other than a single boolean, or a callable that returns one for the parameters.
      update_proj_gap: steps between draws of the projection.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator, for matrices and for the leaves under Adam.
      norm_growth_limit: largest ratio of the norms of a matrix's successive updates, at
        least 1; None switches the limiter off.
      scale_front: whether to multiply by ``sqrt(scale)`` before the limiter instead of
        after it. The paper does so for models of 60 and 130 million parameters.
      projection: ``"rademacher"``, ``"random"``, ``"svd"`` or a function
        ``(key, (r, m)) -> P``.
      key: an int seed or a JAX key, for the random projections.
      weight_dimension_numbers: which axes of a leaf form a matrix, for leaves other
        than 2-D kernels.
      moment_dtype: dtype of both moments of all leaves. The default is float32, or
        float64 for float64 leaves.

    The arguments that :func:`scale_by_apollo` shares are described in full there.

    Returns:
      The corresponding ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError: for a single boolean as `mask`, and as for :func:`scale_by_apollo`.
      ValueError: as for :func:`scale_by_apollo`.

    Examples:
      >>> import apollo_optax, jax, jax.numpy as jnp
      >>> tx = apollo_optax.apollo_mini(0.01, weight_decay=0.1)
      >>> state = tx.init({"kernel": jnp.ones((512, 1376))})
      >>> state[0].mu["kernel"].shape
      (1, 1376)

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2025

    .. seealso:: :func:`apollo`
    """
    return apollo(
        learning_rate,
        rank=1,
        scale_type="tensor",
        scale=scale,
        weight_decay=weight_decay,
        mask=mask,
        update_proj_gap=update_proj_gap,
        b1=b1,
        b2=b2,
        eps=eps,
        norm_growth_limit=norm_growth_limit,
        scale_front=scale_front,
        projection=projection,
        key=key,
        weight_dimension_numbers=weight_dimension_numbers,
        moment_dtype=moment_dtype,
    )


def racs(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    b: jax.typing.ArrayLike = 0.9,
    iterations: int = 1,
    norm_growth_limit: jax.typing.ArrayLike | None = 1.01,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RACS: row and column scaled SGD, at the memory of SGD.

    The state of a matrix of sizes :math:`m` and :math:`n` is :math:`m + n + 1` numbers,
    against :math:`2mn` for AdamW. There is no projection and no momentum. See
    :func:`scale_by_racs` for the algorithm.

    Args:
      learning_rate: a fixed value or a schedule. Start near AdamW's rate, 1e-3, not at
        APOLLO's.
      weight_decay: strength of the decoupled weight decay, which is multiplied by the
        learning rate; a fixed value or a schedule.
      mask: which leaves get weight decay: a tree of booleans, a prefix of such a tree
        other than a single boolean, or a callable that returns one for the parameters.
      b: decay rate of the averages of a matrix's factors.
      iterations: rounds per step. Each round computes the factors of the columns from
        those of the rows, and then the factors of the rows from those of the columns.
      norm_growth_limit: largest ratio of the norms of a matrix's successive updates, at
        least 1; None switches the limiter off.
      b1: decay rate of the first moment of leaves under Adam.
      b2: decay rate of the second moment of leaves under Adam.
      eps: added to the denominator of leaves under Adam.
      weight_dimension_numbers: which axes of a leaf form a matrix, for leaves other
        than 2-D kernels.
      moment_dtype: dtype of both moments of leaves under Adam. The default is float32,
        or float64 for float64 leaves.

    The arguments that :func:`scale_by_racs` shares are described in full there.

    Returns:
      The corresponding ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError: for a single boolean as `mask`, and as for :func:`scale_by_racs`.
      ValueError: as for :func:`scale_by_racs`.

    Examples:
      >>> import apollo_optax, jax, jax.numpy as jnp
      >>> tx = apollo_optax.racs(1e-3, weight_decay=0.1)
      >>> state = tx.init({"kernel": jnp.ones((512, 1376))})
      >>> state[0].row["kernel"].shape, state[0].column["kernel"].shape
      ((512,), (1376,))

      :func:`static_args` has an example with ``inject_hyperparams``.

    References:
      Gong et al., `Towards Efficient Optimizer Design for LLM via Structured Fisher
      Approximation with a Low-Rank Extension <https://arxiv.org/abs/2502.07752>`_, 2025

    .. seealso:: :func:`apollo_mini`, :func:`optax.adafactor`
    """
    return optax.chain(
        scale_by_racs(
            b,
            iterations=iterations,
            norm_growth_limit=norm_growth_limit,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_dimension_numbers=weight_dimension_numbers,
            moment_dtype=moment_dtype,
        ),
        _decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def apollo_zero(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    power: jax.typing.ArrayLike = 0.5,
    method: Literal["low_rank", "newton_schulz", "exact"] = "low_rank",
    rank: int | None = None,
    momentum: jax.typing.ArrayLike | None = None,
    int8_momentum: bool = False,
    relative: bool = False,
    key: jax.typing.ArrayLike = 0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO-Zero: training without optimizer state for matrices.

    The update of a matrix is its gradient with normalized rows and columns and a
    flattened spectrum. This algorithm is this library's own, not the paper's. See
    :func:`scale_by_flattening` for its equations.

    Args:
      learning_rate: a fixed value or a schedule. Start near AdamW's rate, 1e-3 to 2e-3
        for pre-training.
      weight_decay: strength of the decoupled weight decay, which is multiplied by the
        learning rate; a fixed value or a schedule.
      mask: which leaves get weight decay: a tree of booleans, a prefix of such a tree
        other than a single boolean, or a callable that returns one for the parameters.
      power: the power of the singular values, in [0, 1). On a small model, 0.5 was
        better than 0 with 1,024 tokens per step, and 0 with ``"newton_schulz"`` was
        better with 8,192.
      method: ``"low_rank"``, ``"newton_schulz"`` or ``"exact"``.
      rank: the rank of the random projection of ``"low_rank"``; by default an eighth of
        the smaller side of each matrix.
      momentum: decay rate of a momentum of the gradients; None for no momentum and no
        state. With 0.9, halve the learning rate.
      int8_momentum: whether the momentum takes one byte per number instead of four, by
        :func:`int8_trace`. It needs a `momentum`.
      relative: whether a matrix's updates are in proportion to the root mean square of
        its weights, by :func:`scale_by_param_matrix_rms` with its defaults. If that is
        0.02, updates are as with ``relative=False``. For other bounds, chain the two
        transformations.
      key: an int seed or a JAX key, for the random projections.
      b1: decay rate of the first moment of the leaves under Adam.
      b2: decay rate of the second moment of the leaves under Adam.
      eps: added to the denominator of the leaves under Adam.
      weight_dimension_numbers: which axes of a leaf form a matrix, for leaves other
        than 2-D kernels.
      moment_dtype: dtype of both moments of the leaves under Adam, and of a momentum
        that is not in int8. The default is float32, or float64 for float64 leaves.

    The arguments that :func:`scale_by_flattening` shares are described in full there.

    Returns:
      The corresponding ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as for :func:`scale_by_flattening`, :func:`int8_trace` with
        `int8_momentum`, and :func:`scale_by_param_matrix_rms` with `relative`. Also for
        `int8_momentum` without a `momentum`, and for a single boolean as `mask`.

    Examples:
      >>> import apollo_optax, jax, jax.numpy as jnp
      >>> tx = apollo_optax.apollo_zero(1e-3, weight_decay=0.1)
      >>> params = {"kernel": jnp.ones((512, 1376))}
      >>> apollo_optax.state_bytes(tx, params).kernels
      0

      :func:`static_args` has an example with ``inject_hyperparams``.

    .. seealso:: :func:`apollo`, :func:`optax.contrib.muon`
    """
    # The flattening warns of kernels whose axes can't be guessed, so the other
    # transformations are given the default rule itself, of which they do not warn.
    numbers = weight_dimension_numbers
    if numbers is None:
        numbers = default_dimension_numbers
    _check.boolean("relative", relative)
    _check.boolean("int8_momentum", int8_momentum)
    before = []
    if int8_momentum:
        if momentum is None:
            raise ValueError(
                "int8_momentum=True needs a momentum; give momentum=0.9, for example"
            )
        _check.decay("momentum", momentum)
        before.append(
            int8_trace(momentum, nesterov=True, weight_dimension_numbers=numbers)
        )
        momentum = None
    # The state has the same structure with `relative` and without.
    in_proportion = (
        scale_by_param_matrix_rms(weight_dimension_numbers=numbers)
        if relative
        else optax.identity()
    )
    return optax.chain(
        *before,
        scale_by_flattening(
            power,
            method=method,
            rank=rank,
            momentum=momentum,
            key=key,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_dimension_numbers=weight_dimension_numbers,
            moment_dtype=moment_dtype,
        ),
        in_proportion,
        _decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
