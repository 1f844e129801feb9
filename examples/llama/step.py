"""The training step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from apollo_optax import apply_updates_stochastic, layerwise_step
from examples.llama.lora import joined
from examples.llama.model import (
    Batch,
    Llama,
    Params,
    Pieces,
    next_token_loss,
    target_weights,
)
from examples.llama.optimizers.parameters import lr_group, path_name
from examples.llama.optimizers.wrappers import global_norm


class TrainState(NamedTuple):
    """Everything a step changes."""

    params: Params
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """What a step tells; scalars on the device."""

    loss: jax.Array  # Weighted mean over the batch, in nats, before the step.
    # The Euclidean norm over all parameters. It is not finite if any gradient is not.
    grad_norm: jax.Array
    # The RMS of the kernels' update, at the steps at which it is measured.
    update_rms: jax.Array | None = None


# A step takes the state, which it consumes, the batch, the step's number and, if only
# adapters are trained, the other parameters.
TrainStep = Callable[..., tuple[TrainState, StepMetrics]]


# The number may be any large one, because other draws from the same seed fold in small
# numbers only.
ROUNDING = 0x6F756E64


def rounding_key(seed: int, step: jax.typing.ArrayLike) -> jax.Array:
    """Returns the key of a step's stochastic rounding."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ROUNDING), step)


def make_train_step(
    graphdef: nnx.GraphDef[Llama],
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    rounding_seed: int | None = None,
    out_shardings: Any = None,
) -> TrainStep:
    """Returns the compiled step.

    Args:
        graphdef: the model's structure.
        tx: the optimizer.
        accumulate: the number of micro-batches that the batch is split into;
            must divide B.
        skip_nonfinite: leave the state as it is where the loss or a gradient is not
            finite.
        rounding_seed: round bfloat16 parameters stochastically, with keys of this seed;
            None: to nearest.
        out_shardings: of the state and the metrics, as `jax.jit` takes them; by default
            the compiler's.
    """

    # The new state takes over the memory of the old one.
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def train_step(
        state: TrainState,
        batch: Batch,
        step: jax.Array,
        frozen: Params | None = None,
    ) -> tuple[TrainState, StepMetrics]:
        def loss_of(params: Params, batch: Batch) -> jax.Array:
            return next_token_loss(graphdef, joined(params, frozen), batch)

        loss_and_grads = jax.value_and_grad(loss_of)
        if accumulate == 1:
            loss, grads = loss_and_grads(state.params, batch)
        else:
            loss, grads = accumulated(loss_and_grads, state.params, batch, accumulate)
        metrics = StepMetrics(loss, global_norm(grads))

        def stepped() -> TrainState:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            if rounding_seed is None:
                params = optax.apply_updates(state.params, updates)
            else:
                params = apply_updates_stochastic(
                    state.params, updates, rounding_key(rounding_seed, step)
                )
            return TrainState(cast(Params, params), opt_state)

        if not skip_nonfinite:
            return stepped(), metrics
        finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)
        return jax.lax.cond(finite, stepped, lambda: state), metrics

    return train_step


def make_layerwise_train_step(
    pieces: Pieces,
    tx: optax.GradientTransformation,
    *,
    offload_inputs: bool = False,
    rounding_seed: int | None = None,
    out_shardings: Any = None,
) -> TrainStep:
    """Returns the compiled step that updates each layer as soon as it has its gradient.

    Args:
        pieces: the model.
        tx: an optimizer that treats the layers of a leaf separately.
        offload_inputs: keep the layers' inputs in host memory from the forward to the
            backward walk.
        rounding_seed: as in `make_train_step`; int8 parameters need it.
        out_shardings: as there.
    """
    update = layerwise_step(
        pieces.embed, pieces.layer, pieces.head, tx, offload_inputs=offload_inputs
    )

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def train_step(
        state: TrainState, batch: Batch, step: jax.Array, frozen: None = None
    ) -> tuple[TrainState, StepMetrics]:
        del frozen  # This step trains all parameters.
        key = None if rounding_seed is None else rounding_key(rounding_seed, step)
        params, opt_state, metrics = update(
            state.params, state.opt_state, batch, key=key
        )
        return TrainState(params, opt_state), StepMetrics(
            metrics.loss, metrics.grad_norm
        )

    return train_step


def with_update_rms(train_step: TrainStep, at: Callable[[int], bool]) -> TrainStep:
    """Returns `train_step`, which also measures the kernels' update at some steps.

    The update is the difference of the weights after and before the step. So the
    compiled step stays the same, and other steps cost nothing more. A step that is
    measured needs memory for a copy of the kernels.

    Args:
        train_step: a step of float32 weights. In weights that are rounded, the
            difference would be that of the rounding too.
        at: whether to measure, by the number of the step.
    """
    copy_of = jax.jit(functools.partial(jax.tree.map, jnp.copy))

    def measured_step(
        state: TrainState, batch: Batch, step: jax.typing.ArrayLike
    ) -> tuple[TrainState, StepMetrics]:
        if not at(int(np.asarray(step))):
            return train_step(state, batch, step)
        # The step consumes the old weights.
        before = copy_of(kernels_of(state.params))
        state, metrics = train_step(state, batch, step)
        update_rms = rms_of_difference(before, kernels_of(state.params))
        return state, metrics._replace(update_rms=update_rms)

    return measured_step


def kernels_of(params: Params) -> list[jax.Array]:
    return [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if lr_group(path_name(path)) == "kernels"
    ]


@jax.jit
def rms_of_difference(before: list[jax.Array], after: list[jax.Array]) -> jax.Array:
    """Returns the RMS over the entries of all arrays."""
    squares = sum(
        jnp.sum(jnp.square(b - a)) for a, b in zip(before, after, strict=True)
    )
    # An int of 2**31 or more would be an error.
    return jnp.sqrt(squares / float(sum(leaf.size for leaf in after)))


def accumulated(
    loss_and_grads: Callable[[Params, Batch], tuple[jax.Array, Params]],
    params: Params,
    batch: Batch,
    micro_batches: int,
) -> tuple[jax.Array, Params]:
    """Returns the mean loss and gradients over micro-batches, taken one at a time.

    With weights, those of a micro-batch count by its part of the batch's weight, so
    that the mean is that of the batch as a whole.
    """

    def split(leaf_BxS: jax.Array) -> jax.Array:
        B, S = leaf_BxS.shape
        # Every device that holds rows of the batch holds some of each micro-batch.
        return jnp.moveaxis(
            leaf_BxS.reshape(B // micro_batches, micro_batches, S), 1, 0
        )

    stacked = jax.tree.map(split, batch)
    weights = target_weights(batch)
    mean_weight = None if weights is None else jnp.sum(weights) / micro_batches

    def add(
        sums: tuple[jax.Array, Params], micro_batch: Batch
    ) -> tuple[tuple[jax.Array, Params], None]:
        loss, grads = loss_and_grads(params, micro_batch)
        micro_weights = target_weights(micro_batch)
        if micro_weights is not None:
            assert mean_weight is not None
            factor = jnp.sum(micro_weights) / jnp.where(mean_weight > 0, mean_weight, 1)
            loss, grads = jax.tree.map(lambda x: factor * x, (loss, grads))
        return jax.tree.map(lambda total, x: total + x, sums, (loss, grads)), None

    # Gradients of bfloat16 parameters are summed in float32, since a long sum in
    # bfloat16 loses the small terms.
    zeros = jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params
    )
    (loss, grads), _ = jax.lax.scan(add, (jnp.zeros(()), zeros), stacked)
    return loss / micro_batches, jax.tree.map(
        lambda g, p: (g / micro_batches).astype(p.dtype), grads, params
    )
