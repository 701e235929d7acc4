"""Chat templates: tools, dates, lost text, faults; tokens beyond the embedding; samples."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from profiles.prompts import Request, Requests, read, read_all, sample, tokenize
from profiles.records.errors import PromptError
from tests.profiles.prompts.test_reader import write
from tests.support import tiny

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOOLS = "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}" + (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %} CALL {{ call.function.name }} {{ call.function.arguments.city }}"
    "{% endfor %}\n{% endfor %}"
)
AGENT = {
    "messages": [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "18C"},
    ],
    "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}],
}


def tokenizer(template: str) -> Any:
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def rendered(requests: list[Request], template: str) -> tuple[list[str], list[str]]:
    """What a model is given, and the warnings."""
    made = tokenizer(template)
    prompts, warnings = tokenize(requests, made, 1000)
    return [made.decode(list(prompt.token_ids)) for prompt in prompts], warnings


def user(text: str) -> Request:
    return Request(messages=(("user", text),), domain="a")


def test_tools_and_tool_calls_reach_the_template(tmp_path: Path) -> None:
    """With the arguments as an object, as templates expect them; OpenAI sends them as text."""
    texts, warnings = rendered(read(write(tmp_path / "agent.jsonl", AGENT)), TOOLS)
    assert texts[0].startswith('TOOLS [{"type": "function", "function": {"name": "get_weather"')
    assert "CALL get_weather Rome" in texts[0]
    assert "tool: 18C" in texts[0]
    assert warnings == []


def test_a_line_of_a_batch_file_is_read(tmp_path: Path) -> None:
    """OpenAI's batches hold the request in `body`, of chats and of responses."""
    chat = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": AGENT}
    plain = {"custom_id": "2", "body": {"model": "m", "input": "hello"}}
    requests = read(write(tmp_path / "batch.jsonl", chat, plain))
    assert [request.messages[0][1] for request in requests] == ["weather?", "hello"]  # type: ignore[union-attr]
    assert len(requests[0].tools) == 1


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', ["a"]),
        ('[{"role": "user", "content": "a"}]\n[{"role": "user", "content": "b"}]', ["a", "b"]),
        ('{"data": [{"prompt": "a"}, {"prompt": "b"}]}', ["a", "b"]),
        ('{\n  "prompt": "a"\n}', ["a"]),
        ('["a", "b"]', ["a", "b"]),
        ('{"prompt": "a"}\n{"prompt": "b"}', ["a", "b"]),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}', ["a"]),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": []}', ["a"]),
        ('{"conversations": [{"role": "user", "content": "a"}]}', ["a"]),
        ('{"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]}', ["a"]),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}', ["a"]),
    ],
)
@pytest.mark.parametrize("name", ["set.json", "set.jsonl", "set.txt", "set"])
def test_formats_are_recognised_by_content(tmp_path: Path, content: str, texts: list[str], name: str) -> None:
    """Whatever the file is called."""
    (tmp_path / name).write_text(content)
    requests = read(str(tmp_path / name))
    assert [request.messages[0][1] for request in requests] == texts  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("label", "domain"),
    [
        (7, "7"),
        (1.5, "1.5"),
        ("a\u000bb", "a b"),
        (" \u202e ", "set"),
        (["x"], "set"),
        (None, "set"),
        ("\ud83d", "set"),
    ],
)
def test_domains_are_one_line_that_can_be_shown(tmp_path: Path, label: object, domain: str) -> None:
    """They end up in terminals, pages and file names; a label that cannot be one is no fault of the prompt."""
    (request,) = read(write(tmp_path / "set.jsonl", {"text": "a", "category": label}))
    assert request.domain == domain


DATED = "\n  {% if true %}{{ strftime_now('%d %b %Y') }} {% endif %}" + PLAIN
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("template", "text"), [(DATED, "\n01 Jan 2025 user: hello\n"), (PARTS, "hello")])
def test_dates_are_fixed_and_parts_are_read(template: str, text: str) -> None:
    """A prompt is the same tomorrow; in a template that reads lists of parts a text would vanish letter by letter."""
    assert rendered([user("hello")], template)[0] == [text]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("nothing", "the chat template leaves out the text of its last message"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ nonesuch.field }}", "nonesuch"),
    ],
)
def test_a_template_s_faults_are_one_line(template: str, words: str) -> None:
    """It is a program that came with the model."""
    with pytest.raises(PromptError) as caught:
        rendered([user("hello")], template)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_that_the_template_refuses_is_skipped() -> None:
    """One system role does not decide over a file."""
    system = Request(messages=(("system", "be brief"), ("user", "c")), domain="a")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
    texts, warnings = rendered([user("a"), user("b"), system], template)
    assert len(texts) == 2
    (warning,) = warnings
    assert warning.startswith("1 of 3 prompts cannot be used and were skipped: prompt 3 (domain 'a'): ")
    assert "no system role" in warning


def test_a_prompt_with_a_token_beyond_the_embedding_is_skipped() -> None:
    """The model has no row for it; the other prompts are fine."""
    made = tokenizer(PLAIN)
    ids = max(tokenize([user("zz")], made, 100)[0][0].token_ids)
    with pytest.raises(PromptError, match="beyond the 1 rows of the model's embedding"):
        tokenize([user("zz")], made, 100, vocab_size=1)
    assert tokenize([user("zz")], made, 100, vocab_size=ids + 1)[1] == []


def test_skipped_rows_are_among_the_warnings(tmp_path: Path) -> None:
    """Of every source."""
    first = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": 3})
    second = write(tmp_path / "b.jsonl", {"text": "b"})
    _, warnings = tokenize(read_all([first, second]), tokenizer(PLAIN), 100)
    assert warnings == [
        f"prompts {first!r}: 1 of 2 rows cannot be used and were skipped: line 2: field 'text': 3 is not text"
    ]


def test_a_sample_is_even_over_domains_and_repeatable() -> None:
    """Small domains are used up, the order stays, another seed draws others."""
    requests = Requests(
        [
            Request(messages=f"{domain}{number}", domain=domain)
            for domain, size in (("a", 50), ("b", 2), ("c", 50))
            for number in range(size)
        ],
        ["skipped"],
    )
    chosen = sample(requests, 12, seed=0)
    assert Counter(request.domain for request in chosen) == {"a": 5, "b": 2, "c": 5}
    assert chosen == sample(requests, 12, seed=0)
    assert chosen != sample(requests, 12, seed=1)
    assert chosen == sorted(chosen, key=requests.index)
    assert chosen.skipped == ["skipped"]
    assert len(sample(requests, 1000, seed=0)) == 102
    with pytest.raises(PromptError, match="num-prompts 0"):
        sample(requests, 0, seed=0)
