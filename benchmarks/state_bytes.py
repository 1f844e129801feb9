"""Optimizer-state bytes of the paper's models, from shapes alone.

Run it with `python -m benchmarks.state_bytes`.

Nothing is allocated. The bytes are those of ``jax.eval_shape`` of each optimizer's
``init``.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import apollo_optax
from examples.llama.config import LlamaConfig, preset
from examples.llama.model import Execution, init_params
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.optimizers.recipes import with_defaults
from examples.llama.options import RunOptions

# The ranks are from the paper's tables. The names are those of presets.
RANKS = {"60M": 128, "130M": 192, "350M": 256, "1B": 512, "7B": 256, "13B": 256}

# Each rule has the optimizer that uses it for kernels, the name of the rule for
# embedding and head, and the rank, or None for the example's default.
RULES: dict[str, tuple[str, str, int | None]] = {
    "AdamW": ("adamw", "adam", None),
    "APOLLO, rank 256": ("apollo", "apollo", 256),
    "APOLLO-Mini": ("apollo-mini", "apollo", None),
    "SCALE": ("scale-hidden", "scale", None),
    "Adafactor, no momentum": ("adafactor", "adafactor", None),
    "Adafactor, int8 momentum": ("adafactor", "adafactor-momentum", None),
    "RACS": ("racs", "racs", None),
    "APOLLO-Zero": ("apollo-zero", "adafactor-momentum", None),
    "the same, momentum 0.9": ("apollo-zero-momentum", "adafactor-momentum", None),
    "the same, in int8": ("apollo-zero-momentum-int8", "adafactor-momentum", None),
    "flattening everywhere": ("apollo-zero", "flattening", None),
}


def llama(config: LlamaConfig) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """A LLaMA's bfloat16 parameters, unstacked: kernels, embedding, head and norms."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    kernels = dict.fromkeys("qkvo", (hidden, hidden))
    kernels |= {"gate": (hidden, intermediate), "up": (hidden, intermediate)}
    kernels |= {"down": (intermediate, hidden)}
    shapes = {
        f"layer_{i}": kernels | {"attention_norm": (hidden,), "mlp_norm": (hidden,)}
        for i in range(config.num_layers)
    }
    shapes |= {
        "embed": {"embedding": (config.vocab_size, hidden)},
        "lm_head": {"kernel": (hidden, config.vocab_size)},
    }
    shapes |= {"norm": {"scale": (hidden,)}}
    return {
        module: {
            name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            for name, shape in leaves.items()
        }
        for module, leaves in shapes.items()
    }


def kernels_only(params: Any) -> Any:
    """GaLore's matrices; it would also project the embedding and the head."""
    numbers = optax.contrib.GaLoreDimensionNumbers()
    return {
        module: {
            name: numbers
            if module.startswith("layer_") and len(leaf.shape) == 2
            else None
            for name, leaf in leaves.items()
        }
        for module, leaves in params.items()
    }


def optimizers(
    rank: int, dtype: str
) -> dict[str, Callable[[], optax.GradientTransformation]]:
    return {
        "AdamW": lambda: optax.adamw(1e-3),  # Its moments have the parameters' dtype.
        "GaLore": lambda: optax.contrib.galore(
            1e-2, rank, weight_dimension_numbers=kernels_only
        ),
        "APOLLO": lambda: apollo_optax.apollo(1e-2, rank, moment_dtype=dtype),
        "APOLLO-Mini": lambda: apollo_optax.apollo_mini(1e-2, moment_dtype=dtype),
    }


def table(only_kernels: bool, dtype: str) -> str:
    names = list(optimizers(1, dtype))
    lines = [
        "| model | rank | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for model, rank in RANKS.items():
        params: Any = llama(preset(model.lower()))
        if only_kernels:
            params = {
                name: {k: v for k, v in layer.items() if len(v.shape) == 2}
                for name, layer in params.items()
                if name.startswith("layer_")
            }
        costs = [
            sum(apollo_optax.state_bytes(make(), params))
            for make in optimizers(rank, dtype).values()
        ]
        lines.append(
            f"| {model} | {rank} | " + " | ".join(f"{cost:,}" for cost in costs) + " |"
        )
    return "\n".join(lines)


def bytes_by_part(optimizer: str, rule: str, rank: int | None) -> dict[str, int]:
    """The state of LLaMA-7B's kernels, embedding and head in the LLaMA example."""
    config = preset("7b")
    options = RunOptions(
        out=Path("unused"),
        model="7b",
        optimizer=optimizer,
        embeddings=rule,
        rank=rank,
        moment_dtype="bfloat16",
    )
    tx, _ = make_optimizer(with_defaults(options, config), config)
    in_bfloat16 = Execution(param_dtype="bfloat16")
    params = jax.eval_shape(lambda: init_params(config, in_bfloat16, seed=0))
    state = jax.eval_shape(tx.init, params)
    parts: dict[str, int] = {"kernels": 0, "embedding": 0, "head": 0}
    owners = jax.tree.leaves(apollo_optax.state_owners(state, params))
    for owner, leaf in zip(owners, jax.tree.leaves(state), strict=True):
        part = {"embed/embedding": "embedding", "lm_head/kernel": "head"}.get(owner)
        if owner.startswith("layers/") and owner.endswith("/kernel"):
            part = "kernels"
        if part is not None:
            parts[part] += math.prod(leaf.shape) * leaf.dtype.itemsize
    return parts


def table_of_rules() -> str:
    names = ("rule", "`--optimizer`", "kernels", "`--embeddings`", "embedding", "head")
    lines = [
        "| " + " | ".join((*names, "together")) + " |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for label, (optimizer, rule, rank) in RULES.items():
        sizes = list(bytes_by_part(optimizer, rule, rank).values())
        kernels, *rest = (f"{size / 1e9:.4f}" for size in (*sizes, sum(sizes)))
        cells = (label, f"`{optimizer}`", kernels, f"`{rule}`", *rest)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    print(
        f"jax {jax.__version__}, optax {optax.__version__}, apollo-optax "
        f"{apollo_optax.__version__}"
    )
    print("bytes of optimizer state, bfloat16 parameters and moments\n")
    print("attention and MLP kernels:\n")
    print(table(only_kernels=True, dtype="bfloat16"))
    print("\nwhole model, embeddings, head and norms with Adam:\n")
    print(table(only_kernels=False, dtype="bfloat16"))
    print("\nGB of LLaMA-7B by optimizer, and by rule for embedding and head:\n")
    print(table_of_rules())


if __name__ == "__main__":
    main()
