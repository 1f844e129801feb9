"""Where the optimizer's state lives on a mesh.

A moment of a matrix is cut over the same devices as its parameter. Mesh axes that cut the batch or
the channel side stay where they are. Those that cut the contracted side, which a moment does not
have, move to the channel side, so that the sum of partial projections can be a reduce-scatter; to
the rank axis where the channel size does not divide; and are dropped, the moment replicated over
them, where neither does.

Under automatic sharding that is a choice made once, at ``init`` or by :func:`state_sharding`. Under
explicit sharding, where types carry shardings, ``init`` and ``update`` both name them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from apollo_optax import _check, _tree
from apollo_optax._dimension_numbers import (
    MatrixAxes,
    WeightDimensionNumbers,
    rank_in,
    resolve,
    state_shapes,
)


def of(leaf: Any) -> NamedSharding | None:
    """The sharding of an array, concrete, abstract or traced; None where there is none to know."""
    if isinstance(leaf, Tracer):
        return of_type(leaf)
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def of_type(array: jax.Array) -> NamedSharding | None:
    """The sharding in an array's type; None under automatic sharding."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def is_on_one_device(array: jax.Array) -> bool:
    """Whether an array is sure to be in one piece.

    A type without a mesh is no proof: ``jit`` with ``in_shardings`` does not tell the types of what it is not
    called with.
    """
    mesh = jax.typeof(array).sharding.mesh
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 and AxisType.Explicit not in mesh.axis_types


def zeros(shape: Sequence[int], dtype: Any, sharding: NamedSharding | None) -> jax.Array:
    return jnp.zeros(shape, dtype, device=sharding)


def put(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Moves a concrete array; a traced one stays, as its sharding is the enclosing jit's to choose."""
    if sharding is None or isinstance(array, Tracer):
        return array
    return jax.device_put(array, sharding)


def place(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Under explicit sharding, moves `array` where the next operation's type rules want it."""
    return array if sharding is None else jax.sharding.reshard(array, sharding)


def automatic(
    function: Callable[..., jax.Array], out_sharding: NamedSharding | None
) -> Callable[..., jax.Array]:
    """Under explicit sharding, leaves to XLA what `function` computes where, all but its result."""
    if out_sharding is None:
        return function
    types = zip(out_sharding.mesh.axis_names, out_sharding.mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in types if kind == AxisType.Explicit)
    wrapped: Any = jax.sharding.auto_axes(function, axes=explicit, out_sharding=out_sharding)
    return wrapped


def everywhere(array: jax.Array) -> jax.Array:
    """Under automatic sharding, has every device hold all of `array`."""
    mesh = jax.typeof(array).sharding.mesh
    if AxisType.Auto not in mesh.axis_types:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))


def whole_axis(array: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """Under automatic sharding, keeps XLA from cutting `axis` on the mesh that `like` is on."""
    mesh = jax.typeof(like).sharding.mesh
    if AxisType.Auto not in mesh.axis_types or AxisType.Explicit in mesh.axis_types:
        return array
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * array.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*spec)))


def _mesh_axes(sharding: NamedSharding, axis: int) -> tuple[str, ...]:
    """The mesh axes that cut tensor axis `axis`; a spec may be shorter than the tensor's rank."""
    entry = sharding.spec[axis] if axis < len(sharding.spec) else None
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _named(sharding: NamedSharding, cuts: Sequence[tuple[str, ...]]) -> NamedSharding:
    """Cuts by tensor axis, on the mesh and in the kind of memory of `sharding`."""
    spec = PartitionSpec(*(cut[0] if len(cut) == 1 else cut or None for cut in cuts))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def pick(sharding: NamedSharding | None, axes: Iterable[int | None]) -> NamedSharding | None:
    """The sharding of an array made of these axes of a tensor; None stands for an axis of its own."""
    if sharding is None:
        return None
    return _named(sharding, [() if axis is None else _mesh_axes(sharding, axis) for axis in axes])


def moments(axes: MatrixAxes, rank: int, sharding: NamedSharding | None) -> NamedSharding | None:
    """For ``(*batch, r, *channel)``, by the rule in this module's docstring."""
    if sharding is None:
        return None
    shape = axes.moment_shape(rank)
    cuts = [
        *(_mesh_axes(sharding, axis) for axis in axes.batch),
        (),
        *(_mesh_axes(sharding, axis) for axis in axes.channel),
    ]
    rank_axis = len(axes.batch)
    candidates = [*range(rank_axis + 1, len(cuts)), rank_axis]
    sizes = dict(sharding.mesh.shape)
    for name in (name for axis in axes.contracted for name in _mesh_axes(sharding, axis)):
        for axis in candidates:
            if shape[axis] % math.prod(sizes[cut] for cut in (*cuts[axis], name)) == 0:
                cuts[axis] = (*cuts[axis], name)
                break
    return _named(sharding, cuts)


def projections(axes: MatrixAxes, sharding: NamedSharding | None) -> NamedSharding | None:
    """For ``(*batch, r, *contracted)``: each device holds the part it multiplies with."""
    return pick(sharding, (*axes.batch, None, *axes.contracted))


def channels(axes: MatrixAxes, sharding: NamedSharding | None) -> NamedSharding | None:
    """For ``(*batch, *channel)``."""
    return pick(sharding, (*axes.batch, *axes.channel))


def norms(axes: MatrixAxes, sharding: NamedSharding | None) -> NamedSharding | None:
    """For ``(*batch,)``."""
    return pick(sharding, axes.batch)


def replicated(sharding: NamedSharding | None) -> NamedSharding | None:
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())


def state_sharding(
    state: Any,
    params: Any,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> Any:
    """The place of every leaf of an optimizer state on its parameters' mesh.

    Works on the state of any Optax pipeline that holds this library's states among others: inside
    ``chain``, ``masked``, ``partition``, ``MultiSteps``, ``inject_hyperparams``, a Linen
    ``TrainState``'s ``opt_state`` or ``nnx.state(optimizer)``.

    * A state leaf whose path ends with a parameter's path and which has its shape takes the
      parameter's sharding.
    * Moments, projections and norms of a matrix go by their role, known from the names of their
      fields: moments are cut over the same devices as the parameter (along the channel side first,
      then along the rank axis, replicated where neither divides).
    * All else (counts, keys, hyperparameters) is replicated.

    What belongs to a parameter is in the kind of memory that the parameter is in.

    Args:
      state: an optimizer state, of arrays or ``jax.ShapeDtypeStruct`` (from
        ``jax.eval_shape(tx.init, params)``).
      params: the parameters, of arrays or ``jax.ShapeDtypeStruct`` with ``NamedSharding`` on one mesh;
        leaves without one count as replicated.
      weight_dimension_numbers: what the optimizer was given.

    Returns:
      A tree of the structure of `state` with a ``NamedSharding`` for every leaf, as ``jax.jit``'s
      ``out_shardings`` and ``jax.device_put`` take it.

    Raises:
      ValueError: if no parameter has a ``NamedSharding``, or if moments have shapes that do not follow
        from `weight_dimension_numbers`.

    Examples:
      >>> import jax, jax.numpy as jnp, apollo_optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
      >>> params = {"kernel": jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("fsdp")))}
      >>> tx = apollo_optax.apollo(0.01, rank=4)
      >>> shardings = state_sharding(jax.eval_shape(tx.init, params), params)
      >>> tuple(shardings[0].mu["kernel"].spec)
      (None, 'fsdp')
    """
    leaves = _tree.leaves_by_path(params)
    shardings = {path: of(leaf) for path, leaf in leaves.items()}
    on_mesh = next((sharding for sharding in shardings.values() if sharding is not None), None)
    everywhere = replicated(on_mesh)
    if everywhere is None:
        raise ValueError(
            "no parameter has a NamedSharding, so there is no mesh to place the state on; give "
            "params as arrays on a mesh, or as jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
        )
    axes = resolve(weight_dimension_numbers, params)
    states = _tree.leaves_by_path(state)
    owners = _tree.owners(states, leaves)

    def place_of(path: _tree.Path, leaf: Any) -> NamedSharding:
        param, field = owners[path]
        if param is None:
            return everywhere
        sharding, matrix, shape = shardings[param] or everywhere, axes[param], jnp.shape(leaf)
        if field is not None:
            rank = rank_in(matrix, shape) if field in ("mu", "nu", "projection") else 0
            expected = state_shapes(matrix, jnp.shape(leaves[param]), rank)[field]
            _check.state_shape(param, field, leaf, expected, _check.OTHER_NUMBERS)
            return of_field(field, matrix, rank, sharding) or everywhere
        if shape == jnp.shape(leaves[param]):
            return sharding
        if matrix is not None and path[-len(param) - 1 :][:1] == ("norm",) and shape == matrix.batch_shape:
            return norms(matrix, sharding) or everywhere  # Of a LimitNormGrowthState.
        return everywhere

    placed = [place_of(path, leaf) for path, leaf in states.items()]
    return jax.tree.unflatten(jax.tree.structure(state), placed)


def of_field(field: str, axes: MatrixAxes | None, rank: int, sharding: NamedSharding) -> NamedSharding | None:
    """For a field of ScaleByApolloState; `axes` is None for a leaf that is no matrix."""
    if axes is None:
        return sharding if field in ("mu", "nu") else pick(sharding, ())
    if field == "norm":
        return norms(axes, sharding)
    if field == "projection":
        return projections(axes, sharding)
    return moments(axes, rank, sharding)
