"""The layer-wise step computes the ordinary step's numbers."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.core import freeze

import apollo_optax
from apollo_optax import (
    limit_norm_growth,
    scale_by_apollo,
)
from tests.layerwise_models import (
    GAP,
    HIGHEST,
    NUMBERS,
    D,
    F,
    L,
    Model,
    V,
    apollo,
    assert_agree,
    batches,
    cross_entropy,
    embed,
    head,
    layer,
    normal,
    of_dtype,
    ordinary_step,
    toy,
    train,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def is_matrix(params):
    return jax.tree.map(lambda x: x.ndim > 2, params)


def labels(params):
    return jax.tree.map(lambda x: "matrices" if x.ndim > 2 else "rest", params)


TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "inject": lambda: optax.inject_hyperparams(
        apollo_optax.apollo,
        static_args=apollo_optax.static_args(apollo_optax.apollo),
        hyperparam_dtype=jnp.float64,
    )(optax.linear_schedule(0.1, 0.0, 6), rank=2, **GAP),
    "chain": lambda: optax.chain(
        scale_by_apollo(
            1, scale_type="tensor", projection="rademacher", scale_front=True, **GAP
        ),
        optax.add_decayed_weights(0.1, mask=is_matrix),
        optax.scale_by_schedule(lambda count: -0.1 / (1 + count)),
    ),
    "partition": lambda: optax.partition(
        {"matrices": apollo(0.1, projection="svd"), "rest": optax.adam(0.2)}, labels
    ),
    "racs": lambda: apollo_optax.racs(0.1, weight_dimension_numbers=NUMBERS),
    # The bits of rbg depend on how many keys a single call draws with.
    "rbg": lambda: apollo(0.1, key=jax.random.key(1, impl="rbg")),
    "zero": lambda: apollo_optax.apollo_zero(0.1, weight_dimension_numbers=NUMBERS),
    "zero momentum": lambda: apollo_optax.apollo_zero(
        0.1, momentum=0.9, weight_dimension_numbers=NUMBERS
    ),
    "int8 momentum": lambda: apollo_optax.apollo_zero(
        0.1, momentum=0.9, int8_momentum=True, weight_dimension_numbers=NUMBERS
    ),
    "zero relative": lambda: apollo_optax.apollo_zero(
        0.1, relative=True, weight_dimension_numbers=NUMBERS
    ),
    "limiter": lambda: optax.chain(
        optax.trace(0.9, nesterov=True),
        optax.masked(limit_norm_growth(weight_dimension_numbers=NUMBERS), is_matrix),
        optax.scale(-0.1),
    ),
    # Outputs of one jitted operation that depend on gradients, and others that do not.
    "jitted": lambda: optax.GradientTransformation(
        optax.adam(0.1).init, jax.jit(optax.adam(0.1).update)
    ),
    "conditional": lambda: optax.conditionally_transform(
        optax.adam(0.1), lambda step, **_: step < 3
    ),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.usefixtures("x64")
def test_transformations_match_the_ordinary_step(name):
    model, tx = toy(), TRANSFORMATIONS[name]()
    expected = train(ordinary_step(model, tx), model, tx)
    assert_agree(train(model.step(tx), model, tx), expected)
    moved = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - b).max(), expected[0][0], model.params
    )
    assert min(jax.tree.leaves(moved)) > 1e-3


def dropped(x, key):
    return x * jax.random.bernoulli(key, 0.8, x.shape) / 0.8


def with_constants():
    """A model with two constants per layer: a scalar and a dropout key.

    It also has an auxiliary loss, two activations and a nested stack.
    """
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
        "decoder": {
            "norm": model.params["norm"],
            "layers": {"block": model.params["layers"]},
        },
        "lm_head": model.params["lm_head"],
    }
    per_layer = {
        "scale": np.array([0.5, 1.0, 2.0]),
        "key": jax.random.split(jax.random.key(3), L),
    }
    return Model(two, one_layer, loss, params, "decoder/layers", True, per_layer)


def with_experts():
    """A model with kernels of four axes and with a tied head.

    The kernels have two batch axes, or two axes on one side of the matrix.
    """

    def one_layer(params, x, batch, constants):
        del batch, constants
        attention, experts = params["attention"]["kernel"], params["experts"]["kernel"]
        x = x + jnp.einsum(
            "bthk,dhk->btd",
            jnp.tanh(jnp.einsum("btd,dhk->bthk", x, attention)),
            attention,
        )
        return x + jnp.einsum(
            "btef,edf->btd", jnp.tanh(jnp.einsum("btd,edf->btef", x, experts)), experts
        )

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
    """A model whose embedding reads all leaves, so none is updated before the walk."""
    model = toy()

    def all_read(params, batch):
        return (
            embed(params, batch)
            * params["norm"]["scale"]
            @ params["lm_head"]["kernel"][:, :D]
        )

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
def test_models_match_the_ordinary_step(name):
    model = MODELS[name]()
    tx = optax.adam(0.1) if name in ("bare", "all read") else apollo(0.1)
    expected = train(ordinary_step(model, tx), model, tx, steps=3)
    assert_agree(train(model.step(tx), model, tx, steps=3), expected)
    loss = model.apply()(model.params, batches()[0], per_layer=model.per_layer)
    # The forward pass alone returns the loss without the auxiliary losses.
    assert float(loss) <= float(expected[1].loss[0]) + HIGHEST
    assert model.has_aux_loss == (float(loss) < float(expected[1].loss[0]) - 0.01)


@pytest.mark.usefixtures("x64")
def test_parameters_may_be_named_like_fields_of_the_state():
    """The state's `count` and `learning_rate` belong to no parameter of that name."""
    model = toy()

    def one_head(params, x, batch):
        return cross_entropy(
            (x * params["count"] + params["learning_rate"]) @ params["scale"], batch
        )

    params = {name: model.params[name] for name in ("embed", "layers")}
    params |= {
        "count": 1 + normal(4, D),
        "learning_rate": normal(6),
        "scale": normal(5, D, V),
    }
    model = model._replace(head=one_head, params=params)
    schedule = optax.linear_schedule(0.1, 0.0, 6)
    tx = optax.chain(
        optax.adam(schedule),
        optax.inject_hyperparams(optax.sgd)(learning_rate=schedule),
    )
    expected = train(ordinary_step(model, tx), model, tx, steps=3)
    assert_agree(train(model.step(tx), model, tx, steps=3), expected)


def test_bfloat16_keeps_its_dtype():
    model, tx = of_dtype(toy(), jnp.bfloat16), apollo(0.1)
    state = tx.init(model.params)
    params, new, metrics = jax.jit(model.step(tx))(model.params, state, batches()[0])
    chex.assert_trees_all_equal_shapes_and_dtypes((params, new), (model.params, state))
    assert metrics.loss.dtype == metrics.grad_norm.dtype == jnp.float32
    expected, _, expected_metrics = jax.jit(ordinary_step(model, tx))(
        model.params, state, batches()[0]
    )
    assert_agree(params, expected, highest=2.0**-7)
    np.testing.assert_allclose(metrics.loss, expected_metrics.loss, rtol=1e-3)


def test_runs_without_jit():
    model, tx = nothing_but_layers(), optax.sgd(0.1)
    arguments = model.params, tx.init(model.params), batches()[0]
    expected = jax.jit(model.step(tx))(*arguments)
    assert_agree(jax.tree.map(jnp.asarray, model.step(tx)(*arguments)), expected, 1e-5)


def test_runs_under_vmap():
    """A run over several seeds does this."""
    model, tx = toy(), optax.sgd(0.1, momentum=0.9)
    copies = jax.tree.map(lambda x: np.stack([x, 1.5 * x]), model.params)
    in_axes = (0, 0, None)
    states = jax.eval_shape(jax.vmap(tx.init), copies)
    states = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), states)
    many = jax.jit(jax.vmap(model.step(tx), in_axes))(copies, states, batches()[0])
    many_expected = jax.jit(jax.vmap(ordinary_step(model, tx), in_axes))(
        copies, states, batches()[0]
    )
    assert_agree(many, many_expected, 1e-5)
    assert float(many[2].loss[0]) != float(many[2].loss[1])


@pytest.mark.parametrize(
    "kind", [freeze, nnx.State, lambda tree: {k: freeze(v) for k, v in tree.items()}]
)
def test_other_mappings_keep_their_types(kind):
    tx, model = optax.adam(0.1), toy()
    params = kind(model.params)
    expected = jax.jit(model.step(tx))(
        model.params, tx.init(model.params), batches()[0]
    )
    actual = jax.jit(model.step(tx))(params, tx.init(params), batches()[0])
    chex.assert_trees_all_equal_structs(actual[:2], (params, tx.init(params)))
    chex.assert_trees_all_equal(jax.tree.leaves(actual), jax.tree.leaves(expected))


def test_nnx_variables_keep_their_boxes():
    """The model's functions get the boxes; the optimizer's state has none."""
    tx, model = optax.adam(0.1), toy()

    def unboxed(function):
        return lambda params, *rest: function(
            jax.tree.map(lambda x: x, nnx.to_pure_dict(params)), *rest
        )

    def by_part(function):
        return lambda params, *rest: function(
            {k: nnx.to_pure_dict(v) for k, v in params.items()}, *rest
        )

    boxed = model._replace(
        embed=by_part(embed), layer=unboxed(layer), head=by_part(head)
    )
    params = nnx.State(jax.tree.map(nnx.Param, model.params))
    state = tx.init(params)
    new, _, metrics = jax.jit(boxed.step(tx))(params, state, batches()[0])
    expected, _, expected_metrics = jax.jit(model.step(tx))(
        model.params, tx.init(model.params), batches()[0]
    )
    chex.assert_trees_all_equal_structs(new, params)
    chex.assert_trees_all_equal(jax.tree.leaves(new), jax.tree.leaves(expected))
    assert metrics == expected_metrics
