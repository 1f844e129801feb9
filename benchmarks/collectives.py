"""What optimizers send between devices and what each device stores.

Run it with `python -m benchmarks.collectives`.

The step from gradients to new weights is compiled for TPU topologies that need not be
attached, and nothing is run. Gradients are sharded as the weights are, as a
reduce-scatter over the data leaves them, so the optimizer alone causes all traffic.
Bytes are those of one device. benchmarks/hlo.py says how sent bytes are counted.
"""

import dataclasses
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from benchmarks.hlo import collectives
from benchmarks.report import made_with, markdown
from examples.llama.config import PRESETS, preset
from examples.llama.memory.report import versions
from examples.llama.memory.target import (
    bytes_on_a_device,
    check_target,
    environment,
    larger_target,
    mesh_on,
    refused_bytes,
)
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.optimizers.recipes import RECIPES, with_defaults
from examples.llama.options import RunOptions, parse
from examples.llama.partition import state_shardings
from examples.llama.run.errors import (
    UsageError,
    check_names,
    exit_on_usage_error,
    unknown_name,
)
from examples.llama.run.setup import abstract_state, model_config, placed, shardings_of
from examples.llama.step import TrainState

CAPTION = (
    "Columns: MB (1e6 bytes) that each device sends in an optimizer step, and MB of "
    "the optimizer's state that it stores,\n"
    "by the number of devices. {sharding}.\n"
    "Weights and gradients are in bfloat16 and moments in float32. The rank of apollo "
    "and galore is {rank}, and embeddings\n"
    "and head have Adam. With k devices and an array of B bytes, each device sends 2 "
    "(k - 1) / k B in an all-reduce,\n"
    "(k - 1) / k B in a reduce-scatter, all-gather or all-to-all, and B in a permute. "
    "For TPUs, another function with\n"
    "whole matrices as inputs and outputs replaces an SVD. *: compiled for v5p, "
    "because it is too large for the chip."
)
SHARDINGS = {
    "trainer": (
        "Matrices are sharded as by `--mesh fsdp=N`: those of the layers along "
        "APOLLO's channels if N divides them"
    ),
    "contracted": (
        "The layers' matrices are sharded along the side that APOLLO projects away"
    ),
}
TOPOLOGIES = {8: "v5e:2x4", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Prints the table of docs/distributed.md."""

    models: tuple[str, ...] = ("1b", "7b")
    """Presets of examples/llama/config.py."""
    optimizers: tuple[str, ...] = ("adamw", "galore", "muon", "apollo", "apollo-mini")
    """Names that examples.llama.pretrain takes."""
    devices: tuple[int, ...] = tuple(TOPOLOGIES)
    """How many devices the weights are sharded over: 8, 16, 64 or 256, or any number
    with --target cpu."""
    rank: int = 256
    """The rank of APOLLO and GaLore."""
    sharding: str = "trainer"
    """How weights are sharded. trainer: as by the trainer; contracted: the layers'
    kernels along the other side."""
    target: str = "v5e"
    """v5e, or cpu, which compiles fast."""
    jobs: int = 1
    """Compilations at the same time; each takes some GB of memory."""

    def __post_init__(self) -> None:
        check_names("--models", self.models, PRESETS)
        check_names("--optimizers", self.optimizers, RECIPES)
        if not self.devices:
            raise UsageError("--devices is empty; give one or more")
        if self.sharding not in SHARDINGS:
            raise unknown_name("--sharding", self.sharding, SHARDINGS)
        if self.target not in ("v5e", "cpu"):
            raise unknown_name("--target", self.target, ("v5e", "cpu"))
        for count in self.devices:
            if count < 1 or (self.target == "v5e" and count not in TOPOLOGIES):
                raise UsageError(
                    f"--devices {count} is no topology here; give "
                    f"{', '.join(map(str, TOPOLOGIES))}"
                )
        if self.jobs < 1:
            raise UsageError(f"--jobs {self.jobs} is out of range; give 1 or more")


@dataclasses.dataclass(frozen=True)
class Cost:
    """The bytes that one device stores and sends for an optimizer step."""

    state: int  # Bytes of the optimizer's state.
    sent: float  # Bytes sent at most steps.
    # Bytes sent at the steps that compute projections anew. They are infinite if
    # unknown.
    sent_at_refresh: float
    fits: bool = True  # Otherwise it was compiled for larger chips.


def run_of(options: Options, model: str, optimizer: str, devices: int) -> RunOptions:
    has_rank = optimizer in ("apollo", "apollo-svd", "galore")
    run = RunOptions(
        out=Path("unused"),
        model=model,
        optimizer=optimizer,
        rank=options.rank if has_rank else None,
        weights="bfloat16",
        batch=devices,
        seq=16,
        mesh=f"fsdp={devices}",
    )
    return with_defaults(run, preset(model))


def along_the_contracted_side(params: Any) -> Any:
    """Shards the shapes of the layers' kernels along the side that APOLLO contracts."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if len(x.shape) != 3:
            return x
        spec = (
            jax.P(None, None, "fsdp")
            if x.shape[1] > x.shape[2]
            else jax.P(None, "fsdp", None)
        )
        sharding = jax.sharding.NamedSharding(x.sharding.mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return {**params, "layers": jax.tree.map(place, params["layers"])}


def compiled_cost(run: RunOptions, target: str, sharding: str = "trainer") -> Cost:
    """Compiles an optimizer step; for a TPU, the caller starts a process for it."""
    config = model_config(run)
    tx, _ = make_optimizer(run, config)
    mesh = mesh_on(run, config, target)
    state = abstract_state(run, config, tx, mesh)
    if sharding == "contracted":
        params = along_the_contracted_side(state.params)
        opt_state = placed(
            state.opt_state, state_shardings(run, state.opt_state, params)
        )
        state = TrainState(params, opt_state)

    def step(state: TrainState, grads: Any) -> TrainState:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state)

    jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings_of(state))
    try:
        with nullcontext() if compiles_svds(target) else no_svds(mesh):
            program = jitted.lower(state, state.params).compile().as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        refused_bytes(error)  # Raises errors other than a lack of memory.
        return dataclasses.replace(
            compiled_cost(run, larger_target(mesh.size), sharding), fits=False
        )
    sent, at_refresh = (
        sum(each.sent_bytes for each in collectives(program, rare=rare))
        for rare in (False, True)
    )
    return Cost(bytes_on_a_device(state.opt_state, host=False), sent, at_refresh)


def compiles_svds(target: str) -> bool:
    """Whether the target's compiler finishes SVDs of matrices of thousands of rows.

    For TPUs, it does not finish within hours.
    """
    return target == "cpu"


@contextmanager
def no_svds(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Replaces SVDs with a function that gathers whole matrices as an SVD does.

    An SVD needs its matrix replicated on each device and gives replicated results.
    """

    def everywhere(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(
            x, jax.sharding.NamedSharding(mesh, jax.P())
        )

    def svd(matrix: jax.Array, **_: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        matrix, k = everywhere(matrix), min(matrix.shape)
        return (
            everywhere(matrix[:, :k]),
            everywhere(matrix[:k, 0]),
            everywhere(matrix[:k]),
        )

    with mock.patch.object(jnp.linalg, "svd", svd):
        yield


def cost(run: RunOptions, target: str, devices: int, sharding: str = "trainer") -> Cost:
    child = subprocess.run(
        [sys.executable, "-c", "from benchmarks.collectives import answer; answer()"],
        input=pickle.dumps((run, target, sharding)),
        capture_output=True,
        env=environment(target, devices),
    )
    if child.returncode:
        raise RuntimeError(
            f"compiling {run.optimizer} for {target} failed:\n"
            f"{child.stderr.decode()[-4000:]}"
        )
    found = Cost(**json.loads(child.stdout.splitlines()[-1]))
    print(f"{run.model} {run.optimizer} on {devices} devices: {found}", file=sys.stderr)
    return found


def answer() -> None:
    """Answers :func:`cost` in the process that it starts.

    The question comes from stdin. The answer is the last line of stdout.
    """
    print(json.dumps(dataclasses.asdict(compiled_cost(*pickle.load(sys.stdin.buffer)))))


def megabytes(size: float) -> str:
    digits = 5 if 0 < size < 1e6 else 2
    return f"{size / 1e6:,.{digits}f}" if math.isfinite(size) else "unbounded"


def rows(options: Options, model: str, pool: ThreadPoolExecutor) -> Iterator[list[str]]:
    """Yields the bytes that each optimizer sends and stores, by number of devices."""

    def cost_of(pair: tuple[str, int]) -> Cost:
        optimizer, devices = pair
        target = options.target if options.target == "cpu" else TOPOLOGIES[devices]
        return cost(
            run_of(options, model, optimizer, devices),
            target,
            devices,
            options.sharding,
        )

    pairs = [
        (optimizer, devices)
        for optimizer in options.optimizers
        for devices in options.devices
    ]
    found = dict(zip(pairs, pool.map(cost_of, pairs), strict=True))
    for name in options.optimizers:
        costs = [found[name, devices] for devices in options.devices]
        state = [megabytes(each.state) for each in costs]
        sent = [megabytes(each.sent) + ("" if each.fits else "*") for each in costs]
        yield [name, *sent, *state]
        if any(each.sent_at_refresh != each.sent for each in costs):
            yield [
                f"{name}, at a refresh",
                *(megabytes(each.sent_at_refresh) for each in costs),
                *state,
            ]


def table(options: Options, model: str, pool: ThreadPoolExecutor) -> str:
    head = [
        "optimizer",
        *(
            f"{what}, {count}"
            for what in ("sent", "state")
            for count in options.devices
        ),
    ]
    return markdown(head, rows(options, model, pool), numbers_from=1)


def report(options: Options) -> None:
    target = (
        options.target if options.target == "cpu" else TOPOLOGIES[options.devices[0]]
    )
    check_target(target)
    print(
        f"compiled for {options.target}, none attached, on "
        f"{made_with(versions(target))}\n"
    )
    print(CAPTION.format(rank=options.rank, sharding=SHARDINGS[options.sharding]))
    with ThreadPoolExecutor(options.jobs) as pool:
        for model in options.models:
            print(f"\n{model}:\n\n{table(options, model, pool)}", flush=True)


def main(args: list[str] | None = None) -> None:
    exit_on_usage_error(
        lambda: report(parse(Options, args, "python -m benchmarks.collectives"))
    )


if __name__ == "__main__":
    main()
