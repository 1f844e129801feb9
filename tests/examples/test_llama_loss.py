import functools
import importlib.util
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama import loss as loss_module
from examples.llama.loss import chunked_cross_entropy, num_chunks
from examples.llama.memory.target import environment

B, T, D, V = 3, 11, 16, 37


def inputs(dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_key, head_key, target_key = jax.random.split(jax.random.key(0), 3)
    x_BxTxD = jax.random.normal(x_key, (B, T, D), dtype)
    head_DxV = jax.random.normal(head_key, (D, V), dtype) / 4
    return x_BxTxD, head_DxV, jax.random.randint(target_key, (B, T), 0, V)


def plain(x_BxTxD: jax.Array, head_DxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    logits = jnp.einsum("btd,dv->btv", x_BxTxD, head_DxV)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets_BxT).mean()


def relative_error(value: jax.Array, expected: jax.Array) -> float:
    return float(jnp.abs(value - expected).max() / jnp.abs(expected).max())


@pytest.mark.parametrize("chunks", [1, 2, 3, 11])
def test_loss_and_gradients_equal_the_plain_ones(chunks: int) -> None:
    with jax.enable_x64(True):
        x, head, targets = inputs(jnp.float64)

        def scaled(loss: Any, x: jax.Array, head: jax.Array) -> jax.Array:
            return 3 * loss(x, head) ** 2  # The cotangent of the loss is not 1 then.

        results = [
            jax.value_and_grad(functools.partial(scaled, loss), argnums=(0, 1))(x, head)
            for loss in (
                lambda x, head: chunked_cross_entropy(x, head, targets, chunks),
                lambda x, head: plain(x, head, targets),
            )
        ]
        assert results[0][0].dtype == jnp.float64
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14),
            *results,
        )


def test_without_a_gradient_the_loss_is_the_same() -> None:
    x, head, targets = inputs(jnp.float32)
    loss, _ = jax.value_and_grad(chunked_cross_entropy)(x, head, targets, 3)
    assert float(chunked_cross_entropy(x, head, targets, 3)) == pytest.approx(
        float(loss), rel=1e-6
    )
    assert float(loss) == pytest.approx(float(plain(x, head, targets)), rel=1e-6)


def test_bfloat16_is_summed_in_float32() -> None:
    x, head, targets = inputs(jnp.bfloat16)
    loss, grads = jax.value_and_grad(chunked_cross_entropy, argnums=(0, 1))(
        x, head, targets, 3
    )
    assert loss.dtype == jnp.float32
    assert [grad.dtype for grad in grads] == [jnp.bfloat16] * 2
    wide = (x.astype(jnp.float32), head.astype(jnp.float32))
    expected, expected_grads = jax.value_and_grad(plain, argnums=(0, 1))(*wide, targets)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad.astype(jnp.float32), expected_grad) < 1e-2


def test_logits_of_the_whole_batch_are_never_computed() -> None:
    batch, seq, hidden, vocab = 4, 64, 8, 512
    chunks = num_chunks(batch, seq, vocab, logits_bytes=4 * batch * 16 * vocab)
    assert chunks == 4
    shapes = (
        jax.ShapeDtypeStruct((batch, seq, hidden), jnp.float32),
        jax.ShapeDtypeStruct((hidden, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, seq), jnp.int32),
    )

    def compiled(loss: Any) -> Any:
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()

    def largest(program: Any) -> int:
        found = re.findall(r"f32\[([\d,]+)\]", program.as_text())
        return max(int(np.prod([int(n) for n in dims.split(",")])) for dims in found)

    chunked = compiled(
        lambda x, head, targets: chunked_cross_entropy(x, head, targets, chunks)
    )
    assert largest(chunked) == batch * seq * vocab // chunks
    assert (
        largest(compiled(plain)) == batch * seq * vocab
    )  # The plain loss has them, so the check can fail.
    assert (
        chunked.memory_analysis().temp_size_in_bytes
        < compiled(plain).memory_analysis().temp_size_in_bytes
    )


# Two rows are fewer tokens than twice D, and three are more.
FEW, MANY = 2, 3


@pytest.fixture
def large_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats every head as one whose float32 gradient is too large."""
    monkeypatch.setattr(loss_module, "HEAD_SUM_BYTES", 0)


def carried(dtype: Any, rows: int, head_dtype: Any = None) -> list[str]:
    """Returns the types of the arrays that the scan over the chunks carries."""
    x, head, targets = inputs(dtype)
    program = jax.make_jaxpr(jax.grad(chunked_cross_entropy, 1), static_argnums=3)(
        x[:rows], head.astype(head_dtype or dtype), targets[:rows], 3
    )
    (scan,) = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
    first = scan.params["num_consts"]
    carry = scan.invars[first : first + scan.params["num_carry"]]
    return [var.aval.str_short() for var in carry]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_large_head_has_the_same_gradient(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, head, targets = inputs(jnp.bfloat16)
    x, targets = x[:FEW], targets[:FEW]
    weights = (jnp.arange(FEW * T).reshape(FEW, T) % 3).astype(jnp.float32)

    def tripled(x: jax.Array, head: jax.Array) -> jax.Array:
        given = weights if weighted else None
        return 3 * chunked_cross_entropy(x, head, targets, 3, given)

    summed, grads_of_sum = jax.value_and_grad(tripled, argnums=(0, 1))(x, head)
    monkeypatch.setattr(loss_module, "HEAD_SUM_BYTES", 0)
    kept, grads = jax.value_and_grad(tripled, argnums=(0, 1))(x, head)
    assert kept == summed
    assert [grad.dtype for grad in grads] == [jnp.bfloat16] * 2
    np.testing.assert_array_equal(grads[0], grads_of_sum[0])
    # Both are sums in float32, so they differ only where these fall on two sides of
    # the border between two bfloat16s.
    assert float((grads[1] != grads_of_sum[1]).mean()) < 0.02
    wide = (grad.astype(jnp.float32) for grad in (grads[1], grads_of_sum[1]))
    assert relative_error(*wide) < 2**-7


@pytest.mark.usefixtures("large_head")
def test_a_large_head_has_no_gradient_in_float32() -> None:
    assert carried(jnp.bfloat16, FEW) == ["float32[]", f"bfloat16[3,{FEW},4,{V}]"]


@pytest.mark.usefixtures("large_head")
@pytest.mark.parametrize(
    ("dtype", "head_dtype", "rows"),
    [
        (jnp.bfloat16, jnp.bfloat16, MANY),  # The logits' gradients are larger then.
        (jnp.bfloat16, jnp.float32, FEW),
        (jnp.float32, jnp.float32, FEW),
    ],
)
def test_otherwise_the_gradient_is_summed_in_float32(
    dtype: Any, head_dtype: Any, rows: int
) -> None:
    assert carried(dtype, rows, head_dtype) == ["float32[]", f"float32[{D},{V}]"]


def test_the_gradient_of_a_small_head_is_summed_in_float32() -> None:
    assert carried(jnp.bfloat16, FEW) == ["float32[]", f"float32[{D},{V}]"]


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from examples.llama.loss import chunked_cross_entropy, num_chunks

T, D, V = 1024, 4096, 128_256
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1")
here = SingleDeviceSharding(topology.devices[0])

def shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=here)

def loss(x, head, targets):
    return chunked_cross_entropy(x, head, targets, num_chunks(1, T, V))

grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
shapes = shape(jnp.bfloat16, 1, T, D), shape(jnp.bfloat16, D, V), shape(jnp.int32, 1, T)
print(grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes / (D * V))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed",
)
def test_memory_beside_the_gradient_of_a_large_head() -> None:
    """LLaMA 3's vocabulary, on a TPU: a float32 sum alone has 4 bytes per weight."""
    compiled = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment("v5e:1x1", 1),
        stdout=subprocess.PIPE,
        check=True,
    )
    assert float(compiled.stdout) < 1.5


def test_no_chunk_is_padding_alone() -> None:
    """63 chunks of 256 tokens become 52 chunks of 5, the last with 4 of padding."""
    x, head, targets = (jnp.ones(shape) for shape in ((1, 256, 2), (2, 3), (1, 256)))
    program = jax.make_jaxpr(chunked_cross_entropy, static_argnums=3)(
        x, head, targets.astype(int), 63
    )
    assert "length=52" in str(program)


def test_number_of_chunks() -> None:
    assert num_chunks(8, 128, 2048) == 2  # Even small logits have two chunks.
    assert (
        num_chunks(512, 256, 32_000) == 63
    )  # 16.8 GB of logits make chunks of 268 MB.
    assert (
        num_chunks(4096, 2, 128_256) == 2
    )  # There are at most as many as tokens per sequence.
    assert num_chunks(1, 1, 10) == 1
