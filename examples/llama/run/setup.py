"""Builds the parts of a run from options: model, text, parameters, optimizer state."""

import dataclasses
import datetime
import functools
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich import filesize

from apollo_optax import StateBytes, state_bytes
from examples.llama.config import LlamaConfig, adapter_count, param_count, preset
from examples.llama.hf import weights as hf_weights
from examples.llama.hf.config import read_config
from examples.llama.hf.folder import config_folder, weights_folder
from examples.llama.loop import Text
from examples.llama.lora import adapters_of, without_adapters
from examples.llama.mesh import make_mesh, on_every_device
from examples.llama.model import (
    Execution,
    Params,
    graphdef_of,
    init_layer,
    init_outside_layers,
    init_params,
    pieces_of,
)
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.options import RunOptions, TrainingOptions, TuningOptions
from examples.llama.partition import check_sizes, parameter_shardings, state_shardings
from examples.llama.run.errors import UsageError
from examples.llama.run.machine import machine
from examples.llama.step import (
    TrainState,
    TrainStep,
    make_layerwise_train_step,
    make_train_step,
)
from examples.llama.storage import Storage, on_mesh
from examples.llama.text import corpus
from examples.llama.text.hub import PREFIX


def model_config(options: TrainingOptions) -> LlamaConfig:
    """Returns the shape that `model` or `init_from` gives.

    Raises `UsageError` if `seq` is longer than the model's context or its window of
    attention.
    """
    if options.init_from:
        name = f"`init_from` {options.init_from}"
        config = read_config(config_folder(options.init_from))
    else:
        assert options.model is not None
        name, config = f"`model` {options.model}", preset(options.model)
    if options.seq > config.max_seq_len:
        raise UsageError(
            f"`seq` {options.seq} is too long; {name} takes {config.max_seq_len}"
        )
    if config.sliding_window and options.seq > config.sliding_window:
        raise UsageError(
            f"`seq` {options.seq} is longer than the sliding_window "
            f"{config.sliding_window} of {name}, and attention is computed without "
            f"windows; give `seq` {config.sliding_window} or less"
        )
    if isinstance(options, TuningOptions) and options.lora:
        assert options.lora_alpha is not None
        return dataclasses.replace(
            config, lora_rank=options.lora, lora_alpha=options.lora_alpha
        )
    return config


def mesh_of(
    options: TrainingOptions, config: LlamaConfig, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """Returns the mesh of a run, of all `devices`, by default those of all processes.

    Raises:
        UsageError: if the mesh's sizes do not multiply to the number of devices, or do
            not divide the model's sizes.
    """
    mesh = make_mesh(options.mesh, devices)
    check_sizes(options, config)
    return mesh


def execution_of(
    options: TrainingOptions, config: LlamaConfig, mesh: jax.sharding.Mesh | None = None
) -> Execution:
    """Returns the options for computing the model.

    Raises `UsageError` for an `attention` that this machine does not have.
    """
    assert options.compute_dtype is not None
    execution = Execution(
        remat=options.remat,
        param_dtype=options.compute_dtype
        if options.weights == "int8"
        else options.weights,
        compute_dtype=options.compute_dtype,
        attention=options.attention,
        mesh=mesh,
    )
    automatic = dataclasses.replace(execution, attention="auto")
    # Fine-tuning packs rows, which takes a mask.
    best = automatic.attention_implementation(
        config.head_size, options.seq, has_mask=isinstance(options, TuningOptions)
    )
    if options.attention == "cudnn" and best != "cudnn":
        raise UsageError(
            "`attention` cudnn takes an NVIDIA GPU from Ampere on, `compute_dtype` "
            "bfloat16, heads of a multiple of 8 up to 128, and in fine-tuning an even "
            f"`seq`; this is {jax.devices()[0].device_kind}, "
            f"{execution.compute_dtype}, {config.head_size}, {options.seq}; leave it "
            "out"
        )
    return execution


def check_offload(options: TrainingOptions) -> None:
    """Raises `UsageError` for `offload` if the devices share the host's memory."""
    device = jax.local_devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if options.offload and (device.platform == "cpu" or "pinned_host" not in kinds):
        raise UsageError(
            f"`offload` {options.offload} moves what a GPU or TPU has no room for to "
            f"the host's memory, and this is {device.device_kind}, "
            "which has no other; leave it out"
        )


def load_corpus(options: TrainingOptions, config: LlamaConfig) -> corpus.Corpus:
    tokenizer, max_tokens = options.tokenizer, options.data_tokens
    is_the_models = bool(options.init_from) and not tokenizer
    if is_the_models:
        tokenizer = options.init_from  # Its weights mean nothing with another one.
    if options.data.startswith(PREFIX) and not max_tokens:
        # A hub data set may have no end. The number of tokens is rounded up, so that
        # slightly longer runs find the text cached.
        max_tokens = (
            2 ** (options.steps * options.batch * (options.seq + 1)).bit_length()
        )
    return corpus.load_corpus(
        options.data,
        vocab_size=config.vocab_size,
        tokenizer=tokenizer,
        tokenizer_option="`init_from`" if is_the_models else "`tokenizer`",
        vocab=options.vocab,
        max_tokens=max_tokens,
        validation=options.validation,
        text_field=options.text_field,
        bos=options.bos,
    )


def describe(options: RunOptions, config: LlamaConfig, text: Text) -> dict[str, Any]:
    """Returns a JSON description of the run; equal descriptions compute the same."""
    description = options.as_run() | {
        "model_config": dataclasses.asdict(config),
        "corpus": text.key,
        "end_token": text.tokenizer.id_to_token(text.end_id),
        "made_with": {
            **{name: metadata.version(name) for name in ("jax", "flax", "optax")},
            "python": platform.python_version(),
            "device": machine(),
            "date": datetime.date.today().isoformat(),
        },
    }
    if config.lora_rank and options.init_from:
        # Checkpoints have the adapters alone, which fit no other weights.
        folder = weights_folder(options.init_from)
        description["base_weights"] = hf_weights.weights_digest(folder)
    return description


def summary(
    options: RunOptions,
    config: LlamaConfig,
    text: Text,
    mesh: jax.sharding.Mesh,
) -> str:
    """Returns a line that describes the run."""
    tokens = options.steps * options.batch * options.seq
    state = sum(state_bytes_of(options, config))
    adapters = (
        f" and {adapter_count(config):,} in adapters of rank {config.lora_rank}, which "
        "alone are trained"
        if config.lora_rank
        else ""
    )
    return (
        f"{options.model or options.init_from}: {param_count(config):,} parameters in "
        f"{options.weights}{adapters}, {filesize.decimal(state)} of optimizer state, "
        f"on {mesh.size} of {len(jax.devices())} {jax.devices()[0].device_kind}; "
        f"{tokens:,} tokens, {tokens / text.tokens:.2g} times the {text.tokens:,} "
        "there are"
    )


def state_bytes_of(options: RunOptions, config: LlamaConfig) -> StateBytes:
    """Returns the bytes of a run's optimizer state."""
    mesh = make_mesh(options.mesh)
    params = abstract_params(config, execution_of(options, config), mesh)
    return state_bytes(make_optimizer(options, config)[0], trained(config, params))


def abstract_params(
    config: LlamaConfig, execution: Execution, mesh: jax.sharding.Mesh
) -> Params:
    """Returns the parameters' shapes, dtypes and shardings; allocates nothing."""
    shapes = jax.eval_shape(lambda: init_params(config, execution, seed=0))
    return placed(shapes, parameter_shardings(shapes, mesh))


def trained(config: LlamaConfig, params: Params) -> Params:
    """Returns the parameters that a run trains: the adapters, or all if it has none."""
    return adapters_of(params) if config.lora_rank else params


def abstract_frozen(
    options: TrainingOptions, config: LlamaConfig, mesh: jax.sharding.Mesh
) -> Params | None:
    """Returns the shapes of the parameters beside the adapters; None without `lora`."""
    if not config.lora_rank:
        return None
    params = abstract_params(config, execution_of(options, config), mesh)
    return without_adapters(params)


def frozen_params(
    options: TrainingOptions, config: LlamaConfig, mesh: jax.sharding.Mesh
) -> Params | None:
    """Returns the weights of `init_from` beside the adapters; None without `lora`."""
    shapes = abstract_frozen(options, config, mesh)
    if shapes is None:
        return None
    reader = pretrained_weights(options, config)
    return read_params(reader, storage_of(options, mesh), shapes)


def storage_of(options: TrainingOptions, mesh: jax.sharding.Mesh) -> Storage:
    return Storage(
        mesh, int8=options.weights == "int8", offload="weights" in options.offloaded
    )


def abstract_state(
    options: RunOptions,
    config: LlamaConfig,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state; allocates nothing."""
    params = trained(
        config, abstract_params(config, execution_of(options, config), mesh)
    )
    opt_state = jax.eval_shape(tx.init, params)
    opt_state = placed(opt_state, state_shardings(options, opt_state, params))
    return TrainState(storage_of(options, mesh).abstract(params), opt_state)


def placed(shapes: Any, shardings: Any) -> Any:
    def place(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)


def shardings_of(shapes: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, shapes)


def initial_state(
    options: RunOptions,
    config: LlamaConfig,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    shapes = trained(
        config, abstract_params(config, execution_of(options, config), mesh)
    )
    shardings = shardings_of(abstract_state(options, config, tx, mesh).opt_state)

    # The function takes only the shapes of the parameters, so that they need not all
    # exist in full.
    def init_state() -> optax.OptState:
        return tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    opt_state = jax.jit(init_state, out_shardings=shardings)()
    return TrainState(initial_params(options, config, mesh), opt_state)


def initial_params(
    options: RunOptions, config: LlamaConfig, mesh: jax.sharding.Mesh
) -> Params:
    """Returns the weights to start from, as `weights` and `offload` keep them.

    With `lora` they are the adapters alone.
    """
    execution, storage = execution_of(options, config), storage_of(options, mesh)
    shapes = abstract_params(config, execution, mesh)
    shardings = shardings_of(shapes)
    of_the_rest = {
        name: sharding for name, sharding in shardings.items() if name != "layers"
    }
    arguments = {"config": config, "execution": execution, "seed": options.seed}
    if config.lora_rank:
        return jax.jit(
            lambda: adapters_of(init_params(**arguments)),
            out_shardings=adapters_of(shardings),
        )()
    if options.init_from:
        return read_params(pretrained_weights(options, config), storage, shapes)
    if not storage.a_layer_at_a_time:
        return jax.jit(
            functools.partial(init_params, **arguments), out_shardings=shardings
        )()
    rest = jax.jit(
        functools.partial(init_outside_layers, **arguments), out_shardings=of_the_rest
    )()
    # The layers' axis is not sharded, so a stack of one layer has the sharding of all.
    draw = jax.jit(
        functools.partial(init_layer, **arguments), out_shardings=shardings["layers"]
    )
    return storage.filled(shapes, rest, lambda index: draw(index=index))


def read_params(
    reader: hf_weights.WeightReader, storage: Storage, shapes: Params
) -> Params:
    """Returns the weights of a file as `storage` keeps them.

    Each layer is moved to its device before the next one is read. Besides the weights
    that are stored in host memory, it has at most two layers: the one that was read,
    and its copy on the device if the device is a CPU.

    Args:
        reader: the reader of the weights.
        storage: the storage of the run's weights.
        shapes: all parameters, abstract, with shardings.
    """
    shardings = shardings_of(shapes)

    def to_devices(params: Params, shardings: Any) -> Params:
        # JAX frees the arrays that were read only when they have arrived.
        return jax.block_until_ready(jax.tree.map(on_mesh, params, shardings))

    layers = shardings.pop("layers")
    return storage.filled(
        shapes,
        to_devices(reader.outside_layers(), shardings),
        # The layers' axis is not sharded, so a stack of one layer has their sharding.
        lambda index: to_devices(reader.layer(index), layers),
    )


def pretrained_weights(
    options: TrainingOptions, config: LlamaConfig
) -> hf_weights.WeightReader:
    """Returns the reader of the weights that `init_from` names.

    They are downloaded if necessary. Raises `UsageError` if they are missing or do not
    fit `config`.
    """
    assert options.init_from is not None
    return hf_weights.WeightReader(
        weights_folder(options.init_from),
        config.base,
        execution_of(options, config).param_dtype,
    )


def training_step(
    options: RunOptions,
    config: LlamaConfig,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainStep:
    """Returns the compiled step of a run."""
    execution = execution_of(options, config, mesh)
    # The metrics are replicated too, since every process reads them.
    out_shardings = (
        shardings_of(abstract_state(options, config, tx, mesh)),
        on_every_device(mesh),
    )
    rounding_seed = options.seed if options.rounding == "stochastic" else None
    if options.layerwise:
        return make_layerwise_train_step(
            pieces_of(config, execution),
            tx,
            offload_inputs="activations" in options.offloaded,
            rounding_seed=rounding_seed,
            out_shardings=out_shardings,
        )
    return make_train_step(
        graphdef_of(config, execution),
        tx,
        accumulate=options.accumulate,
        skip_nonfinite=options.on_nonfinite == "skip",
        rounding_seed=rounding_seed,
        out_shardings=out_shardings,
    )
