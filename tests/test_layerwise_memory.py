"""The memory that the layer-wise step uses, on the device and on the host."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import (
    _layerwise,
    _stack_rows,
    _tree,
    dequantize,
    state_sharding,
)
from tests.layerwise_models import (
    KEY,
    NUMBERS,
    D,
    L,
    apollo,
    batches,
    embed,
    head,
    in_int8,
    toy,
    wide_toy,
    without,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
OPTIMIZERS = {"apollo": lambda: apollo(0.1), "adam": lambda: optax.adam(0.1)}


def scanned_step(model, tx):
    """The ordinary step of a scanned model that keeps each layer's input."""

    def loss_of(params, batch):
        rest = without(params, ["layers"])
        one_layer = jax.checkpoint(
            lambda params, x: model.layer(params, x, batch, None)
        )
        x, _ = jax.lax.scan(
            lambda x, one: (one_layer(one, x), None),
            embed(rest, batch),
            params["layers"],
        )
        return head(rest, x, batch)

    def step(params, state, batch):
        grads = jax.grad(loss_of)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def memory(make_step, name, depth):
    model, tx = wide_toy(depth), OPTIMIZERS[name]()
    arguments = model.params, jax.eval_shape(tx.init, model.params), batches()[0]
    step = jax.jit(make_step(model, tx), donate_argnums=(0, 1))
    analysis = step.lower(*arguments).compile().memory_analysis()
    updated = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[:2])
    )
    return analysis, updated


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_of_all_layers_never_exist(name):
    """In the compiled program, only the layers' inputs grow with the depth."""
    model = wide_toy(1)
    layer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["layers"]))
    input_bytes = jax.eval_shape(embed, model.params, batches()[0]).size * 4

    def growths(make_step, depths):
        temporaries = []
        for depth in depths:
            analysis, updated = memory(make_step, name, depth)
            # The update is in place: outputs reuse the memory of the inputs.
            assert analysis.alias_size_in_bytes == updated
            temporaries.append(analysis.temp_size_in_bytes)
        return np.diff(temporaries) / np.diff(depths)

    # XLA rounds allocations up to 64 bytes.
    assert max(growths(lambda model, tx: model.step(tx), (2, 4, 8))) <= input_bytes + 64
    # The ordinary step exceeds the limit above, so the limit can fail.
    assert min(growths(scanned_step, (2, 8))) >= layer_bytes


@pytest.mark.parametrize("jit", [lambda function: function, jax.jit])
def test_leaves_that_only_other_parts_read_do_not_wait_for_the_embedding(jit):
    model = toy()
    rest = _tree.leaves_by_path(without(model.params, ["layers"]))

    def embedded(leaves):
        params = {"embed": {"embedding": leaves["embed", "embedding"]}}
        return embed(params, batches()[0])

    assert ("lm_head", "kernel") in rest
    assert _layerwise._read_by(jit(embedded), rest) == [("embed", "embedding")]


# With older versions, a loop that reads host memory aborts the process on CPUs.
needs_host_memory = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="needs jax 0.10.2"
)


def on_host(sharding):
    return sharding.with_memory_kind("pinned_host")


@needs_host_memory
def test_host_memory_changes_no_result():
    """CPUs have a host memory space too, so they run an accelerator's copies."""
    model, tx = toy(), apollo(0.1)
    here = SingleDeviceSharding(jax.devices()[0])
    places = {
        name: on_host(here) if name == "layers" else here for name in model.params
    }
    params = {
        name: jax.device_put(leaf, places[name]) for name, leaf in model.params.items()
    }
    state = tx.init(model.params)
    arguments = model.params, state, batches()[0]
    expected = jax.jit(model.step(tx))(*arguments)
    offloading = jax.jit(model.step(tx, offload_inputs=True))
    chex.assert_trees_all_equal(offloading(*arguments), expected)
    inputs_in_host_memory = rf"f32<host>\[{L},2,3,{D}\]"
    assert re.search(inputs_in_host_memory, str(offloading.trace(*arguments).jaxpr))
    assert not re.search(r"<host>", str(jax.make_jaxpr(model.step(tx))(*arguments)))

    stored = jax.jit(model.step(tx), donate_argnums=(0, 1))
    lowered = stored.lower(
        params, jax.tree.map(jnp.copy, state), batches()[0]
    ).as_text()
    assert "pinned_host" in lowered
    loss = model.apply()(params, batches()[0])
    actual = stored(params, state, batches()[0])
    chex.assert_trees_all_equal(actual, expected)
    assert float(loss) == pytest.approx(float(actual[2].loss))
    for name, part in actual[0].items():
        kind = "pinned_host" if name == "layers" else "device"
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(part)} == {kind}


@needs_host_memory
def test_int8_codes_in_host_memory_change_no_result():
    """The scales stay on the device, as they do in the trainer."""
    model, tx = in_int8(toy()), apollo(0.1)
    here = SingleDeviceSharding(jax.devices()[0])

    params = jax.device_put(model.params, here)
    kernel = params["layers"]["block"]["kernel"]
    kernel = dataclasses.replace(
        kernel, qvalue=jax.device_put(kernel.qvalue, on_host(here))
    )
    params["layers"]["block"]["kernel"] = kernel
    step, state = jax.jit(model.step(tx)), tx.init(dequantize(model.params))
    expected = step(model.params, state, batches()[0], key=KEY)
    chex.assert_trees_all_equal(step(params, state, batches()[0], key=KEY), expected)


@needs_host_memory
def test_states_in_host_memory_change_no_result():
    mesh = jax.make_mesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
    )
    model, tx = toy(), apollo(0.1)
    here = NamedSharding(mesh, P())
    params = {
        name: jax.device_put(leaf, on_host(here) if name == "layers" else here)
        for name, leaf in model.params.items()
    }
    state = tx.init(model.params)
    places = state_sharding(state, params, weight_dimension_numbers=NUMBERS)
    kinds = jax.tree.map(lambda place: place.memory_kind, places)
    assert "pinned_host" in jax.tree.leaves(kinds)
    expected = jax.jit(model.step(tx))(model.params, state, batches()[0])
    actual = jax.jit(model.step(tx))(
        params, jax.device_put(state, places), batches()[0]
    )
    chex.assert_trees_all_equal(actual, expected)
    assert jax.tree.map(lambda x: x.sharding.memory_kind, actual[1]) == kinds


def test_a_stack_in_host_memory_is_written_after_it_is_read():
    """Without that order XLA:GPU copies the whole stack for each layer.

    A stack on the device needs no order.
    """

    def after(stack, row):
        return _stack_rows.delay_until_fetched({"w": stack}, {"w": row})["w"]

    stack, row = jnp.zeros((3, 4)), jnp.ones((1, 4))
    (equation,) = jax.make_jaxpr(after)(stack, row).eqns
    assert equation.primitive.name == "optimization_barrier"
    assert len(equation.invars) == 2
    assert not jax.make_jaxpr(lambda stack: after(stack, None))(stack).eqns
