"""Weights in int8 and bfloat16, and updates that are added with stochastic rounding.

A weight of few bits can't represent an update that is much smaller than its rounding
step. Rounded to nearest, it would keep its value, step after step. Stochastic rounding
moves it up with the probability that makes the expectation exact, so that small updates
add up. It applies to bfloat16 weights as they are, and to int8 weights in groups that
share a scale and a zero point, as Q-GaLore and Q-APOLLO train them.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from apollo_optax import _check, _keys, _sharding, _tree
from apollo_optax._blocks import (
    BLOCK,
    block_shape,
    from_blocks,
    split_shape,
    to_blocks,
)
from apollo_optax._dtypes import wide_dtype
from apollo_optax._rounding import (
    Grid,
    needed_scale,
    new_grid,
    random_bits,
    round_to_bfloat16,
    value_range,
)


# eq=False, because arrays have no single truth value to compare by.
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["qvalue", "scale", "zero_point"],
    meta_fields=["axis", "axis_size", "group_size", "dtype"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A matrix, or a stack of them, in int8: ``(qvalue - zero_point) * scale``.

    Each group of `group_size` neighbours along `axis` has its own scale and zero point.
    The last group is shorter if `group_size` does not divide the axis. A QuantizedArray
    is a pytree of three arrays, so ``jit``, ``lax.scan``, donation, ``device_put`` and
    Orbax treat it like any other pytree. ``flax.serialization`` supports registered
    types only; give it the ``jax.tree.leaves``.

    `shape`, `ndim` and `size` are those of the matrix. In `scale` and `zero_point`, an
    axis of groups replaces `axis`. In `qvalue`, an axis of groups and two axes of
    positions within a group replace it. Weights of shape ``(4096, 11008)`` have scales
    of shape ``(32, 11008)`` and codes of shape ``(32, 16, 8, 11008)``, in which
    ``(16, 8)`` are the 128 positions. If `axis` is the last, positions form a single
    axis. The last group is padded with zeros. A kernel sharded by
    ``P("data", "model")`` has codes sharded by ``P("data", None, None, "model")``. All
    three arrays can be sliced and stacked along the other axes, such as the axis of
    layers.

    :func:`quantize` makes it and :func:`dequantize` reads it.

    Attributes:
      qvalue: the codes, int8, of shape ``(..., groups, positions / 8, 8, ...)``, or
        ``(..., groups, positions)`` along the last axis.
      scale: the scale of each group, bfloat16, of shape ``(..., groups, ...)``. A
        float32 scale stays float32.
      zero_point: the code of 0 in each group, int8, of the scale's shape.
      axis: the axis of groups. It is negative, so that it also holds for a layer
        sliced from a stack.
      axis_size: the matrix's size along `axis`, without the padding.
      group_size: neighbours per scale.
      dtype: the dtype of the dequantized array.
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    axis: int
    axis_size: int
    group_size: int
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix or stack of matrices."""
        before, _, after = split_shape(self.scale.shape, self.axis)
        return (*before, self.axis_size, *after)

    @property
    def ndim(self) -> int:
        """Number of axes of the matrix or stack of matrices."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points; the arrays may be abstract."""
        parts = (self.qvalue, self.scale, self.zero_point)
        sizes = (math.prod(p.shape) * jnp.dtype(p.dtype).itemsize for p in parts)
        return sum(sizes)


def quantize(
    array: jax.typing.ArrayLike,
    *,
    axis: int | None = None,
    group_size: int = 128,
    key: Any = None,
) -> QuantizedArray:
    r"""Rounds an array to int8, with a scale and a zero point per group of neighbours.

    A group with values from :math:`l \le 0` to :math:`h \ge 0` (the range always
    includes 0) becomes

    .. math::

       s = (h - l) / 253.99, \quad z = \lceil -l / s \rceil - 128, \quad
       q = \mathrm{round}(w / s) + z,

    with :math:`s` rounded up to bfloat16. The divisor is a little less than 254, so
    nothing is clipped even if a division is a few ulp off. 0 is exact. The error of
    :math:`(q - z) s` is at most half a step :math:`s`, or less than a step if `key` is
    given. A group with a value that is not finite dequantizes to NaN throughout,
    because int8 can't record which value it was.

    Args:
      array: real floating-point, with two or more axes (or one, if `axis` is given).
      axis: the axis along which neighbours form a group. The default is the second to
        last axis, the inputs of Flax's ``(in, out)`` kernels, so that neighbouring
        weights in memory have neighbouring scales. If the array's ``NamedSharding``
        splits that axis within a group, the default is the last axis, unless that is
        split within a group too. For example, 11008 is 86 groups of 128, which two
        devices can share and four can't. (Inside ``jit`` under automatic sharding, the
        sharding is unknown; pass `axis` there.) It must not be the axis of layers if
        the stack is to be sliced.
      group_size: neighbours per scale, a multiple of 8. With 128, an int8 weight takes
        1.023 bytes. An axis that is longer than a group, and not a multiple of it, is
        padded to the next multiple.
      key: None rounds to nearest. A JAX key, typed or raw, rounds up with a probability
        equal to the remaining fraction of a step, so that the expectation is the
        weight, to within :math:`2^{-17}` of a step.

    Returns:
      A :class:`QuantizedArray` that dequantizes to the shape and dtype of `array`.

    Raises:
      TypeError: if `array` is a QuantizedArray, if `axis` or `group_size` is not an
        int, or if `key` is not a JAX key.
      ValueError: if `array` is not real floating-point or has too few axes, or if
        `axis` or `group_size` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.linspace(-1.0, 1.0, 256 * 8).reshape(256, 8)
      >>> quantized = quantize(kernel)
      >>> quantized.scale.shape, quantized.nbytes / quantized.size
      ((2, 8), 1.0234375)
      >>> error = abs(dequantize(quantized) - kernel)
      >>> float(error.max()) < 0.5 * float(quantized.scale.max())
      True

    References:
      Jacob et al., `Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference <https://arxiv.org/abs/1712.05877>`_, 2018

      Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
      Low-Rank Gradients <https://arxiv.org/abs/2407.08296>`_, 2024
    """
    if isinstance(array, QuantizedArray):
        raise TypeError(
            "the array is a QuantizedArray already; pass dequantize(array) to quantize "
            "it again"
        )
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"quantize takes real floating-point arrays, got dtype {array.dtype}; "
            "leave this array as it is"
        )
    _check.positive_int("group_size", group_size)
    group_size = int(group_size)
    if group_size % BLOCK != 0:
        raise ValueError(
            f"group_size must be a multiple of {BLOCK}, such as 64 or 128, got "
            f"{group_size}"
        )
    if axis is None:
        axis = _default_axis(array, group_size)
    else:
        axis = _negative_axis(axis, array.shape)
    key = None if key is None else _threefry_key(key)
    return _quantize(array, key, axis, group_size)


def dequantize(tree: Any) -> Any:
    """Replaces every :class:`QuantizedArray` in a pytree by the array it represents.

    Args:
      tree: any pytree; a single QuantizedArray is one too.

    Returns:
      The tree with arrays of the dtypes that were quantized, computed in float32
      (float64 for float64). Other leaves are unchanged. ``tx.init`` takes the
      dequantized parameters; ``jax.eval_shape(dequantize, params)`` has their shapes.

    Raises:
      ValueError: if the shapes of a QuantizedArray's codes and scales do not match.
    """

    def dequantize_leaf(leaf: Any) -> Any:
        return _dequantize(leaf) if is_quantized(leaf) else leaf

    return jax.tree.map(dequantize_leaf, tree, is_leaf=is_quantized)


def apply_updates_stochastic(
    params: optax.Params,
    updates: optax.Updates,
    key: Any,
    *,
    batch_index: jax.typing.ArrayLike | None = None,
) -> Any:
    r"""Adds updates to bfloat16 and int8 parameters with stochastic rounding.

    It replaces ``optax.apply_updates``, and does the same for leaves in all other
    dtypes. Updates are added in float32 and the sums are rounded so that their
    expectation is exact. A sum that is a fraction :math:`f` of a step above a
    representable value is rounded up with probability :math:`f`, and otherwise down. A
    bfloat16 weight that is not finite stays as it is.

    An int8 group keeps its scale and zero point as long as the new weights fit its
    range and use at least half of it. Otherwise it gets a new scale and zero point, as
    in :func:`quantize`.

    Every element's draw is a function of the key, of its leaf's path (boxes and node
    types do not matter) and of its index in the leaf, on any mesh. Draws use threefry
    even if the key belongs to another generator, because the bits of other generators
    depend on how the computation is sharded and batched.

    Args:
      params: the parameters; a :class:`QuantizedArray` is one leaf.
      updates: arrays of the parameters' shapes at the same paths.
      key: a JAX key, typed or raw, a different one for each step:
        ``jax.random.fold_in(key, step)``.
      batch_index: the index of the first layer, if the leaves are slices of
        layer-stacked leaves that keep the layer axis at size 1 (or a few layers).
        Slices then get the draws that they would get in the whole stack. May be traced.

    Returns:
      The new parameters, with the structure, shapes and dtypes of `params`.

    Raises:
      TypeError: if `key` is not a JAX key, or `batch_index` is not an integer.
      ValueError: if the paths or shapes of the updates differ from the parameters'.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((4, 8), jnp.bfloat16)}
      >>> updates = {"kernel": jnp.full((4, 8), 1e-3)}
      >>> lost = optax.apply_updates(params, updates)["kernel"]
      >>> [float(x) for x in jnp.unique(lost)]
      [1.0]
      >>> moved = apply_updates_stochastic(params, updates, jax.random.key(0))["kernel"]
      >>> [float(x) for x in jnp.unique(moved)]
      [1.0, 1.0078125]

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision
      <https://arxiv.org/abs/1502.02551>`_, 2015

      Zamirai et al., `Revisiting BFloat16 Training
      <https://arxiv.org/abs/2010.06192>`_, 2020
    """
    leaves = _tree.leaves_by_path(params, is_quantized)
    deltas = _tree.leaves_by_path(updates)
    _check_updates(leaves, deltas)
    key, first = _threefry_key(key), 0 if batch_index is None else batch_index
    _check.batch_index(first)
    # Follow the parameters' order of leaves. The updates' order can differ if their
    # containers sort keys differently.
    new = [
        _update_leaf(leaf, deltas[path], key, _keys.leaf_id(path), first)
        for path, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), new)


def is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedArray)


# Checks of arguments.


def _negative_axis(axis: Any, shape: tuple[int, ...]) -> int:
    """`axis` counted from the end."""
    try:
        axis = operator.index(axis)
    except TypeError as error:
        raise TypeError(f"axis must be an int or None, got {axis!r}") from error
    ndim = len(shape)
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"axis must be one of the {ndim} axes of shape {shape}, got {axis}"
        )
    return axis - ndim if axis >= 0 else axis


def _default_axis(array: jax.Array, group_size: int) -> int:
    """The axis that the docstring of :func:`quantize` promises."""
    if array.ndim < 2:
        raise ValueError(
            f"quantize takes arrays of two or more axes, got shape {array.shape}: "
            "vectors are too small a part of a model to be worth the error; leave this "
            "array as it is, or give axis="
        )
    sharding = _sharding.sharding_of(array)
    shard = array.shape if sharding is None else sharding.shard_shape(array.shape)

    def has_whole_groups(axis: int) -> bool:
        return shard[axis] == array.shape[axis] or shard[axis] % group_size == 0

    return next((axis for axis in (-2, -1) if has_whole_groups(axis)), -2)


def _threefry_key(key: Any) -> jax.Array:
    """`key` as one typed threefry key; of another generator, a key drawn from it."""
    impl = _keys.jax_key_impl(key)
    if impl is None:
        raise TypeError(
            "key must be one JAX key, from jax.random.key(seed) or the raw data of one "
            f"of JAX's default generator, got {key!r}"
        )
    if key.shape != ():  # Raw data is a vector.
        key = jax.random.wrap_key_data(jnp.asarray(key), impl=impl)
    if impl == _keys.SEED_IMPL:
        return key
    words = jax.random.bits(key, (2,), jnp.uint32)
    return jax.random.wrap_key_data(words, impl=_keys.SEED_IMPL)


def _check_updates(
    leaves: dict[_tree.Path, Any], updates: dict[_tree.Path, Any]
) -> None:
    difference = _check.path_difference(
        leaves,
        updates,
        missing="lack leaves that the parameters have",
        unexpected="have leaves that the parameters lack",
    )
    if difference:
        raise ValueError(
            f"the updates {difference}; pass an array for every parameter, and for a "
            "QuantizedArray one like the array it dequantizes to (take gradients with "
            "respect to dequantize(params))"
        )
    for path, leaf in leaves.items():
        if is_quantized(leaf):
            _check_parts(leaf)
        shape = leaf.shape if is_quantized(leaf) else jnp.shape(leaf)
        if jnp.shape(updates[path]) != shape:
            raise ValueError(
                f"the update of '{_tree.show(path)}' has shape "
                f"{jnp.shape(updates[path])}, but the parameter has shape {shape}; "
                "pass updates of the parameters' shapes"
            )


def _check_parts(array: QuantizedArray) -> None:
    """Raises if codes and scales do not match, as after a slice along the groups."""
    expected = None
    if len(array.scale.shape) + array.axis >= 0:
        before, n, after = split_shape(array.shape, array.axis)
        groups, *positions = block_shape(n, array.axis, array.group_size)
        expected = (*before, groups, *positions, *after), (*before, groups, *after)
    if (array.qvalue.shape, array.scale.shape) != expected:
        raise ValueError(
            f"a QuantizedArray of {array.axis_size} weights along axis {array.axis}, "
            f"in groups of {array.group_size}, has codes of shape "
            f"{array.qvalue.shape} and scales of shape {array.scale.shape}; slice and "
            "stack along other axes only"
        )


# Operations on one leaf. Each is jitted by itself, so that leaves of equal shape share
# a trace, an eager call computes exactly what a jitted one does, and explicit shardings
# can be read from the types of tracers.


@functools.partial(jax.jit, static_argnames=("axis", "group_size"))
def _quantize(
    array: jax.Array, key: jax.Array | None, axis: int, group_size: int
) -> QuantizedArray:
    dtype = wide_dtype(array.dtype)
    values = to_blocks(array, axis, group_size).astype(dtype)
    bits = None
    if key is not None:
        bits = random_bits(key, values.shape, 0, _sharding.sharding_of(values))
    grid = new_grid(*value_range(values, axis))
    scale, zero_point = grid.stored(axis, jnp.bfloat16)
    return QuantizedArray(
        qvalue=grid.codes(values, bits),
        scale=scale,
        zero_point=zero_point,
        axis=axis,
        axis_size=array.shape[axis],
        group_size=group_size,
        dtype=jnp.dtype(array.dtype),
    )


def _grid_of(array: QuantizedArray) -> Grid:
    dtype = wide_dtype(array.dtype)
    return Grid.load(array.scale, array.zero_point, array.axis, dtype)


@jax.jit
def _dequantize(array: QuantizedArray) -> jax.Array:
    _check_parts(array)
    # The value of a code may exceed the weight by half a step, and so the largest
    # finite number of its dtype.
    largest = jnp.finfo(array.dtype).max.astype(wide_dtype(array.dtype))
    values = jnp.clip(_grid_of(array).values(array.qvalue), -largest, largest)
    values = values.astype(array.dtype)
    return from_blocks(values, array.shape, array.axis, array.group_size)


def _update_leaf(
    leaf: Any, update: Any, key: jax.Array, leaf_id: np.uint32, first: Any
) -> Any:
    if is_quantized(leaf):
        return _update_int8(leaf, update, key, leaf_id, first)
    if jnp.result_type(leaf) == jnp.bfloat16:
        return _update_bfloat16(leaf, update, key, leaf_id, first)
    return optax.apply_updates(leaf, update)


@jax.jit
def _update_int8(
    array: QuantizedArray,
    update: jax.Array,
    key: jax.Array,
    leaf_id: jax.Array,
    first: jax.Array,
) -> QuantizedArray:
    key = jax.random.fold_in(key, leaf_id)
    # Without the barrier XLA casts before it changes the layout. For blocks along the
    # last axis it would then keep the update in float32 in both layouts, which is 8
    # bytes per weight on TPUs.
    update = to_blocks(update, array.axis, array.group_size)
    update = jax.lax.optimization_barrier(update)
    old = _grid_of(array)
    values = old.values(array.qvalue) + update.astype(old.scale.dtype)
    low, high = value_range(values, array.axis)
    # Keep the old grid while it serves. Rounding a value that is a fraction f of a step
    # above the grid has variance f(1-f) steps^2. On the old grid only the update
    # contributes, which is next to nothing. A new grid re-rounds every weight of the
    # group, moved or not.
    is_kept = old.covers(low, high) & (2 * needed_scale(low, high) >= old.scale)
    choose = functools.partial(jnp.where, is_kept)
    grid = jax.tree.map(choose, old, new_grid(low, high))
    bits = random_bits(key, values.shape, first, _sharding.sharding_of(values))
    codes = grid.codes(values, bits)
    scale, zero_point = grid.stored(array.axis, array.scale.dtype)
    return dataclasses.replace(array, qvalue=codes, scale=scale, zero_point=zero_point)


@jax.jit
def _update_bfloat16(
    array: jax.Array,
    update: jax.Array,
    key: jax.Array,
    leaf_id: jax.Array,
    first: jax.Array,
) -> jax.Array:
    key = jax.random.fold_in(key, leaf_id)
    bits = random_bits(key, array.shape, first, _sharding.sharding_of(array))
    total = array.astype(jnp.float32) + update.astype(jnp.float32)
    return round_to_bfloat16(total, bits)
