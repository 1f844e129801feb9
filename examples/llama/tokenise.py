"""Tokenises text ahead of a run.

Run it with `python -m examples.llama.tokenise --model 1b --data ...`.

A run does it by itself at the first use of a text, before its first step. Where that
takes hours, do it on a machine without accelerators that shares the cache
(XDG_CACHE_HOME).
"""

import dataclasses
from pathlib import Path

from examples.llama.config import preset
from examples.llama.options import TextOptions, parse
from examples.llama.run.errors import UsageError, exit_on_usage_error
from examples.llama.text import corpus
from examples.llama.text.hub import PREFIX
from examples.llama.text.windows import token_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokeniseOptions(TextOptions):
    """Tokenises a text. Give the run the same options, including --data-tokens."""

    model: str = "tiny"
    """The run's --model. A tokenizer that is trained here has as many tokens as the
    model's vocabulary."""
    save_tokenizer: Path | None = None
    """Also write the tokenizer to this .json, for the --tokenizer of other texts."""


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(TokeniseOptions, args, "python -m examples.llama.tokenise")
        path = options.save_tokenizer
        if path is not None and (path.suffix != ".json" or path.is_dir()):
            raise UsageError(
                f"--save-tokenizer {path} is not a .json file; give the name of one"
            )
        if options.data.startswith(PREFIX) and options.data_tokens is None:
            raise UsageError(
                f"`data` {options.data} may have no end, and a run takes a part of it; "
                "give `data_tokens`, and give the run the same"
            )
        text = corpus.load_corpus(
            options.data,
            vocab_size=preset(options.model).vocab_size,
            tokenizer=options.tokenizer,
            vocab=options.vocab,
            max_tokens=options.data_tokens,
            validation=options.validation,
            text_field=options.text_field,
            bos=options.bos,
        )
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            text.tokenizer.save(str(path), pretty=False)
        print(
            f"{token_count(text.train):,} training and "
            f"{token_count(text.validation):,} validation tokens of "
            f"{text.tokenizer.get_vocab_size():,} kinds, ready for runs"
        )

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()
