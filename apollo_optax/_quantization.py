"""Weights of eight or sixteen bits that an update smaller than their last bit still moves.

A weight of few bits can't hold an update much smaller than its rounding step: rounded to nearest it
stays where it was, step after step. Stochastic rounding moves it up with the probability that keeps
the expectation exact, so small updates add up. It serves bfloat16 weights as they are, and int8
weights in groups that share a scale and a zero point, as Q-GaLore and Q-APOLLO train them.
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

from apollo_optax import _blocks, _check, _projection, _rounding, _sharding, _tree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["qvalue", "scale", "zero_point"],
    meta_fields=["axis", "axis_size", "group_size", "dtype"],
)
@dataclasses.dataclass(
    frozen=True, eq=False
)  # Arrays have no single truth value to compare by.
class QuantizedArray:
    """A matrix, or a stack of them, in int8; stands for ``(qvalue - zero_point) * scale``.

    Each group of `group_size` neighbours along `axis` has a scale and a zero point of its own; the last
    group is shorter where the size does not divide. It is a pytree of three arrays, so ``jit``,
    ``lax.scan``, donation, ``device_put`` and Orbax take it like any other. ``flax.serialization``, which
    takes only types it was told of, takes its ``jax.tree.leaves``.

    `shape`, `ndim` and `size` are the matrix's. `scale` and `zero_point` have the groups in the place of
    `axis`, and `qvalue` has the groups and the places in a group: weights of shape ``(4096, 11008)`` have
    scales of shape ``(32, 11008)`` and codes of shape ``(32, 16, 8, 11008)``, the 128 places as
    ``(16, 8)``. Along the last axis places are one axis. The last group is filled up in storage. So what is
    cut over a mesh by ``P("data", "model")`` has its codes cut by ``P("data", None, None, "model")``, and
    all three arrays can be sliced and stacked along the other axes, such as that of layers.

    Made by :func:`quantize` and read by :func:`dequantize`.
    """

    qvalue: jax.Array  # int8, (..., groups, places / 8, 8, ...); along the last axis (..., groups, places).
    scale: jax.Array  # bfloat16, (..., groups, ...). Stays in float32 if put there.
    zero_point: jax.Array  # int8, of the scale's shape: the code of 0.
    axis: int  # Counted from the end, so that it holds for a layer sliced from a stack.
    axis_size: int  # Of the matrix along `axis`, without what fills up the last group.
    group_size: int
    dtype: np.dtype  # What it dequantizes to.

    @property
    def shape(self) -> tuple[int, ...]:
        before, _, after = _blocks.split_shape(self.scale.shape, self.axis)
        return (*before, self.axis_size, *after)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together; the arrays may be abstract."""
        parts = (self.qvalue, self.scale, self.zero_point)
        return sum(
            math.prod(part.shape) * jnp.dtype(part.dtype).itemsize for part in parts
        )


def quantize(
    array: jax.typing.ArrayLike,
    *,
    axis: int | None = None,
    group_size: int = 128,
    key: Any = None,
) -> QuantizedArray:
    r"""Rounds an array to int8, with a scale and a zero point for each group of neighbours.

    A group with values from :math:`l \le 0` to :math:`h \ge 0` (the range always includes 0) becomes

    .. math:: s = (h - l) / 254, \quad z = \lceil -l / s \rceil - 128, \quad q = \mathrm{round}(w / s) + z,

    :math:`s` rounded up to bfloat16. So nothing is clipped, 0 is exact, and :math:`(q - z) s` is off by
    at most half a step :math:`s`, or by less than a step if `key` is given. A group with a value that is
    not finite dequantizes to NaN throughout, as int8 can't say which one it was.

    Args:
      array: real floating-point, of any shape of two or more axes (of one, if `axis` is given).
      axis: the axis along which neighbours are grouped. By default the last but one, the inputs of Flax's
        ``(in, out)`` kernels, so that scales lie beside each other as the weights do. Where the array's
        ``NamedSharding`` cuts that axis within a group, it is the last axis, unless that is cut within a
        group too: 11008 is 86 groups, which two devices can share and four can't. (Inside ``jit`` under
        automatic sharding nothing is known of cuts; pass `axis` there.) Not the axis of layers, if the
        stack is to be sliced.
      group_size: neighbours to a scale, a multiple of 8. With 128, an int8 weight takes 1.023 bytes; an
        axis longer than this that it does not divide takes the space of the next multiple.
      key: None rounds to nearest; a JAX key, typed or raw, rounds up with a probability of the part that
        is left, so that the expectation is the weight, to :math:`2^{-17}` of a step.

    Returns:
      A :class:`QuantizedArray` that dequantizes to the shape and dtype of `array`.

    Raises:
      TypeError: if `axis` or `group_size` is no int, or `key` no key.
      ValueError: if `array` is not real floating-point or has too few axes, or if `axis` or `group_size`
        is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.linspace(-1.0, 1.0, 256 * 8).reshape(256, 8)
      >>> quantized = quantize(kernel)
      >>> quantized.scale.shape, quantized.nbytes / quantized.size
      ((2, 8), 1.0234375)
      >>> float(abs(dequantize(quantized) - kernel).max()) < 0.5 * float(quantized.scale.max())
      True

    References:
      Jacob et al., `Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
      Inference <https://arxiv.org/abs/1712.05877>`_, 2018

      Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients
      <https://arxiv.org/abs/2407.08296>`_, 2024
    """
    if isinstance(array, QuantizedArray):
        raise TypeError(
            "the array is a QuantizedArray already; pass dequantize(array) to quantize it anew"
        )
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"quantize takes real floating-point arrays, got dtype {array.dtype}; leave this one as it is"
        )
    _check.positive_int("group_size", group_size)
    group_size = int(group_size)
    if group_size % _blocks.BLOCK != 0:
        raise ValueError(
            f"group_size must be a multiple of {_blocks.BLOCK}, such as 64 or 128, got {group_size}"
        )
    axis = (
        _default_axis(array, group_size)
        if axis is None
        else _from_the_end(axis, array.shape)
    )
    return _quantize(
        array, None if key is None else _rounding_key(key), axis, group_size
    )


def dequantize(tree: Any) -> Any:
    """Replaces every :class:`QuantizedArray` in a pytree by the array it stands for.

    Args:
      tree: any pytree; a QuantizedArray alone is one too.

    Returns:
      The tree with arrays of the dtypes that were quantized, computed in float32 (float64 for float64);
      other leaves are untouched. ``jax.eval_shape(dequantize, params)`` is what ``tx.init`` has to see.

    Raises:
      ValueError: if a QuantizedArray's codes and scales don't belong together.
    """
    return jax.tree.map(
        lambda x: _dequantize(x) if is_quantized(x) else x, tree, is_leaf=is_quantized
    )


def apply_updates_stochastic(
    params: optax.Params,
    updates: optax.Updates,
    key: Any,
    *,
    batch_index: jax.typing.ArrayLike | None = None,
) -> Any:
    r"""Adds updates to parameters of few bits, rounding so that the expectation is exact.

    In place of ``optax.apply_updates``, which it is for leaves that are neither bfloat16 nor int8. Those
    two are added to in float32 and rounded stochastically: a weight a fraction :math:`f` of a step above
    one it can hold goes up a step with probability :math:`f`, else down to it. A bfloat16 weight that is
    not finite stays what it is.

    An int8 group keeps its scale and zero point while the new weights fit and use at least half of its
    range; else both are chosen anew, as in :func:`quantize`.

    Every element's draw is a function of the key, of its leaf's path (boxes and node types do not
    matter) and of its place in the leaf, whatever the mesh. Draws are threefry's even if the key is
    another generator's, whose bits depend on how the computation is sharded and batched.

    Args:
      params: the parameters; a :class:`QuantizedArray` counts as one leaf.
      updates: arrays of the parameters' shapes, by the same paths.
      key: a JAX key, typed or raw: another one for each step, ``jax.random.fold_in(key, step)``.
      batch_index: if the leaves are slices of layer-stacked ones that keep the layer axis at size 1 (or a
        few layers), the index of the first layer. Slices then get what the whole stack would. May be
        traced.

    Returns:
      The new parameters, with the structure, shapes and dtypes of `params`.

    Raises:
      TypeError: if `key` is no key, or `batch_index` no integer.
      ValueError: if the updates have other paths or shapes than the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((4, 8), jnp.bfloat16)}
      >>> updates = {"kernel": jnp.full((4, 8), 1e-3)}
      >>> bool((optax.apply_updates(params, updates)["kernel"] == 1).all())  # Lost.
      True
      >>> moved = apply_updates_stochastic(params, updates, jax.random.key(0))["kernel"]
      >>> [float(x) for x in jnp.unique(moved)]
      [1.0, 1.0078125]

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision <https://arxiv.org/abs/1502.02551>`_,
      2015

      Zamirai et al., `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020
    """
    leaves, deltas = (
        _tree.leaves_by_path(params, is_quantized),
        _tree.leaves_by_path(updates),
    )
    _check_updates(leaves, deltas)
    key, first = _rounding_key(key), _first_index(batch_index)
    # In the order of the parameters: that of the updates is another where their node types sort otherwise.
    new = [
        _update_leaf(leaf, deltas[path], key, _projection.leaf_id(path), first)
        for path, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), new)


def is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedArray)


# Arguments.


def _from_the_end(axis: Any, shape: tuple[int, ...]) -> int:
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
    """The rule in the docstring of :func:`quantize`."""
    if array.ndim < 2:
        raise ValueError(
            f"quantize takes arrays of two or more axes, got shape {array.shape}: vectors are too small a "
            "part of a model to be worth the error; leave this one as it is, or name its axis"
        )
    sharding = _sharding.of(array)
    held = array.shape if sharding is None else sharding.shard_shape(array.shape)

    def has_whole_groups(axis: int) -> bool:
        return held[axis] == array.shape[axis] or held[axis] % group_size == 0

    return next((axis for axis in (-2, -1) if has_whole_groups(axis)), -2)


def _rounding_key(key: Any) -> jax.Array:
    """`key` as one typed threefry key."""
    impl = _projection.jax_key_impl(key)
    if impl is None:
        raise TypeError(
            "key must be one JAX key, from jax.random.key(seed) or the raw data of one of JAX's default "
            f"generator, got {key!r}"
        )
    if key.shape != ():
        key = jax.random.wrap_key_data(jnp.asarray(key), impl=impl)
    if impl == "threefry2x32":
        return key
    return jax.random.wrap_key_data(
        jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32"
    )


def _first_index(batch_index: Any) -> jax.typing.ArrayLike:
    if batch_index is None:
        return 0
    if jnp.ndim(batch_index) != 0 or not jnp.issubdtype(
        jnp.result_type(batch_index), jnp.integer
    ):
        raise TypeError(
            f"batch_index must be an integer, the index of a layer, got {batch_index!r}"
        )
    return batch_index


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
            f"the updates {difference}; pass an array for every parameter, where it is a QuantizedArray "
            "one like the array it dequantizes to (take gradients with respect to dequantize(params))"
        )
    for path, leaf in leaves.items():
        if is_quantized(leaf):
            _check_parts(leaf)
            shape = leaf.shape
        else:
            shape = jnp.shape(leaf)
        if jnp.shape(updates[path]) != shape:
            raise ValueError(
                f"the update of '{_tree.show(path)}' has shape {jnp.shape(updates[path])}, but the parameter "
                f"has shape {shape}; pass updates of the parameters' shapes"
            )


def _check_parts(array: QuantizedArray) -> None:
    expected = None
    if len(array.scale.shape) + array.axis >= 0:
        before, n, after = _blocks.split_shape(array.shape, array.axis)
        groups, *places = _blocks.block_shape(n, array.axis, array.group_size)
        expected = (*before, groups, *places, *after), (*before, groups, *after)
    if (array.qvalue.shape, array.scale.shape) != expected:
        raise ValueError(
            f"a QuantizedArray of {array.axis_size} weights along axis {array.axis}, in groups of "
            f"{array.group_size}, has codes of shape {array.qvalue.shape} and scales of shape "
            f"{array.scale.shape}; slice and stack along other axes only"
        )


def _grid_of(array: QuantizedArray) -> _rounding.Grid:
    dtype = _check.wide_dtype(array.dtype)
    return _rounding.Grid.load(array.scale, array.zero_point, array.axis, dtype)


# Leaves. Jitted for themselves, so that leaves of one shape share a trace, an eager call computes what a
# jitted one does, and shardings in types are there to be read.


@functools.partial(jax.jit, static_argnames=("axis", "group_size"))
def _quantize(
    array: jax.Array, key: jax.Array | None, axis: int, group_size: int
) -> QuantizedArray:
    values = _blocks.to_blocks(array, axis, group_size).astype(
        _check.wide_dtype(array.dtype)
    )
    bits = None
    if key is not None:
        bits = _rounding.random_bits(key, values.shape, 0, _sharding.of(values))
    grid = _rounding.new_grid(*_rounding.value_range(values, axis))
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


@jax.jit
def _dequantize(array: QuantizedArray) -> jax.Array:
    _check_parts(array)
    # A code may stand for half a step more than the weight did, and that for no number of its dtype.
    largest = jnp.finfo(array.dtype).max.astype(_check.wide_dtype(array.dtype))
    values = jnp.clip(_grid_of(array).values(array.qvalue), -largest, largest).astype(
        array.dtype
    )
    return _blocks.from_blocks(values, array.shape, array.axis, array.group_size)


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
    # Without the barrier XLA casts it first, and where the blocks are along the last axis, so that they take
    # another layout, keeps it in float32 in both: eight bytes a weight on a TPU.
    update = jax.lax.optimization_barrier(
        _blocks.to_blocks(update, array.axis, array.group_size)
    )
    old = _grid_of(array)
    values = old.values(array.qvalue) + update.astype(old.scale.dtype)
    low, high = _rounding.value_range(values, array.axis)
    # The variance of a rounding is f(1-f) of a step's square, f the part of a step that is left. On the
    # old grid that is the update's alone, next to nothing; on a new one all weights of the group are off
    # the grid and rounded anew, whether they moved or not. So a grid stays as long as it serves.
    is_kept = old.covers(low, high) & (
        2 * _rounding.needed_scale(low, high) >= old.scale
    )
    grid = jax.tree.map(
        functools.partial(jnp.where, is_kept), old, _rounding.new_grid(low, high)
    )
    codes = grid.codes(
        values, _rounding.random_bits(key, values.shape, first, _sharding.of(values))
    )
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
    bits = _rounding.random_bits(key, array.shape, first, _sharding.of(array))
    total = array.astype(jnp.float32) + update.astype(jnp.float32)
    return _rounding.round_to_bfloat16(total, bits)
