"""How parameters are sharded over the axes of the mesh, by one table of rules.

`tensor` cuts attention by heads, the MLP by columns and the vocabulary, as Megatron-LM
does (https://arxiv.org/abs/1909.08053): what comes back to the hidden size is summed
over the devices, once after attention and once after the MLP. `fsdp` cuts every matrix
along the hidden size: a device keeps its part, and is sent the rest when a layer is
computed. Without `tensor` that can be any side, and is that of APOLLO's channels where
it divides: then each device projects whole channels of a layer's matrices, and sends
norms alone. `data` cuts no parameter. Activations are cut in `model.py`.
"""

import math
import re
from typing import Any

import jax
import optax

import apollo_optax
from examples.llama.config import LlamaConfig
from examples.llama.mesh import axis_sizes, ways
from examples.llama.optimizers import KERNELS, dimension_numbers, path_name
from examples.llama.options import RunOptions, TrainingOptions
from examples.llama.usage import UsageError

# The keys are patterns of paths, of which the first match counts. The layer axis is
# never sharded, since a step takes the layers one by one.
PARTITION_RULES: tuple[tuple[str, jax.P], ...] = (
    (r"^embed/embedding$", jax.P("tensor", "fsdp")),  # (V, D)
    (
        r"^layers/.*/(q_proj|k_proj|v_proj)/kernel$",
        jax.P(None, "fsdp", "tensor"),
    ),  # (L, D, heads)
    (r"^layers/.*/o_proj/kernel$", jax.P(None, "tensor", "fsdp")),  # (L, heads, D)
    (
        r"^layers/.*/(gate_proj|up_proj)/kernel$",
        jax.P(None, "fsdp", "tensor"),
    ),  # (L, D, F)
    (r"^layers/.*/down_proj/kernel$", jax.P(None, "tensor", "fsdp")),  # (L, F, D)
    (r"^lm_head/kernel$", jax.P("fsdp", "tensor")),  # (D, V)
    (r"norm/scale$", jax.P()),
)


def spec_of(
    name: str,
    shape: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    parts: tuple[int, ...] | None = None,
) -> jax.P:
    """Returns how a parameter is cut: by `PARTITION_RULES`, or along APOLLO's channels.

    Args:
        name: its path.
        shape: its shape.
        mesh: the devices.
        parts: how many parts an axis has that stay whole, such as groups of numbers
            with one scale; by default `shape`.
    """
    spec = next(spec for rule, spec in PARTITION_RULES if re.search(rule, name))
    # If `fsdp` and `tensor` shared a side, XLA would gather the shards of `tensor` too,
    # where `data` has as many devices.
    if not re.search(KERNELS, name) or mesh.shape["tensor"] > 1:
        return spec
    # apollo_optax's channels are along the larger side, or the outputs if both are
    # equal.
    channels = 1 if shape[1] > shape[2] else 2
    if spec[channels] == "fsdp" or (parts or shape)[channels] % mesh.shape["fsdp"]:
        return spec
    layers, rows, columns = spec
    return jax.P(layers, columns, rows)


def cut_sizes(config: LlamaConfig) -> dict[str, dict[str, int]]:
    """Returns the sizes that each axis of the mesh has to divide, by what they are."""
    return {
        "fsdp": {"hidden size": config.hidden_size},
        "tensor": {
            "number of heads": config.num_heads,
            "number of key and value heads": config.num_kv_heads,
            "feed-forward size": config.intermediate_size,
            "vocabulary": config.vocab_size,
        },
    }


def check_sizes(options: TrainingOptions, config: LlamaConfig) -> None:
    """Raises `UsageError` for a model size that an axis of --mesh does not divide."""
    model = (
        f"--init-from {options.init_from}"
        if options.init_from
        else f"--model {options.model}"
    )
    for axis, parts in axis_sizes(options.mesh).items():
        cut = cut_sizes(config).get(axis, {})
        most = math.gcd(*cut.values())
        for what, size in cut.items():
            if size % parts:
                raise UsageError(
                    f"--mesh {options.mesh} cuts the {what} of {model}, {size}, over "
                    f"{axis}={parts}, which does not divide it; give {axis}={most}"
                    + (" or a divisor of it" if most > 1 else "")
                )


def parameter_shardings(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the sharding of every parameter, of arrays or shapes, by `spec_of`."""

    def place(path: tuple[Any, ...], leaf: Any) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(
            mesh, spec_of(path_name(path), leaf.shape, mesh)
        )

    return jax.tree_util.tree_map_with_path(place, params)


def state_shardings(options: RunOptions, state: optax.OptState, params: Any) -> Any:
    """Returns the sharding of every leaf of the state of any optimizer.

    They are those of `apollo_optax.state_sharding`. What that leaves whole though it is
    a matrix or more of a parameter that is cut, as GaLore's moments and projections
    are, is cut along its last axis.

    Args:
        options: of the run, which say what is a matrix.
        state: shapes, from `jax.eval_shape(tx.init, params)`.
        params: shapes with shardings.
    """
    numbers = dimension_numbers(options)
    shardings = apollo_optax.state_sharding(
        state, params, weight_dimension_numbers=numbers
    )
    owners = apollo_optax.state_owners(state, params)
    parameters = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def place(leaf: Any, sharding: jax.sharding.NamedSharding, owner: str) -> Any:
        parameter = parameters.get(owner)
        if (
            parameter is None
            or leaf.ndim < 2
            or leaf.shape == parameter.shape
            or cuts(sharding)
        ):
            return sharding
        mesh, axes = parameter.sharding.mesh, cuts(parameter.sharding)
        for cut in (axes, *((axis,) for axis in axes)):
            if leaf.shape[-1] % ways(mesh, cut) == 0:
                return jax.sharding.NamedSharding(
                    mesh, jax.P(*[None] * (leaf.ndim - 1), cut)
                )
        return sharding

    return jax.tree.map(place, state, shardings, owners)


def cuts(sharding: jax.sharding.NamedSharding) -> tuple[str, ...]:
    """Returns the axes of the mesh that cut an array."""
    names = [
        name
        for entry in sharding.spec
        for name in (entry if isinstance(entry, tuple) else (entry,))
    ]
    return tuple(
        name for name in names if name is not None and sharding.mesh.shape[name] > 1
    )
