import jax
import pytest
from flax import nnx

import apollo_optax
from examples import nano

SMALL = nano.Config(
    width=32, hidden=48, heads=2, layers=1, context=16, batch=8, steps=20
)


def test_nano_learns_on_a_mesh_and_ends_with_a_sample(
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses = nano.main(SMALL)
    assert losses[-1] < losses[0] - 0.5
    lines = capsys.readouterr().out
    assert f"sharded over {jax.device_count()} device(s)" in lines
    assert "step 20  loss" in lines
    assert "\ndef " in lines


def test_nano_shards_the_kernels_and_their_state() -> None:
    mesh, tx = nano.make_mesh(), nano.make_optimizer(SMALL)
    model = nnx.eval_shape(lambda: nano.Llama(SMALL, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        params,
        nano.parameter_shardings(params, mesh),
    )
    (up_proj,) = jax.tree.leaves(params["blocks"][0]["mlp"]["up_proj"])
    assert up_proj.sharding.shard_shape((32, 48)) == (32, 48 // mesh.size)
    state = jax.eval_shape(tx.init, params)
    moments = apollo_optax.state_sharding(state, params)[0].mu
    (moment,) = jax.tree.leaves(moments["blocks"][0]["mlp"]["up_proj"])
    assert moment.shard_shape((8, 48)) == (8, 48 // mesh.size)
