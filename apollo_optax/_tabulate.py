"""What each tensor gets and what it costs, as a table."""

import collections
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _tree
from apollo_optax._dimension_numbers import (
    MatrixAxes,
    WeightDimensionNumbers,
    is_embedding_or_head,
    resolve,
)

_KINDS = ("kernels", "embeddings and head", "other")
_HEADER = ("parameter", "shape", "treatment", "state", "bytes", "AdamW")


def tabulate(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> str:
    """A table of what `tx` keeps for each parameter, from shapes alone.

    Works for any Optax pipeline; nothing is allocated.

    Args:
      tx: the optimizer.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      weight_dimension_numbers: what the optimizer was given, to name each matrix's contracted side.

    Returns:
      A line per parameter with its path, shape, treatment, the shapes and bytes of its state, and the
      bytes ``optax.adamw`` would keep; then totals for kernels, for embeddings and output head and
      for the rest (norms, biases, and state that belongs to no parameter). A kernel is a leaf of two
      or more axes that is neither embedding or head by name nor a ``bias`` or ``scale``.

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
    state = _tree.leaves_by_path(jax.eval_shape(tx.init, params))
    ours, prefixes = _by_owner(state, leaves), _tree.apollo_prefixes(state)
    adamw = _by_owner(_tree.leaves_by_path(jax.eval_shape(optax.adamw(1e-3).init, params)), leaves)

    rows = []
    totals = {kind: [0, 0] for kind in _KINDS}
    for path, owned in ours.items():
        costs = [sum(map(_nbytes, state[path].values())) for state in (ours, adamw)]
        for i, cost in enumerate(costs):
            totals[_kind(path, leaves)][i] += cost
        if path is not None:
            shape = jnp.shape(leaves[path])
            fields = {field[: len(field) - len(path)]: x.shape for field, x in owned.items()}
            treatment = _treatment(shape, fields, prefixes, axes[path])
            rows.append((_tree.show(path), str(shape), treatment, _shapes(fields), *costs))
    blank = ("",) * 3
    rows.append(("", *blank, "", ""))
    rows += [(kind, *blank, *costs) for kind, costs in totals.items()]
    rows.append(("total", *blank, *map(sum, zip(*totals.values(), strict=True))))
    return _align([_HEADER, *rows])


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


def _kind(path: _tree.Path | None, leaves: dict[_tree.Path, Any]) -> str:
    if path is None or jnp.ndim(leaves[path]) < 2 or path[-1:] in (("bias",), ("scale",)):
        return "other"
    return "embeddings and head" if is_embedding_or_head(path) else "kernels"


def _treatment(
    shape: tuple[int, ...],
    fields: dict[_tree.Path, tuple[int, ...]],
    prefixes: set[_tree.Path],
    axes: MatrixAxes | None,
) -> str:
    """What the shapes of a parameter's state, by field, say an optimizer does with it."""
    moments = [moment for field, moment in fields.items() if field[-1] in ("mu", "nu")]
    if axes is not None and any(field[:-1] in prefixes for field in fields):
        return f"APOLLO rank {moments[0][len(axes.batch)]}, {axes.contracted_size} contracted"
    if moments == [shape, shape]:
        return "Adam"
    return "other" if fields else "no state"


def _shapes(fields: dict[_tree.Path, tuple[int, ...]]) -> str:
    counts = collections.Counter(shape for shape in fields.values() if shape)
    return ", ".join(f"{shape} x {count}" for shape, count in counts.items())


def _by_owner(
    state: dict[_tree.Path, Any], leaves: dict[_tree.Path, Any]
) -> dict[Any, dict[_tree.Path, Any]]:
    """State leaves by the parameter they belong to; None for those that belong to none."""
    owned: dict[Any, dict[_tree.Path, Any]] = {path: {} for path in [*leaves, None]}
    for path, leaf in state.items():
        owned[_tree.owner(path, leaves)][path] = leaf
    return owned


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
