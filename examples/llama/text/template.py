"""Chat templates: the Jinja in a model's folder that makes one text of a conversation.

They come with a model from anywhere, so they run in Jinja's sandbox, as in
transformers, whose environment this one agrees with.
"""

import datetime
import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from examples.llama.run.errors import UsageError, first_line
from examples.llama.text.decoding import DocumentError, decode, parse_json
from examples.llama.text.hub import SPECIAL_TOKENS_MAP, TEMPLATE, TOKENIZER_CONFIG
from examples.llama.text.tokenizer import special_token

DEFAULT = "default"  # The template that counts among several.
COMPILED = "<template>"  # The file of a template's code in a traceback.

Message = Mapping[str, Any]  # A message has a role and a content.


class GenerationBlock(jinja2.ext.Extension):
    """Reads `{% generation %}`, with which some templates mark what a model writes."""

    tags = {"generation"}  # noqa: RUF012 (Jinja reads it of the class.)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A template that is ready to be rendered.

    Args:
        where: the file that has the template, for errors.
        source: its text.
        tokens: special tokens by the names that templates know them by, as eos_token.
        today: the day whose midnight `strftime_now` formats. A run that is resumed on
            another day thus sees the same text.

    Raises:
        UsageError: if it is not valid Jinja.
    """

    def __init__(
        self, where: str, source: str, tokens: Mapping[str, str], today: datetime.date
    ) -> None:
        self.where, self.source = where, source
        self._tokens = dict(tokens)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, jinja2.ext.loopcontrols],
        )
        midnight = datetime.datetime.combine(today, datetime.time())
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = midnight.strftime
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"line {error.lineno} of the chat template in {where} is not Jinja "
                f"({first_line(error)}); mend it, or give `chat_template`"
            ) from error

    def render(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """Returns the text of a conversation.

        Args:
            messages: the conversation, or its first messages.
            answer: end with what precedes an answer of the assistant.

        Raises:
            DocumentError: where the template refuses the messages or fails.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=answer,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except Exception as error:  # A template can raise any, as a program can.
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == COMPILED]
            line = f"line {lines[-1]} of the" if lines else "the"
            raise DocumentError(
                f"{line} chat template in {self.where} fails on it "
                f"({first_line(error)}); change the messages, or give `chat_template`"
            ) from error


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter of this name escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def find_template(
    files: Mapping[str, Path], tokens: Mapping[str, str], today: datetime.date
) -> ChatTemplate | None:
    """Returns the chat template among a model's files, or None if it has none.

    Args:
        files: the files by their paths in the model's folder, as `pretrained` finds
            them.
        tokens: special tokens by name, which those that the files name override.
        today: see `ChatTemplate`.

    Raises:
        UsageError: where a file cannot be read or holds no template.
    """
    config = json_object(files.get(TOKENIZER_CONFIG))
    named = dict(tokens) | special_tokens(json_object(files.get(SPECIAL_TOKENS_MAP)))
    named |= special_tokens(config)
    if path := files.get(TEMPLATE):
        try:
            source = decode(path.read_bytes())
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the chat template {path} cannot be read ({first_line(error)}); give "
                "a readable text file with `chat_template`"
            ) from error
        return ChatTemplate(str(path), source, named, today)
    source = config.get("chat_template")
    if isinstance(source, list):
        by_name = {
            each.get("name"): each.get("template")
            for each in source
            if isinstance(each, dict)
        }
        source = by_name.get(DEFAULT)
    if source is None:
        return None
    where = str(files[TOKENIZER_CONFIG])
    if not isinstance(source, str):
        raise UsageError(
            f"the chat_template in {where} is {type(source).__name__}, not a string; "
            "mend it, or give `chat_template`"
        )
    return ChatTemplate(where, source, named, today)


def json_object(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = parse_json(decode(path.read_bytes()), str(path), "get it again")
    except (OSError, UnicodeDecodeError, DocumentError) as error:
        raise UsageError(
            f"{path} cannot be read ({first_line(error)}); get it again"
        ) from error
    return value if isinstance(value, dict) else {}


def special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Returns the fields that name a token, as bos_token, by their names."""
    names = [name for name in fields if name.endswith("_token")]
    found = {name: special_token(fields, name) for name in names}
    return {name: token for name, token in found.items() if isinstance(token, str)}
