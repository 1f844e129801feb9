"""The devices of a run: so far, the batch is cut over them and everything else is on each."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from examples.llama.usage import UsageError, unknown_name

AXES = ("data",)


def axis_sizes(text: str) -> dict[str, int]:
    """Returns the sizes that `--mesh data=8` gives, by axis; raises `UsageError` for another form."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES:
            raise unknown_name("--mesh", name, AXES)
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(f"--mesh {text} is malformed; give a number above 0, as in data=8")
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns the mesh that `--mesh` asks for, of the first of `devices`, by default this machine's.

    Raises:
        UsageError: where there are fewer.
    """
    sizes = axis_sizes(text)
    count, devices = int(np.prod(list(sizes.values()))), devices or jax.devices()
    if count > len(devices):
        raise UsageError(
            f"--mesh {text} needs {count} devices and there are {len(devices)} "
            f"({devices[0].device_kind}); lower it"
        )
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices[:count])


def on_every_device(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.P())


def over_data(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Returns where a batch (B, S) goes: rows cut over the devices."""
    return jax.sharding.NamedSharding(mesh, jax.P("data"))
