"""The optimizers' rules for the kernels of the layers.

A rule gets all parameters, and leaves those that are not kernels to Adam.
"""

import functools
from collections.abc import Hashable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import apollo_optax
from examples.llama.config import LlamaConfig
from examples.llama.optimizers.parameters import dimension_numbers, lr_groups
from examples.llama.optimizers.wrappers import (
    UNMAPPED,
    by_matrix,
    factored_rms,
    in_float32,
    moments_in,
    over_layers,
    over_rms,
)
from examples.llama.options import RunOptions

SECOND_MOMENT_DECAY = 0.999  # The decay unless `b2` gives another one.


def second_moment_decay(options: RunOptions) -> float:
    return SECOND_MOMENT_DECAY if options.b2 is None else options.b2


def adamw(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    del config
    # The weight decay of all optimizers follows in `pipeline`. The default is none, as
    # in the APOLLO paper's pre-training.
    return in_float32(
        moments_in(
            options.moment_dtype,
            optax.scale_by_adam(b1=0.9, b2=second_moment_decay(options), eps=1e-8),
        )
    )


def with_adam_for_the_rest(
    for_kernels: optax.GradientTransformation, options: RunOptions, config: LlamaConfig
) -> optax.GradientTransformation:
    scalers: dict[Hashable, optax.GradientTransformation]
    scalers = {"kernels": in_float32(for_kernels), "rest": adamw(options, config)}
    return optax.partition(scalers, lr_groups)


def adafactor(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    # The chain is that of `optax.adafactor`.
    scaler = optax.chain(
        factored_rms(options.b2),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    factored = optax.FactoredState(count=UNMAPPED, v_row=0, v_col=0, v=0)
    axes = (factored, optax.EmptyState(), optax.EmptyState())
    return with_adam_for_the_rest(over_layers(scaler, axes), options, config)


def galore(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    assert options.rank is not None
    assert options.scale is not None
    scaler = galore_over_layers(
        options.rank,
        options.scale,
        second_moment_decay(options),
        options.moment_dtype,
    )
    return with_adam_for_the_rest(scaler, options, config)


def galore_over_layers(
    rank: int,
    scale: float,
    b2: float = SECOND_MOMENT_DECAY,
    moment_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Returns Optax's GaLore for stacks of matrices, which it does not take itself."""
    moments = optax.ScaleByAdamState(count=UNMAPPED, mu=0, nu=0)
    axes = optax.contrib.GaLoreState(
        count=UNMAPPED, base_optimizer_state=moments, projector=0
    )
    projected = moments_in(moment_dtype, optax.scale_by_adam(b2=b2))
    return over_layers(
        optax.contrib.scale_by_galore(rank, scale=scale, base_optimizer=projected), axes
    )


def lion(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    scaler = optax.scale_by_lion(b1=0.9, b2=0.99, mu_dtype=options.moment_dtype)
    return with_adam_for_the_rest(scaler, options, config)


def muon(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    def dimension_numbers(params: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), params)

    descent = optax.contrib.muon(
        1.0,
        mu_dtype=options.moment_dtype,
        muon_weight_dimension_numbers=dimension_numbers,
    )
    # Optax has Muon's scaling by shape only inside `muon`, which negates the updates
    # itself.
    scaler = optax.chain(descent, optax.scale(-1.0))
    return with_adam_for_the_rest(scaler, options, config)


def sgd(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    # SGD has no momentum here, to show the memory that the others are measured against.
    return with_adam_for_the_rest(optax.identity(), options, config)


def apollo(
    options: RunOptions,
    config: LlamaConfig,
    *,
    scale_type: Literal["channel", "tensor"],
    svd: bool = False,
    norm_growth_limit: float | None = 1.01,
) -> optax.GradientTransformation:
    assert options.rank is not None
    assert options.scale is not None
    return apollo_optax.scale_by_apollo(
        options.rank,
        scale_type=scale_type,
        scale=options.scale,
        # The paper's order for models of up to 130M parameters.
        scale_front=config.hidden_size <= 768,
        b2=second_moment_decay(options),
        norm_growth_limit=norm_growth_limit,
        projection="svd" if svd else cast(Any, options.projection),
        key=options.seed,
        weight_dimension_numbers=dimension_numbers(options),
        moment_dtype=options.moment_dtype,
    )


def racs(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    del config
    return apollo_optax.scale_by_racs(
        b2=second_moment_decay(options),
        weight_dimension_numbers=dimension_numbers(options),
        moment_dtype=options.moment_dtype,
    )


def apollo_zero(
    options: RunOptions,
    config: LlamaConfig,
    *,
    power: float = 0.5,
    method: Literal["low_rank", "newton_schulz", "exact"] = "low_rank",
    momentum: float | None = None,
) -> optax.GradientTransformation:
    del config
    return apollo_optax.scale_by_flattening(
        power,
        method=method,
        rank=options.rank,
        momentum=momentum,
        key=options.seed,
        b2=second_moment_decay(options),
        weight_dimension_numbers=dimension_numbers(options),
        moment_dtype=options.moment_dtype,
    )


def apollo_zero_of_int8_momentum(
    options: RunOptions, config: LlamaConfig
) -> optax.GradientTransformation:
    momentum = apollo_optax.int8_trace(
        0.9, nesterov=True, weight_dimension_numbers=dimension_numbers(options)
    )
    return optax.chain(momentum, apollo_zero(options, config))


def sinkgd(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    """SinkGD (https://arxiv.org/abs/2502.06742): rows, then columns, of RMS 1."""

    def rule(gradient: jax.Array) -> jax.Array:
        for _ in range(5):
            gradient = over_rms(over_rms(gradient, axis=1), axis=0)
        return gradient

    return with_adam_for_the_rest(by_matrix(rule), options, config)


def scale_hidden(
    options: RunOptions, config: LlamaConfig
) -> optax.GradientTransformation:
    """The rule of SCALE (https://arxiv.org/abs/2506.16659) for the layers' kernels.

    The gradients of an output have an RMS of 1 over the inputs.
    """
    scaler = by_matrix(functools.partial(over_rms, axis=0))
    return with_adam_for_the_rest(scaler, options, config)


def swan(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    """SWAN (https://arxiv.org/abs/2412.13148): standardized, then orthogonalized.

    The orthogonalization is Muon's, by five Newton-Schulz steps.
    """
    # Without momentum, Optax's state of Muon need not be kept.
    muon = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)

    def rule(gradient: jax.Array) -> jax.Array:
        centred = gradient - jnp.mean(gradient, axis=0, keepdims=True)
        standardized = over_rms(centred, axis=0)
        orthogonal, _ = muon.update(standardized, muon.init(standardized))
        orthogonal = jnp.asarray(orthogonal)
        # The update has the norm of the matrix that was orthogonalized.
        norm = jnp.linalg.norm(orthogonal)
        return orthogonal * jnp.where(
            norm > 0, jnp.linalg.norm(standardized) / norm, 0.0
        )

    return with_adam_for_the_rest(by_matrix(rule), options, config)
