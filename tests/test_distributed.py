"""Runs on any mesh give the losses of one device.

As a script, with the index of a process and a port, this file trains in one of two
processes of four devices each, and prints the losses and a projection as JSON.
"""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import (
    apollo,
    apollo_mini,
    apollo_zero,
    racs,
    scale_by_apollo,
    state_sharding,
)
from tests.helpers import AXIS_TYPES, combinations_of, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

AXES = ("data", "fsdp", "tensor")
STEPS, BATCH, WIDTH, HIDDEN = 20, 16, 32, 64
SPECS = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp"), "bias": P("tensor")}
OPTIMIZERS = {
    "apollo": functools.partial(apollo, 0.01, 8, update_proj_gap=5),
    "apollo-mini": functools.partial(apollo_mini, 0.002, update_proj_gap=5),
    "apollo-zero": functools.partial(apollo_zero, 0.002),
    "apollo-zero relative": functools.partial(apollo_zero, 2e-4, relative=True),
    "racs": functools.partial(racs, 0.003),
}


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["up"] + params["bias"])
    return jnp.mean(jnp.square(hidden @ params["down"] - y))


def shard(array: Any, mesh: jax.sharding.Mesh, spec: P) -> jax.Array:
    """Shards an array that every process has in full."""
    array = np.asarray(array)
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )


def make_mesh(sizes: tuple[int, ...], axis_type: AxisType) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, AXES, (axis_type,) * 3, devices=devices)


def train(name: str, sizes: tuple[int, ...], axis_type: AxisType) -> list[float]:
    """The losses of some steps on a mesh of these sizes."""
    mesh = make_mesh(sizes, axis_type)
    values = {
        "up": 0.2 * normal(0, (WIDTH, HIDDEN)),
        "down": 0.2 * normal(1, (HIDDEN, WIDTH)),
        "bias": np.zeros(HIDDEN, np.float32),
    }
    params = {key: shard(value, mesh, SPECS[key]) for key, value in values.items()}
    of_batch = P(("data", "fsdp"))
    x, y = (shard(normal(seed, (BATCH, WIDTH)), mesh, of_batch) for seed in (2, 3))
    tx = OPTIMIZERS[name]()
    replicated = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    gradient = jax.value_and_grad(loss_fn)
    if axis_type == AxisType.Explicit:
        # XLA chooses the shardings inside the model. The optimizer's are explicit.
        gradient = jax.sharding.auto_axes(
            gradient, out_sharding=(replicated, shardings)
        )
    state_shardings = state_sharding(jax.eval_shape(tx.init, params), params)

    def step(params, state, x, y):
        loss, grads = gradient(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    with jax.set_mesh(mesh):
        state = jax.jit(tx.init, out_shardings=state_shardings)(params)
        jitted = jax.jit(
            step,
            donate_argnums=(0, 1),
            out_shardings=(shardings, state_shardings, replicated),
        )
        losses = []
        for _ in range(STEPS):
            params, state, loss = jitted(params, state, x, y)
            losses.append(float(loss))
    return losses


def projection(sizes: tuple[int, ...], axis_type: AxisType, name: str) -> np.ndarray:
    """The bits of a projection, which projects an identity matrix to itself."""
    mesh = make_mesh(sizes, axis_type)
    gradient = shard(np.eye(WIDTH, HIDDEN, dtype=np.float32), mesh, SPECS["up"])
    tx = scale_by_apollo(8, b1=0.0, projection=name, key=7)
    with jax.set_mesh(mesh):
        _, state = jax.jit(tx.update)(gradient, jax.jit(tx.init)(gradient))
        replicate = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
        moment = np.asarray(replicate(state.mu).addressable_data(0))
    return moment[:, :WIDTH].view(np.uint32)


# Each is the one parameter of a tuple, because its sizes are a tuple too.
MESHES = [((8, 1, 1),), ((1, 8, 1),), ((1, 1, 8),), ((2, 2, 2),)]


@functools.cache
def losses_on_one_device(name: str) -> list[float]:
    return train(name, (1, 1, 1), AxisType.Auto)


@combinations_of("name, sizes, axis_type", OPTIMIZERS, MESHES, AXIS_TYPES)
def test_losses_are_those_of_one_device(name, sizes, axis_type):
    expected = losses_on_one_device(name)
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(train(name, sizes, axis_type), expected, rtol=1e-5)


def answer_as_process(number: int, port: int) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
    assert jax.device_count() == 8
    drawn = projection((2, 2, 2), AxisType.Auto, "random")
    return {
        "losses": train("apollo", (2, 2, 2), AxisType.Auto),
        "projection": drawn.tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(answer_as_process(*map(int, sys.argv[1:]))))
