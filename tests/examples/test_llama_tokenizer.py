import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tokenizers

from examples.llama.run.errors import UsageError
from examples.llama.text import tokenizer

TEXTS = [
    "def spam(x):\n    return x + 1\n" * 5,
    "grüße from the spam factory, spam spam\n" * 3,
]
SPECIAL = "<|end_of_text|>"


def write_tokenizer(folder: Path, *specials: str, **config: object) -> Path:
    """Writes a BPE with special tokens to a model's folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = tokenizer.train_tokenizer(TEXTS, 300).tokenizer
    fields = json.loads(trained.to_str())
    fields["added_tokens"] = []
    fields["model"]["vocab"] = {"spam!": 0} | {
        name: number for name, number in fields["model"]["vocab"].items() if number
    }
    given = tokenizers.Tokenizer.from_str(json.dumps(fields))
    given.add_special_tokens(list(specials))
    given.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_trained_tokenizer_spells_any_text() -> None:
    encoder = tokenizer.train_tokenizer(TEXTS, 300)
    trained, end_id = encoder.tokenizer, encoder.end_id
    text = "def spam(x):\n\treturn 'grüße 🚀' + x  # two  spaces\r\n"
    assert trained.decode(trained.encode(text).ids) == text
    assert trained.get_vocab_size() <= 300
    assert trained.id_to_token(end_id) == "<|end|>"


def test_encoded_texts_end_with_the_end_token_and_only_there() -> None:
    encoder = tokenizer.train_tokenizer(TEXTS, 300)
    texts = ["spam", "", "a <|end|> that is quoted"]
    rows = encoder.encode(texts)
    assert [row[-1] for row in rows] == [encoder.end_id] * 3
    assert all(encoder.end_id not in row[:-1] for row in rows)
    assert [encoder.tokenizer.decode(row[:-1].tolist()) for row in rows] == texts


def test_given_tokenizer_encodes_whole_texts_and_adds_only_bos(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, SPECIAL, "<s>")
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = f"spam{SPECIAL} " * 20
    # A tokenizer for inference may have these settings.
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    raw.save(str(folder / "tokenizer.json"))
    encoder = tokenizer.load_tokenizer(str(folder), 400)
    (row,) = encoder.encode([text])
    assert row[0] == raw.token_to_id("<s>")
    assert (
        encoder.tokenizer.decode(row[1:-1].tolist(), skip_special_tokens=False) == text
    )
    assert row.tolist().count(encoder.end_id) == 1


def test_file_and_folder_name_the_same_tokenizer(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, SPECIAL)
    from_file = tokenizer.load_tokenizer(str(folder / "tokenizer.json"), 400)
    from_folder = tokenizer.load_tokenizer(str(folder), 400)
    assert from_file.tokenizer.to_str() == from_folder.tokenizer.to_str()
    assert from_file.end_id == from_folder.end_id


@pytest.mark.parametrize(
    ("specials", "config", "end"),
    [
        (["</s>", "<|eot|>"], {"eos_token": "<|eot|>"}, "<|eot|>"),
        (
            ["</s>", "<|eot|>"],
            {"eos_token": {"content": "<|eot|>", "lstrip": False}},
            "<|eot|>",
        ),
        (["</s>", "<|eot|>"], {"eos_token": None}, "</s>"),
        (["<s>", "</s>"], {}, "</s>"),
        (["<eos>", "<|end_of_text|>"], {}, "<|end_of_text|>"),
    ],
)
def test_end_token(
    tmp_path: Path, specials: list[str], config: dict[str, object], end: str
) -> None:
    encoder = tokenizer.load_tokenizer(
        str(write_tokenizer(tmp_path, *specials, **config)), 400
    )
    assert encoder.tokenizer.id_to_token(encoder.end_id) == end


def test_the_end_token_of_the_special_tokens_map(tmp_path: Path) -> None:
    """Tokenizers of older models name it there alone."""
    folder = write_tokenizer(tmp_path, "</s>", "<|eot|>")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|eot|>"}')
    encoder = tokenizer.load_tokenizer(str(folder), 400)
    assert encoder.tokenizer.id_to_token(encoder.end_id) == "<|eot|>"
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    encoder = tokenizer.load_tokenizer(str(folder), 400)
    assert encoder.tokenizer.id_to_token(encoder.end_id) == "</s>"
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<none>"}')
    message = r"has no token '<none>', the eos_token of .*special_tokens_map\.json"
    with pytest.raises(UsageError, match=message):
        tokenizer.load_tokenizer(str(folder), 400)


def printed(code: str, environment: dict[str, str]) -> str:
    """Returns what a program prints that begins with these variables."""
    command = [sys.executable, "-c", code]
    return subprocess.check_output(command, env=environment, text=True)


def test_hub_tokenizer_is_read_from_the_cache_without_a_network(tmp_path: Path) -> None:
    cached = tmp_path / "models--meta-llama--Llama-3.2-1B"
    commit = "4e20de362430cd3b72f300e6b0f18e50e7166e08"
    write_tokenizer(
        cached / "snapshots" / commit, SPECIAL, "<|eot_id|>", eos_token="<|eot_id|>"
    )
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = """
from examples.llama.text import tokenizer
from examples.llama.run.errors import UsageError
encoder = tokenizer.load_tokenizer("meta-llama/Llama-3.2-1B", 400)
print(encoder.tokenizer.id_to_token(encoder.end_id))
try:
    tokenizer.load_tokenizer("meta-llama/Llama-9", 400)
except UsageError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    end, refusal = printed(code, environment).splitlines()
    assert end == "<|eot_id|>"
    assert refusal.startswith(
        "`tokenizer` 'meta-llama/Llama-9' is no file or folder here, nor to be had from"
    )
    assert "check the name, the network" in refusal


class Refusing(http.server.BaseHTTPRequestHandler):
    """A proxy that lets nobody out."""

    def do_CONNECT(self) -> None:
        self.send_error(403)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_network_without_the_hub_is_an_error_of_one_line(tmp_path: Path) -> None:
    code = """
from examples.llama.text import tokenizer
from examples.llama.run.errors import UsageError
try:
    tokenizer.load_tokenizer("meta-llama/Llama-9", 400, "`init_from`")
except UsageError as error:
    print(error)
"""
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.server_port}"
        environment = os.environ | {
            "HF_HUB_CACHE": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "HTTPS_PROXY": address,
            "https_proxy": address,
            "NO_PROXY": "",
            "no_proxy": "",
        }
        refusal = printed(code, environment)
        proxy.shutdown()
    assert refusal.startswith("`init_from` 'meta-llama/Llama-9' is no file or")
    assert "check the name, the network" in refusal


def test_rejects_a_larger_vocabulary_than_the_models(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, SPECIAL)
    size = tokenizer.load_tokenizer(str(folder), 400).vocab_size
    assert tokenizer.load_tokenizer(str(folder), size).end_id == size - 1
    message = f"has {size} tokens and the model's vocabulary is {size - 1}; give a smaller tokenizer, or"
    with pytest.raises(UsageError, match=message):
        tokenizer.load_tokenizer(str(folder), size - 1)


def test_ids_with_gaps_count_by_the_largest(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, SPECIAL)
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["model"]["vocab"]["spam!"] = 900
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(
        UsageError, match="has 901 tokens and the model's vocabulary is 400"
    ):
        tokenizer.load_tokenizer(str(folder), 400)


def test_rejects_missing_tokenizers(tmp_path: Path) -> None:
    for name in (str(tmp_path / "tokenizer.json"), "my.json", "a/b/c"):
        with pytest.raises(
            UsageError,
            match=f"`tokenizer` '{name}' does not exist; give a tokenizer.json",
        ):
            tokenizer.load_tokenizer(name, 400)
    with pytest.raises(
        UsageError, match="has no tokenizer.json; write one with transformers"
    ):
        tokenizer.load_tokenizer(str(tmp_path), 400)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": 1}'])
def test_rejects_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        UsageError, match=r"`tokenizer` .*tokenizer.json is no tokenizer \(.*\); give a"
    ):
        tokenizer.load_tokenizer(str(tmp_path), 400)


def test_rejects_bad_end_tokens(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, "<fin>")
    with pytest.raises(
        UsageError,
        match=r"has none of <\|end\|>, .* to end a document with; name its own in",
    ):
        tokenizer.load_tokenizer(str(folder), 400)
    config = folder / "tokenizer_config.json"
    config.write_text('{"eos_token": "</s>"}')
    with pytest.raises(
        UsageError,
        match="has no token '</s>', the eos_token of .*; correct one of them",
    ):
        tokenizer.load_tokenizer(str(folder), 400)
    for content in ("{", "[]", '{"eos_token": {}}', '{"eos_token": 2}'):
        config.write_text(content)
        with pytest.raises(
            UsageError,
            match="tokenizer_config.json holds no JSON object of a tokenizer",
        ):
            tokenizer.load_tokenizer(str(folder), 400)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    folder = write_tokenizer(tmp_path, "</s>", "<fin>", eos_token="<fin>")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (folder / name).read_text()
        (folder / name).write_text(content, encoding)
    encoder = tokenizer.load_tokenizer(str(folder), 400)
    assert encoder.tokenizer.id_to_token(encoder.end_id) == "<fin>"
    (folder / "tokenizer_config.json").write_text('{"n": ' + "1" * 5000 + "}")
    with pytest.raises(UsageError, match="a number of more than 4300 digits"):
        tokenizer.load_tokenizer(str(folder), 400)


# Tokens before a document.


def with_post_processor(folder: Path, single: str, *tokens: str) -> None:
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[(name, raw.token_to_id(name)) for name in tokens]
    )
    # Llama 3's tokenizer.json has this form.
    byte_level = tokenizers.processors.ByteLevel(trim_offsets=False)
    raw.post_processor = tokenizers.processors.Sequence([byte_level, template])
    raw.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("single", "prefix"),
    [
        ("<s> $A", ["<s>"]),
        ("<s> $A </s>", ["<s>"]),
        ("$A </s>", []),
        ("$A", []),
        ("<a> <s> $A", ["<a>", "<s>"]),
        # A token that both begins and ends texts stands once between two texts.
        ("</s> $A", []),
    ],
)
def test_documents_begin_with_the_tokens_that_the_tokenizer_adds(
    tmp_path: Path, single: str, prefix: list[str]
) -> None:
    folder = write_tokenizer(tmp_path, "<s>", "</s>", "<a>", eos_token="</s>")
    names = [name for name in ("<s>", "</s>", "<a>") if name in single]
    with_post_processor(folder, single, *names)
    encoder = tokenizer.load_tokenizer(str(folder), 400)
    assert [encoder.tokenizer.id_to_token(token) for token in encoder.prefix] == prefix
    plain = encoder.tokenizer.encode("spam", add_special_tokens=False).ids
    expected = [*encoder.prefix, *plain, encoder.end_id]
    assert [row.tolist() for row in encoder.encode(["spam"] * 2)] == [expected] * 2


@pytest.mark.parametrize("single", ["<s> $A", "$A"])
@pytest.mark.parametrize("add_bos", [True, False, None])
def test_bos_is_where_transformers_puts_it(
    tmp_path: Path, single: str, add_bos: bool | None
) -> None:
    pytest.importorskip("transformers", reason="needs transformers, to compare with")
    from transformers import AutoTokenizer

    fields: dict[str, object] = {"eos_token": "</s>", "bos_token": "<s>"}
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if add_bos is not None:
        fields["add_bos_token"] = add_bos
    folder = write_tokenizer(tmp_path, "<s>", "</s>", **fields)
    with_post_processor(folder, single, *["<s>"] * ("<s>" in single))
    encoder = tokenizer.load_tokenizer(str(folder), 400)
    theirs = AutoTokenizer.from_pretrained(folder)("spam")["input_ids"]
    assert encoder.encode(["spam"])[0].tolist() == [*theirs, encoder.end_id]
