import dataclasses
import functools
import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from examples.llama.config import LlamaConfig, RopeScaling
from examples.llama.hf import pretrained
from examples.llama.hf import weights as hf_weights
from examples.llama.hf.config import read_config
from examples.llama.model import Params, graphdef_of, init_params
from examples.llama.run.errors import UsageError

# These large weights make attention far from uniform. Otherwise rotary embeddings
# would hardly matter.
LLAMA = functools.partial(LlamaConfig, max_seq_len=96, initializer_range=0.3)
CONFIGS = {
    "multi-head": LLAMA(64, 16, 24, 2, 3),
    "grouped-query": LLAMA(
        64, 32, 40, 4, 2, num_kv_heads=2, rms_norm_eps=1e-3, rope_theta=500.0
    ),
    "tied": LLAMA(64, 16, 24, 2, 2, tied_head=True),
    "scaled": LLAMA(
        64, 16, 24, 2, 2, rope_theta=1000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 12)
    ),
    "head_dim": LLAMA(64, 16, 24, 2, 2, head_size=12, num_kv_heads=1),
    "qwen2": LLAMA(64, 32, 40, 4, 2, num_kv_heads=2, model_type="qwen2"),
    "qwen3": LLAMA(
        64,
        16,
        24,
        2,
        2,
        head_size=12,
        num_kv_heads=1,
        tied_head=True,
        model_type="qwen3",
    ),
    "mistral": LLAMA(64, 16, 24, 2, 2, num_kv_heads=1, model_type="mistral"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TOLERANCE = 1e-4
TOKENS_BXT = np.random.default_rng(0).integers(0, 64, (2, 80))
END = "<|end|>"
TIED, UNTIED = CONFIGS["tied"], CONFIGS["multi-head"]


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch", reason="needs transformers and torch, to compare with")
    return pytest.importorskip(
        "transformers", reason="needs transformers and torch, to compare with"
    )


def random_params(config: LlamaConfig, dtype: str = "float32") -> Params:
    """Parameters that all differ, norms too, so that a misplaced one is noticed."""
    generator = np.random.default_rng(1)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return generator.normal(mean, config.initializer_range, shape.shape).astype(
            jnp.dtype(dtype)
        )

    shapes = jax.eval_shape(functools.partial(init_params, config, seed=0))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def byte_level_tokenizer(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def logits_of(config: LlamaConfig, params: Params) -> np.ndarray:
    graphdef = graphdef_of(config)
    return np.asarray(
        jax.jit(lambda params: nnx.merge(graphdef, params)(TOKENS_BXT))(params)
    )


def their_model(transformers: Any, config: LlamaConfig) -> Any:
    """A transformers model of random weights, configured without `hf_config`."""
    import torch

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    name = config.model_type.capitalize()
    # Transformers gives a Mistral a window of 4096 tokens if nothing else is asked.
    more = {"sliding_window": None} if name == "Mistral" else {}
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(
            **more,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_size,
            max_position_embeddings=config.max_seq_len,
            rope_parameters=rope,
            rms_norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            tie_word_embeddings=config.tied_head,
        )
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), config.initializer_range)
    return model


def their_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS_BXT)).logits.numpy()


def edit_json(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; `...` removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({key: value for key, value in fields.items() if value is not ...})
    )


def edit_weights(file: Path, **changes: np.ndarray | None) -> None:
    """Changes tensors of a safetensors file; None removes one."""
    tensors = load_file(file) | changes
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, file
    )


def assert_trees_equal(found: Params, expected: Params) -> None:
    def check(path: Any, x: Any, y: Any) -> None:
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)

    jax.tree_util.tree_map_with_path(check, found, expected)


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    """A function that exports random parameters and returns the folder."""

    def export(config: LlamaConfig, dtype: str = "float32", **options: Any) -> Path:
        folder = tmp_path / "exported"
        hf_weights.save_pretrained(
            random_params(config, dtype), config, folder, **options
        )
        return folder

    return export


# Against transformers.


@every_config
def test_their_export_gives_our_logits(
    transformers: Any, config: LlamaConfig, tmp_path: Path
) -> None:
    model = their_model(transformers, config)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert read_config(tmp_path) == config
    params = hf_weights.load_params(tmp_path, config, "float32")
    logits, expected = logits_of(config, params), their_logits(model)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    assert np.std(expected) > 100 * TOLERANCE
    if config.rope_scaling:
        unscaled = logits_of(dataclasses.replace(config, rope_scaling=None), params)
        assert np.max(np.abs(unscaled - expected)) > 1000 * TOLERANCE


@every_config
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4096])
def test_our_export_gives_their_logits(
    transformers: Any,
    config: LlamaConfig,
    max_shard_bytes: int,
    exported: Callable[..., Path],
) -> None:
    import torch

    folder = exported(config, max_shard_bytes=max_shard_bytes)
    assert (folder / hf_weights.INDEX).exists() == (max_shard_bytes == 4096)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, None)
    logits = logits_of(config, random_params(config))
    np.testing.assert_allclose(their_logits(model), logits, rtol=0, atol=TOLERANCE)


def test_their_bfloat16_is_ours_bit_for_bit(transformers: Any, tmp_path: Path) -> None:
    import torch

    model = their_model(transformers, UNTIED).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    params = hf_weights.load_params(tmp_path / "theirs", UNTIED, "bfloat16")
    hf_weights.save_pretrained(params, UNTIED, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in again.state_dict().items()
    )


def test_their_tokenizer_encodes_as_ours(
    transformers: Any, exported: Callable[..., Path]
) -> None:
    text = "def f(x):\n    return  x , naïve 🙂 ! don't\n"
    tokenizer = byte_level_tokenizer(text * 3, 300)
    config = dataclasses.replace(UNTIED, vocab_size=320)
    folder = exported(config, tokenizer=tokenizer, end_token=END)
    end_id = tokenizer.token_to_id(END)
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = kind.from_pretrained(folder)
        ids = theirs(text + END)["input_ids"]
        assert ids == tokenizer.encode(text + END).ids
        assert ids[-1] == theirs.eos_token_id == end_id
        assert theirs.eos_token == END
        assert theirs.decode(ids, skip_special_tokens=True) == text
        assert (theirs.bos_token, theirs.unk_token) == (None, None)
        assert theirs.model_max_length == config.max_seq_len
        assert len(theirs) == tokenizer.get_vocab_size()
    assert transformers.AutoConfig.from_pretrained(folder).eos_token_id == end_id


# The files beside the weights.

CHAT = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": {"__type": "AddedToken", "content": END, "special": True},
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "model_max_length": 77,
}
CHAT_CONFIG = dataclasses.replace(UNTIED, vocab_size=320)


def chat_tokenizer() -> tokenizers.Tokenizer:
    given = byte_level_tokenizer("spam and eggs", 300)
    given.add_special_tokens(["<s>", "<pad>", "<|eot|>"])
    return given


@pytest.fixture
def chat(tmp_path: Path, exported: Callable[..., Path]) -> Path:
    """A model's folder with the files of a chat model."""
    given = chat_tokenizer()
    folder = exported(CHAT_CONFIG, tokenizer=given, end_token=END)
    folder = folder.rename(tmp_path / "chat")
    given.enable_truncation(5)
    given.save(str(folder / hf_weights.TOKENIZER))
    hf_weights.write_json(folder / hf_weights.TOKENIZER_CONFIG, CHAT)
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\x00")
    ids = {
        token: given.token_to_id(token) for token in (END, "<s>", "<pad>", "<|eot|>")
    }
    edit_json(
        folder / hf_weights.CONFIG,
        bos_token_id=ids["<s>"],
        pad_token_id=ids["<pad>"],
        eos_token_id=[ids[END], ids["<|eot|>"]],
    )
    return folder


def export_of(tmp_path: Path, files: pretrained.Files) -> Path:
    params = random_params(CHAT_CONFIG)
    given = chat_tokenizer()
    folder = tmp_path / "tuned"
    hf_weights.save_pretrained(
        params, CHAT_CONFIG, folder, tokenizer=given, end_token=END, passed_on=files
    )
    return folder


def test_files_beside_the_weights_are_passed_on(chat: Path, tmp_path: Path) -> None:
    folder = export_of(tmp_path, pretrained.find_files(None, chat))
    names = {path.name for path in chat.rglob("*") if path.is_file()}
    assert names == {path.name for path in folder.rglob("*") if path.is_file()}
    for path in chat.rglob("*"):
        if path.is_file() and path.name not in (hf_weights.WEIGHTS, hf_weights.CONFIG):
            passed = folder / path.relative_to(chat)
            assert passed.read_bytes() == path.read_bytes(), path.name
    before, after = (
        json.loads((f / hf_weights.CONFIG).read_text()) for f in (chat, folder)
    )
    assert after == before


def test_transformers_finds_what_is_passed_on(
    transformers: Any, chat: Path, tmp_path: Path
) -> None:
    (chat / "chat_template.jinja").unlink()
    (chat / "additional_chat_templates" / "tools.jinja").unlink()
    folder = export_of(tmp_path, pretrained.find_files(None, chat))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token, theirs.pad_token, theirs.eos_token) == (
        "<s>",
        "<pad>",
        END,
    )
    messages = [{"role": "user", "content": "spam"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "<s>spam"
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.pad_token_id == theirs.pad_token_id
    assert config.bos_token_id == theirs.bos_token_id


def test_ids_of_special_tokens(chat: Path, tmp_path: Path) -> None:
    given = chat_tokenizer()
    end_id = given.token_to_id(END)
    fields = {"bos_token_id": None, "eos_token_id": end_id}
    ids = functools.partial(pretrained.with_token_ids, fields, tokenizer=given)
    # A missing field stays missing. The end token of the text is one of the model's.
    edit_json(
        chat / hf_weights.CONFIG, bos_token_id=..., pad_token_id=None, eos_token_id=5
    )
    files = pretrained.find_files(None, chat)
    assert ids(files) == {"pad_token_id": None, "eos_token_id": end_id}
    # The ids of a model with another tokenizer are ignored.
    other = tmp_path / "other"
    other.mkdir()
    (other / hf_weights.TOKENIZER).write_text(given.to_str())
    hf_weights.write_json(other / hf_weights.TOKENIZER_CONFIG, CHAT)
    files = pretrained.find_files(str(other), chat)
    assert set(files) == {hf_weights.TOKENIZER, hf_weights.TOKENIZER_CONFIG}
    assert ids(files) == {
        "bos_token_id": given.token_to_id("<s>"),
        "pad_token_id": given.token_to_id("<pad>"),
        "eos_token_id": end_id,
    }
    assert ids({}) == fields


def test_an_end_token_that_no_file_names_is_written(chat: Path, tmp_path: Path) -> None:
    fields = {name: value for name, value in CHAT.items() if name != "eos_token"}
    hf_weights.write_json(chat / hf_weights.TOKENIZER_CONFIG, fields)
    folder = export_of(tmp_path, pretrained.find_files(None, chat))
    found = json.loads((folder / hf_weights.TOKENIZER_CONFIG).read_text())
    assert found == fields | {"eos_token": END}


def test_a_byte_order_mark_is_not_passed_on(
    transformers: Any, chat: Path, tmp_path: Path
) -> None:
    for name in (hf_weights.TOKENIZER, hf_weights.TOKENIZER_CONFIG):
        text = (chat / name).read_text()
        (chat / name).write_text(text, encoding="utf-8-sig")
    folder = export_of(tmp_path, pretrained.find_files(None, chat))
    assert transformers.AutoTokenizer.from_pretrained(folder).bos_token == "<s>"


# Round trips.


@every_config
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000])
def test_exported_weights_are_read_bit_for_bit(
    config: LlamaConfig, dtype: str, max_shard_bytes: int, exported: Callable[..., Path]
) -> None:
    folder = exported(config, dtype, max_shard_bytes=max_shard_bytes)
    assert read_config(folder) == config
    params = hf_weights.load_params(folder, config, dtype)
    assert_trees_equal(params, random_params(config, dtype))


def test_parameters_on_devices_are_written_like_those_on_the_host(
    tmp_path: Path,
) -> None:
    mesh = jax.make_mesh((2,), ("data",))
    sharding = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(None, "data")
    )
    params = random_params(UNTIED)
    on_devices = jax.tree.map(
        lambda x: jax.device_put(x, sharding) if x.ndim == 3 else jnp.asarray(x), params
    )
    hf_weights.save_pretrained(on_devices, UNTIED, tmp_path / "exported")
    assert_trees_equal(
        hf_weights.load_params(tmp_path / "exported", UNTIED, "float32"), params
    )


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_weights_are_cast_when_read(
    stored: str, wanted: str, exported: Callable[..., Path]
) -> None:
    folder = exported(UNTIED)
    tensors = load_file(folder / hf_weights.WEIGHTS)
    save_file(
        {name: x.astype(jnp.dtype(stored)) for name, x in tensors.items()},
        folder / hf_weights.WEIGHTS,
    )
    original = random_params(UNTIED)
    expected = jax.tree.map(
        lambda x: x.astype(jnp.dtype(stored)).astype(jnp.dtype(wanted)), original
    )
    assert_trees_equal(hf_weights.load_params(folder, UNTIED, wanted), expected)


def test_weights_are_cast_when_written(tmp_path: Path) -> None:
    params = random_params(UNTIED)
    hf_weights.save_pretrained(params, UNTIED, tmp_path / "exported", dtype="bfloat16")
    assert (
        json.loads((tmp_path / "exported" / hf_weights.CONFIG).read_text())[
            "torch_dtype"
        ]
        == "bfloat16"
    )
    stored = load_file(tmp_path / "exported" / hf_weights.WEIGHTS)
    assert {tensor.dtype.name for tensor in stored.values()} == {"bfloat16"}
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert_trees_equal(
        hf_weights.load_params(tmp_path / "exported", UNTIED, "bfloat16"), expected
    )


def test_shards_hold_no_more_than_asked_and_the_index_says_where(
    exported: Callable[..., Path],
) -> None:
    folder = exported(UNTIED, max_shard_bytes=5000)
    index = json.loads((folder / hf_weights.INDEX).read_text())
    shards = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    sizes = {
        name: sum(x.nbytes for x in tensors.values())
        for name, tensors in shards.items()
    }
    assert len(shards) > 3
    assert max(sizes.values()) <= 5000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"] == {
        name: file for file, tensors in shards.items() for name in tensors
    }
    assert set(shards) == {
        f"model-{n:05}-of-{len(shards):05}.safetensors"
        for n in range(1, len(shards) + 1)
    }


def test_files_have_the_fields_that_transformers_4_needs(
    exported: Callable[..., Path],
) -> None:
    folder = exported(
        LLAMA(320, 16, 24, 2, 2), tokenizer=byte_level_tokenizer("text", 300)
    )
    with safe_open(folder / hf_weights.WEIGHTS, framework="np") as weights:
        assert weights.metadata() == {"format": "pt"}
    assert not json.loads((folder / hf_weights.TOKENIZER_CONFIG).read_text())[
        "clean_up_tokenization_spaces"
    ]


def test_consecutive_tensors_fill_shards() -> None:
    assert hf_weights.cut_into_shards("abcde", [2, 2, 9, 1, 3], 4) == [
        ["a", "b"],
        ["c"],
        ["d", "e"],
    ]


def test_a_tensor_larger_than_a_shard_has_its_own(
    exported: Callable[..., Path],
) -> None:
    folder = exported(UNTIED, max_shard_bytes=1)
    assert all(len(load_file(file)) == 1 for file in folder.glob("*.safetensors"))
    assert_trees_equal(
        hf_weights.load_params(folder, UNTIED, "float32"), random_params(UNTIED)
    )


def test_memory_is_that_of_one_model_to_read_and_of_one_shard_to_write(
    tmp_path: Path,
) -> None:
    config = LlamaConfig(1024, 256, 512, 4, 12)
    params = random_params(config)
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = params["embed"]["embedding"].nbytes
    shard = model // 6
    assert shard > 2 * largest
    peaks = []
    for action in (
        lambda: hf_weights.save_pretrained(
            params, config, tmp_path / "exported", max_shard_bytes=shard
        ),
        lambda: hf_weights.load_params(tmp_path / "exported", config, "float32"),
    ):
        tracemalloc.start()
        action()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < shard + 3 * largest
    assert peaks[1] < model + 3 * largest


# Variants of config.json.


def test_both_spellings_of_rotary_scaling(exported: Callable[..., Path]) -> None:
    config = CONFIGS["scaled"]
    folder = exported(config)
    scaling = json.loads((folder / hf_weights.CONFIG).read_text())["rope_scaling"]
    kind = scaling.pop("rope_type")
    edit_json(folder / hf_weights.CONFIG, rope_scaling=scaling | {"type": kind})
    assert read_config(folder) == config
    newer = scaling | {"rope_type": kind, "rope_theta": config.rope_theta}
    edit_json(
        folder / hf_weights.CONFIG,
        rope_scaling=...,
        rope_theta=...,
        rope_parameters=newer,
    )
    assert read_config(folder) == config


def test_fields_that_early_versions_did_not_write(
    exported: Callable[..., Path],
) -> None:
    folder = exported(UNTIED)
    missing = (
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
    )
    biases = ("attention_bias", "mlp_bias")
    edit_json(folder / hf_weights.CONFIG, **dict.fromkeys(missing + biases, ...))
    assert read_config(folder) == UNTIED
    edit_json(folder / hf_weights.CONFIG, num_key_value_heads=None, head_dim=None)
    assert read_config(folder) == UNTIED


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({"architectures": ["LLaMAForCausalLM"]}, {}),
        ({"architectures": None, "model_type": None}, {}),
        ({"attention_bias": None, "mlp_bias": None}, {}),
        ({"hidden_act": "swish"}, {}),
        ({"hidden_act": None}, {}),
        ({"tie_word_embeddings": None}, {}),
        ({"rope_scaling": {"rope_type": None}}, {}),
        ({"rope_scaling": {"type": None}}, {}),
        ({"rms_norm_eps": ...}, {"rms_norm_eps": 1e-6}),
        ({"rms_norm_eps": None}, {"rms_norm_eps": 1e-6}),
        ({"max_position_embeddings": ...}, {"max_seq_len": 2048}),
        ({"initializer_range": ...}, {"initializer_range": 0.02}),
        ({"rope_theta": None}, {"rope_theta": 10_000.0}),
    ],
)
def test_fields_with_a_default_or_another_name(
    changes: dict[str, Any], read: dict[str, Any], exported: Callable[..., Path]
) -> None:
    config = dataclasses.replace(UNTIED, rms_norm_eps=1e-3, rope_theta=10_000.0)
    folder = exported(config)
    edit_json(folder / hf_weights.CONFIG, **changes)
    assert read_config(folder) == dataclasses.replace(config, **read)


def test_defaults_are_those_of_transformers(
    transformers: Any, exported: Callable[..., Path]
) -> None:
    folder = exported(UNTIED)
    missing = ("rms_norm_eps", "max_position_embeddings", "initializer_range")
    edit_json(folder / hf_weights.CONFIG, **dict.fromkeys(missing, ...))
    ours, theirs = (
        read_config(folder),
        transformers.AutoConfig.from_pretrained(folder),
    )
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.initializer_range == theirs.initializer_range


def test_tensors_that_early_versions_wrote(exported: Callable[..., Path]) -> None:
    folder = exported(TIED)
    embedding = random_params(TIED)["embed"]["embedding"]
    constants = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit_weights(
        folder / hf_weights.WEIGHTS, **constants, **{hf_weights.HEAD: embedding}
    )
    assert_trees_equal(
        hf_weights.load_params(folder, TIED, "float32"), random_params(TIED)
    )


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            r"architectures \['MistralForCausalLM'\] is not supported",
        ),
        (
            {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
            "model_type 'gemma' is not supported; choose a model with 'llama' or "
            "'qwen2' or 'qwen3' or 'mistral'",
        ),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        (
            {"architectures": ["GemmaForCausalLM"], "model_type": ...},
            r"architectures \['GemmaForCausalLM'\] is not supported; choose a model "
            r"with \['LlamaForCausalLM'\] or \['Qwen2ForCausalLM'\] or ",
        ),
        (
            {"model_type": "qwen2"},
            r"architectures \['LlamaForCausalLM'\] is not supported; choose a model "
            r"with \['Qwen2ForCausalLM'\]",
        ),
        (
            {"hidden_act": "gelu"},
            "hidden_act 'gelu' is not supported; choose a model with 'silu'",
        ),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"vocab_size": ...}, "lacks vocab_size; add it"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"intermediate_size": ...}, "lacks intermediate_size"),
        ({"num_hidden_layers": ...}, "lacks num_hidden_layers"),
        ({"num_attention_heads": ...}, "lacks num_attention_heads"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r"architectures \['LlamaForSequenceClassification'\] is not supported",
        ),
        ({"architectures": []}, r"architectures \[\] is not supported"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0; give a whole"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; give a number above 0"),
        ({"hidden_size": "16"}, "hidden_size is '16'; give a whole number above 0"),
        ({"hidden_size": 16.0}, "hidden_size is 16.0; give a whole number above 0"),
        (
            {"num_hidden_layers": True},
            "num_hidden_layers is True; give a whole number above 0",
        ),
        (
            {"num_hidden_layers": 0},
            "num_hidden_layers is 0; give a whole number above 0",
        ),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; give a number above 0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; give a number above 0"),
        (
            {"tie_word_embeddings": "no"},
            "tie_word_embeddings is 'no'; give true or false",
        ),
        (
            {"num_key_value_heads": 3},
            "num_heads 2 must be a multiple of num_kv_heads 3",
        ),
        ({"head_dim": 7}, "head_size 7 must be even"),
        (
            {"rope_scaling": "llama3"},
            "rope_scaling is 'llama3'; give an object or null",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling.type 'linear' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters.rope_type 'yarn' is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"lacks rope_scaling\.low_freq_factor",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "low_freq_factor 4.0 is not below high_freq_factor 4.0",
        ),
    ],
)
def test_rejects_unusable_configs(
    changes: dict[str, Any], message: str, exported: Callable[..., Path]
) -> None:
    folder = exported(UNTIED)
    edit_json(folder / hf_weights.CONFIG, **changes)
    with pytest.raises(UsageError, match=f"config.json:? .*{message}"):
        read_config(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "holds no JSON object"),
        (b'{"n": ' + b"1" * 5000 + b"}", "is JSON with a number of more than 4300 dig"),
        (b"[" * 100_000, "is JSON with brackets nested too deep"),
    ],
)
def test_rejects_unreadable_configs(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / hf_weights.CONFIG).write_bytes(content)
    with pytest.raises(UsageError, match=f"config.json {message}"):
        read_config(tmp_path)


def test_rejects_a_config_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / hf_weights.CONFIG).mkdir()
    with pytest.raises(UsageError, match="cannot read .*config.json: Is a directory"):
        read_config(tmp_path)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: None}, f"exported lacks {UP}; "),
        (
            {UP: None, hf_weights.HEAD: None},
            f"exported lacks {UP} and 1 other tensors; .* tie_word_embeddings false",
        ),
        (
            {UP: np.ones((16, 24), np.float32)},
            rf"model.safetensors: {UP} is \(16, 24\), but \(24, 16\) by \(intermediate_size, hidden_size\)",
        ),
        (
            {UP: np.ones((24, 16), np.int8)},
            f"model.safetensors: {UP} is of dtype I8; convert it to",
        ),
        (
            {"model.layers.0.mlp.up_proj.bias": np.ones(24)},
            "up_proj.bias is no tensor of a llama of 3 layers; correct num_hidden_layers or",
        ),
        (
            {"model.layers.3.mlp.up_proj.weight": np.ones(24)},
            "layers.3.* correct num_hidden_layers or model_type in config",
        ),
    ],
)
def test_rejects_unusable_tensors(
    changes: dict[str, np.ndarray | None], message: str, exported: Callable[..., Path]
) -> None:
    folder = exported(UNTIED)
    edit_weights(folder / hf_weights.WEIGHTS, **changes)
    with pytest.raises(UsageError, match=message):
        hf_weights.load_params(folder, UNTIED, "float32")


def test_errors_name_the_fields_that_make_a_shape() -> None:
    config = LLAMA(64, 20, 24, 6, 2, num_kv_heads=3, head_size=8)
    fields = hf_weights.hf_config(config, "float32", None)
    for tensor in hf_weights.tensors_of(config):
        sizes = [
            math.prod(fields[name] for name in size.split(" * "))
            for size in hf_weights.NAMES[tensor.path][1]
        ]
        assert tuple(sizes) == tensor.shape, tensor.name


def test_rejects_a_tied_head_that_differs(exported: Callable[..., Path]) -> None:
    folder = exported(TIED)
    edit_weights(
        folder / hf_weights.WEIGHTS, **{hf_weights.HEAD: np.ones((64, 16), np.float32)}
    )
    with pytest.raises(
        UsageError,
        match=r"lm_head.weight is not model.embed_tokens.weight, though config",
    ):
        hf_weights.load_params(folder, TIED, "float32")


def test_rejects_missing_and_repeated_shards(exported: Callable[..., Path]) -> None:
    folder = exported(UNTIED, max_shard_bytes=9000)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    repeated = load_file(first)
    edit_weights(second, **repeated)
    with pytest.raises(
        UsageError, match=rf"{second.name}: .* is also in .*{first.name}; remove one"
    ):
        hf_weights.load_params(folder, UNTIED, "float32")
    second.unlink()
    with pytest.raises(
        UsageError,
        match=rf"{second.name} is not there, though {hf_weights.INDEX} names it",
    ):
        hf_weights.load_params(folder, UNTIED, "float32")
    edit_json(folder / hf_weights.INDEX, weight_map=["model.safetensors"])
    with pytest.raises(UsageError, match=rf"{hf_weights.INDEX} has no weight_map"):
        hf_weights.load_params(folder, UNTIED, "float32")
    (folder / hf_weights.INDEX).unlink()
    with pytest.raises(
        UsageError,
        match=r"holds neither model.safetensors nor model.safetensors.index.json",
    ):
        hf_weights.load_params(folder, UNTIED, "float32")


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -5])
def test_rejects_truncated_weights(
    kept_bytes: int, exported: Callable[..., Path]
) -> None:
    file = exported(UNTIED) / hf_weights.WEIGHTS
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(
        UsageError, match=r"cannot read .*model.safetensors: .*; download it again"
    ):
        hf_weights.load_params(file.parent, UNTIED, "float32")


def test_rejects_a_pointer_of_git_lfs(exported: Callable[..., Path]) -> None:
    file = exported(UNTIED) / hf_weights.WEIGHTS
    file.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"
    )
    with pytest.raises(UsageError, match=r"cannot read .*model.safetensors: "):
        hf_weights.load_params(file.parent, UNTIED, "float32")


def test_rejects_unknown_dtypes(exported: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="dtype 'bfloat' is unknown; choose one of: bfloat16, float32"
    ):
        hf_weights.load_params(exported(UNTIED), UNTIED, "bfloat")
    with pytest.raises(UsageError, match="dtype 'float16' is unknown"):
        hf_weights.save_pretrained(
            random_params(UNTIED), UNTIED, tmp_path / "new", dtype="float16"
        )
    with pytest.raises(UsageError, match="dtype 'float64' is unknown"):
        hf_weights.save_pretrained(
            random_params(UNTIED, "float64"), UNTIED, tmp_path / "new"
        )
    assert not (tmp_path / "new").exists()


def test_rejects_parameters_of_another_shape(tmp_path: Path) -> None:
    deeper = dataclasses.replace(UNTIED, num_layers=4)
    with pytest.raises(
        UsageError,
        match=r"params: layers/attention/k_proj/kernel is \(3, 16, 16\), but \(4, ",
    ):
        hf_weights.save_pretrained(random_params(UNTIED), deeper, tmp_path / "new")
    tied = dataclasses.replace(UNTIED, tied_head=True)
    with pytest.raises(
        UsageError,
        match=r"params: lm_head/kernel is \(16, 64\), but missing in a model of",
    ):
        hf_weights.save_pretrained(random_params(UNTIED), tied, tmp_path / "new")


def test_rejects_arguments_of_an_export(tmp_path: Path) -> None:
    save = functools.partial(
        hf_weights.save_pretrained, random_params(UNTIED), UNTIED, tmp_path / "new"
    )
    tokenizer = byte_level_tokenizer("text", 300)
    with pytest.raises(
        UsageError, match="max_shard_bytes 0 is out of range; give a number above 0"
    ):
        save(max_shard_bytes=0)
    with pytest.raises(
        UsageError,
        match=r"tokenizer has a token of id \d+, but the model's vocab_size is 64",
    ):
        save(tokenizer=tokenizer)
    with pytest.raises(
        UsageError, match="end_token '<end>' is no token of the tokenizer"
    ):
        save(end_token="<end>")
    with pytest.raises(
        UsageError, match="end_token '<end>' is no token of the tokenizer"
    ):
        save(end_token="<end>", tokenizer=tokenizers.Tokenizer(tokenizers.models.BPE()))
    assert not (tmp_path / "new").exists()


def test_an_export_overwrites_nothing(exported: Callable[..., Path]) -> None:
    folder = exported(UNTIED)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(
        UsageError, match=r"exported already holds files; choose a folder that is empty"
    ):
        exported(TIED)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(
        UsageError, match=r"model.safetensors is a file; choose a folder"
    ):
        hf_weights.check_free(folder / hf_weights.WEIGHTS)


def test_an_export_takes_an_empty_folder_and_makes_a_missing_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b"):
        hf_weights.save_pretrained(random_params(UNTIED), UNTIED, folder)
        assert sorted(file.name for file in folder.iterdir()) == [
            hf_weights.CONFIG,
            hf_weights.WEIGHTS,
        ]
        assert (folder / hf_weights.WEIGHTS).stat().st_mode == (
            folder / hf_weights.CONFIG
        ).stat().st_mode


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            OSError(28, "No space left on device"),
            UsageError,
            "cannot write .*exported: .*No space left",
        ),
        (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
    ],
)
def test_an_interrupted_export_leaves_no_files(
    error: BaseException,
    raised: type[BaseException],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exported: Callable[..., Path],
) -> None:
    written = []

    def fail_at_the_second(tensors: Any, file: Path, metadata: Any) -> None:
        if written:
            raise error
        save_file(tensors, file, metadata)
        written.append(file)

    monkeypatch.setattr(hf_weights, "save_file", fail_at_the_second)
    with pytest.raises(raised, match=message):
        exported(UNTIED, max_shard_bytes=5000)
    assert written
    assert not list(tmp_path.iterdir())


def test_rejects_an_export_to_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UsageError, match="cannot write .*new: .*; free space or choose another folder"
    ):
        hf_weights.save_pretrained(
            random_params(UNTIED), UNTIED, tmp_path / "file" / "new"
        )
