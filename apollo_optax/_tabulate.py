"""What each tensor gets and what it costs, as a table."""

import collections
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _state, _tree
from apollo_optax._dimension_numbers import (
    MatrixAxes,
    WeightDimensionNumbers,
    is_embedding_or_head,
    resolve,
)
from apollo_optax._matrix import Matrix

_Owned = list[tuple[_state.Owner, Any]]
_KINDS = ("kernels", "embeddings and head", "other")
_HEADER = ("parameter", "shape", "treatment", "state", "bytes", "AdamW")


class StateBytes(NamedTuple):
    """Bytes of an optimizer's state, by the kind of parameter they belong to.

    A kernel is a leaf of two or more axes that is neither embedding or head by name nor a
    ``bias`` or ``scale``.
    """

    kernels: int
    embeddings_and_head: int
    other: int  # Norms, biases, and what belongs to no parameter, such as counts.


def tabulate(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> str:
    """A table of what `tx` keeps for each parameter, from shapes alone.

    Works for any Optax pipeline; nothing is allocated. "16 contracted" means that the side of size 16 is
    projected away and channels lie along the other.

    Args:
      tx: the optimizer.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      weight_dimension_numbers: what the optimizer was given, which can't be read off it: without them a
        full-rank matrix and a leaf under Adam look alike.

    Returns:
      A line per parameter with its path, shape, treatment, the shapes and bytes of its state, and the
      bytes ``optax.adamw`` would keep; then totals for kernels, for embeddings and output head and
      for the rest (norms, biases, and state that belongs to no parameter). A kernel is a leaf of two
      or more axes that is neither embedding or head by name nor a ``bias`` or ``scale``.

    Raises:
      ValueError: if the state's shapes do not follow from `weight_dimension_numbers`.

    Examples:
      >>> import jax.numpy as jnp, apollo_optax
      >>> params = {"mlp": {"kernel": jnp.ones((64, 128))}, "embed": {"embedding": jnp.ones((100, 64))}}
      >>> print(tabulate(apollo_optax.apollo(0.01, rank=16), params))
      parameter            shape      treatment                      state           bytes    AdamW
      embed/embedding      (100, 64)  Adam                           (100, 64) x 2  51,204   51,200
      mlp/kernel           (64, 128)  APOLLO rank 16, 64 contracted  (16, 128) x 2  16,388   65,536
      <BLANKLINE>
      kernels                                                                       16,388   65,536
      embeddings and head                                                           51,204   51,200
      other                                                                             12        4
      total                                                                         67,604  116,740
    """
    leaves = _tree.leaves_by_path(params)
    axes = resolve(weight_dimension_numbers, params)
    ours, adamw = _by_parameter(tx, params), _by_parameter(optax.adamw(1e-3), params)

    rows = []
    for path, leaf in leaves.items():
        treatment = _treatment(leaf, ours[path], axes[path])
        costs = _nbytes(ours[path]), _nbytes(adamw[path])
        shapes = _shapes(ours[path])
        rows.append((_tree.show(path), str(jnp.shape(leaf)), treatment, shapes, *costs))
    blank = ("",) * 3
    rows.append(("", *blank, "", ""))
    totals = [_totals(owned, leaves) for owned in (ours, adamw)]
    for kind, *costs in zip(_KINDS, *totals, strict=True):
        rows.append((kind, *blank, *costs))
    rows.append(("total", *blank, *map(sum, totals)))
    return _align([_HEADER, *rows])


def state_bytes(tx: optax.GradientTransformation, params: optax.Params) -> StateBytes:
    """The bytes of the state that `tx` keeps, from shapes alone.

    Args:
      tx: any Optax optimizer.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      The totals of :func:`tabulate`, as :class:`StateBytes`.

    Examples:
      >>> import jax.numpy as jnp, apollo_optax
      >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}
      >>> state_bytes(apollo_optax.apollo(0.01, rank=16), params)
      StateBytes(kernels=16388, embeddings_and_head=0, other=1040)
    """
    return _totals(_by_parameter(tx, params), _tree.leaves_by_path(params))


def _align(rows: list[tuple[Any, ...]]) -> str:
    """Columns two spaces apart, text to the left and numbers to the right."""
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


def _totals(
    owned: dict[_tree.Path | None, _Owned], leaves: dict[_tree.Path, Any]
) -> StateBytes:
    totals: dict[str, int] = dict.fromkeys(_KINDS, 0)
    for path, states in owned.items():
        totals[_kind(path, leaves)] += _nbytes(states)
    return StateBytes(*totals.values())


def _kind(path: _tree.Path | None, leaves: dict[_tree.Path, Any]) -> str:
    if path is None or jnp.ndim(leaves[path]) < 2 or path[-1:] in (("bias",), ("scale",)):
        return "other"
    return "embeddings and head" if is_embedding_or_head(path) else "kernels"


def _treatment(leaf: Any, owned: _Owned, axes: MatrixAxes | None) -> str:
    """What the shapes of a parameter's state show that an optimizer does with it."""
    shape = jnp.shape(leaf)
    fields = [(owner, state) for owner, state in owned if owner.rule is not None]
    if not fields:
        shapes = [state.shape for _, state in owned if state.shape or not shape]
        return "Adam" if shapes == [shape, shape] else "other" if owned else "no state"
    matrix = None if axes is None else Matrix.of_parameter(leaf, axes, jnp.float32)
    matrices = [_state.owned_matrix(*field, leaf, matrix) for field in fields]
    if axes is None:
        return "Adam"
    rank = max(matrix.rank for matrix in matrices if matrix is not None)
    return f"APOLLO rank {rank}, {axes.contracted_size} contracted"


def _shapes(owned: _Owned) -> str:
    counts = collections.Counter(leaf.shape for _, leaf in owned if leaf.shape)
    return ", ".join(f"{shape} x {count}" for shape, count in counts.items())


def _by_parameter(
    tx: optax.GradientTransformation, params: Any
) -> dict[_tree.Path | None, _Owned]:
    """The leaves of a state by the parameter that owns them; None: no parameter does."""
    parameters = _tree.leaves_by_path(params)
    leaves = _tree.leaves_by_path(jax.eval_shape(tx.init, params))
    masked = jax.tree.map(lambda _: optax.MaskedNode(), params)
    shared = _state.shared_state(tx.init, masked)
    owned: dict[_tree.Path | None, _Owned] = {path: [] for path in [*parameters, None]}
    for path, owner in _state.owners(leaves, parameters, shared).items():
        owned[owner.parameter].append((owner, leaves[path]))
    return owned


def _nbytes(owned: _Owned) -> int:
    return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for _, s in owned)
