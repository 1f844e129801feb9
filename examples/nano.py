"""A small LLaMA, pre-trained with APOLLO in one file that is meant to be copied.

Run it with ``python -m examples.nano``. It reads the source of Python's standard
library byte by byte, trains on all devices that JAX shows, prints the loss, and ends
with a sample. It takes about 90 seconds of one CPU core. ``examples/llama`` adds
checkpoints, tokenizers, larger models and much else.

The letters at the end of an array's name are its axes: B sequences in a batch, T
tokens in a sequence, D features, N heads, H features of a head, V bytes.
"""

import dataclasses
import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax

VOCABULARY = 256  # Every byte is a token, so there is no tokenizer.


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of the model and of the training run."""

    width: int = 128
    hidden: int = 352  # The MLP's inner width, about 8/3 of the width.
    heads: int = 4
    layers: int = 4
    context: int = 128  # Tokens that the model sees at once.
    batch: int = 8  # Sequences per step; the number of devices must divide it.
    steps: int = 300
    learning_rate: float = 0.01  # APOLLO needs a higher rate than AdamW.
    seed: int = 0


# The model.


def linear(size_in: int, size_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(0.02)
    return nnx.Linear(size_in, size_out, use_bias=False, kernel_init=init, rngs=rngs)


def rotate(x_BxTxNxH: jax.Array) -> jax.Array:
    """Encodes positions by rotation, so that attention depends on distances."""
    T, H = x_BxTxNxH.shape[1], x_BxTxNxH.shape[3]
    frequency_h = 10_000.0 ** (-jnp.arange(0, H, 2) / H)
    angle_Tx1xh = jnp.arange(T)[:, None, None] * frequency_h
    cos, sin = jnp.cos(angle_Tx1xh), jnp.sin(angle_Tx1xh)
    first, second = jnp.split(x_BxTxNxH, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


class Attention(nnx.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.heads = config.heads
        # Query, key and value are separate kernels, so that APOLLO scales each of them
        # by its own projection.
        self.q_proj = linear(config.width, config.width, rngs)
        self.k_proj = linear(config.width, config.width, rngs)
        self.v_proj = linear(config.width, config.width, rngs)
        self.o_proj = linear(config.width, config.width, rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        B, T, D = x_BxTxD.shape

        def split_heads(y_BxTxD: jax.Array) -> jax.Array:
            return y_BxTxD.reshape(B, T, self.heads, D // self.heads)

        out_BxTxNxH = jax.nn.dot_product_attention(
            rotate(split_heads(self.q_proj(x_BxTxD))),
            rotate(split_heads(self.k_proj(x_BxTxD))),
            split_heads(self.v_proj(x_BxTxD)),
            is_causal=True,
        )
        return self.o_proj(out_BxTxNxH.reshape(B, T, D))


class Mlp(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.gate_proj = linear(config.width, config.hidden, rngs)
        self.up_proj = linear(config.width, config.hidden, rngs)
        self.down_proj = linear(config.hidden, config.width, rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        return self.down_proj(nnx.silu(self.gate_proj(x_BxTxD)) * self.up_proj(x_BxTxD))


class Block(nnx.Module):
    """One layer: attention, then the MLP, each added to its input."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD))
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))


class Llama(nnx.Module):
    """Maps tokens (B, T) to the logits of the tokens that follow, (B, T, V)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        # APOLLO leaves the embedding and the head to Adam. It recognises them by their
        # names, `embed` and `lm_head`.
        self.embed = nnx.Embed(VOCABULARY, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.final_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.lm_head = linear(config.width, VOCABULARY, rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        x_BxTxD = self.embed(tokens_BxT)
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD)
        return self.lm_head(self.final_norm(x_BxTxD))


# The text.


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes for training and the held-out bytes."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    held_out = len(text) // 20
    return text[:-held_out], text[-held_out:]


def draw_batch(text: np.ndarray, config: Config, rng: np.random.Generator) -> Any:
    """Returns random pieces of the text, each one byte longer than the context.

    The extra byte is the target of the last token.
    """
    starts = rng.integers(len(text) - config.context, size=config.batch)
    return text[starts[:, None] + np.arange(config.context + 1)].astype(np.int32)


# The mesh.


def make_mesh() -> jax.sharding.Mesh:
    """Returns all devices on one axis, over which batches and weights are sharded."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def parameter_shardings(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns a sharding for each parameter: matrices along their last axis.

    Each device stores one shard, and XLA gathers the others when a layer needs them.
    """

    def sharding(leaf: Any) -> NamedSharding:
        is_divisible = leaf.ndim == 2 and leaf.shape[1] % mesh.size == 0
        return NamedSharding(mesh, P(None, "data") if is_divisible else P())

    return jax.tree.map(sharding, params)


# The training step.


def loss_of(graphdef: Any, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross entropy in nats per byte."""
    logits_BxTxV = nnx.merge(graphdef, params)(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits_BxTxV, tokens[:, 1:]
    )
    return jnp.mean(losses)


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Returns APOLLO with a warm-up over a tenth of the steps, then a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        warmup_steps=max(1, config.steps // 10),
        decay_steps=config.steps + 1,  # A single step must not end in its warm-up.
        end_value=config.learning_rate / 10,
    )
    return apollo_optax.apollo(
        schedule,
        rank=config.width // 4,  # The paper's rank for pre-training.
        scale_front=True,  # The paper's order for small models.
        key=config.seed,
    )


def make_train_step(
    graphdef: Any, tx: optax.GradientTransformationExtraArgs, shardings: Any
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Returns the compiled step.

    Args:
      graphdef: the model's structure.
      tx: the optimizer.
      shardings: the shardings of the parameters and of the optimizer's state.
    """

    def train_step(
        params: Any, opt_state: Any, tokens: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of, argnums=1)(graphdef, params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    # Donation lets the new parameters and state take over the memory of the old ones.
    # Without `out_shardings`, XLA might gather them.
    return jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(*shardings, None))


# The sample.


def sample(
    graphdef: Any, params: Any, config: Config, *, prompt: bytes, length: int
) -> str:
    """Returns the prompt with `length` bytes that the model draws one after another."""
    # A window of constant size compiles once. Rotary positions are relative, so the
    # window may move along the text.
    window = np.frombuffer(prompt.rjust(config.context, b"\n"), np.uint8)

    @jax.jit
    def draw_bytes(params: Any, window: jax.Array, keys: jax.Array) -> jax.Array:
        def draw_byte(window_T: jax.Array, key: Any) -> tuple[jax.Array, jax.Array]:
            logits_V = nnx.merge(graphdef, params)(window_T[None])[0, -1]
            byte = jax.random.categorical(key, logits_V / 0.8)
            return jnp.append(window_T[1:], byte), byte

        return jax.lax.scan(draw_byte, window, keys)[1]

    keys = jax.random.split(jax.random.key(config.seed), length)
    drawn = draw_bytes(params, window.astype(np.int32), keys)
    return (prompt + bytes(np.asarray(drawn).tolist())).decode(errors="replace")


# The loop.


def print_sizes(tx: Any, params: Any, mesh: jax.sharding.Mesh) -> None:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = sum(apollo_optax.state_bytes(tx, params))
    adamw = sum(apollo_optax.state_bytes(optax.adamw(0.0), params))
    print(f"{count:,} parameters, sharded over {mesh.size} device(s)")
    print(f"{state:,} bytes of optimizer state; AdamW would have {adamw:,}")


def main(config: Config = Config()) -> list[float]:
    """Trains, prints the loss and a sample, and returns the losses of all steps."""
    train_text, held_out_text = read_text()
    mesh, tx = make_mesh(), make_optimizer(config)
    graphdef, params = nnx.split(Llama(config, rngs=nnx.Rngs(config.seed)), nnx.Param)
    params = jax.device_put(params, parameter_shardings(params, mesh))
    shardings = (
        parameter_shardings(params, mesh),
        # Moments are sharded over the same devices as the channels they belong to.
        apollo_optax.state_sharding(jax.eval_shape(tx.init, params), params),
    )
    opt_state = jax.jit(tx.init, out_shardings=shardings[1])(params)
    print_sizes(tx, params, mesh)

    train_step = make_train_step(graphdef, tx, shardings)
    evaluate = jax.jit(loss_of, static_argnums=0)
    rng, losses = np.random.default_rng(config.seed), []
    on_devices = NamedSharding(mesh, P("data"))
    held_out = draw_batch(held_out_text, config, np.random.default_rng(config.seed))
    for step in range(1, config.steps + 1):
        tokens = jax.device_put(draw_batch(train_text, config, rng), on_devices)
        params, opt_state, loss = train_step(params, opt_state, tokens)
        losses.append(loss)  # Reading it here would make the device wait for the host.
        if step % 50 == 0 or step == config.steps:
            held_out_loss = evaluate(graphdef, params, held_out)
            line = f"step {step}  loss {loss:.3f}  held out {held_out_loss:.3f}"
            print(line, flush=True)
    print(sample(graphdef, params, config, prompt=b"def ", length=300))
    return [float(loss) for loss in losses]


if __name__ == "__main__":
    main()
