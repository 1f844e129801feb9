"""A Haliax model with its optimizer built as Levanter builds its own."""

import pathlib
import tempfile
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import optax

import apollo_optax
from integrations import checks

Vocabulary, Embed, Mlp = hax.make_axes(vocabulary=256, embed=128, mlp=256)
Batch, Position = hax.make_axes(batch=16, position=32)
STEPS = 10
MAPPING = {"batch": "fsdp", "embed": "fsdp", "mlp": "tensor", "vocabulary": "tensor"}
TOKENS = hax.random.randint(jax.random.key(1), (Batch, Position), 0, Vocabulary.size)


class Model(eqx.Module):
    """Embeddings, one residual MLP and an output head."""

    embed: hnn.Embedding
    norm: hnn.LayerNorm
    up: hnn.Linear
    down: hnn.Linear
    lm_head: hnn.Linear

    def __init__(self):
        embed, up, down, head = jax.random.split(jax.random.key(0), 4)
        self.embed = hnn.Embedding.init(Vocabulary, Embed, key=embed)
        self.norm = hnn.LayerNorm.init(Embed)
        self.up = hnn.Linear.init(Embed, Mlp, key=up)
        self.down = hnn.Linear.init(Mlp, Embed, key=down)
        self.lm_head = hnn.Linear.init(Embed, Vocabulary, key=head)

    def __call__(self, tokens: hax.NamedArray) -> hax.NamedArray:
        x = self.embed(tokens)
        return self.lm_head(x + self.down(hnn.gelu(self.up(self.norm(x)))))


def build(name: str, **arguments: Any) -> optax.GradientTransformation:
    """What ``OptimizerConfig.build`` returns in Levanter, which logs the rate."""

    def optimizer(learning_rate: Any) -> optax.GradientTransformation:
        make = {"adamw": optax.adamw}.get(name) or getattr(apollo_optax, name)
        return make(learning_rate, **arguments)

    schedule = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 3, 100)
    return optax.inject_hyperparams(optimizer)(learning_rate=schedule)


OPTIMIZERS = {
    "adamw": build("adamw"),
    "apollo": build("apollo", rank=Embed.size // 4),
    "apollo_mini": build("apollo_mini"),
}


def mesh_of(fsdp: int, tensor: int) -> jax.sharding.Mesh:
    types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=types)


def mean_loss(model: Model) -> jax.Array:
    logits = model(TOKENS)
    targets = hax.roll(TOKENS, -1, Position)
    one_hot = hax.nn.one_hot(targets, Vocabulary)
    return hnn.cross_entropy_loss(logits, Vocabulary, one_hot, hax.mean).scalar()


@eqx.filter_jit
def step(tx: Any, model: Model, state: Any, shardings: Any) -> tuple[Any, Any, Any]:
    loss, gradients = eqx.filter_value_and_grad(mean_loss)(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = tx.update(gradients, state, params)
    model, state = eqx.apply_updates(model, updates), eqx.filter_shard(state, shardings)
    return model, state, loss


def placed(tx: Any) -> tuple[Any, Any]:
    """The model as the mesh in context shards it, and where its state belongs."""
    model = hax.shard(Model(), MAPPING)
    params = eqx.filter(model, eqx.is_inexact_array)
    state = jax.eval_shape(tx.init, params)
    return model, apollo_optax.state_sharding(state, params)


def train(name: str, tx: Any, folder: pathlib.Path) -> None:
    vectors = (".norm.weight", ".bias")
    with jax.set_mesh(mesh_of(8, 1)):
        model, state_at = placed(tx)
        params = eqx.filter(model, eqx.is_inexact_array)
        state = jax.jit(tx.init, out_shardings=state_at)(params)
        losses = []
        for _ in range(STEPS):
            model, state, loss = step(tx, model, state, state_at)
            losses.append(loss)
        expected = step(tx, model, state, state_at)[2]
    checks.check_losses_fall(name, losses)
    rate = float(jnp.asarray(state.hyperparams["learning_rate"]))
    checks.check(0 < rate <= 1e-2, f"{name}: the rate in the state is {rate:.5f}")
    checks.check_state_is_sharded(name, state, vectors)
    saved = (eqx.filter(model, eqx.is_inexact_array), state)
    with jax.set_mesh(mesh_of(4, 2)):
        other, state_at = placed(tx)
        params, static = eqx.partition(other, eqx.is_inexact_array)
        places = jax.tree.map(lambda leaf: leaf.sharding, params)
        target = checks.with_shardings(saved, (places, state_at))
        restored = checks.saved_and_restored(folder / name, saved, target)
        checks.check_equal(name, restored, saved)
        loss = step(tx, eqx.combine(restored[0], static), restored[1], state_at)[2]
    checks.check_same_loss(name, loss, expected)
    checks.check_state_is_sharded(f"{name}, restored", restored[1], vectors)


def main() -> None:
    folder = pathlib.Path(tempfile.mkdtemp())
    for name, tx in OPTIMIZERS.items():
        train(name, tx, folder)


if __name__ == "__main__":
    main()
