"""Cross entropy of the next token, a chunk of the sequence at a time.

Logits are the largest array of a language model: a batch of 131,072 tokens over a
vocabulary of 32,000 is 17 GB of float32. Here those of one chunk exist at a time. The
gradient of a chunk is computed together with its loss, while its logits are there, so
nothing is computed twice.

The head's gradient is the next largest array. It is summed over the chunks in float32,
except where the logits' gradients of all chunks are smaller (`_keeps_logit_grads`).

B batch, T tokens, t tokens of a chunk, C chunks, D hidden size, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

LOGITS_BYTES = 2**28  # The bytes of one chunk's float32 logits on one device.
# Up to this size the head's gradient is always summed over the chunks, in float32.
HEAD_SUM_BYTES = 2**30


def num_chunks(
    batch: int, seq: int, vocab_size: int, logits_bytes: int = LOGITS_BYTES
) -> int:
    """Returns the number of chunks, at least 2, so all logits never exist at once."""
    return min(seq, max(2, -(-4 * batch * seq * vocab_size // logits_bytes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked_cross_entropy(
    x_BxTxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxT: jax.Array,
    chunks: int,
    weights_BxT: jax.Array | None = None,
) -> jax.Array:
    """Returns the mean cross entropy of `softmax(x @ head)` and the targets, in nats.

    Args:
        x_BxTxD: what the head is applied to.
        head_DxV: the output head, used in the dtype of `x`; products are summed in
            float32, and in float64 for float64.
        targets_BxT: the tokens to predict.
        chunks: the number of chunks of the sequence; T need not be a multiple.
        weights_BxT: the weight of each target in the mean, at least 0; None gives all
            targets the same. If all weights are 0, the loss is 0.

    Returns:
        A scalar. Differentiable once, in `x` and `head`, in reverse mode.
    """
    pieces = _pieces(x_BxTxD, targets_BxT, chunks, weights_BxT)

    def add_chunk(
        total: jax.Array, piece: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, None]:
        x, targets, weights = piece
        loss, _ = _chunk_loss(_logits(x, head_DxV), targets, weights)
        return total + loss, None

    zero = jnp.zeros((), _sum_dtype(x_BxTxD))
    return jax.lax.scan(add_chunk, zero, pieces)[0] / _total(targets_BxT, weights_BxT)


def _forward(
    x_BxTxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxT: jax.Array,
    chunks: int,
    weights_BxT: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the loss, and its gradients in `x` and `head` for the backward pass."""
    B, T, D = x_BxTxD.shape
    dtype = _sum_dtype(x_BxTxD)
    total_weight = _total(targets_BxT, weights_BxT)
    head = head_DxV.astype(x_BxTxD.dtype)
    x_CxBxtxD, *rest = _pieces(x_BxTxD, targets_BxT, chunks, weights_BxT)
    keeps_logit_grads = _keeps_logit_grads(x_BxTxD, head_DxV)

    def add_chunk(
        sums: tuple[jax.Array, jax.Array], piece: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, grads = sums
        index, x_BxtxD, targets_Bxt, weights = piece
        logits_BxtxV = _logits(x_BxtxD, head)
        loss, logsumexp_Bxt = _chunk_loss(logits_BxtxV, targets_Bxt, weights)
        grad_BxtxV = _logits_grad(logits_BxtxV, logsumexp_Bxt, targets_Bxt)
        grad_BxtxV /= total_weight
        if weights_BxT is not None:
            grad_BxtxV *= weights[..., None]
        grad_BxtxV = grad_BxtxV.astype(x_BxtxD.dtype)
        if keeps_logit_grads:
            grads = grads.at[index].set(grad_BxtxV)
        else:
            grads += _head_grad(x_BxtxD, grad_BxtxV)
        x_grad_BxtxD = jnp.einsum("btv,dv->btd", grad_BxtxV, head)
        return (total + loss, grads), x_grad_BxtxD

    grads = jnp.zeros(head.shape, dtype)
    if keeps_logit_grads:
        grads = _zeros_after(x_CxBxtxD, (*x_CxBxtxD.shape[:-1], head.shape[1]))
    pieces = (jnp.arange(x_CxBxtxD.shape[0]), x_CxBxtxD, *rest)
    zero = jnp.zeros((), dtype)
    (total, grads), x_grads_CxBxtxD = jax.lax.scan(add_chunk, (zero, grads), pieces)
    if keeps_logit_grads:
        grads = _head_grad(x_CxBxtxD, grads)
    # Padding has gradients too. They add nothing to the head's gradient, as padding's x
    # is 0, and its own rows are sliced off here.
    x_grad_BxTxD = jnp.moveaxis(x_grads_CxBxtxD, 0, 1).reshape(B, -1, D)[:, :T]
    return total / total_weight, (x_grad_BxTxD, grads.astype(head_DxV.dtype))


def _backward(
    chunks: int, grads: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    del chunks
    x_grad_BxTxD, head_grad_DxV = (
        grad * cotangent.astype(grad.dtype) for grad in grads
    )
    return x_grad_BxTxD, head_grad_DxV, None, None


chunked_cross_entropy.defvjp(_forward, _backward)


def _keeps_logit_grads(x_BxTxD: jax.Array, head_DxV: jax.Array) -> bool:
    """Whether the logits' gradients stay until they give the head's, in one product.

    They are in the dtype of `x`, so those of a few tokens are smaller than a large
    head's gradient in float32. A product is summed in float32 too, but its result can
    be rounded to the head's dtype at once, so the sum is never in memory. A head that
    is stored in float32 gains nothing.
    """
    dtype = _sum_dtype(x_BxTxD)
    D, V = head_DxV.shape
    tokens = x_BxTxD.shape[0] * x_BxTxD.shape[1]
    return (
        head_DxV.dtype.itemsize < dtype.itemsize
        and D * V * dtype.itemsize > HEAD_SUM_BYTES
        and tokens * x_BxTxD.dtype.itemsize < D * dtype.itemsize
    )


def _zeros_after(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns zeros in the dtype of `x`, which XLA allocates once `x` is known.

    Without the barrier, XLA for TPU allocates such a buffer at the start of the
    program, and it takes up memory while the layers run.
    """
    return jax.lax.optimization_barrier((x, jnp.zeros(shape, x.dtype)))[1]


def _head_grad(x: jax.Array, logit_grad: jax.Array) -> jax.Array:
    """Returns the gradient of the head: (D, V), from (..., D) and (..., V)."""
    return jnp.einsum(
        "...d,...v->dv", x, logit_grad, preferred_element_type=_sum_dtype(x)
    )


def _sum_dtype(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _total(targets_BxT: jax.Array, weights_BxT: jax.Array | None) -> jax.Array | int:
    """Returns the sum of the targets' weights, or 1 if all weights are 0."""
    if weights_BxT is None:
        return targets_BxT.size
    total = jnp.sum(weights_BxT)
    return jnp.where(total > 0, total, 1)


def _pieces(
    x_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    chunks: int,
    weights_BxT: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Returns x (C, B, t, D), targets (C, B, t) and weights, which are 0 for padding.

    The weights are (C, B, t), or (C, t) if all targets have the same weight.
    """
    B, T, D = x_BxTxD.shape
    t = -(-T // chunks)
    # There are fewer chunks if t is rounded up by much, so that none is padding alone.
    chunks = -(-T // t)
    padding = (0, t * chunks - T)
    # Chunks are along the sequence, as the batch may be sharded over devices.
    x = jnp.pad(x_BxTxD, ((0, 0), padding, (0, 0))).reshape(B, chunks, t, D)
    targets = jnp.pad(targets_BxT, ((0, 0), padding)).reshape(B, chunks, t)
    if weights_BxT is None:
        weights = jnp.pad(jnp.ones(T, _sum_dtype(x)), padding).reshape(chunks, t)
    else:
        weights = jnp.pad(weights_BxT.astype(_sum_dtype(x)), ((0, 0), padding))
        weights = jnp.moveaxis(weights.reshape(B, chunks, t), 1, 0)
    return jnp.moveaxis(x, 1, 0), jnp.moveaxis(targets, 1, 0), weights


def _logits(x_BxtxD: jax.Array, head_DxV: jax.Array) -> jax.Array:
    head = head_DxV.astype(x_BxtxD.dtype)
    return jnp.einsum(
        "btd,dv->btv", x_BxtxD, head, preferred_element_type=_sum_dtype(x_BxtxD)
    )


def _chunk_loss(
    logits_BxtxV: jax.Array, targets_Bxt: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of the cross entropies, and each softmax's logsumexp."""
    logsumexp_Bxt = jax.nn.logsumexp(logits_BxtxV, axis=-1)
    target_Bxt = jnp.take_along_axis(logits_BxtxV, targets_Bxt[..., None], axis=-1)[
        ..., 0
    ]
    return jnp.sum((logsumexp_Bxt - target_Bxt) * weights), logsumexp_Bxt


def _logits_grad(
    logits_BxtxV: jax.Array, logsumexp_Bxt: jax.Array, targets_Bxt: jax.Array
) -> jax.Array:
    """Returns the gradient of the sum of the cross entropies: (B, t, V)."""
    probabilities_BxtxV = jnp.exp(logits_BxtxV - logsumexp_Bxt[..., None])
    hit_BxtxV = jnp.arange(logits_BxtxV.shape[-1]) == targets_Bxt[..., None]
    return probabilities_BxtxV - hit_BxtxV
