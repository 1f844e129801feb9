"""A short text from the model, to look at while it trains."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from apollo_optax import layerwise_apply
from examples.llama.mesh import on_every_device
from examples.llama.model import Batch, Params, Pieces

LENGTH = 64  # Tokens.
TEMPERATURE = 0.8


def make_sampler(
    pieces: Pieces,
    tokenizer: tokenizers.Tokenizer,
    end_id: int,
    *,
    start_id: int,
    seed: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[Params, int], str]:
    """Returns a function of parameters and step that writes the start of a document.

    The step and the seed set the draws, so a run that is resumed writes what it would
    have written.
    """
    known = tokenizer.get_vocab_size()  # The model's vocabulary may be larger.

    @functools.partial(jax.jit, out_shardings=on_every_device(mesh))
    def sampled_tokens(params: Params, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), step)

        def extend(position: jax.Array, tokens_1xT: jax.Array) -> jax.Array:
            def head(params: Params, x_1xTxD: jax.Array, _: Batch) -> jax.Array:
                return pieces.logits(params, x_1xTxD[:, position])

            # The whole text is computed again for each token. It is short, and a cache
            # of keys and values would take more code.
            logits_V = layerwise_apply(pieces.embed, pieces.layer, head)(
                params, Batch(tokens_1xT)
            )[0, :known]
            token = jax.random.categorical(
                jax.random.fold_in(key, position), logits_V / TEMPERATURE
            )
            return tokens_1xT.at[0, position + 1].set(token)

        return jax.lax.fori_loop(
            0, LENGTH, extend, jnp.full((1, LENGTH + 1), start_id)
        )[0, 1:]

    def sample(params: Params, step: int) -> str:
        tokens_T = np.asarray(sampled_tokens(params, jnp.asarray(step)))
        end = np.append(np.flatnonzero(tokens_T == end_id), LENGTH)[0]
        return tokenizer.decode(tokens_T[:end].tolist())

    return sample
