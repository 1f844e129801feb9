"""MaxText with AdamW, APOLLO and APOLLO-Mini: losses, bytes on a device, resumption."""

import importlib.resources
import json
import pathlib
import tempfile
from typing import Any

import jax
from maxtext.trainers.pre_train import train

from integrations import checks

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
WITHOUT_CHECKPOINTS = {"enable_checkpointing": False}
EXPERTS = {
    "decoder_block": "mixtral",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "base_moe_mlp_dim": 256,
    "sparse_matmul": False,
}
LAYOUTS = {"scanned": {}, "unscanned": {"scan_layers": False}, "experts": EXPERTS}


def trained(
    folder: pathlib.Path, opt_type: str, steps: int, **changes: Any
) -> tuple[Any, dict[int, float]]:
    """MaxText's state after `steps` steps, and the loss of each step by its number."""
    metrics = pathlib.Path(tempfile.mkstemp(dir=folder)[1])
    settings = MODEL | RUN | {"opt_type": opt_type, "steps": steps}
    settings |= {"base_output_directory": folder, "run_name": opt_type}
    settings |= {"metrics_file": metrics} | changes
    base = importlib.resources.files("maxtext") / "configs" / "base.yml"
    arguments = [f"{name}={value}" for name, value in settings.items()]
    state = train.train_loop(*train.initialize(["", str(base), *arguments]))
    lines = map(json.loads, metrics.read_text().splitlines())
    losses = {int(line["step"]): float(line["learning/loss"]) for line in lines}
    return state["optimizer"]["opt_state"], losses


def check_placement(folder: pathlib.Path) -> None:
    """AdamW beside APOLLO, with layers scanned and unscanned and with experts."""
    table = {}
    for layout, changes in LAYOUTS.items():
        for opt_type in ("adamw", "apollo", "apollo_mini"):
            if opt_type == "apollo" and layout != "scanned":
                continue  # One rank more would show nothing new there.
            name = f"{layout}, {opt_type}"
            state, losses = trained(
                folder, opt_type, 10, **WITHOUT_CHECKPOINTS, **changes
            )
            checks.check_losses_fall(name, list(losses.values()))
            table[name] = checks.check_state_is_sharded(name, state)
    for name, size in table.items():
        print(f"{name:24s} {size:>9,} bytes of optimizer state on each device")


def check_wrappers(folder: pathlib.Path) -> None:
    """What MaxText wraps around the optimizer, which a plain `return` would skip."""
    wrappers = {"skip_step_on_spikes": True, "trainable_parameters_mask": "['mlp']"}
    state, losses = trained(
        folder, "apollo_mini", 10, **WITHOUT_CHECKPOINTS, **wrappers
    )
    checks.check_losses_fall("apollo_mini, mlp alone trained", list(losses.values()))
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    checks.check(any("grad_norms" in path for path in paths), "steps can be skipped")
    frozen = not any("self_attention" in path for path in paths)
    checks.check(frozen, "frozen parameters have no state")


def check_resumption(folder: pathlib.Path) -> None:
    """A checkpoint of step 10 on another mesh, beside the run that wrote it."""
    _, straight = trained(folder, "apollo_mini", 13)
    mesh = {"ici_fsdp_parallelism": 4, "ici_tensor_parallelism": 2}
    state, resumed = trained(folder, "apollo_mini", 13, **mesh)
    first = min(resumed)
    checks.check(first == 11, f"apollo_mini resumes on another mesh at step {first}")
    checks.check_same_loss("apollo_mini", resumed[12], straight[12])
    checks.check_state_is_sharded("apollo_mini, restored", state)


def main() -> None:
    folder = pathlib.Path(tempfile.mkdtemp())
    check_placement(folder)
    check_wrappers(folder)
    check_resumption(folder)


if __name__ == "__main__":
    main()
