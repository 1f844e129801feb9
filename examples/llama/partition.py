"""How parameters are sharded over the axes of the mesh, by one table of rules.

`tensor` shards attention by heads, the MLP by columns, and the vocabulary, as
Megatron-LM does (https://arxiv.org/abs/1909.08053). The outputs of attention and of the
MLP are summed over the devices. `fsdp` shards every matrix along the hidden size: a
device stores its shard, and the other shards are gathered when a layer is computed.
Without `tensor`, `fsdp` may shard either side. It shards the side of APOLLO's channels
if their number is divisible, so that each device projects whole channels and sends
norms only. `data` shards no parameter. `model.py` shards the activations.
"""

import math
import re
from typing import Any

import jax
import optax

import apollo_optax
from examples.llama.config import LlamaConfig
from examples.llama.lora import ADAPTERS
from examples.llama.mesh import axis_sizes, shard_count
from examples.llama.optimizers.parameters import KERNELS, dimension_numbers, path_name
from examples.llama.options import RunOptions, TrainingOptions
from examples.llama.run.errors import UsageError

# The keys are patterns of paths, of which the first match counts. The layer axis is
# never sharded, since a step takes the layers one by one.
PARTITION_RULES: tuple[tuple[str, jax.P], ...] = (
    (r"^embed/embedding$", jax.P("tensor", "fsdp")),  # (V, D)
    (
        r"^layers/.*/(q_proj|k_proj|v_proj)/kernel$",
        jax.P(None, "fsdp", "tensor"),
    ),  # (L, D, heads)
    (r"^layers/.*/(q_proj|k_proj|v_proj)/bias$", jax.P(None, "tensor")),  # (L, heads)
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
    """Returns a parameter's spec, by `PARTITION_RULES` or along APOLLO's channels.

    Args:
        name: the parameter's path.
        shape: the parameter's shape.
        mesh: the mesh of devices.
        parts: the number of indivisible parts per axis, such as groups of numbers with
            one scale; by default `shape`.
    """
    if adapter := re.search(ADAPTERS, name):
        layers, rows, columns = _rule_of(f"{adapter[1]}/kernel")
        # The axis of the rank is too short to be sharded.
        return jax.P(layers, *((rows, None) if adapter[2] == "a" else (None, columns)))
    spec = _rule_of(name)
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


def _rule_of(name: str) -> jax.P:
    return next(spec for rule, spec in PARTITION_RULES if re.search(rule, name))


def sharded_sizes(config: LlamaConfig) -> dict[str, dict[str, int]]:
    """Returns the sizes that each axis of the mesh has to divide, by their names."""
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
    """Raises `UsageError` for a model size that an axis of the mesh does not divide."""
    model = (
        f"`init_from` {options.init_from}"
        if options.init_from
        else f"`model` {options.model}"
    )
    for axis, parts in axis_sizes(options.mesh).items():
        sizes = sharded_sizes(config).get(axis, {})
        most = math.gcd(*sizes.values())
        for what, size in sizes.items():
            if size % parts:
                raise UsageError(
                    f"`mesh` {options.mesh} shards the {what} of {model}, {size}, over "
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

    They are the shardings of `apollo_optax.state_sharding`, with one exception. That
    function replicates state whose shape is not the parameter's, such as GaLore's
    moments and projections. If the parameter is sharded, such state of two or more axes
    is sharded along its last axis here.

    Args:
        options: the options of the run, which decide what is a matrix.
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
            or sharded_over(sharding)
        ):
            return sharding
        mesh, axes = parameter.sharding.mesh, sharded_over(parameter.sharding)
        for over in (axes, *((axis,) for axis in axes)):
            if leaf.shape[-1] % shard_count(mesh, over) == 0:
                return jax.sharding.NamedSharding(
                    mesh, jax.P(*[None] * (leaf.ndim - 1), over)
                )
        return sharding

    return jax.tree.map(place, state, shardings, owners)


def sharded_over(sharding: jax.sharding.NamedSharding) -> tuple[str, ...]:
    """Returns the axes of the mesh that an array is sharded over."""
    names = [
        name
        for entry in sharding.spec
        for name in (entry if isinstance(entry, tuple) else (entry,))
    ]
    return tuple(
        name for name in names if name is not None and sharding.mesh.shape[name] > 1
    )
