"""Projections on any mesh have the bits of one device, also in two processes.

These programs are compiled as users' are, because XLA's optimizations must not change
a bit of them.
"""

import functools
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import AxisType

from tests import test_distributed
from tests.helpers import AXIS_TYPES, combinations_of

JAX_VERSION = tuple(map(int, jax.__version__.split(".")[:2]))


@functools.cache
def projection_on_one_device(name: str) -> np.ndarray:
    return test_distributed.projection((1, 1, 1), AxisType.Auto, name)


@combinations_of(
    "name, sizes, axis_type",
    ["random", "rademacher"],
    test_distributed.MESHES,
    AXIS_TYPES,
)
def test_projections_are_those_of_one_device_bit_for_bit(name, sizes, axis_type):
    expected = projection_on_one_device(name)
    values = 2 if name == "rademacher" else expected.size
    assert len(np.unique(expected)) == values
    actual = test_distributed.projection(sizes, axis_type, name)
    differences = np.abs(actual.astype(np.int64) - expected.astype(np.int64))
    # XLA for CPUs has rounded normal draws in shards of some shapes otherwise since
    # jax 0.12.
    rounds_otherwise = name == "random" and JAX_VERSION >= (0, 12)
    assert differences.max() <= (4 if rounds_otherwise else 0)


def test_two_processes_compute_the_numbers_of_one_device():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, test_distributed.__file__, str(number), str(port)],
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
        expected = test_distributed.losses_on_one_device("apollo")
        np.testing.assert_allclose(answer["losses"], expected, rtol=1e-5)
        expected = projection_on_one_device("random")
        np.testing.assert_array_equal(answer["projection"], expected)
