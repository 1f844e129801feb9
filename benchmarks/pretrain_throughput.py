"""Tokens per second of the example's training step and of `transformers`.

Run it with `python -m benchmarks.pretrain_throughput`.

Three trainings have the same model shape and the same random tokens: the example's step
with AdamW and with APOLLO-Mini, and the LLaMA of `transformers` in eager torch with
fused AdamW. They take turns, with a block of steps each, so that other load on the
machine affects all of them. Torch and transformers must be installed.
"""

import dataclasses
import importlib
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.report import made_with
from examples.llama.config import LlamaConfig, param_count, preset
from examples.llama.flops import flops_per_token, mfu
from examples.llama.hf.config import hf_config
from examples.llama.model import (
    REMAT_POLICIES,
    Batch,
    Execution,
    graphdef_of,
    init_params,
)
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.optimizers.recipes import with_defaults
from examples.llama.options import RunOptions
from examples.llama.run.errors import UsageError, exit_on_usage_error, unknown_name
from examples.llama.run.machine import cores
from examples.llama.step import TrainState, make_train_step

# The first step compiles. The second fills the caches.
WARMUP_STEPS = 2

# Runs the given number of steps, waits for the last, and returns its loss.
RunSteps = Callable[[int], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Tokens per second of the example's training step and of transformers in torch."""

    model: str
    """A preset of examples/llama/config.py."""
    batch: int
    """Sequences per step."""
    seq: int
    """Tokens per sequence."""
    dtype: str
    """The dtype of weights, moments and matrix products: float32 or bfloat16."""
    remat: str = "dots"
    """What the example's backward pass computes again: none, dots or full. Torch
    computes nothing again."""
    steps: int
    """Steps per block."""
    repeats: int = 7
    """Blocks per training."""
    skip_torch: bool = False
    """Time the example only."""
    torch_compile: bool = False
    """Compile the model of torch."""

    def __post_init__(self) -> None:
        for name in ("batch", "seq", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"--{name} {getattr(self, name)} is out of range; give 1 or more"
                )
        for flag, value, known in (
            ("--dtype", self.dtype, ("float32", "bfloat16")),
            ("--remat", self.remat, REMAT_POLICIES),
        ):
            if value not in known:
                raise unknown_name(flag, value, known)


ON_CPU = Options(model="60m", batch=2, seq=256, dtype="float32", steps=2)
ON_ACCELERATOR = Options(model="350m", batch=16, seq=1024, dtype="bfloat16", steps=20)


def ours(
    options: Options, config: LlamaConfig, tokens: np.ndarray, optimizer: str
) -> RunSteps:
    """Returns the example's training with one of its optimizers."""
    execution = Execution(
        remat=options.remat, param_dtype=options.dtype, compute_dtype=options.dtype
    )
    # Only the folder has no default. Nothing is written to it.
    run = RunOptions(
        out=Path(os.devnull),
        model=options.model,
        optimizer=optimizer,
        moment_dtype=options.dtype,
    )
    tx, _ = make_optimizer(with_defaults(run, config), config)
    train_step = make_train_step(graphdef_of(config, execution), tx)
    params = init_params(config, execution, seed=0)
    if sum(leaf.size for leaf in jax.tree.leaves(params)) != param_count(config):
        raise AssertionError("parameters of our model")
    state = TrainState(params, jax.jit(tx.init)(params))

    def run_steps(steps: int) -> float:
        nonlocal state
        metrics = None
        for _ in range(steps):
            state, metrics = train_step(state, Batch(tokens), 0)
        jax.block_until_ready(state)
        assert metrics is not None
        return float(metrics.loss)

    return run_steps


def imported(name: str) -> Any:
    """Returns a package that only the comparison needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{name} is not installed; pip install torch transformers, "
            "or give --skip-torch"
        ) from error


def torch_runs_here() -> bool:
    torch, _ = imported("torch"), imported("transformers")
    backend = jax.default_backend()
    return backend == "cpu" or (backend == "gpu" and torch.cuda.is_available())


def transformers_on_torch(
    options: Options, config: LlamaConfig, tokens: np.ndarray
) -> RunSteps:
    """Returns the training of the LLaMA of `transformers`, in the same shape."""
    torch, transformers = imported("torch"), imported("transformers")
    torch.manual_seed(0)
    torch.set_num_threads(cores())
    device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
    fields = hf_config(config, options.dtype, end_id=None)
    # The cache of keys and values is for generation only.
    shape = transformers.LlamaConfig.from_dict(
        fields | {"use_cache": False, "attn_implementation": "sdpa"}
    )
    model = transformers.LlamaForCausalLM(shape).to(
        device=device, dtype=getattr(torch, options.dtype)
    )
    if sum(p.numel() for p in model.parameters()) != param_count(config):
        raise AssertionError("parameters of torch's model")
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, weight_decay=0.0, fused=True
    )
    forward = torch.compile(model) if options.torch_compile else model

    def run_steps(steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            on_device = torch.from_numpy(tokens).to(device)
            inputs, targets = on_device[:, :-1], on_device[:, 1:].contiguous()
            # The targets are shifted already, so T tokens predict T tokens.
            loss = forward(input_ids=inputs, labels=targets, shift_labels=targets).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return run_steps


def timed(trainers: dict[str, RunSteps], options: Options) -> dict[str, list[float]]:
    """Returns tokens per second by trainer and block."""
    guessing = math.log(preset(options.model).vocab_size)
    for name, run_steps in trainers.items():
        loss = run_steps(1)
        if not abs(loss - guessing) < 0.5:
            raise AssertionError(
                f"{name} begins with a loss of {loss}, guessing has {guessing}"
            )
        run_steps(WARMUP_STEPS - 1)
    rates: dict[str, list[float]] = {name: [] for name in trainers}
    for repeat in range(options.repeats):
        # The order alternates, so that a drift of the machine favours none.
        for name in list(trainers)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            trainers[name](options.steps)
            seconds = time.perf_counter() - start
            rates[name].append(options.steps * options.batch * options.seq / seconds)
    return rates


def table(rates: dict[str, list[float]], options: Options, baseline: str | None) -> str:
    """Returns medians over the blocks; a ratio is the median of the blocks' ratios."""
    config, device = preset(options.model), jax.devices()[0]
    lines = [
        "| step | tokens/s | fastest, slowest block "
        "| TFLOP/s | of the peak | against torch |",
        "|---|---|---|---|---|---|",
    ]
    for name, blocks in rates.items():
        rate = statistics.median(blocks)
        flops = rate * flops_per_token(config, options.seq)
        utilisation = mfu(rate, config, options.seq, [device], options.dtype)
        share = f"{utilisation:.1%}" if utilisation else ""
        ratio = ""
        if baseline:
            pairs = zip(blocks, rates[baseline], strict=True)
            ratio = f"{statistics.median(a / b for a, b in pairs):.2f}"
        spread = f"{max(blocks):,.0f}, {min(blocks):,.0f}"
        lines.append(
            f"| {name} | {rate:,.0f} | {spread} "
            f"| {flops / 1e12:.3g} | {share} | {ratio} |"
        )
    return "\n".join(lines)


def measure(options: Options) -> None:
    config = preset(options.model)
    with_torch = not options.skip_torch and torch_runs_here()
    tokens = np.random.default_rng(0).integers(
        config.vocab_size, size=(options.batch, options.seq + 1), dtype=np.int64
    )
    packages = ["jax", "flax", "optax"]
    trainers = {
        f"ours, {name}": ours(options, config, tokens.astype(np.int32), name)
        for name in ("adamw", "apollo-mini")
    }
    baseline = None
    if with_torch:
        baseline = (
            "transformers, "
            f"{'compiled' if options.torch_compile else 'eager'} torch, adamw"
        )
        trainers[baseline] = transformers_on_torch(options, config, tokens)
        packages += ["torch", "transformers"]
    elif not options.skip_torch:
        print("without torch, which can't use this device")
    rates = timed(trainers, options)
    print(made_with(packages))
    print(
        f"{options.model} ({param_count(config):,} parameters), {options.dtype}, "
        f"{options.batch} x {options.seq} tokens a step, remat {options.remat}; "
        f"medians of {options.repeats} blocks of {options.steps} steps\n"
    )
    print(table(rates, options, baseline))


def main(args: list[str] | None = None) -> None:
    import tyro

    # JAX would preallocate three quarters of a GPU, and torch needs memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    def command() -> None:
        default = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
        prog = "python -m benchmarks.pretrain_throughput"
        measure(tyro.cli(Options, args=args, default=default, prog=prog))

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
