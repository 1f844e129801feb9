"""Tunix's trainer on a tiny Llama 3: full fine-tuning, LoRA, and resumption."""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer

import apollo_optax
from integrations import checks

STEPS = 10
CONFIG = llama3.ModelConfig(
    num_layers=1,
    vocab_size=256,
    embed_dim=128,
    hidden_dim=256,
    num_heads=8,
    head_dim=16,
    num_kv_heads=8,
    rope_theta=10_000,
    norm_eps=1e-5,
)
Numbers = apollo_optax.ApolloDimensionNumbers
NUMBERS = apollo_optax.dimension_numbers_by_path(
    [
        (r"(q|k|v)_proj/w$", Numbers(0, (1, 2))),  # (embed, heads, head_dim)
        (r"o_proj/w$", Numbers((0, 1), 2)),  # (heads, head_dim, embed)
        (r"(q|k|v)_proj/w_lora_b$", Numbers(0, (1, 2))),  # (rank, heads, head_dim)
        (r"o_proj/w_lora_a$", Numbers((0, 1), 2)),  # (heads, head_dim, rank)
    ]
)
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "apollo": apollo_optax.apollo(1e-2, rank=32, weight_dimension_numbers=NUMBERS),
    "apollo_mini": apollo_optax.apollo_mini(1e-2, weight_dimension_numbers=NUMBERS),
}
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (16, 32))


def mesh_of(fsdp: int, tensor: int) -> jax.sharding.Mesh:
    types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tp"), axis_types=types)


@nnx.jit
def sharded_model() -> nnx.Module:
    model = llama3.Llama3(CONFIG, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    specs = nnx.get_partition_spec(state)
    nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
    return model


def with_lora(model: nnx.Module) -> nnx.Module:
    modules = ".*q_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"
    provider = qwix.LoraProvider(module_path=modules, rank=16, alpha=16.0)
    return qwix.apply_lora_to_model(model, provider, **model.get_model_input())


def model_input(batch: peft_trainer.TrainingInput) -> dict[str, Any]:
    rows, length = batch.input_tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    attention = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": positions,
        "attention_mask": attention,
    }


def trainer_of(
    tx: Any, steps: int, folder: pathlib.Path, adapt: Callable[[Any], Any]
) -> peft_trainer.PeftTrainer:
    """A trainer for `steps` steps, which goes on from what it finds in `folder`."""
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=1000,
        max_steps=steps,
        checkpoint_root_directory=str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=STEPS),
    )
    trainer = peft_trainer.PeftTrainer(adapt(sharded_model()), tx, config)
    return trainer.with_gen_model_input_fn(model_input)


def losses_of(trainer: peft_trainer.PeftTrainer, steps: int) -> list[float]:
    mask = np.ones_like(TOKENS)
    batch = peft_trainer.TrainingInput(input_tokens=TOKENS, input_mask=mask)
    trainer.train([batch] * steps)
    return list(trainer.metrics_logger.get_metric_history("", "loss", "train"))


def optimizer_state(trainer: peft_trainer.PeftTrainer) -> Any:
    return nnx.state(trainer.optimizer, nnx.optimizer.OptState)


def fine_tune(name: str, tx: Any, folder: pathlib.Path) -> None:
    """All parameters, which Tunix shards, and a checkpoint for another mesh."""
    with mesh_of(8, 1):
        trainer = trainer_of(tx, STEPS, folder, lambda model: model)
        losses = losses_of(trainer, STEPS)
    checks.check_losses_fall(name, losses)
    checks.check_state_is_sharded(name, optimizer_state(trainer))
    with mesh_of(4, 2):
        resumed = trainer_of(tx, STEPS + 1, folder, lambda model: model)
        checks.check_equal(name, optimizer_state(resumed), optimizer_state(trainer))
        losses = [*losses, *losses_of(resumed, STEPS + 1)]
    checks.check_losses_fall(f"{name}, restored", losses[-2:])
    checks.check_state_is_sharded(f"{name}, restored", optimizer_state(resumed))


def fine_tune_adapters(name: str, tx: Any, folder: pathlib.Path) -> None:
    """LoRA's matrices alone, which Qwix replicates, so that no state is sharded."""
    with mesh_of(8, 1):
        trainer = trainer_of(tx, STEPS, folder, with_lora)
        checks.check_losses_fall(name, losses_of(trainer, STEPS))


def main() -> None:
    folder = pathlib.Path(tempfile.mkdtemp())
    for name, tx in OPTIMIZERS.items():
        fine_tune(f"full, {name}", tx, folder / name)
    fine_tune_adapters("lora, apollo", OPTIMIZERS["apollo"], folder / "lora")


if __name__ == "__main__":
    main()
