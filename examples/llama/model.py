"""LLaMA and its relatives in Flax NNX: one block, stacked over the depth and scanned.

Shapes: B batch, T tokens, S = T + 1, D hidden size, N heads, K heads of keys and
values, H head size, F feed-forward size, L layers, V vocabulary. A stacked kernel is
(L, in, out), so the layer is an axis of the weight and the time to compile does not
grow with the depth.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from examples.llama.config import LlamaConfig
from examples.llama.loss import chunked_cross_entropy, num_chunks
from examples.llama.mesh import BATCH_AXES, constrained, shard_count

# Parameters are nested: params["layers"]["mlp"]["up_proj"]["kernel"] is (L, D, F).
Params = dict[str, Any]


def flatten(params: Params) -> dict[str, Any]:
    """Returns the leaves by path: layers/mlp/up_proj/kernel."""
    return dict(traverse_util.flatten_dict(params, sep="/"))


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """Returns the tree of leaves by path."""
    return dict(traverse_util.unflatten_dict(leaves, sep="/"))


class Batch(NamedTuple):
    """Sequences to train or evaluate on.

    A leaf that is None takes no part in the compiled program.
    """

    tokens: Any
    """The token ids: int32 (B, S), of which the first T are inputs and the last T
    targets."""
    segments: Any = None
    """The number of the packed sequence that each token belongs to: int32 (B, S), from
    1 on in each row, and 0 for padding. Attention stays inside a segment and positions
    count from its start. None: a row is one sequence."""
    weights: Any = None
    """The weight of each token as a target: float32 (B, S). None: all weigh the same.
    The first token of a segment and padding never count."""


def target_weights(batch: Batch) -> jax.Array | None:
    """Returns the weight of each target in the loss: float32 (B, T), or None."""
    weights_BxT = None if batch.weights is None else batch.weights[:, 1:]
    if batch.segments is None:
        return weights_BxT
    here_BxT, next_BxT = batch.segments[:, :-1], batch.segments[:, 1:]
    predictable_BxT = ((here_BxT == next_BxT) & (next_BxT > 0)).astype(jnp.float32)
    return predictable_BxT if weights_BxT is None else predictable_BxT * weights_BxT


# The activations of a layer that are saved for the backward pass, which computes the
# others again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    # This saves all products but attention's scores.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed. Only the dtypes change values beyond rounding."""

    remat: str = "dots"
    """A key of `REMAT_POLICIES`."""
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    attention: str = "auto"
    """xla, cudnn, or auto: cudnn where its flash attention takes the dtype, the heads
    and the GPU."""
    mesh: jax.sharding.Mesh | None = None
    """The mesh that activations are sharded over; None leaves it to the compiler."""

    def shard(self, x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
        """Shards an activation over the mesh, by an entry for each of its axes."""
        return x if self.mesh is None else constrained(x, self.mesh, *axes)

    def on_a_device(self, size: int, axes: str | tuple[str, ...]) -> int:
        """Returns the size per device of an axis that is sharded over `axes`."""
        return size if self.mesh is None else -(-size // shard_count(self.mesh, axes))

    def attention_implementation(
        self, head_size: int, length: int, *, has_mask: bool
    ) -> Any:
        if self.attention != "auto":
            return self.attention
        fits = (
            self.compute_dtype == "bfloat16"
            and head_size <= 128
            and head_size % 8 == 0
            # JAX has no gradient of cuDNN's attention with a mask and an odd length.
            and not (has_mask and length % 2)
        )
        return "cudnn" if fits and cudnn_has_flash_attention() else "xla"


def cudnn_has_flash_attention() -> bool:
    device = jax.local_devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    return float(device.compute_capability) >= 8.0  # The number is that of Ampere.


def rotary_frequencies(config: LlamaConfig) -> np.ndarray:
    """Returns the angle per token by which each pair of a head turns, in radians.

    The shape is (H / 2,), the dtype float32.
    """
    H = config.head_size
    frequency_h = config.rope_theta ** (-np.arange(0, H, 2) / H)
    if scaling := config.rope_scaling:
        turns_h = scaling.original_max_seq_len * frequency_h / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept_h = np.clip((turns_h - low) / (high - low), 0, 1)
        frequency_h *= kept_h + (1 - kept_h) / scaling.factor
    return frequency_h.astype(np.float32)


def rotary(
    x_BxTxNxH: jax.Array, position: jax.Array, frequency_h: np.ndarray
) -> jax.Array:
    """Rotates each pair (h, h + H/2) of every head by its frequency times its position.

    Dot products of rotated vectors then depend on positions only through their
    difference. The positions are (T,), or (B, T) if those of the rows differ.
    """
    angle = position[..., None, None] * frequency_h  # (T, 1, h) or (B, T, 1, h)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return rotated.astype(x_BxTxNxH.dtype)


def positions_in_segments(segments_BxT: jax.Array) -> jax.Array:
    """Returns the distance of each token from the start of its segment: (B, T)."""
    index_T = jnp.arange(segments_BxT.shape[1])
    starts_BxT = jnp.diff(segments_BxT, axis=1, prepend=-1) != 0
    return index_T - jax.lax.cummax(jnp.where(starts_BxT, index_T, 0), axis=1)


def initializer(config: LlamaConfig) -> nnx.Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        # Weights are drawn in float32 and rounded. If they were drawn in bfloat16, a
        # seed would give different weights.
        return (
            config.initializer_range * jax.random.normal(key, shape, jnp.float32)
        ).astype(dtype)

    return init


# The gradient of a bfloat16 table is summed in so many parts of its columns.
COLUMN_CHUNKS = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(
    table_VxD: jax.Array, tokens_BxT: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns a row of the table per token, in `dtype`: (B, T, D).

    The gradient of a row is summed over its tokens in float32 or wider. In bfloat16, a
    sum of equal terms stops at 256 of them, and a batch has a frequent token thousands
    of times.
    """
    return jnp.take(table_VxD.astype(dtype), tokens_BxT, axis=0)


def _look_up_forward(
    table_VxD: jax.Array, tokens_BxT: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return look_up(table_VxD, tokens_BxT, dtype), (table_VxD, tokens_BxT)


def _look_up_backward(
    dtype: jax.typing.DTypeLike,
    residuals: tuple[jax.Array, jax.Array],
    grad_BxTxD: jax.Array,
) -> tuple[jax.Array, None]:
    table_VxD, tokens_BxT = residuals
    (V, D), wide = table_VxD.shape, jnp.promote_types(dtype, jnp.float32)

    def summed(grad_BxTxd: jax.Array) -> jax.Array:
        sums_Vxd = jnp.zeros((V, grad_BxTxd.shape[-1]), wide)
        sums_Vxd = sums_Vxd.at[tokens_BxT].add(grad_BxTxd.astype(wide))
        return sums_Vxd.astype(table_VxD.dtype)

    is_narrower = table_VxD.dtype.itemsize < wide.itemsize
    if not is_narrower or D % COLUMN_CHUNKS:
        return summed(grad_BxTxD), None
    # The sums of all columns in float32 would be twice as large as the table. For a
    # large vocabulary, they would be the largest array of a layer-wise step.
    d = D // COLUMN_CHUNKS

    def add_chunk(chunk: jax.Array, sums_VxD: jax.Array) -> jax.Array:
        grad_BxTxd = jax.lax.dynamic_slice_in_dim(grad_BxTxD, chunk * d, d, axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(
            sums_VxD, summed(grad_BxTxd), chunk * d, axis=1
        )

    sums_VxD = jnp.zeros((V, D), table_VxD.dtype)
    return jax.lax.fori_loop(0, COLUMN_CHUNKS, add_chunk, sums_VxD), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def with_bias(layer: nnx.Linear, x: jax.Array, out_sharding: Any) -> jax.Array:
    """Applies a linear layer: (..., D) to (..., E) in the layer's dtype.

    The bias is added in float32 or wider, so that its gradient, a sum over all tokens,
    is in that too.
    """
    if layer.bias is None:
        return nnx.Linear.__call__(layer, x, out_sharding=out_sharding)
    dtype = layer.dtype
    y = layer.dot_general(
        x.astype(dtype),
        layer.kernel[...].astype(dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        out_sharding=out_sharding,
    )
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return (y.astype(wide) + layer.bias[...].astype(wide)).astype(y.dtype)


class Linear(nnx.Linear):
    """A linear layer whose bias has a gradient in float32."""

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        return with_bias(self, x, out_sharding)


class AdaptedLinear(nnx.LoRALinear):
    """A linear layer with a LoRA adapter: xW + scale xAB."""

    def __init__(self, *sizes: int, scale: float, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.scale = scale

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = with_bias(self, x, out_sharding)
        return y + self.scale * self.lora(x)


def linear(
    config: LlamaConfig,
    execution: Execution,
    size_in: int,
    size_out: int,
    rngs: nnx.Rngs,
    *,
    use_bias: bool = False,
) -> nnx.Linear:
    """Returns a linear layer, with an adapter if `config` has them."""
    options: dict[str, Any] = {
        "use_bias": use_bias,
        "kernel_init": initializer(config),
        "dtype": execution.compute_dtype,
        "param_dtype": execution.param_dtype,
        "rngs": rngs,
    }
    if not config.lora_rank:
        return Linear(size_in, size_out, **options)
    return AdaptedLinear(
        size_in,
        size_out,
        scale=config.lora_scale,
        lora_rank=config.lora_rank,
        lora_dtype=execution.compute_dtype,
        lora_param_dtype=execution.param_dtype,
        a_initializer=init_adapter,
        **options,
    )


def init_adapter(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draws a matrix A (in, rank) as PEFT does; B is 0 at first."""
    uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    # The draws are in float32 for the same reason as those of `initializer`.
    return uniform(key, shape, jnp.float32).astype(dtype)


def rms_norm(
    config: LlamaConfig, execution: Execution, size: int, rngs: nnx.Rngs
) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        size,
        epsilon=config.rms_norm_eps,
        dtype=execution.compute_dtype,
        param_dtype=execution.param_dtype,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary position embeddings.

    With segments (B, T), each token attends only to those of its own segment.
    """

    def __init__(
        self, config: LlamaConfig, execution: Execution, *, rngs: nnx.Rngs
    ) -> None:
        self.config, self.execution = config, execution
        D, H = config.hidden_size, config.head_size
        queries, keys = config.num_heads * H, config.num_kv_heads * H
        bias = config.qkv_bias
        self.q_proj = linear(config, execution, D, queries, rngs, use_bias=bias)
        self.k_proj = linear(config, execution, D, keys, rngs, use_bias=bias)
        self.v_proj = linear(config, execution, D, keys, rngs, use_bias=bias)
        self.o_proj = linear(config, execution, queries, D, rngs)
        if config.qk_norm:
            self.q_norm = rms_norm(config, execution, H, rngs)
            self.k_norm = rms_norm(config, execution, H, rngs)

    def __call__(
        self, x_BxTxD: jax.Array, segments_BxT: jax.Array | None = None
    ) -> jax.Array:
        B, T, _ = x_BxTxD.shape
        frequency_h = rotary_frequencies(self.config)
        position, mask_Bx1xTxT = jnp.arange(T), None
        if segments_BxT is not None:
            position = positions_in_segments(segments_BxT)
            mask_Bx1xTxT = segments_BxT[:, None, :, None] == segments_BxT[:, None, None]

        def heads(y_BxTxE: jax.Array) -> jax.Array:
            y_BxTxNxH = y_BxTxE.reshape(B, T, -1, self.config.head_size)
            return self.execution.shard(y_BxTxNxH, BATCH_AXES, None, "tensor", None)

        q_BxTxNxH = heads(self.q_proj(x_BxTxD))
        k_BxTxKxH = heads(self.k_proj(x_BxTxD))
        v_BxTxKxH = heads(self.v_proj(x_BxTxD))
        if self.config.qk_norm:
            q_BxTxNxH, k_BxTxKxH = self.q_norm(q_BxTxNxH), self.k_norm(k_BxTxKxH)
        q_BxTxNxH = rotary(q_BxTxNxH, position, frequency_h)
        k_BxTxKxH = rotary(k_BxTxKxH, position, frequency_h)
        out_BxTxNxH = jax.nn.dot_product_attention(
            q_BxTxNxH,
            k_BxTxKxH,
            v_BxTxKxH,
            mask=mask_Bx1xTxT,
            is_causal=True,
            implementation=self.execution.attention_implementation(
                self.config.head_size, T, has_mask=mask_Bx1xTxT is not None
            ),
        )
        return self.o_proj(out_BxTxNxH.reshape(B, T, -1))


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(
        self, config: LlamaConfig, execution: Execution, *, rngs: nnx.Rngs
    ) -> None:
        self.execution = execution
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(config, execution, D, F, rngs)
        self.up_proj = linear(config, execution, D, F, rngs)
        self.down_proj = linear(config, execution, F, D, rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        hidden_BxTxF = jax.nn.silu(self.gate_proj(x_BxTxD)) * self.up_proj(x_BxTxD)
        return self.down_proj(
            self.execution.shard(hidden_BxTxF, BATCH_AXES, None, "tensor")
        )


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(
        self, config: LlamaConfig, execution: Execution, *, rngs: nnx.Rngs
    ) -> None:
        self.execution = execution
        self.attention_norm = rms_norm(config, execution, config.hidden_size, rngs)
        self.attention = Attention(config, execution, rngs=rngs)
        self.mlp_norm = rms_norm(config, execution, config.hidden_size, rngs)
        self.mlp = Mlp(config, execution, rngs=rngs)

    def attend(
        self, x_BxTxD: jax.Array, segments_BxT: jax.Array | None = None
    ) -> jax.Array:
        x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD), segments_BxT)
        return self.execution.shard(x_BxTxD, BATCH_AXES, None, None)

    def feed_forward(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))
        return self.execution.shard(x_BxTxD, BATCH_AXES, None, None)

    def __call__(
        self, x_BxTxD: jax.Array, segments_BxT: jax.Array | None = None
    ) -> jax.Array:
        return self.feed_forward(self.attend(x_BxTxD, segments_BxT))


class Llama(nnx.Module):
    """Maps tokens (B, T) to float32 logits (B, T, V).

    Args:
        config: the shape.
        execution: dtypes, attention kernel and what the backward pass computes again.
        with_layers: False for the embedding, the last norm and the head alone.
        rngs: the source of the initial weights.
    """

    def __init__(
        self,
        config: LlamaConfig,
        execution: Execution = Execution(),
        *,
        with_layers: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked_block(rngs: nnx.Rngs) -> Block:
            return Block(config, execution, rngs=rngs)

        self.execution = execution
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=initializer(config),
            dtype=execution.compute_dtype,
            param_dtype=execution.param_dtype,
            rngs=rngs,
        )
        if with_layers:
            self.layers = stacked_block(rngs)
        self.final_norm = rms_norm(config, execution, config.hidden_size, rngs)
        if not config.tied_head:
            # Adapters are beside the layers' kernels only.
            self.lm_head = linear(
                config.base, execution, config.hidden_size, config.vocab_size, rngs
            )

    def hidden(
        self, tokens_BxT: jax.Array, segments_BxT: jax.Array | None = None
    ) -> jax.Array:
        """Returns the input of the head: (B, T, D) in the compute dtype."""

        def apply_block(x_BxTxD: jax.Array, block: Block) -> jax.Array:
            return block(x_BxTxD, segments_BxT)

        if self.execution.remat != "none":
            policy = REMAT_POLICIES[self.execution.remat]
            # The scan already keeps XLA from merging the recomputation with the forward
            # pass.
            apply_block = nnx.remat(apply_block, prevent_cse=False, policy=policy)
        scan = nnx.scan(apply_block, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.final_norm(scan(self.embedded(tokens_BxT), self.layers))

    def embedded(self, tokens_BxT: jax.Array) -> jax.Array:
        """Returns the input of the first layer: (B, T, D) in the compute dtype."""
        # Only the hidden axis of the table is gathered. Its rows are looked up on the
        # devices that store them.
        table_VxD = self.execution.shard(self.embed.embedding[...], "tensor", None)
        x_BxTxD: Any = look_up(table_VxD, tokens_BxT, self.execution.compute_dtype)
        return self.execution.shard(x_BxTxD, BATCH_AXES, None, None)

    def head(self) -> jax.Array:
        """Returns the output head: (D, V) in the parameters' dtype."""
        return (
            self.lm_head.kernel[...]
            if hasattr(self, "lm_head")
            else self.embed.embedding[...].T
        )

    def logits(self, x: jax.Array) -> jax.Array:
        """Applies the head to what `hidden` returns, (..., D)."""
        head_DxV = self.head().astype(x.dtype)
        return jnp.einsum(
            "...d,dv->...v", x, head_DxV, preferred_element_type=jnp.float32
        )

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        return self.logits(self.hidden(tokens_BxT))


def graphdef_of(
    config: LlamaConfig, execution: Execution = Execution()
) -> nnx.GraphDef[Llama]:
    """Returns the model's structure; allocates nothing."""
    return nnx.graphdef(
        nnx.eval_shape(lambda: Llama(config, execution, rngs=nnx.Rngs(0)))
    )


def init_params(
    config: LlamaConfig, execution: Execution = Execution(), *, seed: int
) -> Params:
    """Returns new parameters as nested dictionaries; under `jax.eval_shape`, shapes."""

    @jax.jit
    def params() -> Params:
        model = Llama(config, execution, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    return params()


def init_outside_layers(
    config: LlamaConfig, execution: Execution = Execution(), *, seed: int
) -> Params:
    """Returns those of `init_params` outside the layers; XLA draws no others."""

    @jax.jit
    def params() -> Params:
        return {
            k: v
            for k, v in init_params(config, execution, seed=seed).items()
            if k != "layers"
        }

    return params()


def init_layer(
    config: LlamaConfig, execution: Execution, index: jax.typing.ArrayLike, *, seed: int
) -> Params:
    """Returns layer `index` of `init_params` as a stack of one; draws no others."""
    rngs = nnx.Rngs(seed)
    rngs.params()  # This draws the embedding's key.
    nnx.split_rngs(rngs, splits=config.num_layers)
    graphdef, keys = nnx.split(rngs)
    rngs = nnx.merge(graphdef, jax.tree.map(lambda key: key[index], keys))
    block = Block(config, execution, rngs=rngs)
    return jax.tree.map(
        lambda x: x[None], nnx.to_pure_dict(nnx.state(block, nnx.Param))
    )


def next_token_loss(
    graphdef: nnx.GraphDef[Llama], params: Params, batch: Batch
) -> jax.Array:
    """Returns the mean cross entropy of each next token given those before, in nats.

    Args:
        graphdef: the model's structure.
        params: its parameters.
        batch: B rows of S = T + 1 tokens; its weights are those of the mean.

    Returns:
        A float32 scalar.
    """
    model = nnx.merge(graphdef, params)
    x_BxTxD = model.hidden(batch.tokens[:, :-1], input_segments(batch))
    return cross_entropy(model.execution, x_BxTxD, model.head(), batch)


def input_segments(batch: Batch) -> jax.Array | None:
    return None if batch.segments is None else batch.segments[:, :-1]


def cross_entropy(
    execution: Execution, x_BxTxD: jax.Array, head_DxV: jax.Array, batch: Batch
) -> jax.Array:
    B, T, _ = x_BxTxD.shape
    # The number of chunks goes by the logits of one device. Fewer chunks are better,
    # since each ends in an all-reduce of the head's gradient.
    chunks = num_chunks(
        execution.on_a_device(B, BATCH_AXES),
        T,
        execution.on_a_device(head_DxV.shape[1], "tensor"),
    )
    x_BxTxD = execution.shard(x_BxTxD, BATCH_AXES, None, None)
    head_DxV = execution.shard(head_DxV, None, "tensor")
    return chunked_cross_entropy(
        x_BxTxD, head_DxV, batch.tokens[:, 1:], chunks, target_weights(batch)
    )


@jax.custom_vjp
def gradient_barrier(tree: Any) -> Any:
    """Returns `tree`; none of its gradients is used before all are there."""
    return tree


gradient_barrier.defvjp(
    lambda tree: (tree, None), lambda _, grads: (jax.lax.optimization_barrier(grads),)
)


class Pieces(NamedTuple):
    """`next_token_loss` as three pure functions, for a step layer by layer.

    Parameters are as in the whole model, without `layers`; a layer's are those of one
    of them.
    """

    # Maps parameters and a batch to x (B, T, D).
    embed: Callable[[Params, Batch], jax.Array]
    # Maps a layer's parameters, x and, where it has segments, the batch to x.
    layer: Callable[..., jax.Array]
    # Maps parameters, x and the batch to the loss.
    head: Callable[[Params, jax.Array, Batch], jax.Array]
    # Maps parameters and x (..., D) to float32 logits (..., V).
    logits: Callable[[Params, jax.Array], jax.Array]


def pieces_of(config: LlamaConfig, execution: Execution = Execution()) -> Pieces:
    outside_layers = nnx.graphdef(
        nnx.eval_shape(
            lambda: Llama(config, execution, with_layers=False, rngs=nnx.Rngs(0))
        )
    )
    block = nnx.graphdef(
        nnx.eval_shape(lambda: Block(config, execution, rngs=nnx.Rngs(0)))
    )

    def embed(params: Params, batch: Batch) -> jax.Array:
        return nnx.merge(outside_layers, params).embedded(batch.tokens[:, :-1])

    def layer(
        params: Params, x_BxTxD: jax.Array, batch: Batch | None = None, *_: Any
    ) -> jax.Array:
        segments_BxT = None if batch is None else input_segments(batch)
        x_BxTxD = nnx.merge(block, params).attend(x_BxTxD, segments_BxT)
        # The ordinary step puts a gradient into its stack at once. Without the barrier,
        # XLA for TPU would compute the MLP's gradients last, next to their updates.
        # Until then it would keep the MLP's activations, the widest of all, beside
        # those of attention.
        late = {name: params[name] for name in ("mlp_norm", "mlp")}
        late, x_BxTxD = gradient_barrier((late, x_BxTxD))
        return nnx.merge(block, params | late).feed_forward(x_BxTxD)

    def head(params: Params, x_BxTxD: jax.Array, batch: Batch) -> jax.Array:
        model = nnx.merge(outside_layers, params)
        return cross_entropy(execution, model.final_norm(x_BxTxD), model.head(), batch)

    def logits(params: Params, x: jax.Array) -> jax.Array:
        model = nnx.merge(outside_layers, params)
        return model.logits(model.final_norm(x))

    if execution.remat != "none":
        layer = jax.checkpoint(
            layer, prevent_cse=False, policy=REMAT_POLICIES[execution.remat]
        )
    return Pieces(embed, layer, head, logits)
