import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import apollo_optax
from examples.llama.config import LlamaConfig
from examples.llama.model import Batch, Execution, graphdef_of, init_params
from examples.llama.optimizers.parameters import lr_group, path_name
from examples.llama.step import (
    StepMetrics,
    TrainState,
    make_train_step,
    with_update_rms,
)

# Stacked kernels are (L, in, out); the head and the embedding go to Adam by name.
MATRICES = apollo_optax.dimension_numbers_by_path(
    [(r"^layers/.*/kernel$", apollo_optax.ApolloDimensionNumbers(1, 2))]
)


PLAIN = Execution()


def tx_of(rate: float = 0.1) -> optax.GradientTransformation:
    return apollo_optax.apollo(rate, rank=4, weight_dimension_numbers=MATRICES)


def initial_state(config: LlamaConfig, execution: Execution = PLAIN) -> TrainState:
    params = init_params(config, execution, seed=0)
    return TrainState(params, tx_of().init(params))


def batch_of(config: LlamaConfig, batch: int, seq: int = 9) -> Batch:
    shape = (batch, seq + 1)
    return Batch(jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size))


def stepped(
    config: LlamaConfig,
    state: TrainState,
    execution: Execution = PLAIN,
    batch: int = 8,
    **arguments: int,
) -> tuple[TrainState, StepMetrics]:
    train_step = make_train_step(graphdef_of(config, execution), tx_of(), **arguments)
    copied = jax.tree.map(jnp.copy, state)  # The step donates its state.
    return train_step(copied, batch_of(config, batch), 1)


@pytest.mark.parametrize("accumulate", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_micro_batches_make_the_step_of_the_whole_batch(
    accumulate: int, small: LlamaConfig
) -> None:
    state = initial_state(small)
    whole, whole_metrics = stepped(small, state)
    parts, metrics = stepped(small, state, accumulate=accumulate)
    np.testing.assert_allclose(metrics[:2], whole_metrics[:2], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, atol=1e-4 * np.abs(b).max(), rtol=1e-4
        ),
        parts,
        whole,
    )
    moved = jnp.abs(
        whole.params["lm_head"]["kernel"] - state.params["lm_head"]["kernel"]
    ).max()
    assert float(moved) > 0.01


def test_micro_batches_keep_dtypes(small: LlamaConfig) -> None:
    half = Execution(param_dtype="bfloat16", compute_dtype="bfloat16")
    state = initial_state(small, half)
    after, _ = stepped(small, state, half, accumulate=4)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


@pytest.mark.slow
def test_micro_batches_save_memory(small: LlamaConfig) -> None:
    def temporaries(accumulate: int) -> int:
        train_step = jax.jit(
            make_train_step(graphdef_of(small), tx_of(), accumulate=accumulate)
        )
        program = train_step.lower(
            initial_state(small), batch_of(small, 32, seq=64), 1
        ).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(16) < temporaries(1) / 4


def test_gradient_norm_is_of_all_parameters(small: LlamaConfig) -> None:
    state = initial_state(small)
    _, metrics = stepped(small, state)
    after, _ = make_train_step(graphdef_of(small), optax.sgd(1.0))(
        TrainState(
            jax.tree.map(jnp.copy, state.params), optax.sgd(1.0).init(state.params)
        ),
        batch_of(small, 8),
        1,
    )
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, after.params)
    assert float(metrics.grad_norm) == pytest.approx(
        float(optax.tree.norm(moved)), rel=1e-4
    )


def test_the_update_of_the_kernels_is_measured_at_the_steps_that_are_asked_for(
    small: LlamaConfig,
) -> None:
    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState, batch: Batch, step: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        # What is not a kernel changes by much more.
        params = jax.tree_util.tree_map_with_path(
            lambda path, p: p - (0.01 if lr_group(path_name(path)) == "kernels" else 1),
            state.params,
        )
        return TrainState(params, state.opt_state), StepMetrics(jnp.ones(()), step)

    measured = with_update_rms(train_step, lambda step: step == 2)
    state = TrainState(init_params(small, PLAIN, seed=0), ())
    batch = batch_of(small, 1)
    state, first = measured(state, batch, np.int32(1))
    state, second = measured(state, batch, np.int32(2))
    assert (first.update_rms, second.grad_norm) == (None, 2)
    assert second.update_rms is not None
    assert float(second.update_rms) == pytest.approx(0.01, rel=1e-4)
    assert jnp.isfinite(state.params["final_norm"]["scale"]).all()


def test_a_skipped_step_changes_nothing(small: LlamaConfig) -> None:
    state = initial_state(small)
    state.params["final_norm"]["scale"] = (
        state.params["final_norm"]["scale"].at[3].set(jnp.nan)
    )
    skipped, metrics = stepped(small, state, skip_nonfinite=True)
    assert not np.isfinite(metrics.grad_norm)
    jax.tree.map(np.testing.assert_array_equal, skipped, state)
    ruined, _ = stepped(small, state)  # Without skipping, the weights are lost.
    assert np.isnan(ruined.params["lm_head"]["kernel"]).any()


@pytest.mark.usefixtures("fusion_emitters")
def test_skipping_changes_no_finite_step(small: LlamaConfig) -> None:
    state = initial_state(small)
    for a, b in zip(
        jax.tree.leaves(stepped(small, state, skip_nonfinite=True)),
        jax.tree.leaves(stepped(small, state)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_state_is_updated_in_place(small: LlamaConfig) -> None:
    state = initial_state(small)
    train_step = make_train_step(graphdef_of(small), tx_of())
    program = (
        jax.jit(train_step, donate_argnums=0)
        .lower(state, batch_of(small, 8), 1)
        .compile()
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes == size
