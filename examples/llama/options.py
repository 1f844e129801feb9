"""What a user can set; the classes are the command lines, their docstrings the help."""

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from examples.llama.config import LlamaConfig
from examples.llama.mesh import batch_shards
from examples.llama.model import REMAT_POLICIES
from examples.llama.run.errors import UsageError, unknown_name
from examples.llama.text.rows import FIELD

# The rules for embeddings and head.
EMBEDDING_RULE_NAMES = (
    "adam",
    "apollo",
    "scale",
    "adafactor",
    "adafactor-momentum",
    "racs",
    "flattening",
)

CHOICES = {
    "--remat": tuple(REMAT_POLICIES),
    "--weights": ("float32", "bfloat16", "int8"),
    "--rounding": ("nearest", "stochastic"),
    "--compute-dtype": ("float32", "bfloat16"),
    "--attention": ("auto", "xla", "cudnn"),
    "--moment-dtype": ("float32", "bfloat16"),
    "--embeddings": EMBEDDING_RULE_NAMES,
    "--head": EMBEDDING_RULE_NAMES,
    "--projection": ("auto", "rademacher", "random"),
    "--on-nonfinite": ("stop", "skip"),
    "--resume": ("never", "auto"),
    "--schedule": ("cosine", "linear"),
}
BOS_CHOICES = ("auto", "never")
# These options may be None, which stands for a default that depends on other options.
UNSET = ("--rounding", "--compute-dtype", "--head")

# These options may change when a run is resumed. The trained weights stay the same, up
# to rounding, unless a step is not finite.
CHANGEABLE = frozenset(
    (
        "layerwise",
        "offload",
        "made_with",
        "out",
        "resume",
        "mesh",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "workers",
        "on_nonfinite",
    )
)
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # Such as gs://bucket/run.
OFFLOADABLE = ("weights", "activations")
LARGEST_SEED = 2**32 - 1  # The largest seed of Grain's shuffle.
# Options whose value "auto" or None means the value that a resumed run began with. Runs
# that are older than the option have the value given here.
BEFORE_CHOICE = {"bos": "never", "projection": "random", "relative": False}
MOST_STEPS = 2**31 - 1  # Optax counts in int32.
MOST_WORKERS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The options that determine the tokens, besides the model's vocabulary."""

    data: str = "stdlib"
    """stdlib: the source of Python's standard library, which needs no network. python:
    the same and the source of all installed packages. package-docs: the .rst, .md and
    .txt files and the descriptions of these packages. Or a file, a folder or a quoted
    glob of text, .jsonl, .json, .parquet, .csv or .tsv, or hf:OWNER/NAME[/CONFIG] from
    the hub. If a folder has files with rows, such as .jsonl, its other files are left
    out."""
    validation: str | None = None
    """The same for held-out text. The default is the split "validation" of a data set
    on the hub, if it has one, and otherwise one document in twenty of --data."""
    text_field: str = FIELD
    """The field, or column, that has the text in the rows of --data and --validation.
    Rows without text are skipped."""
    data_tokens: int | None = None
    """Stop reading --data after this many tokens. By default, a run on hf: takes as
    many as it needs, and any other run reads all of them."""
    tokenizer: str | None = None
    """A tokenizer.json, a folder with one, or OWNER/NAME[@REVISION] on the hub. The
    default is the tokenizer of --init-from, or else a BPE that is trained on --data
    when it is first used."""
    vocab: int | None = None
    """How many tokens that BPE has; by default as many as the model's vocabulary."""
    bos: str = "auto"
    """auto: put BOS before each document if the tokenizer puts it before a text, as
    those of Llama 2 and 3 do. never: add no BOS. A resumed run keeps the setting that
    it began with."""

    def __post_init__(self) -> None:
        for name in ("data", "validation", "text_field", "tokenizer"):
            check_not_empty(name, getattr(self, name))
        if self.bos not in BOS_CHOICES:
            raise unknown_name("--bos", self.bos, BOS_CHOICES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(TextOptions):
    """The options that runs in a comparison have in common."""

    out: Path
    """Folder for the results; it must not contain another run."""
    model: str | None = None
    """tiny (the default), 6m, 60m, 130m, 350m, 1b, 7b, 13b, llama-2-70b, llama-3.2-1b,
    llama-3-8b, llama-3.1-8b, qwen2.5-7b, qwen3-8b or mistral-7b."""
    init_from: str | None = None
    """A LLaMA, Qwen2, Qwen2.5, Qwen3 or Mistral to start from, instead of --model and
    random weights: a folder in Hugging Face's format (config.json, *.safetensors), or
    OWNER/NAME[@REVISION] on the hub, which is downloaded when it is first used. An
    export copies the files of its tokenizer, including the chat template."""
    mesh: str = "data=1"
    """The mesh of devices, such as data=2,fsdp=2,tensor=2. data and fsdp shard each
    batch, fsdp shards every matrix of weights, and tensor shards their heads and
    columns. The sizes must multiply to the number of devices, except that data=1
    takes the first device alone. An axis that is left out has size 1."""
    steps: int = 800
    """Training steps. Learning rates rise in the first tenth of them."""
    schedule: str = "cosine"
    """How the learning rates fall to a tenth of their peak: cosine or linear."""
    batch: int = 8
    """Sequences per step."""
    accumulate: int = 1
    """Split --batch into this many micro-batches, to save memory. It must divide
    --batch."""
    seq: int = 128
    """Tokens per sequence."""
    seed: int = 0
    """Sets the initial weights, the order of the data, the samples, stochastic rounding
    and APOLLO's projections."""
    workers: int = 2
    """Threads that read data ahead."""
    eval_every: int = 100
    """Steps between evaluations. There is always one after the last step."""
    eval_windows: int = 128
    """Sequences of held-out text per evaluation. They are spread evenly over the text
    and are always the same. Pre-training rounds their number down to a multiple of
    8, and takes at least 8."""
    checkpoint_every: int = 500
    """Steps between checkpoints. There is always one after the last step."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    resume: str = "never"
    """auto: continue the run in --out from its last checkpoint, or start a new run.
    never: reject a folder with a run in it."""
    on_nonfinite: str = "stop"
    """What to do if a loss or gradient is not finite: stop, or skip the step."""
    weights: str = "float32"
    """The dtype of the parameters, float32 or bfloat16; or int8 for the layers'
    kernels, which needs --layerwise."""
    compute_dtype: str | None = None
    """The dtype of activations and matrix products, float32 or bfloat16. With --weights
    int8, it is also the dtype of the other parameters. The default is the dtype of
    --weights, or bfloat16 for int8."""
    rounding: str | None = None
    """How updates are added to bfloat16 and int8 weights: stochastic (the default), or
    nearest, which loses updates that are smaller than half of the last bit."""
    layerwise: bool = False
    """Update each layer in the backward pass as soon as its gradient is known, so that
    only one layer's gradients are in memory."""
    offload: str | None = None
    """With --layerwise, what to keep in host memory: weights (the layers' kernels),
    activations (the layers' inputs), or weights,activations."""
    remat: str = "dots"
    """What the backward pass recomputes to save memory: none (nothing), dots
    (everything except the products with weights) or full (the whole layer)."""
    attention: str = "auto"
    """xla, cudnn, or auto: cudnn on a GPU in bfloat16."""
    rank: int | None = None
    """The rank of APOLLO and GaLore. The default is 1 for apollo-mini, an eighth of the
    hidden size for apollo-zero, and a quarter of it for the others."""
    scale: float | None = None
    """The scale of APOLLO, by default 128 for apollo-mini and 1 for the others; or of
    GaLore, by default 0.25."""
    moment_dtype: str = "float32"
    """The dtype of the moments of APOLLO and Adam, of the first moments of Muon and
    Lion, and of the momenta of apollo-zero-momentum and of scale on the head: float32
    or bfloat16. In bfloat16 a second moment with a decay of 0.999 never decays, because
    0.999 times a number rounds to the same number."""
    b2: float | None = None
    """The decay of the second moments, from 0 to below 1, for Adam on embeddings, head
    and norms, and on the kernels for adamw, apollo, apollo-mini, apollo-svd and galore.
    The default is 0.999. Adafactor's decay rises towards 1, and to no more than this if
    it is given."""
    clip_norm: float | None = None
    """Scale each step's gradients down to this Euclidean norm over all parameters if
    their norm is larger. By default they are not clipped."""
    relative: bool | None = None
    """Whether a kernel's updates are multiplied by the RMS of its weights over 0.02, a
    factor of 0.05 to 5. By default, those of apollo-zero are, also with whitening or a
    momentum, unless the run starts from good weights. A resumed run keeps what it began
    with."""
    weight_decay: float = 0.0
    """The decoupled weight decay of the kernels, or of the adapters of --lora: each
    step also subtracts the learning rate times this times the weights. Embeddings, head
    and norms have none."""
    embeddings: str = "adam"
    """The rule for the embeddings and the head. adam, scale, adafactor (without
    momentum), adafactor-momentum (with a momentum in int8), racs and flattening work
    with any --optimizer. apollo works with apollo, apollo-mini and apollo-svd, and does
    the same as they do for the kernels. Norms have Adam."""
    head: str | None = None
    """A different one of these rules for the head."""
    projection: str = "auto"
    """The projections of apollo and apollo-mini: rademacher (random signs) or random
    (the paper's normal entries). The other optimizers accept random, without an effect.
    auto: rademacher, or for a resumed run, the projection that it began with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in self.numbers().items():
            if value is not None:
                check_positive(flag, value)
        check_seed("--seed", self.seed)
        if self.steps > MOST_STEPS:
            raise UsageError(
                f"--steps {self.steps} is out of range; give 1 to {MOST_STEPS}"
            )
        if self.workers > MOST_WORKERS:
            raise UsageError(
                f"--workers {self.workers} is out of range; give 1 to {MOST_WORKERS}"
            )
        if self.b2 is not None and not 0 <= self.b2 < 1:
            raise UsageError(
                f"--b2 {self.b2} is out of range; give a number from 0 to below 1"
            )
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise UsageError(
                f"--weight-decay {self.weight_decay} is out of range; give 0 or more"
            )
        check_not_empty("model", self.model)
        check_not_empty("init_from", self.init_from)
        if self.out == Path():
            raise UsageError(
                "--out is empty or the current folder; name a folder for the run"
            )
        if self.batch % self.accumulate:
            raise UsageError(
                f"--batch {self.batch} is not a multiple of --accumulate "
                f"{self.accumulate}; change one"
            )
        rows, shards = self.batch // self.accumulate, batch_shards(self.mesh)
        if rows % shards:
            raise UsageError(
                f"--batch {self.batch} in --accumulate {self.accumulate} micro-batches "
                f"is {rows} sequences, not a multiple of the {shards} shards that data "
                f"and fsdp of --mesh {self.mesh} make; change one"
            )
        if self.model and self.init_from:
            raise UsageError(
                f"--model {self.model} and --init-from {self.init_from} both give the "
                "model's shape; give one of them"
            )
        # The class is frozen, so defaults that depend on other options are set here.
        if self.init_from:
            # A run is resumed by its options, and `a/` is the folder `a`.
            folder = expanded("init_from", Path(self.init_from))
            object.__setattr__(self, "init_from", str(folder))
        else:
            object.__setattr__(self, "model", self.model or "tiny")
        for flag, known in CHOICES.items():
            value = getattr(self, flag[2:].replace("-", "_"))
            if value is None and flag in UNSET:
                continue
            if value not in known:
                raise unknown_name(flag, str(value), known)
        widest = "bfloat16" if self.weights == "int8" else self.weights
        object.__setattr__(self, "compute_dtype", self.compute_dtype or widest)
        self._check_rounding()
        self._check_layerwise()

    def _check_rounding(self) -> None:
        if self.weights == "float32" and self.rounding == "stochastic":
            raise UsageError(
                "--rounding stochastic means nothing to --weights float32; leave it out"
            )
        if self.weights == "int8" and self.rounding == "nearest":
            raise UsageError(
                "--rounding nearest would lose all updates of --weights int8, which "
                "are smaller than half a step of it; leave it out"
            )
        default = "nearest" if self.weights == "float32" else "stochastic"
        object.__setattr__(self, "rounding", self.rounding or default)

    def _check_layerwise(self) -> None:
        for name in self.offloaded:
            if name not in OFFLOADABLE:
                raise unknown_name("--offload", name, OFFLOADABLE)
            if self.offloaded.count(name) > 1:
                raise UsageError(
                    f"--offload {self.offload} names {name} twice; give each once"
                )
        if not self.layerwise:
            for flag, value, reason in (
                (
                    "--weights",
                    self.weights == "int8" and "int8",
                    "the ordinary step would store all of them",
                ),
                (
                    "--offload",
                    self.offload,
                    "the ordinary step would fetch all of them",
                ),
            ):
                if value:
                    raise UsageError(
                        f"{flag} {value} takes --layerwise, "
                        f"since {reason} in full; give it too"
                    )
            return
        if self.accumulate > 1:
            raise UsageError(
                f"--accumulate {self.accumulate} can't be done with --layerwise, which "
                "drops a layer's gradient before the next micro-batch; leave it out, "
                "and if the batch does not fit, add --remat full or devices to --mesh, "
                "or lower --batch"
            )
        if self.clip_norm is not None:
            raise UsageError(
                f"--clip-norm {self.clip_norm:g} can't be done with --layerwise, which "
                "has updated other layers by the time it knows the norm over all; "
                "leave one of the two out: APOLLO's limiter bounds each layer's update "
                "without that norm"
            )
        if self.on_nonfinite == "skip":
            raise UsageError(
                "--on-nonfinite skip can't be done with --layerwise, which has updated "
                "other layers by the time it sees a gradient; leave it out: stop keeps "
                "the last good checkpoint, and APOLLO's limiter bounds each layer's "
                "update without a norm over all"
            )

    @property
    def warmup_steps(self) -> int:
        """The number of steps in which the learning rates rise, the first from 0."""
        return max(1, self.steps // 10) if self.steps > 1 else 0

    def evaluates_after(self, step: int) -> bool:
        """Whether a step, counted from 1, is followed by an evaluation."""
        return step == self.steps or step % self.eval_every == 0

    @property
    def offloaded(self) -> tuple[str, ...]:
        """The names that --offload lists."""
        return tuple(self.offload.split(",")) if self.offload is not None else ()

    def numbers(self) -> dict[str, float | None]:
        """Returns the options that must be positive, by flag."""
        names = (
            "steps",
            "batch",
            "accumulate",
            "seq",
            "data_tokens",
            "vocab",
            "workers",
            "eval_every",
            "eval_windows",
            "checkpoint_every",
            "keep_checkpoints",
            "rank",
            "scale",
            "clip_norm",
        )
        return {f"--{name.replace('_', '-')}": getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """The place of this process among several; their number does not change the run."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where it meets the other processes. Under Slurm, Open
    MPI, GKE and on TPU pods, JAX finds the values of this and the next two options."""
    processes: int | None = None
    """The number of processes. 1: run alone, even if JAX would detect a cluster."""
    process_id: int | None = None
    """The number of this process, from 0."""

    def check_processes(self) -> None:
        given = (self.coordinator, self.processes, self.process_id)
        if given in ((None, None, None), (None, 1, None)):
            return
        if (
            self.coordinator is None
            or self.processes is None
            or self.process_id is None
        ):
            flags = dict(
                zip(
                    ("--coordinator HOST:PORT", "--processes", "--process-id"),
                    given,
                    strict=True,
                )
            )
            missing = " and ".join(
                flag for flag, value in flags.items() if value is None
            )
            raise UsageError(
                "--coordinator, --processes and --process-id go together; add "
                f"{missing}, or give --processes 1 alone"
            )
        if not re.fullmatch(r".+:\d+", self.coordinator):
            raise UsageError(
                f"--coordinator {self.coordinator} is malformed; give HOST:PORT"
            )
        if not 0 <= self.process_id < self.processes:
            raise UsageError(
                f"--process-id {self.process_id} is out of range; give 0 to "
                f"{self.processes - 1}, as --processes is {self.processes}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(ProcessOptions, TrainingOptions):
    """One run: a model trained with one optimizer at one pair of learning rates."""

    optimizer: str = "apollo-mini"
    """adamw, apollo, apollo-mini, apollo-svd, apollo-zero, apollo-zero-whitening,
    apollo-zero-momentum, apollo-zero-momentum-int8, racs, sinkgd, scale-hidden, swan,
    galore, muon, adafactor, lion or sgd."""
    lr: float | None = None
    """Peak learning rate of the layers' kernels. The default depends on the
    optimizer."""
    lr_embeddings: float | None = None
    """Peak learning rate of embeddings, head and norms. The default depends on the
    optimizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_processes()

    def numbers(self) -> dict[str, float | None]:
        more = {
            "--lr": self.lr,
            "--lr-embeddings": self.lr_embeddings,
            "--processes": self.processes,
        }
        return super().numbers() | more

    def as_begun(self, config: dict[str, Any] | None) -> Self:
        """Returns the options with the choices that a run keeps from its beginning.

        Args:
            config: the configuration that the run began with; None for a new run.
        """
        if config is None:
            return self
        options = {field.name for field in dataclasses.fields(self) if field.init}
        kept = {
            name: config.get(name, before)
            for name, before in BEFORE_CHOICE.items()
            if name in options and getattr(self, name) in (None, "auto")
        }
        return dataclasses.replace(self, **kept)

    def as_run(self) -> dict[str, Any]:
        """Returns the options that define the run, equal on all processes, as JSON."""
        fields = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return {
            name: value for name, value in fields.items() if name not in PROCESS_FIELDS
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningOptions(RunOptions):
    """The options of fine-tuning on conversations, without the model and the data."""

    chat_template: Path | None = None
    """A file with a chat template (Jinja) that replaces the model's own. An export gets
    it too."""
    loss_on: str = "assistant"
    """Which tokens of a conversation have a loss. assistant: what the assistant writes,
    and its end of turn. all: every token. Completions are learned without their prompt,
    and texts completely."""
    too_long: str = "cut"
    """What to do with conversations of more than --seq + 1 tokens: cut off the end, or
    drop them."""
    epochs: float = 3.0
    """How often to go through --data, unless --steps is given."""
    steps: int = 0
    """Training steps. 0: the number that --epochs gives."""
    warmup: float = 0.03
    """The fraction of the steps in which the learning rates rise from 0. 0: begin at
    the peak."""
    seq: int = 1024
    """Tokens per row. Several conversations are packed into a row."""
    eval_every: int = 50
    """Steps between evaluations. There is always one after the last step."""
    date: str | None = None
    """The date for chat templates that ask for it, such as 2026-11-27. The default is
    the day on which the run began."""
    lora: int | None = None
    """Train LoRA adapters of this rank on the layers' kernels, with --optimizer adamw.
    All other weights stay as they are."""
    lora_alpha: float | None = None
    """With --lora: multiply the output of the adapters by alpha / rank. The default is
    twice the rank."""

    # These options of pre-training are not options here.
    tokenizer: None = dataclasses.field(init=False, default=None)
    vocab: None = dataclasses.field(init=False, default=None)
    text_field: str = dataclasses.field(init=False, default=FIELD)
    data_tokens: None = dataclasses.field(init=False, default=None)
    bos: str = dataclasses.field(init=False, default="auto")

    def __post_init__(self) -> None:
        if self.lora is not None:
            check_positive("--lora", self.lora)
            self._check_adapters()
        elif self.lora_alpha is not None:
            raise UsageError(
                f"--lora-alpha {self.lora_alpha} means nothing without --lora; give "
                "that too, or leave this out"
            )
        super().__post_init__()
        for flag, value, known in (
            ("--loss-on", self.loss_on, ("assistant", "all")),
            ("--too-long", self.too_long, ("cut", "drop")),
        ):
            if value not in known:
                raise unknown_name(flag, value, known)
        if not 0 <= self.warmup < 1:
            raise UsageError(
                f"--warmup {self.warmup} is out of range; give a share from 0 to below "
                "1"
            )
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise UsageError(
                    f"--date {self.date!r} is not a date; give one such as 2026-11-27"
                ) from error

    def _check_adapters(self) -> None:
        """Resolves --lora-alpha, and refuses the options of another step."""
        assert self.lora is not None
        alpha = 2.0 * self.lora if self.lora_alpha is None else self.lora_alpha
        object.__setattr__(self, "lora_alpha", alpha)
        for flag, given in (
            ("--layerwise", self.layerwise),
            ("--weights int8", self.weights == "int8"),
            (f"--offload {self.offload}", self.offload),
        ):
            if given:
                raise UsageError(
                    f"{flag} is for training all weights, and --lora {self.lora} "
                    "trains adapters alone; leave out one of the two"
                )

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.steps * self.warmup) if self.steps > 1 else 0

    def numbers(self) -> dict[str, float | None]:
        return super().numbers() | {
            "--steps": self.steps or None,
            "--epochs": self.epochs,
            "--lora-alpha": self.lora_alpha,
        }

    def as_begun(self, config: dict[str, Any] | None) -> Self:
        began = (config or {}).get("date") or datetime.date.today().isoformat()
        return dataclasses.replace(super().as_begun(config), date=self.date or began)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TuningOptions):
    """One run that trains an existing model further on conversations."""

    data: str = dataclasses.field()
    """A .jsonl or .parquet file, a folder or a quoted glob of such, or
    hf:OWNER/NAME[/CONFIG] from the hub. Rows have messages (each with role and
    content), or prompt and completion, or text."""
    validation: str | None = None
    """The same for held-out conversations. The default is one in twenty of --data."""
    init_from: str = dataclasses.field()
    """The model to start from, with its tokenizer and its chat template: a folder in
    Hugging Face's format, or OWNER/NAME[@REVISION] on the hub."""

    # The model is that of --init-from.
    model: None = dataclasses.field(init=False, default=None)


def check_positive(flag: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise UsageError(f"{flag} {value} is out of range; give a number above 0")


def check_not_empty(field: str, value: str | None) -> None:
    if value == "":
        flag = f"--{field.replace('_', '-')}"
        raise UsageError(f"{flag} is empty; give it a value, or leave it out")


def check_seed(flag: str, seed: int) -> None:
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"{flag} {seed} is out of range; give 0 to {LARGEST_SEED}")


def check_seeds(flag: str, seeds: Sequence[int]) -> None:
    if not seeds:
        raise UsageError(f"{flag} is empty; give one or more")
    for seed in seeds:
        check_seed(flag, seed)


def differing_fields(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Returns the differences of two configurations, as `field: theirs -> ours`.

    Changeable fields are left out. If a configuration is older than a field, the field
    counts as having its default. The same is true of fields of the model's shape.
    """
    ours, theirs = with_all_shape_fields(ours), with_all_shape_fields(theirs)
    defaults = {field.name: field.default for field in dataclasses.fields(RunOptions)}
    # Runs from before these options existed used these values.
    defaults |= {"rounding": "nearest"} | BEFORE_CHOICE
    ignored: set[str] = set(CHANGEABLE)
    if ours["corpus"] == theirs.get("corpus"):
        # The text of the same corpus may have moved.
        ignored.update(field.name for field in dataclasses.fields(TextOptions))
    pairs = {
        name: (theirs.get(name, defaults.get(name)), ours.get(name, defaults.get(name)))
        for name in ours | theirs
        if name not in ignored
    }
    return [
        f"{name}: {before} -> {now}"
        for name, (before, now) in pairs.items()
        if before != now
    ]


def with_all_shape_fields(run: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's description, with the defaults of newer fields of the shape."""
    if "model_config" not in run:
        return run
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(LlamaConfig)
        if field.default is not dataclasses.MISSING
    }
    return run | {"model_config": defaults | run["model_config"]}


PROCESS_FIELDS = frozenset(field.name for field in dataclasses.fields(ProcessOptions))
Options = TypeVar("Options")


def parse(options: type[Options], args: list[str] | None, prog: str) -> Options:
    """Returns a command line's options. If it is invalid, exits with status 2.

    Raises:
        UsageError: for a path that is the address of a bucket. The file system would
            take it for a folder of this machine, and lose it with the machine.
    """
    import tyro  # The import is here so that training from Python does not need it.

    parsed = tyro.cli(options, args=args, prog=prog)
    for name, path in vars(parsed).items():
        if isinstance(path, Path) and ADDRESS.match(str(path)):
            # `Path` has made one slash of two.
            address = str(path).replace(":/", "://", 1)
            raise UsageError(
                f"`{name}` {address} is an address, not a path; mount the bucket and "
                "give the folder where it is mounted"
            )
        if isinstance(path, Path):  # Shells leave the ~ of --out=~/runs alone.
            object.__setattr__(parsed, name, expanded(name, path))
    return parsed


def expanded(name: str, path: Path) -> Path:
    """Returns a path with the home folder in place of ~."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"`{name}` {path} is in the home folder of an unknown user; give another"
        ) from error
