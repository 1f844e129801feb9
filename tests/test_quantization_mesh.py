"""Quantized arrays and their updates on a mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import _quantization
from apollo_optax._quantization import apply_updates_stochastic, dequantize, quantize
from tests.helpers import make_mesh
from tests.quantized_values import normal

pytestmark = pytest.mark.usefixtures("quick_compilation")
KINDS = [AxisType.Auto, AxisType.Explicit]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "spec", "axis"),
    [
        ((128, 64), P(None, "model"), -2),
        ((256, 64), P("data"), -2),  # Each shard is one group.
        ((256, 64), P("model"), -1),  # Each shard is half a group.
        ((11008, 8), P("data", "model"), -2),
        ((11008, 8), P("model", "data"), -2),  # Both axes are split in a group.
        ((11008, 8), P("model"), -1),
        ((11008, 256), P("model", "data"), -1),
        ((2, 256, 64), P("data", "model"), -1),
        ((2, 128, 64), P("data", None, "model"), -2),
    ],
)
def test_default_axis_has_whole_groups_per_shard(kind, shape, spec, axis):
    placed = jax.device_put(
        np.zeros(shape, np.float32), NamedSharding(make_mesh(kind), spec)
    )
    assert _quantization._default_axis(placed, 128) == axis
    if kind == AxisType.Explicit:
        seen = []
        jax.eval_shape(
            lambda x: seen.append(_quantization._default_axis(x, 128)), placed
        )
        assert seen == [axis]


@pytest.mark.parametrize(
    ("kind", "shape", "spec", "codes_spec", "transform"),
    [
        (AxisType.Auto, (4, 64, 8), P("data", "model"), P("data", "model"), jax.jit),
        (
            AxisType.Explicit,
            (4, 64, 8),
            P(None, "model", "data"),
            P(None, "model", None, None, "data"),
            jax.jit,
        ),
        (AxisType.Explicit, (40, 40), P("model"), P("model"), lambda apply: apply),
    ],
    ids=["automatic", "explicit", "explicit, eager"],
)
def test_mesh_matches_one_device(kind, shape, spec, codes_spec, transform):
    mesh = make_mesh(kind)
    sharding, codes_sharding = (
        NamedSharding(mesh, spec),
        NamedSharding(mesh, codes_spec),
    )

    def assert_in_place(quantized):
        assert quantized.qvalue.sharding.is_equivalent_to(
            codes_sharding, quantized.qvalue.ndim
        )
        for leaf in (quantized.scale, quantized.zero_point):
            assert leaf.sharding.is_equivalent_to(sharding, len(shape))

    array, update = normal(0, shape), 0.01 * normal(1, shape)
    placed, bfloat16, placed_update = jax.device_put(
        (array, array.astype(jnp.bfloat16), update), sharding
    )
    quantized = quantize(placed, group_size=16, key=jax.random.key(0))
    assert quantized.axis == (-1 if spec == P("model") else -2)
    expected = quantize(
        array, axis=quantized.axis, group_size=16, key=jax.random.key(0)
    )
    chex.assert_trees_all_equal(jax.device_get(quantized), jax.device_get(expected))
    assert_in_place(quantized)
    assert dequantize(quantized).sharding.is_equivalent_to(sharding, len(shape))
    params = {"int8": quantized, "bfloat16": bfloat16}
    updates = {"int8": placed_update, "bfloat16": placed_update}
    with jax.set_mesh(mesh):
        moved = transform(apply_updates_stochastic)(params, updates, jax.random.key(1))
    assert_in_place(moved["int8"])
    assert moved["bfloat16"].sharding.is_equivalent_to(sharding, len(shape))
    alone = jax.device_get((params, updates))
    expected = apply_updates_stochastic(*alone, jax.random.key(1))
    chex.assert_trees_all_equal(jax.device_get(moved), jax.device_get(expected))
