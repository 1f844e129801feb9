"""The bytes that each optimizer's compiled step moves, beside those that it must move.

Run it with `python -m benchmarks.step_traffic`. It compiles the steps that
`benchmarks.optimizer_step` times for a TPU, of which none is needed: its compiler,
libtpu, works without one. The bytes are read off the compiled program
(`benchmarks.hlo.moved_bytes`). Where the two columns agree, no kernel written by hand
can take less of the memory's bandwidth.
"""

import dataclasses
import os

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.hlo import moved_bytes
from benchmarks.optimizer_step import DTYPES, LAYOUTS, OPTIMIZERS
from benchmarks.report import made_with, markdown
from benchmarks.step_contenders import Method, Setting, jitted_step, methods
from examples.llama.config import preset
from examples.llama.memory.target import check_target, devices_of
from examples.llama.options import parse
from examples.llama.run.errors import (
    UsageError,
    exit_on_usage_error,
    notice,
    unknown_name,
)

HEAD = ("optimizer", "layout", "least MB", "compiled MB", "ratio")
# GaLore is left out, because a program for both kinds of its steps has no one number.
DEFAULT = ("sgd", "adamw", "apollo", "apollo-mini", "racs", "apollo-zero")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrafficOptions:
    """The bytes that each optimizer's step moves, compiled for a TPU."""

    target: str = "v5e:1x1"
    """A TPU topology; the step is compiled for one of its devices."""
    model: str = "7b"
    """A preset of examples/llama/config.py."""
    layers: int = 2
    """How many of the model's layers to update; each is like the others."""
    layouts: tuple[str, ...] = LAYOUTS
    """unstacked: a leaf per matrix; stacked: a leaf for the matrices of all layers."""
    dtype: str = "bfloat16"
    """The dtype of weights and gradients: float32 or bfloat16."""
    optimizers: tuple[str, ...] = DEFAULT
    """Any of sgd, adamw, adafactor, lion, muon, apollo, apollo-mini, racs and
    apollo-zero."""

    def __post_init__(self) -> None:
        preset(self.model)
        check_target(self.target)
        for flag, names, known in (
            ("--layouts", self.layouts, LAYOUTS),
            ("--dtype", (self.dtype,), DTYPES),
            (
                "--optimizers",
                self.optimizers,
                tuple(name for name in OPTIMIZERS if name != "galore"),
            ),
        ):
            for name in names:
                if name not in known:
                    raise unknown_name(flag, name, known)
        if self.layers < 1:
            raise UsageError(f"--layers {self.layers} is out of range; give 1 or more")


def compiled_step(
    method: Method, kernels: dict[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> str:
    """Returns the text of the program that updates the kernels on a mesh."""
    tx, replicated = method.make(), NamedSharding(mesh, PartitionSpec())
    params, state = jax.tree.map(
        lambda leaf: leaf.update(sharding=replicated),
        (kernels, jax.eval_shape(tx.init, kernels)),
    )
    text = jitted_step(tx).lower(params, state, params).compile().as_text()
    assert text is not None
    return text


def row(options: TrafficOptions, layout: str, method: Method, mesh: Mesh) -> list[str]:
    notice(f"{method.name}, {layout}")
    kernels = Setting(options.model, options.dtype, layout, options.layers).kernels()
    least = method.floor_bytes(kernels)
    moved = moved_bytes(compiled_step(method, kernels, mesh))
    numbers = (f"{least / 1e6:,.1f}", f"{moved / 1e6:,.1f}", f"{moved / least:.2f}")
    return [method.name, layout, *numbers]


def report(options: TrafficOptions) -> None:
    # No TPU is looked for, and another process may have the compiler loaded.
    os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    mesh = Mesh(np.array(devices_of(options.target)[:1]), ("data",))
    rows = [
        row(options, layout, method, mesh)
        for layout in options.layouts
        for name, group in methods(
            Setting(options.model, options.dtype, layout, options.layers)
        ).items()
        if name in options.optimizers
        for method in group
    ]
    print(made_with(("jax", "jaxlib", "libtpu", "optax")))
    print(
        f"{options.layers} layers of {options.model}, {options.dtype}, compiled for "
        f"{options.target}; MB of 1e6 bytes\n\n{markdown(HEAD, rows, 2)}"
    )


def main(args: list[str] | None = None) -> None:
    exit_on_usage_error(
        lambda: report(parse(TrafficOptions, args, "python -m benchmarks.step_traffic"))
    )


if __name__ == "__main__":
    main()
