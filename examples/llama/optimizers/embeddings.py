"""The rules for embedding and head, other than Adam and those of `kernels`."""

import functools
import re
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import optax

import apollo_optax
from examples.llama.config import LlamaConfig
from examples.llama.optimizers.parameters import (
    ENDS,
    dimension_numbers,
    embedding_rules,
    path_name,
)
from examples.llama.optimizers.wrappers import (
    by_leaf,
    factored_rms,
    in_float32,
    moments_in,
    over_rms,
)
from examples.llama.options import RunOptions


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


def adafactor_of_embedding(options: RunOptions) -> optax.GradientTransformation:
    """Returns Adafactor without momentum, with an absolute learning rate.

    By default, Optax factors only matrices whose sides are at least 128. An embedding
    should be factored at any width.
    """
    return in_float32(
        optax.chain(
            factored_rms(options.b2, min_dim_size_to_factor=1),
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

    The learning rates of scale, adafactor and racs are the best of the searches in
    docs/results.md, on both the embedding and the head, with APOLLO-Zero on the kernels
    of the tiny model. That of adafactor-momentum is the better of the two that were
    tried. That of flattening was not searched, because flattening the head's gradient
    fails.
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
        adafactor_with_momentum, adafactor_with_momentum, lr=4.8e-2
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
