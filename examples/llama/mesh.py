"""The devices of a run as a mesh.

`data` shards the batch, `fsdp` the batch and weights, and `tensor` weights.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

from examples.llama.run.errors import UsageError, unknown_name

# The last axis is the innermost: its devices are next to each other.
AXES = ("data", "fsdp", "tensor")
# The axes over which the sequences of a batch are sharded.
BATCH_AXES = ("data", "fsdp")


def axis_sizes(text: str) -> dict[str, int]:
    """Returns the sizes by axis of a mesh such as `data=2,fsdp=4`.

    Axes that it does not name have size 1.

    Raises:
        UsageError: for another form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        if equals and name not in AXES:
            raise unknown_name("`mesh`", name, AXES)
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(
                f"`mesh` {text} is malformed; give numbers above 0, as in data=2,fsdp=4"
            )
        if name in sizes:
            raise UsageError(f"`mesh` {text} gives {name} twice; give it once")
        sizes[name] = int(size)
    return dict.fromkeys(AXES, 1) | sizes


def device_count(text: str) -> int:
    """Returns how many devices a mesh such as `data=2,fsdp=4` takes."""
    return math.prod(axis_sizes(text).values())


def batch_shards(text: str) -> int:
    """Returns how many shards the sequences of a batch have on such a mesh."""
    return math.prod(axis_sizes(text)[axis] for axis in BATCH_AXES)


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns the mesh that `text`, such as `data=2,fsdp=4`, asks for.

    It has all `devices`, by default those of all processes. If all of them belong to
    this process, a mesh of size 1 has only the first device.

    Raises:
        UsageError: if the sizes do not multiply to the number of devices, or `data` is
            not a multiple of the number of TPU slices.
    """
    sizes, count = axis_sizes(text), device_count(text)
    devices = jax.devices() if devices is None else devices
    if count == 1 and jax.process_count() == 1:
        devices = devices[:1]
    if count != len(devices):
        here, axes, product = (
            len(devices),
            " x ".join(sizes),
            " x ".join(map(str, sizes.values())),
        )
        shown = (
            f", or set JAX_NUM_CPU_DEVICES={count}"
            if devices[0].platform == "cpu"
            else ""
        )
        raise UsageError(
            f"`mesh` {text} needs {count} devices, and the devices here are {here} "
            f"({devices[0].device_kind}); give {axes} = {here} in place of "
            f"{product}{shown}"
        )
    # Slices of TPUs are connected by a slower network, which `data` uses least.
    slices = 1
    if devices[0].platform == "tpu":
        slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % slices:
        raise UsageError(
            f"`mesh` {text} is for one slice of TPUs, and the devices here are of "
            f"{slices}; give a multiple of {slices} for data"
        )
    # `jax.make_mesh` refuses sizes that are not products of a TPU topology's sizes.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    else:
        over_slices = dict.fromkeys(sizes, 1) | {"data": slices}
        grid = mesh_utils.create_hybrid_device_mesh(
            tuple(size // over_slices[axis] for axis, size in sizes.items()),
            tuple(over_slices.values()),
            devices,
            allow_split_physical_axes=True,
        )
    return jax.sharding.Mesh(
        grid, tuple(sizes), (jax.sharding.AxisType.Auto,) * len(sizes)
    )


def on_every_device(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.P())


def over_data(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Returns the sharding of a batch (B, S): rows over `data` and `fsdp`.

    Along `tensor`, the batch is replicated.
    """
    return jax.sharding.NamedSharding(mesh, jax.P(BATCH_AXES))


def shard_count(mesh: jax.sharding.Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Returns how many shards these axes of the mesh make."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def constrained(
    x: jax.Array, mesh: jax.sharding.Mesh, *spec: str | tuple[str, ...] | None
) -> jax.Array:
    """Shards each axis of `x` over the mesh axes that `spec` names for it.

    An axis whose size the devices do not divide is replicated, as a single row is.
    """
    if mesh.size == 1:
        return x
    dividing = jax.P(
        *(
            None if size % shard_count(mesh, axes) else axes
            for size, axes in zip(x.shape, spec, strict=True)
        )
    )
    return jax.lax.with_sharding_constraint(
        x, jax.sharding.NamedSharding(mesh, dividing)
    )


def batch_share(mesh: jax.sharding.Mesh, batch: int) -> tuple[int, int]:
    """Returns the shard of a batch's rows on this process, and the number of shards.

    Processes whose devices differ along `tensor` only have the same shard. If shards
    overlap otherwise, every process has the whole batch.
    """
    held: dict[int, set[int]] = {}
    for device, (rows, _) in over_data(mesh).devices_indices_map((batch, 1)).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(batch)))
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != batch or len(set(map(len, parts))) != 1:
        return 0, 1
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)
