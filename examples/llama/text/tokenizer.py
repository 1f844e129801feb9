"""Tokenizers: a byte-level BPE trained on the corpus, or one that is given."""

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from examples.llama.run.errors import UsageError, first_line
from examples.llama.text.decoding import DocumentError, decode, parse_json
from examples.llama.text.hub import (
    NAME_AND_REVISION,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    tokenizer_folder,
)
from examples.llama.text.hub import TOKENIZER as TOKENIZER_FILE

# It follows every document, so that no window mistakes one for its successor.
END = "<|end|>"
# What other tokenizers call it where no tokenizer_config.json says.
KNOWN_ENDS = (END, "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
SMALLEST_VOCAB = 256 + 1  # A token for each byte, and `END`.
# A BPE of 32,000 tokens for the data set `python`, so that no GPU waits for its
# training.
PYTHON_TOKENIZER = Path(__file__).parent / "tokenizers" / "python-32k.json"
PYTHON_VOCAB = 32_000


class Encoder(NamedTuple):
    """A tokenizer, and the ids of the tokens before and after every document."""

    tokenizer: tokenizers.Tokenizer
    end_id: int
    prefix: tuple[int, ...] = ()
    """What precedes a document: BOS, where the tokenizer itself puts one there."""

    def identity(self) -> tuple[Any, ...]:
        """Returns a value that determines the tokens of a text."""
        # Without a prefix it is what it was before there were prefixes, so that caches
        # from then are found.
        ids = (self.end_id, self.prefix) if self.prefix else (self.end_id,)
        return (self.tokenizer.to_str(), *ids)

    @property
    def vocab_size(self) -> int:
        """The largest id + 1, which exceeds the number of tokens if ids have gaps."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns each text's token ids (uint32, 1-D), from `prefix` to `end_id`."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array([*self.prefix, *encoding.ids, self.end_id], np.uint32)
            for encoding in encodings
        ]


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer in a file, set to encode text of any length and content.

    Raises:
        Exception: the Rust library's error for a file that is not a tokenizer.
    """
    tokenizer = tokenizers.Tokenizer.from_str(decode(path.read_bytes()))
    # Some files ask for these, which suit a batch for inference.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # The option makes the name of a special token ordinary text where a document quotes
    # it. (The option's own name is Rust's: encode the names of special tokens as text.)
    tokenizer.encode_special_tokens = True
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Encoder:
    """Returns a byte-level BPE, which can spell any text without an unknown token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return Encoder(tokenizer, tokenizer.get_vocab()[END])


def load_tokenizer(name: str, vocab_size: int, option: str = "`tokenizer`") -> Encoder:
    """Returns the tokenizer of this name, after checking that it fits the model.

    Args:
        name: path of a tokenizer.json, a folder with one, or the name of a model on the
            hub.
        vocab_size: the size of the model's vocabulary.
        option: the name in errors of the option that gave `name`.

    Raises:
        UsageError: if there is no such tokenizer, if it does not fit the model, or if
            it has no token for the end of a text.
    """
    path, source = tokenizer_path(name, option), f"{option} {name!r}"
    try:
        tokenizer = read_tokenizer(path)
    except Exception as error:  # The library raises nothing more specific.
        raise UsageError(
            f"{source}: {path} is no tokenizer ({first_line(error)}); "
            f"give a {TOKENIZER_FILE} in the format of Hugging Face's tokenizers"
        ) from error
    end_id = find_end(source, tokenizer, path.parent)
    encoder = Encoder(tokenizer, end_id, find_prefix(tokenizer, end_id))
    if encoder.vocab_size > vocab_size:
        raise UsageError(
            f"{source} has {encoder.vocab_size} tokens and the model's vocabulary is "
            f"{vocab_size}; give a smaller tokenizer, or a model with a larger "
            "vocabulary"
        )
    return encoder


def tokenizer_path(name: str, option: str = "`tokenizer`") -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        folder = path
    elif (
        re.fullmatch(rf"([\w.-]+/)?{NAME_AND_REVISION}", name)
        and path.suffix != ".json"
    ):
        folder = tokenizer_folder(name, option)
    else:
        raise UsageError(
            f"{option} {name!r} does not exist; give a {TOKENIZER_FILE}, a folder "
            "with one, or OWNER/NAME[@REVISION] of a model on the hub"
        )
    if not (folder / TOKENIZER_FILE).exists():
        raise UsageError(
            f"{option} {name!r} has no {TOKENIZER_FILE}; write one with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return folder / TOKENIZER_FILE


def find_end(source: str, tokenizer: tokenizers.Tokenizer, folder: Path) -> int:
    """Returns the id of the token that ends a text.

    A file in the folder names it, or else it is a known one. Errors begin with
    `source`.
    """
    configs = [folder / name for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)]
    tokens = {config: eos_token(source, config) for config in configs}
    config = next((each for each in configs if tokens[each] is not None), configs[0])
    named = tokens[config]
    for token in KNOWN_ENDS if named is None else [named]:
        if (end_id := tokenizer.token_to_id(token)) is not None:
            return end_id
    if named is not None:
        raise UsageError(
            f"{source} has no token {named!r}, "
            f"the eos_token of {config}; correct one of them"
        )
    raise UsageError(
        f"{source} has none of {', '.join(KNOWN_ENDS)} to end a document "
        f'with; name its own in {config}: {{"eos_token": "..."}}'
    )


def find_prefix(tokenizer: tokenizers.Tokenizer, end_id: int) -> tuple[int, ...]:
    """Returns the ids that the tokenizer itself puts before a text: BOS, if any.

    Its post-processor decides, as in transformers. From version 5 on, transformers does
    not read `add_bos_token` of tokenizer_config.json if there is a tokenizer.json.
    """
    encoding = tokenizer.encode("a")
    pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    prefix = (token for token, _ in itertools.takewhile(lambda pair: pair[1], pairs))
    # A BOS that is also the end token is between two documents already.
    return tuple(token for token in prefix if token != end_id)


def eos_token(source: str, config: Path) -> str | None:
    """Returns the end-of-text token that a model's file names, if any."""
    if not config.exists():
        return None
    try:
        fields: Any = parse_json(decode(config.read_bytes()), str(config), "mend it")
        token = special_token(fields, "eos_token")
        if fields.get("eos_token") is not None and not isinstance(token, str):
            raise ValueError(f"its eos_token is {fields['eos_token']!r}")
        return token
    except (OSError, ValueError, DocumentError, AttributeError) as error:
        raise UsageError(
            f"{source}: {config} holds no JSON object of a tokenizer "
            f"({type(error).__name__}: {first_line(error)}); get it again, or remove it"
        ) from error


def special_token(fields: Mapping[str, Any], name: str) -> Any:
    """Returns a token of a model's file, whether a string or an AddedToken."""
    token = fields.get(name)
    return token.get("content") if isinstance(token, dict) else token
