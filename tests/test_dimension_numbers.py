"""Which leaves are matrices, by the default rule and by dimension numbers."""

import dataclasses
import pathlib
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import apollo_optax
from apollo_optax import (
    ApolloDimensionNumbers,
    dimension_numbers_by_path,
    dimension_numbers_from,
    scale_by_apollo,
)
from apollo_optax._dimension_numbers import resolve

MUON = optax.contrib.MuonDimensionNumbers
# Optax 0.2.6 has Muon's objects only.
GALORE = getattr(optax.contrib, "GaLoreDimensionNumbers", MUON)

STACKED = ApolloDimensionNumbers(1, 2)
# Flax before 0.12.7 calls it nnx.pure.
as_pure = getattr(nnx, "as_pure", None) or nnx.pure


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def matrices(params, weight_dimension_numbers=None):
    """Paths of the leaves that are matrices, with their contracted axes."""
    axes = resolve(weight_dimension_numbers, params)
    return {
        "/".join(path): found.contracted
        for path, found in axes.items()
        if found is not None
    }


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, 8)(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.Dense(12)(nn.RMSNorm()(x)))
        return nn.Dense(32, name="lm_head")(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs)
        self.lm_head = nnx.Linear(8, 32, rngs=rngs)


def test_default_rule_on_a_linen_model():
    key, tokens = jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(LinenModel().init, key, tokens)["params"]
    assert matrices(params) == {"Dense_0/kernel": (1,), "Dense_1/kernel": (0,)}
    with pytest.warns(UserWarning, match=r"MultiHeadDotProductAttention_0/\w+/kernel"):
        scale_by_apollo(4).init(params)


def test_default_rule_on_an_nnx_model():
    params = nnx.state(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))), nnx.Param)
    assert matrices(params) == {"layers/0/kernel": (0,), "layers/1/kernel": (0,)}


def test_warns_of_a_model_in_a_module_that_is_called_like_a_head():
    """All its kernels would get Adam, and the user would save no memory."""
    kernels = {"dense_0": {"kernel": leaf(8, 16)}, "dense_1": {"kernel": leaf(16, 4)}}
    params = {"classifier": kernels}
    with pytest.warns(UserWarning, match="Adam trains all 2 kernels") as caught:
        scale_by_apollo(4).init(params)
    message = str(caught[0].message)
    assert "'classifier/dense_0/kernel' (8, 16)" in message
    rules = dimension_numbers_by_path([("kernel$", ApolloDimensionNumbers())])
    assert len(matrices(params, rules)) == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "params",
    [
        {"embed": {"embedding": leaf(32, 8)}, "lm_head": {"kernel": leaf(8, 32)}},
        {"embeddings": {"word_embeddings": {"embedding": leaf(32, 8)}}},
        {"head": {"dense": {"kernel": leaf(8, 8)}}, "mlp": {"kernel": leaf(8, 16)}},
        {"head": {"dense": {"bias": leaf(1, 8)}}},
    ],
    ids=["embedding and head", "nested embedding", "other matrices", "vectors"],
)
def test_does_not_warn_of_embeddings_and_heads(params):
    scale_by_apollo(4).init(params)


def test_maxtext_layers_need_rules():
    # This is the tree of MaxText's checkpoints. With scan_layers, axis 1 is the layer
    # axis.
    attention = {
        "query": {"kernel": leaf(8, 2, 4, 4)},
        "out": {"kernel": leaf(4, 2, 4, 8)},
        "qkv_bias": {"bias": leaf(2, 4, 4)},
    }
    params = {
        "token_embedder": {"embedding": leaf(32, 8)},
        "position_embedder": {"embedding": leaf(16, 8)},
        "decoder": {
            "decoder_norm": {"scale": leaf(8)},
            "layers": {
                "pre_self_attention_layer_norm": {"scale": leaf(8, 2)},
                "self_attention": attention,
                "mlp": {
                    "wi_0": {"kernel": leaf(8, 2, 12)},
                    "wo": {"kernel": leaf(12, 2, 8)},
                },
            },
            "logits_dense": {"kernel": leaf(8, 32)},
        },
    }
    assert matrices(params) == {}
    with pytest.warns(UserWarning, match="three or more axes") as caught:
        scale_by_apollo(4).init(params)
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith("Adam trains 4 leaves of three or more axes, ")
    total = 32 * 8 + 16 * 8 + 8 + 16 + 8 * 32 + 256 + 256 + 32 + 192 + 192
    assert f"{(256 + 256 + 192 + 192) / total:.0%} of the parameters" in message
    assert "'decoder/layers/self_attention/out/kernel' (4, 2, 4, 8)" in message
    assert "weight_dimension_numbers" in message
    rules = dimension_numbers_by_path(
        [
            (
                r"self_attention/(query|key|value)/kernel",
                ApolloDimensionNumbers(0, (2, 3)),
            ),
            (r"self_attention/out/kernel", ApolloDimensionNumbers((0, 2), 3)),
            (r"mlp/.*/kernel", ApolloDimensionNumbers(0, 2)),
        ]
    )
    prefix = "decoder/layers/"
    assert matrices(params, rules) == {
        prefix + "self_attention/query/kernel": (0,),
        prefix + "self_attention/out/kernel": (3,),
        prefix + "mlp/wi_0/kernel": (0,),
        prefix + "mlp/wo/kernel": (2,),
    }


@pytest.mark.parametrize(
    ("path", "is_matrix"),
    [
        ("Dense_0/kernel", True),
        # A name that only contains "Head" is not that of an output head.
        ("MultiHeadDotProductAttention_0/kernel", True),
        ("Heads_3/kernel", True),
        ("head_norm/kernel", True),
        ("w", True),
        # A module may be called scale.
        ("scale/kernel", True),
        ("norm/scale", False),
        ("dense/bias", False),
        ("embedder/input_embedding", False),
        ("wte/embedding", False),
        ("model/embed_tokens/weight", False),
        ("lm_head/kernel", False),
        ("head/kernel", False),
        ("emb/weight", False),
        ("tok_emb", False),
        ("token_embed/kernel", False),
        ("word_emb/weight", False),
        ("pos_emb", False),
        # Diffusion models project the embedding of the time step by a kernel.
        ("time_emb_proj/kernel", True),
        ("emb_norm/kernel", True),
    ],
)
def test_default_rule_by_name(path, is_matrix):
    tree = leaf(4, 6)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    assert bool(matrices(tree)) == is_matrix


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4), (2, 3, 4, 5)])
def test_default_rule_leaves_other_than_2d_to_adam(shape):
    assert not matrices({"kernel": leaf(*shape)})


def test_no_warning_if_all_axes_are_known():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = {"embed": {"table": leaf(2, 3, 4)}, "x": {"bias": leaf(2, 3, 4)}}
        scale_by_apollo(2).init(known)
        for given in (STACKED, {"kernel": None}):
            tx = scale_by_apollo(2, weight_dimension_numbers=given)
            tx.init({"kernel": leaf(2, 3, 4)})


@pytest.mark.parametrize(
    "given",
    [
        {"a": {"kernel": STACKED, "bias": None}, "b": STACKED},
        {
            "a": {"kernel": STACKED, "bias": None},
            "b": {"c": STACKED, "d": [STACKED, STACKED]},
        },
        {
            "a": {"kernel": STACKED, "bias": None},
            "b": STACKED,
            "other": STACKED,
        },
        lambda params: jax.tree.map(lambda x: STACKED if x.ndim == 3 else None, params),
    ],
)
def test_accepts_prefixes_and_callables(given):
    kernel = leaf(3, 4, 6)
    params = {
        "a": {"kernel": kernel, "bias": leaf(6)},
        "b": {"c": kernel, "d": (kernel, kernel)},
    }
    assert matrices(params, given) == dict.fromkeys(
        ("a/kernel", "b/c", "b/d/0", "b/d/1"), (1,)
    )


@pytest.mark.parametrize("numbers", [ApolloDimensionNumbers, MUON])
def test_a_callable_model_may_hold_the_numbers(numbers):
    """As an Equinox model does after ``jax.tree.map`` over it."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Linear:
        weight: jax.Array
        bias: jax.Array

        def __call__(self, x):
            raise AssertionError("these are the numbers, not a function of parameters")

    params = Linear(jnp.ones((4, 6)), jnp.ones(6))
    given = jax.tree.map(lambda x: numbers(1, 0) if x.ndim == 2 else None, params)
    if numbers is MUON:
        given = dimension_numbers_from(given)
    assert matrices(params, given) == {"weight": (0,)}
    assert matrices(params, dimension_numbers_from(given)) == {"weight": (0,)}


def test_matches_by_path_whatever_the_node_types():
    model = NnxModel(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    given = {
        "layers": [ApolloDimensionNumbers(1, 0), None],
        "norm": None,
        "attention": None,
    }
    given |= {
        "embed": None,
        "lm_head": {"kernel": ApolloDimensionNumbers(), "bias": None},
    }
    given["layers"][0] = {"kernel": ApolloDimensionNumbers(1, 0), "bias": None}
    expected = {"layers/0/kernel": (1,), "lm_head/kernel": (0,)}
    assert matrices(state, given) == matrices(as_pure(state), given) == expected
    # A callable may return its numbers in boxes. jax.tree.map over an nnx.State does.
    boxed = jax.tree.map(
        lambda x: ApolloDimensionNumbers() if x.ndim == 2 else None, state
    )
    assert "embed/embedding" in matrices(state, boxed)


@pytest.mark.parametrize("numbers", [MUON, GALORE])
@pytest.mark.parametrize("is_callable", [False, True])
def test_converts_the_dimension_numbers_of_other_optimizers(numbers, is_callable):
    given = {
        "query": {"kernel": numbers(0, (1, 2)), "bias": None},
        "out": {"kernel": numbers([0, 1], (-1,)), "bias": optax.MaskedNode()},
        "mlp": numbers(-2, -1),  # This is the prefix of two kernels.
        "norm": None,
    }
    params = {
        "query": {"kernel": leaf(8, 2, 5), "bias": leaf(2, 5)},
        "out": {"kernel": leaf(2, 5, 8), "bias": leaf(8)},
        "mlp": {"wi": leaf(3, 8, 12), "wo": leaf(3, 12, 8)},
        "norm": {"scale": leaf(8, 3)},
    }
    tree = (lambda params: given) if is_callable else given
    converted = dimension_numbers_from(tree)
    assert callable(converted) == is_callable
    if not is_callable:
        assert converted["query"]["kernel"] == ApolloDimensionNumbers(0, (1, 2))
        assert converted["out"]["bias"] is None
    contracted = {"query/kernel": (0,), "out/kernel": (2,)}
    assert matrices(params, converted) == contracted | {"mlp/wi": (1,), "mlp/wo": (2,)}


def test_converts_objects_of_other_types_and_in_boxes():
    sharded = dataclasses.make_dataclass(
        "Sharded", ["reduction_axis", "output_axis", "sharding"]
    )
    state = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)

    def numbers_of(params):
        return jax.tree.map(
            lambda x: sharded(0, 1, None) if x.ndim == 2 else None, params
        )

    numbers = numbers_of(state)
    assert isinstance(numbers["lm_head"]["kernel"], nnx.Variable)
    for converted in (
        dimension_numbers_from(numbers),
        dimension_numbers_from(as_pure(numbers)),
        dimension_numbers_from(numbers_of),
    ):
        found = matrices(state, converted)
        assert found["lm_head/kernel"] == found["layers/0/kernel"] == (0,)
        assert "attention/out/kernel" not in found


@pytest.mark.parametrize("given", [MUON(), GALORE(), lambda params: MUON()])
def test_one_object_of_another_optimizer_is_for_leaves_of_two_or_more_axes(given):
    params = {"embedding": leaf(9, 4), "stack": leaf(4, 6, 3), "bias": leaf(4)}
    found = matrices(params, dimension_numbers_from(given))
    assert found == {"embedding": (1,), "stack": (0,)}


def test_no_dimension_numbers_of_another_optimizer_mean_the_default_rule():
    assert dimension_numbers_from(None) is None


def test_a_callable_of_another_optimizer_that_returns_none_leaves_all_to_adam():
    assert not matrices({"w": leaf(4, 6)}, dimension_numbers_from(lambda params: None))


def test_converts_the_numbers_of_a_tree_that_muon_trains():
    """One table serves both optimizers, as it is."""
    params = {"query": jnp.ones((8, 2, 5)), "bias": jnp.ones(5)}
    given = {"query": MUON(0, (1, 2)), "bias": None}
    optax.contrib.muon(0.1, muon_weight_dimension_numbers=given).init(params)
    tx = scale_by_apollo(2, weight_dimension_numbers=dimension_numbers_from(given))
    assert tx.init(params).mu["query"].shape == (2, 2, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": {"kernel": "muon"}}, "'muon' for 'a/kernel'.*MuonDimensionNumbers"),
        ({"a": (0, 1)}, "0 for 'a/0'.*or None for Adam"),
        ({"a": jnp.ones(2)}, "for 'a'"),
        (3, "got 3"),
    ],
)
def test_rejects_a_tree_without_dimension_numbers(given, message):
    with pytest.raises(TypeError, match=message):
        dimension_numbers_from(given)
    converted = dimension_numbers_from(lambda params: given)
    with pytest.raises(TypeError, match=message):
        scale_by_apollo(2, weight_dimension_numbers=converted).init({"a": leaf(4, 6)})


def test_rejects_converted_numbers_that_do_not_fit():
    tx = scale_by_apollo(
        2, weight_dimension_numbers=dimension_numbers_from({"w": MUON(0, 2)})
    )
    with pytest.raises(ValueError, match="does not fit 'w' of shape"):
        tx.init({"w": leaf(4, 6)})


def test_accepts_numpy_axes_and_lists():
    params = {"w": leaf(3, 4, 6)}
    for numbers in (
        ApolloDimensionNumbers(np.int64(1), np.int32(2)),
        ApolloDimensionNumbers([1], [2]),
    ):
        assert matrices(params, numbers) == {"w": (1,)}


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("projection", ["random", "rademacher", "svd"])
def test_leaves_without_elements_keep_their_shape(shape, projection):
    tx = scale_by_apollo(2, projection=projection)
    params = {"empty": jnp.zeros(shape), "kernel": jnp.ones((2, 3))}
    updates, state = tx.update(params, tx.init(params))
    assert updates["empty"].shape == state.mu["empty"].shape == shape


def test_keys_with_several_path_components():
    """Haiku joins the names of modules, and flattened dicts have tuples as keys."""
    params = {
        "transformer/~/lm_head": {"w": leaf(4, 6)},
        "mlp/~/linear": {"w": leaf(4, 6)},
    }
    assert matrices(params) == {"mlp/~/linear/w": (0,)}
    flattened = {("embed", "embedding"): leaf(9, 4), ("mlp", "w"): leaf(4, 6)}
    assert matrices(flattened) == {"mlp/w": (0,)}
    with pytest.raises(ValueError, match="same path"):
        matrices({"a/b": leaf(4, 6), "a": {"b": leaf(4, 6)}})


def test_node_with_two_children_is_no_box():
    """A user's node may have a method of the same name as a method of Flax's boxes."""
    params = {"layer": Pair(jnp.ones((2, 3)), jnp.ones((2, 4)))}
    tx = scale_by_apollo(1)
    updates, state = tx.update(params, tx.init(params))
    assert isinstance(state.mu["layer"], Pair)
    assert updates["layer"].first.shape == (2, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    first: jax.Array
    second: jax.Array

    def get_value(self):
        return self.first @ self.second


def test_the_recipe_for_maxtext_is_the_tested_patch():
    root = pathlib.Path(__file__).parents[1]
    patch = (root / "integrations/maxtext/maxtext.patch").read_text()
    added = "\n".join(re.findall(r"^\+(?!\+\+)(.*)$", patch, re.MULTILINE))
    page = (root / "docs/recipes.md").read_text()
    (recipe,) = re.findall(
        r"```python\n(  elif config.opt_type.*?)\n```", page, re.DOTALL
    )
    assert recipe in added
    for name in re.findall(r'`(APOLLO\w* = "\w+")`', page):
        assert name in added


def test_sides_of_equal_size_contract_the_reduction_side():
    square, heads = {"w": leaf(5, 5)}, {"w": leaf(6, 2, 3)}
    assert matrices(square, {"w": ApolloDimensionNumbers(0, 1)}) == {"w": (0,)}
    assert matrices(square, {"w": ApolloDimensionNumbers(1, 0)}) == {"w": (1,)}
    assert matrices(heads, {"w": ApolloDimensionNumbers((1, 2), 0)}) == {"w": (1, 2)}


def test_rules_by_path_fall_back_to_the_default_rule():
    params = {
        "a": {"kernel": leaf(3, 4, 5), "bias": leaf(3, 5)},
        "b": {"kernel": leaf(4, 5)},
    }
    params["embed"] = {"embedding": leaf(9, 4)}
    given = dimension_numbers_by_path([(r"^a/kernel$", STACKED), (r"kernel", None)])
    # The first rule that matches counts.
    assert matrices(params, given) == {"a/kernel": (1,)}
    given = dimension_numbers_by_path([(r"a/.*kernel", STACKED)])
    assert matrices(params, given) == {"a/kernel": (1,), "b/kernel": (0,)}
    with pytest.raises(ValueError, match="no rule matches 1 leaf of three or more"):
        dimension_numbers_by_path([])(params)


def attention(number_of_layers, *shape):
    """Unstacked layers, with kernels that no rule of the tests below matches."""
    return {
        f"layers_{i}": {
            "attn": {name: {"kernel": leaf(*shape)} for name in ("q", "k")},
            "mlp": {"kernel": leaf(4, 6), "bias": leaf(6)},
        }
        for i in range(number_of_layers)
    }


def printed_rules(error):
    """The rules in the message of an error, as a user pastes them."""
    lines = [line for line in str(error).splitlines() if line.startswith("    (")]
    return eval("\n".join(["[", *lines, "]"]), dict(vars(apollo_optax)))


def test_error_counts_the_leaves_and_prints_a_rule_per_pattern():
    params = attention(12, 16, 4, 8)
    given = [(r"nothing$", STACKED)]
    with pytest.raises(ValueError, match="no rule matches 24 leaves of") as error:
        dimension_numbers_by_path(given)(params)
    message = str(error.value)
    assert "placeholders -2 and -1" in message
    assert "None instead of ApolloDimensionNumbers(...)" in message
    assert "12 leaves, the first of shape (16, 4, 8)" in message
    placeholder = ApolloDimensionNumbers(-2, -1)
    rules = printed_rules(error.value)
    # Each leaf of the twelve layers is matched by one of two patterns.
    assert rules == [
        (r"^layers_\d+/attn/k/kernel$", placeholder),
        (r"^layers_\d+/attn/q/kernel$", placeholder),
    ]
    found = matrices(params, dimension_numbers_by_path([*given, *rules]))
    by_default = {f"layers_{i}/mlp/kernel" for i in range(12)}
    attention_kernels = {f"layers_{i}/attn/{x}/kernel" for i in range(12) for x in "qk"}
    assert set(found) == by_default | attention_kernels


def test_error_prints_at_most_three_rules():
    params = {name: {"kernel": leaf(2, 3, 4)} for name in "abcde"}
    with pytest.raises(ValueError, match="5 leaves") as error:
        dimension_numbers_by_path([])(params)
    assert "# and rules for 2 more patterns" in str(error.value)
    assert len(printed_rules(error.value)) == 3


@pytest.mark.parametrize(
    "key",
    [
        "w",
        "a.b-c (d)+",
        "it's",
        "a\nb",
        "a\\d",
        "transformer/~/conv2d",
        "12",
        "\u0663",
        "",
    ],
)
def test_printed_rule_matches_whatever_the_name(key):
    params = {key: {"w": leaf(2, 3, 4)}, "other": leaf(4, 6)}
    with pytest.raises(ValueError, match="no rule matches 1 leaf") as error:
        dimension_numbers_by_path([])(params)
    rules = printed_rules(error.value)
    found = matrices(params, dimension_numbers_by_path(rules))
    assert found == {f"{key}/w": (1,), "other": (0,)}


@pytest.mark.parametrize("wrap", [lambda x: x, nnx.Param], ids=["array", "box"])
def test_one_vector_of_parameters_warns(wrap):
    params = wrap(jnp.ones(24))
    for make in (lambda: scale_by_apollo(2), lambda: apollo_optax.apollo_mini(0.1)):
        with pytest.warns(
            UserWarning, match="one vector of shape.*ravel_pytree"
        ) as caught:
            make().init(params)
        assert len(caught) == 1
    # With given dimension numbers, the user knows that it is no matrix.
    scale_by_apollo(2, weight_dimension_numbers=lambda _: None).init(params)
    # Vectors in a tree, as biases are, need no warning.
    scale_by_apollo(2).init({"bias": params})
    scale_by_apollo(2).init([params])


def test_flattened_parameters_warn():
    params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
    with pytest.warns(UserWarning, match=r"one vector of shape \(30,\)"):
        optax.flatten(scale_by_apollo(2)).init(params)
    with pytest.warns(UserWarning, match=r"one vector of shape \(30,\)"):
        scale_by_apollo(2).init(ravel_pytree(params)[0])
