"""The layer-wise step on a mesh of devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import (
    state_sharding,
)
from tests.layerwise_models import (
    NUMBERS,
    V,
    apollo,
    assert_agree,
    layer,
    wide_toy,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


SPECS = {
    "data": P(),
    # As in MaxText: all matrices over "fsdp", the hidden side also over "tensor".
    "fsdp": {
        "embed": {"embedding": P(None, "fsdp")},
        "layers": {
            "block": {"kernel": P(None, "fsdp", "tensor")},
            "scale": P(),
        },
        "norm": {"scale": P()},
        "lm_head": {"kernel": P("fsdp")},
    },
}
ACTIVATIONS = P(("data", "fsdp"))


def explicit(model):
    """The model with explicit shardings; weights are gathered where they are used."""
    whole = functools.partial(jax.sharding.reshard, out_shardings=P(None, None))

    def explicit_embed(params, batch):
        return (
            whole(params["embed"]["embedding"])
            .at[batch[:, :-1]]
            .get(out_sharding=ACTIVATIONS)
        )

    def explicit_layer(params, x, batch, constants):
        block = {"kernel": whole(params["block"]["kernel"])}
        return layer({**params, "block": block}, x, batch, constants)

    def explicit_head(params, x, batch):
        scores = jax.nn.log_softmax(
            x * params["norm"]["scale"] @ whole(params["lm_head"]["kernel"])
        )
        return -jnp.mean(jnp.sum(scores * (batch[:, 1:, None] == jnp.arange(V)), -1))

    return model._replace(
        embed=explicit_embed, layer=explicit_layer, head=explicit_head
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [(AxisType.Auto, "data"), (AxisType.Auto, "fsdp"), (AxisType.Explicit, "fsdp")],
)
@pytest.mark.usefixtures("x64")
def test_mesh_matches_one_device(kind, name):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    model, tx, steps = wide_toy(2, width=8), apollo(0.1), 3
    batch = np.random.default_rng(9).integers(0, V, (steps, 8, 4), dtype=np.int32)
    state = tx.init(model.params)
    step = jax.jit(model.step(tx))
    expected = model.params, state
    expected_metrics = metrics = None
    for rows in batch:
        *expected, expected_metrics = step(*expected, rows)

    specs = SPECS[name] if name == "fsdp" else jax.tree.map(lambda _: P(), model.params)
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )
    params = jax.device_put(model.params, places)
    state_places = state_sharding(state, params, weight_dimension_numbers=NUMBERS)
    actual = params, jax.device_put(state, state_places)
    placed = explicit(model) if kind == AxisType.Explicit else model
    out = (places, state_places, NamedSharding(mesh, P()))
    step = jax.jit(placed.step(tx), donate_argnums=(0, 1), out_shardings=out)
    data = jax.device_put(batch, NamedSharding(mesh, P(None, *ACTIVATIONS)))
    with jax.set_mesh(mesh):
        program = step.lower(*actual, data[0]).compile()
        for number in range(steps):
            *actual, metrics = step(*actual, data[number])
    assert_agree(jax.device_get(actual), jax.device_get(expected))
    np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-9)
    # Each device updates its shards in place, and no all-gather returns the weights of
    # more than one layer.
    stored = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(actual)
    )
    assert program.memory_analysis().alias_size_in_bytes == stored
    assert not re.search(r"= f64\[2,8,16\]\S* all-gather", program.as_text())
