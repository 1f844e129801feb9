"""An Equinox model with stacked layers, placed by ``state_sharding``."""

import pathlib
import tempfile
from typing import Any

import equinox as eqx
import jax
import optax

import apollo_optax
from integrations import checks

VOCABULARY, WIDTH, HIDDEN, LAYERS, STEPS = 256, 128, 256, 2, 10
# Equinox's weights are (out, in), and these are stacked, so they are (layers, out, in).
NUMBERS = apollo_optax.dimension_numbers_by_path(
    [
        (r"^layers/norm", None),  # Stacked vectors look like a matrix.
        (r"^layers/", apollo_optax.ApolloDimensionNumbers(2, 1)),
    ]
)
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "apollo": apollo_optax.apollo(
        1e-2, rank=WIDTH // 4, weight_dimension_numbers=NUMBERS
    ),
    "apollo_mini": apollo_optax.apollo_mini(1e-2, weight_dimension_numbers=NUMBERS),
}
TOKENS = jax.random.randint(jax.random.key(1), (16, 32), 0, VOCABULARY)


class Layer(eqx.Module):
    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        up, down = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.up = eqx.nn.Linear(WIDTH, HIDDEN, use_bias=False, key=up)
        self.down = eqx.nn.Linear(HIDDEN, WIDTH, use_bias=False, key=down)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    layers: Layer
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        embed, layers, head = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=embed)
        self.layers = eqx.filter_vmap(Layer)(jax.random.split(layers, LAYERS))
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=head)

    def __call__(self, token: jax.Array) -> jax.Array:
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def apply(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return eqx.combine(layer, static)(x), None

        x, _ = jax.lax.scan(apply, self.embed(token), arrays)
        return self.head(x)


def parameter_shardings(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shards the larger of the last two axes over fsdp and the other over tensor."""

    def place(leaf: jax.Array) -> jax.sharding.NamedSharding:
        names: list[str | None] = [None] * leaf.ndim
        if min(leaf.shape[-2:], default=0) >= WIDTH:
            larger = leaf.ndim - 2 + int(leaf.shape[-1] > leaf.shape[-2])
            names[-2:] = ["tensor", "tensor"]
            names[larger] = "fsdp"
        return jax.NamedSharding(mesh, jax.P(*names))

    return jax.tree.map(place, params)


def mean_loss(model: Model) -> jax.Array:
    logits = jax.vmap(jax.vmap(model))(TOKENS[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(logits, TOKENS[:, 1:]).mean()


@eqx.filter_jit
def step(tx: Any, model: Model, state: Any, shardings: Any) -> tuple[Any, Any, Any]:
    loss, gradients = eqx.filter_value_and_grad(mean_loss)(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = tx.update(gradients, state, params)
    model, state = eqx.apply_updates(model, updates), eqx.filter_shard(state, shardings)
    return model, state, loss


def placed(model: Model, tx: Any, devices: tuple[int, int]) -> tuple[Any, Any]:
    """Where the parameters and the optimizer's state belong on a mesh."""
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(devices, ("fsdp", "tensor"), axis_types=types)
    params = eqx.filter(model, eqx.is_inexact_array)
    places = parameter_shardings(params, mesh)
    abstract = checks.with_shardings(params, places)
    state = jax.eval_shape(tx.init, params)
    return places, apollo_optax.state_sharding(
        state, abstract, weight_dimension_numbers=NUMBERS
    )


def train(name: str, tx: Any, folder: pathlib.Path) -> None:
    model = Model(jax.random.key(0))
    params_at, state_at = placed(model, tx, (8, 1))
    model = eqx.filter_shard(model, params_at)
    params = eqx.filter(model, eqx.is_inexact_array)
    state = jax.jit(tx.init, out_shardings=state_at)(params)
    losses = []
    for _ in range(STEPS):
        model, state, loss = step(tx, model, state, state_at)
        losses.append(loss)
    checks.check_losses_fall(name, losses)
    checks.check_state_is_sharded(name, state, vectors=("norm.", "bias"))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    saved = (params, state)
    shardings = placed(model, tx, (4, 2))
    target = checks.with_shardings(saved, shardings)
    restored = checks.saved_and_restored(folder / name, saved, target)
    checks.check_equal(name, restored, saved)
    loss = step(tx, eqx.combine(restored[0], static), restored[1], shardings[1])[2]
    checks.check_same_loss(name, loss, step(tx, model, state, state_at)[2])
    checks.check_state_is_sharded(name, restored[1], vectors=("norm.", "bias"))


def main() -> None:
    folder = pathlib.Path(tempfile.mkdtemp())
    for name, tx in OPTIMIZERS.items():
        train(name, tx, folder)


if __name__ == "__main__":
    main()
