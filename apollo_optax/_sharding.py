"""JAX's shardings, read from arrays and made for others; nothing of APOLLO.

Under automatic sharding, where an array lives is the compiler's choice, which a
constraint can narrow. Under explicit sharding it is a part of the array's type, and
operations whose operands do not fit each other must say where their result lives.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def sharding_of(leaf: Any) -> NamedSharding | None:
    """The sharding of a concrete, abstract or traced array; None if not known."""
    if isinstance(leaf, Tracer):
        return explicit_sharding_of(leaf)
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def committed_device(leaf: Any) -> Any:
    """The one device on which the caller has put an array; None if there is none."""
    if isinstance(leaf, Tracer) or not getattr(leaf, "committed", False):
        return None
    devices = leaf.devices()
    return next(iter(devices)) if len(devices) == 1 else None


def explicit_sharding_of(array: jax.Array) -> NamedSharding | None:
    """The sharding in an array's type; None under automatic sharding."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def is_on_one_device(array: jax.Array) -> bool:
    """Whether an array, and what is computed from it, is on a single device.

    A traced array on one device has no mesh in its type. Neither has the argument of a
    ``jit`` with ``in_shardings`` that is lowered from shapes without shardings, so a
    mesh in the context (``jax.set_mesh``) counts as the array's.
    """
    mesh = jax.typeof(array).sharding.mesh
    if not mesh.empty:
        return mesh.size == 1 and AxisType.Explicit not in mesh.axis_types
    if not isinstance(array, Tracer):
        return len(array.sharding.device_set) == 1
    context = jax.sharding.get_abstract_mesh()
    return context.empty or context.size == 1


def device_put_if_concrete(
    array: jax.Array, sharding: NamedSharding | None
) -> jax.Array:
    """Moves a concrete array; the sharding of a traced one is the enclosing jit's."""
    if sharding is None or isinstance(array, Tracer):
        return array
    return jax.device_put(array, sharding)


def reshard(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Under explicit sharding, moves `array` to where the next operation needs it."""
    return array if sharding is None else jax.sharding.reshard(array, sharding)


def with_auto_axes(
    function: Callable[..., jax.Array], out_sharding: NamedSharding | None
) -> Callable[..., jax.Array]:
    """Under explicit sharding, lets XLA shard `function`, but not its result."""
    if out_sharding is None:
        return function
    mesh = out_sharding.mesh
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in types if kind == AxisType.Explicit)
    wrapped: Any = jax.sharding.auto_axes(
        function, axes=explicit, out_sharding=out_sharding
    )
    return wrapped


def replicate(array: jax.Array) -> jax.Array:
    """Under automatic sharding, replicates `array` over the devices."""
    mesh = jax.typeof(array).sharding.mesh
    if AxisType.Auto not in mesh.axis_types:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))


def keep_axis_unsharded(array: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """Under automatic sharding, keeps `axis` unsharded on the mesh of `like`."""
    mesh = jax.typeof(like).sharding.mesh
    if AxisType.Auto not in mesh.axis_types or AxisType.Explicit in mesh.axis_types:
        return array
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * array.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(
        array, NamedSharding(mesh, PartitionSpec(*spec))
    )


def mesh_axes(sharding: NamedSharding, axis: int) -> tuple[str, ...]:
    """The mesh axes that shard one axis of a tensor."""
    # Specs with reduced axes refuse an index. Those of older JAX have no `partitions`.
    partitions = getattr(sharding.spec, "partitions", sharding.spec)
    # A spec may be shorter than the tensor's rank.
    entry = partitions[axis] if axis < len(partitions) else None
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def named_sharding(
    like: NamedSharding, axes: Sequence[tuple[str, ...]]
) -> NamedSharding:
    """The mesh axes per tensor axis, on the mesh and in the memory kind of `like`."""
    spec = PartitionSpec(
        *(names[0] if len(names) == 1 else names or None for names in axes)
    )
    return NamedSharding(like.mesh, spec, memory_kind=like.memory_kind)


def sharding_of_axes(
    sharding: NamedSharding | None, axes: Iterable[int | None]
) -> NamedSharding | None:
    """The sharding of an array with these axes of a tensor; None: an unsharded axis."""
    if sharding is None:
        return None
    return named_sharding(
        sharding, [() if axis is None else mesh_axes(sharding, axis) for axis in axes]
    )


def replicated(like: NamedSharding | None) -> NamedSharding | None:
    return None if like is None else NamedSharding(like.mesh, PartitionSpec())
