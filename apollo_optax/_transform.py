"""APOLLO: SGD-like memory, AdamW-level performance.

Implementation of "APOLLO: SGD-like Memory, AdamW-level Performance"
(https://arxiv.org/abs/2412.05270) by Zhu et al. The matrices' moments are those of a random
low-rank projection of the gradient; they serve to scale the channels of the gradient itself.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from apollo_optax import _check, _projection, _schedule, _sharding, _tree
from apollo_optax._dimension_numbers import (
    MatrixAxes,
    WeightDimensionNumbers,
    resolve,
    state_shapes,
    warn_if_unguessable,
)
from apollo_optax._limiter import limit_norm

STATIC_ARGS = frozenset(
    {
        "rank",
        "scale_type",
        "update_proj_gap",
        "scale_front",
        "projection",
        "key",
        "weight_dimension_numbers",
        "moment_dtype",
        "mask",
    }
)
"""Arguments of :func:`apollo` that ``optax.inject_hyperparams`` must leave as they are.

It would otherwise turn integers into arrays and take callables and dtypes for schedules. A factory
that lacks some of them takes ``STATIC_ARGS & inspect.signature(factory).parameters.keys()``.
"""


class ScaleByApolloState(NamedTuple):
    """State of :func:`scale_by_apollo`; plain arrays, in trees of the parameters' structure.

    Shapes: for a matrix ``batch`` are the sizes of its batch axes, ``channel`` those of its channel
    side and ``contracted`` those of the other; ``r`` is the rank, clipped to the contracted size.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # shape=(), int32: steps taken.
    key: jax.Array  # raw key data, uint32; shape=(2,) for an int seed.
    mu: optax.Updates  # matrix: (*batch, r, *channel); any other leaf: the leaf's shape.
    nu: optax.Updates  # as mu.
    norm: optax.Updates  # matrix: batch, the limiter's remembered norms, 0: none; other leaves: ().
    projection: optax.Updates | None = None  # SVD only: (*batch, r, *contracted); other leaves: ().


_ARRAYS = (jax.Array, np.ndarray)


class _Constant:
    """A constant of the compiled code; callables are told apart by identity, not by their own ``==``."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._identity = id(value) if callable(value) else value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Settings:
    """Hyperparameters, as an argument of jitted functions.

    Arrays (from ``inject_hyperparams``) are traced. Python numbers stay constants of the compiled
    code, since ``1 - b2`` of a float32 array has lost four digits.
    """

    rank: int
    scale_type: str
    scale: Any
    b1: Any
    b2: Any
    eps: Any
    norm_growth_limit: Any
    scale_front: bool
    projection: str | _projection.Draw

    def tree_flatten(self) -> tuple[list[Any], tuple[Any, ...]]:
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        arrays = [value for value in values if isinstance(value, _ARRAYS)]
        return arrays, tuple(_ARRAYS if isinstance(v, _ARRAYS) else _Constant(v) for v in values)

    @classmethod
    def tree_unflatten(cls, constants: tuple[Any, ...], arrays: list[Any]) -> "_Settings":
        remaining = iter(arrays)
        return cls(*(next(remaining) if c is _ARRAYS else c.value for c in constants))


class _LeafState(NamedTuple):
    """What the fields of ScaleByApolloState hold for one leaf."""

    mu: jax.Array
    nu: jax.Array
    norm: jax.Array
    projection: jax.Array | None


class _Step(NamedTuple):
    """What all leaves share at one step; arrays, so that no leaf is compiled for a step."""

    key: jax.Array  # Typed.
    refresh: jax.Array  # Which draw of the projection is in use, counted from 0.
    is_refresh: jax.Array  # Whether this step is the first to use it.
    correction: jax.Array  # Adam's bias correction as one factor: sqrt(1 - b2^t) / (1 - b1^t).
    batch_index: jax.Array  # Where the leaves begin on their first batch axis; 0 for whole ones.


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
    projection: Literal["random", "rademacher", "svd"] | _projection.Draw = "random",
    key: jax.typing.ArrayLike = 0,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates according to the APOLLO algorithm.

    For a matrix :math:`G_t \in \mathbb{R}^{m \times n}`, with the smaller side, of size :math:`m`,
    contracted and channels along the other, rank :math:`r` and :math:`a = \sqrt{\text{scale}}`:

    .. math::

      \begin{align*}
        P_t &\in \mathbb{R}^{r \times m}, \quad (P_t)_{ij} \sim \mathcal{N}(0, 1/r),
          \quad \text{drawn anew every update\_proj\_gap steps} \\
        R_t &= P_t G_t \\
        M_t &= \beta_1 M_{t-1} + (1-\beta_1) R_t, \quad
        V_t = \beta_2 V_{t-1} + (1-\beta_2) R_t^2, \quad
        N_t = M_t / (\sqrt{V_t} + \varepsilon) \\
        s_j &= \|N_{t,:,j}\| / (\|R_{t,:,j}\| + 10^{-8}) \quad \text{(channel)}, \qquad
        s = \|N_t\| / (\|R_t\| + 10^{-8}) \quad \text{(tensor)} \\
        U_t &= a\, \mathrm{limit}(G_t\, \mathrm{diag}(s)) \\
        \text{update} &= \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\, U_t
      \end{align*}

    where :math:`\mathrm{limit}` is the norm-growth limiter, :func:`limit_norm_growth`. All other leaves
    (vectors, scalars, embeddings, the output head) get :func:`optax.scale_by_adam`'s update, so this
    is a drop-in replacement for it: no learning rate, same sign as the gradient.

    Args:
      rank: rank of the projection, clipped to the contracted size of each matrix. Moments take
        ``2 * n * rank`` numbers.
      scale_type: ``"channel"``, a factor per channel, or ``"tensor"``, one for the matrix.
      scale: the update is multiplied by its square root. The lower the rank, the smaller the factors
        (about ``sqrt(rank / m)`` of the full-rank ones), so rank 1 goes with 128.
      update_proj_gap: steps between draws of the projection.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the denominator, for matrices and for Adam's leaves.
      norm_growth_limit: largest ratio of the norms of a matrix's successive updates, at least 1; None
        switches the limiter off.
      scale_front: multiply by ``sqrt(scale)`` before the limiter instead of after it.
      projection: ``"random"``, normal entries; ``"rademacher"``, entries of random sign; ``"svd"``, the
        gradient's top singular vectors, which the state then holds; or a pure function
        ``(key, (r, m)) -> P``, vmapped over batch elements. Random projections are functions of `key`
        and take no memory in the state.
      key: an int seed below 2**32, which may be a traced scalar, or a JAX key, typed or raw.
      weight_dimension_numbers: which axes of a leaf form a matrix: a pytree (or prefix) of
        :class:`ApolloDimensionNumbers` or None (Adam), matched by path, or a callable that returns
        one for the parameters (the updates, at update time), as :func:`dimension_numbers_by_path`
        makes. Axes named by neither field are batch axes. The default takes 2-D leaves, except
        ``bias`` and ``scale`` and those under a known name of an embedding or output head; of kernels
        with more axes it warns.
      moment_dtype: dtype of both moments of all leaves. The default is float32, or float64 for float64
        leaves, whatever the gradients: ``(1 - b2) * R**2`` is lost when added to a bfloat16 number.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with :class:`ScaleByApolloState`. Updates keep the
      gradients' dtypes. The extra argument `batch_index` of ``update``, an integer, says that all leaves
      are slices of layer-stacked ones, from that index of their leading axis on, and has them draw the
      projections that they would as parts of the whole.

    Raises:
      TypeError: for an argument of the wrong type, such as an array where the value must be static.
      ValueError: for an argument out of range; from ``init`` and ``update``, for a leaf that is not
        real floating-point, dimension numbers that do not fit, a projection callable that returns
        the wrong shape, updates of another structure than the parameters, a state made for another
        rank, or, inside ``shard_map``, a matrix that varies over a manual axis.

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

      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?
      <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    _check.positive_int("rank", rank)
    _check.one_of("scale_type", scale_type, ("channel", "tensor"))
    _check.non_negative("scale", scale)
    _check.positive_int("update_proj_gap", update_proj_gap)
    _check.decay("b1", b1)
    _check.decay("b2", b2)
    _check.non_negative("eps", eps)
    if norm_growth_limit is not None:
        _check.norm_growth_limit(norm_growth_limit)
    _check.boolean("scale_front", scale_front)
    if not callable(projection):
        _check.one_of("projection", projection, _projection.NAMES, " or a callable (key, (r, m)) -> P")
    _check.moment_dtype(moment_dtype)
    key_impl = _projection.key_impl(key)
    key_shape = _projection.key_data_shape(key_impl)
    # No count gets further, and it must fit an int32 beside it.
    gap = min(int(update_proj_gap), jnp.iinfo(jnp.int32).max)
    settings = _Settings(rank, scale_type, scale, b1, b2, eps, norm_growth_limit, scale_front, projection)

    def init_fn(params: optax.Params) -> Any:
        if weight_dimension_numbers is None:
            warn_if_unguessable(params)
        axes = resolve(weight_dimension_numbers, params)
        leaves = _tree.leaves_by_path(params)
        states = [_init_leaf(settings, moment_dtype, path, leaf, axes[path]) for path, leaf in leaves.items()]
        structure = jax.tree.structure(_tree.unbox(params))
        fields = {
            name: structure.unflatten([getattr(leaf, name) for leaf in states])
            for name in ("mu", "nu", "norm", *(("projection",) if projection == "svd" else ()))
        }
        on_mesh = next((s for s in map(_sharding.of, leaves.values()) if s is not None), None)
        everywhere = _sharding.replicated(on_mesh)
        return ScaleByApolloState(
            count=_sharding.zeros((), jnp.int32, everywhere),
            key=_sharding.put(_projection.key_data(key), everywhere),
            **fields,
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        batch_index: jax.typing.ArrayLike = 0,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        axes = resolve(weight_dimension_numbers, updates)
        leaves = _tree.leaves_by_path(updates)
        _check.svd_state(projection == "svd", state.projection)
        _check.key_shape(state.key, key_shape)
        states = _leaf_states(state, leaves)
        count = jnp.asarray(optax.safe_increment(state.count))
        step = _Step(
            key=jax.random.wrap_key_data(state.key, impl=key_impl),
            refresh=state.count // gap,
            is_refresh=state.count % gap == 0,
            correction=jnp.sqrt(_one_minus_power(b2, count)) / _one_minus_power(b1, count),
            batch_index=jnp.asarray(batch_index),
        )
        new_updates, matrices = {}, {}
        for path, leaf in leaves.items():
            accumulator = _check.accumulator_dtype(path, leaf)
            gradient, matrix, old = jnp.asarray(leaf), axes[path], states[path]
            _check_leaf_state(path, leaf, old, matrix, rank)
            if matrix is None:
                new_updates[path], states[path] = _update_adam_leaf(
                    settings, gradient, old, count, accumulator
                )
            else:
                _check.not_varying(path, leaf)
                matrices[path] = _Matrix(gradient, old, _projection.leaf_id(path), matrix)
        for group in _alike(settings, matrices):
            results = _update_alike(settings, step, [matrices[path] for path in group])
            for path, (update, new) in zip(group, results, strict=True):
                new_updates[path], states[path] = update, new
        return (
            jax.tree.unflatten(jax.tree.structure(updates), [new_updates[path] for path in leaves]),
            _with_leaf_states(state._replace(count=count), states),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _init_leaf(
    settings: _Settings, moment_dtype: Any, path: _tree.Path, leaf: Any, axes: MatrixAxes | None
) -> _LeafState:
    accumulator = _check.accumulator_dtype(path, leaf)
    sharding = _sharding.of(leaf)
    shapes = state_shapes(axes, jnp.shape(leaf), settings.rank)
    if axes is not None and not isinstance(settings.projection, str):
        _projection.check_callable(settings.projection, path, axes, settings.rank)

    def zeros(field: str, dtype: Any) -> jax.Array:
        place = sharding and _sharding.of_field(field, axes, settings.rank, sharding)
        return _sharding.zeros(shapes[field], dtype, place)

    dtype = moment_dtype or accumulator
    stored = zeros("projection", accumulator) if settings.projection == "svd" else None
    return _LeafState(zeros("mu", dtype), zeros("nu", dtype), zeros("norm", accumulator), stored)


def _leaf_states(state: ScaleByApolloState, leaves: dict[_tree.Path, Any]) -> dict[_tree.Path, _LeafState]:
    """The state by leaf, which must be the leaves of the updates."""
    fields: list[Any] = [getattr(state, name) for name in _LeafState._fields]
    nothing: dict[_tree.Path, Any] = dict.fromkeys(leaves)
    by_path = [nothing if field is None else _check.same_paths(leaves, field) for field in fields]
    return {path: _LeafState(*(field[path] for field in by_path)) for path in leaves}


def _with_leaf_states(state: ScaleByApolloState, states: dict[_tree.Path, _LeafState]) -> ScaleByApolloState:
    """`state` with new leaves, in trees of the structure it had."""
    fields = {name: getattr(state, name) for name in _LeafState._fields}
    new = {
        name: _tree.rebuild(field, {path: getattr(leaf, name) for path, leaf in states.items()})
        for name, field in fields.items()
        if field is not None
    }
    return state._replace(**new)


def _check_leaf_state(
    path: _tree.Path, leaf: Any, state: _LeafState, axes: MatrixAxes | None, rank: int
) -> None:
    shapes = state_shapes(axes, jnp.shape(leaf), rank)
    for field, stored in zip(_LeafState._fields, state, strict=True):
        if stored is not None:
            _check.state_shape(path, field, stored, shapes[field])


def _update_adam_leaf(
    settings: _Settings, gradient: jax.Array, state: _LeafState, count: jax.Array, dtype: Any
) -> tuple[jax.Array, _LeafState]:
    """The update of :func:`optax.scale_by_adam`, by its own formulas, for one leaf."""
    mu, nu = _update_moments(settings, gradient.astype(dtype), state)
    mu_hat = optax.tree.bias_correction(mu, settings.b1, count)
    nu_hat = optax.tree.bias_correction(nu, settings.b2, count)
    update = mu_hat / (jnp.sqrt(nu_hat) + settings.eps)
    return _narrow(update, gradient.dtype), _store(state, mu=mu, nu=nu)


class _Matrix(NamedTuple):
    """A leaf that is one matrix or a batch of them."""

    gradient: jax.Array
    state: _LeafState
    leaf_id: np.uint32
    axes: MatrixAxes


def _alike(settings: _Settings, matrices: dict[_tree.Path, _Matrix]) -> list[list[_tree.Path]]:
    """The leaves in groups whose projections one loop can draw."""
    groups: dict[Any, list[_tree.Path]] = {}
    for path, (gradient, _, _, axes) in matrices.items():
        dtype = _check.accumulator_dtype(path, gradient)
        group: Any = path
        # Not where there may be a mesh, which may cut leaves of one shape along different axes.
        if (
            settings.projection in _projection.DRAWN
            and _sharding.is_on_one_device(gradient)
            and not _schedule.is_by_rows(axes, settings.rank, gradient, dtype)
        ):
            group = (axes.batch_shape, axes.projection_shape(settings.rank), dtype)
        groups.setdefault(group, []).append(path)
    return list(groups.values())


def _update_alike(
    settings: _Settings, step: _Step, matrices: list[_Matrix]
) -> Iterator[tuple[jax.Array, _LeafState]]:
    """Updates the leaves of a group in turn, drawing as many projections at once as memory allows."""
    if len(matrices) == 1:
        ((gradient, state, leaf_id, axes),) = matrices
        yield _update_matrix_leaf(settings, gradient, state, None, leaf_id, step, axes)
        return
    gradients, like = [matrix.gradient for matrix in matrices], matrices[0].axes
    dtype = _check.accumulator_dtype((), gradients[0])
    sizes = [_schedule.computed_bytes(matrix.axes, settings.rank, dtype) for matrix in matrices]
    at_once = _schedule.draws_at_once(gradients, sizes)
    keys = _leaf_keys(step, np.array([matrix.leaf_id for matrix in matrices]), like)
    drawn = jnp.zeros((at_once, *like.projection_shape(settings.rank)), dtype)
    in_turn, first, after = _schedule.is_in_turn(gradients, sizes), 0, step.refresh
    for index, (gradient, state, leaf_id, axes) in enumerate(matrices):
        if index % at_once == 0:
            # As many each time, so that all times share a loop's code.
            first = min(index, len(matrices) - at_once)
            start = _schedule.place(first, after)
            drawn = _draw_into(settings, drawn, keys, start, like, _schedule.is_small(drawn, gradients))
        projection = _schedule.at(drawn, _schedule.place(index - first, after))
        update, new = _update_matrix_leaf(settings, gradient, state, projection, leaf_id, step, axes)
        yield update, new
        if in_turn:
            after = new.nu


@functools.partial(jax.jit, static_argnames=("axes",))
def _leaf_keys(step: _Step, leaf_ids: jax.Array, axes: MatrixAxes) -> jax.Array:
    """The keys of leaves of one batch shape, ``(leaves, batch size)``."""
    of_leaf = functools.partial(_batch_keys, step, axes=axes)
    return _projection.mapped(of_leaf, step.key)(leaf_ids)


def _batch_keys(step: _Step, leaf_id: jax.typing.ArrayLike, axes: MatrixAxes) -> jax.Array:
    first = step.batch_index * math.prod(axes.batch_shape[1:])
    return _projection.batch_keys(step.key, leaf_id, step.refresh, axes.batch_size, first)


@functools.partial(jax.jit, static_argnames=("axes", "at_once"))
def _draw_into(
    settings: _Settings,
    drawn: jax.Array,
    keys: jax.Array,
    first: jax.Array,
    axes: MatrixAxes,
    at_once: bool,
) -> jax.Array:
    """Step 1 for several leaves, from the `first` of `keys` on, in the place of what was drawn before."""

    def draw(of_leaf: jax.Array) -> jax.Array:
        return _projection.draw(settings.projection, of_leaf, axes, settings.rank, drawn.dtype)

    if at_once:
        given = jax.lax.dynamic_slice_in_dim(keys, first, drawn.shape[0])
        return _projection.mapped(draw, keys)(given)

    def body(i: jax.Array, drawn: jax.Array) -> jax.Array:
        one = draw(_schedule.at(keys, first + i))
        return jax.lax.dynamic_update_index_in_dim(drawn, one, i, 0, allow_negative_indices=False)

    return jax.lax.fori_loop(0, drawn.shape[0], body, drawn)


# Jitted for itself, so that leaves of one shape share a trace and an eager step computes what a jitted
# one does.
@functools.partial(jax.jit, static_argnames=("axes",))
def _update_matrix_leaf(
    settings: _Settings,
    gradient: jax.Array,
    state: _LeafState,
    projection: jax.Array | None,
    leaf_id: jax.typing.ArrayLike,
    step: _Step,
    axes: MatrixAxes,
) -> tuple[jax.Array, _LeafState]:
    """Steps 1 to 8 of the algorithm for one leaf; `state` and result as in ScaleByApolloState."""
    dtype = _check.accumulator_dtype((), gradient)
    keys = _batch_keys(step, leaf_id, axes)

    def of_row(
        gradient: jax.Array, state: _LeafState, row: jax.Array, axes: MatrixAxes
    ) -> tuple[jax.Array, _LeafState]:
        of_its_matrices = jax.lax.dynamic_slice_in_dim(keys, row * axes.batch_size, axes.batch_size)
        return _update_factors(settings, gradient, state, None, of_its_matrices, step, axes)

    if _schedule.is_by_rows(axes, settings.rank, gradient, dtype):
        factors, new = _schedule.by_rows(of_row, gradient, state, axes)
    else:
        factors, new = _update_factors(settings, gradient, state, projection, keys, step, axes)
    # Here and not in the loop, so that what applies the update takes it as it is computed.
    return _narrow(gradient.astype(dtype) * axes.spread(factors), gradient.dtype), new


def _update_factors(
    settings: _Settings,
    gradient: jax.Array,
    state: _LeafState,
    projection: jax.Array | None,
    keys: jax.Array,
    step: _Step,
    axes: MatrixAxes,
) -> tuple[jax.Array, _LeafState]:
    """Steps 1 to 8 as factors of the gradient, ``(*batch, *channel)`` or of size 1 on the channel axes."""
    sharding = _sharding.of(gradient)
    wide = gradient.astype(_check.accumulator_dtype((), gradient))
    scale = jnp.sqrt(jnp.asarray(settings.scale, wide.dtype))

    stored = None
    if projection is None:
        projection, stored = _projections(settings, wide, state, keys, step, axes)
    # Where the moments are, which need not follow from the gradient's sharding but from the parameter's.
    moments_sharding = _sharding.of(state.mu) or _sharding.moments(axes, settings.rank, sharding)
    # Where the moments are cut along the rank axis, XLA would cut P so too, and gather the gradient for it.
    placed = functools.partial(_sharding.whole_axis, axis=len(axes.batch), like=wide)
    projected = axes.project(projection, gradient, moments_sharding, placed)
    mu, nu = _update_moments(settings, projected, state)
    normalized = mu / (jnp.sqrt(nu) + settings.eps)
    factors = _scaling_factors(settings, normalized, projected, axes, sharding)

    if settings.scale_front:
        factors = scale * factors
    norm = state.norm
    if settings.norm_growth_limit is not None:
        # |U| without a pass over the update: |U|^2 = sum_j s_j^2 |G_j|^2, over what has a factor of its own.
        if settings.scale_type == "channel":
            norms = axes.channel_norms(wide)
        else:
            of_tensor = axes.tensor_norms(wide, through_channels=_sharding.is_on_one_device(gradient))
            norms = axes.per_batch(of_tensor, factors.ndim)
        update_norm = axes.norm(factors * norms)
        update_norm = _sharding.place(update_norm, _sharding.of(state.norm))
        limit, norm = limit_norm(update_norm, state.norm, settings.norm_growth_limit)
        limit = _sharding.place(limit, _sharding.norms(axes, sharding))
        factors = axes.per_batch(limit, factors.ndim) * factors
    if not settings.scale_front:
        factors = scale * factors
    factors = step.correction.astype(wide.dtype) * factors
    return factors, _store(state, mu=mu, nu=nu, norm=norm, projection=stored)


def _projections(
    settings: _Settings,
    gradient: jax.Array,
    state: _LeafState,
    keys: jax.Array,
    step: _Step,
    axes: MatrixAxes,
) -> tuple[jax.Array, jax.Array | None]:
    """Step 1: ``(*batch, r, *contracted)``, placed where the gradient is; and what of it is stored."""
    sharding = _sharding.projections(axes, _sharding.of(gradient))
    if state.projection is not None:
        stored = jax.lax.cond(
            step.is_refresh,
            lambda previous: _projection.from_svd(gradient, previous, axes, settings.rank),
            lambda previous: previous,
            state.projection,
        )
        return _sharding.place(stored, sharding), stored
    return _projection.draw(settings.projection, keys, axes, settings.rank, gradient.dtype, sharding), None


def _update_moments(
    settings: _Settings, gradient: jax.Array, state: _LeafState
) -> tuple[jax.Array, jax.Array]:
    """Step 3, in the gradient's dtype whatever the stored one."""
    mu, nu = state.mu.astype(gradient.dtype), state.nu.astype(gradient.dtype)
    mu = optax.tree.update_moment(gradient, mu, settings.b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(gradient, nu, settings.b2, 2)
    return mu, nu


def _scaling_factors(
    settings: _Settings,
    normalized: jax.Array,
    projected: jax.Array,
    axes: MatrixAxes,
    sharding: Any,
) -> jax.Array:
    """Step 4: ``(*batch, *channel)``, or size 1 on the channel axes for the tensor-wise factor."""
    if settings.scale_type == "tensor":
        ratio = axes.norm(normalized) / (axes.norm(projected) + 1e-8)
        ratio = _sharding.place(ratio, _sharding.norms(axes, sharding))
        return axes.per_batch(ratio, projected.ndim - 1)
    rank_axis = len(axes.batch)

    def norms(moment: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(moment), axis=rank_axis))

    ratios = norms(normalized) / (norms(projected) + 1e-8)
    return _sharding.place(ratios, _sharding.channels(axes, sharding))


def _one_minus_power(decay: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """``1 - decay**count`` without the cancellation that costs float32 four digits at first."""
    if isinstance(decay, _ARRAYS):
        return -jnp.expm1(count * jnp.log(decay))
    return -jnp.expm1(count * (math.log(cast(float, decay)) if decay else -math.inf))


def _store(state: _LeafState, **new: jax.Array | None) -> _LeafState:
    """The new state of a leaf in the dtypes of the old one."""
    changed = {n: _narrow(v, getattr(state, n).dtype) for n, v in new.items() if v is not None}
    return state._replace(**changed)


def _narrow(array: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Casts; what is finite, and nothing else, stays so in a dtype that ends earlier, as float16 at 65504."""
    if jnp.finfo(dtype).max < jnp.finfo(array.dtype).max:
        clipped = jnp.clip(array, jnp.finfo(dtype).min, jnp.finfo(dtype).max)
        array = jnp.where(jnp.isinf(array), array, clipped)
    return array.astype(dtype)
