"""LoRA: what the adapters compute, train and keep, and their exports."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from examples.llama import export, finetune, plan
from examples.llama.config import (
    FAMILIES,
    PRESETS,
    LlamaConfig,
    adapter_count,
    param_count,
)
from examples.llama.evaluate import make_evaluator
from examples.llama.flops import flops_per_token
from examples.llama.hf.adapters import save_adapters
from examples.llama.hf.weights import load_params, save_pretrained
from examples.llama.lora import adapters_of, joined, merge, without_adapters
from examples.llama.memory.options import PlannedTuning
from examples.llama.mesh import device_count, make_mesh, over_data
from examples.llama.model import (
    Batch,
    Execution,
    Params,
    flatten,
    graphdef_of,
    init_params,
    next_token_loss,
    pieces_of,
)
from examples.llama.optimizers.parameters import lr_group
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.optimizers.recipes import with_defaults
from examples.llama.options import FinetuneOptions
from examples.llama.run import log as run_log
from examples.llama.run import setup
from examples.llama.run.checkpoint import restore_params, steps_on_disk
from examples.llama.run.errors import UsageError
from tests.examples.chat_models import EOS, chat_tokenizer
from tests.examples.chat_runs import SHORT, refused, without_times, words
from tests.examples.chat_runs import start as start
from tests.examples.conftest import SMALL
from tests.examples.test_llama_plan import here as here

RANK, ALPHA = 4, 6.0
LORA = ["--lora", str(RANK), "--lora-alpha", str(ALPHA), "--optimizer", "adamw"]


def with_rank(config: LlamaConfig) -> LlamaConfig:
    return dataclasses.replace(config, lora_rank=RANK, lora_alpha=ALPHA)


def random_params(config: LlamaConfig) -> Params:
    """Parameters with adapters that add something, and norms other than 1."""
    params = init_params(config, seed=0)

    def moved(x: jax.Array) -> np.ndarray:
        rng = np.random.default_rng(x.size)
        return np.asarray(x) + rng.normal(size=x.shape).astype(np.float32) / 10

    return jax.tree.map(moved, params)


def tokens_of(config: LlamaConfig, rows: int = 2) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, config.vocab_size, (rows, 17), dtype=np.int32)


def logits_of(config: LlamaConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    graphdef = graphdef_of(config)
    logits = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    return np.asarray(logits(params, tokens))


def test_new_adapters_add_nothing_and_are_counted(small: LlamaConfig) -> None:
    config = with_rank(dataclasses.replace(small, num_kv_heads=1))
    batch = Batch(tokens_of(config))

    @jax.jit
    def losses(params: Params) -> tuple[jax.Array, jax.Array]:
        own = without_adapters(params)
        return (
            next_token_loss(graphdef_of(config), params, batch),
            next_token_loss(graphdef_of(config.base), own, batch),
        )

    params = init_params(config, seed=0)
    own, adapters = without_adapters(params), adapters_of(params)
    assert len(flatten(adapters)) == 14
    assert sum(x.size for x in jax.tree.leaves(adapters)) == adapter_count(config)
    assert sum(x.size for x in jax.tree.leaves(own)) == param_count(config)
    adapted, alone = losses(params)
    assert adapted == pytest.approx(float(alone), rel=1e-6)
    q_proj = adapters["layers"]["attention"]["q_proj"]["lora"]
    # PEFT draws A evenly up to one over the root of the inputs.
    bound = small.hidden_size**-0.5
    assert 0.9 * bound < np.abs(q_proj["lora_a"]).max() <= bound
    assert not np.any(q_proj["lora_b"])
    assert flatten(joined(adapters, own)).keys() == flatten(params).keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_adds_in_float32_and_rounds_once(
    dtype: str, small: LlamaConfig
) -> None:
    config = with_rank(small)
    shapes = jax.eval_shape(lambda: init_params(config, seed=0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(jnp.dtype(dtype)), shapes
    )
    own, before = (jax.tree.map(np.array, without_adapters(params)) for _ in "12")
    merge(own, adapters_of(params), config)
    for path, leaf in flatten(own).items():
        expected = flatten(before)[path]
        if path.startswith("layers/") and path.endswith("/kernel"):
            lora = path.replace("/kernel", "/lora/lora_")
            a, b = (flatten(params)[lora + x].astype(np.float32) for x in "ab")
            expected = expected.astype(np.float32) + ALPHA / RANK * (a @ b)
        np.testing.assert_allclose(
            leaf, expected.astype(leaf.dtype), rtol=1e-6 if dtype == "float32" else 0
        )
        assert leaf.dtype == jnp.dtype(dtype)


def losses_of(**changes: Any) -> list[float]:
    """Returns the losses of three steps, of which the first has a rate of 0."""
    options = PlannedTuning(
        batch=4, seq=16, lora=RANK, optimizer="adamw", lr=0.01, **changes
    )
    config = setup.model_config(options)
    options = with_defaults(dataclasses.replace(options, steps=3), config)
    mesh = setup.mesh_of(options, config, jax.devices()[: device_count(options.mesh)])
    tx, _ = make_optimizer(options, config)
    shapes = setup.abstract_frozen(options, config, mesh)
    own = without_adapters(init_params(config, seed=1))
    frozen = jax.device_put(own, setup.shardings_of(shapes))
    state = setup.initial_state(options, config, tx, mesh)
    step = setup.training_step(options, config, tx, mesh)
    batch = jax.device_put(Batch(tokens_of(config, rows=4)), over_data(mesh))
    found = []
    for number in range(1, 4):
        state, metrics = step(state, batch, np.int32(number), frozen=frozen)
        found.append(float(metrics.loss))
    return found


@pytest.mark.slow  # The specs are tested below, and a mesh's step for all weights.
def test_a_mesh_trains_adapters_as_one_device(tiny_is_small: None) -> None:
    losses = losses_of()
    assert losses[2] < losses[0]
    on_mesh = losses_of(mesh="fsdp=2,tensor=2", accumulate=2)
    np.testing.assert_allclose(on_mesh, losses, rtol=1e-5)


def test_adapters_are_sharded_as_their_kernels(small: LlamaConfig) -> None:
    mesh = make_mesh("fsdp=2,tensor=2", jax.devices()[:4])
    shapes = setup.abstract_params(with_rank(small), Execution(), mesh)
    specs = {path: leaf.sharding.spec for path, leaf in flatten(shapes).items()}
    for name, rows, columns in (
        ("mlp/down_proj", "tensor", "fsdp"),
        ("attention/q_proj", "fsdp", "tensor"),
    ):
        assert specs[f"layers/{name}/kernel"] == jax.P(None, rows, columns)
        assert specs[f"layers/{name}/lora/lora_a"] == jax.P(None, rows, None)
        assert specs[f"layers/{name}/lora/lora_b"] == jax.P(None, None, columns)


def test_a_run_its_resumption_and_its_exports(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    short = [*SHORT, "--lr", "0.03", "--checkpoint-every", "4", "--steps", "6"]
    args = words(start, out, *short, *LORA)
    finetune.main(args)
    adapters = adapter_count(with_rank(SMALL))
    said = (
        f" in float32 and {adapters:,} in adapters of rank 4, which alone are trained"
    )
    assert said in capsys.readouterr().err
    rows = run_log.read_metrics(out)
    assert rows[-1]["val_loss"] < rows[2]["val_loss"] < rows[0]["loss"]
    # Checkpoints have the adapters alone, and a run that was killed goes on.
    shapes = setup.abstract_params(
        with_rank(SMALL),
        setup.execution_of(options_of(start, out), SMALL),
        make_mesh("data=1"),
    )
    kept = restore_params(out, adapters_of(shapes), None, "best")
    assert sum(x.size for x in jax.tree.leaves(kept)) == adapters
    metadata = json.loads((out / "best" / "6" / "state" / "_METADATA").read_text())
    assert all("lora" in key for key in metadata["tree_metadata"])
    whole = without_times(out)
    shutil.rmtree(out / "checkpoints" / "6")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:5]))
    finetune.main([*args, "--resume", "auto"])
    assert without_times(out) == whole
    assert steps_on_disk(out) == [4, 6]
    other = [*args[: -len(LORA)], "--lora", "8", *LORA[2:], "--resume", "auto"]
    assert "lora: 4 -> 8" in refused(other, capsys, finetune.main)
    # The merged model has the loss of the run, and nothing else is exported as a model.
    to = tmp_path / "exported"
    line = ["--run", str(out), "--to", str(to), "--best"]
    assert refused(line, capsys, export.main) == (
        f"error: {out} has LoRA adapters and no whole model; give --adapter to write "
        "them in PEFT's format, or --merge to write the model with what they add\n"
    )
    assert not to.exists()
    export.main([*line, "--merge"])
    _, text = finetune.load_text(options_of(start, out), SMALL, make_mesh("data=1"))
    loss = make_evaluator(pieces_of(SMALL), text.held_out)(
        load_params(to, SMALL, "float32")
    )
    assert loss == pytest.approx(rows[-1]["val_loss"], abs=1e-5)
    line[3] = str(tmp_path / "adapter")
    export.main([*line, "--adapter"])
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    shutil.move(start / "model", tmp_path / "elsewhere")
    try:
        line[3] = str(tmp_path / "none")
        error = refused([*line, "--merge"], capsys, export.main)
        # Adapters fit no other weights, such as those of a branch that has moved.
        shutil.copytree(tmp_path / "elsewhere", start / "model")
        tensors = load_file(start / "model" / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
        save_file(tensors, start / "model" / "model.safetensors")
        merged = refused([*line, "--merge"], capsys, export.main)
        resumed = refused([*args, "--resume", "auto"], capsys, finetune.main)
        shutil.rmtree(start / "model")
    finally:
        shutil.move(tmp_path / "elsewhere", start / "model")
    assert f"have changed since {out} began from them" in merged
    assert "base_weights: " in resumed
    assert error.startswith(f"error: --merge needs the model that {out} began from: ")
    assert not (tmp_path / "none").exists()


def options_of(start: Path, out: Path) -> FinetuneOptions:
    return FinetuneOptions(
        out=out,
        init_from=str(start / "model"),
        data=str(start / "chat.jsonl"),
        seq=48,
        batch=2,
        date="2026-11-27",
    )


# PEFT reads a deprecated attribute of Transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_the_run_does(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[torch]'")
    import torch
    import transformers

    config = with_rank(dataclasses.replace(SMALL, num_kv_heads=1, model_type=family))
    params, tokens = random_params(config), tokens_of(config)
    arguments: dict[str, Any] = {"tokenizer": chat_tokenizer(), "end_token": EOS}
    base = tmp_path / "base"
    save_pretrained(without_adapters(params), config.base, base, **arguments)
    save_adapters(
        adapters_of(params), config, tmp_path / "lora", base=str(base), **arguments
    )
    expected = logits_of(config, params, tokens)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert isinstance(model.base_model.model, transformers.PreTrainedModel)
    for each in (model, model.merge_and_unload()):
        with torch.no_grad():
            logits = each.eval()(torch.as_tensor(tokens).long()).logits.numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_files_of_adapters(small: LlamaConfig, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    config, folder = with_rank(small), tmp_path / "lora"
    adapters = adapters_of(random_params(config))
    arguments: dict[str, Any] = {"tokenizer": chat_tokenizer(), "dtype": "bfloat16"}
    save_adapters(adapters, config, folder, base="owner/name@v1", **arguments)
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (RANK, ALPHA)
    assert fields["base_model_name_or_path"] == "owner/name"
    assert fields["revision"] == "v1"
    assert len(fields["target_modules"]) == 7
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 14 * config.num_layers
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"
    own = adapters["layers"]["mlp"]["down_proj"]["lora"]["lora_b"][2]
    np.testing.assert_array_equal(tensors[name], own.T.astype(jnp.bfloat16))
    before = sorted(folder.iterdir())
    with pytest.raises(UsageError, match="already holds files"):
        save_adapters(adapters, config, folder, base="owner/name", **arguments)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora", "0"], "--lora 0 is out of range; give a number above 0"),
        ([*LORA, "--lora-alpha", "-1"], "--lora-alpha -1.0 is out of range"),
        (["--lora-alpha", "8"], "--lora-alpha 8.0 means nothing without --lora"),
        (["--lora", "4"], "--lora 4 trains its adapters with AdamW, not with "),
        ([*LORA, "--layerwise"], "--layerwise is for training all weights, and"),
        ([*LORA, "--weights", "int8"], "--weights int8 is for training all weights"),
        ([*LORA, "--offload", "weights"], "--offload weights is for training all"),
        (
            [*LORA, "--lr-embeddings", "1"],
            "--lr-embeddings 1.0 means nothing to --lora",
        ),
        (
            [*LORA, "--embeddings", "scale"],
            "--embeddings scale means nothing to --lora",
        ),
        ([*LORA, "--head", "scale"], "--head scale means nothing to --lora 4, which"),
        (
            [*LORA, "--relative", "True"],
            "--relative means nothing to --lora 4, whose adapters start at zero",
        ),
        ([*LORA, "--rank", "4"], "--rank 4 means nothing to --optimizer adamw"),
    ],
)
def test_options_that_do_not_go_with_adapters(
    more: list[str],
    message: str,
    start: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = words(start, tmp_path / "tuned", *SHORT, *more)
    error = refused(args, capsys, finetune.main)
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "tuned").exists()


def test_adapters_alone_are_written_only_of_a_run_that_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"model_config": dataclasses.asdict(SMALL), "optimizer": "adamw"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(fields))
    line = ["--run", str(tmp_path / "run"), "--to", str(tmp_path / "to")]
    error = refused([*line, "--adapter"], capsys, export.main)
    assert error.startswith("error: --adapter is for a run with --lora, and ")
    error = refused([*line, "--adapter", "--merge"], capsys, export.main)
    assert error.startswith("error: --adapter writes the adapters alone, and --merge ")
    assert not (tmp_path / "to").exists()


def test_default_rate_and_alpha(small: LlamaConfig) -> None:
    options = with_defaults(PlannedTuning(lora=8, optimizer="adamw"), small)
    assert (options.lr, options.lora_alpha) == (pytest.approx(2e-4), 16)
    assert lr_group("layers/mlp/up_proj/lora/lora_b") == "kernels"


def test_the_plan_has_the_whole_model_and_the_state_of_adapters(
    here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_rank(PRESETS["tiny"])
    line = ["--model", "tiny", "--seq", "16", "--batch", "2", "--remat", "full"]
    plan.main(["finetune", *line, *LORA, "--json"])
    row = json.loads(capsys.readouterr().out)
    adapters = adapter_count(config)
    assert (row["lora"], row["adapter_parameters"]) == (RANK, adapters)
    assert row["parameters"] == param_count(config)
    assert row["weights_bytes"] == 4 * (param_count(config) + adapters)
    # Two moments per number, and counts.
    assert 8 * adapters < row["optimizer_bytes"] < 8 * adapters + 64
    # The step returns nothing of what is frozen.
    assert row["output_bytes"] < 2 * 12 * adapters


def test_frozen_weights_have_no_gradients_in_the_count_of_flops(
    small: LlamaConfig,
) -> None:
    own, adapted = (flops_per_token(c, 1) for c in (small, with_rank(small)))
    attention = 12 * small.num_layers * small.num_heads * small.head_size
    adapters = 6 * adapter_count(with_rank(small))
    assert adapted == pytest.approx((own - attention) * 4 / 6 + attention + adapters)
