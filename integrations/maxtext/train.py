"""MaxText with AdamW, APOLLO and APOLLO-Mini: losses, bytes on a device, resumption."""

import importlib.resources
import json
import pathlib
import tempfile

import jax

from integrations import checks
from maxtext.trainers.pre_train import train

MODEL = {
    "base_emb_dim": 128,
    "base_num_query_heads": 8,
    "base_num_kv_heads": 8,
    "head_dim": 16,
    "base_mlp_dim": 256,
    "base_num_decoder_layers": 4,
    "vocab_size": 512,
    "max_target_length": 32,
}
RUN = {
    "per_device_batch_size": 1,
    "dataset_type": "synthetic",
    "learning_rate": 0.01,
    "learning_rate_schedule_steps": 100,
    "gradient_clipping_threshold": 0.0,  # The limiter inside takes its place.
    "attention": "dot_product",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "enable_tensorboard": False,
    "log_config": False,
    "enable_goodput_recording": False,
    "async_checkpointing": False,
    "save_checkpoint_on_completion": False,
    "checkpoint_period": 10,
}


def trained(folder: pathlib.Path, opt_type: str, steps: int, **changes):
    """MaxText's state after `steps` steps, and the loss of each step by its number."""
    metrics = folder / f"metrics-{len(list(folder.glob('metrics-*')))}"
    settings = MODEL | RUN | {"opt_type": opt_type, "steps": steps}
    settings |= {"base_output_directory": folder, "run_name": opt_type}
    settings |= {"metrics_file": metrics} | changes
    base = importlib.resources.files("maxtext") / "configs" / "base.yml"
    arguments = [f"{name}={value}" for name, value in settings.items()]
    state = train.train_loop(*train.initialize(["", str(base), *arguments]))
    lines = map(json.loads, metrics.read_text().splitlines())
    return state, {int(line["step"]): line["learning/loss"] for line in lines}


def main() -> None:
    folder = pathlib.Path(tempfile.mkdtemp())
    table = {}
    for scanned in (True, False):
        for opt_type in ("adamw", "apollo", "apollo_mini"):
            state, losses = trained(folder, opt_type, 10, scan_layers=scanned,
                enable_checkpointing=False)
            name = f"{opt_type}, {'scanned' if scanned else 'unscanned'}"
            checks.check_losses_fall(name, list(losses.values()))
            table[name] = state["optimizer"]["opt_state"]
    for name, state in table.items():
        checks.check_state_is_sharded(name, state)
    _, straight = trained(folder, "apollo_mini", 15)
    mesh = {"ici_fsdp_parallelism": 4, "ici_tensor_parallelism": 2}
    _, resumed = trained(folder, "apollo_mini", 15, **mesh)


if __name__ == "__main__":
    main()
