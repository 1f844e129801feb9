"""What an update costs: memory of the compiled step, draws compiled once; and order changes no number."""

import os
import re
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import ApolloDimensionNumbers, _schedule, scale_by_apollo
from apollo_optax._dimension_numbers import matrix_axes

RANDOM = ["random", "rademacher"]


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def one_device(array):
    """On a mesh of one device, which says in the type that there is no other."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return jax.device_put(array, NamedSharding(mesh, P()))


def temporaries(tx, params):
    """Bytes of the compiled step beside its arguments, which it updates in place."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# ---------------------------------------------------------------- one after the other


@pytest.mark.parametrize("projection", RANDOM)
def test_leaves_that_are_drawn_together_draw_what_they_do_alone(projection):
    """Bit for bit, in the first draw and in later ones; with leaves of other shapes between."""
    shapes = {f"layer_{i}": (8, 24) if i % 3 else (24, 8) for i in range(10)}
    gradients = {name: one_device(normal(shape, i)) for i, (name, shape) in enumerate(shapes.items())}
    tx = scale_by_apollo(2, projection=projection, update_proj_gap=1)
    of_projection, of_projected = _schedule.computed_bytes(
        matrix_axes(("w",), (8, 24), ApolloDimensionNumbers()), 2, jnp.float32
    )
    assert of_projection <= 4 * 8 * 24 - of_projected < len(shapes) * of_projection  # So not all at once.
    updates, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    for name, gradient in gradients.items():
        alone = {name: gradient}
        expected, expected_state = jax.jit(tx.update)(alone, tx.init(alone))
        chex.assert_trees_all_equal(state.mu[name], expected_state.mu[name])
        chex.assert_trees_all_equal(updates[name], expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("projection", RANDOM)
def test_leaves_of_one_shape_share_what_draws(projection):
    """The compiled step has no more loops for more leaves, as long as as few draws have memory for all."""

    def loops(leaves, shape, rank):
        gradients = {str(i): one_device(normal(shape)) for i in range(leaves)}
        tx = scale_by_apollo(rank, projection=projection)
        return jax.jit(tx.update).lower(gradients, tx.init(gradients)).compile().as_text().count(" while(")

    assert loops(3, (32, 128), 1) == loops(9, (32, 128), 1)
    # Eleven to twenty are drawn in two, the last of which may overlap with the first.
    assert loops(11, (64, 96), 8) == loops(15, (64, 96), 8) == loops(20, (64, 96), 8)
    assert loops(10, (64, 96), 8) < loops(11, (64, 96), 8) < loops(21, (64, 96), 8)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_several_leaves_with_x64(dtype, jit):
    with jax.enable_x64(True):
        gradients = {str(i): one_device(jnp.asarray(normal((8, 24), i), dtype)) for i in range(5)}
        tx = scale_by_apollo(2)
        update = jax.jit(tx.update) if jit else tx.update
        updates, _ = update(gradients, tx.init(gradients))
        for name, gradient in gradients.items():
            alone = {name: gradient}
            expected, _ = update(alone, tx.init(alone))
            assert updates[name].dtype == dtype
            chex.assert_trees_all_equal(updates[name], expected[name])


def test_several_leaves_of_an_explicit_mesh_without_set_mesh():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    on_mesh = NamedSharding(mesh, P(None, "x"))
    gradients = {str(i): normal((16, 24), i) for i in range(3)}
    tx = scale_by_apollo(4)
    expected, _ = tx.update(gradients, tx.init(gradients))
    gradients = jax.device_put(gradients, on_mesh)
    updates, _ = tx.update(gradients, tx.init(gradients))
    chex.assert_trees_all_close(jax.device_get(updates), jax.device_get(expected), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "scale_type"), [(16, "channel"), (1, "tensor")])
def test_leaves_of_one_shape_share_their_kernels(rank, scale_type):
    """What is compiled for leaves of one shape differs in no constant, so it is compiled once."""

    def kernels(leaves):
        gradients = {str(i): one_device(normal((64, 96))) for i in range(leaves)}
        tx = scale_by_apollo(rank, scale_type=scale_type)
        compiled = jax.jit(tx.update).lower(gradients, tx.init(gradients)).compile().as_text()
        bodies = re.findall(r"^%(?:fused|wrapped)[^\n]*\{\n(.*?)^\}", compiled, re.MULTILINE | re.DOTALL)
        return {re.sub(r", metadata=\{.*?\}|(?<=%)[\w.-]+", "", body) for body in bodies}

    few, many = kernels(12), kernels(24)
    assert len(few) > 5
    assert len(many) <= len(few) + 5  # What is for the group as a whole knows how many it has.


def test_a_nan_does_not_hold_up_the_leaves_after_it():
    gradients = {str(i): one_device(normal((8, 24), i)) for i in range(5)}
    broken = gradients | {"1": gradients["1"].at[0, 0].set(jnp.nan)}
    tx = scale_by_apollo(2)
    updates, _ = jax.jit(tx.update)(broken, tx.init(gradients))
    expected, _ = jax.jit(tx.update)(gradients, tx.init(gradients))
    assert jnp.isnan(updates.pop("1")).any()
    chex.assert_trees_all_equal(updates, {name: expected[name] for name in updates})


@pytest.mark.parametrize(("rank", "scale_type"), [(64, "channel"), (16, "tensor"), (1, "tensor")])
@pytest.mark.parametrize("projection", RANDOM)
@pytest.mark.parametrize("limit", [1.01, None])
def test_temporaries_of_separate_leaves(rank, scale_type, projection, limit):
    """At most twice the largest matrix: no gradient or update beside the weights."""
    shapes = [(256, 256), (256, 688), (688, 256)] * 4
    params = {str(i): one_device(normal(shape, i)) for i, shape in enumerate(shapes)}
    tx = optax.chain(
        scale_by_apollo(rank, scale_type=scale_type, projection=projection, norm_growth_limit=limit),
        optax.scale_by_learning_rate(0.1),
    )
    assert temporaries(tx, params) <= 2 * 4 * 256 * 688


# ---------------------------------------------------------------- row by row


@pytest.mark.parametrize("projection", [*RANDOM, "svd", lambda key, shape: jax.random.uniform(key, shape)])
@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((5, 8, 24), ApolloDimensionNumbers(1, 2)),
        ((24, 5, 8), ApolloDimensionNumbers(0, 2)),
        ((8, 24, 5), ApolloDimensionNumbers(0, 1)),
        ((5, 2, 8, 24), ApolloDimensionNumbers(2, 3)),
        ((5, 8, 4, 6), ApolloDimensionNumbers(1, (2, 3))),
    ],
)
def test_by_rows_is_all_at_once(shape, numbers, projection):
    gradients = [normal(shape, seed) for seed in range(3)]
    axes = matrix_axes(("w",), shape, numbers)
    assert _schedule.is_by_rows(axes, 4, one_device(gradients[0]), jnp.float32)
    assert not _schedule.is_by_rows(axes, 4, gradients[0], jnp.float32)  # The tests have eight devices.
    tx = scale_by_apollo(4, projection=projection, weight_dimension_numbers=numbers, update_proj_gap=2)
    at_once, by_rows = tx.init(gradients[0]), tx.init(one_device(gradients[0]))
    for gradient in gradients:
        expected, at_once = tx.update(gradient, at_once)
        updates, by_rows = tx.update(one_device(gradient), by_rows)
        np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(jax.device_get(by_rows), jax.device_get(at_once), rtol=1e-4, atol=1e-5)


def test_a_stack_of_one_is_not_taken_by_rows():
    """A layer-wise step's slices: a loop of one row saves nothing."""
    numbers = ApolloDimensionNumbers(1, 2)
    for layers, by_rows in ((1, False), (2, True)):
        gradient = one_device(normal((layers, 64, 64)))
        axes = matrix_axes(("w",), gradient.shape, numbers)
        assert _schedule.is_by_rows(axes, 40, gradient, jnp.float32) == by_rows


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_not_by_rows_on_a_mesh(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    gradient = jax.device_put(normal((8, 8, 24)), NamedSharding(mesh, P("x")))
    axes = matrix_axes(("w",), gradient.shape, ApolloDimensionNumbers(1, 2))
    assert not _schedule.is_by_rows(axes, 4, gradient, jnp.float32)


@pytest.mark.parametrize(("rank", "scale_type"), [(64, "channel"), (1, "tensor")])
def test_temporaries_of_a_stack(rank, scale_type):
    """At most two rows' worth."""
    params = {name: one_device(normal((12, 256, 688), i)) for i, name in enumerate(("gate", "up"))}
    tx = optax.chain(
        scale_by_apollo(rank, scale_type=scale_type, weight_dimension_numbers=ApolloDimensionNumbers(1, 2)),
        optax.scale_by_learning_rate(0.1),
    )
    assert temporaries(tx, params) <= 2 * 4 * 256 * 688


TPU = """
    import sys

    import jax, jax.numpy as jnp, optax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    import apollo_optax

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    rank, stacked = int(sys.argv[1]), sys.argv[2] == "stacked"
    shapes = [(1024, 1024), (1024, 2752), (2752, 1024)]
    shapes = [(4, *shape) for shape in shapes] if stacked else 2 * shapes
    params = {str(i): abstract(jnp.zeros(shape, jnp.bfloat16)) for i, shape in enumerate(shapes)}
    tx = apollo_optax.apollo(
        0.1, rank, weight_dimension_numbers=apollo_optax.ApolloDimensionNumbers(-2, -1)
    )

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.tree.map(abstract, jax.eval_shape(tx.init, params))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    print(compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
@pytest.mark.parametrize("rank", [1, 256])
def test_temporaries_on_a_tpu(rank, layout):
    """Of bfloat16 gradients there is no float32 copy, nor of the update any."""
    pytest.importorskip("libtpu")
    environment = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TPU), str(rank), layout],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    assert int(result.stdout.split()[-1]) <= 2 * 2 * 1024 * 2752


def test_keys_and_small_draws_take_no_loop_over_leaves():
    """A GPU launches each iteration's kernels anew, which took longer than the update."""

    def lengths(leaves):
        gradients = {str(i): one_device(normal((32, 128))) for i in range(leaves)}
        tx = scale_by_apollo(1, scale_type="tensor")
        jaxpr = str(jax.make_jaxpr(tx.update)(gradients, tx.init(gradients)))
        return jaxpr.count(f"length={leaves}\n"), jaxpr.count("while[")

    assert lengths(7)[0] == 0
    assert lengths(7)[1] == lengths(9)[1]
