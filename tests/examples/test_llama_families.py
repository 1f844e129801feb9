"""Models of the families Qwen2, Qwen3 and Mistral, and models named as on the hub."""

import dataclasses
import json
import shlex
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

from examples.llama import export, pretrain
from examples.llama.config import FAMILIES, LlamaConfig
from examples.llama.hf import folder as hf_folder
from examples.llama.hf import weights as hf_weights
from examples.llama.hf.config import read_config
from examples.llama.mesh import make_mesh
from examples.llama.options import RunOptions, differing_fields
from examples.llama.run import setup
from examples.llama.run.errors import UsageError
from tests.examples.test_llama_cli import SHORT, exits_with_message
from tests.examples.test_llama_hf import (
    END,
    LLAMA,
    byte_level_tokenizer,
    edit_json,
    random_params,
)
from tests.examples.test_llama_hf import transformers as transformers

CONFIGS = {
    name: LLAMA(
        384,
        16,
        24,
        2,
        2,
        num_kv_heads=1,
        initializer_range=0.1,
        max_seq_len=64,
        model_type=name,
    )
    for name in FAMILIES
}
COMMIT = "4e20de362430cd3b72f300e6b0f18e50e7166e08"


def write_model(folder: Path, family: str = "qwen2", **options: Any) -> Path:
    config = CONFIGS[family]
    hf_weights.save_pretrained(
        random_params(config),
        config,
        folder,
        tokenizer=byte_level_tokenizer("spam and eggs\n", 300),
        end_token=END,
        **options,
    )
    return folder


# Reading config.json.


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True is not supp"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "'sliding_attention' in layer_types is not supported; choose a model with",
        ),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling.type 'yarn' is not supported; choose a model with 'default' ",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias True is not supported; ch"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window True is not supp"),
        ("mistral", {"sliding_window": "all"}, "sliding_window is 'all'; give a whole"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            "mistral",
            {"architectures": ["MistralForSequenceClassification"]},
            r"architectures .* is not supported; choose a model with \['MistralForC",
        ),
    ],
)
def test_rejects_settings_of_a_family_that_are_not_computed(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model", family) / hf_weights.CONFIG
    edit_json(path, **changes)
    with pytest.raises(UsageError, match=f"config.json: .*{message}"):
        read_config(path.parent)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_its_own_defaults(
    transformers: Any, family: str, tmp_path: Path
) -> None:
    """The defaults stand for missing fields and for fields that are null."""
    sizes = {
        "model_type": family,
        "vocab_size": 384,
        "hidden_size": 256,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
    }
    null = {"num_key_value_heads": None, "sliding_window": None}
    # Version 5 of transformers refuses the first of these for a Mistral.
    null = {"sliding_window": None} if family == "mistral" else null
    for more in ({}, null):
        (tmp_path / hf_weights.CONFIG).write_text(json.dumps(sizes | more))
        ours = read_config(tmp_path)
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert ours.model_type == theirs.model_type == family
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.max_seq_len == theirs.max_position_embeddings
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.tied_head == theirs.tie_word_embeddings
        assert ours.head_size == getattr(theirs, "head_dim", 4)
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)


def test_the_attention_window_limits_the_sequence(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "mistral")
    fields = json.loads((folder / hf_weights.CONFIG).read_text())
    assert fields["sliding_window"] is None
    edit_json(folder / hf_weights.CONFIG, sliding_window=32)
    options = RunOptions(out=tmp_path / "out", init_from=str(folder), seq=32)
    config = setup.model_config(options)
    assert config == dataclasses.replace(CONFIGS["mistral"], sliding_window=32)
    # An export has the model's own window.
    assert hf_weights.hf_config(config, "float32", None)["sliding_window"] == 32
    with pytest.raises(
        UsageError, match="`seq` 33 is longer than the sliding_window 32"
    ):
        setup.model_config(dataclasses.replace(options, seq=33))


# Runs that are older than the families.


def test_a_run_older_than_the_families_is_the_same_run(tmp_path: Path) -> None:
    now = {"corpus": "a", "model_config": dataclasses.asdict(CONFIGS["llama"])}
    shape = {
        name: value
        for name, value in now["model_config"].items()
        if name not in ("model_type", "sliding_window")
    }
    before = {"corpus": "a", "optimizer": "adamw", "model_config": shape}
    assert not differing_fields(now | {"optimizer": "adamw"}, before)
    other = now | {"model_config": dataclasses.asdict(CONFIGS["qwen2"])}
    (difference,) = differing_fields(other | {"optimizer": "adamw"}, before)
    assert "'model_type': 'llama'" in difference
    assert "'model_type': 'qwen2'" in difference
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert export.config_of_run(tmp_path)[0] == CONFIGS["llama"]


# Models on the hub, and weights in other files than safetensors.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that puts a model's folder into a cache of the hub's layout.

    It returns the model's folder in the cache. There is no network.
    """
    cache = tmp_path / "cache" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(folder: Path, name: str, ref: str = "main", commit: str = COMMIT) -> Path:
        cached = cache / f"models--{name.replace('/', '--')}"
        snapshot = cached / "snapshots" / commit
        for made in (cached / "blobs", cached / "refs", snapshot):
            made.mkdir(parents=True, exist_ok=True)
        (cached / "refs" / ref).write_text(commit)
        for path in folder.iterdir():
            path.rename(cached / "blobs" / f"{commit}{path.name}")
            (snapshot / path.name).symlink_to(
                Path("..", "..", "blobs", f"{commit}{path.name}")
            )
        return snapshot

    return put


def test_a_hub_name_is_found_in_the_cache(
    hub: Callable[..., Path], tmp_path: Path
) -> None:
    main = hub(write_model(tmp_path / "model", max_shard_bytes=9000), "acme/model")
    old = hub(write_model(tmp_path / "old", "qwen3"), "acme/model", "v0.1", "1" * 40)
    assert len(list(main.glob("*.safetensors"))) > 2
    for name, snapshot in (
        ("acme/model", main),
        ("acme/model@v0.1", old),
        (f"acme/model@{COMMIT}", main),
    ):
        assert hf_folder.config_folder(name) == snapshot
        assert hf_folder.weights_folder(name) == snapshot
        assert setup.model_config(
            RunOptions(out=tmp_path, init_from=name, seq=8)
        ) == read_config(snapshot)


def test_rejects_a_model_that_the_cache_lacks(
    hub: Callable[..., Path], tmp_path: Path
) -> None:
    snapshot = hub(write_model(tmp_path / "model", max_shard_bytes=9000), "acme/model")
    absent = r"is no file or folder here, nor to be had from the hub \(.*\); check the "
    for name in ("acme/other", "acme/model@v2"):
        with pytest.raises(UsageError, match=f"^`init_from` '{name}' {absent}"):
            hf_folder.config_folder(name)
    for name in ("model", "a/b/c", "/acme/model", "acme/model@"):
        with pytest.raises(
            UsageError, match=rf"^`init_from` '{name}' does not exist; give a folder "
        ):
            hf_folder.config_folder(name)
    # A plan needs no weights. A run says which file is missing.
    shard = sorted(snapshot.glob("*.safetensors"))[1]
    shard.unlink()
    assert hf_folder.config_folder("acme/model") == snapshot
    options = RunOptions(out=tmp_path, init_from="acme/model", seq=8)
    with pytest.raises(UsageError, match="acme/model.* nor to be had|is not there, th"):
        setup.pretrained_weights(options, CONFIGS["qwen2"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_hub_model_is_trained_in_int8_and_exported(
    family: str,
    hub: Callable[..., Path],
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    snapshot = hub(write_model(tmp_path / "model", family), "acme/model")
    args = ["--out", str(out), "--init-from", "acme/model", *SHORT]
    pretrain.main([*args, "--weights", "int8", "--layerwise", "--lr", "0.01"])
    export.main(["--run", str(out), "--to", str(tmp_path / "tuned")])
    assert read_config(tmp_path / "tuned") == CONFIGS[family]
    before, after = (
        load_file(folder / hf_weights.WEIGHTS)
        for folder in (snapshot, tmp_path / "tuned")
    )
    assert before.keys() == after.keys()
    kind = "k_proj.bias" if family == "qwen2" else "k_norm.weight"
    name = f"model.layers.1.self_attn.{kind}"
    assert after[name].dtype.name == "bfloat16"
    # Adam moves every element a little.
    moved = np.abs(after[name].astype(np.float32) - before[name])
    assert 0 < moved.min() <= moved.max() < 0.2


def test_rejects_unreadable_weights_before_a_run_begins(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "model")
    (folder / hf_weights.WEIGHTS).rename(folder / "pytorch_model.bin")
    args = ["--out", str(out), "--init-from", str(folder), *SHORT]
    error = exits_with_message(pretrain.main, args, capsys)
    assert f"{folder} has its weights in pytorch_model.bin, not in " in error
    assert "`python -c 'from transformers import " in error
    assert f"and give {folder}-safetensors" in error
    assert not out.exists()


def test_the_error_has_a_command_that_converts_the_weights(
    transformers: Any, tmp_path: Path
) -> None:
    import torch

    folder = write_model(tmp_path / "it's 1")
    params = hf_weights.load_params(folder, CONFIGS["qwen2"], "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / hf_weights.WEIGHTS).unlink()
    new = tmp_path / "new"
    _, _, code = shlex.split(hf_weights.conversion(folder, str(new)))
    exec(code, {})
    converted = hf_weights.load_params(new, CONFIGS["qwen2"], "float32")
    jax.tree.map(np.testing.assert_array_equal, converted, params)
    assert (new / hf_weights.TOKENIZER).exists()


# Memory.


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_run_reads_weights_a_layer_at_a_time(weights: str, tmp_path: Path) -> None:
    config = LlamaConfig(512, 128, 512, 2, 24, model_type="qwen2")
    params = random_params(config)
    hf_weights.save_pretrained(params, config, tmp_path / "model")
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    options = RunOptions(
        out=tmp_path,
        init_from=str(tmp_path / "model"),
        weights=weights,
        layerwise=weights == "int8",
        compute_dtype="float32",
    )
    mesh = make_mesh("data=1")
    setup.initial_params(
        options, config, mesh
    )  # This call compiles, so that the second one is measured without compiling.
    tracemalloc.start()
    found = setup.initial_params(options, config, mesh)
    # JAX allocates the parameters, which tracemalloc does not see. A layer is 1/25 of
    # the model. Python needs the rest of the limit for the programs.
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < model / 4
    if weights == "float32":
        jax.tree.map(np.testing.assert_array_equal, found, params)
