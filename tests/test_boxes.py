"""The state in Flax's boxes, from which frameworks read its sharding."""

import functools
import math
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.linen.spmd import logical_to_mesh_axes, logical_to_mesh_sharding
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax
from apollo_optax import ApolloDimensionNumbers, dimension_numbers_by_path
from tests.helpers import assert_close, every_axis_type, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

STACKED = ApolloDimensionNumbers(1, 2)
NUMBERS = dimension_numbers_by_path([(r"layers/.*kernel", STACKED)])
RULES = (("embed", "fsdp"), ("mlp", "tensor"), ("vocab", None), ("layers", None))

# A parameter per line: its shape and the names of its axes, on a mesh or logical.
ON_MESH = {
    "embed": {"embedding": ((48, 16), (None, "fsdp"))},
    "up": {"kernel": ((16, 32), ("fsdp", "tensor")), "bias": ((32,), ("tensor",))},
    "down": {"kernel": ((32, 16), ("tensor", "fsdp"))},
    "layers": {"up": {"kernel": ((3, 16, 32), (None, "fsdp", "tensor"))}},
}
LOGICAL = {
    "embed": {"embedding": ((48, 16), ("vocab", "embed"))},
    "up": {"kernel": ((16, 32), ("embed", "mlp")), "bias": ((32,), ("mlp",))},
    "down": {"kernel": ((32, 16), ("mlp", "embed"))},
    "layers": {"up": {"kernel": ((3, 16, 32), ("layers", "embed", "mlp"))}},
}
OPTIMIZERS: dict[str, Any] = {
    "apollo": functools.partial(apollo_optax.apollo, rank=8),
    "svd": functools.partial(apollo_optax.apollo, rank=8, projection="svd"),
    "apollo_mini": apollo_optax.apollo_mini,
    # Without momentum, APOLLO-Zero has no state that could be sharded.
    "apollo_zero": functools.partial(apollo_optax.apollo_zero, momentum=0.9),
    "int8": functools.partial(
        apollo_optax.apollo_zero, momentum=0.9, int8_momentum=True
    ),
    "racs": apollo_optax.racs,
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_box = pytest.mark.parametrize("make_box", ["linen", "nnx"])


def make_mesh(axis_type=AxisType.Auto, fsdp=4, tensor=2):
    return jax.make_mesh(
        (fsdp, tensor), ("fsdp", "tensor"), axis_types=(axis_type,) * 2
    )


def is_layout(x):
    return isinstance(x, tuple)


def is_box(x):
    return isinstance(x, (nnx.Variable, nn.Partitioned))


def boxed_params(kind, layout, mesh=None, rules=None) -> Any:
    """Parameters in boxes of Linen or NNX, on `mesh` if it is given."""

    def box(entry):
        shape, names = entry
        value = normal(0, shape)
        if mesh is not None:
            by_name = dict(rules or ())
            spec = P(*(by_name.get(name, name) for name in names))
            value = jax.device_put(value, NamedSharding(mesh, spec))
        if kind == "nnx":
            more = {"sharding_rules": rules} if rules else {}
            return nnx.Param(value, out_sharding=names, eager_sharding=False, **more)
        if rules:
            return nn.LogicallyPartitioned(value, names, rules=rules)
        return nn.Partitioned(value, names)

    params = jax.tree.map(box, layout, is_leaf=is_layout)
    return nnx.State(params) if kind == "nnx" else params


def specs_of(tree, rules=None) -> Any:
    """The specs that a framework reads off boxes, as leaves of the unboxed tree."""
    get = nnx.get_partition_spec if has_variables(tree) else nn.get_partition_spec
    specs = jax.tree.leaves(get(tree), is_leaf=lambda x: isinstance(x, P))
    if rules and not has_variables(tree):
        specs = [logical_to_mesh_axes(tuple(spec), rules) for spec in specs]
    return specs


def has_variables(tree):
    leaves = jax.tree.leaves(tree, is_leaf=is_box)
    return any(isinstance(leaf, nnx.Variable) for leaf in leaves)


def shards(array, spec, mesh):
    """How many different shards of an array there are."""
    shard = NamedSharding(mesh, spec or P()).shard_shape(array.shape)
    return math.prod(array.shape) // math.prod(shard)


def device_bytes(arrays, specs, mesh):
    return sum(
        array.nbytes // shards(array, spec, mesh)
        for array, spec in zip(arrays, specs, strict=True)
    )


@every_optimizer
@every_box
@every_axis_type
@pytest.mark.parametrize("layout", ["mesh names", "logical names"])
def test_moments_are_sharded_as_far_as_state_sharding_does(
    layout, axis_type, make_box, name
):
    mesh, rules = make_mesh(axis_type), RULES if layout == "logical names" else None
    named = LOGICAL if rules else ON_MESH
    tx = OPTIMIZERS[name](0.1, weight_dimension_numbers=NUMBERS)
    with jax.set_mesh(mesh):
        params = boxed_params(make_box, named, mesh, rules)
        state = tx.init(params)
    leaves = jax.tree.leaves(state)
    specs = specs_of(state, rules)
    assert len(specs) == len(leaves)
    expected = apollo_optax.state_sharding(
        state, params, weight_dimension_numbers=NUMBERS
    )
    ours = device_bytes(leaves, specs, mesh)
    best = device_bytes(leaves, [s.spec for s in jax.tree.leaves(expected)], mesh)
    assert ours <= 1.1 * best
    # The arrays are where their boxes say.
    for leaf, spec in zip(leaves, specs, strict=True):
        told = NamedSharding(mesh, spec or P())
        assert leaf.sharding.is_equivalent_to(told, leaf.ndim)


class Model(nnx.Module):
    def __init__(self, rngs):
        def part(*names):
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)

        self.embed = nnx.Embed(256, 64, embedding_init=part(None, "fsdp"), rngs=rngs)
        self.up = nnx.Linear(64, 128, kernel_init=part("fsdp", None), rngs=rngs)


@every_axis_type
@pytest.mark.parametrize(
    "make",
    [apollo_optax.apollo_mini, functools.partial(apollo_optax.apollo, rank=8)],
    ids=["apollo_mini", "apollo"],
)
def test_an_nnx_optimizer_shards_at_least_as_adamw(axis_type, make):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(axis_type,))
    smallest = {}
    with jax.set_mesh(mesh):
        model = nnx.jit(Model)(nnx.Rngs(0))
        for name, tx in {"adamw": optax.adamw(1e-3), "ours": make(1e-2)}.items():
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            state = nnx.state(optimizer, nnx.optimizer.OptState)
            arrays, specs = jax.tree.leaves(state), specs_of(state)
            matrices = [
                shards(array, spec, mesh)
                for array, spec in zip(arrays, specs, strict=True)
                if array.ndim >= 2
            ]
            assert len(matrices) == 4
            smallest[name] = min(matrices)
    assert smallest["ours"] >= smallest["adamw"] == 8


def mu_of(params, rank=8, numbers=None) -> Any:
    tx: Any = apollo_optax.scale_by_apollo(rank, weight_dimension_numbers=numbers)
    return tx.init(params).mu


@pytest.mark.parametrize(
    ("names", "shape", "rank", "moved"),
    [
        (("fsdp", None), (16, 32), 8, (None, "fsdp")),
        (("fsdp",), (16, 32), 8, (None, "fsdp")),  # Shorter than the shape.
        (("fsdp", "tensor"), (16, 32), 8, (None, ("tensor", "fsdp"))),
        ((("fsdp", "tensor"), None), (16, 32), 8, (None, ("fsdp", "tensor"))),
        (("fsdp", None), (16, 31), 8, ("fsdp", None)),  # The channels don't divide.
        (("fsdp", None), (16, 31), 1, (None, None)),
        (("fsdp", "fsdp"), (16, 32), 8, (None, "fsdp")),
        (("unknown", "tensor"), (16, 32), 8, (None, "tensor")),
        (
            ("fsdp", "single"),
            (16, 32),
            8,
            (None, "fsdp"),
        ),  # A mesh axis of one device shards nothing.
    ],
)
@every_box
def test_names_move_like_mesh_axes(make_box, names, shape, rank, moved):
    params = boxed_params(make_box, {"w": {"kernel": (shape, names)}})
    with jax.set_mesh(make_mesh()):
        mu = mu_of(params, rank)
    assert specs_of(mu) == [P(*moved)]


@every_box
def test_names_stay_where_no_mesh_is_known(make_box):
    layout = {"w": {"kernel": ((16, 32), ("fsdp", "tensor"))}}
    with pytest.warns(UserWarning, match="sharded over fsdp will be replicated.*mesh"):
        mu = mu_of(boxed_params(make_box, layout))
    assert specs_of(mu) == [P(None, "tensor")]


@every_box
@pytest.mark.filterwarnings("error")
def test_names_that_need_not_move_stay_where_no_mesh_is_known(make_box):
    layout = {"w": {"kernel": ((16, 32), (None, ("fsdp", "tensor")))}}
    mu = mu_of(boxed_params(make_box, layout))
    assert specs_of(mu) == [P(None, ("fsdp", "tensor"))]


@every_box
def test_axes_that_the_compiler_shards_have_no_name(make_box):
    layout = {"w": {"kernel": ((16, 32), (P.UNCONSTRAINED, "tensor"))}}
    with jax.set_mesh(make_mesh()):
        mu = mu_of(boxed_params(make_box, layout))
    assert specs_of(mu) == [P(None, "tensor")]


# Two names may share a mesh axis, and a name may have several rules, as in MaxText.
SEVERAL_RULES = (("mlp", ("tensor",)), ("embed", ("fsdp", "tensor")), ("embed", "fsdp"))
SHARED_AXIS = (("embed", "fsdp"), ("mlp", "fsdp"))


@pytest.mark.parametrize(
    ("rules", "shape", "expected"),
    [
        (SEVERAL_RULES, (16, 32), P(None, ("tensor", "fsdp"))),
        (SHARED_AXIS, (16, 32), P(None, "fsdp")),
        # The channels don't divide, so no name is left.
        (SHARED_AXIS, (16, 31), P(None, None)),
    ],
)
def test_linens_rules_give_a_mesh_axis_to_one_name_only(rules, shape, expected):
    names = ("embed", "mlp")
    kernel = nn.LogicallyPartitioned(normal(0, shape), names, rules=rules)
    with jax.set_mesh(make_mesh()):
        mu = mu_of({"kernel": kernel}, rank=1)
    assert specs_of(mu, rules) == [expected]
    specs = nn.get_partition_spec(mu)
    shardings = logical_to_mesh_sharding(specs, make_mesh(), rules)
    jax.device_put(nn.unbox(mu), shardings)


def test_nnxs_rules_give_a_name_its_last_rule():
    variable = nnx.Param(
        normal(0, (16, 32)),
        out_sharding=("embed", "mlp"),
        sharding_rules=SEVERAL_RULES,
        eager_sharding=False,
    )
    with jax.set_mesh(make_mesh()):
        mu = mu_of(nnx.State({"kernel": variable}))
    assert specs_of(mu) == [P(None, ("tensor", "fsdp"))]


@every_box
def test_names_under_jit_are_those_of_eager_parameters(make_box):
    """The mesh of the parameters counts, also where no mesh is in context."""
    layout = {"w": {"kernel": ((16, 32), ("fsdp", None))}}
    params = boxed_params(make_box, layout, make_mesh())
    assert specs_of(mu_of(params)) == [P(None, "fsdp")]
    assert specs_of(jax.jit(mu_of)(params)) == [P(None, "fsdp")]
    assert specs_of(jax.eval_shape(mu_of, params)) == [P(None, "fsdp")]


@every_box
def test_rules_of_the_context_are_read(make_box):
    layout = {"w": {"kernel": ((16, 32), ("embed", None))}}
    params = boxed_params(make_box, layout)
    with jax.set_mesh(make_mesh()), nn.logical_axis_rules(RULES):
        assert specs_of(mu_of(params)) in ([P(None, "embed")], [P(None, "fsdp")])
    with jax.set_mesh(make_mesh()):
        assert specs_of(mu_of(params)) == [P(None, None)]


def test_the_mesh_of_a_box_is_read():
    value, names = jnp.ones((16, 32)), ("fsdp", None)
    linen = nn.Partitioned(value, names, mesh=make_mesh())
    assert mu_of({"kernel": linen})["kernel"].names == (None, "fsdp")
    variable = nnx.Param(
        value, out_sharding=names, mesh=make_mesh(), eager_sharding=False
    )
    moment = mu_of(nnx.State({"kernel": variable}))["kernel"]
    assert moment.get_metadata()["out_sharding"] == (None, "fsdp")


def test_sharding_for_the_optimizer_only_is_moved_too():
    variable = nnx.Param(
        jnp.ones((16, 32)),
        out_sharding=(None, None),
        optimizer_sharding=("fsdp", None),
        eager_sharding=False,
    )
    with jax.set_mesh(make_mesh()):
        state = mu_of(nnx.State({"kernel": variable}))
        moment: Any = nnx.optimizer.to_opt_state(state)["kernel"]
    assert moment.get_metadata()["out_sharding"] == (None, "fsdp")


def test_names_of_older_releases_do_not_come_back():
    """Some trainers set both keys, and NNX's optimizer takes the older one."""
    with jax.set_mesh(make_mesh()):
        variable = nnx.Param(
            jnp.ones((16, 32)), out_sharding=("fsdp", None), eager_sharding=False
        )
        variable._var_metadata["sharding_names"] = ("fsdp", None)
        moment = mu_of(nnx.State({"kernel": variable}))["kernel"]
    metadata = moment.get_metadata()
    assert metadata["out_sharding"] == (None, "fsdp")
    assert metadata["sharding_names"] == (None, "fsdp")


def test_a_logical_name_that_moves_stays_logical():
    mesh = jax.make_mesh((8, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    kernel = nn.LogicallyPartitioned(jnp.ones((16, 32)), ("embed", "mlp"), rules=RULES)
    with jax.set_mesh(mesh):
        assert mu_of({"kernel": kernel})["kernel"].names == (None, "embed")


@every_box
def test_norms_scalars_and_parameters_without_names_get_no_box(make_box):
    layout = {
        "layers": {"up": {"kernel": ((3, 16, 32), ("tensor", "fsdp", None))}},
        "plain": {"kernel": ((16, 32), ()), "bias": ((32,), (None,))},
    }
    tx: Any = apollo_optax.scale_by_apollo(4, weight_dimension_numbers=NUMBERS)
    with jax.set_mesh(make_mesh()):
        state = tx.init(boxed_params(make_box, layout))
    found = jax.tree.leaves(state, is_leaf=is_box)
    assert sum(map(is_box, found)) == 2  # Both moments of the stack.
    assert not any(map(is_box, jax.tree.leaves(state.norm, is_leaf=is_box)))


# A state in boxes trains and is restored like any other.


def train(tx, params, steps=2) -> Any:
    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda x: jnp.sin(3 * x), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def kernels_only(params):
    return jax.tree.map_with_path(
        lambda path, _: "kernel" in jax.tree_util.keystr(path), params
    )


PIPELINES: dict[str, Any] = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "masked": lambda tx: optax.masked(tx, kernels_only),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": lambda _: optax.inject_hyperparams(
        apollo_optax.apollo, static_args=apollo_optax.static_args(apollo_optax.apollo)
    )(0.1, rank=8, weight_dimension_numbers=NUMBERS),
}


# These three wrap a transformation as MultiSteps does, which is tested by default.
SLOW_PIPELINES = ("chain", "masked", "apply_if_finite")


@pytest.mark.parametrize(
    "pipeline",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_PIPELINES))
        for name in PIPELINES
    ],
)
@every_box
def test_pipelines_train_as_without_boxes(make_box, pipeline):
    tx = PIPELINES[pipeline](
        apollo_optax.apollo(0.1, rank=8, weight_dimension_numbers=NUMBERS)
    )
    boxed = boxed_params(make_box, ON_MESH)
    bare = jax.tree.map(lambda entry: normal(0, entry[0]), ON_MESH, is_leaf=is_layout)
    with jax.set_mesh(make_mesh()):
        params, state = train(tx, boxed)
        chex.assert_trees_all_equal_structs(state, tx.init(boxed))
    expected_params, expected_state = train(tx, bare)
    assert any(map(is_box, jax.tree.leaves(state, is_leaf=is_box)))
    for actual, expected in ((params, expected_params), (state, expected_state)):
        assert_close(jax.tree.leaves(actual), jax.tree.leaves(expected))


@every_box
def test_layerwise_step_keeps_boxes(make_box):
    layout = {
        "layers": {"kernel": ((3, 8, 8), (None, "fsdp", None))},
        "embed": {"embedding": ((5, 8), (None, "fsdp"))},
    }

    def value(box):
        if isinstance(box, nnx.Variable):
            return box.get_value()
        return box.value if isinstance(box, nn.Partitioned) else box

    def embed(params, batch):
        return value(params["embed"]["embedding"])[batch]

    def layer(params, x, batch, constants):
        return x + jnp.tanh(x @ value(params["kernel"]))

    def head(params, x, batch):
        return jnp.mean(x**2)

    tx = apollo_optax.apollo(0.1, rank=4, weight_dimension_numbers=NUMBERS)
    step = apollo_optax.layerwise_step(embed, layer, head, tx)
    boxed = boxed_params(make_box, layout)
    bare = jax.tree.map(lambda entry: normal(0, entry[0]), layout, is_leaf=is_layout)
    with jax.set_mesh(make_mesh()):
        state = tx.init(boxed)
        params, new_state, _ = step(boxed, state, jnp.arange(4))
    chex.assert_trees_all_equal_structs(new_state, state)
    expected, _, _ = step(bare, tx.init(bare), jnp.arange(4))
    assert_close(jax.tree.leaves(params), jax.tree.leaves(expected))


def test_tabulate_and_state_bytes_see_through_the_boxes_of_the_state():
    tx = apollo_optax.apollo(0.1, rank=8, weight_dimension_numbers=NUMBERS)
    bare = jax.tree.map(lambda entry: normal(0, entry[0]), ON_MESH, is_leaf=is_layout)
    for kind in ("linen", "nnx"):
        boxed = boxed_params(kind, ON_MESH)
        for function in (apollo_optax.tabulate, apollo_optax.state_bytes):
            numbers = (
                {"weight_dimension_numbers": NUMBERS}
                if function is apollo_optax.tabulate
                else {}
            )
            assert function(tx, boxed, **numbers) == function(tx, bare, **numbers)


def test_a_state_of_plain_arrays_is_restored_into_boxes(tmp_path):
    """Versions without boxes have saved such states."""
    tx = apollo_optax.apollo(0.1, rank=8, weight_dimension_numbers=NUMBERS)
    boxed = boxed_params("linen", ON_MESH)
    _, trained = train(tx, nn.meta.unbox(boxed))
    with jax.set_mesh(make_mesh()):
        fresh = tx.init(boxed)
    plain = nn.meta.unbox(fresh)

    restored = flax.serialization.from_bytes(
        plain, flax.serialization.to_bytes(trained)
    )
    converted = jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(restored))
    chex.assert_trees_all_equal_structs(converted, fresh)
    chex.assert_trees_all_equal(jax.tree.leaves(converted), jax.tree.leaves(trained))

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", trained)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", plain)
    converted = jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(restored))
    chex.assert_trees_all_equal(jax.tree.leaves(converted), jax.tree.leaves(trained))


def test_an_nnx_optimizer_restores_a_state_of_plain_arrays(tmp_path):
    with jax.set_mesh(jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))):
        model = Model(nnx.Rngs(0))
        tx = apollo_optax.apollo(0.1, rank=8)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = nnx.to_pure_dict(nnx.state(optimizer))
    old = jax.tree.map(lambda x: np.asarray(x) + 1, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", old)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    target = nnx.state(optimizer)
    nnx.replace_by_pure_dict(target, restored)
    nnx.update(optimizer, target)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(optimizer)), old)
