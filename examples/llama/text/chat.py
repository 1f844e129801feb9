"""Conversations to fine-tune on, rendered by a chat template and tokenised.

A row has `messages`, each with a role and a content, or `prompt` and `completion`, or
`text`. To find the assistant's tokens, a conversation is rendered up to a turn of the
assistant and up to the end of that turn. The text in between is the assistant's. Some
templates render a turn differently once another turn follows, for example without its
reasoning. Such a turn gets a sequence of its own, in the form in which the model must
write it.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tqdm import tqdm

from examples.llama.run.errors import UsageError, notice
from examples.llama.text.decoding import DocumentError
from examples.llama.text.formats import read_rows
from examples.llama.text.hub import PREFIX, HubSource
from examples.llama.text.packing import Example
from examples.llama.text.readers import named_by_text
from examples.llama.text.rows import Document, Row
from examples.llama.text.sources import (
    FileSource,
    Source,
    chosen,
    find_files,
    no_files,
)
from examples.llama.text.template import ChatTemplate, Message
from examples.llama.text.tokenizer import Encoder

MESSAGES, PROMPT, COMPLETION, TEXT = "messages", "prompt", "completion", "text"
FIELDS = (MESSAGES, PROMPT, COMPLETION, TEXT)
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
ENCODED_AT_ONCE = 256  # Conversations.
# Text of this form in a template, such as <|im_start|>, must name a special token.
# Text of other forms need not: [INST] is ordinary text to Llama 2.
TOKEN_NAME = re.compile(r"<\|[^\s|<>{}]+\|>")

Span = tuple[int, int]  # The first character, and the one after the last.


class Written(NamedTuple):
    """What a template writes, and the parts of it to learn."""

    text: str
    spans: list[Span]


class Conversation(NamedTuple):
    """One row. It has messages, or a completion after a prompt, which may be empty."""

    place: str  # The file and line, for errors.
    messages: Sequence[Message] = ()
    prompt: str = ""
    completion: str = ""

    @property
    def question(self) -> str:
        """What the user said last, or the prompt."""
        said = (m["content"] for m in reversed(self.messages) if m["role"] == "user")
        return next(said, self.prompt)


def open_conversations(option: str, data: str) -> Source:
    """Returns the conversations that `data` names; errors say that `option` gave it.

    It is a file, a folder or a glob of rows, or a data set of the hub, as
    `sources.open_source` says. A document's text is a conversation as JSON.

    Raises:
        UsageError: where there is no such source, or a file has no rows.
    """
    if data.startswith(PREFIX):
        return HubSource.parse(option, data, MESSAGES, conversation_documents)
    if files := find_files(data):
        return FileSource(
            option, data, chosen(option, data, files), read_conversations, MESSAGES
        )
    raise no_files(option, data)


def read_conversations(name: str, path: Path, field: str) -> Iterator[Document]:
    yield from conversation_documents(read_rows(path, FIELDS), field)


def conversation_documents(rows: Iterable[Row], field: str) -> Iterator[Document]:
    """Yields the conversation of each row as JSON; raises `DocumentError`."""
    for row in rows:
        fields = conversation_fields(row)
        # The place is no part of the name, so that rows may move between files.
        name = named_by_text(json.dumps(fields)).name
        # JSON can spell half a character (a lone surrogate), which no tokenizer takes.
        text = json.dumps(fields, ensure_ascii=False).encode(errors="replace")
        found = {"place": row.place, **json.loads(text)}
        yield Document(name, json.dumps(found, ensure_ascii=False))


def conversation_fields(row: Row) -> dict[str, Any]:
    """Returns a row's messages, or its prompt and completion.

    Raises:
        DocumentError: for a row that has neither, or a field of another type.
    """
    if not isinstance(row.value, Mapping):
        raise DocumentError(
            f"{row.place} is a {type(row.value).__name__}; give JSON objects with "
            f"{MESSAGES!r}, with {PROMPT!r} and {COMPLETION!r}, or with {TEXT!r}"
        )
    fields = {
        name: row.value[name] for name in FIELDS if row.value.get(name) is not None
    }
    if MESSAGES in fields:
        return {MESSAGES: checked_messages(row.place, fields[MESSAGES])}
    for names in ((PROMPT, COMPLETION), (TEXT,)):
        if all(name in fields for name in names):
            for name in names:
                if not isinstance(fields[name], str):
                    raise wrong_type(f"{row.place}: {name}", fields[name], "a string")
            return {
                PROMPT: fields.get(PROMPT, "") if len(names) == 2 else "",
                COMPLETION: fields[names[-1]],
            }
    raise DocumentError(
        f"{row.place} has none of {MESSAGES!r}, {PROMPT!r} with {COMPLETION!r}, and "
        f"{TEXT!r}; its fields are: {', '.join(map(str, row.value)) or 'none'}; rename "
        "them"
    )


def checked_messages(place: str, messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise wrong_type(f"{place}: {MESSAGES}", messages, "a list")
    if not messages:
        raise DocumentError(f"{place}: {MESSAGES} is empty; remove the row")
    found = []
    for number, message in enumerate(messages, 1):
        where = f"{place}: message {number}"
        if not isinstance(message, Mapping):
            raise wrong_type(where, message, "an object with role and content")
        # Parquet has a null for a field that only other messages have.
        message = {name: x for name, x in message.items() if x is not None}
        for name in ("role", "content"):
            if name not in message:
                raise DocumentError(f"{where} has no {name}; add it, or remove the row")
            if not isinstance(message[name], str):
                raise wrong_type(f"{where}: {name}", message[name], "a string")
        if message["role"] not in ROLES:
            raise DocumentError(
                f"{where} has the unknown role {message['role']!r}; give one of: "
                f"{', '.join(ROLES)}"
            )
        for name, value in message.items():
            try:
                json.dumps(value)
            except TypeError as error:
                # Parquet has values that JSON has not, such as times and bytes.
                raise DocumentError(
                    f"{where}: {name} cannot be written as JSON ({error}); make it a "
                    "string, or remove the field"
                ) from error
        found.append(message)
    return found


def wrong_type(what: str, value: object, expected: str) -> DocumentError:
    return DocumentError(f"{what} is a {type(value).__name__}; give {expected}")


def conversation_of(document: Document) -> Conversation:
    return Conversation(**json.loads(document.text))


class ChatEncoder:
    """Turns conversations into tokens and their weights as targets.

    Args:
        option: what errors call the option that names the conversations, and its value.
        encoder: the model's tokenizer. Names of its special tokens are ordinary text in
            rows without messages, and special tokens in what the template writes.
        template: the model's chat template, if it has one.
        learn_all: give every token the weight 1; else the assistant's, those of a
            completion, and all of a text.
    """

    def __init__(
        self,
        option: str,
        encoder: Encoder,
        template: ChatTemplate | None,
        *,
        learn_all: bool,
    ) -> None:
        self._option, self._encoder, self._template = option, encoder, template
        self._learn_all = learn_all
        self._joined = 0  # The answers that share their first token with what precedes.
        self._plain_tokenizer = with_whole_spans(encoder.tokenizer)
        self._plain_tokenizer.encode_special_tokens = True
        self.chat_tokenizer = with_whole_spans(encoder.tokenizer)
        self.chat_tokenizer.encode_special_tokens = False
        known = self.chat_tokenizer.get_vocab(with_added_tokens=True)
        names = TOKEN_NAME.findall(template.source) if template else ()
        self._unknown = sorted({name for name in names if name not in known})
        added = encoder.tokenizer.get_added_tokens_decoder()
        special = {number: token for number, token in added.items() if token.special}
        self.special_ids = frozenset(special)
        self._ends = tuple(token.content for token in special.values())

    def examples(self, conversations: Iterable[Conversation]) -> list[Example]:
        """Returns the conversations as tokens, in their order.

        A conversation becomes several examples if the template writes a turn of the
        assistant differently once another turn follows.

        Raises:
            UsageError: if the template does not take a conversation, or does not show
                which part of it is the assistant's.
        """
        found: list[Example] = []
        count = 0
        bar = tqdm(unit="row", desc="tokenising", delay=2, disable=None)
        with bar:
            rows = iter(conversations)
            while chunk := list(itertools.islice(rows, ENCODED_AT_ONCE)):
                found.extend(self._encoded(chunk))
                count += len(chunk)
                bar.update(len(chunk))
        if len(found) > count:
            notice(
                f"{self._option}: {count:,} conversations become {len(found):,} "
                "sequences, because the chat template changes answers that others "
                "follow; each such answer ends a sequence"
            )
        if self._joined:
            notice(
                f"{self._option}: {self._joined:,} answers begin in the middle of a "
                "token, which does not count in the loss; a chat template should end "
                "the text before an answer with a special token or a line feed; in "
                "rows without a template, end the prompt without a space and begin the "
                "completion with it"
            )
            self._joined = 0
        return found

    def prompt(self, conversation: Conversation) -> list[int]:
        """Returns the tokens up to what the user said last, for a sample to answer."""
        if messages := self._messages(conversation):
            # The last answer, and what follows it, is left out.
            users = [k for k, m in enumerate(messages) if m["role"] == "user"]
            asked = messages[: users[-1] + 1] if users else messages[:1]
            text = self._rendered(conversation, asked, answer=True)
            return self.chat_tokenizer.encode(text, add_special_tokens=False).ids
        ids = self._encoder.tokenizer.encode(
            conversation.prompt, add_special_tokens=False
        ).ids
        # A text begins as one does that follows another.
        return [*self._encoder.prefix, *ids] or [self._encoder.end_id]

    def _encoded(self, conversations: Sequence[Conversation]) -> list[Example]:
        plain = [each for each in conversations if not self._messages(each)]
        chats = [each for each in conversations if self._messages(each)]
        written = [self._written(chat) for chat in chats]
        encodings = iter(
            self.chat_tokenizer.encode_batch(
                [each.text for parts in written for each in parts],
                add_special_tokens=False,
            )
        )
        of_chats = (
            [self._chat_example(next(encodings), each.spans) for each in parts]
            for parts in written
        )
        of_plain = zip(
            self._plain_tokenizer.encode_batch(
                [each.prompt + each.completion for each in plain],
                add_special_tokens=False,
            ),
            [len(each.prompt) for each in plain],
            strict=True,
        )
        plain_examples = ([self._plain_example(*each)] for each in of_plain)
        return [
            example
            for each in conversations
            for example in next(of_chats if self._messages(each) else plain_examples)
        ]

    def _messages(self, conversation: Conversation) -> Sequence[Message]:
        """Returns what the template is to write out, if there is one for it."""
        if conversation.messages or self._template is None or not conversation.prompt:
            return conversation.messages
        return (
            {"role": "user", "content": conversation.prompt},
            {"role": ASSISTANT, "content": conversation.completion},
        )

    def _written(self, conversation: Conversation) -> list[Written]:
        """Returns the sequences of a conversation, after checking their tokens."""
        sequences = self._sequences(conversation)
        for name in self._unknown:
            if any(name in each.text for each in sequences):
                raise self._error(
                    conversation,
                    f"the chat template in {self._where} writes {name!r}, which is no "
                    "token of the tokenizer; add it there, or give a `chat_template` "
                    "with tokens that it has",
                )
        return sequences

    def _sequences(self, conversation: Conversation) -> list[Written]:
        messages = self._messages(conversation)
        text = self._rendered(conversation, messages)
        if self._learn_all:
            return [Written(text, [(0, len(text))])]
        found = [Written(text, [])]
        for turn, span in reversed(self._turns(conversation, messages)):
            # A template may change a turn that others follow. The model does not write
            # it in that form, so it gets a sequence that ends with it.
            if not found[-1].text.startswith(turn):
                found.append(Written(turn, []))
            found[-1].spans.append(span)
        return [each for each in reversed(found) if each.spans]

    def _turns(
        self, conversation: Conversation, messages: Sequence[Message]
    ) -> list[tuple[str, Span]]:
        """Returns the text up to the end of each turn of the assistant, and its span.

        A span includes the end-of-turn token.
        """
        turns = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._rendered(conversation, messages[:number], answer=True)
            turn = self._rendered(conversation, messages[: number + 1])
            if not turn.startswith(before):
                raise self._error(
                    conversation,
                    f"the chat template in {self._where} does not show which tokens "
                    f"are the assistant's: message {number + 1} does not begin where "
                    "its prompt ends; give `loss_on` all, or another `chat_template`",
                )
            # What follows an end-of-turn token, such as a line feed, is no answer.
            bare = turn.rstrip()
            end = len(bare) if bare.endswith(self._ends) else len(turn)
            turns.append((turn, (len(before), end)))
        if not turns:
            raise self._error(
                conversation,
                "no message is the assistant's, so there is nothing to learn; remove "
                "the row, or give `loss_on` all",
            )
        return turns

    @property
    def _where(self) -> str:
        assert self._template is not None
        return self._template.where

    def _rendered(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        *,
        answer: bool = False,
    ) -> str:
        if self._template is None:
            raise self._error(
                conversation,
                "the model has no chat template to write out messages with "
                "(chat_template.jinja, or chat_template in tokenizer_config.json); "
                "give `chat_template`, or rows with prompt and completion",
            )
        try:
            return self._template.render(messages, answer=answer)
        except DocumentError as error:
            raise self._error(conversation, str(error)) from error

    def _chat_example(
        self, encoding: tokenizers.Encoding, spans: Sequence[Span]
    ) -> Example:
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        ends = np.array([end for _, end in encoding.offsets], np.int64)
        counts = np.zeros(starts.size, bool)
        for first, end in spans:
            counts |= (first <= starts) & (starts < end)
            self._joined += bool(np.any((starts < first) & (first < ends)))
        return Example(np.array(encoding.ids, np.int32), counts.astype(np.float32))

    def _plain_example(
        self, encoding: tokenizers.Encoding, prompt_size: int
    ) -> Example:
        prefix = self._encoder.prefix
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        ends = np.array([end for _, end in encoding.offsets], np.int64)
        counts = (starts >= prompt_size) | self._learn_all
        self._joined += bool(np.any(~counts & (prompt_size < ends)))
        tokens = [*prefix, *encoding.ids, self._encoder.end_id]
        return Example(
            np.array(tokens, np.int32),
            np.array([*[1] * len(prefix), *counts, 1], np.float32),
        )

    def _error(self, conversation: Conversation, message: str) -> UsageError:
        return UsageError(f"{self._option}: {conversation.place}: {message}")


def with_whole_spans(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns a copy in which the span of a token includes the token's spaces."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    # The post-processor of some tokenizers trims spaces off the spans, so that a token
    # with the last space of a prompt would seem to begin in the answer. It is not
    # needed for anything else, since its special tokens are not added.
    copy.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    return copy


def digest(*parts: Sequence[Example]) -> str:
    """Returns a string that changes when tokens or weights do."""
    found = hashlib.sha256()
    for examples in parts:
        found.update(len(examples).to_bytes(8, "big"))
        for example in examples:
            found.update(example.tokens.size.to_bytes(8, "big"))
            found.update(example.tokens.tobytes())
            found.update(example.weights.tobytes())
    return found.hexdigest()[:16]
