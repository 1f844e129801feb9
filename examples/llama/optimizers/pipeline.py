"""The whole optimizer of a run.

It clips the gradients, applies the rules, scales updates by the weights, decays the
weights, and applies the learning rates.
"""

from collections.abc import Hashable

import optax

import apollo_optax
from examples.llama.config import LlamaConfig
from examples.llama.optimizers.embeddings import with_embedding_rules
from examples.llama.optimizers.parameters import KERNELS, are_kernels, lr_groups
from examples.llama.optimizers.recipes import RECIPES
from examples.llama.optimizers.wrappers import clip_by_global_norm, in_float32
from examples.llama.options import RunOptions

Schedules = dict[str, optax.Schedule]


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
    # The weight decay and the clipping are added only if they are asked for, so that
    # the state of other runs has the structure of earlier checkpoints.
    if options.weight_decay:
        # The sum is in float32, because a bfloat16 sum would lose a decay that is much
        # smaller than the update.
        decay = in_float32(optax.add_decayed_weights(options.weight_decay))
        transformations.insert(-1, optax.masked(decay, are_kernels))
    if options.clip_norm is not None:
        transformations.insert(0, clip_by_global_norm(options.clip_norm))
    return optax.chain(*transformations), schedules


def make_schedule(
    peak: float, steps: int, warmup: int, shape: str = "cosine"
) -> optax.Schedule:
    """Returns the learning rate by step: a linear warmup from 0, then a decay.

    The first step of a warmup has the rate 0.

    Args:
        peak: the highest rate.
        steps: the number of all steps.
        warmup: the number of steps of the warmup. Without any, the first step has
            the peak.
        shape: the shape of the decay, cosine or linear. It would reach a tenth of
            `peak` at the step after the last.
    """
    decay_steps = max(steps, warmup + 1)
    fall = (
        optax.linear_schedule(peak, peak / 10, decay_steps - warmup)
        if shape == "linear"
        else optax.cosine_decay_schedule(peak, decay_steps - warmup, alpha=0.1)
    )
    if warmup == 0:
        return fall
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, fall], [warmup])


def in_proportion_to_weights(max_rms: float = 0.1) -> optax.GradientTransformation:
    """Returns a transformation of the kernels' updates by the RMS of their weights.

    An RMS above `max_rms` counts as `max_rms`.
    """
    rules = [(KERNELS, apollo_optax.ApolloDimensionNumbers(1, 2)), ("", None)]
    return apollo_optax.scale_by_param_matrix_rms(
        max_rms=max_rms,
        weight_dimension_numbers=apollo_optax.dimension_numbers_by_path(rules),
    )
