"""Short texts that the model writes while it trains."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence

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
    prompts: Mapping[str, Sequence[int]],
    *,
    end_ids: Collection[int],
    seed: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[Params, int], str]:
    """Returns a function of parameters and step that continues each of the prompts.

    The draws depend on the step and the seed only, so a resumed run writes the same
    texts as an uninterrupted one.

    Args:
        pieces: the model.
        tokenizer: turns tokens into text.
        prompts: lists of one or more token ids, by the text to show before the
            continuation.
        end_ids: the tokens that end a text.
        seed: the seed of the draws.
        mesh: the mesh of the parameters.
    """
    length = max(map(len, prompts.values())) + LENGTH  # One length, so one program.
    # The model's vocabulary may be larger, and the ids of the tokens may have gaps.
    known = 1 + max(tokenizer.get_vocab().values())

    @functools.partial(jax.jit, out_shardings=on_every_device(mesh))
    def sampled_tokens(
        params: Params,
        step: jax.Array,
        tokens_1xT: jax.Array,
        prompt: jax.Array,
        first_draw: jax.Array,
    ) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), step)

        def extend(count: jax.Array, tokens_1xT: jax.Array) -> jax.Array:
            position = prompt - 1 + count

            def head(params: Params, x_1xTxD: jax.Array, _: Batch) -> jax.Array:
                return pieces.logits(params, x_1xTxD[:, position])

            # The whole text is computed again for each token. It is short, and a cache
            # of keys and values would take more code.
            logits_V = layerwise_apply(pieces.embed, pieces.layer, head)(
                params, Batch(tokens_1xT)
            )[0, :known]
            token = jax.random.categorical(
                jax.random.fold_in(key, first_draw + count), logits_V / TEMPERATURE
            )
            return tokens_1xT.at[0, position + 1].set(token)

        return jax.lax.fori_loop(0, LENGTH, extend, tokens_1xT)[0]

    def continued(params: Params, step: int, number: int, prompt: Sequence[int]) -> str:
        tokens_1xT = np.full((1, length), prompt[-1], np.int32)
        tokens_1xT[0, : len(prompt)] = prompt
        written = sampled_tokens(
            params,
            *map(jnp.asarray, (step, tokens_1xT, len(prompt), number * LENGTH)),
        )
        tokens_T = np.asarray(written)[len(prompt) :][:LENGTH]
        end = np.append(np.flatnonzero(np.isin(tokens_T, list(end_ids))), LENGTH)[0]
        return tokenizer.decode(tokens_T[:end].tolist())

    def sample(params: Params, step: int) -> str:
        return "\n\n".join(
            shown + continued(params, step, number, prompt)
            for number, (shown, prompt) in enumerate(prompts.items())
        )

    return sample
