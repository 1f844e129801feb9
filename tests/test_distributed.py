"""The same numbers on any mesh, of one process or two.

As a script, with the number of a process and a port: trains in one process of two, four devices each, and
prints what :func:`train` returns, as JSON.
"""

import functools
import json
import os
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import apollo, apollo_mini, scale_by_apollo, state_sharding

KINDS = [AxisType.Auto, AxisType.Explicit]
AXES = ("data", "fsdp", "tensor")
STEPS, BATCH, WIDTH, HIDDEN = 20, 16, 32, 64
SPECS = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp"), "bias": P("tensor")}
OPTIMIZERS = {
    "apollo": functools.partial(apollo, 0.01, 8, update_proj_gap=5),
    "apollo-mini": functools.partial(apollo_mini, 0.002, update_proj_gap=5),
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def loss_of(params, x, y):
    hidden = jnp.tanh(x @ params["up"] + params["bias"])
    return jnp.mean(jnp.square(hidden @ params["down"] - y))


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """As each process has all of `array`."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def make_mesh(sizes: tuple[int, ...], kind: AxisType) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, AXES, (kind,) * 3, devices=devices)


def train(name: str, sizes: tuple[int, ...], kind: AxisType) -> list[float]:
    """The losses of some steps on a mesh of these sizes."""
    mesh = make_mesh(sizes, kind)
    values = {"up": 0.2 * normal(0, WIDTH, HIDDEN), "down": 0.2 * normal(1, HIDDEN, WIDTH)}
    values |= {"bias": np.zeros(HIDDEN, np.float32)}
    params = {key: place(value, NamedSharding(mesh, SPECS[key])) for key, value in values.items()}
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    x, y = (place(normal(seed, BATCH, WIDTH), rows) for seed in (2, 3))
    tx = OPTIMIZERS[name]()
    everywhere = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    gradient = jax.value_and_grad(loss_of)
    if kind == AxisType.Explicit:  # The model is XLA's to cut; the optimizer's types say how they are.
        gradient = jax.sharding.auto_axes(gradient, out_sharding=(everywhere, shardings))
    places = state_sharding(jax.eval_shape(tx.init, params), params)

    def step(params, state, x, y):
        loss, grads = gradient(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    with jax.set_mesh(mesh):
        state = jax.jit(tx.init, out_shardings=places)(params)
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(shardings, places, everywhere))
        losses = []
        for _ in range(STEPS):
            params, state, loss = jitted(params, state, x, y)
            losses.append(float(loss))
    return losses


def projection(sizes: tuple[int, ...], kind: AxisType, name: str) -> np.ndarray:
    """The bits of a projection: what it makes of a gradient that is the identity."""
    mesh = make_mesh(sizes, kind)
    gradient = place(np.eye(WIDTH, HIDDEN, dtype=np.float32), NamedSharding(mesh, SPECS["up"]))
    tx = scale_by_apollo(8, b1=0.0, projection=name, key=7)
    with jax.set_mesh(mesh):
        _, state = jax.jit(tx.update)(gradient, jax.jit(tx.init)(gradient))
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(state.mu)
    return np.asarray(whole.addressable_data(0))[:, :WIDTH].view(np.uint32)


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


@functools.cache
def on_one_device(name: str) -> list[float]:
    return train(name, (1, 1, 1), AxisType.Auto)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_losses(name, sizes, kind):
    expected = on_one_device(name)
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(train(name, sizes, kind), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", ["random", "rademacher"])
def test_the_same_projections_to_the_bit(name, sizes, kind):
    expected = projection((1, 1, 1), AxisType.Auto, name)
    assert len(np.unique(expected)) == (2 if name == "rademacher" else expected.size)
    np.testing.assert_array_equal(projection(sizes, kind, name), expected)


def test_two_processes_compute_what_one_does():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(number), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    for printed, _ in outputs:
        answer = json.loads(printed.splitlines()[-1])
        np.testing.assert_allclose(answer["losses"], on_one_device("apollo"), rtol=1e-5)
        expected = projection((1, 1, 1), AxisType.Auto, "random")
        np.testing.assert_array_equal(answer["projection"], expected)


def answer_as_process(number: int, port: int) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
    assert jax.device_count() == 8
    losses = train("apollo", (2, 2, 2), AxisType.Auto)
    return {"losses": losses, "projection": projection((2, 2, 2), AxisType.Auto, "random").tolist()}


if __name__ == "__main__":
    print(json.dumps(answer_as_process(*map(int, sys.argv[1:]))))
