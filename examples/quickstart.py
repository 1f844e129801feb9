"""APOLLO on one page: put it in a chain, train a small Flax model, print its state.

Run it with ``python -m examples.quickstart``; it takes seconds on a CPU.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import apollo_optax

STEPS = 300


class Mlp(nnx.Module):
    """Two hidden layers."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(16, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        # The name marks an output head, which gets Adam.
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x_BxD)))))


def loss_fn(model: Mlp, x_BxD: jax.Array, y_BxK: jax.Array) -> jax.Array:
    return jnp.mean((model(x_BxD) - y_BxK) ** 2)


@nnx.jit
def train_step(
    model: Mlp, optimizer: nnx.Optimizer, x_BxD: jax.Array, y_BxK: jax.Array
) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_fn)(model, x_BxD, y_BxK)
    optimizer.update(model, grads)
    return loss


def main() -> list[float]:
    """Trains on the outputs of a random network; returns the losses."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.01, STEPS // 10, STEPS)
    tx = optax.chain(
        apollo_optax.scale_by_apollo(rank=16),  # A drop-in for optax.scale_by_adam().
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(schedule),
    )
    model, teacher = Mlp(256, rngs=nnx.Rngs(0)), Mlp(64, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    print(apollo_optax.tabulate(tx, nnx.state(model, nnx.Param)), end="\n\n")

    losses = []
    for step in range(STEPS):
        x_BxD = jax.random.normal(jax.random.key(step), (128, 16))
        losses.append(float(train_step(model, optimizer, x_BxD, teacher(x_BxD))))
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:3d}  loss {losses[-1]:.5f}")
    return losses


if __name__ == "__main__":
    main()
