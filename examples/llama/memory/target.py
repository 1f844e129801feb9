"""The memory that a training step needs on a target, from compiling it there.

Nothing is run. A target is `cpu`, `gpu` (that of this machine) or a TPU topology such
as `v5e:1x1`. TPU topologies need no TPU, because their compiler, libtpu, works without
one. All numbers are bytes on one device.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from examples.llama.config import LlamaConfig
from examples.llama.mesh import device_count, on_every_device, over_data
from examples.llama.model import Batch
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.options import RunOptions, TuningOptions
from examples.llama.run import setup
from examples.llama.run.errors import UsageError, first_line

LOCAL = ("cpu", "gpu")
# A size of 0 would end libtpu's process.
TOPOLOGY = re.compile(r"[a-z0-9]+:[1-9]\d*(x[1-9]\d*)+")
INSTALL = "pip install '.[tpu-aot]' in the clone"
# The generation with the most memory per device. Any number of its chips makes a
# topology.
LARGEST = "v5p"
# The TPU compiler's message about a program that does not fit. The size includes the
# arguments, and its units are binary.
REFUSAL = re.compile(
    r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])"
    r"(?:\) exceeds available HBM \(| of )([\d.]+)([KMGT])"
)
# The number of last lines that are shown of a crashed compiler's output.
CRASH_LINES = 10


class CompilerError(Exception):
    """The compiler failed for another reason than a lack of memory."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a compiled step on one device, in bytes.

    The compiler's own numbers are None for a program that the compiler rejects and that
    does not fit a larger target either. Its message still has the peak, in hundredths
    of a GiB.
    """

    weights_bytes: int  # The size of the parameters on the device, from their shapes.
    optimizer_bytes: int  # The size of the optimizer's state, from its shapes.
    host_weights_bytes: int  # The size of the parameters in host memory.
    device_kind: str
    peak_bytes: int  # Arguments + temporaries + output - alias, on the device.
    arguments_bytes: int | None = None
    temporaries_bytes: int | None = None
    output_bytes: int | None = None
    # The part of the output that reuses the memory of the arguments.
    alias_bytes: int | None = None
    host_bytes: int | None = None  # The same sum as the peak, in host memory.
    host_temporaries_bytes: int | None = None
    # The memory that the device gives a program, or None if that is unknown.
    capacity_bytes: int | None = None
    refused: bool = False  # Whether the target's compiler refuses the program.
    # The target, or the larger one that the numbers are for.
    compiled_for: str | None = None


def check_target(target: str) -> None:
    """Raises `UsageError` for an unknown `target` or one without its compiler."""
    if target in LOCAL:
        return
    if not TOPOLOGY.fullmatch(target):
        raise UsageError(
            f"`target` {target!r} is unknown; give cpu, gpu or a TPU topology: "
            "v5e:1x1, v5e:4x4, v6e:2x2, v5p:2x2x1, v4:2x2x1"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"`target` {target} needs libtpu, which compiles for TPUs; {INSTALL}"
        )


def for_target(options: RunOptions, target: str) -> RunOptions:
    """Returns the options as `pretrain` would resolve them on the target.

    The target may not be this machine.

    Raises:
        UsageError: for attention that only a GPU has.
    """
    if target == "gpu":
        return options  # `setup.execution_of` chooses for the GPU that it finds.
    if options.attention == "cudnn":
        raise UsageError(
            f"`attention` cudnn takes a GPU, and `target` is {target}; leave it out"
        )
    return dataclasses.replace(options, attention="xla")


def devices_of(target: str) -> Sequence[Any]:
    """Returns the devices to compile for; raises `UsageError` where there are none."""
    try:
        if target in LOCAL:
            return jax.devices(target)
        # JAX has a v4 chip as one device. The default of libtpu is two.
        more = {"chip_config_name": "megacore"} if target.startswith("v4:") else {}
        return topologies.get_topology_desc(
            platform="tpu", topology_name=target, **more
        ).devices
    except RuntimeError as error:
        remedy = (
            "give cpu or a TPU topology as v5e:1x1"
            if target in LOCAL
            else "give one as v5e:1x1, v5e:4x4 or v5p:2x2x2"
        )
        raise UsageError(
            f"`target` {target} is not there ({first_line(error)}); {remedy}"
        ) from error


def mesh_on(options: RunOptions, config: LlamaConfig, target: str) -> jax.sharding.Mesh:
    devices, count = devices_of(target), device_count(options.mesh)
    if target not in LOCAL and count != len(devices):
        raise UsageError(
            f"`mesh` {options.mesh} is {count} of the {len(devices)} devices of "
            f"`target` {target}; use all, or give another topology"
        )
    # A CPU shows as many devices as it is asked for.
    return setup.mesh_of(
        options, config, devices[:count] if target == "cpu" else devices
    )


def larger_target(devices: int) -> str:
    """Returns a topology of as many chips of the generation with the most memory."""
    x, y = (2, 2) if devices % 4 == 0 else (1, 1)
    return f"{LARGEST}:{x}x{y}x{devices // (x * y)}"


def memory_of(options: RunOptions, target: str, *, exact: bool = True) -> Memory:
    """Returns the memory that a run's step needs on a target.

    Args:
        options: the options of the run, with defaults filled in.
        target: the target to compile for. A TPU needs its own process, see `Compiler`.
        exact: whether to get the numbers of a program that the target's compiler
            rejects from a larger target. If not, only the message's number is returned.

    Raises:
        UsageError: for a target that does not exist, and for options that do not fit
            it.
    """
    options = for_target(options, target)
    if target in LOCAL:
        setup.check_offload(options)
    config = setup.model_config(options)
    mesh = mesh_on(options, config, target)
    try:
        return compiled_memory(options, config, mesh, target)
    except jax.errors.JaxRuntimeError as error:
        needed, available = refused_bytes(error)
    memory = shapes_memory(options, config, mesh, peak_bytes=needed)
    larger = larger_target(mesh.size)
    if exact and larger != target:
        try:
            memory = compiled_memory(
                options, config, mesh_on(options, config, larger), larger
            )
        except jax.errors.JaxRuntimeError as error:
            refused_bytes(error)
    kind = mesh.devices.flat[0].device_kind
    return dataclasses.replace(
        memory, device_kind=kind, capacity_bytes=available, refused=True
    )


def refused_bytes(error: Exception) -> tuple[int, int]:
    """Returns a program's need and limit in bytes, from the compiler's message.

    Any other error is raised again.
    """
    if not (refusal := REFUSAL.search(str(error))):
        raise error
    number, unit, there, unit_there = refusal.groups()
    return binary_bytes(number, unit), binary_bytes(there, unit_there)


def binary_bytes(number: str, unit: str) -> int:
    return round(float(number) * 2 ** (10 * (1 + "KMGT".index(unit))))


def compiled_memory(
    options: RunOptions, config: LlamaConfig, mesh: jax.sharding.Mesh, target: str
) -> Memory:
    """Returns the memory of a run's step, compiled for the devices of a mesh."""
    return memory_of_step(
        compiled_step(options, config, mesh), options, config, mesh, target
    )


def compiled_step(
    options: RunOptions, config: LlamaConfig, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """Returns the step of a run, compiled for the devices of a mesh.

    It takes the state, the batch, the number of the step and, if the run trains
    adapters, the other parameters.
    """
    tx, _ = make_optimizer(options, config)
    # The step is a function that can be jitted.
    step: Any = setup.training_step(options, config, tx, mesh)
    frozen = setup.abstract_frozen(options, config, mesh)
    return step.lower(
        setup.abstract_state(options, config, tx, mesh),
        abstract_batch(options, mesh),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=on_every_device(mesh)),
        *(() if frozen is None else (frozen,)),
    ).compile()


def abstract_batch(options: RunOptions, mesh: jax.sharding.Mesh) -> Batch:
    """Returns the shapes and shardings of the batch that the command gives the step."""

    def leaf(dtype: Any) -> jax.ShapeDtypeStruct:
        shape = (options.batch, options.seq + 1)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=over_data(mesh))

    if isinstance(options, TuningOptions):
        return Batch(leaf(jnp.int32), leaf(jnp.int32), leaf(jnp.float32))
    return Batch(leaf(jnp.int32))


def memory_of_step(
    compiled: jax.stages.Compiled,
    options: RunOptions,
    config: LlamaConfig,
    mesh: jax.sharding.Mesh,
    target: str,
) -> Memory:
    """Returns the memory of a compiled step, which the other arguments describe."""
    sizes: Any = compiled.memory_analysis()
    return shapes_memory(
        options,
        config,
        mesh,
        peak_bytes=sizes.argument_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes,
        arguments_bytes=sizes.argument_size_in_bytes,
        temporaries_bytes=sizes.temp_size_in_bytes,
        output_bytes=sizes.output_size_in_bytes,
        alias_bytes=sizes.alias_size_in_bytes,
        host_bytes=sizes.host_argument_size_in_bytes
        + sizes.host_temp_size_in_bytes
        + sizes.host_output_size_in_bytes
        - sizes.host_alias_size_in_bytes,
        host_temporaries_bytes=sizes.host_temp_size_in_bytes,
        capacity_bytes=capacity(mesh),
        compiled_for=target,
    )


def shapes_memory(
    options: RunOptions, config: LlamaConfig, mesh: jax.sharding.Mesh, **compiled: Any
) -> Memory:
    """Returns the memory by shapes, with the known numbers of the compiled program."""
    tx, _ = make_optimizer(options, config)
    state = setup.abstract_state(options, config, tx, mesh)
    weights = state.params, setup.abstract_frozen(options, config, mesh)
    return Memory(
        weights_bytes=bytes_on_a_device(weights, host=False),
        optimizer_bytes=bytes_on_a_device(state.opt_state, host=False),
        host_weights_bytes=bytes_on_a_device(weights, host=True),
        device_kind=mesh.devices.flat[0].device_kind,
        **compiled,
    )


def bytes_on_a_device(tree: Any, *, host: bool) -> int:
    """Returns the bytes per device of a tree of shapes, in device or host memory."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if (leaf.sharding.memory_kind == "pinned_host") == host
    )


def capacity(mesh: jax.sharding.Mesh) -> int | None:
    """Returns the bytes that a device gives a program, or None if that is unknown."""
    device = mesh.devices.flat[0]
    if device.platform == "gpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    if device.platform != "tpu":
        return None
    # A topology does not have this number. The compiler's message about a program that
    # is too large does.
    too_large = jax.ShapeDtypeStruct((2**40,), jnp.int8, sharding=on_every_device(mesh))
    try:
        jax.jit(lambda x: x[0]).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        return refused_bytes(error)[1]
    return None


class Compiler:
    """A process that compiles for one target.

    Use it as `with Compiler(...) as memory_of: memory_of(options)`.

    A separate process is needed because libtpu takes over signals, writes warnings, and
    sometimes ends the process on unusual requests. Also, in this process Ctrl-C would
    wait for the compilation to end.

    Args:
        target: the target to compile for.
        devices: how many devices the CPU should show.
    """

    def __init__(self, target: str, devices: int = 1) -> None:
        self._target = target
        self._environment = environment(target, devices)

    def __enter__(self) -> "Compiler":
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from examples.llama.memory.target import serve; serve()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=self._environment,
            # Ctrl-C reaches this process only, which then ends that one.
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        # The last request may still be in the pipe.
        with self._errors, contextlib.suppress(BrokenPipeError), self._process:
            pass

    def __call__(self, options: RunOptions, *, exact: bool = True) -> Memory:
        """Returns the result of `memory_of`, or raises its errors.

        Raises `CompilerError` if the compiler crashes.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((options, self._target, exact), self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise CompilerError(self._last_words()) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        cause = (
            f"signal {signal.Signals(-status).name}"
            if status < 0
            else f"status {status}"
        )
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()[-CRASH_LINES:]
        return "\n".join(
            [
                f"the compiler for {self._target} ended with {cause}; its last lines:",
                *lines,
            ]
        )


def environment(target: str, devices: int) -> dict[str, str]:
    """Returns the environment of a process that compiles for a target."""
    ours = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        # These programs are not run, so they need not be cached.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    if target == "gpu":
        # Another run may have the memory.
        return ours | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    ours |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if target == "cpu":
        return ours
    # libtpu ends the process if it does not know a flag, and it lacks some of those for
    # other platforms.
    flags = [
        flag
        for flag in ours.get("XLA_FLAGS", "").split()
        if not flag.lstrip("-").startswith(("xla_cpu_", "xla_gpu_"))
    ]
    # No TPU is looked for, and another process may have libtpu loaded.
    return ours | {
        "XLA_FLAGS": " ".join(flags),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def serve() -> None:
    """Answers the requests of a `Compiler` from stdin on stdout, until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What a library prints is no answer.
    requests: queue.SimpleQueue[tuple[RunOptions, str, bool]] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(EOFError):
            while True:
                requests.put(pickle.load(sys.stdin.buffer))
        os._exit(0)  # Whoever asked is gone, and compiling may take minutes more.

    threading.Thread(target=read, daemon=True).start()
    while True:
        options, target, exact = requests.get()
        try:
            answer: Any = memory_of(options, target, exact=exact)
        except UsageError as error:
            answer = error
        except Exception:
            answer = CompilerError(traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()
