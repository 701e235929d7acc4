"""Reading prompt files, every way they can be wrong, and what a tokenizer makes of them."""

import gzip
import io
import json
import random
import sys
from pathlib import Path

import jinja2
import pytest
from transformers import AutoTokenizer

from profiles.builtin import BUILTIN_FOLDER
from profiles.prompts import reader, rows, tokenize
from profiles.prompts.reader import Request
from profiles.records.core import Prompt
from profiles.records.errors import PromptError
from tests.support import tiny


class Letters:
    """A tokenizer with one token per character; its template writes `role:content;` and opens `>`."""

    def __init__(self, *, chat_template: str | None = "letters") -> None:
        self.chat_template = chat_template

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, **options: object) -> object:
        assert (options["add_generation_prompt"], options["return_dict"]) == (True, False)
        if conversation[0]["role"] == "refused":
            raise jinja2.TemplateError("roles must\nalternate")
        text = "".join(f"{message['role']}:{message['content']};" for message in conversation) + ">"
        return [ord(character) for character in text] if tokenize else text


def text_of(prompt: Prompt) -> str:
    return "".join(map(chr, prompt.token_ids))


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refusal(source: str) -> str:
    """The one line that reading `source` is refused with."""
    with pytest.raises(PromptError) as caught:
        reader.read(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "hi"}, (("user", "hi"),)),
        ({"text": "hi"}, "hi"),
        ({"turns": ["hi", "and then"]}, (("user", "hi"),)),
        (
            {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]},
            (("system", "be brief"), ("user", "hi")),
        ),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, (("user", "hi"),)),
        ({"messages": None, "text": "hi", "other": 1}, "hi"),
        ({"prompt": "hi", "messages": [{"role": "user", "content": "first wins"}]}, (("user", "first wins"),)),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            },
            (("user", "a"), ("assistant", "b"), ("user", "c")),
        ),
    ],
)
def test_every_known_field_is_read(tmp_path: Path, row: object, messages: object) -> None:
    """Each row shape becomes the messages or the raw text it means."""
    (request,) = reader.read(write(tmp_path / "set.jsonl", row))
    assert request == Request(messages=messages, domain="set")  # type: ignore[arg-type]


def test_the_domain_comes_from_caller_row_or_file(tmp_path: Path) -> None:
    """The caller's label wins over the row's `domain` or `category`, which win over the file's stem."""
    rows = [{"text": "a", "domain": "law"}, {"text": "b", "category": "maths"}, {"text": "c", "domain": None}]
    source = write(tmp_path / "stem.jsonl", *rows)
    assert [request.domain for request in reader.read(source)] == ["law", "maths", "stem"]
    assert [request.domain for request in reader.read(source, domain="all")] == ["all", "all", "all"]
    assert [request.domain for request in reader.read(source, domain=" all ")] == ["all", "all", "all"]
    for empty in ("", "  "):
        with pytest.raises(PromptError, match=r"^domain '': a name is needed$"):
            reader.read(source, domain=empty)


# Spec-Bench, questions 375, 239, 455, 117 and 125 (hemingkx/Spec-Bench, Apache-2.0)
SPEC_BENCH = r"""
{"question_id": 375, "category": "qa", "turns": ["What is the meaning of cc and bcc?"]}
{"question_id": 239, "category": "translation", "turns": ["Translate German to English: Lesen auch unbekannte Menschen die E-Mails mit ?"]}
{"question_id": 455, "category": "math_reasoning", "turns": ["Jack had $100. Sophia gave him 1/5 of her $100. How many dollars does Jack have now?"]}
{"question_id": 117, "category": "math", "turns": ["How many integers are in the solution of the inequality |x + 5| < 10", "What about |x + 10| < 5"]}
{"question_id": 125, "category": "coding", "turns": ["Write a function to find the highest common ancestor (not LCA) of two nodes in a binary tree.", "What if it is not a binary tree?"]}
"""  # noqa: E501


def test_spec_bench_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Of each question the first turn is asked, under its category; the caller's domain goes before it."""
    path = tmp_path / "question.jsonl"
    path.write_text(SPEC_BENCH, encoding="utf-8")
    found = reader.read(str(path))
    assert [request.domain for request in found] == ["qa", "translation", "math_reasoning", "math", "coding"]
    assert found[3].messages == (("user", "How many integers are in the solution of the inequality |x + 5| < 10"),)
    assert {request.domain for request in reader.read(str(path), domain="spec")} == {"spec"}
    assert tokenize(found, Letters(), 1000)[1] == []


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (b'\n  {"text": "a", "domain": "law"}\n{"prompt": "b"}\n', [("a", "law"), ((("user", "b"),), "stdin")]),
        (b'\xef\xbb\xbf{"text": "a"}', [("a", "stdin")]),
        (b"one\n---\ntwo {\n", [((("user", "one"),), "stdin"), ((("user", "two {"),), "stdin")]),
        (b'["a", {"text": "b"}]', [((("user", "a"),), "stdin"), ("b", "stdin")]),
        (b"[INST] a [/INST]", [((("user", "[INST] a [/INST]"),), "stdin")]),
    ],
)
def test_a_dash_reads_standard_input(
    monkeypatch: pytest.MonkeyPatch, content: bytes, asked: list[tuple[object, str]]
) -> None:
    """JSON lines and arrays are recognised, everything else is plain text."""
    pipe(monkeypatch, content)
    assert [(request.messages, request.domain) for request in reader.read("-")] == asked
    pipe(monkeypatch, content)
    assert {request.domain for request in reader.read("-", domain="mine")} == {"mine"}


def test_a_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert refusal("-") == "prompts from standard input: it is closed; pipe a file into it or name one"


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("set.txt", b"one\n\nstill one\n", ["one\n\nstill one"]),
        ("set.txt", b"one\n---\ntwo --- two\n---\n\n", ["one", "two --- two"]),
        ("set.jsonl", '\ufeff{"text": "a\u2028b"}\r\n\n  \n{"text": "c"}'.encode(), ["a\u2028b", "c"]),
        ("set.jsonl", b'{"prompt": "a"}\n{"prompt": "a\0b"}\n{"prompt": "b"}', ["a", "b"]),
        ("set.jsonl", b'\0{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "b"}', ["a", "b"]),
        ("set.json", b'[\n  {"text": "a"},\n  {"prompt": "b"}\n]', ["a", "b"]),
        ("set.json", json.dumps([{"text": "x" * 700}] * 4000).encode(), ["x" * 700] * 4000),
    ],
    ids=range(7),
)
def test_a_file_is_cut_into_rows(tmp_path: Path, name: str, content: bytes, texts: list[str]) -> None:
    """Only a line of dashes ends a text, and only a line feed a row; the mark of Windows is skipped.

    A NUL spoils its row alone.
    """
    (tmp_path / name).write_bytes(content)
    assert [request.text for request in reader.read(str(tmp_path / name))] == texts


def test_built_in_sets_are_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One set by its name, or all of them in name order, each its own domain."""
    monkeypatch.setattr(reader, "PROMPTS_FOLDER", tmp_path)
    write(tmp_path / "prose.jsonl", {"text": "p"})
    write(tmp_path / "code.jsonl", {"text": "c"})
    assert [request.domain for request in reader.read("builtin:prose")] == ["prose"]
    assert [request.domain for request in reader.read("builtin:all")] == ["code", "prose"]
    allowed = "allowed are builtin:code, builtin:prose, builtin:all"
    assert refusal("builtin:poem") == f"prompts 'builtin:poem': no built-in set of that name; {allowed}"
    assert allowed in refusal("builtin:../prose")
    monkeypatch.setattr(reader, "PROMPTS_FOLDER", tmp_path / "none")
    assert "no set is installed" in refusal("builtin:all")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a"', "not JSON"),
        ('{"text": NaN1}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ('["a"]', "['a'] is not an object with one of the fields messages, conversations, turns, prompt, text"),
        ('{"question": "a"}', "fields 'question'; one of messages, conversations, turns, prompt, text is needed"),
        ("{}", "fields none"),
        ('{"text": 7}', "field 'text': 7 is not text"),
        ('{"prompt": ["a"]}', "field 'prompt': ['a'] is not text"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "of type 'image_url' is not text"),
        ('{"turns": "a"}', "'a' is not a list of one text or more"),
        ('{"turns": []}', "[] is not a list of one text or more"),
        ('{"turns": [1]}', "1 is not text"),
        ('{"messages": "a"}', "'a' is not a list of messages"),
        ('{"messages": []}', "nothing is asked in it"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing is asked in it"),
        ('{"messages": [{"content": "a"}]}', "message 1: {'content': 'a'} has no 'role' or 'from'"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1: None is not text"),
        ('{"conversations": [{"from": "alien", "value": "a"}]}', "sender 'alien'; allowed are human, user"),
        ('{"text": ""}', "field 'text': an empty prompt"),
        ('{"messages": [{"role": "user", "content": " "}]}', "an empty prompt"),
        ('{"text": "\\ud800"}', "not valid Unicode at character 0"),
    ],
)
def test_a_bad_line_is_skipped_and_named(tmp_path: Path, line: str, words: str) -> None:
    """The rest of the file is used; the report has the file, the line's number and what is wrong with it."""
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    requests = reader.read(str(path))
    assert [request.messages for request in requests] == ["good"]
    (message,) = requests.skipped
    assert message.startswith(f"prompts {str(path)!r}: 1 of 2 rows cannot be used and were skipped: line 2: ")
    assert words in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    path.write_text('{"text": "good"}\n' + 5 * (line + "\n"))
    message = refusal(str(path))
    assert message.startswith(f"prompts {str(path)!r}: 5 of 6 rows cannot be used: line 2: ")
    assert message.endswith("; and 2 more")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", "holds no prompts"),
        ("blank.jsonl", b"\n \n", "holds no prompts"),
        ("empty.txt", b"", "holds no prompts"),
        ("dashes.txt", b"---\n---\n", "holds no prompts"),
        ("empty.json", b"", "holds no prompts"),
        ("none.json", b"[]", "holds no prompts"),
        ("latin.txt", b"a\ncaf\xe9", "line 2: byte 0xe9 is not UTF-8"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "line 1: byte 0xe9 is not UTF-8"),
        ("row.json", b"[3, {}]", "2 of 2 rows cannot be used: row 1: 3 is not an object"),
        ("cut.json", b'[{"text": "a"', "line 1: not JSON"),
        ("set.jsonl", '{"text": "a"}'.encode("utf-16"), "is not UTF-8 text; unpack it, or save it as UTF-8"),
        ("set.jsonl", random.Random(0).randbytes(9000), "is not UTF-8 text"),
        ("set.jsonl", gzip.compress(b"a", mtime=0), "is not UTF-8 text; unpack it"),
        ("set", b" \n", "holds no prompts"),
        ("set.csv", b"a,b", "the ending '.csv' is unknown; allowed are .jsonl, .json, .txt"),
        ("set", b"a", "the ending '' is unknown"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    """The message has the file and what is wrong with it."""
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(str(path))
    assert message.startswith(f"prompts {str(path)!r}")
    assert words in message


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file and a directory do not end in a traceback, and a device without end is not read for ever."""
    assert "No such file or directory; allowed are readable files, builtin:NAME and -" in refusal(str(tmp_path / "no"))
    assert "a directory; name a file" in refusal(str(tmp_path))
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    monkeypatch.setattr(rows, "_MAX_BYTES", 2 << 20)
    assert "more than 2 MiB" in refusal(str(tmp_path / "zero.jsonl"))


def test_messages_go_through_the_template_and_text_does_not() -> None:
    """Without a template the contents of messages are joined by blank lines."""
    chat = Request(messages=(("system", "s"), ("user", "u")), domain="a")
    raw = Request(messages="raw", domain="b")
    found, warnings = tokenize([chat, raw], Letters(), 100)
    assert [(prompt.domain, text_of(prompt)) for prompt in found] == [("a", "system:s;user:u;>"), ("b", "raw")]
    assert warnings == []
    found, _ = tokenize([chat], Letters(chat_template=None), 100)
    assert text_of(found[0]) == "s\n\nu"


def test_a_long_prompt_loses_its_middle() -> None:
    """The template's head and end stay, and a warning counts the prompts that were cut."""
    requests = [Request(messages=(("user", "abcdef"),), domain="a"), Request(messages="ok", domain="a")]
    found, warnings = tokenize(requests, Letters(), 4)
    assert [text_of(prompt) for prompt in found] == ["us;>", "ok"]
    assert warnings == ["1 of 2 prompts were cut in their middle, to 4 tokens"]


def test_repeats_are_dropped_and_counted() -> None:
    """Prompts that read the same, also only after cutting, are kept once, under their first domain."""
    requests = [Request(messages=text, domain=domain) for text, domain in (("XaaY", "a"), ("XbbY", "b"), ("XY", "c"))]
    found, warnings = tokenize(requests, Letters(), 2)
    assert [(prompt.domain, text_of(prompt)) for prompt in found] == [("a", "XY")]
    assert warnings[1] == "2 of 3 prompts repeat another one and were dropped"


def test_the_built_in_prompts_are_read_without_a_warning() -> None:
    """All 144 that ship, with the tokenizer that ships."""
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_FOLDER / "target")
    requests = reader.read("builtin:all")
    found, warnings = tokenize(requests, tokenizer, 1000)
    assert len(found) == len(requests) == 144
    assert warnings == []


@pytest.mark.parametrize(
    ("requests", "most_tokens", "words"),
    [
        ([], 5, "no prompts: at least 1 is needed"),
        ([Request(messages="a", domain="a")], 0, "0 prompt tokens allowed"),
        ([Request(messages="", domain="a")], 5, "prompt 1 (domain 'a'): no token is left"),
        (
            [Request(messages=(("refused", "a"),), domain="a")],
            5,
            "prompt 1 (domain 'a'): the chat template refuses the roles refused: roles must alternate",
        ),
    ],
)
def test_what_cannot_be_tokenised_is_refused(requests: list[Request], most_tokens: int, words: str) -> None:
    """One line says which prompt and why."""
    with pytest.raises(PromptError) as caught:
        tokenize(requests, Letters(), most_tokens)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_real_tokenizer_opens_the_assistant_s_turn() -> None:
    """A transformers tokenizer with a chat template fits the protocol."""
    tokenizer = tiny.tokenizer()
    found, _ = tokenize([Request(messages=(("user", "hi"),), domain="a")], tokenizer, 100)
    assert tokenizer.decode(list(found[0].token_ids)) == "<|user|>hi<|end|><|assistant|>"
