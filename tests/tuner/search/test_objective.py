"""Candidate setups, and how drafts and lengths are spelled."""

import re

import pytest

from profiles.records.core import PLAIN, Draft, Model
from profiles.records.draft_spec import DraftSpec, parse_draft, parse_lengths, with_composites
from profiles.records.errors import InputError
from tests.support.policies import CODE_DRAFT, NGRAM
from tuner.search.objective import candidates


def test_plain_decoding_is_always_a_candidate() -> None:
    """Plain decoding comes first, then every draft at every length."""
    names = [setup.name for setup in candidates([CODE_DRAFT, NGRAM], [1, 4])]
    assert names == [
        "plain",
        "family/draft-code k=1",
        "family/draft-code k=4",
        "ngram:max=4,min=2 k=1",
        "ngram:max=4,min=2 k=4",
    ]
    assert candidates([], [1, 2]) == candidates([NGRAM], []) == (PLAIN,)


def test_the_same_weights_count_once() -> None:
    """A draft given twice, even under another name, is not measured twice."""
    assert CODE_DRAFT.model is not None
    copy = Draft(kind="model", model=Model(name="copy", dtype="float32", digest="bb" * 16, num_params=400_000))
    assert [setup.name for setup in candidates([CODE_DRAFT, copy], [2])] == ["plain", "family/draft-code k=2"]


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("3", (3,)),
        ("1-8", (1, 2, 3, 4, 5, 6, 7, 8)),
        ("4,1,2", (1, 2, 4)),
        ("1-3, 2-4,64", (1, 2, 3, 4, 64)),
        ("5-5", (5,)),
    ],
)
def test_lengths(text: str, lengths: tuple[int, ...]) -> None:
    """Single lengths, ranges and lists, sorted and distinct."""
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "0", "65", "1-65", "8-1", "a", "1,,2", "-3", "1-", "2.5", "1-2-3", "²", "1e1"])
def test_wrong_lengths(text: str) -> None:
    """Anything else is refused, naming the text and what is allowed."""
    with pytest.raises(InputError, match=re.escape(f"lengths {text!r}: ") + ".*(allowed is|within 1 to 64)"):
        parse_lengths(text)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("ngram", DraftSpec(kind="ngram", max_match=4, min_match=2)),
        ("ngram+a/draft", DraftSpec(kind="composite", path="a/draft", max_match=4, min_match=2)),
        ("ngram:max=6,min=1+x+y", DraftSpec(kind="composite", path="x+y", max_match=6, min_match=1)),
        ("a+b", DraftSpec(kind="model", path="a+b")),
        ("ngram:max=6", DraftSpec(kind="ngram", max_match=6, min_match=2)),
        ("ngram:min=1,max=3", DraftSpec(kind="ngram", max_match=3, min_match=1)),
        ("early-exit:4", DraftSpec(kind="early_exit", num_layers=4)),
        ("early-exits", DraftSpec(kind="model", path="early-exits")),
        ("./ngram", DraftSpec(kind="model", path="./ngram")),
        ("some-lab/some-model", DraftSpec(kind="model", path="some-lab/some-model")),
        ("C:/models/draft.gguf", DraftSpec(kind="model", path="C:/models/draft.gguf")),
    ],
)
def test_draft(text: str, spec: DraftSpec) -> None:
    """An n-gram look-up, an early exit, or else a path or hub id."""
    assert parse_draft(text) == spec


def test_draft_names_parse_back() -> None:
    """What a draft calls itself is what the command line takes."""
    assert parse_draft(NGRAM.name) == DraftSpec(kind="ngram", max_match=4, min_match=2)
    assert parse_draft(Draft(kind="early_exit", num_layers=7).name) == DraftSpec(kind="early_exit", num_layers=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "draft '': allowed are a model directory, .gguf file or hub id"),
        ("ngram:", "draft 'ngram:': '' is not one of max=N and min=N"),
        ("ngram:size=3", "draft 'ngram:size=3': 'size=3' is not one of max=N and min=N"),
        ("ngram:max=3,max=4", "draft 'ngram:max=3,max=4': 'max=4' is not one of max=N and min=N, each at most once"),
        ("ngram:max=many", "draft 'ngram:max=many': 'many' is not a whole number; allowed is max=N"),
        ("ngram:max=2,min=3", "ngram matches max=2,min=3: allowed are 1 <= min <= max"),
        ("ngram:min=0", "ngram matches max=4,min=0: allowed are 1 <= min <= max"),
        ("ngram+", "draft '': allowed are"),
        ("ngram+ngram", "draft 'ngram+ngram': behind the + a model or a method such as eagle:PATH is allowed"),
        ("ngram:size=3+a", "draft 'ngram:size=3+a': 'size=3' is not one of max=N and min=N"),
        ("early-exit", "draft 'early-exit': '' is not a whole number; allowed is early-exit:LAYERS"),
        ("early-exit:half", "draft 'early-exit:half': 'half' is not a whole number"),
        ("early-exit:0", "early-exit layers 0: at least 1 is needed"),
    ],
)
def test_wrong_draft(text: str, message: str) -> None:
    """A misspelt draft is refused, naming the part and what is allowed."""
    with pytest.raises(InputError, match=re.escape(message)):
        parse_draft(text)


def test_every_draft_model_gets_its_composite() -> None:
    """With the default look-up, and not twice when it was asked for."""
    specs = [parse_draft(text) for text in ("a", "ngram", "early-exit:2", "ngram+a", "b")]
    names = [spec.name for spec in with_composites(specs)]
    both = "ngram:max=4,min=2+"
    assert names == ["a", "ngram:max=4,min=2", "early-exit:2", f"{both}a", "b", f"{both}b"]


def test_a_composite_is_named_as_it_is_spelled() -> None:
    """Its parts are drafts of their own, and its identity is neither's."""
    assert CODE_DRAFT.model is not None
    composite = Draft(kind="composite", model=CODE_DRAFT.model, max_match=4, min_match=2)
    assert composite.name == "ngram:max=4,min=2+family/draft-code"
    assert composite.components == (NGRAM, CODE_DRAFT)
    assert len({composite.digest, NGRAM.digest, CODE_DRAFT.digest}) == 3
    spec = parse_draft(composite.name)
    assert (spec.kind, spec.path, spec.name) == ("composite", CODE_DRAFT.model.name, composite.name)
