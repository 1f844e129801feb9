"""Fine-tuning by each optimizer: what a model learns of a new text, and what it keeps.

Run it with `python -m benchmarks.finetune_quality`. It pre-trains the tiny LLaMA on the
source of Python's standard library, then fine-tunes it on the documentation of the
installed packages: with each optimizer, at five learning rates and with each seed. All
parameters are trained, except in the rows of LoRA. For each optimizer's best rate the
table has the perplexity on held-out documentation, the perplexity on held-out source,
the optimizer's state and the peak of the compiled step's memory. Runs that have ended
are not run again, so the same command continues an interrupted series.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.run_records import runs_made_with
from examples.llama import export
from examples.llama.evaluate import make_evaluator, perplexity
from examples.llama.finetune import finetune, load_text
from examples.llama.hf.config import read_config
from examples.llama.hf.weights import load_params
from examples.llama.memory.target import memory_of
from examples.llama.mesh import make_mesh
from examples.llama.model import Batch, Execution, pieces_of
from examples.llama.optimizers import recipes
from examples.llama.options import FinetuneOptions, RunOptions, check_seeds, parse
from examples.llama.pretrain import pretrain
from examples.llama.run.errors import UsageError, check_names, exit_on_usage_error
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.recorder import DivergedError
from examples.llama.run.setup import load_corpus, model_config
from examples.llama.text.sources import package_docs
from examples.llama.text.windows import validation_batches

# The options that set each contender apart.
CONTENDERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "apollo": {"optimizer": "apollo"},
    "apollo-mini": {"optimizer": "apollo-mini"},
    "apollo-zero": {"optimizer": "apollo-zero"},
    "racs": {"optimizer": "racs"},
    "lora-8": {"optimizer": "adamw", "lora": 8},
}
# The rates that are tried are these multiples of the pre-training rates. The default
# rates of a fine-tuning are lower, because they are for larger models.
MULTIPLES = (1 / 8, 1 / 4, 1 / 2, 1, 2)
SEQ, BATCH = 128, 8
# A passage has about as many characters as a row has tokens for.
PASSAGE_CHARACTERS = 200
HEAD = (
    "way",
    "lr",
    "new text, ppl",
    "±",
    "over adamw, by seed",
    "old text, ppl",
    "±",
    "state, MB",
    "peak, MB",
    "new text, ppl of the mean loss by lr",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneQualityOptions:
    """Each optimizer at the best of five rates, fine-tuning one pre-trained model."""

    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Any of adamw, apollo, apollo-mini, apollo-zero, racs and lora-8; adamw is always
    among them."""
    base_steps: int = 800
    """Steps of the pre-training, of 1,024 tokens each."""
    steps: int = 200
    """Steps of each fine-tuning, of 1,024 tokens each."""
    seeds: tuple[int, ...] = (0, 1)
    """A run each at every rate; a seed sets the order of the text and projections."""
    out: Path = Path("runs/finetune-quality")
    """Folder for the runs."""

    def __post_init__(self) -> None:
        check_names("--contenders", self.contenders, CONTENDERS)
        for flag, value in (("--steps", self.steps), ("--base-steps", self.base_steps)):
            if value < 1:
                raise UsageError(f"{flag} {value} is out of range; give 1 or more")
        check_seeds("--seeds", self.seeds)


# The rate of the kernels and that of embeddings, head and norms, which LoRA does not
# train.
Rates = tuple[float, float | None]


class Losses(NamedTuple):
    """Losses in nats per token of the weights that are best on the new text."""

    new: float
    old: float


DIVERGED = Losses(math.inf, math.inf)


def base_run(options: FinetuneQualityOptions) -> RunOptions:
    """Returns the pre-training whose model all fine-tunings start from."""
    return RunOptions(out=options.out / "base", steps=options.base_steps, resume="auto")


def write_base(options: FinetuneQualityOptions, stop: StopRequest) -> None:
    """Makes the model to start from, if it is missing."""
    run, folder = base_run(options), options.out / "model"
    pretrain(run, stop)
    if not folder.exists():
        export.export(export.ExportOptions(run=run.out, to=folder))


def write_passages(path: Path) -> None:
    """Writes the documentation of installed packages, a passage per line, in JSON."""
    if path.exists():
        return
    rows = [
        json.dumps({"text": passage})
        for document in package_docs()
        for passage in passages(document.text)
    ]
    # A run that was stopped while it writes leaves no file that looks whole.
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("\n".join(rows) + "\n", encoding="utf-8")
    unfinished.replace(path)


def passages(text: str, characters: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Yields whole paragraphs of a document, joined to about so many characters."""
    joined = ""
    for paragraph in text.strip().split("\n\n"):
        joined = f"{joined}\n\n{paragraph}" if joined else paragraph
        if len(joined) >= characters:
            yield joined
            joined = ""
    if joined:
        yield joined


def rates_of(name: str) -> list[Rates]:
    """Returns the pairs of rates to try."""
    recipe = recipes.RECIPES[CONTENDERS[name]["optimizer"]]
    if "lora" in CONTENDERS[name]:
        factor = recipes.LORA_FACTOR
        return [
            (rounded(factor * multiple * recipe.lr), None) for multiple in MULTIPLES
        ]
    return [
        (rounded(multiple * recipe.lr), multiple * recipe.lr_embeddings)
        for multiple in MULTIPLES
    ]


def rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def run_of(
    options: FinetuneQualityOptions, name: str, rates: Rates, seed: int
) -> FinetuneOptions:
    lr, lr_embeddings = rates
    return FinetuneOptions(
        out=options.out / f"{name}-{lr:g}-seed{seed}",
        init_from=str(options.out / "model"),
        data=str(options.out / "passages.jsonl"),
        steps=options.steps,
        seq=SEQ,
        batch=BATCH,
        weights="float32",
        lr=lr,
        lr_embeddings=lr_embeddings,
        seed=seed,
        resume="auto",
        **CONTENDERS[name],
    )


def losses_of(
    options: FinetuneQualityOptions, run: FinetuneOptions, stop: StopRequest
) -> Losses:
    """Fine-tunes, or reads a run that has ended, and evaluates on the old text."""
    try:
        new = finetune(run, stop).val_loss
    except DivergedError:
        return DIVERGED
    exported = run.out / "exported"
    if not exported.exists():
        merge = run.lora is not None
        export.export(
            export.ExportOptions(run=run.out, to=exported, best=True, merge=merge)
        )
    return Losses(new, old_loss(options, exported))


def old_loss(options: FinetuneQualityOptions, folder: Path) -> float:
    """Returns the loss of an exported model on the held-out text of the base run."""
    base = base_run(options)
    corpus = load_corpus(base, model_config(base))
    held_out = validation_batches(
        corpus.validation, seq=base.seq, count=base.eval_windows
    )
    config = read_config(folder)
    params = load_params(folder, config, "float32")
    return make_evaluator(pieces_of(config, Execution()), Batch(held_out))(params)


def losses_before(options: FinetuneQualityOptions) -> Losses:
    """Returns the losses of the model that the fine-tunings start from."""
    run = run_of(options, "adamw", rates_of("adamw")[0], options.seeds[0])
    run = run.as_begun(None)
    config = model_config(run)
    _, text = load_text(run, config, make_mesh(run.mesh))
    params = load_params(options.out / "model", config, "float32")
    evaluate = make_evaluator(pieces_of(config, Execution()), text.held_out)
    return Losses(evaluate(params), old_loss(options, options.out / "model"))


class Found(NamedTuple):
    """The losses of a contender: by pair of rates, each with one per seed."""

    by_rates: dict[Rates, list[Losses]]
    state_bytes: int
    peak_bytes: int

    def best(self) -> Rates:
        """Returns the rates with the lowest mean loss on the new text."""
        return min(self.by_rates, key=lambda rates: mean_loss(self.by_rates[rates]))


def mean_loss(losses: list[Losses]) -> float:
    return statistics.mean(each.new for each in losses)


def found_of(options: FinetuneQualityOptions, name: str, stop: StopRequest) -> Found:
    by_rates = {
        rates: [
            losses_of(options, run_of(options, name, rates, seed), stop)
            for seed in options.seeds
        ]
        for rates in rates_of(name)
    }
    run = run_of(options, name, rates_of(name)[0], options.seeds[0])
    config = model_config(run)
    memory = memory_of(recipes.with_defaults(run, config), "cpu")
    return Found(by_rates, memory.optimizer_bytes, memory.peak_bytes)


def table(found: dict[str, Found], before: Losses) -> str:
    """Returns a row for the model before, and one per contender at its best rate."""
    of_adamw = found["adamw"]
    references = [perplexity(each.new) for each in of_adamw.by_rates[of_adamw.best()]]

    def row(name: str) -> tuple[str, ...]:
        rates = found[name].best()
        losses = found[name].by_rates[rates]
        columns = [
            [perplexity(loss) for loss in column]
            for column in zip(*losses, strict=True)
        ]
        (new, new_spread), (old, old_spread) = (
            (statistics.mean(x), report.spread(x)) for x in columns
        )
        return (
            name,
            f"{rates[0]:g}",
            f"{new:.2f}",
            new_spread,
            ", ".join(
                f"{ours / reference - 1:+.1%}"
                for ours, reference in zip(columns[0], references, strict=True)
            ),
            f"{old:.2f}",
            old_spread,
            f"{found[name].state_bytes / 1e6:.2f}",
            f"{found[name].peak_bytes / 1e6:.1f}",
            ", ".join(
                f"{lr:g}: {perplexity(mean_loss(losses)):.2f}"
                for (lr, _), losses in found[name].by_rates.items()
            ),
        )

    new, old = (f"{perplexity(loss):.2f}" for loss in before)
    untuned = ("before", "", new, "", "", old, *[""] * 4)
    return report.markdown(HEAD, [untuned, *map(row, found)], 1)


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(
            FinetuneQualityOptions, args, "python -m benchmarks.finetune_quality"
        )
        names = tuple(dict.fromkeys(("adamw", *options.contenders)))
        with StopRequest() as stop:
            write_base(options, stop)
            write_passages(options.out / "passages.jsonl")
            found = {name: found_of(options, name, stop) for name in names}
        before = losses_before(options)
        folders = [
            run_of(options, name, rates, seed).out
            for name in names
            for rates in found[name].by_rates
            for seed in options.seeds
        ]
        seeds = ", ".join(map(str, options.seeds))
        print(
            f"tiny, {options.base_steps} steps on stdlib, then {options.steps} steps "
            f"of {BATCH * SEQ:,} tokens on package-docs; seeds {seeds}\n"
            f"{runs_made_with(folders)}\n\n{table(found, before)}"
        )

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
