"""Policies: what a file may hold, how a question is answered, and what a broken file says."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import InputError, PolicyError
from tests import ROOT
from tests.support.policies import (
    CODE_DRAFT,
    CREATED,
    EARLY_EXIT,
    ENVIRONMENT,
    NGRAM,
    TARGET,
    choice,
    forecast,
    measured,
    policy,
)
from tuner.policy.policy import Policy, from_json, read, to_json, write
from tuner.policy.query import MIXED
from tuner.selector.selector import Selector

ASSETS = ROOT / "tests" / "assets"
CODE4 = Setup(draft=CODE_DRAFT, length=4)
NGRAM2 = Setup(draft=NGRAM, length=2)
EXIT1 = Setup(draft=EARLY_EXIT, length=1)


def changed(path: tuple[str | int, ...], value: object) -> str:
    """The JSON of a one-choice policy with one value replaced; `...` removes the key."""
    raw = json.loads(to_json(policy(choice(CODE4))))
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(raw)


def grid() -> Policy:
    """Batches 1, 4 and contexts 512, 2048 over all domains; code at batch 1, context 512; temperature 0.7 once."""
    return policy(
        choice(CODE4),
        choice(NGRAM2, context_length=2048),
        choice(EXIT1, batch_size=4),
        choice(PLAIN, batch_size=4, context_length=2048),
        choice(Setup(draft=CODE_DRAFT, length=8), domain="code"),
        choice(Setup(draft=CODE_DRAFT, length=3), temperature=0.7, top_p=0.9, top_k=40),
    )


@given(
    st.lists(
        st.builds(
            choice,
            st.sampled_from([PLAIN, CODE4, NGRAM2, EXIT1, Setup(draft=CODE_DRAFT, length=2, stop_below=0.4)]),
            batch_size=st.integers(1, 4096),
            context_length=st.integers(1, 10**6),
            domain=st.sampled_from([MIXED, "code", "prosa é"]),
            temperature=st.floats(0.0, 10.0),
            evidence=st.lists(st.text(), max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda one: (one.batch_size, one.context_length, one.domain, one.temperature),
    )
)
def test_round_trip(choices: list) -> None:
    """A policy survives its JSON form unchanged, whatever its choices are."""
    whole = policy(choice(), *(one for one in choices if one.context_length != 512))
    assert from_json(to_json(whole)) == whole


def test_file_round_trip(tmp_path: Path) -> None:
    """Writing replaces the file in one step and leaves nothing beside it; the text is stable and compact."""
    path = tmp_path / "policy.json"
    write(path, policy())
    write(path, grid())
    assert read(path) == grid()
    assert [one.name for one in tmp_path.iterdir()] == ["policy.json"]
    text = path.read_text()
    assert text == to_json(grid())
    assert text.startswith('{"version":4,"created":"2026-11-21T09:30:00+00:00","target":{"name":')
    assert text.endswith("}\n")


def with_current_names(text: str) -> str:
    """A file of versions 1 to 3 with the keys of version 4."""
    names = ("partings", "divergences"), ("kept", "acceptance"), ("times", "round_times"), ("hit", "propose_prob")
    for old, new in (*names, ("keep", "accept_probs"), ("per_round", "mean_tokens")):
        text = re.sub(rf'"(num_)?{old}":', rf'"\g<1>{new}":', text)
    return text


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_of_earlier_versions_are_read(version: int) -> None:
    """A kept file of each, made by the code of its time, gives the answers that code gave; every value is read."""
    old = read(ASSETS / f"policy-v{version}.json")
    answers = json.loads((ASSETS / "policy-answers.json").read_text())["answers"]
    for batch_size, context_length, domain, temperature, name, matched in answers:
        answer = old.look_up(
            batch_size=batch_size, context_length=context_length, domain=domain, temperature=temperature
        )
        assert (answer.choice.setup.name, answer.matched) == (name, matched)
    assert not any(choice.out_of_time for choice in old.choices)
    assert (old.prior is None) == (version < 3)
    written = json.loads(to_json(old))
    text = with_current_names((ASSETS / f"policy-v{version}.json").read_text())
    assert without_added(written) == without_added(json.loads(text))


def without_added(raw: object) -> object:
    """JSON without the version, and without keys of later versions that hold nothing."""
    if isinstance(raw, dict):
        empty = (None, [], False)
        return {key: without_added(value) for key, value in raw.items() if key != "version" and value not in empty}
    return [without_added(value) for value in raw] if isinstance(raw, list) else raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 5, "policy version 5 is newer than version 4, which this draftpick reads: upgrade"),
        (("version",), 0, "policy: version 0: this draftpick reads 4"),
        (("version",), True, "policy.version is true: Expected `int`"),
        (("created",), "yesterday", "policy: created 'yesterday': a UTC time like 2026-01-31T12:00:00+00:00 is needed"),
        (("created",), "2026-11-21T09:30:00", "policy: created '2026-11-21T09:30:00': a UTC time"),
        (("target", "num_params"), 1.5, "policy.target.num_params is 1.5: Expected `int`"),
        (("target", "dtype"), "int3", "policy.target: dtype 'int3': allowed are float32, bfloat16, float16"),
        (("environment",), None, "policy.environment is null: Expected `object`"),
        (("choices",), {}, "policy.choices is {}: Expected `array`"),
        (("choices",), [], "policy: no choice of domain 'mixed'"),
        (("choices", 0, "sped"), 1, "policy.choices[0]: unknown key 'sped'; allowed are batch_size, "),
        (("choices", 0, "reason"), ..., "policy.choices[0]: Object missing required field `reason`"),
        (("choices", 0, "top_p"), 0, "policy.choices[0]: top-p 0.0: allowed are fractions above 0, up to 1"),
        (("choices", 0, "batch_size"), 0, "policy.choices[0]: batch size 0: whole numbers from 1 are allowed"),
        (("choices", 0, "temperature"), "hot", 'policy.choices[0].temperature is "hot": Expected `float`'),
        (("choices", 0, "temperature"), float("nan"), "policy is not a JSON document: JSON is malformed"),
        (("choices", 0, "proven"), "yes", 'policy.choices[0].proven is "yes": Expected `bool`'),
        (("choices", 0, "measured"), None, "policy.choices[0]: setup 'family/draft-code k=4' is called proven"),
        (("choices", 0, "evidence"), [1], "policy.choices[0].evidence[0] is 1: Expected `str`"),
        (("choices", 0, "reason"), "", "policy.choices[0]: a choice without a reason: one sentence is needed"),
        (("choices", 0, "setup", "length"), 0, "policy.choices[0].setup: speculation length 0"),
        (
            ("choices", 0, "setup", "draft", "kind"),
            "oracle",
            'policy.choices[0].setup.draft.kind is "oracle": Invalid enum value',
        ),
    ],
)
def test_broken_field(path: tuple[str | int, ...], value: object, message: str) -> None:
    """A wrong, unknown or missing value is refused in one line that names the field, the value and what is allowed."""
    with pytest.raises(PolicyError, match=re.escape(message)) as caught:
        from_json(changed(path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"policy"', "{}", "[" * 100_000, "\ufeff{}"])
def test_not_a_policy(text: str, tmp_path: Path) -> None:
    """Any other text is refused in one line that names the file."""
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicyError, match=re.escape(f"policy file {path}: ")) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_unreadable_file(tmp_path: Path) -> None:
    """A missing file, a folder and bytes that are no text are refused, naming the path."""
    with pytest.raises(PolicyError, match=r"nowhere\.json cannot be read: No such file"):
        read(tmp_path / "nowhere.json")
    with pytest.raises(PolicyError, match="cannot be read: Is a directory"):
        read(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match=r"bytes\.json: 'utf-8' codec"):
        read(tmp_path / "bytes.json")


def test_unwritable_file(tmp_path: Path) -> None:
    """Writing into a missing folder, or over a folder, is refused and leaves no half-written file."""
    with pytest.raises(PolicyError, match="cannot be written: No such file"):
        write(tmp_path / "missing" / "policy.json", policy())
    (tmp_path / "folder").mkdir()
    with pytest.raises(PolicyError, match="cannot be written: Is a directory"):
        write(tmp_path / "folder", policy())
    with pytest.raises(PolicyError, match="cannot be written: Is a directory"):
        write("", policy())
    assert [one.name for one in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setup": PLAIN}, "setup 'plain' is called proven"),
        ({"measured": None}, "setup 'family/draft-code k=4' is called proven"),
        ({"measured": measured(NGRAM2)}, "setup 'family/draft-code k=4' is called proven"),
        ({"domain": ""}, "a choice without a domain"),
        ({"temperature": float("inf")}, "temperature inf: allowed are 0"),
        ({"top_k": -1}, "top-k -1"),
    ],
)
def test_choice_validates(changes: dict[str, object], message: str) -> None:
    """Only a drafting setup with its own measurement can be called proven, and no value is out of range."""
    with pytest.raises(InputError, match=re.escape(message)):
        choice(CODE4, **changes)


def test_plain_keeps_the_losers_figures() -> None:
    """Plain decoding may carry the measurement of the setup that failed to beat it, unproven."""
    kept = choice(PLAIN, measured=measured(CODE4, 1.01))
    assert kept.measured is not None
    assert not kept.proven


def test_policy_validates() -> None:
    """One choice per operating point, and one top-p and top-k per temperature."""
    with pytest.raises(InputError, match=re.escape("(1, 512, 'mixed', 0.0)")):
        policy(choice(), choice(CODE4))
    with pytest.raises(InputError, match=re.escape("temperature 0 with (top-p, top-k) = (0.9, 0) and (1.0, 0)")):
        policy(choice(), choice(batch_size=2, top_p=0.9))
    with pytest.raises(InputError, match="version 3: this draftpick reads 4"):
        Policy(version=3, created=CREATED, target=TARGET, environment=ENVIRONMENT, choices=(choice(),))


@pytest.mark.parametrize(
    ("question", "name", "rule"),
    [
        ({}, "ngram:max=4,min=2 k=2", "measured on mixed prompts at batch 1, context 2048"),
        ({"context_length": 1}, "family/draft-code k=4", "measured on mixed prompts at batch 1, context 512"),
        ({"context_length": 512}, "family/draft-code k=4", "measured on mixed prompts at batch 1, context 512"),
        ({"context_length": 513}, "ngram:max=4,min=2 k=2", "measured on mixed prompts at batch 1, context 2048"),
        (
            {"batch_size": 2, "context_length": 9},
            "early-exit:3 k=1",
            "measured on mixed prompts at batch 4, context 512",
        ),
        ({"batch_size": 2}, "plain", "measured on mixed prompts at batch 4, context 2048"),
        ({"domain": "code", "context_length": 9}, "family/draft-code k=8", "measured on code prompts at batch 1, "),
        ({"domain": "code", "context_length": 600}, "ngram:max=4,min=2 k=2", "measured on mixed prompts at batch 1, "),
        ({"domain": "legal", "context_length": 9}, "family/draft-code k=4", "measured on mixed prompts at batch 1, "),
        ({"temperature": 9e-6}, "ngram:max=4,min=2 k=2", "measured on mixed prompts at batch 1, context 2048"),
        ({"temperature": 0.7 + 5e-7}, "family/draft-code k=3", "measured on mixed prompts at batch 1, context 512"),
    ],
)
def test_look_up_finds(question: dict[str, object], name: str, rule: str) -> None:
    """The domain's own choice, else the mixed one, at the smallest measured batch and context that cover it."""
    answer = grid().look_up(**question)  # type: ignore[arg-type]
    assert answer.matched
    assert answer.choice.setup.name == name
    assert answer.rule.startswith(rule)


@pytest.mark.parametrize(
    ("question", "rule"),
    [
        ({"temperature": 0.70001}, "temperature 0.70001 was not measured, only 0, 0.7"),
        ({"batch_size": 5}, "batch size 5 is beyond the largest measured, 4"),
        ({"batch_size": 2, "temperature": 0.7}, "batch size 2 is beyond the largest measured, 1"),
        ({"context_length": 2049}, "context 2049 is beyond the longest measured at this batch size, 2048"),
    ],
)
def test_look_up_falls_back(question: dict[str, object], rule: str) -> None:
    """What no measurement covers is answered with plain decoding, and the rule that fired is named."""
    answer = grid().look_up(**question)  # type: ignore[arg-type]
    assert not answer.matched
    assert answer.choice.setup == PLAIN
    assert answer.rule == rule
    assert answer.choice.reason == f"Plain decoding, because {rule}."


def test_look_up_of_a_domain_measured_alone() -> None:
    """Without a mixed choice at the temperature, an unknown domain is answered with plain decoding."""
    only_code = policy(choice(), choice(CODE4, domain="code", temperature=0.7))
    assert only_code.look_up(temperature=0.7, domain="code").choice.setup == CODE4
    assert only_code.look_up(temperature=0.7).rule == "domain 'mixed' was not measured at temperature 0.7"


@pytest.mark.parametrize(
    "question",
    [{"batch_size": 0}, {"batch_size": 1.5}, {"context_length": 0}, {"temperature": float("nan")}, {"temperature": -1}],
)
def test_look_up_refuses_the_impossible(question: dict[str, object]) -> None:
    """A batch, context or temperature that cannot exist is an error, not plain decoding."""
    with pytest.raises(InputError, match="allowed"):
        grid().look_up(**question)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wins", "crossover"),
    [
        ({1: True, 4: True, 16: False, 64: False}, 16),
        ({1: True, 4: False, 16: True}, None),
        ({1: False, 4: False}, 1),
        ({1: False}, 1),
        ({1: True}, None),
    ],
)
def test_crossover_batch(wins: dict[int, bool], crossover: int | None) -> None:
    """Where plain decoding starts to be the choice for good, over all domains and at every context."""
    rows = [choice(NGRAM2 if won else PLAIN, batch_size=size) for size, won in wins.items()]
    assert policy(*rows).crossover_batch == crossover
    assert policy(*rows, choice(CODE4, batch_size=99, domain="code")).crossover_batch == crossover
    last = max(wins)
    assert policy(*rows, choice(NGRAM2, batch_size=last, context_length=4096)).crossover_batch is None


def test_what_was_not_decided_is_no_crossover() -> None:
    """A run whose budget ended before the larger batch says nothing of it."""
    undecided = choice(PLAIN, batch_size=16, evidence=())
    assert policy(choice(NGRAM2), undecided).crossover_batch is None
    assert policy(choice(PLAIN), undecided).crossover_batch == 1


def test_what_the_budget_left_undecided_answers_nothing() -> None:
    """A domain's row without a decision gives way to the proven row over all domains, and ends no crossover."""
    code = choice(PLAIN, domain="code", forecast=forecast(CODE4), out_of_time=True)
    large = choice(PLAIN, batch_size=8, forecast=forecast(CODE4), out_of_time=True)
    cut = policy(choice(NGRAM2), code, large)
    answer = cut.look_up(domain="code")
    assert (answer.choice.setup, answer.rule) == (NGRAM2, "measured on mixed prompts at batch 1, context 512")
    answer = cut.look_up(batch_size=8)
    assert not answer.matched
    assert answer.rule == "the run's budget ended before mixed prompts at batch 8, context 512 were decided"
    assert cut.crossover_batch is None
    assert Selector(cut).choose(domain="code").setup == NGRAM2
    assert not Selector(cut).choose(batch_size=8).covered
    assert from_json(to_json(cut)) == cut


def test_between_measured_contexts_nothing_is_proven() -> None:
    """The choice at the longer one answers, and says so; at and below the measured ones it is as proven as it was."""
    answer = grid().look_up(context_length=600)
    assert answer.choice.setup == NGRAM2
    assert not answer.choice.proven
    assert answer.rule == (
        "measured on mixed prompts at batch 1, context 2048; context 600 lies between it and 512, so nothing is proven"
    )
    for context_length in (None, 100, 512, 2048):
        assert grid().look_up(context_length=context_length).choice.proven


def test_an_unknown_context_is_taken_for_the_longest_of_all() -> None:
    """Also where only a larger batch was measured at it."""
    rows = policy(choice(CODE4), choice(NGRAM2, batch_size=4, context_length=2048))
    assert rows.look_up().choice.setup == NGRAM2
    assert rows.look_up(context_length=512).choice.setup == CODE4
