"""The update fused into the backward pass: the ordinary step's numbers, without its memory."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import apollo_optax
from apollo_optax import (
    ApolloDimensionNumbers,
    LayerwiseMetrics,
    _stack_rows,
    apply_updates_stochastic,
    dequantize,
    dimension_numbers_by_path,
    layerwise_apply,
    layerwise_step,
    limit_norm_growth,
    quantize,
    scale_by_apollo,
    state_sharding,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

STACKED = ApolloDimensionNumbers(1, 2)
NUMBERS = dimension_numbers_by_path(
    [
        (r"layers/experts/", ApolloDimensionNumbers(2, 3)),  # (L, E, in, out)
        (r"layers/attention/", ApolloDimensionNumbers(1, (2, 3))),  # (L, in, heads, head size)
        (r"layers/.*kernel$", STACKED),
    ]
)
# Of two steps, so that a few steps see projections drawn anew.
GAP = {"update_proj_gap": 2, "weight_dimension_numbers": NUMBERS}
V, D, F, L = 5, 4, 6, 3
HIGHEST = 1e-10  # Of the error, as a part of a leaf's largest element; rounding makes 1e-15 of it.


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


class Model(NamedTuple):
    """What layerwise_step takes, and parameters for it."""

    embed: Callable[..., Any]
    layer: Callable[..., Any]
    head: Callable[..., Any]
    params: Any
    layers: str = "layers"
    has_aux_loss: bool = False
    per_layer: Any = None

    def step(self, tx, **settings):
        settings = {"layers": self.layers, "has_aux_loss": self.has_aux_loss, **settings}
        return layerwise_step(self.embed, self.layer, self.head, tx, **settings)

    def apply(self):
        pieces = self.embed, self.layer, self.head
        return layerwise_apply(*pieces, layers=self.layers, has_aux_loss=self.has_aux_loss)


def normal(seed, *shape):
    """In float64 under x64, else in float32. Not JAX's, so that nothing is compiled to make parameters."""
    dtype = np.float64 if jax.config.values["jax_enable_x64"] else np.float32
    return (0.5 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def batches(steps=5):
    return np.random.default_rng(9).integers(0, V, (steps, 2, 4), dtype=np.int32)


def cross_entropy(logits, batch):
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def embed(params, batch):
    return params["embed"]["embedding"][batch[:, :-1]]


def layer(params, x, batch, constants):
    del batch, constants
    kernel = params["block"]["kernel"]
    return x + jnp.tanh(x * params["scale"] @ kernel) @ kernel.T


def head(params, x, batch):
    return cross_entropy(x * params["norm"]["scale"] @ params["lm_head"]["kernel"], batch)


def toy(depth=L):
    """A matrix and a vector in the stack, tables and a vector outside."""
    params = {
        "embed": {"embedding": normal(0, V, D)},
        "layers": {
            "block": {"kernel": normal(1, depth, D, F)},
            "scale": 1 + normal(3, depth, D),
        },
        "norm": {"scale": 1 + normal(4, D)},
        "lm_head": {"kernel": normal(5, D, V)},
    }
    return Model(embed, layer, head, params)


def of_dtype(model, dtype):
    return model._replace(params=jax.tree.map(lambda x: x.astype(dtype), model.params))


def in_int8(model):
    """The kernels of the stack in int8."""
    layers = model.params["layers"]
    kernel = quantize(layers["block"]["kernel"], group_size=8)
    return model._replace(params={**model.params, "layers": {**layers, "block": {"kernel": kernel}}})


def wide_toy(depth, width=32):
    """Of a width at which matrices are larger than activations."""
    shapes = {
        "embed": {"embedding": (V, width)},
        "layers": {
            "block": {"kernel": (depth, width, 2 * width)},
            "scale": (depth, width),
        },
        "norm": {"scale": (width,)},
        "lm_head": {"kernel": (width, V)},
    }
    params = jax.tree.map(
        lambda shape: normal(sum(shape), *shape), shapes, is_leaf=lambda x: type(x) is tuple
    )
    return Model(embed, layer, head, params)


def without(tree, path):
    name, *rest = path
    return {
        key: without(tree[key], rest) if key == name else tree[key] for key in tree if rest or key != name
    }


def ordinary_step(model, tx):
    """The whole model as one function, its gradient, one update of everything."""
    path = model.layers.split("/")

    def loss_of(params, batch, per_layer):
        rest, stack = without(params, path), functools.reduce(lambda tree, name: tree[name], path, params)
        x, aux_losses = model.embed(rest, batch), 0.0
        for index in range(jax.tree.leaves(stack)[0].shape[0]):
            one, constants = jax.tree.map(lambda leaf, i=index: leaf[i], (stack, per_layer))
            x = model.layer(one, x, batch, constants)
            if model.has_aux_loss:
                x, aux_loss = x
                aux_losses += aux_loss
        return model.head(rest, x, batch) + aux_losses

    def step(params, state, batch, *, key=None, per_layer=None):
        whole = dequantize(params)
        loss, grads = jax.value_and_grad(loss_of)(whole, batch, per_layer)
        updates, state = tx.update(grads, state, whole)
        apply = optax.apply_updates if key is None else functools.partial(apply_updates_stochastic, key=key)
        return apply(params, updates), state, LayerwiseMetrics(loss, optax.tree.norm(grads))

    return step


def trainer(step, model, tx):
    """Compiles steps from given parameters, with a key for each: parameters, state and all metrics."""

    @jax.jit
    def run(params, batches, keys=None):
        def body(carry, row):
            batch, key = row
            params, state, metrics = step(*carry, batch, key=key, per_layer=model.per_layer)
            return (params, state), metrics

        return jax.lax.scan(body, (params, tx.init(dequantize(params))), (batches, keys))

    return run


def train(step, model, tx, steps=5, keys=None):
    return trainer(step, model, tx)(model.params, batches(steps), keys)


def assert_agree(actual, expected, highest=HIGHEST):
    """Every leaf's largest error is at most this part of its largest element; types are the same."""
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max(initial=0)
        assert error <= highest * np.abs(b).max(initial=0), (jax.tree_util.keystr(path), error)


# The ordinary step's numbers.


def is_matrix(params):
    return jax.tree.map(lambda x: x.ndim > 2, params)


def labels(params):
    return jax.tree.map(lambda x: "matrices" if x.ndim > 2 else "rest", params)


apollo = functools.partial(apollo_optax.apollo, rank=2, **GAP)
TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "inject": lambda: optax.inject_hyperparams(
        apollo_optax.apollo, static_args=apollo_optax.STATIC_ARGS, hyperparam_dtype=jnp.float64
    )(optax.linear_schedule(0.1, 0.0, 6), rank=2, **GAP),
    "chain": lambda: optax.chain(
        scale_by_apollo(1, scale_type="tensor", projection="rademacher", scale_front=True, **GAP),
        optax.add_decayed_weights(0.1, mask=is_matrix),
        optax.scale_by_schedule(lambda count: -0.1 / (1 + count)),
    ),
    "partition": lambda: optax.partition(
        {"matrices": apollo(0.1, projection="svd"), "rest": optax.adam(0.2)}, labels
    ),
    # Its bits depend on how many keys are drawn with at a time.
    "rbg": lambda: apollo(0.1, key=jax.random.key(1, impl="rbg")),
    "limiter": lambda: optax.chain(
        optax.trace(0.9, nesterov=True),
        optax.masked(limit_norm_growth(weight_dimension_numbers=NUMBERS), is_matrix),
        optax.scale(-0.1),
    ),
    # What depends on gradients is beside what does not, in one operation of the program.
    "jitted": lambda: optax.GradientTransformation(optax.adam(0.1).init, jax.jit(optax.adam(0.1).update)),
    "conditional": lambda: optax.conditionally_transform(optax.adam(0.1), lambda step, **_: step < 3),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.usefixtures("x64")
def test_any_transformation(name):
    model, tx = toy(), TRANSFORMATIONS[name]()
    expected = train(ordinary_step(model, tx), model, tx)
    assert_agree(train(model.step(tx), model, tx), expected)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), expected[0][0], model.params)
    assert min(jax.tree.leaves(moved)) > 1e-3


def dropped(x, key):
    return x * jax.random.bernoulli(key, 0.8, x.shape) / 0.8


def with_constants():
    """A scalar and a dropout key for each layer, an auxiliary loss, two activations, a nested stack."""
    model = toy()

    def two(params, batch):
        x = embed(params, batch)
        return {"x": x, "sum": jnp.zeros(x.shape[:-1], x.dtype)}

    def one_layer(params, x, batch, constants):
        y = layer(params["block"], x["x"], batch, None)
        y = constants["scale"] * dropped(y, constants["key"])
        aux_loss = 0.3 * constants["scale"] * jnp.mean(y**2)
        return {"x": y, "sum": 0.5 * x["sum"] + y.sum(-1)}, aux_loss

    def loss(params, x, batch):
        params = {"norm": params["decoder"]["norm"], "lm_head": params["lm_head"]}
        return head(params, x["x"], batch) + jnp.mean(x["sum"] ** 2)

    params = {
        "embed": model.params["embed"],
        "decoder": {"norm": model.params["norm"], "layers": {"block": model.params["layers"]}},
        "lm_head": model.params["lm_head"],
    }
    per_layer = {"scale": np.array([0.5, 1.0, 2.0]), "key": jax.random.split(jax.random.key(3), L)}
    return Model(two, one_layer, loss, params, "decoder/layers", True, per_layer)


def with_experts():
    """Kernels of four axes, of which two are batch axes or two one side, in a model with a tied head."""

    def one_layer(params, x, batch, constants):
        del batch, constants
        attention, experts = params["attention"]["kernel"], params["experts"]["kernel"]
        x = x + jnp.einsum("bthk,dhk->btd", jnp.tanh(jnp.einsum("btd,dhk->bthk", x, attention)), attention)
        return x + jnp.einsum("btef,edf->btd", jnp.tanh(jnp.einsum("btd,edf->btef", x, experts)), experts)

    def loss(params, x, batch):
        return cross_entropy(x @ params["embed"]["embedding"].T, batch)

    params = {
        "embed": {"embedding": normal(0, V, D)},
        "layers": {
            "attention": {"kernel": normal(1, L, D, 2, 3)},
            "experts": {"kernel": normal(2, L, 2, D, F)},
        },
        "unread": {"kernel": normal(3, 2, 3)},
    }
    return Model(embed, one_layer, loss, params)


def nothing_but_layers():
    return Model(
        lambda params, batch: jnp.ones((2, D), normal(0).dtype),
        lambda kernel, x, batch, constants: x + jnp.tanh(x @ kernel),
        lambda params, x, batch: jnp.mean(x**2),
        {"layers": normal(0, L, D, D)},
    )


def with_all_read_by_the_embedding():
    """So that there is nothing to update before the walk."""
    model = toy()

    def all_read(params, batch):
        return embed(params, batch) * params["norm"]["scale"] @ params["lm_head"]["kernel"][:, :D]

    return model._replace(embed=all_read)


MODELS = {
    "constants": with_constants,
    "experts": with_experts,
    "one layer": lambda: toy(1),
    "bare": nothing_but_layers,
    "all read": with_all_read_by_the_embedding,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("x64")
def test_any_model(name):
    model = MODELS[name]()
    tx = optax.adam(0.1) if name in ("bare", "all read") else apollo(0.1)
    expected = train(ordinary_step(model, tx), model, tx, steps=3)
    assert_agree(train(model.step(tx), model, tx, steps=3), expected)
    loss = model.apply()(model.params, batches()[0], per_layer=model.per_layer)
    assert float(loss) <= float(expected[1].loss[0]) + HIGHEST  # Without the auxiliary losses.
    assert model.has_aux_loss == (float(loss) < float(expected[1].loss[0]) - 0.01)


@pytest.mark.usefixtures("x64")
def test_parameters_named_as_fields_of_a_state():
    """`count` and `learning_rate` of the state are nobody's, whatever the parameters are called."""
    model = toy()

    def one_head(params, x, batch):
        return cross_entropy((x * params["count"] + params["learning_rate"]) @ params["scale"], batch)

    params = {name: model.params[name] for name in ("embed", "layers")}
    params |= {"count": 1 + normal(4, D), "learning_rate": normal(6), "scale": normal(5, D, V)}
    model = model._replace(head=one_head, params=params)
    schedule = optax.linear_schedule(0.1, 0.0, 6)
    tx = optax.chain(optax.adam(schedule), optax.inject_hyperparams(optax.sgd)(learning_rate=schedule))
    expected = train(ordinary_step(model, tx), model, tx, steps=3)
    assert_agree(train(model.step(tx), model, tx, steps=3), expected)


def test_bfloat16_stays():
    model, tx = of_dtype(toy(), jnp.bfloat16), apollo(0.1)
    state = tx.init(model.params)
    params, new, metrics = jax.jit(model.step(tx))(model.params, state, batches()[0])
    chex.assert_trees_all_equal_shapes_and_dtypes((params, new), (model.params, state))
    assert metrics.loss.dtype == metrics.grad_norm.dtype == jnp.float32
    expected, _, expected_metrics = jax.jit(ordinary_step(model, tx))(model.params, state, batches()[0])
    assert_agree(params, expected, highest=2.0**-7)
    np.testing.assert_allclose(metrics.loss, expected_metrics.loss, rtol=1e-3)


def test_without_jit():
    model, tx = nothing_but_layers(), optax.sgd(0.1)
    arguments = model.params, tx.init(model.params), batches()[0]
    expected = jax.jit(model.step(tx))(*arguments)
    assert_agree(jax.tree.map(jnp.asarray, model.step(tx)(*arguments)), expected, 1e-5)


def test_under_vmap():
    """As over seeds."""
    model, tx = toy(), optax.sgd(0.1, momentum=0.9)
    copies = jax.tree.map(lambda x: np.stack([x, 1.5 * x]), model.params)
    in_axes = (0, 0, None)
    states = jax.eval_shape(jax.vmap(tx.init), copies)
    states = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), states)
    many = jax.jit(jax.vmap(model.step(tx), in_axes))(copies, states, batches()[0])
    many_expected = jax.jit(jax.vmap(ordinary_step(model, tx), in_axes))(copies, states, batches()[0])
    assert_agree(many, many_expected, 1e-5)
    assert float(many[2].loss[0]) != float(many[2].loss[1])


@pytest.mark.parametrize("kind", [freeze, nnx.State, lambda tree: {k: freeze(v) for k, v in tree.items()}])
def test_other_mappings_keep_their_types(kind):
    tx, model = optax.adam(0.1), toy()
    params = kind(model.params)
    expected = jax.jit(model.step(tx))(model.params, tx.init(model.params), batches()[0])
    actual = jax.jit(model.step(tx))(params, tx.init(params), batches()[0])
    chex.assert_trees_all_equal_structs(actual[:2], (params, tx.init(params)))
    chex.assert_trees_all_equal(jax.tree.leaves(actual), jax.tree.leaves(expected))


def test_nnx_variables():
    """The functions get them in their boxes, as the state had them; the optimizer's state has none."""
    tx, model = optax.adam(0.1), toy()

    def unboxed(function):
        return lambda params, *rest: function(jax.tree.map(lambda x: x, nnx.to_pure_dict(params)), *rest)

    def by_part(function):
        return lambda params, *rest: function({k: nnx.to_pure_dict(v) for k, v in params.items()}, *rest)

    boxed = model._replace(embed=by_part(embed), layer=unboxed(layer), head=by_part(head))
    params = nnx.State(jax.tree.map(nnx.Param, model.params))
    state = tx.init(params)
    new, _, metrics = jax.jit(boxed.step(tx))(params, state, batches()[0])
    expected, _, expected_metrics = jax.jit(model.step(tx))(model.params, tx.init(model.params), batches()[0])
    chex.assert_trees_all_equal_structs(new, params)
    chex.assert_trees_all_equal(jax.tree.leaves(new), jax.tree.leaves(expected))
    assert metrics == expected_metrics


# Memory.

OPTIMIZERS = {"apollo": lambda: apollo(0.1), "adam": lambda: optax.adam(0.1)}


def scanned_step(model, tx):
    """The ordinary step of a scanned model that keeps each layer's input: its memory is compared with."""

    def loss_of(params, batch):
        rest = without(params, ["layers"])
        one_layer = jax.checkpoint(lambda params, x: model.layer(params, x, batch, None))
        x, _ = jax.lax.scan(lambda x, one: (one_layer(one, x), None), embed(rest, batch), params["layers"])
        return head(rest, x, batch)

    def step(params, state, batch):
        grads = jax.grad(loss_of)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def memory(make_step, name, depth):
    model, tx = wide_toy(depth), OPTIMIZERS[name]()
    arguments = model.params, jax.eval_shape(tx.init, model.params), batches()[0]
    step = jax.jit(make_step(model, tx), donate_argnums=(0, 1))
    analysis = step.lower(*arguments).compile().memory_analysis()
    updated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[:2]))
    return analysis, updated


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_of_all_layers_never_exist(name):
    """From the compiled program: only each layer's input takes memory that grows with the depth."""
    model = wide_toy(1)
    layer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["layers"]))
    input_bytes = jax.eval_shape(embed, model.params, batches()[0]).size * 4

    def growths(make_step, depths):
        temporaries = []
        for depth in depths:
            analysis, updated = memory(make_step, name, depth)
            assert analysis.alias_size_in_bytes == updated  # In place: the new take the memory of the old.
            temporaries.append(analysis.temp_size_in_bytes)
        return np.diff(temporaries) / np.diff(depths)

    # Allocations are rounded up to 64 bytes.
    assert max(growths(lambda model, tx: model.step(tx), (2, 4, 8))) <= input_bytes + 64
    assert min(growths(scanned_step, (2, 8))) >= layer_bytes  # What the limit above would notice.


# Host memory.


def on_host(sharding):
    return sharding.with_memory_kind("pinned_host")


def test_host_memory_changes_no_bit():
    """The CPU has that kind of memory too, and so XLA's types and moves."""
    model, tx = toy(), apollo(0.1)
    here = SingleDeviceSharding(jax.devices()[0])
    places = {name: on_host(here) if name == "layers" else here for name in model.params}
    params = {name: jax.device_put(leaf, places[name]) for name, leaf in model.params.items()}
    state = tx.init(model.params)
    arguments = model.params, state, batches()[0]
    expected = jax.jit(model.step(tx))(*arguments)
    offloading = jax.jit(model.step(tx, offload_inputs=True))
    chex.assert_trees_all_equal(offloading(*arguments), expected)
    inputs_in_host_memory = rf"f32<host>\[{L},2,3,{D}\]"
    assert re.search(inputs_in_host_memory, str(offloading.trace(*arguments).jaxpr))
    assert not re.search(r"<host>", str(jax.make_jaxpr(model.step(tx))(*arguments)))

    stored = jax.jit(model.step(tx), donate_argnums=(0, 1))
    lowered = stored.lower(params, jax.tree.map(jnp.copy, state), batches()[0]).as_text()
    assert "pinned_host" in lowered
    loss = model.apply()(params, batches()[0])
    actual = stored(params, state, batches()[0])
    chex.assert_trees_all_equal(actual, expected)
    assert float(loss) == pytest.approx(float(actual[2].loss))
    for name, part in actual[0].items():
        kind = "pinned_host" if name == "layers" else "device"
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(part)} == {kind}


def test_int8_codes_in_host_memory_change_no_bit():
    """Their scales stay on the device, as in the trainer."""
    model, tx = in_int8(toy()), apollo(0.1)
    here = SingleDeviceSharding(jax.devices()[0])

    params = jax.device_put(model.params, here)
    kernel = params["layers"]["block"]["kernel"]
    kernel = dataclasses.replace(kernel, qvalue=jax.device_put(kernel.qvalue, on_host(here)))
    params["layers"]["block"]["kernel"] = kernel
    step, state = jax.jit(model.step(tx)), tx.init(dequantize(model.params))
    expected = step(model.params, state, batches()[0], key=KEY)
    chex.assert_trees_all_equal(step(params, state, batches()[0], key=KEY), expected)


def test_states_may_be_in_host_memory_too():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    model, tx = toy(), apollo(0.1)
    here = NamedSharding(mesh, P())
    params = {
        name: jax.device_put(leaf, on_host(here) if name == "layers" else here)
        for name, leaf in model.params.items()
    }
    state = tx.init(model.params)
    places = state_sharding(state, params, weight_dimension_numbers=NUMBERS)
    kinds = jax.tree.map(lambda place: place.memory_kind, places)
    assert "pinned_host" in jax.tree.leaves(kinds)
    expected = jax.jit(model.step(tx))(model.params, state, batches()[0])
    actual = jax.jit(model.step(tx))(params, jax.device_put(state, places), batches()[0])
    chex.assert_trees_all_equal(actual, expected)
    assert jax.tree.map(lambda x: x.sharding.memory_kind, actual[1]) == kinds


# Few bits.


def constant_updates(size=1e-3):
    """Updates that rounding in the gradients does not reach."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda x: jnp.full(x.shape, -size), updates))


KEY = jax.random.key(7)


@pytest.mark.parametrize("few_bits", [in_int8, lambda model: of_dtype(model, jnp.bfloat16)])
def test_layers_are_rounded_as_in_the_whole_stack(few_bits):
    model, tx = few_bits(toy()), constant_updates()
    keys = jax.random.split(KEY, 3)
    run = trainer(model.step(tx), model, tx)
    (params, _), _ = run(model.params, batches(3), keys)
    chex.assert_trees_all_equal(params, train(ordinary_step(model, tx), model, tx, 3, keys)[0][0])
    chex.assert_trees_all_equal_structs(params, model.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, model.params)
    (others, _), _ = run(model.params, batches(3), jax.random.split(jax.random.key(8), 3))
    assert any(
        np.any(np.asarray(a != b)) for a, b in zip(*map(jax.tree.leaves, (params, others)), strict=True)
    )
    # Layers have bits of their own: weights that are the same are not all rounded the same way.
    same = jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape), model.params)
    (rounded, _), _ = run(same, batches(3), keys)
    codes = jax.tree.leaves(rounded["layers"]["block"])[0]
    assert np.any(np.asarray(codes[0] != codes[1]))


def test_int8_weights_train():
    """As in the ordinary step on dequantized weights, but where a last digit decides the rounding."""
    steps, tx = 30, apollo(0.02, projection="rademacher")
    model, keys = in_int8(toy()), jax.random.split(KEY, steps)
    (params, state), metrics = train(model.step(tx), model, tx, steps, keys)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, model.params)
    chex.assert_trees_all_equal_structs(state, tx.init(dequantize(model.params)))
    assert float(metrics.loss[-5:].mean()) < float(metrics.loss[:5].mean()) - 0.2
    np.testing.assert_allclose(
        model.apply()(model.params, batches()[0]), metrics.loss[0], rtol=1e-6
    )  # Dequantized a layer at a time, too.

    (once, _, _) = jax.jit(model.step(tx))(
        model.params, tx.init(dequantize(model.params)), batches()[0], key=keys[0]
    )
    (expected, _), _ = train(ordinary_step(model, tx), model, tx, 1, keys[:1])
    codes, expected_codes, before = (
        np.asarray(tree["layers"]["block"]["kernel"].qvalue, np.int32)
        for tree in (once, expected, model.params)
    )
    assert np.abs(codes - expected_codes).max() <= 1
    assert np.mean(codes != expected_codes) < 0.02
    assert np.mean(codes != before) > 0.5


@pytest.mark.parametrize("where", ["layers", "lm_head"])
def test_int8_takes_a_key(where):
    model = toy()
    params = {**model.params, where: jax.eval_shape(lambda: jax.tree.map(quantize, model.params[where]))}
    state = optax.sgd(0.1).init(params)
    with pytest.raises(ValueError, match=rf"'{where}/.*' is in int8.*give the step a key="):
        model.step(optax.sgd(0.1))(params, state, batches()[0])


# Meshes.

SPECS = {
    "data": P(),
    # As MaxText: everything over "fsdp", the hidden side over "tensor".
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
    """The model with the shardings in types that it does not infer, weights gathered where they are used."""
    whole = functools.partial(jax.sharding.reshard, out_shardings=P(None, None))

    def explicit_embed(params, batch):
        return whole(params["embed"]["embedding"]).at[batch[:, :-1]].get(out_sharding=ACTIVATIONS)

    def explicit_layer(params, x, batch, constants):
        block = {"kernel": whole(params["block"]["kernel"])}
        return layer({**params, "block": block}, x, batch, constants)

    def explicit_head(params, x, batch):
        scores = jax.nn.log_softmax(x * params["norm"]["scale"] @ whole(params["lm_head"]["kernel"]))
        return -jnp.mean(jnp.sum(scores * (batch[:, 1:, None] == jnp.arange(V)), -1))

    return model._replace(embed=explicit_embed, layer=explicit_layer, head=explicit_head)


@pytest.mark.parametrize(
    ("kind", "name"), [(AxisType.Auto, "data"), (AxisType.Auto, "fsdp"), (AxisType.Explicit, "fsdp")]
)
@pytest.mark.usefixtures("x64")
def test_a_mesh_changes_nothing(kind, name):
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
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
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
    # Nothing gathers the weights of more than a layer, and each device updates its part in place.
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(actual))
    assert program.memory_analysis().alias_size_in_bytes == held
    assert not re.search(r"= f64\[2,8,16\]\S* all-gather", program.as_text())


# What is refused.


def refuses(model, tx, match, per_layer=None, **settings):
    """That the step raises when it is traced, with an error that names the leaf and a remedy."""
    state = jax.eval_shape(tx.init, dequantize(model.params))
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(
            functools.partial(model.step(tx, **settings), key=KEY, per_layer=per_layer),
            *(model.params, state, batches()[0]),
        )


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ("blocks", r"no 'blocks' at '' \(it has \['embed', 'layers', 'lm_head', 'norm'\]\); give layers="),
        ("layers/block/stack", r"no 'stack' at 'layers/block' \(it has \['kernel'\]\)"),
        ("norm/scale/stack", r"no 'stack' at 'norm/scale' \(it is "),
        ("", "no '' at ''"),
    ],
)
def test_no_stack_there(layers, match):
    refuses(toy(), optax.sgd(0.1), match, layers=layers)


@pytest.mark.parametrize("leaf", [(2, D), (), (0, D)])
def test_leaves_of_another_depth(leaf):
    model = toy()
    model.params["layers"]["odd"] = jnp.ones(leaf)
    match = rf"number of layers as its leading axis, got .*'layers/odd': {re.escape(str(leaf))}"
    refuses(model, optax.sgd(0.1), match)


def test_no_layers_at_all():
    refuses(toy(0), optax.sgd(0.1), "number of layers as its leading axis")
    refuses(toy()._replace(params={**toy().params, "layers": {}}), optax.sgd(0.1), "got {}")
    refuses(toy()._replace(params=jnp.ones((3, 2))), optax.sgd(0.1), "no 'layers' at ''")


@pytest.mark.parametrize("rows", [2, 4])
def test_constants_of_another_depth(rows):
    match = rf"per_layer must have the number of layers, 3, as its leading axis, got .*\({rows},\)"
    refuses(toy(), optax.sgd(0.1), match, per_layer={"window": np.ones(rows)})


@pytest.mark.parametrize("layers", [None, ("layers",)])
def test_a_place_that_is_no_string(layers):
    with pytest.raises(TypeError, match=r"layers must be a string such as 'decoder/layers', got "):
        toy().step(optax.sgd(0.1), layers=layers)


@pytest.mark.parametrize(
    ("made_by", "match"),
    [
        (optax.lion, r"it lacks '0/nu/.*' of shape "),
        (optax.sgd, r"it lacks '0/.*' of shape "),
        (optax.adam, r"it lacks '0/mu/layers/block/kernel' of shape \(3, 4, 6\)"),
    ],
)
def test_states_of_something_else(made_by, match):
    """The last is that of int8 weights as they are."""
    model = in_int8(toy())
    params = model.params if made_by is optax.adam else dequantize(model.params)
    state = made_by(0.1).init(params)
    with pytest.raises(ValueError, match=rf"opt_state is not tx.init\(dequantize\(params\)\): {match}"):
        model.step(optax.adam(0.1))(model.params, state, batches()[0], key=KEY)


def test_a_state_that_changes_its_dtype():
    """Injected decay rates are float32 where any leaf is, and so is what comes of them and of bfloat16."""
    model = toy()
    model.params["layers"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params["layers"])
    match = "'inner_state/0/mu/layers/.*' of the optimizer's state from bfloat16 into float32"
    refuses(model, optax.inject_hyperparams(optax.adamw)(optax.constant_schedule(0.1)), match)


@pytest.mark.parametrize("depth", [2, 4, 6])
@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("limit", [1.01, None])
def test_vectors_taken_for_a_matrix_over_the_layers(depth, rank, limit):
    """As the default rule takes stacked ones that are called neither `scale` nor `bias`."""
    model = toy(depth)
    model.params["layers"]["weight"] = model.params["layers"]["scale"]
    tx = scale_by_apollo(rank, norm_growth_limit=limit, weight_dimension_numbers=NUMBERS)
    refuses(model, tx, "layers/weight'")


class Remembered(NamedTuple):
    norm: Any


def norm_of_all_layers():
    """A norm of each leaf, kept as an array with as many axes as the leaf."""

    def init(params):
        return Remembered(jax.tree.map(lambda x: jnp.zeros((1,) * x.ndim, x.dtype), params))

    def update(updates, state, params=None):
        del params
        norms = jax.tree.map(
            lambda x, norm: 0.9 * norm + jnp.sqrt(jnp.sum(x**2, keepdims=True)), updates, state.norm
        )
        return jax.tree.map(lambda x, norm: x / (norm + 1e-8), updates, norms), Remembered(norms)

    return optax.GradientTransformation(init, update)


MIXING: dict[str, Callable[[], optax.GradientTransformation]] = {
    # Within a leaf.
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "limit_norm_growth": lambda: optax.chain(optax.scale_by_adam(), limit_norm_growth()),
    "novograd": lambda: optax.novograd(0.1),
    "zero_nans": optax.zero_nans,
    "galore": lambda: optax.contrib.galore(0.1, 2),
    "sm3": lambda: optax.sm3(0.1),
    "norms of a leaf": norm_of_all_layers,
    # Over all leaves.
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "prodigy": optax.contrib.prodigy,
    "dog": optax.contrib.dog,
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", MIXING)
def test_states_that_layers_share(name):
    refuses(toy(), MIXING[name](), "'.*' of the optimizer's .*use the ordinary step")


@pytest.mark.parametrize("axis", [0, -2])
def test_int8_groups_along_the_layers(axis):
    model = toy()
    model.params["layers"]["scale"] = quantize(model.params["layers"]["scale"], axis=axis, group_size=8)
    refuses(model, optax.sgd(0.1), "'layers/scale'")


def test_a_stack_in_host_memory_is_written_after_it_is_read():
    """Otherwise XLA for GPUs copies all of it for each layer; a stack on the device needs no order."""

    def after(stack, row):
        return _stack_rows.delay_until_fetched({"w": stack}, {"w": row})["w"]

    stack, row = jnp.zeros((3, 4)), jnp.ones((1, 4))
    (equation,) = jax.make_jaxpr(after)(stack, row).eqns
    assert equation.primitive.name == "optimization_barrier"
    assert len(equation.invars) == 2
    assert not jax.make_jaxpr(lambda stack: after(stack, None))(stack).eqns
