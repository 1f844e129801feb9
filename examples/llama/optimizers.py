"""The optimizers by name, with their learning rates.

Parameters fall into two groups: the kernels of the layers (attention and MLP), which is
where the optimizers differ, and the rest (embeddings, head, norms), which all of them
leave to Adam by default. Each group has a learning rate of its own, so that no
comparison is won by a better rate for the embeddings alone. The embedding and the head
may be given to another rule, whatever the optimizer.

To add an optimizer, add a `Recipe`. To add a rule for embedding and head, add an
`EmbeddingRule`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import apollo_optax
from examples.llama.config import LlamaConfig
from examples.llama.lora import ADAPTERS
from examples.llama.options import RunOptions, TuningOptions
from examples.llama.run.errors import UsageError, unknown_name

KERNELS = r"^layers/.*/kernel$"  # (L, in, out)
EMBEDDING = r"^embed/embedding$"  # (V, D)
HEAD = r"^lm_head/kernel$"  # (D, V)
ENDS = {"embedding": EMBEDDING, "head": HEAD}

SECOND_MOMENT_DECAY = 0.999  # The decay unless `b2` gives another one.

Schedules = dict[str, optax.Schedule]


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a path of JAX keys as `layers/mlp/up_proj/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def adamw(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    del config
    # Without weight decay, as in the APOLLO paper's pre-training, AdamW is Adam.
    return in_float32(
        moments_in(
            options.moment_dtype,
            optax.scale_by_adam(b1=0.9, b2=second_moment_decay(options), eps=1e-8),
        )
    )


def second_moment_decay(options: RunOptions) -> float:
    return SECOND_MOMENT_DECAY if options.b2 is None else options.b2


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `tx` as it is for float32 parameters.

    Optax gives a second moment the parameters' dtype. In bfloat16 its decay of 0.999
    rounds to 1, so it would never decay. APOLLO's moments are float32 by default.
    """

    def widened(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        return tx.update(widened(updates), state, widened(params))

    return optax.GradientTransformation(lambda params: tx.init(widened(params)), update)


def moments_in(
    dtype: str, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns `tx` with its state stored in `dtype` between steps.

    Optax itself has this option for first moments only.
    """

    def cast(state: optax.OptState, dtype: Any) -> optax.OptState:
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            state,
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = tx.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    if dtype == "float32":
        # The state is already so, and float64 parameters have moments in float64.
        return tx
    return optax.GradientTransformation(
        lambda params: cast(tx.init(params), dtype), update
    )


def with_adam_for_the_rest(
    for_kernels: optax.GradientTransformation, options: RunOptions, config: LlamaConfig
) -> optax.GradientTransformation:
    scalers: dict[Hashable, optax.GradientTransformation]
    scalers = {"kernels": in_float32(for_kernels), "rest": adamw(options, config)}
    return optax.partition(scalers, lr_groups)


def factored_rms(
    options: RunOptions, min_dim_size_to_factor: int = 128
) -> optax.GradientTransformation:
    """Returns Adafactor's second moments, whose decay rises towards 1.

    If `b2` is given, the decay rises to that at most, as in Scaling Vision Transformers
    (https://arxiv.org/abs/2106.04560).
    """

    def decay(step: jax.typing.ArrayLike, exponent: jax.typing.ArrayLike) -> jax.Array:
        steps = jnp.asarray(step, jnp.float32) + 1
        rising = 1 - steps ** jnp.negative(exponent)
        return rising if options.b2 is None else jnp.minimum(rising, options.b2)

    return optax.scale_by_factored_rms(
        min_dim_size_to_factor=min_dim_size_to_factor, decay_rate_fn=decay
    )


def adafactor(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    # The chain is that of `optax.adafactor`.
    scaler = optax.chain(
        factored_rms(options),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    factored = optax.FactoredState(count=UNMAPPED, v_row=0, v_col=0, v=0)
    axes = (factored, optax.EmptyState(), optax.EmptyState())
    return with_adam_for_the_rest(over_layers(scaler, axes), options, config)


def galore(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    assert options.rank is not None
    assert options.scale is not None
    return with_adam_for_the_rest(
        galore_over_layers(options.rank, options.scale, second_moment_decay(options)),
        options,
        config,
    )


def galore_over_layers(
    rank: int, scale: float, b2: float = SECOND_MOMENT_DECAY
) -> optax.GradientTransformation:
    """Returns Optax's GaLore for stacks of matrices, which it does not take itself."""
    moments = optax.ScaleByAdamState(count=UNMAPPED, mu=0, nu=0)
    axes = optax.contrib.GaLoreState(
        count=UNMAPPED, base_optimizer_state=moments, projector=0
    )
    projected = optax.scale_by_adam(b2=b2)
    return over_layers(
        optax.contrib.scale_by_galore(rank, scale=scale, base_optimizer=projected), axes
    )


# The axis of a count, which is not mapped. On a mapped count, GaLore would compute the
# SVD at every step.
UNMAPPED: Any = None


def over_layers(
    tx: optax.GradientTransformation, axes: Any
) -> optax.GradientTransformation:
    """Maps a transformation of matrices over the first axis of stacked matrices.

    The norms of the matrices stay separate.

    Args:
        tx: a transformation of matrices.
        axes: 0 for each part of its state that every matrix has, and `UNMAPPED` for
            each part that they share.
    """
    mapped_init = jax.vmap(tx.init, out_axes=axes)
    mapped_update = jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes))

    # If all matrices are masked out, there is nothing to map over.
    def init(params: optax.Params) -> optax.OptState:
        return mapped_init(params) if jax.tree.leaves(params) else tx.init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        return (mapped_update if jax.tree.leaves(updates) else tx.update)(
            updates, state, params
        )

    return optax.GradientTransformation(init, update)


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


def dimension_numbers(options: RunOptions) -> Callable[[Any], Any]:
    """Returns which axes of the parameters are matrices to this library's optimizers.

    An embedding or a head is a matrix only to some of its rules.
    """
    rules = [
        (KERNELS, apollo_optax.ApolloDimensionNumbers(1, 2)),
        (ADAPTERS, None),  # Adapters have Adam.
    ]
    rules += [
        (ENDS[end], apollo_optax.ApolloDimensionNumbers(0, 1))
        for end, rule in embedding_rules(options).items()
        if rule in ("apollo", "racs", "flattening", "adafactor-momentum")
    ]
    return apollo_optax.dimension_numbers_by_path(rules)


def embedding_rules(options: RunOptions) -> dict[str, str]:
    """Returns the names of the rules for "embedding" and "head"."""
    return {
        "embedding": options.embeddings,
        "head": options.head or options.embeddings,
    }


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
    options: RunOptions, config: LlamaConfig, *, momentum: float | None = None
) -> optax.GradientTransformation:
    del config
    return apollo_optax.scale_by_flattening(
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


def by_matrix(
    rule: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformation:
    """Returns the stateless transformation that applies `rule` to each matrix.

    Args:
        rule: a function of the gradient of one kernel, (in, out).
    """
    return optax.stateless(
        lambda updates, params: jax.tree.map(jax.vmap(rule), updates)
    )


def over_rms(x: jax.Array, axis: int) -> jax.Array:
    """Returns `x` divided by its RMS over an axis, or zeros if the RMS is 0."""
    rms = jnp.sqrt(jnp.mean(jnp.square(x), axis, keepdims=True))
    return x / jnp.where(rms > 0, rms, 1)


def scale_of_embedding(options: RunOptions) -> optax.GradientTransformation:
    """Returns the rule of SCALE for an embedding: channels of RMS 1, and no state.

    The gradients of a channel have an RMS of 1 over the vocabulary.
    """
    del options
    return in_float32(by_leaf(functools.partial(over_rms, axis=0)))


def scale_of_head(options: RunOptions) -> optax.GradientTransformation:
    """Returns the rule of SCALE for a head: momentum, and tokens of RMS 1."""
    momentum = optax.trace(0.9)
    tokens = by_leaf(functools.partial(over_rms, axis=0))
    return in_float32(optax.chain(moments_in(options.moment_dtype, momentum), tokens))


def by_leaf(rule: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Returns the stateless transformation that applies `rule` to whole leaves."""
    return optax.stateless(lambda updates, params: jax.tree.map(rule, updates))


def adafactor_of_embedding(options: RunOptions) -> optax.GradientTransformation:
    """Returns Adafactor without momentum, with an absolute learning rate.

    By default, Optax factors only matrices whose sides are at least 128. An embedding
    should be factored at any width.
    """
    return in_float32(
        optax.chain(
            factored_rms(options, min_dim_size_to_factor=1),
            optax.clip_by_block_rms(1.0),
        )
    )


def adafactor_with_momentum(options: RunOptions) -> optax.GradientTransformation:
    """Returns `adafactor_of_embedding` with the moving average of its updates.

    The average is stored in int8.
    """
    decay = 0.9
    momentum = apollo_optax.int8_trace(
        decay, weight_dimension_numbers=dimension_numbers(options)
    )
    return optax.chain(
        adafactor_of_embedding(options), momentum, optax.scale(1 - decay)
    )


def racs_of_embedding(options: RunOptions) -> optax.GradientTransformation:
    return apollo_optax.scale_by_racs(
        weight_dimension_numbers=dimension_numbers(options)
    )


def flattening_of_embedding(options: RunOptions) -> optax.GradientTransformation:
    return apollo_optax.scale_by_flattening(
        key=options.seed, weight_dimension_numbers=dimension_numbers(options)
    )


class EmbeddingRule(NamedTuple):
    """A rule for the embedding, (V, D), and the head, (D, V).

    The learning rates are the best of the searches in docs/results.md, on both the
    embedding and the head, with APOLLO-Zero on the kernels of the tiny model. That of
    adafactor-momentum is the rate of adafactor; twice as much was better. That of
    flattening was not searched, because flattening the head's gradient fails.
    """

    of_embedding: Callable[[RunOptions], optax.GradientTransformation]
    of_head: Callable[[RunOptions], optax.GradientTransformation]
    lr: float


EMBEDDING_RULES: dict[str, EmbeddingRule] = {
    "scale": EmbeddingRule(scale_of_embedding, scale_of_head, lr=1.5e-2),
    "adafactor": EmbeddingRule(
        adafactor_of_embedding, adafactor_of_embedding, lr=2.4e-2
    ),
    "adafactor-momentum": EmbeddingRule(
        adafactor_with_momentum, adafactor_with_momentum, lr=2.4e-2
    ),
    "racs": EmbeddingRule(racs_of_embedding, racs_of_embedding, lr=2e-2),
    "flattening": EmbeddingRule(
        flattening_of_embedding, flattening_of_embedding, lr=3e-2
    ),
}


def with_embedding_rules(
    scaler: optax.GradientTransformation, options: RunOptions, config: LlamaConfig
) -> optax.GradientTransformation:
    """Returns `scaler` for all parameters except those with a rule of their own.

    If there is no such rule, it is `scaler` itself, because a partition would change
    the paths in the checkpoints.
    """
    rules = embedding_rules(options)
    if config.tied_head:
        del rules["head"]
    own = {end: rule for end, rule in rules.items() if rule in EMBEDDING_RULES}
    if not own:
        return scaler
    scalers: dict[Hashable, optax.GradientTransformation] = {"others": scaler}
    for end, name in own.items():
        rule = EMBEDDING_RULES[name]
        of_end = rule.of_embedding if end == "embedding" else rule.of_head
        scalers[end] = of_end(options)

    def part(path: tuple[Any, ...], leaf: Any) -> str:
        del leaf
        matches = (end for end in own if re.search(ENDS[end], path_name(path)))
        return next(matches, "others")

    return optax.partition(
        scalers, lambda params: jax.tree_util.tree_map_with_path(part, params)
    )


class Recipe(NamedTuple):
    """An optimizer: its transformation, default learning rates and APOLLO options.

    The learning rates are the best of the grids in docs/results.md, with the tiny model
    and one seed; apollo-svd has those of apollo. The rates of racs, sinkgd,
    scale-hidden and swan are those of their papers, and that of apollo-zero is a usual
    one of AdamW.
    """

    scaler: Callable[[RunOptions, LlamaConfig], optax.GradientTransformation]
    lr: float
    lr_embeddings: float
    rank_of: Callable[[LlamaConfig], int | None] = lambda config: None
    scale: float | None = None
    layerwise: bool = True  # Whether it can be given some of the parameters at a time.
    # What `projection` auto stands for. An optimizer without projections has the value
    # that its runs had before there was a choice, so that they can be resumed.
    projection: str = "random"
    relative: bool = False  # The default in pre-training.


def quarter_of_width(config: LlamaConfig) -> int:
    return config.hidden_size // 4


def eighth_of_width(config: LlamaConfig) -> int:
    return config.hidden_size // 8


def channel_wise(*, svd: bool = False) -> Recipe:
    return Recipe(
        functools.partial(apollo, scale_type="channel", svd=svd),
        lr=1e-2,
        lr_embeddings=3e-2,
        rank_of=quarter_of_width,
        scale=1.0,
        projection="random" if svd else "rademacher",
    )


RECIPES: dict[str, Recipe] = {
    "adamw": Recipe(adamw, lr=2e-3, lr_embeddings=3e-2),
    "apollo": channel_wise(),
    "apollo-mini": Recipe(
        functools.partial(apollo, scale_type="tensor"),
        lr=7e-3,
        lr_embeddings=3e-2,
        rank_of=lambda config: 1,
        scale=128.0,
        projection="rademacher",
    ),
    "apollo-svd": channel_wise(svd=True),
    "apollo-zero": Recipe(
        apollo_zero,
        lr=2e-3,
        lr_embeddings=3e-2,
        rank_of=eighth_of_width,
        relative=True,
    ),
    "apollo-zero-momentum": Recipe(
        functools.partial(apollo_zero, momentum=0.9),
        lr=1e-3,
        lr_embeddings=3e-2,
        rank_of=eighth_of_width,
        relative=True,
    ),
    "apollo-zero-momentum-int8": Recipe(
        apollo_zero_of_int8_momentum,
        lr=1e-3,
        lr_embeddings=3e-2,
        rank_of=eighth_of_width,
        relative=True,
    ),
    "racs": Recipe(racs, lr=1e-3, lr_embeddings=3e-2),
    "sinkgd": Recipe(sinkgd, lr=1e-3, lr_embeddings=3e-2),
    "scale-hidden": Recipe(scale_hidden, lr=1e-3, lr_embeddings=3e-2),
    "swan": Recipe(swan, lr=1e-3, lr_embeddings=3e-2),
    "galore": Recipe(
        galore,
        lr=2e-2,
        lr_embeddings=3e-2,
        rank_of=quarter_of_width,
        scale=0.25,
        layerwise=False,
    ),
    "muon": Recipe(muon, lr=7e-3, lr_embeddings=3e-2),
    "adafactor": Recipe(adafactor, lr=9e-2, lr_embeddings=3e-2),
    "lion": Recipe(lion, lr=3e-4, lr_embeddings=3e-2),
    "sgd": Recipe(sgd, lr=1.0, lr_embeddings=3e-2),
}


# Adapters are new, so they take higher rates than good weights do.
LORA_FACTOR = 10
# Fine-tuning starts from good weights, so its default rates of the kernels are the
# pre-training rates divided by this. The rest gets AdamW's rate of the kernels. These
# rates have not been swept.
FINETUNING_DIVISOR = 100


def default_rates(options: RunOptions) -> tuple[float, float]:
    """Returns the learning rates of the kernels and of the rest."""
    recipe = RECIPES[options.optimizer]
    if isinstance(options, TuningOptions):
        adamw_lr = RECIPES["adamw"].lr / FINETUNING_DIVISOR
        lr = adamw_lr * LORA_FACTOR if options.lora else recipe.lr / FINETUNING_DIVISOR
        return lr, adamw_lr
    return recipe.lr, lr_of_embeddings(options, recipe)


def with_defaults(options: RunOptions, config: LlamaConfig) -> RunOptions:
    """Fills in the options that depend on the model and the optimizer.

    Raises:
        UsageError: for an optimizer that is not in the table, or one that does not
            support the options.
    """
    if options.optimizer not in RECIPES:
        raise unknown_name("`optimizer`", options.optimizer, RECIPES)
    recipe = RECIPES[options.optimizer]
    for name, value in unused(options, config).items():
        raise UsageError(
            f"`{name}` {value} means nothing to `optimizer` {options.optimizer}; "
            "leave it out"
        )
    if options.head not in (None, options.embeddings) and config.tied_head:
        raise UsageError(
            f"`head` {options.head} means nothing to a model whose head is its "
            "embedding, which `embeddings` is for; leave it out"
        )
    if options.layerwise and not recipe.layerwise:
        raise UsageError(
            f"`layerwise` can't be done with `optimizer` {options.optimizer}: Optax's "
            "takes no tree in which all matrices are masked out; "
            "leave out one of the two"
        )
    if isinstance(options, TuningOptions) and options.lora:
        check_lora(options)
    lr, lr_embeddings = default_rates(options)
    defaults = {
        "lr": lr,
        "lr_embeddings": lr_embeddings,
        "rank": recipe.rank_of(config),
        "scale": recipe.scale,
        "projection": recipe.projection,
        # It is off in fine-tuning, where it was not measured.
        "relative": recipe.relative and not isinstance(options, TuningOptions),
    }
    unset = {
        name: value
        for name, value in defaults.items()
        if getattr(options, name) in (None, "auto")
    }
    return dataclasses.replace(options, **unset)


def check_lora(options: TuningOptions) -> None:
    """Raises `UsageError` for options that do not apply to training with `lora`."""
    if options.optimizer != "adamw":
        raise UsageError(
            f"`lora` {options.lora} trains its adapters with AdamW, not with "
            f"`optimizer` {options.optimizer}; give `optimizer` adamw"
        )
    for name, value in (
        ("lr_embeddings", options.lr_embeddings),
        ("embeddings", None if options.embeddings == "adam" else options.embeddings),
        ("head", options.head),
    ):
        if value is not None:
            raise UsageError(
                f"`{name}` {value} means nothing to `lora` {options.lora}, which "
                "leaves embeddings, head and norms as they are; leave it out"
            )
    if options.relative:
        raise UsageError(
            f"`relative` means nothing to `lora` {options.lora}, whose adapters start "
            "at zero; leave it out"
        )


def lr_of_embeddings(options: RunOptions, recipe: Recipe) -> float:
    """Returns the default learning rate of embeddings, head and norms.

    The three share it, so it is the lowest of those of the rules in use.
    """
    names = embedding_rules(options).values()
    own = [EMBEDDING_RULES[name].lr for name in names if name in EMBEDDING_RULES]
    return min([recipe.lr_embeddings, *own])


def unused(options: RunOptions, config: LlamaConfig) -> dict[str, Any]:
    """Returns the options that the optimizer does not use, with their values."""
    recipe = RECIPES[options.optimizer]

    def takes(rule: str | None) -> bool:
        return rule in EMBEDDING_RULES or options.optimizer.startswith("apollo")

    return {
        name: value
        for name, value, has_use in (
            ("rank", options.rank, recipe.rank_of(config) is not None),
            ("scale", options.scale, recipe.scale is not None),
            ("embeddings", options.embeddings, takes(options.embeddings)),
            ("head", options.head, takes(options.head)),
            (
                "projection",
                options.projection,
                recipe.projection == "rademacher",
            ),
            # Adafactor has such factors of its own.
            ("relative", options.relative or None, options.optimizer != "adafactor"),
        )
        # "random" is the projection of other optimizers' runs, see `Recipe`.
        if value not in (None, "adam", "auto", "random") and not has_use
    }


def make_schedule(
    peak: float, steps: int, warmup: int, shape: str = "cosine"
) -> optax.Schedule:
    """Returns the learning rate by step: a linear warmup, then a decay.

    Args:
        peak: the highest rate.
        steps: the number of all steps.
        warmup: the number of steps of the warmup, at least 1.
        shape: the shape of the decay, cosine or linear. It ends at a tenth of `peak`.
    """
    decay_steps = max(steps, warmup + 1)
    if shape == "linear":
        rise = optax.linear_schedule(0.0, peak, warmup)
        fall = optax.linear_schedule(peak, peak / 10, decay_steps - warmup)
        return optax.join_schedules([rise, fall], [warmup])
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup, decay_steps, end_value=peak / 10
    )


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Returns Optax's transformation of the name, with a norm in float32.

    Optax sums the squares in the gradients' dtype, and in bfloat16 small ones are lost.
    """

    def clipped(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        norm = global_norm(updates)
        factor = jnp.where(norm < limit, 1, limit / norm)
        return jax.tree.map(lambda x: (factor * x).astype(x.dtype), updates)

    return optax.stateless(clipped)


def global_norm(grads: Any) -> jax.Array:
    return jnp.sqrt(
        sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads))
    )


def in_proportion_to_weights() -> optax.GradientTransformation:
    """Returns a transformation of the kernels' updates by the RMS of their weights."""
    rules = [(KERNELS, apollo_optax.ApolloDimensionNumbers(1, 2)), ("", None)]
    return apollo_optax.scale_by_param_matrix_rms(
        weight_dimension_numbers=apollo_optax.dimension_numbers_by_path(rules)
    )


def lr_group(path: str) -> str:
    of_kernels = re.search(KERNELS, path) or re.search(ADAPTERS, path)
    return "kernels" if of_kernels else "rest"


def lr_groups(params: Any) -> Any:
    """Returns "kernels" or "rest" for each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: lr_group(path_name(path)), params
    )


def make_optimizer(
    options: RunOptions, config: LlamaConfig
) -> tuple[optax.GradientTransformation, Schedules]:
    """Returns the optimizer of `options`, whose defaults are filled in.

    Also returns its learning rates by group: "kernels" and "rest".
    """
    assert options.lr is not None
    assert options.lr_embeddings is not None
    shape = options.steps, options.warmup_steps, options.schedule
    schedules = {
        "kernels": make_schedule(options.lr, *shape),
        "rest": make_schedule(options.lr_embeddings, *shape),
    }

    rates: dict[Hashable, optax.GradientTransformation] = {
        name: optax.scale_by_learning_rate(rate) for name, rate in schedules.items()
    }
    scaler = RECIPES[options.optimizer].scaler(options, config)
    scaler = with_embedding_rules(scaler, options, config)
    transformations = [scaler, optax.partition(rates, lr_groups)]
    if options.relative:
        transformations.insert(1, in_proportion_to_weights())
    if options.clip_norm is not None:
        # Without it, the chain stays as in the checkpoints of earlier runs.
        transformations.insert(0, clip_by_global_norm(options.clip_norm))
    return optax.chain(*transformations), schedules
