"""The cost of APOLLO-Zero's update relative to the model, in flops.

Run it with `python -m benchmarks.flattening_cost`. For each model it prints the flops
of one update of all kernels, and their share of those of forward and backward passes.
"""

import argparse
import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp

import apollo_optax
from benchmarks.report import made_with, markdown
from examples.llama.config import PRESETS, LlamaConfig
from examples.llama.flops import flops_per_token

MODELS, TOKENS, SEQ = ("60m", "1b", "7b"), (4096, 32768, 131072), 256


def kernel_shapes(config: LlamaConfig) -> collections.Counter[tuple[int, int]]:
    """How many kernels of each shape, smaller side first, the layers have."""
    width, hidden = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_size
    kernels = [(width, heads)] * 4 + [(width, hidden)] * 3
    return collections.Counter(kernels * config.num_layers)


@functools.cache
def update_flops(shape: tuple[int, int], method: Any, rank: int | None) -> float:
    """The flops of the compiled update of one kernel, as XLA counts them.

    XLA does not count what decompositions take: `r^3 / 3` flops for a Cholesky factor
    and `r^3` for its inverse, or about `9 m^3` for all eigenvectors.
    """
    tx = apollo_optax.scale_by_flattening(method=method, rank=rank)
    gradient = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, gradient)
    cost: Any = jax.jit(tx.update).lower(gradient, state).compile().cost_analysis()
    return float(cost["flops"])


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
    methods = [("low_rank", part) for part in options.parts] + [("newton_schulz", None)]
    head = ("model", "method", "Tflop", *(f"{tokens:,} tokens" for tokens in TOKENS))
    rows = [row(name, *method) for name in options.models for method in methods]
    print(made_with(("jax", "jaxlib")) + "\n")
    print(markdown(head, rows, 2))


if __name__ == "__main__":
    main()
