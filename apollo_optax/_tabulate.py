"""What each tensor gets and what it costs, as a table."""

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _check, _tree
from apollo_optax._dimension_numbers import (
    MatrixAxes,
    WeightDimensionNumbers,
    is_embedding_or_head,
    rank_in,
    resolve,
    state_shapes,
)

_Owned = list[tuple[str | None, Any]]
_KINDS = ("kernels", "embeddings and head", "other")
_HEADER = ("parameter", "shape", "treatment", "state", "bytes", "AdamW")


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
    ours, adamw = (_by_parameter(init, params, leaves) for init in (tx.init, optax.adamw(1e-3).init))

    rows = []
    totals = {kind: [0, 0] for kind in _KINDS}
    for path, owned in ours.items():
        costs = [sum(_nbytes(leaf) for _, leaf in state[path]) for state in (ours, adamw)]
        for i, cost in enumerate(costs):
            totals[_kind(path, leaves)][i] += cost
        if path is not None:
            shape = jnp.shape(leaves[path])
            treatment = _treatment(path, shape, owned, axes[path])
            rows.append((_tree.show(path), str(shape), treatment, _shapes(owned), *costs))
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


def _treatment(path: _tree.Path, shape: tuple[int, ...], owned: _Owned, axes: MatrixAxes | None) -> str:
    """What the shapes of a parameter's state say an optimizer does with it."""
    fields = {field: leaf for field, leaf in owned if field is not None}
    if not fields:
        is_adam = [leaf.shape for _, leaf in owned if leaf.shape or not shape] == [shape, shape]
        return "Adam" if is_adam else "other" if owned else "no state"
    rank = rank_in(axes, fields["mu"].shape)
    for field, leaf in fields.items():
        expected = state_shapes(axes, shape, rank)[field]
        _check.state_shape(path, field, leaf, expected, _check.OTHER_NUMBERS)
    return "Adam" if axes is None else f"APOLLO rank {rank}, {axes.contracted_size} contracted"


def _shapes(owned: _Owned) -> str:
    counts = collections.Counter(leaf.shape for _, leaf in owned if leaf.shape)
    return ", ".join(f"{shape} x {count}" for shape, count in counts.items())


def _by_parameter(
    init: Callable[[Any], Any], params: Any, leaves: dict[_tree.Path, Any]
) -> dict[_tree.Path | None, _Owned]:
    """State leaves, with their field, by the parameter they belong to; None: to no parameter."""
    by_path = _tree.leaves_by_path(jax.eval_shape(init, params))
    shared = _tree.shared_state(init, jax.tree.map(lambda _: optax.MaskedNode(), params))
    owned: dict[_tree.Path | None, _Owned] = {path: [] for path in [*leaves, None]}
    for path, (param, field) in _tree.owners(by_path, leaves, shared).items():
        owned[param].append((field, by_path[path]))
    return owned


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
