import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from examples.llama.hf import pretrained
from examples.llama.run.errors import UsageError
from examples.llama.text.chat import (
    ChatEncoder,
    Conversation,
    conversation_of,
    open_conversations,
)
from examples.llama.text.packing import (
    Example,
    Packed,
    evaluation_batches,
    fit,
    pack,
)
from examples.llama.text.template import find_template
from examples.llama.text.tokenizer import load_tokenizer
from tests.examples.chat_models import (
    CHATML,
    TEMPLATES,
    THINKING,
    chat_tokenizer,
    write_tokenizer,
)

CHAT = (
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "Two: \N{GRINNING FACE}"},
    {"role": "user", "content": " And <b>&</b> twice that?\n"},
    {"role": "assistant", "content": "Four."},
)
ANSWERS = {
    "chatml": "Two: \N{GRINNING FACE}<|im_end|>Four.<|im_end|>",
    "llama-3": "Two: \N{GRINNING FACE}<|eot_id|>Four.<|eot_id|>",
    "mistral": " Two: \N{GRINNING FACE}</s> Four.</s>",
}
TODAY = datetime.date(2026, 11, 27)


def encoder_of(
    folder: Path,
    template: str | None = CHATML,
    *,
    learn_all: bool = False,
    trim_offsets: bool = False,
) -> ChatEncoder:
    write_tokenizer(folder, template)
    if trim_offsets:
        tokenizer = chat_tokenizer()
        tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
        tokenizer.save(str(folder / "tokenizer.json"))
    files = pretrained.find_files(str(folder), None)
    return ChatEncoder(
        "`data` 'x'",
        load_tokenizer(str(folder), 400),
        find_template(files, {}, TODAY),
        learn_all=learn_all,
    )


def decoded(encoder: ChatEncoder, tokens: Any) -> str:
    return encoder.chat_tokenizer.decode(list(tokens), skip_special_tokens=False)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
def test_tokens_are_those_of_transformers(
    name: str, system: bool, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = encoder_of(tmp_path, TEMPLATES[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    messages = (*({"role": "system", "content": "Be brief."},) * system, *CHAT)
    (example,) = encoder.examples([Conversation("x:1", messages)])
    expected = theirs.apply_chat_template(list(messages), return_dict=False)
    assert example.tokens.tolist() == expected
    prompt = theirs.apply_chat_template(
        list(messages[:-1]), add_generation_prompt=True, return_dict=False
    )
    assert encoder.prompt(Conversation("x:1", messages)) == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_tokens_count_in_the_loss(name: str, tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, TEMPLATES[name])
    (example,) = encoder.examples([Conversation("x:1", CHAT)])
    assert decoded(encoder, example.tokens[example.weights == 1]) == ANSWERS[name]
    (example,) = encoder_of(tmp_path, TEMPLATES[name], learn_all=True).examples(
        [Conversation("x:1", CHAT)]
    )
    assert example.weights.all()


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


REASONED = (
    said("user", "1?"),
    said("assistant", "<think>t1</think>One."),
    said("user", "2?"),
    said("assistant", "<think>t2</think>Two,"),
    said("tool", "yes"),
    said("assistant", "<think>t3</think>two."),
)


def test_an_answer_that_is_changed_later_ends_a_sequence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every answer counts once, after the very tokens that prompt the model for it."""
    encoder = encoder_of(tmp_path, THINKING)
    single = Conversation("x:1", REASONED[:2])
    examples = encoder.examples([single, Conversation("x:2", REASONED), single])
    assert "3 conversations become 4 sequences" in capsys.readouterr().err
    assert examples[3].tokens.tolist() == examples[0].tokens.tolist()
    # The two answers to the last question are in one sequence.
    counted = [decoded(encoder, each.tokens[each.weights == 1]) for each in examples]
    assert counted[1:3] == [
        "<think>t1</think>One.<|im_end|>",
        "<think>t2</think>Two,<|im_end|><think>t3</think>two.<|im_end|>",
    ]
    assert "t1" not in decoded(encoder, examples[2].tokens)
    for example, question, answers in ((examples[1], 0, 1), (examples[2], 2, 2)):
        starts = np.flatnonzero(np.diff(example.weights, prepend=0) == 1)
        assert len(starts) == answers
        prompt = encoder.prompt(Conversation("x:2", REASONED[: question + 1]))
        assert example.tokens[: starts[0]].tolist() == prompt


def test_what_follows_the_last_answer_is_no_sequence(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, THINKING)
    (example,) = encoder.examples([Conversation("x:1", REASONED[:3])])
    assert decoded(encoder, example.tokens).endswith("</think>One.<|im_end|>\n")


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_says_that_an_answer_shares_a_token_with_the_prompt(
    trim_offsets: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
        "{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    encoder = encoder_of(tmp_path, template, trim_offsets=trim_offsets)
    chat = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "ttt"})
    (example,) = encoder.examples([Conversation("x:1", chat)])
    # " t" is one token, so the answer begins with the second "t" of "ttt".
    assert decoded(encoder, example.tokens[example.weights == 1]) == "tt</s>"
    assert "1 answers begin in the middle of a token" in capsys.readouterr().err


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_says_that_a_completion_shares_a_token_with_the_prompt(
    trim_offsets: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Conversation("x:1", (), "What: ", "three \N{GRINNING FACE}"),
        Conversation("x:2", (), "What: ", "4"),
        Conversation("x:3", (), "What:", " three"),
    ]
    encoder = encoder_of(tmp_path, None, trim_offsets=trim_offsets)
    examples = encoder.examples(rows)
    # " t" is one token, and the space before "4" is a token of the prompt.
    assert [decoded(encoder, each.tokens[each.weights == 1]) for each in examples] == [
        "hree \N{GRINNING FACE}</s>",
        "4</s>",
        " three</s>",
    ]
    said = capsys.readouterr().err
    assert "1 answers begin in the middle of a token" in said
    assert "end the prompt without a space and begin the completion with it" in said
    encoder = encoder_of(tmp_path, None, learn_all=True, trim_offsets=trim_offsets)
    assert all(each.weights.all() for each in encoder.examples(rows))
    assert not capsys.readouterr().err


def test_prompts_completions_and_texts(tmp_path: Path) -> None:
    asked = Conversation("x:1", (), "What is 1?", " One. <|im_end|>")
    text = Conversation("x:2", (), "", "A text.")
    chat = Conversation("x:3", CHAT)
    encoder = encoder_of(tmp_path, None)
    examples = encoder.examples([text, asked])
    # The name of a special token in plain text is encoded letter by letter.
    assert [decoded(encoder, each.tokens) for each in examples] == [
        "A text.</s>",
        "What is 1? One. <|im_end|></s>",
    ]
    assert encoder.chat_tokenizer.token_to_id("<|im_end|>") not in examples[1].tokens
    assert examples[0].weights.all()
    counted = examples[1].tokens[examples[1].weights == 1]
    assert decoded(encoder, counted) == " One. <|im_end|></s>"
    assert encoder.prompt(text) == [encoder.chat_tokenizer.token_to_id("</s>")]
    assert decoded(encoder, encoder.prompt(asked)) == "What is 1?"
    with pytest.raises(UsageError, match=r"x:3: the model has no chat template"):
        encoder.examples([chat])
    # A template makes turns of a prompt and its completion. The order of the rows
    # stays the same.
    encoder = encoder_of(tmp_path)
    examples = encoder.examples([chat, asked, text])
    assert decoded(encoder, examples[1].tokens).endswith(
        "user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\n One. <|im_end|><|im_end|>\n"
    )
    assert decoded(encoder, examples[2].tokens) == "A text.</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ bos_token }}\n{% for m in %}", "line 2 of the chat template in .* is not"),
        (
            "\n\n{{ raise_exception('no') }}",
            r"'x': x:1: line 3 of the chat template in .*config.json fails on it \(no\)",
        ),
        ("{{ messages[0].nothing.more }}", "line 1 of the chat template"),
        (
            "{{ '<|channel|>' }}",
            r"writes '<\|channel\|>', which is no token of the tokenizer; add",
        ),
        (
            "{% for m in messages %}{{ m.content if loop.last }}{% endfor %}",
            "does not show which tokens are the assistant's: message 2 .* `loss_on` all",
        ),
        # A template can neither read files, nor run code, nor change the messages.
        ("{% include '/etc/passwd' %}", "fails on it"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "is unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "is unsafe"),
        ("{{ raise_exception.__globals__['json'] }}", "is unsafe"),
        ("{{ strftime_now.__self__.__reduce__() }}", "is unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "is unsafe"),
        ("{{ messages.append(1) }}", "fails on it"),
        ("{{ messages[0].update(role='x') }}", "is unsafe"),
        ("{{ range(10**9) | list }}", "Range too big"),
    ],
)
def test_rejects_templates(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        encoder_of(tmp_path, template).examples([Conversation("x:1", list(CHAT))])


def test_finds_the_template_among_the_files(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    files = {"tokenizer_config.json": config}

    def found() -> str | None:
        template = find_template(files, {"eos_token": "E"}, TODAY)
        return template and template.render(CHAT)

    several = [
        {"name": "tool_use", "template": "tools"},
        {
            "name": "default",
            "template": "{{ eos_token }}{{ strftime_now('%d %b %H') }}",
        },
    ]
    config.write_text(json.dumps({"chat_template": several}))
    assert found() == "E27 Nov 00"
    config.write_text(json.dumps({"chat_template": None}))
    assert found() is None
    config.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(UsageError, match="is int, not a string"):
        found()
    # The file overrides the field. `tojson` escapes neither HTML nor letters outside of
    # ASCII.
    files["chat_template.jinja"] = tmp_path / "chat_template.jinja"
    files["chat_template.jinja"].write_text(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ {'a': '<\N{LATIN SMALL LETTER E WITH ACUTE}>'} | tojson }}{% endfor %}"
    )
    assert found() == '{"a": "<\N{LATIN SMALL LETTER E WITH ACUTE}>"}'


def rows_of(folder: Path, *rows: Any) -> list[Conversation]:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
    return list(map(conversation_of, open_conversations("`data`", "chat.jsonl")))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [said("user", "a \ud83d"), said("assistant", "b")]},
        {"prompt": "a \ud83d", "completion": "b"},
        {"text": "a \ud83d"},
    ],
)
def test_half_a_character_becomes_a_question_mark(row: Any, folder: Path) -> None:
    (read,) = rows_of(folder, row)
    assert "a ?" in (*(message["content"] for message in read.messages), *read[2:])


def test_rows_of_all_kinds(folder: Path) -> None:
    rows = (
        {"messages": list(CHAT), "id": 3},
        {"prompt": "a", "completion": "b", "messages": None},
        {"text": "c"},
    )
    read = rows_of(folder, *rows)
    assert [each.place for each in read] == [f"chat.jsonl:{n}" for n in (1, 2, 3)]
    assert read[0].messages == list(CHAT)
    assert read[1][1:] == ((), "a", "b")
    assert read[2][1:] == ((), "", "c")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = ("messages", "prompt", "completion", "text", "id")
    table = [{name: row.get(name) for name in names} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(table), "chat.parquet")
    source = open_conversations("`data`", "chat.parquet")
    from_parquet = list(map(conversation_of, source))
    assert [each[1:] for each in from_parquet] == [each[1:] for each in read]
    assert from_parquet[1].place == "chat.parquet row 2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "chat.jsonl:2 is a list; give JSON objects with 'messages'"),
        ("{", "chat.jsonl:2 is not JSON"),
        ({"question": "?"}, "has none of 'messages', .* its fields are: question"),
        ({"prompt": "?"}, "has none of 'messages', .* its fields are: prompt"),
        ({"prompt": ["?"], "completion": ""}, "2: prompt is a list; give a string"),
        ({"text": 3}, "chat.jsonl:2: text is a int; give a string"),
        ({"messages": "hello"}, "messages is a str; give a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hello"]}, "message 1 is a str; give an object"),
        ({"messages": [CHAT[0], {"role": "assistant"}]}, "message 2 has no content"),
        ({"messages": [{"content": "?"}]}, "message 1 has no role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 1: content is a list; give a string",
        ),
        (
            {"messages": [{"role": "human", "content": "?"}]},
            "message 1 has the unknown role 'human'; give one of: system, developer,",
        ),
    ],
)
def test_rejects_rows(row: Any, message: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        rows_of(folder, {"text": "fine"}, row)


def test_rejects_messages_with_values_that_json_has_not(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    fine = {"role": "user", "content": "?"}
    timed = fine | {"extra": {"time": datetime.datetime(2026, 11, 27)}}
    rows = [{"messages": [fine]}, {"messages": [fine, timed]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), "chat.parquet")
    with pytest.raises(
        UsageError,
        match=r"`data` 'chat.parquet': chat.parquet row 2: message 2: extra cannot be "
        r"written as JSON \(.*datetime.*\); make it a string, or remove the field",
    ):
        list(open_conversations("`data`", "chat.parquet"))


def test_rejects_data_without_rows(folder: Path) -> None:
    (folder / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="a.txt is plain text, which has no rows"):
        list(open_conversations("`data`", "a.txt"))
    with pytest.raises(UsageError, match="`data` 'stdlib' does not exist; give a file"):
        open_conversations("`data`", "stdlib")


def test_rejects_conversations_with_nothing_to_learn(tmp_path: Path) -> None:
    asked = Conversation("x:7", CHAT[:1])
    with pytest.raises(UsageError, match="x:7: no message is the assistant's"):
        encoder_of(tmp_path).examples([asked])
    assert encoder_of(tmp_path, learn_all=True).examples([asked])


def test_packing() -> None:
    sizes = np.random.default_rng(0).integers(1, 20, 500).tolist()
    rows = pack(sizes, 24, seed=0)
    assert sorted(index for row in rows for index in row) == list(range(500))
    filled = [sum(sizes[index] for index in row) for row in rows]
    assert max(filled) <= 24
    assert sum(filled) / (24 * len(rows)) > 0.95
    assert rows == pack(sizes, 24, seed=0) != pack(sizes, 24, seed=1)


def test_rows_hold_examples_one_after_the_other() -> None:
    examples = [
        Example(np.full(size, size, np.int32), np.arange(size, dtype=np.float32))
        for size in (2, 3)
    ]
    packed = Packed(examples, 7, seed=1)
    (row,) = [packed[index] for index in range(len(packed))]
    first, second = (2, 3) if row.tokens[0] == 2 else (3, 2)
    assert row.tokens.tolist() == [first] * first + [second] * second + [0, 0]
    assert row.segments.tolist() == [1] * first + [2] * second + [0, 0]
    assert row.weights.tolist() == [*range(first), *range(second), 0, 0]
    held_out = evaluation_batches(packed, count=5, batch=2)
    assert [leaf.shape for leaf in held_out] == [(1, 2, 7)] * 3
    assert not held_out.segments[0, 1].any()  # Padding fills the batch.


def test_long_examples_are_cut_or_dropped() -> None:
    def example(*weights: float) -> Example:
        return Example(np.arange(len(weights), dtype=np.int32), np.array(weights))

    examples = [example(0, 1), example(0, 0, 0, 1), example(0, 1, 1, 1), example(1)]
    result = fit(examples, 3, cut=True)
    assert (result.cut, result.dropped) == (1, 2)
    assert [each.tokens.size for each in result.examples] == [2, 3]
    result = fit(examples, 3, cut=False)
    assert (result.cut, result.dropped) == (0, 3)


def test_a_data_set_with_splits(folder: Path) -> None:
    pytest.importorskip("datasets")
    (folder / "set").mkdir()
    for name, rows in {"train": 3, "validation": 1}.items():
        lines = [json.dumps({"messages": list(CHAT[:2])}) for _ in range(rows)]
        (folder / "set" / f"{name}.jsonl").write_text("\n".join(lines))
    source = open_conversations("`data`", f"hf:{folder}/set")
    read = list(map(conversation_of, source))
    assert [each.place for each in read] == [
        f"row {number} of split 'train'" for number in (1, 2, 3)
    ]
    assert read[0].messages == list(CHAT[:2])
    assert len(list(source.held_out() or ())) == 1
