"""The optimizers by name, with their learning rates.

Parameters fall into two learning-rate groups: the kernels of the layers, which are what APOLLO
treats as matrices, and the rest (embeddings, head, norms), which it leaves to Adam. AdamW gets the
same two rates, so that a comparison is not won by a better rate for the embeddings alone.

To add an optimizer, add a `Recipe`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import optax

import apollo_optax
from examples.llama.config import LlamaConfig, preset
from examples.llama.options import RunOptions
from examples.llama.usage import unknown_name

KERNELS = r"^layers/.*/kernel$"  # (L, in, out)
EMBEDDING = r"^embed/embedding$"  # (V, D)
HEAD = r"^lm_head/kernel$"  # (D, V)

Schedules = dict[str, optax.Schedule]


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a path of JAX keys as `layers/mlp/up_proj/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def adamw(options: RunOptions, config: LlamaConfig) -> optax.GradientTransformation:
    del config
    # Without weight decay, as in the APOLLO paper's pre-training, AdamW is Adam.
    return optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=options.moment_dtype)


def apollo(
    options: RunOptions,
    config: LlamaConfig,
    *,
    scale_type: Literal["channel", "tensor"],
    projection: Literal["random", "svd"],
) -> optax.GradientTransformation:
    assert options.rank is not None
    assert options.scale is not None
    rules = [(KERNELS, apollo_optax.ApolloDimensionNumbers(1, 2))]
    if options.embeddings == "apollo":
        rules += [(name, apollo_optax.ApolloDimensionNumbers(0, 1)) for name in (EMBEDDING, HEAD)]
    return apollo_optax.scale_by_apollo(
        options.rank,
        scale_type=scale_type,
        scale=options.scale,
        # The paper's order for models of up to 130M parameters.
        scale_front=config.hidden_size <= 768,
        projection=projection,
        key=options.seed,
        weight_dimension_numbers=apollo_optax.dimension_numbers_by_path(rules),
        moment_dtype=options.moment_dtype,
    )


class Recipe(NamedTuple):
    """An optimizer: what scales the gradients, and its default learning rates and APOLLO options.

    The learning rates are the best of the grids in docs/results.md, with the tiny model and one seed;
    apollo-svd has those of apollo.
    """

    scaler: Callable[[RunOptions, LlamaConfig], optax.GradientTransformation]
    lr: float
    lr_embeddings: float
    rank_of: Callable[[LlamaConfig], int | None] = lambda config: None
    scale: float | None = None


def channel_wise(projection: Literal["random", "svd"]) -> Recipe:
    return Recipe(
        functools.partial(apollo, scale_type="channel", projection=projection),
        lr=1e-2,
        lr_embeddings=3e-2,
        rank_of=lambda config: config.hidden_size // 4,
        scale=1.0,
    )


RECIPES: dict[str, Recipe] = {
    "adamw": Recipe(adamw, lr=2e-3, lr_embeddings=3e-2),
    "apollo": channel_wise("random"),
    "apollo-mini": Recipe(
        functools.partial(apollo, scale_type="tensor", projection="random"),
        lr=7e-3,
        lr_embeddings=3e-2,
        rank_of=lambda config: 1,
        scale=128.0,
    ),
    "apollo-svd": channel_wise("svd"),
}


def with_defaults(options: RunOptions) -> RunOptions:
    """Fills in what the optimizer decides; raises `UsageError` for an optimizer not in the table."""
    if options.optimizer not in RECIPES:
        raise unknown_name("--optimizer", options.optimizer, RECIPES)
    recipe = RECIPES[options.optimizer]
    defaults = {
        "lr": recipe.lr,
        "lr_embeddings": recipe.lr_embeddings,
        "rank": recipe.rank_of(preset(options.model)),
        "scale": recipe.scale,
    }
    unset = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **unset)


def make_schedule(peak: float, steps: int) -> optax.Schedule:
    """Returns the rate by step: up over the first tenth, then a cosine down to a tenth of `peak`."""
    warmup = max(1, steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), end_value=peak / 10)


def lr_group(path: str) -> str:
    return "kernels" if re.search(KERNELS, path) else "rest"


def make_optimizer(
    options: RunOptions, config: LlamaConfig
) -> tuple[optax.GradientTransformation, Schedules]:
    """Returns the optimizer that `options`, with its defaults filled in, describe.

    Also returns its learning rates, by group: "kernels" and "rest".
    """
    assert options.lr is not None
    assert options.lr_embeddings is not None
    schedules = {
        "kernels": make_schedule(options.lr, options.steps),
        "rest": make_schedule(options.lr_embeddings, options.steps),
    }

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: lr_group(path_name(path)), params)

    rates: dict[Hashable, optax.GradientTransformation] = {
        name: optax.scale_by_learning_rate(rate) for name, rate in schedules.items()
    }
    scaler = RECIPES[options.optimizer].scaler(options, config)
    return optax.chain(scaler, optax.partition(rates, labels)), schedules
