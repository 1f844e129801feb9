"""The optimizers by name, and the options that each of them has by default."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax

from examples.llama.config import LlamaConfig
from examples.llama.optimizers.embeddings import EMBEDDING_RULES
from examples.llama.optimizers.kernels import (
    adafactor,
    adamw,
    apollo,
    apollo_zero,
    apollo_zero_of_int8_momentum,
    galore,
    lion,
    muon,
    racs,
    scale_hidden,
    sgd,
    sinkgd,
    swan,
)
from examples.llama.optimizers.parameters import embedding_rules
from examples.llama.options import RunOptions, TuningOptions
from examples.llama.run.errors import UsageError, unknown_name

Scaler = Callable[[RunOptions, LlamaConfig], optax.GradientTransformation]


class Recipe(NamedTuple):
    """An optimizer: its transformation, default learning rates and APOLLO options.

    Most learning rates are the best of the grids in docs/results.md, with the tiny
    model and one seed; apollo-svd has those of apollo. The rates of racs, sinkgd,
    scale-hidden and swan are those of their papers. That of apollo-zero is the best at
    8K tokens per step, without and with whitening. With a momentum it is half of that,
    which was the only one tried.
    """

    scaler: Scaler
    lr: float
    lr_embeddings: float
    rank_of: Callable[[LlamaConfig], int | None] = lambda config: None
    scale: float | None = None
    layerwise: bool = True  # Whether it can be given some of the parameters at a time.
    # What `projection` auto stands for. An optimizer without projections has the value
    # that its runs had before there was a choice, so that they can be resumed.
    projection: str = "random"
    relative: bool = False  # The default in pre-training.
    # Whether `embeddings` apollo gives it embedding and head. APOLLO-Zero could take
    # them, but training fails if the gradient of the head is flattened.
    takes_embeddings: bool = False


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
        takes_embeddings=True,
    )


def flattening(
    scaler: Scaler,
    *,
    lr: float,
    rank_of: Callable[[LlamaConfig], int | None] = eighth_of_width,
) -> Recipe:
    return Recipe(scaler, lr, lr_embeddings=3e-2, rank_of=rank_of, relative=True)


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
        takes_embeddings=True,
    ),
    "apollo-svd": channel_wise(svd=True),
    "apollo-zero": flattening(apollo_zero, lr=2e-3),
    # All singular values become equal, as in Muon.
    "apollo-zero-whitening": flattening(
        functools.partial(apollo_zero, power=0.0, method="newton_schulz"),
        lr=2e-3,
        rank_of=lambda config: None,
    ),
    "apollo-zero-momentum": flattening(
        functools.partial(apollo_zero, momentum=0.9), lr=1e-3
    ),
    "apollo-zero-momentum-int8": flattening(apollo_zero_of_int8_momentum, lr=1e-3),
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
# A run that starts from good weights has the pre-training rates of the kernels divided
# by this as its defaults. The rest gets AdamW's rate of the kernels. These rates have
# not been swept.
FINETUNING_DIVISOR = 100


def with_defaults(options: RunOptions, config: LlamaConfig) -> RunOptions:
    """Fills in the options that depend on the model and the optimizer.

    Raises:
        UsageError: for an optimizer that is not in the table, or one that does not
            support the options.
    """
    for name, value in unused(options, config).items():
        raise UsageError(
            f"`{name}` {value} means nothing to `optimizer` {options.optimizer}; "
            "leave it out"
        )
    recipe = RECIPES[options.optimizer]
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
        # It is off for good weights, with which it was not measured.
        "relative": recipe.relative and not starts_from_weights(options),
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


def starts_from_weights(options: RunOptions) -> bool:
    """Whether a run trains good weights further.

    Fine-tuning always does. Only a plan of it may name a preset instead of weights.
    """
    return options.init_from is not None or isinstance(options, TuningOptions)


def default_rates(options: RunOptions) -> tuple[float, float]:
    """Returns the learning rates of the kernels and of the rest."""
    recipe = RECIPES[options.optimizer]
    if starts_from_weights(options):
        adamw_lr = RECIPES["adamw"].lr / FINETUNING_DIVISOR
        lora = isinstance(options, TuningOptions) and options.lora
        lr = adamw_lr * LORA_FACTOR if lora else recipe.lr / FINETUNING_DIVISOR
        return lr, adamw_lr
    return recipe.lr, lr_of_embeddings(options, recipe)


def lr_of_embeddings(options: RunOptions, recipe: Recipe) -> float:
    """Returns the default learning rate of embeddings, head and norms.

    The three share it, so it is the lower of those of the embedding and the head.
    """
    return min(
        EMBEDDING_RULES[name].lr if name in EMBEDDING_RULES else recipe.lr_embeddings
        for name in embedding_rules(options).values()
    )


def options_of_each(
    optimizers: Sequence[str], options: RunOptions, config: LlamaConfig
) -> list[RunOptions]:
    """Returns the options of each optimizer of a comparison, with its defaults.

    Options for some of the optimizers are dropped for the others.

    Raises:
        UsageError: for an option that none of the optimizers uses, or as
            `with_defaults` does.
    """
    runs = [dataclasses.replace(options, optimizer=name) for name in optimizers]
    of_no_use = [unused(run, config) for run in runs]
    for name, value in of_no_use[0].items():
        if all(name in names for names in of_no_use):
            raise UsageError(
                f"`{name}` {value} means nothing to {', '.join(optimizers)}; leave it "
                "out"
            )
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    return [
        with_defaults(
            dataclasses.replace(run, **{name: defaults[name] for name in names}), config
        )
        for run, names in zip(runs, of_no_use, strict=True)
    ]


def unused(options: RunOptions, config: LlamaConfig) -> dict[str, Any]:
    """Returns the options that the optimizer does not use, with their values.

    Raises:
        UsageError: for an optimizer that is not in the table.
    """
    if options.optimizer not in RECIPES:
        raise unknown_name("`optimizer`", options.optimizer, RECIPES)
    recipe = RECIPES[options.optimizer]

    def takes(rule: str | None) -> bool:
        return rule in EMBEDDING_RULES or recipe.takes_embeddings

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
