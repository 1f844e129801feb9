"""Fine-tunes a model on conversations: all of its parameters, or LoRA adapters.

Run it with `python -m examples.llama.finetune --init-from DIR --data chat.jsonl --out
runs/tuned`.

The output folder has the same files as that of `pretrain`, and also best/, which has
the weights of the evaluation with the lowest loss.
"""

import dataclasses
import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax

from examples.llama.config import LlamaConfig
from examples.llama.evaluate import perplexity, rows_at_once
from examples.llama.hf import pretrained
from examples.llama.loop import Text
from examples.llama.mesh import batch_share
from examples.llama.options import FinetuneOptions, RunOptions, parse
from examples.llama.run import distributed
from examples.llama.run.checkpoint import loss_of_newest, steps_on_disk
from examples.llama.run.errors import (
    RESUME,
    UsageError,
    exit_on_usage_error,
    is_first,
    notice,
)
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.log import BEST
from examples.llama.run.result import RunResult
from examples.llama.sample import LENGTH
from examples.llama.text import loader
from examples.llama.text.chat import (
    ChatEncoder,
    Conversation,
    conversation_of,
    digest,
    open_conversations,
)
from examples.llama.text.packing import (
    Example,
    Fitted,
    Packed,
    evaluation_batches,
    fit,
)
from examples.llama.text.rows import Document
from examples.llama.text.split import TRAIN, VALIDATION, split
from examples.llama.text.template import TEMPLATE, find_template
from examples.llama.text.tokenizer import Encoder, load_tokenizer
from examples.llama.train import train

PROMPTS = 2  # The held-out conversations that samples answer.


class Conversations(NamedTuple):
    train: list[Conversation]
    held_out: list[Conversation]


def finetune(options: FinetuneOptions, stop: StopRequest) -> RunResult:
    """Runs one fine-tuning, or the rest of it; see `train`."""
    return train(options, stop, load_text, keep_best=True)


def load_text(
    options: RunOptions, config: LlamaConfig, mesh: jax.sharding.Mesh
) -> tuple[FinetuneOptions, Text]:
    """Returns the options with their steps, and the conversations packed into rows.

    Raises:
        UsageError: for conversations, a template or a tokenizer that can't be used.
    """
    assert isinstance(options, FinetuneOptions)
    encoder = load_tokenizer(str(options.init_from), config.vocab_size, "`init_from`")
    files = model_files(options)
    train_option = held_out_option = f"--data {options.data!r}"
    if options.validation:
        held_out_option = f"--validation {options.validation!r}"
    chat_encoders = [
        make_chat_encoder(options, option, encoder, files)
        for option in (train_option, held_out_option)
    ]
    conversations = read_conversations(options)
    train_set, held_out = (
        fitted(options, chat_encoder.examples(each), name)
        for chat_encoder, each, name in zip(
            chat_encoders, conversations, ("--data", "held-out"), strict=True
        )
    )
    chat_encoder = chat_encoders[1]  # Evaluations show held-out conversations.
    rows = packed_rows(options, train_set)
    options = with_steps(options, len(rows), conversations, train_set)
    share, shares = batch_share(mesh, options.batch)
    # A prompt is no longer than a row, which bounds the memory of a sample.
    longest_prompt = max(1, min(options.seq, config.longest_seq - LENGTH))
    text = Text(
        tokenizer=encoder.tokenizer,
        end_id=encoder.end_id,
        key=digest(train_set, held_out),
        tokens=len(rows) * options.seq,
        batches=loader.batches_of(
            rows,
            batch=options.batch,
            seed=options.seed,
            workers=options.workers,
            process_index=share,
            process_count=shares,
        ),
        held_out=evaluation_batches(
            Packed(held_out, options.seq + 1, seed=0),
            count=options.eval_windows,
            batch=rows_at_once(options),
        ),
        prompts={
            f"{each.question}\n> ": chat_encoder.prompt(each)[-longest_prompt:]
            for each in conversations.held_out[:PROMPTS]
        },
        stop_ids={encoder.end_id, *last_tokens(chat_encoder, held_out)},
        passed_on=files,
    )
    return options, text


def model_files(options: FinetuneOptions) -> dict[str, Path]:
    """Returns the files beside the model's weights, with --chat-template among them."""
    files = pretrained.find_files(None, options.init_from)
    if options.chat_template:
        files[TEMPLATE] = options.chat_template
    return files


def make_chat_encoder(
    options: FinetuneOptions, option: str, encoder: Encoder, files: dict[str, Path]
) -> ChatEncoder:
    """Returns the encoder of conversations; its errors begin with `option`."""
    assert options.date is not None
    end_token = encoder.tokenizer.id_to_token(encoder.end_id) or ""
    template = find_template(
        files, {"eos_token": end_token}, datetime.date.fromisoformat(options.date)
    )
    return ChatEncoder(
        option,
        encoder,
        template,
        learn_all=options.loss_on == "all",
    )


def read_conversations(options: FinetuneOptions) -> Conversations:
    """Returns the conversations to train on and those held out.

    The held-out ones are those of --validation, or else those of the data set, or else
    one in twenty.
    """
    source = open_conversations("--data", options.data)
    other = source.held_out()
    if options.validation:
        given = open_conversations("--validation", options.validation)
        # A data set on the hub may have held-out rows of its own.
        other = given.held_out() or given
    labelled: Iterable[tuple[str, Document]] = (
        split(source, options.data)
        if other is None
        else ((TRAIN, document) for document in source)
    )
    found: dict[str, list[Conversation]] = {TRAIN: [], VALIDATION: []}
    for label, document in labelled:
        found[label].append(conversation_of(document))
    if other is not None:
        found[VALIDATION] = [conversation_of(document) for document in other]
    return Conversations(found[TRAIN], found[VALIDATION])


def fitted(
    options: FinetuneOptions, examples: list[Example], name: str
) -> list[Example]:
    """Returns the examples that fit --seq, and prints what happened to the others."""
    row = options.seq + 1
    result: Fitted = fit(examples, row, cut=options.too_long == "cut")
    if result.cut or result.dropped:
        notice(
            f"{name}: of {len(examples):,} sequences, {result.cut:,} are cut to "
            f"{row:,} tokens and {result.dropped:,} are left out because they are too "
            "long or have nothing to learn in so many tokens; raise --seq to keep "
            "more, and choose with --too-long whether to cut or to drop them"
        )
    if not result.examples:
        raise UsageError(
            f"--seq {options.seq} leaves nothing to learn in the {name} conversations; "
            "raise it"
        )
    return result.examples


def packed_rows(options: FinetuneOptions, examples: list[Example]) -> Packed:
    """Returns the rows to train on; raises `UsageError` for fewer than --batch."""
    rows = Packed(examples, options.seq + 1, seed=options.seed)
    if len(rows) < options.batch:
        raise UsageError(
            f"--batch {options.batch} needs as many rows, and --data fills {len(rows)} "
            f"of --seq {options.seq}; lower one of them, or give more conversations"
        )
    return rows


def with_steps(
    options: FinetuneOptions,
    rows: int,
    conversations: Conversations,
    examples: list[Example],
) -> FinetuneOptions:
    """Returns the options with the steps for --epochs, and prints their number."""
    steps = options.steps or max(1, round(options.epochs * rows / options.batch))
    tokens = sum(example.tokens.size for example in examples)
    counted = sum(float(example.weights[1:].sum()) for example in examples)
    notice(
        f"{len(conversations.train):,} conversations and "
        f"{len(conversations.held_out):,} held out; {tokens:,} tokens, of which "
        f"{counted:,.0f} count in the loss, in {rows:,} rows of {options.seq:,}, "
        f"{tokens / rows / (options.seq + 1):.0%} full; {steps:,} steps of "
        f"{options.batch} rows are {steps * options.batch / rows:.3g} epochs"
    )
    return dataclasses.replace(options, steps=steps)


def last_tokens(encoder: ChatEncoder, examples: list[Example]) -> set[int]:
    """Returns the special tokens that end the learned parts, which are turns."""
    ends = {
        int(example.tokens[example.weights.nonzero()[0][-1]]) for example in examples
    }
    return ends & encoder.special_ids


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(FinetuneOptions, args, "python -m examples.llama.finetune")
        if args is None:
            distributed.start(options)
        with StopRequest() as stop:
            result = finetune(options, stop)
        if is_first():
            # After a run was continued, these may be the weights of another evaluation
            # than that with the lowest loss of all metrics.
            best = loss_of_newest(options.out, steps_on_disk(options.out, BEST))
            print(
                f"lowest held-out perplexity {perplexity(best or result.val_loss):.2f} "
                f"in {result.options.steps} steps; its weights are in "
                f"{options.out / BEST}, curves, metrics and checkpoints in "
                f"{options.out}"
            )

    exit_on_usage_error(command, after_interrupt=RESUME)


if __name__ == "__main__":
    main()
