import dataclasses
import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama.config import PRESETS, LlamaConfig, param_count, preset
from examples.llama.model import (
    REMAT_POLICIES,
    Batch,
    Block,
    Execution,
    Llama,
    Params,
    graphdef_of,
    init_params,
    look_up,
    next_token_loss,
    rotary,
    rotary_frequencies,
)
from examples.llama.optimizers.parameters import lr_group, path_name
from examples.llama.run.errors import UsageError

# Nominal sizes of the models in the papers, and exact sizes of published models.
NOMINAL = {
    **{
        "60m": 58e6,
        "130m": 134e6,
        "350m": 368e6,
        "1b": 1.34e9,
        "7b": 6.74e9,
        "13b": 13.0e9,
    },
    **{
        "llama-3.2-1b": 1_235_814_400,
        "llama-3-8b": 8_030_261_248,
        "llama-3.1-8b": 8_030_261_248,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-8b": 8_190_735_360,
        "mistral-7b": 7_248_023_552,
    },
}
GROUPED = LlamaConfig(
    384, 24, 40, 4, 3, num_kv_heads=2, head_size=8, max_seq_len=128, tied_head=True
)


def abstract_params(config: LlamaConfig) -> Params:
    return jax.eval_shape(lambda: init_params(config, seed=0))


def model_of(config: LlamaConfig) -> Llama:
    return nnx.merge(graphdef_of(config), init_params(config, seed=0))


def tokens_of(config: LlamaConfig, shape: tuple[int, int], seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name: str) -> None:
    config = PRESETS[name]
    shapes = jax.tree.leaves(abstract_params(config))
    assert sum(math.prod(leaf.shape) for leaf in shapes) == param_count(config)
    assert all(leaf.dtype == jnp.float32 for leaf in shapes)
    if name in NOMINAL:
        assert param_count(config) == pytest.approx(
            NOMINAL[name], rel=0 if isinstance(NOMINAL[name], int) else 0.01
        )


def test_parameter_paths_and_shapes(small: LlamaConfig) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(small))
    names = {
        jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves
    }
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


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("mistral", {}),
        (
            "qwen2",
            {
                "layers/attention/q_proj/bias": (3, 16),
                "layers/attention/k_proj/bias": (3, 8),
                "layers/attention/v_proj/bias": (3, 8),
            },
        ),
        (
            "qwen3",
            {
                "layers/attention/q_norm/scale": (3, 8),
                "layers/attention/k_norm/scale": (3, 8),
            },
        ),
    ],
)
def test_additional_parameters_of_a_family(
    model_type: str, more: dict[str, tuple[int, ...]], small: LlamaConfig
) -> None:
    llama = dataclasses.replace(small, num_kv_heads=1)
    before, after = (
        {path_name(path): leaf.shape for path, leaf in leaves}
        for leaves in (
            jax.tree_util.tree_leaves_with_path(abstract_params(config))
            for config in (llama, dataclasses.replace(llama, model_type=model_type))
        )
    )
    assert after == before | more
    assert {lr_group(path) for path in more} <= {"rest"}


def test_rejects_an_unknown_family() -> None:
    with pytest.raises(
        ValueError, match="model_type 'gemma' is unknown; choose one of"
    ):
        dataclasses.replace(GROUPED, model_type="gemma")


def test_grouped_queries_and_a_tied_head_have_smaller_kernels() -> None:
    params = abstract_params(GROUPED)
    assert "lm_head" not in params
    shapes = {
        name: kernel["kernel"].shape
        for name, kernel in params["layers"]["attention"].items()
    }
    assert shapes == {
        **dict.fromkeys(("k_proj", "v_proj"), (3, 24, 2 * 8)),
        "q_proj": (3, 24, 4 * 8),
        "o_proj": (3, 4 * 8, 24),
    }


def test_grouped_queries_share_keys_and_values() -> None:
    """Multi-head attention with the groups' heads repeated gives the same logits."""
    params = init_params(GROUPED, seed=0)
    repeated = jax.tree.map(lambda leaf: leaf, params)
    for name in ("k_proj", "v_proj"):
        kernel_LxDxKxH = params["layers"]["attention"][name]["kernel"].reshape(
            3, 24, 2, 8
        )
        repeated["layers"]["attention"][name]["kernel"] = jnp.repeat(
            kernel_LxDxKxH, 2, axis=2
        ).reshape(3, 24, 32)
    tokens = tokens_of(GROUPED, (2, 10))
    multi_head = dataclasses.replace(GROUPED, num_kv_heads=4)
    expected = nnx.merge(graphdef_of(multi_head), repeated)(tokens)
    np.testing.assert_allclose(
        nnx.merge(graphdef_of(GROUPED), params)(tokens), expected, atol=1e-5
    )


def test_initial_weights_have_the_configured_spread_and_differ_by_layer(
    small: LlamaConfig,
) -> None:
    params = init_params(small, seed=0)
    up_LxDxF = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert float(jnp.std(up_LxDxF)) == pytest.approx(small.initializer_range, rel=0.1)
    assert float(jnp.std(params["embed"]["embedding"])) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(up_LxDxF[0], up_LxDxF[1])
    again = init_params(small, seed=0)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    other = init_params(small, seed=1)
    assert not np.array_equal(params["lm_head"]["kernel"], other["lm_head"]["kernel"])


def test_later_tokens_do_not_change_earlier_logits(small: LlamaConfig) -> None:
    model = model_of(small)
    tokens_BxT = tokens_of(small, (2, 12))
    changed_BxT = tokens_BxT.at[:, 7:].set((tokens_BxT[:, 7:] + 1) % small.vocab_size)
    before, after = model(tokens_BxT), model(changed_BxT)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])


def test_earlier_tokens_change_later_logits(small: LlamaConfig) -> None:
    model = model_of(small)
    tokens_BxT = tokens_of(small, (1, 12))
    changed_BxT = tokens_BxT.at[0, 0].set((tokens_BxT[0, 0] + 1) % small.vocab_size)
    assert not np.allclose(
        model(tokens_BxT)[0, -1], model(changed_BxT)[0, -1], atol=1e-7
    )


def test_scan_equals_a_loop_over_the_layers(small: LlamaConfig) -> None:
    model = model_of(small)
    tokens_BxT = tokens_of(small, (2, 10))
    params = init_params(small, seed=0)
    block_graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: Block(small, Execution(), rngs=nnx.Rngs(0)))
    )
    x_BxTxD = model.embed(tokens_BxT)
    for layer in range(small.num_layers):
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        x_BxTxD = nnx.merge(block_graphdef, weights)(x_BxTxD)
    expected = model.lm_head(model.final_norm(x_BxTxD))
    np.testing.assert_allclose(model(tokens_BxT), expected, atol=1e-6)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_program_size_does_not_grow_with_depth(remat: str) -> None:
    def program_lines(num_layers: int) -> int:
        config = LlamaConfig(64, 16, 24, 2, num_layers)
        grad = jax.grad(
            functools.partial(next_token_loss, graphdef_of(config, Execution(remat)))
        )
        tokens = Batch(jax.ShapeDtypeStruct((1, 5), jnp.int32))
        return len(
            jax.jit(grad).lower(abstract_params(config), tokens).as_text().splitlines()
        )

    assert program_lines(2) == program_lines(9)


def test_remat_gives_the_same_loss_and_gradients(small: LlamaConfig) -> None:
    batch, params = Batch(tokens_of(small, (2, 9))), init_params(small, seed=0)
    results, products = [], []
    for remat in REMAT_POLICIES:
        grad = jax.value_and_grad(
            functools.partial(next_token_loss, graphdef_of(small, Execution(remat)))
        )
        products.append(str(jax.make_jaxpr(grad)(params, batch)).count("dot_general"))
        results.append(grad(params, batch))
    assert (
        products[0] < products[1] < products[2]
    )  # In the order none, dots, full, more is computed again.
    for result in results[1:]:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6), result, results[0]
        )


def test_rematerialization_saves_memory(small: LlamaConfig) -> None:
    def temporaries(remat: str) -> int:
        grad = jax.grad(
            functools.partial(next_token_loss, graphdef_of(small, Execution(remat)))
        )
        tokens = Batch(jax.ShapeDtypeStruct((8, 129), jnp.int32))
        return (
            jax.jit(grad)
            .lower(abstract_params(small), tokens)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    none, dots, full = (temporaries(remat) for remat in ("none", "dots", "full"))
    assert full < dots < none * 0.8


def test_dtypes_of_parameters_and_of_the_computation(small: LlamaConfig) -> None:
    tokens_BxT = tokens_of(small, (2, 9))
    expected = model_of(small)(tokens_BxT)
    for execution, tolerance in (
        (Execution(compute_dtype="bfloat16"), 0.02),
        (Execution(param_dtype="bfloat16", compute_dtype="bfloat16"), 0.02),
        (Execution(param_dtype="bfloat16"), 0.02),
    ):
        params = init_params(small, execution, seed=0)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {
            execution.param_dtype
        }
        model = nnx.merge(graphdef_of(small, execution), params)
        assert model.hidden(tokens_BxT).dtype == execution.compute_dtype
        logits = model(tokens_BxT)
        assert logits.dtype == jnp.float32
        error = jnp.abs(logits - expected).max() / jnp.abs(expected).max()
        assert 1e-5 < float(error) < tolerance


def test_the_attention_kernel_is_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kernel(
        execution: Execution,
        head_size: int = 64,
        length: int = 127,
        has_mask: bool = False,
    ) -> str:
        return execution.attention_implementation(head_size, length, has_mask=has_mask)

    half = Execution(compute_dtype="bfloat16")
    assert kernel(Execution(attention="cudnn")) == "cudnn"
    assert kernel(half) == "xla"  # This machine has no GPU.

    def device(kind: str, version: str, capability: str) -> Any:
        client = types.SimpleNamespace(platform_version=version)
        return types.SimpleNamespace(
            platform=kind, client=client, compute_capability=capability
        )

    for gpu, expected in (
        (device("gpu", "cuda 12080", "9.0"), "cudnn"),
        (device("gpu", "cuda 12080", "7.5"), "xla"),
        (device("gpu", "rocm 60300", "gfx942"), "xla"),
        (device("tpu", "TFRT TPU v5", ""), "xla"),
    ):
        monkeypatch.setattr(jax, "local_devices", lambda gpu=gpu: [gpu])
        assert kernel(half) == expected
    monkeypatch.setattr(
        jax, "local_devices", lambda: [device("gpu", "cuda 12080", "9.0")]
    )
    assert kernel(Execution()) == "xla"  # cuDNN's kernel does not take float32.
    assert kernel(half, head_size=160) == "xla"
    assert kernel(half, head_size=12) == "xla"
    assert kernel(Execution(attention="xla", compute_dtype="bfloat16")) == "xla"
    # Packed rows have a mask.
    assert kernel(half, has_mask=True) == "xla"
    assert kernel(half, length=128, has_mask=True) == "cudnn"


def test_rotary_scores_depend_on_relative_position_only() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    frequencies = rotary_frequencies(LlamaConfig(8, 16, 8, 2, 1))

    def score(q_position: int, k_position: int) -> float:
        rotated_q = rotary(q, jnp.array([q_position]), frequencies)
        rotated_k = rotary(k, jnp.array([k_position]), frequencies)
        return float(jnp.vdot(rotated_q, rotated_k))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-3)
    np.testing.assert_array_equal(rotary(q, jnp.array([0]), frequencies), q)


def test_llama3_scaling_lowers_low_frequencies_only() -> None:
    config = PRESETS["llama-3.2-1b"]
    scaled, plain = (
        rotary_frequencies(c)
        for c in (config, dataclasses.replace(config, rope_scaling=None))
    )
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 32, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.sum() >= 2
    assert np.all((scaled < plain)[between] & (scaled > plain / 32)[between])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 30, "num_heads": 4},
            "hidden_size 30 must be a multiple of num_heads 4",
        ),
        ({"hidden_size": 30, "num_heads": 6}, "head_size 5 must be even"),
        (
            {"num_heads": 4, "num_kv_heads": 3},
            "num_heads 4 must be a multiple of num_kv_heads 3",
        ),
    ],
)
def test_rejects_shapes_that_make_no_model(
    fields: dict[str, int], message: str
) -> None:
    sizes = {
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_heads": 4,
        "num_layers": 1,
    }
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**sizes | fields)


def test_unknown_preset_lists_the_nearest_first() -> None:
    with pytest.raises(
        UsageError, match=r"`model` '130' is unknown; choose one of: 130m, "
    ):
        preset("130")


@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_in_bfloat16_are_near_those_in_float32(
    weights: Any, tied: bool
) -> None:
    """Sums over so many tokens in bfloat16 would lose a quarter of the embedding's."""
    config = LlamaConfig(64, 16, 32, 1, 2, model_type="qwen2", tied_head=tied)
    tokens = np.zeros((16, 513), np.int32)
    rng = np.random.default_rng(0)
    tokens[:, ::2] = rng.integers(0, 64, (16, 257))  # Half of all tokens are one.
    params = jax.tree.map(lambda x: x.astype(weights), init_params(config, seed=0))

    def gradients(dtype: Any, params: Params) -> Params:
        graphdef = graphdef_of(
            config, Execution(compute_dtype=dtype, param_dtype=weights)
        )
        loss = functools.partial(next_token_loss, graphdef, batch=Batch(tokens))
        return jax.jit(jax.grad(loss))(params)

    narrow = gradients(jnp.bfloat16, params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    exact = gradients(jnp.float32, wide)
    for path, expected in jax.tree.leaves_with_path(exact):
        actual = functools.reduce(lambda tree, key: tree[key.key], path, narrow)
        assert actual.dtype == weights
        error = jnp.linalg.norm(actual.astype(jnp.float32) - expected)
        assert error < 0.03 * jnp.linalg.norm(expected), path_name(path)


def test_the_gradient_of_a_bfloat16_table_needs_no_sums_of_its_size() -> None:
    """In float32 these would be twice as large as the table."""
    table = jax.ShapeDtypeStruct((8192, 256), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def total(table: jax.Array, tokens: jax.Array) -> jax.Array:
        rows: Any = look_up(table, tokens, jnp.bfloat16)
        return jnp.sum(rows.astype(jnp.float32))

    memory: Any = (
        jax.jit(jax.grad(total)).lower(table, tokens).compile().memory_analysis()
    )
    assert memory.temp_size_in_bytes < table.size * table.dtype.itemsize
