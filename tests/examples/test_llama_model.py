import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama.config import PRESETS, LlamaConfig, param_count, preset
from examples.llama.model import Block, Llama, Params, init_model, next_token_loss, rotary
from examples.llama.usage import UsageError

NOMINAL = {"60m": 58e6, "130m": 134e6, "350m": 368e6, "1b": 1.34e9, "7b": 6.74e9, "13b": 13.0e9}


def abstract_params(config: LlamaConfig) -> Params:
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def tokens_of(config: LlamaConfig, shape: tuple[int, int], seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_that_of_the_model(name: str) -> None:
    config = PRESETS[name]
    shapes = jax.tree.leaves(abstract_params(config))
    assert sum(math.prod(leaf.shape) for leaf in shapes) == param_count(config)
    assert all(leaf.dtype == jnp.float32 for leaf in shapes)
    if name in NOMINAL:
        assert param_count(config) == pytest.approx(NOMINAL[name], rel=0.01)


def test_parameter_paths_and_shapes(small: LlamaConfig) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(small))
    names = {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}
    L, D, F, V = 3, 16, 24, 384
    assert names == {
        "embed/embedding": (V, D),
        **{f"layers/attention/{name}_proj/kernel": (L, D, D) for name in "qkvo"},
        "layers/mlp/gate_proj/kernel": (L, D, F),
        "layers/mlp/up_proj/kernel": (L, D, F),
        "layers/mlp/down_proj/kernel": (L, F, D),
        "layers/attention_norm/scale": (L, D),
        "layers/mlp_norm/scale": (L, D),
        "final_norm/scale": (D,),
        "lm_head/kernel": (D, V),
    }


def test_initial_weights_have_the_configured_spread_and_differ_by_layer(small: LlamaConfig) -> None:
    _, params = init_model(small, seed=0)
    up_LxDxF = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert float(jnp.std(up_LxDxF)) == pytest.approx(small.initializer_range, rel=0.1)
    assert float(jnp.std(params["embed"]["embedding"])) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(up_LxDxF[0], up_LxDxF[1])
    _, again = init_model(small, seed=0)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    _, other = init_model(small, seed=1)
    assert not np.array_equal(params["lm_head"]["kernel"], other["lm_head"]["kernel"])


def test_later_tokens_do_not_change_earlier_logits(small: LlamaConfig) -> None:
    graphdef, params = init_model(small, seed=0)
    model = nnx.merge(graphdef, params)
    tokens_BxT = tokens_of(small, (2, 12))
    changed_BxT = tokens_BxT.at[:, 7:].set((tokens_BxT[:, 7:] + 1) % small.vocab_size)
    before, after = model(tokens_BxT), model(changed_BxT)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])


def test_earlier_tokens_change_later_logits(small: LlamaConfig) -> None:
    graphdef, params = init_model(small, seed=0)
    model = nnx.merge(graphdef, params)
    tokens_BxT = tokens_of(small, (1, 12))
    changed_BxT = tokens_BxT.at[0, 0].set((tokens_BxT[0, 0] + 1) % small.vocab_size)
    assert not np.allclose(model(tokens_BxT)[0, -1], model(changed_BxT)[0, -1], atol=1e-7)


def test_scan_equals_a_loop_over_the_layers(small: LlamaConfig) -> None:
    graphdef, params = init_model(small, seed=0)
    model = nnx.merge(graphdef, params)
    tokens_BxT = tokens_of(small, (2, 10))
    block_graphdef = nnx.graphdef(nnx.eval_shape(lambda: Block(small, rngs=nnx.Rngs(0))))
    x_BxTxD = model.embed(tokens_BxT)
    for layer in range(small.num_layers):
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        x_BxTxD = nnx.merge(block_graphdef, weights)(x_BxTxD)
    expected = model.lm_head(model.final_norm(x_BxTxD))
    np.testing.assert_allclose(model(tokens_BxT), expected, atol=1e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_program_size_does_not_grow_with_depth(remat: str) -> None:
    def program_lines(num_layers: int) -> int:
        config = LlamaConfig(64, 16, 24, 2, num_layers)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(config, remat=remat, rngs=nnx.Rngs(0))))
        grad = jax.grad(functools.partial(next_token_loss, graphdef))
        tokens = jax.ShapeDtypeStruct((1, 5), jnp.int32)
        return len(jax.jit(grad).lower(abstract_params(config), tokens).as_text().splitlines())

    assert program_lines(2) == program_lines(9)


def test_remat_gives_the_same_loss_and_gradients(small: LlamaConfig) -> None:
    tokens_BxS = tokens_of(small, (2, 9))
    results = []
    for remat in ("none", "full"):
        graphdef, params = init_model(small, seed=0, remat=remat)
        grad = jax.value_and_grad(functools.partial(next_token_loss, graphdef))
        assert ("remat" in str(jax.make_jaxpr(grad)(params, tokens_BxS))) == (remat == "full")
        results.append(grad(params, tokens_BxS))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *results)


def test_initial_loss_is_that_of_guessing(small: LlamaConfig) -> None:
    graphdef, params = init_model(small, seed=0)
    loss = next_token_loss(graphdef, params, tokens_of(small, (4, 33)))
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(math.log(small.vocab_size), abs=0.05)


def test_rotary_scores_depend_on_relative_position_only() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(q_position: int, k_position: int) -> float:
        rotated_q = rotary(q, jnp.array([q_position]), 10_000.0)
        rotated_k = rotary(k, jnp.array([k_position]), 10_000.0)
        return float(jnp.vdot(rotated_q, rotated_k))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-3)
    np.testing.assert_array_equal(rotary(q, jnp.array([0]), 10_000.0), q)


def test_heads_of_odd_size_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size 30 must be a multiple of twice num_heads 6"):
        LlamaConfig(8, 30, 8, 6, 1)


def test_unknown_preset_lists_the_nearest_first() -> None:
    with pytest.raises(UsageError, match=r"--model '130' is unknown; choose one of: 130m, "):
        preset("130")
