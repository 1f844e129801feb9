"""The number of matrices that are updated at once: memory and compile time.

Without XLA's optimizations, the machine code is slower. The sizes of temporaries, the
loops and the kernels, which tests read from compiled programs, stay the same.
"""

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

from apollo_optax import (
    ApolloDimensionNumbers,
    _batching,
    _keys,
    apollo_mini,
    apollo_zero,
    scale_by_apollo,
)
from apollo_optax._dimension_numbers import matrix_axes
from apollo_optax._matrix import Matrix
from tests.helpers import normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

RANDOM = ["random", "rademacher"]
REPLICATED = P()
KERNEL = ApolloDimensionNumbers()


def on_mesh(array, devices=8, spec=REPLICATED, kind=AxisType.Auto):
    mesh = jax.make_mesh((devices,), ("x",), (kind,), devices=jax.devices()[:devices])
    return jax.device_put(array, NamedSharding(mesh, spec))


def leaf_of(gradient, numbers=KERNEL, rank=4):
    axes = matrix_axes(("w",), gradient.shape, numbers)
    matrix = Matrix.of_gradient(gradient, axes, jnp.float32, rank)
    shapes = matrix.projection_shape, matrix.moment_shape
    return _batching.Leaf(matrix, gradient, {}, _keys.leaf_id(("w",)), *shapes)


def temporaries(tx, params):
    """Bytes of the compiled step beside its arguments, which it updates in place."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    compiled = step.lower(params, tx.init(params), params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# ------------------------------------------------------------- leaves one by one


@pytest.mark.parametrize("projection", RANDOM)
def test_leaves_draw_the_same_together_and_alone(projection):
    """Bit for bit, in the first draw and later ones, with other leaves between."""
    gradients = {
        f"layer_{i}": normal(i, (8, 24) if i % 3 else (24, 8)) for i in range(10)
    }
    tx = scale_by_apollo(2, projection=projection, update_proj_gap=1)
    leaf = leaf_of(normal(0, (8, 24)), rank=2)
    room = leaf.gradient.nbytes - leaf.computed_nbytes
    # Several draws are needed for all leaves.
    assert leaf.drawn_nbytes <= room < len(gradients) * leaf.drawn_nbytes
    updates, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    # These are the first and the last leaf of each shape, which are drawn apart.
    for name in ("layer_1", "layer_8", "layer_0", "layer_9"):
        alone = {name: gradients[name]}
        expected, expected_state = jax.jit(tx.update)(alone, tx.init(alone))
        chex.assert_trees_all_equal(state.mu[name], expected_state.mu[name])
        chex.assert_trees_all_equal(updates[name], expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("projection", RANDOM)
def test_leaves_of_one_shape_share_the_drawing_loop(projection):
    """More leaves compile no more loops, unless memory limits need more draws."""

    def loops(leaves, shape, rank):
        gradients = {str(i): normal(0, shape) for i in range(leaves)}
        tx = scale_by_apollo(rank, projection=projection)
        compiled = jax.jit(tx.update).lower(gradients, tx.init(gradients)).compile()
        return compiled.as_text().count(" while(")

    assert loops(3, (32, 128), 1) == loops(9, (32, 128), 1)
    # Eleven to twenty leaves take two draws, the second of which may overlap the first.
    two_draws = loops(11, (64, 96), 8)
    assert two_draws == loops(15, (64, 96), 8) == loops(20, (64, 96), 8)
    assert loops(10, (64, 96), 8) < two_draws < loops(21, (64, 96), 8)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "jit",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["jit", "eager"],
)
def test_several_leaves_with_x64(dtype, jit):
    with jax.enable_x64(True):
        gradients = {str(i): jnp.asarray(normal(i, (8, 24)), dtype) for i in range(5)}
        tx = scale_by_apollo(2)
        update = jax.jit(tx.update) if jit else tx.update
        updates, _ = update(gradients, tx.init(gradients))
        for name in ("0", "4"):
            alone = {name: gradients[name]}
            expected, _ = update(alone, tx.init(alone))
            assert updates[name].dtype == dtype
            chex.assert_trees_all_equal(updates[name], expected[name])


def test_several_leaves_of_an_explicit_mesh_without_set_mesh():
    gradients = {str(i): normal(i, (16, 24)) for i in range(3)}
    tx = scale_by_apollo(4)
    expected, _ = tx.update(gradients, tx.init(gradients))
    gradients = {
        name: on_mesh(gradient, spec=P(None, "x"), kind=AxisType.Explicit)
        for name, gradient in gradients.items()
    }
    updates, _ = tx.update(gradients, tx.init(gradients))
    chex.assert_trees_all_close(
        jax.device_get(updates), jax.device_get(expected), rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "scale_type"), [(16, "channel"), (1, "tensor")])
def test_leaves_of_one_shape_share_their_kernels(rank, scale_type):
    """The kernels of leaves of one shape differ in no constant, so XLA compiles one."""

    def kernels(leaves):
        gradients = {str(i): normal(0, (64, 96)) for i in range(leaves)}
        tx = scale_by_apollo(rank, scale_type=scale_type)
        lowered = jax.jit(tx.update).lower(gradients, tx.init(gradients))
        text = lowered.compile().as_text()
        bodies = re.findall(
            r"^%(?:fused|wrapped)[^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL
        )
        names = r", metadata=\{.*?\}|(?<=%)[\w.-]+"
        return {re.sub(names, "", body) for body in bodies}

    few, many = kernels(12), kernels(24)
    assert len(few) > 5
    # Kernels for the group as a whole know how many leaves it has.
    assert len(many) <= len(few) + 5


def test_a_nan_does_not_hold_up_the_leaves_after_it():
    gradients = {str(i): normal(i, (8, 24)) for i in range(5)}
    broken = gradients | {"1": gradients["1"].at[0, 0].set(jnp.nan)}
    tx = scale_by_apollo(2)
    updates, _ = jax.jit(tx.update)(broken, tx.init(gradients))
    expected, _ = jax.jit(tx.update)(gradients, tx.init(gradients))
    assert jnp.isnan(updates.pop("1")).any()
    chex.assert_trees_all_equal(updates, {name: expected[name] for name in updates})


def with_one_fast(argvalues, fast):
    """Marks all parameters but one as slow."""
    return [
        values if values == fast else pytest.param(*values, marks=pytest.mark.slow)
        for values in argvalues
    ]


@pytest.mark.parametrize(
    ("limit", "projection", "rank", "scale_type"),
    with_one_fast(
        [
            (limit, projection, *scale)
            for limit in (1.01, None)
            for projection in RANDOM
            for scale in ((64, "channel"), (16, "tensor"), (1, "tensor"))
        ],
        fast=(1.01, "random", 64, "channel"),
    ),
)
def test_temporaries_of_separate_leaves(limit, projection, rank, scale_type):
    """At most twice the largest matrix: no gradient or update beside the weights."""
    shapes = [(256, 256), (256, 688), (688, 256)] * 4
    params = {str(i): normal(i, shape) for i, shape in enumerate(shapes)}
    tx = optax.chain(
        scale_by_apollo(
            rank, scale_type=scale_type, projection=projection, norm_growth_limit=limit
        ),
        optax.scale_by_learning_rate(0.1),
    )
    assert temporaries(tx, params) <= 2 * 4 * 256 * 688


# ------------------------------------------------------------- rows one by one


ROWS = [
    ((5, 8, 24), ApolloDimensionNumbers(1, 2)),
    ((24, 5, 8), ApolloDimensionNumbers(0, 2)),
    ((8, 24, 5), ApolloDimensionNumbers(0, 1)),
    ((5, 2, 8, 24), ApolloDimensionNumbers(2, 3)),
    ((5, 8, 4, 6), ApolloDimensionNumbers(1, (2, 3))),
]


# How a projection is made does not depend on where the axes of the rows are. So the
# default tests take each projection with one shape, and each shape with one projection.
@pytest.mark.parametrize(
    ("shape", "numbers", "projection"),
    [
        (*rows, projection)
        if rows is ROWS[0] or projection == "random"
        else pytest.param(*rows, projection, marks=pytest.mark.slow)
        for rows in ROWS
        for projection in (*RANDOM, "svd", jax.random.uniform)
    ],
)
def test_row_by_row_gives_the_result_of_all_at_once(shape, numbers, projection):
    """Eight devices that replicate the stack update its rows in one batch."""
    gradients = [normal(seed, shape) for seed in range(3)]
    assert leaf_of(gradients[0], numbers).is_by_rows
    assert not leaf_of(on_mesh(gradients[0]), numbers).is_by_rows
    tx = scale_by_apollo(
        4,
        projection=projection,
        weight_dimension_numbers=numbers,
        update_proj_gap=2,
    )
    at_once, by_rows = tx.init(on_mesh(gradients[0])), tx.init(gradients[0])
    for gradient in gradients:
        expected, at_once = tx.update(on_mesh(gradient), at_once)
        updates, by_rows = tx.update(gradient, by_rows)
        np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(
            jax.device_get(by_rows), jax.device_get(at_once), rtol=1e-4, atol=1e-5
        )


def test_a_stack_of_one_is_not_updated_by_rows():
    """Slices of a layer-wise step have one row, for which a loop saves nothing."""
    for layers, by_rows in ((1, False), (2, True)):
        gradient = normal(0, (layers, 64, 64))
        leaf = leaf_of(gradient, ApolloDimensionNumbers(1, 2), rank=40)
        assert leaf.is_by_rows == by_rows


@pytest.mark.parametrize(
    ("rank", "scale_type"),
    with_one_fast([(64, "channel"), (1, "tensor")], fast=(1, "tensor")),
)
def test_temporaries_of_a_stack(rank, scale_type):
    """At most twice the size of a row."""
    params = {name: normal(i, (12, 256, 688)) for i, name in enumerate(("gate", "up"))}
    tx = optax.chain(
        scale_by_apollo(
            rank,
            scale_type=scale_type,
            weight_dimension_numbers=ApolloDimensionNumbers(1, 2),
        ),
        optax.scale_by_learning_rate(0.1),
    )
    assert temporaries(tx, params) <= 2 * 4 * 256 * 688


# ------------------------------------------------------------- arrays on one device


def seen_devices(gradient, context=None, jit=True):
    """Whether an update of `gradient` treats it as an array on one device."""
    seen = []

    def update(gradient):
        seen.append(leaf_of(gradient).matrix.is_on_one_device)
        return gradient

    with context or jax.set_mesh(jax.sharding.get_mesh()):
        (jax.jit(update) if jit else update)(gradient)
    return seen[0]


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_an_array_on_one_of_eight_devices(jit):
    """An array on one device is updated as on a host that has no other."""
    assert jax.device_count() == 8
    single = normal(0, (8, 24))
    assert seen_devices(single, jit=jit)
    assert seen_devices(jax.device_put(single, jax.devices()[3]), jit=jit)
    assert seen_devices(on_mesh(single, devices=1), jit=jit)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "x")])
def test_an_array_on_a_mesh_of_eight(spec, kind, jit):
    assert not seen_devices(on_mesh(normal(0, (8, 24)), spec=spec, kind=kind), jit=jit)


def test_a_mesh_in_the_context_counts_if_the_type_has_none():
    """``jit`` with ``in_shardings`` may be lowered from shapes alone."""
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    sharding, seen = NamedSharding(mesh, P("x")), []

    def update(gradient):
        seen.append(leaf_of(gradient).matrix.is_on_one_device)
        return gradient

    abstract = jax.ShapeDtypeStruct((8, 24), jnp.float32)
    with jax.set_mesh(mesh):
        jax.jit(update, in_shardings=sharding).lower(abstract)
    assert seen == [False]


TPU = """
    import sys

    import jax, jax.numpy as jnp, optax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    import apollo_optax

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))

    def abstract(x):
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    name, stacked = sys.argv[1], sys.argv[2] == "stacked"
    shapes = [(1024, 1024), (1024, 2752), (2752, 1024)]
    shapes = [(4, *shape) for shape in shapes] if stacked else 2 * shapes
    zeros = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
    params = {str(i): abstract(leaf) for i, leaf in enumerate(zeros)}
    numbers = {"weight_dimension_numbers": apollo_optax.ApolloDimensionNumbers(-2, -1)}
    if name == "racs":
        tx = apollo_optax.racs(0.1, **numbers)
    else:
        tx = apollo_optax.apollo(0.1, int(name), **numbers)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.tree.map(abstract, jax.eval_shape(tx.init, params))
    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = jitted.lower(params, state, params).compile()
    print(compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
@pytest.mark.parametrize("name", ["1", "256", "racs"])
def test_temporaries_on_a_tpu(name, layout):
    """No float32 copy of a bfloat16 gradient, nor any update, is in memory.

    The name is the rank of APOLLO, or that of another optimizer.
    """
    pytest.importorskip("libtpu")
    environment = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # libtpu does not know the flags for CPUs of `quick_compilation`.
        "XLA_FLAGS": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TPU), name, layout],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    assert int(result.stdout.split()[-1]) <= 2 * 2 * 1024 * 2752


def test_keys_and_small_draws_need_no_loop_over_leaves():
    """On a GPU, launching the kernels of such a loop took longer than the update."""

    def loops(leaves):
        gradients = {str(i): normal(0, (32, 128)) for i in range(leaves)}
        tx = scale_by_apollo(1, scale_type="tensor")
        jaxpr = str(jax.make_jaxpr(tx.update)(gradients, tx.init(gradients)))
        return jaxpr.count(f"length={leaves}\n"), jaxpr.count("while[")

    assert loops(7)[0] == 0
    assert loops(7)[1] == loops(9)[1]


@pytest.mark.parametrize(
    "tx", [apollo_zero(0.1), apollo_zero(0.1, momentum=0.9), apollo_mini(0.1)]
)
def test_leaves_of_one_shape_may_be_on_different_devices(tx):
    gradients = {name: normal(seed, (64, 96)) for seed, name in enumerate("abc")}
    expected, _ = tx.update(gradients, tx.init(gradients), gradients)
    devices = dict(zip(gradients, jax.devices(), strict=False))
    placed = {name: jax.device_put(g, devices[name]) for name, g in gradients.items()}
    state = tx.init(placed)
    updates, _ = tx.update(placed, state, placed)
    for name, update in updates.items():
        assert update.devices() == {devices[name]}
    chex.assert_trees_all_close(jax.device_get(updates), expected, rtol=1e-5)
