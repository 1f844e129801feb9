"""A Linen TrainState and an NNX Optimizer, placed by Flax, with Orbax checkpoints."""

import functools
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import apollo_optax
from integrations import checks

VOCABULARY, WIDTH, HIDDEN, LAYERS, STEPS = 256, 128, 256, 2, 10
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "apollo": apollo_optax.apollo(1e-2, rank=WIDTH // 4),
    "apollo_mini": apollo_optax.apollo_mini(1e-2),
}
RULES = (("batch", "fsdp"), ("vocabulary", "tensor"), ("embed", "fsdp"))
RULES += (("mlp", "tensor"),)
TOKENS = jax.random.randint(jax.random.key(1), (16, 32), 0, VOCABULARY)


def mesh_of(fsdp: int, tensor: int) -> jax.sharding.Mesh:
    types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=types)


def cross_entropy(logits: jax.Array) -> jax.Array:
    """The loss of predicting each token's successor."""
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(logits[:, :-1], TOKENS[:, 1:]).mean()


class LinenModel(nn.Module):
    """Residual MLPs on embeddings, with logical names as Flax's LM1B example has."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        def named(*names: str) -> Any:
            return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)

        embedding = named("vocabulary", "embed")
        x = nn.Embed(VOCABULARY, WIDTH, embedding_init=embedding)(tokens)
        for _ in range(LAYERS):
            y = nn.Dense(HIDDEN, kernel_init=named("embed", "mlp"))(nn.LayerNorm()(x))
            x = x + nn.Dense(WIDTH, kernel_init=named("mlp", "embed"))(nn.gelu(y))
        return nn.Dense(VOCABULARY, kernel_init=named("embed", "vocabulary"))(x)


def linen_state(tx: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """A function that makes the train state, and the shardings that Flax gives it."""
    model = LinenModel()

    def init() -> TrainState:
        params = model.init(jax.random.key(0), TOKENS)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    specs = nn.get_partition_spec(jax.eval_shape(init))
    return init, nn.logical_to_mesh_sharding(specs, mesh, RULES)


@jax.jit
def linen_step(state: TrainState) -> tuple[TrainState, jax.Array]:
    def loss(params: Any) -> jax.Array:
        return cross_entropy(state.apply_fn({"params": params}, TOKENS))

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


def train_linen(name: str, tx: Any, folder: pathlib.Path) -> None:
    mesh = mesh_of(8, 1)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        init, shardings = linen_state(tx, mesh)
        state = jax.jit(init, out_shardings=shardings)()
        losses = []
        for _ in range(STEPS):
            state, loss = linen_step(state)
            losses.append(loss)
        expected = linen_step(state)[1]
    checks.check_losses_fall(name, losses)
    checks.check_state_is_sharded(name, state.opt_state)
    saved = {"params": state.params, "opt_state": state.opt_state}
    mesh = mesh_of(4, 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        init, shardings = linen_state(tx, mesh)
        abstract = checks.with_shardings(jax.eval_shape(init), shardings)
        target = {"params": abstract.params, "opt_state": abstract.opt_state}
        restored = checks.saved_and_restored(folder / name, saved, target)
        checks.check_equal(name, restored, saved)
        state = state.replace(step=jnp.int32(STEPS), **restored)
        checks.check_same_loss(name, linen_step(state)[1], expected)
    checks.check_state_is_sharded(f"{name}, restored", restored["opt_state"])


class NnxModel(nnx.Module):
    """The same model, whose parameters name the mesh's axes."""

    def __init__(self, rngs: nnx.Rngs):
        def named(*names: str | None) -> Any:
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)

        up, down = named("fsdp", "tensor"), named("tensor", "fsdp")
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, embedding_init=down, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(LAYERS)])
        self.ups = nnx.List(
            [linear(WIDTH, HIDDEN, kernel_init=up) for _ in range(LAYERS)]
        )
        self.downs = nnx.List(
            [linear(HIDDEN, WIDTH, kernel_init=down) for _ in range(LAYERS)]
        )
        self.head = linear(WIDTH, VOCABULARY, kernel_init=up)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(nnx.gelu(up(norm(x))))
        return self.head(x)


class Training(nnx.Module):
    """A model with its optimizer, so that both are one state to shard and to save."""

    def __init__(self, tx: Any):
        self.model = NnxModel(nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)


@nnx.jit
def nnx_step(training: Training) -> jax.Array:
    loss, gradients = nnx.value_and_grad(lambda model: cross_entropy(model(TOKENS)))(
        training.model
    )
    training.optimizer.update(training.model, gradients)
    return loss


def train_nnx(name: str, tx: Any, folder: pathlib.Path) -> None:
    @nnx.jit
    def init() -> Training:
        training = Training(tx)
        state = nnx.state(training)
        specs = nnx.get_partition_spec(state)
        nnx.update(training, jax.lax.with_sharding_constraint(state, specs))
        return training

    with jax.set_mesh(mesh_of(8, 1)):
        training = init()
        losses = [nnx_step(training) for _ in range(STEPS)]
        # nnx.state holds the variables themselves, which the next step changes.
        saved = jax.tree.map(lambda leaf: leaf, nnx.state(training))
        checks.check_losses_fall(name, losses)
        checks.check_state_is_sharded(name, saved["optimizer"])
        expected = nnx_step(training)
    mesh = mesh_of(4, 2)
    with jax.set_mesh(mesh):
        abstract = nnx.eval_shape(lambda: Training(tx))
        graph, shapes = nnx.split(abstract)
        target = checks.with_shardings(shapes, nnx.get_named_sharding(shapes, mesh))
        restored = checks.saved_and_restored(folder / name, saved, target)
        checks.check_equal(name, restored, saved)
        training = nnx.merge(graph, restored)
        checks.check_same_loss(name, nnx_step(training), expected)
    checks.check_state_is_sharded(f"{name}, restored", restored["optimizer"])


def main() -> None:
    folder = pathlib.Path(tempfile.mkdtemp())
    for name, tx in OPTIMIZERS.items():
        train_linen(f"linen, {name}", tx, folder)
        train_nnx(f"nnx, {name}", tx, folder)


if __name__ == "__main__":
    main()
