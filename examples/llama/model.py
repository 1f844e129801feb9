"""LLaMA in Flax NNX: one block, stacked over the depth and scanned.

Shapes: B batch, T tokens, D hidden size, N heads, H head size, F feed-forward size, L layers,
V vocabulary. A stacked kernel is (L, in, out), so the layer is an axis of the weight and the time
to compile does not grow with the depth.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.llama.config import LlamaConfig

Params = dict[str, Any]  # Nested: params["layers"]["mlp"]["up_proj"]["kernel"] is (L, D, F).


def rotary(x_BxTxNxH: jax.Array, position_T: jax.Array, theta: float) -> jax.Array:
    """Rotates each pair (h, h + H/2) of every head by an angle proportional to its position.

    Dot products of rotated vectors then depend on positions only through their difference.
    """
    H = x_BxTxNxH.shape[-1]
    frequency_h = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angle_Tx1xh = position_T[:, None, None] * frequency_h
    cos, sin = jnp.cos(angle_Tx1xh), jnp.sin(angle_Tx1xh)
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxNxH.dtype)


def linear(config: LlamaConfig, size_in: int, size_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(size_in, size_out, use_bias=False, kernel_init=init, rngs=rngs)


def rms_norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)


class Attention(nnx.Module):
    """Causal multi-head attention with rotary position embeddings."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        D = config.hidden_size
        self.config = config
        self.q_proj = linear(config, D, D, rngs)
        self.k_proj = linear(config, D, D, rngs)
        self.v_proj = linear(config, D, D, rngs)
        self.o_proj = linear(config, D, D, rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        B, T, D = x_BxTxD.shape
        theta, position_T = self.config.rope_theta, jnp.arange(T)

        def heads(y_BxTxD: jax.Array) -> jax.Array:
            return y_BxTxD.reshape(B, T, self.config.num_heads, self.config.head_size)

        q_BxTxNxH = rotary(heads(self.q_proj(x_BxTxD)), position_T, theta)
        k_BxTxNxH = rotary(heads(self.k_proj(x_BxTxD)), position_T, theta)
        v_BxTxNxH = heads(self.v_proj(x_BxTxD))
        out_BxTxNxH = jax.nn.dot_product_attention(q_BxTxNxH, k_BxTxNxH, v_BxTxNxH, is_causal=True)
        return self.o_proj(out_BxTxNxH.reshape(B, T, D))


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(config, D, F, rngs)
        self.up_proj = linear(config, D, F, rngs)
        self.down_proj = linear(config, F, D, rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BxTxD)) * self.up_proj(x_BxTxD))


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = rms_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = rms_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD))
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))


class Llama(nnx.Module):
    """Maps tokens (B, T) to logits (B, T, V).

    Args:
        config: the shape.
        remat: "none" keeps every activation for the backward pass; "full" keeps only the input of
            each layer and computes the rest again, which trades time for memory.
        rngs: the source of the initial weights.
    """

    def __init__(self, config: LlamaConfig, *, remat: str = "none", rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked_block(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.remat = remat
        init = nnx.initializers.normal(config.initializer_range)
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, embedding_init=init, rngs=rngs)
        self.layers = stacked_block(rngs)
        self.final_norm = rms_norm(config, rngs)
        self.lm_head = linear(config, config.hidden_size, config.vocab_size, rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        def apply_block(x_BxTxD: jax.Array, block: Block) -> jax.Array:
            return block(x_BxTxD)

        if self.remat == "full":
            # The scan already keeps XLA from merging the recomputation with the forward pass.
            apply_block = nnx.remat(apply_block, prevent_cse=False)
        scan = nnx.scan(apply_block, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x_BxTxD = scan(self.embed(tokens_BxT), self.layers)
        return self.lm_head(self.final_norm(x_BxTxD))


def init_model(config: LlamaConfig, *, seed: int, remat: str = "none") -> tuple[nnx.GraphDef[Llama], Params]:
    """Returns the model's structure and its float32 parameters as a nested dictionary."""

    @jax.jit
    def params() -> Params:
        model = Llama(config, remat=remat, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    abstract = nnx.eval_shape(lambda: Llama(config, remat=remat, rngs=nnx.Rngs(seed)))
    return nnx.graphdef(abstract), params()


def next_token_loss(graphdef: nnx.GraphDef[Llama], params: Params, tokens_BxS: jax.Array) -> jax.Array:
    """Returns the mean cross entropy, in nats, of each token after the first given those before.

    Args:
        graphdef: the model's structure.
        params: its parameters.
        tokens_BxS: B windows of S = T + 1 tokens.

    Returns:
        A float32 scalar.
    """
    logits_BxTxV = nnx.merge(graphdef, params)(tokens_BxS[:, :-1]).astype(jnp.float32)
    targets_BxT = tokens_BxS[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, targets_BxT).mean()
