"""Arguments that the layer-wise step rejects when it is built or traced."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from apollo_optax import (
    ApolloDimensionNumbers,
    dequantize,
    dimension_numbers_by_path,
    limit_norm_growth,
    quantize,
    scale_by_apollo,
    scale_by_flattening,
    scale_by_param_matrix_rms,
    scale_by_racs,
)
from tests.layerwise_models import (
    KEY,
    NUMBERS,
    D,
    batches,
    in_int8,
    toy,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def assert_rejected(model, tx, match, per_layer=None, **settings):
    """Asserts that tracing the step raises an error that matches."""
    state = jax.eval_shape(tx.init, dequantize(model.params))
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(
            functools.partial(model.step(tx, **settings), key=KEY, per_layer=per_layer),
            model.params,
            state,
            batches()[0],
        )


@pytest.mark.parametrize(
    ("loss", "has_aux_loss", "match"),
    [
        (None, True, "must return a pair of activations and a loss, got a .*leave out"),
        (jnp.ones(4), True, r"a scalar, got shape \(4,\); return its sum or its mean"),
        (jnp.ones(()), False, "must return activations like .* give has_aux_loss"),
    ],
)
def test_rejects_an_output_that_does_not_fit_has_aux_loss(loss, has_aux_loss, match):
    model = toy()

    def layer(*args):
        x = model.layer(*args)
        return x if loss is None else (x, loss)

    other = model._replace(layer=layer, has_aux_loss=has_aux_loss)
    assert_rejected(other, optax.sgd(0.1), match)


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        (
            "blocks",
            r"no 'blocks' at '' \(it has \['embed', 'layers', 'lm_head', 'norm'\]\); "
            "give layers=",
        ),
        ("layers/block/stack", r"no 'stack' at 'layers/block' \(it has \['kernel'\]\)"),
        ("norm/scale/stack", r"no 'stack' at 'norm/scale' \(it is "),
        ("", "no '' at ''"),
    ],
)
def test_rejects_a_path_without_a_stack(layers, match):
    assert_rejected(toy(), optax.sgd(0.1), match, layers=layers)


@pytest.mark.parametrize("leaf", [(2, D), (), (0, D)])
def test_rejects_leaves_of_another_depth(leaf):
    model = toy()
    model.params["layers"]["odd"] = jnp.ones(leaf)
    shape = re.escape(str(leaf))
    match = rf"number of layers as its leading axis, got .*'layers/odd': {shape}"
    assert_rejected(model, optax.sgd(0.1), match)


def test_rejects_a_stack_without_layers():
    assert_rejected(toy(0), optax.sgd(0.1), "number of layers as its leading axis")
    assert_rejected(
        toy()._replace(params={**toy().params, "layers": {}}), optax.sgd(0.1), "got {}"
    )
    assert_rejected(
        toy()._replace(params=jnp.ones((3, 2))), optax.sgd(0.1), "no 'layers' at ''"
    )


@pytest.mark.parametrize("rows", [2, 4])
def test_rejects_per_layer_of_another_depth(rows):
    match = (
        "per_layer must have the number of layers, 3, as its leading axis, "
        rf"got .*\({rows},\)"
    )
    assert_rejected(toy(), optax.sgd(0.1), match, per_layer={"window": np.ones(rows)})


@pytest.mark.parametrize("layers", [None, ("layers",)])
def test_layers_must_be_a_string(layers):
    with pytest.raises(
        TypeError, match=r"layers must be a string such as 'decoder/layers', got "
    ):
        toy().step(optax.sgd(0.1), layers=layers)


@pytest.mark.parametrize(
    ("made_by", "match"),
    [
        (optax.lion, r"it lacks '0/nu/.*' of shape "),
        (optax.sgd, r"it lacks '0/.*' of shape "),
        (
            optax.adam,
            r"it lacks '0/mu/layers/block/kernel' of shape \(3, 4, 6\)",
        ),
    ],
)
def test_rejects_foreign_state(made_by, match):
    """The last case is the state of int8 weights that were not dequantized."""
    model = in_int8(toy())
    params = model.params if made_by is optax.adam else dequantize(model.params)
    state = made_by(0.1).init(params)
    with pytest.raises(
        ValueError, match=rf"opt_state is not tx.init\(dequantize\(params\)\): {match}"
    ):
        model.step(optax.adam(0.1))(model.params, state, batches()[0], key=KEY)


@pytest.mark.skipif(
    optax.__version__ == "0.2.6", reason="Optax 0.2.6 does not change that dtype"
)
def test_rejects_a_state_that_changes_its_dtype():
    """Injected decay rates are float32 if any leaf is, and turn bfloat16 moments so."""
    model = toy()
    model.params["layers"] = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), model.params["layers"]
    )
    match = (
        "'inner_state/0/mu/layers/.*' of the optimizer's state from bfloat16 into "
        "float32"
    )
    assert_rejected(
        model,
        optax.inject_hyperparams(optax.adamw)(optax.constant_schedule(0.1)),
        match,
    )


@pytest.mark.parametrize("depth", [2, 4, 6])
@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("limit", [1.01, None])
def test_rejects_stacked_vectors_taken_for_a_matrix(depth, rank, limit):
    """The default rule takes them for one unless they are called `scale` or `bias`."""
    model = toy(depth)
    model.params["layers"]["weight"] = model.params["layers"]["scale"]
    tx = scale_by_apollo(
        rank, norm_growth_limit=limit, weight_dimension_numbers=NUMBERS
    )
    assert_rejected(model, tx, "layers/weight'")


@pytest.mark.parametrize("depth", [2, 4, 6])
@pytest.mark.parametrize("make", [scale_by_racs, scale_by_flattening])
def test_no_algorithm_takes_stacked_vectors_for_a_matrix(make, depth):
    model = toy(depth)
    model.params["layers"]["weight"] = model.params["layers"]["scale"]
    assert_rejected(model, make(weight_dimension_numbers=NUMBERS), "layers/weight'")


@pytest.mark.parametrize("make", [scale_by_apollo, scale_by_racs, scale_by_flattening])
def test_takes_a_stack_of_one_vector(make):
    """It is a vector to the ordinary step as well, since one of its sides is 1."""
    model = toy(1)
    model.params["layers"]["weight"] = model.params["layers"]["scale"]
    tx = make(weight_dimension_numbers=NUMBERS)
    model.step(tx)(model.params, tx.init(model.params), batches()[0])


@pytest.mark.parametrize(
    "make",
    [scale_by_apollo, scale_by_racs, scale_by_flattening, scale_by_param_matrix_rms],
)
@pytest.mark.parametrize("numbers", [((0, 1), 2), (1, (0, 2)), (0, 2)])
def test_rejects_a_matrix_that_the_layers_are_a_part_of(make, numbers):
    tx = make(
        weight_dimension_numbers=dimension_numbers_by_path(
            [(r"layers/block/kernel$", ApolloDimensionNumbers(*numbers))]
        )
    )
    assert_rejected(toy(), tx, "layers/block/kernel'")


@pytest.mark.parametrize("depth", [1, 3])
def test_updates_without_a_state_do_not_take_stacked_vectors_for_a_matrix(depth):
    """One layer alone looks like one of many, whose update would be another."""
    model = toy(depth)
    model.params["layers"]["weight"] = model.params["layers"]["scale"]
    tx = scale_by_param_matrix_rms(weight_dimension_numbers=NUMBERS)
    match = "'layers/weight' of shape .* its axis 0 is a part of the matrix"
    assert_rejected(model, tx, match)


class Remembered(NamedTuple):
    norm: Any


def norm_of_all_layers():
    """Divides by a norm of each leaf, an array with as many axes as the leaf."""

    def init(params):
        return Remembered(
            jax.tree.map(lambda x: jnp.zeros((1,) * x.ndim, x.dtype), params)
        )

    def update(updates, state, params=None):
        del params
        norms = jax.tree.map(
            lambda x, norm: 0.9 * norm + jnp.sqrt(jnp.sum(x**2, keepdims=True)),
            updates,
            state.norm,
        )
        return jax.tree.map(
            lambda x, norm: x / (norm + 1e-8), updates, norms
        ), Remembered(norms)

    return optax.GradientTransformation(init, update)


def accumulating_within_a_chain(tx, every):
    steps = optax.MultiSteps(tx, every).gradient_transformation()
    return optax.chain(optax.identity(), steps)


MIXING: dict[str, Callable[[], optax.GradientTransformation]] = {
    # These mix the layers of a leaf.
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "limit_norm_growth": lambda: optax.chain(
        optax.scale_by_adam(), limit_norm_growth()
    ),
    "novograd": lambda: optax.novograd(0.1),
    "zero_nans": optax.zero_nans,
    "galore": lambda: optax.contrib.galore(0.1, 2),
    "sm3": lambda: optax.sm3(0.1),
    "norms of a leaf": norm_of_all_layers,
    # These mix all leaves.
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "prodigy": optax.contrib.prodigy,
    "dog": optax.contrib.dog,
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", MIXING)
def test_rejects_states_that_layers_share(name):
    assert_rejected(
        toy(), MIXING[name](), "'.*' of the optimizer's .*use the ordinary step"
    )


@pytest.mark.parametrize("wrap", [optax.MultiSteps, accumulating_within_a_chain])
def test_rejects_steps_that_do_not_tell_the_layer(wrap):
    assert_rejected(toy(), wrap(optax.adam(0.1), 2), "mini_step' of optax.MultiSteps")


@pytest.mark.parametrize("axis", [0, -2])
def test_rejects_int8_groups_along_the_layers(axis):
    model = toy()
    model.params["layers"]["scale"] = quantize(
        model.params["layers"]["scale"], axis=axis, group_size=8
    )
    assert_rejected(model, optax.sgd(0.1), "'layers/scale'")


@pytest.mark.parametrize("where", ["layers", "lm_head"])
def test_rejects_int8_without_a_key(where):
    model = toy()
    params = {
        **model.params,
        where: jax.eval_shape(lambda: jax.tree.map(quantize, model.params[where])),
    }
    state = optax.sgd(0.1).init(params)
    with pytest.raises(
        ValueError, match=rf"'{where}/.*' is in int8.*give the step a key="
    ):
        model.step(optax.sgd(0.1))(params, state, batches()[0])
