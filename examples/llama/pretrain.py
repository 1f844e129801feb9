"""Pre-trains one model.

Run it with `python -m examples.llama.pretrain --out runs/one --optimizer apollo-mini`.

Writes config.json, metrics.jsonl, tensorboard/, curves.png and checkpoints/ to the
output folder.
"""

import math

import jax

from examples.llama.config import LlamaConfig
from examples.llama.evaluate import MOST_ROWS, perplexity, rows_at_once
from examples.llama.hf import pretrained
from examples.llama.loop import Text
from examples.llama.mesh import batch_share
from examples.llama.model import Batch
from examples.llama.options import RunOptions, parse
from examples.llama.run import distributed, setup
from examples.llama.run.errors import RESUME, exit_on_usage_error, is_first, notice
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.result import RunResult
from examples.llama.text import loader
from examples.llama.text.windows import token_count, validation_batches
from examples.llama.train import train


def pretrain(
    options: RunOptions, stop: StopRequest, *, measure_updates: bool = False
) -> RunResult:
    """Runs one pre-training, or the rest of it; see `train`."""
    return train(options, stop, load_text, measure_updates=measure_updates)


def load_text(
    options: RunOptions, config: LlamaConfig, mesh: jax.sharding.Mesh
) -> tuple[RunOptions, Text]:
    """Returns the options and the text of --data and --validation in windows."""
    text = setup.load_corpus(options, config)
    share, shares = batch_share(mesh, options.batch)
    batches = loader.train_loader(
        text.train,
        seq=options.seq,
        batch=options.batch,
        seed=options.seed,
        workers=options.workers,
        process_index=share,
        process_count=shares,
    )
    held_out = validation_batches(
        text.validation, seq=options.seq, count=options.eval_windows, batch=MOST_ROWS
    )
    are_fewer = len(held_out) < options.eval_windows // MOST_ROWS
    # A small text has fewer windows than the default, which needs no notice.
    if are_fewer and options.eval_windows > RunOptions.eval_windows:
        notice(
            f"evaluations take {len(held_out) * MOST_ROWS} windows instead of "
            f"`eval_windows` {options.eval_windows}, because the held-out text has no "
            "more"
        )
    # The windows are the same for any batch, so the rows must divide their number.
    rows = math.gcd(rows_at_once(options), len(held_out) * MOST_ROWS)
    held_out = held_out.reshape(-1, rows, options.seq + 1)
    # A sample is the start of a document.
    start_id = text.prefix[-1] if text.prefix else text.end_id
    return options, Text(
        tokenizer=text.tokenizer,
        end_id=text.end_id,
        key=text.key,
        tokens=token_count(text.train),
        batches=batches,
        held_out=Batch(held_out),
        prompts={"": [start_id]},
        stop_ids=[text.end_id],
        passed_on=pretrained.find_files(options.tokenizer, options.init_from),
    )


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(RunOptions, args, "python -m examples.llama.pretrain")
        if args is None:
            # Only the command line starts the processes. A caller in Python may have
            # used JAX already, and starts them itself.
            distributed.start(options)
        with StopRequest() as stop:
            result = pretrain(options, stop)
        if is_first():
            print(
                f"best validation perplexity {perplexity(result.val_loss):.2f} in "
                f"{options.steps} steps; curves, metrics and checkpoints in "
                f"{options.out}"
            )

    exit_on_usage_error(command, after_interrupt=RESUME)


if __name__ == "__main__":
    main()
