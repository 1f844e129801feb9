"""The short texts that the model writes while it trains."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers

from examples.llama.mesh import make_mesh
from examples.llama.sample import make_sampler


def test_a_text_ends_at_a_token_beyond_a_gap_in_the_ids() -> None:
    """The tokenizer has two tokens, and the id of the second is 9."""
    vocab = {"word": 0, "end": 9}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "word"))

    def logits(params: Any, x_1xD: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(16) == 9, 100.0, 0.0)[None]

    pieces: Any = types.SimpleNamespace(
        embed=lambda params, batch: jnp.zeros((*batch.tokens.shape, 1)),
        layer=lambda params, x, batch, constants: x,
        logits=logits,
    )
    sample = make_sampler(
        pieces, tokenizer, {"> ": [0]}, end_ids={9}, seed=0, mesh=make_mesh("data=1")
    )
    params: Any = {"layers": {"kernel": jnp.zeros((1, 1))}}
    assert sample(params, 1) == "> "
