"""The state in Flax's boxes, so that frameworks shard it.

Frameworks such as MaxText read the sharding of an optimizer's state off the metadata of
its boxes, and replicate what has none. Optax's transformations hand the parameters'
boxes on to their moments. So does this library, with the names of the axes that a
moment has. Flax is never imported: boxes are recognised and copied by their own
methods.

A name is either the name of a mesh axis or a logical name, which rules translate into
mesh axes.
"""

import math
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from apollo_optax import _sharding, _tree

# The keys of NNX's metadata that may have names. The first counts for the state of an
# optimizer. The last is an older word for the second, which some trainers still set.
_KEYS = ("optimizer_sharding", "out_sharding", "sharding_names")

Names = tuple[tuple[str, ...], ...]  # The names that shard each axis of an array.


def boxes_by_path(tree: Any) -> dict[_tree.Path, Any]:
    """The boxes in `tree` by path, which is that of the leaf if a box holds one."""
    nodes = _tree.leaves_by_path(tree, is_leaf=_tree.is_box, keep_boxes=True)
    return {path: node for path, node in nodes.items() if _tree.is_box(node)}


def replace(box: Any, array: Any) -> Any:
    """A box like `box` around another array."""
    return box.replace(array) if _is_nnx(box) else box.replace(value=array)


def partition_names(box: Any, ndim: int) -> Names | None:
    """The names per axis in a box's metadata; None where it has none.

    A name can shard one axis only, so a name that occurs twice counts for the first.
    """
    metadata = _metadata(box)
    given = next((metadata[key] for key in _KEYS if metadata.get(key)), None)
    given = getattr(given, "spec", given)  # NNX takes a NamedSharding too.
    if not isinstance(given, tuple | PartitionSpec):
        return None
    seen: set[str] = set()
    names = []
    for entry in [*given, *(None,) * ndim][:ndim]:
        if entry is PartitionSpec.UNCONSTRAINED:
            entry = None
        parts = (entry,) if isinstance(entry, str) else tuple(entry or ())
        names.append(tuple(part for part in parts if part not in seen))
        seen.update(parts)
    return tuple(names) if seen else None


NO_MESH = "moments of matrices that are sharded over"


def shapes_of_state(init: Callable[[Any], Any], params: Any) -> Any:
    """``jax.eval_shape(init, params)`` where the shardings of the state do not matter.

    So there is no warning of a mesh that is not known.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_MESH)
        return jax.eval_shape(init, params)


class Named:
    """The names in a parameter's box, as a sharding that Matrix's rules can move.

    Attributes:
      sharding: on an abstract mesh whose axes are the names. Each has as many devices
        as the name has on the real mesh, or one where that is not known, so that it
        stays where it is.
    """

    def __init__(self, box: Any, names: Names, on_mesh: NamedSharding | None) -> None:
        """Reads the mesh and the rules.

        Args:
          box: the parameter's.
          names: from :func:`partition_names`.
          on_mesh: the sharding of the value in the box; None if it is not known.
        """
        sizes = _mesh_sizes(box, on_mesh)
        self._is_mesh_known = bool(sizes)
        # The mesh axes of each name with more than one device, and their sizes.
        self._mesh_axes = {
            name: {axis: sizes[axis] for axis in axes if sizes.get(axis, 1) > 1}
            for name, axes in _mesh_axes_by_name(box, names).items()
        }
        self._box = box
        self._names = [
            tuple(name for name in part if name in self._mesh_axes) for part in names
        ]
        devices = [math.prod(axes.values()) for axes in self._mesh_axes.values()]
        mesh = AbstractMesh(tuple(devices), tuple(self._mesh_axes))
        replicated = NamedSharding(mesh, PartitionSpec())
        self.sharding = _sharding.named_sharding(replicated, self._names)

    def replace(self, array: Any, sharding: NamedSharding) -> Any:
        """A box around `array`, whose sharding is in terms of the names."""
        axes = [_sharding.mesh_axes(sharding, axis) for axis in range(array.ndim)]
        self._warn_if_dropped({name for names in axes for name in names})
        entries = tuple(map(self._entry, axes))
        if not _is_nnx(self._box):
            return self._box.replace(value=array, names=entries)
        # NNX's optimizer would take the old names under another key for its own.
        metadata = _metadata(self._box)
        keys = [key for key in _KEYS if key == "out_sharding" or metadata.get(key)]
        return self._box.replace(array, **dict.fromkeys(keys, entries))

    def _warn_if_dropped(self, kept: set[str]) -> None:
        """Warns of names that a moment would have if the mesh were known."""
        dropped = [name for part in self._names for name in part if name not in kept]
        if dropped and not self._is_mesh_known and jax.device_count() > 1:
            warnings.warn(
                f"{NO_MESH} {', '.join(dropped)} will be replicated, because init "
                "knows no mesh, and so not which other axis of a moment can be "
                "sharded; call init, or jax.eval_shape of it, inside "
                "jax.set_mesh(mesh)",
                UserWarning,
                stacklevel=2,
            )

    def _entry(self, names: tuple[str, ...]) -> Any:
        """The metadata for an axis that these names shard.

        Logical names can't be merged: NNX raises, and Linen takes them for mesh axes.
        Several names become the mesh axes that they stand for.
        """
        if names in self._names:  # These shared an axis before, so none is merged.
            return names[0] if len(names) == 1 else names or None
        sharding = [name for name in names if self._mesh_axes[name]]
        if len(sharding) <= 1:
            return next(iter((*sharding, *names)), None)
        return tuple(axis for name in sharding for axis in self._mesh_axes[name])


def _is_nnx(box: Any) -> bool:
    return hasattr(type(box), "get_metadata")


def _metadata(box: Any) -> Mapping[str, Any]:
    """A box's metadata under NNX's keys; Linen has other names for two of them."""
    if _is_nnx(box):
        return box.get_metadata()
    keys = {"out_sharding": "names", "sharding_rules": "rules", "mesh": "mesh"}
    return {key: getattr(box, name, None) for key, name in keys.items()}


def _mesh_axes_by_name(box: Any, names: Names) -> dict[str, tuple[str, ...]]:
    """The mesh axes of the names of one parameter, as Flax assigns them.

    Flax reads a box by the box's own rules and by those of its context. There may be
    several rules for a name. Linen takes the first one whose mesh axes no other name
    of the parameter has, and NNX takes the last one. If other names have the mesh axes
    of all rules for a name, it shards nothing and is left out. A name without a rule
    is that of a mesh axis.
    """
    flax = sys.modules.get("flax.core.spmd")
    in_context = () if flax is None else flax.get_logical_axis_rules()
    rules = [*(_metadata(box).get("sharding_rules") or ()), *in_context]
    if _is_nnx(box):
        rules = list(dict(rules).items())
    ruled = {name for name, _ in rules}
    unique = [name for part in names for name in part]
    assigned: dict[str, tuple[str, ...]] = {
        name: (name,) for name in unique if name not in ruled
    }
    for name, given in rules:
        axes = (given,) if isinstance(given, str) else tuple(given or ())
        taken = {axis for other in assigned.values() for axis in other}
        if name in unique and name not in assigned and taken.isdisjoint(axes):
            assigned[name] = axes
    return assigned


def _mesh_sizes(box: Any, on_mesh: NamedSharding | None) -> Mapping[str, int]:
    """Devices per mesh axis: of the box's mesh, the value's, or the one in context."""
    mesh = _metadata(box).get("mesh")
    if mesh is None and on_mesh is not None:
        mesh = on_mesh.mesh
    if mesh is None:
        # Under automatic sharding, the type of a traced value has a mesh, but no spec.
        mesh = jax.typeof(_tree.unbox(box)).sharding.mesh
    if mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape)
