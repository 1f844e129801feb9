"""The cost of APOLLO-Zero's update and of Muon's relative to the model, in flops.

Run it with `python -m benchmarks.flattening_cost`. For each model it prints the flops
of one update of all kernels, and their share of those of forward and backward passes.
They are counted in the traced program, since XLA counts the body of a loop once and
decompositions not at all.
"""

import argparse
import collections
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.extend.core import ClosedJaxpr, Jaxpr

import apollo_optax
from benchmarks.report import made_with, markdown
from examples.llama.config import PRESETS, LlamaConfig
from examples.llama.flops import flops_per_token

MUON = "muon, for comparison"
MODELS, TOKENS, SEQ = ("60m", "1b", "7b"), (4096, 32768, 131072), 256


def kernel_shapes(config: LlamaConfig) -> collections.Counter[tuple[int, int]]:
    """How many kernels of each shape, smaller side first, the layers have."""
    width, hidden = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_size
    kv_heads = config.num_kv_heads * config.head_size
    kernels = [(width, heads)] * 2 + [(width, kv_heads)] * 2 + [(width, hidden)] * 3
    shapes = ((min(kernel), max(kernel)) for kernel in kernels * config.num_layers)
    return collections.Counter(shapes)


def program_flops(program: Jaxpr) -> float:
    """The flops of the products and decompositions of a traced program.

    A decomposition counts as what its usual algorithm takes: `m^3 / 3` for a Cholesky
    factor, `m^2` per column of a triangular solve, and `9 m^3` for all eigenvectors. Of
    alternatives, the one with the fewest flops counts, since the other is for a rare
    gradient.
    """
    total = 0.0
    for equation in program.eqns:
        inputs: list[Any] = [variable.aval for variable in equation.invars]
        outputs: list[Any] = [variable.aval for variable in equation.outvars]
        shapes = [x.shape for x in inputs]
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            length = math.prod(shapes[0][axis] for axis in contracted)
            total += 2 * length * math.prod(outputs[0].shape)
        elif name == "cholesky":
            total += math.prod(shapes[0]) * shapes[0][-1] / 3
        elif name == "triangular_solve":
            total += math.prod(shapes[1]) * shapes[0][-1]
        elif name == "eigh":
            total += 9 * math.prod(shapes[0]) * shapes[0][-1]
        elif name == "cond":
            branches = equation.params["branches"]
            total += min(program_flops(branch.jaxpr) for branch in branches)
            continue
        # A loop of a known length is a scan.
        times = equation.params["length"] if name == "scan" else 1
        inner = jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr),
        )
        for each in inner:
            each = each.jaxpr if isinstance(each, ClosedJaxpr) else each
            if isinstance(each, Jaxpr):
                total += times * program_flops(each)
    return total


@functools.cache
def update_flops(shape: tuple[int, int], method: Any, rank: int | None) -> float:
    """The flops of the update of one kernel, by Muon or by a method of flattening."""
    tx = (
        optax.contrib.scale_by_muon()
        if method == MUON
        else apollo_optax.scale_by_flattening(method=method, rank=rank)
    )
    gradient = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, gradient)
    return program_flops(jax.make_jaxpr(tx.update)(gradient, state).jaxpr)


def row(name: str, method: str, part: int | None) -> tuple[str, ...]:
    config = PRESETS[name]
    flops = 0.0
    for shape, count in kernel_shapes(config).items():
        rank = None if part is None else min(shape) // part
        flops += count * update_flops(shape, method, rank)
    of_model = (tokens * flops_per_token(config, SEQ) for tokens in TOKENS)
    label = method if part is None else f"{method}, m/{part}"
    return name, label, f"{flops / 1e12:.3g}", *(f"{flops / x:.1%}" for x in of_model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=PRESETS)
    parser.add_argument("--parts", nargs="+", type=int, default=(4, 8, 16, 32))
    options = parser.parse_args()
    for part in options.parts:
        if part < 1:
            parser.error(f"--parts {part} is out of range; give 1 or more")
    methods = [("low_rank", part) for part in options.parts]
    methods += [("newton_schulz", None), (MUON, None)]
    head = ("model", "method", "Tflop", *(f"{tokens:,} tokens" for tokens in TOKENS))
    rows = [row(name, *method) for name in options.models for method in methods]
    print(made_with(("jax", "jaxlib")) + "\n")
    print(markdown(head, rows, 2))


if __name__ == "__main__":
    main()
