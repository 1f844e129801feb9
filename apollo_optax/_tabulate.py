"""How an optimizer treats each parameter and how much state it keeps, as a table."""

import collections
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _boxes, _sharding, _state, _tree
from apollo_optax._dimension_numbers import (
    MatrixAxes,
    WeightDimensionNumbers,
    is_embedding_or_head,
    is_vector_by_name,
    resolve,
)
from apollo_optax._int8_trace import Int8TraceState
from apollo_optax._matrix import Matrix

_Owned = list[tuple[_state.Owner, Any]]
NO_STATE = "no state"
_KINDS = ("kernels", "embeddings and head", "other")
_HEADER = ("parameter", "shape", "treatment", "state", "bytes", "AdamW")


class StateBytes(NamedTuple):
    """Bytes of an optimizer's state, by the kind of parameter they belong to.

    Attributes:
      kernels: bytes of the kernels' state. A kernel is a leaf of two or more axes that
        is neither an embedding or output head by name nor a ``bias`` or ``scale``.
      embeddings_and_head: bytes of the state of embeddings and output heads by name.
      other: bytes of the state of norms and biases, and of state that belongs to no
        parameter, such as counts.
    """

    kernels: int
    embeddings_and_head: int
    other: int


def tabulate(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> str:
    """A table of the state that `tx` keeps for each parameter, from shapes alone.

    Works for any Optax pipeline whose ``init`` takes the parameters, so not for
    ``optax.lookahead``. No array is allocated. "Adam" stands for two arrays of
    the parameter's shape, whichever optimizer they belong to. "4 contracted" means that
    the side of size 4 is projected away, and that the other side has the channels.

    Args:
      tx: the optimizer.
      params: the parameters, as arrays or ``jax.ShapeDtypeStruct``.
      weight_dimension_numbers: the dimension numbers that the optimizer was given. They
        can't be read from the optimizer. Without them, a full-rank matrix looks like a
        leaf under Adam.

    Returns:
      A line per parameter with its path, its shape, its treatment, the shapes and bytes
      of its state, and the bytes that ``optax.adamw`` would keep. Below them are the
      totals for kernels, for embeddings and output heads, and for the rest, as in
      :class:`StateBytes`. If the parameters are on a mesh, the last line has the bytes
      on each device of a state that is sharded by :func:`state_sharding`. Under
      :func:`scale_by_flattening` without momentum a matrix has no state, so a matrix
      that ``optax.masked`` or ``optax.partition`` excludes is shown as "flattened" too.

    Raises:
      ValueError: if the state's shapes do not follow from `weight_dimension_numbers`.

    Examples:
      >>> import jax.numpy as jnp, apollo_optax
      >>> params = {
      ...     "mlp": {"kernel": jnp.ones((4, 8))},
      ...     "embed": {"embedding": jnp.ones((9, 4))},
      ... }
      >>> print(tabulate(apollo_optax.apollo(0.01, rank=2), params))
      parameter            shape   treatment                    state       bytes  AdamW
      embed/embedding      (9, 4)  Adam                         (9, 4) x 2    292    288
      mlp/kernel           (4, 8)  APOLLO rank 2, 4 contracted  (2, 8) x 2    132    256
      <BLANKLINE>
      kernels                                                                 132    256
      embeddings and head                                                     292    288
      other                                                                    12      4
      total                                                                   436    548
    """
    leaves = _tree.leaves_by_path(params)
    axes = resolve(weight_dimension_numbers, params)
    ours = _state_by_parameter(tx, params)
    adamw = _state_by_parameter(optax.adamw(1e-3), params)

    stateless = _stateless(tx, params)
    rows = []
    for path, leaf in leaves.items():
        treatment = _treatment(leaf, ours[path], axes[path], stateless)
        costs = _nbytes(ours[path]), _nbytes(adamw[path])
        shapes = _shapes(ours[path])
        rows.append((_tree.show(path), str(jnp.shape(leaf)), treatment, shapes, *costs))
    blank = ("",) * 3
    rows.append(("", *blank, "", ""))
    totals = [_totals(owned, params) for owned in (ours, adamw)]
    for kind, *costs in zip(_KINDS, *totals, strict=True):
        rows.append((kind, *blank, *costs))
    rows.append(("total", *blank, *map(sum, totals)))
    shardings = map(_sharding.sharding_of, leaves.values())
    if any(sharding and sharding.mesh.size > 1 for sharding in shardings):
        of_a_device = (
            _nbytes_of_a_device(each, params, weight_dimension_numbers)
            for each in (tx, optax.adamw(1e-3))
        )
        rows.append(("total per device", *blank, *of_a_device))
    return _aligned([_HEADER, *rows])


def state_bytes(tx: optax.GradientTransformation, params: optax.Params) -> StateBytes:
    """The bytes of the state that `tx` keeps, from shapes alone.

    Args:
      tx: any Optax optimizer.
      params: the parameters, as arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      The totals of :func:`tabulate`, as :class:`StateBytes`.

    Examples:
      >>> import jax.numpy as jnp, apollo_optax
      >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}
      >>> state_bytes(apollo_optax.apollo(0.01, rank=16), params)
      StateBytes(kernels=16388, embeddings_and_head=0, other=1040)
    """
    return _totals(_state_by_parameter(tx, params), params)


def _aligned(rows: list[tuple[Any, ...]]) -> str:
    """The rows as lines, with text aligned to the left and numbers to the right."""
    cells = [[f"{x:,}" if isinstance(x, int) else x for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i >= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _totals(owned: dict[_tree.Path | None, _Owned], params: Any) -> StateBytes:
    leaves, names = _tree.leaves_by_path(params), _tree.names_by_path(params)
    totals: dict[str, int] = dict.fromkeys(_KINDS, 0)
    for path, states in owned.items():
        # The state under None belongs to no parameter.
        kind = "other"
        if path is not None:
            kind = _kind_of(path, names[path], leaves[path])
        totals[kind] += _nbytes(states)
    return StateBytes(*totals.values())


def _kind_of(path: _tree.Path, name: _tree.Path, leaf: Any) -> str:
    """The one of `_KINDS` that a parameter is."""
    if jnp.ndim(leaf) < 2 or is_vector_by_name(path, name):
        return "other"
    return "embeddings and head" if is_embedding_or_head(path) else "kernels"


def _stateless(tx: optax.GradientTransformation, params: Any) -> str:
    """How an optimizer treats a matrix that has no state.

    The class of the optimizer's state says so, for nothing of the matrix is in it.
    """
    kinds = tuple(_state.STATES)

    def has_no_matrices(state: Any) -> bool:
        fields = _state.fields_of(type(state)).items()
        trees = (getattr(state, name) for name, field in fields if field.shape)
        return all(tree is None for tree in trees)

    nodes = jax.tree.leaves(
        _boxes.shapes_of_state(tx.init, params),
        is_leaf=lambda node: isinstance(node, kinds),
    )
    found = (
        type(node)
        for node in nodes
        if isinstance(node, kinds) and has_no_matrices(node)
    )
    return next((_state.STATES[kind] for kind in found), NO_STATE)


def _treatment(
    leaf: Any, owned: _Owned, axes: MatrixAxes | None, stateless: str
) -> str:
    """How an optimizer treats a parameter, as the shapes of its state show."""
    if not owned:
        return NO_STATE if axes is None else stateless
    shape = jnp.shape(leaf)
    fields = [(owner, state) for owner, state in owned if owner.rule is not None]
    if not fields:
        shapes = [state.shape for _, state in owned if state.shape or not shape]
        return "Adam" if shapes == [shape, shape] else "other"
    matrix = None if axes is None else Matrix.of_parameter(leaf, axes, jnp.float32)
    matrices = [_state.owned_matrix(*field, leaf, matrix) for field in fields]
    if axes is None:
        return "Adam"
    # A chain may have several transformations that treat the matrix, one after another.
    ranks: dict[Any, int] = {}
    for (owner, _), matrix in zip(fields, matrices, strict=True):
        if matrix is not None:
            ranks[owner.kind] = max(ranks.get(owner.kind, 0), matrix.rank)
    words = [
        _state.STATES[kind].format(rank=rank, contracted=axes.contracted_size)
        for kind, rank in ranks.items()
    ]
    # A momentum alone says little about the update if a rule without state follows it.
    if ranks.keys() == {Int8TraceState} and stateless != NO_STATE:
        words.append(stateless)
    return ", ".join(words)


def _shapes(owned: _Owned) -> str:
    """The shapes of a parameter's state and how often each occurs, without scalars."""
    counts = collections.Counter(leaf.shape for _, leaf in owned if leaf.shape)
    return ", ".join(f"{shape} x {count}" for shape, count in counts.items())


def _state_by_parameter(
    tx: optax.GradientTransformation, params: Any
) -> dict[_tree.Path | None, _Owned]:
    """The leaves of `tx`'s state by the parameter they belong to; None if to none."""
    parameters = _tree.leaves_by_path(params)
    leaves = _tree.leaves_by_path(_boxes.shapes_of_state(tx.init, params))
    masked = jax.tree.map(lambda _: optax.MaskedNode(), params)
    try:
        shared = _state.shared_state(tx.init, masked)
    except (IndexError, TypeError, ValueError):
        # Some need an array, such as `optax.flatten` and `optax.lbfgs`. Names then tell
        # what belongs to no parameter.
        shared = ()
    owned: dict[_tree.Path | None, _Owned] = {path: [] for path in [*parameters, None]}
    for path, owner in _state.owners(leaves, parameters, shared).items():
        owned[owner.parameter].append((owner, leaves[path]))
    return owned


def _nbytes_of_a_device(
    tx: optax.GradientTransformation, params: Any, numbers: WeightDimensionNumbers
) -> int:
    """The bytes of `tx`'s state on each device of the parameters' mesh."""
    state = _boxes.shapes_of_state(tx.init, params)
    shardings = _state.state_sharding(state, params, weight_dimension_numbers=numbers)
    pairs = zip(*map(jax.tree.leaves, (state, shardings)), strict=True)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in pairs
    )


def _nbytes(owned: _Owned) -> int:
    return sum(math.prod(s.shape) * s.dtype.itemsize for _, s in owned)
